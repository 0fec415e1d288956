package rdma

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/rdma"
	"github.com/kvof/kvof/rdma/rdmatest"
)

// TestReject asks for connections that are refused, each with its own status.
func TestReject(t *testing.T) {
	e := serve(t, rdmatest.DefaultCaps())
	good := nvmeof.RDMARequest{QID: 1, HRQSIZE: 32, HSQSIZE: 31}
	change := func(f func(*nvmeof.RDMARequest)) []byte {
		r := good
		f(&r)
		b := make([]byte, nvmeof.RDMARequestSize)
		r.Encode(b)
		return b
	}
	format := request(1, 32)
	format[0] = 1
	for _, c := range []struct {
		name    string
		private []byte
		want    nvmeof.RDMAReject
	}{
		{"record format", format, nvmeof.RDMARejectFormat},
		{"queue", change(func(r *nvmeof.RDMARequest) { r.QID = 65 }), nvmeof.RDMARejectQID},
		{"queue of one entry", change(func(r *nvmeof.RDMARequest) { r.HSQSIZE = 0 }), nvmeof.RDMARejectHSQSIZE},
		{"large queue", change(func(r *nvmeof.RDMARequest) { r.HSQSIZE = 128 }), nvmeof.RDMARejectHSQSIZE},
		{"large admin queue", change(func(r *nvmeof.RDMARequest) { r.QID, r.HSQSIZE = 0, maxAdmin }), nvmeof.RDMARejectHSQSIZE},
		{"no room for responses", change(func(r *nvmeof.RDMARequest) { r.HRQSIZE = 0 }), nvmeof.RDMARejectHRQSIZE},
	} {
		_, err := e.dial(c.private, 4096)
		var r *rdma.RejectedError
		if !errors.As(err, &r) || nvmeof.DecodeRDMAReject(r.Private) != c.want {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
	id, err := e.net.Resolve(t.Context(), hostAddr, e.l.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer id.Close()
	ch, _ := id.Device().NewChannel()
	defer ch.Close()
	cq, _ := ch.NewCQ(64)
	defer cq.Close()
	if _, err := id.CreateQP(rdma.QPAttr{SendCQ: cq, RecvCQ: cq, RecvDepth: 4, SendDepth: 4, SendSGE: 1}); err != nil {
		t.Fatal(err)
	}
	var r *rdma.RejectedError
	if _, err := id.Connect(t.Context(), rdma.ConnParam{Private: request(0, 32)}); !errors.As(err, &r) || nvmeof.DecodeRDMAReject(r.Private) != nvmeof.RDMARejectIRD {
		t.Errorf("no READ allowed: %v", err)
	}
	short := e.far.Caps()
	short.IWARP = true // private data is not padded
	if _, err := e.dial(request(1, 32)[:31], 4096); !errors.As(err, &r) || nvmeof.DecodeRDMAReject(r.Private) != nvmeof.RDMARejectLength {
		t.Errorf("short private data: %v", err)
	}
}

// TestNoRoom fills the device until connections are refused for want of resources, and goes on when there is room again.
func TestNoRoom(t *testing.T) {
	caps := rdmatest.DefaultCaps()
	caps.MaxSRQ, caps.MaxSRQWR, caps.MaxCQE = 1, 128, 4096 // room for two queues of 32
	e := serve(t, caps)
	var hosts []*host
	for range 2 {
		h, err := e.dial(request(0, hostDepth), 4096)
		if err != nil {
			t.Fatal(err)
		}
		hosts = append(hosts, h)
	}
	if _, err := e.dial(request(0, hostDepth), 4096); err == nil {
		t.Fatal("the device has no room, and took another")
	}
	hosts[0].id.Disconnect()
	eventually(t, func() error {
		_, err := e.dial(request(0, hostDepth), 4096)
		return err
	})
}

// TestDepth connects with a larger queue than was offered, and sends more commands than there are entries.
func TestDepth(t *testing.T) {
	e := serve(t, rdmatest.DefaultCaps(), block(1, configs.DeviceMemory, "", 16<<20))
	_, cntlid := e.admin()
	io, err := e.dial(request(1, 8), 4096)
	if err != nil {
		t.Fatal(err)
	}
	if cqe := io.connect(1, 9, cntlid, testNQN); cqe.Status().Code() != nvmeof.ConnectInvalidParam {
		t.Errorf("9 entries where 8 were offered: %v", cqe.Status())
	}
	if cqe := io.connect(1, 8, cntlid, testNQN); cqe.Status() != nvmeof.Success {
		t.Fatal(cqe.Status())
	}
	e.dev.Stall(true) // no data comes in
	for range 8 {
		io.send(io.rw(nvmeof.OpWrite, 1, 0, 1, 0), nil)
	}
	time.Sleep(50 * time.Millisecond)
	if io.id.Err() != nil {
		t.Fatal("8 commands are too many")
	}
	io.send(io.rw(nvmeof.OpWrite, 1, 0, 1, 0), nil)
	select {
	case <-io.id.Ended():
	case <-time.After(patience):
		t.Fatal("the ninth command is accepted")
	}
	e.dev.Stall(false)
}

// TestInvalidate asks for remote invalidation, and does not.
func TestInvalidate(t *testing.T) {
	for name, caps := range devices() {
		t.Run(name, func(t *testing.T) {
			e := serve(t, caps, block(1, configs.DeviceMemory, "", 16<<20))
			_, io := e.queues(64 << 10)
			for _, ask := range []bool{true, false, true} {
				c := io.rw(nvmeof.OpRead, 1, 0, 4, 0)
				want := uint32(0)
				if ask {
					s := c.SGL()
					s[15] = nvmeof.SGLKeyedInvalidate
					c.SetSGL(s)
					if caps.SendInvalidate {
						want = io.rkey
					}
				}
				if io.must(c, nil); io.invalidated != want {
					t.Errorf("asked %v: key %#x was invalidated, want %#x", ask, io.invalidated, want)
				}
			}
		})
	}
}

// TestInCapsule writes from the capsule: to a file from where it arrived, to memory by the one copy there is.
func TestInCapsule(t *testing.T) {
	for name, caps := range devices() {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			e := serve(t, caps, block(1, configs.DeviceFile, dir, 16<<20), block(2, configs.DeviceMemory, dir, 16<<20), kv(3, configs.DeviceFile, dir, 256<<20))
			_, io := e.queues(64 << 10)
			data := make([]byte, 4096)
			for i := range 100 {
				for nsid := uint32(1); nsid <= 2; nsid++ {
					pattern(data, i)
					c := io.rw(nvmeof.OpWrite, nsid, uint64(i), 1, 0)
					c.SetSGL(nvmeof.MakeSGL(nvmeof.SGLOffset, 0, 4096))
					io.must(c, data)
					io.must(io.rw(nvmeof.OpRead, nsid, uint64(i), 1, 0), nil)
					check(t, "block", io.data[:4096], data)
				}
			}
			if n := e.target.Status().Copied; n != 100*4096 {
				t.Errorf("%d payload bytes were copied, want those of the memory namespace", n)
			}
			var c nvmeof.Command
			c.SetHeader(nvmeof.OpStore, 0, 3)
			c.SetKey([]byte("small"))
			c.SetKV(100, 0)
			c.SetSGL(nvmeof.MakeSGL(nvmeof.SGLOffset, 0, 100))
			io.must(c, data[:100])
			io.kv(nvmeof.OpRetrieve, 3, "small", 100, 0)
			check(t, "value", io.data[:100], data[:100])
		})
	}
}

// TestBadKey uses keys and addresses that are not the host's memory: the connection ends, nothing else does.
func TestBadKey(t *testing.T) {
	for _, op := range []uint8{nvmeof.OpRead, nvmeof.OpWrite} {
		for _, device := range []configs.DeviceKind{configs.DeviceMemory, configs.DeviceFile} {
			t.Run(fmt.Sprintf("%02Xh/%s", op, device), func(t *testing.T) {
				e := serve(t, rdmatest.DefaultCaps(), block(1, device, t.TempDir(), 16<<20))
				admin, cntlid := e.admin()
				io, other := e.io(cntlid, 1, 1<<20), e.io(cntlid, 2, 1<<20)
				c := io.rw(op, 1, 0, 256, 0)
				s := c.SGL()
				s[11]++ // the key
				c.SetSGL(s)
				io.send(c, nil)
				if _, err := io.recv(); !errors.Is(err, errEnded) {
					t.Errorf("opcode %02Xh with a wrong key: %v", op, err)
				}
				other.must(other.rw(nvmeof.OpRead, 1, 0, 256, 0), nil)
				var ka nvmeof.Command
				ka.SetHeader(nvmeof.OpKeepAlive, 0, 0)
				admin.must(ka, nil)
			})
		}
	}
}

// TestVanish loses hosts, and the device, in the middle of transfers.
func TestVanish(t *testing.T) {
	for name, caps := range devices() {
		for _, how := range []string{"host is silent", "host disconnects", "device is removed", "listener closes"} {
			t.Run(name+"/"+how, func(t *testing.T) {
				dir := t.TempDir()
				e := serve(t, caps, block(1, configs.DeviceMemory, dir, 64<<20), block(2, configs.DeviceFile, dir, 64<<20), kv(3, configs.DeviceFile, dir, 256<<20))
				_, io := e.queues(4 << 20)
				e.dev.Stall(true) // the target's transfers hang
				for i := range 8 {
					op := []uint8{nvmeof.OpRead, nvmeof.OpWrite}[i%2]
					io.send(io.rw(op, uint32(1+i/2%2), 0, 512, 0), nil)
				}
				data := make([]byte, 4096)
				c := io.rw(nvmeof.OpWrite, 2, 0, 1, 0)
				c.SetSGL(nvmeof.MakeSGL(nvmeof.SGLOffset, 0, 4096))
				io.send(c, data)
				time.Sleep(20 * time.Millisecond)
				switch how {
				case "host is silent":
					e.net.Vanish(io.id)
					e.dev.Stall(false)
					e.target.Drain(0)
				case "host disconnects":
					io.id.Disconnect()
					e.dev.Stall(false)
					e.target.Drain(0)
				case "device is removed":
					e.dev.Remove()
				case "listener closes":
					e.target.Drain(0)
				}
				e.quiet(0)
			})
		}
	}
}

// TestReturn removes the device and brings it back: the listener listens again.
func TestReturn(t *testing.T) {
	retryTime = 10 * time.Millisecond
	e := serve(t, rdmatest.DefaultCaps(), block(1, configs.DeviceMemory, "", 16<<20))
	_, io := e.queues(64 << 10)
	io.must(io.rw(nvmeof.OpRead, 1, 0, 1, 0), nil)
	e.dev.Remove()
	e.quiet(0)
	e.dev = e.net.AddDevice("target1", targetAddr, rdmatest.DefaultCaps())
	eventually(t, func() error {
		id, err := e.net.Resolve(t.Context(), hostAddr, netip.AddrPortFrom(targetAddr, 4420))
		if err == nil {
			defer id.Close()
			_, err = id.Connect(t.Context(), rdma.ConnParam{Private: make([]byte, 32)})
			if r := (*rdma.RejectedError)(nil); errors.As(err, &r) {
				err = nil // it answers
			}
		}
		return err
	})
	_, io = e.queues(64 << 10)
	io.must(io.rw(nvmeof.OpRead, 1, 0, 1, 0), nil)
}

// TestStall connects and does not send a Connect, and lets transfers hang: both end.
func TestStall(t *testing.T) {
	stallLimit, setupTime = 300*time.Millisecond, 300*time.Millisecond
	defer func() { stallLimit, setupTime = 30*time.Second, 15*time.Second }()
	e := serve(t, rdmatest.DefaultCaps(), block(1, configs.DeviceMemory, "", 16<<20))
	mute, err := e.dial(request(0, hostDepth), 4096)
	if err != nil {
		t.Fatal(err)
	}
	admin, io := e.queues(64 << 10)
	e.dev.Stall(true)
	io.send(io.rw(nvmeof.OpRead, 1, 0, 1, 0), nil)
	for _, h := range []*host{mute, io} {
		select {
		case <-h.id.Ended():
		case <-time.After(patience):
			t.Fatal("it goes on")
		}
	}
	e.dev.Stall(false)
	var ka nvmeof.Command
	ka.SetHeader(nvmeof.OpKeepAlive, 0, 0)
	admin.must(ka, nil)
}

// TestBurst connects many hosts at once.
func TestBurst(t *testing.T) {
	e := serve(t, rdmatest.DefaultCaps(), block(1, configs.DeviceMemory, "", 16<<20))
	const n = 1000
	var wg sync.WaitGroup
	errs := make(chan error, n)
	for range n {
		wg.Add(1)
		go func() {
			defer wg.Done()
			h, err := e.dial(request(0, hostDepth), 4096)
			if err != nil {
				errs <- err
				return
			}
			if cqe := h.connect(0, hostDepth, nvmeof.CNTLIDDynamic, testNQN); cqe.Status() != nvmeof.Success {
				errs <- cqe.Status()
			}
		}()
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	s := e.transport.Status()[0]
	if s.QueuePairs != n || s.Receives != n*hostDepth {
		t.Errorf("%+v", s)
	}
	e.target.Drain(0)
	e.quiet(0)
	eventually(t, func() error {
		if now := e.transport.Status()[0]; now.Memory > s.Memory/4 {
			return fmt.Errorf("%d MiB of control memory, and %d with hosts", now.Memory>>20, s.Memory>>20)
		}
		return nil
	})
}

// TestLateEnds shows that the ends of small reads' responses wake no lane, and that none goes unnoticed for long.
func TestLateEnds(t *testing.T) {
	dir := t.TempDir()
	e := serve(t, rdmatest.DefaultCaps(), block(1, configs.DeviceFile, dir, 16<<20))
	_, io := e.queues(1 << 20)
	io.must(io.rw(nvmeof.OpWrite, 1, 0, 256, 0), nil)
	sleeps := func() (n uint64) {
		for _, s := range e.transport.Status() {
			n += s.Sleeps
		}
		return n
	}
	const reads = 500
	before := sleeps()
	for i := range reads {
		io.must(io.rw(nvmeof.OpRead, 1, uint64(i%256), 1, 0), nil)
	}
	if n := sleeps() - before; n > reads*5/2 { // one for the capsule, one for the file's data
		t.Errorf("%d sleeps for %d reads", n, reads)
	}
	eventually(t, func() error {
		e.transport.mu.Lock()
		defer e.transport.mu.Unlock()
		for _, d := range e.transport.devices {
			for _, l := range d.lanes {
				l.mu.Lock()
				defer l.mu.Unlock()
				for _, s := range l.shards {
					if n := s.awaited.Load() + s.unawaited.Load(); n != 0 {
						return fmt.Errorf("%d ends of sends unnoticed", n)
					}
				}
			}
		}
		return nil
	})
	e.quiet(1)
}
