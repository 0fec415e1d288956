package rdma

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/rdma"
	"github.com/kvof/kvof/target"
	"github.com/kvof/kvof/uring"
)

const (
	// maxPull is the most that one step of a transfer from the host brings: it is checksummed and stored while the next comes.
	maxPull = 1 << 20
	// overlap is how many such steps of a command are under way together, where READs are to be had.
	overlap = 4
	// maxSGEs is the most pieces of memory that one work request names.
	maxSGEs = 8
	// drainTime is how long a failed queue pair may take to give back what was posted, and to say that it uses no receive any
	// more, before it is destroyed, which ends all of that as well. soft-iWARP does not do the one, others not the other.
	drainTime = time.Second
)

// conn is one connection: a queue pair, for one queue.
type conn struct {
	l     *Listener
	log   *slog.Logger
	dev   *device
	lane  *lane
	shard *shard
	recvs *receives // its own, or the shard's
	id    rdma.ID
	qp    rdma.QP
	name  string
	queue *target.Queue

	depth  int // commands the host may have outstanding
	sends  int // places of the send queue
	sges   int // of one WRITE
	inline uint8
	born   time.Time
	serial uint64 // tells the connection from others in the IDs of work requests: 30 bits

	listed    bool         // among lane.dirty; the lane's
	early     []arrival    // commands that came before there was a request for them; the lane's
	taken     atomic.Int32 // commands whose response is not posted
	connected atomic.Bool  // a Connect succeeded
	progress  atomic.Uint64
	last      uint64 // progress, when checkStall last looked
	still     time.Duration

	mu       sync.Mutex
	ops      []*op // by request tag
	out      fifo[item]
	reads    fifo[item]
	done     fifo[entry] // WRITEs and SENDs posted, in order
	reading  fifo[entry] // READs posted, in order
	seq      uint32      // of the last posted
	free     int         // places of the send queue
	readFree int         // READs that may begin
	backs    []uint32    // slots to post again, before the next response
	posting  bool        // somebody is
	over     bool        // nothing is begun any more
	batch    rdma.Batch  // of whoever is posting, unless it is the lane
	cqes     *slab
	cqeAt    int
	drained  chan struct{}

	closeOnce sync.Once
	closing   chan struct{}
	reason    string
}

// op is the transport's side of a request.
type op struct {
	c    *conn
	r    *target.Request
	sgl  sgl
	slot uint32 // that the capsule's data is in
	held bool   // slot is

	bad    bool          // data could not be sent: the command fails
	parts  [overlap]part // of a pull, in order
	asked  uint32        // bytes whose READs are queued
	got    uint32        // bytes that are there
	failed bool
	wake   chan bool // of an asynchronous pull: the end of a part

	under int // parts whose READs are under way
}

// part is a piece of a command's memory that READs fill.
type part struct {
	want []byte
	page int32 // that its bytes arrive in
}

type kind uint8

const (
	write    kind = iota // data to the host
	response             // the completion
	read                 // data from the host
	drain                // the last request of a failed queue pair
)

// item is something to post.
type item struct {
	op     *op
	kind   kind
	signal bool // the host's response does not follow at once
	page   int32
	data   []byte // what is left
	buf    uring.Buf
}

// entry is what was posted: an item's last request, or one in its middle.
type entry struct {
	item
	seq  uint32
	wrs  int  // places of the send queue
	end  bool // the item ends with it
	wait wait
}

// wait says who looks for the end of a posted request.
type wait uint8

const (
	unsignaled wait = iota // it is not told of
	unawaited              // nobody, soon
	awaited                // somebody: it wakes the lane
)

// count adds n to the shard's requests of the kind.
func (s *shard) count(w wait, n int32) {
	switch w {
	case unawaited:
		s.unawaited.Add(n)
	case awaited:
		s.awaited.Add(n)
	}
}

// fifo is a queue that keeps its memory.
type fifo[T any] struct {
	b    []T
	head int
}

func (f *fifo[T]) len() int  { return len(f.b) - f.head }
func (f *fifo[T]) front() *T { return &f.b[f.head] }

