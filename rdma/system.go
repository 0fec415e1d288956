//go:build cgo && rdma

package rdma

/*
#cgo LDFLAGS: -ldl
#cgo noescape kvof_turn
#cgo nocallback kvof_turn
#cgo noescape kvof_arm
#cgo nocallback kvof_arm
#cgo noescape kvof_channel_wait
#cgo nocallback kvof_channel_wait
#include "verbs.h"
*/
import "C"

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The compact forms that Go fills and C reads must be the same.
var (
	_ [unsafe.Sizeof(C.struct_kvof_wr{})]byte    = [unsafe.Sizeof(WR{})]byte{}
	_ [unsafe.Sizeof(C.struct_kvof_chain{})]byte = [unsafe.Sizeof(chain{})]byte{}
	_ [unsafe.Sizeof(C.struct_ibv_sge{})]byte    = [unsafe.Sizeof(SGE{})]byte{}
	_ [unsafe.Sizeof(C.struct_ibv_wc{})]byte     = [unsafe.Sizeof(WC{})]byte{}
	_ [C.MAX_FILES]byte                          = [MaxFiles]byte{}
)

// Limits of the connection manager.
const (
	resolveTime = 2 * time.Second // for an address, and for a route
	maxPrivate  = 196             // bytes in an answer; a request has less room on InfiniBand: 56
)

// system is the machine's RDMA.
type system struct {
	events *C.struct_rdma_event_channel

	mu        sync.Mutex
	ids       map[*C.struct_rdma_cm_id]*id
	listeners map[*C.struct_rdma_cm_id]*listener
	devices   map[*C.struct_ibv_context]*device
}

var theSystem = sync.OnceValues(func() (*system, error) {
	if missing := C.kvof_load(); missing != nil {
		return nil, fmt.Errorf("%w: %s (package rdma-core)", ErrUnavailable, C.GoString(missing))
	}
	events, err := C.kvof_create_event_channel()
	if events == nil {
		return nil, fmt.Errorf("%w: no connection manager (%w): load the kernel modules rdma_ucm and that of the device", ErrUnavailable, err)
	}
	s := &system{events: events, ids: map[*C.struct_rdma_cm_id]*id{}, listeners: map[*C.struct_rdma_cm_id]*listener{},
		devices: map[*C.struct_ibv_context]*device{}}
	fd, err := newPollFD(events.fd, "rdma_cm")
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	go s.dispatch(fd)
	return s, nil
})

// System returns the machine's own RDMA, through rdma-core. The first call opens its libraries.
func System() (Verbs, error) {
	s, err := theSystem()
	if err != nil {
		return nil, err
	}
	return s, nil
}

// pollFD is a file descriptor of rdma-core's that Go's poller waits for.
type pollFD struct {
	file *os.File
	raw  syscall.RawConn
}

// newPollFD makes fd, which stays rdma-core's, not block.
func newPollFD(fd C.int, name string) (*pollFD, error) {
	C.kvof_nonblock(fd)
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("dup", err)
	}
	f := os.NewFile(uintptr(dup), name)
	raw, err := f.SyscallConn()
	if err == nil {
		err = f.SetReadDeadline(time.Time{}) // fails unless Go's poller took it
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &pollFD{f, raw}, nil
}

// dispatch takes the connection manager's events, for ever.
func (s *system) dispatch(fd *pollFD) {
	var e C.struct_kvof_cm_event
	for {
		rc := C.int(0)
		err := fd.raw.Read(func(uintptr) bool {
			rc = C.kvof_cm_event_take(s.events, &e)
			return rc != 0
		})
		if err != nil {
			return
		}
		if rc < 0 { // a broken event channel: connections end by their own errors
			time.Sleep(time.Second)
			continue
		}
		s.event(&e)
	}
}

func (s *system) event(e *C.struct_kvof_cm_event) {
	s.mu.Lock()
	i, l := s.ids[e.id], s.listeners[e.id]
	from := s.listeners[e.listen_id]
	s.mu.Unlock()
	switch {
	case e.event == C.RDMA_CM_EVENT_CONNECT_REQUEST:
		s.request(from, e)
	case l != nil:
		if e.event == C.RDMA_CM_EVENT_DEVICE_REMOVAL {
			l.end(ErrRemoved)
		}
	case i != nil:
		i.event(e)
	}
}

