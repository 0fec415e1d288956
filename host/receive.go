package host

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/kvof/kvof/internal/sock"
	"github.com/kvof/kvof/nvmeof"
)

// inbox buffers what arrives ahead of its place: PDU headers, and the data of small PDUs, which are then copied.
// The data of large PDUs goes from the socket to where it belongs.
type inbox struct {
	buf  []byte
	r, w int
	// ahead is how much to read beyond what is needed now. After a large PDU it is little, since what follows is
	// likely large too and should not be copied.
	ahead int
	last  [nvmeof.DataPDUSize]byte // header of the PDU in hand, for a termination request
}

const (
	inboxSize  = 64 << 10
	aheadLarge = 512 // a few headers
	largePDU   = 32 << 10
)

func (b *inbox) init() { b.buf, b.ahead = make([]byte, inboxSize), inboxSize }

// receive runs until the connection ends, and then finishes all commands.
func (q *tcpQueue) receive() {
	var err error
	for err == nil {
		err = q.receivePDU()
	}
	var term *nvmeof.TermError
	switch {
	case errors.As(err, &term):
		if !nvmeof.IsTermReq(q.in.last[0]) {
			q.sendTerm(term)
		}
		err = fmt.Errorf("%w: %w: %w", ErrConnectionLost, ErrProtocol, term)
	case errors.Is(err, io.EOF):
		err = fmt.Errorf("%w: the target closed it", ErrConnectionLost)
	case !errors.Is(err, ErrConnectionLost):
		err = fmt.Errorf("%w: %w", ErrConnectionLost, err)
	}
	q.fail(err)
	q.drain()
}

// sendTerm tells the target why the connection ends, if the socket is free for it.
func (q *tcpQueue) sendTerm(e *nvmeof.TermError) {
	q.mu.Lock()
	if q.sending || q.err != nil {
		q.mu.Unlock()
		return
	}
	q.sending = true // for good
	q.mu.Unlock()
	q.out.vecs[0] = sock.Vec(nvmeof.AppendTerm(nil, nvmeof.PDUH2CTermReq, e, q.in.last[:]))
	_, _ = q.sock.Write(q.out.vecs[:1], false) // best effort
	q.fail(fmt.Errorf("%w: %w: %w", ErrConnectionLost, ErrProtocol, e))
	q.abandon()
}

// peek returns the next n bytes, n at most MaxPDUHeader + DigestSize; they are valid until the next read.
func (q *tcpQueue) peek(n int) ([]byte, error) {
	b := &q.in
	for b.w-b.r < n {
		if b.r > 0 {
			b.w = copy(b.buf, b.buf[b.r:b.w])
			b.r = 0
		}
		end := min(max(b.w+b.ahead, n), len(b.buf))
		m, err := q.read(nil, b.buf[b.w:end])
		if err != nil {
			return nil, err
		}
		b.w += m
	}
	return b.buf[b.r:][:n], nil
}

// read is sock.Conn.Read of what is owed, a, except that a passed deadline only says that a command was cancelled.
func (q *tcpQueue) read(a, b []byte) (int, error) {
	for {
		n, err := q.sock.Read(a, b, max(1, len(a)))
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return n, err
		}
		q.conn.SetReadDeadline(time.Time{})
		if a != nil && q.rx != nil && q.rx.orphan.Load() { // only the reader changes rx
			return 0, nil
		}
	}
}

func (q *tcpQueue) receivePDU() error {
	b, err := q.peek(nvmeof.PDUHeaderSize)
	if err != nil {
		return err
	}
	clear(q.in.last[copy(q.in.last[:], b):])
	n, terr := nvmeof.HeaderSize(b, false, q.dg)
	if terr != nil {
		return terr
	}
	if b, err = q.peek(n); err != nil {
		return err
	}
	copy(q.in.last[:], b)
	p, terr := nvmeof.DecodePDU(b, q.dg)
	if terr != nil {
		return terr
	}
	q.in.r += n
	switch p.Type {
	case nvmeof.PDUCapsuleResp:
		return q.receiveResponse(&p)
	case nvmeof.PDUC2HData:
		return q.receiveData(&p)
	case nvmeof.PDUR2T:
		return q.receiveR2T(&p)
	case nvmeof.PDUC2HTermReq:
		t := p.Term()
		t.Why = "the target ended the connection"
		return fmt.Errorf("%w: %s", ErrConnectionLost, t.Error())
	}
	return &nvmeof.TermError{FES: nvmeof.FESSequence, Why: fmt.Sprintf("PDU type %02Xh after connection set-up", p.Type)}
}

// active finds the slot of a command in flight; the caller holds the mutex.
func (q *tcpQueue) active(cid uint16) *slot {
	if i := int(cid % maxDepth); i < len(q.slots) {
		if s := &q.slots[i]; s.state == slotActive && s.cid == cid && s.capsule {
			return s
		}
	}
	return nil
}

func unknownCID(off uint32) error {
	return &nvmeof.TermError{FES: nvmeof.FESInvalidField, FEI: off, Why: "PDU for a command that is not in flight"}
}

func (q *tcpQueue) receiveResponse(p *nvmeof.PDU) error {
	cqe := nvmeof.Completion(p.Raw[nvmeof.PDUHeaderSize:])
	q.mu.Lock()
	defer q.mu.Unlock()
	s := q.active(cqe.CID())
	if s == nil {
		return unknownCID(20)
	}
	s.cqe = cqe
	q.finish(s)
	return nil
}

