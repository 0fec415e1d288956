package kvlayer

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/kvof/kvof/uring"
	"github.com/tidwall/btree"
)

// Open opens the store on dev, formatting a device whose first 128 KiB are
// zero, and rebuilds the index from the log. Segments that were added by growing the
// device are taken into use. Data that is not a store of this version is
// ErrForeign. The device must support blocks of 4096 bytes; unless it is memory, the
// store holds two large buffers of the arena until Close. Neither is closed with the store.
func Open(dev uring.Device, arena *uring.Arena, o Options) (*Store, error) {
	s := &Store{
		dev: dev, arena: arena, log: o.Log,
		mem:     dev.View(0, block) != nil,
		maxKeys: o.MaxKeys,
		holes:   make(map[int64]int64),
		index: btree.NewBTreeGOptions(func(a, b entry) bool { return a.key.Compare(b.key) < 0 },
			btree.Options{NoLocks: true}),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if bs := dev.BlockSize(); bs > block {
		return nil, fmt.Errorf("kvlayer: the device's blocks have %d bytes, a store needs 4096 or less", bs)
	}
	if !s.mem {
		if err := s.takeBuffers(); err != nil {
			return nil, err
		}
	}
	if err := s.recover(o); err != nil {
		s.closed.Store(true)
		s.slotsBuf.Put()
		s.copyBuf.Put()
		return nil, err
	}
	return s, nil
}

func (s *Store) takeBuffers() error {
	for wait := time.Duration(0); ; wait += time.Millisecond { // a busy arena frees some soon
		var a, b bool
		s.slotsBuf, a = s.arena.TryGet(uring.LargeBuf)
		s.copyBuf, b = s.arena.TryGet(uring.LargeBuf)
		if a && b {
			break
		}
		s.slotsBuf.Put()
		s.copyBuf.Put()
		if wait == time.Second {
			return errors.New("kvlayer: the buffer arena is used up; make it larger")
		}
		time.Sleep(time.Millisecond)
	}
	s.slots = make(chan *slot, headerSlots)
	for m := s.slotsBuf.Data; len(m) > 0; m = m[maxHeader:] {
		s.slots <- &slot{mem: m[:maxHeader:maxHeader]}
	}
	return nil
}

func (s *Store) recover(o Options) error {
	sl, err := s.slot()
	if err != nil {
		return err
	}
	defer s.putSlot(sl)
	if err := s.loadSuper(sl); err != nil {
		return err
	}
	segCap := s.super.segSize - block
	s.capacity = (s.super.segments - 1) * segCap
	s.maxValue = min(MaxValue, segCap-block) // smaller segments than that need but one header block
	if o.MaxValue > 0 {
		s.maxValue = min(s.maxValue, o.MaxValue)
	}

	start := time.Now()
	r := recovery{Store: s, progress: o.Progress}
	if err := r.run(sl); err != nil {
		return err
	}
	s.log.Info("store opened", "keys", s.index.Len(), "used", s.used, "capacity", s.capacity,
		"segments", len(s.segs), "took", time.Since(start).Round(time.Microsecond))
	return nil
}

// loadSuper reads the superblock, or formats an empty device.
func (s *Store) loadSuper(sl *slot) error {
	if s.dev.Size() < superArea {
		_, _, err := geometry(s.dev.Size())
		return err
	}
	b, err := s.read(&sl.op, s.copyBuf.Data, 0, superArea)
	if err != nil {
		return fmt.Errorf("kvlayer: read superblock: %w", err)
	}
	first, err1 := parseSuper(b)
	second, err2 := parseSuper(b[superSecond:])
	switch {
	case err1 != nil && err2 != nil:
		if len(bytes.TrimLeft(b, "\x00")) == 0 {
			return s.format(sl)
		}
		if errors.Is(err1, errNoSuper) {
			err1 = err2
		}
		return fmt.Errorf("%w: %w", ErrForeign, err1)
	case err1 != nil, err2 == nil && second.gen > first.gen:
		s.super = second
	default:
		s.super = first
	}
	have := (s.dev.Size() - dataStart) / s.super.segSize
	if have < s.super.segments {
		return fmt.Errorf("%w: the device has %d bytes and the store needs %d; give it back its size",
			ErrForeign, s.dev.Size(), dataStart+s.super.segments*s.super.segSize)
	}
	if have == s.super.segments && err1 == nil && err2 == nil && first == second {
		return nil
	}
	s.super.segments = have // the device grew, or a copy was lost
	return s.writeSuper(sl)
}

func (s *Store) format(sl *slot) (err error) {
	if s.super.segSize, s.super.segments, err = geometry(s.dev.Size()); err != nil {
		return err
	}
	var seed [8]byte
	_, _ = rand.Read(seed[:]) // never fails
	s.super.id, s.super.seed = uuid.New(), le.Uint64(seed[:])
	s.log.Info("formatting an empty device", "store", s.super.id, "segments", s.super.segments, "segment_size", s.super.segSize)
	return s.writeSuper(sl)
}

// writeSuper writes the copies one after the other, so that one is always whole.
func (s *Store) writeSuper(sl *slot) error {
	s.super.gen++
	for _, off := range [...]int64{0, superSecond} {
		putSuper(s.header(sl, off, block), s.super)
		err := s.writeHeader(sl, off, block)
		if err == nil {
			err = s.flush(sl)
		}
		if err != nil {
			return fmt.Errorf("kvlayer: write superblock: %w", err)
		}
	}
	return nil
}

// recovery rebuilds the index.
type recovery struct {
	*Store
	progress func(done, total int)

	mu     sync.Mutex
	dead   []entry // live records that lost to a newer one
	seqMax uint64
	done   int
	err    error
}

func (r *recovery) run(sl *slot) error {
	r.segs = make([]segment, r.super.segments)
	for i := range r.segs {
		r.segs[i].off = dataStart + int64(i)*r.super.segSize
	}
	var wg sync.WaitGroup
	var next atomic.Int64
	worker := func(buf []byte) {
		var op uring.Op
		for i := next.Add(1) - 1; i < int64(len(r.segs)); i = next.Add(1) - 1 {
			r.segment(i, &op, buf)
		}
	}
	for range 7 {
		if r.mem {
			break
		}
		b, ok := r.arena.TryGet(uring.LargeBuf)
		if !ok {
			break
		}
		wg.Go(func() {
			defer b.Put()
			worker(b.Data)
		})
	}
	worker(r.copyBuf.Data)
	wg.Wait()
	if r.err != nil {
		return r.err
	}

	for _, e := range r.dead {
		if err := r.kill(sl, e, r.segmentOf(e.off).gen); err != nil {
			return fmt.Errorf("kvlayer: recovery: %w", err)
		}
	}
	r.seq.Store(r.seqMax)
	r.index.Scan(func(e entry) bool {
		r.segmentOf(e.off).live += e.span()
		r.used += e.span()
		return true
	})
	// The newest segment goes on where it ended; others that were not sealed are now.
	for i := range r.segs {
		if g := &r.segs[i]; g.state == segmentOpen && (r.open == nil || g.gen > r.open.gen) {
			r.open = g
		}
	}
	for i := range r.segs {
		if g := &r.segs[i]; g.state == segmentOpen && g != r.open {
			if err := r.seal(sl, g); err != nil {
				return err
			}
		}
	}
	return r.restoreReserve(sl)
}

// segment takes segment i's records into the index.
func (r *recovery) segment(i int64, op *uring.Op, buf []byte) {
	g := &r.segs[i]
	err := r.scanSegment(i, g, op, buf)
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil {
		r.err = fmt.Errorf("kvlayer: segment %d: %w", i, err)
	}
	r.gen = max(r.gen, g.gen)
	if r.done++; r.progress != nil {
		r.progress(r.done, len(r.segs))
	}
}

func (r *recovery) scanSegment(i int64, g *segment, op *uring.Op, buf []byte) error {
	b, err := r.read(op, buf, g.off, block)
	if err != nil && !errors.Is(err, uring.ErrMedia) {
		return err
	}
	h, ok := parseSegment(b, r.super.seed)
	if err != nil || !ok || h.id != r.super.id || h.index != i {
		if err != nil || bytes.Equal(b[24:40], r.super.id[:]) {
			r.c.corrupt.Add(1)
			r.log.Warn("segment header is damaged: its values are lost", "segment", i, "offset", g.off, "error", err)
		}
		return nil
	}
	g.gen = h.gen
	if h.free {
		return nil
	}
	g.state = segmentOpen
	tail, sealed, err := r.scan(g, op, buf, func(rec record) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.seqMax = max(r.seqMax, rec.seq)
		if rec.kind == recordLive {
			r.add(entry{off: rec.off, seq: rec.seq, size: uint32(rec.size), key: rec.key})
		}
	})
	g.tail = tail
	if sealed || tail == r.super.segSize {
		g.state = segmentSealed
	}
	return err
}

