package nvmeof

import "errors"

// Fabrics command types, byte 4 of a command with opcode 7Fh (Base, Fabrics Command Set).
const (
	FCPropertySet = 0x00
	FCConnect     = 0x01
	FCPropertyGet = 0x04
	FCAuthSend    = 0x05
	FCAuthReceive = 0x06
	FCDisconnect  = 0x08
)

// Property offsets (Base, Controller Properties).
const (
	PropCAP  = 0x00 // 8 bytes
	PropVS   = 0x08 // 4 bytes
	PropCC   = 0x14 // 4 bytes
	PropCSTS = 0x1C // 4 bytes
	PropNSSR = 0x20 // 4 bytes
	PropCRTO = 0x68 // 4 bytes
)

// ConnectDataSize is the size in bytes of the Connect command's data.
const ConnectDataSize = 1024

// CNTLIDDynamic in Connect asks the controller to choose a CNTLID.
const CNTLIDDynamic = 0xFFFF

// Offsets that DW0 of a Connect Invalid Parameters completion names: in the SQE (IATTR 0) or in the data (IATTR 1).
const (
	ConnectOffRECFMT  = 40
	ConnectOffQID     = 42
	ConnectOffSQSIZE  = 44
	ConnectOffHOSTID  = 0
	ConnectOffCNTLID  = 16
	ConnectOffSUBNQN  = 256
	ConnectOffHOSTNQN = 512
)

// ConnectInvalidDW0 builds DW0 of a Connect Invalid Parameters completion; inData tells whether off (bytes) is an
// offset into the data or into the SQE.
func ConnectInvalidDW0(off uint16, inData bool) uint32 {
	v := uint32(off)
	if inData {
		v |= 1 << 16
	}
	return v
}

// FCType is the fabrics command type, byte 4.
func (c *Command) FCType() uint8 { return c[4] }

// ConnectRECFMT is the record format of a Connect; 0 is the only one defined.
func (c *Command) ConnectRECFMT() uint16 { return le.Uint16(c[40:]) }

// ConnectQID is the queue to create: 0 is the admin queue.
func (c *Command) ConnectQID() uint16 { return le.Uint16(c[42:]) }

// ConnectSQSIZE is the submission queue size, 0's based.
func (c *Command) ConnectSQSIZE() uint16 { return le.Uint16(c[44:]) }

// ConnectCATTR holds the connect attributes; bit 2 disables SQ flow control.
func (c *Command) ConnectCATTR() uint8 { return c[46] }

// ConnectKATO is the keep alive time-out in milliseconds; 0 disables it.
func (c *Command) ConnectKATO() uint32 { return le.Uint32(c[48:]) }

// CATTRNoFlowControl in CATTR disables SQ flow control.
const CATTRNoFlowControl = 1 << 2

// MakeConnect builds a Connect command; sqsize is 0's based, kato in milliseconds.
func MakeConnect(cid, qid, sqsize uint16, cattr uint8, kato uint32) (c Command) {
	c.SetHeader(OpFabrics, cid, 0)
	c[4] = FCConnect
	le.PutUint16(c[42:], qid)
	le.PutUint16(c[44:], sqsize)
	c[46] = cattr
	le.PutUint32(c[48:], kato)
	return c
}

// PropertyOffset is the property's offset in bytes, of Property Get and Set.
func (c *Command) PropertyOffset() uint32 { return le.Uint32(c[44:]) }

// PropertySize is the property's size in bytes, 4 or 8; 0 when the field is reserved.
func (c *Command) PropertySize() int {
	switch c[40] & 7 {
	case 0:
		return 4
	case 1:
		return 8
	}
	return 0
}

// PropertyValue is the value to set.
func (c *Command) PropertyValue() uint64 { return le.Uint64(c[48:]) }

// MakePropertyGet builds a Property Get of 4 or 8 bytes.
func MakePropertyGet(off uint32, size int) (c Command) {
	c.SetHeader(OpFabrics, 0, 0)
	c[4] = FCPropertyGet
	c[40] = uint8(size / 8)
	le.PutUint32(c[44:], off)
	return c
}

// MakePropertySet builds a Property Set of a 4-byte property.
func MakePropertySet(off uint32, v uint32) (c Command) {
	c.SetHeader(OpFabrics, 0, 0)
	c[4] = FCPropertySet
	le.PutUint32(c[44:], off)
	le.PutUint32(c[48:], v)
	return c
}

// ConnectData is the 1024-byte data of a Connect command.
type ConnectData struct {
	HostID  [16]byte
	CNTLID  uint16
	SubNQN  string
	HostNQN string
}

// Decode reads the data; an error means that it is too short. NQNs are not validated.
func (d *ConnectData) Decode(b []byte) error {
	if len(b) < ConnectDataSize {
		return errors.New("connect data is shorter than 1024 bytes")
	}
	copy(d.HostID[:], b)
	d.CNTLID = le.Uint16(b[16:])
	d.SubNQN = cstring(b[256:512])
	d.HostNQN = cstring(b[512:768])
	return nil
}

// Encode writes the data into b, which must hold 1024 bytes.
func (d *ConnectData) Encode(b []byte) {
	clear(b[:ConnectDataSize])
	copy(b, d.HostID[:])
	le.PutUint16(b[16:], d.CNTLID)
	copy(b[256:511], d.SubNQN)
	copy(b[512:767], d.HostNQN)
}

// CAP is the Controller Capabilities property.
type CAP uint64

// MakeCAP builds CAP: mqes 0's based, CQR set, time-out in units of 500 ms, MPSMIN 0, CSS bits 37 and 43 (I/O command
// sets), CRMS bits as given (Base, Controller Capabilities).
func MakeCAP(mqes uint16, to uint8, crms uint8) CAP {
	return CAP(mqes) | 1<<16 | CAP(to)<<24 | 1<<37 | 1<<43 | CAP(crms&3)<<59
}

// MQES is the maximum queue entries, 0's based.
func (c CAP) MQES() uint16 { return uint16(c) }

// TO is the worst-case time to become ready, in units of 500 ms.
func (c CAP) TO() uint8 { return uint8(c >> 24) }

// CommandSets reports whether I/O command sets are supported (CSS bit 6, CAP bit 43).
func (c CAP) CommandSets() bool { return c>>43&1 == 1 }

// CC fields (Base, Controller Configuration).
const (
	CCEnable    = 1 << 0
	CCCSSAll    = 6 << 4 // CSS 110b: all supported I/O command sets
	CCSHNNormal = 1 << 14
	CCIOSQES64  = 6 << 16
	CCIOCQES16  = 4 << 20
)

// CSTS fields (Base, Controller Status).
const (
	CSTSReady    = 1 << 0
	CSTSFatal    = 1 << 1
	CSTSSHSTDone = 2 << 2
	CSTSSHSTMask = 3 << 2
)

// VersionNVMe20 is VS of a controller of NVMe 2.0.
const VersionNVMe20 = 0x00020000

// CCEN, CCCSS, CCSHN take CC apart.
func CCEN(cc uint32) bool { return cc&1 == 1 }

// CCCSS is the command set selected.
func CCCSS(cc uint32) uint32 { return cc >> 4 & 7 }

// CCSHN is the shutdown notification.
func CCSHN(cc uint32) uint32 { return cc >> 14 & 3 }