func (f *fifo[T]) push(v T) {
	if f.head > 0 && len(f.b) == cap(f.b) { // slide rather than grow
		n := copy(f.b, f.b[f.head:])
		clear(f.b[n:])
		f.b, f.head = f.b[:n], 0
	}
	f.b = append(f.b, v)
}

func (f *fifo[T]) pop() (v T) {
	var zero T
	v, f.b[f.head] = f.b[f.head], zero
	if f.head++; f.head == len(f.b) {
		f.b, f.head = f.b[:0], 0
	}
	return v
}

// newConn makes a queue pair for a request that was found good.
func newConn(l *Listener, d *device, id rdma.ID, req *nvmeof.RDMARequest, reads int) (*conn, error) {
	c := &conn{l: l, log: l.t.log, dev: d, id: id, name: id.Remote().String(), depth: int(req.HSQSIZE) + 1, readFree: reads, born: time.Now(),
		closing: make(chan struct{}), drained: make(chan struct{})}
	c.sends = min(max(2*c.depth, 64), d.caps.MaxQPWR-1)
	c.sges = min(maxSGEs, d.caps.MaxSGE)
	c.free = c.sends
	next := d.next.Add(1)
	c.lane, c.serial = d.lanes[int(next)%len(d.lanes)], uint64(next&(1<<30-1))
	var err error
	if c.shard, err = c.lane.place(c.depth, c.sends+1); err != nil {
		return nil, err
	}
	attr := rdma.QPAttr{SendCQ: c.shard.sends, RecvCQ: c.shard.recvs, SendDepth: c.sends + 1, SendSGE: c.sges, Inline: nvmeof.CompletionSize}
	if c.recvs = c.shard.srq; c.recvs != nil {
		attr.SRQ = c.recvs.queue.(rdma.SRQ)
	} else {
		attr.RecvDepth = c.depth + slack
	}
	if c.qp, err = id.CreateQP(attr); err != nil {
		c.free = 0
		return nil, errors.Join(err, c.release())
	}
	if c.qp.Inline() >= nvmeof.CompletionSize && !d.caps.IWARP { // soft-iWARP has no inline SEND with invalidate
		c.inline = rdma.FlagInline
	}
	if c.cqes, err = newSlab(d, c.sends*nvmeof.CompletionSize); err != nil {
		return nil, errors.Join(err, c.release())
	}
	if c.recvs == nil {
		c.recvs = newOwnReceives(d, c.qp, c.depth)
		if err = c.recvs.reserve(c.depth); err != nil {
			return nil, errors.Join(err, c.release())
		}
	}
	c.queue = l.t.target.NewQueue(c, l.port, id.Local())
	c.queue.Limit(c.depth)
	return c, nil
}

// release gives back what newConn took, after the queue pair's end.
func (c *conn) release() error {
	err := c.id.Close()
	if c.cqes != nil {
		err = errors.Join(err, c.cqes.close())
	}
	if c.shard.srq == nil && c.recvs != nil {
		err = errors.Join(err, c.recvs.close())
	}
	c.lane.leave(c.shard, c.depth, c.sends+1)
	return err
}

// Name implements target.Conn.
func (c *conn) Name() string { return c.name }

// Close implements target.Conn.
func (c *conn) Close(reason string) {
	c.closeOnce.Do(func() {
		c.reason = reason
		close(c.closing)
	})
}

// serve runs an accepted connection until it has ended.
func (c *conn) serve() {
	select {
	case <-c.id.Ended():
		c.log.Debug("connection ended", "peer", c.name, "error", c.id.Err())
		c.Close("")
	case <-c.closing:
		c.log.Debug("connection closed", "peer", c.name, "reason", c.reason)
	}
	c.stop()
	late := time.After(drainTime)
	select {
	case <-c.drained:
		if c.shard.srq != nil {
			select {
			case <-c.qp.LastReceive():
			case <-late:
			}
		}
	case <-late:
		c.log.Debug("a failed queue pair does not give back what was posted", "peer", c.name)
	}
	c.lane.remove(c)
	if err := c.id.Close(); err != nil { // nothing touches memory from here on
		c.log.Warn("closing a connection", "peer", c.name, "error", err)
	}
	c.abort()
	c.queue.Close()
	if err := c.release(); err != nil {
		c.log.Warn("closing a connection", "peer", c.name, "error", err)
	}
}

