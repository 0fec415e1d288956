package nvmeof

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// decode takes a whole PDU apart the way a connection's reader does.
func decode(b []byte, h2c bool, dg Digests) (PDU, *TermError) {
	n, err := HeaderSize(b, h2c, dg)
	if err != nil {
		return PDU{}, err
	}
	return DecodePDU(b[:n], dg)
}

func TestPDURoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		dg := Digests{rapid.Bool().Draw(t, "header digest"), rapid.Bool().Draw(t, "data digest")}
		align := 4 * rapid.IntRange(1, 32).Draw(t, "align")
		n := rapid.IntRange(1, 1<<26).Draw(t, "n")
		cid, tag := rapid.Uint16().Draw(t, "cid"), rapid.Uint16().Draw(t, "ttag")
		off := rapid.Uint32().Draw(t, "off")
		b := bytes.Repeat([]byte{0xEE}, 72+4+128)
		check := func(h2c bool, typ uint8, n, size int) PDU {
			p, err := decode(b, h2c, dg)
			if err != nil {
				t.Fatal(err)
			}
			if p.Type != typ || p.DataLen() != uint32(n) || int(p.end())+p.Pad() != size || n > 0 && size%align != 0 {
				t.Fatalf("type %d, %d bytes of data, header %d + %d of padding, want type %d, %d bytes, header %d", p.Type, p.DataLen(), p.end(), p.Pad(), typ, n, size)
			}
			if pad := b[p.end():size]; !bytes.Equal(pad, make([]byte, len(pad))) {
				t.Fatalf("padding % x", pad)
			}
			return p
		}
		for _, typ := range []uint8{PDUH2CData, PDUC2HData} {
			flags := uint8(FlagLast)
			size := EncodeData(b, typ, flags, cid, tag, off, n, align, dg)
			p := check(typ == PDUH2CData, typ, n, size)
			if p.CCCID() != cid || p.TTAG() != tag || p.DATAO() != off || p.DATAL() != uint32(n) || p.Flags&(FlagLast|FlagSuccess) != flags {
				t.Fatalf("data PDU % x", p.Raw)
			}
		}
		var cmd Command
		copy(cmd[:], rapid.SliceOfN(rapid.Byte(), CommandSize, CommandSize).Draw(t, "command"))
		for _, n := range []int{0, n} {
			size := EncodeCapsule(b, &cmd, n, align, dg)
			if p := check(true, PDUCapsuleCmd, n, size); Command(p.Raw[PDUHeaderSize:]) != cmd {
				t.Fatalf("capsule % x", p.Raw)
			}
		}
		cqe := MakeCompletion(off, 0, tag, 1, cid, InvalidField|DNR)
		if p := check(false, PDUCapsuleResp, 0, EncodeResponse(b, &cqe, dg)); Completion(p.Raw[PDUHeaderSize:]) != cqe {
			t.Fatalf("response % x", p.Raw)
		}
		p := check(false, PDUR2T, 0, EncodeR2T(b, cid, tag, off, uint32(n), dg))
		if p.CCCID() != cid || p.TTAG() != tag || p.DATAO() != off || p.DATAL() != uint32(n) {
			t.Fatalf("R2T % x", p.Raw)
		}
	})
}

func TestICRoundTrip(t *testing.T) {
	for typ, ic := range map[uint8]IC{PDUICReq: {PDA: 3, Digest: bothDigest, Max: 7}, PDUICResp: {Digest: Digests{Data: true}, Max: 4096}} {
		b := make([]byte, ICSize)
		EncodeIC(b, typ, ic)
		p, err := decode(b, typ == PDUICReq, noDigest)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := DecodeIC(&p); err != nil || got != ic {
			t.Errorf("%+v, %v; want %+v", got, err, ic)
		}
	}
}

