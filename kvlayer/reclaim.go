package kvlayer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"slices"
	"sync"

	"github.com/kvof/kvof/uring"
)

// reclaimOne makes one segment of d free, if one is wanted; false if not, or if there is none, which
// it tells those who asked.
func (d *device) reclaimOne(asks uint64) bool {
	p := d.p
	p.mu.Lock()
	g, all, again := d.victim()
	if g == nil {
		enough := d.enough()
		if enough {
			p.notify()
		}
		p.mu.Unlock()
		if !again && !enough {
			d.giveUp(asks)
		}
		return again
	}
	s := g.store
	o := s.o
	p.mu.Unlock()
	err := d.reclaim(g, s, o, all)
	if err == nil {
		s.c.cleaned.Add(1)
		return true
	}
	if err == errChanged {
		return true
	}
	if !errors.Is(err, errFull) && !errors.Is(err, ErrClosed) {
		p.log.Error("cannot reclaim a segment", "member", d.member, "offset", g.off, "error", err)
	}
	d.giveUp(asks)
	return false
}

// enough tells that those who wait for room may take a segment: what came free was taken by others, or they have not yet
// looked. Under Pool.mu.
func (d *device) enough() bool {
	for _, s := range d.p.stores {
		if s.waiting > 0 && s.used.Load()+d.want > s.limit() {
			return false
		}
	}
	return len(d.free) > d.reserve()
}

// victim chooses a segment to reclaim, and tells whether all that lives in it is to
// be kept. In this order: one in which nothing lives; one of a store that is over its
// quota; when segments run short, one of the store furthest above its share, or of one that
// waits for room itself; when there are none, the one with least in it that cleaning makes
// room from; or again: an open segment was ended, which is to be sealed first. Under Pool.mu.
func (d *device) victim() (v *segment, all, again bool) {
	p := d.p
	d.busy = false
	oldest := make(map[*Store]*segment)
	var least *segment
	free := len(d.free)
	for i := range d.segs {
		g := &d.segs[i]
		switch {
		case g.state == segmentDraining:
			free++
			d.busy = true
		case g.writers > 0 || g.state == segmentFull:
			d.busy = true
		case g.state != segmentSealed:
		case g.live.Load() == 0:
			return g, true, false
		default:
			if o := oldest[g.store]; o == nil || g.before(o) {
				oldest[g.store] = g
			}
			if least == nil || g.live.Load() < least.live.Load() {
				least = g
			}
		}
	}
	for _, s := range p.stores {
		slack := min(2*p.super.segSize, s.o.Quota/8)
		if s.o.Quota == 0 || !s.evicts() {
			continue
		}
		if g := oldest[s]; g != nil && s.used.Load() > s.o.Quota-slack {
			return g, false, false
		}
		if s.waiting > 0 && s.used.Load() > s.o.Quota-slack && !s.sealed() {
			again = d.retireOpen(s) || again
		}
	}
	if again {
		return nil, false, true
	}
	d.urgent = free < d.low() || d.urgent && free < d.high()
	if !d.urgent {
		return nil, false, false
	}
	over := int64(0)
	for s, g := range oldest {
		if x := s.used.Load() - s.o.Share; s.evicts() && x >= g.live.Load() && (v == nil || x > over) {
			v, over = g, x
		}
	}
	if v != nil {
		return v, false, false
	}
	if d.want == 0 || free > d.reserve() {
		return nil, false, false
	}
	for s, g := range oldest {
		if s.waiting > 0 && s.evicts() {
			return g, false, false
		}
	}
	if least != nil && free > 0 && least.live.Load()+d.want <= p.usable() {
		return least, true, false
	}
	// Last, what is in the open segments of those who may evict, or is dead in them.
	for _, s := range p.stores {
		for _, g := range d.open[s.tenant] {
			if g == nil || g.tail == block {
				continue
			}
			evict := s.evicts() && (s.used.Load()-s.o.Share >= g.live.Load() || s.waiting > 0)
			if evict || free > 0 && g.live.Load()+d.want <= p.usable() && !g.fits(d.want) {
				d.retire(g)
				return nil, false, true
			}
		}
	}
	return nil, false, false
}