// stop fails the queue pair, begins nothing any more, and posts the request behind all others.
func (c *conn) stop() {
	c.id.Disconnect()
	c.qp.Fail()
	c.mu.Lock()
	c.over = true
	dropped := c.out
	c.out = fifo[item]{}
	c.out.push(item{kind: drain})
	c.mu.Unlock()
	for dropped.len() > 0 {
		it := dropped.pop()
		c.retire(&it)
	}
	c.flush()
}

// abort ends what was posted and did not complete, and what waited for its turn.
func (c *conn) abort() {
	c.mu.Lock()
	done, reading, reads := c.done, c.reading, c.reads
	c.done, c.reading, c.reads = fifo[entry]{}, fifo[entry]{}, fifo[item]{}
	backs := c.backs
	c.backs = nil
	c.mu.Unlock()
	for _, a := range c.early {
		backs = append(backs, a.slot)
	}
	for done.len() > 0 {
		e := done.pop()
		c.shard.count(e.wait, -1)
		if e.end {
			c.retire(&e.item)
		}
	}
	for reading.len() > 0 {
		e := reading.pop()
		c.shard.count(e.wait, -1)
		if e.end {
			c.arrived(e.op, false)
		}
	}
	for reads.len() > 0 {
		c.arrived(reads.pop().op, false)
	}
	c.giveBack(backs)
}

// giveBack posts slots again, outside any turn.
func (c *conn) giveBack(slots []uint32) {
	if c.shard.srq == nil || len(slots) == 0 { // its own queue is gone
		return
	}
	var b rdma.Batch
	b.Recv(c.recvs.queue)
	for _, s := range slots {
		if sge, id, ok := c.recvs.back(s); ok {
			b.Add(rdma.WR{ID: id}, sge)
		}
	}
	c.dev.dev.Post(&b)
}

// capsule takes a command. The lane calls it.
func (c *conn) capsule(from *receives, slot uint32, n int) {
	if n < nvmeof.CommandSize || n > nvmeof.CommandSize+inCapsule {
		c.lane.repost(from, slot)
		c.log.Warn("host broke the protocol", "peer", c.name, "capsule_bytes", n)
		c.Close("a capsule was too short")
		return
	}
	c.mu.Lock()
	over := c.over
	c.mu.Unlock()
	if over {
		c.lane.repost(from, slot)
		return
	}
	if int(c.taken.Add(1)) > c.depth {
		c.lane.repost(from, slot)
		c.log.Warn("host broke the protocol", "peer", c.name, "error", "more commands than the queue has entries")
		c.Close("more commands than the queue has entries")
		return
	}
	c.dev.commands.Add(1)
	c.execute(arrival{from, slot, n})
}

// arrival is a capsule in its slot.
type arrival struct {
	from *receives
	slot uint32
	n    int
}

// execute runs a command. It waits in line when the host has all responses but the device has not told us of most.
func (c *conn) execute(a arrival) {
	r := c.queue.NewRequest()
	if r == nil {
		c.early = append(c.early, a)
		c.lane.overdue.Store(true)
		return
	}
	from, slot := a.from, a.slot
	b := from.capsule(slot, a.n)
	copy(r.Cmd[:], b)
	r.Batch = &c.lane.ops
	o := c.op(r)
	length, inline, st := o.sgl.parse(&r.Cmd, b[nvmeof.CommandSize:])
	r.Length = length
	if len(inline) > 0 && st == nvmeof.Success {
		r.Inline, r.Stays = inline, true
		o.slot, o.held = slot, true
	} else {
		c.lane.repost(from, slot)
	}
	if st != nvmeof.Success {
		c.queue.Refuse(r, st)
		return
	}
	c.queue.Execute(r)
}