func TestTermRoundTrip(t *testing.T) {
	e := TermError{FES: FESHeaderDigest, FEI: 0x11223344}
	b := AppendTerm([]byte{1, 2}, PDUH2CTermReq, &e, make([]byte, 200))[2:]
	if len(b) != MaxTermSize {
		t.Errorf("%d bytes, want %d", len(b), MaxTermSize)
	}
	p, err := decode(b, true, bothDigest)
	if err != nil {
		t.Fatal(err)
	}
	if got := p.Term(); got.FES != e.FES || got.FEI != e.FEI {
		t.Errorf("%+v, want %+v", got, e)
	}
	if p.DataLen() != 0 || p.Pad() != 0 {
		t.Errorf("a termination request has %d bytes of data", p.DataLen())
	}
}

func TestMalformedPDU(t *testing.T) {
	capsuleOf := func(n int, dg Digests) []byte { return capsule(Command{}, make([]byte, n), dg) }
	data := func(typ, flags uint8, dg Digests) []byte {
		b := make([]byte, 64)
		EncodeData(b, typ, flags, 1, 2, 0, 512, 4, dg)
		return b
	}
	ic := func(typ uint8, max uint32) []byte {
		b := make([]byte, ICSize)
		EncodeIC(b, typ, IC{Max: max})
		return b
	}
	response := make([]byte, 28)
	EncodeResponse(response, &Completion{}, noDigest)
	term := AppendTerm(nil, PDUH2CTermReq, &TermError{}, []byte{1})
	for _, tc := range []struct {
		name string
		pdu  []byte
		c2h  bool
		dg   Digests
		at   int // what is overwritten, where
		with string
		fes  uint16
		fei  uint32
	}{
		{"unknown type 08h", capsuleOf(0, noDigest), false, noDigest, 0, "08", FESInvalidField, 0},
		{"unknown type FFh", capsuleOf(0, noDigest), false, noDigest, 0, "ff", FESInvalidField, 0},
		{"a host's PDU from a controller", capsuleOf(0, noDigest), true, noDigest, 0, "", FESInvalidField, 0},
		{"a controller's PDU from a host", data(PDUC2HData, 0, noDigest), false, noDigest, 0, "", FESInvalidField, 0},
		{"HLEN too small", capsuleOf(0, noDigest), false, noDigest, 2, "47", FESInvalidField, 2},
		{"HLEN too large", data(PDUH2CData, 0, noDigest), false, noDigest, 2, "ff", FESInvalidField, 2},
		{"HLEN of ICReq", ic(PDUICReq, 0), false, noDigest, 2, "18", FESInvalidField, 2},
		{"header digest missing, HLEN wrong too", capsuleOf(0, noDigest), false, bothDigest, 2, "00", FESInvalidField, 1},
		{"header digest not negotiated", capsuleOf(0, bothDigest), false, noDigest, 0, "", FESInvalidField, 1},
		{"header digest wrong", capsuleOf(0, bothDigest), false, bothDigest, 72, "01020304", FESHeaderDigest, 0x04030201},
		{"header digest of a changed header", data(PDUH2CData, 0, Digests{Header: true}), false, Digests{Header: true}, 24, "00000000", FESHeaderDigest, 0},
		{"data digest missing", capsuleOf(8, Digests{Header: true}), false, bothDigest, 0, "", FESInvalidField, 1},
		{"data digest not negotiated", capsuleOf(8, Digests{Data: true}), false, noDigest, 0, "", FESInvalidField, 1},
		{"PLEN of ICReq", ic(PDUICReq, 0), false, noDigest, 4, "81", FESInvalidField, 4},
		{"PLEN of a response", response, true, noDigest, 4, "1c", FESInvalidField, 4},
		{"PLEN of a termination request, short", term, false, noDigest, 4, "17", FESInvalidField, 4},
		{"PLEN of a termination request, long", term, false, noDigest, 4, "99", FESInvalidField, 4},
		{"PLEN shorter than the header", capsuleOf(0, noDigest), false, noDigest, 3, "48 47", FESInvalidField, 4},
		{"PLEN ends at PDO", capsuleOf(8, noDigest), false, noDigest, 3, "4c 4c", FESInvalidField, 4},
		{"PLEN has room for the data digest only", capsuleOf(8, Digests{Data: true}), false, Digests{Data: true}, 4, "4c", FESInvalidField, 4},
		{"PLEN 4 GiB - 1, not what DATAL says", data(PDUH2CData, 0, noDigest), false, noDigest, 4, "ffffffff", FESInvalidField, 4},
		{"PDO inside the header", capsuleOf(8, noDigest), false, noDigest, 3, "44", FESInvalidField, 3},
		{"PDO inside the header digest", func() []byte {
			b := capsuleOf(8, Digests{Header: true})
			b[3] = CapsuleCmdSize
			le.PutUint32(b[CapsuleCmdSize:], Digest(0, b[:CapsuleCmdSize]))
			return b
		}(), false, Digests{Header: true}, 0, "", FESInvalidField, 3},
		{"PDO not a multiple of 4", capsuleOf(8, noDigest), false, noDigest, 3, "4a", FESInvalidField, 3},
		{"PDO 0 with data", capsuleOf(8, noDigest), false, noDigest, 3, "00", FESInvalidField, 3},
		{"data PDU without data", data(PDUH2CData, 0, noDigest), false, noDigest, 4, "18000000", FESInvalidField, 4},
		{"DATAL larger than the PDU", data(PDUH2CData, 0, noDigest), false, noDigest, 16, "01020000", FESInvalidField, 4},
		{"SUCCESS without LAST", data(PDUC2HData, FlagSuccess, noDigest), true, noDigest, 0, "", FESInvalidField, 1},
		{"PFV 1", ic(PDUICReq, 0), false, noDigest, 8, "01", FESUnsupportedParam, 8},
		{"HPDA 32", ic(PDUICReq, 0), false, noDigest, 10, "20", FESInvalidField, 10},
		{"MAXH2CDATA 0", ic(PDUICResp, 0), true, noDigest, 0, "", FESInvalidField, 12},
		{"MAXH2CDATA not a multiple of 4", ic(PDUICResp, 4098), true, noDigest, 0, "", FESInvalidField, 12},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := bytes.Clone(tc.pdu)
			copy(b[tc.at:], fields{0: tc.with}.bytes(len(strings.ReplaceAll(tc.with, " ", ""))/2))
			p, err := decode(b, !tc.c2h, tc.dg)
			if err == nil {
				_, err = DecodeIC(&p)
			}
			if err == nil {
				t.Fatal("accepted")
			}
			if want := fmt.Sprintf("%s (FES %02Xh, FEI %d)", err.Why, tc.fes, tc.fei); err.Error() != want {
				t.Errorf("%v, want FES %02Xh, FEI %d", err, tc.fes, tc.fei)
			}
		})
	}
}

