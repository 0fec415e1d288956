package tcp

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/nvmeof"
)

var le = binary.LittleEndian

// patch changes bytes of a PDU.
func patch(b []byte, at int, v ...byte) []byte {
	b = bytes.Clone(b)
	copy(b[at:], v)
	return b
}

// Every PDU that breaks the protocol gets a termination request that names the error, and only its own connection ends.
func TestMalformed(t *testing.T) {
	both := nvmeof.Digests{Header: true, Data: true}
	hdr := func(typ, flags, hlen, pdo uint8, plen uint32) []byte {
		return le.AppendUint32([]byte{typ, flags, hlen, pdo}, plen)
	}
	padded := func(b []byte, n int) []byte { return append(b, make([]byte, n)...) }
	e := serve(t, 16<<20, kv(1, configs.DeviceMemory, "", 128<<20))
	_, id := e.admin(noDigests, 0)
	bystander := e.io(id, 63, noDigests, 0)
	value := pattern(1, 100000)
	bystander.store(1, "value", value, false)

	flush := kvCommand(nvmeof.OpFlush, 1, "", 0)
	small := kvCommand(nvmeof.OpStore, 1, "small", 8)
	small.SetSGL(nvmeof.MakeSGL(nvmeof.SGLOffset, 0, 8))
	for _, c := range []struct {
		name  string
		dg    nvmeof.Digests
		setup bool // instead of the ICReq; else on a connected I/O queue
		pull  bool // after an R2T for 10000 bytes; its tag goes into byte 10, the command's into byte 8
		pdu   func(h *host) []byte
		fes   uint16 // 0: no termination request
		fei   uint32
	}{
		{name: "the first PDU is a capsule", setup: true, fes: 2, pdu: func(h *host) []byte { return h.capsule(&flush, nil) }},
		{name: "format version", setup: true, fes: 6, fei: 8, pdu: func(h *host) []byte { return patch(icreq(noDigests, 0), 8, 1) }},
		{name: "HPDA", setup: true, fes: 1, fei: 10, pdu: func(h *host) []byte { return icreq(noDigests, 32) }},
		{name: "HLEN of an ICReq", setup: true, fes: 1, fei: 2, pdu: func(h *host) []byte { return patch(icreq(noDigests, 0), 2, 127) }},
		{name: "PLEN of an ICReq", setup: true, fes: 1, fei: 4, pdu: func(h *host) []byte { return patch(icreq(noDigests, 0), 4, 129) }},
		{name: "garbage", setup: true, fes: 2, pdu: func(h *host) []byte { return []byte("GET / HTTP/1.1\r\n\r\n") }},

		{name: "unknown type", fes: 1, fei: 0, pdu: func(h *host) []byte { return hdr(0x0A, 0, 8, 0, 8) }},
		{name: "type 08h", fes: 1, fei: 0, pdu: func(h *host) []byte { return hdr(0x08, 0, 24, 0, 24) }},
		{name: "the target's type", fes: 1, fei: 0, pdu: func(h *host) []byte { return padded(hdr(nvmeof.PDUCapsuleResp, 0, 24, 0, 24), 16) }},
		{name: "a second ICReq", fes: 2, pdu: func(h *host) []byte { return icreq(noDigests, 0) }},
		{name: "HLEN of a capsule", fes: 1, fei: 2, pdu: func(h *host) []byte { return padded(hdr(nvmeof.PDUCapsuleCmd, 0, 64, 0, 72), 64) }},
		{name: "PLEN too small", fes: 1, fei: 3, pdu: func(h *host) []byte { return patch(h.capsule(&flush, nil), 4, 71) }},
		{name: "PDO inside the header", fes: 1, fei: 3, pdu: func(h *host) []byte { return patch(h.capsule(&small, make([]byte, 8)), 3, 68) }},
		{name: "PDO not aligned", fes: 1, fei: 3, pdu: func(h *host) []byte { return patch(h.capsule(&small, make([]byte, 8)), 3, 74) }},
		{name: "PDO at the end", fes: 1, fei: 4, pdu: func(h *host) []byte { return patch(h.capsule(&small, make([]byte, 8)), 3, 80) }},
		{name: "8193 bytes in a capsule", fes: 5, fei: 4, pdu: func(h *host) []byte { return h.capsule(&small, make([]byte, 8193)) }},
		{name: "4 GiB in a capsule", fes: 5, fei: 4, pdu: func(h *host) []byte { return patch(h.capsule(&small, make([]byte, 8)), 4, 255, 255, 255, 255) }},
		{name: "header digest not negotiated", fes: 1, fei: 1, pdu: func(h *host) []byte { return patch(h.capsule(&flush, nil), 1, nvmeof.FlagHDGST) }},
		{name: "data digest not negotiated", fes: 1, fei: 1, pdu: func(h *host) []byte { return patch(h.capsule(&small, make([]byte, 8)), 1, nvmeof.FlagDDGST) }},
		{name: "header digest missing", dg: both, fes: 1, fei: 1, pdu: func(h *host) []byte { return patch(h.capsule(&flush, nil), 1, 0) }},
		{name: "data digest missing", dg: nvmeof.Digests{Data: true}, fes: 1, fei: 1, pdu: func(h *host) []byte { return patch(h.capsule(&small, make([]byte, 8)), 1, 0) }},
		{name: "header digest wrong", dg: both, fes: 3, fei: 0xDDCCBBAA, pdu: func(h *host) []byte { return patch(h.capsule(&flush, nil), 72, 0xAA, 0xBB, 0xCC, 0xDD) }},

		{name: "H2CData without an R2T", fes: 1, fei: 10, pdu: func(h *host) []byte { return h.h2cData(1, 99, make([]byte, 8), 0, 8) }},
		{name: "H2CData for another command", pull: true, fes: 1, fei: 10, pdu: func(h *host) []byte { return patch(h.h2cData(0, 0, make([]byte, 10000), 0, 8), 8, 0xEE) }},
		{name: "H2CData without data", pull: true, fes: 1, fei: 4, pdu: func(h *host) []byte { return padded(hdr(nvmeof.PDUH2CData, 0, 24, 0, 24), 16) }},
		{name: "H2CData beyond the start", pull: true, fes: 4, fei: 12, pdu: func(h *host) []byte { return h.h2cData(0, 0, make([]byte, 10000), 8, 8) }},
		{name: "H2CData of too much", pull: true, fes: 4, fei: 12, pdu: func(h *host) []byte { return h.h2cData(0, 0, make([]byte, 10004), 0, 10004) }},
		{name: "H2CData longer than DATAL", pull: true, fes: 1, fei: 4, pdu: func(h *host) []byte { return patch(h.h2cData(0, 0, make([]byte, 10000), 0, 8), 16, 7) }},
		{name: "H2CData over MAXH2CDATA", pull: true, fes: 5, fei: 16, pdu: func(h *host) []byte { return h.h2cData(0, 0, make([]byte, maxH2CData+4), 0, maxH2CData+4) }},
		{name: "LAST too early", pull: true, fes: 1, fei: 1, pdu: func(h *host) []byte { return patch(h.h2cData(0, 0, make([]byte, 10000), 0, 8), 1, nvmeof.FlagLast) }},
		{name: "no LAST", pull: true, fes: 1, fei: 1, pdu: func(h *host) []byte { return patch(h.h2cData(0, 0, make([]byte, 10000), 0, 10000), 1, 0) }},

		{name: "termination request", pdu: func(h *host) []byte {
			return nvmeof.AppendTerm(nil, nvmeof.PDUH2CTermReq, &nvmeof.TermError{FES: 1}, make([]byte, 24))
		}},
		{name: "wrong termination request", pdu: func(h *host) []byte { return padded(hdr(nvmeof.PDUH2CTermReq, 0, 25, 0, 24), 16) }},
		{name: "termination request of a controller", pdu: func(h *host) []byte {
			return nvmeof.AppendTerm(nil, nvmeof.PDUC2HTermReq, &nvmeof.TermError{FES: 1}, make([]byte, 24))
		}},
		{name: "long termination request", pdu: func(h *host) []byte { return padded(hdr(nvmeof.PDUH2CTermReq, 0, 24, 0, 153), 145) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			var h *host
			if c.setup {
				h = e.open()
			} else {
				h = e.dial(c.dg, 0)
				eventually(t, func() error { // the queue of the last connection goes first
					if st := h.tryConnect(id, 1, 127, 0).Status(); st != nvmeof.Success {
						return st
					}
					return nil
				})
			}
			pdu := c.pdu(h)
			if c.pull {
				pdu = bytes.Clone(pdu)
				cmd := kvCommand(nvmeof.OpStore, 1, "never", 10000)
				cmd.SetCID(77)
				cmd.SetSGL(nvmeof.MakeSGL(nvmeof.SGLTransport, 0, 10000))
				h.write(h.capsule(&cmd, nil))
				p := h.next(nvmeof.PDUR2T)
				if pdu[8] == 0 {
					pdu[8] = 77
				}
				le.PutUint16(pdu[10:], p.TTAG())
			}
			_, _ = h.nc.Write(pdu)
			p, err := h.recv()
			if c.fes == 0 {
				if !errors.Is(err, io.EOF) {
					t.Errorf("answer: %+v, %v", p.PDU, err)
				}
			} else if err != nil {
				t.Fatal(err)
			} else if term := p.Term(); p.Type != nvmeof.PDUC2HTermReq || term.FES != c.fes || term.FEI != c.fei {
				t.Fatalf("%+v: FES %d, FEI %d, not %d, %d", p.PDU, term.FES, term.FEI, c.fes, c.fei)
			} else if n := min(len(p.term), len(pdu)); n < 8 || !bytes.Equal(p.term[:n], pdu[:n]) {
				t.Errorf("header in the request: % x, sent % x", p.term, pdu[:n])
			}
			h.nc.Close()
			bystander.retrieve(1, "value", value)
		})
	}
	if st := bystander.do(kvCommand(nvmeof.OpExist, 1, "never", 0), nil, false, 0).Status(); st.Code() != nvmeof.KeyDoesNotExist {
		t.Error(st)
	}
}

