package nvmeof

import (
	"bytes"
	"encoding/hex"
	"strings"
	"testing"
)

// fields describes bytes by offset, in hexadecimal; everything else is zero.
type fields map[int]string

// bytes lays the fields out in size bytes.
func (f fields) bytes(size int) []byte {
	b := make([]byte, size)
	for off, s := range f {
		v, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
		if err != nil {
			panic(err)
		}
		if copy(b[off:], v) != len(v) {
			panic("a field is longer than its structure")
		}
	}
	return b
}

// text is a string as a field.
func text(s string) string { return hex.EncodeToString([]byte(s)) }

// spaced is a space padded string as a field of n bytes.
func spaced(s string, n int) string { return text(s + strings.Repeat(" ", n-len(s))) }

// same compares bytes and names the first that differs.
func same(t *testing.T, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	if len(got) != len(want) {
		t.Fatalf("%d bytes, want %d", len(got), len(want))
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("byte %d (%#x) differs:\n got % x\nwant % x", i, i, got[i:min(i+16, len(got))], want[i:min(i+16, len(want))])
		}
	}
}

const (
	testSubNQN  = "nqn.2026-01.io.kvof:cache"
	testHostNQN = "nqn.2014-08.org.nvmexpress:uuid:00112233-4455-6677-8899-aabbccddeeff"
)

var (
	noDigest   = Digests{}
	bothDigest = Digests{Header: true, Data: true}
	testID     = [16]byte{0, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff}
	testKey    = [16]byte{0xa0, 0xa1, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6, 0xa7, 0xa8, 0xa9, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf}
)

// capsule is a whole command capsule PDU.
func capsule(c Command, data []byte, dg Digests) []byte {
	b := make([]byte, CapsuleCmdSize+DigestSize+4)
	b = append(b[:EncodeCapsule(b, &c, len(data), 4, dg)], data...)
	if dg.Data && len(data) > 0 {
		b = le.AppendUint32(b, Digest(0, data))
	}
	return b
}

// connect is a Connect capsule with its data.
func connect(cid, qid, sqsize, cntlid uint16, kato uint32, dg Digests) []byte {
	c := MakeConnect(cid, qid, sqsize, 0, kato)
	c.SetSGL(MakeSGL(SGLOffset, 0, ConnectDataSize))
	data := make([]byte, ConnectDataSize)
	(&ConnectData{testID, cntlid, testSubNQN, testHostNQN}).Encode(data)
	return capsule(c, data, dg)
}

// spdkBringUp is what SPDK's host sends to attach a KV namespace, and to leave again, in order.
func spdkBringUp(dg Digests) (pdus [][]byte) {
	icreq := make([]byte, ICSize)
	EncodeIC(icreq, PDUICReq, IC{Digest: dg})
	pdus = append(pdus, icreq, connect(0, 0, 31, CNTLIDDynamic, 120000, dg))
	send := func(c Command, read uint32) {
		c.SetCID(uint16(len(pdus)))
		if read > 0 {
			c.SetSGL(MakeSGL(SGLTransport, 0, read))
		}
		pdus = append(pdus, capsule(c, nil, dg))
	}
	feature := func(op, fid uint8, v uint32) (c Command) {
		c.SetHeader(op, 0, 0)
		c.SetDW(10, uint32(fid))
		c.SetDW(11, v)
		return c
	}
	send(MakePropertyGet(PropVS, 4), 0)
	send(MakePropertyGet(PropCAP, 8), 0)
	send(MakePropertyGet(PropCC, 4), 0)
	send(MakePropertyGet(PropCSTS, 4), 0)
	send(MakePropertySet(PropCC, 0x460061), 0)
	send(MakePropertyGet(PropCSTS, 4), 0)
	send(MakeIdentify(CNSController, 0, 0), IdentifySize)
	send(feature(OpSetFeatures, FeatAsyncEvent, AENNamespace), 0)
	for range 4 {
		send(feature(OpAsyncEvent, 0, 0), 0)
	}
	send(feature(OpGetFeatures, FeatKATO, 0), 0)
	for _, csi := range []CSI{0, 2, 1} {
		send(MakeIdentify(CNSControllerCSI, 0, csi), IdentifySize)
	}
	send(feature(OpSetFeatures, FeatQueues, 0x007F007F), 0)
	send(MakeIdentify(CNSActiveList, 0, 0), IdentifySize)
	send(MakeIdentify(CNSNamespace, 1, 0), IdentifySize)
	send(MakeIdentify(CNSDescriptors, 1, 0), IdentifySize)
	send(MakeIdentify(CNSNamespaceCSI, 1, CSIKV), IdentifySize)
	pdus = append(pdus, connect(0, 1, 127, 1, 0, dg))
	send(MakePropertySet(PropCC, 0x464061), 0)
	send(MakePropertyGet(PropCSTS, 4), 0)
	return pdus
}

