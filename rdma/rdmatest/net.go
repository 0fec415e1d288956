// Package rdmatest is RDMA in memory, for tests: package rdma's interfaces with devices, queue pairs and connections that
// are Go structures. It is strict: it checks keys, bounds and access, and it counts what a real device would punish, such
// as a send that meets no receive or a completion queue that overflows.
package rdmatest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"unsafe"

	"github.com/kvof/kvof/rdma"
)

// Net is a network of devices with one address each. It implements rdma.Verbs for both ends.
type Net struct {
	mu        sync.Mutex
	devices   []*Device
	listeners map[netip.AddrPort]*listener
	queues    map[uintptr]any // *qp or *srq, by handle
	lastID    uint32
	faults    Faults

	// Fault, when set, may end a work request with an error other than rdma.WCSuccess. It is called with the Net locked.
	Fault func(w *rdma.WR) rdma.WCStatus
}

// Faults counts what real devices punish. All zero is what a correct user leaves.
type Faults struct {
	RNR         int // sends that met no receive, and waited
	CQOverflow  int // completions beyond a completion queue's depth
	SendQueue   int // requests beyond a send queue's depth, refused
	RecvQueue   int // receives beyond a receive queue's depth, refused
	ReadDepth   int // READs beyond what the connection allows
	SGEs        int // requests with more SGEs than their queue takes, or READs than the device takes
	Access      int // keys or addresses that were wrong
	ByReference int // unsignaled WRITEs of a page or more on iWARP: soft-iWARP does not copy them, and their memory may change before it is sent
	LeakedMRs   int // registrations that outlived their device
	LeakedOther int // queues that outlived their device
}

// DefaultCaps are those of a modest device.
func DefaultCaps() rdma.Caps {
	return rdma.Caps{SendInvalidate: true, MaxQP: 4096, MaxQPWR: 1024, MaxSGE: 16, MaxSGERead: 16, MaxCQE: 1 << 16, MaxMRSize: 1 << 40, MaxMessage: 1 << 31,
		MaxInitiator: 16, MaxResponder: 16, MaxSRQ: 64, MaxSRQWR: 4096, MaxSRQSGE: 4, ActiveMTU: 1024, LinkLayer: "Ethernet", ProviderTransport: "RoCE"}
}

// New returns a network without devices.
func New() *Net { return &Net{listeners: map[netip.AddrPort]*listener{}, queues: map[uintptr]any{}} }

// AddDevice adds a device at an address.
func (n *Net) AddDevice(name string, addr netip.Addr, caps rdma.Caps) *Device {
	n.mu.Lock()
	defer n.mu.Unlock()
	d := &Device{net: n, name: name, addr: addr, caps: caps, mrs: map[uint32]*mr{}, events: make(chan rdma.Event, 16)}
	n.devices = append(n.devices, d)
	return d
}

// Faults returns what was counted so far.
func (n *Net) Faults() Faults {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.faults
}

// Devices implements rdma.Verbs.
func (n *Net) Devices() (ds []rdma.Device, _ error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, d := range n.devices {
		ds = append(ds, d)
	}
	return ds, nil
}

func (n *Net) id() uint32 {
	n.lastID++
	return n.lastID
}

// deviceAt finds the device with an address.
func (n *Net) deviceAt(a netip.Addr) *Device {
	for _, d := range n.devices {
		if d.addr == a && !d.removed {
			return d
		}
	}
	return nil
}

// Device implements rdma.Device.
type Device struct {
	net     *Net
	name    string
	addr    netip.Addr
	caps    rdma.Caps
	removed bool
	mrs     map[uint32]*mr
	open    int // queues
	srqs    int
	ids     []*conn
	stalled bool
	late    bool // READs are
	events  chan rdma.Event
	// Registrations counts calls of Register.
	Registrations int
	// NoDMABuf makes it a device that takes none.
	NoDMABuf bool
}

type mr struct {
	mem    []byte
	addr   uint64 // by which mem is named: its own, or that of a dma-buf
	access rdma.Access
	key    uint32
}

// Name implements rdma.Device.
func (d *Device) Name() string { return d.name }

// Caps implements rdma.Device.
func (d *Device) Caps() *rdma.Caps { return &d.caps }

// Port implements rdma.Device.
func (d *Device) Port() string { return "active" }

