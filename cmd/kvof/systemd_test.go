package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// fakeManager listens as a service manager does and sets NOTIFY_SOCKET.
func fakeManager(t *testing.T) (next func() string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return func() string {
		t.Helper()
		buf := make([]byte, 4096)
		conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		n, err := conn.Read(buf)
		if err != nil {
			t.Fatal("no notification:", err)
		}
		return string(buf[:n])
	}
}

func TestNotifier(t *testing.T) {
	next := fakeManager(t)
	n := notifier{slog.New(slog.DiscardHandler)}
	expect := func(want string) {
		t.Helper()
		if got := next(); got != want {
			t.Errorf("notified %q, want %q", got, want)
		}
	}
	n.Ready("serving\nREADY=0")
	expect("READY=1\nSTATUS=serving READY=0")
	n.Status("3 controllers")
	expect("STATUS=3 controllers")
	n.Stopping("draining")
	expect("STOPPING=1\nSTATUS=draining")
	n.Reloading()
	var usec int64
	if got := next(); !strings.HasPrefix(got, "RELOADING=1\n") {
		t.Errorf("notified %q", got)
	} else if _, err := fmt.Sscanf(got, "RELOADING=1\nMONOTONIC_USEC=%d", &usec); err != nil || usec <= 0 {
		t.Errorf("notified %q: %v", got, err)
	}
}

func TestNotifierWithoutManager(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	t.Setenv("WATCHDOG_USEC", "")
	var out bytes.Buffer
	n := notifier{slog.New(slog.NewTextHandler(&out, nil))}
	n.Ready("up")
	n.Watchdog(t.Context(), func() error { return errors.New("not asked") }) // returns at once
	if out.Len() > 0 {
		t.Errorf("logged %s", out.String())
	}
}

func TestWatchdogFollowsHealth(t *testing.T) {
	next := fakeManager(t)
	t.Setenv("WATCHDOG_USEC", "20000")
	t.Setenv("WATCHDOG_PID", fmt.Sprint(os.Getpid()))
	var asked, sick atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	n := notifier{slog.New(slog.DiscardHandler)}
	go func() {
		defer close(done)
		n.Watchdog(ctx, func() error {
			if asked.Add(1); sick.Load() != 0 {
				return errors.New("stuck")
			}
			return nil
		})
	}()
	for range 2 {
		if got := next(); got != "WATCHDOG=1" {
			t.Errorf("notified %q", got)
		}
	}
	// Once healthy has been asked twice in sickness, no answer given in health is on its way.
	sick.Store(1)
	for from := asked.Load(); asked.Load() < from+2; {
		time.Sleep(time.Millisecond)
	}
	n.Status("marker")
	for got := next(); got != "STATUS=marker"; got = next() {
	}
	for from := asked.Load(); asked.Load() < from+3; {
		time.Sleep(time.Millisecond)
	}
	n.Status("end")
	if got := next(); got != "STATUS=end" {
		t.Errorf("notified %q while sick", got)
	}
	cancel()
	<-done
}

// TestSocketActivation runs itself as a service manager's child, with a listening socket as descriptor 3.
func TestSocketActivation(t *testing.T) {
	if addr := os.Getenv("KVOF_TEST_INHERIT"); addr != "" {
		inheritInChild(t, netip.MustParseAddrPort(addr))
		return
	}
	var files []*os.File
	var addrs []string
	for range 2 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		f, err := l.(*net.TCPListener).File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files, addrs = append(files, f), append(addrs, l.Addr().String())
	}
	// LISTEN_PID is the child's own, which only the child knows before it runs.
	cmd := exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ exec "$0" -test.run '^TestSocketActivation$'`, os.Args[0])
	cmd.Env = append(os.Environ(), "LISTEN_FDS=2", "LISTEN_FDNAMES=nvme-tcp:nvme-tcp", "KVOF_TEST_INHERIT="+addrs[1])
	cmd.ExtraFiles = files
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("unused "+addrs[0]+"\n")) {
		t.Errorf("child: %v\n%s", err, out)
	}
}

func inheritInChild(t *testing.T, addr netip.AddrPort) {
	s, err := inheritSockets()
	if err != nil {
		t.Fatal(err)
	}
	if len(s.inherited) != 2 {
		t.Fatalf("inherited %d sockets", len(s.inherited))
	}
	// The parent listens on the address: only the inherited socket can be had.
	l, err := s.Listen(addr)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if l.Addr().String() != addr.String() {
		t.Errorf("got %s for %s", l.Addr(), addr)
	}
	conn, err := net.Dial("tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if _, err := s.Listen(addr); err == nil {
		t.Error("the same socket twice")
	}
	fmt.Println("unused", strings.Join(s.CloseUnused(), " "))
}

func TestListenErrorsSayWhatToDo(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	taken := l.Addr().(*net.TCPAddr).AddrPort()
	for _, test := range []struct {
		name    string
		sockets sockets
		addr    netip.AddrPort
		want    string
	}{
		{"in use", sockets{}, taken, "the address is in use"},
		{"opened by the socket unit", sockets{inherited: []net.Listener{l}}, netip.AddrPortFrom(netip.IPv4Unspecified(), taken.Port()), "ListenStream="},
		{"not ours", sockets{}, netip.MustParseAddrPort("192.0.2.1:4420"), "no such address"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := test.sockets.Listen(test.addr)
			if err == nil || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error is %v", err)
			}
		})
	}
}
