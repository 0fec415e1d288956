package kvlayer

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/kvof/kvof/uring"
	"github.com/zeebo/xxh3"
)

func (p *Pool) recover(progress func(done, total int)) error {
	sl, err := p.slot()
	if err != nil {
		return err
	}
	defer p.putSlot(sl)
	if err := p.loadSupers(sl); err != nil {
		return err
	}
	p.lay()
	start := time.Now()
	r := recovery{Pool: p, progress: progress, used: make(map[uint64]bool)}
	if err := r.run(sl); err != nil {
		return err
	}
	keys := int64(0)
	for _, s := range p.stores {
		keys += s.index.keys.Load()
	}
	p.log.Info("store opened", "devices", len(p.devs), "keys", keys, "capacity", p.Capacity(), "segments", r.total,
		"sealed", r.sealed, "took", time.Since(start).Round(time.Microsecond))
	return nil
}

// loadSupers reads the superblocks, and formats empty devices.
func (p *Pool) loadSupers(sl *slot) error {
	var fresh []*device
	var supers []super // of each device that has one
	rewrite := false
	for _, d := range p.devs {
		d.member = -1
		if d.Size() < superArea {
			_, _, err := geometry(d.Size())
			return err
		}
		found, err := d.loadSuper(&sl.op)
		if err != nil {
			return err
		}
		if len(found) == 0 {
			fresh = append(fresh, d)
			continue
		}
		s := slices.MaxFunc(found, func(a, b super) int { return cmpWordEq(a.gen, b.gen) })
		rewrite = rewrite || len(found) < 2 || found[0].gen != found[1].gen
		d.member = s.member
		for _, o := range supers {
			if o.id != s.id || o.member == s.member {
				return fmt.Errorf("%w: %s belongs to another pool than the devices before it", ErrForeign, d.Info().Path)
			}
		}
		supers = append(supers, s)
		if have := segmentsOf(d.Size(), s.segSize); have < s.segments {
			return fmt.Errorf("%w: the device has %d bytes and the store needs %d; give it back its size", ErrForeign, d.Size(), dataStart+s.segments*s.segSize)
		} else if have > s.segments {
			rewrite = true // it grew
		}
	}
	if len(supers) == 0 {
		small := slices.MinFunc(p.devs, func(a, b *device) int { return int(a.Size()>>12) - int(b.Size()>>12) })
		var err error
		if p.super.segSize, p.super.extent, err = geometry(small.Size()); err != nil {
			return err
		}
		var seed [8]byte
		_, _ = rand.Read(seed[:]) // never fails
		p.super.id, p.super.seed = uuid.New(), le.Uint64(seed[:])
		p.log.Info("formatting an empty device", "store", p.super.id, "devices", len(fresh), "segment_size", p.super.segSize)
	} else {
		p.super = slices.MaxFunc(supers, func(a, b super) int { return cmpWordEq(a.gen, b.gen) })
	}
	for _, d := range fresh {
		if segmentsOf(d.Size(), p.super.segSize) < minSegments {
			return fmt.Errorf("kvlayer: a device of %d bytes is too small for a pool with segments of %d", d.Size(), p.super.segSize)
		}
		if d.member = len(p.super.epochs); d.member == maxMembers {
			return fmt.Errorf("kvlayer: a pool has at most %d devices in its life", maxMembers)
		}
		p.super.epochs = append(p.super.epochs, 0)
		rewrite = true
	}
	slices.SortFunc(p.devs, func(a, b *device) int { return a.member - b.member })
	for i, e := range p.super.epochs { // what a missing device had must not come back with it
		if !slices.ContainsFunc(p.devs, func(d *device) bool { return d.member == i }) {
			p.log.Warn("a device of the pool is missing: its values are lost", "member", i)
			p.super.epochs[i], rewrite = e+1, true
		}
	}
	if rewrite {
		return p.writeSupersIn(sl)
	}
	return nil
}

func cmpWordEq(a, b uint64) int {
	if a == b {
		return 0
	}
	return cmpWord(a, b)
}

