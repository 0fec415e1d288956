package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/rdma"
)

// DiscoverOptions say how [Discover] works.
type DiscoverOptions struct {
	Transport                string // as in [Options], like what follows
	HostNQN                  string
	HostID                   [16]byte
	HeaderDigest, DataDigest bool
	Verbs                    rdma.Verbs
	Referrals                bool // also ask the discovery controllers that the log refers to, over any transport
}

const (
	maxDiscoveryRecords = 1 << 16
	maxReferrals        = 64
	discoveryChunk      = 64 // records in one read
)

// Discover returns the records of the discovery log at addr (host:port). With referrals followed, it returns the
// records of all logs reached, each once; a referral that does not answer is left as its record, without an error.
func Discover(ctx context.Context, addr string, o DiscoverOptions) ([]nvmeof.DiscoveryEntry, error) {
	o.Transport = cmp.Or(o.Transport, TCP)
	entries, err := discover(ctx, addr, o)
	if err != nil || !o.Referrals {
		return entries, err
	}
	seen := map[nvmeof.DiscoveryEntry]bool{}
	type place struct{ transport, addr string }
	visited := map[place]bool{{o.Transport, addr}: true}
	var all []nvmeof.DiscoveryEntry
	for queue := [][]nvmeof.DiscoveryEntry{entries}; len(queue) > 0; queue = queue[1:] {
		for _, e := range queue[0] {
			if seen[e] {
				continue
			}
			seen[e] = true
			all = append(all, e)
			p := place{Transport(&e), net.JoinHostPort(e.TRAddr, e.TRSVCID)}
			if e.SubType != nvmeof.SubtypeReferral || p.transport == "" || visited[p] || len(visited) > maxReferrals {
				continue
			}
			visited[p] = true
			o := o
			o.Transport = p.transport
			if p.transport != TCP {
				o.HeaderDigest, o.DataDigest = false, false
			}
			if more, err := discover(ctx, p.addr, o); err == nil {
				queue = append(queue, more)
			} else if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
		}
	}
	return all, nil
}

// Transport is the transport that a discovery record names, as in [Options]; "" for one that this package does not know.
func Transport(e *nvmeof.DiscoveryEntry) string {
	switch e.TRType {
	case nvmeof.TRTypeTCP:
		return TCP
	case nvmeof.TRTypeRDMA:
		return RDMA
	}
	return ""
}

func discover(ctx context.Context, addr string, o DiscoverOptions) ([]nvmeof.DiscoveryEntry, error) {
	c, err := Connect(ctx, Options{Transport: o.Transport, Addr: addr, HostNQN: o.HostNQN, HostID: o.HostID, HeaderDigest: o.HeaderDigest, DataDigest: o.DataDigest, Verbs: o.Verbs, KATO: -1})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.DiscoveryLog(ctx)
}

// DiscoveryLog reads a discovery controller's whole log. It starts again when the log changes meanwhile, as its
// generation counter tells.
func (c *Controller) DiscoveryLog(ctx context.Context) ([]nvmeof.DiscoveryEntry, error) {
	header := make([]byte, nvmeof.DiscoveryHeaderSize)
	read := func() (gen, n uint64, err error) {
		if err := c.LogPage(ctx, nvmeof.LogDiscovery, 0, header); err != nil {
			return 0, 0, fmt.Errorf("discovery log: %w", err)
		}
		return nvmeof.DecodeDiscoveryHeader(header)
	}
	gen, n, err := read()
	for range 10 {
		if err != nil {
			return nil, err
		}
		if n > maxDiscoveryRecords {
			return nil, protocolError("discovery log of %d records", n)
		}
		page := make([]byte, nvmeof.DiscoveryEntrySize*min(n, discoveryChunk))
		entries := make([]nvmeof.DiscoveryEntry, n)
		for i := uint64(0); i < n; i += discoveryChunk {
			b := page[:nvmeof.DiscoveryEntrySize*min(n-i, discoveryChunk)]
			off := nvmeof.DiscoveryHeaderSize + i*nvmeof.DiscoveryEntrySize
			if err := c.LogPage(ctx, nvmeof.LogDiscovery, off, b); err != nil {
				return nil, fmt.Errorf("discovery log: %w", err)
			}
			for j := 0; len(b) > 0; j, b = j+1, b[nvmeof.DiscoveryEntrySize:] {
				if err := entries[i+uint64(j)].Decode(b); err != nil {
					return nil, err
				}
			}
		}
		before := gen
		if gen, n, err = read(); err == nil && gen == before && n == uint64(len(entries)) {
			return entries, nil
		}
	}
	return nil, errors.New("discovery log keeps changing")
}
