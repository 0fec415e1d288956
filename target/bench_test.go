package target_test

import (
	"bytes"
	"fmt"
	"net/netip"
	"testing"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/target"
	"github.com/kvof/kvof/uring"
)

// benchConn is a connection that costs nothing: what the target costs by itself.
type benchConn struct {
	done chan nvmeof.Status
	data []byte // to pull
}

func (c *benchConn) Name() string                                   { return "bench" }
func (c *benchConn) Close(string)                                   {}
func (c *benchConn) Send(r *target.Request, b uring.Buf, last bool) { b.Put(); r.Taken() }
func (c *benchConn) Complete(r *target.Request)                     { st := r.CQE.Status(); r.Release(); c.done <- st }
func (c *benchConn) Pull(r *target.Request) {
	for n := int(r.PullLength); n > 0; {
		b := r.Buffer(n)
		copy(b, c.data)
		r.Filled(len(b))
		n -= len(b)
	}
	r.Received(nvmeof.Success)
}

// BenchmarkCommand measures commands one after the other, without a transport.
func BenchmarkCommand(b *testing.B) {
	for _, device := range []configs.DeviceKind{configs.DeviceMemory, configs.DeviceFile} {
		dir := b.TempDir()
		cfg := serving(
			configs.Namespace{NSID: 1, Type: configs.KeyValue, Device: device, Path: dir + "/kv", Size: 256 << 20, MaxValue: 8 << 20},
			configs.Namespace{NSID: 2, Type: configs.Block, Device: device, Path: dir + "/block", Size: 64 << 20, LBASize: 4096},
		)
		for _, bc := range []struct {
			name string
			cmd  nvmeof.Command
			n    int
		}{
			{"Read4K", makeCommand(nvmeof.OpRead, 2, 0), 4 << 10},
			{"Write4K", makeCommand(nvmeof.OpWrite, 2, 0), 4 << 10},
			{"Store2M", makeCommand(nvmeof.OpStore, 1, 2<<20), 2 << 20},
			{"Retrieve2M", makeCommand(nvmeof.OpRetrieve, 1, 2<<20), 2 << 20},
			{"Exist", makeCommand(nvmeof.OpExist, 1, 0), 0},
		} {
			b.Run(fmt.Sprintf("%s/%s", bc.name, device), func(b *testing.B) {
				tg, _ := newTarget(b, 32<<20, cfg)
				c := &benchConn{done: make(chan nvmeof.Status, 1), data: bytes.Repeat([]byte{0x5A}, 1<<20)}
				q, admin := connectBench(b, tg, c)
				do := func(cmd nvmeof.Command, n int) {
					r := q.NewRequest()
					r.Cmd, r.Length = cmd, uint32(n)
					q.Execute(r)
					if st := <-c.done; st != nvmeof.Success {
						b.Fatal(st)
					}
				}
				do(makeCommand(nvmeof.OpStore, 1, 2<<20), 2<<20)
				for range 20 { // what is made at the first use
					do(bc.cmd, bc.n)
				}
				b.SetBytes(int64(bc.n))
				b.ReportAllocs()
				for b.Loop() {
					do(bc.cmd, bc.n)
				}
				b.StopTimer()
				q.Close()
				admin.Close()
			})
		}
	}
}

func makeCommand(op uint8, nsid uint32, size int) (c nvmeof.Command) {
	c.SetHeader(op, 1, nsid)
	if nsid == 1 {
		c.SetKey([]byte("key"))
		c.SetKV(uint32(size), 0)
	}
	return c
}

// connectBench connects an admin queue and an I/O queue.
func connectBench(b *testing.B, tg *target.Target, c *benchConn) (io, admin *target.Queue) {
	do := func(q *target.Queue, cmd nvmeof.Command, data []byte) {
		r := q.NewRequest()
		r.Cmd, r.Length, r.Inline = cmd, uint32(len(data)), data
		q.Execute(r)
		if st := <-c.done; st != nvmeof.Success {
			b.Fatal(st)
		}
	}
	d := nvmeof.ConnectData{CNTLID: nvmeof.CNTLIDDynamic, SubNQN: testNQN, HostNQN: "nqn.2014-08.org.nvmexpress:uuid:bench"}
	data := make([]byte, nvmeof.ConnectDataSize)
	d.Encode(data)
	admin, io = tg.NewQueue(c, &target.Port{}, netip.AddrPort{}), tg.NewQueue(c, &target.Port{}, netip.AddrPort{})
	do(admin, nvmeof.MakeConnect(1, 0, 31, 0, 0), data)
	do(admin, nvmeof.MakePropertySet(nvmeof.PropCC, 0x460061), nil)
	var f nvmeof.Command
	f.SetHeader(nvmeof.OpSetFeatures, 1, 0)
	f.SetDW(10, nvmeof.FeatQueues)
	do(admin, f, nil)
	d.CNTLID = admin.Controller().ID
	d.Encode(data)
	do(io, nvmeof.MakeConnect(1, 1, 127, 0, 0), data)
	return io, admin
}
