package tcp

import (
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kvof/kvof/internal/sock"
	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/target"
	"github.com/kvof/kvof/uring"
)

// sender puts PDUs on the wire in order. Whoever has one queues it; whoever finds nobody writing writes all that is
// queued together. When the socket is full the rest is left to the sender's own goroutine.
type sender struct {
	c *conn

	mu      sync.Mutex
	queue   []pdu // to be written
	writing bool  // somebody is
	closed  bool
	quiet   sync.Cond // nobody is writing any more

	// Those of whoever is writing.
	batch  []pdu
	iov    []unix.Iovec // the batch's
	left   []unix.Iovec // of these, to be sent
	wake   chan struct{}
	exited chan struct{}
	full   bool // written under mu
}

// pdu is one PDU on its way out.
type pdu struct {
	n    int // bytes of head
	buf  uring.Buf
	tail [nvmeof.DigestSize]byte
	of   *target.Request // told when the piece is out
	end  *target.Request // released when the PDU is out
	head [nvmeof.DataPDUSize + nvmeof.DigestSize + 128]byte
}

func (s *sender) init(c *conn) {
	s.c = c
	s.wake = make(chan struct{}, 1)
	s.exited = make(chan struct{})
	s.quiet.L = &s.mu
}

// add queues a PDU and returns it for the caller to fill, with mu held; nil when the connection is over.
func (s *sender) add() *pdu {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	if len(s.queue) == cap(s.queue) {
		s.queue = append(s.queue, pdu{})
	} else {
		s.queue = s.queue[:len(s.queue)+1]
	}
	p := &s.queue[len(s.queue)-1]
	p.buf, p.of, p.end = uring.Buf{}, nil, nil
	return p
}

// Send implements target.Conn: one C2HData PDU.
func (c *conn) Send(r *target.Request, b uring.Buf, last bool) {
	var digest uint32
	if c.dg.Data {
		digest = nvmeof.Digest(0, b.Data)
	}
	p := c.tx.add()
	if p == nil {
		b.Put()
		r.Taken()
		return
	}
	flags := uint8(0)
	if last {
		flags = nvmeof.FlagLast
	}
	p.n = nvmeof.EncodeData(p.head[:], nvmeof.PDUC2HData, flags, r.Cmd.CID(), 0, r.Sent, len(b.Data), c.align, c.dg)
	p.buf, p.of = b, r
	p.tail = [4]byte{byte(digest), byte(digest >> 8), byte(digest >> 16), byte(digest >> 24)}
	c.tx.mu.Unlock()
	if r.Async && !last { // else Complete, which follows at once, flushes
		c.tx.flush()
	}
}

// Complete implements target.Conn: a response capsule, behind the data.
func (c *conn) Complete(r *target.Request) {
	p := c.tx.add()
	if p == nil {
		r.Release()
		return
	}
	p.n = nvmeof.EncodeResponse(p.head[:], &r.CQE, c.dg)
	p.end = r
	async := r.Async
	c.tx.mu.Unlock()
	if async { // the reader flushes when it has no more to read
		c.tx.flush()
	}
}

// r2t queues the request for a command's data and tells whether the caller must flush. Once r2t has returned the
// command may be over at any time.
func (s *sender) r2t(r *target.Request) (flush bool) {
	p := s.add()
	if p == nil {
		return false
	}
	p.n = nvmeof.EncodeR2T(p.head[:], r.Cmd.CID(), r.Tag, 0, r.PullLength, s.c.dg)
	flush = r.Async
	s.mu.Unlock()
	return flush
}

// term sends a termination request, at most MaxTermSize bytes, after what is queued, and returns when it is out or cannot be.
func (s *sender) term(b []byte) {
	if p := s.add(); p != nil {
		p.n = copy(p.head[:], b)
		s.mu.Unlock()
		s.flush()
		s.settle() // somebody else may be writing
	}
}

// flush writes what is queued unless somebody else is already at it.
func (s *sender) flush() {
	s.mu.Lock()
	if s.writing || s.closed || len(s.queue) == 0 {
		s.mu.Unlock()
		return
	}
	s.writing = true
	s.mu.Unlock()
	s.drain(false)
}

// drain writes until nothing is queued. The caller has set writing. Without wait, it leaves a full socket to loop.
func (s *sender) drain(wait bool) {
	for {
		if len(s.left) == 0 {
			if !s.next() {
				return
			}
			s.vectors()
		}
		var err error
		if s.left, err = s.c.sock.Write(s.left, wait); err != nil {
			s.c.Close("writing failed: " + err.Error())
			s.release()
			s.mu.Lock()
			s.closed = true
			s.mu.Unlock()
			s.discard()
			return
		}
		if len(s.left) == 0 {
			s.release()
			continue
		}
		if !wait {
			s.mu.Lock()
			s.full = true
			s.mu.Unlock()
			s.wake <- struct{}{}
			return
		}
	}
}

// next takes the queue as the batch to write; false when it is empty, and then nobody is writing any more.
func (s *sender) next() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.full = false
	if len(s.queue) == 0 {
		s.writing = false
		s.quiet.Broadcast()
		return false
	}
	s.batch, s.queue = s.queue, s.batch[:0]
	return true
}

// vectors describes the batch's bytes.
func (s *sender) vectors() {
	v := s.iov[:0]
	for i := range s.batch {
		p := &s.batch[i]
		v = append(v, sock.Vec(p.head[:p.n]))
		if len(p.buf.Data) > 0 {
			v = append(v, sock.Vec(p.buf.Data))
			if s.c.dg.Data {
				v = append(v, sock.Vec(p.tail[:]))
			}
		}
	}
	s.iov, s.left = v, v
}

// release gives back what the batch held.
func (s *sender) release() {
	for i := range s.batch {
		p := &s.batch[i]
		p.buf.Put()
		if p.of != nil {
			p.of.Taken()
		}
		if p.end != nil {
			p.end.Release()
		}
		p.buf, p.of, p.end = uring.Buf{}, nil, nil
	}
	s.batch = s.batch[:0]
}

// discard drops what is queued: the connection is over.
func (s *sender) discard() {
	for s.next() {
		s.release()
	}
}

// loop is the goroutine that waits for a full socket.
func (s *sender) loop() {
	defer close(s.exited)
	for range s.wake {
		s.drain(true)
	}
}

// blocked tells whether the socket is full.
func (s *sender) blocked() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.full
}

// close drops what is queued and takes no more. The socket is closed: whoever is writing fails at once.
func (s *sender) close() {
	s.mu.Lock()
	s.closed = true
	idle := !s.writing
	s.writing = true
	s.mu.Unlock()
	if idle {
		s.discard()
	}
}

// settle waits until nobody is writing.
func (s *sender) settle() {
	s.mu.Lock()
	for s.writing {
		s.quiet.Wait()
	}
	s.mu.Unlock()
}

// stop returns when nobody writes any more, everything is given back, and the sender's goroutine has ended.
func (s *sender) stop() {
	s.settle()
	close(s.wake)
	<-s.exited
}