// A wrong SGL is the command's error, not the connection's.
func TestWrongSGL(t *testing.T) {
	e := serve(t, 16<<20, kv(1, configs.DeviceMemory, "", 128<<20))
	_, id := e.admin(noDigests, 0)
	h := e.io(id, 1, noDigests, 0)
	for _, c := range []struct {
		name string
		op   uint8
		sgl  nvmeof.SGL
		data int
		want nvmeof.Status
	}{
		{"no descriptor", nvmeof.OpStore, nvmeof.SGL{}, 0, nvmeof.DataSGLLength},
		{"keyed", nvmeof.OpStore, nvmeof.MakeSGL(nvmeof.SGLKeyed, 0, 100), 0, nvmeof.SGLTypeInvalid},
		{"address", nvmeof.OpStore, nvmeof.MakeSGL(0, 0, 100), 0, nvmeof.SGLTypeInvalid},
		{"keyed, with data", nvmeof.OpStore, nvmeof.MakeSGL(nvmeof.SGLKeyed, 0, 0), 100, nvmeof.SGLTypeInvalid},
		{"transport, with data", nvmeof.OpStore, nvmeof.MakeSGL(nvmeof.SGLTransport, 0, 100), 100, nvmeof.SGLTypeInvalid},
		{"offset beyond the data", nvmeof.OpStore, nvmeof.MakeSGL(nvmeof.SGLOffset, 101, 100), 100, nvmeof.SGLOffsetInvalid},
		{"offset that overflows", nvmeof.OpStore, nvmeof.MakeSGL(nvmeof.SGLOffset, 1<<64-1, 100), 100, nvmeof.SGLOffsetInvalid},
		{"longer than the data", nvmeof.OpStore, nvmeof.MakeSGL(nvmeof.SGLOffset, 0, 101), 100, nvmeof.DataSGLLength},
		{"longer behind an offset", nvmeof.OpStore, nvmeof.MakeSGL(nvmeof.SGLOffset, 4, 100), 100, nvmeof.DataSGLLength},
		{"4 GiB", nvmeof.OpStore, nvmeof.MakeSGL(nvmeof.SGLOffset, 0, 1<<32-1), 100, nvmeof.DataSGLLength},
		{"offset without data", nvmeof.OpStore, nvmeof.MakeSGL(nvmeof.SGLOffset, 0, 100), 0, nvmeof.DataSGLLength},
		{"to the host in the capsule", nvmeof.OpRetrieve, nvmeof.MakeSGL(nvmeof.SGLOffset, 0, 100), 0, nvmeof.InvalidField},
	} {
		cmd := kvCommand(c.op, 1, "key", 100)
		cmd.SetCID(9)
		cmd.SetSGL(c.sgl)
		h.write(h.capsule(&cmd, make([]byte, c.data)))
		p := h.next(nvmeof.PDUCapsuleResp)
		if st := p.cqe.Status(); st != c.want|nvmeof.DNR {
			t.Errorf("%s: %v", c.name, st)
		}
	}
	h.store(1, "key", pattern(1, 100), true)
}

