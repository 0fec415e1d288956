package kvlayer

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/uuid"
	"github.com/zeebo/xxh3"
)

// The format, version 2. docs/kvlayer.md describes it byte by byte. All
// integers are little-endian.
const (
	formatVersion = 2

	block     = 4 << 10   // everything starts on a block
	pieceSize = 128 << 10 // of a value under one checksum
	maxExtent = 4 << 20   // of a value in one record
	maxParts  = 16        // records of a value

	superSecond = 64 << 10 // byte offset of the second superblock; the first is at 0
	superArea   = 128 << 10
	dataStart   = 1 << 20 // where segment 0 begins

	segmentLen = 64 // bytes used of each structure; a superblock and a summary use their block
	recordLen  = 80

	superMembers = 128 // offset of the members' epochs
	superTenants = 384
	maxMembers   = (superTenants - superMembers) / 4
	maxTenants   = (block - superTenants) / 16

	summaryHead  = 64
	summaryEntry = 48
	perSummary   = (block - summaryHead) / summaryEntry

	minSegments = 3 // one to write, one to clean into, one to clean
)

// MaxValue is the largest value any store takes, in bytes. Small devices take
// less: see Store.MaxValue.
const MaxValue = maxParts * maxExtent

// Granularity is what a Reader reads and verifies at a time, in bytes.
const Granularity = pieceSize

var (
	superMagic   = [8]byte{'k', 'v', 'o', 'f', 's', 't', 'o', 'r'}
	segmentMagic = [8]byte{'k', 'v', 'o', 'f', 's', 'e', 'g', 'm'}
	recordMagic  = [8]byte{'k', 'v', 'o', 'f', 'r', 'e', 'c', 'd'}
	summaryMagic = [8]byte{'k', 'v', 'o', 'f', 's', 'u', 'm', 'm'}

	le = binary.LittleEndian
)

// Every structure starts with its checksum (8 bytes: XXH3-64 of the rest, with
// a seed) and its magic (8 bytes).

func sealStruct(b []byte, seed uint64) { le.PutUint64(b, xxh3.HashSeed(b[8:], seed)) }

func intact(b []byte, magic *[8]byte, seed uint64) bool {
	return bytes.Equal(b[8:16], magic[:]) && le.Uint64(b) == xxh3.HashSeed(b[8:], seed)
}

// super is the superblock of one device of a pool. All but member and segments
// is the pool's, and of all copies on all its devices the highest gen counts.
type super struct {
	gen      uint64
	member   int // which of the pool's devices this is
	id       uuid.UUID
	seed     uint64 // secret: without it nobody can make a value that holds a valid record header
	segSize  int64
	extent   int64
	segments int64
	epochs   []uint32    // of each member: what was written under an earlier one does not count
	tenants  []uuid.UUID // by tenant number
}

func putSuper(b []byte, s *super) {
	clear(b[:block])
	copy(b[8:], superMagic[:])
	le.PutUint32(b[16:], formatVersion)
	le.PutUint32(b[20:], uint32(s.member))
	le.PutUint64(b[24:], s.gen)
	copy(b[32:], s.id[:])
	le.PutUint64(b[48:], s.seed)
	le.PutUint64(b[56:], dataStart)
	le.PutUint64(b[64:], uint64(s.segSize))
	le.PutUint64(b[72:], uint64(s.segments))
	le.PutUint32(b[80:], block)
	le.PutUint32(b[84:], pieceSize)
	le.PutUint64(b[88:], uint64(s.extent))
	le.PutUint32(b[96:], uint32(len(s.epochs)))
	le.PutUint32(b[100:], uint32(len(s.tenants)))
	for i, e := range s.epochs {
		le.PutUint32(b[superMembers+4*i:], e)
	}
	for i, id := range s.tenants {
		copy(b[superTenants+16*i:], id[:])
	}
	sealStruct(b[:block], 0)
}

