package kvlayer

import (
	"fmt"
	"io"

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
	s    *Store // nil while idle
	e    entry
	seg  *segment
	sums []uint64

	data    int64 // of the value on the device
	end     int64 // bytes of the value to return
	last    int64 // bytes to read: end, up to the end of its piece
	pos     int64 // bytes returned
	started int64 // bytes whose read has started
	slots   [window]transferSlot
	head, n int // the slots in flight: n from head on
	batch   [window]*uring.Op
	err     error
}

// Open begins to read the first limit bytes of k's value, or less if it is
// smaller. A limit of 0 asks only for the size. ErrNotFound, ErrCorrupt when
// its header is damaged, or the device's error leave r idle; else it is in use
// until Close, and sees the value as it is now, whatever happens to k.
func (s *Store) Open(r *Reader, k Key, limit int64) error {
	if r.s != nil {
		return errInUse
	}
	sl, err := s.slot()
	if err != nil {
		return err
	}
	defer s.putSlot(sl)
	lock := s.stripe(k) // no header of k changes while it is read
	lock.RLock()
	defer lock.RUnlock()

	s.mu.RLock()
	e, ok := s.index.Get(entry{key: k})
	if ok {
		r.seg = s.segmentOf(e.off)
		r.seg.pins.Add(1)
	}
	s.mu.RUnlock()
	s.c.looked(ok)
	if !ok {
		return ErrNotFound
	}
	size := int64(e.size)
	r.s, r.e = s, e
	r.data = e.off + headerLen(size)
	r.end = min(size, max(0, limit))
	r.last = min(size, pieces(r.end)*pieceSize)
	r.pos, r.started, r.head, r.n, r.err = 0, 0, 0, 0, nil
	if r.end == 0 {
		return nil
	}
	if err := r.readHeader(sl); err != nil {
		r.Close()
		return err
	}
	return nil
}

// readHeader reads the checksums, with the first of the data on its way.
func (r *Reader) readHeader(sl *slot) error {
	s, n := r.s, headerLen(int64(r.e.size))
	b := s.header(sl, r.e.off, n)
	if !s.mem {
		sl.op.Kind, sl.op.Off, sl.op.Data = uring.OpRead, r.e.off, b
		r.batch[0] = &sl.op
		r.start(1, false)
		if err := sl.op.Wait(); err != nil {
			return fmt.Errorf("kvlayer: read %v: %w", r.e.key, err)
		}
	}
	rec, ok := parseRecord(b, s.super.seed)
	if !ok || !rec.is(r.e, r.seg.gen) {
		return r.corrupt("header", r.e.off)
	}
	r.sums = appendSums(r.sums[:0], b, rec)
	return nil
}

// is tells that r is e's record, in a segment of generation gen.
func (r *record) is(e entry, gen uint64) bool {
	return *r == record{kind: recordLive, key: e.key, off: e.off, gen: gen, seq: e.seq, size: int64(e.size)}
}

func (r *Reader) corrupt(what string, off int64) error {
	r.s.c.corrupt.Add(1)
	r.s.log.Warn("a stored value is corrupt", "key", r.e.key, "what", what, "offset", off)
	return fmt.Errorf("%w: %v: %s at byte %d of the device", ErrCorrupt, r.e.key, what, off)
}

// Size is the value's full size in bytes.
func (r *Reader) Size() int64 { return int64(r.e.size) }

// start starts reads as far as window and buffers allow, after the n ops that
// are in batch already. If must is set and none is in flight, it waits for a buffer.
func (r *Reader) start(n int, must bool) {
	for r.n < window && r.started < r.last && n < window {
		want := min(uring.LargeBuf, r.last-r.started)
		t := &r.slots[(r.head+r.n)%window]
		var ok bool
		if t.buf, ok = r.s.arena.TryGet(int(roundUp(want))); !ok {
			if !must || r.n > 0 {
				break
			}
			t.buf = r.s.arena.Get(int(roundUp(want)))
		}
		t.op.Kind, t.op.Off, t.op.Data = uring.OpRead, r.data+r.started, t.buf.Data
		t.busy = true
		r.batch[n] = &t.op
		n++
		r.n++
		r.started += want
	}
	if n > 0 {
		r.s.dev.Submit(r.batch[:n]...)
	}
}

// Next returns the next piece of the value, verified, in order: up to 256 KiB
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
	var b uring.Buf
	if r.s.mem {
		b = uring.View(r.s.dev.View(r.data+r.pos, min(viewSize, r.last-r.pos)))
	} else {
		r.start(0, true)
		t := &r.slots[r.head]
		r.head, r.n = (r.head+1)%window, r.n-1
		if err := t.wait(); err != nil {
			t.buf.Put()
			r.err = fmt.Errorf("kvlayer: read %v: %w", r.e.key, err)
			return uring.Buf{}, r.err
		}
		b = t.buf
		b.Data = b.Data[:min(int64(len(b.Data)), r.last-r.pos)] // without padding
	}
	for off := int64(0); off < int64(len(b.Data)); off += pieceSize {
		piece := b.Data[off:min(off+pieceSize, int64(len(b.Data)))]
		if xxh3.Hash(piece) != r.sums[(r.pos+off)/pieceSize] {
			b.Put()
			r.err = r.corrupt("piece", r.data+r.pos+off)
			return uring.Buf{}, r.err
		}
	}
	b.Data = b.Data[:min(int64(len(b.Data)), r.end-r.pos)]
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
	r.seg.pins.Add(-1)
	r.s, r.seg = nil, nil
}