// Events implements rdma.Device.
func (d *Device) Events() <-chan rdma.Event { return d.events }

// Register implements rdma.Device.
func (d *Device) Register(mem []byte, access rdma.Access) (*rdma.Region, error) {
	d.net.mu.Lock()
	defer d.net.mu.Unlock()
	if d.removed {
		return nil, rdma.ErrRemoved
	}
	d.Registrations++
	return rdma.NewRegion(mem, d.caps.MaxMRSize, func(part []byte) (rdma.MR, error) {
		return d.add(&mr{mem: part, addr: address(part), access: access}, func() error { return nil }), nil
	})
}

// RegisterDMABuf implements rdma.Device. A dma-buf is whatever can be mapped, such as a memfd: transfers go to its content, not to mem.
func (d *Device) RegisterDMABuf(mem []byte, buf rdma.DMABuf, access rdma.Access) (*rdma.Region, error) {
	d.net.mu.Lock()
	defer d.net.mu.Unlock()
	page := uint64(os.Getpagesize())
	switch {
	case d.removed:
		return nil, rdma.ErrRemoved
	case d.NoDMABuf:
		return nil, rdma.ErrNoDMABuf
	case (address(mem)-buf.Offset)%page != 0:
		return nil, syscall.EINVAL
	}
	var st syscall.Stat_t
	if err := syscall.Fstat(buf.FD, &st); err != nil {
		return nil, err
	}
	off := buf.Offset
	if off+uint64(len(mem)) > uint64(st.Size) {
		return nil, syscall.EINVAL
	}
	d.Registrations++
	return rdma.NewRegion(mem, d.caps.MaxMRSize, func(part []byte) (rdma.MR, error) {
		skip := off % page
		all, err := syscall.Mmap(buf.FD, int64(off-skip), int(skip)+len(part), syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
		if err != nil {
			return rdma.MR{}, err
		}
		off += uint64(len(part))
		return d.add(&mr{mem: all[skip:], addr: address(part), access: access}, func() error { return syscall.Munmap(all) }), nil
	})
}

func address(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) }

// add makes a registration known, until it is closed.
func (d *Device) add(m *mr, release func() error) rdma.MR {
	for m.key == 0 || d.mrs[m.key] != nil {
		m.key = rand.Uint32()
	}
	d.mrs[m.key] = m
	return rdma.MR{LKey: m.key, RKey: m.key, Close: func() error {
		d.net.mu.Lock()
		defer d.net.mu.Unlock()
		delete(d.mrs, m.key)
		return release()
	}}
}

// Close implements rdma.Device.
func (d *Device) Close() error {
	d.net.mu.Lock()
	defer d.net.mu.Unlock()
	d.net.faults.LeakedMRs += len(d.mrs)
	d.net.faults.LeakedOther += d.open
	return nil
}

// Tell sends an event.
func (d *Device) Tell(e rdma.Event) { d.events <- e }

// Remove takes the device away, as unplugging does: its connections end, its queues fail.
func (d *Device) Remove() {
	d.net.mu.Lock()
	d.removed = true
	ids := append([]*conn(nil), d.ids...)
	for _, l := range d.net.listeners {
		if l.addr.Addr() == d.addr {
			l.end(rdma.ErrRemoved)
		}
	}
	for _, c := range ids {
		c.fail()
		c.end(rdma.ErrRemoved)
	}
	d.net.mu.Unlock()
	d.Tell(rdma.Event{Fatal: true, Text: "local catastrophic error"})
}

// Stall keeps all work requests of the device's queue pairs from being carried out, until it is called with false.
func (d *Device) Stall(on bool) {
	d.net.mu.Lock()
	defer d.net.mu.Unlock()
	d.stalled = on
	d.run()
}

// LateReads keeps the READs of an iWARP device's queue pairs from being carried out, until it is called with false: what was posted
// later overtakes them.
func (d *Device) LateReads(on bool) {
	d.net.mu.Lock()
	defer d.net.mu.Unlock()
	d.late = on
	d.run()
}

// run carries out what may be.
func (d *Device) run() {
	for _, c := range d.ids {
		if c.qp != nil {
			c.qp.run()
		}
	}
}