// param copies what came with an event.
func param(e *C.struct_kvof_cm_event) ConnParam {
	return ConnParam{Private: C.GoBytes(unsafe.Pointer(&e.private_data[0]), C.int(e.private_len)), InitiatorDepth: uint8(e.initiator_depth),
		ResponderResources: uint8(e.responder_resources)}
}

// request hands a new connection to its listener.
func (s *system) request(l *listener, e *C.struct_kvof_cm_event) {
	i := s.newID(e.id)
	i.request = param(e)
	dev, err := s.device(e.id.verbs)
	i.dev = dev
	if l == nil || err != nil || !l.offer(i) {
		_ = i.Close() // which refuses it
	}
}

func (s *system) newID(cm *C.struct_rdma_cm_id) *id {
	i := &id{sys: s, cm: cm, setup: make(chan setupEvent, 8), ended: make(chan struct{})}
	s.mu.Lock()
	s.ids[cm] = i
	s.mu.Unlock()
	return i
}

// Devices implements Verbs.
func (s *system) Devices() ([]Device, error) {
	var n C.int
	list, err := C.kvof_get_devices(&n)
	if list == nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	defer C.kvof_free_devices(list)
	var ds []Device
	for _, ctx := range unsafe.Slice(list, int(n)) {
		d, err := s.device(ctx)
		if err != nil {
			return nil, err
		}
		ds = append(ds, d)
	}
	return ds, nil
}

// device returns the device of a context, opening it when it is new.
func (s *system) device(ctx *C.struct_ibv_context) (*device, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if d := s.devices[ctx]; d != nil {
		return d, nil
	}
	d, err := openDevice(s, ctx)
	if err != nil {
		return nil, err
	}
	s.devices[ctx] = d
	return d, nil
}

// sockaddr converts an address; the zero AddrPort becomes family 0.
func sockaddr(a netip.AddrPort) *C.struct_sockaddr {
	ip := a.Addr().Unmap()
	port := [2]byte{byte(a.Port() >> 8), byte(a.Port())}
	switch {
	case !ip.IsValid():
		return (*C.struct_sockaddr)(unsafe.Pointer(&unix.RawSockaddrInet6{}))
	case ip.Is4():
		return (*C.struct_sockaddr)(unsafe.Pointer(&unix.RawSockaddrInet4{Family: unix.AF_INET, Port: *(*uint16)(unsafe.Pointer(&port)), Addr: ip.As4()}))
	default:
		sa := &unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: *(*uint16)(unsafe.Pointer(&port)), Addr: ip.As16()}
		if z := ip.Zone(); z != "" {
			if n, err := interfaceIndex(z); err == nil {
				sa.Scope_id = n
			}
		}
		return (*C.struct_sockaddr)(unsafe.Pointer(sa))
	}
}

func interfaceIndex(zone string) (uint32, error) {
	i, err := net.InterfaceByName(zone)
	if err != nil {
		return 0, err
	}
	return uint32(i.Index), nil
}

// addrPort converts back.
func addrPort(sa *C.struct_sockaddr_storage) netip.AddrPort {
	b := (*[28]byte)(unsafe.Pointer(sa))
	port := uint16(b[2])<<8 | uint16(b[3])
	switch sa.ss_family {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), port)
	case unix.AF_INET6:
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[8:24])), port)
	}
	return netip.AddrPort{}
}

// listener implements Listener.
type listener struct {
	sys    *system
	cm     *C.struct_rdma_cm_id
	addr   netip.AddrPort
	accept chan *id
	once   sync.Once
	ended  chan struct{}
	err    error

	closing sync.Mutex
	closed  bool
}

