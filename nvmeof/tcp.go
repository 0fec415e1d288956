package nvmeof

import (
	"fmt"
	"hash/crc32"
)

// PDU types (TCP, PDU Header: PDU-Type).
const (
	PDUICReq       = 0x00
	PDUICResp      = 0x01
	PDUH2CTermReq  = 0x02
	PDUC2HTermReq  = 0x03
	PDUCapsuleCmd  = 0x04
	PDUCapsuleResp = 0x05
	PDUH2CData     = 0x06
	PDUC2HData     = 0x07
	PDUR2T         = 0x09
)

// PDU flags.
const (
	FlagHDGST   = 1 << 0 // a header digest follows the header
	FlagDDGST   = 1 << 1 // a data digest follows the data
	FlagLast    = 1 << 2 // last data PDU of the transfer
	FlagSuccess = 1 << 3 // C2HData: the command is complete, no response capsule follows
)

// Header lengths (HLEN) in bytes, without digests.
const (
	PDUHeaderSize  = 8 // the common header
	ICSize         = 128
	CapsuleCmdSize = PDUHeaderSize + CommandSize
	CapsuleRspSize = PDUHeaderSize + CompletionSize
	DataPDUSize    = 24 // H2CData, C2HData, R2T and the termination requests
	MaxTermSize    = DataPDUSize + 128
	MaxPDUHeader   = ICSize
	DigestSize     = 4
)

// TermError is a fatal error of a TCP connection: the FES and FEI fields of a termination request.
type TermError struct {
	FES uint16
	FEI uint32 // offset in bytes of the field in error, or the digest received
	Why string
}

func (e *TermError) Error() string {
	return fmt.Sprintf("%s (FES %02Xh, FEI %d)", e.Why, e.FES, e.FEI)
}

// Fatal error status values (FES).
const (
	FESInvalidField     = 0x01
	FESSequence         = 0x02
	FESHeaderDigest     = 0x03
	FESDataOutOfRange   = 0x04
	FESDataLimit        = 0x05 // from a controller: data transfer limit exceeded; from a host: R2T limit exceeded
	FESUnsupportedParam = 0x06
)

// Offsets of the common header's fields.
const (
	offType  = 0
	offFlags = 1
	offHLEN  = 2
	offPDO   = 3
	offPLEN  = 4
)

// Offsets in ICReq and ICResp, and what their DGST and MAXH2CDATA fields hold.
const (
	offPFV  = 8
	offPDA  = 10 // HPDA, CPDA
	offDGST = 11
	offMax  = 12 // MAXR2T, MAXH2CDATA

	dgstHeader = 1 << 0
	dgstData   = 1 << 1
	maxPDA     = 31
	minH2CData = 4096
)

// Offsets in a data PDU or R2T.
const (
	offCCCID = 8
	offTTAG  = 10
	offDATAO = 12
	offDATAL = 16
)

// Offsets in a termination request.
const (
	offFES = 8
	offFEI = 10
)

// PDU is a decoded PDU header. It says where the data lies; the type specific fields are in Raw.
type PDU struct {
	Type  uint8
	Flags uint8
	HLEN  uint8
	PDO   uint8  // offset of the data from the start of the PDU, bytes
	PLEN  uint32 // whole PDU, bytes
	Raw   []byte // the HLEN header bytes; aliases the decoder's input
}

// headerLen gives HLEN for each PDU type, 0 for unknown ones.
var headerLen = [...]uint8{PDUICReq: ICSize, PDUICResp: ICSize, PDUH2CTermReq: DataPDUSize, PDUC2HTermReq: DataPDUSize,
	PDUCapsuleCmd: CapsuleCmdSize, PDUCapsuleResp: CapsuleRspSize, PDUH2CData: DataPDUSize, PDUC2HData: DataPDUSize, PDUR2T: DataPDUSize}

// Digests tells which digests a connection negotiated.
type Digests struct{ Header, Data bool }

