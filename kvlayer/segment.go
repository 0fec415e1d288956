package kvlayer

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kvof/kvof/uring"
)

// class is a placement class: values of different lifetimes go to different
// segments, and to different placement handles of the drive.
type class uint8

const (
	classNew class = iota // just stored
	classHot              // has earned to stay
	classes  = 2
)

type segmentState uint8

const (
	segmentFree     segmentState = iota // nothing in it counts
	segmentOpen                         // the end of a log
	segmentFull                         // waits for its last writes, to be sealed
	segmentSealed                       // its summary is written
	segmentDraining                     // reclaimed, while Readers are still in it
	segmentStates   = 5
)

// SegmentStates are the names of the states that DeviceStats counts.
var SegmentStates = [segmentStates]string{"free", "open", "full", "sealed", "draining"}

// segment is what memory knows of one.
type segment struct {
	dev  *device
	off  int64 // on the device
	base int64 // its first block in the pool's numbering

	live atomic.Int64 // bytes of live records and of writes in progress
	pins atomic.Int64 // Readers; raised by those who then find their entry still there

	// meta keeps headers and summary as they are: held, across I/O, by who seals or frees the
	// segment, or marks a record dead in it until the index has forgotten that record.
	meta     sync.Mutex
	log      []record // open and full: what is committed, under meta
	fence    []uint32 // where the first record of each of the summary's blocks lies, in blocks; nil: none was written
	unsure   []bool   // blocks of a summary found at the start that show dead records, whose headers may not; nil: none
	unsynced bool     // their headers were marked, and that was not flushed

	// Under Pool.mu:
	state   segmentState
	store   *Store
	class   class
	gen     uint64
	tail    int64 // where the next record goes, relative to off
	records int   // taken, committed or not
	writers int   // writes in progress
}

// reserve is how many segments only reclaiming may take.
func (d *device) reserve() int { return 1 }

// low and high are the watermarks: with fewer free segments than low, reclaiming
// goes on until there are high. Where it does not cost much, Stores have one more to
// take while the first segments are made free.
func (d *device) low() int { return d.reserve() + 1 + max(len(d.segs)/100, min(1, len(d.segs)/32)) }
func (d *device) high() int {
	if len(d.segs) < 16 {
		return d.low()
	}
	return d.low() + 1 + len(d.segs)/200
}

// hot is the class for what is kept. Small devices do not have the segments for two.
func (d *device) hot() class {
	if len(d.segs) < 16 {
		return classNew
	}
	return classHot
}

func (g *segment) index() int64 { return (g.off - dataStart) / g.dev.p.super.segSize }

// end is where records must end for the summary of one more than n to fit.
func (g *segment) end(n int) int64 { return g.dev.p.super.segSize - summaryBlocks(n+1)*block }

func (g *segment) fits(n int64) bool { return g.tail+n <= g.end(g.records) }

// place is where one part of a value goes.
type place struct {
	seg *segment
	off int64 // of the record on the device
	gen uint64
}

func (pl place) block() int64 { return pl.seg.base + (pl.off-pl.seg.off)/block }

// take takes n bytes at the end of a log on d. Under Pool.mu.
func (d *device) take(s *Store, c class, n int64) (place, bool) {
	g := d.open[s.tenant][c]
	if g == nil || !g.fits(n) {
		return place{}, false
	}
	pl := place{g, g.off + g.tail, g.gen}
	g.tail += n
	g.records++
	g.writers++
	g.live.Add(n)
	d.load.Add(n)
	return pl, true
}

// giveBack undoes take. The space is there again at once if it is the log's
// last, and dead space otherwise, or when a header may lie in it. Under Pool.mu.
func (pl place) giveBack(n int64, written bool) {
	g := pl.seg
	g.live.Add(-n)
	if g.state == segmentOpen && !written && pl.off+n == g.off+g.tail {
		g.tail -= n
		g.records--
	}
	g.done(n)
}

// done ends a write of n bytes. Under Pool.mu.
func (g *segment) done(n int64) {
	g.dev.load.Add(-n)
	if g.writers--; g.writers == 0 && g.state == segmentFull {
		g.dev.wake()
	}
}

// wake has the keeper look for work.
func (d *device) wake() {
	select {
	case d.kick <- struct{}{}:
	default:
	}
}