// TestDigest uses the examples of RFC 3720, B.4, whose digests are laid out as in NVMe/TCP.
func TestDigest(t *testing.T) {
	ascending := make([]byte, 32)
	for i := range ascending {
		ascending[i] = byte(i)
	}
	for want, b := range map[uint32][]byte{
		0x8A9136AA: make([]byte, 32), 0x62A8AB43: bytes.Repeat([]byte{0xFF}, 32), 0x46DD794E: ascending, 0xE3069283: []byte("123456789"),
	} {
		if got := Digest(0, b); got != want {
			t.Errorf("Digest(% x) = %#x, want %#x", b, got, want)
		}
		if got := Digest(Digest(0, b[:5]), b[5:]); got != want {
			t.Errorf("Digest(% x) in two steps = %#x, want %#x", b, got, want)
		}
	}
}

func TestSPDKBringUp(t *testing.T) {
	for _, dg := range []Digests{noDigest, bothDigest, {Header: true}, {Data: true}} {
		for i, b := range spdkBringUp(dg) {
			if i == 0 {
				continue // ICReq precedes the digests
			}
			p, err := decode(b, true, dg)
			if err != nil {
				t.Fatalf("PDU %d: %v", i, err)
			}
			if c := Command(p.Raw[PDUHeaderSize:]); c.Opcode() == OpFabrics && c.FCType() == FCConnect {
				var d ConnectData
				if err := d.Decode(b[p.PDO:][:p.DataLen()]); err != nil || d.SubNQN != testSubNQN || d.HostNQN != testHostNQN || d.HostID != testID {
					t.Errorf("Connect data %+v, %v", d, err)
				}
			}
		}
	}
}

