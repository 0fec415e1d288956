package kvlayer

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/uuid"
	"github.com/zeebo/xxh3"
)

// The format, version 1. docs/kvlayer.md describes it byte by byte. All
// integers are little-endian.
const (
	formatVersion = 1

	block     = 4 << 10   // everything starts on a block
	pieceSize = 128 << 10 // of a value under one checksum

	superSecond = 64 << 10 // byte offset of the second superblock; the first is at 0
	superArea   = 128 << 10
	dataStart   = 1 << 20 // where segment 0 begins

	superLen   = 96 // bytes used of each structure
	segmentLen = 64
	recordLen  = 72
	maxHeader  = 2 * block // a record header with the checksums of a 64 MiB value

	minSegments = 3 // one to write, one to clean into, one to clean
)

// MaxValue is the largest value any store takes, in bytes. Small devices take
// less: see Store.MaxValue.
const MaxValue = 64 << 20

var (
	superMagic   = [8]byte{'k', 'v', 'o', 'f', 's', 't', 'o', 'r'}
	segmentMagic = [8]byte{'k', 'v', 'o', 'f', 's', 'e', 'g', 'm'}
	recordMagic  = [8]byte{'k', 'v', 'o', 'f', 'r', 'e', 'c', 'd'}

	le = binary.LittleEndian
)

// Every structure starts with its checksum (8 bytes: XXH3-64 of the rest, with
// a seed) and its magic (8 bytes).

func sealStruct(b []byte, seed uint64) { le.PutUint64(b, xxh3.HashSeed(b[8:], seed)) }

func intact(b []byte, magic *[8]byte, seed uint64) bool {
	return bytes.Equal(b[8:16], magic[:]) && le.Uint64(b) == xxh3.HashSeed(b[8:], seed)
}

// super is the superblock.
type super struct {
	gen      uint64 // the higher of the two copies counts
	id       uuid.UUID
	seed     uint64 // secret: without it nobody can make a value that holds a valid record header
	segSize  int64
	segments int64
}

func putSuper(b []byte, s super) {
	clear(b)
	copy(b[8:], superMagic[:])
	le.PutUint32(b[16:], formatVersion)
	le.PutUint64(b[24:], s.gen)
	copy(b[32:], s.id[:])
	le.PutUint64(b[48:], s.seed)
	le.PutUint64(b[56:], dataStart)
	le.PutUint64(b[64:], uint64(s.segSize))
	le.PutUint64(b[72:], uint64(s.segments))
	le.PutUint32(b[80:], block)
	le.PutUint32(b[84:], pieceSize)
	sealStruct(b[:superLen], 0)
}

var (
	errNoSuper = errors.New("it holds other data; to use it for kvof, erase at least its first 128 KiB (delete a file, wipefs or blkdiscard a drive)")
	errTorn    = errors.New("the superblock is damaged")
)

func parseSuper(b []byte) (super, error) {
	if len(b) < superLen || !bytes.Equal(b[8:16], superMagic[:]) {
		return super{}, errNoSuper
	}
	// The version comes before the checksum: another version may compute that differently.
	if v := le.Uint32(b[16:]); v != formatVersion {
		return super{}, fmt.Errorf("it has format version %d and this kvof reads version %d; use the kvof that wrote it, or erase it", v, formatVersion)
	}
	if !intact(b[:superLen], &superMagic, 0) {
		return super{}, errTorn
	}
	s := super{
		gen:      le.Uint64(b[24:]),
		id:       uuid.UUID(b[32:48]),
		seed:     le.Uint64(b[48:]),
		segSize:  int64(le.Uint64(b[64:])),
		segments: int64(le.Uint64(b[72:])),
	}
	const limit = 1 << 40
	switch {
	case le.Uint64(b[56:]) != dataStart, le.Uint32(b[80:]) != block, le.Uint32(b[84:]) != pieceSize,
		s.segSize < 4*block, s.segSize > limit, s.segSize%block != 0,
		s.segments < minSegments, s.segments > limit, s.segments > (1<<62)/s.segSize:
		return super{}, errTorn
	}
	return s, nil
}

// segmentHeader is the first block of a segment in use.
type segmentHeader struct {
	id    uuid.UUID // the store's
	index int64
	gen   uint64 // unique in the store; records of other generations are remains
	free  bool   // cleaned: nothing in it counts
}

func putSegment(b []byte, seed uint64, h segmentHeader) {
	clear(b)
	copy(b[8:], segmentMagic[:])
	if h.free {
		b[16] = 1
	}
	copy(b[24:], h.id[:])
	le.PutUint64(b[40:], uint64(h.index))
	le.PutUint64(b[48:], h.gen)
	sealStruct(b[:segmentLen], seed)
}