// loadSuper returns the valid copies of d's superblock, the better first: none if d is empty.
func (d *device) loadSuper(op *uring.Op) (found []super, err error) {
	b := aligned(superArea)
	if b, err = d.read(op, b, 0, superArea); err != nil {
		return nil, fmt.Errorf("kvlayer: read superblock: %w", err)
	}
	first, err1 := parseSuper(b)
	second, err2 := parseSuper(b[superSecond:])
	if err1 != nil && err2 != nil {
		if len(bytes.TrimLeft(b, "\x00")) == 0 {
			return nil, nil
		}
		if errors.Is(err1, errNoSuper) {
			err1 = err2
		}
		return nil, fmt.Errorf("%w: %w", ErrForeign, err1)
	}
	if err1 == nil {
		found = append(found, first)
	}
	if err2 == nil {
		found = append(found, second)
	}
	return found, nil
}

// writeSupers writes the pool's superblocks. Under meta.
func (p *Pool) writeSupers() error {
	sl, err := p.slot()
	if err != nil {
		return err
	}
	defer p.putSlot(sl)
	return p.writeSupersIn(sl)
}

// writeSupersIn writes the copies one after the other, so that one is always whole.
func (p *Pool) writeSupersIn(sl *slot) error {
	p.super.gen++
	for _, off := range [...]int64{0, superSecond} {
		for _, d := range p.devs {
			if d.lost.Load() {
				continue
			}
			s := p.super
			s.member, s.segments = d.member, segmentsOf(d.Size(), s.segSize)
			b := d.header(sl.mem, off)
			putSuper(b, &s)
			err := d.write(&sl.op, off, b)
			if err == nil {
				err = d.sync()
			}
			if err != nil && !d.lost.Load() {
				return fmt.Errorf("kvlayer: write superblock: %w", err)
			}
		}
	}
	return nil
}

// lay lays out the segments of all devices in the pool's numbering.
func (p *Pool) lay() {
	p.per = p.super.segSize / block
	first := int64(0)
	for _, d := range p.devs {
		d.first = first
		d.segs = make([]segment, min(segmentsOf(d.Size(), p.super.segSize), maxBlocks/p.per-first))
		for i := range d.segs {
			g := &d.segs[i]
			g.dev, g.off, g.base = d, dataStart+int64(i)*p.super.segSize, (first+int64(i))*p.per
		}
		first += int64(len(d.segs))
	}
	for i := range p.super.tenants {
		p.tenant(i)
	}
}

// recovery rebuilds the index.
type recovery struct {
	*Pool
	progress func(done, total int)
	total    int
	sealed   int

	mu    sync.Mutex
	used  map[uint64]bool // generations of segments in use
	dead  []entry         // records that lost to another, and must not come back
	torn  []place         // headers of segments and summaries that are damaged, or cannot be read today
	gaps  []*segment      // of whose records some cannot be read today
	moved []partRecord    // copies that reclaiming made of what is still in use
	parts []partRecord    // other than the first of their values
	seq   uint64
	done  int
	err   error
}

type partRecord struct {
	s *Store
	e entry
}

// workers read segments, so many on each device.
const workers = 8

// each calls f for every segment, with a buffer of its own for each goroutine.
func (r *recovery) each(f func(g *segment, op *uring.Op, buf []byte) error) error {
	var wg sync.WaitGroup
	for _, d := range r.devs {
		var next atomic.Int64
		for w := range workers {
			buf := d.copy.Data[:min(len(d.copy.Data), uring.MediumBuf)]
			var more uring.Buf
			if w > 0 && !r.mem {
				var ok bool
				if more, ok = r.arena.TryGet(uring.MediumBuf); !ok {
					break
				}
				buf = more.Data
			}
			wg.Go(func() {
				defer more.Put()
				var op uring.Op
				for i := next.Add(1) - 1; i < int64(len(d.segs)); i = next.Add(1) - 1 {
					if err := f(&d.segs[i], &op, buf); err != nil && !d.lost.Load() {
						r.mu.Lock()
						r.err = fmt.Errorf("kvlayer: segment %d of device %d: %w", i, d.member, err)
						r.mu.Unlock()
						return
					}
				}
			})
		}
	}
	wg.Wait()
	return r.err
}