// Listen implements Verbs.
func (s *system) Listen(addr netip.AddrPort, backlog int, ready func(Device) error) (Listener, error) {
	l := &listener{sys: s, accept: make(chan *id, backlog), ended: make(chan struct{})}
	if rc, err := C.kvof_create_id(s.events, &l.cm); rc != 0 {
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	s.mu.Lock()
	s.listeners[l.cm] = l
	s.mu.Unlock()
	if err := l.open(addr, backlog, ready); err != nil {
		l.Close()
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	return l, nil
}

func (l *listener) open(addr netip.AddrPort, backlog int, ready func(Device) error) error {
	if rc, err := C.kvof_bind(l.cm, sockaddr(addr)); rc != 0 {
		return noDevice(err)
	}
	var dev Device
	if l.cm.verbs != nil {
		var err error
		if dev, err = l.sys.device(l.cm.verbs); err != nil {
			return err
		}
	}
	if err := ready(dev); err != nil {
		return err
	}
	if rc, err := C.kvof_listen(l.cm, C.int(backlog)); rc != 0 {
		return noDevice(err)
	}
	var src, dst C.struct_sockaddr_storage
	C.kvof_addrs(l.cm, &src, &dst)
	l.addr = addrPort(&src)
	return nil
}

// noDevice explains what binding says to an address without a device.
func noDevice(err error) error {
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EADDRNOTAVAIL) {
		return fmt.Errorf("%w: no RDMA device has this address (rdma link shows the devices)", err)
	}
	return err
}

// offer queues a connection for Accept; false when there is no room.
func (l *listener) offer(i *id) bool {
	l.closing.Lock()
	defer l.closing.Unlock()
	if l.closed {
		return false
	}
	select {
	case l.accept <- i:
		return true
	default:
		return false
	}
}

func (l *listener) end(err error) {
	l.once.Do(func() {
		l.err = err
		close(l.ended)
	})
}

func (l *listener) Accept() (ID, error) {
	select {
	case i := <-l.accept:
		return i, nil
	case <-l.ended:
		return nil, l.err
	}
}

func (l *listener) Addr() netip.AddrPort { return l.addr }

func (l *listener) Close() error {
	l.closing.Lock()
	was := l.closed
	l.closed = true
	l.closing.Unlock()
	if was {
		return nil
	}
	l.end(ErrClosed)
	for {
		select {
		case i := <-l.accept:
			_ = i.Close()
			continue
		default:
		}
		break
	}
	l.sys.mu.Lock()
	delete(l.sys.listeners, l.cm)
	l.sys.mu.Unlock()
	C.kvof_destroy_id(l.cm)
	return nil
}

// id implements ID.
type id struct {
	sys     *system
	cm      *C.struct_rdma_cm_id
	dev     *device
	qp      *qp
	request ConnParam
	setup   chan setupEvent

	once  sync.Once
	ended chan struct{}
	err   error

	mu     sync.Mutex // Close against what others do with cm
	closed bool
}

// setupEvent is an event that Resolve or Connect waits for.
type setupEvent struct {
	event  C.enum_rdma_cm_event_type
	status int
	param  ConnParam
}

func (i *id) event(e *C.struct_kvof_cm_event) {
	ev := setupEvent{C.enum_rdma_cm_event_type(e.event), int(e.status), param(e)}
	switch ev.event {
	case C.RDMA_CM_EVENT_DISCONNECTED:
		i.end(errors.New("the peer disconnected"))
		i.Disconnect() // the answer: without it the queue pair does not fail
	case C.RDMA_CM_EVENT_DEVICE_REMOVAL:
		i.end(ErrRemoved)
	case C.RDMA_CM_EVENT_ADDR_CHANGE:
		i.end(errors.New("the network device's address changed"))
	case C.RDMA_CM_EVENT_CONNECT_ERROR, C.RDMA_CM_EVENT_UNREACHABLE, C.RDMA_CM_EVENT_REJECTED:
		i.end(i.refusal(ev))
	case C.RDMA_CM_EVENT_TIMEWAIT_EXIT:
	default:
		select {
		case i.setup <- ev:
		default:
		}
	}
}

// refusal is why a connection did not come about.
func (i *id) refusal(ev setupEvent) error {
	if ev.event == C.RDMA_CM_EVENT_REJECTED {
		return &RejectedError{Reason: ev.status, Private: ev.param.Private}
	}
	if ev.status < 0 {
		return fmt.Errorf("%w: %w", ErrUnreachable, syscall.Errno(-ev.status))
	}
	return ErrUnreachable
}

func (i *id) end(err error) {
	i.once.Do(func() {
		i.err = err
		close(i.ended)
	})
}

// wait waits for a step of the set-up.
func (i *id) wait(ctx context.Context, want C.enum_rdma_cm_event_type) (setupEvent, error) {
	for {
		select {
		case ev := <-i.setup:
			switch {
			case ev.event == want:
				return ev, nil
			case ev.status < 0:
				return ev, fmt.Errorf("%w: %w", ErrUnreachable, syscall.Errno(-ev.status))
			}
		case <-i.ended:
			return setupEvent{}, i.err
		case <-ctx.Done():
			return setupEvent{}, fmt.Errorf("%w: %w", ErrUnreachable, ctx.Err())
		}
	}
}

// Resolve implements Verbs.
func (s *system) Resolve(ctx context.Context, local netip.Addr, peer netip.AddrPort) (ID, error) {
	var cm *C.struct_rdma_cm_id
	if rc, err := C.kvof_create_id(s.events, &cm); rc != 0 {
		return nil, fmt.Errorf("connect to %s: %w", peer, err)
	}
	i := s.newID(cm)
	err := func() error {
		ms := C.int(resolveTime / time.Millisecond)
		if rc, err := C.kvof_resolve_addr(cm, sockaddr(netip.AddrPortFrom(local, 0)), sockaddr(peer), ms); rc != 0 {
			return fmt.Errorf("%w: %w", ErrUnreachable, err)
		}
		if _, err := i.wait(ctx, C.RDMA_CM_EVENT_ADDR_RESOLVED); err != nil {
			return err
		}
		if rc, err := C.kvof_resolve_route(cm, ms); rc != 0 {
			return fmt.Errorf("%w: %w", ErrUnreachable, err)
		}
		if _, err := i.wait(ctx, C.RDMA_CM_EVENT_ROUTE_RESOLVED); err != nil {
			return err
		}
		var err error
		i.dev, err = s.device(cm.verbs)
		return err
	}()
	if err != nil {
		_ = i.Close()
		return nil, fmt.Errorf("connect to %s: %w", peer, err)
	}
	return i, nil
}

func (i *id) Device() Device         { return i.dev }
func (i *id) Request() ConnParam     { return i.request }
func (i *id) Ended() <-chan struct{} { return i.ended }

func (i *id) addrs() (src, dst C.struct_sockaddr_storage) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if !i.closed {
		C.kvof_addrs(i.cm, &src, &dst)
	}
	return src, dst
}

