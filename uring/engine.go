package uring

import (
	"cmp"
	"fmt"
	"math/bits"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/pawelgaczynski/giouring"
	"golang.org/x/sys/unix"
)

const (
	maxRetries = 100 // passing errors, and transfers that moved nothing
	retryDelay = time.Millisecond
	maxRounds  = 8 // calls of io_uring_enter one Submit makes, at most, for itself and others

	// yieldEvery is how long a waiter may only ever wait in the kernel. To the runtime's monitor (sysmon) a goroutine that
	// Go's scheduler does not see for 10 ms hogs its processor: it takes that away, and then looks again every 20 us for a
	// while, at up to a third of all the CPU time of large reads.
	yieldEvery = 4 * time.Millisecond

	// companyFor is how many waiters leave completions to the completion goroutine after several have waited at a time.
	companyFor = 64

	defaultDepth = 256
	maxDepth     = 16384
)

// engine runs a device's ops as commands on a ring. An op becomes one command
// or several, and several ops may share one; what a command looks like is the
// driver's.
type engine struct {
	path   string
	size   int64 // of the device, bytes
	align  int64
	kinds  kindSet // that it knows
	skips  kindSet // that need nothing done
	driver driver
	ring   queues
	polled bool // completions are found by asking, not announced
	arena  *Arena
	chunk  int // bytes of the arena registered together; 0: minChunk
	pinned pins
	reaped chan struct{} // closed when the completion goroutine has ended

	reaping atomic.Bool    // somebody takes completions: the completion goroutine, a waiter, or a batch's owner
	batch   [64]completion // whose memory this is, and yielded
	yielded time.Time      // when a waiter was last seen by Go's scheduler
	company atomic.Int32   // how many waiters will believe that they are not alone
	parked  atomic.Int32   // waiters that leave that to others, and ops that nobody waits for; goes up with the mutex

	mu         sync.Mutex
	bulk       bulk     // ops that wait for their turn
	pending    queue    // ops with commands still to start; only the first may have some started
	again      []uint32 // slots to submit once more
	slots      []slot   // commands, by user_data
	free       []uint32 // slots to use
	elsewhere  int      // ops in a goroutine of their own, and timers
	submitting bool     // somebody fills entries and enters the kernel
	owned      int      // ops that nobody waits for whose batch's owner takes their completions
	nudging    bool     // a completion is wanted that is of no command
	closing    bool
	down       error // what every op ends with for now, or nil
}

// kindSet has a bit for each OpKind.
type kindSet uint16

func kindsOf(ks ...OpKind) (s kindSet) {
	for _, k := range ks {
		s |= 1 << k
	}
	return s
}

func (s kindSet) has(k OpKind) bool { return k <= OpCopy && s>>k&1 != 0 }

// fileKinds are what files and memory do.
var fileKinds = kindsOf(OpRead, OpWrite, OpFlush, OpDiscard, OpZero)

// slot is one command.
type slot struct {
	op     *Op   // the first of the ops that it is for, linked by next
	ops    int   // how many; if several, whole ones
	pos, n int64 // the bytes of op it is for: n from pos on
	total  int64 // bytes of all its ops
	moved  int64 // of these, done
	now    int64 // of these, on their way
	retry  uint8
	fixed  bool  // by a registered buffer
	plain  bool  // never by one
	err    error // once it has ended
}

// driver knows a device's commands. Its methods are called with the engine's
// mutex held and must not block.
type driver interface {
	// part is how many bytes of o, from o.pos on, one command takes.
	part(o *Op) int64
	// joins tells whether s, which has whole ops, takes o too.
	joins(s *slot, o *Op) bool
	// prepare describes to the kernel what of s is still to do. e is cleared.
	prepare(e *giouring.SubmissionQueueEntry, i uint32, s *slot)
	// advance takes the kernel's result and says how s goes on.
	advance(s *slot, res int32) verdict
}

// verdict is what becomes of a command.
type verdict uint8

const (
	ended  verdict = iota // with s.err
	repeat                // submit what is left
	wait                  // do so after a pause
	apart                 // do its ops again, each alone
	given                 // its one op runs elsewhere
)

