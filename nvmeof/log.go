package nvmeof

import (
	"fmt"
)

// Log page identifiers.
const (
	LogError             = 0x01
	LogSMART             = 0x02
	LogFirmware          = 0x03
	LogChangedNamespaces = 0x04
	LogEffects           = 0x05
	LogFDPConfigs        = 0x20
	LogDiscovery         = 0x70
)

// Sizes in bytes of log pages and their entries.
const (
	ErrorEntrySize        = 64
	SMARTSize             = 512
	FirmwareSize          = 512
	ChangedNamespacesSize = 4096
	EffectsSize           = 4096
	DiscoveryEntrySize    = 1024
	DiscoveryHeaderSize   = 1024
)

// LID is the log page identifier, CDW10 bits 7:0.
func (c *Command) LID() uint8 { return c[40] }

// RAE is Retain Asynchronous Event, CDW10 bit 15.
func (c *Command) RAE() bool { return c[41]&0x80 != 0 }

// LogLength is the length asked for in bytes: (NUMD + 1) * 4, NUMDL in CDW10 31:16 and NUMDU in CDW11 15:0.
func (c *Command) LogLength() uint64 {
	return (uint64(le.Uint16(c[42:])) | uint64(le.Uint16(c[44:]))<<16 + 1) * 4
}

// LogOffset is the log page offset in bytes, CDW12 and CDW13.
func (c *Command) LogOffset() uint64 { return le.Uint64(c[48:]) }

// LogCSI is the command set of log 05h, CDW14 bits 31:24.
func (c *Command) LogCSI() CSI { return CSI(c[59]) }

// MakeGetLogPage builds a Get Log Page of n bytes (a multiple of 4) from offset off.
func MakeGetLogPage(lid uint8, nsid uint32, n uint32, off uint64, csi CSI, rae bool) (c Command) {
	c.SetHeader(OpGetLogPage, 0, nsid)
	c[40] = lid
	if rae {
		c[41] = 0x80
	}
	numd := n/4 - 1
	le.PutUint16(c[42:], uint16(numd))
	le.PutUint16(c[44:], uint16(numd>>16))
	le.PutUint64(c[48:], off)
	c[59] = uint8(csi)
	return c
}

// Commands Supported and Effects bits (log 05h).
const (
	EffectSupported = 1 << 0 // CSUPP
	EffectContent   = 1 << 1 // LBCC
)

// Effects is the Commands Supported and Effects log (log 05h): opcode to effects.
type Effects struct {
	Admin map[uint8]uint32
	IO    map[uint8]uint32
}

// Encode writes the log into b (4096 bytes).
func (e *Effects) Encode(b []byte) {
	clear(b[:EffectsSize])
	for op, v := range e.Admin {
		le.PutUint32(b[4*int(op):], v)
	}
	for op, v := range e.IO {
		le.PutUint32(b[1024+4*int(op):], v)
	}
}

// Transport types (TRTYPE), address families (ADRFAM), subsystem types (SUBTYPE) of discovery records.
const (
	TRTypeRDMA = 1
	TRTypeTCP  = 3

	AdrFamIPv4 = 1
	AdrFamIPv6 = 2

	SubtypeReferral  = 1
	SubtypeNVM       = 2
	SubtypeDiscovery = 3 // the current discovery subsystem
)

// TREQ of a discovery record: secure channel in bits 1:0, the rest are flags.
const (
	TREQNotRequired   = 2      // a secure channel is not required
	TREQNoFlowControl = 1 << 2 // disabling SQ flow control is supported
)

// EFLAGS bits of a discovery record.
const (
	EFlagReturnsOwnLog = 1 << 0 // DUPRETINFO
	EFlagEPCSD         = 1 << 1 // explicit persistent connection supported
)

// DiscoveryEntry is one record of the discovery log page (Base, Discovery Log Page Entry).
type DiscoveryEntry struct {
	TRType  uint8
	AdrFam  uint8
	SubType uint8
	TREQ    uint8
	PortID  uint16
	CNTLID  uint16
	ASQSZ   uint16
	EFlags  uint16
	TRSVCID string // 32 bytes
	SubNQN  string
	TRAddr  string // 256 bytes
}