// advance gives a log on d, which has no room for n bytes, a new segment. It
// fails with errFull when none is free but those kept for reclaiming.
func (d *device) advance(sl *slot, s *Store, c class, n int64, reclaiming bool) error {
	d.alloc.Lock()
	defer d.alloc.Unlock()
	p := d.p
	p.mu.Lock()
	if old := d.open[s.tenant][c]; old != nil && old.fits(n) {
		p.mu.Unlock()
		return nil
	}
	kept := d.reserve()
	if reclaiming {
		kept = 0
	}
	if d.lost.Load() || len(d.free) <= kept {
		p.mu.Unlock()
		return errFull
	}
	g := d.free[0]
	d.free = slices.Delete(d.free, 0, 1)
	// The random half keeps a generation from coming back should the header with the newest get lost.
	p.gen = (p.gen>>32+1)<<32 | uint64(rand.Uint32())
	g.store, g.class, g.gen, g.tail, g.records = s, c, p.gen, block, 0
	if len(d.free) < d.low() {
		d.wake()
	}
	p.mu.Unlock()

	err := g.writeHeader(sl, false)
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil {
		g.store = nil
		d.free = append(d.free, g)
		return fmt.Errorf("kvlayer: open a segment: %w", err)
	}
	if old := d.open[s.tenant][c]; old != nil { // the keeper may have ended it meanwhile
		d.retire(old)
	}
	s.hold(c, p.super.segSize)
	g.state, g.log, g.fence, g.unsure = segmentOpen, g.log[:0], nil, nil
	d.open[s.tenant][c] = g
	return nil
}

// retire ends a log's segment; the keeper seals it. Under Pool.mu.
func (d *device) retire(g *segment) {
	g.state = segmentFull
	d.open[g.store.tenant][g.class] = nil
	d.wake()
}

func (g *segment) writeHeader(sl *slot, free bool) error {
	p := g.dev.p
	h := segmentHeader{id: p.super.id, member: g.dev.member, epoch: p.super.epochs[g.dev.member], index: g.index(),
		gen: g.gen, tenant: g.store.tenant, class: g.class, free: free}
	b := g.dev.header(sl.mem, g.off)
	putSegment(b, p.super.seed, h)
	return g.dev.write(&sl.op, g.off, b)
}

// writeRecord writes a record's header.
func (g *segment) writeRecord(sl *slot, r record, sums []uint64) error {
	b := g.dev.header(sl.mem, r.off)
	putRecord(b, g.dev.p.super.seed, r, sums)
	return g.dev.write(&sl.op, r.off, b)
}

// seal writes the summary of a full segment without writers: a recovery reads that
// instead of the records.
func (g *segment) seal(op *uring.Op) error {
	g.meta.Lock()
	defer g.meta.Unlock()
	d, p := g.dev, g.dev.p
	slices.SortFunc(g.log, func(a, b record) int { return int(a.off-b.off) / block })
	n := int(summaryBlocks(len(g.log)))
	b := aligned(n * block)
	fence := make([]uint32, n)
	for i := range n {
		at := b[(n-1-i)*block:]
		if putSummary(at, p.super.seed, g.gen, i, g.tail, g.off, g.log) > 0 {
			fence[i] = uint32((g.log[i*perSummary].off - g.off) / block)
		}
	}
	off := g.off + p.super.segSize - int64(len(b))
	g.fence, g.unsure = fence, nil // also should the write fail: a recovery may find it whole
	if p.mem {
		copy(d.View(off, int64(len(b))), b)
	} else if err := d.transfer(op, uring.OpWrite, off, b); err != nil {
		return fmt.Errorf("kvlayer: seal a segment: %w", err)
	}
	g.log = nil
	p.mu.Lock()
	g.state = segmentSealed
	p.mu.Unlock()
	return nil
}

// aligned returns n bytes of the heap that direct I/O can use.
func aligned(n int) []byte {
	b := make([]byte, n+block)
	skip := -int(address(b)) & (block - 1)
	return b[skip : skip+n : skip+n]
}

// bury marks the record of e, which lies in g, dead on the device, so that no recovery
// brings it back: in the summary that a recovery reads, and in its header. Under g.meta.
func (g *segment) bury(sl *slot, e entry, off int64) error {
	if err := g.strike(sl, off); err != nil {
		return err
	}
	return g.writeRecord(sl, record{kind: recordDead, part: e.part(), key: e.key(), off: off, gen: g.gen, seq: e.seq(), size: e.size()}, nil)
}

// strike marks the record at off dead in g's summary, and in what becomes of it. Under g.meta.
func (g *segment) strike(sl *slot, off int64) error {
	g.log = slices.DeleteFunc(g.log, func(r record) bool { return r.off == off })
	return g.amend(sl, off, func(entry []byte) { entry[42] = byte(recordDead) })
}

// setPinned has the live record of e, at off, say that its value is pinned or not. Under g.meta, and unless it is a copy that
// nobody knows yet, under the key's stripe.
func (g *segment) setPinned(sl *slot, e entry, off int64, on bool) error {
	d, p := g.dev, g.dev.p
	b, err := d.read(&sl.op, sl.mem, off, block)
	if err != nil {
		return err
	}
	r, ok := parseRecord(b, p.super.seed, p.super.extent)
	switch {
	case ok && r.was(e):
		return ErrNotFound
	case !ok || r.off != off || r.gen != g.gen || !r.is(e):
		return fmt.Errorf("%w: %v: header", ErrCorrupt, e.key())
	}
	r.pinned = on
	b[19] = r.flags()
	sealStruct(b[:recordLen], p.super.seed)
	if err := d.write(&sl.op, off, b); err != nil {
		return err
	}
	for i := range g.log {
		if g.log[i].off == off {
			g.log[i].pinned = on
		}
	}
	return g.amend(sl, off, func(entry []byte) { entry[43] = r.flags() })
}

