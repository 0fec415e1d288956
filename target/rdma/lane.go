package rdma

import (
	"errors"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/rdma"
	"github.com/kvof/kvof/uring"
)

const (
	// pollBatch is how many completions one turn takes.
	pollBatch = 64
	// recvDepth and sendDepth are the sizes of a shard's queues.
	recvDepth = 4096
	sendDepth = 2 * recvDepth

	// yieldEvery is how long a lane may only ever wait in the kernel: a goroutine that Go's scheduler does not see for 10 ms has
	// the runtime's monitor look every 20 us for a while. It is twice that while operations are in flight: the goroutine often goes on in
	// another thread, and the kernel ends an operation in the one that began it.
	yieldEvery = 4 * time.Millisecond

	// lateTime is how long the end of a send that nobody waits for may go unnoticed.
	lateTime = 100 * time.Millisecond

	// spinTime is how long a lane looks for work before it asks for an interrupt, if work has lately come that fast. To
	// sleep and be woken costs more than that.
	spinTime = 30 * time.Microsecond
	// spinScore is how surely work comes fast: it goes up and down with each sleep.
	spinScore = 8
)

// lane is one goroutine that serves some of a device's queue pairs.
type lane struct {
	dev  *device
	ch   rdma.Channel
	done chan struct{}

	mu      sync.Mutex
	shards  []*shard
	todo    []func()
	ordered atomic.Bool // todo is not empty

	connsMu sync.RWMutex
	conns   map[uint32]*conn // by queue pair number

	// The goroutine's own.
	wc      [pollBatch]rdma.WC
	batch   rdma.Batch
	recv    *receives   // whose chain is the last of batch
	dirty   []*conn     // have something to post
	posting []*conn     // have a chain in batch
	chains  []int       // of those
	ended   []entry     // scratch
	ops     uring.Batch // that commands begin
	arms    []rdma.CQ   // scratch
	files   []int32     // scratch
	score   int
	yielded time.Time // when Go's scheduler was last given a turn

	lag              *time.Timer
	lagging, overdue atomic.Bool // it runs; it has run out
}

// shard is two completion queues and a shared receive queue. Queue pairs are placed on a shard that has room for all that
// they may have under way, so that no queue can overflow or run dry.
//
// A sleeping lane is woken by receives. The end of a response that holds little wakes nobody: it is noticed when the lane is
// awake for other reasons, or after lateTime. So a small read wakes the lane once, not twice.
type shard struct {
	recvs, sends       rdma.CQ
	srq                *receives // nil on devices without
	recvRoom, sendRoom int       // completions not spoken for; of receives only without srq
	users              int       // queue pairs

	awaited, unawaited atomic.Int32 // sends under way that somebody waits for, and others
	quiet              atomic.Bool  // the lane sleeps, and sends is not armed
}

// later sees to it that the lane looks for the ends of sends in a while.
func (l *lane) later() {
	if !l.lagging.Load() && l.lagging.CompareAndSwap(false, true) {
		l.lag.Reset(lateTime)
	}
}

// arm has the lane woken by the end of a send too, if it is not yet.
func (s *shard) arm() error {
	if s.quiet.CompareAndSwap(true, false) {
		return s.sends.Arm()
	}
	return nil
}

func newLane(d *device) (*lane, error) {
	ch, err := d.dev.NewChannel()
	if err != nil {
		return nil, err
	}
	l := &lane{dev: d, ch: ch, done: make(chan struct{}), conns: map[uint32]*conn{}, files: make([]int32, 0, rdma.MaxFiles)}
	l.lag = time.AfterFunc(time.Hour, func() {
		l.lagging.Store(false)
		l.overdue.Store(true)
		l.ch.Wake()
	})
	l.lag.Stop()
	go l.run()
	return l, nil
}

// place finds room for a queue pair with so many receives and sends, making more when there is none.
func (l *lane) place(receives, sends int) (*shard, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	at := len(l.shards)
	for i, s := range l.shards {
		if s == nil {
			at = i
		} else if s.take(receives, sends) == nil {
			return s, nil
		}
	}
	s, err := l.newShard(at)
	if err == nil {
		err = s.take(receives, sends)
	}
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	if at == len(l.shards) {
		l.shards = append(l.shards, nil)
	}
	l.shards[at] = s
	return s, nil
}

var errNoRoom = errors.New("the device's queues have no room")

func (l *lane) newShard(at int) (s *shard, err error) {
	s = &shard{recvRoom: min(recvDepth, l.dev.caps.MaxCQE), sendRoom: min(sendDepth, l.dev.caps.MaxCQE)}
	if l.dev.caps.MaxSRQ > 0 {
		depth := min(s.recvRoom, l.dev.caps.MaxSRQWR)
		srq, err := l.dev.dev.NewSRQ(depth)
		if err != nil {
			return nil, err
		}
		s.srq = newReceives(l.dev, srq, depth, at)
	}
	if s.recvs, err = l.ch.NewCQ(s.recvRoom); err == nil {
		s.sends, err = l.ch.NewCQ(s.sendRoom)
	}
	return s, err
}

