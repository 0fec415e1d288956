package kvlayer

import (
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"fmt"
)

// MaxKey is the longest key in bytes.
const MaxKey = 16

// Key is an opaque key of 1 to 16 bytes. Its length is part of its identity:
// 00 and 0000 are two keys. Keys compare with ==. The zero Key is no key; it
// sorts before all.
type Key struct {
	hi, lo uint64 // big-endian, zero padded: integers sort as keys do, and travel in registers
	n      uint8
}

// MakeKey copies b. It fails with ErrKeySize unless b has 1 to 16 bytes.
func MakeKey(b []byte) (Key, error) {
	if len(b) == 0 || len(b) > MaxKey {
		return Key{}, fmt.Errorf("%w: %d bytes", ErrKeySize, len(b))
	}
	var padded [MaxKey]byte
	copy(padded[:], b)
	return loadKey(padded[:], uint8(len(b))), nil
}

// Len is the key's length in bytes.
func (k Key) Len() int { return int(k.n) }

// Append appends the key's bytes to b.
func (k Key) Append(b []byte) []byte {
	var padded [MaxKey]byte
	k.store(padded[:])
	return append(b, padded[:k.n]...)
}

// String is the key in hex.
func (k Key) String() string { return hex.EncodeToString(k.Append(nil)) }

// loadKey makes the key of n bytes that is in b, padded to 16 bytes.
func loadKey(b []byte, n uint8) Key {
	return Key{binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:]), n}
}

// store puts k, padded, in the first 16 bytes of b.
func (k Key) store(b []byte) {
	binary.BigEndian.PutUint64(b, k.hi)
	binary.BigEndian.PutUint64(b[8:], k.lo)
}

// Compare orders keys by their bytes, then by length: -1, 0 or 1.
func (k Key) Compare(o Key) int {
	// A shorter key is padded with zeroes, so only equal paddings are left to the length.
	return cmp.Or(cmp.Compare(k.hi, o.hi), cmp.Compare(k.lo, o.lo), cmp.Compare(k.n, o.n))
}
