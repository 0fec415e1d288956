package kvlayer

import (
	"fmt"
	"slices"

	"github.com/kvof/kvof/uring"
	"github.com/zeebo/xxh3"
)

// window is how many device operations of one value are in flight at most:
// 2 MiB of read-ahead or write-behind.
const window = 8

// transferSlot is one of them.
type transferSlot struct {
	op   uring.Op
	buf  uring.Buf
	busy bool
}

func (t *transferSlot) wait() error {
	err := t.op.Wait()
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

	seg      *segment
	off      int64 // of the record on the device
	gen      uint64
	promised bool // counted in Store.promised
	written  bool // a header may lie at off

	cur   uring.Buf // being filled, from byte base of the value on
	base  int64
	slots [window]transferSlot
	next  int // slot
	err   error
}

// Create begins to store a value of size bytes under k, and takes the space
// for it. It refuses here, before any payload moves: ErrExists or ErrNotFound
// as m asks, ErrTooLarge, ErrNoSpace. On success w is in use until Commit or
// Abort. Making room may take a while on a full device.
func (s *Store) Create(w *Writer, k Key, size int64, m Mode) error {
	switch {
	case w.s != nil:
		return errInUse
	case s.closed.Load():
		return ErrClosed
	case k.n == 0:
		return ErrKeySize
	}
	n := span(max(0, size))
	for {
		s.mu.Lock()
		promise, err := s.admit(k, m)
		switch {
		case err != nil:
		case size < 0 || size > s.maxValue:
			err = ErrTooLarge
		case s.used+n > s.capacity:
			err = ErrNoSpace
		case !s.cleaning:
			seg, off, ok := s.take(n)
			if !ok {
				break
			}
			s.used += n
			if promise {
				s.promised++
			}
			w.s, w.key, w.mode, w.size = s, k, m, size
			w.seg, w.off, w.gen, w.promised = seg, off, seg.gen, promise
			s.mu.Unlock()
			w.sums = slices.Grow(w.sums[:0], int(pieces(size)))
			return nil
		}
		s.mu.Unlock()
		if err == nil {
			err = s.makeRoom(n)
		}
		if err != nil {
			return err
		}
	}
}

// admit checks m and the limit of keys for k; absent tells that k would be a new key. Under mu.
func (s *Store) admit(k Key, m Mode) (absent bool, err error) {
	switch _, ok := s.index.Get(entry{key: k}); {
	case ok && m == StoreIfAbsent:
		return false, ErrExists
	case ok:
		return false, nil
	case m == StoreIfExists:
		return true, ErrNotFound
	case s.maxKeys > 0 && s.index.Len()+s.promised >= s.maxKeys:
		return true, ErrNoSpace
	}
	return true, nil
}

// data is where byte off of the value lies on the device.
func (w *Writer) data(off int64) int64 { return w.off + headerLen(w.size) + off }

// Buffer returns memory for the next bytes of the value, at least one and at
// most max: the device's own memory, or part of an arena buffer, for which it
// may wait. Asked again before Filled it returns the same memory. It is nil
// when the value is complete. The memory is w's until Filled, Commit or Abort.
func (w *Writer) Buffer(max int) []byte {
	if w.s == nil || w.done == w.size || max <= 0 {
		return nil
	}
	n := min(int64(max), w.size-w.done)
	if w.s.mem {
		return w.s.dev.View(w.data(w.done), n)
	}
	if w.cur.Data == nil {
		w.base = w.done
		w.cur = w.s.arena.Get(int(min(uring.LargeBuf, roundUp(w.size-w.done))))
	}
	b := w.cur.Data[w.done-w.base:]
	return b[:min(n, int64(len(b)))]
}

