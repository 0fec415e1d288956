package kvlayer

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/kvof/kvof/uring"
)

// Errors to test for with errors.Is. Others come from the device: see uring.
var (
	ErrNotFound = errors.New("kvlayer: key does not exist")
	ErrExists   = errors.New("kvlayer: key exists")
	ErrNoSpace  = errors.New("kvlayer: no space, or the limit of keys is reached")
	ErrReplaced = errors.New("kvlayer: the key has another value")
	ErrTooLarge = errors.New("kvlayer: value is too large")
	ErrKeySize  = errors.New("kvlayer: a key has 1 to 16 bytes")
	ErrCorrupt  = errors.New("kvlayer: stored value is corrupt")
	ErrClosed   = errors.New("kvlayer: store is closed")
	ErrForeign  = errors.New("kvlayer: not a store this kvof can use")

	errInUse = errors.New("kvlayer: Writer or Reader is already in use")
	errIdle  = errors.New("kvlayer: Writer or Reader is not in use")
	errShort = errors.New("kvlayer: value committed before its last byte")
	errFull  = errors.New("kvlayer: no free segment")
)

// Mode says when a value may be stored.
type Mode uint8

const (
	StoreAlways   Mode = iota
	StoreIfExists      // replaces only: else ErrNotFound
	StoreIfAbsent      // creates only: else ErrExists
)

// Eviction says what makes room in a full store.
type Eviction uint8

const (
	EvictClock       Eviction = iota // the oldest values that nobody has read since they were stored or last spared
	EvictS3FIFO                      // a tenth of the space is for new values, the rest for those read at least twice there
	EvictSecondTouch                 // as EvictClock, but a value is kept only when its key is stored for a second time
	EvictFIFO                        // the oldest values, read or not: nothing is ever written twice
	EvictNever                       // nothing: a full store answers ErrNoSpace
)

func (e Eviction) String() string {
	return [...]string{"clock", "s3-fifo", "second-touch", "fifo", "never"}[min(e, EvictNever)]
}

// Options of a Store. The zero value is usable: a recomputable cache that takes
// what room there is and evicts by CLOCK.
type Options struct {
	MaxValue int64 // largest value in bytes; 0, or beyond what the pool takes: as large as that
	MaxKeys  int   // most keys; 0: as many as fit
	Eviction Eviction
	Quota    int64         // most bytes of records, headers and padding among them; 0: all of the pool
	Share    int64         // bytes of records that no other store of the pool can evict
	TTL      time.Duration // values older than that are not found; 0: no limit
	Flushed  bool          // a Store or Delete completes when it survives a power cut, not when it is written
	Strict   bool          // a corrupt value stays and answers ErrCorrupt until it is replaced; else it is dropped after the first time
	Log      *slog.Logger  // nil: the pool's, or silent

	// For Open, which makes the pool, alone: see PoolOptions.
	Progress func(done, total int)
	Scrub    int64
}

// Store is one tenant of a pool: a set of keys and their values, and the policy for them.
type Store struct {
	p      *Pool
	tenant int
	index  *index
	own    bool // the pool ends with the store

	o        Options   // under Pool.mu until attached
	attached bool      // under Pool.mu
	since    time.Time // when it was not attached any more
	maxValue int64
	closed   atomic.Bool
	ghost    *ghost
	c        counters

	used     atomic.Int64 // bytes of live records and of writes in progress
	held     atomic.Int64 // bytes of segments
	small    atomic.Int64 // those of classNew
	promised atomic.Int64 // keys of writes in progress that are not in the index; counted only under MaxKeys
	waiting  int          // Stores that wait for room, under Pool.mu
	strays   strays

	// Locks are taken in this order: a slot, the key's stripe, segment.meta, device.alloc,
	// Pool.mu, a leaf of the index. The stripe is held by who writes headers of the key's records.
	stripes [256]sync.Mutex
}

// Open opens the only store of a pool of one device, which it formats if its first
// 128 KiB are zero: see OpenPool. The store's Close closes the pool.
func Open(dev uring.Device, arena *uring.Arena, o Options) (*Store, error) {
	p, err := OpenPool([]uring.Device{dev}, arena, PoolOptions{Log: o.Log, Progress: o.Progress, Scrub: o.Scrub})
	if err != nil {
		return nil, err
	}
	s, err := p.Store(uuid.Nil, o)
	if err != nil {
		return nil, errors.Join(err, p.Close())
	}
	s.own = true
	return s, nil
}