func (q *tcpQueue) receiveR2T(p *nvmeof.PDU) error {
	q.mu.Lock()
	s := q.active(p.CCCID())
	var err error
	off, n := p.DATAO(), p.DATAL()
	switch {
	case q.err != nil: // nobody sends any more
		err = q.err
	case s == nil:
		err = unknownCID(8)
	case s.orphan.Load():
		err = fmt.Errorf("%w: the target asks for the data of a command that was given up", ErrConnectionLost)
	case s.dir != nvmeof.HostToController || s.inCapsule || n == 0 || off != s.asked || uint64(off)+uint64(n) > uint64(s.data.size):
		err = &nvmeof.TermError{FES: nvmeof.FESDataOutOfRange, FEI: 12, Why: fmt.Sprintf("R2T for %d bytes at %d of a command", n, off)}
	case s.sent != s.asked:
		err = &nvmeof.TermError{FES: nvmeof.FESDataLimit, Why: "more than one R2T at a time for a command"}
	}
	if err != nil {
		q.mu.Unlock()
		return err
	}
	s.ttag, s.asked = p.TTAG(), off+n
	s.refs++
	q.sendq = append(q.sendq, s.index)
	if q.sending {
		q.mu.Unlock()
		return nil
	}
	q.sending = true
	if n > largePDU { // sending that takes a while, which the reader has better uses for
		q.handed = true
		q.mu.Unlock()
		q.kick <- struct{}{}
		return nil
	}
	q.mu.Unlock()
	q.flush(false)
	return nil
}

func (q *tcpQueue) receiveData(p *nvmeof.PDU) error {
	cid, off, n, pad, flags := p.CCCID(), p.DATAO(), p.DataLen(), p.Pad(), p.Flags
	if pad > 0 {
		if _, err := q.peek(pad); err != nil { // at most 255 bytes
			return err
		}
		q.in.r += pad
	}
	success := flags&nvmeof.FlagSuccess != 0
	q.mu.Lock()
	s := q.active(cid)
	var err error
	keep := false
	switch {
	case s == nil:
		err = unknownCID(8)
	case success && flags&nvmeof.FlagLast == 0:
		err = &nvmeof.TermError{FES: nvmeof.FESInvalidField, FEI: 1, Why: "SUCCESS without LAST"}
	case s.dir != nvmeof.ControllerToHost:
		err = &nvmeof.TermError{FES: nvmeof.FESDataOutOfRange, FEI: 8, Why: "data for a command that takes none"}
	case s.orphan.Load():
	case off != s.got || uint64(off)+uint64(n) > uint64(s.data.size):
		err = &nvmeof.TermError{FES: nvmeof.FESDataOutOfRange, FEI: 12, Why: fmt.Sprintf("%d bytes of data at %d of a command with %d, %d of them here", n, off, s.data.size, s.got)}
	default:
		keep = true
		q.rx = s
	}
	q.mu.Unlock()
	if err != nil {
		return err
	}
	crc, err := q.receiveBytes(s, keep, int(off), int(n))
	if err != nil {
		return err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.rx = nil
	q.detach(s)
	s.got += n
	if q.dg.Data {
		q.mu.Unlock() // a cancel must not wait for these bytes
		d, err := q.peek(nvmeof.DigestSize)
		q.mu.Lock()
		if err != nil {
			return err
		}
		q.in.r += nvmeof.DigestSize
		if binary.LittleEndian.Uint32(d) != crc {
			s.err = ErrDigest // the command fails, the connection is sound (TCP, Data Digest)
		}
	}
	if success {
		s.cqe = nvmeof.MakeCompletion(0, 0, 0, q.id, s.cid, nvmeof.Success)
		q.finish(s)
	}
	return nil
}

// receiveBytes receives a PDU's n data bytes into the slot's data from off on, or nowhere when it is not to be kept, as that of
// an orphan, and sums them if data digests are on.
func (q *tcpQueue) receiveBytes(s *slot, keep bool, off, n int) (crc uint32, err error) {
	b := &q.in
	b.ahead = inboxSize
	if n >= largePDU {
		b.ahead = aheadLarge
	}
	for n > 0 {
		if keep && s.orphan.Load() {
			q.mu.Lock()
			q.detach(s)
			q.mu.Unlock()
			keep = false
		}
		var part, dst []byte
		if keep {
			dst = s.data.at(off)
			dst = dst[:min(len(dst), n)]
		}
		if b.r == b.w && dst != nil {
			b.r, b.w = 0, 0
			m, err := q.read(dst, b.buf[:b.ahead])
			if err != nil {
				return 0, err
			}
			part = dst[:min(m, len(dst))]
			b.w = m - len(part)
		} else {
			if b.r == b.w {
				b.r, b.w = 0, 0
				if b.w, err = q.read(nil, b.buf); err != nil {
					return 0, err
				}
			}
			part = b.buf[b.r:][:min(n, b.w-b.r)]
			if keep {
				part = part[:copy(dst, part)]
			}
			b.r += len(part)
		}
		if q.dg.Data {
			crc = nvmeof.Digest(crc, part)
		}
		off, n = off+len(part), n-len(part)
	}
	return crc, nil
}
