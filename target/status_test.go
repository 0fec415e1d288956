package target

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/uring"
)

// statusConn is a connection whose host takes every completion at once and whose data comes in the capsule.
type statusConn struct{ cqe chan nvmeof.Completion }

func (c *statusConn) Pull(r *Request)                      { r.Aborted() }
func (c *statusConn) Send(r *Request, b uring.Buf, _ bool) { b.Put(); r.Taken() }
func (c *statusConn) Close(string)                         {}
func (c *statusConn) Name() string                         { return "192.0.2.1:50000" }
func (c *statusConn) Complete(r *Request) {
	cqe := r.CQE
	r.Release()
	c.cqe <- cqe
}

const statusNQN = "nqn.2026-11.dev.kvof:status"

// statusTarget serves a Key Value namespace in memory and a block namespace on a file; namespace 3 cannot be opened.
func statusTarget(t *testing.T) (*Target, error) {
	t.Helper()
	arena, err := uring.NewArena(16 << 20)
	if err != nil {
		t.Fatal(err)
	}
	tg := New(arena, configs.Limits{Controllers: 8, IOQueues: 4, QueueEntries: 32}, slog.New(slog.DiscardHandler))
	t.Cleanup(func() {
		if err := tg.Close(); err != nil {
			t.Error(err)
		}
		if err := arena.Close(); err != nil {
			t.Error(err)
		}
	})
	err = tg.Apply(&configs.Config{Subsystems: []configs.Subsystem{{NQN: statusNQN, Serial: "S1", AllowAnyHost: true, Namespaces: []configs.Namespace{
		{NSID: 1, Type: configs.KeyValue, Device: configs.DeviceMemory, Size: 64 << 20, MaxValue: 4 << 20},
		{NSID: 2, Type: configs.Block, Device: configs.DeviceFile, Path: filepath.Join(t.TempDir(), "block.img"), Size: 1 << 20, LBASize: 4096},
		{NSID: 3, Type: configs.Block, Device: configs.DeviceBlock, Path: "/nowhere/nvme9n9", LBASize: 4096},
	}}}})
	return tg, err
}

// execute runs one command as a transport does.
func execute(t *testing.T, q *Queue, cmd nvmeof.Command, data []byte) nvmeof.Completion {
	t.Helper()
	r := q.NewRequest()
	r.Cmd, r.Inline, r.Length = cmd, data, uint32(len(data))
	q.Execute(r)
	return <-q.conn.(*statusConn).cqe
}

