package rdma

import (
	"context"
	"errors"
	"net/netip"
	"runtime"
	"sync"
	"time"

	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/rdma"
	"github.com/kvof/kvof/target"
)

const (
	// backlog is how many connection requests wait to be looked at.
	backlog = 1024
	// maxAdmin is the most entries of an admin queue.
	maxAdmin = 128
)

// Times, which tests shorten.
var (
	stallLimit = 30 * time.Second // ends a connection whose host takes part in no transfer for this long
	setupTime  = 15 * time.Second // that a host may take from connecting to a successful Connect
	retryTime  = 2 * time.Second  // between attempts to listen again after the device was removed
)

// Listener accepts NVMe/RDMA connections at one address.
type Listener struct {
	t     *Transport
	port  *target.Port
	addr  netip.AddrPort
	stall time.Duration
	setup time.Duration

	mu     sync.Mutex
	ln     rdma.Listener
	conns  map[*conn]struct{}
	closed bool
	ended  bool
	stop   chan struct{}
	wg     sync.WaitGroup
	busy   chan struct{} // connections that are being set up
}

func newListener(t *Transport, addr netip.AddrPort, discovery bool) *Listener {
	return &Listener{t: t, addr: addr, stall: stallLimit, setup: setupTime, conns: map[*conn]struct{}{}, stop: make(chan struct{}),
		busy: make(chan struct{}, max(4, runtime.GOMAXPROCS(0))),
		port: &target.Port{TRType: nvmeof.TRTypeRDMA, Discovery: discovery, InCapsule: inCapsule, MSDBD: maxDescriptors}}
}

// open binds the address.
func (l *Listener) open() error {
	ln, err := l.t.verbs.Listen(l.addr, backlog, l.t.ready)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		ln.Close()
		return rdma.ErrClosed
	}
	l.ln, l.addr = ln, ln.Addr()
	l.port.Address = l.addr
	return nil
}

func (l *Listener) start() {
	l.wg.Add(2)
	go l.accept()
	go l.watch()
}

// Addr is the address the listener is bound to.
func (l *Listener) Addr() netip.AddrPort { return l.addr }

func (l *Listener) accept() {
	defer l.wg.Done()
	for {
		l.mu.Lock()
		ln := l.ln
		l.mu.Unlock()
		id, err := ln.Accept()
		switch {
		case err == nil:
			l.busy <- struct{}{}
			l.wg.Add(1)
			go func() {
				defer l.wg.Done()
				l.connect(id)
			}()
		case errors.Is(err, rdma.ErrClosed):
			return
		default:
			l.t.log.Warn("the listener's device is gone; listening again when it is back", "address", l.addr, "error", err)
			ln.Close()
			if !l.reopen() {
				return
			}
		}
	}
}

// reopen tries to listen again until it succeeds; false when the listener was closed meanwhile.
func (l *Listener) reopen() bool {
	for {
		select {
		case <-time.After(retryTime):
		case <-l.stop:
			return false
		}
		if err := l.open(); err == nil {
			l.t.log.Info("listening again", "transport", "rdma", "address", l.addr)
			return true
		}
	}
}

// check judges a connection request and returns how many RDMA READs we may have under way.
func (l *Listener) check(id rdma.ID, req *nvmeof.RDMARequest) (reads int, err error) {
	p, limits := id.Request(), l.t.target.Limits()
	if err := req.Decode(p.Private); err != nil {
		return 0, err
	}
	caps := id.Device().Caps()
	entries := int(req.HSQSIZE) + 1
	most := limits.QueueEntries
	if req.QID == 0 {
		most = maxAdmin
	}
	reads = min(int(p.InitiatorDepth), caps.MaxInitiator)
	if caps.IWARP && reads == 0 { // not every iWARP host tells
		reads = 1
	}
	switch {
	case int(req.QID) > limits.IOQueues:
		return 0, nvmeof.RDMARejectQID
	case entries < 2 || entries > most:
		return 0, nvmeof.RDMARejectHSQSIZE
	case req.HRQSIZE == 0:
		return 0, nvmeof.RDMARejectHRQSIZE
	case reads == 0: // the host's data could not be fetched
		return 0, nvmeof.RDMARejectIRD
	}
	return reads, nil
}

// connect answers a connection request and serves the connection.
func (l *Listener) connect(id rdma.ID) {
	ready := func() { <-l.busy }
	c, req, reads, err := l.prepare(id)
	if err == nil {
		private := make([]byte, nvmeof.RDMAAcceptSize)
		nvmeof.EncodeRDMAAccept(private, req.HSQSIZE+1)
		err = id.Accept(rdma.ConnParam{Private: private, InitiatorDepth: uint8(reads)})
		ready()
		if err != nil {
			l.t.log.Warn("accepting a connection failed", "peer", c.name, "error", err)
			c.Close("accepting failed")
		}
		c.serve()
		l.forget(c)
		return
	}
	code := nvmeof.RDMARejectBusy
	errors.As(err, &code)
	l.t.log.Warn("connection refused", "peer", id.Remote().String(), "error", err, "status", uint16(code))
	private := make([]byte, nvmeof.RDMARejectSize)
	code.Encode(private)
	_ = id.Reject(private)
	_ = id.Close()
	ready()
}

// prepare makes all that a connection needs.
func (l *Listener) prepare(id rdma.ID) (c *conn, req nvmeof.RDMARequest, reads int, err error) {
	if reads, err = l.check(id, &req); err != nil {
		return nil, req, 0, err
	}
	d, err := l.t.device(id.Device())
	if err != nil {
		return nil, req, 0, err
	}
	if c, err = newConn(l, d, id, &req, reads); err != nil {
		return nil, req, 0, err
	}
	l.mu.Lock()
	ok := !l.ended && d.add(c)
	if ok {
		l.conns[c] = struct{}{}
		c.lane.add(c)
	}
	l.mu.Unlock()
	if !ok {
		return nil, req, 0, errors.Join(rdma.ErrClosed, c.release())
	}
	return c, req, reads, nil
}

func (l *Listener) forget(c *conn) {
	l.mu.Lock()
	delete(l.conns, c)
	l.mu.Unlock()
	c.dev.remove(c)
}

// watch ends connections that are stalled.
func (l *Listener) watch() {
	defer l.wg.Done()
	every := min(l.stall, l.setup) / 6
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-l.stop:
			return
		case <-tick.C:
		}
		l.mu.Lock()
		for c := range l.conns {
			c.checkStall(every)
		}
		l.mu.Unlock()
	}
}

// StopAccepting refuses further connections; those there are go on.
func (l *Listener) StopAccepting() {
	l.mu.Lock()
	if !l.closed {
		l.closed = true
		close(l.stop)
	}
	ln := l.ln
	l.mu.Unlock()
	ln.Close()
}

// Close ends all connections and waits until they are gone, or ctx ends.
func (l *Listener) Close(ctx context.Context) error {
	l.StopAccepting()
	l.mu.Lock()
	l.ended = true
	for c := range l.conns {
		c.Close("the listener is closing")
	}
	l.mu.Unlock()
	done := make(chan struct{})
	go func() { l.wg.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