// memory finds n bytes at addr in a registration.
func (d *Device) memory(key uint32, addr, n uint64, need rdma.Access) []byte {
	m := d.mrs[key]
	if m == nil || m.access&need != need {
		return nil
	}
	return m.at(addr, n)
}

func (m *mr) at(addr, n uint64) []byte {
	off := addr - m.addr
	if off > uint64(len(m.mem)) || n > uint64(len(m.mem))-off {
		return nil
	}
	return m.mem[off : off+n]
}

// gather finds a request's own memory.
func (d *Device) gather(sges []rdma.SGE, inline bool) (parts [][]byte, total int, ok bool) {
	for _, s := range sges {
		b := d.memory(s.LKey, s.Addr, uint64(s.Length), 0)
		if b == nil && inline {
			for _, m := range d.mrs {
				if b = m.at(s.Addr, uint64(s.Length)); b != nil {
					break
				}
			}
		}
		if b == nil && s.Length > 0 {
			return nil, 0, false
		}
		parts = append(parts, b)
		total += len(b)
	}
	return parts, total, true
}

// Post implements rdma.Device.
func (d *Device) Post(b *rdma.Batch) {
	n := d.net
	n.mu.Lock()
	defer n.mu.Unlock()
	b.Chains(func(handle uintptr, recv bool, wrs []rdma.WR) (int, syscall.Errno) {
		switch q := n.queues[handle].(type) {
		case *srq:
			return q.rq.post(b, wrs)
		case *qp:
			if recv {
				k, errno := q.rq.post(b, wrs)
				if q.failed {
					q.flush()
				}
				return k, errno
			}
			return q.post(b, wrs)
		}
		return 0, syscall.EBADF
	})
}

// recvQueue is the receives of a queue pair or SRQ.
type recvQueue struct {
	net     *Net
	dev     *Device
	depth   int
	posted  []recv
	waiting []*qp // senders that met none
}

type recv struct {
	id  uint64
	mem []byte
}

func (r *recvQueue) post(b *rdma.Batch, wrs []rdma.WR) (int, syscall.Errno) {
	for i := range wrs {
		if len(r.posted) >= r.depth {
			r.net.faults.RecvQueue++
			return i, syscall.ENOMEM
		}
		parts, _, ok := r.dev.gather(b.SGEs(&wrs[i]), false)
		if !ok || len(parts) != 1 {
			r.net.faults.Access++
			return i, syscall.EINVAL
		}
		r.posted = append(r.posted, recv{wrs[i].ID, parts[0]})
	}
	waiting := r.waiting
	r.waiting = nil
	for _, q := range waiting {
		q.run()
	}
	return len(wrs), 0
}

// srq implements rdma.SRQ.
type srq struct {
	rq recvQueue
	h  uintptr
}

// NewSRQ implements rdma.Device.
func (d *Device) NewSRQ(depth int) (rdma.SRQ, error) {
	d.net.mu.Lock()
	defer d.net.mu.Unlock()
	if depth > d.caps.MaxSRQWR || d.srqs == d.caps.MaxSRQ {
		return nil, syscall.EINVAL
	}
	d.srqs++
	s := &srq{rq: recvQueue{net: d.net, dev: d, depth: depth}, h: uintptr(d.net.id())}
	d.net.queues[s.h] = s
	d.open++
	return s, nil
}

func (s *srq) Handle() uintptr { return s.h }

func (s *srq) Close() error {
	s.rq.net.mu.Lock()
	defer s.rq.net.mu.Unlock()
	delete(s.rq.net.queues, s.h)
	s.rq.dev.open--
	s.rq.dev.srqs--
	return nil
}

// channel implements rdma.Channel.
type channel struct {
	dev  *Device
	cqs  []*cq
	at   int
	bell *Bell
}

// cq implements rdma.CQ.
type cq struct {
	ch    *channel
	depth int
	wcs   []entry
	armed bool
}

// entry is a completion, and the place in the send queue that polling it frees.
type entry struct {
	wc    rdma.WC
	of    *qp
	frees int
}

// NewChannel implements rdma.Device.
func (d *Device) NewChannel() (rdma.Channel, error) {
	d.net.mu.Lock()
	defer d.net.mu.Unlock()
	bell, err := NewBell()
	if err != nil {
		return nil, err
	}
	d.open++
	return &channel{dev: d, bell: bell}, nil
}