func (i *id) Local() netip.AddrPort {
	src, _ := i.addrs()
	return addrPort(&src)
}

func (i *id) Remote() netip.AddrPort {
	_, dst := i.addrs()
	return addrPort(&dst)
}

func (i *id) Err() error {
	select {
	case <-i.ended:
		return i.err
	default:
		return nil
	}
}

func (i *id) CreateQP(attr QPAttr) (QP, error) {
	inline := C.int(attr.Inline)
	var srq *C.struct_ibv_srq
	if attr.SRQ != nil {
		srq = attr.SRQ.(*sharedQueue).srq
	}
	rc, err := C.kvof_create_qp(i.cm, i.dev.pd, attr.SendCQ.(*completions).cq, attr.RecvCQ.(*completions).cq, srq, C.int(attr.SendDepth),
		C.int(attr.RecvDepth), C.int(attr.SendSGE), &inline)
	if rc != 0 {
		return nil, fmt.Errorf("%s: cannot create a queue pair for %d sends: %w", i.dev.name, attr.SendDepth, err)
	}
	i.qp = &qp{qp: i.cm.qp, inline: int(inline), last: make(chan struct{})}
	i.dev.mu.Lock()
	i.dev.qps[i.qp.qp] = i.qp
	i.dev.mu.Unlock()
	return i.qp, nil
}

// call calls f with the private data in C's terms.
func (i *id) call(private []byte, f func(data unsafe.Pointer, n C.int) (C.int, error)) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.closed {
		return ErrClosed
	}
	if len(private) > maxPrivate {
		return fmt.Errorf("%d bytes of private data: %w", len(private), unix.EMSGSIZE)
	}
	if rc, err := f(unsafe.Pointer(unsafe.SliceData(private)), C.int(len(private))); rc != 0 {
		return err
	}
	return nil
}

