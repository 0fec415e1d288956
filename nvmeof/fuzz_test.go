package nvmeof

import (
	"bytes"
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"
)

// FuzzPDU decodes one PDU as a reader of either side does.
func FuzzPDU(f *testing.F) {
	for _, dg := range []Digests{noDigest, bothDigest} {
		for _, b := range spdkBringUp(dg) {
			f.Add(b, true, dg.Header, dg.Data)
		}
		b := make([]byte, 256)
		EncodeIC(b, PDUICResp, IC{Digest: dg, Max: 128 << 10})
		f.Add(bytes.Clone(b), false, dg.Header, dg.Data)
		for _, typ := range []uint8{PDUH2CData, PDUC2HData} {
			EncodeData(b, typ, FlagLast|FlagSuccess, 1, 2, 4096, 4096, 128, dg)
			f.Add(bytes.Clone(b), typ == PDUH2CData, dg.Header, dg.Data)
		}
		EncodeR2T(b, 1, 2, 0, 1<<20, dg)
		f.Add(bytes.Clone(b), false, dg.Header, dg.Data)
		EncodeResponse(b, &Completion{}, dg)
		f.Add(bytes.Clone(b), false, dg.Header, dg.Data)
		f.Add(AppendTerm(nil, PDUC2HTermReq, &TermError{FES: 1, FEI: 2}, b[:72]), false, dg.Header, dg.Data)
	}
	f.Fuzz(func(t *testing.T, b []byte, h2c, hdgst, ddgst bool) {
		dg := Digests{hdgst, ddgst}
		wellFormed := func(err *TermError) {
			if err.FES < FESInvalidField || err.FES > FESUnsupportedParam || err.Why == "" || err.FES == FESInvalidField && err.FEI >= MaxPDUHeader {
				t.Fatalf("error %+v", err)
			}
		}
		if len(b) < PDUHeaderSize {
			return
		}
		n, err := HeaderSize(b, h2c, dg)
		if err != nil {
			wellFormed(err)
			return
		}
		if n < PDUHeaderSize || n > MaxPDUHeader+DigestSize {
			t.Fatalf("header of %d bytes", n)
		}
		if len(b) < n {
			return
		}
		h := bytes.Clone(b[:n])
		p, err := DecodePDU(h, dg)
		if err != nil && err.FES == FESHeaderDigest { // the fuzzer cannot guess digests
			le.PutUint32(h[p.HLEN:], Digest(0, h[:p.HLEN]))
			p, err = DecodePDU(h, dg)
		}
		if err != nil {
			wellFormed(err)
			return
		}
		switch data, pad := p.DataLen(), p.Pad(); {
		case data == 0:
			if pad != 0 || p.PLEN != uint32(n) && p.Type != PDUH2CTermReq && p.Type != PDUC2HTermReq {
				t.Fatalf("%+v: padding %d without data", p, pad)
			}
		default:
			total := uint64(n) + uint64(pad) + uint64(data)
			if ddgst {
				total += DigestSize
			}
			if pad < 0 || total != uint64(p.PLEN) || n+pad != int(p.PDO) {
				t.Fatalf("%+v: header %d, padding %d, data %d do not add up", p, n, pad, data)
			}
		}
		switch p.Type {
		case PDUICReq, PDUICResp:
			ic, err := DecodeIC(&p)
			if err != nil {
				wellFormed(err)
				return
			}
			again := make([]byte, ICSize)
			EncodeIC(again, p.Type, ic)
			q, err := decode(again, h2c, dg)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := DecodeIC(&q); err != nil || got != ic {
				t.Fatalf("%+v, %v; want %+v", got, err, ic)
			}
		case PDUH2CTermReq, PDUC2HTermReq:
			_ = p.Term()
		case PDUCapsuleCmd:
			c := Command(p.Raw[PDUHeaderSize:])
			checkCommand(t, &c)
		case PDUH2CData, PDUC2HData:
			if p.DATAL() != p.DataLen() {
				t.Fatalf("DATAL %d, %d bytes of data", p.DATAL(), p.DataLen())
			}
			_, _, _ = p.CCCID(), p.TTAG(), p.DATAO()
		}
	})
}

