package tcp

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/target"
	"github.com/kvof/kvof/uring"
)

const (
	testNQN  = "nqn.2026-11.dev.kvof:test"
	hostNQN  = "nqn.2014-08.org.nvmexpress:uuid:host"
	patience = 30 * time.Second // for what must happen soon
)

// env is a target with a listener on loopback.
type env struct {
	testing.TB
	target *target.Target
	arena  *uring.Arena
	idle   uring.ArenaStats // before the first connection
	l      *Listener

	namespaces int
}

// serve starts a target with an arena of so many bytes. The test ends with nothing left: no goroutine, no controller,
// no buffer.
func serve(t testing.TB, arenaSize int, ns ...configs.Namespace) *env {
	t.Helper()
	if _, bench := t.(*testing.B); !bench { // they run one inside the other
		t.Cleanup(func() { goleak.VerifyNone(t) })
	}
	e := &env{TB: t, namespaces: len(ns)}
	var err error
	if e.arena, err = uring.NewArena(arenaSize); err != nil {
		t.Fatal(err)
	}
	e.target = target.New(e.arena, configs.Limits{Controllers: 1000, IOQueues: 64, QueueEntries: 128}, slog.New(slog.DiscardHandler))
	if err := e.target.Apply(&configs.Config{Subsystems: []configs.Subsystem{{NQN: testNQN, Serial: "1", AllowAnyHost: true, Namespaces: ns}}}); err != nil {
		t.Fatal(err)
	}
	e.idle = e.arena.Stats()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e.l = Listen(e.target, ln, false, slog.New(slog.DiscardHandler))
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := e.l.Close(ctx); err != nil {
			panic(err) // with all goroutines
		}
		e.quiet(0)
		if err := e.target.Close(); err != nil {
			t.Error(err)
		}
		if err := e.arena.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

// quiet waits until so many controllers are left and all buffers are back.
func (e *env) quiet(controllers int) {
	e.Helper()
	eventually(e, func() error {
		if n := len(e.target.Status().Controllers); n != controllers {
			return fmt.Errorf("%d controllers, not %d", n, controllers)
		}
		// A namespace keeps the buffer of its first Compare.
		if s := e.arena.Stats(); s.Small.Used != e.idle.Small.Used || s.Large.Used != e.idle.Large.Used || s.Medium.Used > e.idle.Medium.Used+e.namespaces {
			return fmt.Errorf("arena: %+v in use, %+v at the start", s, e.idle)
		}
		return nil
	})
}

func eventually(t testing.TB, check func() error) {
	t.Helper()
	err := check()
	for end := time.Now().Add(patience); err != nil && time.Now().Before(end); err = check() {
		time.Sleep(time.Millisecond)
	}
	if err != nil {
		t.Error(err)
	}
}

// kv and block are namespaces.
func kv(nsid uint32, device configs.DeviceKind, dir string, size configs.Size) configs.Namespace {
	return configs.Namespace{NSID: nsid, Type: configs.KeyValue, Device: device, Path: fmt.Sprintf("%s/kv%d", dir, nsid), Size: size, MaxValue: configs.MaxValue}
}

func block(nsid uint32, device configs.DeviceKind, dir string, size configs.Size) configs.Namespace {
	return configs.Namespace{NSID: nsid, Type: configs.Block, Device: device, Path: fmt.Sprintf("%s/block%d", dir, nsid), Size: size, LBASize: 4096}
}

// host is one connection of a host that does everything by hand.
type host struct {
	t    testing.TB
	nc   net.Conn
	dg   nvmeof.Digests
	c2h  int // alignment in bytes that it asked for
	h2c  int // alignment in bytes of what it sends
	cid  uint16
	head [256]byte
	out  []byte
	in   []byte // what recv reads data into; grows
}

// pdu is one PDU from the target.
type pduIn struct {
	nvmeof.PDU
	cqe  nvmeof.Completion
	data []byte // valid until the next recv
	term []byte // the header in a termination request
}

// dial connects and sets the connection up.
func (e *env) dial(dg nvmeof.Digests, hpda uint8) *host {
	e.Helper()
	h := e.open()
	h.write(icreq(dg, hpda))
	b := h.read(nvmeof.ICSize)
	if b[0] != nvmeof.PDUICResp {
		e.Fatalf("ICResp: % x", b)
	}
	p, te := nvmeof.DecodePDU(b, nvmeof.Digests{})
	if te != nil {
		e.Fatal(te)
	}
	ic, te := nvmeof.DecodeIC(&p)
	if te != nil || ic.PFV != 0 || ic.PDA != 0 || ic.Digest != dg || ic.Max < 4096 || ic.Max%4 != 0 {
		e.Fatalf("ICResp: %+v, %v", ic, te)
	}
	h.dg, h.c2h = dg, (int(hpda)+1)*4
	return h
}

// open connects without a word.
func (e *env) open() *host {
	e.Helper()
	nc, err := net.Dial(e.l.Addr().Network(), e.l.Addr().String())
	if err != nil {
		e.Fatal(err)
	}
	e.Cleanup(func() { nc.Close() })
	return &host{t: e.TB, nc: nc, h2c: 4}
}

func icreq(dg nvmeof.Digests, hpda uint8) []byte {
	b := make([]byte, nvmeof.ICSize)
	nvmeof.EncodeIC(b, nvmeof.PDUICReq, nvmeof.IC{PDA: hpda, Digest: dg})
	return b
}

func (h *host) write(b []byte) {
	h.t.Helper()
	if _, err := h.nc.Write(b); err != nil {
		h.t.Fatal(err)
	}
}

// read returns the next n bytes, in a buffer that is used again.
func (h *host) read(n int) []byte {
	h.t.Helper()
	if err := h.fill(h.head[:n]); err != nil {
		h.t.Fatal(err)
	}
	return h.head[:n]
}

func (h *host) fill(b []byte) error {
	_ = h.nc.SetReadDeadline(time.Now().Add(patience))
	_, err := io.ReadFull(h.nc, b)
	return err
}

// recv reads and checks one PDU; io.EOF at the end of the connection.
func (h *host) recv() (p pduIn, err error) {
	if err := h.fill(h.head[:8]); err != nil {
		return p, err
	}
	t := h.head[0]
	if t != nvmeof.PDUC2HData && t != nvmeof.PDUCapsuleResp && t != nvmeof.PDUR2T && t != nvmeof.PDUC2HTermReq {
		return p, fmt.Errorf("PDU type %02Xh from the target", t)
	}
	n, te := nvmeof.HeaderSize(h.head[:8], false, h.dg)
	if te != nil {
		return p, te
	}
	if err := h.fill(h.head[8:n]); err != nil {
		return p, err
	}
	if p.PDU, te = nvmeof.DecodePDU(h.head[:n], h.dg); te != nil {
		return p, te
	}
	switch t {
	case nvmeof.PDUCapsuleResp:
		p.cqe = nvmeof.Completion(p.Raw[8:])
	case nvmeof.PDUC2HTermReq:
		p.term = make([]byte, int(p.PLEN)-n)
		return p, h.fill(p.term)
	case nvmeof.PDUC2HData:
		if int(p.PDO)%h.c2h != 0 || p.Pad() >= h.c2h {
			return p, fmt.Errorf("PDO %d with an alignment of %d", p.PDO, h.c2h)
		}
		if err := h.fill(h.head[n:][:p.Pad()]); err != nil {
			return p, err
		}
		if cap(h.in) < int(p.DataLen()) {
			h.in = make([]byte, p.DataLen())
		}
		p.data = h.in[:p.DataLen()]
		if err := h.fill(p.data); err != nil {
			return p, err
		}
		if h.dg.Data {
			if err := h.fill(h.head[n:][:4]); err != nil {
				return p, err
			}
			if got, want := binary.LittleEndian.Uint32(h.head[n:]), nvmeof.Digest(0, p.data); got != want {
				return p, fmt.Errorf("data digest %08x, not %08x", got, want)
			}
		}
	}
	return p, nil
}

// next is recv for what must come.
func (h *host) next(t uint8) *pduIn {
	h.t.Helper()
	p, err := h.recv()
	if err != nil {
		h.t.Fatal(err)
	}
	if p.Type != t {
		h.t.Fatalf("PDU type %02Xh, not %02Xh: %+v", p.Type, t, p.PDU)
	}
	return &p
}

// capsule makes a command capsule; data, if any, lies in it.
func (h *host) capsule(cmd *nvmeof.Command, data []byte) []byte {
	n := nvmeof.EncodeCapsule(h.head[:], cmd, len(data), h.h2c, h.dg)
	return h.tail(append(h.out[:0], h.head[:n]...), data)
}

// h2cData makes an H2CData PDU of data[off:off+n].
func (h *host) h2cData(cid, ttag uint16, data []byte, off, n int) []byte {
	flags := uint8(0)
	if off+n == len(data) {
		flags = nvmeof.FlagLast
	}
	k := nvmeof.EncodeData(h.head[:], nvmeof.PDUH2CData, flags, cid, ttag, uint32(off), n, h.h2c, h.dg)
	return h.tail(append(h.out[:0], h.head[:k]...), data[off:off+n])
}

func (h *host) tail(b, data []byte) []byte {
	b = append(b, data...)
	if h.dg.Data && len(data) > 0 {
		b = binary.LittleEndian.AppendUint32(b, nvmeof.Digest(0, data))
	}
	h.out = b
	return b
}

// reply is how a command ended, and its data.
type reply struct {
	nvmeof.Completion
	data []byte
}

// do runs a command that moves data, in the capsule if inline, or has room for so many bytes. It sends H2CData in
// pieces of odd sizes.
func (h *host) do(cmd nvmeof.Command, data []byte, inline bool, room int) *reply {
	h.t.Helper()
	h.cid++
	cmd.SetCID(h.cid)
	var capsule []byte
	switch {
	case inline && len(data) > 0:
		cmd.SetSGL(nvmeof.MakeSGL(nvmeof.SGLOffset, 0, uint32(len(data))))
		capsule = data
	case len(data)+room > 0:
		cmd.SetSGL(nvmeof.MakeSGL(nvmeof.SGLTransport, 0, uint32(len(data)+room)))
	}
	h.write(h.capsule(&cmd, capsule))
	r := new(reply)
	for {
		p, err := h.recv()
		if err != nil {
			h.t.Fatal(err)
		}
		switch p.Type {
		case nvmeof.PDUR2T:
			if p.CCCID() != h.cid || p.DATAO() != 0 || int(p.DATAL()) > len(data) || inline {
				h.t.Fatalf("R2T for %d bytes at %d", p.DATAL(), p.DATAO())
			}
			h.sendAll(p.CCCID(), p.TTAG(), data[:p.DATAL()])
		case nvmeof.PDUC2HData:
			if p.CCCID() != h.cid || int(p.DATAO()) != len(r.data) || len(r.data)+len(p.data) > room || p.Flags&nvmeof.FlagSuccess != 0 {
				h.t.Fatalf("C2HData of %d bytes at %d, %d have come, flags %x", len(p.data), p.DATAO(), len(r.data), p.Flags)
			}
			r.data = append(r.data, p.data...)
		case nvmeof.PDUCapsuleResp:
			if p.cqe.CID() != h.cid {
				h.t.Fatalf("completion of %d, not %d", p.cqe.CID(), h.cid)
			}
			r.Completion = p.cqe
			return r
		default:
			t := p.Term()
			h.t.Fatalf("%v: % x", &t, p.term)
		}
	}
}

// sendAll sends data as H2CData PDUs of 1, 4, 13, 40 and so on bytes, up to the most that is allowed.
func (h *host) sendAll(cid, ttag uint16, data []byte) {
	h.t.Helper()
	for off, n := 0, 1; off < len(data); n = min(3*n+1, maxH2CData) {
		n = min(n, len(data)-off)
		h.write(h.h2cData(cid, ttag, data, off, n))
		off += n
	}
}

// connect connects a queue and returns the CNTLID.
func (h *host) connect(cntlid, qid, sqsize uint16, kato uint32) uint16 {
	h.t.Helper()
	c := h.tryConnect(cntlid, qid, sqsize, kato)
	if st := c.Status(); st != nvmeof.Success {
		h.t.Fatal(st)
	}
	return uint16(c.DW0())
}

func (h *host) tryConnect(cntlid, qid, sqsize uint16, kato uint32) *nvmeof.Completion {
	h.t.Helper()
	return &h.do(nvmeof.MakeConnect(0, qid, sqsize, 0, kato), connectData(cntlid), true, 0).Completion
}

func connectData(cntlid uint16) []byte {
	d := nvmeof.ConnectData{CNTLID: cntlid, SubNQN: testNQN, HostNQN: hostNQN}
	b := make([]byte, nvmeof.ConnectDataSize)
	d.Encode(b)
	return b
}

// admin connects and enables a controller with as many I/O queues as there are.
func (e *env) admin(dg nvmeof.Digests, kato uint32) (h *host, cntlid uint16) {
	e.Helper()
	h = e.dial(dg, 0)
	cntlid = h.connect(nvmeof.CNTLIDDynamic, 0, 31, kato)
	h.do(nvmeof.MakePropertySet(nvmeof.PropCC, 0x460061), nil, false, 0)
	var c nvmeof.Command
	c.SetHeader(nvmeof.OpSetFeatures, 0, 0)
	c.SetDW(10, nvmeof.FeatQueues)
	c.SetDW(11, 63<<16|63)
	if st := h.do(c, nil, false, 0).Status(); st != nvmeof.Success {
		e.Fatal(st)
	}
	return h, cntlid
}

// io connects an I/O queue of 128 entries.
func (e *env) io(cntlid, qid uint16, dg nvmeof.Digests, hpda uint8) *host {
	e.Helper()
	h := e.dial(dg, hpda)
	h.connect(cntlid, qid, 127, 0)
	return h
}

// kvCommand makes a Key Value command for namespace nsid.
func kvCommand(op uint8, nsid uint32, key string, size int) (c nvmeof.Command) {
	c.SetHeader(op, 0, nsid)
	c.SetKey([]byte(key))
	c.SetKV(uint32(size), 0)
	return c
}

// blockCommand makes an NVM command for blocks of namespace nsid.
func blockCommand(op uint8, nsid uint32, slba uint64, blocks int) (c nvmeof.Command) {
	c.SetHeader(op, 0, nsid)
	c.SetDW(10, uint32(slba))
	c.SetDW(11, uint32(slba>>32))
	c.SetDW(12, uint32(blocks-1))
	return c
}

// store and retrieve move a value and fail the test if they do not.
func (h *host) store(nsid uint32, key string, v []byte, inline bool) {
	h.t.Helper()
	if r := h.do(kvCommand(nvmeof.OpStore, nsid, key, len(v)), v, inline, 0); r.Status() != nvmeof.Success || r.DW0() != 0 || r.DW1() != 0 {
		h.t.Fatalf("store of %d bytes: %v", len(v), r.Status())
	}
}

func (h *host) retrieve(nsid uint32, key string, want []byte) {
	h.t.Helper()
	r := h.do(kvCommand(nvmeof.OpRetrieve, nsid, key, len(want)), nil, false, len(want))
	if r.Status() != nvmeof.Success || int(r.DW0()) != len(want) || r.DW1() != 0 || !bytes.Equal(r.data, want) {
		h.t.Fatalf("retrieve: %v, DW0 %d, %d of %d bytes, equal: %v", r.Status(), r.DW0(), len(r.data), len(want), bytes.Equal(r.data, want))
	}
}

// pattern is n bytes that differ by seed and nearly everywhere.
func pattern(seed uint64, n int) []byte {
	b := make([]byte, (n+7)&^7)
	x := seed*0x9E3779B97F4A7C15 + 1
	for i := 0; i < len(b); i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(b[i:], x)
	}
	return b[:n]
}

// ended waits until the target has closed the connection, whatever it still sends.
func (h *host) ended() {
	h.t.Helper()
	_ = h.nc.SetReadDeadline(time.Now().Add(patience))
	if _, err := io.Copy(io.Discard, h.nc); err != nil {
		if ne, ok := err.(net.Error); ok && ne.Timeout() {
			h.t.Error("the target does not close the connection")
		}
	}
}
