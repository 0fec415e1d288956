package kvlayer

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/google/uuid"
	"github.com/kvof/kvof/uring"
)

// Pool is one capacity over one or more devices, which one or more Stores share.
type Pool struct {
	arena *uring.Arena
	log   *slog.Logger
	mem   bool      // all devices are memory: values are written and read in place
	super super     // the pool's; member and segments mean nothing here
	devs  []*device // those that are there, by member
	per   int64     // blocks of a segment
	slab  *slab
	seq   atomic.Uint64
	scrub scrubber

	slots    chan *slot
	slotsBuf uring.Buf

	meta sync.Mutex // superblocks change
	mu   sync.Mutex // segments, open and free ones: never held across I/O
	// Under mu:
	gen     uint64        // of the newest segment
	stores  []*Store      // by tenant number
	changed chan struct{} // closed when space may have come free; nil when nobody waits
	asks    uint64        // Stores that found no room, counted
	waiting int           // those that wait now

	closed atomic.Bool
	stop   chan struct{}
	work   sync.WaitGroup
}

// PoolOptions of OpenPool. The zero value is usable.
type PoolOptions struct {
	Log      *slog.Logger          // nil: silent
	Progress func(done, total int) // called while OpenPool reads segments, by one goroutine at a time
	Scrub    int64                 // bytes a second that are read and verified in the background; 0: none
}

// device is one device of a pool.
type device struct {
	uring.Device
	p      *Pool
	member int
	segs   []segment
	first  int64 // the pool's number of segs[0]
	places int   // placement handles
	lost   atomic.Bool
	out    atomic.Bool  // lost, and the others know: what it holds cannot come back
	load   atomic.Int64 // bytes of writes in progress
	errs   atomic.Int64 // failed ops in a row
	flush  flusher

	alloc sync.Mutex // opens segments; before Pool.mu
	kick  chan struct{}
	copy  uring.Buf // of the keeper
	// Under Pool.mu:
	free   []*segment          // the one unused for longest first
	open   [][classes]*segment // by tenant
	want   int64               // bytes of the largest request that waits for room
	stuck  uint64              // the last of Pool.asks for which nothing could be reclaimed
	busy   bool                // but more when Readers and writes in progress end
	urgent bool                // reclaiming, up to the high watermark
}

// slot is what one header's I/O needs. Slots are the pool's own, not taken
// from the shared arena: nobody holds one while waiting for the network.
type slot struct {
	op  uring.Op
	mem []byte // a block
}

const headerSlots = uring.MediumBuf / block

// OpenPool opens the pool that devs are the devices of, in any order. Devices whose first
// 128 KiB are zero are formatted: all of them as a new pool, some of them as
// additions to the pool of the others. A device of the pool that is missing has lost its
// values, also should it come back later. Data that is not a pool of this version is ErrForeign.
//
// It rebuilds the index from the log. Devices must support blocks of 4096 bytes. Unless
// they are memory the pool holds a medium buffer of the arena, and a large one for each device,
// until Close. Neither devices nor arena are closed with the pool.
func OpenPool(devs []uring.Device, arena *uring.Arena, o PoolOptions) (*Pool, error) {
	p := &Pool{arena: arena, log: o.Log, mem: true, stop: make(chan struct{})}
	if p.log == nil {
		p.log = slog.New(slog.DiscardHandler)
	}
	if len(devs) == 0 || len(devs) > maxMembers {
		return nil, fmt.Errorf("kvlayer: a pool has 1 to %d devices, not %d", maxMembers, len(devs))
	}
	for _, dev := range devs {
		if bs := dev.BlockSize(); bs > block {
			return nil, fmt.Errorf("kvlayer: the device's blocks have %d bytes, a store needs 4096 or less", bs)
		}
		p.mem = p.mem && dev.View(0, block) != nil
		p.devs = append(p.devs, &device{Device: dev, p: p, places: dev.Info().Placements, kick: make(chan struct{}, 1)})
	}
	var err error
	if p.slab, err = newSlab(); err != nil {
		return nil, err
	}
	if err := p.takeBuffers(); err != nil {
		p.slab.close()
		return nil, err
	}
	if err := p.recover(o.Progress); err != nil {
		p.release()
		return nil, err
	}
	for _, d := range p.devs {
		p.work.Go(d.keep)
		d.wake()
	}
	p.scrub.rate.Store(o.Scrub)
	p.work.Go(p.scrubAll)
	return p, nil
}

