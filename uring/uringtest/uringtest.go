// Package uringtest makes devices misbehave, for the tests of what is built on
// them: single faults by hand ([Wrap]), faults by chance that a seed repeats
// ([Plan]), and the end of the process or of the power ([Device.CutAfter]).
package uringtest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"time"
	"unsafe"

	"github.com/kvof/kvof/uring"
)

// ErrOff is the result of every op that had not completed at a cut, and of all
// later ones until Restart.
var ErrOff = errors.New("uringtest: the device is off")

// Fault is what happens to one op. The zero Fault lets it pass.
type Fault struct {
	Err     error           // the op's result
	Torn    bool            // a write: only its first Keep bytes reach the device, and then Err, or success, is reported
	Keep    int64           // bytes; 0 loses the write whole
	Corrupt func(b []byte)  // changes what a write stores, or what a read returns
	Late    int             // ops submitted later that may overtake it
	Delay   time.Duration   // before the op is carried out, or, with Hold,
	Hold    <-chan struct{} // once this is closed; others do not wait for it
}

// Device passes ops to another device, as its hook allows, one at a time in a
// goroutine that lets others run first, so that there are several in flight to
// choose from. It has no View, so that its user does all through ops; it
// reports blocks of 4096 bytes over memory, and refuses ops that are not aligned
// to them, so that the user keeps to what drives take.
type Device struct {
	uring.Device
	hook    func(*uring.Op) Fault
	running sync.WaitGroup

	*power
	// Under power.mu:
	queue  []flight
	count  int      // of ops queued
	busy   bool     // the goroutine runs
	flying []*write // submitted
	cache  []*write // carried out since the last flush
	seq    uint64   // of the newest in cache
}

// power is what devices have that end together.
type power struct {
	mu   sync.Mutex
	devs []*Device
	life int // counts Restarts: an op ends in the life in which it began
	off  bool
	cut  int // writes to carry out until the cut, this one torn; 0: none is planned
	loss bool
	rnd  *rand.Rand // what the cut does
}

// flight is an op in flight.
type flight struct {
	op    *uring.Op
	fault Fault
	turn  int    // the lowest is next
	w     *write // or nil
	life  int
	seq   uint64 // of the newest write that had completed
}

// write is a write that a cut may undo.
type write struct {
	off      int64
	old, new []byte // old: only once carried out
	seq      uint64
}

// Wrap returns dev with hook asked about every op, in the order submitted and
// before it starts. The hook may be called from several goroutines at once; it
// reads the op and leaves it alone. A nil hook lets all ops pass.
func Wrap(dev uring.Device, hook func(*uring.Op) Fault) *Device {
	if hook == nil {
		hook = func(*uring.Op) Fault { return Fault{} }
	}
	d := &Device{Device: dev, hook: hook, power: new(power)}
	d.devs = []*Device{d}
	return d
}

// Together lets devices that are not in use end together: what CutAfter, Cut, Off
// and Restart do and tell of one of them holds for all, and the writes of all
// count.
func Together(devs ...*Device) {
	for _, d := range devs {
		d.power = devs[0].power
	}
	devs[0].devs = devs
}

const (
	block  = 4096
	sector = 512 // what a drive writes whole or not at all
)

// View returns nil, also for a memory device.
func (d *Device) View(off, n int64) []byte { return nil }

// BlockSize is 4096 over memory, else the device's own.
func (d *Device) BlockSize() int {
	if bs := d.Device.BlockSize(); bs > 1 {
		return bs
	}
	return block
}

// CutAfter plans the end: the n-th write from now on, 1 or more, is the last
// that is begun to be carried out. Of it, and of each write in flight then,
// nothing, all, or any of its sectors has reached the device; with a loss of power the
// same goes for each write from now on that no flush has covered. All ops
// complete with ErrOff from there on. The outcome depends on seed and on the ops.
// Discard and Zero count as writes of zeroes.
func (p *power) CutAfter(n int, loss bool, seed uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut, p.loss, p.rnd = n, loss, rand.New(rand.NewPCG(seed, 0))
}

// Cut carries out the end that CutAfter planned now, if it has not come yet.
func (p *power) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.rnd != nil && !p.off {
		p.end()
	}
}

// Off tells whether the cut has come.
func (p *power) Off() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.off
}

// Restart lets the device work again, with what the cut left on it, and plans
// no cut. What is still in flight of the time before is lost.
func (p *power) Restart() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.life++
	p.off, p.cut, p.rnd = false, 0, nil
	for _, d := range p.devs {
		d.flying, d.cache = nil, nil
	}
}