// checkCommand reads every field that a command may have, and holds those with a range to it.
func checkCommand(t *testing.T, c *Command) {
	if n := c.LogLength(); n < 4 || n > 1<<34 || n%4 != 0 {
		t.Fatalf("log length %d", n)
	} else if n < 1<<32 {
		l := MakeGetLogPage(c.LID(), c.NSID(), uint32(n), c.LogOffset(), c.LogCSI(), c.RAE())
		if l.LID() != c.LID() || l.LogLength() != n || l.LogOffset() != c.LogOffset() || l.LogCSI() != c.LogCSI() || l.RAE() != c.RAE() {
			t.Fatalf("Get Log Page % x of % x", l, c)
		}
	}
	if n := c.PropertySize(); n != 0 && n != 4 && n != 8 {
		t.Fatalf("property of %d bytes", n)
	}
	if n := c.KeyLen(); n <= MaxKeyLen {
		k := c.Key()
		var d Command
		d.SetKey(k[:n])
		d.SetKV(c.KVSize(), c.KVOption())
		if got := d.Key(); !bytes.Equal(got[:n], k[:n]) || d.KeyLen() != n || d.KVSize() != c.KVSize() || d.KVOption() != c.KVOption() {
			t.Fatalf("key % x of % x", got, c)
		}
	}
	for i := range 16 {
		c.SetDW(i, c.DW(i))
	}
	if s := c.SGL(); !MakeSGL(s.ID(), s.Address(), s.Length()).same(s) {
		t.Fatalf("SGL % x", s)
	}
}

// same compares the fields of two unkeyed descriptors; bytes 12 to 14 are reserved.
func (s SGL) same(o SGL) bool {
	return s.ID() == o.ID() && s.Address() == o.Address() && s.Length() == o.Length()
}

func FuzzCommand(f *testing.F) {
	for _, b := range spdkBringUp(noDigest)[1:] {
		f.Add(b[PDUHeaderSize:CapsuleCmdSize])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var c Command
		copy(c[:], b)
		checkCommand(t, &c)
	})
}

// again checks that what was decoded into s survives encoding: decoders drop only what encoders never write.
func again(t *testing.T, s structure, size int, nqns ...string) {
	t.Helper()
	for _, nqn := range nqns {
		if len(nqn) > 255 { // a field without its terminating NUL: not what we write
			return
		}
	}
	roundTrip(t, s, size)
}

func FuzzConnectData(f *testing.F) {
	f.Add(connect(0, 0, 31, CNTLIDDynamic, 120000, noDigest)[CapsuleCmdSize:])
	f.Add(connect(0, 1, 127, 1, 0, noDigest)[CapsuleCmdSize:])
	f.Add(bytes.Repeat([]byte("n"), ConnectDataSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		var d ConnectData
		if err := d.Decode(b); (err == nil) != (len(b) >= ConnectDataSize) {
			t.Fatalf("%d bytes: %v", len(b), err)
		} else if err == nil {
			again(t, &d, ConnectDataSize, d.SubNQN, d.HostNQN)
			_, _ = CheckNQN(d.SubNQN), CheckNQN(d.HostNQN)
		}
	})
}

func FuzzIdentify(f *testing.F) {
	for _, s := range []structure{&testController, &testNamespace, &testKV, &NamespaceIDs{testID, testKey, CSIKV}} {
		b := make([]byte, IdentifySize)
		s.Encode(b)
		f.Add(b)
	}
	f.Add([]byte{NIDTUUID, 16, 0, 0, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		var ids NamespaceIDs
		if ids.Decode(b) == nil {
			again(t, &ids, IdentifySize)
		}
		var c IdentifyController
		for _, s := range []structure{&c, &IdentifyNamespace{}, &IdentifyKV{}} {
			if err := s.Decode(b); (err == nil) != (len(b) >= IdentifySize) {
				t.Fatalf("%T of %d bytes: %v", s, len(b), err)
			} else if err == nil {
				again(t, s, IdentifySize, c.SUBNQN)
			}
		}
		var nvm IdentifyNVMController
		if err := nvm.Decode(b); (err == nil) != (len(b) >= IdentifySize) {
			t.Fatalf("%d bytes: %v", len(b), err)
		}
	})
}