// EncodeDiscovery appends the whole discovery log page, header and records, to b.
func EncodeDiscovery(b []byte, genctr uint64, entries []DiscoveryEntry) []byte {
	off := len(b)
	b = append(b, make([]byte, DiscoveryHeaderSize+len(entries)*DiscoveryEntrySize)...)
	h := b[off:]
	le.PutUint64(h, genctr)
	le.PutUint64(h[8:], uint64(len(entries)))
	for i := range entries {
		e, r := &entries[i], h[DiscoveryHeaderSize+i*DiscoveryEntrySize:]
		r[0], r[1], r[2], r[3] = e.TRType, e.AdrFam, e.SubType, e.TREQ
		le.PutUint16(r[4:], e.PortID)
		le.PutUint16(r[6:], e.CNTLID)
		le.PutUint16(r[8:], e.ASQSZ)
		le.PutUint16(r[10:], e.EFlags)
		PadString(r[32:64], e.TRSVCID)
		copy(r[256:511], e.SubNQN)
		PadString(r[512:768], e.TRAddr)
		if e.TRType == TRTypeRDMA {
			r[tsasOffset], r[tsasOffset+1], r[tsasOffset+2] = tsasQPType, tsasPRType, tsasCMS
		}
	}
	return b
}

// DecodeDiscoveryHeader reads the generation counter and the number of records.
func DecodeDiscoveryHeader(b []byte) (genctr, records uint64, err error) {
	if len(b) < 18 {
		return 0, 0, errShort
	}
	if f := le.Uint16(b[16:]); f != 0 {
		return 0, 0, fmt.Errorf("discovery log has record format %d", f)
	}
	return le.Uint64(b), le.Uint64(b[8:]), nil
}

// Decode reads one record of 1024 bytes.
func (e *DiscoveryEntry) Decode(b []byte) error {
	if len(b) < DiscoveryEntrySize {
		return errShort
	}
	*e = DiscoveryEntry{TRType: b[0], AdrFam: b[1], SubType: b[2], TREQ: b[3], PortID: le.Uint16(b[4:]), CNTLID: le.Uint16(b[6:]),
		ASQSZ: le.Uint16(b[8:]), EFlags: le.Uint16(b[10:]), TRSVCID: trim(b[32:64]), SubNQN: cstring(b[256:512]), TRAddr: trim(b[512:768])}
	return nil
}

// SMART is the part of the SMART / Health Information log (log 02h) kvof keeps. Counts are since the start.
type SMART struct {
	SpareThreshold  uint8  // percent
	Spare           uint8  // percent
	TemperatureK    uint16 // kelvin
	UnitsRead       uint64 // thousands of 512-byte units
	UnitsWritten    uint64
	Reads, Writes   uint64 // commands
	PowerOnHours    uint64
	MediaErrors     uint64
	ErrorLogEntries uint64
	Critical        uint8
}

// Encode writes the log into b (512 bytes).
func (s *SMART) Encode(b []byte) {
	clear(b[:SMARTSize])
	b[0] = s.Critical
	le.PutUint16(b[1:], s.TemperatureK)
	b[3], b[4] = s.Spare, s.SpareThreshold
	le.PutUint64(b[32:], s.UnitsRead)
	le.PutUint64(b[48:], s.UnitsWritten)
	le.PutUint64(b[64:], s.Reads)
	le.PutUint64(b[80:], s.Writes)
	le.PutUint64(b[128:], s.PowerOnHours)
	le.PutUint64(b[160:], s.MediaErrors)
	le.PutUint64(b[176:], s.ErrorLogEntries)
}

// EncodeFirmware writes the Firmware Slot Information log (log 03h) into b: one slot, active.
func EncodeFirmware(b []byte, revision string) {
	clear(b[:FirmwareSize])
	b[0] = 1
	PadString(b[8:16], revision)
}