// Data whose digest does not match ends the command, and the host may send it again.
func TestWrongDataDigest(t *testing.T) {
	for _, device := range devices {
		t.Run(string(device), func(t *testing.T) {
			e := serve(t, 16<<20, kv(1, device, t.TempDir(), 128<<20))
			dg := nvmeof.Digests{Header: true, Data: true}
			_, id := e.admin(dg, 0)
			h := e.io(id, 1, dg, 0)
			cmd := kvCommand(nvmeof.OpStore, 1, "key", 100)
			cmd.SetSGL(nvmeof.MakeSGL(nvmeof.SGLOffset, 0, 100))
			b := h.capsule(&cmd, pattern(1, 100))
			b[len(b)-1] ^= 1
			h.write(b)
			if st := h.next(nvmeof.PDUCapsuleResp).cqe.Status(); st != nvmeof.TransientTransport {
				t.Error(st, st.Retry())
			}
			v := pattern(2, 600000)
			cmd = kvCommand(nvmeof.OpStore, 1, "key", len(v))
			cmd.SetSGL(nvmeof.MakeSGL(nvmeof.SGLTransport, 0, uint32(len(v))))
			h.write(h.capsule(&cmd, nil))
			tag := h.next(nvmeof.PDUR2T).TTAG()
			b = h.h2cData(0, tag, v, 0, 300000)
			b[len(b)-1000] ^= 1
			h.write(b)
			h.write(h.h2cData(0, tag, v, 300000, 300000))
			if st := h.next(nvmeof.PDUCapsuleResp).cqe.Status(); st != nvmeof.TransientTransport {
				t.Error(st, st.Retry())
			}
			if st := h.do(kvCommand(nvmeof.OpExist, 1, "key", 0), nil, false, 0).Status(); st.Code() != nvmeof.KeyDoesNotExist {
				t.Error(st)
			}
			h.store(1, "key", v, false)
			h.retrieve(1, "key", v)
		})
	}
}

