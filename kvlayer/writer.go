package kvlayer

import (
	"fmt"
	"slices"
	"time"

	"github.com/kvof/kvof/uring"
	"github.com/zeebo/xxh3"
)

// window is how many device operations of one value are in flight at most:
// 4 MiB of read-ahead or write-behind.
const window = 4

// lookahead is how many buffers of a value that is stored may be filled at a time.
const lookahead = 4

// transferSlot is one of them.
type transferSlot struct {
	op   uring.Op
	dev  *device
	buf  uring.Buf
	busy bool
}

func (t *transferSlot) start() {
	t.busy = true
	t.op.Start(t.dev.Device)
}

func (t *transferSlot) wait() error {
	err := t.dev.failed(t.op.Wait())
	t.busy = false
	return err
}

// Writer stores one value: Create, then Buffer and Filled until all bytes are
// there, then Commit or Abort. The zero value is ready; it is meant to be
// embedded in a request and reused, and must not be copied after its first
// use. It allocates only when a value needs more checksums than any before.
type Writer struct {
	s    *Store // nil while idle
	key  Key
	mode Mode
	size int64
	done int64 // bytes filled
	sums []uint64

	parts    [maxParts]place
	n        int  // parts; 0: the value is not kept
	promised bool // counted in Store.promised
	written  bool // headers may lie there

	pieces [lookahead]uring.Buf // for what comes, in order, from byte base of the value on
	coming int                  // of these
	base   int64
	slots  [window]transferSlot
	next   int // slot
	err    error
}

// Create begins to store a value of size bytes under k, and takes the space
// for it. It refuses here, before any payload moves: ErrExists or ErrNotFound
// as m asks, ErrTooLarge, ErrNoSpace. On success w is in use until Commit or
// Abort. It waits only when room is made more slowly than it is taken.
func (s *Store) Create(w *Writer, k Key, size int64, m Mode) error {
	switch {
	case w.s != nil:
		return errInUse
	case s.closed.Load():
		return ErrClosed
	case k.n == 0:
		return ErrKeySize
	}
	_, ok := s.lookup(k, 0)
	promised, err := s.admit(ok, m)
	if err != nil {
		return err
	}
	w.key, w.mode, w.size, w.promised, w.n = k, m, size, promised, 0
	c := classNew
	switch {
	case size < 0 || size > s.maxValue:
		err = ErrTooLarge
	case s.o.Eviction == EvictSecondTouch && !ok && !s.ghost.learn(s.index, k):
		w.s = s // take the value and forget it
	default:
		if s.o.Eviction == EvictS3FIFO && !ok && s.ghost.forget(s.index, k) {
			c = s.p.devs[0].hot()
		}
		w.n = s.index.partsOf(size)
		err = s.reserve(w, c)
	}
	if err != nil {
		if promised {
			s.promised.Add(-1)
		}
		w.n = 0
		return err
	}
	w.s = s
	w.sums = slices.Grow(w.sums[:0], int(pieces(size)))
	return nil
}

// admit checks m and the limit of keys for a key that exists or not. promised tells
// that a new key was counted.
func (s *Store) admit(exists bool, m Mode) (promised bool, err error) {
	switch {
	case exists && m == StoreIfAbsent:
		return false, ErrExists
	case exists:
		return false, nil
	case m == StoreIfExists:
		return false, ErrNotFound
	case s.o.MaxKeys == 0:
		return false, nil
	}
	if s.index.keys.Load()+s.promised.Add(1) > int64(s.o.MaxKeys) {
		s.promised.Add(-1)
		return false, ErrNoSpace
	}
	return true, nil
}

// waitForSpace is how long a Store waits for Readers and writes in progress that
// stand in the way of making room. Only tests change it.
var waitForSpace = 50 * time.Millisecond

// maxWait is how long it waits for room that is being made.
var maxWait = 10 * time.Second

// reserve takes the space for w's parts.
func (s *Store) reserve(w *Writer, c class) error {
	p := s.p
	n := int64(0)
	for i := range w.n {
		n += w.span(s, i)
	}
	if n > s.limit() {
		return ErrNoSpace
	}
	a := ask{s: s}
	for taken := 0; ; {
		p.mu.Lock()
		var d *device
		need := n
		switch over := s.used.Load()+n > s.limit(); {
		case over && s.o.Eviction == EvictNever:
			s.giveAll(w, taken)
			a.end()
			p.mu.Unlock()
			return ErrNoSpace
		case !over:
			if taken, d, need = s.takeAll(w, c, taken); d == nil && need == 0 {
				s.used.Add(n)
				a.end()
				p.mu.Unlock()
				return nil
			}
		}
		var err error
		if d == nil {
			s.giveAll(w, taken)
			taken = 0
			err = a.wait(need) // unlocks
		} else {
			p.mu.Unlock()
			err = s.advance(d, c, need)
		}
		if err != nil && err != errFull {
			p.mu.Lock()
			s.giveAll(w, taken)
			a.end()
			p.mu.Unlock()
			return err
		}
	}
}