func TestStatus(t *testing.T) {
	tg, err := statusTarget(t)
	if err == nil {
		t.Error("a missing drive was opened")
	}
	port := &Port{TRType: nvmeof.TRTypeTCP, Address: netip.MustParseAddrPort("127.0.0.1:4420")}
	tg.AddPort(port)

	// Status is asked for all the time while a controller comes, works and goes: the race detector watches.
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				tg.Status()
			}
		}
	}()
	queue := func(qid uint16) *Queue {
		q := tg.NewQueue(&statusConn{make(chan nvmeof.Completion, 1)}, port, port.Address)
		d := nvmeof.ConnectData{HostID: [16]byte{0xAB}, CNTLID: nvmeof.CNTLIDDynamic, SubNQN: statusNQN, HostNQN: "nqn.2014-08.org.nvmexpress:uuid:h"}
		if qid > 0 {
			d.CNTLID = 1
		}
		data := make([]byte, nvmeof.ConnectDataSize)
		d.Encode(data)
		if cqe := execute(t, q, nvmeof.MakeConnect(1, qid, 31, 0, 15000), data); cqe.Status() != nvmeof.Success {
			t.Fatalf("connect of queue %d: %v", qid, cqe.Status())
		}
		return q
	}
	admin := queue(0)
	execute(t, admin, nvmeof.MakePropertySet(nvmeof.PropCC, 0x460061), nil)
	var features nvmeof.Command
	features.SetHeader(nvmeof.OpSetFeatures, 2, 0)
	features.SetDW(10, 7) // Number of Queues
	features.SetDW(11, 0x10001)
	execute(t, admin, features, nil)
	io := queue(1)
	var store nvmeof.Command
	store.SetHeader(nvmeof.OpStore, 3, 1)
	store.SetKey([]byte("hello"))
	store.SetKV(5, 0)
	if cqe := execute(t, io, store, []byte("world")); cqe.Status() != nvmeof.Success {
		t.Fatal("store: ", cqe.Status())
	}
	close(stop)
	<-done

	s := tg.Status()
	if len(s.Ports) != 1 || s.Ports[0] != (PortStatus{ID: 1, Transport: "tcp", Address: "127.0.0.1:4420"}) {
		t.Errorf("ports: %+v", s.Ports)
	}
	if s.Kernel.Kernel == "" || s.Arena.Size != 16<<20 || s.Uptime <= 0 {
		t.Errorf("kernel %+v, arena %+v, uptime %v", s.Kernel, s.Arena, s.Uptime)
	}
	ns := s.Subsystems[0].Namespaces
	if ns[0].State != NamespaceServed || ns[1].State != NamespaceServed || ns[2].State != NamespaceFailed || !strings.Contains(ns[2].Error, "/nowhere/nvme9n9") {
		t.Fatalf("states: %+v", ns)
	}
	if kv := ns[0]; kv.Store.Keys != 1 || kv.Used == 0 || kv.BytesIn != 5 || kv.Commands[0].Name != "store" || kv.Commands[0].Latency.Count != 1 {
		t.Errorf("Key Value namespace: %+v", kv)
	}
	if b := ns[1]; b.Capacity != 1<<20 || b.LBASize != 4096 || b.Store != nil || b.Device.Kind != "file" {
		t.Errorf("block namespace: %+v", b)
	}
	k := s.Controllers[0]
	if len(s.Controllers) != 1 || k.CNTLID != 1 || !k.Ready || k.KATO != 15000 || k.Subsystem != statusNQN || !strings.HasPrefix(k.HostID, "ab00") {
		t.Errorf("controllers: %+v", s.Controllers)
	}
	if len(k.Queues) != 2 || k.Queues[1] != (QueueStatus{QID: 1, Entries: 32, Peer: "192.0.2.1:50000"}) {
		t.Errorf("queues: %+v", k.Queues)
	}
	if _, err := json.Marshal(s); err != nil {
		t.Error(err)
	}
	io.Close()
	admin.Close()
	if n := len(tg.Status().Controllers); n != 0 {
		t.Errorf("%d controllers are left", n)
	}
}

func TestReady(t *testing.T) {
	tg, _ := statusTarget(t)
	if err := tg.Ready(); err == nil || !strings.Contains(err.Error(), "/nowhere/nvme9n9") {
		t.Errorf("with a namespace that failed: %v", err)
	}
	if err := tg.Apply(&configs.Config{Subsystems: []configs.Subsystem{{NQN: statusNQN}}}); err != nil {
		t.Fatal(err)
	}
	if err := tg.Ready(); err != nil {
		t.Errorf("without that namespace: %v", err)
	}
	tg.Drain(0)
	if err := tg.Ready(); err == nil || !strings.Contains(err.Error(), "draining") {
		t.Errorf("while draining: %v", err)
	}
}

// stuckDevice answers reads when it is told to.
type stuckDevice struct {
	uring.Device
	answer chan struct{}
	err    error
	reads  atomic.Int32
}

func (d *stuckDevice) BlockSize() int { return 4096 }

func (d *stuckDevice) Submit(ops ...*uring.Op) {
	for _, o := range ops {
		o.Begin()
		d.reads.Add(1)
		go func() {
			<-d.answer
			o.Complete(d.err)
		}()
	}
}