func (c *channel) NewCQ(depth int) (rdma.CQ, error) {
	c.dev.net.mu.Lock()
	defer c.dev.net.mu.Unlock()
	if depth > c.dev.caps.MaxCQE {
		return nil, syscall.EINVAL
	}
	q := &cq{ch: c, depth: depth}
	c.cqs = append(c.cqs, q)
	c.dev.open++
	c.Wake()
	return q, nil
}

func (c *channel) Turn(b *rdma.Batch, wc []rdma.WC) int {
	if b != nil {
		c.dev.Post(b)
	}
	c.dev.net.mu.Lock()
	defer c.dev.net.mu.Unlock()
	n := 0
	c.at++
	for i := range c.cqs {
		q := c.cqs[(c.at+i)%len(c.cqs)]
		for n < len(wc) && len(q.wcs) > 0 {
			e := q.wcs[0]
			q.wcs = q.wcs[1:]
			wc[n] = e.wc
			if e.of != nil {
				e.of.used -= e.frees
			}
			n++
		}
	}
	return n
}

func (c *channel) Wait(arm []rdma.CQ, files []int32, wc []rdma.WC) (int, error) {
	for _, q := range arm {
		_ = q.Arm()
	}
	if n := c.Turn(nil, wc); n > 0 {
		return n, nil
	}
	if err := c.bell.Wait(files); err != nil {
		return 0, err
	}
	return c.Turn(nil, wc), nil
}

func (c *channel) Wake() { c.bell.Ring() }

func (c *channel) Close() error {
	c.dev.net.mu.Lock()
	defer c.dev.net.mu.Unlock()
	c.dev.open--
	return c.bell.Close()
}

func (q *cq) Arm() error {
	q.ch.dev.net.mu.Lock()
	defer q.ch.dev.net.mu.Unlock()
	q.armed = true
	return nil
}

func (q *cq) Close() error {
	q.ch.dev.net.mu.Lock()
	defer q.ch.dev.net.mu.Unlock()
	for i, o := range q.ch.cqs {
		if o == q {
			q.ch.cqs = append(q.ch.cqs[:i], q.ch.cqs[i+1:]...)
			q.ch.dev.open--
			return nil
		}
	}
	return errors.New("closed twice")
}

func (q *cq) add(e entry) {
	if len(q.wcs) >= q.depth {
		q.ch.dev.net.faults.CQOverflow++
	}
	q.wcs = append(q.wcs, e)
	if q.armed {
		q.armed = false
		q.ch.Wake()
	}
}

// qp implements rdma.QP.
type qp struct {
	conn   *conn
	dev    *Device
	attr   rdma.QPAttr
	h      uintptr
	num    uint32
	send   *cq
	recv   *cq
	rq     *recvQueue
	sq     []sent // posted, not carried out
	asked  []sent // READs of iWARP, of which the peer was asked: what is posted later does not wait for them
	used   int    // places of the send queue
	quiet  int    // of those, carried out without a completion
	reads  int    // READs in sq and asked
	failed bool
	once   sync.Once
	last   chan struct{}
}

type sent struct {
	w    rdma.WR
	sges []rdma.SGE
}

func (q *qp) Handle() uintptr              { return q.h }
func (q *qp) Num() uint32                  { return q.num }
func (q *qp) Inline() int                  { return q.attr.Inline }
func (q *qp) LastReceive() <-chan struct{} { return q.last }

func (q *qp) Fail() {
	q.dev.net.mu.Lock()
	defer q.dev.net.mu.Unlock()
	q.fail()
}

func (q *qp) post(b *rdma.Batch, wrs []rdma.WR) (int, syscall.Errno) {
	for i := range wrs {
		w, sges := wrs[i], append([]rdma.SGE(nil), b.SGEs(&wrs[i])...)
		if q.used >= q.attr.SendDepth {
			q.dev.net.faults.SendQueue++
			return i, syscall.ENOMEM
		}
		if len(sges) > q.attr.SendSGE || w.Op == rdma.OpRead && len(sges) > q.dev.caps.MaxSGERead {
			q.dev.net.faults.SGEs++
			return i, syscall.EINVAL
		}
		q.used++
		if w.Op == rdma.OpRead {
			if q.reads++; q.reads > int(q.conn.initiator) {
				q.dev.net.faults.ReadDepth++
			}
		}
		q.sq = append(q.sq, sent{w, sges})
	}
	q.run()
	return len(wrs), 0
}