// takeAll takes space for w's parts from number taken on, each on the device that
// has least to do and most room. If it cannot take all it returns the device that needs
// a new segment for need bytes; or none if all devices need room, and then gives back what
// it took. Under Pool.mu.
func (s *Store) takeAll(w *Writer, c class, taken int) (n int, d *device, need int64) {
	for ; taken < w.n; taken++ {
		need = w.span(s, taken)
		var best *device
		var fits bool
		for _, d := range s.p.devs {
			g := d.open[s.tenant][c]
			has := g != nil && g.fits(need)
			if !d.lost.Load() && (has || len(d.free) > d.reserve()) && (best == nil || d.less(best)) {
				best, fits = d, has
			}
		}
		if best != nil && !fits {
			return taken, best, need
		}
		if best == nil {
			s.giveAll(w, taken)
			return 0, nil, need
		}
		w.parts[taken], _ = best.take(s, c, need)
	}
	return taken, nil, 0
}

// giveAll gives back the space of w's first parts. Under Pool.mu.
func (s *Store) giveAll(w *Writer, taken int) {
	for i := taken - 1; i >= 0; i-- {
		w.parts[i].giveBack(w.span(s, i), w.written)
	}
}

// less tells that d is the better place for a write than o: by the work in
// progress, in units of an extent, then by the free space. Under Pool.mu.
func (d *device) less(o *device) bool {
	if a, b := d.load.Load()/d.p.super.extent, o.load.Load()/d.p.super.extent; a != b {
		return a < b
	}
	return len(d.free)*len(o.segs) > len(o.free)*len(d.segs)
}

func (s *Store) advance(d *device, c class, n int64) error {
	sl, err := s.p.slot()
	if err != nil {
		return err
	}
	defer s.p.putSlot(sl)
	return d.advance(sl, s, c, n, false)
}

// ask is a Store's wait for room.
type ask struct {
	s        *Store
	ticket   uint64    // of Pool.asks; 0: not yet asked
	start    time.Time // since when it waits
	hopeless time.Time // since when only Readers and writes in progress stand in the way
}

// wait has the keepers look for room for n bytes, and waits until something has
// changed. Under Pool.mu, which it unlocks.
func (a *ask) wait(n int64) error {
	p := a.s.p
	now := time.Now()
	stuck, busy := a.ticket > 0, false
	for _, d := range p.devs {
		if !d.lost.Load() {
			stuck = stuck && d.stuck >= a.ticket
			busy = busy || d.busy
		}
	}
	if a.ticket == 0 {
		a.start = now
		a.s.waiting++
		p.waiting++
	}
	if !stuck {
		a.hopeless = time.Time{}
	} else if a.hopeless.IsZero() {
		a.hopeless = now
	}
	if p.closed.Load() || stuck && (!busy || now.Sub(a.hopeless) > waitForSpace) || now.Sub(a.start) > maxWait {
		p.mu.Unlock()
		return ErrNoSpace
	}
	if a.ticket == 0 || stuck {
		p.asks++
		a.ticket = p.asks
		for _, d := range p.devs {
			d.want = max(d.want, n)
			d.wake()
		}
	}
	if p.changed == nil {
		p.changed = make(chan struct{})
	}
	changed := p.changed
	p.mu.Unlock()
	if stuck {
		time.Sleep(time.Millisecond)
		return nil
	}
	t := time.NewTimer(time.Second)
	defer t.Stop()
	select {
	case <-changed:
	case <-t.C:
	}
	return nil
}

// end ends the wait, if there was one. Under Pool.mu.
func (a *ask) end() {
	if a.ticket == 0 {
		return
	}
	p := a.s.p
	a.s.waiting--
	if p.waiting--; p.waiting == 0 {
		for _, d := range p.devs {
			d.want = 0
		}
	}
	a.ticket = 0
}

// span is what part i takes on its device.
func (w *Writer) span(s *Store, i int) int64 { return span(partSize(w.size, i, s.p.super.extent)) }

// at returns where byte off of the value lies.
func (w *Writer) at(off int64) (*device, int64) {
	e := w.s.p.super.extent
	pl := w.parts[off/e]
	return pl.seg.dev, pl.off + block + off%e
}

// view returns bytes from to to of the value, in one part of it, on a memory device.
func (w *Writer) view(from, to int64) []byte {
	d, off := w.at(from)
	return d.View(off, to-from)
}

// inPlace tells that the value is written straight into a memory device.
func (w *Writer) inPlace() bool { return w.s.p.mem && w.n > 0 }

