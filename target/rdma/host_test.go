package rdma

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/rdma"
	"github.com/kvof/kvof/rdma/rdmatest"
	"github.com/kvof/kvof/target"
	"github.com/kvof/kvof/uring"
)

const (
	testNQN  = "nqn.2026-11.dev.kvof:test"
	hostNQN  = "nqn.2014-08.org.nvmexpress:uuid:host"
	patience = 30 * time.Second // for what must happen soon
)

var (
	targetAddr = netip.MustParseAddr("192.0.2.1")
	hostAddr   = netip.MustParseAddr("192.0.2.2")
)

// env is a target with a listener on a device in memory, and hosts' device beside it.
type env struct {
	testing.TB
	net       *rdmatest.Net
	dev, far  *rdmatest.Device
	target    *target.Target
	transport *Transport
	arena     *uring.Arena
	idle      uring.ArenaStats // before the first connection
	l         *Listener
	faults    rdmatest.Faults // that the test causes

	namespaces int
}

// serve starts a target. The test ends with nothing left: no goroutine, no controller, no buffer, no queue pair, no
// registration, and nothing that a device would punish.
func serve(t testing.TB, caps rdma.Caps, ns ...configs.Namespace) *env {
	t.Helper()
	if _, bench := t.(*testing.B); !bench {
		t.Cleanup(func() { goleak.VerifyNone(t) })
	}
	log := slog.New(slog.DiscardHandler)
	e := &env{TB: t, net: rdmatest.New(), namespaces: len(ns)}
	e.dev = e.net.AddDevice("target0", targetAddr, caps)
	e.far = e.net.AddDevice("host0", hostAddr, rdmatest.DefaultCaps())
	var err error
	if e.arena, err = uring.NewArena(32 << 20); err != nil {
		t.Fatal(err)
	}
	e.target = target.New(e.arena, configs.Limits{Controllers: 2000, IOQueues: 64, QueueEntries: 128}, log)
	if err := e.target.Apply(&configs.Config{Subsystems: []configs.Subsystem{{NQN: testNQN, Serial: "1", AllowAnyHost: true, Namespaces: ns}}}); err != nil {
		t.Fatal(err)
	}
	e.idle = e.arena.Stats()
	e.transport = New(e.target, e.net, log)
	if e.l, err = e.transport.Listen(netip.AddrPortFrom(targetAddr, 4420), false); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := e.l.Close(ctx); err != nil {
			panic(err) // with all goroutines
		}
		e.quiet(0)
		if err := e.transport.Close(); err != nil {
			t.Error(err)
		}
		if err := e.target.Close(); err != nil {
			t.Error(err)
		}
		if err := e.arena.Close(); err != nil {
			t.Error(err)
		}
		if f := e.net.Faults(); f != e.faults {
			t.Errorf("a device would punish %+v, want %+v", f, e.faults)
		}
	})
	return e
}

// quiet waits until so many controllers are left and all buffers are back.
func (e *env) quiet(controllers int) {
	e.Helper()
	eventually(e, func() error {
		if n := len(e.target.Status().Controllers); n != controllers {
			return fmt.Errorf("%d controllers, not %d", n, controllers)
		}
		if s := e.arena.Stats(); s.Small.Used != e.idle.Small.Used || s.Large.Used != e.idle.Large.Used || s.Medium.Used > e.idle.Medium.Used+e.namespaces {
			return fmt.Errorf("arena: %+v in use, %+v at the start", s, e.idle)
		}
		if controllers > 0 {
			return nil
		}
		for _, s := range e.transport.Status() {
			if s.QueuePairs != 0 || s.Receives != 0 {
				return fmt.Errorf("left: %+v", s)
			}
		}
		e.transport.mu.Lock()
		defer e.transport.mu.Unlock()
		for _, d := range e.transport.devices {
			if n := len(d.bounce.free); n != bouncePages {
				return fmt.Errorf("%d of %d pages are free", n, bouncePages)
			}
		}
		return nil
	})
}

func eventually(t testing.TB, check func() error) {
	t.Helper()
	err := check()
	for end := time.Now().Add(patience); err != nil && time.Now().Before(end); err = check() {
		time.Sleep(time.Millisecond)
	}
	if err != nil {
		t.Error(err)
	}
}

// kv and block are namespaces.
func kv(nsid uint32, device configs.DeviceKind, dir string, size configs.Size) configs.Namespace {
	return configs.Namespace{NSID: nsid, Type: configs.KeyValue, Device: device, Path: fmt.Sprintf("%s/kv%d", dir, nsid), Size: size, MaxValue: configs.MaxValue}
}