// add enters e unless a newer record of its key is there; the loser dies. Of
// two copies that an interrupted cleaning left, the one it made counts.
func (r *recovery) add(e entry) {
	old, ok := r.index.Get(e)
	if ok {
		newer := e.seq > old.seq || e.seq == old.seq && r.segmentOf(e.off).gen > r.segmentOf(old.off).gen
		if !newer {
			r.dead = append(r.dead, e)
			return
		}
		r.dead = append(r.dead, old)
	}
	r.index.Set(e)
}

// scan calls f for each live and dead record of g, in order. It goes from
// header to header; where none is (a write that was never committed) it looks
// at every block until the next one. tail is the end of the last record, relative
// to the segment; sealed tells that a seal follows it. Unreadable stretches are skipped.
func (s *Store) scan(g *segment, op *uring.Op, buf []byte, f func(record)) (tail int64, sealed bool, err error) {
	pos, end := g.off+block, g.off+s.super.segSize
	var win []byte // what has been read, from at
	var at int64
	chunk := int64(len(buf))
	if s.mem {
		chunk = s.super.segSize
	}
	ahead := chunk
	for tail = block; pos < end; {
		if need := min(maxHeader, end-pos); pos+need > at+int64(len(win)) {
			n := min(max(ahead, maxHeader), end-pos)
			if win, err = s.read(op, buf, pos, n); errors.Is(err, uring.ErrMedia) {
				s.c.corrupt.Add(1)
				s.log.Warn("cannot read part of a segment", "offset", pos, "length", n, "error", err)
				clear(win)
			} else if err != nil {
				return tail, false, err
			}
			at = pos
		}
		r, ok := parseRecord(win[pos-at:], s.super.seed)
		n := span(r.size)
		if !ok || r.off != pos || r.gen != g.gen || n > end-pos {
			pos, ahead = pos+block, chunk
			continue
		}
		if r.kind == recordSeal {
			return tail, true, nil
		}
		f(r)
		pos += n
		tail = pos - g.off
		if ahead = chunk; n > chunk/2 {
			ahead = maxHeader // the next header is far
		}
	}
	return tail, false, nil
}
