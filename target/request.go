package target

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/kvof/kvof/kvlayer"
	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/uring"
)

// Conn is the connection that carries one queue: all that a transport must provide. Its methods may be called from
// any goroutine, never block (but Pull of a request that is Async may), and do nothing but release what they were given
// once the connection is closed.
type Conn interface {
	// Pull brings r.PullLength bytes of the command's data into the memory that r.Buffer hands out, and then calls
	// r.Received; when the connection ends first, it calls r.Aborted.
	Pull(r *Request)
	// Send queues one piece of the command's data for the host. The connection owns b; when it is out, it puts it and calls
	// r.Taken.
	Send(r *Request, b uring.Buf, last bool)
	// Complete queues the completion r.CQE, behind the data, and calls r.Release when it is out.
	Complete(r *Request)
	// Close ends the connection; the reason is for the log.
	Close(reason string)
	// Name identifies the connection in logs and status: the peer's address.
	Name() string
}

// Request is one command on its way through the target. A queue owns its requests and reuses them; a transport gets
// one from NewRequest, fills Cmd, Length and Inline, and hands it to Execute.
type Request struct {
	Cmd    nvmeof.Command
	CQE    nvmeof.Completion // valid from Conn.Complete on
	Length uint32            // bytes of data that the command's SGL describes
	Inline []byte            // data that came in the capsule; the transport's memory, valid only during Execute, but for:
	Stays  bool              // Inline is valid until Conn.Complete
	Batch  *uring.Batch      // the reader's own, or nil: operations may be added, which it submits when it has no more commands at hand, and reaps
	Tag    uint16            // index of the request in its queue: for the transport's own use, such as a TTAG

	PullLength uint32 // bytes to bring, valid from Conn.Pull on
	Sent       uint32 // bytes handed to Conn.Send so far: the offset of the next piece. Transports only read it
	Async      bool   // the request no longer runs on the connection's reader. Transports only read it

	queue *Queue
	sink  sink
	step  func(*Request) // what happens next
	run   func()         // runs step: made once, so that starting a goroutine allocates nothing
	kept  uring.Buf      // Inline's bytes for a command that outlives Execute
	hold  hold           // reserved
	room  chan struct{}  // full when sendWindow pieces wait to be sent; the pieces of reserved memory alone
	start time.Time
	ns    *namespace

	// What commands need, made at the first use and kept.
	writer *kvlayer.Writer
	reader *kvlayer.Reader
	pinned bool // reader is open until the data is out
	stream *stream
	ranges *ranges
	ended  func(error, *uring.Batch) // ends a command of one piece: made once
}

// sink takes a command's data in order, as kvlayer.Writer does.
type sink interface {
	Ahead(off, limit int) []byte // memory for the bytes from off on, behind those filled: see Request.Ahead
	Filled(n int)                // the next n bytes are there
	Abort()                      // no more will come
}

// Buffer returns memory for the next bytes of the data being pulled: at least 1, at most limit. It may block until a
// piece of the arena is free.
func (r *Request) Buffer(limit int) []byte { return r.sink.Ahead(0, limit) }

// Ahead is Buffer for the bytes that are off behind the next: a transport has several pieces come at a time, and tells of
// them, by Filled, in order. What was handed out before ends where off begins. nil: the pieces before have to come first.
func (r *Request) Ahead(off, limit int) []byte { return r.sink.Ahead(off, limit) }

// Filled tells that the first n bytes of what Buffer returned are there.
func (r *Request) Filled(n int) { r.sink.Filled(n) }

// Received tells that all data is there. st is Success, or the status the command ends with, such as Transient
// Transport Error for a data digest that did not match.
func (r *Request) Received(st nvmeof.Status) {
	if st != nvmeof.Success {
		r.sink.Abort()
		r.complete(st, 0)
		return
	}
	if r.step != nil {
		r.proceed(r.step)
	}
}

// Aborted tells that the connection ended before all data was there.
func (r *Request) Aborted() {
	r.sink.Abort()
	r.complete(nvmeof.AbortSQDeleted, 0)
}