// Buffer returns memory for the next bytes of the value, at least one and at
// most max: the device's own memory, or part of an arena buffer, for which it
// may wait. Asked again before Filled it returns the same memory. It is nil
// when the value is complete. The memory is w's until Filled, Commit or Abort.
func (w *Writer) Buffer(max int) []byte { return w.Ahead(0, max) }

// Ahead is Buffer for the bytes that are off behind the next: what comes by
// several ways at a time is told of, by Filled, in order. What was handed out
// before ends where off begins. It is nil when that has to be Filled first.
func (w *Writer) Ahead(off, max int) []byte {
	at := w.done + int64(off)
	if w.s == nil || at >= w.size || max <= 0 {
		return nil
	}
	n := min(int64(max), w.size-at)
	if w.inPlace() {
		e := w.s.p.super.extent
		return w.view(at, at+min(n, e-at%e))
	}
	if w.coming == 0 {
		w.base = w.done
	}
	i, base := 0, w.base
	for i < w.coming && at-base >= int64(len(w.pieces[i].Data)) {
		base += int64(len(w.pieces[i].Data))
		i++
	}
	if i == lookahead {
		return nil
	}
	if i == w.coming {
		if i > 0 { // w holds no more than window and one buffers
			w.wait(&w.slots[(w.next+i-1)%window])
		}
		e := w.s.p.piece()
		n, size := min(w.size-at, e-at%e), uring.LargeBuf // as Store.Buffered has it
		if at+n == w.size {
			size = int(roundUp(n))
		}
		b := w.s.p.arena.Get(size)
		b.Data = b.Data[:roundUp(n)]
		w.pieces[i] = b
		w.coming++
	}
	b := w.pieces[i].Data[at-base:]
	return b[:min(n, int64(len(b)))]
}

// Filled tells that the first n bytes of Buffer's result are there. It
// checksums them while they are in the cache, and starts to write what is full.
func (w *Writer) Filled(n int) {
	if w.s == nil || n <= 0 {
		return
	}
	if w.inPlace() {
		w.done = min(w.done+int64(n), w.size)
	} else if w.coming == 0 {
		return
	} else {
		w.done = min(w.done+int64(n), w.size, w.base+int64(len(w.pieces[0].Data)))
	}
	for w.n > 0 {
		from := int64(len(w.sums)) * pieceSize
		to := min(from+pieceSize, w.size)
		if from >= w.size || to > w.done {
			break
		}
		var piece []byte
		if w.inPlace() {
			piece = w.view(from, to)
		} else {
			piece = w.pieces[0].Data[from-w.base : to-w.base]
		}
		w.sums = append(w.sums, xxh3.Hash(piece))
	}
	if !w.inPlace() && (w.done-w.base == int64(len(w.pieces[0].Data)) || w.done == w.size) {
		clear(w.pieces[0].Data[w.done-w.base:])
		w.flush()
		w.base = w.done
	}
}

// flush starts to write the first piece.
func (w *Writer) flush() {
	b := w.pieces[0]
	w.coming--
	copy(w.pieces[:], w.pieces[1:])
	w.pieces[lookahead-1] = uring.Buf{}
	if w.n == 0 {
		b.Put()
		return
	}
	t := &w.slots[w.next]
	w.next = (w.next + 1) % window
	w.wait(t)
	t.dev, t.op.Off = w.at(w.base)
	t.op.Kind, t.op.Data = uring.OpWrite, b.Data
	t.op.Placement = t.dev.placement(w.s, w.parts[w.base/w.s.p.super.extent].seg.class)
	t.buf = b
	t.start()
}

// placement is the handle for a class of a store's values: 0, the device's own, without any.
func (d *device) placement(s *Store, c class) uint16 {
	if d.places == 0 {
		return 0
	}
	return uint16(1 + (s.tenant*classes+int(c))%d.places)
}

func (w *Writer) wait(t *transferSlot) {
	if !t.busy {
		return
	}
	if err := t.wait(); err != nil && w.err == nil {
		w.err = err
	}
	t.buf.Put()
}

// drain waits for all that was started.
func (w *Writer) drain() error {
	for i := range w.slots {
		w.wait(&w.slots[i])
	}
	return w.err
}

// Commit waits for the value's last byte to be written and publishes it. Once
// it returns nil the value is stored, and what it replaced is gone for good.
// The mode is checked again: of several Writers with StoreIfAbsent one wins,
// and the others get ErrExists. On an error nothing has changed for readers;
// either way w is idle again.
func (w *Writer) Commit() error {
	if w.s == nil {
		return errIdle
	}
	err := w.drain()
	switch {
	case err != nil:
		err = fmt.Errorf("kvlayer: store %v: %w", w.key, err)
	case w.done != w.size:
		err = errShort
	case w.n == 0:
		err = w.s.skip(w)
	default:
		if err = w.s.commit(w); err == nil {
			w.s.c.stores.Add(1)
			w.reset()
			return nil
		}
	}
	w.Abort()
	return err
}

