// Package targettest runs real targets inside the tests of what uses them, on memory devices: over NVMe/TCP on loopback, and over NVMe/RDMA
// on devices in memory.
package targettest

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/rdma"
	"github.com/kvof/kvof/rdma/rdmatest"
	"github.com/kvof/kvof/target"
	targetrdma "github.com/kvof/kvof/target/rdma"
	"github.com/kvof/kvof/target/tcp"
	"github.com/kvof/kvof/uring"
)

// NQN is the subsystem of a server unless its options say otherwise. Namespace 1 is Key Value, 2 is a block namespace.
const NQN = "nqn.2026-11.dev.kvof:test"

// Options of Serve. The zero value is usable.
type Options struct {
	Addr      string // host:port to listen at; a free port on loopback by default
	NQN       string
	Size      int64     // of the Key Value namespace in bytes, 256 MiB by default
	MaxValue  int64     // in bytes, 64 MiB by default
	Discovery bool      // the port serves the discovery subsystem alone, besides one for I/O
	RDMA      bool      // also over RDMA
	HostCaps  rdma.Caps // of the hosts' device; [rdmatest.DefaultCaps] by default
}

// Server is a running target.
type Server struct {
	Addr      string // of I/O
	Discovery string // of the port for discovery alone, if asked for
	NQN       string
	Target    *target.Target
	RDMA      string           // of RDMA, if asked for
	Verbs     *rdmatest.Net    // to be used by hosts
	Host      *rdmatest.Device // the hosts'

	t         testing.TB
	arena     *uring.Arena
	listeners []interface{ Close(context.Context) error }
	rdma      *targetrdma.Transport
	stop      sync.Once
}

// Serve starts a target, which ends with the test.
func Serve(t testing.TB, o Options) *Server {
	t.Helper()
	if o.Addr == "" {
		o.Addr = "127.0.0.1:0"
	}
	if o.NQN == "" {
		o.NQN = NQN
	}
	if o.Size == 0 {
		o.Size = 256 << 20
	}
	if o.MaxValue == 0 {
		o.MaxValue = 64 << 20
	}
	if o.HostCaps == (rdma.Caps{}) {
		o.HostCaps = rdmatest.DefaultCaps()
	}
	s := &Server{t: t, NQN: o.NQN}
	var err error
	if s.arena, err = uring.NewArena(32 << 20); err != nil {
		t.Fatal(err)
	}
	s.Target = target.New(s.arena, configs.Limits{Controllers: 1000, IOQueues: 16, QueueEntries: 1024}, slog.New(slog.DiscardHandler))
	s.Apply(configs.Namespace{NSID: 1, Type: configs.KeyValue, Device: configs.DeviceMemory, Size: configs.Size(o.Size), MaxValue: configs.Size(o.MaxValue)},
		configs.Namespace{NSID: 2, Type: configs.Block, Device: configs.DeviceMemory, Size: 1 << 20, LBASize: 512})
	s.Addr = s.listen(o.Addr, false)
	if o.Discovery {
		s.Discovery = s.listen("127.0.0.1:0", true)
	}
	if o.RDMA {
		s.listenRDMA(o.HostCaps)
	}
	t.Cleanup(s.Stop)
	return s
}

// Apply serves these namespaces in place of all others.
func (s *Server) Apply(ns ...configs.Namespace) {
	s.t.Helper()
	err := s.Target.Apply(&configs.Config{Subsystems: []configs.Subsystem{{NQN: s.NQN, Serial: "1", AllowAnyHost: true, Namespaces: ns}}})
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *Server) listen(addr string, discovery bool) string {
	s.t.Helper()
	var ln net.Listener
	var err error
	for range 100 { // the port of a server that has just stopped
		if ln, err = net.Listen("tcp", addr); err == nil {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	s.listeners = append(s.listeners, tcp.Listen(s.Target, ln, discovery, slog.New(slog.DiscardHandler)))
	return ln.Addr().String()
}

// listenRDMA makes a network of two devices, the target's and the hosts'.
func (s *Server) listenRDMA(host rdma.Caps) {
	s.t.Helper()
	s.Verbs = rdmatest.New()
	addr := netip.MustParseAddrPort("192.0.2.1:4420")
	// The first device is what a host takes that asks for none.
	s.Host = s.Verbs.AddDevice("host0", netip.MustParseAddr("192.0.2.2"), host)
	s.Verbs.AddDevice("target0", addr.Addr(), rdmatest.DefaultCaps())
	s.rdma = targetrdma.New(s.Target, s.Verbs, slog.New(slog.DiscardHandler))
	l, err := s.rdma.Listen(addr, false)
	if err != nil {
		s.t.Fatal(err)
	}
	s.listeners = append(s.listeners, l)
	s.RDMA = addr.String()
}

// Stop ends the target and all its connections at once.
func (s *Server) Stop() {
	s.stop.Do(func() {
		for _, l := range s.listeners {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			if err := l.Close(ctx); err != nil {
				s.t.Error(err)
			}
			cancel()
		}
		if s.rdma != nil {
			if err := s.rdma.Close(); err != nil {
				s.t.Error(err)
			}
			if f := s.Verbs.Faults(); f != (rdmatest.Faults{}) {
				s.t.Errorf("a device would punish %+v", f)
			}
		}
		if err := s.Target.Close(); err != nil {
			s.t.Error(err)
		}
		if err := s.arena.Close(); err != nil {
			s.t.Error(err)
		}
	})
}
