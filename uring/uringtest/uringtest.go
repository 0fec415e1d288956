// Package uringtest makes devices misbehave, for the tests of what is built on
// them.
package uringtest

import (
	"sync"
	"time"
	"unsafe"

	"github.com/kvof/kvof/uring"
)

// Fault is what happens to one op. The zero Fault lets it pass.
type Fault struct {
	Err     error           // the op's result
	Torn    bool            // a write: only its first Keep bytes reach the device, and then Err, or success, is reported
	Keep    int64           // bytes; 0 loses the write whole
	Corrupt func(b []byte)  // changes what a write stores, or what a read returns
	Delay   time.Duration   // before the op starts
	Hold    <-chan struct{} // the op starts once this is closed
}

// Device passes ops to another device, as its hook allows. Ops of one Submit
// may start in any order, as on a drive. It has no View, so that its user does
// all through ops.
type Device struct {
	uring.Device
	hook    func(*uring.Op) Fault
	running sync.WaitGroup
}

// Wrap returns dev with hook asked about every op, in the order submitted and
// before it starts. The hook may be called from several goroutines at once; it
// reads the op and leaves it alone.
func Wrap(dev uring.Device, hook func(*uring.Op) Fault) *Device {
	return &Device{Device: dev, hook: hook}
}

// View returns nil, also for a memory device.
func (d *Device) View(off, n int64) []byte { return nil }

// Submit implements uring.Device.
func (d *Device) Submit(ops ...*uring.Op) {
	for _, o := range ops {
		o.Begin()
		f := d.hook(o)
		d.running.Go(func() { o.Complete(d.do(o, f)) })
	}
}

// Close waits for ops in flight, held ones too, and closes the device below.
func (d *Device) Close() error {
	d.running.Wait()
	return d.Device.Close()
}

func (d *Device) do(o *uring.Op, f Fault) error {
	time.Sleep(f.Delay)
	if f.Hold != nil {
		<-f.Hold
	}
	in := uring.Op{Kind: o.Kind, Off: o.Off, Len: o.Len, Data: o.Data}
	if o.Kind == uring.OpWrite {
		if f.Torn {
			in.Data = in.Data[:min(f.Keep, int64(len(in.Data)))]
		} else if f.Err != nil {
			return f.Err
		}
		if f.Corrupt != nil {
			in.Data = aligned(in.Data)
			f.Corrupt(in.Data)
		}
	} else if f.Err != nil {
		return f.Err
	}
	if err := in.Do(d.Device); err != nil {
		return err
	}
	if o.Kind == uring.OpRead && f.Corrupt != nil {
		f.Corrupt(o.Data)
	}
	return f.Err
}

// aligned returns a copy of b that direct I/O takes.
func aligned(b []byte) []byte {
	const page = 4096
	c := make([]byte, len(b)+page)
	c = c[-int(uintptr(unsafe.Pointer(unsafe.SliceData(c))))&(page-1):]
	return c[:copy(c, b)]
}