func TestCommandFields(t *testing.T) {
	c := MakeConnect(1, 2, 127, CATTRNoFlowControl, 5000)
	rw := Command(fields{0: "02 40 0300 04000000", 24: "08", 32: "09", 39: "01", 40: "0807060504030201"}.bytes(CommandSize))
	log := MakeGetLogPage(LogDiscovery, 5, 1<<20, 1<<40, CSIKV, true)
	feature := Command(fields{40: "20 03 00 80"}.bytes(CommandSize))
	identify := Command(fields{40: "12 00 0201", 47: "01"}.bytes(CommandSize))
	kv := Command(fields{8: "a0a1a2a3a4a5a6a7", 40: "00000002 10 02", 56: "a8a9aaabacadaeaf"}.bytes(CommandSize))
	cap := MakeCAP(127, 30, 3)
	cc := uint32(0x464061)
	sgl, cpl := rw.SGL(), MakeCompletion(1, 2, 3, 4, 5, KeyExists|DNR)
	reserved := Command(fields{40: "02"}.bytes(CommandSize))
	set := MakePropertySet(PropCC, cc)
	get := MakePropertyGet(PropCAP, 8)
	for i, tc := range [][2]any{
		{c.Direction(), HostToController}, {get.Direction(), NoData}, {rw.Direction(), ControllerToHost},
		{c.ConnectRECFMT(), uint16(0)}, {c.ConnectQID(), uint16(2)}, {c.ConnectSQSIZE(), uint16(127)}, {c.ConnectCATTR(), uint8(4)}, {c.ConnectKATO(), uint32(5000)},
		{set.PropertyOffset(), uint32(0x14)}, {set.PropertySize(), 4}, {set.PropertyValue(), uint64(cc)}, {get.PropertySize(), 8}, {reserved.PropertySize(), 0},
		{rw.Opcode(), uint8(2)}, {rw.Flags(), uint8(0x40)}, {rw.CID(), uint16(3)}, {rw.NSID(), uint32(4)}, {rw.SLBA(), uint64(0x0102030405060708)},
		{sgl.Address(), uint64(8)}, {sgl.Length(), uint32(9)}, {sgl.ID(), uint8(SGLOffset)},
		{log.LID(), uint8(LogDiscovery)}, {log.RAE(), true}, {log.LogLength(), uint64(1 << 20)}, {log.LogOffset(), uint64(1 << 40)}, {log.LogCSI(), CSIKV},
		{feature.FID(), uint8(FeatKV)}, {feature.FeatureSelect(), uint8(FeatSelectSupported)}, {feature.FeatureSave(), true},
		{identify.CNS(), uint8(CNSNamespaceCtrlList)}, {identify.IdentifyCNTID(), uint16(0x0102)}, {identify.IdentifyCSI(), CSIKV},
		{kv.Key(), testKey}, {kv.KeyLen(), 16}, {kv.KVOption(), uint8(StoreIfAbsent)}, {kv.KVSize(), uint32(32 << 20)},
		{uint64(cap), uint64(0x1800_0820_1E01_007F)}, {cap.MQES(), uint16(127)}, {cap.TO(), uint8(30)}, {cap.CommandSets(), true},
		{CCEN(cc), true}, {CCCSS(cc), uint32(6)}, {CCSHN(cc), uint32(1)},
		{cpl.DW0(), uint32(1)}, {cpl.DW1(), uint32(2)}, {cpl.SQHD(), uint16(3)}, {cpl.CID(), uint16(5)}, {cpl.Status(), KeyExists | DNR},
		{ConnectInvalidDW0(ConnectOffSUBNQN, true), uint32(0x10100)}, {ConnectInvalidDW0(ConnectOffSQSIZE, false), uint32(44)},
		{EventNamespaceChanged, 0x040002}, {EventDiscoveryChanged, 0x70F002},
	} {
		if tc[0] != tc[1] {
			t.Errorf("case %d: %#v, want %#v", i, tc[0], tc[1])
		}
	}
	if l := Command(fields{42: "ffff ffff"}.bytes(CommandSize)); l.LogLength() != 1<<34 {
		t.Errorf("the longest log is %d bytes", l.LogLength())
	}
}