// op returns the op of a request, ready for its next command.
func (c *conn) op(r *target.Request) *op {
	c.mu.Lock()
	defer c.mu.Unlock()
	for int(r.Tag) >= len(c.ops) {
		c.ops = append(c.ops, nil)
	}
	o := c.ops[r.Tag]
	if o == nil {
		o = &op{c: c, r: r, wake: make(chan bool, overlap)}
		c.ops[r.Tag] = o
	}
	o.held, o.bad, o.failed, o.asked, o.got, o.under = false, false, false, 0, 0, 0
	return o
}

func (c *conn) opOf(r *target.Request) *op {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ops[r.Tag]
}

// post sees to it that what was queued goes out: here and now, or with the lane's turn when the caller is the lane.
func (c *conn) post(async bool) {
	if async {
		c.flush()
	} else {
		c.lane.touch(c)
	}
}

// Send implements target.Conn: an RDMA WRITE. The last piece waits for the response, to go with it.
func (c *conn) Send(r *target.Request, b uring.Buf, last bool) {
	o := c.opOf(r)
	if len(b.Data) > 0 && c.dev.region(b.Data) == nil {
		c.sendCopy(o, b)
		return
	}
	it, async := item{op: o, kind: write, signal: !last, page: noPage, data: b.Data, buf: b}, r.Async
	c.mu.Lock()
	if c.over {
		c.mu.Unlock()
		c.retire(&it)
		return
	}
	c.out.push(it)
	c.mu.Unlock()
	if !last {
		c.post(async)
	}
}

// sendCopy sends what is not in registered memory, such as Identify data: by pages that are.
func (c *conn) sendCopy(o *op, b uring.Buf) {
	data := b.Data
	ps := c.dev.bounce.take((len(data) + pageSize - 1) / pageSize)
	c.mu.Lock()
	if ps == nil || c.over {
		o.bad = true
	} else {
		for _, p := range ps {
			page := c.dev.bounce.at(p, min(len(data), pageSize))
			data = data[copy(page, data):]
			c.out.push(item{op: o, kind: write, page: p, data: page})
		}
		ps = nil
	}
	c.mu.Unlock()
	for _, p := range ps {
		c.dev.bounce.put(p)
	}
	b.Put()
	o.r.Taken()
}

// Complete implements target.Conn.
func (c *conn) Complete(r *target.Request) {
	o := c.opOf(r)
	if o.bad && r.CQE.Status() == nvmeof.Success {
		r.CQE = nvmeof.MakeCompletion(0, 0, r.CQE.SQHD(), c.queue.ID(), r.CQE.CID(), nvmeof.InternalError)
	}
	if r.Cmd.Opcode() == nvmeof.OpFabrics && r.Cmd.FCType() == nvmeof.FCConnect && r.CQE.Status() == nvmeof.Success {
		c.connected.Store(true)
	}
	it, async := item{op: o, kind: response, page: noPage}, r.Async // r is the host's once it is queued
	c.mu.Lock()
	if o.held {
		o.held = false
		c.backs = append(c.backs, o.slot)
	}
	if c.over {
		backs := c.backs
		c.backs = nil
		c.mu.Unlock()
		c.giveBack(backs)
		c.retire(&it)
		return
	}
	c.out.push(it)
	c.mu.Unlock()
	c.post(async)
}

// Pull implements target.Conn: RDMA READs, for some parts of the data at a time. On the lane it goes on with the end of each
// part; a request in a goroutine of its own waits there.
func (c *conn) Pull(r *target.Request) {
	o := c.opOf(r)
	if !r.Async {
		c.step(o)
		return
	}
	for o.got < r.PullLength && !o.failed {
		if o.failed = !c.ask(o); o.under == 0 {
			break
		}
		c.flush()
		c.ended(o, <-o.wake)
	}
	for o.under > 0 {
		<-o.wake
		c.ended(o, false)
	}
	c.pulled(o)
}

// pulled ends a pull of which nothing is under way.
func (c *conn) pulled(o *op) {
	if o.failed {
		o.r.Aborted()
	} else {
		o.r.Received(nvmeof.Success)
	}
}