func block(nsid uint32, device configs.DeviceKind, dir string, size configs.Size) configs.Namespace {
	return configs.Namespace{NSID: nsid, Type: configs.Block, Device: device, Path: fmt.Sprintf("%s/block%d", dir, nsid), Size: size, LBASize: 4096}
}

const (
	hostDepth = 32
	hostCap   = nvmeof.CommandSize + inCapsule
	hostData  = hostDepth * (hostCap + nvmeof.CompletionSize) // where a host's payload memory begins
)

// host is one queue pair of a host that does everything by hand.
type host struct {
	t    testing.TB
	id   rdma.ID
	qp   rdma.QP
	ch   rdma.Channel
	reg  *rdma.Region
	mem  []byte
	data []byte // the part of mem for payload
	rkey uint32
	cid  uint16
	wc   []rdma.WC

	invalidated uint32 // key that the last response named
}

func request(qid, entries uint16) []byte {
	b := make([]byte, nvmeof.RDMARequestSize)
	(&nvmeof.RDMARequest{QID: qid, HRQSIZE: entries, HSQSIZE: entries - 1}).Encode(b)
	return b
}

// dial makes a queue pair and asks for a connection.
func (e *env) dial(private []byte, payload int) (*host, error) {
	e.Helper()
	id, err := e.net.Resolve(context.Background(), hostAddr, e.l.Addr())
	if err != nil {
		e.Fatal(err)
	}
	h := &host{t: e.TB, id: id, wc: make([]rdma.WC, hostDepth)}
	if h.mem, err = unix.Mmap(-1, 0, hostData+payload, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS); err != nil {
		e.Fatal(err)
	}
	h.data = h.mem[hostData:]
	if h.reg, err = id.Device().Register(h.mem, rdma.RemoteRead|rdma.RemoteWrite); err != nil {
		e.Fatal(err)
	}
	_, h.rkey = h.reg.Split(h.mem)
	if h.ch, err = id.Device().NewChannel(); err != nil {
		e.Fatal(err)
	}
	cq, err := h.ch.NewCQ(4 * hostDepth)
	if err != nil {
		e.Fatal(err)
	}
	if h.qp, err = id.CreateQP(rdma.QPAttr{SendCQ: cq, RecvCQ: cq, RecvDepth: hostDepth, SendDepth: 2 * hostDepth, SendSGE: 2}); err != nil {
		e.Fatal(err)
	}
	e.Cleanup(func() {
		id.Close()
		cq.Close()
		h.ch.Close()
		h.reg.Close()
		_ = unix.Munmap(h.mem)
	})
	var b rdma.Batch
	b.Recv(h.qp)
	for i := range hostDepth {
		s, _ := h.reg.Split(h.response(i))
		b.Add(rdma.WR{ID: uint64(i) | 1<<32}, s)
	}
	h.ch.Turn(&b, nil)
	p, err := id.Connect(context.Background(), rdma.ConnParam{Private: private, InitiatorDepth: 0, ResponderResources: 4})
	if err == nil {
		if n, err := nvmeof.DecodeRDMAAccept(p.Private); err != nil || n == 0 {
			e.Errorf("accepted with %d receives, %v", n, err)
		}
	}
	return h, err
}

func (h *host) response(i int) []byte {
	return h.mem[hostDepth*hostCap+i*nvmeof.CompletionSize:][:nvmeof.CompletionSize]
}

// keyed describes payload memory.
func (h *host) keyed(off, n int) nvmeof.SGL {
	s, _ := h.reg.Split(h.data[off : off+n])
	return nvmeof.MakeKeyedSGL(nvmeof.SGLKeyed, s.Addr, uint32(n), h.rkey)
}

// send sends a capsule.
func (h *host) send(cmd nvmeof.Command, data []byte) uint16 {
	h.t.Helper()
	cid := h.cid
	h.cid++
	cmd.SetCID(cid)
	at := h.mem[int(cid)%hostDepth*hostCap:]
	n := copy(at, cmd[:])
	n += copy(at[n:hostCap], data)
	h.post(at[:n])
	return cid
}

func (h *host) post(b []byte) {
	h.t.Helper()
	var batch rdma.Batch
	batch.Send(h.qp)
	var sges []rdma.SGE
	if len(b) > 0 {
		s, _ := h.reg.Split(b)
		sges = append(sges, s)
	}
	batch.Add(rdma.WR{ID: uint64(h.cid), Op: rdma.OpSend, Flags: rdma.FlagSignaled}, sges...)
	h.id.Device().Post(&batch)
}

var errEnded = errors.New("the connection has ended")

