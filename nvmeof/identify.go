package nvmeof

import "errors"

// IdentifySize is the size in bytes of every Identify data structure.
const IdentifySize = 4096

// CNS values of Identify (Base, Identify: Controller or Namespace Structure).
const (
	CNSNamespace          = 0x00
	CNSController         = 0x01
	CNSActiveList         = 0x02
	CNSDescriptors        = 0x03
	CNSNamespaceCSI       = 0x05
	CNSControllerCSI      = 0x06
	CNSActiveListCSI      = 0x07
	CNSNamespaceCommon    = 0x08 // I/O Command Set Independent Identify Namespace
	CNSAllocatedList      = 0x10
	CNSAllocatedNamespace = 0x11
	CNSNamespaceCtrlList  = 0x12
	CNSControllerList     = 0x13
	CNSCommandSets        = 0x1C
)

// CNS is the structure asked for, CDW10 bits 7:0.
func (c *Command) CNS() uint8 { return c[40] }

// IdentifyCNTID is CDW10 bits 31:16.
func (c *Command) IdentifyCNTID() uint16 { return le.Uint16(c[42:]) }

// IdentifyCSI is the command set, CDW11 bits 31:24.
func (c *Command) IdentifyCSI() CSI { return CSI(c[47]) }

// MakeIdentify builds an Identify command.
func MakeIdentify(cns uint8, nsid uint32, csi CSI) (c Command) {
	c.SetHeader(OpIdentify, 0, nsid)
	c[40], c[47] = cns, uint8(csi)
	return c
}

// Controller types (CNTRLTYPE).
const (
	ControllerIO        = 1
	ControllerDiscovery = 2
)

// OAES bits: events a host may enable with feature 0Bh.
const (
	AENNamespace = 1 << 8
	AENDiscovery = 1 << 31
)

// CTRATT bits.
const (
	CTRATT128BitHostID = 1 << 0
	CTRATTTBKAS        = 1 << 6  // Traffic Based Keep Alive
	CTRATTFDP          = 1 << 19 // Flexible Data Placement
)

// ONCS bits.
const (
	ONCSCompare     = 1 << 0
	ONCSDSM         = 1 << 2
	ONCSWriteZeroes = 1 << 3
	ONCSVerify      = 1 << 7
	ONCSCopy        = 1 << 8
)

// IdentifyController is the part of the Identify Controller structure (CNS 01h) that kvof fills or reads.
type IdentifyController struct {
	VID       uint16
	Serial    string // 20 bytes
	Model     string // 40 bytes
	Firmware  string // 8 bytes
	CMIC      uint8  // bit 0: several ports, bit 1: several controllers, bit 3: ANA
	MDTS      uint8  // power of two of the page size; 0 = no limit
	CNTLID    uint16
	VER       uint32
	OAES      uint32
	CTRATT    uint32
	CNTRLTYPE uint8
	OACS      uint16
	ACL       uint8 // 0's based
	AERL      uint8 // 0's based
	LPA       uint8 // bit 1: effects log, bit 2: extended data
	ELPE      uint8 // 0's based
	KAS       uint16
	MAXCMD    uint16
	NN        uint32 // highest NSID
	ONCS      uint16
	VWC       uint8  // bit 0: volatile write cache present; bits 2:1 = 11b: Flush with NSID FFFFFFFFh supported
	AWUN      uint16 // atomic write unit normally, logical blocks, 0's based
	AWUPF     uint16 // and across a power failure
	OCFS      uint16 // bit n: Copy descriptor format n supported
	SGLS      uint32
	MNAN      uint32
	SUBNQN    string
	IOCCSZ    uint32 // in 16-byte units
	IORCSZ    uint32 // in 16-byte units
	ICDOFF    uint16 // in 16-byte units
	FCATT     uint8
	MSDBD     uint8
}