// HeaderSize validates the 8-byte common header and returns how many bytes the header takes in all, header digest
// included. h2c tells the direction: PDU types of the other one are invalid. Like [DecodePDU], it reports the first
// field in error. The answer to an error in a termination request ([IsTermReq]) is to close the connection, not another
// request.
func HeaderSize(b []byte, h2c bool, dg Digests) (int, *TermError) {
	t, flags := b[offType], b[offFlags]
	if int(t) >= len(headerLen) || headerLen[t] == 0 {
		return 0, &TermError{FESInvalidField, offType, fmt.Sprintf("unknown PDU type %02Xh", t)}
	}
	if fromHost := t == PDUICReq || t == PDUH2CTermReq || t == PDUCapsuleCmd || t == PDUH2CData; fromHost != h2c {
		return 0, &TermError{FESInvalidField, offType, fmt.Sprintf("PDU type %02Xh from the wrong side", t)}
	}
	n := int(headerLen[t])
	if hasDigest(t) {
		switch {
		case dg.Header && flags&FlagHDGST == 0:
			return 0, &TermError{FESInvalidField, offFlags, "header digest is missing"}
		case !dg.Header && flags&FlagHDGST != 0:
			return 0, &TermError{FESInvalidField, offFlags, "header digest was not negotiated"}
		case dg.Header:
			n += DigestSize
		}
	}
	if b[offHLEN] != headerLen[t] {
		return 0, &TermError{FESInvalidField, offHLEN, fmt.Sprintf("HLEN %d of PDU type %02Xh", b[offHLEN], t)}
	}
	return n, nil
}

// IsTermReq tells whether t is a termination request of either side, which is never answered with another one (TCP,
// Error Handling).
func IsTermReq(t uint8) bool { return t == PDUH2CTermReq || t == PDUC2HTermReq }

// hasDigest tells which PDU types carry digests: all but connection set-up and termination.
func hasDigest(t uint8) bool { return t >= PDUCapsuleCmd }

// DecodePDU validates a header of HeaderSize bytes, its digest and its lengths. DataLen tells how much data follows;
// it may be up to 4 GiB, the caller sets the limit.
func DecodePDU(b []byte, dg Digests) (p PDU, err *TermError) {
	p = PDU{Type: b[0], Flags: b[offFlags], HLEN: b[offHLEN], PDO: b[offPDO], PLEN: le.Uint32(b[offPLEN:]), Raw: b[:b[offHLEN]]}
	end := uint32(p.HLEN)
	if dg.Header && hasDigest(p.Type) {
		got := le.Uint32(b[p.HLEN:])
		if want := Digest(0, p.Raw); got != want {
			return p, &TermError{FESHeaderDigest, got, "header digest does not match"}
		}
		end += DigestSize
	}
	switch p.Type {
	case PDUICReq, PDUICResp, PDUCapsuleResp, PDUR2T:
		if p.PLEN != end {
			return p, &TermError{FESInvalidField, offPLEN, fmt.Sprintf("PLEN %d of PDU type %02Xh", p.PLEN, p.Type)}
		}
	case PDUH2CTermReq, PDUC2HTermReq:
		if p.PLEN < end || p.PLEN > MaxTermSize {
			return p, &TermError{FESInvalidField, offPLEN, fmt.Sprintf("PLEN %d of a termination request", p.PLEN)}
		}
	default: // capsules and data PDUs
		if p.PLEN == end {
			if p.Type != PDUCapsuleCmd {
				return p, &TermError{FESInvalidField, offPLEN, "data PDU without data"}
			}
			break
		}
		tail := uint32(0)
		if dg.Data {
			tail = DigestSize
		}
		switch {
		case dg.Data != (p.Flags&FlagDDGST != 0):
			return p, &TermError{FESInvalidField, offFlags, "data digest flag differs from what was negotiated"}
		case p.Type == PDUC2HData && p.Flags&(FlagLast|FlagSuccess) == FlagSuccess:
			return p, &TermError{FESInvalidField, offFlags, "SUCCESS on a PDU that is not the last"}
		case uint32(p.PDO) < end || p.PDO%4 != 0:
			return p, &TermError{FESInvalidField, offPDO, fmt.Sprintf("PDO %d", p.PDO)}
		case p.PLEN <= uint32(p.PDO)+tail:
			return p, &TermError{FESInvalidField, offPLEN, fmt.Sprintf("PLEN %d with PDO %d", p.PLEN, p.PDO)}
		}
		if n := p.PLEN - uint32(p.PDO) - tail; p.Type != PDUCapsuleCmd && n != p.DATAL() {
			return p, &TermError{FESInvalidField, offPLEN, fmt.Sprintf("PLEN %d with DATAL %d", p.PLEN, p.DATAL())}
		}
	}
	return p, nil
}