// skip ends a Store whose value is not kept: what was stored meanwhile is replaced by nothing.
func (s *Store) skip(w *Writer) error {
	if _, exists := s.lookup(w.key, 0); exists && w.mode == StoreIfAbsent {
		return ErrExists
	}
	s.c.skipped.Add(1)
	_, err := s.erase(w.key, nil, reasonReplace)
	return err
}

func (s *Store) commit(w *Writer) error {
	sl, err := s.p.slot()
	if err != nil {
		return err
	}
	defer s.p.putSlot(sl)
	lock := s.stripe(w.key)
	lock.Lock()
	defer lock.Unlock()

	_, exists := s.lookup(w.key, 0)
	switch {
	case exists && w.mode == StoreIfAbsent:
		return ErrExists
	case !exists && !w.promised: // deleted since Create
		if w.promised, err = s.admit(exists, w.mode); err != nil {
			return err
		}
	case !exists && w.mode == StoreIfExists:
		return ErrNotFound
	}

	seq := s.p.nextSeq()
	w.written = true
	var es [maxParts]entry
	var old *segment // locked
	per := int(s.p.super.extent / pieceSize)
	for i := w.n - 1; i >= 0 && err == nil; i-- { // the value counts from part 0's header on
		pl := w.parts[i]
		es[i] = makeEntry(w.key, i, seq, w.size, pl.block())
		err = pl.seg.writeRecord(sl, w.record(i, seq), w.sums[i*per:min((i+1)*per, len(w.sums))])
	}
	for i := range w.n { // until the write is done nobody seals the segment
		g := w.parts[i].seg
		g.meta.Lock()
		g.log = append(g.log, w.record(i, seq))
		g.meta.Unlock()
	}
	if err == nil {
		old, err = s.kill(sl, w.key)
	}
	defer func() {
		if old != nil {
			old.meta.Unlock()
		}
	}()
	for i := 0; i < w.n && err == nil && s.o.Flushed; i++ {
		if d := w.parts[i].seg.dev; i == 0 || d != w.parts[i-1].seg.dev {
			err = d.sync()
		}
	}
	if err == nil && s.o.Flushed && old != nil && !slices.ContainsFunc(w.parts[:w.n], func(pl place) bool { return pl.seg.dev == old.dev }) {
		err = old.dev.sync() // or the old value would be back once the new one is deleted
	}
	if err != nil {
		// Whatever reached the device, the new value must not come back after
		// a crash. The old one's header may be damaged: then it is lost by that.
		pl := w.parts[0]
		r := w.record(0, seq)
		r.kind = recordDead
		bad := pl.seg.writeRecord(sl, r, nil)
		if bad == nil && s.o.Flushed {
			bad = pl.seg.dev.sync()
		}
		if bad != nil {
			s.strays.add(pl.seg, r)
		}
		if old != nil {
			old.meta.Unlock()
			old = nil
		}
		for i := range w.n {
			g := w.parts[i].seg
			g.meta.Lock()
			g.log = slices.DeleteFunc(g.log, func(r record) bool { return r.seq == seq && r.part == i })
			g.meta.Unlock()
		}
		return fmt.Errorf("kvlayer: store %v: %w", w.key, err)
	}
	s.forget(w.key, es[:w.n], reasonReplace)
	s.p.mu.Lock()
	for i := range w.n {
		n := w.span(s, i)
		w.parts[i].seg.done(n)
		s.c.written.Add(uint64(n))
	}
	s.p.mu.Unlock()
	if w.promised {
		s.promised.Add(-1)
	}
	return nil
}

// record is part i's.
func (w *Writer) record(i int, seq uint64) record {
	return record{kind: recordLive, part: i, key: w.key, off: w.parts[i].off, gen: w.parts[i].gen, seq: seq, size: w.size}
}

// Abort gives the space back. It is safe at any time, and does nothing on an
// idle Writer.
func (w *Writer) Abort() {
	s := w.s
	if s == nil {
		return
	}
	_ = w.drain()
	for _, b := range w.pieces {
		b.Put()
	}
	s.p.mu.Lock()
	s.giveAll(w, w.n)
	s.p.mu.Unlock()
	for i := range w.n {
		s.used.Add(-w.span(s, i))
	}
	if w.promised {
		s.promised.Add(-1)
	}
	w.reset()
}

func (w *Writer) reset() {
	w.s, w.err = nil, nil
	w.pieces, w.coming = [lookahead]uring.Buf{}, 0
	w.done, w.base, w.n, w.promised, w.written = 0, 0, 0, false, false
}