// before orders the segments of a store by when they are reclaimed: the oldest
// first; under S3-FIFO those of new values while they have more than a tenth.
func (g *segment) before(o *segment) bool {
	if g.store.o.Eviction == EvictS3FIFO && g.class != o.class {
		small := g.store.small.Load()*10 > g.store.held.Load()
		return (g.class == classNew) == small
	}
	return g.gen < o.gen
}

// sealed tells that s has something to reclaim on some device. Under Pool.mu.
func (s *Store) sealed() bool {
	for _, d := range s.p.devs {
		for i := range d.segs {
			if g := &d.segs[i]; g.store == s && (g.state == segmentSealed || g.state == segmentFull) {
				return true
			}
		}
	}
	return false
}

// retireOpen ends the segments that s writes to on d. Under Pool.mu.
func (d *device) retireOpen(s *Store) (some bool) {
	for _, g := range d.open[s.tenant] {
		if g != nil && g.live.Load() > 0 {
			d.retire(g)
			some = true
		}
	}
	return some
}

// move is a record on its way out of a segment being reclaimed.
type move struct {
	e      entry
	to     place
	pinned bool // as the copy says
}

// dead is what is to lie in the copy's place when it is given up.
func (m *move) dead(from uint64) record {
	return record{kind: recordDead, part: m.e.part(), key: m.e.key(), off: m.to.off, gen: m.to.gen, seq: m.e.seq(), from: from, size: m.e.size()}
}

// setPinned has a copy say what the original says by now.
func (m *move) setPinned(sl *slot, on bool) error {
	m.to.seg.meta.Lock()
	defer m.to.seg.meta.Unlock()
	return m.to.seg.setPinned(sl, m.e, m.to.off, on)
}

// cancel gives up a copy from the segment of a generation: no recovery may take it for a value.
func (m *move) cancel(sl *slot, s *Store, from uint64) error {
	g := m.to.seg
	dead := m.dead(from)
	err := g.writeRecord(sl, dead, nil)
	if err != nil {
		s.strays.add(g, dead)
	}
	g.meta.Lock()
	g.log = slices.DeleteFunc(g.log, func(r record) bool { return r.off == m.to.off })
	g.meta.Unlock()
	s.p.mu.Lock()
	m.to.giveBack(s.span(m.e), true)
	s.p.mu.Unlock()
	return err
}

// eviction is a value that goes with its segment.
type eviction struct {
	e   entry
	why reason
}

