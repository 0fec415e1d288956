package host

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/kvof/kvof/nvmeof"
)

// FuzzReceive gives a queue with commands in flight whatever bytes a target may send. Every command must return, with
// an error unless the bytes completed it, and guard bytes around the buffers must stay.
func FuzzReceive(f *testing.F) {
	const size = 300
	c2h := func(dg nvmeof.Digests, cid uint16, off uint32, n int, flags uint8) []byte {
		h := make([]byte, 200)
		h = h[:nvmeof.EncodeData(h, nvmeof.PDUC2HData, flags, cid, 0, off, n, 4, dg)]
		b := make([]byte, n)
		h = append(h, b...)
		if dg.Data {
			h = binary.LittleEndian.AppendUint32(h, nvmeof.Digest(0, b))
		}
		return h
	}
	reply := func(dg nvmeof.Digests, cid uint16, st nvmeof.Status) []byte {
		b := make([]byte, 32)
		cqe := nvmeof.MakeCompletion(size, 0, 0, 1, cid, st)
		return b[:nvmeof.EncodeResponse(b, &cqe, dg)]
	}
	r2t := func(dg nvmeof.Digests, cid uint16, off, n uint32) []byte {
		b := make([]byte, 32)
		return b[:nvmeof.EncodeR2T(b, cid, 3, off, n, dg)]
	}
	// Slot 0 holds a Retrieve, slot 1 a Store of two H2CData PDUs, slot 2 an Exist.
	for i, dg := range []nvmeof.Digests{{}, {Header: true}, {Data: true}, {Header: true, Data: true}} {
		f.Add(uint8(i), append(c2h(dg, 0, 0, size, nvmeof.FlagLast), reply(dg, 0, 0)...))
		f.Add(uint8(i), append(c2h(dg, 0, 0, 100, 0), c2h(dg, 0, 100, 200, nvmeof.FlagLast|nvmeof.FlagSuccess)...))
		f.Add(uint8(i), append(r2t(dg, 1, 0, 5000), reply(dg, 1, 0)...))
		f.Add(uint8(i), append(r2t(dg, 1, 0, 100), r2t(dg, 1, 100, 4900)...))
		f.Add(uint8(i), append(reply(dg, 2, nvmeof.KeyDoesNotExist), reply(dg, 2, 0)...))
		f.Add(uint8(i), nvmeof.AppendTerm(nil, nvmeof.PDUC2HTermReq, &nvmeof.TermError{FES: 1}, make([]byte, 24)))
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { l.Close() })
	f.Fuzz(func(t *testing.T, mode uint8, b []byte) {
		conn, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Skip(err)
		}
		peer, err := l.Accept()
		if err != nil {
			t.Skip(err)
		}
		q := &tcpQueue{id: 1, conn: conn.(*net.TCPConn), dg: nvmeof.Digests{Header: mode&1 != 0, Data: mode&2 != 0}, align: 4, maxData: 4096}
		if err := q.start(4); err != nil {
			t.Fatal(err)
		}
		mem := make([]byte, size+16)
		for i := range mem {
			mem[i] = 0xA5
		}
		var wg sync.WaitGroup
		for i, c := range []struct {
			op  uint8
			buf []byte
		}{{nvmeof.OpRetrieve, mem[8 : 8+size : 8+size]}, {nvmeof.OpStore, make([]byte, 5000)}, {nvmeof.OpExist, nil}} {
			s, err := q.acquire(context.Background())
			if err != nil || int(s.index) != i {
				t.Fatal(s.index, err)
			}
			var cmd nvmeof.Command
			cmd.SetHeader(c.op, 0, 1)
			s.data.set(data{buf: c.buf})
			q.prepare(s, &cmd)
			if err := q.enqueue(s); err != nil {
				t.Fatal(err)
			}
			wg.Go(func() { _, _, _ = q.await(context.Background(), s) })
		}
		// The commands are out before the answers come.
		if _, err := io.ReadFull(peer, make([]byte, 3*(nvmeof.CapsuleCmdSize+int(mode&1)*nvmeof.DigestSize))); err != nil {
			t.Fatal(err)
		}
		wg.Go(func() { io.Copy(io.Discard, peer) })
		peer.Write(b)
		peer.(*net.TCPConn).CloseWrite()
		q.wg.Wait()
		peer.Close()
		wg.Wait()
		for i, v := range mem {
			if (i < 8 || i >= 8+size) && v != 0xA5 {
				t.Fatalf("byte %d beside the buffer was written", i-8)
			}
		}
		if !errors.Is(q.err, ErrConnectionLost) {
			t.Fatal(q.err)
		}
		if len(q.free) != len(q.slots) || q.inflight != 0 {
			t.Fatalf("%d of %d slots are free, %d in flight", len(q.free), len(q.slots), q.inflight)
		}
	})
}
