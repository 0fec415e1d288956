package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
)

// notifier tells the service manager how the service is (sd_notify(3)). Without a service manager its
// methods do nothing.
type notifier struct{ log *slog.Logger }

// Ready says that the service is up, or has finished reloading, and what it does.
func (n notifier) Ready(status string) { n.send(daemon.SdNotifyReady, "STATUS="+status) }

// Status changes the line that systemctl status shows.
func (n notifier) Status(status string) { n.send("STATUS=" + status) }

// Reloading says that a reload began; Ready ends it.
func (n notifier) Reloading() {
	n.send(daemon.SdNotifyReloading, strings.TrimSuffix(daemon.SdNotifyMonotonicUsec(), "\n"))
}

// Stopping says that the service drains and then ends.
func (n notifier) Stopping(status string) { n.send(daemon.SdNotifyStopping, "STATUS="+status) }

func (n notifier) send(assignments ...string) {
	for i, a := range assignments {
		assignments[i] = strings.ReplaceAll(a, "\n", " ") // a line is an assignment
	}
	if _, err := daemon.SdNotify(false, strings.Join(assignments, "\n")); err != nil {
		n.log.Warn("the service manager cannot be notified", "error", err)
	}
}

// Watchdog reports to the service manager's watchdog until ctx ends, twice in each of its periods, as
// long as healthy returns nil. A service that stays unhealthy for a period is killed and restarted.
func (n notifier) Watchdog(ctx context.Context, healthy func() error) {
	period, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		n.log.Warn("no watchdog", "error", err)
	}
	if period <= 0 {
		return
	}
	tick := time.NewTicker(max(period/2, time.Millisecond))
	defer tick.Stop()
	for {
		if err := healthy(); err != nil {
			n.log.Error("unhealthy: the watchdog gets no sign of life", "error", err)
		} else {
			n.send(daemon.SdNotifyWatchdog)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// sockets opens the server's TCP listeners, and takes those that the service manager opened for it.
type sockets struct{ inherited []net.Listener }

// inheritSockets takes over the sockets of socket activation. Call it once, before starting anything.
func inheritSockets() (*sockets, error) {
	listeners, err := activation.Listeners()
	if err != nil {
		return nil, fmt.Errorf("taking over the service manager's sockets: %w", err)
	}
	s := new(sockets)
	for _, l := range listeners {
		if l != nil { // not a listening socket
			s.inherited = append(s.inherited, l)
		}
	}
	return s, nil
}

// Listen returns the inherited socket that is bound to addr, or a new one.
func (s *sockets) Listen(addr netip.AddrPort) (net.Listener, error) {
	for i, l := range s.inherited {
		if bound, ok := l.Addr().(*net.TCPAddr); ok && bound.AddrPort() == addr {
			s.inherited = append(s.inherited[:i], s.inherited[i+1:]...)
			return l, nil
		}
	}
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(addr))
	if err == nil {
		return l, nil
	}
	advice := err.Error()
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		advice = "the address is in use: stop what listens there (ss -ltnp shows it), or configure another address"
		for _, l := range s.inherited {
			if bound, ok := l.Addr().(*net.TCPAddr); !ok || bound.Port != int(addr.Port()) {
				continue
			}
			advice = fmt.Sprintf("the socket unit opened %s instead: make its ListenStream= and the configured address the same", l.Addr())
		}
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		advice = "this machine has no such address (ip address shows those it has)"
	case errors.Is(err, syscall.EACCES):
		advice = "ports below 1024 need CAP_NET_BIND_SERVICE: configure another port, or grant it"
	}
	return nil, fmt.Errorf("cannot listen on %s: %s", addr, advice)
}

// CloseUnused closes the inherited sockets that no Listen took, so that hosts are refused rather than
// left waiting, and returns their addresses.
func (s *sockets) CloseUnused() (addrs []string) {
	for _, l := range s.inherited {
		addrs = append(addrs, l.Addr().String())
		l.Close()
	}
	s.inherited = nil
	return addrs
}
