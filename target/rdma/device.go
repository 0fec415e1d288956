package rdma

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kvof/kvof/rdma"
	"github.com/kvof/kvof/target"
)

const (
	// maxLanes is the most polling goroutines of a device.
	maxLanes = 8
	pageSize = 4096
	// bouncePages is how many pages a device keeps for small data that is not in registered memory.
	bouncePages = 1024
)

// device is an RDMA device in use.
type device struct {
	tr   *Transport
	dev  rdma.Device
	caps *rdma.Caps

	regions atomic.Pointer[[]*rdma.Region] // payload memory
	lanes   []*lane
	next    atomic.Uint32
	bounce  *pages
	stop    chan struct{}
	watched sync.WaitGroup
	removed atomic.Bool

	mu     sync.Mutex
	conns  map[*conn]struct{}
	closed bool

	commands, completions, turns, sleeps atomic.Uint64
	memory                               atomic.Int64 // bytes of control memory
	registers                            atomic.Uint64
	spinners                             atomic.Int32
}

func newDevice(t *Transport, dev rdma.Device) (*device, error) {
	d := &device{tr: t, dev: dev, caps: dev.Caps(), stop: make(chan struct{}), conns: map[*conn]struct{}{}}
	d.regions.Store(new([]*rdma.Region))
	fail := func(err error) (*device, error) { return nil, errors.Join(err, d.close()) }
	for _, b := range t.memory {
		if err := d.register(b); err != nil {
			return fail(err)
		}
	}
	var err error
	if d.bounce, err = newPages(d, bouncePages); err != nil {
		return fail(err)
	}
	for range max(1, min(runtime.GOMAXPROCS(0)/2, maxLanes)) {
		l, err := newLane(d)
		if err != nil {
			return fail(err)
		}
		d.lanes = append(d.lanes, l)
	}
	d.watched.Add(1)
	go d.watch()
	t.log.Info("RDMA device in use", "device", dev.Name(), "transport", d.caps.ProviderTransport, "port", dev.Port(), "mtu", d.caps.ActiveMTU,
		"lanes", len(d.lanes), "srq", d.caps.MaxSRQ > 0, "send_invalidate", d.caps.SendInvalidate)
	return d, nil
}

// register makes payload memory known.
func (d *device) register(b []byte) error {
	r, err := d.dev.Register(b, rdma.Local)
	if err != nil {
		return err
	}
	d.registers.Add(1)
	list := append(append([]*rdma.Region(nil), *d.regions.Load()...), r)
	d.regions.Store(&list)
	return nil
}

func (d *device) unregister(b []byte) {
	var list []*rdma.Region
	for _, r := range *d.regions.Load() {
		if r.Contains(b) {
			defer r.Close()
		} else {
			list = append(list, r)
		}
	}
	d.regions.Store(&list)
}

// region finds the registration of payload memory; nil if there is none.
func (d *device) region(b []byte) *rdma.Region {
	for _, r := range *d.regions.Load() {
		if r.Contains(b) {
			return r
		}
	}
	return nil
}

// watch reports what happens to the device and ends its connections when it is lost.
func (d *device) watch() {
	defer d.watched.Done()
	for {
		select {
		case e := <-d.dev.Events():
			d.tr.log.Warn("RDMA device event", "device", d.dev.Name(), "event", e.Text)
			if e.Fatal {
				d.lost("the RDMA device is gone: " + e.Text)
			}
		case <-d.stop:
			return
		}
	}
}

// lost ends all connections; the last of them to go closes the device.
func (d *device) lost(reason string) {
	if d.removed.Swap(true) {
		return
	}
	d.mu.Lock()
	empty := len(d.conns) == 0
	for c := range d.conns {
		c.Close(reason)
	}
	d.mu.Unlock()
	if empty {
		go d.tr.drop(d)
	}
}

func (d *device) add(c *conn) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed || d.removed.Load() {
		return false
	}
	d.conns[c] = struct{}{}
	return true
}