var (
	errNoSuper = errors.New("it holds other data; to use it for kvof, erase at least its first 128 KiB (delete a file, wipefs or blkdiscard a drive)")
	errTorn    = errors.New("the superblock is damaged")
)

func parseSuper(b []byte) (super, error) {
	if len(b) < block || !bytes.Equal(b[8:16], superMagic[:]) {
		return super{}, errNoSuper
	}
	// The version comes before the checksum: another version may compute that differently.
	if v := le.Uint32(b[16:]); v != formatVersion {
		return super{}, fmt.Errorf("it has format version %d and this kvof reads version %d; use the kvof that wrote it, or erase it", v, formatVersion)
	}
	if !intact(b[:block], &superMagic, 0) {
		return super{}, errTorn
	}
	s := super{
		member:   int(le.Uint32(b[20:])),
		gen:      le.Uint64(b[24:]),
		id:       uuid.UUID(b[32:48]),
		seed:     le.Uint64(b[48:]),
		segSize:  int64(le.Uint64(b[64:])),
		segments: int64(le.Uint64(b[72:])),
		extent:   int64(le.Uint64(b[88:])),
	}
	const limit = 1 << 40
	members, tenants := le.Uint32(b[96:]), le.Uint32(b[100:])
	switch {
	case le.Uint64(b[56:]) != dataStart, le.Uint32(b[80:]) != block, le.Uint32(b[84:]) != pieceSize,
		s.segSize < 4*block, s.segSize > limit, s.segSize%block != 0,
		s.segments < minSegments, s.segments > maxBlocks/(s.segSize/block),
		s.extent < pieceSize, s.extent > maxExtent, s.extent&(s.extent-1) != 0, s.extent > s.segSize-4*block,
		members > maxMembers, tenants > maxTenants, s.member < 0, s.member >= int(members):
		return super{}, errTorn
	}
	for i := range members {
		s.epochs = append(s.epochs, le.Uint32(b[superMembers+4*i:]))
	}
	for i := range tenants {
		s.tenants = append(s.tenants, uuid.UUID(b[superTenants+16*i:]))
	}
	return s, nil
}

// segmentHeader is the first block of a segment in use.
type segmentHeader struct {
	id     uuid.UUID // the pool's
	member int
	epoch  uint32
	index  int64
	gen    uint64 // unique in the pool; records of other generations are remains
	tenant int
	class  class
	free   bool // reclaimed: nothing in it counts
}

func putSegment(b []byte, seed uint64, h segmentHeader) {
	clear(b)
	copy(b[8:], segmentMagic[:])
	if h.free {
		b[16] = 1
	}
	b[17] = byte(h.class)
	le.PutUint16(b[18:], uint16(h.tenant))
	le.PutUint32(b[20:], h.epoch)
	copy(b[24:], h.id[:])
	le.PutUint64(b[40:], uint64(h.index))
	le.PutUint64(b[48:], h.gen)
	le.PutUint32(b[56:], uint32(h.member))
	sealStruct(b[:segmentLen], seed)
}

func parseSegment(b []byte, seed uint64) (segmentHeader, bool) {
	if len(b) < segmentLen || !intact(b[:segmentLen], &segmentMagic, seed) {
		return segmentHeader{}, false
	}
	return segmentHeader{
		id:     uuid.UUID(b[24:40]),
		member: int(le.Uint32(b[56:])),
		epoch:  le.Uint32(b[20:]),
		index:  int64(le.Uint64(b[40:])),
		gen:    le.Uint64(b[48:]),
		tenant: int(le.Uint16(b[18:])),
		class:  class(b[17]),
		free:   b[16] == 1,
	}, b[17] < classes
}

type recordKind uint8

const (
	recordLive recordKind = 1 + iota
	recordDead            // deleted or replaced
)

