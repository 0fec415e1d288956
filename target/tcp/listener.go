// Package tcp is the NVMe/TCP transport of the target: listeners, and one connection for each queue.
//
// A connection has one goroutine that reads and one that writes when the socket is full; everybody else who has
// something for the host writes it in place. Payload goes from the socket into the memory that the command's namespace
// hands out, and from there to the socket, without a copy.
package tcp

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/target"
)

// stallLimit ends a connection whose peer owes us bytes, or takes none of ours, for this long.
var stallLimit = 30 * time.Second

// Listener accepts NVMe/TCP connections on one port.
type Listener struct {
	target *target.Target
	port   *target.Port
	ln     net.Listener
	log    *slog.Logger
	stall  time.Duration // stallLimit
	setup  time.Duration // setupTime

	spinners atomic.Int32

	mu     sync.Mutex
	conns  map[*conn]struct{}
	closed bool
	wg     sync.WaitGroup
	stop   chan struct{}
}

// Listen serves a target on ln, which the listener owns from now on, and adds the port to the target's discovery log.
// With discovery set it serves the discovery subsystem alone.
func Listen(t *target.Target, ln net.Listener, discovery bool, log *slog.Logger) *Listener {
	addr := netip.AddrPort{}
	if a, ok := ln.Addr().(*net.TCPAddr); ok {
		addr = a.AddrPort()
		addr = netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())
	}
	l := &Listener{target: t, ln: ln, log: log, stall: stallLimit, setup: setupTime, conns: map[*conn]struct{}{}, stop: make(chan struct{}),
		port: &target.Port{TRType: nvmeof.TRTypeTCP, Address: addr, Discovery: discovery, InCapsule: target.InCapsule, MSDBD: 1}}
	t.AddPort(l.port)
	l.wg.Add(2)
	go l.accept()
	go l.watch()
	return l
}

// Addr is the address the listener is bound to.
func (l *Listener) Addr() net.Addr { return l.ln.Addr() }

func (l *Listener) accept() {
	defer l.wg.Done()
	for {
		nc, err := l.ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // such as too many open files: hosts try again
			l.log.Warn("accept failed", "listener", l.ln.Addr().String(), "error", err)
			select {
			case <-time.After(100 * time.Millisecond):
				continue
			case <-l.stop:
				return
			}
		}
		l.serve(nc)
	}
}

// serve starts a connection.
func (l *Listener) serve(nc net.Conn) {
	c, err := newConn(l, nc)
	if err != nil {
		l.log.Warn("connection refused", "error", err)
		nc.Close()
		return
	}
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		nc.Close()
		return
	}
	l.conns[c] = struct{}{}
	l.wg.Add(1)
	l.mu.Unlock()
	go func() {
		defer l.wg.Done()
		c.serve()
		l.mu.Lock()
		delete(l.conns, c)
		l.mu.Unlock()
	}()
}

// watch ends connections that are stalled.
func (l *Listener) watch() {
	defer l.wg.Done()
	every := l.stall / 6
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

// StopAccepting closes the listening socket; connections go on.
func (l *Listener) StopAccepting() { l.ln.Close() }

// Close ends all connections and waits until they are gone, or ctx ends.
func (l *Listener) Close(ctx context.Context) error {
	l.ln.Close()
	l.mu.Lock()
	if !l.closed {
		l.closed = true
		close(l.stop)
	}
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