// amend changes the entry of the record at off in g's summary, if there is one. Under g.meta.
func (g *segment) amend(sl *slot, off int64, change func(entry []byte)) error {
	if g.fence == nil {
		return nil
	}
	d, p := g.dev, g.dev.p
	at := uint32((off - g.off) / block)
	i, found := slices.BinarySearch(g.fence, at)
	if !found {
		i = max(0, i-1)
	}
	soff := g.off + p.super.segSize - int64(i+1)*block
	if g.unsure != nil && g.unsure[i] {
		if err := g.assure(sl, soff); err != nil {
			return err
		}
		g.unsure[i] = false
	}
	b, err := d.read(&sl.op, sl.mem, soff, block)
	if errors.Is(err, uring.ErrMedia) || err == nil && !amendIn(b, p.super.seed, g.gen, at, change) {
		clear(b[:block]) // it may be whole the next time it is read: recovery is to read the headers, always
	} else if err != nil {
		return err
	}
	return d.write(&sl.op, soff, b)
}

// assure marks dead in their headers the records that the summary's block at soff shows as dead: a crash can have come in
// between. Only then may the block be written, which another may damage: then the headers count. Under g.meta.
func (g *segment) assure(sl *slot, soff int64) error {
	d, p := g.dev, g.dev.p
	b, err := d.read(&sl.op, sl.mem, soff, block)
	if errors.Is(err, uring.ErrMedia) {
		return nil
	} else if err != nil {
		return err
	}
	_, rs, ok := parseSummary(nil, b, p.super.seed, g.gen, g.off, p.super.segSize, p.super.extent)
	for _, r := range rs {
		if !ok || r.kind != recordDead {
			continue
		}
		if b, err = d.read(&sl.op, sl.mem, r.off, block); err != nil && !errors.Is(err, uring.ErrMedia) {
			return err
		}
		if h, ok := parseRecord(b, p.super.seed, p.super.extent); err != nil || ok && h.kind == recordLive && h.off == r.off && h.gen == g.gen {
			if err := g.writeRecord(sl, r, nil); err != nil {
				return err
			}
			g.unsynced = true
		}
	}
	if g.unsynced {
		if err := d.sync(); err != nil {
			return err
		}
		g.unsynced = false
	}
	return nil
}

// amendIn changes the entry of the record that lies at block at of its segment in a summary's block; false if that is damaged.
func amendIn(b []byte, seed, gen uint64, at uint32, change func(entry []byte)) bool {
	if !intact(b[:block], &summaryMagic, seed) || le.Uint64(b[16:]) != gen {
		return false
	}
	for j := range min(le.Uint32(b[32:]), perSummary) {
		if e := b[summaryHead+j*summaryEntry:]; le.Uint32(e[36:]) == at {
			change(e[:summaryEntry])
			sealStruct(b[:block], seed)
			return true
		}
	}
	return true
}

// keep is a device's keeper: it seals what is full and reclaims what is needed.
func (d *device) keep() {
	var op uring.Op
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-d.kick:
		case <-tick.C: // a Reader's end wakes nobody, nor does a drive's return
			d.buryStrays()
		case <-d.p.stop:
			return
		}
		if d.lost.Load() {
			d.p.away(d)
			continue
		}
		for !d.p.closed.Load() && !d.lost.Load() && d.step(&op) {
		}
	}
}

// away is the keeper's work while its device is lost.
func (p *Pool) away(d *device) {
	sl, err := p.slot()
	if err != nil {
		return
	}
	defer p.putSlot(sl)
	known := false
	for d.lost.Load() {
		if known = known || d.forget(); known && d.rejoin(sl) {
			return
		}
		select {
		case <-p.stop:
			return
		case <-time.After(time.Second):
		}
	}
}

// giveUp tells those who asked for room before that there is no more as things are.
func (d *device) giveUp(asks uint64) {
	d.p.mu.Lock()
	d.stuck = asks
	d.p.notify()
	d.p.mu.Unlock()
}

// step does one piece of the keeper's work; false if there is none.
func (d *device) step(op *uring.Op) bool {
	p := d.p
	var full *segment
	freed := false
	p.mu.Lock()
	asks := p.asks
	for i := range d.segs {
		switch g := &d.segs[i]; {
		case g.state == segmentFull && g.writers == 0 && full == nil:
			full = g
		case g.state == segmentDraining && g.pins.Load() == 0:
			g.state, g.store = segmentFree, nil
			d.free = append(d.free, g)
			freed = true
		}
	}
	if freed {
		p.notify()
	}
	p.mu.Unlock()
	if full != nil {
		if err := full.seal(op); err != nil {
			p.log.Error("cannot seal a segment", "member", d.member, "offset", full.off, "error", err)
			d.giveUp(asks)
			return false
		}
		return true
	}
	return d.reclaimOne(asks)
}
