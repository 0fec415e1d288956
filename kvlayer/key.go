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
	b [MaxKey]byte // zero padded
	n uint8
}

// MakeKey copies b. It fails with ErrKeySize unless b has 1 to 16 bytes.
func MakeKey(b []byte) (Key, error) {
	if len(b) == 0 || len(b) > MaxKey {
		return Key{}, fmt.Errorf("%w: %d bytes", ErrKeySize, len(b))
	}
	k := Key{n: uint8(len(b))}
	copy(k.b[:], b)
	return k, nil
}

// Len is the key's length in bytes.
func (k Key) Len() int { return int(k.n) }

// Bytes returns the key's bytes, which share k's memory.
func (k *Key) Bytes() []byte { return k.b[:k.n] }

// String is the key in hex.
func (k Key) String() string { return hex.EncodeToString(k.b[:k.n]) }

// Compare orders keys by their bytes, then by length: -1, 0 or 1.
func (k Key) Compare(o Key) int {
	// A shorter key is padded with zeroes, so only equal paddings are left to the length.
	be := binary.BigEndian
	if a, b := be.Uint64(k.b[:]), be.Uint64(o.b[:]); a != b {
		return cmp.Compare(a, b)
	}
	if a, b := be.Uint64(k.b[8:]), be.Uint64(o.b[8:]); a != b {
		return cmp.Compare(a, b)
	}
	return cmp.Compare(k.n, o.n)
}
