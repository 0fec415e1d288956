package main

import (
	"bytes"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/kvof/kvof/uring"
)

// simulated is a drive in memory that keeps only the blocks that are not zero, so that it can be larger than memory.
type simulated struct {
	size    int64 // bytes
	written atomic.Int64

	mu     sync.RWMutex
	blocks map[int64]*[simulatedBlock]byte // by number; nil while closed
}

const simulatedBlock = 4096 // bytes

var zeroBlock [simulatedBlock]byte

func newSimulated(size int64) *simulated {
	return &simulated{size: size, blocks: map[int64]*[simulatedBlock]byte{}}
}

// Submit implements uring.Device. Ops have completed when it returns.
func (d *simulated) Submit(ops ...*uring.Op) {
	for _, o := range ops {
		o.Begin()
		o.Complete(d.do(o))
	}
}

func (d *simulated) do(o *uring.Op) error {
	n := int64(len(o.Data))
	if o.Kind == uring.OpZero || o.Kind == uring.OpDiscard {
		n = o.Len
	}
	if o.Kind == uring.OpRead {
		d.mu.RLock()
		defer d.mu.RUnlock()
	} else {
		d.mu.Lock()
		defer d.mu.Unlock()
	}
	switch {
	case d.blocks == nil:
		return uring.ErrClosed
	case o.Kind == uring.OpFlush:
		return nil
	case o.Off < 0 || (o.Off|n)%simulatedBlock != 0 || o.Off > d.size-n:
		return fmt.Errorf("%w: %v of %d bytes at %d", uring.ErrInvalid, o.Kind, n, o.Off)
	case o.Kind == uring.OpWrite:
		d.written.Add(n)
	}
	for at := int64(0); at < n; at += simulatedBlock {
		number := (o.Off + at) / simulatedBlock
		b := d.blocks[number]
		switch o.Kind {
		case uring.OpRead:
			if b == nil {
				b = &zeroBlock
			}
			copy(o.Data[at:], b[:])
		case uring.OpWrite:
			data := o.Data[at : at+simulatedBlock]
			if bytes.Equal(data, zeroBlock[:]) {
				delete(d.blocks, number)
				continue
			}
			if b == nil {
				b = new([simulatedBlock]byte)
				d.blocks[number] = b
			}
			copy(b[:], data)
		default:
			delete(d.blocks, number)
		}
	}
	return nil
}

// View returns nil: all goes through ops, where it is counted.
func (d *simulated) View(off, n int64) []byte { return nil }

func (d *simulated) Size() int64    { return d.size }
func (d *simulated) BlockSize() int { return simulatedBlock }

func (d *simulated) Info() uring.DeviceInfo {
	return uring.DeviceInfo{Kind: "simulated", Size: d.size, BlockSize: simulatedBlock}
}

// Close frees the memory.
func (d *simulated) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.blocks = nil
	return nil
}
