package kvlayer

import (
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/kvof/kvof/uring"
	"github.com/zeebo/xxh3"
)

// viewSize is the most that Next returns of a memory device.
const viewSize = 1 << 20

// Reader reads one value: Store.Open, then Next until io.EOF, then Close. The
// zero value is ready; it is meant to be embedded in a request and reused, and
// must not be copied after its first use. It allocates only when a value needs
// more checksums than any before.
type Reader struct {
	s     *Store // nil while idle
	es    [maxParts]entry
	parts int // es in use
	sums  []uint64
	sumOf int // the part whose checksums they are; -1: none

	size    int64 // of the whole value
	pos     int64 // what Next returns next: from here on
	end     int64 // up to here
	last    int64 // what is read ends here, at the end of end's piece
	started int64 // reads have started up to here
	slots   [window]transferSlot
	head, n int // the slots in flight: n from head on
	batch   uring.Batch
	err     error
}

// Open begins to read the first limit bytes of k's value, or less if it is
// smaller. A limit of 0 asks only for the size. ErrNotFound, ErrCorrupt when
// its header is damaged, or the device's error leave r idle; else it is in use
// until Close, and sees the value as it is now, whatever happens to k.
func (s *Store) Open(r *Reader, k Key, limit int64) error { return s.OpenRange(r, k, 0, limit, 0) }

// OpenRange is Open for the bytes of k's value from offset on, at most limit; none
// from its end on. Only the pieces in which they lie are read and verified. tag,
// if not 0, is the Tag that the value must have: else ErrReplaced. Of ranges, those
// from offset 0 count as a read of the value.
func (s *Store) OpenRange(r *Reader, k Key, offset, limit int64, tag uint32) error {
	touches := 0
	if offset == 0 {
		touches = s.touches()
	}
	err := s.open(r, k, offset, limit, tag, touches)
	if offset == 0 {
		s.c.looked(err == nil)
	}
	return err
}

func (s *Store) open(r *Reader, k Key, offset, limit int64, tag uint32, touches int) error {
	if r.s != nil {
		return errInUse
	}
	if s.closed.Load() {
		return ErrClosed
	}
	for {
		if _, ok := s.lookup(k, touches); !ok || !r.pin(s, k) {
			return ErrNotFound
		}
		r.s, r.size = s, r.es[0].size()
		if tag != 0 && tag != r.Tag() {
			r.Close()
			return ErrReplaced
		}
		r.pos = min(r.size, max(0, offset))
		r.end = r.pos + min(r.size-r.pos, max(0, limit))
		r.last = min(r.size, pieces(r.end)*pieceSize)
		r.started = r.pos - r.pos%pieceSize
		r.head, r.n, r.err, r.sumOf = 0, 0, nil, -1
		if r.pos == r.end {
			return nil
		}
		err := r.readHeader(int(r.started / s.p.super.extent))
		if err == nil {
			return nil
		}
		r.Close()
		if err != errChanged {
			return err
		}
	}
}

// pin keeps all of k's value where it is. What is pinned and then still in the
// index is not reclaimed before it is unpinned.
func (r *Reader) pin(s *Store, k Key) bool {
	var again [maxParts]entry
	for {
		es := s.index.all(r.es[:0], k)
		if len(es) == 0 || len(es) < s.index.partsOf(es[0].size()) {
			return false
		}
		lost := false
		for _, e := range es {
			g, _ := s.p.segmentOf(e.block())
			g.pins.Add(1)
			lost = lost || g.dev.lost.Load()
		}
		r.parts = len(es)
		same := s.index.all(again[:0], k)
		ok := len(same) == len(es)
		for i := 0; ok && i < len(es); i++ {
			ok = es[i].same(same[i])
		}
		if ok && !lost {
			return true
		}
		r.unpin(s)
		if lost {
			return false
		}
	}
}

func (r *Reader) unpin(s *Store) {
	for _, e := range r.es[:r.parts] {
		g, _ := s.p.segmentOf(e.block())
		g.pins.Add(-1)
	}
	r.parts = 0
}

