package host

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/kvof/kvof/nvmeof"
	"github.com/zeebo/xxh3"
)

// The stored form of a split value; docs/split-values.md specifies it. Integers are little endian.

var (
	rootMagic  = []byte("kvof split value")
	notePrefix = []byte("kvof split parts")
	// partPrefix begins the key of every part and note. The rest is generation and index, big endian, so that List shows
	// a value's parts in order, its note last.
	partPrefix = []byte("\xFFkvof")
)

const (
	splitFormat = 1
	rootHeader  = 48 // bytes before the parts' digests
	noteSize    = 64
	noteIndex   = 1<<24 - 1
	maxParts    = noteIndex
	maxPart     = 1 << 30 // bytes; more would not be wise to hold in memory
)

// root is what a split value's own key holds.
type root struct {
	generation uint64
	size       int64 // of the value, bytes
	part       int64 // of each part but the last, bytes
	digests    []uint64
}

func (r *root) parts() int64 { return (r.size + r.part - 1) / r.part }

// length of part i in bytes.
func (r *root) length(i int64) int64 { return min(r.part, r.size-i*r.part) }

func (r *root) encode(key []byte) []byte {
	b := make([]byte, rootHeader, rootHeader+8*len(r.digests))
	copy(b, rootMagic)
	binary.LittleEndian.PutUint32(b[16:], splitFormat)
	binary.LittleEndian.PutUint32(b[20:], uint32(r.part))
	binary.LittleEndian.PutUint64(b[24:], uint64(r.size))
	binary.LittleEndian.PutUint64(b[32:], r.generation)
	for _, d := range r.digests {
		b = binary.LittleEndian.AppendUint64(b, d)
	}
	binary.LittleEndian.PutUint64(b[40:], rootDigest(key, b))
	return b
}

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrDamaged, fmt.Sprintf(format, args...))
}

// rootDigest covers the key, so that a copy under another key is not taken for a value of its own.
func rootDigest(key, b []byte) uint64 {
	h := xxh3.New()
	h.Write(key)
	h.Write(b[:40])
	h.Write(b[rootHeader:])
	return h.Sum64()
}

// isRoot tells whether a value is a root, from its first bytes.
func isRoot(b []byte) bool { return bytes.HasPrefix(b, rootMagic) }

// decodeRootHeader reads all of a root but its digests. size is that of the whole root in bytes.
func decodeRootHeader(b []byte, size int) (*root, error) {
	if len(b) < rootHeader || !isRoot(b) {
		return nil, damaged("not a root")
	}
	if f := binary.LittleEndian.Uint32(b[16:]); f != splitFormat {
		return nil, damaged("the root has format %d", f)
	}
	r := &root{part: int64(binary.LittleEndian.Uint32(b[20:])), size: int64(binary.LittleEndian.Uint64(b[24:])), generation: binary.LittleEndian.Uint64(b[32:])}
	if r.part < 1 || r.part > maxPart || r.size < 1 || r.size > r.part*maxParts || r.parts()*8+rootHeader != int64(size) {
		return nil, damaged("the root's sizes do not agree")
	}
	return r, nil
}

func decodeRoot(key, b []byte) (*root, error) {
	r, err := decodeRootHeader(b, len(b))
	if err != nil {
		return nil, err
	}
	if binary.LittleEndian.Uint64(b[40:]) != rootDigest(key, b) {
		return nil, damaged("the root's checksum does not match")
	}
	for b = b[rootHeader:]; len(b) > 0; b = b[8:] {
		r.digests = append(r.digests, binary.LittleEndian.Uint64(b))
	}
	return r, nil
}

// partKey is the key of part i, or with noteIndex that of the note.
func partKey(generation uint64, i int64) []byte {
	k := slices.Grow(slices.Clone(partPrefix), nvmeof.MaxKeyLen-len(partPrefix))
	k = binary.BigEndian.AppendUint64(k, generation)
	return append(k, byte(i>>16), byte(i>>8), byte(i))
}

// parsePartKey is the reverse.
func parsePartKey(key []byte) (generation uint64, i int64, ok bool) {
	if len(key) != nvmeof.MaxKeyLen || !bytes.HasPrefix(key, partPrefix) {
		return 0, 0, false
	}
	k := key[len(partPrefix):]
	return binary.BigEndian.Uint64(k), int64(k[8])<<16 | int64(k[9])<<8 | int64(k[10]), true
}

// note says which key parts are for. It is stored before the first of them and deleted after the last.
type note struct {
	key  []byte
	time time.Time // seconds
}

func (n *note) encode() []byte {
	b := make([]byte, noteSize)
	copy(b, notePrefix)
	binary.LittleEndian.PutUint32(b[16:], splitFormat)
	binary.LittleEndian.PutUint32(b[20:], uint32(len(n.key)))
	copy(b[24:40], n.key)
	binary.LittleEndian.PutUint64(b[40:], uint64(n.time.Unix()))
	binary.LittleEndian.PutUint64(b[56:], xxh3.Hash(b[:56]))
	return b
}

func decodeNote(b []byte) (*note, error) {
	if len(b) != noteSize || !bytes.HasPrefix(b, notePrefix) || binary.LittleEndian.Uint32(b[16:]) != splitFormat ||
		binary.LittleEndian.Uint64(b[56:]) != xxh3.Hash(b[:56]) {
		return nil, errors.New("not a note of parts")
	}
	n := binary.LittleEndian.Uint32(b[20:])
	if n < 1 || n > nvmeof.MaxKeyLen {
		return nil, errors.New("note of parts has a wrong key")
	}
	return &note{key: b[24 : 24+n], time: time.Unix(int64(binary.LittleEndian.Uint64(b[40:])), 0)}, nil
}