// A host that sends more commands than a queue can have ends its connection.
func TestTooManyCommands(t *testing.T) {
	for _, device := range devices {
		t.Run(string(device), func(t *testing.T) {
			e := serve(t, 16<<20, kv(1, device, t.TempDir(), 512<<20))
			_, id := e.admin(noDigests, 0)
			h := e.dial(noDigests, 0)
			h.connect(id, 1, 31, 0)
			for i := range 200 {
				cmd := kvCommand(nvmeof.OpStore, 1, fmt.Sprint(i), 100000)
				cmd.SetCID(uint16(i))
				cmd.SetSGL(nvmeof.MakeSGL(nvmeof.SGLTransport, 0, 100000))
				if _, err := h.nc.Write(h.capsule(&cmd, nil)); err != nil {
					break
				}
			}
			for r2ts := 0; ; r2ts++ {
				p, err := h.recv()
				if err != nil {
					t.Fatal(err)
				}
				if p.Type == nvmeof.PDUC2HTermReq {
					if term := p.Term(); term.FES != nvmeof.FESSequence || r2ts > maxTransfers {
						t.Errorf("FES %d after %d R2Ts", term.FES, r2ts)
					}
					break
				}
			}
			h.nc.Close()
			e.quiet(1)
		})
	}
}

// A connection that never gets to a Connect ends.
func TestSetupTime(t *testing.T) {
	defer func(d time.Duration) { setupTime = d }(setupTime)
	setupTime = 100 * time.Millisecond
	e := serve(t, 16<<20)
	for _, b := range [][]byte{nil, icreq(noDigests, 0)[:3], icreq(noDigests, 0)[:127], icreq(noDigests, 0)} {
		h := e.open()
		h.write(b)
		h.ended()
	}
}