// reclaim makes g, which is sealed, free: it copies what is to be kept to a log of
// the same device, marks g free on the device, and only then has the index name the
// copies and forget the rest. The copies do not count for a recovery while g is in use.
func (d *device) reclaim(g *segment, s *Store, o Options, all bool) (err error) {
	p := d.p
	sl, err := p.slot()
	if err != nil {
		return err
	}
	defer p.putSlot(sl)
	var moves []move
	var evicted []eviction
	defer func() {
		for _, m := range moves { // what is left of them could not be moved
			err = errors.Join(err, m.cancel(sl, s, g.gen))
		}
	}()

	var live []record
	if g.live.Load() > 0 {
		if live, err = g.liveRecords(&sl.op, d.copy.Data); err != nil {
			return err
		}
	}
	budget := p.usable() * 3 / 4 // so that a round of reclaiming makes room, whatever has been read
	for _, r := range live {
		e, ok := s.index.get(r.key, r.part, 0)
		if _, off := p.segmentOf(e.block()); !ok || e.seq() != r.seq || off != r.off || e.block() < g.base || e.block() >= g.base+p.per {
			continue
		}
		c, keep := s.keeps(e, o, g)
		if c == classHot {
			c = d.hot()
		}
		if n := s.span(e); keep || all {
			all := all || s.pinned(e)
			if all || n <= budget {
				m, err := d.copyOut(sl, g, s, e, c)
				switch {
				case err == nil:
					budget -= n
					moves = append(moves, m)
					continue
				case err == errChanged:
					continue
				case err == errBuried:
					evicted = append(evicted, eviction{e, reasonDelete})
					continue
				case errors.Is(err, ErrCorrupt), errors.Is(err, uring.ErrMedia):
					evicted = append(evicted, eviction{e, reasonCorrupt})
					continue
				case all:
					return err
				}
			}
		}
		why := reasonCapacity
		if o.TTL > 0 && age(e.seq()) > o.TTL {
			why = reasonExpired
		}
		evicted = append(evicted, eviction{e, why})
	}
	evicted = d.unlisted(g, s, evicted, moves)
	if err := s.strays.bury(sl, func(t *stray) bool { return t.rec.from == g.gen }); err != nil {
		return err
	}
	if err := d.sync(); err != nil { // the copies, and the end of those given up before, are durable before the originals go
		return err
	}

	g.meta.Lock()
	defer g.meta.Unlock()
	for _, v := range evicted { // Pin waits for meta, and then looks whether the value is still there
		if (v.why == reasonCapacity || v.why == reasonExpired) && s.pinned(v.e) {
			return errChanged
		}
	}
	canceled := false
	for i := 0; i < len(moves); {
		m := moves[i]
		if now, ok := s.index.get(m.e.key(), m.e.part(), 0); ok && now.same(m.e) {
			if now.pinned() != m.pinned {
				if err := m.setPinned(sl, now.pinned()); err != nil {
					return err
				}
			}
			i++
			continue
		}
		moves = slices.Delete(moves, i, i+1) // replaced or deleted meanwhile
		canceled = true
		if err := m.cancel(sl, s, g.gen); err != nil {
			return err
		}
	}
	if canceled {
		if err := d.sync(); err != nil { // no copy of what is gone may count
			return err
		}
	}
	if o.Log.Enabled(context.Background(), slog.LevelDebug) { // before it is so: who misses a value finds it in the log
		for _, v := range evicted {
			if v.why == reasonDelete {
				continue
			}
			o.Log.Debug("evicted", "key", v.e.key(), "size", v.e.size(), "reason", v.why)
		}
	}
	if err := g.writeHeader(sl, true); err != nil {
		return errors.Join(err, g.writeHeader(sl, false))
	}
	if err := d.sync(); err != nil { // it is free for good before anything is written there; there is no way back
		p.log.Error("cannot flush", "member", d.member, "error", err)
	}
	for _, m := range moves {
		n := s.span(m.e)
		moved := s.index.update(m.e, func(e *entry) {
			e.place = uint64(m.to.block())<<sizeBits | uint64(e.size())
			if e.meta&entryTouches != 0 { // it has been rewarded
				if e.meta -= entryTouch; o.Eviction == EvictS3FIFO && g.class == classNew {
					e.meta &^= entryTouches
				}
			}
		})
		p.mu.Lock()
		if moved {
			m.to.seg.done(n)
			g.live.Add(-n)
			s.c.moved.Add(uint64(n))
		} else { // a part of a value that was replaced: without its first part it counts nowhere
			m.to.giveBack(n, true)
		}
		p.mu.Unlock()
	}
	moves = nil
	for _, v := range evicted {
		if s.drop(v.e, v.why) && s.ghost != nil && o.Eviction == EvictS3FIFO && g.class == classNew {
			s.ghost.learn(s.index, v.e.key())
		}
	}
	g.fence = nil
	p.mu.Lock()
	g.state = segmentDraining
	s.hold(g.class, -p.super.segSize)
	p.mu.Unlock()
	return nil
}

// hold counts the segments that s has. Under Pool.mu.
func (s *Store) hold(c class, n int64) {
	s.held.Add(n)
	if c == classNew {
		s.small.Add(n)
	}
}