// Encode writes the structure into b (4096 bytes).
func (d *IdentifyController) Encode(b []byte) {
	clear(b[:IdentifySize])
	le.PutUint16(b[0:], d.VID)
	le.PutUint16(b[2:], d.VID)
	PadString(b[4:24], d.Serial)
	PadString(b[24:64], d.Model)
	PadString(b[64:72], d.Firmware)
	b[76], b[77] = d.CMIC, d.MDTS
	le.PutUint16(b[78:], d.CNTLID)
	le.PutUint32(b[80:], d.VER)
	le.PutUint32(b[92:], d.OAES)
	le.PutUint32(b[96:], d.CTRATT)
	b[111] = d.CNTRLTYPE
	le.PutUint16(b[256:], d.OACS)
	b[258], b[259], b[261], b[262] = d.ACL, d.AERL, d.LPA, d.ELPE
	le.PutUint16(b[320:], d.KAS)
	if d.CNTRLTYPE == ControllerIO {
		b[260] = 0x03               // FRMW: one firmware slot, read-only
		b[512], b[513] = 0x66, 0x44 // SQES, CQES
	}
	le.PutUint16(b[514:], d.MAXCMD)
	le.PutUint32(b[516:], d.NN)
	le.PutUint16(b[520:], d.ONCS)
	b[525] = d.VWC
	le.PutUint16(b[526:], d.AWUN)
	le.PutUint16(b[528:], d.AWUPF)
	le.PutUint16(b[534:], d.OCFS)
	le.PutUint32(b[536:], d.SGLS)
	le.PutUint32(b[540:], d.MNAN)
	copy(b[768:1023], d.SUBNQN)
	le.PutUint32(b[1792:], d.IOCCSZ)
	le.PutUint32(b[1796:], d.IORCSZ)
	le.PutUint16(b[1800:], d.ICDOFF)
	b[1802], b[1803] = d.FCATT, d.MSDBD
}

// Decode reads the structure from b.
func (d *IdentifyController) Decode(b []byte) error {
	if len(b) < IdentifySize {
		return errShort
	}
	*d = IdentifyController{
		VID: le.Uint16(b), Serial: trim(b[4:24]), Model: trim(b[24:64]), Firmware: trim(b[64:72]), CMIC: b[76], MDTS: b[77],
		CNTLID: le.Uint16(b[78:]), VER: le.Uint32(b[80:]), OAES: le.Uint32(b[92:]), CTRATT: le.Uint32(b[96:]),
		CNTRLTYPE: b[111], OACS: le.Uint16(b[256:]), ACL: b[258], AERL: b[259], LPA: b[261], ELPE: b[262],
		KAS: le.Uint16(b[320:]), MAXCMD: le.Uint16(b[514:]), NN: le.Uint32(b[516:]), ONCS: le.Uint16(b[520:]), VWC: b[525],
		AWUN: le.Uint16(b[526:]), AWUPF: le.Uint16(b[528:]), OCFS: le.Uint16(b[534:]), SGLS: le.Uint32(b[536:]), MNAN: le.Uint32(b[540:]), SUBNQN: cstring(b[768:1024]), IOCCSZ: le.Uint32(b[1792:]),
		IORCSZ: le.Uint32(b[1796:]), ICDOFF: le.Uint16(b[1800:]), FCATT: b[1802], MSDBD: b[1803],
	}
	return nil
}

var errShort = errors.New("data structure is too short")

// trim reads a space padded field.
func trim(b []byte) string {
	n := len(b)
	for n > 0 && (b[n-1] == ' ' || b[n-1] == 0) {
		n--
	}
	return string(b[:n])
}

// IdentifyNamespace is the NVM command set's Identify Namespace structure (CNS 00h). KV namespaces answer it too,
// with sizes in units of their nominal LBA, because SPDK's host drops a namespace that does not.
type IdentifyNamespace struct {
	NSZE, NCAP, NUSE uint64 // logical blocks
	NSFEAT           uint8  // NSFEAT bits below
	NMIC             uint8  // bit 0: shared
	DLFEAT           uint8  // bits 2:0 = 001b: deallocated blocks read as zeroes; bit 3: Write Zeroes takes DEAC
	NSATTR           uint8  // bit 0: write protected
	NGUID            [16]byte
	EUI64            [8]byte
	ENDGID           uint16 // endurance group
	LBADS            uint8  // log2 of the LBA size in bytes
	MS               uint16 // bytes of metadata for each LBA
	Limits           NamespaceLimits
}

// NSFEAT bits.
const (
	NSFEATThin     = 1 << 0
	NSFEATAtomic   = 1 << 1 // NAWUN, NAWUPF and NACWU are the namespace's own
	NSFEATOptimal  = 1 << 4 // NPWG, NPWA, NPDG, NPDA and NOWS are there
	nsfeatOptimal3 = 3 << 4 // the same in later versions: not 00b
)

// NamespaceLimits is what a drive asks of the I/O to a namespace: the fields of IdentifyNamespace that a target hands on
// to its hosts when it hands on their commands. All count logical blocks; 0's based unless it says otherwise.
type NamespaceLimits struct {
	NAWUN, NAWUPF, NACWU uint16 // atomic write units, normal and across a power failure, and atomic compare and write unit
	NABSN, NABO, NABSPF  uint16 // boundaries that atomic writes do not cross, normal, their offset (not 0's based), and across a power failure
	NOIOB                uint16 // optimal I/O boundary, not 0's based
	NPWG, NPWA           uint16 // preferred write granularity and alignment
	NPDG, NPDA           uint16 // preferred deallocate granularity and alignment
	NOWS                 uint16 // optimal write size
	MSSRL                uint16 // most blocks of one Copy source range, not 0's based
	MCL                  uint32 // most blocks of one Copy, not 0's based
	MSRC                 uint8  // most source ranges of one Copy
}