func FuzzPlacement(f *testing.F) {
	f.Add(testFDPConfigs)
	f.Add(testRUHStatus)
	f.Fuzz(func(t *testing.T, b []byte) {
		if cs := DecodeFDPConfigs(b); len(cs)*FDPConfigSize > len(b) {
			t.Fatalf("%d configurations in %d bytes", len(cs), len(b))
		}
		if pids := DecodePlacements(b); len(pids)*RUHSSize > len(b) {
			t.Fatalf("%d placement identifiers in %d bytes", len(pids), len(b))
		}
	})
}

func FuzzNSIDList(f *testing.F) {
	b := make([]byte, IdentifySize)
	EncodeNSIDList(b, []uint32{1, 2, 7}, 0)
	f.Add(b)
	f.Add([]byte{1, 0, 0, 0, 2, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		ids := DecodeNSIDList(b)
		if len(ids) > len(b)/4 {
			t.Fatalf("%d namespaces in %d bytes", len(ids), len(b))
		}
		if len(ids) > IdentifySize/4 {
			return
		}
		list := make([]byte, IdentifySize)
		EncodeNSIDList(list, ids, 0)
		if got := DecodeNSIDList(list); !reflect.DeepEqual(got, ids) {
			t.Fatalf("%v, want %v", got, ids)
		}
	})
}

func FuzzDiscovery(f *testing.F) {
	f.Add(EncodeDiscovery(nil, 3, []DiscoveryEntry{testDiscovery, {TRAddr: "2001:db8::1", SubNQN: DiscoveryNQN}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, _, err := DecodeDiscoveryHeader(b); err != nil || len(b) < DiscoveryHeaderSize {
			return
		}
		for b = b[DiscoveryHeaderSize:]; len(b) > 0; b = b[min(DiscoveryEntrySize, len(b)):] {
			var e, got DiscoveryEntry
			if err := e.Decode(b); (err == nil) != (len(b) >= DiscoveryEntrySize) {
				t.Fatalf("%d bytes: %v", len(b), err)
			} else if err != nil || len(e.SubNQN) > 255 {
				continue
			}
			if err := got.Decode(EncodeDiscovery(nil, 0, []DiscoveryEntry{e})[DiscoveryHeaderSize:]); err != nil || got != e {
				t.Fatalf("%+v, %v; want %+v", got, err, e)
			}
		}
	})
}

func FuzzKeyList(f *testing.F) {
	l := NewKeyList(make([]byte, 0, 4096))
	for n := 1; n <= MaxKeyLen; n++ {
		l.Add(testKey[:n])
	}
	f.Add(l.Bytes())
	f.Add([]byte{255, 255, 255, 255, 1, 0, 1, 0})
	f.Add([]byte{1, 0, 0, 0, 17, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		var keys [][]byte
		err := DecodeKeyList(b, func(k []byte) bool {
			if len(k) < 1 || len(k) > MaxKeyLen {
				t.Fatalf("key of %d bytes", len(k))
			}
			keys = append(keys, k)
			return true
		})
		if err != nil {
			return
		}
		l := NewKeyList(make([]byte, 0, 4+len(keys)*ListKeyMax))
		for _, k := range keys {
			if !l.Add(k) {
				t.Fatalf("key % x does not fit", k)
			}
		}
		var got [][]byte
		if err := DecodeKeyList(l.Bytes(), func(k []byte) bool { got = append(got, k); return true }); err != nil || !reflect.DeepEqual(got, keys) {
			t.Fatalf("%x, %v; want %x", got, err, keys)
		}
	})
}

func FuzzCheckNQN(f *testing.F) {
	for _, s := range []string{DiscoveryNQN, testSubNQN, testHostNQN, "nqn.2016-06.io.spdk:cnode1", "nqn.2026-00.x:y", "nqn.2026-01.\x00:y", strings.Repeat("n", 300)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, nqn string) {
		if CheckNQN(nqn) != nil {
			return
		}
		if len(nqn) > MaxNQN || !utf8.ValidString(nqn) || !strings.HasPrefix(nqn, "nqn.") || strings.ContainsAny(nqn, "\x00\n") {
			t.Fatalf("%q is accepted", nqn)
		}
		roundTrip(t, &ConnectData{SubNQN: nqn, HostNQN: nqn}, ConnectDataSize)
	})
}