// Filled tells that the first n bytes of Buffer's result are there. It
// checksums them while they are in the cache, and starts to write what is full.
func (w *Writer) Filled(n int) {
	if w.s == nil || n <= 0 {
		return
	}
	var piece []byte // the part of the value in memory, up to done
	if w.s.mem {
		w.done = min(w.done+int64(n), w.size)
		w.base = int64(len(w.sums)) * pieceSize
		piece = w.s.dev.View(w.data(w.base), w.done-w.base)
	} else if w.cur.Data == nil {
		return
	} else {
		w.done = min(w.done+int64(n), w.size, w.base+int64(len(w.cur.Data)))
		piece = w.cur.Data[:w.done-w.base]
	}
	for {
		from := int64(len(w.sums)) * pieceSize
		to := min(from+pieceSize, w.size)
		if from >= w.size || to > w.done {
			break
		}
		w.sums = append(w.sums, xxh3.Hash(piece[from-w.base:to-w.base]))
	}
	if !w.s.mem && (len(piece) == len(w.cur.Data) || w.done == w.size) {
		clear(w.cur.Data[len(piece):])
		w.flush()
	}
}

// flush starts to write the current buffer.
func (w *Writer) flush() {
	t := &w.slots[w.next]
	w.next = (w.next + 1) % window
	w.wait(t)
	t.op.Kind, t.op.Off, t.op.Data = uring.OpWrite, w.data(w.base), w.cur.Data
	t.buf, t.busy = w.cur, true
	w.cur = uring.Buf{}
	t.op.Start(w.s.dev)
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
	if err != nil {
		err = fmt.Errorf("kvlayer: store %v: %w", w.key, err)
	} else if w.done != w.size {
		err = errShort
	} else {
		err = w.s.commit(w)
	}
	if err != nil {
		w.Abort()
		return err
	}
	w.s.c.stores.Add(1)
	w.reset()
	return nil
}

func (s *Store) commit(w *Writer) error {
	sl, err := s.slot()
	if err != nil {
		return err
	}
	defer s.putSlot(sl)
	s.moving.RLock()
	defer s.moving.RUnlock()
	lock := s.stripe(w.key)
	lock.Lock()
	defer lock.Unlock()

	s.mu.Lock()
	old, replace := s.index.Get(entry{key: w.key})
	switch {
	case replace && w.mode == StoreIfAbsent:
		err = ErrExists
	case !replace && w.mode == StoreIfExists:
		err = ErrNotFound
	case !replace && !w.promised: // deleted since Create
		if _, err = s.admit(w.key, w.mode); err == nil {
			w.promised = true
			s.promised++
		}
	}
	s.mu.Unlock()
	if err != nil {
		return err
	}

	e := entry{off: w.off, seq: s.seq.Add(1), size: uint32(w.size), key: w.key}
	n := headerLen(w.size)
	r := record{kind: recordLive, key: w.key, off: w.off, gen: w.gen, seq: e.seq, size: w.size}
	w.written = true
	putRecord(s.header(sl, w.off, n), s.super.seed, r, w.sums)
	if err = s.writeHeader(sl, w.off, n); err == nil && replace {
		err = s.kill(sl, old, s.segmentOf(old.off).gen)
	}
	if err != nil {
		// Whatever reached the device, the new value must not come back after
		// a crash. The old one's header may be damaged: then it is lost by that.
		_ = s.kill(sl, e, w.gen)
		return fmt.Errorf("kvlayer: store %v: %w", w.key, err)
	}

	s.mu.Lock()
	s.index.Set(e)
	w.seg.writers--
	if replace {
		s.drop(s.segmentOf(old.off), old.span())
	}
	if w.promised {
		s.promised--
	}
	s.mu.Unlock()
	return nil
}

// Abort gives the space back. It is safe at any time, and does nothing on an
// idle Writer.
func (w *Writer) Abort() {
	s := w.s
	if s == nil {
		return
	}
	_ = w.drain()
	w.cur.Put()
	n := span(w.size)
	s.mu.Lock()
	s.used -= n
	s.giveBack(w.seg, w.off, n, w.written)
	if w.promised {
		s.promised--
	}
	s.mu.Unlock()
	w.reset()
}

func (w *Writer) reset() {
	w.s, w.seg, w.err = nil, nil, nil
	w.cur = uring.Buf{}
	w.done, w.base, w.written = 0, 0, false
}