// keeps decides about a value in a segment of class c that is reclaimed, and for
// which class it has qualified.
func (s *Store) keeps(e entry, o Options, g *segment) (class, bool) {
	head, c := e, g.class
	if e.part() > 0 { // its first part decides for all
		var ok bool
		if head, ok = s.index.get(e.key(), 0, 0); !ok || head.seq() != e.seq() {
			return c, false
		}
		if h, _ := s.p.segmentOf(head.block()); h != g && h.class == h.dev.hot() && h.gen > g.gen { // it has been spared
			return classHot, true
		}
	}
	switch {
	case s.pinned(e):
		return classHot, true
	case o.TTL > 0 && age(e.seq()) > o.TTL:
		return c, false
	}
	switch o.Eviction {
	case EvictClock, EvictSecondTouch:
		return classHot, head.touches() > 0
	case EvictS3FIFO:
		if c == classNew {
			return classHot, head.touches() > 1
		}
		return classHot, head.touches() > 0
	}
	return c, o.Eviction == EvictNever
}

// pinned tells that the value that e is a part of is pinned, as its first part says.
func (s *Store) pinned(e entry) bool {
	head, ok := s.index.get(e.key(), 0, 0)
	return ok && head.seq() == e.seq() && head.pinned()
}

// unlisted adds to evicted what the index has in g and its records did not show: a
// damaged header hides a record. The index is searched only if the accounts differ.
func (d *device) unlisted(g *segment, s *Store, evicted []eviction, moves []move) []eviction {
	known := int64(0)
	seen := make(map[uint64]bool, len(moves)+len(evicted)) // by block
	mark := func(e entry) {
		known += s.span(e)
		seen[uint64(e.block())] = true
	}
	for _, m := range moves {
		mark(m.e)
	}
	for _, v := range evicted {
		mark(v.e)
	}
	if known < g.live.Load() {
		s.index.each(func(es []entry) bool {
			for _, e := range es {
				if b := e.block(); b >= g.base && b < g.base+d.p.per && !seen[uint64(b)] {
					evicted = append(evicted, eviction{e, reasonCorrupt})
				}
			}
			return true
		})
	}
	return evicted
}

// copyOut copies e's record out of g to the log of a class.
func (d *device) copyOut(sl *slot, g *segment, s *Store, e entry, c class) (m move, err error) {
	p := d.p
	n := s.span(e)
	m.e = e
	for ok := false; !ok; {
		p.mu.Lock()
		m.to, ok = d.take(s, c, n)
		p.mu.Unlock()
		if !ok {
			if err := d.advance(sl, s, c, n, true); err != nil {
				return m, err
			}
		}
	}
	_, from := p.segmentOf(e.block())
	written, err := d.copyRecord(sl, g, &m, from, n)
	if err != nil {
		if written {
			s.strays.add(m.to.seg, m.dead(g.gen))
		}
		p.mu.Lock()
		m.to.giveBack(n, true)
		p.mu.Unlock()
	}
	return m, err
}

// copyRecord copies the value's data as it is, its checksums go with it, and then its header. written tells that a header may
// lie there, whatever the error.
func (d *device) copyRecord(sl *slot, g *segment, m *move, from, n int64) (written bool, err error) {
	p, e, to := d.p, m.e, m.to
	for at := int64(block); at < n; {
		step := min(n-at, uring.LargeBuf)
		b, err := d.read(&sl.op, d.copy.Data, from+at, step)
		if errors.Is(err, uring.ErrMedia) {
			d.unreadable(g, e, from+at, err)
			return false, err
		} else if err != nil {
			return false, err
		}
		if p.mem {
			copy(d.View(to.off+at, step), b)
		} else {
			sl.op.Kind, sl.op.Off, sl.op.Data, sl.op.Placement = uring.OpWrite, to.off+at, b, d.placement(g.store, to.seg.class)
			if err := d.failed(sl.op.Do(d.Device)); err != nil {
				return false, err
			}
		}
		at += step
	}
	r, sums, err := g.header(sl, e, from)
	if err != nil {
		return false, err
	}
	r.off, r.gen, r.from = to.off, to.gen, g.gen
	m.pinned = r.pinned
	if err := to.seg.writeRecord(sl, r, sums); err != nil {
		return true, err
	}
	to.seg.meta.Lock() // counted by recoveries when g is free
	to.seg.log = append(to.seg.log, r)
	to.seg.meta.Unlock()
	return true, nil
}

// errBuried tells that a record's header is marked dead, and the summary and the index do not know: a crash or a failed write
// came in between.
var errBuried = errors.New("kvlayer: value was deleted")