// record is the fixed part of a record header. A live one is followed, in the
// same block, by the XXH3-64 checksums of the pieces of its part of the value.
type record struct {
	kind   recordKind
	pinned bool // part 0 of a value that is not to be evicted
	part   int
	key    Key
	off    int64  // the header's own byte offset on the device
	gen    uint64 // the segment's
	seq    uint64 // of two live records of a key the higher counts
	from   uint64 // the generation of the segment it was copied from, while which is in use it does not count; 0: none
	size   int64  // of the whole value, bytes
}

// flags are the byte of a header and of a summary's entry that says whether a value is pinned.
func (r *record) flags() byte {
	if r.pinned {
		return 1
	}
	return 0
}

// partSize is the length of one part of a value of size bytes.
func partSize(size int64, part int, extent int64) int64 {
	return min(extent, max(0, size-int64(part)*extent))
}

func pieces(size int64) int64 { return (size + pieceSize - 1) / pieceSize }

// span is what a part of n bytes takes on the device, with its header.
func span(n int64) int64 { return block + roundUp(n) }

func roundUp(n int64) int64 { return (n + block - 1) &^ (block - 1) }

// putRecord fills b, a block, with r and, if r is live, sums.
func putRecord(b []byte, seed uint64, r record, sums []uint64) {
	clear(b)
	copy(b[8:], recordMagic[:])
	b[16], b[17], b[18], b[19] = byte(r.kind), r.key.n, byte(r.part), r.flags()
	le.PutUint32(b[20:], uint32(r.size))
	r.key.store(b[24:])
	le.PutUint64(b[40:], uint64(r.off))
	le.PutUint64(b[48:], r.gen)
	le.PutUint64(b[56:], r.seq)
	le.PutUint64(b[64:], r.from)
	for i, sum := range sums {
		le.PutUint64(b[recordLen+8*i:], sum)
	}
	le.PutUint64(b[72:], xxh3.Hash(b[recordLen:recordLen+8*len(sums)]))
	sealStruct(b[:recordLen], seed)
}

// parseRecord returns the record header at the start of b, of a pool with such
// an extent. The caller checks that off and gen are those of the place it was read from.
func parseRecord(b []byte, seed uint64, extent int64) (record, bool) {
	if len(b) < recordLen || !intact(b[:recordLen], &recordMagic, seed) {
		return record{}, false
	}
	r := record{
		kind:   recordKind(b[16]),
		pinned: b[19]&1 != 0,
		part:   int(b[18]),
		key:    loadKey(b[24:], b[17]),
		off:    int64(le.Uint64(b[40:])),
		gen:    le.Uint64(b[48:]),
		seq:    le.Uint64(b[56:]),
		from:   le.Uint64(b[64:]),
		size:   int64(le.Uint32(b[20:])),
	}
	if !r.valid(extent) {
		return record{}, false
	}
	if r.kind == recordLive {
		table := int(8 * pieces(partSize(r.size, r.part, extent)))
		if len(b) < recordLen+table || xxh3.Hash(b[recordLen:recordLen+table]) != le.Uint64(b[72:]) {
			return record{}, false
		}
	}
	return r, true
}

// valid bounds what was read from a device.
func (r *record) valid(extent int64) bool {
	return (r.kind == recordLive || r.kind == recordDead) && r.key.n >= 1 && r.key.n <= MaxKey && r.seq < 1<<seqBits &&
		r.size <= maxParts*extent && (r.part == 0 || r.part < maxParts && partSize(r.size, r.part, extent) > 0)
}

// appendSums appends the checksums of live record r, whose header is b.
func appendSums(sums []uint64, b []byte, r record, extent int64) []uint64 {
	for i := range pieces(partSize(r.size, r.part, extent)) {
		sums = append(sums, le.Uint64(b[recordLen+8*i:]))
	}
	return sums
}

// A summary lists the records of a sealed segment in the order of their places.
// Its blocks lie at the segment's end, the first one last.

// summaryBlocks is how many blocks the summary of n records has.
func summaryBlocks(n int) int64 { return int64(max(1, (n+perSummary-1)/perSummary)) }

