package rdma

import (
	"fmt"
	"testing"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/rdma"
	"github.com/kvof/kvof/rdma/rdmatest"
)

// devices are those that differ in what matters.
func devices() map[string]rdma.Caps {
	d := rdmatest.DefaultCaps()
	iwarp := d
	iwarp.IWARP, iwarp.MaxSGERead, iwarp.SendInvalidate = true, 1, false
	noSRQ := d
	noSRQ.MaxSRQ, noSRQ.MaxSRQWR, noSRQ.MaxSGE = 0, 0, 3
	small := d
	small.MaxMRSize, small.MaxMessage, small.MaxQPWR, small.MaxInitiator, small.MaxSRQWR, small.MaxSGE, small.MaxCQE = 1<<20, 64<<10, 24, 1, 256, 1, 512
	return map[string]rdma.Caps{"RoCE": d, "iWARP": iwarp, "no SRQ": noSRQ, "small": small}
}

// TestTransfers moves data of many sizes both ways, to every kind of device and namespace.
func TestTransfers(t *testing.T) {
	for name, caps := range devices() {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			e := serve(t, caps, block(1, configs.DeviceMemory, dir, 64<<20), block(2, configs.DeviceFile, dir, 64<<20),
				kv(3, configs.DeviceMemory, dir, 256<<20), kv(4, configs.DeviceFile, dir, 256<<20))
			const most = 16 << 20
			_, io := e.queues(2 * most)
			for _, blocks := range []int{1, 2, 3, 64, 65, 256, most/4096 - 1} {
				n := blocks * 4096
				for nsid := uint32(1); nsid <= 2; nsid++ {
					pattern(io.data[:n], blocks)
					clear(io.data[most:][:n])
					io.must(io.rw(nvmeof.OpWrite, nsid, 3, blocks, 0), nil)
					io.must(io.rw(nvmeof.OpRead, nsid, 3, blocks, most), nil)
					check(t, "block", io.data[most:][:n], io.data[:n])
				}
			}
			for _, n := range []int{0, 1, 4095, 4097, 300000, most} {
				for nsid := uint32(3); nsid <= 4; nsid++ {
					pattern(io.data[:n], n)
					clear(io.data[most:][:n])
					io.kv(nvmeof.OpStore, nsid, "key", n, 0)
					cqe := io.kv(nvmeof.OpRetrieve, nsid, "key", n, most)
					if got := cqe.DW0(); got != uint32(n) {
						t.Errorf("size %d, not %d", got, n)
					}
					check(t, "value", io.data[most:][:n], io.data[:n])
				}
			}
			if n := e.target.Status().Copied; n != 0 {
				t.Errorf("%d payload bytes were copied", n)
			}
		})
	}
}

// TestOvertakenRead has a READ's completion come after those of requests that were posted later, as soft-iWARP does: the command that
// waits for its data goes on waiting.
func TestOvertakenRead(t *testing.T) {
	for _, device := range []configs.DeviceKind{configs.DeviceMemory, configs.DeviceFile} {
		t.Run(fmt.Sprint(device), func(t *testing.T) {
			e := serve(t, devices()["iWARP"], block(1, device, t.TempDir(), 16<<20))
			_, io := e.queues(1 << 20)
			const n = 16 * 4096
			pattern(io.data[:n], 1)
			var flush nvmeof.Command
			flush.SetHeader(nvmeof.OpFlush, 0, 1)
			e.dev.LateReads(true)
			cid := io.send(io.rw(nvmeof.OpWrite, 1, 3, n/4096, 0), nil)
			for range 3 {
				io.must(flush, nil)
				io.must(io.rw(nvmeof.OpRead, 1, 100, n/4096, n), nil)
			}
			e.dev.LateReads(false)
			if cqe, err := io.recv(); err != nil || cqe.CID() != cid || cqe.Status() != nvmeof.Success {
				t.Fatalf("%v, command %d, response %d: %v", err, cid, cqe.CID(), cqe.Status())
			}
			io.must(io.rw(nvmeof.OpRead, 1, 3, n/4096, n), nil)
			check(t, "block", io.data[n:][:n], io.data[:n])
		})
	}
}

// kv runs a Store or Retrieve of n bytes at off of payload memory; a large value takes several descriptors, cut unevenly.
func (h *host) kv(op uint8, nsid uint32, key string, n, off int) nvmeof.Completion {
	h.t.Helper()
	var c nvmeof.Command
	c.SetHeader(op, 0, nsid)
	c.SetKey([]byte(key))
	c.SetKV(uint32(n), 0)
	if n < 1<<20 {
		c.SetSGL(h.keyed(off, n))
		return h.must(c, nil)
	}
	var list []byte
	for _, cut := range []int{n / 3, 1, n/2 + 17, n} {
		if cut = min(cut, n); cut > 0 {
			s := h.keyed(off, cut)
			list = append(list, s[:]...)
			off, n = off+cut, n-cut
		}
	}
	c.SetSGL(nvmeof.MakeSGL(nvmeof.SGLLastSegment, 0, uint32(len(list))))
	return h.must(c, list)
}

// TestOverlap shows that the READs of one command overlap, as far as the host answers so many.
func TestOverlap(t *testing.T) {
	dir := t.TempDir()
	e := serve(t, rdmatest.DefaultCaps(), kv(1, configs.DeviceFile, dir, 256<<20), block(2, configs.DeviceFile, dir, 64<<20), kv(3, configs.DeviceMemory, dir, 256<<20))
	_, io := e.queues(8 << 20)
	const n = 4 << 20
	pattern(io.data[:n], 1)
	store := func(nsid uint32) (c nvmeof.Command) {
		c.SetHeader(nvmeof.OpStore, 0, nsid)
		c.SetKey([]byte("key"))
		c.SetKV(n, 0)
		c.SetSGL(io.keyed(0, n))
		return c
	}
	for _, cmd := range []nvmeof.Command{store(1), io.rw(nvmeof.OpWrite, 2, 0, n/4096, 0), store(3)} {
		e.dev.Stall(true)
		io.send(cmd, nil)
		eventually(t, func() error {
			e.transport.mu.Lock()
			defer e.transport.mu.Unlock()
			most := 0
			for _, d := range e.transport.devices {
				d.mu.Lock()
				for c := range d.conns {
					c.mu.Lock()
					most = max(most, c.reading.len())
					c.mu.Unlock()
				}
				d.mu.Unlock()
			}
			if most != overlap {
				return fmt.Errorf("namespace %d: %d READs at a time", cmd.NSID(), most)
			}
			return nil
		})
		e.dev.Stall(false)
		if cqe, err := io.recv(); err != nil || cqe.Status() != nvmeof.Success {
			t.Error(err, cqe.Status())
		}
	}
	clear(io.data[n:])
	io.kv(nvmeof.OpRetrieve, 1, "key", n, n)
	check(t, "value", io.data[n:][:n], io.data[:n])
}