// DataLen is the number of data bytes the PDU carries, without padding and digest.
// What follows the header of a termination request is not data: it is a copy of the header in error, for people.
func (p *PDU) DataLen() uint32 {
	if !hasDigest(p.Type) || p.PLEN <= p.end() {
		return 0
	}
	n := p.PLEN - uint32(p.PDO)
	if p.Flags&FlagDDGST != 0 {
		n -= DigestSize
	}
	return n
}

// Pad is the number of padding bytes between the header (and its digest) and the data; 0 when there is no data.
func (p *PDU) Pad() int {
	if p.DataLen() == 0 {
		return 0
	}
	return int(p.PDO) - int(p.end())
}

// end is where the header and its digest end.
func (p *PDU) end() uint32 {
	if p.Flags&FlagHDGST != 0 {
		return uint32(p.HLEN) + DigestSize
	}
	return uint32(p.HLEN)
}

// CCCID is the command identifier of a data PDU or R2T.
func (p *PDU) CCCID() uint16 { return le.Uint16(p.Raw[offCCCID:]) }

// TTAG is the transfer tag of a data PDU or R2T.
func (p *PDU) TTAG() uint16 { return le.Uint16(p.Raw[offTTAG:]) }

// DATAO is the offset in bytes of the data within the command's data; R2TO in an R2T.
func (p *PDU) DATAO() uint32 { return le.Uint32(p.Raw[offDATAO:]) }

// DATAL is the length in bytes of the data; R2TL in an R2T.
func (p *PDU) DATAL() uint32 { return le.Uint32(p.Raw[offDATAL:]) }

// Term decodes a termination request.
func (p *PDU) Term() TermError {
	return TermError{FES: le.Uint16(p.Raw[offFES:]), FEI: le.Uint32(p.Raw[offFEI:]), Why: "the peer ended the connection"}
}

// castagnoli is the CRC32C table; digests are CRC32C without further inversion (TCP, Data Digest).
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Digest continues a CRC32C digest (start with 0) over b.
func Digest(crc uint32, b []byte) uint32 { return crc32.Update(crc, castagnoli, b) }

// IC holds the parameters of connection set-up.
type IC struct {
	PFV    uint16
	PDA    uint8 // HPDA or CPDA: data alignment, dwords, 0's based
	Digest Digests
	Max    uint32 // ICReq: MAXR2T, 0's based; ICResp: MAXH2CDATA, bytes
}

// DecodeIC reads an ICReq or ICResp.
func DecodeIC(p *PDU) (ic IC, err *TermError) {
	b := p.Raw
	ic = IC{PFV: le.Uint16(b[offPFV:]), PDA: b[offPDA], Digest: Digests{b[offDGST]&dgstHeader != 0, b[offDGST]&dgstData != 0}, Max: le.Uint32(b[offMax:])}
	switch {
	case ic.PFV != 0:
		return ic, &TermError{FESUnsupportedParam, offPFV, fmt.Sprintf("PDU format version %d", ic.PFV)}
	case ic.PDA > maxPDA:
		return ic, &TermError{FESInvalidField, offPDA, fmt.Sprintf("data alignment %d", ic.PDA)}
	case p.Type == PDUICResp && (ic.Max < minH2CData || ic.Max%4 != 0):
		return ic, &TermError{FESInvalidField, offMax, fmt.Sprintf("MAXH2CDATA %d", ic.Max)}
	}
	return ic, nil
}