// piece is what an arena buffer holds of a value at most, bytes: pieces begin at multiples of it. Extents are powers of two.
func (p *Pool) piece() int64 { return min(p.super.extent, uring.LargeBuf) }

// Buffers is how many arena buffers a pool of n devices that are not memory holds.
func Buffers(n int) (large, medium int) { return n, 1 }

func (p *Pool) takeBuffers() error {
	p.slots = make(chan *slot, headerSlots)
	if p.mem {
		for range cap(p.slots) {
			p.slots <- &slot{mem: make([]byte, block)}
		}
		return nil
	}
	take := func(b *uring.Buf, size int) (ok bool) {
		for range 1000 { // a busy arena frees some soon
			if *b, ok = p.arena.TryGet(size); ok {
				break
			}
			time.Sleep(time.Millisecond)
		}
		return ok
	}
	ok := take(&p.slotsBuf, uring.MediumBuf)
	for _, d := range p.devs {
		ok = ok && take(&d.copy, uring.LargeBuf)
	}
	if !ok {
		p.putBuffers()
		return errors.New("kvlayer: the buffer arena is used up; make it larger")
	}
	for m := p.slotsBuf.Data; len(m) > 0; m = m[block:] {
		sl := &slot{mem: m[:block:block]}
		sl.op.Unpaced = true // what a keeper copies makes room for the others
		p.slots <- sl
	}
	return nil
}

func (p *Pool) putBuffers() {
	p.slotsBuf.Put()
	for _, d := range p.devs {
		d.copy.Put()
	}
}

// release ends what OpenPool began.
func (p *Pool) release() {
	p.closed.Store(true)
	p.slab.close()
	p.putBuffers()
}

// Close flushes and ends the pool. Its Stores are closed before.
func (p *Pool) Close() error {
	if !p.closed.CompareAndSwap(false, true) {
		return nil
	}
	close(p.stop)
	p.mu.Lock()
	p.notify()
	p.mu.Unlock()
	p.work.Wait()
	err := p.flushAll()
	for range cap(p.slots) {
		<-p.slots
	}
	close(p.slots)
	p.release()
	return err
}

