// Package keys is kvof's key scheme: how a caller's key becomes an NVMe key of at most 16 bytes, and what is stored beside a
// value so that a reader can tell whether it is its key's. docs/keys.md specifies both; testdata/vectors.json has examples for every
// language.
package keys

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"

	"github.com/zeebo/xxh3"
)

// MaxLen is the longest caller's key in bytes.
const MaxLen = 1<<16 - 1

// ErrLength is the error of a key of 0 or more than MaxLen bytes.
var ErrLength = errors.New("a key has 1 to 65535 bytes")

// version is the first field that is hashed.
const version = "kvof-key-1"

// Scope separates the hashed keys of those who share a namespace.
type Scope struct {
	Tenant string `json:"tenant"`
	Model  string `json:"model"`
	Rank   string `json:"rank"`
	Group  string `json:"group"`
	Salt   string `json:"salt"`
}

// Key is the NVMe key that stands for a caller's key.
type Key struct {
	bytes  [16]byte
	len    uint8
	hashed bool
	digest [sha256.Size]byte
}

// Bytes is the NVMe key, 1 to 16 bytes that share k's memory.
func (k *Key) Bytes() []byte { return k.bytes[:k.len] }

// Hashed tells whether the NVMe key is a digest, so that the value has a trailer.
func (k *Key) Hashed() bool { return k.hashed }

// Digest is the full digest of a hashed key, zeroes otherwise.
func (k *Key) Digest() [sha256.Size]byte { return k.digest }

// Scheme makes keys within one scope. It is made once, and serves many goroutines.
type Scheme struct {
	prefix []byte // what the digest covers before the key's bytes, but for their length
	all    bool
}

// NewScheme makes the scheme of a scope. hashAll hashes every key, so that the scope separates short keys too.
func NewScheme(s Scope, hashAll bool) *Scheme {
	h := &Scheme{all: hashAll}
	for _, f := range []string{version, s.Tenant, s.Model, s.Rank, s.Group, s.Salt} {
		h.prefix = binary.LittleEndian.AppendUint32(h.prefix, uint32(len(f)))
		h.prefix = append(h.prefix, f...)
	}
	return h
}

// Key maps a caller's key: 1 to 16 bytes are used as they are; exactly 32 hexadecimal digits stand for their 16 bytes;
// everything else is hashed.
func (s *Scheme) Key(b []byte) (k Key, err error) {
	if len(b) == 0 || len(b) > MaxLen {
		return k, ErrLength
	}
	if !s.all {
		if len(b) <= len(k.bytes) {
			k.len = uint8(copy(k.bytes[:], b))
			return k, nil
		}
		if len(b) == 2*len(k.bytes) {
			if _, err := hex.Decode(k.bytes[:], b); err == nil {
				k.len = uint8(len(k.bytes))
				return k, nil
			}
		}
	}
	var short [512]byte
	data := append(short[:0], s.prefix...)
	data = binary.LittleEndian.AppendUint32(data, uint32(len(b)))
	data = append(data, b...)
	k.digest = sha256.Sum256(data)
	k.hashed, k.len = true, uint8(copy(k.bytes[:], k.digest[:]))
	return k, nil
}

// TrailerSize is how many bytes follow the payload in the value of a hashed key.
const TrailerSize = 64

// Offsets in the trailer. Integers are little-endian, sums are XXH3-64 without a seed.
const (
	offMagic   = 0  // "KVOF"
	offVersion = 4  // u16: 1
	offFlags   = 6  // u16: flagSum
	offLength  = 8  // u64: of the payload in bytes
	offSum     = 16 // u64: of the payload; 0 without flagSum
	offDigest  = 24 // the full digest of the key
	offCheck   = 56 // u64: of the 56 bytes before
)

const (
	trailerMagic   = "KVOF"
	trailerVersion = 1
	flagSum        = 1 << 0 // there is a sum of the payload
)

// Sum is the running sum of a payload that lies in several pieces.
type Sum struct{ h xxh3.Hasher }

// Reset begins a new sum.
func (s *Sum) Reset() { s.h.Reset() }

// Add adds the payload's next bytes.
func (s *Sum) Add(b []byte) { _, _ = s.h.Write(b) }

// Sum returns the sum of what was added.
func (s *Sum) Sum() uint64 { return s.h.Sum64() }

// SumOf is the sum of a payload in one piece.
func SumOf(b []byte) uint64 { return xxh3.Hash(b) }

// PutTrailer writes the trailer of a payload of n bytes into b (64 bytes). sum is its sum; nil if there is none.
func (k *Key) PutTrailer(b []byte, n uint64, sum *uint64) {
	b = b[:TrailerSize]
	clear(b)
	le := binary.LittleEndian
	copy(b[offMagic:], trailerMagic)
	le.PutUint16(b[offVersion:], trailerVersion)
	if sum != nil {
		le.PutUint16(b[offFlags:], flagSum)
		le.PutUint64(b[offSum:], *sum)
	}
	le.PutUint64(b[offLength:], n)
	copy(b[offDigest:], k.digest[:])
	le.PutUint64(b[offCheck:], xxh3.Hash(b[:offCheck]))
}

// CheckTrailer tells whether b, the last 64 bytes of a value, is the trailer of a payload of n bytes under k, and the payload's sum if
// it has one. The caller compares the sum.
func (k *Key) CheckTrailer(b []byte, n uint64) (sum uint64, summed, ok bool) {
	le := binary.LittleEndian
	if len(b) != TrailerSize || string(b[offMagic:offVersion]) != trailerMagic || le.Uint16(b[offVersion:]) != trailerVersion ||
		le.Uint64(b[offCheck:]) != xxh3.Hash(b[:offCheck]) || le.Uint64(b[offLength:]) != n || !k.hashed || [32]byte(b[offDigest:offCheck]) != k.digest {
		return 0, false, false
	}
	return le.Uint64(b[offSum:]), le.Uint16(b[offFlags:])&flagSum != 0, true
}