// Encode writes the structure into b (4096 bytes).
func (d *IdentifyNamespace) Encode(b []byte) {
	clear(b[:IdentifySize])
	le.PutUint64(b[0:], d.NSZE)
	le.PutUint64(b[8:], d.NCAP)
	le.PutUint64(b[16:], d.NUSE)
	b[24], b[30], b[33] = d.NSFEAT, d.NMIC, d.DLFEAT
	l := &d.Limits
	for off, v := range map[int]uint16{34: l.NAWUN, 36: l.NAWUPF, 38: l.NACWU, 40: l.NABSN, 42: l.NABO, 44: l.NABSPF, 46: l.NOIOB, 64: l.NPWG, 66: l.NPWA, 68: l.NPDG, 70: l.NPDA,
		72: l.NOWS, 74: l.MSSRL, 102: d.ENDGID, 128: d.MS} {
		le.PutUint16(b[off:], v)
	}
	le.PutUint32(b[76:], l.MCL)
	b[80] = l.MSRC
	b[99] = d.NSATTR
	copy(b[104:], d.NGUID[:])
	copy(b[120:], d.EUI64[:])
	b[130] = d.LBADS // LBAF0
}

// Decode reads the structure; LBADS and MS are those of the format in use.
func (d *IdentifyNamespace) Decode(b []byte) error {
	if len(b) < IdentifySize {
		return errShort
	}
	u16 := func(off int) uint16 { return le.Uint16(b[off:]) }
	format := int(b[26] & 15)
	if b[25] >= 16 { // NLBAF: more formats than the low bits tell apart
		format |= int(b[26]>>5&3) << 4
	}
	lbaf := b[128+4*format:]
	*d = IdentifyNamespace{NSZE: le.Uint64(b), NCAP: le.Uint64(b[8:]), NUSE: le.Uint64(b[16:]), NSFEAT: b[24], NMIC: b[30],
		DLFEAT: b[33], NSATTR: b[99], NGUID: [16]byte(b[104:]), EUI64: [8]byte(b[120:]), ENDGID: u16(102), MS: le.Uint16(lbaf), LBADS: lbaf[2],
		Limits: NamespaceLimits{NAWUN: u16(34), NAWUPF: u16(36), NACWU: u16(38), NABSN: u16(40), NABO: u16(42), NABSPF: u16(44), NOIOB: u16(46), NPWG: u16(64), NPWA: u16(66), NPDG: u16(68),
			NPDA: u16(70), NOWS: u16(72), MSSRL: u16(74), MCL: le.Uint32(b[76:]), MSRC: b[80]}}
	return nil
}

// Optimal tells whether NPWG, NPWA, NPDG, NPDA and NOWS mean anything.
func (d *IdentifyNamespace) Optimal() bool { return d.NSFEAT&nsfeatOptimal3 != 0 }

// IdentifyNVMController is the NVM command set's Identify Controller structure (CNS 06h, CSI 00h). 0 is no limit.
type IdentifyNVMController struct {
	VSL   uint8  // most data of one Verify, a power of two of the smallest page
	WZSL  uint8  // of one Write Zeroes
	DMRL  uint8  // most ranges of one Dataset Management
	DMRSL uint32 // most logical blocks of one of its ranges
	DMSL  uint64 // most logical blocks of all of its ranges
}

// Decode reads the structure.
func (d *IdentifyNVMController) Decode(b []byte) error {
	if len(b) < IdentifySize {
		return errShort
	}
	*d = IdentifyNVMController{VSL: b[0], WZSL: b[1], DMRL: b[3], DMRSL: le.Uint32(b[4:]), DMSL: le.Uint64(b[8:])}
	return nil
}

// IdentifyKV is the Key Value command set's Identify Namespace structure (CNS 05h, CSI 01h).
type IdentifyKV struct {
	NSZE, NUSE uint64 // bytes
	NMIC       uint8  // bit 0: shared
	NOVG       uint32 // optimal value granularity, bytes
	NSATTR     uint8  // bit 0: write protected
	NGUID      [16]byte
	EUI64      [8]byte
	MaxKey     uint16 // bytes
	MaxValue   uint32 // bytes
	MaxKeys    uint32 // 0 = none stated
}

