package host

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/rdma"
	"golang.org/x/sys/unix"
)

// rdmaTransport dials NVMe/RDMA queues, all on one device. Data goes straight between the caller's memory and the
// controller; only what is small and not registered is copied.
type rdmaTransport struct {
	opts  *Options
	verbs rdma.Verbs

	dev     rdma.Device  // of the first queue, and so of all
	devices atomic.Int32 // regions that are a dma-buf's; changed with the mutex

	mu      sync.RWMutex
	regions []*region // registered by the caller
}

// region is memory of the caller's.
type region struct {
	mem []byte
	*rdma.Region
	device bool // a dma-buf's: no processor may touch it
}

const (
	// remote is what the controller may do with data. A registration serves both directions.
	remote = rdma.RemoteRead | rdma.RemoteWrite
	// maxDescriptor is the most data that one descriptor of ours names: whole pages, and fewer bytes than 24 bits count.
	maxDescriptor = nvmeof.MaxKeyedLength &^ 0xFFF
	// bounceSize is how much data a slot has room for, so as not to register small pieces of memory for one command.
	bounceSize = 8 << 10

	sglsKeyed  = 1 << 2  // keyed descriptors
	sglsOffset = 1 << 20 // offsets into the capsule
)

func newRDMA(o *Options) (transport, error) {
	if o.HeaderDigest || o.DataDigest {
		return nil, errors.New("RDMA has no digests: its network protects the data")
	}
	t := &rdmaTransport{opts: o, verbs: o.Verbs}
	if t.verbs == nil {
		var err error
		if t.verbs, err = rdma.System(); err != nil {
			return nil, err
		}
	}
	return t, nil
}

