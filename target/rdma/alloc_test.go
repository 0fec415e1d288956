package rdma

import (
	"context"
	"log/slog"
	"net/netip"
	"runtime/metrics"
	"sync"
	"syscall"
	"testing"
	"unsafe"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/rdma"
	"github.com/kvof/kvof/rdma/rdmatest"
	"github.com/kvof/kvof/target"
	"github.com/kvof/kvof/uring"
)

// nullDevice is a device, its only queue pair, connection and all, that does every work request at once, moves no byte
// and allocates nothing: what the transport costs by itself. The host is the test.
type nullDevice struct {
	caps   rdma.Caps
	ended  chan struct{}
	bell   *rdmatest.Bell
	answer chan nvmeof.Completion

	mu    sync.Mutex
	mem   [][]byte
	recvs []nullRecv
	wcs   []rdma.WC
	held  []rdma.WC // of sends
	late  bool      // hold
}

type nullRecv struct {
	id  uint64
	mem []byte
}

func newNullDevice() *nullDevice {
	bell, err := rdmatest.NewBell()
	if err != nil {
		panic(err)
	}
	d := &nullDevice{ended: make(chan struct{}), bell: bell, answer: make(chan nvmeof.Completion, hostDepth),
		recvs: make([]nullRecv, 0, 1<<16), wcs: make([]rdma.WC, 0, 1024)}
	d.caps = rdma.Caps{MaxQP: 1, MaxQPWR: 1024, MaxSGE: 16, MaxSGERead: 16, MaxCQE: 1 << 16, MaxMRSize: 1 << 40, MaxMessage: 1 << 31, MaxInitiator: 16, MaxSRQ: 4, MaxSRQWR: 4096, MaxSRQSGE: 1}
	return d
}

func (d *nullDevice) Name() string                          { return "null0" }
func (d *nullDevice) Caps() *rdma.Caps                      { return &d.caps }
func (d *nullDevice) Port() string                          { return "active" }
func (d *nullDevice) Close() error                          { return nil }
func (d *nullDevice) Events() <-chan rdma.Event             { return nil }
func (d *nullDevice) NewChannel() (rdma.Channel, error)     { return (*nullChannel)(d), nil }
func (d *nullDevice) NewSRQ(int) (rdma.SRQ, error)          { return nullQueue{}, nil }
func (d *nullDevice) Device() rdma.Device                   { return d }
func (d *nullDevice) Local() netip.AddrPort                 { return netip.AddrPort{} }
func (d *nullDevice) Remote() netip.AddrPort                { return netip.AddrPort{} }
func (d *nullDevice) Request() (p rdma.ConnParam)           { return p }
func (d *nullDevice) Accept(rdma.ConnParam) error           { return nil }
func (d *nullDevice) Reject([]byte) error                   { return nil }
func (d *nullDevice) Disconnect()                           {}
func (d *nullDevice) Ended() <-chan struct{}                { return d.ended }
func (d *nullDevice) Err() error                            { return nil }
func (d *nullDevice) CreateQP(rdma.QPAttr) (rdma.QP, error) { return (*nullQP)(d), nil }
func (d *nullDevice) Connect(context.Context, rdma.ConnParam) (p rdma.ConnParam, _ error) {
	return p, nil
}

func (d *nullDevice) Register(mem []byte, _ rdma.Access) (*rdma.Region, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mem = append(d.mem, mem)
	return rdma.NewRegion(mem, 1<<40, func([]byte) (rdma.MR, error) { return rdma.MR{Close: func() error { return nil }}, nil })
}

func (d *nullDevice) RegisterDMABuf([]byte, rdma.DMABuf, rdma.Access) (*rdma.Region, error) {
	return nil, rdma.ErrNoDMABuf
}

// at finds registered memory by its address.
func (d *nullDevice) at(s rdma.SGE) []byte {
	for _, m := range d.mem {
		if off := s.Addr - uint64(uintptr(unsafe.Pointer(&m[0]))); off < uint64(len(m)) {
			return m[off:][:s.Length]
		}
	}
	return nil
}

func (d *nullDevice) Post(b *rdma.Batch) {
	d.mu.Lock()
	defer d.mu.Unlock()
	b.Chains(func(_ uintptr, recv bool, wrs []rdma.WR) (int, syscall.Errno) {
		for i := range wrs {
			w := &wrs[i]
			switch {
			case recv:
				d.recvs = append(d.recvs, nullRecv{w.ID, d.at(b.SGEs(w)[0])})
				continue
			case w.Op == rdma.OpSend && w.NumSGE > 0:
				d.answer <- nvmeof.Completion(d.at(b.SGEs(w)[0]))
			}
			if w.Flags&rdma.FlagSignaled != 0 {
				if wc := rdma.MakeSent(w.ID, rdma.WCSuccess, 1); d.late {
					d.held = append(d.held, wc)
				} else {
					d.complete(wc)
				}
			}
		}
		return len(wrs), 0
	})
}

