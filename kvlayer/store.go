package kvlayer

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/kvof/kvof/uring"
	"github.com/tidwall/btree"
)

// Errors to test for with errors.Is. Others come from the device: see uring.
var (
	ErrNotFound = errors.New("kvlayer: key does not exist")
	ErrExists   = errors.New("kvlayer: key exists")
	ErrNoSpace  = errors.New("kvlayer: no space, or the limit of keys is reached")
	ErrTooLarge = errors.New("kvlayer: value is too large")
	ErrKeySize  = errors.New("kvlayer: a key has 1 to 16 bytes")
	ErrCorrupt  = errors.New("kvlayer: stored value is corrupt")
	ErrClosed   = errors.New("kvlayer: store is closed")
	ErrForeign  = errors.New("kvlayer: not a store this kvof can use")

	errInUse = errors.New("kvlayer: Writer or Reader is already in use")
	errIdle  = errors.New("kvlayer: Writer or Reader is not in use")
	errShort = errors.New("kvlayer: value committed before its last byte")
)

// Mode says when a value may be stored.
type Mode uint8

const (
	StoreAlways   Mode = iota
	StoreIfExists      // replaces only: else ErrNotFound
	StoreIfAbsent      // creates only: else ErrExists
)

// Options of Open. The zero value is usable.
type Options struct {
	MaxValue int64                 // largest value in bytes; 0, or beyond what the device takes: as large as that
	MaxKeys  int                   // most keys; 0: as many as fit
	Log      *slog.Logger          // nil: silent
	Progress func(done, total int) // called while Open reads segments, by one goroutine at a time
}

// Store is an open store.
type Store struct {
	dev      uring.Device
	arena    *uring.Arena
	log      *slog.Logger
	mem      bool // the device is memory: values are written and read in place
	super    super
	maxValue int64
	maxKeys  int
	capacity int64 // bytes of records that can be live
	seq      atomic.Uint64
	closed   atomic.Bool
	c        counters

	// Locks are taken in the order of the fields below, and a slot before
	// any but the first. Only alloc is held long, by who makes room.

	alloc   sync.Mutex // makes room: opens and cleans segments
	gen     uint64     // of the newest segment
	copyBuf uring.Buf

	moving  sync.RWMutex      // read: a record header is written; write: records move
	stripes [256]sync.RWMutex // by key. Read: its header is read; write: its headers are written

	mu       sync.RWMutex // never held across I/O
	index    *btree.BTreeG[entry]
	segs     []segment
	open     *segment        // the log's end; nil while there is none
	cleaning bool            // the log's end is reserved for the cleaner
	holes    map[int64]int64 // aborted writes in the open segment that are not last: end to start
	used     int64           // bytes of live records and of writes in progress
	promised int             // keys of writes in progress that are not in the index

	slots    chan *slot
	slotsBuf uring.Buf
}

// entry is a value in the index: 40 bytes, no pointer.
type entry struct {
	off  int64 // of its header on the device
	seq  uint64
	size uint32
	key  Key
}

func (e *entry) span() int64 { return span(int64(e.size)) }

// slot is what one header's I/O needs. Slots are the store's own, not taken
// from the shared arena: nobody holds one while waiting for the network.
type slot struct {
	op  uring.Op
	mem []byte // maxHeader bytes, nil on a memory device
}

const headerSlots = uring.LargeBuf / maxHeader

// memorySlot is everybody's on memory devices, where headers are written in place.
var memorySlot slot

func (s *Store) slot() (*slot, error) {
	if s.closed.Load() {
		return nil, ErrClosed
	}
	if s.mem {
		return &memorySlot, nil
	}
	sl, ok := <-s.slots
	if !ok {
		return nil, ErrClosed
	}
	return sl, nil
}

func (s *Store) putSlot(sl *slot) {
	if !s.mem {
		s.slots <- sl
	}
}

// header returns the n bytes in which to prepare a header for off.
func (s *Store) header(sl *slot, off, n int64) []byte {
	if s.mem {
		return s.dev.View(off, n)
	}
	return sl.mem[:n]
}

// writeHeader writes what was prepared.
func (s *Store) writeHeader(sl *slot, off, n int64) error {
	if s.mem {
		return nil
	}
	return s.transfer(&sl.op, uring.OpWrite, off, sl.mem[:n])
}

func (s *Store) transfer(op *uring.Op, kind uring.OpKind, off int64, b []byte) error {
	op.Kind, op.Off, op.Data = kind, off, b
	return op.Do(s.dev)
}

// read returns n bytes at off: in place on a memory device, else in buf.
func (s *Store) read(op *uring.Op, buf []byte, off, n int64) ([]byte, error) {
	if s.mem {
		return s.dev.View(off, n), nil
	}
	return buf[:n], s.transfer(op, uring.OpRead, off, buf[:n])
}

// kill marks e's record dead in place, so that no recovery brings it back.
func (s *Store) kill(sl *slot, e entry, gen uint64) error {
	r := record{kind: recordDead, key: e.key, off: e.off, gen: gen, seq: e.seq, size: int64(e.size)}
	putRecord(s.header(sl, e.off, block), s.super.seed, r, nil)
	return s.writeHeader(sl, e.off, block)
}

