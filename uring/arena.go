package uring

import (
	"fmt"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The buffer sizes of an arena, in bytes. Buffers start on a multiple of
// their size, so they are page aligned and fit any direct I/O.
const (
	SmallBuf  = 16 << 10
	MediumBuf = 256 << 10
	LargeBuf  = 1 << 20
)

const hugePage = 2 << 20

// Arena is one mapping off the Go heap, carved into buffers of three sizes.
// Memory is touched only as buffers come into use, lowest addresses first.
// All methods may be called from any goroutine.
type Arena struct {
	mapping []byte // as mapped
	mem     []byte // the part of mapping that starts on a huge page
	huge    bool
	large   class
	medium  class
	small   class
}

// class is the buffers of one size: a stack of free ones and, while there are
// none, a queue of goroutines waiting for one.
type class struct {
	mem  []byte // the class's part of the arena
	size int

	mu      sync.Mutex
	free    []uint32  // stack of indices
	puts    []uint32  // per buffer, how often it was Put: tells a Buf put twice
	waiting []*waiter // FIFO, from head
	head    int
	idle    []*waiter // waiters to reuse
	waits   uint64
}

type waiter struct{ got chan uint32 }

// Buf is a piece of memory: from an Arena, which gets it back by Put, or
// somebody else's (View, and the zero Buf), for which Put does nothing. It is
// a value; of all its copies exactly one is Put.
type Buf struct {
	Data []byte

	class *class
	index uint32
	puts  uint32
}

// View returns a Buf that owns nothing: Put leaves b alone.
func View(b []byte) Buf { return Buf{Data: b} }

// NewArena maps size bytes, rounded up to 2 MiB: about one eighth for small
// buffers, a quarter for medium ones, the rest for large ones. It takes huge pages (MAP_HUGETLB) when the
// system has set enough aside, and normal pages otherwise, advising
// transparent huge pages.
func NewArena(size int) (*Arena, error) {
	if size <= 0 {
		return nil, fmt.Errorf("uring: arena of %d bytes: the size must be positive", size)
	}
	size = roundUp(size, hugePage)
	const prot, flags = unix.PROT_READ | unix.PROT_WRITE, unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
	a := &Arena{huge: true}
	var err error
	if a.mapping, err = unix.Mmap(-1, 0, size, prot, flags|unix.MAP_HUGETLB); err != nil {
		a.huge = false
		a.mapping, err = unix.Mmap(-1, 0, size+hugePage, prot, flags|unix.MAP_NORESERVE)
	}
	if err != nil {
		return nil, fmt.Errorf("uring: cannot map an arena of %d MiB (%w): choose a smaller one", size>>20, err)
	}
	skip := -int(address(a.mapping)) & (hugePage - 1)
	a.mem = a.mapping[skip : skip+size : skip+size]
	if !a.huge {
		_ = unix.Madvise(a.mem, unix.MADV_HUGEPAGE)
	}
	_ = unix.Madvise(a.mem, unix.MADV_DONTDUMP) // payload has no place in a core file

	small := roundUp(size/8, MediumBuf)
	large := (size - small - size/4) &^ (LargeBuf - 1)
	a.large.init(a.mem[:large], LargeBuf)
	a.medium.init(a.mem[large:size-small], MediumBuf)
	a.small.init(a.mem[size-small:], SmallBuf)
	return a, nil
}

func (c *class) init(mem []byte, size int) {
	n := len(mem) / size
	c.mem, c.size = mem, size
	c.puts = make([]uint32, n)
	c.free = make([]uint32, n)
	for i := range c.free {
		c.free[i] = uint32(n - 1 - i)
	}
}

func (a *Arena) class(n int) *class {
	switch {
	case n < 0 || n > LargeBuf:
		panic(fmt.Sprintf("uring: no arena buffer has %d bytes", n))
	case n <= SmallBuf:
		return &a.small
	case n <= MediumBuf:
		return &a.medium
	default:
		return &a.large
	}
}

// Get returns a buffer of n bytes, 0 to LargeBuf (others panic), with whatever
// its last user left in it. It waits while all of its class are out; waiters
// are served in the order they came. The caller Puts it.
func (a *Arena) Get(n int) Buf {
	c := a.class(n)
	c.mu.Lock()
	if len(c.free) > 0 {
		b := c.take(n)
		c.mu.Unlock()
		return b
	}
	c.waits++
	var w *waiter
	if last := len(c.idle) - 1; last >= 0 {
		w, c.idle = c.idle[last], c.idle[:last]
	} else {
		w = &waiter{make(chan uint32, 1)}
	}
	if c.head > 0 && len(c.waiting) == cap(c.waiting) { // slide rather than grow
		c.waiting = c.waiting[:copy(c.waiting, c.waiting[c.head:])]
		c.head = 0
	}
	c.waiting = append(c.waiting, w)
	c.mu.Unlock()

	i := <-w.got
	c.mu.Lock()
	c.idle = append(c.idle, w)
	b := c.buf(i, n)
	c.mu.Unlock()
	return b
}

// TryGet is Get for callers that cannot wait: false means none was free.
func (a *Arena) TryGet(n int) (Buf, bool) {
	c := a.class(n)
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.free) == 0 {
		return Buf{}, false
	}
	return c.take(n), true
}

