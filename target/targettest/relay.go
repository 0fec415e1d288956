package targettest

import (
	"net"
	"sync"
	"testing"
	"time"
)

// Relay passes bytes on to a server until it is told to hold them back: what a target that hangs, or a network that swallows packets, looks like to a host.
type Relay struct {
	Addr string // host:port to connect to

	to   string
	mu   sync.Mutex
	hold bool
	all  []net.Conn
	wg   sync.WaitGroup
}

// NewRelay starts a relay to an address, which ends with the test.
func NewRelay(t testing.TB, to string) *Relay {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &Relay{Addr: l.Addr().String(), to: to}
	r.wg.Go(func() {
		for {
			a, err := l.Accept()
			if err != nil {
				return
			}
			b, err := net.Dial("tcp", r.to)
			if err != nil {
				a.Close()
				continue
			}
			r.mu.Lock()
			r.all = append(r.all, a, b)
			r.mu.Unlock()
			for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
				r.wg.Go(func() { r.copy(way[0], way[1]) })
			}
		}
	})
	t.Cleanup(func() {
		l.Close()
		r.Cut()
		r.wg.Wait()
	})
	return r
}

func (r *Relay) copy(from, to net.Conn) {
	defer to.Close()
	b := make([]byte, 64<<10)
	for {
		n, err := from.Read(b)
		if err != nil {
			return
		}
		for r.held() {
			if time.Sleep(time.Millisecond); from.SetReadDeadline(time.Time{}) != nil { // closed
				return
			}
		}
		if _, err := to.Write(b[:n]); err != nil {
			return
		}
	}
}

func (r *Relay) held() bool { r.mu.Lock(); defer r.mu.Unlock(); return r.hold }

// Freeze holds all bytes back, or lets them go on.
func (r *Relay) Freeze(on bool) { r.mu.Lock(); r.hold = on; r.mu.Unlock() }

// Cut ends all connections. New ones may follow.
func (r *Relay) Cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.all {
		c.Close()
	}
	r.all = nil
}