// step goes on with a pull on the lane.
func (c *conn) step(o *op) {
	if !o.failed && o.got < o.r.PullLength {
		o.failed = !c.ask(o)
		c.lane.touch(c)
	}
	if o.under == 0 {
		c.pulled(o)
	}
}

// ask queues the READs of as many parts as may come now; false when the connection is over.
func (c *conn) ask(o *op) bool {
	for o.asked < o.r.PullLength && o.under < overlap {
		p := part{o.r.Ahead(int(o.asked-o.got), int(min(o.r.PullLength-o.asked, maxPull))), noPage}
		data := p.want
		if len(data) == 0 { // the parts before come first
			break
		}
		if c.dev.region(data) == nil { // small structures on the Go heap, such as Connect data
			ps := c.dev.bounce.take(1)
			if ps == nil {
				return false
			}
			p.page = ps[0]
			p.want = p.want[:min(len(data), pageSize)]
			data = c.dev.bounce.at(p.page, len(p.want))
		}
		c.mu.Lock()
		over := c.over
		if !over {
			c.reads.push(item{op: o, kind: read, page: p.page, data: data})
		}
		c.mu.Unlock()
		if over {
			c.forget(p)
			return false
		}
		o.parts[o.under] = p
		o.under++
		o.asked += uint32(len(p.want))
	}
	return true
}

// ended hands the oldest part to the command when it has arrived.
func (c *conn) ended(o *op, ok bool) {
	p := o.parts[0]
	o.under--
	copy(o.parts[:], o.parts[1:])
	o.parts[overlap-1] = part{}
	if o.failed = o.failed || !ok; o.failed {
		c.forget(p)
		return
	}
	if p.page != noPage {
		copy(p.want, c.dev.bounce.at(p.page, len(p.want)))
		c.forget(p)
	}
	o.got += uint32(len(p.want))
	o.r.Filled(len(p.want))
}

// forget gives the page of a part back.
func (c *conn) forget(p part) {
	if p.page != noPage {
		c.dev.bounce.put(p.page)
	}
}

// arrived tells a pull that the READs of its oldest part are over.
func (c *conn) arrived(o *op, ok bool) {
	if o.r.Async {
		o.wake <- ok
		return
	}
	c.ended(o, ok)
	c.step(o)
}

// flush posts what is queued unless somebody else is already at it, who then looks again.
func (c *conn) flush() {
	c.mu.Lock()
	if c.posting {
		c.mu.Unlock()
		return
	}
	for {
		c.batch.Reset()
		if c.posting = c.fill(&c.batch); !c.posting {
			c.mu.Unlock()
			return
		}
		c.mu.Unlock()
		c.dev.dev.Post(&c.batch)
		for k := range c.batch.Len() {
			if _, err := c.batch.Posted(k); err != nil {
				c.unposted(err)
			}
		}
		c.mu.Lock()
	}
}

// unposted ends the connection: the device did not take a request.
func (c *conn) unposted(err error) {
	c.mu.Lock()
	over := c.over
	c.mu.Unlock()
	if over { // what was posted before has been given back, or the end of the queue pair ends it
		c.closeDrained()
		return
	}
	c.log.Warn("the queue pair takes no request", "peer", c.name, "error", err)
	c.Close("posting failed")
}

func (c *conn) closeDrained() {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.drained:
	default:
		close(c.drained)
	}
}

// ready tells whether something can be posted. The caller holds mu.
func (c *conn) ready() bool {
	return c.reads.len() > 0 && c.readFree > 0 && c.free > 0 && !c.over || c.out.len() > 0 && (c.free > 0 || c.out.front().kind == drain)
}