// fail flushes everything.
func (q *qp) fail() {
	q.failed = true
	q.flush()
	q.once.Do(func() { close(q.last) })
}

func (q *qp) flush() {
	for len(q.asked) > 0 {
		q.done(&q.asked, rdma.WCFlush)
	}
	for len(q.sq) > 0 {
		q.done(&q.sq, rdma.WCFlush)
	}
	if q.attr.SRQ == nil {
		for _, r := range q.rq.posted {
			q.recv.add(entry{wc: rdma.MakeRecv(r.id, rdma.WCFlush, q.num, 0, 0)})
		}
		q.rq.posted = nil
	}
}

// done completes the oldest request of sq or asked.
func (q *qp) done(list *[]sent, st rdma.WCStatus) {
	w := (*list)[0].w
	*list = (*list)[1:]
	if w.Op == rdma.OpRead {
		q.reads--
	}
	if st == rdma.WCSuccess && w.Flags&rdma.FlagSignaled == 0 {
		q.quiet++
		return
	}
	q.send.add(entry{rdma.MakeSent(w.ID, st, q.num), q, q.quiet + 1})
	q.quiet = 0
	if st != rdma.WCSuccess && !q.failed {
		q.fail()
	}
}

// run carries out what is posted, as far as it goes.
func (q *qp) run() {
	if q.failed {
		q.flush()
		return
	}
	for len(q.sq) > 0 && !q.failed && !q.dev.stalled {
		if q.dev.caps.IWARP && q.sq[0].w.Op == rdma.OpRead {
			q.asked, q.sq = append(q.asked, q.sq[0]), q.sq[1:]
		} else if !q.carryOut(&q.sq) {
			break
		}
	}
	for len(q.asked) > 0 && !q.failed && !q.dev.stalled && !q.dev.late && q.carryOut(&q.asked) {
	}
}

// carryOut carries out the oldest request of sq or asked; false when it must wait.
func (q *qp) carryOut(list *[]sent) bool {
	s := &(*list)[0]
	peer := q.conn.peer
	if peer == nil || peer.qp == nil {
		return false // not connected yet
	}
	if f := q.dev.net.Fault; f != nil {
		if st := f(&s.w); st != rdma.WCSuccess {
			q.done(list, st)
			return true
		}
	}
	if peer.qp.failed {
		q.done(list, rdma.WCRetry)
		return true
	}
	parts, total, ok := q.dev.gather(s.sges, s.w.Flags&rdma.FlagInline != 0)
	if !ok {
		q.dev.net.faults.Access++
		q.done(list, rdma.WCLocalAccess)
		return true
	}
	switch s.w.Op {
	case rdma.OpWrite, rdma.OpRead:
		need := rdma.RemoteWrite
		if s.w.Op == rdma.OpRead {
			need = rdma.RemoteRead
		} else if q.dev.caps.IWARP && total >= 4096 && s.w.Flags&rdma.FlagSignaled == 0 {
			q.dev.net.faults.ByReference++
		}
		far := peer.dev.memory(s.w.RKey, s.w.Remote, uint64(total), need)
		if far == nil && total > 0 {
			peer.qp.fail()
			q.done(list, rdma.WCRemoteAccess)
			return true
		}
		for _, p := range parts {
			if s.w.Op == rdma.OpRead {
				copy(p, far)
			} else {
				copy(far, p)
			}
			far = far[len(p):]
		}
	default:
		rq := peer.qp.rq
		if len(rq.posted) == 0 {
			q.dev.net.faults.RNR++
			rq.waiting = append(rq.waiting, q)
			return false
		}
		r := rq.posted[0]
		rq.posted = rq.posted[1:]
		if total > len(r.mem) {
			peer.qp.recv.add(entry{wc: rdma.MakeRecv(r.id, rdma.WCLocalLength, peer.qp.num, 0, 0)})
			peer.qp.fail()
			q.done(list, rdma.WCRemoteInval)
			return true
		}
		at := 0
		for _, p := range parts {
			at += copy(r.mem[at:], p)
		}
		inv := uint32(0)
		if s.w.Op == rdma.OpSendInvalidate {
			inv = s.w.RKey
		}
		peer.qp.recv.add(entry{wc: rdma.MakeRecv(r.id, rdma.WCSuccess, peer.qp.num, uint32(total), inv)})
	}
	q.done(list, rdma.WCSuccess)
	return true
}

