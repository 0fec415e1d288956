package uring

import "time"

// The pieces of large payloads go to a device one after the other, as many at a time as keep it busy. A device that has more works
// on all of them together: that makes nothing faster, and all payloads are then complete late, and at the same moment, rather than one
// after the other, the first while the last is still being read.
//
// What keeps a device busy is what it moves in the time that a piece takes when it has nothing else to do; twice that is let in.

const (
	// minBulk is the least that is in flight, bytes: more than what a drive of 14 GB/s moves in 200 us, and some pieces, as
	// each that ends alone wakes somebody for itself.
	minBulk = 3 << 20
	maxBulk = 64 << 20
	// bulkPeriod is how many pieces it takes to see how fast the device is.
	bulkPeriod = 64
)

// paced tells whether o is such a piece: small operations never wait for large ones, and larger ones are those of callers that have
// a depth of their own in mind.
func (o *Op) paced() bool {
	return o.Kind.transfers() && len(o.Data) > SmallBuf && len(o.Data) <= LargeBuf && !o.Unpaced
}

// bulk is the pieces that wait for their turn.
type bulk struct {
	queue
	window int64 // what was found to keep the device busy, twice, in bytes
	moving int64 // of these

	fastest time.Duration // that a piece has ever taken
	since   time.Time     // the start of the period
	moved   int64         // bytes in it
	pieces  int           // of it
}

// limit is how many bytes may be in flight, but for the last piece.
func (b *bulk) limit() int64 { return max(b.window, minBulk) }

// admit moves ops whose turn it is to the end of to.
func (b *bulk) admit(to *queue) {
	for b.head != nil && b.moving < b.limit() {
		o := b.pop()
		b.moving += o.size()
		o.began = time.Now()
		to.push(o)
	}
}

// all moves all ops to the end of to.
func (b *bulk) all(to *queue) {
	for b.head != nil {
		o := b.pop()
		b.moving += o.size()
		to.push(o)
	}
}

// over takes notice of the end of an op that was let in.
func (b *bulk) over(o *Op) {
	b.moving -= o.size()
	if o.err == nil && !o.began.IsZero() {
		now := time.Now()
		b.took(now, now.Sub(o.began), o.size())
	}
}

// took learns from a piece of n bytes that has ended, after d. A period is so many of them, behind each of which another one waited.
func (b *bulk) took(now time.Time, d time.Duration, n int64) {
	if b.fastest == 0 || d < b.fastest {
		b.fastest = max(d, 1)
	}
	if b.pieces == 0 || b.head == nil {
		b.since, b.moved, b.pieces = now, 0, 1
		return
	}
	b.moved += n
	if b.pieces++; b.pieces == bulkPeriod {
		b.window = min(2*b.moved*int64(b.fastest)/int64(max(now.Sub(b.since), 1)), maxBulk)
		b.pieces = 0
	}
}