func (s *Store) stripe(k Key) *sync.RWMutex { return &s.stripes[k.hash()%uint64(len(s.stripes))] }

func (s *Store) segmentOf(off int64) *segment { return &s.segs[(off-dataStart)/s.super.segSize] }

func (s *Store) lookup(k Key) (entry, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.index.Get(entry{key: k})
}

// MaxValue is the largest value the store takes, in bytes.
func (s *Store) MaxValue() int64 { return s.maxValue }

// Exist tells whether k is stored, and the size of its value in bytes.
func (s *Store) Exist(k Key) (size int64, ok bool) {
	e, ok := s.lookup(k)
	s.c.looked(ok)
	return int64(e.size), ok
}

// Delete removes k. Once it returns, k is gone for good; Readers that have it
// open read on. An error leaves k as it was.
func (s *Store) Delete(k Key) (existed bool, err error) {
	if _, ok := s.lookup(k); !ok {
		return false, nil
	}
	sl, err := s.slot()
	if err != nil {
		return false, err
	}
	defer s.putSlot(sl)
	s.moving.RLock()
	defer s.moving.RUnlock()
	lock := s.stripe(k)
	lock.Lock()
	defer lock.Unlock()
	e, ok := s.lookup(k)
	if !ok {
		return false, nil
	}
	seg := s.segmentOf(e.off)
	if err := s.kill(sl, e, seg.gen); err != nil {
		return true, fmt.Errorf("kvlayer: delete %v: %w", k, err)
	}
	s.mu.Lock()
	s.index.Delete(e)
	s.drop(seg, e.span())
	s.mu.Unlock()
	s.c.deletes.Add(1)
	return true, nil
}

// List calls yield with keys from the lower bound from on (the zero Key: from
// the first) and their values' sizes in bytes, in the order of Key.Compare,
// until yield returns false. Keys stored or deleted meanwhile may show or not;
// all others show once. No lock is held while yield runs.
func (s *Store) List(from Key, yield func(Key, int64) bool) {
	var batch [64]entry
	for after := false; ; after = true {
		n := 0
		s.mu.RLock()
		s.index.Ascend(entry{key: from}, func(e entry) bool {
			if after && e.key == from {
				return true
			}
			batch[n] = e
			n++
			return n < len(batch)
		})
		s.mu.RUnlock()
		for i := range n {
			if !yield(batch[i].key, int64(batch[i].size)) {
				return
			}
		}
		if n < len(batch) {
			return
		}
		from = batch[n-1].key
	}
}

// Flush makes everything that had completed before it survive a power cut.
func (s *Store) Flush() error {
	sl, err := s.slot()
	if err != nil || s.mem {
		return err
	}
	defer s.putSlot(sl)
	return s.flush(sl)
}

func (s *Store) flush(sl *slot) error {
	if s.mem {
		return nil
	}
	sl.op.Kind, sl.op.Data = uring.OpFlush, nil
	return sl.op.Do(s.dev)
}

// Close flushes and returns the store's buffers. Writers are aborted and
// Readers closed before, by their owners; other calls fail with ErrClosed from
// here on. The device stays open.
func (s *Store) Close() error {
	s.alloc.Lock()
	defer s.alloc.Unlock()
	if s.closed.Load() {
		return nil
	}
	err := s.Flush()
	if s.closed.Store(true); s.mem {
		return err
	}
	for range cap(s.slots) {
		<-s.slots
	}
	close(s.slots)
	s.slotsBuf.Put()
	s.copyBuf.Put()
	return err
}

// Stats describes a store. Sizes are in bytes and count headers and padding.
type Stats struct {
	Keys     int
	Used     int64 // live records and writes in progress
	Capacity int64 // that can be in use
	MaxValue int64 // largest value

	Segments, FreeSegments int
	SegmentSize            int64

	Hits, Misses    uint64 // of Open and Exist
	Stores, Deletes uint64
	Corrupt         uint64 // headers and pieces that failed their checksum
	Cleaned         uint64 // segments
	Moved           uint64 // bytes moved by cleaning
}

type counters struct {
	hits, misses, stores, deletes, corrupt, cleaned, moved atomic.Uint64
}

func (c *counters) looked(hit bool) {
	if hit {
		c.hits.Add(1)
	} else {
		c.misses.Add(1)
	}
}

// Stats returns the store's present state.
func (s *Store) Stats() Stats {
	s.mu.RLock()
	defer s.mu.RUnlock()
	_, free := s.freeSegment()
	return Stats{
		Keys: s.index.Len(), Used: s.used, Capacity: s.capacity, MaxValue: s.maxValue,
		Segments: len(s.segs), FreeSegments: free, SegmentSize: s.super.segSize,
		Hits: s.c.hits.Load(), Misses: s.c.misses.Load(),
		Stores: s.c.stores.Load(), Deletes: s.c.deletes.Load(), Corrupt: s.c.corrupt.Load(),
		Cleaned: s.c.cleaned.Load(), Moved: s.c.moved.Load(),
	}
}
