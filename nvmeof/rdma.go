package nvmeof

import "fmt"

// SGL identifiers of NVMe/RDMA.
const (
	SGLKeyedInvalidate = 0x4F // as SGLKeyed; the response may invalidate the key at the host
	SGLLastSegment     = 0x31 // Last Segment, offset subtype: descriptors in the capsule
)

// SGLSize is the size in bytes of one SGL descriptor.
const SGLSize = 16

// MaxKeyedLength is the most bytes that one keyed descriptor describes: its length has 24 bits.
const MaxKeyedLength = 1<<24 - 1

// KeyedLength is the length in bytes of a keyed descriptor.
func (s *SGL) KeyedLength() uint32 { return uint32(s[8]) | uint32(s[9])<<8 | uint32(s[10])<<16 }

// Key is the remote key of a keyed descriptor.
func (s *SGL) Key() uint32 { return le.Uint32(s[11:]) }

// MakeKeyedSGL builds a keyed descriptor, SGLKeyed or SGLKeyedInvalidate; length is in bytes, at most MaxKeyedLength.
func MakeKeyedSGL(id uint8, addr uint64, length, key uint32) (s SGL) {
	le.PutUint64(s[:], addr)
	s[8], s[9], s[10] = byte(length), byte(length>>8), byte(length>>16)
	le.PutUint32(s[11:], key)
	s[15] = id
	return s
}

// Sizes in bytes of the private data of RDMA connections (NVMe/RDMA Transport, RDMA_CM message data).
const (
	RDMARequestSize = 32
	RDMAAcceptSize  = 32
	RDMARejectSize  = 4
)

// RDMARequest is the private data of a connection request.
type RDMARequest struct {
	QID     uint16 // queue the connection is for
	HRQSIZE uint16 // entries of the host's receive queue: responses it has room for
	HSQSIZE uint16 // entries of the host's send queue less 1: commands it may have outstanding
	CNTLID  uint16 // controller, when QID is not 0; hosts of before revision 1.1 leave it 0
}

// Decode reads a request as it came; private data may be padded. An RDMAReject says what is wrong.
func (r *RDMARequest) Decode(b []byte) error {
	if len(b) < RDMARequestSize {
		return RDMARejectLength
	}
	if le.Uint16(b) != 0 {
		return RDMARejectFormat
	}
	*r = RDMARequest{QID: le.Uint16(b[2:]), HRQSIZE: le.Uint16(b[4:]), HSQSIZE: le.Uint16(b[6:]), CNTLID: le.Uint16(b[8:])}
	return nil
}

// Encode writes the request into b (RDMARequestSize bytes).
func (r *RDMARequest) Encode(b []byte) {
	clear(b[:RDMARequestSize])
	le.PutUint16(b[2:], r.QID)
	le.PutUint16(b[4:], r.HRQSIZE)
	le.PutUint16(b[6:], r.HSQSIZE)
	le.PutUint16(b[8:], r.CNTLID)
}

// EncodeRDMAAccept writes the private data of an accepted connection into b (RDMAAcceptSize bytes); crqsize is the entries
// of the controller's receive queue.
func EncodeRDMAAccept(b []byte, crqsize uint16) {
	clear(b[:RDMAAcceptSize])
	le.PutUint16(b[2:], crqsize)
}

// DecodeRDMAAccept reads CRQSIZE from the private data of an accepted connection.
func DecodeRDMAAccept(b []byte) (crqsize uint16, err error) {
	if len(b) < 4 {
		return 0, errShort
	}
	if f := le.Uint16(b); f != 0 {
		return 0, fmt.Errorf("accepted with record format %d", f)
	}
	return le.Uint16(b[2:]), nil
}

// RDMAReject is the status in the private data of a refused connection.
type RDMAReject uint16

// Why connections are refused.
const (
	RDMARejectLength  RDMAReject = 1 // Invalid Private Data Length
	RDMARejectFormat  RDMAReject = 2 // Invalid RECFMT
	RDMARejectQID     RDMAReject = 3 // Invalid QID
	RDMARejectHSQSIZE RDMAReject = 4 // Invalid HSQSIZE
	RDMARejectHRQSIZE RDMAReject = 5 // Invalid HRQSIZE
	RDMARejectBusy    RDMAReject = 6 // No Resources
	RDMARejectIRD     RDMAReject = 7 // Invalid IRD: RDMA READs that the host answers
	RDMARejectORD     RDMAReject = 8 // Invalid ORD: RDMA READs that the host starts
)

var rdmaRejectText = [...]string{"", "invalid private data length", "invalid record format", "invalid queue identifier",
	"invalid send queue size", "invalid receive queue size", "no resources", "invalid inbound RDMA READ depth", "invalid outbound RDMA READ depth"}

func (r RDMAReject) Error() string {
	if r > 0 && int(r) < len(rdmaRejectText) {
		return "NVMe/RDMA connection refused: " + rdmaRejectText[r]
	}
	return fmt.Sprintf("NVMe/RDMA connection refused: status %d", uint16(r))
}

// Encode writes the private data of a refused connection into b (RDMARejectSize bytes).
func (r RDMAReject) Encode(b []byte) {
	le.PutUint16(b, 0)
	le.PutUint16(b[2:], uint16(r))
}

// DecodeRDMAReject reads the private data of a refused connection; 0 when the peer said nothing.
func DecodeRDMAReject(b []byte) RDMAReject {
	if len(b) < RDMARejectSize || le.Uint16(b) != 0 {
		return 0
	}
	return RDMAReject(le.Uint16(b[2:]))
}

// The transport specific address subtype of a discovery record for RDMA: reliable connected queue pairs, no provider in
// particular, and the RDMA_CM of IP addresses.
const (
	tsasOffset = 768
	tsasQPType = 1 // RDMA_QPTYPE: reliable connected
	tsasPRType = 1 // RDMA_PRTYPE: no provider specified
	tsasCMS    = 1 // RDMA_CMS: RDMA_IP_CM
)
