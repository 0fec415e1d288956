package host

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/rdma"
	"github.com/kvof/kvof/rdma/rdmatest"
)

var (
	fakeRDMAAddr    = netip.MustParseAddrPort("192.0.2.1:4420")
	fakeDescriptors = uint8(16)
)

// fakeRDMA is a fake's end of an RDMA connection: one goroutine, which carries out each command when it arrives.
type fakeRDMA struct {
	t    testing.TB
	id   rdma.ID
	dev  rdma.Device
	qp   rdma.QP
	ch   rdma.Channel
	cq   rdma.CQ
	recv [][]byte // receive buffers
	out  []byte   // a response
	reg  []*rdma.Region
	cmds map[uint16][]byte // capsules, by command identifier
	got  []rdma.WC         // receives that came while something else was awaited
	last uint64            // request posted
	over uint64            // request completed
	mu   sync.Mutex
}

// newFakeRDMA is newFake on RDMA. The host's device has the caps given.
func newFakeRDMA(t testing.TB, caps rdma.Caps) (f *fake, far *rdmatest.Device) {
	f = bareFake(t)
	f.net = rdmatest.New()
	far = f.net.AddDevice("host0", netip.MustParseAddr("192.0.2.2"), caps)
	dev := f.net.AddDevice("target0", fakeRDMAAddr.Addr(), rdmatest.DefaultCaps())
	l, err := f.net.Listen(fakeRDMAAddr, 16, func(rdma.Device) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	f.wg.Go(func() {
		for {
			id, err := l.Accept()
			if err != nil {
				return
			}
			f.wg.Go(func() { f.serveRDMA(id) })
		}
	})
	t.Cleanup(func() { // after the controllers' Close
		l.Close()
		f.dropAll()
		f.wg.Wait()
		dev.Close()
		far.Close()
		if f := f.net.Faults(); f != (rdmatest.Faults{}) {
			t.Errorf("a device would punish %+v", f)
		}
	})
	return f, far
}

func (r *fakeRDMA) Close() error {
	r.id.Disconnect()
	return nil
}

func (f *fake) serveRDMA(id rdma.ID) {
	defer id.Close()
	var req nvmeof.RDMARequest
	if err := req.Decode(id.Request().Private); err != nil {
		f.t.Error(err)
	}
	if req.HRQSIZE != req.HSQSIZE+1 || (req.QID == 0) != (req.CNTLID == 0) || id.Request().InitiatorDepth == 0 {
		f.t.Errorf("fake: %+v %+v", req, id.Request())
	}
	r := &fakeRDMA{t: f.t, id: id, dev: id.Device(), out: make([]byte, 16), cmds: map[uint16][]byte{}}
	var err error
	must := func(e error) {
		if e != nil {
			panic(e)
		}
	}
	r.ch, err = r.dev.NewChannel()
	must(err)
	defer r.ch.Close()
	r.cq, err = r.ch.NewCQ(4096)
	must(err)
	depth := int(req.HSQSIZE) + 1
	r.qp, err = id.CreateQP(rdma.QPAttr{SendCQ: r.cq, RecvCQ: r.cq, RecvDepth: depth, SendDepth: 256, SendSGE: 1})
	must(err)
	defer r.cq.Close()
	defer id.Close() // before the queue
	for range depth {
		r.recv = append(r.recv, make([]byte, 64+8192))
	}
	var b rdma.Batch
	b.Recv(r.qp)
	for i := range r.recv {
		b.Add(rdma.WR{ID: receiveID | uint64(i)}, r.sge(r.recv[i]))
	}
	r.dev.Post(&b)
	accept := make([]byte, nvmeof.RDMAAcceptSize)
	nvmeof.EncodeRDMAAccept(accept, uint16(depth))
	must(id.Accept(rdma.ConnParam{Private: accept, InitiatorDepth: 4}))
	defer func() {
		for _, g := range r.reg {
			g.Close()
		}
	}()
	f.mu.Lock()
	f.conns[r] = true
	f.mu.Unlock()
	c := &fakeConn{fake: f, rdma: r}
	for {
		wc, ok := r.next()
		if !ok {
			return
		}
		i := int(wc.ID &^ receiveID)
		capsule := bytes.Clone(r.recv[i][:wc.Bytes])
		b.Reset()
		b.Recv(r.qp)
		b.Add(rdma.WR{ID: wc.ID}, r.sge(r.recv[i]))
		r.dev.Post(&b)
		cmd := nvmeof.Command(capsule)
		r.mu.Lock()
		r.cmds[cmd.CID()] = capsule
		r.mu.Unlock()
		c.command(cmd, nil)
	}
}

// sge registers memory for good.
func (r *fakeRDMA) sge(b []byte) rdma.SGE {
	for _, g := range r.reg {
		if g.Contains(b) {
			s, _ := g.Split(b)
			return s
		}
	}
	g, err := r.dev.Register(b, rdma.Local)
	if err != nil {
		panic(err)
	}
	r.reg = append(r.reg, g)
	s, _ := g.Split(b)
	return s
}

// next waits for a capsule.
func (r *fakeRDMA) next() (rdma.WC, bool) {
	for len(r.got) == 0 {
		if !r.turn() {
			return rdma.WC{}, false
		}
	}
	wc := r.got[0]
	r.got = r.got[1:]
	return wc, true
}

// turn waits for some completions; false when the connection has ended.
func (r *fakeRDMA) turn() bool {
	var wc [16]rdma.WC
	n, err := r.ch.Wait([]rdma.CQ{r.cq}, nil, wc[:])
	if err != nil {
		return false
	}
	for _, w := range wc[:n] {
		switch {
		case w.Status != rdma.WCSuccess:
			return false
		case w.ID&receiveID != 0:
			r.got = append(r.got, w)
		default:
			r.over = w.ID
		}
	}
	return true
}

// post posts one request, and waits until it is over unless it is a response.
func (r *fakeRDMA) post(wr rdma.WR, b []byte) {
	var batch rdma.Batch
	batch.Send(r.qp)
	r.mu.Lock()
	r.last++
	wr.ID, wr.Flags = r.last, rdma.FlagSignaled
	batch.Add(wr, r.sge(b))
	r.dev.Post(&batch)
	r.mu.Unlock()
	if wr.Op == rdma.OpRead || wr.Op == rdma.OpWrite {
		for r.over < wr.ID && r.turn() {
		}
	}
}

func (r *fakeRDMA) respond(b []byte, invalidate uint32) {
	wr := rdma.WR{Op: rdma.OpSend}
	if invalidate != 0 {
		wr = rdma.WR{Op: rdma.OpSendInvalidate, RKey: invalidate}
	}
	r.post(wr, bytes.Clone(b))
}

// descriptors returns the keyed descriptors of a command, or the data in its capsule.
func (r *fakeRDMA) descriptors(cid uint16) (list []nvmeof.SGL, data []byte) {
	r.mu.Lock()
	c := r.cmds[cid]
	r.mu.Unlock()
	cmd := nvmeof.Command(c)
	sgl := cmd.SGL()
	switch sgl.ID() {
	case nvmeof.SGLKeyed:
		return []nvmeof.SGL{sgl}, nil
	case nvmeof.SGLOffset:
		return nil, c[64+sgl.Address():][:sgl.Length()]
	case nvmeof.SGLLastSegment:
		for b := c[64+sgl.Address():][:sgl.Length()]; len(b) > 0; b = b[16:] {
			list = append(list, nvmeof.SGL(b[:16]))
		}
		if len(list) < 2 || len(list) > int(fakeDescriptors) {
			r.t.Errorf("fake: %d descriptors", len(list))
		}
		return list, nil
	}
	r.t.Errorf("fake: SGL %02Xh", sgl.ID())
	return nil, nil
}

func (r *fakeRDMA) read(cid uint16) []byte {
	list, data := r.descriptors(cid)
	for _, s := range list {
		if s.KeyedLength() == 0 {
			continue
		}
		b := make([]byte, s.KeyedLength())
		r.post(rdma.WR{Op: rdma.OpRead, Remote: s.Address(), RKey: s.Key()}, b)
		data = append(data, b...)
	}
	return data
}

func (r *fakeRDMA) write(cid uint16, b []byte) {
	list, _ := r.descriptors(cid)
	for _, s := range list {
		if n := min(int(s.KeyedLength()), len(b)); n > 0 {
			r.post(rdma.WR{Op: rdma.OpWrite, Remote: s.Address(), RKey: s.Key()}, b[:n:n])
			b = b[n:]
		}
	}
}

func TestRDMA(t *testing.T) {
	small := rdmatest.DefaultCaps()
	small.MaxMRSize = 1 << 20 // values of 3 MiB take several descriptors
	small.MaxQPWR = 20
	for name, caps := range map[string]rdma.Caps{"default": rdmatest.DefaultCaps(), "small": small} {
		t.Run(name, func(t *testing.T) {
			f, _ := newFakeRDMA(t, caps)
			testKV(t, f, Options{})
			f.kv = map[string][]byte{}
			testBlock(t, f, Options{})
			if name == "small" {
				if d := connect(t, f, Options{}).QueueDepth(); d != 19 {
					t.Error(d)
				}
			}
		})
	}
}

// TestRDMARegistered: what the caller has registered costs no registration per command.
func TestRDMARegistered(t *testing.T) {
	f, far := newFakeRDMA(t, rdmatest.DefaultCaps())
	c := connect(t, f, Options{QueueDepth: 4})
	kv := openKV(t, c)
	buf := make([]byte, 40<<20)
	if err := c.Register(buf); err != nil {
		t.Fatal(err)
	}
	before := far.Registrations
	for _, n := range []int{1, 4096, 5000, 100000, 17 << 20, 33 << 20} {
		v := buf[3:][:n]
		copy(v, random(n))
		if err := kv.Store(t.Context(), testKey, v, 0); err != nil {
			t.Fatal(n, err)
		}
		clear(v)
		if got, err := kv.Retrieve(t.Context(), testKey, v); got != n || err != nil || !bytes.Equal(v, random(n)) {
			t.Fatal(n, got, err)
		}
	}
	if far.Registrations != before {
		t.Errorf("%d registrations", far.Registrations-before)
	}
	pieces := [][]byte{buf[:10], buf[5000:9000], nil, buf[1<<20 : 20<<20]}
	want := random(10 + 4000 + 19<<20)
	scatter := want
	for _, p := range pieces {
		scatter = scatter[copy(p, scatter):]
	}
	if err := kv.StorePieces(t.Context(), testKey, pieces, 0); err != nil || !bytes.Equal(f.kv[string(testKey)], want) {
		t.Error(err)
	}
	clear(buf)
	if n, err := kv.RetrievePieces(t.Context(), testKey, pieces); n != len(want) || err != nil || !bytes.Equal(bytes.Join(pieces, nil), want) {
		t.Error(n, err)
	}
	c.Unregister(buf)
	if n, err := kv.Retrieve(t.Context(), testKey, buf); n != len(want) || err != nil || far.Registrations != before+1 {
		t.Error(n, err, far.Registrations-before)
	}
	// 17 pieces are one too many, unless they are small.
	many := make([][]byte, 17)
	for i := range many {
		many[i] = buf[i<<20:][:100]
	}
	if err := kv.StorePieces(t.Context(), testKey, many, 0); err != nil {
		t.Error(err)
	}
	for i := range many {
		many[i] = buf[i<<20:][:1000]
	}
	if err := kv.StorePieces(t.Context(), testKey, many, 0); !errors.Is(err, ErrTransferSize) {
		t.Error(err)
	}
	if m := kv.MaxValue(); m != 64<<20 {
		t.Error(m)
	}
}

func TestRDMAAllocations(t *testing.T) {
	f, _ := newFakeRDMA(t, rdmatest.DefaultCaps())
	c := connect(t, f, Options{KATO: -1})
	q := c.now.Load().io[0].(*rdmaQueue)
	buf := make([]byte, 1<<20)
	if err := c.Register(buf); err != nil {
		t.Fatal(err)
	}
	s := &q.slots[<-q.free]
	var cmd nvmeof.Command
	cmd.SetHeader(nvmeof.OpRetrieve, 0, 1)
	for _, n := range []int{0, 10, 1 << 20} {
		if a := testing.AllocsPerRun(100, func() {
			if _, err := q.prepare(s, cmd, data{buf: buf[:n]}); err != nil {
				t.Error(err)
			}
			q.clean(s)
		}); a != 0 {
			t.Errorf("%v allocations for %d bytes", a, n)
		}
	}
	q.free <- s.index
}

func TestRDMAParallel(t *testing.T) {
	f, _ := newFakeRDMA(t, rdmatest.DefaultCaps())
	c := connect(t, f, Options{IOQueues: 8, QueueDepth: 4})
	kv := openKV(t, c)
	var wg sync.WaitGroup
	for g := range 32 {
		wg.Go(func() {
			key, buf := []byte{byte(g)}, make([]byte, 64<<10)
			for i := range 20 {
				v := random(1 + (g*7919+i*104729)%len(buf))
				if err := kv.Store(t.Context(), key, v, 0); err != nil {
					t.Error(err)
					return
				}
				n, err := kv.Retrieve(t.Context(), key, buf)
				if err != nil || !bytes.Equal(buf[:n], v) {
					t.Error("value differs", n, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestRDMAReconnect(t *testing.T) {
	f, _ := newFakeRDMA(t, rdmatest.DefaultCaps())
	c := connect(t, f, Options{IOQueues: 3, QueueDepth: 4, Reconnect: time.Minute})
	kv := openKV(t, c)
	registered := make([]byte, 1<<20)
	if err := c.Register(registered); err != nil {
		t.Fatal(err)
	}
	stop := make(chan bool)
	var drops, wg sync.WaitGroup
	drops.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(100 * time.Millisecond):
				f.dropAll()
			}
		}
	})
	end := time.Now().Add(1500 * time.Millisecond)
	for g := range 8 {
		wg.Go(func() {
			key, buf := []byte{byte(g)}, registered[g*100000:][:50000]
			for i := 0; time.Now().Before(end); i++ {
				v := random(1 + (g*7919+i*104729)%len(buf))
				if err := kv.Store(t.Context(), key, v, StoreAlways); err != nil {
					t.Error(err)
					return
				}
				if n, err := kv.Retrieve(t.Context(), key, buf); err != nil || !bytes.Equal(buf[:n], v) {
					t.Error("value differs", n, err)
					return
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	drops.Wait()
	if c.Err() != nil {
		t.Error(c.Err())
	}
}

// TestRDMACancel gives commands up: those whose data the controller cannot reach at once, others when they end, or with
// the connection.
func TestRDMACancel(t *testing.T) {
	f, _ := newFakeRDMA(t, rdmatest.DefaultCaps())
	held := make(chan chan bool)
	f.kv["k"] = random(100000)
	f.intercept = func(c *fakeConn, cmd *nvmeof.Command) bool {
		if c.qid == 0 || cmd.Opcode() != nvmeof.OpRetrieve {
			return false
		}
		release := make(chan bool)
		held <- release
		select {
		case <-release:
			return false
		case <-t.Context().Done():
			return true
		}
	}
	c := connect(t, f, Options{QueueDepth: 2})
	kv := openKV(t, c)
	try := func(n int, after func(release chan bool)) error {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		buf := make([]byte, n)
		go func() {
			_, err := kv.Retrieve(ctx, []byte("k"), buf)
			clear(buf)
			done <- err
		}()
		release := <-held
		cancel()
		after(release)
		err := <-done
		if !bytes.Equal(buf, make([]byte, n)) {
			t.Error("buffer was written after the call returned")
		}
		return err
	}
	for range 5 { // more than there are slots
		var release chan bool
		if err := try(100, func(r chan bool) { release = r }); err != context.Canceled {
			t.Error(err)
		}
		close(release)
	}
	if err := try(100000, func(release chan bool) { time.Sleep(10 * time.Millisecond); close(release) }); err != nil {
		t.Error(err)
	}
	if err := try(100000, func(chan bool) {}); !errors.Is(err, ErrConnectionLost) || !errors.Is(err, ErrOutcomeUnknown) {
		t.Error(err)
	}
	<-c.Done()
}

// TestRDMAHostile has the target break the protocol; the connection must end, cleanly.
func TestRDMAHostile(t *testing.T) {
	cqe := func(cid uint16) []byte {
		c := nvmeof.MakeCompletion(0, 0, 0, 1, cid, 0)
		return c[:]
	}
	for name, answer := range map[string]func(r *fakeRDMA, cid uint16){
		"unknown command": func(r *fakeRDMA, cid uint16) { r.respond(cqe(cid+1), 0) },
		"old generation":  func(r *fakeRDMA, cid uint16) { r.respond(cqe(cid-maxDepth), 0) },
		"no such slot":    func(r *fakeRDMA, cid uint16) { r.respond(cqe(cid+1000), 0) },
		"short":           func(r *fakeRDMA, cid uint16) { r.respond(cqe(cid)[:15], 0) },
		"long":            func(r *fakeRDMA, cid uint16) { r.respond(append(cqe(cid), 0), 0) },
		"invalidating": func(r *fakeRDMA, cid uint16) {
			list, _ := r.descriptors(cid)
			r.respond(cqe(cid), list[0].Key())
		},
		"gone": func(r *fakeRDMA, cid uint16) { r.id.Disconnect() },
	} {
		t.Run(name, func(t *testing.T) {
			f, _ := newFakeRDMA(t, rdmatest.DefaultCaps())
			f.intercept = func(c *fakeConn, cmd *nvmeof.Command) bool {
				if c.qid == 0 || cmd.Opcode() == nvmeof.OpFabrics {
					return false
				}
				answer(c.rdma, cmd.CID())
				return true
			}
			kv := openKV(t, connect(t, f, Options{QueueDepth: 4}))
			if _, err := kv.Retrieve(t.Context(), testKey, make([]byte, 100)); !errors.Is(err, ErrConnectionLost) || !errors.Is(err, ErrOutcomeUnknown) {
				t.Error(err)
			}
		})
	}
}

// TestRDMARemoved takes the host's device away in the middle of commands.
func TestRDMARemoved(t *testing.T) {
	f, far := newFakeRDMA(t, rdmatest.DefaultCaps())
	held := make(chan bool, 8)
	f.intercept = func(c *fakeConn, cmd *nvmeof.Command) bool {
		hold := c.qid > 0 && cmd.Opcode() == nvmeof.OpRetrieve
		if hold {
			held <- true
		}
		return hold
	}
	kv := openKV(t, connect(t, f, Options{}))
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := kv.Retrieve(t.Context(), testKey, make([]byte, 100000)); !errors.Is(err, ErrConnectionLost) {
				t.Error(err)
			}
		})
	}
	for range 8 {
		<-held
	}
	far.Remove()
	wg.Wait()
}

func TestRDMAConnectErrors(t *testing.T) {
	n := rdmatest.New()
	n.AddDevice("host0", netip.MustParseAddr("192.0.2.2"), rdmatest.DefaultCaps())
	n.AddDevice("target0", fakeRDMAAddr.Addr(), rdmatest.DefaultCaps())
	l, err := n.Listen(fakeRDMAAddr, 16, func(rdma.Device) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for i := 0; ; i++ {
			id, err := l.Accept()
			if err != nil {
				return
			}
			b := make([]byte, nvmeof.RDMARejectSize)
			nvmeof.RDMAReject(nvmeof.RDMARejectBusy).Encode(b)
			if i == 1 {
				b = nil
			}
			id.Reject(b)
			id.Close()
		}
	}()
	o := Options{Transport: "rdma", Verbs: n, Addr: fakeRDMAAddr.String(), SubNQN: testNQN}
	if _, err := Connect(t.Context(), o); !errors.Is(err, nvmeof.RDMARejectBusy) {
		t.Error(err)
	}
	var rejected *rdma.RejectedError
	if _, err := Connect(t.Context(), o); !errors.As(err, &rejected) {
		t.Error(err)
	}
	l.Close()
	if _, err := Connect(t.Context(), o); err == nil {
		t.Error("nobody listens")
	}
	o.Addr = "192.0.2.9:1"
	if _, err := Connect(t.Context(), o); err == nil {
		t.Error("nobody is there")
	}
	o.DataDigest = true
	if _, err := Connect(t.Context(), o); err == nil {
		t.Error("there are no digests")
	}
	if f := n.Faults(); f != (rdmatest.Faults{}) {
		t.Errorf("%+v", f)
	}
}