// recv waits for the next response.
func (h *host) recv() (cqe nvmeof.Completion, err error) {
	h.t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); {
		var one [1]rdma.WC
		if h.ch.Turn(nil, one[:]) == 0 {
			select {
			case <-h.id.Ended():
				if h.ch.Turn(nil, one[:]) == 0 {
					return cqe, errEnded
				}
			default:
				time.Sleep(20 * time.Microsecond)
				continue
			}
		}
		wc := one[0]
		switch {
		case wc.Status != rdma.WCSuccess:
			return cqe, errEnded
		case wc.ID>>32 == 0: // a capsule is out
			continue
		case wc.Bytes != nvmeof.CompletionSize:
			h.t.Errorf("a response of %d bytes", wc.Bytes)
		}
		h.invalidated = 0
		if wc.WithInvalidate() {
			h.invalidated = wc.Invalidated
		}
		i := int(uint32(wc.ID))
		copy(cqe[:], h.response(i))
		var b rdma.Batch
		b.Recv(h.qp)
		s, _ := h.reg.Split(h.response(i))
		b.Add(rdma.WR{ID: wc.ID}, s)
		h.ch.Turn(&b, nil)
		return cqe, nil
	}
	h.t.Fatal("no response")
	return cqe, nil
}

// do sends one command and waits for its response.
func (h *host) do(cmd nvmeof.Command, data []byte) nvmeof.Completion {
	h.t.Helper()
	cid := h.send(cmd, data)
	cqe, err := h.recv()
	if err != nil || cqe.CID() != cid {
		h.t.Fatalf("%v, command %d, response %d", err, cid, cqe.CID())
	}
	return cqe
}

func (h *host) must(cmd nvmeof.Command, data []byte) nvmeof.Completion {
	h.t.Helper()
	cqe := h.do(cmd, data)
	if st := cqe.Status(); st != nvmeof.Success {
		h.t.Fatalf("opcode %02Xh: %v", cmd.Opcode(), st)
	}
	return cqe
}

// connect sends a Connect whose data the target fetches.
func (h *host) connect(qid, entries uint16, cntlid uint16, nqn string) nvmeof.Completion {
	h.t.Helper()
	d := nvmeof.ConnectData{CNTLID: cntlid, SubNQN: nqn, HostNQN: hostNQN}
	d.Encode(h.data)
	cmd := nvmeof.MakeConnect(0, qid, entries-1, nvmeof.CATTRNoFlowControl, 0)
	cmd.SetSGL(h.keyed(0, nvmeof.ConnectDataSize))
	return h.do(cmd, nil)
}

// admin connects a controller and enables it.
func (e *env) admin() (h *host, cntlid uint16) {
	e.Helper()
	h, err := e.dial(request(0, hostDepth), 64<<10)
	if err != nil {
		e.Fatal(err)
	}
	cqe := h.connect(0, hostDepth, nvmeof.CNTLIDDynamic, testNQN)
	if cqe.Status() != nvmeof.Success {
		e.Fatal(cqe.Status())
	}
	h.must(nvmeof.MakePropertySet(nvmeof.PropCC, nvmeof.CCEnable|nvmeof.CCCSSAll|nvmeof.CCIOSQES64|nvmeof.CCIOCQES16), nil)
	var cmd nvmeof.Command
	cmd.SetHeader(nvmeof.OpSetFeatures, 0, 0)
	cmd.SetDW(10, nvmeof.FeatQueues)
	cmd.SetDW(11, 63|63<<16)
	h.must(cmd, nil)
	return h, uint16(cqe.DW0())
}

// queues connects a controller with one I/O queue and so much payload memory.
func (e *env) queues(payload int) (admin, io *host) {
	e.Helper()
	admin, cntlid := e.admin()
	return admin, e.io(cntlid, 1, payload)
}

func (e *env) io(cntlid, qid uint16, payload int) *host {
	e.Helper()
	io, err := e.dial(request(qid, hostDepth), max(payload, 4096))
	if err != nil {
		e.Fatal(err)
	}
	if cqe := io.connect(qid, hostDepth, cntlid, testNQN); cqe.Status() != nvmeof.Success {
		e.Fatal(cqe.Status())
	}
	return io
}

// rw is a Read or Write of blocks of 4096 bytes, to or from payload memory at off.
func (h *host) rw(op uint8, nsid uint32, slba uint64, blocks, off int) (c nvmeof.Command) {
	c.SetHeader(op, 0, nsid)
	c.SetDW(10, uint32(slba))
	c.SetDW(12, uint32(blocks-1))
	c.SetSGL(h.keyed(off, blocks*4096))
	return c
}

// pattern fills b with bytes that tell where they belong.
func pattern(b []byte, seed int) {
	for i := range b {
		b[i] = byte(i>>12*7 + i + seed)
	}
}

func check(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		for i := range got {
			if got[i] != want[i] {
				t.Fatalf("%s: byte %d of %d is %02X, not %02X", what, i, len(got), got[i], want[i])
			}
		}
	}
}
