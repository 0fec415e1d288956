package target

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kvof/kvof/nvmeof"
)

// queueBudget bounds the arena bytes that one queue's commands hold at one time, so that no host takes it all.
const queueBudget = 32 << 20

// maxRequests is how many requests a queue can tell apart by their tags.
const maxRequests = 1 << 16

// fused is FUSE in a command's flags.
const fused = 3

// adminDepth is the number of entries of an admin queue that hosts may use.
const adminDepth = 128

// Queue is the target's end of one fabrics queue pair. A transport makes one for each connection; it belongs to no
// controller until a Connect succeeds on it.
type Queue struct {
	target *Target
	conn   Conn
	port   *Port
	local  netip.AddrPort // address the host connected to

	ctrl *Controller // set once, by Connect
	id   uint16
	size uint32 // entries
	most int    // entries that the transport has room for
	sqhd atomic.Uint32
	noFC bool // SQ flow control is off

	mu       sync.Mutex
	free     []*Request
	made     int       // requests, free or not: grows on demand
	idle     sync.Cond // inflight or spent went down
	inflight int
	held     []*Request // commands that came while the target drains: not begun, so that the host tries them elsewhere
	spent    int        // bytes of queueBudget
}

// NewQueue makes the queue of a new connection that reached port at the local address .
func (t *Target) NewQueue(c Conn, port *Port, local netip.AddrPort) *Queue {
	q := &Queue{target: t, conn: c, port: port, local: local, size: adminDepth, most: maxRequests}
	q.idle.L = &q.mu
	return q
}

// NewRequest returns a request to fill, nil when the host has sent more commands than its queue has entries. Twice as
// many as that can be in use at once: completed ones are given back only after the host may have seen the completion.
// Only the connection's reader calls it.
func (q *Queue) NewRequest() *Request {
	q.mu.Lock()
	defer q.mu.Unlock()
	var r *Request
	if n := len(q.free); n > 0 {
		r, q.free = q.free[n-1], q.free[:n-1]
	} else if q.made < min(2*int(q.size), maxRequests) {
		r = &Request{queue: q, Tag: uint16(q.made)}
		r.run = func() { r.step(r) }
		q.made++
	} else {
		return nil
	}
	q.inflight++
	return r
}

// Limit bounds the entries that a Connect may ask for, for a transport whose connections have room for so many commands.
func (q *Queue) Limit(entries int) {
	q.most = entries
	q.size = min(q.size, uint32(entries))
}

func (q *Queue) put(r *Request) {
	q.mu.Lock()
	q.free = append(q.free, r)
	q.inflight--
	q.idle.Broadcast()
	q.mu.Unlock()
}

// Controller returns the controller the queue belongs to, nil before Connect.
func (q *Queue) Controller() *Controller { return q.ctrl }

// ID is the queue identifier, 0 for the admin queue.
func (q *Queue) ID() uint16 { return q.id }

// head is the SQ head pointer for the next completion.
func (q *Queue) head() uint16 {
	if q.noFC {
		return 0xFFFF
	}
	return uint16(q.sqhd.Load())
}

// took counts a command as taken from the submission queue. Only the connection's reader calls it.
func (q *Queue) took(r *Request) {
	r.start = time.Now()
	q.sqhd.Store((q.sqhd.Load() + 1) % q.size)
}

// reserve takes what r will hold of the arena, waiting until the queue's other commands, and then those of all queues, have
// given back enough. Never called on the connection's reader, which others may wait for.
func (q *Queue) reserve(r *Request, h hold) {
	if h == (hold{}) || r.kept.Data != nil { // data that came in the capsule: keep has reserved
		return
	}
	q.mu.Lock()
	for q.spent+h.bytes() > queueBudget {
		q.idle.Wait()
	}
	q.spent += h.bytes()
	q.mu.Unlock()
	q.target.pool.take(h)
	r.hold = h
	if r.room == nil {
		r.room = make(chan struct{}, sendWindow)
	}
}

// tryReserve is reserve for callers that cannot wait.
func (q *Queue) tryReserve(r *Request, h hold) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.spent+h.bytes() > queueBudget || !q.target.pool.tryTake(h) {
		return false
	}
	q.spent += h.bytes()
	r.hold = h
	if r.room == nil {
		r.room = make(chan struct{}, sendWindow)
	}
	return true
}

// giveBack ends r's reservation: it holds nothing of the arena any more.
func (q *Queue) giveBack(r *Request) {
	if r.hold != (hold{}) {
		q.target.pool.give(r.hold)
		q.mu.Lock()
		q.spent -= r.hold.bytes()
		q.idle.Broadcast()
		q.mu.Unlock()
		r.hold = hold{}
	}
}

// Close tells that the connection has ended: the transport has aborted every pull and reads no more. It returns when
// no command is left, and ends the controller when this was its admin queue.
func (q *Queue) Close() {
	if q.ctrl != nil {
		q.ctrl.detach(q)
	}
	q.mu.Lock()
	held := q.held
	q.held = nil
	q.mu.Unlock()
	for _, r := range held {
		r.complete(nvmeof.AbortSQDeleted, 0)
	}
	q.mu.Lock()
	for q.inflight > 0 {
		q.idle.Wait()
	}
	q.mu.Unlock()
	if q.ctrl != nil {
		q.ctrl.gone(q)
	}
}

// Execute runs one command. Only the connection's reader calls it; it blocks for no longer than a short wait for a
// small buffer, and on the admin queue not at all.
func (q *Queue) Execute(r *Request) {
	q.took(r)
	c := &r.Cmd
	switch {
	case c.Flags()&fused != 0:
		r.fail(nvmeof.InvalidField) // FUSES says that there are none
	case c.Opcode() == nvmeof.OpFabrics:
		q.fabrics(r)
	case q.ctrl == nil:
		r.fail(nvmeof.CommandSequenceError)
	default:
		q.ctrl.traffic.Store(true)
		if !q.ctrl.ready() {
			r.fail(nvmeof.CommandSequenceError)
		} else if q.id == 0 {
			q.ctrl.adminCommand(r)
		} else if q.target.draining.Load() {
			q.mu.Lock()
			q.held = append(q.held, r)
			q.mu.Unlock()
		} else {
			q.ctrl.ioCommand(r)
		}
	}
}

// busy is the number of commands in flight that will end by themselves.
func (q *Queue) busy() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.inflight - len(q.held)
}

// Refuse ends a command that the transport could not accept, such as one with a wrong SGL. st has DNR set unless the
// same command may succeed when sent again.
func (q *Queue) Refuse(r *Request, st nvmeof.Status) {
	q.took(r)
	r.complete(st, 0)
}