// structure is what all identify and log structures with a decoder have in common.
type structure interface {
	Encode([]byte)
	Decode([]byte) error
}

// roundTrip encodes s into size bytes, decodes them and compares.
func roundTrip(t *testing.T, s structure, size int) {
	t.Helper()
	b := bytes.Repeat([]byte{0xEE}, size)
	s.Encode(b)
	got := reflect.New(reflect.TypeOf(s).Elem())
	if err := got.Interface().(structure).Decode(b); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got.Interface(), s) {
		t.Errorf("%+v, want %+v", got.Elem(), s)
	}
}

func TestStructureRoundTrip(t *testing.T) {
	connect := &ConnectData{testID, CNTLIDDynamic, testSubNQN, testHostNQN}
	for _, s := range []structure{&testController, &testNamespace, &testKV, &NamespaceIDs{testID, testKey, CSIKV}, &NamespaceIDs{UUID: testID}} {
		roundTrip(t, s, IdentifySize)
	}
	roundTrip(t, connect, ConnectDataSize)
	for _, s := range []structure{&testController, &testNamespace, &testKV, connect} {
		if s.Decode(make([]byte, ConnectDataSize-1)) == nil {
			t.Errorf("%T accepts a short structure", s)
		}
	}
	if (&NamespaceIDs{}).Decode([]byte{NIDTNGUID, 16, 0, 0, 1}) == nil {
		t.Error("NamespaceIDs accepts a descriptor that is cut off")
	}

	log := EncodeDiscovery([]byte{1}, 7, []DiscoveryEntry{testDiscovery, {TRAddr: "2001:db8::1"}})[1:]
	genctr, n, err := DecodeDiscoveryHeader(log)
	if genctr != 7 || n != 2 || err != nil {
		t.Errorf("discovery header: %d, %d, %v", genctr, n, err)
	}
	for i, want := range []DiscoveryEntry{testDiscovery, {TRAddr: "2001:db8::1"}} {
		var e DiscoveryEntry
		if err := e.Decode(log[DiscoveryHeaderSize+i*DiscoveryEntrySize:]); err != nil || e != want {
			t.Errorf("record %d: %+v, %v; want %+v", i, e, err, want)
		}
	}
	if (&DiscoveryEntry{}).Decode(log[:DiscoveryEntrySize-1]) == nil {
		t.Error("DiscoveryEntry accepts a short record")
	}
	if _, _, err := DecodeDiscoveryHeader(log[:17]); err == nil {
		t.Error("discovery log of 17 bytes is accepted")
	}
	log[16] = 1
	if _, _, err := DecodeDiscoveryHeader(log); err == nil {
		t.Error("discovery log of record format 1 is accepted")
	}

	var r DSMRange
	if r.Decode(fields{0: "ffffffff 08000000 0001"}.bytes(DSMRangeSize)); r != (DSMRange{8, 256}) {
		t.Errorf("DSM range %+v", r)
	}
}

// TestFormatInUse: hosts read other targets too, whose format in use need not be the first.
func TestFormatInUse(t *testing.T) {
	var ns IdentifyNamespace
	if err := ns.Decode(fields{25: "01 01", 130: "09", 134: "0c"}.bytes(IdentifySize)); err != nil || ns.LBADS != 12 {
		t.Errorf("LBADS %d, %v", ns.LBADS, err)
	}
	var kv IdentifyKV
	if err := kv.Decode(fields{25: "0f", 29: "0f", 72 + 240: "0800 0000 00100000 05"}.bytes(IdentifySize)); err != nil || kv.MaxKey != 8 || kv.MaxValue != 4096 || kv.MaxKeys != 5 {
		t.Errorf("%+v, %v", kv, err)
	}
}

