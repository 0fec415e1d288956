package host

import (
	"encoding/binary"
	"fmt"

	"github.com/kvof/kvof/internal/sock"
	"github.com/kvof/kvof/nvmeof"
	"golang.org/x/sys/unix"
)

// outbox is the sender's state: a batch of slots taken from sendq, and the pieces of the write under way. It belongs
// to whoever owns queue.sending.
type outbox struct {
	batch []uint16 // being sent, from pos on
	pos   int
	ready []uint16 // whose last byte is in vecs
	vecs  [maxVecs]unix.Iovec
	left  []unix.Iovec // of these, to be sent
	n     int
	bytes int
	hdrs  [maxVecs / 2][nvmeof.DataPDUSize + nvmeof.DigestSize + maxAlign]byte
	tails [maxVecs / 2][nvmeof.DigestSize]byte
	pdus  int
}

func (o *outbox) init(depth int) {
	o.batch = make([]uint16, 0, depth)
	o.ready = make([]uint16, 0, depth)
}

// What is gathered into one write: pieces, and bytes. With data digests it is small, so that what was summed is still in the cache when
// the kernel copies it.
const (
	maxVecs        = 128
	maxWrite       = 4 << 20
	maxWriteDigest = 256 << 10
)

// flush sends all that is queued; the caller owns q.sending and loses it. It waits for a full socket only if wait is
// set, and leaves the rest to the writer goroutine otherwise.
func (q *tcpQueue) flush(wait bool) {
	for q.gather() {
		var err error
		q.out.left, err = q.sock.Write(q.out.left, wait)
		if err == nil && len(q.out.left) > 0 { // would wait
			q.mu.Lock()
			if q.err == nil {
				q.handed = true
				q.mu.Unlock()
				q.kick <- struct{}{}
				return
			}
			err = q.err
			q.mu.Unlock()
		}
		if err != nil {
			q.fail(fmt.Errorf("%w: %w", ErrConnectionLost, err))
			q.abandon()
			return
		}
	}
}

// writer continues where a submitter found the socket full.
func (q *tcpQueue) writer() {
	for {
		select {
		case <-q.kick:
			q.flush(true)
		case <-q.dead:
			q.mu.Lock()
			handed := q.handed
			q.mu.Unlock()
			if handed {
				q.flush(true) // fails, and lets go of the slots
			}
			return
		}
	}
}

// gather prepares the next write. It lets go of the slots that are sent, and when nothing is left it gives up
// q.sending and returns false.
func (q *tcpQueue) gather() bool {
	if len(q.out.left) > 0 {
		return true // handed over
	}
	o := &q.out
	if o.pos == len(o.batch) {
		q.mu.Lock()
		q.sentLocked()
		if len(q.sendq) == 0 {
			q.sending, q.handed = false, false
			q.mu.Unlock()
			return false
		}
		o.batch, q.sendq, o.pos = q.sendq, o.batch[:0], 0
		q.mu.Unlock()
	} else if len(o.ready) > 0 {
		q.mu.Lock()
		q.sentLocked()
		q.mu.Unlock()
	}
	limit := maxWrite
	if q.dg.Data {
		limit = maxWriteDigest
	}
	o.n, o.bytes, o.pdus = 0, 0, 0
	for o.pos < len(o.batch) && o.n+pduVecs <= maxVecs && o.pdus < len(o.hdrs) && o.bytes < limit {
		if s := &q.slots[o.batch[o.pos]]; !q.gatherPDU(s) {
			o.ready = append(o.ready, s.index)
			o.pos++
		}
	}
	o.left = o.vecs[:o.n]
	return true
}

func (q *tcpQueue) sentLocked() {
	for _, i := range q.out.ready {
		q.unref(&q.slots[i])
	}
	q.out.ready = q.out.ready[:0]
}

// gatherPDU adds the slot's next PDU to the write, and reports whether it has more.
func (q *tcpQueue) gatherPDU(s *slot) bool {
	o := &q.out
	q.mu.Lock()
	if !s.capsule {
		s.capsule = true
		q.mu.Unlock()
		o.add(s.hdr[:s.hdrLen])
		if s.inCapsule {
			q.addData(s, 0, s.data.size)
		}
		return false
	}
	off := s.sent
	n := s.data.fit(int(off), min(int(s.asked-off), q.maxData), maxVecs-o.n-2)
	s.sent += uint32(n)
	flags := uint8(0)
	if s.sent == s.asked {
		flags = nvmeof.FlagLast
	}
	ttag, cid := s.ttag, s.cid
	q.mu.Unlock()
	if n == 0 {
		return false
	}
	h := o.hdrs[o.pdus][:]
	o.add(h[:nvmeof.EncodeData(h, nvmeof.PDUH2CData, flags, cid, ttag, off, n, q.align, q.dg)])
	q.addData(s, int(off), n)
	return flags == 0
}

// addData adds n bytes of the slot's data from off, and their digest.
func (q *tcpQueue) addData(s *slot, off, n int) {
	o := &q.out
	var crc uint32
	for n > 0 {
		b := s.data.at(off)
		b = b[:min(len(b), n)]
		o.add(b)
		if q.dg.Data {
			crc = nvmeof.Digest(crc, b)
		}
		off, n = off+len(b), n-len(b)
	}
	if q.dg.Data {
		tail := o.tails[o.pdus][:]
		binary.LittleEndian.PutUint32(tail, crc)
		o.add(tail)
	}
	o.pdus++
}

func (o *outbox) add(b []byte) {
	o.vecs[o.n] = sock.Vec(b)
	o.n++
	o.bytes += len(b)
}

// abandon lets go of every slot on the send path of a failed queue; the caller owns q.sending, which stays set.
func (q *tcpQueue) abandon() {
	q.mu.Lock()
	defer q.mu.Unlock()
	o := &q.out
	q.sentLocked()
	for _, list := range [][]uint16{o.batch[o.pos:], q.sendq} {
		for _, i := range list {
			q.unref(&q.slots[i])
		}
	}
	o.batch, o.pos, q.sendq, q.handed = o.batch[:0], 0, q.sendq[:0], false
	clear(o.vecs[:])
	o.left = nil
}