func (d *nullDevice) complete(wc rdma.WC) {
	d.wcs = append(d.wcs, wc)
	d.bell.Ring()
}

// hold keeps the completions of sends back, until it is called with false.
func (d *nullDevice) hold(on bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.late = on
	for _, wc := range d.held {
		d.complete(wc)
	}
	d.held = nil
}

// send brings a capsule in.
func (d *nullDevice) send(c *nvmeof.Command, data []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	r := d.recvs[0]
	d.recvs = d.recvs[:copy(d.recvs, d.recvs[1:])]
	n := copy(r.mem, c[:])
	n += copy(r.mem[n:], data)
	d.complete(rdma.MakeRecv(r.id, rdma.WCSuccess, 1, uint32(n), 0))
}

type nullChannel nullDevice

func (c *nullChannel) NewCQ(int) (rdma.CQ, error) { return nullQueue{}, nil }
func (c *nullChannel) Close() error               { return c.bell.Close() }
func (c *nullChannel) Wake()                      { c.bell.Ring() }

func (c *nullChannel) Wait(_ []rdma.CQ, files []int32, wc []rdma.WC) (int, error) {
	if err := c.bell.Wait(files); err != nil {
		return 0, err
	}
	return c.Turn(nil, wc), nil
}

func (c *nullChannel) Turn(b *rdma.Batch, wc []rdma.WC) int {
	d := (*nullDevice)(c)
	if b != nil {
		d.Post(b)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	n := copy(wc, d.wcs)
	d.wcs = d.wcs[:copy(d.wcs, d.wcs[n:])]
	return n
}

type nullQP nullDevice

func (q *nullQP) Handle() uintptr              { return 1 }
func (q *nullQP) Num() uint32                  { return 1 }
func (q *nullQP) Inline() int                  { return 0 }
func (q *nullQP) Fail()                        {}
func (q *nullQP) LastReceive() <-chan struct{} { return q.ended }

type nullQueue struct{}

func (nullQueue) Handle() uintptr { return 2 }
func (nullQueue) Arm() error      { return nil }
func (nullQueue) Close() error    { return nil }

// nullHost is a connected host on null devices, one for each queue.
type nullHost struct {
	testing.TB
	target    *target.Target
	transport *Transport
	io        *nullDevice
}

func newNullHost(t testing.TB, ns ...configs.Namespace) *nullHost {
	log := slog.New(slog.DiscardHandler)
	arena, err := uring.NewArena(64 << 20)
	if err != nil {
		t.Fatal(err)
	}
	h := &nullHost{TB: t, target: target.New(arena, configs.Limits{Controllers: 8, IOQueues: 8, QueueEntries: 128}, log)}
	if err := h.target.Apply(&configs.Config{Subsystems: []configs.Subsystem{{NQN: testNQN, Serial: "1", AllowAnyHost: true, Namespaces: ns}}}); err != nil {
		t.Fatal(err)
	}
	h.transport = New(h.target, nil, log)
	t.Cleanup(func() {
		if err := h.transport.Close(); err != nil {
			t.Error(err)
		}
		if err := h.target.Close(); err != nil {
			t.Error(err)
		}
		if err := arena.Close(); err != nil {
			t.Error(err)
		}
	})
	admin := h.queue(0)
	cntlid := h.connect(admin, 0, nvmeof.CNTLIDDynamic)
	cc := nvmeof.MakePropertySet(nvmeof.PropCC, 0x460061)
	h.do(admin, &cc, nil)
	var f nvmeof.Command
	f.SetHeader(nvmeof.OpSetFeatures, 1, 0)
	f.SetDW(10, nvmeof.FeatQueues)
	h.do(admin, &f, nil)
	h.io = h.queue(1)
	h.connect(h.io, 1, cntlid)
	return h
}

// queue makes a queue pair.
func (h *nullHost) queue(qid uint16) *nullDevice {
	dev := newNullDevice()
	d, err := h.transport.device(dev)
	if err != nil {
		h.Fatal(err)
	}
	c, err := newConn(newListener(h.transport, netip.AddrPort{}, false), d, dev, &nvmeof.RDMARequest{QID: qid, HRQSIZE: hostDepth, HSQSIZE: hostDepth - 1}, 4)
	if err != nil {
		h.Fatal(err)
	}
	d.add(c)
	c.lane.add(c)
	done := make(chan struct{})
	go func() { c.serve(); d.remove(c); close(done) }()
	h.Cleanup(func() {
		close(dev.ended)
		<-done
	})
	return dev
}

func (h *nullHost) do(d *nullDevice, c *nvmeof.Command, data []byte) uint32 {
	d.send(c, data)
	return h.answer(d)
}

func (h *nullHost) answer(d *nullDevice) uint32 {
	cqe := <-d.answer
	if st := cqe.Status(); st != nvmeof.Success {
		h.Fatal(st)
	}
	return cqe.DW0()
}

func (h *nullHost) connect(d *nullDevice, qid uint16, cntlid uint16) uint16 {
	data := make([]byte, nvmeof.ConnectDataSize)
	(&nvmeof.ConnectData{CNTLID: cntlid, SubNQN: testNQN, HostNQN: hostNQN}).Encode(data)
	c := nvmeof.MakeConnect(0, qid, hostDepth-1, nvmeof.CATTRNoFlowControl, 0)
	c.SetSGL(nvmeof.MakeSGL(nvmeof.SGLOffset, 0, nvmeof.ConnectDataSize))
	return uint16(h.do(d, &c, data))
}

// TestLateCompletions has a device that tells late that responses have arrived: the host's next commands are no mistake.
func TestLateCompletions(t *testing.T) {
	h := newNullHost(t, block(1, configs.DeviceMemory, "", 16<<20))
	var flush nvmeof.Command
	flush.SetHeader(nvmeof.OpFlush, 1, 1)
	h.io.hold(true)
	for range 2 * hostDepth {
		h.do(h.io, &flush, nil)
	}
	for range hostDepth { // there is no request, and no place in the send queue, for them
		h.io.send(&flush, nil)
	}
	h.io.hold(false)
	for range hostDepth {
		h.answer(h.io)
	}
}

// TestAllocations shows that commands allocate nothing, register nothing and copy nothing, whatever they move, and that
// small ones start no goroutine.
func TestAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	dir := t.TempDir()
	h := newNullHost(t, block(1, configs.DeviceMemory, dir, 64<<20), block(2, configs.DeviceFile, dir, 64<<20),
		kv(3, configs.DeviceMemory, dir, 256<<20), kv(4, configs.DeviceFile, dir, 256<<20))
	tr, tg := h.transport, h.target
	before, copied := registrations(tr), tg.Status().Copied
	for _, c := range []struct {
		name string
		op   uint8
		nsid uint32
		n    int
	}{
		{"read, memory", nvmeof.OpRead, 1, 4096}, {"write, memory", nvmeof.OpWrite, 1, 4096}, {"large read, memory", nvmeof.OpRead, 1, 2 << 20},
		{"large write, memory", nvmeof.OpWrite, 1, 2 << 20}, {"read, file", nvmeof.OpRead, 2, 4096}, {"write, file", nvmeof.OpWrite, 2, 4096},
		{"large read, file", nvmeof.OpRead, 2, 2 << 20}, {"large write, file", nvmeof.OpWrite, 2, 2 << 20},
		{"store, memory", nvmeof.OpStore, 3, 1 << 20}, {"retrieve, memory", nvmeof.OpRetrieve, 3, 1 << 20},
		{"store, file", nvmeof.OpStore, 4, 1 << 20}, {"retrieve, file", nvmeof.OpRetrieve, 4, 1 << 20},
	} {
		var cmd nvmeof.Command
		cmd.SetHeader(c.op, 1, c.nsid)
		if c.nsid <= 2 {
			cmd.SetDW(12, uint32(c.n/4096-1))
		} else {
			cmd.SetKey([]byte("key"))
			cmd.SetKV(uint32(c.n), 0)
		}
		cmd.SetSGL(nvmeof.MakeKeyedSGL(nvmeof.SGLKeyed, 1<<20, uint32(c.n), 7))
		for range 100 { // what is made at the first use
			h.do(h.io, &cmd, nil)
		}
		started := goroutines()
		if n := testing.AllocsPerRun(200, func() { h.do(h.io, &cmd, nil) }); n != 0 {
			t.Errorf("%s: %v allocations", c.name, n)
		}
		if n := goroutines() - started; c.n == 4096 && n > 20 { // AllocsPerRun has some
			t.Errorf("%s: %d goroutines started for 200 commands", c.name, n)
		}
	}
	if n := registrations(tr); n != before {
		t.Errorf("%d registrations of memory for commands", n-before)
	}
	if n := tg.Status().Copied; n != copied {
		t.Errorf("%d payload bytes were copied", n-copied)
	}
}

// goroutines is how many have ever been started.
func goroutines() uint64 {
	s := []metrics.Sample{{Name: "/sched/goroutines-created:goroutines"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}

func registrations(t *Transport) (n uint64) {
	for _, s := range t.Status() {
		n += s.Registrations
	}
	return n
}