func (t *rdmaTransport) register(b []byte, buf *rdma.DMABuf) (err error) {
	r := &region{mem: b, device: buf != nil}
	if r.device {
		r.Region, err = t.dev.RegisterDMABuf(b, *buf, remote)
	} else {
		r.Region, err = t.dev.Register(b, remote)
	}
	if err != nil {
		err = fmt.Errorf("register %d bytes of memory with %s: %w", len(b), t.dev.Name(), err)
		if errors.Is(err, rdma.ErrNoDMABuf) {
			err = fmt.Errorf("%w: %w", ErrDeviceMemory, err)
		}
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.regions = append(t.regions, r)
	if r.device {
		t.devices.Add(1)
	}
	return nil
}

func (t *rdmaTransport) unregister(b []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, r := range t.regions {
		if len(r.mem) == len(b) && &r.mem[0] == &b[0] {
			t.regions = slices.Delete(t.regions, i, i+1)
			if r.device {
				t.devices.Add(-1)
			}
			r.Close()
			return
		}
	}
}

// find returns the registered region that b lies in.
func (t *rdmaTransport) find(b []byte) *rdma.Region {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, r := range t.regions {
		if r.Contains(b) {
			return r.Region
		}
	}
	return nil
}

// device tells whether any of d lies in the memory of a dma-buf.
func (t *rdmaTransport) device(d data) bool {
	if t.devices.Load() == 0 {
		return false
	}
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, r := range t.regions {
		if r.device && (rdma.Overlap(r.mem, d.buf) || slices.ContainsFunc(d.pieces, func(p []byte) bool { return rdma.Overlap(r.mem, p) })) {
			return true
		}
	}
	return false
}

func (t *rdmaTransport) close() {
	for _, r := range t.regions {
		r.Close()
	}
	t.regions = nil
}

func (t *rdmaTransport) maxTransfer(ident *nvmeof.IdentifyController) uint64 {
	return uint64(descriptors(ident)) * maxDescriptor
}

// descriptors is how many SGL descriptors a command may have.
func descriptors(ident *nvmeof.IdentifyController) int {
	room := int(min(ident.IOCCSZ*16, 1<<16)-nvmeof.CommandSize) / nvmeof.SGLSize
	if ident.SGLS&sglsOffset == 0 || ident.ICDOFF != 0 {
		room = 0
	}
	if ident.MSDBD != 0 {
		room = min(room, int(ident.MSDBD))
	}
	return max(room, 1)
}

func (t *rdmaTransport) dial(ctx context.Context, p queueParams) (_ queue, err error) {
	ctx, stop := context.WithTimeout(ctx, t.opts.DialTimeout)
	defer stop()
	peer, err := resolve(ctx, t.opts.Addr)
	if err != nil {
		return nil, err
	}
	id, err := t.verbs.Resolve(ctx, netip.Addr{}, peer)
	if err != nil {
		return nil, err
	}
	q := &rdmaQueue{t: t, id: id, dev: id.Device(), onFail: p.onFail, descriptors: 1}
	if p.id == 0 {
		t.dev = q.dev
	} else {
		switch {
		case q.dev != t.dev:
			err = errors.New("the routes of two connections lead through different RDMA devices")
		case p.ident.SGLS&sglsKeyed == 0:
			err = protocolError("the controller takes no keyed SGL descriptors")
		}
		if p.ident.SGLS&sglsOffset != 0 {
			q.inCapsule = min(ioInCapsule(p.ident), bounceSize)
		}
		q.descriptors = descriptors(p.ident)
	}
	if err == nil {
		err = q.open(ctx, p)
	}
	if err != nil {
		q.close()
		q.unmap()
		return nil, err
	}
	q.start()
	return q, nil
}

// resolve finds the address of host:port.
func resolve(ctx context.Context, addr string) (netip.AddrPort, error) {
	name, port, err := net.SplitHostPort(addr)
	if err != nil {
		return netip.AddrPort{}, err
	}
	n, err := net.DefaultResolver.LookupPort(ctx, "tcp", port)
	if err != nil {
		return netip.AddrPort{}, err
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", name)
	if err != nil {
		return netip.AddrPort{}, err
	}
	return netip.AddrPortFrom(ips[0].Unmap(), uint16(n)), nil
}

// rdmaQueue is one NVMe queue pair on its own RDMA queue pair. Submitters post their command themselves; one goroutine
// takes all completions, and when the queue fails destroys the queue pair before it lets go of anybody's memory.
type rdmaQueue struct {
	t           *rdmaTransport
	id          rdma.ID
	dev         rdma.Device
	qp          rdma.QP
	ch          rdma.Channel
	sends       rdma.CQ
	responded   rdma.CQ
	late        int    // commands answered whose send is not known to be over; the completing goroutine's
	mem         []byte // of capsules, small data and responses, off the heap
	region      *rdma.Region
	inCapsule   int // data bytes that fit into a command capsule
	descriptors int // of a command
	onFail      func(error)

	slots     []rdmaSlot
	free      chan uint16
	responses [][]byte
	dead      chan struct{} // closed after err is set
	wg        sync.WaitGroup

	mu  sync.Mutex // held while posting
	err error
}

// rdmaSlot is the place of one command in flight. The mutex of its queue guards its state.
type rdmaSlot struct {
	index, cid uint16
	capsule    []byte // with room for in-capsule data or descriptors
	bounce     []byte
	batch      rdma.Batch
	data       data
	temporary  []*rdma.Region // registered for this command
	bounced    bool           // the data comes into bounce
	exposed    bool           // the controller may use the caller's memory
	active     bool
	sent       bool // the send is over
	answered   bool
	orphan     bool // nobody waits
	cqe        nvmeof.Completion
	err        error
	done       chan struct{} // cap 1
}

// receiveID marks the work request IDs of receives; those of sends are slots.
const receiveID = 1 << 32

// open creates the queue pair, posts its receives and connects it.
func (q *rdmaQueue) open(ctx context.Context, p queueParams) (err error) {
	caps := q.dev.Caps()
	depth := min(p.depth, caps.MaxQPWR-1, caps.MaxCQE-1)
	if q.ch, err = q.dev.NewChannel(); err != nil {
		return err
	}
	if q.sends, err = q.ch.NewCQ(depth); err != nil {
		return err
	}
	if q.responded, err = q.ch.NewCQ(depth + 1); err != nil {
		return err
	}
	q.qp, err = q.id.CreateQP(rdma.QPAttr{SendCQ: q.sends, RecvCQ: q.responded, RecvDepth: depth + 1, SendDepth: depth, SendSGE: 1, Inline: nvmeof.CommandSize})
	if err != nil {
		return err
	}
	if err := q.allocate(depth); err != nil {
		return err
	}
	var b rdma.Batch
	b.Recv(q.qp)
	for i := range q.responses {
		q.addReceive(&b, i)
	}
	q.dev.Post(&b)
	if _, err := b.Posted(0); err != nil {
		return err
	}
	private := make([]byte, nvmeof.RDMARequestSize)
	request := nvmeof.RDMARequest{QID: p.id, HRQSIZE: uint16(depth + 1), HSQSIZE: uint16(depth)}
	if p.id != 0 {
		request.CNTLID = p.cntlid
	}
	request.Encode(private)
	accept, err := q.id.Connect(ctx, rdma.ConnParam{Private: private, ResponderResources: uint8(min(caps.MaxResponder, 255))})
	var rejected *rdma.RejectedError
	switch {
	case errors.As(err, &rejected):
		if r := nvmeof.DecodeRDMAReject(rejected.Private); r != 0 {
			return r
		}
		return err
	case err != nil:
		return err
	}
	size, err := nvmeof.DecodeRDMAAccept(accept.Private)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	if int(size) < depth {
		return protocolError("a queue of %d commands was accepted with receives for %d", depth, size)
	}
	return nil
}

// allocate maps and registers the queue's own memory.
func (q *rdmaQueue) allocate(depth int) (err error) {
	capsule := nvmeof.CommandSize + max(q.inCapsule, q.descriptors*nvmeof.SGLSize)
	capsule = (capsule + 63) &^ 63
	const response = 64 // of which a completion takes 16: a cache line each
	if q.mem, err = unix.Mmap(-1, 0, depth*(capsule+bounceSize)+(depth+1)*response, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE); err != nil {
		return fmt.Errorf("memory of a queue: %w", err)
	}
	if q.region, err = q.dev.Register(q.mem, remote); err != nil {
		return fmt.Errorf("register a queue's memory with %s: %w", q.dev.Name(), err)
	}
	rest := q.mem
	take := func(n int) []byte {
		b := rest[:n:n]
		rest = rest[n:]
		return b
	}
	q.slots, q.free, q.dead = make([]rdmaSlot, depth), make(chan uint16, depth), make(chan struct{})
	for i := range q.slots {
		s := &q.slots[i]
		s.index, s.cid, s.done = uint16(i), uint16(i), make(chan struct{}, 1)
		s.bounce = take(bounceSize)
		q.free <- uint16(i)
	}
	for i := range q.slots {
		q.slots[i].capsule = take(capsule)
	}
	for range depth + 1 {
		q.responses = append(q.responses, take(response))
	}
	return nil
}

func (q *rdmaQueue) addReceive(b *rdma.Batch, i int) {
	sge, _ := q.region.Split(q.responses[i])
	b.Add(rdma.WR{ID: receiveID | uint64(i)}, sge)
}

// start begins to take completions.
func (q *rdmaQueue) start() {
	q.wg.Go(q.complete)
	q.wg.Go(func() {
		select {
		case <-q.id.Ended():
			q.fail(fmt.Errorf("%w: %w", ErrConnectionLost, q.id.Err()))
		case <-q.dead:
		}
	})
}

func (q *rdmaQueue) depth() int { return len(q.slots) }

func (q *rdmaQueue) load() int { return cap(q.free) - len(q.free) }

func (q *rdmaQueue) wait() { q.wg.Wait() }

func (q *rdmaQueue) fail(err error) {
	q.mu.Lock()
	if q.err != nil {
		q.mu.Unlock()
		return
	}
	q.err = err
	close(q.dead)
	q.mu.Unlock()
	q.ch.Wake()
	if q.onFail != nil {
		q.onFail(err)
	}
}

func (q *rdmaQueue) do(ctx context.Context, cmd nvmeof.Command, d data) (nvmeof.Completion, int, error) {
	var s *rdmaSlot
	select {
	case i := <-q.free:
		s = &q.slots[i]
	case <-ctx.Done():
		return nvmeof.Completion{}, 0, context.Cause(ctx)
	case <-q.dead:
		return nvmeof.Completion{}, 0, q.err
	}
	n, err := q.prepare(s, cmd, d)
	if err == nil {
		err = q.post(s, n)
	}
	if err != nil {
		q.clean(s)
		q.free <- s.index
		return nvmeof.Completion{}, 0, err
	}
	return q.await(ctx, s, cmd.Direction())
}

// prepare fills a slot that nobody else sees yet, and its capsule; it returns the capsule's length.
func (q *rdmaQueue) prepare(s *rdmaSlot, cmd nvmeof.Command, d data) (int, error) {
	s.data = d
	s.bounced, s.exposed, s.orphan, s.sent, s.answered = false, false, false, false, false
	s.err = nil
	size, dir := d.size(), cmd.Direction()
	n := nvmeof.CommandSize
	cmd.SetCID(s.cid)
	device := q.t.device(d)
	switch {
	case size == 0:
		cmd.SetSGL(nvmeof.MakeKeyedSGL(nvmeof.SGLKeyed, 0, 0, 0))
	case dir == nvmeof.HostToController && size <= q.inCapsule && !device:
		gather(s.capsule[n:], d)
		cmd.SetSGL(nvmeof.MakeSGL(nvmeof.SGLOffset, 0, uint32(size)))
		n += size
	case size <= bounceSize && !device && (d.pieces != nil || q.t.find(d.buf) == nil):
		if dir == nvmeof.HostToController {
			gather(s.bounce, d)
		}
		s.bounced = dir == nvmeof.ControllerToHost
		sge, key := q.region.Split(s.bounce[:size])
		cmd.SetSGL(nvmeof.MakeKeyedSGL(nvmeof.SGLKeyed, sge.Addr, uint32(size), key))
	default:
		s.exposed = true
		list := s.capsule[n:n]
		err := q.describe(s, d.buf, &list)
		for _, p := range d.pieces {
			if err == nil {
				err = q.describe(s, p, &list)
			}
		}
		if err != nil {
			return 0, err
		}
		if len(list) == nvmeof.SGLSize {
			cmd.SetSGL(nvmeof.SGL(list))
		} else {
			cmd.SetSGL(nvmeof.MakeSGL(nvmeof.SGLLastSegment, 0, uint32(len(list))))
			n += len(list)
		}
	}
	copy(s.capsule, cmd[:])
	return n, nil
}

// gather copies data to where a slot has room for it.
func gather(to []byte, d data) {
	to = to[copy(to, d.buf):]
	for _, p := range d.pieces {
		to = to[copy(to, p):]
	}
}

// describe appends the descriptors of a piece of the caller's memory, which it registers if the caller has not.
func (q *rdmaQueue) describe(s *rdmaSlot, b []byte, list *[]byte) error {
	if len(b) == 0 {
		return nil
	}
	r := q.t.find(b)
	if r == nil {
		if q.t.device(data{buf: b}) {
			return fmt.Errorf("%d bytes that are not all in one region: %w", len(b), ErrDeviceMemory)
		}
		var err error
		if r, err = q.dev.Register(b, remote); err != nil {
			return fmt.Errorf("register %d bytes of memory with %s: %w", len(b), q.dev.Name(), err)
		}
		s.temporary = append(s.temporary, r)
	}
	for len(b) > 0 {
		if len(*list) == q.descriptors*nvmeof.SGLSize {
			return fmt.Errorf("the data takes more than %d descriptors: %w", q.descriptors, ErrTransferSize)
		}
		sge, key := r.Split(b[:min(len(b), maxDescriptor)])
		sgl := nvmeof.MakeKeyedSGL(nvmeof.SGLKeyed, sge.Addr, sge.Length, key)
		*list = append(*list, sgl[:]...)
		b = b[sge.Length:]
	}
	return nil
}

// post sends a slot's capsule of n bytes.
func (q *rdmaQueue) post(s *rdmaSlot, n int) error {
	wr := rdma.WR{ID: uint64(s.index), Op: rdma.OpSend, Flags: rdma.FlagSignaled}
	if n <= q.qp.Inline() {
		wr.Flags |= rdma.FlagInline
	}
	sge, _ := q.region.Split(s.capsule[:n])
	s.batch.Reset()
	s.batch.Send(q.qp)
	s.batch.Add(wr, sge)
	q.mu.Lock() // the queue pair stays meanwhile
	if q.err != nil {
		q.mu.Unlock()
		return q.err
	}
	s.active = true
	q.dev.Post(&s.batch)
	_, err := s.batch.Posted(0)
	if err != nil {
		s.active = false
	}
	q.mu.Unlock()
	if err != nil {
		err = fmt.Errorf("%w: %w", ErrConnectionLost, err)
		q.fail(err)
	}
	return err
}

// cancelGrace is for how long a command whose caller has given up may go on. The controller cannot be kept from the
// caller's memory but by ending the connection, which is worse than to wait a moment.
const cancelGrace = time.Second

func (q *rdmaQueue) await(ctx context.Context, s *rdmaSlot, dir nvmeof.Direction) (nvmeof.Completion, int, error) {
	select {
	case <-s.done:
	case <-ctx.Done():
		q.mu.Lock()
		if s.active && !s.exposed {
			s.orphan = true
			s.data = data{}
			q.mu.Unlock()
			return nvmeof.Completion{}, 0, context.Cause(ctx)
		}
		q.mu.Unlock()
		select {
		case <-s.done:
		case <-time.After(cancelGrace):
			q.fail(fmt.Errorf("%w: a command was given up while the controller had its data", ErrConnectionLost))
			<-s.done
		}
	}
	if s.bounced && s.err == nil {
		rest := s.bounce[copy(s.data.buf, s.bounce):]
		for _, p := range s.data.pieces {
			rest = rest[copy(p, rest):]
		}
	}
	cqe, err, n := s.cqe, s.err, 0
	if dir == nvmeof.ControllerToHost {
		n = -1 // the controller writes without telling
	}
	q.clean(s)
	q.free <- s.index
	return cqe, n, err
}

// clean lets go of the caller's memory.
func (q *rdmaQueue) clean(s *rdmaSlot) {
	for _, r := range s.temporary {
		r.Close()
	}
	clear(s.temporary)
	s.temporary, s.data = s.temporary[:0], data{}
}

// complete takes completions until the queue fails, and then finishes all commands.
func (q *rdmaQueue) complete() {
	var wc [64]rdma.WC
	var b rdma.Batch
	finished := make([]*rdmaSlot, 0, len(wc))
	queues := []rdma.CQ{q.responded, q.sends}
	var err error
	for n := 0; err == nil && !q.failed(); {
		if n < len(wc) && b.Empty() && len(finished) == 0 {
			n, err = q.ch.Wait(queues[:q.needed()], nil, wc[:])
		} else {
			n = q.ch.Turn(&b, wc[:])
		}
		if !b.Empty() {
			_, err = b.Posted(0)
			b.Reset()
		}
		// Their receives are posted again: the next command of the slot finds one for its response.
		for _, s := range finished {
			q.release(s)
		}
		finished = finished[:0]
		for i := range wc[:n] {
			if err == nil {
				finished, err = q.completion(&wc[i], &b, finished)
			}
		}
	}
	if err != nil {
		q.fail(fmt.Errorf("%w: %w", ErrConnectionLost, err))
	}
	q.close()
	for _, s := range finished {
		q.release(s)
	}
	q.drain()
	for range q.slots { // until nobody looks at a slot's memory
		<-q.free
	}
	q.unmap()
}

// needed is of how many queues the next completion is waited for: that of the responses. A send is over before its response
// comes, but for one that is told of late.
func (q *rdmaQueue) needed() int {
	if q.late > 0 {
		return 2
	}
	return 1
}

func (q *rdmaQueue) failed() bool {
	select {
	case <-q.dead:
		return true
	default:
		return false
	}
}

// completion handles one, adds the receive to post again to b, and appends the slot to finished if it finishes a command.
func (q *rdmaQueue) completion(wc *rdma.WC, b *rdma.Batch, finished []*rdmaSlot) ([]*rdmaSlot, error) {
	if wc.Status != rdma.WCSuccess {
		return finished, wc.Status
	}
	var s *rdmaSlot
	q.mu.Lock()
	defer q.mu.Unlock()
	if wc.ID&receiveID == 0 {
		s = &q.slots[wc.ID]
		s.sent = true
		if s.answered {
			q.late--
		}
	} else {
		i := int(wc.ID &^ receiveID)
		if wc.Bytes != nvmeof.CompletionSize || wc.WithInvalidate() { // no key may be invalidated: we never ask
			return finished, protocolError("a response of %d bytes, or one that invalidates a key", wc.Bytes)
		}
		cqe := nvmeof.Completion(q.responses[i])
		slot := int(cqe.CID() % maxDepth)
		if slot >= len(q.slots) || !q.slots[slot].active || q.slots[slot].cid != cqe.CID() || q.slots[slot].answered {
			return finished, protocolError("a response to a command that is not in flight (%04Xh)", cqe.CID())
		}
		s = &q.slots[slot]
		s.cqe, s.answered = cqe, true
		if !s.sent {
			q.late++
		}
		if b.Empty() {
			b.Recv(q.qp)
		}
		q.addReceive(b, i)
	}
	if s.sent && s.answered {
		finished = append(finished, s)
	}
	return finished, nil
}

// release hands a finished slot to its waiter, or back when there is none.
func (q *rdmaQueue) release(s *rdmaSlot) {
	q.mu.Lock()
	s.active = false
	s.cid += maxDepth
	orphan := s.orphan
	q.mu.Unlock()
	if orphan {
		q.free <- s.index
		return
	}
	s.done <- struct{}{}
}

// close destroys the queue pair: from then on neither the device nor the controller uses any memory for it.
func (q *rdmaQueue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.id.Disconnect()
	if q.qp != nil {
		q.qp.Fail()
	}
	q.id.Close()
	for _, cq := range []rdma.CQ{q.sends, q.responded} {
		if cq != nil {
			cq.Close()
		}
	}
	if q.ch != nil {
		q.ch.Close()
	}
}

// unmap gives the queue's own memory back.
func (q *rdmaQueue) unmap() {
	if q.region != nil {
		q.region.Close()
	}
	if q.mem != nil {
		_ = unix.Munmap(q.mem)
	}
}

// drain finishes every command of a failed queue.
func (q *rdmaQueue) drain() {
	sent := fmt.Errorf("%w: %w", q.err, ErrOutcomeUnknown)
	for i := range q.slots {
		q.mu.Lock()
		s := &q.slots[i]
		active := s.active
		q.mu.Unlock()
		if active {
			s.err = sent
			q.release(s)
		}
	}
}