// Store opens the tenant with this identifier, which is new if the pool has not
// had it. One tenant is open at most once. The shares of all tenants must fit into the pool.
func (p *Pool) Store(id uuid.UUID, o Options) (*Store, error) {
	p.meta.Lock()
	defer p.meta.Unlock()
	p.mu.Lock()
	n := slices.Index(p.super.tenants, id)
	share := o.Share
	for _, s := range p.stores {
		if s.attached {
			share += s.o.Share
		}
	}
	p.mu.Unlock()
	if c := p.Capacity(); share > c {
		return nil, fmt.Errorf("kvlayer: the shares of the pool's stores are %d bytes together, and it has %d", share, c)
	}
	if n < 0 {
		if n = len(p.super.tenants); n == maxTenants {
			return nil, fmt.Errorf("kvlayer: a pool has at most %d stores in its life", maxTenants)
		}
		p.super.tenants = append(p.super.tenants, id)
		if err := p.writeSupers(); err != nil {
			p.super.tenants = p.super.tenants[:n]
			return nil, err
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.tenant(n)
	if s.attached {
		return nil, fmt.Errorf("kvlayer: store %v is open already", id)
	}
	s.attach(o)
	return s, nil
}

// tenant returns tenant n, which it makes if need be. Under mu, or in recovery.
func (p *Pool) tenant(n int) *Store {
	for len(p.stores) <= n {
		s := &Store{p: p, tenant: len(p.stores), index: newIndex(p.slab, p.super.extent), o: Options{Log: p.log}, since: time.Now()}
		s.closed.Store(true)
		p.stores = append(p.stores, s)
		for _, d := range p.devs {
			d.open = append(d.open, [classes]*segment{})
		}
	}
	return p.stores[n]
}

// all returns the tenants.
func (p *Pool) all() []*Store {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.stores)
}

// Capacity is how many bytes of records can be live.
func (p *Pool) Capacity() (n int64) {
	for _, d := range p.devs {
		if !d.lost.Load() {
			n += int64(len(d.segs)-d.reserve()) * p.usable()
		}
	}
	return n
}

// usable is the room for records in a segment with few of them.
func (p *Pool) usable() int64 { return p.super.segSize - 2*block }

func (p *Pool) slot() (*slot, error) {
	if p.closed.Load() {
		return nil, ErrClosed
	}
	sl, ok := <-p.slots
	if !ok {
		return nil, ErrClosed
	}
	return sl, nil
}

func (p *Pool) putSlot(sl *slot) { p.slots <- sl }

// nextSeq returns a sequence number: seconds since 2025 in its upper 32 bits, so
// that it tells a value's age, and a count in its lower 20.
func (p *Pool) nextSeq() uint64 {
	now := seqNow()
	for {
		old := p.seq.Load()
		n := max(old+1, now)
		if p.seq.CompareAndSwap(old, n) {
			return n
		}
	}
}

const seqEpoch = 1735689600 // 2025-01-01, Unix time

func seqNow() uint64 { return uint64(time.Now().Unix()-seqEpoch) << 20 }

// age is how long ago a value with this sequence number was stored.
func age(seq uint64) time.Duration {
	return time.Duration(max(0, time.Now().Unix()-seqEpoch-int64(seq>>20))) * time.Second
}

// notify wakes who waits for room. Under mu.
func (p *Pool) notify() {
	if p.changed != nil {
		close(p.changed)
		p.changed = nil
	}
}

// segmentOf returns the segment in which a block of the pool lies, and the block's offset on the device.
func (p *Pool) segmentOf(b int64) (*segment, int64) {
	n := b / p.per
	for _, d := range p.devs {
		if i := n - d.first; i < int64(len(d.segs)) {
			g := &d.segs[i]
			return g, g.off + b%p.per*block
		}
	}
	panic("kvlayer: a block outside the pool")
}

// header returns the block in which to prepare a header for off.
func (d *device) header(mem []byte, off int64) []byte {
	if d.p.mem {
		return d.View(off, block)
	}
	return mem
}

// write writes what was prepared in header's block.
func (d *device) write(op *uring.Op, off int64, mem []byte) error {
	if d.p.mem {
		return nil
	}
	return d.transfer(op, uring.OpWrite, off, mem)
}

func (d *device) transfer(op *uring.Op, kind uring.OpKind, off int64, b []byte) error {
	op.Kind, op.Off, op.Data, op.Placement = kind, off, b, 0
	return d.failed(op.Do(d.Device))
}

// read returns n bytes at off: in place on a memory device, else in buf.
func (d *device) read(op *uring.Op, buf []byte, off, n int64) ([]byte, error) {
	if d.p.mem {
		return d.View(off, n), nil
	}
	return buf[:n], d.transfer(op, uring.OpRead, off, buf[:n])
}

// maxErrors in a row make a device of several lost.
const maxErrors = 64

// failed looks at an op's result: a device that is gone, or fails all the time, is lost.
func (d *device) failed(err error) error {
	switch {
	case err == nil:
		if d.errs.Load() != 0 {
			d.errs.Store(0)
		}
	case errors.Is(err, uring.ErrInvalid), errors.Is(err, uring.ErrNoSpace):
	case errors.Is(err, uring.ErrGone), errors.Is(err, uring.ErrClosed), d.errs.Add(1) >= maxErrors:
		d.lose(err)
	}
	return err
}

// lose takes the device out of the pool: its values are misses from here on. The
// last device stays, with its errors.
func (d *device) lose(err error) {
	p := d.p
	p.mu.Lock()
	others := 0
	for _, o := range p.devs {
		if o != d && !o.lost.Load() {
			others++
		}
	}
	if others == 0 || p.closed.Load() || !d.lost.CompareAndSwap(false, true) {
		p.mu.Unlock()
		return
	}
	p.notify()
	p.mu.Unlock()
	p.log.Error("a device of the pool is lost, and its values with it", "member", d.member, "device", d.Info().Path, "error", err)
	d.wake()
}

// forget makes the values of a lost device misses for good: removes them from the
// index, and raises the device's epoch, so that they do not come back with it. False if that could not be written.
func (d *device) forget() bool {
	p := d.p
	p.meta.Lock()
	p.super.epochs[d.member]++
	err := p.writeSupers()
	p.meta.Unlock()
	if err != nil {
		p.log.Error("cannot write the superblocks", "error", err)
		return false
	}
	d.out.Store(true)
	for _, s := range p.all() {
		s.index.each(func(es []entry) bool {
			for _, e := range es {
				if g, _ := p.segmentOf(e.block()); g.dev == d {
					s.drop(e, reasonLost)
				}
			}
			return true
		})
	}
	return true
}

// rejoin takes a lost device that answers again back, empty.
func (d *device) rejoin(sl *slot) bool {
	p := d.p
	if d.Info().Gone {
		return false
	}
	op := &sl.op
	op.Kind, op.Off, op.Data = uring.OpRead, 0, sl.mem
	if p.mem || op.Do(d.Device) != nil {
		return false
	}
	p.mu.Lock()
	for i := range d.segs {
		if g := &d.segs[i]; g.writers > 0 || g.pins.Load() > 0 {
			p.mu.Unlock()
			return false
		}
	}
	d.free = d.free[:0]
	for i := range d.open {
		d.open[i] = [classes]*segment{}
	}
	for i := range d.segs {
		g := &d.segs[i]
		if g.store != nil {
			g.store.hold(g.class, -p.super.segSize)
		}
		g.state, g.store, g.log, g.fence = segmentFree, nil, nil, nil
		g.live.Store(0)
		d.free = append(d.free, g)
	}
	d.errs.Store(0)
	p.mu.Unlock()
	d.out.Store(false)
	d.lost.Store(false)
	p.meta.Lock()
	err := p.writeSupers()
	p.meta.Unlock()
	if err != nil {
		d.lost.Store(true)
		d.out.Store(true)
		return false
	}
	p.mu.Lock()
	p.notify()
	p.mu.Unlock()
	p.log.Info("a device is back in the pool, empty", "member", d.member, "device", d.Info().Path)
	return true
}

// flusher lets flushes that come together be one.
type flusher struct {
	mu          sync.Mutex
	cond        *sync.Cond
	op          uring.Op
	begun, done uint64
	running     bool
	err         error
}

// sync makes durable all that was written before.
func (d *device) sync() error {
	if d.p.mem {
		return nil
	}
	f := &d.flush
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.cond == nil {
		f.cond = sync.NewCond(&f.mu)
	}
	for want := f.begun + 1; f.done < want; {
		if f.running {
			f.cond.Wait()
			continue
		}
		f.running = true
		f.begun++
		f.mu.Unlock()
		f.op.Kind, f.op.Off, f.op.Data = uring.OpFlush, 0, nil
		err := d.failed(f.op.Do(d.Device))
		f.mu.Lock()
		f.running, f.done, f.err = false, f.begun, err
		f.cond.Broadcast()
	}
	return f.err
}

// flushAll flushes every device that is there.
func (p *Pool) flushAll() error {
	var first error
	for _, d := range p.devs {
		if d.lost.Load() {
			continue
		}
		if err := d.sync(); err != nil && first == nil && !d.lost.Load() {
			first = err
		}
	}
	return first
}

// Devices describes the pool's devices.
func (p *Pool) Devices() []DeviceStats {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []DeviceStats
	for _, d := range p.devs {
		st := DeviceStats{Member: d.member, Lost: d.lost.Load(), Segments: len(d.segs), Info: d.Info()}
		for i := range d.segs {
			st.States[d.segs[i].state]++
			st.Live += d.segs[i].live.Load()
		}
		all = append(all, st)
	}
	return all
}

// DeviceStats describes one device of a pool.
type DeviceStats struct {
	Member   int
	Lost     bool
	Segments int
	States   [segmentStates]int // segments by state: see SegmentStates
	Live     int64              // bytes of live records
	Info     uring.DeviceInfo
}

func address(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }
