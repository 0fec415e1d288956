package nvmeof

import "errors"

// Limits of the Key Value command set.
const (
	MaxKeyLen = 16 // bytes
	// ListKeyMax is the space one 16-byte key takes in a List reply: a length, the key, padding to 4.
	ListKeyMax = 20
)

// Store options, CDW11 bits 15:8.
const (
	StoreIfExists   = 1 << 0
	StoreIfAbsent   = 1 << 1
	StoreNoCompress = 1 << 2
)

// KeyLen is the key length in bytes as sent; not validated.
func (c *Command) KeyLen() int { return int(c[44]) }

// KVOption is the Store or Retrieve option byte.
func (c *Command) KVOption() uint8 { return c[45] }

// KVSize is CDW10: Store's value size, Retrieve's and List's host buffer size, in bytes.
func (c *Command) KVSize() uint32 { return le.Uint32(c[40:]) }

// Key copies the 16 key bytes, zero padded, out of CDW2-3 (bytes 8-15) and CDW14-15 (bytes 56-63).
func (c *Command) Key() (k [MaxKeyLen]byte) {
	copy(k[:8], c[8:16])
	copy(k[8:], c[56:64])
	return k
}

// SetKey places a key of at most 16 bytes and its length.
func (c *Command) SetKey(key []byte) {
	var k [MaxKeyLen]byte
	copy(k[:], key)
	copy(c[8:16], k[:8])
	copy(c[56:64], k[8:])
	c[44] = uint8(len(key))
}

// SetKV sets CDW10 (size in bytes) and the option byte.
func (c *Command) SetKV(size uint32, option uint8) {
	le.PutUint32(c[40:], size)
	c[45] = option
}

// KeyList builds the data of a List reply in a buffer of the caller's: u32 number of keys, then for each key u16
// length, the key, zero padding to a multiple of 4 (KV, List command).
type KeyList struct {
	b []byte
	n uint32
}

// NewKeyList starts a reply in b, from its beginning. It may grow to cap(b): slice b with a capacity (b[:0:n]) where the
// memory behind it is larger than the host's buffer. With less than 4 bytes nothing fits.
func NewKeyList(b []byte) KeyList {
	l := KeyList{b: b[:0]}
	if cap(b) >= 4 {
		l.b = append(l.b, 0, 0, 0, 0)
	}
	return l
}

// Add appends a key; false when it does not fit whole.
func (l *KeyList) Add(key []byte) bool {
	need := (2 + len(key) + 3) &^ 3
	if len(l.b) < 4 || len(l.b)+need > cap(l.b) {
		return false
	}
	end := len(l.b) + need
	l.b = le.AppendUint16(l.b, uint16(len(key)))
	l.b = append(l.b, key...)
	for len(l.b) < end {
		l.b = append(l.b, 0)
	}
	l.n++
	le.PutUint32(l.b, l.n)
	return true
}

// Bytes is the reply so far.
func (l *KeyList) Bytes() []byte { return l.b }

// DecodeKeyList calls yield for each key of a List reply; the keys alias b. It stops early when yield returns false.
func DecodeKeyList(b []byte, yield func(key []byte) bool) error {
	if len(b) < 4 {
		return errors.New("list reply is shorter than 4 bytes")
	}
	n := le.Uint32(b)
	b = b[4:]
	for ; n > 0; n-- {
		if len(b) < 2 {
			return errors.New("list reply ends inside a key")
		}
		kl := int(le.Uint16(b))
		if kl < 1 || kl > MaxKeyLen || 2+kl > len(b) {
			return errors.New("list reply has a key of a wrong length")
		}
		if !yield(b[2 : 2+kl]) {
			return nil
		}
		b = b[min((2+kl+3)&^3, len(b)):]
	}
	return nil
}