// listener implements rdma.Listener.
type listener struct {
	net    *Net
	addr   netip.AddrPort
	accept chan *conn
	once   sync.Once
	ended  chan struct{}
	err    error
}

// Listen implements rdma.Verbs.
func (n *Net) Listen(addr netip.AddrPort, backlog int, ready func(rdma.Device) error) (rdma.Listener, error) {
	var dev rdma.Device
	if !addr.Addr().IsUnspecified() {
		n.mu.Lock()
		d := n.deviceAt(addr.Addr())
		n.mu.Unlock()
		if d == nil {
			return nil, fmt.Errorf("listen on %s: %w", addr, syscall.ENODEV)
		}
		dev = d
	}
	if err := ready(dev); err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for addr.Port() == 0 || n.listeners[addr] != nil {
		if addr.Port() != 0 {
			return nil, fmt.Errorf("listen on %s: %w", addr, syscall.EADDRINUSE)
		}
		addr = netip.AddrPortFrom(addr.Addr(), uint16(40000+n.id()))
	}
	l := &listener{net: n, addr: addr, accept: make(chan *conn, backlog), ended: make(chan struct{})}
	n.listeners[addr] = l
	return l, nil
}

func (l *listener) end(err error) {
	l.once.Do(func() {
		l.err = err
		close(l.ended)
	})
}

func (l *listener) Accept() (rdma.ID, error) {
	select {
	case c := <-l.accept:
		return c, nil
	case <-l.ended:
		return nil, l.err
	}
}

func (l *listener) Addr() netip.AddrPort { return l.addr }

func (l *listener) Close() error {
	l.net.mu.Lock()
	defer l.net.mu.Unlock()
	if l.net.listeners[l.addr] == l {
		delete(l.net.listeners, l.addr)
	}
	l.end(rdma.ErrClosed)
	for {
		select {
		case c := <-l.accept:
			c.refuse(nil)
		default:
			return nil
		}
	}
}

// conn implements rdma.ID.
type conn struct {
	net           *Net
	dev           *Device
	local, remote netip.AddrPort
	peer          *conn
	qp            *qp
	request       rdma.ConnParam
	initiator     uint8 // READs we may start
	answer        rdma.ConnParam
	accepted      chan struct{}
	once          sync.Once
	ended         chan struct{}
	err           error
	closed        bool
}

func (n *Net) newConn(d *Device, local, remote netip.AddrPort) *conn {
	c := &conn{net: n, dev: d, local: local, remote: remote, accepted: make(chan struct{}), ended: make(chan struct{})}
	d.ids = append(d.ids, c)
	return c
}

// Resolve implements rdma.Verbs.
func (n *Net) Resolve(_ context.Context, local netip.Addr, peer netip.AddrPort) (rdma.ID, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	d := n.deviceAt(local)
	for _, o := range n.devices {
		if d == nil && !o.removed {
			d = o
		}
	}
	if d == nil {
		return nil, rdma.ErrUnreachable
	}
	return n.newConn(d, netip.AddrPortFrom(d.addr, uint16(n.id())), peer), nil
}

func (c *conn) Device() rdma.Device     { return c.dev }
func (c *conn) Local() netip.AddrPort   { return c.local }
func (c *conn) Remote() netip.AddrPort  { return c.remote }
func (c *conn) Request() rdma.ConnParam { return c.request }
func (c *conn) Ended() <-chan struct{}  { return c.ended }

func (c *conn) Err() error {
	select {
	case <-c.ended:
		return c.err
	default:
		return nil
	}
}

func (c *conn) end(err error) {
	c.once.Do(func() {
		c.err = err
		close(c.ended)
	})
}

// fail ends the queue pair.
func (c *conn) fail() {
	if c.qp != nil && !c.qp.failed {
		c.qp.fail()
	}
}