// Submit implements uring.Device.
func (d *Device) Submit(ops ...*uring.Op) {
	for _, o := range ops {
		o.Begin()
		f := d.hook(o)
		if mask := int64(d.BlockSize() - 1); o.Kind != uring.OpFlush && (o.Off|int64(len(o.Data))|o.Len)&mask != 0 {
			o.Complete(fmt.Errorf("uringtest: %w: %v at %d is not aligned", uring.ErrInvalid, o.Kind, o.Off))
			continue
		}
		d.mu.Lock()
		d.count++
		fl := flight{op: o, fault: f, turn: d.count + f.Late, life: d.life, seq: d.seq}
		switch {
		case d.off:
		case o.Kind == uring.OpWrite:
			fl.w = &write{off: o.Off, new: o.Data}
		case d.rnd != nil && (o.Kind == uring.OpDiscard || o.Kind == uring.OpZero):
			fl.w = &write{off: o.Off, new: make([]byte, o.Len)}
		}
		if fl.w != nil {
			d.flying = append(d.flying, fl.w)
		}
		if f.Delay > 0 || f.Hold != nil {
			d.running.Go(func() {
				time.Sleep(f.Delay)
				if f.Hold != nil {
					<-f.Hold
				}
				o.Complete(d.do(&fl))
			})
		} else if d.queue = append(d.queue, fl); !d.busy {
			d.busy = true
			d.running.Go(d.run)
		}
		d.mu.Unlock()
	}
}

// run carries out what is queued.
func (d *Device) run() {
	for {
		for range 4 {
			runtime.Gosched() // whoever can, submits more
		}
		d.mu.Lock()
		next := 0
		for i := range d.queue {
			if d.queue[i].turn < d.queue[next].turn {
				next = i
			}
		}
		if len(d.queue) == 0 {
			d.busy = false
			d.mu.Unlock()
			return
		}
		fl := d.queue[next]
		d.queue = slices.Delete(d.queue, next, next+1)
		d.mu.Unlock()
		fl.op.Complete(d.do(&fl))
	}
}

// Close waits for ops in flight, held ones too, and closes the device below.
func (d *Device) Close() error {
	d.running.Wait()
	return d.Device.Close()
}

func (d *Device) do(fl *flight) error {
	o, f := fl.op, &fl.fault
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.off || d.life != fl.life {
		return ErrOff
	}
	switch {
	case fl.w != nil:
		return d.write(fl.w, f)
	case f.Err != nil:
		return f.Err
	case o.Kind == uring.OpFlush:
		d.cache = slices.DeleteFunc(d.cache, func(w *write) bool { return w.seq <= fl.seq })
	}
	in := uring.Op{Kind: o.Kind, Off: o.Off, Len: o.Len, Data: o.Data}
	if err := in.Do(d.Device); err != nil {
		return err
	}
	if o.Kind == uring.OpRead && f.Corrupt != nil {
		f.Corrupt(o.Data)
	}
	return nil
}

func (d *Device) write(w *write, f *Fault) error {
	if d.cut > 0 {
		if d.cut--; d.cut == 0 {
			d.end()
			return ErrOff
		}
	}
	d.flying = slices.DeleteFunc(d.flying, func(o *write) bool { return o == w })
	if f.Torn {
		w.new = w.new[:min(f.Keep, int64(len(w.new)))]
	} else if f.Err != nil {
		return f.Err
	}
	if f.Corrupt != nil {
		w.new = aligned(w.new)
		f.Corrupt(w.new)
	}
	if d.rnd != nil && d.loss {
		w.new, w.old = aligned(w.new), aligned(w.new)
		if err := d.transfer(uring.OpRead, w.off, w.old); err != nil {
			return err
		}
		d.seq++
		w.seq = d.seq
		d.cache = append(d.cache, w)
	}
	if err := d.transfer(uring.OpWrite, w.off, w.new); err != nil {
		return err
	}
	return f.Err
}

func (d *Device) transfer(kind uring.OpKind, off int64, b []byte) error {
	if len(b) == 0 {
		return nil
	}
	return (&uring.Op{Kind: kind, Off: off, Data: b}).Do(d.Device)
}

// end leaves on the devices what a cut leaves.
func (p *power) end() {
	p.off = true
	for _, d := range p.devs {
		for _, w := range slices.Backward(d.cache) { // what was durable
			d.must(d.transfer(uring.OpWrite, w.off, w.old))
		}
		for _, w := range append(d.cache, d.flying...) {
			d.leave(w)
		}
		d.cache, d.flying = nil, nil
	}
}

// leave leaves of a write what chance says.
func (d *Device) leave(w *write) {
	b := aligned(w.new)
	switch d.rnd.IntN(4) {
	case 0: // lost
		return
	case 1: // cut off
		b = b[:d.rnd.IntN(len(b)/sector+1)*sector]
	case 2: // any of its sectors
		d.must(d.transfer(uring.OpRead, w.off, b))
		for i := 0; i+sector <= len(b); i += sector {
			if d.rnd.IntN(2) == 0 {
				copy(b[i:i+sector], w.new[i:])
			}
		}
	}
	d.must(d.transfer(uring.OpWrite, w.off, b))
}

func (d *Device) must(err error) {
	if err != nil {
		panic(err) // the device below is not to fail on its own
	}
}

// aligned returns a copy of b that direct I/O takes.
func aligned(b []byte) []byte {
	const page = 4096
	c := make([]byte, len(b)+page)
	c = c[-int(uintptr(unsafe.Pointer(unsafe.SliceData(c))))&(page-1):]
	return c[:copy(c, b)]
}