// EncodeIC writes an ICReq or ICResp (type t) into b (128 bytes).
func EncodeIC(b []byte, t uint8, ic IC) {
	clear(b[:ICSize])
	putHeader(b, t, 0, 0, ICSize)
	le.PutUint16(b[offPFV:], ic.PFV)
	b[offPDA] = ic.PDA
	if ic.Digest.Header {
		b[offDGST] |= dgstHeader
	}
	if ic.Digest.Data {
		b[offDGST] |= dgstData
	}
	le.PutUint32(b[offMax:], ic.Max)
}

func putHeader(b []byte, t, flags, pdo uint8, plen uint32) {
	b[0], b[offFlags], b[offHLEN], b[offPDO] = t, flags, headerLen[t], pdo
	le.PutUint32(b[offPLEN:], plen)
}

// AppendTerm appends a termination request of type t; header is the PDU header in error, at most 128 bytes are kept.
// SPDK takes a request without any for malformed.
func AppendTerm(b []byte, t uint8, e *TermError, header []byte) []byte {
	header = header[:min(len(header), 128)]
	var h [DataPDUSize]byte
	putHeader(h[:], t, 0, 0, uint32(DataPDUSize+len(header)))
	le.PutUint16(h[offFES:], e.FES)
	le.PutUint32(h[offFEI:], e.FEI)
	return append(append(b, h[:]...), header...)
}

// EncodeCapsule writes the header of a command capsule that carries n bytes of data (0 = none), with padding up to
// align bytes (a multiple of 4, at least 4) and the header digest, and returns the header's length, padding included.
// b must hold CapsuleCmdSize + DigestSize + align bytes.
func EncodeCapsule(b []byte, cmd *Command, n, align int, dg Digests) int {
	copy(b[PDUHeaderSize:], cmd[:])
	return finish(b, PDUCapsuleCmd, 0, n, align, dg)
}

// EncodeResponse writes a response capsule into b (CapsuleRspSize + DigestSize bytes) and returns its length.
func EncodeResponse(b []byte, cqe *Completion, dg Digests) int {
	copy(b[PDUHeaderSize:], cqe[:])
	return finish(b, PDUCapsuleResp, 0, 0, 4, dg)
}

// EncodeData writes the header of an H2CData or C2HData PDU (type t) that carries n bytes at offset off of the
// command's data; flags are FlagLast and FlagSuccess. For the rest see [EncodeCapsule].
func EncodeData(b []byte, t, flags uint8, cccid, ttag uint16, off uint32, n, align int, dg Digests) int {
	le.PutUint16(b[offCCCID:], cccid)
	le.PutUint16(b[offTTAG:], ttag)
	le.PutUint32(b[offDATAO:], off)
	le.PutUint32(b[offDATAL:], uint32(n))
	le.PutUint32(b[20:], 0)
	return finish(b, t, flags, n, align, dg)
}

// EncodeR2T writes an R2T for n bytes at offset off into b (DataPDUSize + DigestSize bytes) and returns its length.
func EncodeR2T(b []byte, cccid, ttag uint16, off, n uint32, dg Digests) int {
	le.PutUint16(b[offCCCID:], cccid)
	le.PutUint16(b[offTTAG:], ttag)
	le.PutUint32(b[offDATAO:], off)
	le.PutUint32(b[offDATAL:], n)
	le.PutUint32(b[20:], 0)
	return finish(b, PDUR2T, 0, 0, 4, dg)
}

// finish completes a header: flags, PDO, PLEN, header digest, padding.
func finish(b []byte, t, flags uint8, n, align int, dg Digests) int {
	h := int(headerLen[t])
	end := h
	if dg.Header {
		flags |= FlagHDGST
		end += DigestSize
	}
	pdo, plen := 0, end
	if n > 0 {
		pdo = (end + align - 1) / align * align
		plen = pdo + n
		if dg.Data {
			flags |= FlagDDGST
			plen += DigestSize
		}
	}
	putHeader(b, t, flags, uint8(pdo), uint32(plen))
	if dg.Header {
		le.PutUint32(b[h:], Digest(0, b[:h]))
	}
	if pdo > end {
		clear(b[end:pdo])
		end = pdo
	}
	return end
}