func (d *device) remove(c *conn) {
	d.mu.Lock()
	delete(d.conns, c)
	last := len(d.conns) == 0 && d.removed.Load()
	d.mu.Unlock()
	if last {
		d.tr.drop(d)
	}
}

// close frees the device, which has no connection any more.
func (d *device) close() error {
	d.mu.Lock()
	was, left := d.closed, len(d.conns)
	d.closed = true
	d.mu.Unlock()
	if was {
		return nil
	}
	if left > 0 { // their memory may be in use: the process's end frees it
		return fmt.Errorf("RDMA device %s: %d connections are left", d.dev.Name(), left)
	}
	close(d.stop)
	d.watched.Wait()
	var errs []error
	for _, l := range d.lanes {
		errs = append(errs, l.close())
	}
	if d.bounce != nil {
		errs = append(errs, d.bounce.close())
	}
	for _, r := range *d.regions.Load() {
		errs = append(errs, r.Close())
	}
	errs = append(errs, d.dev.Close())
	if err := errors.Join(errs...); err != nil && !d.removed.Load() {
		return fmt.Errorf("RDMA device %s: %w", d.dev.Name(), err)
	}
	return nil
}

func (d *device) status() target.FabricStatus {
	s := target.FabricStatus{Device: d.dev.Name(), Transport: d.caps.ProviderTransport, Port: d.dev.Port(), MTU: d.caps.ActiveMTU, Lanes: len(d.lanes),
		Memory: d.memory.Load(), Registrations: d.registers.Load(), Commands: d.commands.Load(), Completions: d.completions.Load(), Turns: d.turns.Load(), Sleeps: d.sleeps.Load()}
	for _, r := range *d.regions.Load() {
		s.Registered += int64(r.Len())
	}
	for _, l := range d.lanes {
		s.Receives += l.reserved()
	}
	d.mu.Lock()
	s.QueuePairs = len(d.conns)
	d.mu.Unlock()
	return s
}

// slab is control memory, off the Go heap and registered.
type slab struct {
	dev    *device
	mem    []byte
	region *rdma.Region
}

func newSlab(d *device, size int) (*slab, error) {
	size = (size + pageSize - 1) &^ (pageSize - 1)
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("%d KiB of control memory: %w", size>>10, err)
	}
	r, err := d.dev.Register(mem, rdma.Local)
	if err != nil {
		_ = unix.Munmap(mem)
		return nil, err
	}
	d.registers.Add(1)
	d.memory.Add(int64(size))
	return &slab{d, mem, r}, nil
}

func (s *slab) close() error {
	s.dev.memory.Add(-int64(len(s.mem)))
	return errors.Join(s.region.Close(), unix.Munmap(s.mem))
}

// sge describes a piece of the slab.
func (s *slab) sge(b []byte) rdma.SGE {
	e, _ := s.region.Split(b)
	e.Addr, e.Length = uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))), uint32(len(b))
	return e
}

// pages hands out pages of a slab.
type pages struct {
	*slab
	mu   sync.Mutex
	free []int32
}

func newPages(d *device, n int) (*pages, error) {
	s, err := newSlab(d, n*pageSize)
	if err != nil {
		return nil, err
	}
	p := &pages{slab: s}
	for i := range n {
		p.free = append(p.free, int32(n-1-i))
	}
	return p, nil
}

// noPage is no page.
const noPage = -1

// take returns n pages, nil when there are not so many.
func (p *pages) take(n int) []int32 {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n > len(p.free) {
		return nil
	}
	cut := len(p.free) - n
	ps := append([]int32(nil), p.free[cut:]...)
	p.free = p.free[:cut]
	return ps
}

func (p *pages) put(i int32) {
	p.mu.Lock()
	p.free = append(p.free, i)
	p.mu.Unlock()
}

// at returns n bytes of page i.
func (p *pages) at(i int32, n int) []byte { return p.mem[int(i)*pageSize:][:n:n] }
