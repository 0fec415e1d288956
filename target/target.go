package target

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/uring"
)

// Target holds the subsystems and the controllers of the hosts that are connected to them.
type Target struct {
	log     *slog.Logger
	arena   *uring.Arena
	pool    *pool
	limits  configs.Limits
	started time.Time

	draining atomic.Bool
	copied   counter // payload bytes
	pulse    pulse
	checks   sync.WaitGroup // in progress

	mu         sync.RWMutex
	subsystems map[string]*subsystem // by NQN
	discovery  *subsystem
	referrals  []configs.Referral
	ports      []*Port
	genctr     uint64                 // of the discovery log
	ctrls      map[uint16]*Controller // by CNTLID
	lastID     uint16
}

// Port is an address that hosts connect to.
type Port struct {
	TRType    uint8          // transport, as in discovery records
	Address   netip.AddrPort // an unspecified IP is advertised as the one the host reached
	Discovery bool           // the discovery subsystem alone
	InCapsule int            // most bytes of data in a command capsule of an I/O queue
	MSDBD     uint8          // most descriptors of one command's SGL
}

// New makes a target without subsystems. Payload moves through arena, which the caller owns and closes after Close.
func New(arena *uring.Arena, limits configs.Limits, log *slog.Logger) *Target {
	t := &Target{log: log, arena: arena, pool: newPool(arena), limits: limits, started: time.Now(), subsystems: map[string]*subsystem{}, ctrls: map[uint16]*Controller{}}
	t.discovery = newSubsystem(configs.Subsystem{NQN: nvmeof.DiscoveryNQN, AllowAnyHost: true, Serial: "kvof-discovery"})
	t.discovery.discovery = true
	return t
}

// Limits returns what hosts can make the target hold.
func (t *Target) Limits() configs.Limits { return t.limits }

// AddPort makes a port part of the discovery log.
func (t *Target) AddPort(p *Port) {
	t.mu.Lock()
	t.ports = append(t.ports, p)
	t.genctr++
	t.mu.Unlock()
}

// Apply makes the target serve what the configuration says: it opens what is new, closes what is gone, applies access
// lists, and sends hosts their events. What cannot be opened is left out and reported; the rest is served.
func (t *Target) Apply(c *configs.Config) error {
	var errs []error
	for _, s := range t.all() { // pools that change are closed by all before anybody opens them again
		errs = append(errs, s.leave(t.pool.storages.configure(c.Pools)))
	}
	t.pool.storages.configure(c.Pools)
	want := map[string]configs.Subsystem{}
	for _, s := range c.Subsystems {
		want[s.NQN] = s
	}
	t.mu.Lock()
	var closing []*namespace
	var ended []*Controller
	for nqn, s := range t.subsystems {
		if _, ok := want[nqn]; !ok {
			delete(t.subsystems, nqn)
			closing = append(closing, s.removeAll()...)
			for _, k := range t.ctrls {
				if k.sub == s {
					ended = append(ended, k)
				}
			}
		}
	}
	t.mu.Unlock()
	for _, k := range ended {
		k.end("its subsystem was removed")
	}
	for _, n := range closing {
		errs = append(errs, n.close())
	}
	for _, cs := range c.Subsystems {
		t.mu.Lock()
		s := t.subsystems[cs.NQN]
		if s == nil {
			s = newSubsystem(cs)
			t.subsystems[cs.NQN] = s
		}
		t.mu.Unlock()
		changed, err := s.apply(cs, t.arena, t.pool, t.log)
		if err != nil {
			errs = append(errs, fmt.Errorf("subsystem %s: %w", cs.NQN, err))
		}
		for _, k := range t.controllers() {
			if k.sub != s {
				continue
			}
			if !s.allows(k.HostNQN) {
				k.end("the host is no longer allowed")
			} else {
				k.namespacesChanged(changed)
			}
		}
	}
	t.mu.Lock()
	t.referrals = c.Discovery.Referrals
	t.genctr++
	t.mu.Unlock()
	for _, k := range t.controllers() {
		if k.sub.discovery {
			k.event(nvmeof.EventDiscoveryChanged)
		}
	}
	return errors.Join(errs...)
}