// take takes room for a queue pair.
func (s *shard) take(receives, sends int) error {
	switch {
	case s.sendRoom < sends:
		return errNoRoom
	case s.srq != nil:
		if err := s.srq.reserve(receives); err != nil {
			return err
		}
	case s.recvRoom < receives+slack:
		return errNoRoom
	default:
		s.recvRoom -= receives + slack
	}
	s.sendRoom -= sends
	s.users++
	return nil
}

// leave gives the place of a queue pair back. The last one leaves the shard to be closed, unless it is the only one.
func (l *lane) leave(s *shard, receives, sends int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s.srq != nil {
		s.srq.release(receives)
	} else {
		s.recvRoom += receives + slack
	}
	s.sendRoom += sends
	if s.users--; s.users > 0 {
		return
	}
	others := 0
	for _, o := range l.shards {
		if o != nil && o != s {
			others++
		}
	}
	if i := slices.Index(l.shards, s); others > 0 {
		l.shards[i] = nil
		l.order(func() {
			if err := s.close(); err != nil {
				l.dev.tr.log.Warn("closing the queues of an RDMA device", "device", l.dev.dev.Name(), "error", err)
			}
		})
	}
}

// order has the lane's goroutine do something between two turns; nil ends it. The caller holds mu.
func (l *lane) order(f func()) {
	l.todo = append(l.todo, f)
	l.ordered.Store(true)
	l.ch.Wake()
}

func (s *shard) close() error {
	if s == nil {
		return nil
	}
	var errs []error
	for _, cq := range []rdma.CQ{s.recvs, s.sends} {
		if cq != nil {
			errs = append(errs, cq.Close())
		}
	}
	if s.srq != nil {
		errs = append(errs, s.srq.queue.(rdma.SRQ).Close(), s.srq.close())
	}
	return errors.Join(errs...)
}

// reserved is how many receives are promised to hosts.
func (l *lane) reserved() (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.shards {
		if s != nil && s.srq != nil {
			n += s.srq.promised()
		}
	}
	l.connsMu.RLock()
	defer l.connsMu.RUnlock()
	for _, c := range l.conns {
		if c.shard.srq == nil {
			n += c.depth
		}
	}
	return n
}

func (l *lane) add(c *conn) {
	l.connsMu.Lock()
	l.conns[c.qp.Num()] = c
	l.connsMu.Unlock()
}

func (l *lane) conn(qp uint32) *conn {
	l.connsMu.RLock()
	defer l.connsMu.RUnlock()
	return l.conns[qp]
}

// remove takes a queue pair off the lane: when it returns the lane does nothing for it any more.
func (l *lane) remove(c *conn) {
	l.connsMu.Lock()
	delete(l.conns, c.qp.Num())
	l.connsMu.Unlock()
	gone := make(chan struct{})
	l.mu.Lock()
	l.order(func() { close(gone) })
	l.mu.Unlock()
	<-gone
}

// close ends the lane, which has no queue pair any more.
func (l *lane) close() error {
	l.mu.Lock()
	l.order(nil)
	l.mu.Unlock()
	<-l.done
	l.lag.Stop()
	var errs []error
	for _, s := range l.shards {
		errs = append(errs, s.close())
	}
	return errors.Join(append(errs, l.ch.Close())...)
}

// run is the lane's goroutine.
func (l *lane) run() {
	defer close(l.done)
	idle, since := false, time.Time{}
	for n := 0; ; {
		l.take(n)
		if l.ordered.Load() && l.orders() {
			return
		}
		if busy := n == len(l.wc) || len(l.dirty) > 0 || !l.batch.Empty(); busy == idle {
			if idle = !busy; idle {
				since = time.Now()
				l.dev.spinners.Add(1)
			} else {
				l.dev.spinners.Add(-1)
			}
		}
		switch {
		case !idle:
			n = l.turn()
		case l.score >= spinScore/2 && time.Since(since) < spinTime && int(l.dev.spinners.Load()) <= max(1, runtime.GOMAXPROCS(0)/2):
			runtime.Gosched()
			n = l.turn()
		default:
			l.dev.spinners.Add(-1)
			idle = false
			n = l.sleep()
		}
	}
}