// attach begins to serve. Under Pool.mu.
func (s *Store) attach(o Options) {
	p := s.p
	if o.Log == nil {
		o.Log = p.log
	}
	s.o, s.attached = o, true
	s.closed.Store(false)
	most := maxParts * p.super.extent
	for _, d := range p.devs { // the parts of a value fit into the segments that are not kept free
		most = min(most, int64(len(d.segs)-d.high())*(p.usable()/span(p.super.extent))*p.super.extent)
	}
	s.maxValue = max(p.super.extent, most)
	if o.MaxValue > 0 {
		s.maxValue = min(s.maxValue, o.MaxValue)
	}
	if s.ghost = nil; o.Eviction == EvictS3FIFO || o.Eviction == EvictSecondTouch {
		s.ghost = newGhost(s.limit())
	}
}

// evicts tells that values of s may go to make room. Those of a store that nobody
// opens may, too, but not before there was time to open it. Under Pool.mu.
func (s *Store) evicts() bool {
	if !s.attached {
		return time.Since(s.since) > time.Minute
	}
	return s.o.Eviction != EvictNever
}

// Close ends the service: Writers are aborted and Readers closed before, by their
// owners; other calls fail with ErrClosed from here on. Its values stay, without a
// guaranteed share, until it is opened again.
func (s *Store) Close() error {
	if !s.closed.CompareAndSwap(false, true) {
		return nil
	}
	if s.own {
		return s.p.Close()
	}
	err := s.p.flushAll()
	s.p.mu.Lock()
	s.attached, s.since = false, time.Now()
	s.o = Options{Log: s.p.log}
	s.p.mu.Unlock()
	return err
}

// Pool returns the pool that the store is part of.
func (s *Store) Pool() *Pool { return s.p }

func (s *Store) stripe(k Key) *sync.Mutex {
	return &s.stripes[s.index.hash(k.hi, k.lo, uint64(k.n))%uint64(len(s.stripes))]
}

// expired tells that a value has outlived the store's TTL.
func (s *Store) expired(e entry) bool { return s.o.TTL > 0 && age(e.seq()) > s.o.TTL }

// touches is how many reads of a value the eviction tells apart.
func (s *Store) touches() int {
	switch s.o.Eviction {
	case EvictS3FIFO:
		return 3
	case EvictClock, EvictSecondTouch:
		return 1
	}
	return 0
}

// lookup returns k's entry, unless it has expired.
func (s *Store) lookup(k Key, touches int) (entry, bool) {
	e, ok := s.index.get(k, 0, touches)
	return e, ok && !s.expired(e)
}

// MaxValue is the largest value the store takes, in bytes.
func (s *Store) MaxValue() int64 { return s.maxValue }

// Exist tells whether k is stored, and the size of its value in bytes.
func (s *Store) Exist(k Key) (size int64, ok bool) {
	e, ok := s.lookup(k, s.touches())
	if ok {
		g, _ := s.p.segmentOf(e.block())
		ok = !g.dev.lost.Load()
	}
	s.c.looked(ok)
	if !ok {
		return 0, false
	}
	return e.size(), true
}

// Size is the size of k's value in bytes, 0 without one. It counts as no read.
func (s *Store) Size(k Key) int64 {
	e, ok := s.lookup(k, 0)
	if !ok {
		return 0
	}
	return e.size()
}

// Buffered is how much arena memory bytes from to to of a value need if all of them are in it, in bytes: whole large buffers,
// but for the last piece. Pieces end where extents do, which are smaller than that on devices of less than 32 MiB.
func (s *Store) Buffered(from, to int64) int64 {
	if from >= to {
		return 0
	}
	e := s.p.piece()
	n := to - from + from%e
	return n + (n-1)/e*(uring.LargeBuf-e)
}

// Delete removes k. Once it returns, k is gone for good; Readers that have it
// open read on. After an error of the device k is as it was, or gone, or will be after a crash.
func (s *Store) Delete(k Key) (existed bool, err error) {
	if s.closed.Load() {
		return false, ErrClosed
	}
	e, ok := s.index.get(k, 0, 0)
	if !ok && s.strays.n.Load() == 0 {
		return false, nil
	}
	live := !s.expired(e)
	existed, err = s.erase(k, nil, reasonDelete)
	return existed && live, err
}

// erase removes k's value; that of only alone, if not nil.
func (s *Store) erase(k Key, only *entry, why reason) (existed bool, err error) {
	if s.closed.Load() {
		return false, ErrClosed
	}
	sl, err := s.p.slot()
	if err != nil {
		return false, err
	}
	defer s.p.putSlot(sl)
	lock := s.stripe(k)
	lock.Lock()
	defer lock.Unlock()
	e, ok := s.index.get(k, 0, 0)
	if ok && only != nil && e.seq() != only.seq() {
		return false, nil
	}
	g, err := s.kill(sl, k)
	if g != nil {
		defer g.meta.Unlock()
	}
	if err == nil && s.o.Flushed && g != nil {
		err = g.dev.sync()
	}
	if err != nil {
		return ok, fmt.Errorf("kvlayer: delete %v: %w", k, err)
	}
	s.forget(k, nil, why)
	return ok, nil
}

