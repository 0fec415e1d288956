package target_test

import (
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/target"
	"github.com/kvof/kvof/uring"
)

var discard = slog.New(slog.DiscardHandler)

// patience is how long a test waits for what must happen soon.
const patience = 20 * time.Second

// fakeConn is a connection without a network: its host is the test. It checks what every transport relies on.
type fakeConn struct {
	t     testing.TB
	name  string
	queue *target.Queue

	mu     sync.Mutex
	cmds   map[*target.Request]*command
	reason string // of Close
	over   bool   // the connection has ended: nothing reaches the host any more
	gone   chan struct{}
	late   []nvmeof.Completion // of commands that nobody waits for, in the order they came
}

// command is one command in flight, from the host's side.
type command struct {
	host []byte // its data to pull
	hold bool   // the host does not send it, until release
	pull bool   // it was asked for
	late bool
	cid  uint16
	out  []byte // data that came
	last bool   // with the flag
	cqe  nvmeof.Completion
	done chan struct{}
}

// newTarget serves c with an arena of so many bytes, and checks at the end that everything was given back.
func newTarget(t testing.TB, arenaSize int, c *configs.Config) (*target.Target, *uring.Arena) {
	t.Helper()
	arena, err := uring.NewArena(arenaSize)
	if err != nil {
		t.Fatal(err)
	}
	if c.Limits == (configs.Limits{}) {
		c.Limits = configs.Limits{Controllers: 64, IOQueues: 8, QueueEntries: 128}
	}
	tg := target.New(arena, c.Limits, discard)
	t.Cleanup(func() {
		if err := tg.Close(); err != nil {
			t.Error(err)
		}
		if err := arena.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := tg.Apply(c); err != nil {
		t.Fatal(err)
	}
	return tg, arena
}

func newFake(t testing.TB, tg *target.Target, port *target.Port, name string) *fakeConn {
	c := &fakeConn{t: t, name: name, cmds: map[*target.Request]*command{}, gone: make(chan struct{})}
	c.queue = tg.NewQueue(c, port, netip.MustParseAddrPort("192.0.2.1:4420"))
	return c
}

// Name implements target.Conn.
func (c *fakeConn) Name() string { return c.name }

// Pull implements target.Conn: the host sends odd pieces.
func (c *fakeConn) Pull(r *target.Request) {
	c.mu.Lock()
	x := c.cmds[r]
	x.pull = true
	over, hold := c.over, x.hold
	c.mu.Unlock()
	switch {
	case over:
		r.Aborted()
	case !hold:
		go c.deliver(r, x)
	}
}

func (c *fakeConn) deliver(r *target.Request, x *command) {
	data := x.host
	if int(r.PullLength) > len(data) {
		c.t.Errorf("%d bytes are pulled, the host has %d", r.PullLength, len(data))
		data = make([]byte, r.PullLength)
	}
	data = data[:r.PullLength]
	for n := 1; len(data) > 0; n = min(3*n+1, 1<<20) {
		b := r.Buffer(min(n, len(data)))
		if len(b) == 0 || len(b) > min(n, len(data)) {
			c.t.Errorf("Buffer(%d) returned %d bytes", min(n, len(data)), len(b))
			r.Aborted()
			return
		}
		copy(b, data)
		r.Filled(len(b))
		data = data[len(b):]
	}
	r.Received(nvmeof.Success)
}

// release lets the host send what it held back, once n commands have been asked for theirs, and tells how many were.
func (c *fakeConn) release(n int) int {
	var rs []*target.Request
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		rs = rs[:0]
		c.mu.Lock()
		for r, x := range c.cmds {
			if x.pull {
				rs = append(rs, r)
			}
		}
		if len(rs) >= n || time.Now().After(end) {
			for _, x := range c.cmds {
				x.hold = false
			}
			break
		}
		c.mu.Unlock()
	}
	c.mu.Unlock()
	for _, r := range rs {
		c.mu.Lock()
		x := c.cmds[r]
		c.mu.Unlock()
		c.deliver(r, x)
	}
	return len(rs)
}

// Send implements target.Conn.
func (c *fakeConn) Send(r *target.Request, b uring.Buf, last bool) {
	c.mu.Lock()
	x := c.cmds[r]
	if int(r.Sent) != len(x.out) || len(b.Data) == 0 || x.last {
		c.t.Errorf("piece of %d bytes at %d after %d bytes, last %v", len(b.Data), r.Sent, len(x.out), x.last)
	}
	if len(x.out)+len(b.Data) > int(r.Length) {
		c.t.Errorf("%d bytes sent for an SGL of %d", len(x.out)+len(b.Data), r.Length)
	}
	x.out, x.last = append(x.out, b.Data...), last
	c.mu.Unlock()
	b.Put()
	r.Taken()
}

// Complete implements target.Conn.
func (c *fakeConn) Complete(r *target.Request) {
	c.mu.Lock()
	x := c.cmds[r]
	delete(c.cmds, r)
	x.cqe = r.CQE
	if x.cqe.CID() != x.cid {
		c.t.Errorf("completion for command %d, not %d", x.cqe.CID(), x.cid)
	}
	if x.cqe.Status() == nvmeof.Success && len(x.out) > 0 && !x.last {
		c.t.Errorf("the data ended without its last piece")
	}
	if x.late && !c.over {
		c.late = append(c.late, x.cqe)
	}
	c.mu.Unlock()
	r.Release()
	close(x.done)
}

// Close implements target.Conn: the connection ends soon.
func (c *fakeConn) Close(reason string) {
	c.mu.Lock()
	first := !c.over
	if first {
		c.over, c.reason = true, reason
	}
	var rs []*target.Request
	for r, x := range c.cmds {
		if first && x.pull && x.hold {
			rs = append(rs, r)
		}
	}
	c.mu.Unlock()
	if !first {
		return
	}
	go func() {
		for _, r := range rs {
			r.Aborted()
		}
		c.queue.Close()
		close(c.gone)
	}()
}

// end closes the connection and waits until nothing is left of it.
func (c *fakeConn) end() {
	c.Close("the host disconnected")
	await(c.t, c.gone, "the queue's end")
}

func await(t testing.TB, done <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(patience):
		panic(fmt.Sprintf("%s: no %s", t.Name(), what))
	}
}

