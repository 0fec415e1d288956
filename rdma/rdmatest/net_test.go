package rdmatest

import (
	"bytes"
	"context"
	"net/netip"
	"testing"

	"github.com/kvof/kvof/rdma"
)

var _ rdma.Verbs = (*Net)(nil)

// end is one side of a connection, with registered memory.
type end struct {
	id  rdma.ID
	qp  rdma.QP
	ch  rdma.Channel
	mem []byte
	reg *rdma.Region
}

func newEnd(t *testing.T, id rdma.ID) *end {
	t.Helper()
	e := &end{id: id, mem: make([]byte, 8192)}
	var err error
	if e.reg, err = id.Device().Register(e.mem, rdma.RemoteRead|rdma.RemoteWrite); err != nil {
		t.Fatal(err)
	}
	if e.ch, err = id.Device().NewChannel(); err != nil {
		t.Fatal(err)
	}
	cq, err := e.ch.NewCQ(64)
	if err != nil {
		t.Fatal(err)
	}
	if e.qp, err = id.CreateQP(rdma.QPAttr{SendCQ: cq, RecvCQ: cq, RecvDepth: 4, SendDepth: 8, SendSGE: 4}); err != nil {
		t.Fatal(err)
	}
	return e
}

// turn does one request and returns the completions of both ends.
func (e *end) turn(t *testing.T, w rdma.WR, sge ...rdma.SGE) []rdma.WC {
	t.Helper()
	var b rdma.Batch
	b.Send(e.qp)
	b.Add(w, sge...)
	wc := make([]rdma.WC, 8)
	n := e.ch.Turn(&b, wc)
	if _, err := b.Posted(0); err != nil {
		t.Fatal(err)
	}
	return wc[:n]
}

func TestNet(t *testing.T) {
	n := New()
	addr := netip.MustParseAddr("192.0.2.1")
	n.AddDevice("soft0", addr, DefaultCaps())
	l, err := n.Listen(netip.AddrPortFrom(addr, 4420), 8, func(rdma.Device) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	a, err := n.Resolve(context.Background(), netip.Addr{}, l.Addr())
	if err != nil {
		t.Fatal(err)
	}
	host := newEnd(t, a)
	var far *end
	ready := make(chan struct{})
	go func() {
		defer close(ready)
		id, err := l.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		far = newEnd(t, id)
		var b rdma.Batch
		b.Recv(far.qp)
		s, _ := far.reg.Split(far.mem[:64])
		b.Add(rdma.WR{ID: 7}, s)
		far.ch.Turn(&b, nil)
		_ = id.Accept(rdma.ConnParam{Private: []byte("yes"), InitiatorDepth: 1, ResponderResources: 1})
	}()
	p, err := a.Connect(context.Background(), rdma.ConnParam{Private: []byte("please"), InitiatorDepth: 1, ResponderResources: 1})
	<-ready
	if err != nil || string(p.Private) != "yes" || !bytes.HasPrefix(far.id.Request().Private, []byte("please\x00")) {
		t.Fatal(p, err)
	}

	copy(host.mem, "hello, far end")
	s, _ := host.reg.Split(host.mem[:14])
	if wc := host.turn(t, rdma.WR{ID: 1, Op: rdma.OpSend, Flags: rdma.FlagSignaled}, s); len(wc) != 1 || wc[0].ID != 1 || wc[0].Status != rdma.WCSuccess {
		t.Error(wc)
	}
	wc := make([]rdma.WC, 4)
	if k := far.ch.Turn(nil, wc); k != 1 || wc[0].ID != 7 || wc[0].Bytes != 14 || wc[0].QP != far.qp.Num() || string(far.mem[:14]) != "hello, far end" {
		t.Error(wc[:k])
	}
	_, rkey := far.reg.Split(far.mem)
	fs, _ := far.reg.Split(far.mem[4096:])
	if wc := host.turn(t, rdma.WR{ID: 2, Op: rdma.OpWrite, Flags: rdma.FlagSignaled, Remote: fs.Addr, RKey: rkey}, s); len(wc) != 1 || string(far.mem[4096:][:14]) != "hello, far end" {
		t.Error(wc)
	}
	copy(far.mem[4096:], "HELLO")
	if wc := host.turn(t, rdma.WR{ID: 3, Op: rdma.OpRead, Flags: rdma.FlagSignaled, Remote: fs.Addr, RKey: rkey}, s); len(wc) != 1 || string(host.mem[:14]) != "HELLO, far end" {
		t.Error(wc, string(host.mem[:14]))
	}
	if wc := host.turn(t, rdma.WR{ID: 4, Op: rdma.OpSend}, s); len(wc) != 0 || n.Faults() != (Faults{RNR: 1}) {
		t.Error("a send without a receive", wc, n.Faults())
	}
	far.id.Disconnect()
	<-host.id.Ended()
	if k := host.ch.Turn(nil, wc); k != 1 || wc[0].Status != rdma.WCFlush || wc[0].ID != 4 {
		t.Error("the flush", wc[:k])
	}
}

// TestDMABuf registers the memory of a dma-buf in two parts, and nothing that is not there.
func TestDMABuf(t *testing.T) {
	n := New()
	caps := DefaultCaps()
	caps.MaxMRSize = 8192
	d := n.AddDevice("soft0", netip.MustParseAddr("192.0.2.1"), caps)
	mem, content, buf := DMABuf(t, 10000, 4096+512)
	r, err := d.RegisterDMABuf(mem, buf, rdma.RemoteRead)
	if err != nil || r.Parts() != 2 {
		t.Fatal(r, err)
	}
	copy(content[8192:], "beyond the first part")
	s, key := r.Split(mem[8192:8202])
	if b := d.memory(key, s.Addr, 10, rdma.RemoteRead); string(b) != "beyond the" {
		t.Errorf("%q", b)
	}
	if d.memory(key, s.Addr, 10, rdma.RemoteWrite) != nil || d.memory(key, s.Addr+1800, 9, rdma.RemoteRead) != nil {
		t.Error("more is allowed than was registered")
	}
	if err := r.Close(); err != nil || d.memory(key, s.Addr, 10, rdma.RemoteRead) != nil {
		t.Error("it is still registered", err)
	}
	for _, b := range []rdma.DMABuf{{FD: -1, Offset: buf.Offset}, {FD: buf.FD, Offset: buf.Offset + 1}, {FD: buf.FD, Offset: buf.Offset + 4096}} {
		if _, err := d.RegisterDMABuf(mem, b, rdma.Local); err == nil {
			t.Errorf("%+v was registered", b)
		}
	}
	d.NoDMABuf = true
	if _, err := d.RegisterDMABuf(mem, buf, rdma.Local); err != rdma.ErrNoDMABuf {
		t.Error(err)
	}
	d.Close()
	if f := n.Faults(); f != (Faults{}) {
		t.Errorf("%+v", f)
	}
}