// transient tells of an errno that passes. ECANCELED, where nobody cancels, says that the kernel could not start a worker for a command
// that needs one: the thread that submitted it had a signal pending, as Go's scheduler sends them to threads that it believes to run
// Go code, three times in a row (io_workqueue_create in io_uring/io-wq.c).
func transient(e syscall.Errno) bool { return e == unix.EAGAIN || e == unix.ECANCELED }

// pause is how long wait waits.
const pause = 100 * time.Millisecond

// queue is a FIFO of ops linked through next.
type queue struct{ head, tail *Op }

func (q *queue) push(o *Op) {
	o.next = nil
	if q.tail == nil {
		q.head = o
	} else {
		q.tail.next = o
	}
	q.tail = o
}

func (q *queue) pop() *Op {
	o := q.head
	if q.head = o.next; q.head == nil {
		q.tail = nil
	}
	o.next = nil
	return o
}

// complete ends all ops of the queue with the errors they have.
func (q *queue) complete(by *Batch) {
	for q.head != nil {
		o := q.pop()
		o.complete(o.err, by)
	}
}

// roundDepth is the number of slots for what FileOptions or NVMeOptions ask.
func roundDepth(depth int) int {
	if depth <= 0 {
		return defaultDepth
	}
	return 1 << bits.Len(uint(min(depth, maxDepth)-1))
}

// start begins to serve: all fields up to arena are set.
func (g *engine) start(depth int) {
	g.slots = make([]slot, depth)
	g.free = make([]uint32, depth)
	for i := range g.free {
		g.free[i] = uint32(i)
	}
	g.reaped = make(chan struct{})
	g.pinned.init(g)
	go g.run()
}

// Submit implements Device.
func (g *engine) Submit(ops ...*Op) { g.submit(nil, ops) }

// submit is Submit for a batch that has the place p, or for none.
func (g *engine) submit(p *place, ops []*Op) {
	for _, o := range ops {
		o.Begin()
		o.engine = g
	}
	var refused queue
	g.mu.Lock()
	for _, o := range ops {
		if g.closing {
			o.err = ErrClosed
			refused.push(o)
		} else if err := o.check(g.size, g.align, g.kinds); err != nil {
			o.err = err
			refused.push(o)
		} else if g.skips.has(o.Kind) || o.size() == 0 && o.Kind != OpFlush && o.Kind != OpCopy {
			refused.push(o)
		} else if g.down != nil {
			o.err = g.down
			refused.push(o)
		} else {
			g.add(o)
			if o.Then != nil {
				if p != nil {
					g.begun(p, o)
				}
				g.parked.Add(1)
				g.alert()
			}
		}
	}
	if g.waiting() {
		g.kick()
	}
	g.mu.Unlock()
	refused.complete(nil)
}

// add takes an op, with the mutex.
func (g *engine) add(o *Op) {
	if o.paced() {
		g.bulk.push(o)
	} else {
		g.pending.push(o)
	}
}

// waiting tells whether there are ops with commands to start, now or in their turn.
func (g *engine) waiting() bool { return g.pending.head != nil || g.bulk.head != nil }

// kick moves pending ops into the ring as far as there are slots. Callers hold
// g.mu, which it gives up while in the kernel; a caller that finds another
// submitting leaves its ops to that one. Nobody is kept at it for long: the
// completion goroutine takes over.
func (g *engine) kick() {
	if g.submitting {
		return
	}
	g.submitting = true
	round := 0
	for ; g.fill(); round++ {
		if round == maxRounds {
			g.ring.wake()
			break
		}
		g.mu.Unlock()
		err := g.ring.submit()
		g.mu.Lock()
		if err != nil { // the kernel is short of memory; the entries stay queued
			g.elsewhere++
			time.AfterFunc(retryDelay, g.returned)
			break
		}
	}
	g.submitting = false
	switch {
	case g.closing && round > 0:
		g.ring.wake() // what was submitted may have ended before, and rest found us here
	case g.pending.head != nil:
		g.alert()
	}
}

// returned ends what elsewhere counts, and has the completion goroutine look.
func (g *engine) returned() {
	g.mu.Lock()
	g.nudge()
	g.elsewhere--
	g.mu.Unlock()
	g.ring.wake()
}

