package tcp

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/nvmeof"
)

// FuzzConnection feeds arbitrary bytes to a live connection. Whatever they are, the connection ends when its host leaves,
// everything comes back, and another host's connection works on.
func FuzzConnection(f *testing.F) {
	for _, dg := range allDigests {
		h := &host{dg: dg, h2c: 4}
		var b []byte
		add := func(cmd nvmeof.Command, data []byte, room int) {
			switch {
			case len(data) > 0:
				cmd.SetSGL(nvmeof.MakeSGL(nvmeof.SGLOffset, 0, uint32(len(data))))
			case room > 0:
				cmd.SetSGL(nvmeof.MakeSGL(nvmeof.SGLTransport, 0, uint32(room)))
			}
			b = append(b, h.capsule(&cmd, data)...)
		}
		feature := func(op, fid uint8, v uint32) (c nvmeof.Command) {
			c.SetHeader(op, 0, 0)
			c.SetDW(10, uint32(fid))
			c.SetDW(11, v)
			return c
		}
		var aer nvmeof.Command
		aer.SetHeader(nvmeof.OpAsyncEvent, 0, 0)
		bringup := func(cc ...uint32) {
			b = append(b[:0], icreq(dg, 0)...)
			add(nvmeof.MakeConnect(0, 0, 31, nvmeof.CATTRNoFlowControl, 10000), connectData(nvmeof.CNTLIDDynamic), 0)
			for _, v := range cc {
				add(nvmeof.MakePropertyGet(nvmeof.PropVS, 4), nil, 0)
				add(nvmeof.MakePropertyGet(nvmeof.PropCAP, 8), nil, 0)
				add(nvmeof.MakePropertySet(nvmeof.PropCC, v), nil, 0)
				add(nvmeof.MakePropertyGet(nvmeof.PropCSTS, 4), nil, 0)
			}
			add(nvmeof.MakeIdentify(nvmeof.CNSController, 0, 0), nil, 4096)
		}
		bringup(0x460061) // SPDK
		add(feature(nvmeof.OpSetFeatures, nvmeof.FeatAsyncEvent, 0x100), nil, 0)
		for range 4 {
			add(aer, nil, 0)
		}
		add(feature(nvmeof.OpGetFeatures, nvmeof.FeatKATO, 0), nil, 0)
		add(feature(nvmeof.OpSetFeatures, nvmeof.FeatQueues, 0x10001), nil, 0)
		for _, cns := range []uint8{6, 2, 0, 3, 5} {
			add(nvmeof.MakeIdentify(cns, 1, nvmeof.CSIKV), nil, 4096)
		}
		f.Add(bytes.Clone(b), uint16(0))
		bringup(0x460060, 0x460061) // Linux
		add(nvmeof.MakeGetLogPage(nvmeof.LogEffects, 0, 4096, 0, 0, false), nil, 4096)
		add(nvmeof.MakeGetLogPage(nvmeof.LogEffects, 0, 4096, 0, 1, false), nil, 4096)
		add(feature(nvmeof.OpSetFeatures, nvmeof.FeatQueues, 0x30003), nil, 0)
		add(nvmeof.MakeIdentify(nvmeof.CNSNamespaceCommon, 1, 0), nil, 4096)
		add(nvmeof.MakePropertySet(nvmeof.PropCC, 0x464061), nil, 0)
		f.Add(bytes.Clone(b), uint16(0))

		// An I/O queue: the connection is set up and connected by the test, so only the rest is here.
		b = b[:0]
		add(kvCommand(nvmeof.OpStore, 1, "key", 100), pattern(1, 100), 0)
		add(kvCommand(nvmeof.OpStore, 1, "key", 10000), nil, 10000)
		for tag := range uint16(3) {
			b = append(b, h.h2cData(0, tag, pattern(1, 10000), 0, 4096)...)
		}
		add(kvCommand(nvmeof.OpRetrieve, 1, "key", 10000), nil, 10000)
		add(kvCommand(nvmeof.OpExist, 1, "key", 0), nil, 0)
		add(kvCommand(nvmeof.OpList, 1, "key", 4096), nil, 4096)
		add(kvCommand(nvmeof.OpDelete, 1, "key", 0), nil, 0)
		add(blockCommand(nvmeof.OpWrite, 2, 0, 1), pattern(1, 4096), 0)
		add(blockCommand(nvmeof.OpRead, 2, 0, 2), nil, 8192)
		add(blockCommand(nvmeof.OpDSM, 2, 0, 1), make([]byte, 16), 0)
		mode := uint16(1)
		if dg.Header {
			mode |= 2
		}
		if dg.Data {
			mode |= 4
		}
		f.Add(bytes.Clone(b), mode)
		f.Add(nvmeof.AppendTerm(nil, nvmeof.PDUH2CTermReq, &nvmeof.TermError{FES: 1}, b[:24]), mode)
	}

	e := serve(f, 16<<20, kv(1, configs.DeviceMemory, "", 64<<20), block(2, configs.DeviceMemory, "", 1<<20))
	_, id := e.admin(noDigests, 0)
	bystander := e.io(id, 64, noDigests, 0)
	value := pattern(1, 20000)
	bystander.store(1, "bystander", value, false)
	quiet := func(t *testing.T) {
		for end := time.Now().Add(patience); ; time.Sleep(100 * time.Microsecond) {
			e.l.mu.Lock()
			n := len(e.l.conns)
			e.l.mu.Unlock()
			s := e.arena.Stats()
			if n == 2 && s.Small.Used == e.idle.Small.Used && s.Large.Used == e.idle.Large.Used && s.Medium.Used <= e.idle.Medium.Used+e.namespaces {
				return
			}
			if time.Now().After(end) {
				panic(fmt.Sprintf("%d connections, arena %+v", n, s))
			}
		}
	}
	// Bit 0 of mode: on a connected I/O queue, whose digests are bits 1 and 2; else from the first byte on. The bytes go
	// in pieces of mode>>3, 0 for all at once.
	f.Fuzz(func(t *testing.T, b []byte, mode uint16) {
		e := &env{TB: t, target: e.target, l: e.l}
		bystander.t = t
		var h *host
		if mode&1 == 0 {
			h = e.open()
		} else {
			h = e.dial(nvmeof.Digests{Header: mode&2 != 0, Data: mode&4 != 0}, 0)
			h.connect(id, 1, 31, 0)
		}
		go func() { // takes whatever comes
			var sink [64 << 10]byte
			for {
				if _, err := h.nc.Read(sink[:]); err != nil {
					return
				}
			}
		}()
		_ = h.nc.SetDeadline(time.Now().Add(patience))
		piece := int(mode >> 3)
		if piece == 0 || len(b)/piece > 200 {
			piece = len(b)
		}
		for len(b) > 0 {
			n := min(piece, len(b))
			if _, err := h.nc.Write(b[:n]); err != nil {
				break
			}
			b = b[n:]
		}
		h.nc.Close()
		quiet(t)
		bystander.retrieve(1, "bystander", value)
	})
}

// A listener on a Unix socket works too: anything that is a socket does.
func TestUnixSocket(t *testing.T) {
	e := serve(t, 16<<20, kv(1, configs.DeviceMemory, "", 64<<20))
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "socket"))
	if err != nil {
		t.Fatal(err)
	}
	tcp := e.l
	e.l = Listen(e.target, ln, false, slog.New(slog.DiscardHandler))
	_, id := e.admin(noDigests, 0)
	h := e.io(id, 1, noDigests, 0)
	h.store(1, "key", pattern(1, 3<<20), false)
	h.retrieve(1, "key", pattern(1, 3<<20))
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := tcp.Close(ctx); err != nil {
		t.Error(err)
	}
}
