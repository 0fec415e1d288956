package target_test

import (
	"slices"
	"testing"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/kvlayer"
	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/target"
	"github.com/kvof/kvof/uring"
	"github.com/kvof/kvof/uring/uringtest"
)

// FuzzCommand runs arbitrary commands on an enabled controller: the first byte chooses the queue and where the data is,
// the next 64 are the command, the rest is data; and so on for what is left. Each command completes, and the controller's
// subsystem works afterwards.
func FuzzCommand(f *testing.F) {
	seed := func(queue byte, c nvmeof.Command, data int) []byte {
		return append(append([]byte{queue}, c[:]...), make([]byte, data)...)
	}
	kv := func(op uint8, size uint32) (c nvmeof.Command) {
		c.SetHeader(op, 1, 1)
		c.SetKey([]byte("key"))
		c.SetKV(size, 0)
		return c
	}
	block := func(op uint8, cdw12 uint32) (c nvmeof.Command) {
		c.SetHeader(op, 1, 2)
		c.SetDW(12, cdw12)
		return c
	}
	for cns := range 0x20 {
		f.Add(seed(0, nvmeof.MakeIdentify(uint8(cns), 1, nvmeof.CSIKV), 64))
	}
	for _, lid := range []uint8{1, 2, 3, 4, 5, 0x70, nvmeof.LogVendor} {
		f.Add(seed(0, nvmeof.MakeGetLogPage(lid, 0, 4096, 0, nvmeof.CSIKV, false), 0))
	}
	for fid := range 0x21 {
		var c nvmeof.Command
		c.SetHeader(nvmeof.OpSetFeatures, 1, 1)
		c.SetDW(10, uint32(fid))
		f.Add(seed(2, c, 128))
		c.SetHeader(nvmeof.OpGetFeatures, 1, 1)
		f.Add(seed(0, c, 0))
	}
	for _, op := range []uint8{0, 1, 2, 6, 0x10, 0x14} {
		f.Add(seed(1, kv(op, 4096), 64))
		f.Add(seed(3, kv(op, 64), 64))
	}
	stored := seed(3, kv(nvmeof.OpStore, 64), 64)
	for _, x := range [][2]uint32{{0, 0}, {4, 0}, {60, 0}, {64, 0}, {1 << 31, 0}, {3, 0}, {0, 1}} {
		c := kv(nvmeof.OpRetrieve, 32)
		c.SetRange(x[0], x[1])
		c.SetSGL(nvmeof.MakeSGL(nvmeof.SGLTransport, 0, 32))
		f.Add(append(slices.Clone(stored), seed(1, c, 0)...))
	}
	l := nvmeof.NewKeyList(make([]byte, 0, 64))
	l.Add([]byte("key"))
	l.Add([]byte("another key"))
	many := seed(3, nvmeof.MakeExistMany(1, uint32(len(l.Bytes()))), 0)
	f.Add(append(many, l.Bytes()...))
	for _, op := range []uint8{0, 1, 2, 5, 8, 9, 12} {
		f.Add(seed(1, block(op, 0), 64))
		f.Add(seed(3, block(op, 1<<30|3), 4096))
	}
	f.Add(seed(0, nvmeof.MakePropertySet(nvmeof.PropCC, 0), 0))
	f.Add(seed(0, nvmeof.MakePropertySet(nvmeof.PropCC, 0x464061), 0))
	f.Add(seed(0, nvmeof.MakePropertyGet(nvmeof.PropCAP, 8), 0))

	dir := f.TempDir()
	tg, arena := newTarget(f, 16<<20, serving(
		configs.Namespace{NSID: 1, Type: configs.KeyValue, Device: configs.DeviceMemory, Size: 64 << 20, MaxValue: 8 << 20},
		configs.Namespace{NSID: 2, Type: configs.Block, Device: configs.DeviceMemory, Size: 1 << 20, LBASize: 512},
		configs.Namespace{NSID: 3, Type: configs.KeyValue, Device: configs.DeviceFile, Path: dir + "/kv", Size: 64 << 20, MaxValue: 8 << 20},
		configs.Namespace{NSID: 4, Type: configs.Block, Device: configs.DeviceFile, Path: dir + "/block", Size: 1 << 20, LBASize: 4096},
	))
	used := func() int { return arena.Stats().Used() }
	idle := used() + 2 // each block namespace keeps the buffer of its first Compare
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 64<<10 {
			return
		}
		admin, io := connected(t, tg, testNQN)
		for len(b) > 0 {
			how := b[0]
			b = b[1:]
			var c nvmeof.Command
			b = b[copy(c[:], b):]
			conn := admin
			if how&1 != 0 {
				conn = io
			}
			// As a transport does: the SGL's length is at most what the host has, or has room for.
			length, data := c.SGL(), []byte(nil)
			n := length.Length() % (16 << 20)
			capsule := how&2 != 0
			if capsule {
				n = min(n, target.InCapsule, uint32(len(b)))
				data = append(make([]byte, 0, 1), b[:n]...)
				b = b[n:]
			} else if c.Direction() != nvmeof.ControllerToHost {
				data = make([]byte, n)
				b = b[copy(data, b):]
			}
			x := conn.start(c, n, data, capsule && data != nil, &command{})
			if c.Opcode() == nvmeof.OpAsyncEvent && conn == admin {
				continue
			}
			select {
			case <-conn.gone:
			default:
				await(t, x.done, "completion")
			}
			if conn.closed() {
				break
			}
		}
		io.end()
		admin.end()
		if n := used(); n > idle {
			t.Fatalf("%d buffers are left", n-idle)
		}
		if n := len(tg.Status().Controllers); n > 0 {
			t.Fatalf("%d controllers are left", n)
		}
	})
}

// closed tells whether the target has closed the connection.
func (c *fakeConn) closed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.over
}

// TestReads: whole pieces of 128 KiB, from the beginning of a buffer of 1 MiB on, up to the value's end.
func TestReads(t *testing.T) {
	dev, err := uring.NewMemory(64 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	store, err := kvlayer.Open(dev, uringtest.NewArena(t, 16<<20), kvlayer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	const kib = 1 << 10
	for _, x := range []struct{ size, offset, limit, want int64 }{
		{0, 0, 4096, 0}, {100, 0, 4096, 100}, {100, 0, 0, 0}, {100, 100, 4096, 0}, {100, 1<<32 - 4, 1<<32 - 1, 0},
		{2048 * kib, 0, 48, 128 * kib}, {2048 * kib, 0, 256*kib + 4, 384 * kib}, {2048 * kib, 0, 1<<32 - 1, 2048 * kib},
		{2048 * kib, 128 * kib, 4, 256 * kib}, {2048 * kib, 256*kib + 4, 128 * kib, 512 * kib}, {2048 * kib, 1024*kib + 4, 128 * kib, 256 * kib}, {2048*kib + 4, 2048 * kib, 4096, 4},
	} {
		if got := store.Buffered(x.offset, target.ReadsTo(x.size, x.offset, x.limit)); got != x.want {
			t.Errorf("%+v: %d", x, got)
		}
	}
}