// await returns when o has ended. A waiter that is alone takes completions itself, and waits for them in the kernel:
// nobody else needs to be woken for them, and the eventfd is not used. Where several wait, or lately did, as in a busy server,
// the completion goroutine does it for all: none of them holds a thread, nor has the runtime's monitor look after it.
func (g *engine) await(o *Op) {
	for len(o.done) == 0 {
		if !g.alone() {
			g.park(o)
			return
		}
		for len(o.done) == 0 {
			if g.harvest(nil) > 0 {
				continue
			}
			if g.parked.Load() > 0 {
				break
			}
			g.block()
		}
		g.release()
	}
	<-o.done
}

// alone has its caller take completions, if nobody else waits for any, or lately did.
func (g *engine) alone() bool {
	switch {
	case g.parked.Load() > 0 || g.reaping.Load():
		g.company.Store(companyFor)
		return false
	case g.company.Load() > 0:
		g.company.Add(-1)
		return false
	}
	return g.reaping.CompareAndSwap(false, true)
}

// block waits in the kernel for a completion. Its caller has set reaping.
func (g *engine) block() {
	if now := time.Now(); now.Sub(g.yielded) > yieldEvery {
		g.yielded = now
		runtime.Gosched()
	}
	g.ring.block()
}

// park waits while others take the completions, but for those that are there already.
func (g *engine) park(o *Op) {
	g.mu.Lock()
	if len(o.done) > 0 { // meanwhile, and the ring may have been closed
		g.mu.Unlock()
		<-o.done
		return
	}
	g.parked.Add(1)
	mine := !g.polled && g.ring.completed() && g.reaping.CompareAndSwap(false, true)
	if !mine {
		g.alert()
	}
	g.mu.Unlock()
	if mine {
		g.harvest(nil)
		g.release()
	}
	<-o.done
	g.parked.Add(-1)
}

// release lets others take completions.
func (g *engine) release() {
	g.mu.Lock()
	g.reaping.Store(false)
	if g.closing {
		g.ring.wake()
	} else {
		g.alert()
	}
	g.mu.Unlock()
}

// needed tells, with the mutex, whether somebody relies on the completion goroutine.
func (g *engine) needed() bool {
	return int(g.parked.Load()) > g.owned || g.owned == 0 && g.waiting() || len(g.again) > 0 || g.closing
}

// alert has, with the mutex, the completion goroutine told of completions, those that are there among them, if it is needed and
// nobody takes them now: who does will see that there is more.
func (g *engine) alert() {
	if g.reaping.Load() || !g.needed() {
		return
	}
	g.ring.hush(false)
	if g.polled || g.ring.completed() {
		g.ring.wake()
	}
}

// nudge wakes, with the mutex, a waiter in the kernel whose op has ended by other ways than a completion.
func (g *engine) nudge() {
	if g.reaping.Load() {
		g.nudging = true
		g.kick()
	}
}

const nudgeSlot = 1<<32 - 1

// fill writes submission queue entries, and reports whether there is anything
// to submit.
func (g *engine) fill() bool {
	if g.nudging {
		if e := g.ring.sqe(); e != nil {
			e.OpCode, e.UserData = giouring.OpNop, nudgeSlot
			g.nudging = false
		}
	}
	g.bulk.admit(&g.pending)
	for len(g.again) > 0 || g.pending.head != nil && len(g.free) > 0 {
		e := g.ring.sqe()
		if e == nil {
			break
		}
		var i uint32
		if n := len(g.again); n > 0 {
			i, g.again = g.again[n-1], g.again[:n-1]
		} else {
			n := len(g.free)
			i, g.free = g.free[n-1], g.free[:n-1]
			g.begin(&g.slots[i])
		}
		g.driver.prepare(e, i, &g.slots[i])
		e.UserData = uint64(i)
	}
	return g.ring.ready() > 0
}

// begin makes s the next command of the first pending op, and of those behind
// it that join.
func (g *engine) begin(s *slot) {
	o := g.pending.head
	n := g.driver.part(o)
	*s = slot{op: o, ops: 1, pos: o.pos, n: n, total: n}
	o.pos += n
	o.parts++
	if o.pos < o.size() {
		return
	}
	g.pending.pop()
	if s.pos > 0 || o.alone {
		return
	}
	for last := o; g.pending.head != nil && !g.pending.head.alone && g.driver.joins(s, g.pending.head); s.ops++ {
		o = g.pending.pop()
		o.pos, o.parts = o.size(), 1
		s.total += o.pos
		last.next, last = o, o
	}
}