func TestGoldenCommands(t *testing.T) {
	kv := func(op uint8, key []byte, size uint32, opt uint8) (c Command) {
		c.SetHeader(op, 0x1007, 1)
		c.SetKey(key)
		c.SetKV(size, opt)
		if size > 0 {
			c.SetSGL(MakeSGL(SGLTransport, 0, size))
		}
		return c
	}
	with := func(c Command, cid uint16, length uint32) Command {
		c.SetCID(cid)
		c.SetSGL(MakeSGL(SGLTransport, 0, length))
		return c
	}
	for name, tc := range map[string]struct {
		got  Command
		want fields
	}{
		"Store, if absent": {kv(OpStore, testKey[:], 2<<20, StoreIfAbsent), fields{
			0: "01 40 0710 01000000", 8: "a0a1a2a3a4a5a6a7", 24: "0000000000000000 00002000 000000 5a",
			40: "00002000", 44: "10 02", 56: "a8a9aaabacadaeaf"}},
		"Retrieve": {kv(OpRetrieve, testKey[:], 4096, 0), fields{
			0: "02 40 0710 01000000", 8: "a0a1a2a3a4a5a6a7", 32: "00100000", 39: "5a", 40: "00100000", 44: "10", 56: "a8a9aaabacadaeaf"}},
		"Exist, short key":         {kv(OpExist, []byte{0, 0}, 0, 0), fields{0: "14 40 0710 01000000", 44: "02"}},
		"Delete, key of 9 bytes":   {kv(OpDelete, testKey[:9], 0, 0), fields{0: "10 40 0710 01000000", 8: "a0a1a2a3a4a5a6a7", 44: "09", 56: "a8"}},
		"List, from the beginning": {kv(OpList, nil, 4096, 0), fields{0: "06 40 0710 01000000", 32: "00100000", 39: "5a", 40: "00100000"}},
		"Identify KV namespace":    {with(MakeIdentify(CNSNamespaceCSI, 1, CSIKV), 2, 4096), fields{0: "06 40 0200 01000000", 32: "00100000", 39: "5a", 40: "05", 47: "01"}},
		"Get Log Page, effects of KV": {with(MakeGetLogPage(LogEffects, BroadcastNSID, 4096, 0, CSIKV, true), 3, 4096), fields{
			0: "02 40 0300 ffffffff", 32: "00100000", 39: "5a", 40: "05 80 ff03", 59: "01"}},
		"Get Log Page, large": {MakeGetLogPage(LogDiscovery, 0, 1<<20, 1<<33, 0, false), fields{0: "02 40", 40: "70 00 ffff 0300", 52: "02"}},
		"Property Get CAP":    {MakePropertyGet(PropCAP, 8), fields{0: "7f 40 0000 04", 40: "01"}},
		"Property Get CSTS":   {MakePropertyGet(PropCSTS, 4), fields{0: "7f 40 0000 04", 44: "1c"}},
		"Property Set CC":     {MakePropertySet(PropCC, 0x460061), fields{0: "7f 40 0000 00", 44: "14", 48: "61004600"}},
	} {
		t.Run(name, func(t *testing.T) { same(t, tc.got[:], tc.want.bytes(CommandSize)) })
	}
}