// ErrorEntry is one entry of the Error Information log (log 01h).
type ErrorEntry struct {
	Count    uint64 // unique, ascending, 0 = invalid entry
	SQID     uint16
	CID      uint16
	Status   Status
	Location uint16 // parameter error location: byte in 7:0, bit in 10:8; FFFFh = not about one parameter
	LBA      uint64
	NSID     uint32
}

// Encode writes the entry into b (64 bytes).
func (e *ErrorEntry) Encode(b []byte) {
	clear(b[:ErrorEntrySize])
	le.PutUint64(b, e.Count)
	le.PutUint16(b[8:], e.SQID)
	le.PutUint16(b[10:], e.CID)
	le.PutUint16(b[12:], uint16(e.Status)<<1)
	le.PutUint16(b[14:], e.Location)
	le.PutUint64(b[16:], e.LBA)
	le.PutUint32(b[24:], e.NSID)
}

// Feature identifiers.
const (
	FeatArbitration    = 0x01
	FeatPower          = 0x02
	FeatTemperature    = 0x04
	FeatErrorRecovery  = 0x05
	FeatWriteCache     = 0x06
	FeatQueues         = 0x07
	FeatWriteAtomicity = 0x0A
	FeatAsyncEvent     = 0x0B
	FeatKATO           = 0x0F
	FeatHostBehavior   = 0x16
	FeatCommandSet     = 0x19 // I/O Command Set Profile
	FeatFDP            = 0x1D // Flexible Data Placement: DW0 bit 0 enabled, bits 15:8 the configuration's index
	FeatKV             = 0x20 // Key Value Configuration: CDW11 bit 0 EDNEK
	FeatSoftwareMarker = 0x80
	FeatHostID         = 0x81
	FeatNSWriteProtect = 0x84
)

// FeatSelectSupported in SEL of Get Features asks for a feature's capabilities.
const FeatSelectSupported = 3

// FID is the feature identifier, CDW10 bits 7:0.
func (c *Command) FID() uint8 { return c[40] }

// FeatureSelect is Get Features' SEL, CDW10 bits 10:8.
func (c *Command) FeatureSelect() uint8 { return c[41] & 7 }

// FeatureSave is Set Features' SV, CDW10 bit 31.
func (c *Command) FeatureSave() bool { return c[43]&0x80 != 0 }

// Asynchronous event results, DW0 of an Asynchronous Event Request: type 2:0, information 15:8, log page 23:16.
const (
	EventNamespaceChanged = 0x02 | 0x00<<8 | LogChangedNamespaces<<16
	EventDiscoveryChanged = 0x02 | 0xF0<<8 | LogDiscovery<<16
)

// DSMRangeSize is the size in bytes of one Dataset Management range.
const DSMRangeSize = 16

// DSMRange is one range of a Dataset Management command.
type DSMRange struct {
	Blocks uint32 // logical blocks
	SLBA   uint64
}

// Decode reads the range from 16 bytes.
func (r *DSMRange) Decode(b []byte) {
	r.Blocks, r.SLBA = le.Uint32(b[4:]), le.Uint64(b[8:])
}

// Encode writes the range into b (16 bytes), without context attributes.
func (r *DSMRange) Encode(b []byte) {
	le.PutUint32(b, 0)
	le.PutUint32(b[4:], r.Blocks)
	le.PutUint64(b[8:], r.SLBA)
}

// CopyRangeSize is the size in bytes of one Copy source range, descriptor format 0.
const CopyRangeSize = 32

// MaxCopyRanges is the most source ranges of one Copy.
const MaxCopyRanges = 256

// CopyRange is one source range of a Copy command.
type CopyRange struct {
	SLBA   uint64
	Blocks uint32 // logical blocks, 1 to 65536
}

// Decode reads the range from 32 bytes.
func (r *CopyRange) Decode(b []byte) {
	r.SLBA, r.Blocks = le.Uint64(b[8:]), uint32(le.Uint16(b[16:]))+1
}
