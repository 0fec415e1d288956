package rdma

import (
	"errors"
	"testing"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/rdma/rdmatest"
)

// keep keeps what a test would clean up for the tests after it.
type keep struct {
	testing.TB
	cleanups []func()
}

func (k *keep) Cleanup(f func()) { k.cleanups = append(k.cleanups, f) }

func (k *keep) end() {
	for _, f := range k.cleanups {
		f()
	}
}

// FuzzCapsule sends whatever capsule to a real queue pair state machine, again and again on the same target: every command
// gets its one response, or the connection ends. Neither the target nor its other connections notice.
func FuzzCapsule(f *testing.F) {
	e := serve(f, rdmatest.DefaultCaps(), block(1, configs.DeviceMemory, "", 4<<20), kv(2, configs.DeviceMemory, "", 64<<20),
		block(3, configs.DeviceFile, f.TempDir(), 4<<20))
	_, cntlid := e.admin()
	io := e.io(cntlid, 1, 64<<10)

	seed := func(c nvmeof.Command, data []byte) { f.Add(c[:], data) }
	own := func(off, n uint32) nvmeof.SGL { return nvmeof.MakeKeyedSGL(nvmeof.SGLKeyed, uint64(off), n, 0) }
	rw := func(op uint8, nsid uint32, blocks int) nvmeof.Command {
		c := io.rw(op, nsid, 0, blocks, 0)
		c.SetSGL(own(0, uint32(blocks)*4096))
		return c
	}
	seed(rw(nvmeof.OpRead, 1, 1), nil)
	seed(rw(nvmeof.OpWrite, 3, 2), nil)
	c := rw(nvmeof.OpWrite, 3, 1)
	c.SetSGL(nvmeof.MakeSGL(nvmeof.SGLOffset, 0, 4096))
	seed(c, make([]byte, 4096))
	c = rw(nvmeof.OpRead, 1, 8)
	c.SetSGL(nvmeof.MakeSGL(nvmeof.SGLLastSegment, 0, 32))
	seed(c, list(own(0, 4096), own(8192, 28672)))
	c = nvmeof.Command{}
	c.SetHeader(nvmeof.OpStore, 0, 2)
	c.SetKey([]byte("key"))
	c.SetKV(100, 0)
	c.SetSGL(own(0, 100))
	seed(c, nil)
	c[0] = nvmeof.OpRetrieve
	seed(c, nil)
	seed(nvmeof.MakeConnect(0, 1, 31, 0, 0), nil)
	f.Add([]byte("short"), []byte(nil))

	var old keep
	f.Fuzz(func(t *testing.T, cmd, data []byte) {
		cmd, data = cmd[:min(len(cmd), nvmeof.CommandSize)], data[:min(len(data), inCapsule)]
		io.t = t
		b := io.mem[:hostCap]
		n := copy(b, cmd)
		if n == nvmeof.CommandSize {
			n += copy(b[n:], data)
		}
		// Keyed descriptors with key 0 are for the host's own memory: else every one would end the connection.
		for at := 24; at+nvmeof.SGLSize <= n; {
			if s := nvmeof.SGL(b[at:]); s.ID()&0xF0 == nvmeof.SGLKeyed && s.Key() == 0 {
				k := io.keyed(int(s.Address()%(32<<10)), int(s.KeyedLength()%(32<<10)))
				k[15] = s.ID()
				copy(b[at:], k[:])
			}
			if at += nvmeof.SGLSize; at < nvmeof.CommandSize {
				at = nvmeof.CommandSize
			}
		}
		io.cid++
		io.post(b[:n])
		_, err := io.recv()
		switch {
		case errors.Is(err, errEnded):
			e.TB = &keep{TB: t}
			for err = nvmeof.CommandSequenceError; err != nil; { // until the target has seen the end too
				old.end()
				old = keep{TB: t}
				e.TB = &old
				if io, err = e.dial(request(1, hostDepth), 64<<10); err != nil {
					t.Fatal(err)
				}
				if cqe := io.connect(1, hostDepth, cntlid, testNQN); cqe.Status() != nvmeof.Success {
					err = cqe.Status()
				}
			}
		case n < nvmeof.CommandSize:
			t.Errorf("a capsule of %d bytes is answered", n)
		}
	})
}