func TestGoldenPDUs(t *testing.T) {
	encode := func(f func(b []byte) int) []byte {
		b := bytes.Repeat([]byte{0xEE}, MaxPDUHeader+DigestSize+128) // encoders must not count on zeroed memory
		return b[:f(b)]
	}
	ic := func(typ uint8, ic IC) []byte {
		return encode(func(b []byte) int { EncodeIC(b, typ, ic); return ICSize })
	}
	spdk, linux := spdkBringUp(noDigest), spdkBringUp(bothDigest)
	success := MakeCompletion(4096, 0, 5, 1, 0x1007, Success)
	absent := MakeCompletion(0, 0, 6, 1, 0x1008, KeyDoesNotExist|DNR)
	for name, tc := range map[string]struct {
		got  []byte
		size int
		want fields
	}{
		"ICReq, SPDK and Linux":  {spdk[0], 128, fields{0: "00 00 80 00 80000000"}},
		"ICReq with digests":     {linux[0], 128, fields{0: "00 00 80 00 80000000", 11: "03"}},
		"ICReq, MAXR2T and HPDA": {ic(PDUICReq, IC{PDA: 31, Digest: Digests{Data: true}, Max: 15}), 128, fields{0: "00 00 80 00 80000000", 10: "1f 02 0f000000"}},
		"ICResp":                 {ic(PDUICResp, IC{Digest: Digests{Header: true}, Max: 128 << 10}), 128, fields{0: "01 00 80 00 80000000", 11: "01 00000200"}},
		"Connect, SPDK": {spdk[1], 1096, fields{
			0: "04 00 48 48 48040000", 8: "7f 40 0000 01", 32: "0000000000000000 00040000 000000 01",
			48: "0000 0000 1f00 00 00 c0d40100", 72: "00112233445566778899aabbccddeeff ffff",
			72 + 256: text(testSubNQN), 72 + 512: text(testHostNQN)}},
		"Connect, Linux": {connect(0x1000, 0, 31, CNTLIDDynamic, 5000, noDigest), 1096, fields{
			0: "04 00 48 48 48040000", 8: "7f 40 0010 01", 32: "0000000000000000 00040000 000000 01",
			48: "0000 0000 1f00 00 00 88130000", 72: "00112233445566778899aabbccddeeff ffff",
			72 + 256: text(testSubNQN), 72 + 512: text(testHostNQN)}},
		"Identify with header digest": {capsule(func() Command {
			c := MakeIdentify(CNSController, 0, 0)
			c.SetCID(1)
			c.SetSGL(MakeSGL(SGLTransport, 0, 4096))
			return c
		}(), nil, bothDigest), 76, fields{0: "04 01 48 00 4c000000", 8: "06 40 0100", 40: "00100000", 47: "5a", 48: "01", 72: "33645f44"}},
		"response": {encode(func(b []byte) int { return EncodeResponse(b, &absent, noDigest) }), 24, fields{
			0: "05 00 18 00 18000000", 16: "0600 0100 0810 0e81"}},
		"response with digest": {encode(func(b []byte) int { return EncodeResponse(b, &success, bothDigest) }), 28, fields{
			0: "05 01 18 00 1c000000", 8: "00100000 00000000 0500 0100 0710 0000", 24: "bea53603"}},
		"C2HData": {encode(func(b []byte) int {
			return EncodeData(b, PDUC2HData, FlagLast|FlagSuccess, 0x1007, 0, 8192, 4096, 4, noDigest)
		}), 24, fields{0: "07 0c 18 18 18100000 0710 0000 00200000 00100000"}},
		"C2HData with digests": {encode(func(b []byte) int { return EncodeData(b, PDUC2HData, FlagLast, 0x1007, 0, 0, 4096, 4, bothDigest) }), 28, fields{
			0: "07 07 18 1c 20100000 0710 0000 00000000 00100000", 24: "d0778b3e"}},
		"C2HData, padded": {encode(func(b []byte) int { return EncodeData(b, PDUC2HData, 0, 0x1007, 0, 0, 512, 128, noDigest) }), 128, fields{
			0: "07 00 18 80 80020000 0710 0000 00000000 00020000"}},
		"H2CData": {encode(func(b []byte) int { return EncodeData(b, PDUH2CData, FlagLast, 0x1007, 0x22, 0, 5, 4, noDigest) }), 24, fields{
			0: "06 04 18 18 1d000000 0710 2200 00000000 05000000"}},
		"R2T": {encode(func(b []byte) int { return EncodeR2T(b, 0x1007, 0x22, 1<<17, 1<<20, noDigest) }), 24, fields{
			0: "09 00 18 00 18000000 0710 2200 00000200 00001000"}},
		"C2HTermReq": {AppendTerm(nil, PDUC2HTermReq, &TermError{FES: FESInvalidField, FEI: 2}, []byte{4, 0, 71, 0, 72, 0, 0, 0}), 32, fields{
			0: "03 00 18 00 20000000 0100 02000000", 24: "04 00 47 00 48000000"}},
	} {
		t.Run(name, func(t *testing.T) { same(t, tc.got, tc.want.bytes(tc.size)) })
	}
}