// receive brings n bytes of the command's data into s and goes on with then, or leaves the rest to s: nil.
func (r *Request) receive(n uint32, s sink, then func(*Request)) {
	r.sink, r.step, r.PullLength = s, then, n
	data := r.Inline
	if r.kept.Data != nil {
		data = r.kept.Data
	}
	if data == nil && n > 0 {
		r.queue.conn.Pull(r)
		return
	}
	r.queue.target.copied.Add(uint64(n))
	for data = data[:n]; len(data) > 0; {
		c := copy(s.Ahead(0, len(data)), data)
		s.Filled(c)
		data = data[c:]
	}
	if then != nil {
		then(r)
	}
}

// proceed goes on with step: here and now when the namespace never waits, in a goroutine of its own otherwise.
func (r *Request) proceed(step func(*Request)) {
	if r.ns == nil || r.ns.inline {
		step(r)
		return
	}
	r.detach(step)
}

// detach goes on with step in a goroutine, whatever the namespace.
func (r *Request) detach(step func(*Request)) {
	if !r.Stays {
		if len(r.Inline) > 0 { // the transport takes its memory back when Execute returns
			r.keep()
		}
		r.Inline = nil
	}
	r.spawn(step)
}

// keep copies what came in the capsule. The reader may wait here: only for commands that have all they need and wait for
// nothing but their device.
func (r *Request) keep() {
	t := r.queue.target
	_ = t.pool.inline.Acquire(context.Background(), 1)
	r.kept = t.arena.Get(len(r.Inline))
	t.copied.Add(uint64(copy(r.kept.Data, r.Inline)))
}

// drop ends what keep began.
func (r *Request) drop() {
	if r.kept.Data != nil {
		r.kept.Put()
		r.kept = uring.Buf{}
		r.queue.target.pool.inline.Release(1)
	}
}

// spawn goes on with step in a goroutine.
func (r *Request) spawn(step func(*Request)) {
	r.step, r.Async = step, true
	go r.run()
}

// send hands a piece of the command's data to the connection, which then owns it.
func (r *Request) send(b uring.Buf, last bool) {
	n := len(b.Data)
	if r.hold != (hold{}) {
		r.room <- struct{}{}
	}
	r.queue.conn.Send(r, b, last)
	r.Sent += uint32(n)
}

// Taken tells that a piece of the command's data is out.
func (r *Request) Taken() {
	select {
	case <-r.room:
	default: // not of reserved memory
	}
}

// complete ends the command.
func (r *Request) complete(st nvmeof.Status, dw0 uint32) { r.finish(st, dw0, 0) }

// finish is complete for a command with a result in DW1 too.
func (r *Request) finish(st nvmeof.Status, dw0, dw1 uint32) {
	q := r.queue
	r.drop()
	if r.Sent == 0 && !r.pinned { // else pieces are on their way to the host
		q.giveBack(r)
	}
	r.CQE = nvmeof.MakeCompletion(dw0, dw1, q.head(), q.id, r.Cmd.CID(), st)
	if r.ns != nil {
		r.ns.stats.observe(r.Cmd.Opcode(), st, time.Since(r.start), r.PullLength, r.Sent)
	}
	if st != nvmeof.Success && q.ctrl != nil {
		q.ctrl.logError(nvmeof.ErrorEntry{SQID: q.id, CID: r.Cmd.CID(), Status: st, Location: 0xFFFF, NSID: r.Cmd.NSID()})
	}
	q.conn.Complete(r)
}

// completeQuad ends a Property Get with its 64-bit value in DW0 and DW1.
func (r *Request) completeQuad(v uint64) { r.finish(nvmeof.Success, uint32(v), uint32(v>>32)) }

// fail ends the command with a status that the same command would get again.
func (r *Request) fail(st nvmeof.Status) { r.complete(st|nvmeof.DNR, 0) }

// Release gives the request back to its queue: the host has its completion, or never will.
func (r *Request) Release() {
	if r.pinned {
		r.reader.Close()
		r.pinned = false
	}
	if r.ns != nil {
		r.ns.users.Done()
	}
	q := r.queue
	q.giveBack(r)
	r.Async, r.Stays, r.Batch = false, false, nil
	r.Inline, r.ns, r.sink, r.step, r.PullLength, r.Sent = nil, nil, nil, nil, 0, 0
	q.put(r)
}

// counter is a number that many goroutines add to.
type counter = atomic.Uint64