func (c *class) take(n int) Buf {
	last := len(c.free) - 1
	i := c.free[last]
	c.free = c.free[:last]
	return c.buf(i, n)
}

func (c *class) buf(i uint32, n int) Buf {
	off := int(i) * c.size
	return Buf{Data: c.mem[off : off+n : off+c.size], class: c, index: i, puts: c.puts[i]}
}

// Put gives the buffer back to its arena. A second Put of the same buffer
// panics.
func (b Buf) Put() {
	c := b.class
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.puts[b.index] != b.puts {
		panic("uring: Buf put twice")
	}
	c.puts[b.index]++
	if c.head == len(c.waiting) {
		c.free = append(c.free, b.index)
		return
	}
	w := c.waiting[c.head]
	c.waiting[c.head] = nil
	if c.head++; c.head == len(c.waiting) {
		c.waiting, c.head = c.waiting[:0], 0
	}
	w.got <- b.index // straight to the next holder: nobody overtakes the queue
}

// Memory is all of the arena, for what must know its memory beforehand, such as an RDMA device. It ends with Close.
func (a *Arena) Memory() []byte { return a.mem }

// ArenaStats describes an arena.
type ArenaStats struct {
	Size                 int64 // bytes
	HugePages            bool  // MAP_HUGETLB was granted
	Small, Medium, Large ClassStats
}

// Used is how many buffers are out.
func (s ArenaStats) Used() int { return s.Small.Used + s.Medium.Used + s.Large.Used }

// ClassStats counts the buffers of one size.
type ClassStats struct {
	Free, Used int    // buffers
	Waits      uint64 // Gets that had to wait, since the arena was made
}

// Stats returns the arena's present state.
func (a *Arena) Stats() ArenaStats {
	return ArenaStats{Size: int64(len(a.mem)), HugePages: a.huge, Small: a.small.stats(), Medium: a.medium.stats(), Large: a.large.stats()}
}

func (c *class) stats() ClassStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	return ClassStats{Free: len(c.free), Used: len(c.puts) - len(c.free), Waits: c.waits}
}

// Close unmaps the arena. Devices that registered it are closed before, and
// every buffer is back: else it fails and the arena stays.
func (a *Arena) Close() error {
	if n := a.Stats().Used(); n > 0 {
		return fmt.Errorf("uring: arena closed with %d buffers still out", n)
	}
	m := a.mapping
	a.mapping, a.mem = nil, nil
	a.small.free, a.medium.free, a.large.free = nil, nil, nil
	if m == nil {
		return nil
	}
	return unix.Munmap(m)
}

// offset returns where in the arena b starts, if it lies there.
func (a *Arena) offset(b []byte) (int, bool) {
	off := int(address(b) - address(a.mem)) // huge, or negative, outside
	return off, off >= 0 && off <= len(a.mem)-len(b)
}

func address(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }

// roundUp rounds n up to a multiple of unit, a power of two.
func roundUp[T int | int64 | uintptr](n, unit T) T { return (n + unit - 1) &^ (unit - 1) }
