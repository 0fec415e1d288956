package uring

import (
	"fmt"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// memory is a Device in anonymous memory.
type memory struct {
	mu     sync.RWMutex // read: an op runs; write: Close
	mem    []byte
	size   int64
	pinned bool // hardware knows the pages: they stay
	closed bool
}

// NewMemory returns a device of size bytes of anonymous memory, zeroed. Pages
// are taken as they are written and given back by OpDiscard and OpZero. Its
// contents end with Close. Ops on it copy; View spares the copy.
func NewMemory(size int64) (Device, error) {
	if size <= 0 || size != int64(int(size)) {
		return nil, fmt.Errorf("uring: memory device of %d bytes: the size must be positive", size)
	}
	m, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("uring: cannot map a memory device of %d MiB (%w): choose a smaller one", size>>20, err)
	}
	_ = unix.Madvise(m, unix.MADV_HUGEPAGE)
	_ = unix.Madvise(m, unix.MADV_DONTDUMP)
	return &memory{mem: m, size: size}, nil
}

func (d *memory) Submit(ops ...*Op) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	for _, o := range ops {
		o.Begin()
		o.Complete(d.do(o))
	}
}

func (d *memory) do(o *Op) error {
	if d.closed {
		return ErrClosed
	}
	if err := o.check(d.size, 1, fileKinds); err != nil {
		return err
	}
	if o.Kind == OpFlush {
		return nil // and Off may be anything
	}
	at := d.mem[o.Off : o.Off+o.size()]
	switch o.Kind {
	case OpRead:
		move(o.Data, at)
	case OpWrite:
		move(at, o.Data)
	case OpDiscard, OpZero:
		if d.pinned {
			clear(at)
		} else {
			zero(at)
		}
	}
	return nil
}

func move(dst, src []byte) {
	if unsafe.SliceData(dst) != unsafe.SliceData(src) { // a View comes back as Data
		copy(dst, src)
	}
}

// zero clears b and gives its whole pages back.
func zero(b []byte) {
	page := os.Getpagesize()
	head := min(len(b), -int(address(b))&(page-1))
	tail := head + (len(b)-head)&^(page-1)
	if tail > head && unix.Madvise(b[head:tail], unix.MADV_DONTNEED) != nil {
		clear(b[head:tail])
	}
	clear(b[:head])
	clear(b[tail:])
}

func (d *memory) View(off, n int64) []byte {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if off < 0 || n < 0 || off > d.size || n > d.size-off || d.mem == nil {
		return nil
	}
	return d.mem[off : off+n : off+n]
}

// Pinner is a Device in memory.
type Pinner interface {
	// Pin makes the device keep its pages: hardware is about to register them.
	Pin()
}

func (d *memory) Pin() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.pinned = true
}

func (d *memory) Size() int64    { return d.size }
func (d *memory) BlockSize() int { return 1 }

func (d *memory) Info() DeviceInfo {
	return DeviceInfo{Kind: "memory", Size: d.size, BlockSize: 1}
}

func (d *memory) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil
	}
	m := d.mem
	d.closed, d.mem = true, nil
	return unix.Munmap(m)
}