// sleep waits for the next completion, of the device or of a drive that this lane works on, and returns how many of the device it
// took.
func (l *lane) sleep() int {
	l.arm()
	defer l.awake()
	l.dev.sleeps.Add(1)
	start := time.Now()
	if late := start.Sub(l.yielded); late > 2*yieldEvery || late > yieldEvery && !l.ops.Busy() {
		l.yielded = start
		runtime.Gosched()
	}
	n, err := l.ch.Wait(l.arms, l.ops.Hold(l.files[:0]), l.wc[:])
	if err != nil {
		l.dev.lost("waiting for completions failed: " + err.Error())
		time.Sleep(time.Millisecond)
	}
	if time.Since(start) < 2*spinTime {
		l.score = min(l.score+1, spinScore)
	} else {
		l.score = max(l.score-2, 0)
	}
	l.dev.completions.Add(uint64(n))
	return n
}

// arm lists what to be woken by: the next receive and, where somebody waits for the end of a send, that.
func (l *lane) arm() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.arms = l.arms[:0]
	late, overdue := false, l.overdue.Swap(false)
	for _, s := range l.shards {
		if s == nil {
			continue
		}
		l.arms = append(l.arms, s.recvs)
		s.quiet.Store(true)
		if (s.awaited.Load() > 0 || overdue && s.unawaited.Load() > 0) && s.quiet.CompareAndSwap(true, false) {
			l.arms = append(l.arms, s.sends)
		}
		late = late || s.unawaited.Load() > 0
	}
	if late {
		l.later()
	}
}

// awake ends what arm began.
func (l *lane) awake() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.shards {
		if s != nil {
			s.quiet.Store(false)
		}
	}
}

// orders does what others want done between two turns; true ends the lane.
func (l *lane) orders() (end bool) {
	l.mu.Lock()
	todo := l.todo
	l.todo = nil
	l.ordered.Store(false)
	l.mu.Unlock()
	for _, f := range todo {
		if f == nil {
			end = true
		} else {
			f()
		}
	}
	return end
}

// turn posts what is ready, in one call with the poll for completions, and returns how many of those there are.
func (l *lane) turn() int {
	l.gather()
	n := l.ch.Turn(&l.batch, l.wc[:])
	l.posted()
	l.dev.turns.Add(1)
	if n > 0 {
		l.dev.completions.Add(uint64(n))
	}
	return n
}

// take handles n completions, and those of drives.
func (l *lane) take(n int) {
	for i := range l.wc[:n] {
		l.handle(&l.wc[i])
	}
	l.ops.Submit()
	l.ops.Reap()
}

// gather adds the chains of queue pairs that have something to post.
func (l *lane) gather() {
	for i, c := range l.dirty {
		l.dirty[i] = nil
		c.mu.Lock()
		c.listed = false
		if !c.posting { // else whoever posts looks again
			k := l.batch.Len()
			if c.posting = c.fill(&l.batch); c.posting {
				l.posting = append(l.posting, c)
				l.chains = append(l.chains, k)
			}
		}
		c.mu.Unlock()
	}
	l.dirty = l.dirty[:0]
}

// posted looks at what became of the batch.
func (l *lane) posted() {
	for i, c := range l.posting {
		l.posting[i] = nil
		end := l.batch.Len()
		if i+1 < len(l.chains) {
			end = l.chains[i+1]
		}
		for k := l.chains[i]; k < end; k++ {
			if _, err := l.batch.Posted(k); err != nil {
				c.unposted(err)
			}
		}
		c.mu.Lock()
		c.posting = false
		more := c.ready()
		c.mu.Unlock()
		if more {
			l.touch(c)
		}
	}
	first := l.batch.Len()
	if len(l.chains) > 0 {
		first = l.chains[0]
	}
	for k := range first { // of receives alone
		if _, err := l.batch.Posted(k); err != nil {
			l.dev.lost(err.Error())
		}
	}
	l.posting, l.chains, l.recv = l.posting[:0], l.chains[:0], nil
	l.batch.Reset()
}

// touch notes that a queue pair has something to post. Only the lane's goroutine calls it.
func (l *lane) touch(c *conn) {
	if !c.listed {
		c.listed = true
		l.dirty = append(l.dirty, c)
	}
}

// The kinds of work requests, in the uppermost bits of their IDs. Below is the slot of a receive, with its shard in bits 47:32,
// or the sequence number of anything else, with its connection's serial number in bits 61:32.
const (
	idRecv    = 1 << 63
	idOwnRecv = 1 << 62 // of a queue pair without SRQ
)