// run is the completion goroutine.
func (g *engine) run() {
	defer close(g.reaped)
	for {
		n := 0
		if g.reaping.CompareAndSwap(false, true) {
			n = g.harvest(nil)
			g.reaping.Store(false)
		}
		if n == 0 && g.rest() {
			return
		}
	}
}

// harvest takes completions, for by or for nobody, and returns how many. Its caller has set reaping.
func (g *engine) harvest(by *Batch) int {
	n := g.ring.reap(g.batch[:])
	if n == 0 {
		return 0
	}
	var done queue
	g.mu.Lock()
	for _, c := range g.batch[:n] {
		if c.slot != nudgeSlot {
			g.take(c, &done)
		}
	}
	g.kick() // continues short transfers, and fills the slots set free
	g.mu.Unlock()
	done.complete(by)
	return n
}

// take handles one completion; ops that end with it go to done.
func (g *engine) take(c completion, done *queue) {
	s := &g.slots[c.slot]
	switch v := g.driver.advance(s, c.res); {
	case v == given:
		if s.op.Then != nil {
			g.parked.Add(-1)
			g.over(s.op)
		}
		*s = slot{}
		g.free = append(g.free, c.slot)
	case v != ended && g.down != nil:
		s.err = g.down
		g.finish(c.slot, done)
	case v == repeat:
		g.again = append(g.again, c.slot)
	case v == apart:
		o := s.op
		for range s.ops {
			next := o.next
			o.pos, o.parts, o.alone = 0, 0, true
			g.pending.push(o)
			o = next
		}
		*s = slot{}
		g.free = append(g.free, c.slot)
	case v == wait:
		g.elsewhere++
		time.AfterFunc(pause, func() {
			g.mu.Lock()
			g.again = append(g.again, c.slot)
			g.mu.Unlock()
			g.returned()
		})
	default:
		g.finish(c.slot, done)
	}
}

// finish frees a slot whose command has ended. Ops of which nothing is left go
// to done.
func (g *engine) finish(i uint32, done *queue) {
	s := &g.slots[i]
	o := s.op
	for range s.ops {
		next := o.next
		if o.parts--; s.err != nil && o.err == nil {
			o.err = s.err
			if g.pending.head == o { // no more commands for it
				g.pending.pop()
			}
		}
		if o.parts == 0 && (o.pos == o.size() || o.err != nil) {
			g.end(o, done)
		}
		o = next
	}
	*s = slot{}
	g.free = append(g.free, i)
}

// end adds, with the mutex, an op that is over to done.
func (g *engine) end(o *Op, done *queue) {
	if o.paced() {
		g.bulk.over(o)
	}
	if o.Then != nil {
		g.parked.Add(-1)
		g.over(o)
	}
	done.push(o)
}

// fail ends every op that has no command in the ring, and all that come, with
// err, until it is called with nil.
func (g *engine) fail(err error) {
	var done queue
	g.mu.Lock()
	if g.down = err; err != nil {
		g.bulk.all(&g.pending)
		for g.pending.head != nil {
			o := g.pending.pop()
			if o.err = err; o.parts == 0 {
				g.end(o, &done)
			}
		}
		for _, i := range g.again {
			g.slots[i].err = err
			g.finish(i, &done)
		}
		g.again = g.again[:0]
	}
	g.mu.Unlock()
	done.complete(nil)
	g.mu.Lock()
	g.nudge()
	g.mu.Unlock()
}

// rest submits what others left and sleeps until there is something to do. It reports whether there never will be: the
// device is closing, and nothing is in flight.
func (g *engine) rest() (over bool) {
	g.mu.Lock()
	g.kick()
	needed := g.needed()
	taken := g.reaping.Load() // by others, who see to it that we are told when they stop
	g.ring.hush(!needed || taken)
	idle := !g.submitting && g.ring.ready() == 0 && len(g.free) == len(g.slots)
	over = g.closing && idle && g.elsewhere == 0 && !g.waiting() && g.reaping.CompareAndSwap(false, true) // for ever
	g.mu.Unlock()
	switch {
	case over:
	case needed && g.polled && !idle:
		g.ring.poll()
	default:
		g.ring.sleep()
	}
	return over
}