// Encode writes the structure into b (4096 bytes), with one format.
func (d *IdentifyKV) Encode(b []byte) {
	clear(b[:IdentifySize])
	le.PutUint64(b[0:], d.NSZE)
	le.PutUint64(b[16:], d.NUSE)
	b[26] = d.NMIC
	le.PutUint32(b[32:], d.NOVG)
	b[43] = d.NSATTR
	copy(b[48:], d.NGUID[:])
	copy(b[64:], d.EUI64[:])
	le.PutUint16(b[72:], d.MaxKey)
	le.PutUint32(b[76:], d.MaxValue)
	le.PutUint32(b[80:], d.MaxKeys)
}

// Decode reads the structure and the format in use.
func (d *IdentifyKV) Decode(b []byte) error {
	if len(b) < IdentifySize {
		return errShort
	}
	f := b[72+16*int(b[29]&15):]
	*d = IdentifyKV{NSZE: le.Uint64(b), NUSE: le.Uint64(b[16:]), NMIC: b[26], NOVG: le.Uint32(b[32:]), NSATTR: b[43],
		NGUID: [16]byte(b[48:]), EUI64: [8]byte(b[64:]), MaxKey: le.Uint16(f), MaxValue: le.Uint32(f[4:]), MaxKeys: le.Uint32(f[8:])}
	return nil
}

// IdentifyCommon is the I/O Command Set Independent Identify Namespace structure (CNS 08h).
type IdentifyCommon struct {
	NMIC   uint8
	NSATTR uint8 // bit 0: write protected
	NSTAT  uint8 // bit 0: ready
}

// Encode writes the structure into b (4096 bytes).
func (d *IdentifyCommon) Encode(b []byte) {
	clear(b[:IdentifySize])
	b[1], b[8], b[14] = d.NMIC, d.NSATTR, d.NSTAT
}

// Namespace identifier types (NIDT) of CNS 03h.
const (
	NIDTEUI64 = 1
	NIDTNGUID = 2
	NIDTUUID  = 3
	NIDTCSI   = 4
)

// NamespaceIDs are the identification descriptors of a namespace (CNS 03h). Zero identifiers are left out.
type NamespaceIDs struct {
	NGUID [16]byte
	UUID  [16]byte
	CSI   CSI
}

// Encode writes the descriptors into b (4096 bytes).
func (d *NamespaceIDs) Encode(b []byte) {
	clear(b[:IdentifySize])
	put := func(t uint8, v []byte) {
		b[0], b[1] = t, uint8(len(v))
		copy(b[4:], v)
		b = b[4+len(v):]
	}
	if d.NGUID != [16]byte{} {
		put(NIDTNGUID, d.NGUID[:])
	}
	if d.UUID != [16]byte{} {
		put(NIDTUUID, d.UUID[:])
	}
	put(NIDTCSI, []byte{uint8(d.CSI)})
}

// Decode reads the descriptors; unknown ones are skipped.
func (d *NamespaceIDs) Decode(b []byte) error {
	*d = NamespaceIDs{}
	for len(b) >= 4 && b[1] != 0 {
		n := int(b[1])
		if len(b) < 4+n {
			return errShort
		}
		v := b[4 : 4+n]
		switch {
		case b[0] == NIDTNGUID && n == 16:
			d.NGUID = [16]byte(v)
		case b[0] == NIDTUUID && n == 16:
			d.UUID = [16]byte(v)
		case b[0] == NIDTCSI && n == 1:
			d.CSI = CSI(v[0])
		}
		b = b[4+n:]
	}
	return nil
}

// KVVersion is the Key Value command set version of CNS 06h, CSI 01h, at offset 0.
const KVVersion = 0x00010300

// EncodeKVController writes the Key Value command set's Identify Controller structure (CNS 06h, CSI 01h) into b.
func EncodeKVController(b []byte) {
	clear(b[:IdentifySize])
	le.PutUint32(b, KVVersion)
}

// EncodeNSIDList writes a namespace list (CNS 02h, 07h): those of ids above after, ascending as given, at most 1024.
func EncodeNSIDList(b []byte, ids []uint32, after uint32) {
	clear(b[:IdentifySize])
	n := 0
	for _, id := range ids {
		if id > after && n < IdentifySize/4 {
			le.PutUint32(b[4*n:], id)
			n++
		}
	}
}

// DecodeNSIDList reads a namespace list up to its first zero.
func DecodeNSIDList(b []byte) (ids []uint32) {
	for len(b) >= 4 && le.Uint32(b) != 0 {
		ids = append(ids, le.Uint32(b))
		b = b[4:]
	}
	return ids
}

// EncodeControllerList writes a controller list (CNS 12h, 13h): u16 count, then the identifiers not below from.
func EncodeControllerList(b []byte, ids []uint16, from uint16) {
	clear(b[:IdentifySize])
	n := 0
	for _, id := range ids {
		if id >= from && n < 2047 {
			n++
			le.PutUint16(b[2*n:], id)
		}
	}
	le.PutUint16(b, uint16(n))
}
