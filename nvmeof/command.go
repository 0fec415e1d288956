package nvmeof

import "encoding/binary"

var le = binary.LittleEndian

// Sizes in bytes of the queue entries (Base, figures "Submission Queue Entry", "Completion Queue Entry").
const (
	CommandSize    = 64
	CompletionSize = 16
)

// BroadcastNSID addresses all namespaces (Base, NSID).
const BroadcastNSID = 0xFFFFFFFF

// Opcode values. Bits 1:0 of every opcode give the direction of its data, see [Command.Direction].
const (
	OpFabrics = 0x7F

	// Admin.
	OpGetLogPage  = 0x02
	OpIdentify    = 0x06
	OpAbort       = 0x08
	OpSetFeatures = 0x09
	OpGetFeatures = 0x0A
	OpAsyncEvent  = 0x0C
	OpKeepAlive   = 0x18

	// I/O, all command sets.
	OpFlush = 0x00

	// NVM command set.
	OpWrite       = 0x01
	OpRead        = 0x02
	OpCompare     = 0x05
	OpWriteZeroes = 0x08
	OpDSM         = 0x09 // Dataset Management
	OpVerify      = 0x0C
	OpCopy        = 0x19
	OpIOMgmtRecv  = 0x12 // I/O Management Receive

	// Key Value command set.
	OpStore    = 0x01
	OpRetrieve = 0x02
	OpList     = 0x06
	OpDelete   = 0x10
	OpExist    = 0x14
)

// CSI is a Command Set Identifier (Base, figure "Command Set Identifiers").
type CSI uint8

// Command sets kvof serves.
const (
	CSINVM CSI = 0
	CSIKV  CSI = 1
)

// Direction of a command's data, from opcode bits 1:0.
type Direction uint8

// The three directions kvof knows; 11b (bidirectional) is reserved in all command sets it serves.
const (
	NoData           Direction = 0
	HostToController Direction = 1
	ControllerToHost Direction = 2
)

// Command is one 64-byte submission queue entry exactly as it travels.
type Command [CommandSize]byte

// Opcode is CDW0 bits 7:0.
func (c *Command) Opcode() uint8 { return c[0] }

// Flags is CDW0 bits 15:8: FUSE in bits 1:0, PSDT in bits 7:6.
func (c *Command) Flags() uint8 { return c[1] }

// CID is the command identifier, 16 opaque bits.
func (c *Command) CID() uint16 { return le.Uint16(c[2:]) }

// NSID is the namespace identifier.
func (c *Command) NSID() uint32 { return le.Uint32(c[4:]) }

// DW returns command dword n, 0 to 15.
func (c *Command) DW(n int) uint32 { return le.Uint32(c[4*n:]) }

// SetDW sets command dword n, 0 to 15.
func (c *Command) SetDW(n int, v uint32) { le.PutUint32(c[4*n:], v) }

// SLBA is the starting LBA of an NVM command: CDW10 and CDW11 as one 64-bit number.
func (c *Command) SLBA() uint64 { return le.Uint64(c[40:]) }

// SetHeader sets opcode, command identifier and namespace, with PSDT = 01b (SGL) as fabrics demand.
func (c *Command) SetHeader(opcode uint8, cid uint16, nsid uint32) {
	c[0], c[1] = opcode, 1<<6
	le.PutUint16(c[2:], cid)
	le.PutUint32(c[4:], nsid)
}

// SetCID sets the command identifier.
func (c *Command) SetCID(cid uint16) { le.PutUint16(c[2:], cid) }

// Direction is the direction of the command's data: of FCTYPE for a fabrics command, of the opcode otherwise.
func (c *Command) Direction() Direction {
	if c[0] == OpFabrics {
		return Direction(c.FCType() & 3)
	}
	return Direction(c[0] & 3)
}

// SGL is the command's SGL1 descriptor, bytes 24 to 39.
func (c *Command) SGL() SGL { return SGL(c[24:40]) }

// SetSGL sets the SGL1 descriptor.
func (c *Command) SetSGL(s SGL) { copy(c[24:40], s[:]) }

// SGL is one 16-byte SGL descriptor (Base, figure "Generic SGL Descriptor").
type SGL [16]byte

// SGL identifiers: type in bits 7:4, subtype in bits 3:0 of byte 15.
const (
	SGLOffset    = 0x01 // Data Block, offset: data in the capsule
	SGLTransport = 0x5A // Transport Data Block, transport specific subtype: NVMe/TCP data outside the capsule
	SGLKeyed     = 0x40 // Keyed Data Block, address subtype: NVMe/RDMA
)

// ID is the descriptor's type and subtype.
func (s *SGL) ID() uint8 { return s[15] }

// Address is the address, or for [SGLOffset] the offset into the capsule's data.
func (s *SGL) Address() uint64 { return le.Uint64(s[:]) }

// Length is the length in bytes of an unkeyed descriptor.
func (s *SGL) Length() uint32 { return le.Uint32(s[8:]) }

// MakeSGL builds an unkeyed descriptor; length in bytes.
func MakeSGL(id uint8, addr uint64, length uint32) (s SGL) {
	le.PutUint64(s[:], addr)
	le.PutUint32(s[8:], length)
	s[15] = id
	return s
}

// Completion is one 16-byte completion queue entry exactly as it travels.
type Completion [CompletionSize]byte

// MakeCompletion builds a completion. The phase bit is 0 on fabrics.
func MakeCompletion(dw0, dw1 uint32, sqhd, sqid, cid uint16, st Status) (c Completion) {
	le.PutUint32(c[:], dw0)
	le.PutUint32(c[4:], dw1)
	le.PutUint16(c[8:], sqhd)
	le.PutUint16(c[10:], sqid)
	le.PutUint16(c[12:], cid)
	le.PutUint16(c[14:], uint16(st)<<1)
	return c
}

// DW0 is the command specific result.
func (c *Completion) DW0() uint32 { return le.Uint32(c[:]) }

// DW1 is the second result dword.
func (c *Completion) DW1() uint32 { return le.Uint32(c[4:]) }

// SQHD is the submission queue head pointer.
func (c *Completion) SQHD() uint16 { return le.Uint16(c[8:]) }

// CID is the identifier of the command that completed.
func (c *Completion) CID() uint16 { return le.Uint16(c[12:]) }

// Status is the status field without the phase bit.
func (c *Completion) Status() Status { return Status(le.Uint16(c[14:]) >> 1) }