func (r *recovery) run(sl *slot) error {
	for _, d := range r.devs {
		r.total += len(d.segs)
	}
	if err := r.each(r.readHeader); err != nil {
		return err
	}
	if err := r.each(r.readRecords); err != nil {
		return err
	}
	if err := r.clearTorn(sl); err != nil {
		return fmt.Errorf("kvlayer: recovery: %w", err)
	}
	r.join()
	if err := r.endMoves(sl); err != nil {
		return err
	}
	if err := r.buryAll(sl); err != nil {
		return fmt.Errorf("kvlayer: recovery: %w", err)
	}
	if err := r.sealGaps(sl); err != nil {
		return fmt.Errorf("kvlayer: recovery: %w", err)
	}
	r.Pool.seq.Store(r.seq)
	// The newest segment of each log goes on where it ended; others are sealed.
	for _, d := range r.devs {
		for i := range d.segs {
			g := &d.segs[i]
			if g.state == segmentOpen && g.live.Load() == 0 { // nobody misses it
				g.state, g.store, g.log = segmentFree, nil, nil
			}
			if g.state == segmentFree {
				d.free = append(d.free, g)
				continue
			}
			g.store.hold(g.class, r.super.segSize)
			if g.state != segmentOpen {
				r.sealed++
				continue
			}
			g.state = segmentFull
			if o := d.open[g.store.tenant][g.class]; o == nil || o.gen < g.gen {
				d.open[g.store.tenant][g.class] = g
			}
		}
		for _, logs := range d.open {
			for _, g := range logs {
				if g != nil {
					g.state = segmentOpen
				}
			}
		}
		// Those that were used come first, so that files grow only as needed.
		slices.SortStableFunc(d.free, func(a, b *segment) int { return cmpWordEq(a.gen-1, b.gen-1) })
	}
	return nil
}

// readHeader reads a segment's header.
func (r *recovery) readHeader(g *segment, op *uring.Op, buf []byte) error {
	d := g.dev
	b, err := d.read(op, buf, g.off, block)
	if err != nil && !errors.Is(err, uring.ErrMedia) {
		return err
	}
	h, ok := parseSegment(b, r.super.seed)
	if err != nil || !ok || h.id != r.super.id || h.member != d.member || h.index != g.index() || h.tenant >= maxTenants {
		if err != nil || bytes.Equal(b[24:40], r.super.id[:]) {
			r.log.Warn("segment header is damaged: its values are lost", "member", d.member, "segment", g.index(), "offset", g.off, "error", err)
			r.mu.Lock()
			r.torn = append(r.torn, place{seg: g, off: g.off})
			r.mu.Unlock()
		}
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	g.gen = h.gen
	r.gen = max(r.gen, h.gen)
	if h.free || h.epoch != r.super.epochs[d.member] {
		return nil
	}
	g.state, g.class, g.store = segmentOpen, h.class, r.tenant(h.tenant)
	r.used[h.gen] = true
	return nil
}

// readRecords takes a segment's records into the index.
func (r *recovery) readRecords(g *segment, op *uring.Op, buf []byte) error {
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.done++; r.progress != nil {
			r.progress(r.done, r.total)
		}
	}()
	if g.state == segmentFree {
		return nil
	}
	rs, tail, ok, err := g.readSummary(op, buf)
	if err != nil && !errors.Is(err, uring.ErrMedia) {
		return err
	}
	if ok {
		g.state, g.tail, g.records = segmentSealed, tail, len(rs)
		for i := 0; i == 0 || i < len(rs); i += perSummary {
			at := uint32(0)
			if len(rs) > 0 {
				at = uint32((rs[i].off - g.off) / block)
			}
			g.fence = append(g.fence, at)
		}
		for i := range rs {
			if rs[i].kind == recordDead {
				if g.unsure == nil {
					g.unsure = make([]bool, len(g.fence))
				}
				g.unsure[i/perSummary] = true
			}
		}
	} else {
		if rs = nil; err != nil {
			r.mu.Lock()
			r.torn = append(r.torn, place{seg: g, off: g.off + r.super.segSize - block})
			r.mu.Unlock()
		}
		var gaps bool
		if g.tail, gaps, err = g.scan(op, buf, func(rec record) {
			g.records++
			if rs = append(rs, rec); rec.kind == recordLive {
				g.log = append(g.log, rec)
			}
		}); err != nil {
			return err
		}
		if gaps {
			r.mu.Lock()
			r.gaps = append(r.gaps, g)
			r.mu.Unlock()
		}
	}
	for i := range rs {
		r.add(g, &rs[i])
	}
	return nil
}