func (l *lane) handle(wc *rdma.WC) {
	c := l.conn(wc.QP)
	if wc.ID&idRecv == 0 {
		if c != nil {
			c.sent(wc)
		}
		return
	}
	from, slot := (*receives)(nil), uint32(wc.ID)
	if wc.ID&idOwnRecv == 0 {
		l.mu.Lock()
		if s := l.shards[wc.ID>>32&0xFFFF]; s != nil {
			from = s.srq
		}
		l.mu.Unlock()
	} else if c != nil {
		from = c.recvs
	}
	switch {
	case from == nil: // the queue pair is gone, and its receives with it
	case c == nil || wc.Status != rdma.WCSuccess:
		if wc.ID&idOwnRecv == 0 {
			l.repost(from, slot)
		}
		if c != nil && wc.Status != rdma.WCFlush {
			c.log.Warn("receiving a capsule failed", "peer", c.name, "error", wc.Status)
			c.Close("a capsule was too long")
		}
	default:
		c.capsule(from, slot, int(wc.Bytes))
	}
}

// repost gives a receive back to its queue with the next turn.
func (l *lane) repost(r *receives, slot uint32) {
	sge, id, ok := r.back(slot)
	if !ok {
		return
	}
	if l.recv != r {
		l.batch.Recv(r.queue)
		l.recv = r
	}
	l.batch.Add(rdma.WR{ID: id}, sge)
}

// Where a capsule lies in its slot: its data starts at a multiple of 512 bytes, so that a drive can take it from there.
const (
	slotSize = 512 + inCapsule
	slotHead = 512 - nvmeof.CommandSize
	// perSlab is how many slots of a shared receive queue are made together.
	perSlab = 256
)

// receives is the memory that a receive queue's capsules arrive in. Slots are posted, or held by commands whose data is in
// them, or spare.
type receives struct {
	dev   *device
	queue rdma.Queue
	depth int // of the queue
	per   int // slots of one slab
	id    uint64

	mu    sync.Mutex
	slabs []*slab
	spare []uint32
	out   int // posted or held
	want  int // promised to hosts
	batch rdma.Batch
}

// slack is how many receives are there beyond those promised: a turn may answer commands before it has posted the receives
// that they came in.
const slack = pollBatch

// newReceives is for an SRQ, the index-th shard's.
func newReceives(d *device, q rdma.Queue, depth, index int) *receives {
	return &receives{dev: d, queue: q, depth: depth, per: oneMR(d, perSlab), id: idRecv | uint64(index)<<32}
}

// newOwnReceives is for a queue pair of its own.
func newOwnReceives(d *device, q rdma.Queue, depth int) *receives {
	return &receives{dev: d, queue: q, depth: depth + slack, per: oneMR(d, depth+slack), id: idRecv | idOwnRecv}
}

// oneMR is how many slots of a slab are in one registration: none may cross a border.
func oneMR(d *device, slots int) int { return int(min(uint64(slots), d.caps.MaxMRSize/slotSize)) }

// reserve promises n receives, and posts them.
func (r *receives) reserve(n int) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.want+n+slack > r.depth {
		return errNoRoom
	}
	for r.out+len(r.spare) < r.want+n+slack {
		s, err := newSlab(r.dev, r.per*slotSize)
		if err != nil {
			return err
		}
		for i := range r.per {
			r.spare = append(r.spare, uint32(len(r.slabs)*r.per+i))
		}
		r.slabs = append(r.slabs, s)
	}
	r.batch.Reset()
	r.batch.Recv(r.queue)
	k := 0
	for ; r.out+k < r.want+n+slack; k++ {
		slot := r.spare[len(r.spare)-1-k]
		r.batch.Add(rdma.WR{ID: r.id | uint64(slot)}, r.sge(slot))
	}
	r.dev.dev.Post(&r.batch)
	if k > 0 {
		done, err := r.batch.Posted(0)
		r.spare = r.spare[:len(r.spare)-done]
		r.out += done
		if err != nil {
			return err
		}
	}
	r.want += n
	return nil
}

// release takes a promise back; the receives go as they are used.
func (r *receives) release(n int) {
	r.mu.Lock()
	r.want -= n
	r.mu.Unlock()
}

func (r *receives) promised() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.want
}

// back takes a slot back and returns the request that posts it again; ok is false when there are enough.
func (r *receives) back(slot uint32) (sge rdma.SGE, id uint64, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.out > r.want+slack {
		r.out--
		r.spare = append(r.spare, slot)
		return sge, 0, false
	}
	return r.sge(slot), r.id | uint64(slot), true
}

// at returns a slot's first n bytes.
func (r *receives) at(slot uint32, n int) []byte {
	s := r.slabs[int(slot)/r.per]
	return s.mem[int(slot)%r.per*slotSize+slotHead:][:n:n]
}

func (r *receives) sge(slot uint32) rdma.SGE {
	return r.slabs[int(slot)/r.per].sge(r.at(slot, slotSize-slotHead))
}

// capsule returns n bytes of a capsule.
func (r *receives) capsule(slot uint32, n int) []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.at(slot, n)
}

func (r *receives) close() error {
	var errs []error
	for _, s := range r.slabs {
		errs = append(errs, s.close())
	}
	return errors.Join(errs...)
}