func (i *id) Accept(p ConnParam) error {
	return i.call(p.Private, func(data unsafe.Pointer, n C.int) (C.int, error) {
		rc, err := C.kvof_connect(i.cm, data, n, C.int(p.InitiatorDepth), C.int(p.ResponderResources), 1)
		return rc, err
	})
}

func (i *id) Reject(private []byte) error {
	return i.call(private, func(data unsafe.Pointer, n C.int) (C.int, error) {
		rc, err := C.kvof_reject(i.cm, data, n)
		return rc, err
	})
}

func (i *id) Connect(ctx context.Context, p ConnParam) (ConnParam, error) {
	err := i.call(p.Private, func(data unsafe.Pointer, n C.int) (C.int, error) {
		rc, err := C.kvof_connect(i.cm, data, n, C.int(p.InitiatorDepth), C.int(p.ResponderResources), 0)
		return rc, err
	})
	if err != nil {
		return ConnParam{}, err
	}
	ev, err := i.wait(ctx, C.RDMA_CM_EVENT_ESTABLISHED)
	return ev.param, err
}

func (i *id) Disconnect() {
	_ = i.call(nil, func(unsafe.Pointer, C.int) (C.int, error) {
		rc, err := C.kvof_disconnect(i.cm)
		return rc, err
	})
}

func (i *id) Close() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.closed {
		return nil
	}
	i.closed = true
	i.end(ErrClosed)
	i.sys.mu.Lock()
	delete(i.sys.ids, i.cm)
	i.sys.mu.Unlock()
	if i.qp != nil {
		i.dev.mu.Lock()
		delete(i.dev.qps, i.qp.qp)
		i.dev.mu.Unlock()
		i.qp.mu.Lock()
		i.qp.gone = true
		i.qp.mu.Unlock()
		C.kvof_destroy_qp(i.cm)
	}
	C.kvof_destroy_id(i.cm)
	return nil
}

// qp implements QP.
type qp struct {
	qp     *C.struct_ibv_qp
	inline int
	once   sync.Once
	last   chan struct{}

	mu   sync.Mutex
	gone bool
}

func (q *qp) Handle() uintptr              { return uintptr(unsafe.Pointer(q.qp)) }
func (q *qp) Num() uint32                  { return uint32(q.qp.qp_num) }
func (q *qp) Inline() int                  { return q.inline }
func (q *qp) LastReceive() <-chan struct{} { return q.last }

func (q *qp) Fail() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.gone {
		C.kvof_fail_qp(q.qp)
	}
}

// device implements Device.
type device struct {
	sys    *system
	ctx    *C.struct_ibv_context
	pin    **C.struct_ibv_context // keeps the connection manager's contexts open
	pd     *C.struct_ibv_pd
	name   string
	caps   Caps
	async  *pollFD
	events chan Event

	mu  sync.Mutex
	qps map[*C.struct_ibv_qp]*qp
}

// openDevice readies a device's context, which is the connection manager's own.
func openDevice(s *system, ctx *C.struct_ibv_context) (d *device, err error) {
	d = &device{sys: s, ctx: ctx, name: C.GoString(C.kvof_device_name(ctx)), events: make(chan Event, 16), qps: map[*C.struct_ibv_qp]*qp{}}
	var a C.struct_kvof_attr
	if rc := C.kvof_query(ctx, &a); rc != 0 {
		return nil, fmt.Errorf("%s: %w", d.name, syscall.Errno(rc))
	}
	d.caps = makeCaps(&a)
	if d.pd, err = C.kvof_alloc_pd(ctx); d.pd == nil {
		return nil, fmt.Errorf("%s: no protection domain: %w", d.name, err)
	}
	if d.async, err = newPollFD(ctx.async_fd, d.name); err != nil {
		C.kvof_dealloc_pd(d.pd)
		return nil, fmt.Errorf("%s: %w", d.name, err)
	}
	var n C.int
	d.pin = C.kvof_get_devices(&n)
	go d.watch()
	return d, nil
}