// add enters a record. Of the first parts of a key's values the newest counts; a copy
// that reclaiming made counts only once its source is free. The others die.
func (r *recovery) add(g *segment, rec *record) {
	s := g.store
	e := makeEntry(rec.key, rec.part, rec.seq, rec.size, g.base+(rec.off-g.off)/block)
	if rec.pinned {
		e.meta |= entryPinned
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seq = max(r.seq, rec.seq)
	switch {
	case rec.kind != recordLive:
	case rec.from != 0 && r.used[rec.from]:
		r.moved = append(r.moved, partRecord{s, e})
	case rec.part > 0:
		r.parts = append(r.parts, partRecord{s, e})
	default:
		if old, ok := s.index.get(rec.key, 0, 0); ok {
			if old.seq() > e.seq() || old.seq() == e.seq() && r.genOf(old) > g.gen {
				r.dead = append(r.dead, e)
				return
			}
			r.dead = append(r.dead, old)
			r.count(s, old, -1)
		}
		s.index.replace(rec.key, []entry{e}, nil)
		r.count(s, e, 1)
	}
}

// genOf is the generation of e's segment. Of two records of the same, which a power cut can leave of one that was moved, the one
// with the higher counts, so that of two segments one is left empty.
func (r *recovery) genOf(e entry) uint64 {
	g, _ := r.segmentOf(e.block())
	return g.gen
}

// clearTorn erases what could not be read: what it would say another day does not count. From now on the headers of its
// records tell more than a summary, and without its own a segment has none.
func (r *recovery) clearTorn(sl *slot) error {
	for _, t := range r.torn {
		d := t.seg.dev
		b := d.header(sl.mem, t.off)
		clear(b)
		if err := d.write(&sl.op, t.off, b); err != nil && !d.lost.Load() {
			return err
		}
	}
	if len(r.torn) == 0 {
		return nil
	}
	return r.flushAll()
}

// sealGaps has summaries say what there is in segments that could not be read as a whole. The rest is not to show another day.
func (r *recovery) sealGaps(sl *slot) error {
	for _, g := range r.gaps {
		if err := g.seal(&sl.op); err != nil && !g.dev.lost.Load() {
			return err
		}
	}
	if len(r.gaps) == 0 {
		return nil
	}
	return r.flushAll()
}

// endMoves ends what reclaiming had begun: a copy that is whole takes its original's
// place, so that interrupted reclaims do not use up the space there is for them. The others die: they would
// count when their source is free, also for a value that was evicted with it.
func (r *recovery) endMoves(sl *slot) error {
	for _, m := range r.moved {
		old, ok := m.s.index.get(m.e.key(), m.e.part(), 0)
		if ok = ok && old.seq() == m.e.seq(); ok {
			var err error
			if ok, err = r.adopt(sl, m.e, old.pinned()); err != nil {
				return err
			}
		}
		if !ok {
			r.dead = append(r.dead, m.e)
			continue
		}
		r.dead = append(r.dead, old)
		r.count(m.s, old, -1)
		m.s.index.update(old, func(e *entry) { e.place = m.e.place })
		r.count(m.s, m.e, 1)
	}
	if len(r.moved) == 0 {
		return nil
	}
	return r.flushAll() // the copies stand on their own before the originals die
}

// buryAll marks what lost dead: first in the summaries, for good, then in the headers. So where
// there are two of a record, and one died, the other counts for sure.
func (r *recovery) buryAll(sl *slot) error {
	for _, step := range [...]func(g *segment, e entry, off int64) error{
		func(g *segment, _ entry, off int64) error { return g.strike(sl, off) },
		func(g *segment, e entry, off int64) error { return g.bury(sl, e, off) },
	} {
		for _, e := range r.dead {
			g, off := r.segmentOf(e.block())
			g.meta.Lock()
			err := step(g, e, off)
			g.meta.Unlock()
			if err != nil && !g.dev.lost.Load() {
				return err
			}
		}
		if len(r.dead) > 0 {
			if err := r.flushAll(); err != nil {
				return err
			}
		}
	}
	return nil
}

// adopt verifies a copy and has it no longer say that it is one. It is pinned as its original is.
func (r *recovery) adopt(sl *slot, e entry, pinned bool) (ok bool, err error) {
	g, off := r.segmentOf(e.block())
	d := g.dev
	g.meta.Lock()
	defer g.meta.Unlock()
	defer func() {
		if err != nil && (errors.Is(err, uring.ErrMedia) || d.lost.Load()) {
			ok, err = false, nil
		}
	}()
	b, err := d.read(&sl.op, sl.mem, off, block)
	if err != nil {
		return false, err
	}
	rec, ok := parseRecord(b, r.super.seed, r.super.extent)
	if !ok || !rec.is(e) || rec.gen != g.gen {
		return false, nil
	}
	sums := appendSums(nil, b, rec, r.super.extent)
	if ok, err = d.verify(&sl.op, d.copy.Data, off, partSize(rec.size, rec.part, r.super.extent), sums); !ok || err != nil {
		return false, err
	}
	rec.from, rec.pinned = 0, pinned
	for i := range g.log {
		if g.log[i].off == off {
			g.log[i] = rec
		}
	}
	if err := g.writeRecord(sl, rec, sums); err != nil {
		return false, err
	}
	return true, g.amend(sl, off, func(entry []byte) {
		le.PutUint64(entry[24:], 0)
		entry[43] = rec.flags()
	})
}

// verify reads n bytes of data of the record at off and compares them with sums.
func (d *device) verify(op *uring.Op, buf []byte, off, n int64, sums []uint64) (bool, error) {
	for i, sum := range sums {
		at := int64(i) * pieceSize
		m := min(pieceSize, n-at)
		b, err := d.read(op, buf, off+block+at, roundUp(m))
		if err != nil || xxh3.Hash(b[:m]) != sum {
			return false, err
		}
	}
	return true, nil
}

func (r *recovery) count(s *Store, e entry, sign int64) {
	n := sign * s.span(e)
	g, _ := r.segmentOf(e.block())
	g.live.Add(n)
	s.used.Add(n)
}

// join gives the striped values their parts, and drops those that lack one. Of two records of a part one dies, or
// it would stand in for the other when that was evicted.
func (r *recovery) join() {
	slices.SortFunc(r.parts, func(a, b partRecord) int {
		switch {
		case a.s != b.s:
			return a.s.tenant - b.s.tenant
		case a.e.hi != b.e.hi:
			return cmpWord(a.e.hi, b.e.hi)
		case a.e.lo != b.e.lo:
			return cmpWord(a.e.lo, b.e.lo)
		case a.e.ident()&15 != b.e.ident()&15:
			return int(a.e.ident()&15) - int(b.e.ident()&15)
		case a.e.seq() != b.e.seq():
			return cmpWord(a.e.seq(), b.e.seq())
		case a.e.part() != b.e.part():
			return a.e.part() - b.e.part()
		}
		return cmpWordEq(r.genOf(b.e), r.genOf(a.e))
	})
	for ps := r.parts; len(ps) > 0; {
		s, k, seq := ps[0].s, ps[0].e.key(), ps[0].e.seq()
		head, ok := s.index.get(k, 0, 0)
		es := []entry{head}
		n := 0
		for ; n < len(ps) && ps[n].s == s && ps[n].e.seq() == seq && ps[n].e.key() == k; n++ {
			switch e := ps[n].e; {
			case n > 0 && e.part() == ps[n-1].e.part():
				r.dead = append(r.dead, e)
			case e.part() == len(es) && e.size() == head.size():
				es = append(es, e)
			}
		}
		ps = ps[n:]
		if ok && head.seq() == seq && len(es) == s.index.partsOf(head.size()) {
			s.index.replace(k, es, nil)
			for _, e := range es[1:] {
				r.count(s, e, 1)
			}
		}
	}
	r.parts = nil
	whole := !slices.ContainsFunc(r.super.epochs, func(e uint32) bool { return e > 0 })
	for _, s := range r.stores {
		var torn []entry
		s.index.each(func(es []entry) bool {
			for _, e := range es {
				if n := s.index.partsOf(e.size()); n > 1 && e.part() == 0 && len(s.index.all(nil, e.key())) < n {
					torn = append(torn, e)
				}
			}
			return true
		})
		for _, e := range torn {
			s.drop(e, reasonLost)
			if whole { // else there may be many, and what they lack does not come back
				r.dead = append(r.dead, e)
			}
		}
	}
}

var errSummary = fmt.Errorf("kvlayer: a segment's summary is damaged: %w", uring.ErrMedia)

// readSummary returns the records of a sealed segment, and where they end; not ok if
// it is not sealed, or, with ErrMedia, if the summary is damaged.
func (g *segment) readSummary(op *uring.Op, buf []byte) (rs []record, tail int64, ok bool, err error) {
	d, p := g.dev, g.dev.p
	end := g.off + p.super.segSize
	blocks := 1
	for i := 0; i < blocks; i++ {
		b, err := d.read(op, buf, end-int64(i+1)*block, block)
		if err != nil {
			return rs, 0, false, err
		}
		h, more, ok := parseSummary(rs, b, p.super.seed, g.gen, g.off, p.super.segSize, p.super.extent)
		if !ok || h.block != i || i > 0 && (h.blocks != blocks || h.tail != tail) {
			if whole := intact(b, &summaryMagic, p.super.seed); i > 0 || !whole && bytes.Equal(b[8:16], summaryMagic[:]) {
				return rs, 0, false, errSummary
			}
			return rs, 0, false, nil
		}
		rs, blocks, tail = more, h.blocks, h.tail
	}
	return rs, tail, true, nil
}

// scan calls f for each live and dead record of g, in order. It goes from
// header to header; where none is (a write that was never committed) it looks
// at every block until the next one. tail is the end of the last record, relative
// to the segment. Stretches that cannot be read are skipped: gaps.
func (g *segment) scan(op *uring.Op, buf []byte, f func(record)) (tail int64, gaps bool, err error) {
	d, p := g.dev, g.dev.p
	pos, end := g.off+block, g.off+p.super.segSize
	var win []byte // what has been read, from at
	var at int64
	chunk := int64(len(buf))
	if p.mem {
		chunk = p.super.segSize
	}
	ahead := chunk
	for tail = block; pos < end; {
		if pos+block > at+int64(len(win)) {
			n := min(max(ahead, block), end-pos)
			if win, err = d.read(op, buf, pos, n); errors.Is(err, uring.ErrMedia) {
				if n > block { // what lies around it may be read
					win, ahead = nil, block
					continue
				}
				p.log.Warn("cannot read part of a segment", "member", d.member, "offset", pos, "length", n, "error", err)
				clear(win)
				gaps = true
			} else if err != nil {
				return tail, gaps, err
			}
			at = pos
		}
		r, ok := parseRecord(win[pos-at:], p.super.seed, p.super.extent)
		n := span(partSize(r.size, r.part, p.super.extent))
		if !ok || r.off != pos || r.gen != g.gen || n > end-pos {
			pos, ahead = pos+block, chunk
			continue
		}
		f(r)
		pos += n
		tail = pos - g.off
		if ahead = chunk; n > chunk/2 {
			ahead = block // the next header is far
		}
	}
	return tail, gaps, nil
}