// kill marks k's record, if it has one, and its strays dead on the device. It returns the record's segment
// with meta locked: the record stays where it is until the caller has published what comes
// after it and unlocks. Under k's stripe.
func (s *Store) kill(sl *slot, k Key) (*segment, error) {
	if err := s.strays.bury(sl, func(t *stray) bool { return t.rec.key == k }); err != nil {
		return nil, err
	}
	for {
		e, ok := s.index.get(k, 0, 0)
		if !ok {
			return nil, nil // evicted meanwhile
		}
		g, off := s.p.segmentOf(e.block())
		g.meta.Lock()
		if now, ok := s.index.get(k, 0, 0); !ok || !now.same(e) { // it moved
			g.meta.Unlock()
			continue
		}
		if !g.dev.lost.Load() {
			return g, g.bury(sl, e, off)
		}
		for range 1000 { // the keeper tells the other devices
			if g.dev.out.Load() {
				return g, nil // it cannot come back
			}
			time.Sleep(time.Millisecond)
		}
		return g, uring.ErrGone
	}
}

// forget publishes es as what k has, and gives up the space of what it had.
func (s *Store) forget(k Key, es []entry, why reason) {
	var buf [maxParts]entry
	old := s.index.replace(k, es, buf[:0])
	s.freed(old, why)
}

// drop removes the value that e is a part of from memory, if it is there.
func (s *Store) drop(e entry, why reason) bool {
	var buf [maxParts]entry
	old := s.index.remove(e, buf[:0])
	s.freed(old, why)
	return len(old) > 0
}

// freed gives up the space of entries that were removed from the index.
func (s *Store) freed(old []entry, why reason) {
	for _, e := range old {
		n := s.span(e)
		g, _ := s.p.segmentOf(e.block())
		s.used.Add(-n)
		if g.live.Add(-n) == 0 {
			g.dev.wake() // it may be free
		}
	}
	if len(old) > 0 {
		s.c.removed(old[0], why)
	}
}

func (s *Store) span(e entry) int64 { return span(partSize(e.size(), e.part(), s.p.super.extent)) }

// List calls yield with keys from the lower bound from on (the zero Key: from
// the first) and their values' sizes in bytes, in the order of Key.Compare,
// until yield returns false. Keys stored or deleted meanwhile may show or not;
// all others show once. No lock is held while yield runs.
func (s *Store) List(from Key, yield func(Key, int64) bool) {
	s.index.ascend(from, func(e entry) bool { return s.expired(e) || yield(e.key(), e.size()) })
}

// Pin keeps k's value from being evicted until it is unpinned, replaced or deleted, also
// after a crash: a pin is as durable as a Store. ErrNotFound if there is no value.
func (s *Store) Pin(k Key, on bool) error {
	sl, err := s.p.slot()
	if err != nil {
		return err
	}
	defer s.p.putSlot(sl)
	lock := s.stripe(k)
	lock.Lock()
	defer lock.Unlock()
	for {
		e, ok := s.lookup(k, 0)
		switch {
		case !ok:
			return ErrNotFound
		case e.pinned() == on:
			return nil
		}
		if g, err := s.setPinned(sl, e, on); err == errChanged {
			continue // it moved
		} else if err != nil {
			return fmt.Errorf("kvlayer: pin %v: %w", k, err)
		} else if s.o.Flushed {
			if err := g.dev.sync(); err != nil {
				return err
			}
		}
		// Its other parts may have been on their way out, or be gone.
		there := false
		for _, e := range s.index.all(nil, k) {
			g, _ := s.p.segmentOf(e.block())
			g.meta.Lock() // who held it has evicted the value, or will see the pin
			_, there = s.lookup(k, 0)
			g.meta.Unlock()
		}
		if !there {
			return ErrNotFound
		}
		return nil
	}
}

// setPinned pins the value of e, its first part, in the index and on the device.
func (s *Store) setPinned(sl *slot, e entry, on bool) (*segment, error) {
	set := func(on bool) bool {
		return s.index.update(e, func(e *entry) {
			if e.meta &^= entryPinned; on {
				e.meta |= entryPinned
			}
		})
	}
	g, off := s.p.segmentOf(e.block())
	g.meta.Lock()
	defer g.meta.Unlock()
	if g.dev.lost.Load() {
		return g, ErrNotFound
	}
	if !set(on) {
		return g, errChanged
	}
	err := g.setPinned(sl, e, off, on)
	if err != nil {
		set(!on)
	}
	return g, err
}

// Pinned calls yield with the keys that are pinned, until it returns false.
func (s *Store) Pinned(yield func(Key, int64) bool) {
	s.index.ascend(Key{}, func(e entry) bool { return !e.pinned() || yield(e.key(), e.size()) })
}

// Flush makes everything that had completed before it survive a power cut.
func (s *Store) Flush() error {
	if s.closed.Load() {
		return ErrClosed
	}
	return s.p.flushAll()
}