func makeCaps(a *C.struct_kvof_attr) Caps {
	c := Caps{IWARP: a.iwarp != 0, SendInvalidate: a.flags&C.IBV_DEVICE_MEM_MGT_EXTENSIONS != 0, MaxQP: int(a.max_qp), MaxQPWR: int(a.max_qp_wr),
		MaxSGE: int(a.max_sge), MaxSGERead: int(a.max_sge_rd), MaxCQE: int(a.max_cqe), MaxMRSize: uint64(a.max_mr_size),
		MaxMessage: uint64(a.max_msg), MaxInitiator: int(a.max_initiator), MaxResponder: int(a.max_responder), MaxSRQ: int(a.max_srq),
		MaxSRQWR: int(a.max_srq_wr), MaxSRQSGE: int(a.max_srq_sge), FirmwareVersion: C.GoString(&a.firmware[0]), ActiveMTU: int(a.mtu),
		LinkLayer: "Ethernet", ProviderTransport: "RoCE"}
	switch {
	case c.IWARP:
		c.ProviderTransport, c.MaxSGERead = "iWARP", 1
	case a.infiniband != 0:
		c.ProviderTransport, c.LinkLayer = "InfiniBand", "InfiniBand"
	}
	if c.MaxSGERead == 0 { // not told
		c.MaxSGERead = c.MaxSGE
	}
	if c.MaxMRSize == 0 {
		c.MaxMRSize = 1 << 40
	}
	if c.MaxMessage == 0 {
		c.MaxMessage = 1 << 31
	}
	return c
}

func portState(s uint32) string {
	names := [...]string{"unknown", "down", "initializing", "armed", "active", "active, deferred"}
	return names[min(s, uint32(len(names)-1))]
}

// watch takes the device's asynchronous events until the device is closed or gone.
func (d *device) watch() {
	for {
		var event C.int
		var of *C.struct_ibv_qp
		rc := C.int(0)
		err := d.async.raw.Read(func(uintptr) bool {
			rc = C.kvof_async_event(d.ctx, &event, &of)
			return rc != 0
		})
		if err != nil {
			return
		}
		e := Event{Text: "lost", Fatal: true}
		if rc > 0 {
			e = Event{Text: C.GoString(C.kvof_event_text(event)), Fatal: event == C.IBV_EVENT_DEVICE_FATAL}
		}
		if of != nil {
			d.mu.Lock()
			q := d.qps[of]
			d.mu.Unlock()
			if q != nil && event == C.IBV_EVENT_QP_LAST_WQE_REACHED {
				q.once.Do(func() { close(q.last) })
			}
			continue // its connection notices by itself
		}
		select {
		case d.events <- e:
		default:
		}
		if e.Fatal {
			return
		}
	}
}

func (d *device) Name() string { return d.name }
func (d *device) Caps() *Caps  { return &d.caps }

func (d *device) Port() string {
	var a C.struct_kvof_attr
	if C.kvof_query(d.ctx, &a) != 0 {
		return "gone"
	}
	return portState(uint32(a.port_state))
}

func (d *device) Events() <-chan Event { return d.events }

// flags are an access in C's terms.
func (d *device) flags(access Access) C.int {
	flags := C.int(C.IBV_ACCESS_LOCAL_WRITE)
	if access&RemoteRead != 0 {
		flags |= C.IBV_ACCESS_REMOTE_READ
	}
	if access&RemoteWrite != 0 || d.caps.IWARP {
		flags |= C.IBV_ACCESS_REMOTE_WRITE
	}
	return flags
}

func makeMR(mr *C.struct_ibv_mr) MR {
	return MR{LKey: uint32(mr.lkey), RKey: uint32(mr.rkey), Close: func() error {
		if rc := C.kvof_dereg_mr(mr); rc != 0 {
			return syscall.Errno(rc)
		}
		return nil
	}}
}

func (d *device) RegisterDMABuf(mem []byte, buf DMABuf, access Access) (*Region, error) {
	off := buf.Offset
	return NewRegion(mem, d.caps.MaxMRSize, func(part []byte) (MR, error) {
		iova := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(part))))
		mr, err := C.kvof_reg_dmabuf_mr(d.pd, C.uint64_t(off), C.size_t(len(part)), C.uint64_t(iova), C.int(buf.FD), d.flags(access))
		if mr == nil {
			return MR{}, fmt.Errorf("%s: cannot register %d bytes of a dma-buf: %w", d.name, len(part), dmabufError(err))
		}
		off += uint64(len(part))
		return makeMR(mr), nil
	})
}