// finishAll ends service: it waits until nothing is in flight and frees the
// ring. It returns false when that was done before.
func (g *engine) finishAll() bool {
	g.mu.Lock()
	again := g.closing
	g.closing = true
	if !again {
		g.nudge()
	}
	g.mu.Unlock()
	if !again {
		g.ring.wake()
	}
	<-g.reaped
	if again {
		return false
	}
	g.pinned.wait()
	g.ring.close()
	return true
}

// View implements Device.
func (g *engine) View(off, n int64) []byte { return nil }

// Size implements Device.
func (g *engine) Size() int64 { return g.size }

// BlockSize implements Device.
func (g *engine) BlockSize() int { return int(g.align) }

// pins is the part of the arena that is registered with the ring. It grows
// chunk by chunk as buffers are used, so that memory never used is never
// pinned; ops on a chunk not registered yet work, at a higher cost.
type pins struct {
	chunk   int             // bytes, a power of two
	state   []atomic.Uint32 // per chunk
	bytes   atomic.Int64
	warning atomic.Pointer[string]
	mu      sync.Mutex // one registration at a time
	running sync.WaitGroup
}

const (
	minChunk    = 4 << 20
	maxChunks   = 1 << 14 // registered buffers a ring can have
	unpinned    = 0
	pinning     = 1
	pinned      = 2
	notPinnable = 3
)

func (p *pins) init(g *engine) {
	if g.arena == nil {
		return
	}
	size := len(g.arena.mem)
	if limit := memlockLimit(); limit < uint64(size) {
		p.warn(fmt.Sprintf("%s runs without registered buffers: the memlock limit is %d KiB and the arena has %d MiB; raise it (ulimit -l unlimited, LimitMEMLOCK=infinity)", g.path, limit>>10, size>>20))
		return
	}
	p.chunk = cmp.Or(g.chunk, minChunk)
	for size > p.chunk*maxChunks {
		p.chunk *= 2
	}
	n := (size + p.chunk - 1) / p.chunk
	if err := g.ring.reserve(n); err != nil {
		p.warn(fmt.Sprintf("%s runs without registered buffers (%v): Linux 5.19 or later has them", g.path, err))
		return
	}
	p.state = make([]atomic.Uint32, n)
}

func (p *pins) warn(s string) { p.warning.Store(&s) }

// find returns the registered buffer that holds b. The first use of a chunk
// starts its registration, in the background.
func (p *pins) find(g *engine, b []byte) (int, bool) {
	if p.state == nil {
		return 0, false
	}
	off, ok := g.arena.offset(b)
	if !ok {
		return 0, false
	}
	i := off / p.chunk
	if off+len(b) > (i+1)*p.chunk {
		return 0, false
	}
	s := &p.state[i]
	if s.Load() == unpinned && s.CompareAndSwap(unpinned, pinning) {
		p.running.Add(1)
		go p.register(g, i)
	}
	return i, s.Load() == pinned
}

func (p *pins) register(g *engine, i int) {
	defer p.running.Done()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.warning.Load() != nil {
		p.state[i].Store(notPinnable)
		return
	}
	b := g.arena.mem[i*p.chunk : min((i+1)*p.chunk, len(g.arena.mem))]
	_ = unix.Madvise(b, unix.MADV_POPULATE_WRITE) // outside the ring's lock, which registering holds
	if err := g.ring.register(i, b); err != nil {
		p.state[i].Store(notPinnable)
		p.warn(fmt.Sprintf("%s runs with only %d MiB of registered buffers (%v): raise the memlock limit (ulimit -l unlimited, LimitMEMLOCK=infinity)", g.path, p.bytes.Load()>>20, err))
		return
	}
	p.bytes.Add(int64(len(b)))
	p.state[i].Store(pinned)
}

func (p *pins) wait() { p.running.Wait() }

// describe fills in what all engines know of themselves.
func (g *engine) describe(i DeviceInfo) DeviceInfo {
	g.mu.Lock()
	i.Path, i.Window = g.path, g.bulk.limit()
	g.mu.Unlock()
	i.Size, i.BlockSize, i.Registered, i.Depth = g.size, int(g.align), g.pinned.bytes.Load(), len(g.slots)
	if w := g.pinned.warning.Load(); w != nil {
		i.Warnings = append(i.Warnings, *w)
	}
	return i
}
