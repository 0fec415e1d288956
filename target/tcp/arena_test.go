package tcp

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/nvmeof"
)

// Many commands on many connections share the smallest arena while their hosts send their data in any order.
func TestSmallArena(t *testing.T) {
	const conns, depth, rounds = 8, 16, 4
	dir := t.TempDir()
	e := serve(t, 16<<20, kv(1, configs.DeviceFile, dir, 512<<20), block(2, configs.DeviceFile, dir, 256<<20))
	_, id := e.admin(noDigests, 0)
	var wg sync.WaitGroup
	for i := range conns {
		h := e.io(id, uint16(i+1), noDigests, 0)
		wg.Go(func() {
			for round := range rounds {
				h.interleave(i, depth, round)
			}
		})
	}
	wg.Wait()
}

// Stores to a device so small that its extents end within a large buffer hold no more of these than they were promised: each has
// one before any asks for its second.
func TestSmallExtents(t *testing.T) {
	const n, first = 800_000, 200_000
	e := serve(t, 16<<20, kv(1, configs.DeviceFile, t.TempDir(), 16<<20)) // extents of 512 KiB
	_, id := e.admin(noDigests, 0)
	var wg sync.WaitGroup
	for i := range 16 {
		h := e.io(id, uint16(i+1), noDigests, 0)
		wg.Go(func() {
			v := pattern(uint64(i), n)
			cmd := kvCommand(nvmeof.OpStore, 1, fmt.Sprint(i), n)
			cmd.SetSGL(nvmeof.MakeSGL(nvmeof.SGLTransport, 0, n))
			h.write(h.capsule(&cmd, nil))
			tag := h.next(nvmeof.PDUR2T).TTAG()
			for off := 0; off < n; off += first {
				h.write(h.h2cData(0, tag, v, off, first))
				if off == 0 {
					time.Sleep(100 * time.Millisecond)
				}
			}
			if st := h.next(nvmeof.PDUCapsuleResp).cqe.Status(); st != nvmeof.Success {
				t.Error(st)
			}
		})
	}
	wg.Wait()
}

// interleave runs so many writes and stores at once, and sends pieces of their data in random order.
func (h *host) interleave(conn, depth, round int) {
	type transfer struct {
		cid, ttag uint16
		data      []byte
		off       int
	}
	rnd := rand.New(rand.NewPCG(uint64(conn), uint64(round)))
	data := map[uint16][]byte{}
	for i := range depth {
		n := (1 + rnd.IntN(200)) * 4096
		v := pattern(uint64(conn*1000+i), n)
		cmd := blockCommand(nvmeof.OpWrite, 2, uint64(conn*depth+i)*256, n/4096)
		if i%2 == 1 {
			cmd = kvCommand(nvmeof.OpStore, 1, fmt.Sprint(conn, " ", i), n)
		}
		cid := uint16(i + 1)
		cmd.SetCID(cid)
		cmd.SetSGL(nvmeof.MakeSGL(nvmeof.SGLTransport, 0, uint32(n)))
		data[cid] = v
		h.write(h.capsule(&cmd, nil))
	}
	in := make(chan pduIn)
	go func() { // takes what comes, whatever the other half is at
		defer close(in)
		for done := 0; done < depth; {
			p, err := h.recv()
			if err != nil {
				h.t.Error(err)
				return
			}
			if p.Type == nvmeof.PDUCapsuleResp {
				done++
			}
			p.Raw = bytes.Clone(p.Raw)
			in <- p
		}
	}()
	var ready []*transfer
	take := func(p pduIn) {
		if p.Type == nvmeof.PDUR2T {
			ready = append(ready, &transfer{cid: p.CCCID(), ttag: p.TTAG(), data: data[p.CCCID()]})
		} else if st := p.cqe.Status(); st != nvmeof.Success {
			h.t.Error(st)
		}
	}
	out := &host{t: h.t, nc: h.nc, h2c: 4} // with buffers of its own
	for {
		if len(ready) == 0 {
			p, ok := <-in
			if !ok {
				return
			}
			take(p)
			continue
		}
		select {
		case p, ok := <-in:
			if !ok {
				return
			}
			take(p)
		default:
		}
		i := rnd.IntN(len(ready))
		x := ready[i]
		n := min(1+rnd.IntN(100000), len(x.data)-x.off)
		if _, err := h.nc.Write(out.h2cData(x.cid, x.ttag, x.data, x.off, n)); err != nil {
			h.t.Error(err)
			return
		}
		if x.off += n; x.off == len(x.data) {
			ready = append(ready[:i], ready[i+1:]...)
		}
	}
}
