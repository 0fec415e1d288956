package nvmeof

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestKeyedSGL(t *testing.T) {
	s := MakeKeyedSGL(SGLKeyedInvalidate, 0x1122334455667788, 0xABCDEF, 0xCAFE0001)
	want := SGL{0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0xEF, 0xCD, 0xAB, 0x01, 0x00, 0xFE, 0xCA, 0x4F}
	if s != want || s.Address() != 0x1122334455667788 || s.KeyedLength() != 0xABCDEF || s.Key() != 0xCAFE0001 || s.ID() != SGLKeyedInvalidate {
		t.Errorf("% X", s)
	}
}

// What Linux (drivers/nvme/host/rdma.c) sends for queue 3 of 128 entries: hrqsize is the size, hsqsize 0's based.
func TestRDMARequest(t *testing.T) {
	wire := make([]byte, 56) // InfiniBand pads
	copy(wire, []byte{0, 0, 3, 0, 128, 0, 127, 0, 9, 0})
	var r RDMARequest
	if err := r.Decode(wire); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(RDMARequest{QID: 3, HRQSIZE: 128, HSQSIZE: 127, CNTLID: 9}, r); d != "" {
		t.Error(d)
	}
	b := bytes.Repeat([]byte{0xFF}, RDMARequestSize)
	if r.Encode(b); !bytes.Equal(b, wire[:RDMARequestSize]) {
		t.Errorf("% X", b)
	}
	if err := r.Decode(wire[:31]); !errors.Is(err, RDMARejectLength) {
		t.Error(err)
	}
	wire[1] = 1
	if err := r.Decode(wire); !errors.Is(err, RDMARejectFormat) {
		t.Error(err)
	}
}

func TestRDMAAnswers(t *testing.T) {
	b := bytes.Repeat([]byte{0xFF}, RDMAAcceptSize)
	EncodeRDMAAccept(b, 128)
	if n, err := DecodeRDMAAccept(b); n != 128 || err != nil {
		t.Error(n, err)
	}
	if _, err := DecodeRDMAAccept(b[:3]); err == nil {
		t.Error("short")
	}
	if b[0] = 1; true {
		if _, err := DecodeRDMAAccept(b); err == nil {
			t.Error("format")
		}
	}
	b = bytes.Repeat([]byte{0xFF}, RDMARejectSize)
	RDMARejectHSQSIZE.Encode(b)
	if !bytes.Equal(b, []byte{0, 0, 4, 0}) || DecodeRDMAReject(b) != RDMARejectHSQSIZE {
		t.Errorf("% X", b)
	}
	if DecodeRDMAReject(b[:3]) != 0 || DecodeRDMAReject([]byte{1, 0, 4, 0}) != 0 {
		t.Error("a refusal of another kind")
	}
	for r := RDMARejectLength; r <= RDMARejectORD; r++ {
		if s := r.Error(); strings.Contains(s, "status") {
			t.Error(s)
		}
	}
	if s := RDMAReject(99).Error(); !strings.Contains(s, "status 99") {
		t.Error(s)
	}
}

func TestDiscoveryRDMA(t *testing.T) {
	b := EncodeDiscovery(nil, 1, []DiscoveryEntry{{TRType: TRTypeRDMA, TRSVCID: "4420"}, {TRType: TRTypeTCP, TRSVCID: "4420"}})
	if got := b[DiscoveryHeaderSize+768 : DiscoveryHeaderSize+771]; !bytes.Equal(got, []byte{1, 1, 1}) {
		t.Errorf("TSAS of RDMA: % X", got)
	}
	if got := b[DiscoveryHeaderSize+DiscoveryEntrySize+768:][:256]; !bytes.Equal(got, make([]byte, 256)) {
		t.Errorf("TSAS of TCP: % X", got)
	}
}

func FuzzRDMAPrivateData(f *testing.F) {
	f.Add([]byte{0, 0, 3, 0, 128, 0, 127, 0, 9, 0})
	f.Add(make([]byte, 56))
	f.Fuzz(func(t *testing.T, b []byte) {
		var r RDMARequest
		if err := r.Decode(b); err == nil {
			e := make([]byte, RDMARequestSize)
			r.Encode(e)
			if !bytes.Equal(e[:10], b[:10]) {
				t.Errorf("% X encodes as % X", b, e)
			}
		}
		if n, err := DecodeRDMAAccept(b); err == nil {
			e := make([]byte, RDMAAcceptSize)
			EncodeRDMAAccept(e, n)
			if !bytes.Equal(e[:4], b[:4]) {
				t.Errorf("% X encodes as % X", b, e)
			}
		}
		_ = DecodeRDMAReject(b).Error()
	})
}