// dmabufError tells what is not supported: by rdma-core or the provider, the kernel, or the driver of either device.
func dmabufError(err error) error {
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) {
		return fmt.Errorf("%w: %w", ErrNoDMABuf, err)
	}
	return err
}

func (d *device) Register(mem []byte, access Access) (*Region, error) {
	return NewRegion(mem, d.caps.MaxMRSize, func(part []byte) (MR, error) {
		mr, err := C.kvof_reg_mr(d.pd, unsafe.Pointer(unsafe.SliceData(part)), C.size_t(len(part)), d.flags(access))
		if mr == nil {
			if errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.EPERM) {
				err = fmt.Errorf("%w: memory for RDMA is locked: raise the limit (ulimit -l, LimitMEMLOCK=infinity), or run as root", err)
			}
			return MR{}, fmt.Errorf("%s: cannot register %d MiB: %w", d.name, len(part)>>20, err)
		}
		return makeMR(mr), nil
	})
}

func (d *device) NewSRQ(depth int) (SRQ, error) {
	q, err := C.kvof_create_srq(d.pd, C.int(depth))
	if q == nil {
		return nil, fmt.Errorf("%s: cannot create a shared receive queue of %d: %w", d.name, depth, err)
	}
	return &sharedQueue{q}, nil
}

func (d *device) Post(b *Batch) { turn(b, nil, 0, nil) }

func (d *device) Close() error {
	d.sys.mu.Lock()
	if d.sys.devices[d.ctx] == d {
		delete(d.sys.devices, d.ctx)
	}
	d.sys.mu.Unlock()
	d.async.file.Close()
	rc := C.kvof_dealloc_pd(d.pd)
	C.kvof_free_devices(d.pin)
	if rc != 0 {
		return fmt.Errorf("%s: %w", d.name, syscall.Errno(rc))
	}
	return nil
}

// turn is the one call of the data path.
func turn(b *Batch, cqs []uintptr, start int, wc []WC) int {
	if b == nil {
		b = &empty
	}
	return int(C.kvof_turn((*C.struct_kvof_chain)(unsafe.Pointer(unsafe.SliceData(b.chains))), C.int(len(b.chains)),
		(*C.struct_kvof_wr)(unsafe.Pointer(unsafe.SliceData(b.wrs))), (*C.struct_ibv_sge)(unsafe.Pointer(unsafe.SliceData(b.sges))),
		(*C.uintptr_t)(unsafe.Pointer(unsafe.SliceData(cqs))), C.int(len(cqs)), C.int(start),
		(*C.struct_ibv_wc)(unsafe.Pointer(unsafe.SliceData(wc))), C.int(len(wc))))
}

var empty Batch

// sharedQueue implements SRQ.
type sharedQueue struct{ srq *C.struct_ibv_srq }

func (q *sharedQueue) Handle() uintptr { return uintptr(unsafe.Pointer(q.srq)) }

func (q *sharedQueue) Close() error {
	if rc := C.kvof_destroy_srq(q.srq); rc != 0 {
		return syscall.Errno(rc)
	}
	return nil
}

// channel implements Channel.
type channel struct {
	dev *device
	ch  *C.struct_ibv_comp_channel
	cqs atomic.Pointer[queueList]
	mu  sync.Mutex // changes them
	at  int        // the queue to poll first
	arm []uintptr  // scratch of Wait

	waker  int  // eventfd
	closed bool // with it; mu
}

// queueList is a channel's queues, and their handles in the same order.
type queueList struct {
	queues  []*completions
	handles []uintptr
}

// without copies the list but for q.
func (l *queueList) without(q *completions) *queueList {
	var n queueList
	for _, o := range l.queues {
		if o != q {
			n.queues, n.handles = append(n.queues, o), append(n.handles, o.handle())
		}
	}
	return &n
}

func (d *device) NewChannel() (Channel, error) {
	c := &channel{dev: d}
	var err error
	if c.ch, err = C.kvof_create_channel(d.ctx); c.ch == nil {
		return nil, fmt.Errorf("%s: no completion channel: %w", d.name, err)
	}
	C.kvof_nonblock(c.ch.fd)
	if c.waker, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		C.kvof_destroy_channel(c.ch)
		return nil, os.NewSyscallError("eventfd", err)
	}
	c.cqs.Store(new(queueList))
	return c, nil
}