// at returns where byte off of the value lies.
func (r *Reader) at(off int64) (*device, int64) {
	e := r.s.p.super.extent
	g, at := r.s.p.segmentOf(r.es[off/e].block())
	return g.dev, at + block + off%e
}

// errChanged tells that a value was replaced or deleted before its header was read.
var errChanged = errors.New("kvlayer: value has changed")

// readHeader reads the checksums of one part, those of the first that is read with the first of
// the data on its way.
func (r *Reader) readHeader(part int) error {
	s, e := r.s, r.es[part]
	sl, err := s.p.slot()
	if err != nil {
		return err
	}
	ok, err := r.loadHeader(sl, part)
	half := false // dead here, and not in the summary: a crash or a failed write came in between
	if err == nil && !ok && part == 0 {
		// Whoever replaces or deletes the value marks its header first.
		lock := s.stripe(e.key())
		lock.Lock()
		if now, there := s.index.get(e.key(), 0, 0); !there || !now.same(e) {
			err = errChanged
		} else if ok, err = r.loadHeader(sl, part); err == nil && !ok {
			half = r.buried(sl)
		}
		lock.Unlock()
	}
	s.p.putSlot(sl)
	if half {
		if _, err := s.erase(e.key(), &e, reasonDelete); err != nil {
			return ErrNotFound // it is kept for the next one to try
		}
		return errChanged
	}
	if err == nil && !ok {
		_, off := s.p.segmentOf(e.block())
		err = r.corrupt("header", e, off)
	}
	return err
}

// loadHeader does, and tells whether it is the header of that part.
func (r *Reader) loadHeader(sl *slot, part int) (bool, error) {
	p, e := r.s.p, r.es[part]
	g, off := p.segmentOf(e.block())
	if p.mem {
		copy(sl.mem, g.dev.View(off, block)) // it may change meanwhile
	} else {
		sl.op.Kind, sl.op.Off, sl.op.Data, sl.op.Placement = uring.OpRead, off, sl.mem, 0
		r.batch.Add(g.dev.Device, &sl.op)
		if r.sumOf < 0 {
			r.start(false)
		}
		r.batch.Submit()
		if err := g.dev.failed(sl.op.Wait()); err != nil {
			return false, fmt.Errorf("kvlayer: read %v: %w", e.key(), err)
		}
	}
	rec, ok := parseRecord(sl.mem, p.super.seed, p.super.extent)
	if !ok || rec.off != off || !rec.is(e) || rec.gen != g.gen {
		return false, nil
	}
	r.sums = appendSums(r.sums[:0], sl.mem, rec, p.super.extent)
	r.sumOf = part
	return true, nil
}

// buried tells that sl holds the header of r's value, marked dead.
func (r *Reader) buried(sl *slot) bool {
	p, e := r.s.p, r.es[0]
	_, off := p.segmentOf(e.block())
	rec, ok := parseRecord(sl.mem, p.super.seed, p.super.extent)
	return ok && rec.off == off && rec.was(e)
}

// was tells that r is e's record, marked dead.
func (r *record) was(e entry) bool {
	live := *r
	live.kind = recordLive
	return r.kind == recordDead && live.is(e)
}

// is tells that r is e's record.
func (r *record) is(e entry) bool {
	return r.kind == recordLive && r.key == e.key() && r.part == e.part() && r.seq == e.seq() && r.size == e.size()
}

func (r *Reader) corrupt(what string, e entry, off int64) error {
	g, _ := r.s.p.segmentOf(e.block())
	k := e.key()
	r.s.c.corrupt.Add(1)
	r.s.o.Log.Warn("a stored value is corrupt", "key", k, "what", what, "member", g.dev.member, "offset", off)
	if !r.s.o.Strict {
		if _, err := r.s.erase(k, &r.es[0], reasonCorrupt); err != nil {
			r.s.o.Log.Warn("cannot remove a corrupt value", "key", k, "error", err)
		}
	}
	return fmt.Errorf("%w: %v: %s at byte %d of device %d", ErrCorrupt, k, what, off, g.dev.member)
}