// putSummary fills b with block number i of the summary of the segment at off,
// and returns how many records of rs it holds.
func putSummary(b []byte, seed, gen uint64, i int, tail, off int64, rs []record) int {
	total := summaryBlocks(len(rs))
	rs = rs[min(len(rs), i*perSummary):min(len(rs), (i+1)*perSummary)]
	clear(b[:block])
	copy(b[8:], summaryMagic[:])
	le.PutUint64(b[16:], gen)
	le.PutUint32(b[24:], uint32(i))
	le.PutUint32(b[28:], uint32(total))
	le.PutUint32(b[32:], uint32(len(rs)))
	le.PutUint64(b[40:], uint64(tail))
	for j, r := range rs {
		e := b[summaryHead+j*summaryEntry:]
		r.key.store(e)
		le.PutUint64(e[16:], r.seq)
		le.PutUint64(e[24:], r.from)
		le.PutUint32(e[32:], uint32(r.size))
		le.PutUint32(e[36:], uint32((r.off-off)/block))
		e[40], e[41], e[42], e[43] = r.key.n, byte(r.part), byte(r.kind), r.flags()
	}
	sealStruct(b[:block], seed)
	return len(rs)
}

// summary is the head of a summary's block.
type summary struct {
	block, blocks int
	tail          int64 // the end of the last record, relative to the segment
}

// parseSummary appends the records of a summary's block b, of a segment of gen
// at off with size bytes.
func parseSummary(rs []record, b []byte, seed, gen uint64, off, size, extent int64) (summary, []record, bool) {
	if len(b) < block || !intact(b[:block], &summaryMagic, seed) || le.Uint64(b[16:]) != gen {
		return summary{}, rs, false
	}
	h := summary{int(le.Uint32(b[24:])), int(le.Uint32(b[28:])), int64(le.Uint64(b[40:]))}
	n := int(le.Uint32(b[32:]))
	if n > perSummary || h.blocks < 1 || h.block < 0 || h.block >= h.blocks || h.tail < block || h.tail > size-int64(h.blocks)*block || h.tail%block != 0 {
		return summary{}, rs, false
	}
	for j := range n {
		e := b[summaryHead+j*summaryEntry:]
		r := record{
			kind:   recordKind(e[42]),
			pinned: e[43]&1 != 0,
			part:   int(e[41]),
			key:    loadKey(e, e[40]),
			off:    off + int64(le.Uint32(e[36:]))*block,
			gen:    gen,
			seq:    le.Uint64(e[16:]),
			from:   le.Uint64(e[24:]),
			size:   int64(le.Uint32(e[32:])),
		}
		if !r.valid(extent) || r.off < off+block || r.off+span(partSize(r.size, r.part, extent)) > off+h.tail {
			return summary{}, rs, false
		}
		rs = append(rs, r)
	}
	return h, rs, true
}

// geometry chooses the segments of a new pool whose smallest device has size
// bytes. A segment has room for a power of two of data and 1/128 of that and 16 blocks
// for headers: 128 MiB from 1 GiB up, 256 MiB from 64 GiB up, an eighth of smaller devices.
func geometry(size int64) (segSize, extent int64, err error) {
	data := int64(128 << 20)
	if size >= 64<<30 {
		data = 256 << 20
	}
	for data > 128<<10 && 8*data > size {
		data /= 2
	}
	segSize = data + roundUp(data/128) + min(16, data/128/block+3)*block
	if segmentsOf(size, segSize) < minSegments {
		return 0, 0, fmt.Errorf("kvlayer: a device of %d bytes is too small for a store: give it at least 2 MiB", size)
	}
	return segSize, max(pieceSize, min(maxExtent, data/4)), nil
}

// segmentsOf is how many segments a device of size bytes has.
func segmentsOf(size, segSize int64) int64 { return max(0, size-dataStart) / segSize }
