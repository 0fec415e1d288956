package nvmeof

import (
	"errors"
	"math/bits"
)

// kvof's vendor specific commands, of the Key Value command set, and the log page that advertises them;
// docs/vendor-commands.md specifies them.
const (
	OpExistMany     = 0xA1 // Exist Many: data from the host
	OpRetrieveRange = 0xA2 // Retrieve Range: data to the host
	LogVendor       = 0xE1 // kvof Vendor Commands
)

// MaxExistMany is the number of keys that one Exist Many asks for: one for each bit of DW0 and DW1.
const MaxExistMany = 64

// Sizes in bytes.
const (
	MaxExistManySize = 4 + MaxExistMany*ListKeyMax // Exist Many's data: keys as a List reply has them
	VendorLogSize    = 512
)

// MakeExistMany builds an Exist Many with n bytes of data.
func MakeExistMany(nsid, n uint32) (c Command) {
	c.SetHeader(OpExistMany, 0, nsid)
	c.SetKV(n, 0)
	return c
}

// SetRange makes a Retrieve a Retrieve Range, of CDW10 bytes from offset on, which is a multiple of 4 bytes (CDW12). tag is
// the one that the value must have (CDW13); 0: any.
func (c *Command) SetRange(offset, tag uint32) {
	c[0] = OpRetrieveRange
	c.SetDW(12, offset)
	c.SetDW(13, tag)
}

// Range is a Retrieve Range's offset in bytes, not validated, and the tag that it asks for.
func (c *Command) Range() (offset, tag uint32) { return c.DW(12), c.DW(13) }

// Found is an Exist Many's result: bit i is set when key i exists.
type Found uint64

// Found is the result of a completed Exist Many, DW0 and DW1.
func (c *Completion) Found() Found { return Found(c.DW0()) | Found(c.DW1())<<32 }

// Run is how many keys exist before the first that does not.
func (f Found) Run() int { return bits.TrailingZeros64(^uint64(f)) }

// vendorGUID is the UUID at the beginning of the log page: other vendors use the same identifier for other pages.
var vendorGUID = [16]byte{0x3d, 0x1c, 0x5e, 0x0a, 0x6b, 0x52, 0x4f, 0x2b, 0x9a, 0x71, 0x6b, 0x76, 0x6f, 0x66, 0x00, 0x01}

// VendorCommand is one entry of the Vendor Commands log: a command of a command set, by opcode. Version 1 is what this
// package describes; later versions of a command do all that earlier ones do.
type VendorCommand struct {
	Opcode  uint8
	CSI     CSI
	Version uint16
	Limit   uint32 // Exist Many: keys in one command; Retrieve Range: its granularity in bytes
}

const (
	vendorHeaderSize = 32
	vendorEntrySize  = 16
	maxVendorEntries = (VendorLogSize - vendorHeaderSize) / vendorEntrySize
)

// EncodeVendorLog writes the Vendor Commands log into b (512 bytes).
func EncodeVendorLog(b []byte, commands ...VendorCommand) {
	clear(b[:VendorLogSize])
	copy(b, vendorGUID[:])
	le.PutUint16(b[16:], 1)
	le.PutUint16(b[18:], uint16(len(commands)))
	for i, c := range commands {
		e := b[vendorHeaderSize+i*vendorEntrySize:]
		e[0], e[1] = c.Opcode, uint8(c.CSI)
		le.PutUint16(e[2:], c.Version)
		le.PutUint32(e[4:], c.Limit)
	}
}

// DecodeVendorLog reads the log. It fails when the page is another vendor's.
func DecodeVendorLog(b []byte) ([]VendorCommand, error) {
	if len(b) < VendorLogSize {
		return nil, errShort
	}
	if [16]byte(b) != vendorGUID || le.Uint16(b[16:]) == 0 {
		return nil, errors.New("not kvof's vendor log page")
	}
	n := int(le.Uint16(b[18:]))
	if n > maxVendorEntries {
		return nil, errors.New("vendor log page with more commands than it holds")
	}
	commands := make([]VendorCommand, n)
	for i := range commands {
		e := b[vendorHeaderSize+i*vendorEntrySize:]
		commands[i] = VendorCommand{Opcode: e[0], CSI: CSI(e[1]), Version: le.Uint16(e[2:]), Limit: le.Uint32(e[4:])}
	}
	return commands, nil
}