// fill adds what can be posted to b, and tells whether that was anything. The caller holds mu.
func (c *conn) fill(b *rdma.Batch) bool {
	if !c.ready() {
		return false
	}
	if len(c.backs) > 0 { // before the responses: the host may then send again
		b.Recv(c.recvs.queue)
		for _, s := range c.backs {
			if sge, id, ok := c.recvs.back(s); ok {
				b.Add(rdma.WR{ID: id}, sge)
			}
		}
		c.backs = c.backs[:0]
	}
	b.Send(c.qp)
	for c.reads.len() > 0 && c.readFree > 0 && c.free > 0 && !c.over {
		c.fillRead(b)
	}
	for c.out.len() > 0 {
		switch it := c.out.front(); {
		case it.kind == drain:
			b.Add(rdma.WR{ID: c.note(c.out.pop(), 0, true, awaited), Op: rdma.OpWrite, Flags: rdma.FlagSignaled}) // of no bytes
		case c.free == 0:
			return true
		case it.kind == write:
			c.fillWrite(b)
		default:
			c.fillResponse(b)
		}
	}
	return true
}

// note notes a request that is about to be posted and returns its ID.
func (c *conn) note(it item, wrs int, end bool, w wait) uint64 {
	c.seq++
	c.free -= wrs
	posted := &c.done
	if it.kind == read {
		posted = &c.reading
	}
	posted.push(entry{item: it, seq: c.seq, wrs: wrs, end: end, wait: w})
	c.shard.count(w, 1)
	switch w {
	case unawaited:
		c.lane.later()
	case awaited:
		if err := c.shard.arm(); err != nil {
			c.dev.lost("arming a completion queue failed: " + err.Error())
		}
	}
	return c.serial<<32 | uint64(c.seq)
}

// cut takes the next piece of an item's memory that one SGE can name and one descriptor of the host holds.
func (c *conn) cut(it *item, most uint64) (sge rdma.SGE, addr uint64, key uint32) {
	if it.page != noPage {
		sge = c.dev.bounce.sge(it.data)
	} else if r := c.dev.region(it.data); r != nil {
		sge, _ = r.Split(it.data)
	} else {
		return rdma.SGE{}, 0, 0
	}
	addr, key, sge.Length = it.op.sgl.next(min(uint64(sge.Length), most))
	it.data = it.data[sge.Length:]
	return sge, addr, key
}

// fillRead adds one RDMA READ.
func (c *conn) fillRead(b *rdma.Batch) {
	it := c.reads.front()
	sge, addr, key := c.cut(it, c.dev.caps.MaxMessage)
	end := len(it.data) == 0
	if sge.Length == 0 { // the SGL is shorter than what the command is for: the target has checked that it is not
		end = true
	}
	c.readFree--
	id := c.note(*it, 1, end, awaited)
	if end {
		c.reads.pop()
	}
	b.Add(rdma.WR{ID: id, Op: rdma.OpRead, Flags: rdma.FlagSignaled, Remote: addr, RKey: key}, sge)
}

// fillWrite adds one RDMA WRITE: of as many queued pieces of the same command as are for adjacent memory of the host.
func (c *conn) fillWrite(b *rdma.Batch) {
	var sges [maxSGEs]rdma.SGE
	n, left, signal := 0, c.dev.caps.MaxMessage, false
	w := rdma.WR{Op: rdma.OpWrite}
	o := c.out.front().op
	for {
		it := c.out.front()
		sge, addr, key := c.cut(it, left)
		if n == 0 {
			w.Remote, w.RKey = addr, key
		}
		left -= uint64(sge.Length)
		sges[n] = sge
		n++
		end := len(it.data) == 0 || sge.Length == 0
		if end {
			signal = signal || it.signal
			c.note(c.out.pop(), 0, true, unsignaled)
		}
		if n == c.sges || left == 0 || o.sgl.room() == 0 || c.out.len() == 0 {
			break
		}
		if next := c.out.front(); next.op != o || next.kind != write {
			break
		}
	}
	told := unsignaled
	switch {
	case signal, c.free == 1:
		told = awaited
	case c.dev.caps.IWARP: // soft-iWARP has TCP send the memory itself, even late, unless asked when the WRITE is over
		told = unawaited
	}
	if told != unsignaled {
		w.Flags = rdma.FlagSignaled
	}
	w.ID = c.note(item{op: o, kind: write, page: noPage}, 1, false, told)
	b.Add(w, sges[:n]...)
}

