package host

import (
	"context"
	"fmt"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kvof/kvof/internal/sock"
	"github.com/kvof/kvof/nvmeof"
)

// A command identifier is a slot number with a generation above it, so that a stray or repeated completion of an
// earlier command cannot be taken for one of the slot's next command.
const (
	slotBits = 10
	maxDepth = 1 << slotBits
)

// tcpQueue is one NVMe queue pair on its own TCP connection. Three parties share it: submitters, who put their capsule
// into sendq; whoever of them finds sending unset, and so sends for all (on a full socket the writer goroutine takes
// over); and the reader goroutine, which receives everything and finishes commands.
type tcpQueue struct {
	id        uint16
	conn      *net.TCPConn
	sock      *sock.Conn
	dg        nvmeof.Digests
	align     int // of data in PDUs that the host sends, bytes (CPDA)
	maxData   int // data bytes in one H2CData PDU (MAXH2CDATA)
	inCapsule int // data bytes that fit into a command capsule
	onFail    func(error)

	slots []slot
	free  chan uint16
	in    inbox
	out   outbox
	kick  chan struct{} // wakes the writer
	dead  chan struct{} // closed after err is set
	wg    sync.WaitGroup

	mu       sync.Mutex
	err      error
	rx       *slot // whose buffer the reader is filling
	sendq    []uint16
	sending  bool // someone owns out; sendq is not empty only while this is set
	handed   bool // the owner of out is the writer goroutine
	inflight int
}

type slotState uint8

const (
	slotFree slotState = iota
	slotActive
	slotFinished // completed; waits only for the sender to let go of its data
)

// slot is the place of one command in flight. The mutex of its queue guards it from enqueue to release.
type slot struct {
	index     uint16
	cid       uint16
	state     slotState
	dir       nvmeof.Direction
	inCapsule bool
	capsule   bool   // the capsule is on its way
	refs      int    // entries in sendq and in the sender's batch
	data      pieces // the command's data
	got       uint32 // bytes received
	asked     uint32 // bytes the controller asked for by R2T, in all
	sent      uint32 // bytes handed to the sender, in all
	ttag      uint16 // of the R2T being answered
	hdr       [nvmeof.CapsuleCmdSize + nvmeof.DigestSize + maxAlign]byte
	hdrLen    int
	cqe       nvmeof.Completion
	err       error
	done      chan struct{} // cap 1
	orphan    atomic.Bool   // nobody waits: data is discarded, the slot goes back when the completion comes
	detach    chan struct{} // closed by the reader when it has let go of an orphan's buffer
}

const maxAlign = 128

// start completes a queue whose connection is set up and starts its goroutines.
func (q *tcpQueue) start(depth int) error {
	s, err := sock.New(q.conn)
	if err != nil {
		return err
	}
	q.sock = s
	q.slots = make([]slot, depth)
	q.free = make(chan uint16, depth)
	q.sendq = make([]uint16, 0, depth)
	q.out.init(depth)
	q.in.init()
	q.kick, q.dead = make(chan struct{}, 1), make(chan struct{})
	for i := range q.slots {
		q.slots[i].index, q.slots[i].cid = uint16(i), uint16(i)
		q.slots[i].done = make(chan struct{}, 1)
		q.free <- uint16(i)
	}
	q.wg.Go(q.receive)
	q.wg.Go(q.writer)
	return nil
}

func (q *tcpQueue) do(ctx context.Context, cmd nvmeof.Command, d data) (nvmeof.Completion, int, error) {
	s, err := q.acquire(ctx)
	if err != nil {
		return nvmeof.Completion{}, 0, err
	}
	s.data.set(d)
	q.prepare(s, &cmd)
	if err := q.enqueue(s); err != nil {
		return nvmeof.Completion{}, 0, err
	}
	return q.await(ctx, s)
}

func (q *tcpQueue) acquire(ctx context.Context) (*slot, error) {
	select {
	case i := <-q.free:
		return &q.slots[i], nil
	default:
	}
	select {
	case i := <-q.free:
		return &q.slots[i], nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-q.dead:
		return nil, q.err
	}
}

// prepare fills a slot that has its data and that nobody else sees yet, and encodes its capsule.
func (q *tcpQueue) prepare(s *slot, cmd *nvmeof.Command) {
	s.dir = cmd.Direction()
	s.inCapsule, s.capsule = false, false
	s.got, s.asked, s.sent = 0, 0, 0
	s.err = nil
	n := 0
	limit := q.inCapsule
	if cmd.Opcode() == nvmeof.OpFabrics {
		limit = max(limit, nvmeof.ConnectDataSize) // Connect's data is always in the capsule
	}
	if s.dir == nvmeof.HostToController && s.data.size <= limit && len(s.data.list) <= pduVecs-2 {
		s.inCapsule, n = s.data.size > 0, s.data.size
	}
	id := uint8(nvmeof.SGLTransport)
	if s.inCapsule {
		id = nvmeof.SGLOffset
	}
	cmd.SetCID(s.cid)
	cmd.SetSGL(nvmeof.MakeSGL(id, 0, uint32(s.data.size)))
	s.hdrLen = nvmeof.EncodeCapsule(s.hdr[:], cmd, n, q.align, q.dg)
}