func (c *conn) CreateQP(attr rdma.QPAttr) (rdma.QP, error) {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	if c.dev.removed {
		return nil, rdma.ErrRemoved
	}
	if attr.SendDepth > c.dev.caps.MaxQPWR || attr.RecvDepth > c.dev.caps.MaxQPWR || attr.SendSGE > c.dev.caps.MaxSGE {
		return nil, syscall.EINVAL
	}
	q := &qp{conn: c, dev: c.dev, attr: attr, h: uintptr(c.net.id()), num: c.net.id(), send: attr.SendCQ.(*cq), recv: attr.RecvCQ.(*cq), last: make(chan struct{})}
	if attr.SRQ != nil {
		q.rq = &attr.SRQ.(*srq).rq
	} else {
		q.rq = &recvQueue{net: c.net, dev: c.dev, depth: attr.RecvDepth}
	}
	c.qp = q
	c.net.queues[q.h] = q
	c.dev.open++
	return q, nil
}

func (c *conn) Connect(ctx context.Context, p rdma.ConnParam) (rdma.ConnParam, error) {
	c.net.mu.Lock()
	l := c.net.listeners[c.remote]
	if l == nil {
		for a, o := range c.net.listeners {
			if a.Addr().IsUnspecified() && a.Port() == c.remote.Port() {
				l = o
			}
		}
	}
	far := c.net.deviceAt(c.remote.Addr())
	if l == nil || far == nil {
		c.net.mu.Unlock()
		return rdma.ConnParam{}, rdma.ErrUnreachable
	}
	o := c.net.newConn(far, c.remote, c.local)
	c.peer, o.peer = o, c
	private := make([]byte, max(56, len(p.Private))) // as InfiniBand pads it
	copy(private, p.Private)
	if c.dev.caps.IWARP {
		private = private[:len(p.Private)]
	}
	o.request = rdma.ConnParam{Private: private, InitiatorDepth: p.ResponderResources, ResponderResources: p.InitiatorDepth}
	c.answer.ResponderResources = p.ResponderResources
	select {
	case l.accept <- o:
	default:
		o.refuse(nil)
	}
	c.net.mu.Unlock()
	select {
	case <-c.accepted:
		return c.answer, nil
	case <-c.ended:
		return rdma.ConnParam{}, c.err
	case <-ctx.Done():
		return rdma.ConnParam{}, fmt.Errorf("%w: %w", rdma.ErrUnreachable, ctx.Err())
	}
}

func (c *conn) Accept(p rdma.ConnParam) error {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	o := c.peer
	if c.closed || o == nil || o.closed {
		return rdma.ErrClosed
	}
	c.initiator = min(p.InitiatorDepth, o.answer.ResponderResources)
	o.initiator = p.ResponderResources
	o.answer = rdma.ConnParam{Private: p.Private, InitiatorDepth: p.ResponderResources, ResponderResources: p.InitiatorDepth}
	close(o.accepted)
	if o.qp != nil {
		o.qp.run()
	}
	c.qp.run()
	return nil
}

func (c *conn) Reject(private []byte) error {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	c.refuse(private)
	return nil
}

func (c *conn) refuse(private []byte) {
	if c.peer != nil {
		c.peer.end(&rdma.RejectedError{Reason: 28, Private: private})
	}
	c.end(rdma.ErrClosed)
}

func (c *conn) Disconnect() {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	c.disconnect()
}

func (c *conn) disconnect() {
	c.fail()
	c.end(errors.New("disconnected"))
	if o := c.peer; o != nil && !o.closed {
		o.fail()
		o.end(errors.New("the peer disconnected"))
	}
}

// Vanish ends a connection of n's as a host does that loses its power: its peer is not told.
func (n *Net) Vanish(id rdma.ID) {
	n.mu.Lock()
	defer n.mu.Unlock()
	c := id.(*conn)
	c.fail()
	c.end(errors.New("vanished"))
	c.peer = nil
}

func (c *conn) Close() error {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	if c.closed {
		return nil
	}
	c.disconnect()
	c.closed = true
	for i, o := range c.dev.ids {
		if o == c {
			c.dev.ids = append(c.dev.ids[:i], c.dev.ids[i+1:]...)
			break
		}
	}
	if c.qp != nil {
		delete(c.net.queues, c.qp.h)
		c.dev.open--
	}
	return nil
}
