package client

import (
	"context"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/kvof/kvof/host"
	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/rdma"
)

// source is discovery controllers, of which one at a time tells which targets there are.
type source struct {
	client *Client
	spec   sourceSpec

	mu    sync.Mutex
	read  bool // the log has been read once
	err   error
	found []targetSpec
}

func (s *source) note(err error) {
	s.mu.Lock()
	s.err = err
	s.mu.Unlock()
	s.client.changed()
}

// run follows the log until ctx ends. While no controller answers, the targets stay what they were.
func (s *source) run(ctx context.Context) {
	c := s.client
	defer c.wg.Done()
	for i := 0; ctx.Err() == nil; i++ {
		err := s.follow(ctx, s.spec.discovery[i%len(s.spec.discovery)])
		if ctx.Err() == nil {
			s.note(err)
		}
		select {
		case <-time.After(c.opts.Reconnect):
		case <-ctx.Done():
		}
	}
}

// follow reads the log at addr, and again after each event, until the connection ends.
func (s *source) follow(ctx context.Context, addr string) error {
	o := &s.client.opts
	events := make(chan struct{}, 1)
	limited, cancel := context.WithTimeout(ctx, o.ConnectTimeout)
	defer cancel()
	ctrl, err := host.Connect(limited, host.Options{Addr: addr, HostNQN: o.HostNQN, KATO: o.KeepAlive, HeaderDigest: o.HeaderDigest, DataDigest: o.DataDigest,
		DialTimeout: o.ConnectTimeout, OnEvent: func(uint32) {
			select {
			case events <- struct{}{}:
			default:
			}
		}})
	if err != nil {
		return err
	}
	s.client.wg.Add(1)
	defer func() {
		go func() { // takes seconds when the target hangs
			defer s.client.wg.Done()
			_ = ctrl.Close()
		}()
	}()
	for {
		limited, cancel := context.WithTimeout(ctx, o.ConnectTimeout)
		entries, err := ctrl.DiscoveryLog(limited)
		cancel()
		if err != nil {
			return fmt.Errorf("discovery at %s: %w", addr, err)
		}
		s.mu.Lock()
		s.found, s.read, s.err = s.targets(entries), true, nil
		s.mu.Unlock()
		s.client.assemble()
		select {
		case <-events:
		case <-ctrl.Done():
			return ctrl.Err()
		case <-ctx.Done():
			return nil
		}
	}
}

// haveRDMA tells whether this machine has RDMA at all, and the library was built with it.
var haveRDMA = sync.OnceValue(func() bool {
	_, err := rdma.System()
	return err == nil
})

// targets makes targets of discovery records: one for each subsystem, with a path for each of its records.
func (s *source) targets(entries []nvmeof.DiscoveryEntry) (all []targetSpec) {
	index := map[string]int{}
	for _, e := range entries {
		if e.SubType != nvmeof.SubtypeNVM || s.spec.nqn != "" && e.SubNQN != s.spec.nqn || nvmeof.CheckNQN(e.SubNQN) != nil {
			continue
		}
		p := pathSpec{addr: net.JoinHostPort(e.TRAddr, e.TRSVCID), nqn: e.SubNQN, nsid: s.spec.nsid}
		switch {
		case e.TRType == nvmeof.TRTypeTCP:
			p.transport = schemeTCP
		case e.TRType == nvmeof.TRTypeRDMA && haveRDMA():
			p.transport = schemeRDMA
		default:
			continue
		}
		i, ok := index[e.SubNQN]
		if !ok {
			name := targetName(e.SubNQN, s.spec.nsid)
			if s.spec.named != "" {
				name = s.spec.named
			}
			i = len(all)
			index[e.SubNQN] = i
			all = append(all, targetSpec{name: name})
		}
		all[i].paths = append(all[i].paths, p)
	}
	return all
}