func parseSegment(b []byte, seed uint64) (segmentHeader, bool) {
	if len(b) < segmentLen || !intact(b[:segmentLen], &segmentMagic, seed) {
		return segmentHeader{}, false
	}
	return segmentHeader{
		id:    uuid.UUID(b[24:40]),
		index: int64(le.Uint64(b[40:])),
		gen:   le.Uint64(b[48:]),
		free:  b[16] == 1,
	}, true
}

type recordKind uint8

const (
	recordLive recordKind = 1 + iota
	recordDead            // deleted or replaced
	recordSeal            // the segment's last: nothing follows
)

// record is the fixed part of a record header. A live one is followed, in the
// same or the next block, by the XXH3-64 checksums of the value's pieces.
type record struct {
	kind recordKind
	key  Key
	off  int64  // the header's own byte offset on the device
	gen  uint64 // the segment's
	seq  uint64 // of two live records of a key the higher counts
	size int64  // of the value, bytes
}

func pieces(size int64) int64 { return (size + pieceSize - 1) / pieceSize }

// headerLen is the length on the device of the header of a value of size bytes.
func headerLen(size int64) int64 { return roundUp(recordLen + 8*pieces(size)) }

// span is what a value of size bytes takes on the device, with its header.
func span(size int64) int64 { return headerLen(size) + roundUp(size) }

func roundUp(n int64) int64 { return (n + block - 1) &^ (block - 1) }

// putRecord fills b, whole blocks, with r and, if r is live, sums.
func putRecord(b []byte, seed uint64, r record, sums []uint64) {
	clear(b)
	copy(b[8:], recordMagic[:])
	b[16], b[17] = byte(r.kind), r.key.n
	le.PutUint32(b[20:], uint32(r.size))
	copy(b[24:], r.key.b[:])
	le.PutUint64(b[40:], uint64(r.off))
	le.PutUint64(b[48:], r.gen)
	le.PutUint64(b[56:], r.seq)
	for i, sum := range sums {
		le.PutUint64(b[recordLen+8*i:], sum)
	}
	le.PutUint64(b[64:], xxh3.Hash(b[recordLen:recordLen+8*len(sums)]))
	sealStruct(b[:recordLen], seed)
}

// parseRecord returns the record header at the start of b. The caller checks
// that off and gen are those of the place it was read from.
func parseRecord(b []byte, seed uint64) (record, bool) {
	if len(b) < recordLen || !intact(b[:recordLen], &recordMagic, seed) {
		return record{}, false
	}
	r := record{
		kind: recordKind(b[16]),
		key:  Key{b: [MaxKey]byte(b[24:40]), n: b[17]},
		off:  int64(le.Uint64(b[40:])),
		gen:  le.Uint64(b[48:]),
		seq:  le.Uint64(b[56:]),
		size: int64(le.Uint32(b[20:])),
	}
	switch r.kind {
	case recordLive:
		table := int(8 * pieces(r.size))
		if r.size > MaxValue || len(b) < recordLen+table || xxh3.Hash(b[recordLen:recordLen+table]) != le.Uint64(b[64:]) {
			return record{}, false
		}
	case recordDead:
		if r.size > MaxValue {
			return record{}, false
		}
	case recordSeal:
		return r, true
	default:
		return record{}, false
	}
	return r, r.key.n >= 1 && r.key.n <= MaxKey
}

// appendSums appends the checksums of live record r, whose header is b.
func appendSums(sums []uint64, b []byte, r record) []uint64 {
	for i := range pieces(r.size) {
		sums = append(sums, le.Uint64(b[recordLen+8*i:]))
	}
	return sums
}

// geometry chooses the segments of a new store on a device of size bytes. A
// segment has room for a power of two of data and 1/128 of that for headers:
// 128 MiB from 1 GiB up, 256 MiB from 64 GiB up, an eighth of smaller devices.
func geometry(size int64) (segSize, segments int64, err error) {
	data := int64(128 << 20)
	if size >= 64<<30 {
		data = 256 << 20
	}
	for data > 128<<10 && 8*data > size {
		data /= 2
	}
	segSize = data + max(data/128, 4*block)
	if segments = (size - dataStart) / segSize; segments < minSegments {
		return 0, 0, fmt.Errorf("kvlayer: a device of %d bytes is too small for a store: give it at least 2 MiB", size)
	}
	return segSize, segments, nil
}