// start sends a command with its data in the capsule, or for the target to pull.
func (c *fakeConn) start(cmd nvmeof.Command, length uint32, data []byte, capsule bool, x *command) *command {
	c.t.Helper()
	r := c.queue.NewRequest()
	if r == nil {
		c.t.Fatal("the queue has no free entry")
	}
	x.cid, x.done = cmd.CID(), make(chan struct{})
	r.Cmd, r.Length = cmd, length
	if capsule {
		r.Inline = data
	} else {
		x.host = data
	}
	c.mu.Lock()
	c.cmds[r] = x
	c.mu.Unlock()
	c.queue.Execute(r)
	if capsule { // it is the transport's memory again
		clear(data)
	}
	return x
}

// do runs one command to its end.
func (c *fakeConn) do(cmd nvmeof.Command, length uint32, data []byte, capsule bool) *command {
	c.t.Helper()
	x := c.start(cmd, length, data, capsule, &command{})
	await(c.t, x.done, "completion")
	return x
}

// connect connects a queue.
func (c *fakeConn) connect(d nvmeof.ConnectData, qid, sqsize uint16, kato uint32) nvmeof.Completion {
	b := make([]byte, nvmeof.ConnectDataSize)
	d.Encode(b)
	return c.do(nvmeof.MakeConnect(1, qid, sqsize, 0, kato), nvmeof.ConnectDataSize, b, true).cqe
}

// ready connects and enables a controller with one I/O queue, for as long as the test runs.
func ready(t testing.TB, tg *target.Target, nqn string) (admin, io *fakeConn) {
	t.Helper()
	admin, io = connected(t, tg, nqn)
	t.Cleanup(func() { io.end(); admin.end() })
	return admin, io
}

func connected(t testing.TB, tg *target.Target, nqn string) (admin, io *fakeConn) {
	t.Helper()
	d := nvmeof.ConnectData{CNTLID: nvmeof.CNTLIDDynamic, SubNQN: nqn, HostNQN: "nqn.2014-08.org.nvmexpress:uuid:host"}
	admin, io = newFake(t, tg, &target.Port{}, "admin"), newFake(t, tg, &target.Port{}, "io")
	cqe := admin.connect(d, 0, 31, 0)
	if cqe.Status() != nvmeof.Success {
		t.Fatal(cqe.Status())
	}
	d.CNTLID = uint16(cqe.DW0())
	admin.do(nvmeof.MakePropertySet(nvmeof.PropCC, 0x460061), 0, nil, false)
	var f nvmeof.Command
	f.SetHeader(nvmeof.OpSetFeatures, 2, 0)
	f.SetDW(10, nvmeof.FeatQueues)
	admin.do(f, 0, nil, false)
	if cqe := io.connect(d, 1, 127, 0); cqe.Status() != nvmeof.Success {
		t.Fatal(cqe.Status())
	}
	return admin, io
}