// Size is the value's full size in bytes.
func (r *Reader) Size() int64 { return r.size }

// Tag tells the values of a key apart: those stored less than 68 minutes (2^32
// sequence numbers) apart have different ones. It is never 0, and stays when
// a value is moved or the store opened again.
func (r *Reader) Tag() uint32 { return uint32(1 + r.es[0].seq()%math.MaxUint32) }

// start starts reads as far as window and buffers allow, and what else is in the batch. If must is set and none is in
// flight, it waits for a buffer.
func (r *Reader) start(must bool) {
	p := r.s.p
	e := p.piece()
	for r.n < window && r.started < r.last {
		want := min(e-r.started%e, r.last-r.started)
		t := &r.slots[(r.head+r.n)%window]
		// As Store.Buffered tells whoever reserves memory: as if the piece began with its buffer.
		size := int(roundUp(want) + r.started%e)
		if r.started+want < r.last {
			size = uring.LargeBuf
		}
		var ok bool
		if t.buf, ok = p.arena.TryGet(size); !ok {
			if !must || r.n > 0 {
				break
			}
			t.buf = p.arena.Get(size)
		}
		t.buf.Data = t.buf.Data[:roundUp(want)]
		t.dev, t.op.Off = r.at(r.started)
		t.op.Kind, t.op.Data, t.op.Placement = uring.OpRead, t.buf.Data, 0
		t.busy = true
		r.batch.Add(t.dev.Device, &t.op)
		r.n++
		r.started += want
	}
	r.batch.Submit()
}

// Next returns the next piece of the value, verified, in order: up to 1 MiB
// in an arena buffer, which the caller Puts, or up to 1 MiB of a memory
// device's own memory, valid until Close. io.EOF follows the last one. After
// ErrCorrupt or a device error only Close is left.
func (r *Reader) Next() (uring.Buf, error) {
	switch {
	case r.s == nil:
		return uring.Buf{}, errIdle
	case r.err != nil:
		return uring.Buf{}, r.err
	case r.pos == r.end:
		return uring.Buf{}, io.EOF
	}
	p := r.s.p
	from := r.pos - r.pos%pieceSize // only the first piece is not returned from its beginning
	if part := int(from / p.super.extent); part != r.sumOf {
		if r.err = r.readHeader(part); r.err != nil {
			return uring.Buf{}, r.err
		}
	}
	var b uring.Buf
	inPart := from % p.super.extent
	if p.mem {
		d, off := r.at(from)
		b = uring.View(d.View(off, min(viewSize, r.last-from, p.super.extent-inPart)))
	} else {
		r.start(true)
		t := &r.slots[r.head]
		r.head, r.n = (r.head+1)%window, r.n-1
		if err := t.wait(); err != nil {
			t.buf.Put()
			r.err = fmt.Errorf("kvlayer: read %v: %w", r.es[0].key(), err)
			return uring.Buf{}, r.err
		}
		b = t.buf
		b.Data = b.Data[:min(int64(len(b.Data)), r.last-from)] // without padding
	}
	for off := int64(0); off < int64(len(b.Data)); off += pieceSize {
		piece := b.Data[off:min(off+pieceSize, int64(len(b.Data)))]
		if xxh3.Hash(piece) != r.sums[(inPart+off)/pieceSize] {
			b.Put()
			_, at := r.at(from + off)
			r.err = r.corrupt("piece", r.es[r.sumOf], at)
			return uring.Buf{}, r.err
		}
	}
	b.Data = b.Data[r.pos-from : min(int64(len(b.Data)), r.end-from)]
	r.pos += int64(len(b.Data))
	return b, nil
}

// Close ends reading and lets go of the value. It does nothing on an idle Reader.
func (r *Reader) Close() {
	if r.s == nil {
		return
	}
	for ; r.n > 0; r.n-- {
		t := &r.slots[r.head]
		_ = t.wait()
		t.buf.Put()
		r.head = (r.head + 1) % window
	}
	r.unpin(r.s)
	r.s = nil
}