// controllers returns all controllers, by CNTLID.
func (t *Target) controllers() []*Controller {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return slices.SortedFunc(maps.Values(t.ctrls), func(a, b *Controller) int { return cmp.Compare(a.ID, b.ID) })
}

// Drain refuses new controllers and begins no I/O command any more; it waits, at most for d, until the commands in
// flight are done, then ends all controllers. Hosts send what was not begun again, wherever they connect next.
func (t *Target) Drain(d time.Duration) {
	t.draining.Store(true)
	ks := t.controllers()
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if !slices.ContainsFunc(ks, (*Controller).busy) {
			break
		}
	}
	for _, k := range ks {
		k.end("the target is stopping")
	}
}

// Close closes all namespaces. Every connection has ended before.
func (t *Target) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var errs []error
	for nqn, s := range t.subsystems {
		for _, n := range s.removeAll() {
			errs = append(errs, n.close())
		}
		delete(t.subsystems, nqn)
	}
	return errors.Join(errs...)
}

// addController gives a new controller an identifier; nil when there are too many.
func (t *Target) addController(k *Controller) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.draining.Load() || len(t.ctrls) >= t.limits.Controllers {
		return false
	}
	for {
		if t.lastID++; t.lastID > maxCNTLID {
			t.lastID = 1
		}
		if t.ctrls[t.lastID] == nil {
			break
		}
	}
	k.ID = t.lastID
	t.ctrls[k.ID] = k
	return true
}

// maxCNTLID is the highest dynamic controller identifier (Base, CNTLID).
const maxCNTLID = 0xFFEF

func (t *Target) removeController(k *Controller) {
	t.mu.Lock()
	delete(t.ctrls, k.ID)
	t.mu.Unlock()
}

func (t *Target) controller(id uint16) *Controller {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.ctrls[id]
}

// subsystem finds a subsystem by NQN.
func (t *Target) subsystem(nqn string) *subsystem {
	if nqn == nvmeof.DiscoveryNQN {
		return t.discovery
	}
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.subsystems[nqn]
}

// discoveryLog builds the discovery log page for one host that reached us at the local address.
func (t *Target) discoveryLog(host string, local netip.Addr, port *Port) []byte {
	t.mu.RLock()
	defer t.mu.RUnlock()
	var es []nvmeof.DiscoveryEntry
	record := func(p *Port, id int, subtype uint8, nqn string) {
		addr := p.Address.Addr()
		if addr.IsUnspecified() {
			addr = local
		}
		es = append(es, nvmeof.DiscoveryEntry{TRType: p.TRType, AdrFam: adrfam(addr), SubType: subtype, TREQ: nvmeof.TREQNoFlowControl,
			PortID: uint16(id), CNTLID: nvmeof.CNTLIDDynamic, ASQSZ: adminDepth, TRSVCID: fmt.Sprint(p.Address.Port()), TRAddr: addr.Unmap().String(), SubNQN: nqn})
	}
	for i, p := range t.ports {
		if p == port {
			record(p, i+1, nvmeof.SubtypeDiscovery, nvmeof.DiscoveryNQN)
			es[len(es)-1].EFlags = nvmeof.EFlagReturnsOwnLog | nvmeof.EFlagEPCSD
		}
	}
	for _, nqn := range slices.Sorted(maps.Keys(t.subsystems)) {
		if !t.subsystems[nqn].allows(host) {
			continue
		}
		for i, p := range t.ports {
			if !p.Discovery {
				record(p, i+1, nvmeof.SubtypeNVM, nqn)
			}
		}
	}
	for _, r := range t.referrals {
		p := &Port{TRType: trtype(r.Transport), Address: r.Address}
		record(p, 0, nvmeof.SubtypeReferral, nvmeof.DiscoveryNQN)
	}
	return nvmeof.EncodeDiscovery(nil, t.genctr, es)
}

func trtype(t configs.Transport) uint8 {
	if t == configs.TransportRDMA {
		return nvmeof.TRTypeRDMA
	}
	return nvmeof.TRTypeTCP
}

func adrfam(a netip.Addr) uint8 {
	if a.Unmap().Is4() {
		return nvmeof.AdrFamIPv4
	}
	return nvmeof.AdrFamIPv6
}