// enqueue puts the slot's capsule on its way.
func (q *tcpQueue) enqueue(s *slot) error {
	q.mu.Lock()
	if q.err != nil {
		q.mu.Unlock()
		s.data.drop()
		q.free <- s.index
		return q.err
	}
	s.state, s.refs = slotActive, 1
	q.sendq = append(q.sendq, s.index)
	q.inflight++
	if q.sending {
		q.mu.Unlock()
		return nil
	}
	q.sending = true
	busy := q.inflight > 1
	q.mu.Unlock()
	if busy {
		// Others that the reader woke together with this one are about to submit too: one write for all.
		runtime.Gosched()
	}
	q.flush(false)
	return nil
}

func (q *tcpQueue) await(ctx context.Context, s *slot) (nvmeof.Completion, int, error) {
	if ctx.Done() == nil {
		<-s.done
	} else {
		select {
		case <-s.done:
		case <-ctx.Done():
			if !q.cancel(s) {
				return nvmeof.Completion{}, 0, context.Cause(ctx)
			}
		}
	}
	cqe, got, err := s.cqe, int(s.got), s.err
	s.data.drop()
	q.free <- s.index
	return cqe, got, err
}

// cancel ends the wait for a slot. When it returns nothing reads or writes the slot's buffer any more. It reports
// whether the command finished after all; otherwise the slot goes back by itself when its completion comes.
func (q *tcpQueue) cancel(s *slot) (finished bool) {
	q.mu.Lock()
	switch {
	case s.state == slotFinished && s.refs == 0:
	case s.dir == nvmeof.HostToController && s.data.size > 0 && s.refs > 0:
		// Part of the data may be sent and the rest must never be other bytes: the connection has to go.
		q.mu.Unlock()
		q.fail(fmt.Errorf("%w: a command was given up while its data was being sent", ErrConnectionLost))
		<-s.done
		return true
	case q.rx == s:
		detach := make(chan struct{})
		s.detach = detach
		s.orphan.Store(true)
		q.mu.Unlock()
		q.conn.SetReadDeadline(time.Unix(1, 0)) // wakes the reader
		<-detach
		return false
	default:
		s.data.drop()
		s.orphan.Store(true)
		q.mu.Unlock()
		return false
	}
	q.mu.Unlock()
	<-s.done
	return true
}

// finish completes a slot; the caller holds the mutex.
func (q *tcpQueue) finish(s *slot) {
	s.state = slotFinished
	if s.refs == 0 {
		q.release(s)
	}
}

// unref takes a slot's entry off the send path; the caller holds the mutex.
func (q *tcpQueue) unref(s *slot) {
	s.refs--
	if s.refs == 0 && s.state == slotFinished {
		q.release(s)
	}
}

// release hands a finished slot to its waiter, or back when there is none; the caller holds the mutex.
func (q *tcpQueue) release(s *slot) {
	q.inflight--
	s.cid += maxDepth
	if s.orphan.Load() {
		s.orphan.Store(false)
		s.state = slotFree
		s.data.drop()
		q.free <- s.index
		return
	}
	s.done <- struct{}{}
}

// fail ends the queue: the connection is closed, and everything waiting returns err. Idempotent.
func (q *tcpQueue) fail(err error) {
	q.mu.Lock()
	if q.err != nil {
		q.mu.Unlock()
		return
	}
	q.err = err
	close(q.dead)
	q.mu.Unlock()
	q.conn.Close()
	if q.onFail != nil {
		q.onFail(err)
	}
}

// drain finishes every command of a failed queue. Only the reader calls it, as its last act, so that nothing
// receives into a buffer any more.
func (q *tcpQueue) drain() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.rx = nil
	sent := fmt.Errorf("%w: %w", q.err, ErrOutcomeUnknown)
	for i := range q.slots {
		if s := &q.slots[i]; s.state == slotActive {
			q.detach(s)
			if s.err = q.err; s.capsule {
				s.err = sent
			}
			q.finish(s)
		}
	}
}

// detach tells a waiting cancel that the reader has let go of the buffer; the caller holds the mutex.
func (q *tcpQueue) detach(s *slot) {
	if s.detach != nil {
		close(s.detach)
		s.detach = nil
		s.data.drop()
	}
}

func (q *tcpQueue) load() int { return cap(q.free) - len(q.free) }

func (q *tcpQueue) depth() int { return len(q.slots) }

func (q *tcpQueue) wait() { q.wg.Wait() }