func TestLists(t *testing.T) {
	ids := make([]uint32, 2000)
	for i := range ids {
		ids[i] = uint32(i + 1)
	}
	b := make([]byte, IdentifySize)
	for _, tc := range []struct{ after, first, n int }{{0, 1, 1024}, {10, 11, 1024}, {1990, 1991, 10}, {2000, 0, 0}} {
		EncodeNSIDList(b, ids, uint32(tc.after))
		got := DecodeNSIDList(b)
		if len(got) != tc.n || tc.n > 0 && (got[0] != uint32(tc.first) || got[tc.n-1] != uint32(tc.first+tc.n-1)) {
			t.Errorf("after %d: %d namespaces %v", tc.after, len(got), got)
		}
	}
	EncodeControllerList(b, make([]uint16, 3000), 0)
	if n := le.Uint16(b); n != 2047 {
		t.Errorf("%d controllers, want 2047", n)
	}
}

func TestKeyList(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const guard = 64
		mem := bytes.Repeat([]byte{0xEE}, 4096+guard)
		size := rapid.IntRange(0, 4096).Draw(t, "size")
		l := NewKeyList(mem[:0:size])
		var want [][]byte
		free := size - 4
		for _, k := range rapid.SliceOfN(rapid.SliceOfN(rapid.Byte(), 1, MaxKeyLen), 0, 300).Draw(t, "keys") {
			need := (2 + len(k) + 3) / 4 * 4
			fits := free >= need
			if fits {
				free -= need
				want = append(want, k)
			}
			if l.Add(k) != fits {
				t.Fatalf("Add of %d bytes with %d left: %v", len(k), free, !fits)
			}
		}
		b := l.Bytes()
		if len(b) > size || !bytes.Equal(mem[size:], bytes.Repeat([]byte{0xEE}, len(mem)-size)) {
			t.Fatalf("%d bytes are used of %d", len(b), size)
		}
		if size < 4 {
			if len(b) != 0 {
				t.Fatalf("%d bytes are used of %d", len(b), size)
			}
			return
		}
		var got [][]byte
		if err := DecodeKeyList(b, func(k []byte) bool { got = append(got, k); return true }); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, want) || len(b)%4 != 0 {
			t.Fatalf("keys %x, want %x in % x", got, want, b)
		}
	})

	l := NewKeyList(make([]byte, 0, 4096))
	n := 0
	for l.Add(testKey[:]) {
		n++
	}
	if n != 204 {
		t.Errorf("4096 bytes hold %d keys, want 204", n)
	}
	same(t, l.Bytes()[:24], fields{0: "cc000000 1000 a0a1a2a3a4a5a6a7a8a9aaabacadaeaf"}.bytes(24))
}

func TestDecodeKeyListErrors(t *testing.T) {
	for _, s := range []string{"", "000000", "01000000", "01000000 0000", "01000000 1100 a0", "01000000 0400 a0a1a2", "02000000 0200 a0a1", "ffffffff 0200 a0a1 0200"} {
		b := fields{0: s}.bytes(len(strings.ReplaceAll(s, " ", "")) / 2)
		if DecodeKeyList(b, func([]byte) bool { return true }) == nil {
			t.Errorf("%q is accepted", s)
		}
	}
	if err := DecodeKeyList(fields{0: "02000000 0200 a0a1"}.bytes(8), func([]byte) bool { return false }); err != nil {
		t.Errorf("stopped early: %v", err)
	}
}

func TestCheckNQN(t *testing.T) {
	long := "nqn.2026-01.io.kvof:" + strings.Repeat("x", MaxNQN-20)
	for nqn, ok := range map[string]bool{
		DiscoveryNQN: true, testSubNQN: true, testHostNQN: true, "nqn.2016-06.io.spdk:cnode1": true, "nqn.2026-01.io.kvof:a:b c": true, long: true,
		"": false, "nqn": false, "iqn.2026-01.io.kvof:a": false, "nqn.2026-13.io.kvof:a": false, "nqn.26-01.io.kvof:a": false,
		"nqn.2026-01.io.kvof:": false, "nqn.2026-01.:a": false, "nqn.2026-01.io.kvof:\x00": false, "nqn.2026-01.io.kvof:\xff": false,
		"nqn.2026-01.io.kvof:a\n": false, long + "x": false, " " + testSubNQN: false,
	} {
		if err := CheckNQN(nqn); (err == nil) != ok {
			t.Errorf("CheckNQN(%q) = %v", nqn, err)
		}
	}
}