func TestGoldenStructures(t *testing.T) {
	encode := func(size int, f func(b []byte)) []byte {
		b := bytes.Repeat([]byte{0xEE}, size)
		f(b)
		return b
	}
	for name, tc := range map[string]struct {
		got  []byte
		want fields
	}{
		"Identify Controller": {encode(4096, testController.Encode), fields{
			0: "361d 361d", 4: spaced("KV0001", 20), 24: spaced("kvof", 40), 64: spaced("1.0", 8), 76: "0a 05 0700 00000200",
			92: "00010080", 96: "41000000", 111: "01", 256: "0201 03 04 03 06 07", 320: "0a00", 512: "66 44 8000 00040000 8d00",
			525: "07 0100 0200", 534: "0300", 536: "05001000", 540: "20000000", 768: text(testSubNQN), 1792: "0402 0000 01000000 0000 01 10"}},
		"Identify Namespace": {encode(4096, testNamespace.Encode), fields{
			0: "0000100000000000", 8: "0100100000000000", 16: "0200000000000000", 24: "11", 30: "01", 33: "09",
			34: "1100 1200 1300 1c00 1d00 1e00 1400", 64: "0700 1500 1600 1700 1800 1900 1a000000 1b", 99: "01", 102: "0100",
			104: "00112233445566778899aabbccddeeff", 120: "0102030405060708", 128: "0800 0c"}},
		"Identify KV Namespace": {encode(4096, testKV.Encode), fields{
			0: "0000000001000000", 16: "0000000000010000", 26: "01", 32: "00000400", 43: "01",
			48: "00112233445566778899aabbccddeeff", 64: "0102030405060708", 72: "1000 0000 00000004 40420f00"}},
		"I/O Command Set Independent Identify Namespace": {encode(4096, (&IdentifyCommon{NMIC: 1, NSATTR: 1, NSTAT: 1}).Encode), fields{1: "01", 8: "01", 14: "01"}},
		"Identify Controller, Key Value":                 {encode(4096, EncodeKVController), fields{0: "00030100"}},
		"namespace identification descriptors": {encode(4096, (&NamespaceIDs{testID, testKey, CSIKV}).Encode), fields{
			0: "02 10", 4: "00112233445566778899aabbccddeeff", 20: "03 10", 24: "a0a1a2a3a4a5a6a7a8a9aaabacadaeaf", 40: "04 01", 44: "01"}},
		"namespace list":  {encode(4096, func(b []byte) { EncodeNSIDList(b, []uint32{1, 2, 300}, 1) }), fields{0: "02000000 2c010000"}},
		"controller list": {encode(4096, func(b []byte) { EncodeControllerList(b, []uint16{1, 2, 300}, 2) }), fields{0: "0200 0200 2c01"}},
		"effects log": {encode(4096, (&Effects{Admin: map[uint8]uint32{OpKeepAlive: EffectSupported}, IO: map[uint8]uint32{
			OpStore: EffectSupported | EffectContent, OpExist: EffectSupported}}).Encode), fields{4 * 0x18: "01", 1024 + 4: "03", 1024 + 4*0x14: "01"}},
		"SMART log": {encode(512, (&SMART{SpareThreshold: 10, Spare: 100, TemperatureK: 300, UnitsRead: 1, UnitsWritten: 2, Reads: 3,
			Writes: 4, PowerOnHours: 5, MediaErrors: 6, ErrorLogEntries: 7, Critical: 8}).Encode), fields{
			0: "08 2c01 64 0a", 32: "01", 48: "02", 64: "03", 80: "04", 128: "05", 160: "06", 176: "07"}},
		"firmware log": {encode(512, func(b []byte) { EncodeFirmware(b, "1.0") }), fields{0: "01", 8: spaced("1.0", 8)}},
		"error log": {encode(64, (&ErrorEntry{Count: 1, SQID: 2, CID: 3, Status: InvalidField | DNR, Location: 40, LBA: 5, NSID: 6}).Encode), fields{
			0: "01", 8: "0200 0300 0480 2800 05", 24: "06"}},
		"discovery log": {EncodeDiscovery(nil, 7, []DiscoveryEntry{testDiscovery}), fields{
			0: "07", 8: "01", 1024: "03 01 02 04 0300 ffff 2000 0100", 1024 + 32: spaced("4420", 32),
			1024 + 256: text(testSubNQN), 1024 + 512: spaced("192.0.2.1", 256)}},
		"Dataset Management range": {encode(DSMRangeSize, (&DSMRange{8, 256}).Encode), fields{4: "08000000 0001"}},
		"SGL, keyed":               {func() []byte { s := MakeSGL(SGLKeyed, 0x1122334455667788, 4096); return s[:] }(), fields{0: "8877665544332211 00100000 000000 40"}},
	} {
		t.Run(name, func(t *testing.T) { same(t, tc.got, tc.want.bytes(len(tc.got))) })
	}
}