// header reads the header of e, at off in g: errChanged if the value was replaced or deleted meanwhile.
func (g *segment) header(sl *slot, e entry, off int64) (record, []uint64, error) {
	d, p := g.dev, g.dev.p
	g.meta.Lock() // whoever marks it dead holds this until the index has forgotten it
	defer g.meta.Unlock()
	if now, ok := g.store.index.get(e.key(), e.part(), 0); !ok || !now.same(e) {
		return record{}, nil, errChanged
	}
	b, err := d.read(&sl.op, sl.mem, off, block)
	if err != nil {
		if errors.Is(err, uring.ErrMedia) {
			d.unreadable(g, e, off, err)
		}
		return record{}, nil, err
	}
	r, ok := parseRecord(b, p.super.seed, p.super.extent)
	switch {
	case ok && r.off == off && r.gen == g.gen && r.is(e):
		return r, appendSums(nil, b, r, p.super.extent), nil
	case ok && r.off == off && r.gen == g.gen && r.was(e):
		return record{}, nil, errBuried
	}
	d.unreadable(g, e, off, errors.New("its header is damaged"))
	return record{}, nil, fmt.Errorf("%w: %v: header", ErrCorrupt, e.key())
}

func (d *device) unreadable(g *segment, e entry, off int64, err error) {
	g.store.c.corrupt.Add(1)
	d.p.log.Warn("a value became unreadable", "key", e.key(), "member", d.member, "offset", off, "error", err)
}

// liveRecords returns the live records of g: from its summary, or its headers if that is damaged.
func (g *segment) liveRecords(op *uring.Op, buf []byte) ([]record, error) {
	g.meta.Lock()
	defer g.meta.Unlock()
	rs, _, ok, err := g.readSummary(op, buf)
	if err != nil && !errors.Is(err, uring.ErrMedia) {
		return nil, err
	}
	if !ok {
		rs = rs[:0]
		if _, _, err := g.scan(op, buf, func(r record) { rs = append(rs, r) }); err != nil {
			return nil, err
		}
	}
	return slices.DeleteFunc(rs, func(r record) bool { return r.kind != recordLive }), nil
}

// ghost remembers keys that have no value, of late: in sets of tags of 16 bits, in which a newcomer
// takes the place of the oldest. One key in 2048 is taken for one that is known.
type ghost struct {
	sets  []ghostSet
	locks [64]sync.Mutex // of the sets with this remainder
}

type ghostSet [32]uint16 // the newest first, then zeroes: a cache line

// newGhost makes one for a store of some capacity in bytes: 2 bytes for each 32 KiB, up to 64 MiB.
// Twice to four times as many keys as there are values do best, so that is enough for values of 64 KiB.
func newGhost(capacity int64) *ghost {
	return &ghost{sets: make([]ghostSet, min(max(1<<12, capacity>>15), 1<<25)/int64(len(ghostSet{})))}
}

// set returns k's set, locked, and its tag.
func (h *ghost) set(x *index, k Key) (*ghostSet, *sync.Mutex, uint16) {
	hash := x.hash(k.hi, k.lo, uint64(k.n))
	i, _ := bits.Mul64(hash, uint64(len(h.sets)))
	mu := &h.locks[i%uint64(len(h.locks))]
	mu.Lock()
	return &h.sets[i], mu, max(1, uint16(hash))
}

// learn has k known, as the newest, and tells whether it was known before.
func (h *ghost) learn(x *index, k Key) bool {
	set, mu, tag := h.set(x, k)
	defer mu.Unlock()
	at := slices.Index(set[:], tag)
	known := at >= 0
	if !known {
		at = len(set) - 1
	}
	copy(set[1:at+1], set[:at])
	set[0] = tag
	return known
}

// forget tells that k was known, and is not any more.
func (h *ghost) forget(x *index, k Key) bool {
	set, mu, tag := h.set(x, k)
	defer mu.Unlock()
	at := slices.Index(set[:], tag)
	if at < 0 {
		return false
	}
	copy(set[at:], set[at+1:])
	set[len(set)-1] = 0
	return true
}