// TestStatus lists the names of the specifications: Base 2.0, figures of generic, command specific and media status
// codes; KV, status codes; and docs/vendor-commands.md.
func TestStatus(t *testing.T) {
	names := map[Status]string{
		0x00: "success", 0x01: "invalid command opcode", 0x02: "invalid field in command", 0x03: "command ID conflict",
		0x04: "data transfer error", 0x06: "internal error", 0x07: "command abort requested", 0x08: "command aborted due to SQ deletion",
		0x0B: "invalid namespace or format", 0x0C: "command sequence error",
		0x0D: "invalid SGL segment descriptor", 0x0E: "invalid number of SGL descriptors",
		0x0F: "data SGL length invalid", 0x11: "SGL descriptor type invalid", 0x16: "SGL offset invalid",
		0x1A: "keep alive timeout invalid", 0x20: "namespace is write protected", 0x21: "command interrupted", 0x22: "transient transport error",
		0x80: "LBA out of range", 0x81: "capacity exceeded", 0x82: "namespace not ready",
		0x85: "invalid value size", 0x86: "invalid key size", 0x87: "key does not exist", 0x88: "unrecovered error", 0x89: "key exists",
		0x101: "invalid queue identifier", 0x105: "asynchronous event request limit exceeded", 0x109: "invalid log page",
		0x10D: "feature identifier not saveable", 0x10E: "feature not changeable", 0x12B: "I/O command set combination rejected",
		0x12C: "invalid I/O command set", 0x180: "connect: incompatible format", 0x181: "connect: controller busy",
		0x182: "connect: invalid parameters", 0x183: "connect: restart discovery", 0x184: "connect: invalid host",
		0x1C0: "value replaced",
		0x280: "write fault", 0x281: "unrecovered read error", 0x285: "compare failure", 0x287: "deallocated or unwritten logical block",
	}
	if !reflect.DeepEqual(statusText, names) {
		for s := range statusText {
			if names[s] != statusText[s] {
				t.Errorf("%03Xh is named %q, want %q", uint16(s), statusText[s], names[s])
			}
		}
		t.Errorf("%d names, want %d", len(statusText), len(names))
	}
	err := fmt.Errorf("store: %w", KeyExists|DNR)
	if !errors.Is(err, KeyExists) || errors.Is(err, KeyDoesNotExist) || err.Error() != "store: key exists (89h)" {
		t.Errorf("%v is not KeyExists", err)
	}
	if (KeyExists | DNR).Retry() || !ConnectBusy.Retry() || (ConnectBusy|DNR|1<<13).Code() != ConnectBusy {
		t.Error("DNR is misread")
	}
	if s := Status(0x371).Error(); s != "NVMe status 371h" {
		t.Errorf("%q", s)
	}
}

// hot runs what a connection does for each I/O.
var hot = map[string]func(b []byte, dg Digests){
	"EncodeData": func(b []byte, dg Digests) { EncodeData(b, PDUC2HData, FlagLast, 1, 0, 0, 1<<20, 4, dg) },
	"EncodeResponse": func(b []byte, dg Digests) {
		c := MakeCompletion(1<<20, 0, 1, 1, 1, Success)
		EncodeResponse(b, &c, dg)
	},
	"DecodePDU": func(b []byte, dg Digests) {
		n := EncodeData(b, PDUH2CData, FlagLast, 1, 1, 0, 1<<20, 4, dg)
		if p, err := decode(b[:n], true, dg); err != nil || p.DataLen() != 1<<20 {
			panic(err)
		}
	},
}

func TestNoAllocation(t *testing.T) {
	b := make([]byte, 256)
	for name, f := range hot {
		if n := testing.AllocsPerRun(100, func() { f(b, bothDigest) }); n != 0 {
			t.Errorf("%s allocates %v times", name, n)
		}
	}
}

func BenchmarkPDU(b *testing.B) {
	buf := make([]byte, 256)
	for name, f := range hot {
		for _, dg := range []Digests{noDigest, bothDigest} {
			b.Run(fmt.Sprintf("%s/digests=%v", name, dg.Header), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					f(buf, dg)
				}
			})
		}
	}
}