var (
	testController = IdentifyController{VID: 0x1d36, Serial: "KV0001", Model: "kvof", Firmware: "1.0", CMIC: 0x0a, MDTS: 5, CNTLID: 7,
		VER: VersionNVMe20, OAES: AENNamespace | AENDiscovery, CTRATT: CTRATT128BitHostID | CTRATTTBKAS, CNTRLTYPE: ControllerIO,
		OACS: 0x0102, ACL: 3, AERL: 4, LPA: 6, ELPE: 7, KAS: 10, MAXCMD: 128, NN: 1024,
		ONCS: ONCSCompare | ONCSDSM | ONCSWriteZeroes | ONCSVerify, VWC: 7, AWUN: 1, AWUPF: 2, OCFS: 3, SGLS: 0x100005, MNAN: 32, SUBNQN: testSubNQN,
		IOCCSZ: 0x204, IORCSZ: 1, FCATT: 1, MSDBD: 16}
	testNamespace = IdentifyNamespace{NSZE: 1 << 20, NCAP: 1<<20 + 1, NUSE: 2, NSFEAT: 0x11, NMIC: 1, DLFEAT: 9, NSATTR: 1, NGUID: testID,
		EUI64: [8]byte{1, 2, 3, 4, 5, 6, 7, 8}, LBADS: 12, MS: 8, ENDGID: 1, Limits: NamespaceLimits{NAWUN: 0x11, NAWUPF: 0x12, NACWU: 0x13, NABSN: 0x1c, NABO: 0x1d, NABSPF: 0x1e, NOIOB: 0x14, NPWG: 7,
			NPWA: 0x15, NPDG: 0x16, NPDA: 0x17, NOWS: 0x18, MSSRL: 0x19, MCL: 0x1a, MSRC: 0x1b}}
	testKV = IdentifyKV{NSZE: 1 << 32, NUSE: 1 << 40, NMIC: 1, NOVG: 256 << 10, NSATTR: 1, NGUID: testID,
		EUI64: [8]byte{1, 2, 3, 4, 5, 6, 7, 8}, MaxKey: 16, MaxValue: 64 << 20, MaxKeys: 1000000}
	testDiscovery = DiscoveryEntry{TRType: TRTypeTCP, AdrFam: AdrFamIPv4, SubType: SubtypeNVM, TREQ: TREQNoFlowControl, PortID: 3,
		CNTLID: CNTLIDDynamic, ASQSZ: 32, EFlags: EFlagReturnsOwnLog, TRSVCID: "4420", SubNQN: testSubNQN, TRAddr: "192.0.2.1"}
)