func (c *channel) NewCQ(depth int) (CQ, error) {
	cq, err := C.kvof_create_cq(c.dev.ctx, c.ch, C.int(depth))
	if cq == nil {
		return nil, fmt.Errorf("%s: cannot create a completion queue of %d: %w", c.dev.name, depth, err)
	}
	q := &completions{ch: c, cq: cq}
	c.mu.Lock()
	list := c.cqs.Load().without(nil)
	list.queues, list.handles = append(list.queues, q), append(list.handles, q.handle())
	c.cqs.Store(list)
	c.mu.Unlock()
	c.Wake() // to arm it
	return q, nil
}

// next returns the queues, and which of them to poll first.
func (c *channel) next() (*queueList, int) {
	l := c.cqs.Load()
	if c.at++; c.at >= len(l.handles) {
		c.at = 0
	}
	return l, c.at
}

func (c *channel) Turn(b *Batch, wc []WC) int {
	l, at := c.next()
	return turn(b, l.handles, at, wc)
}

// Wait keeps its thread, and the processor that goes with it for as long as nobody else wants that: a completion wakes the
// thread itself. Go's poller takes two more system calls, and wakes a second thread that polls in its place. All of it is one
// call of C.
func (c *channel) Wait(arm []CQ, files []int32, wc []WC) (int, error) {
	c.arm = c.arm[:0]
	for _, q := range arm {
		if q := q.(*completions); !q.armed.Swap(true) {
			c.arm = append(c.arm, q.handle())
		}
	}
	l, at := c.next()
	var event C.uintptr_t
	n := C.kvof_channel_wait(c.ch, C.int(c.waker), (*C.uintptr_t)(unsafe.Pointer(unsafe.SliceData(c.arm))), C.int(len(c.arm)),
		(*C.int32_t)(unsafe.Pointer(unsafe.SliceData(files))), C.int(len(files)),
		(*C.uintptr_t)(unsafe.Pointer(unsafe.SliceData(l.handles))), C.int(len(l.handles)), C.int(at),
		(*C.struct_ibv_wc)(unsafe.Pointer(unsafe.SliceData(wc))), C.int(len(wc)), &event)
	if event != 0 { // those of other queues make the next Wait short
		l := c.cqs.Load() // the queue may be new
		if i := slices.Index(l.handles, uintptr(event)); i >= 0 {
			l.queues[i].armed.Store(false)
		}
	}
	if n < 0 {
		for _, q := range arm { // not all may be
			q.(*completions).armed.Store(false)
		}
		return 0, syscall.Errno(-n)
	}
	return int(n), nil
}

func (c *channel) Wake() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		_, _ = unix.Write(c.waker, oneEvent)
	}
}

var oneEvent = binary.NativeEndian.AppendUint64(nil, 1)

func (c *channel) Close() error {
	c.mu.Lock()
	c.closed = true
	_ = unix.Close(c.waker)
	c.mu.Unlock()
	if rc := C.kvof_destroy_channel(c.ch); rc != 0 {
		return syscall.Errno(rc)
	}
	return nil
}

// completions implements CQ.
type completions struct {
	ch    *channel
	cq    *C.struct_ibv_cq
	armed atomic.Bool // an event comes, or is there: to ask for it takes a system call on soft devices
}

func (q *completions) Arm() error {
	if q.armed.Swap(true) {
		return nil
	}
	if rc := C.kvof_arm(q.cq); rc != 0 {
		q.armed.Store(false)
		return syscall.Errno(rc)
	}
	return nil
}

func (q *completions) handle() uintptr { return uintptr(unsafe.Pointer(q.cq)) }

// Close takes the queue from its channel, which must not be in Turn meanwhile.
func (q *completions) Close() error {
	q.ch.mu.Lock()
	q.ch.cqs.Store(q.ch.cqs.Load().without(q))
	q.ch.mu.Unlock()
	if rc := C.kvof_destroy_cq(q.cq); rc != 0 {
		return syscall.Errno(rc)
	}
	return nil
}