// TestHealth has devices hang: of a block namespace, and one of a pool that two namespaces share.
func TestHealth(t *testing.T) {
	tg, _ := statusTarget(t)
	dir := t.TempDir()
	pooled := configs.Namespace{NSID: 4, Type: configs.KeyValue, Pool: "p", UUID: uuid.New()}
	other := configs.Namespace{NSID: 5, Type: configs.KeyValue, Pool: "p", UUID: uuid.New()}
	if err := tg.Apply(&configs.Config{
		Pools: []configs.Pool{{Name: "p", Device: configs.DeviceFile, Size: 32 << 20, Devices: []string{filepath.Join(dir, "0"), filepath.Join(dir, "1")}}},
		Subsystems: []configs.Subsystem{{NQN: statusNQN, AllowAnyHost: true, Namespaces: []configs.Namespace{
			{NSID: 2, Type: configs.Block, Device: configs.DeviceFile, Path: filepath.Join(dir, "block"), Size: 1 << 20, LBASize: 4096}, pooled, other}}},
	}); err != nil {
		t.Fatal(err)
	}
	if err := tg.Health(t.Context()); err != nil {
		t.Fatal(err)
	}
	answer := make(chan struct{})
	var stuck []*stuckDevice
	ns := tg.all()[0].list()
	for _, d := range []*disk{ns[0].disks[0], ns[1].disks[1]} {
		s := &stuckDevice{Device: d.Device, answer: answer, err: uring.ErrMedia}
		d.Device, stuck = s, append(stuck, s)
	}
	stuck[1].err = uring.ErrGone
	for range 2 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second) // for the healthy ones to answer
		err := fmt.Sprint(tg.Health(ctx))
		cancel()
		if lines := strings.Split(err, "\n"); len(lines) != 2 || !strings.Contains(lines[0], "block of namespace 2 has not answered for ") ||
			!strings.Contains(lines[1], "1 of namespace 4 has not answered for ") {
			t.Errorf("with silent devices: %v", err)
		}
		if err := tg.Alive(t.Context()); err != nil {
			t.Errorf("silent devices stop the target: %v", err)
		}
	}
	for _, d := range stuck {
		if n := d.reads.Load(); n != 1 {
			t.Errorf("%d reads in flight", n)
		}
	}
	close(answer)
	for range 2 { // the first may be the check that hung
		if err := fmt.Sprint(tg.Health(t.Context())); !strings.HasSuffix(err, "1 of namespace 4 is gone") || strings.Contains(err, "\n") {
			t.Errorf("with one device that answers with errors and one that is gone: %v", err)
		}
	}
}

func TestAlive(t *testing.T) {
	tg, _ := statusTarget(t)
	sub := tg.all()[0]
	sub.mu.Lock()
	for range 2 {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
		if err := tg.Alive(ctx); err == nil || !strings.Contains(err.Error(), "the target has not answered for ") {
			t.Errorf("stuck: %v", err)
		}
		cancel()
	}
	sub.mu.Unlock()
	if err := tg.Alive(t.Context()); err != nil {
		t.Error(err)
	}
	tg.checks.Wait()
}

func TestQuantile(t *testing.T) {
	var h Histogram
	if got := h.snapshot().Quantile(0.5); got != 0 {
		t.Errorf("of nothing: %v", got)
	}
	for range 98 {
		h.observe(100 * time.Microsecond) // 64 to 128 us
	}
	h.observe(5 * time.Millisecond) // 4.096 to 8.192 ms
	h.observe(time.Hour)
	s := h.snapshot()
	for _, test := range []struct{ q, low, high float64 }{{0, 64, 64}, {0.5, 95, 98}, {0.98, 128, 128}, {0.99, 8192, 8192}, {1, 1 << 24, 1 << 24}} {
		if got := float64(s.Quantile(test.q)) / 1e3; got < test.low || got > test.high {
			t.Errorf("quantile %v: %v us, want %v to %v", test.q, got, test.low, test.high)
		}
	}
	if s.Count != 100 || s.Sum < time.Hour {
		t.Errorf("%+v", s)
	}
}