// fillResponse adds the response capsule. It invalidates the host's key if that was asked for, and the device can.
func (c *conn) fillResponse(b *rdma.Batch) {
	it := c.out.pop()
	o := it.op
	cqe := c.cqes.mem[c.cqeAt*nvmeof.CompletionSize:][:nvmeof.CompletionSize]
	c.cqeAt = (c.cqeAt + 1) % c.sends
	copy(cqe, o.r.CQE[:])
	w := rdma.WR{Op: rdma.OpSend, Flags: rdma.FlagSignaled | c.inline}
	if o.sgl.invalidate && c.dev.caps.SendInvalidate {
		w.Op, w.RKey = rdma.OpSendInvalidate, o.sgl.key
		if c.dev.caps.IWARP { // soft-iWARP inlines nothing but plain sends
			w.Flags = rdma.FlagSignaled
		}
	}
	told := unawaited
	if o.r.Sent > uring.SmallBuf || c.free < c.sends*3/4 { // others may wait for the memory, or the place
		told = awaited
	}
	w.ID = c.note(it, 1, true, told)
	c.taken.Add(-1)
	b.Add(w, c.cqes.sge(cqe))
}

// sent handles the completion of a posted request: all before it are over too, but for READs. They have completions of their own,
// which those of later requests overtake on soft-iWARP: until they come the data is not there, and the host's key is in use. The lane
// calls it.
func (c *conn) sent(wc *rdma.WC) {
	if wc.ID>>32 != c.serial { // left of a queue pair that had the same number
		return
	}
	ok := wc.Status == rdma.WCSuccess
	c.progress.Add(1)
	ended := c.lane.ended[:0]
	c.mu.Lock()
	seq, posted := uint32(wc.ID), &c.done
	if c.reading.len() > 0 && c.reading.front().seq == seq {
		posted = &c.reading
	}
	for posted.len() > 0 && int32(posted.front().seq-seq) <= 0 {
		e := posted.pop()
		c.free += e.wrs
		c.shard.count(e.wait, -1)
		if e.kind == read {
			c.readFree++
		}
		if e.end {
			ended = append(ended, e)
		}
	}
	more, over := c.ready(), c.over
	c.mu.Unlock()
	for i := range ended {
		e := &ended[i]
		if e.kind == read {
			c.arrived(e.op, ok)
		} else {
			c.retire(&e.item)
		}
		*e = entry{}
	}
	c.lane.ended = ended
	if early := c.early; len(early) > 0 && !over {
		c.early = nil
		for _, a := range early {
			c.execute(a)
		}
	}
	if more {
		c.lane.touch(c)
	}
	if !ok && wc.Status != rdma.WCFlush {
		c.log.Warn("a transfer failed", "peer", c.name, "error", wc.Status, "vendor_error", fmt.Sprintf("%#x", wc.VendorError))
		c.Close("a transfer failed: " + wc.Status.Error())
	}
}

// retire ends an item: what it held goes back.
func (c *conn) retire(it *item) {
	switch it.kind {
	case write:
		if it.page != noPage {
			c.dev.bounce.put(it.page)
			return
		}
		it.buf.Put()
		it.op.r.Taken()
	case response:
		it.op.r.Release()
	case drain:
		c.closeDrained()
	}
}

// checkStall ends the connection when it was not set up in time, or its host takes part in no transfer for the listener's
// limit. It is called once in every period d.
func (c *conn) checkStall(d time.Duration) {
	if !c.connected.Load() && time.Since(c.born) > c.l.setup {
		c.Close("no Connect in time")
	}
	c.mu.Lock()
	busy := c.done.len()+c.reading.len()+c.out.len()+c.reads.len() > 0
	c.mu.Unlock()
	if now := c.progress.Load(); !busy || now != c.last {
		c.last, c.still = now, 0
		return
	}
	if c.still += d; c.still >= c.l.stall {
		c.log.Warn("connection stalled", "peer", c.name, "after", c.still)
		c.Close("the peer stalled")
	}
}