// reason says why a value went.
type reason uint8

const (
	reasonReplace  reason = iota // by another value of its key
	reasonDelete                 // by the host
	reasonCapacity               // to make room
	reasonExpired                // its TTL had passed
	reasonCorrupt                // it failed its checksum
	reasonLost                   // with its device
	reasons        = 6
)

func (r reason) String() string {
	return [...]string{"replaced", "deleted", "capacity", "expired", "corrupt", "lost"}[r]
}

// EvictionReasons name the counts of Stats.Evictions. What hosts replace and delete is not evicted.
var EvictionReasons = [...]string{"capacity", "expired", "corrupt", "lost"}

// EvictionAgeBounds are the upper bounds, exclusive, of the counts of Stats.EvictionAges.
var EvictionAgeBounds = [...]time.Duration{time.Second, 10 * time.Second, time.Minute, 10 * time.Minute, time.Hour, 6 * time.Hour,
	24 * time.Hour, 3 * 24 * time.Hour, 7 * 24 * time.Hour, 30 * 24 * time.Hour}

const ageBuckets = len(EvictionAgeBounds) + 1

// Stats describes a store. Sizes are in bytes and count headers and padding.
type Stats struct {
	Keys     int
	Used     int64 // live records and writes in progress
	Capacity int64 // that can be in use
	Held     int64 // of the segments in use
	MaxValue int64 // largest value

	// Of its pool.
	Segments, FreeSegments int
	SegmentSize            int64
	IndexBytes             int64  // memory of the pool's indices
	Scrubbed               uint64 // bytes verified in the background

	Hits, Misses    uint64 // of Open and Exist
	Stores, Deletes uint64
	Written         uint64                       // bytes of records that Stores wrote
	Moved           uint64                       // bytes of records that reclaiming wrote again
	Reclaimed       uint64                       // segments
	Evictions       [len(EvictionReasons)]uint64 // values
	EvictionAge     uint64                       // of all values evicted for capacity, summed: seconds
	EvictionAges    [ageBuckets]uint64           // of how many it was below each of EvictionAgeBounds and not below the one before; the last: the rest
	NotAdmitted     uint64                       // Stores whose value was not kept (EvictSecondTouch)
	Corrupt         uint64                       // headers and pieces that failed their checksum
}

// WriteAmplification is what was written for each byte stored.
func (s Stats) WriteAmplification() float64 {
	if s.Written == 0 {
		return 1
	}
	return float64(s.Written+s.Moved) / float64(s.Written)
}

type counters struct {
	hits, misses, stores, written, moved, cleaned, skipped, corrupt, age atomic.Uint64

	reasons [reasons]atomic.Uint64
	ages    [ageBuckets]atomic.Uint64
}

func (c *counters) looked(hit bool) {
	if hit {
		c.hits.Add(1)
	} else {
		c.misses.Add(1)
	}
}

func (c *counters) removed(e entry, why reason) {
	c.reasons[why].Add(1)
	if why == reasonCapacity {
		a := age(e.seq())
		c.age.Add(uint64(a / time.Second))
		i, at := slices.BinarySearch(EvictionAgeBounds[:], a)
		if at {
			i++
		}
		c.ages[i].Add(1)
	}
}

// Stats returns the store's present state.
func (s *Store) Stats() Stats {
	p := s.p
	st := Stats{
		Keys: int(s.index.keys.Load()), Used: s.used.Load(), Held: s.held.Load(), Capacity: s.limit(), MaxValue: s.maxValue,
		SegmentSize: p.super.segSize, Scrubbed: p.scrub.bytes.Load(),
		Hits: s.c.hits.Load(), Misses: s.c.misses.Load(),
		Stores: s.c.stores.Load(), Deletes: s.c.reasons[reasonDelete].Load(),
		Written: s.c.written.Load(), Moved: s.c.moved.Load(), Reclaimed: s.c.cleaned.Load(),
		EvictionAge: s.c.age.Load(), NotAdmitted: s.c.skipped.Load(), Corrupt: s.c.corrupt.Load(),
	}
	for i := range st.EvictionAges {
		st.EvictionAges[i] = s.c.ages[i].Load()
	}
	for i := range st.Evictions {
		st.Evictions[i] = s.c.reasons[int(reasonCapacity)+i].Load()
	}
	if !p.closed.Load() {
		st.IndexBytes = p.slab.bytes()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, d := range p.devs {
		if !d.lost.Load() {
			st.Segments += len(d.segs)
			st.FreeSegments += len(d.free)
		}
	}
	return st
}

// limit is how many bytes of records the store can have.
func (s *Store) limit() int64 {
	c := s.p.Capacity()
	if s.o.Quota > 0 {
		c = min(c, s.o.Quota)
	}
	return c
}
