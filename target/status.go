package target

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
	"unsafe"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/kvlayer"
	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/uring"
)

// Status is a target at one moment, for people and monitoring: its JSON is what the management endpoint answers.
type Status struct {
	Version     string             `json:"version"` // the caller fills it in
	Started     time.Time          `json:"started"`
	Uptime      float64            `json:"uptime_seconds"`
	Draining    bool               `json:"draining"`
	Ports       []PortStatus       `json:"ports"`
	Subsystems  []SubsystemStatus  `json:"subsystems"`        // by NQN
	Pools       []PoolStatus       `json:"pools"`             // by name, those in use
	Controllers []ControllerStatus `json:"controllers"`       // by CNTLID, those of the discovery subsystem among them
	Fabrics     []FabricStatus     `json:"fabrics,omitempty"` // RDMA devices in use
	Arena       uring.ArenaStats   `json:"arena"`
	Copied      uint64             `json:"copied"` // payload bytes that were copied: what came in capsules
	Kernel      uring.Features     `json:"kernel"`
}

// PortStatus is an address that hosts connect to.
type PortStatus struct {
	ID        int    `json:"id"` // PORTID of discovery records
	Transport string `json:"transport"`
	Address   string `json:"address"`
	Discovery bool   `json:"discovery"` // the discovery subsystem alone
}

// FabricStatus is an RDMA device in use. The counters run since the device came into use.
type FabricStatus struct {
	Device        string `json:"device"`
	Transport     string `json:"transport"` // RoCE, iWARP or InfiniBand
	Port          string `json:"port"`      // state of its port
	MTU           int    `json:"mtu"`       // bytes
	QueuePairs    int    `json:"queue_pairs"`
	Receives      int    `json:"receives"`       // promised to hosts
	Lanes         int    `json:"lanes"`          // goroutines that poll
	Registered    int64  `json:"registered"`     // bytes of payload memory
	Memory        int64  `json:"control_memory"` // bytes for capsules and other small things
	Registrations uint64 `json:"registrations"`  // of memory: with connections and namespaces, never for a command
	Commands      uint64 `json:"commands"`
	Completions   uint64 `json:"completions"` // polled
	Turns         uint64 `json:"turns"`       // calls to the device by lanes
	Sleeps        uint64 `json:"sleeps"`      // times a lane waited for an interrupt
}

// SubsystemStatus is one NVM subsystem.
type SubsystemStatus struct {
	NQN          string            `json:"nqn"`
	Serial       string            `json:"serial"`
	AllowAnyHost bool              `json:"allow_any_host"`
	Hosts        []string          `json:"hosts,omitempty"`
	Namespaces   []NamespaceStatus `json:"namespaces"` // all that are configured, by NSID
}

// NamespaceState tells whether hosts have a namespace.
type NamespaceState string

const (
	NamespaceServed  NamespaceState = "served"
	NamespaceOpening NamespaceState = "opening" // its device is opened and its index rebuilt
	NamespaceFailed  NamespaceState = "failed"  // it could not be opened; a reload tries again
)

// NamespaceStatus is one namespace. Sizes are in bytes. What comes from an open device is there when it is served.
type NamespaceStatus struct {
	NSID     uint32                `json:"nsid"`
	Type     configs.NamespaceType `json:"type"`
	ReadOnly bool                  `json:"read_only"`
	State    NamespaceState        `json:"state"`
	Error    string                `json:"error,omitempty"` // why it failed
	Device   uring.DeviceInfo      `json:"device"`

	Capacity int64          `json:"capacity"` // that can be in use
	Used     int64          `json:"used"`     // all of it in a block namespace
	LBASize  int64          `json:"lba_size,omitempty"`
	Store    *StoreStatus   `json:"store,omitempty"` // Key Value only
	Commands []CommandStats `json:"commands"`        // all of the command set

	BytesIn     uint64 `json:"bytes_in"`  // data from hosts
	BytesOut    uint64 `json:"bytes_out"` // data to hosts
	MediaErrors uint64 `json:"media_errors"`
}

// StoreStatus is what a Key Value namespace has beside the common.
type StoreStatus struct {
	Keys     int    `json:"keys"`
	MaxValue int64  `json:"max_value"` // bytes
	Hits     uint64 `json:"hits"`      // of Retrieve and Exist
	Misses   uint64 `json:"misses"`
	Corrupt  uint64 `json:"corrupt"` // headers and pieces that failed their checksum

	Pool               string            `json:"pool,omitempty"`
	Eviction           string            `json:"eviction"`
	Quota              int64             `json:"quota,omitempty"`
	Share              int64             `json:"share,omitempty"`
	Segments           map[string]int    `json:"segments"` // by state; of the whole pool
	IndexBytes         int64             `json:"index_bytes"`
	Written            uint64            `json:"written"` // bytes of records that Stores wrote
	Moved              uint64            `json:"moved"`   // bytes of records that reclaiming wrote again
	WriteAmplification float64           `json:"write_amplification"`
	Reclaimed          uint64            `json:"reclaimed"` // segments
	Evictions          map[string]uint64 `json:"evictions"` // values, by reason
	EvictionAge        EvictionAges      `json:"eviction_age"`
	NotAdmitted        uint64            `json:"not_admitted"`
	Scrubbed           uint64            `json:"scrubbed"` // bytes verified in the background; of the whole pool
}

// EvictionAges counts how old values were when they were evicted for capacity.
type EvictionAges struct {
	Sum    uint64          `json:"sum_seconds"`
	Bounds []time.Duration `json:"bounds_ns"` // upper bounds, exclusive
	Counts []uint64        `json:"counts"`    // one for each bound, and one more for what is above
}

// CommandStats counts the commands with one opcode since the namespace was opened.
type CommandStats struct {
	Name    string            `json:"name"`
	Opcode  uint8             `json:"opcode"`
	Errors  uint64            `json:"errors"` // other than a key that is absent or present
	Latency HistogramSnapshot `json:"latency"`
}

// ControllerStatus is one host's association.
type ControllerStatus struct {
	CNTLID    uint16        `json:"cntlid"`
	HostNQN   string        `json:"host_nqn"`
	HostID    string        `json:"host_id"` // hexadecimal
	Subsystem string        `json:"subsystem"`
	Ready     bool          `json:"ready"` // CSTS.RDY
	KATO      int64         `json:"kato_ms"`
	Since     time.Time     `json:"since"`
	Queues    []QueueStatus `json:"queues"` // by QID, the admin queue first
}

// QueueStatus is one queue pair and its connection.
type QueueStatus struct {
	QID      uint16 `json:"qid"`
	Entries  uint32 `json:"entries"`
	InFlight int    `json:"in_flight"` // commands, held Asynchronous Event Requests aside
	Peer     string `json:"peer"`
}

// Status returns a snapshot of the target. It waits for no I/O.
func (t *Target) Status() Status {
	s := Status{Started: t.started, Uptime: time.Since(t.started).Seconds(), Arena: t.arena.Stats(), Copied: t.copied.Load(), Kernel: probe(),
		Ports: []PortStatus{}, Subsystems: []SubsystemStatus{}, Controllers: []ControllerStatus{}}
	t.mu.RLock()
	s.Draining = t.draining.Load()
	for i, p := range t.ports {
		s.Ports = append(s.Ports, PortStatus{ID: i + 1, Transport: transportName(p.TRType), Address: p.Address.String(), Discovery: p.Discovery})
	}
	t.mu.RUnlock()
	for _, f := range t.pool.memories.fabrics() {
		s.Fabrics = append(s.Fabrics, f.Status()...)
	}
	for _, sub := range t.all() {
		s.Subsystems = append(s.Subsystems, sub.status())
	}
	s.Pools = t.pool.storages.status()
	slices.SortFunc(s.Pools, func(a, b PoolStatus) int { return cmp.Compare(a.Name, b.Name) })
	for _, k := range t.controllers() {
		s.Controllers = append(s.Controllers, k.status())
	}
	return s
}

// probe looks at the kernel once: what it finds does not change while the process runs.
var probe = sync.OnceValue(uring.Probe)

func transportName(trtype uint8) string {
	switch trtype {
	case nvmeof.TRTypeTCP:
		return string(configs.TransportTCP)
	case nvmeof.TRTypeRDMA:
		return string(configs.TransportRDMA)
	default:
		return fmt.Sprintf("trtype %d", trtype)
	}
}

// all returns the subsystems but for discovery, by NQN.
func (t *Target) all() (subs []*subsystem) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, nqn := range slices.Sorted(maps.Keys(t.subsystems)) {
		subs = append(subs, t.subsystems[nqn])
	}
	return subs
}

func (s *subsystem) status() SubsystemStatus {
	s.mu.RLock()
	cfg := s.cfg
	failed := maps.Clone(s.failed)
	s.mu.RUnlock()
	st := SubsystemStatus{NQN: s.NQN, Serial: cfg.Serial, AllowAnyHost: cfg.AllowAnyHost, Hosts: slices.Clone(cfg.Hosts), Namespaces: []NamespaceStatus{}}
	for _, c := range cfg.Namespaces {
		ns := NamespaceStatus{NSID: c.NSID, Type: c.Type, ReadOnly: c.ReadOnly, State: NamespaceOpening,
			Device: uring.DeviceInfo{Kind: string(c.Device), Path: c.Path, Size: int64(c.Size)}, Commands: []CommandStats{}}
		if n := s.acquire(c.NSID); n != nil {
			ns.State = NamespaceServed
			n.fill(&ns)
			n.users.Done()
		} else if err := failed[c.NSID]; err != nil {
			ns.State, ns.Error = NamespaceFailed, err.Error()
		}
		st.Namespaces = append(st.Namespaces, ns)
	}
	return st
}

// fill adds what an open namespace knows. The caller has acquired n.
func (n *namespace) fill(s *NamespaceStatus) {
	s.Device = n.dev.Info()
	names := blockCommands
	if n.store != nil {
		names = kvCommands
		k := n.store.Stats()
		s.Capacity, s.Used = k.Capacity, k.Used
		s.Store = &StoreStatus{Keys: k.Keys, MaxValue: k.MaxValue, Hits: k.Hits, Misses: k.Misses, Corrupt: k.Corrupt,
			Pool: n.Pool, Eviction: string(cmp.Or(n.Eviction, configs.EvictClock)), Quota: int64(n.Quota), Share: int64(n.Share), Segments: map[string]int{},
			IndexBytes: k.IndexBytes, Written: k.Written, Moved: k.Moved, WriteAmplification: k.WriteAmplification(), Reclaimed: k.Reclaimed,
			Evictions: map[string]uint64{}, EvictionAge: EvictionAges{k.EvictionAge, kvlayer.EvictionAgeBounds[:], k.EvictionAges[:]}, NotAdmitted: k.NotAdmitted, Scrubbed: k.Scrubbed}
		for i, n := range k.Evictions {
			s.Store.Evictions[kvlayer.EvictionReasons[i]] = n
		}
		for _, d := range n.kv.status().Devices {
			for state, n := range d.Segments {
				s.Store.Segments[state] += n
			}
		}
	} else {
		s.LBASize = 1 << n.lbads
		s.Capacity = int64(n.blocks << n.lbads)
		s.Used = s.Capacity
	}
	for _, c := range names {
		o := n.stats.of(c.opcode)
		s.Commands = append(s.Commands, CommandStats{Name: c.name, Opcode: c.opcode, Errors: o.errors.Load(), Latency: o.latency.snapshot()})
	}
	s.BytesIn, s.BytesOut, s.MediaErrors = n.stats.bytesIn.Load(), n.stats.bytesOut.Load(), n.stats.mediaErrors.Load()
}

type commandName struct {
	opcode uint8
	name   string
}

// The names of the commands in status and metrics.
var (
	kvCommands = []commandName{{nvmeof.OpStore, "store"}, {nvmeof.OpRetrieve, "retrieve"}, {nvmeof.OpRetrieveRange, "retrieve-range"}, {nvmeof.OpExist, "exist"}, {nvmeof.OpExistMany, "exist-many"},
		{nvmeof.OpDelete, "delete"}, {nvmeof.OpList, "list"}, {nvmeof.OpFlush, "flush"}}
	blockCommands = []commandName{{nvmeof.OpWrite, "write"}, {nvmeof.OpRead, "read"}, {nvmeof.OpWriteZeroes, "write-zeroes"},
		{nvmeof.OpDSM, "dsm"}, {nvmeof.OpCompare, "compare"}, {nvmeof.OpVerify, "verify"}, {nvmeof.OpFlush, "flush"}}
)

func (k *Controller) status() ControllerStatus {
	s := ControllerStatus{CNTLID: k.ID, HostNQN: k.HostNQN, HostID: fmt.Sprintf("%x", k.HostID), Subsystem: k.sub.NQN,
		Ready: k.ready(), Since: k.since, Queues: []QueueStatus{}}
	k.mu.Lock()
	defer k.mu.Unlock()
	s.KATO = k.kato.Milliseconds()
	for _, q := range k.all() {
		q.mu.Lock()
		n := q.inflight
		q.mu.Unlock()
		if q == k.admin {
			n = max(0, n-len(k.aers))
		}
		s.Queues = append(s.Queues, QueueStatus{QID: q.id, Entries: q.size, InFlight: n, Peer: q.conn.Name()})
	}
	slices.SortFunc(s.Queues, func(a, b QueueStatus) int { return int(a.QID) - int(b.QID) })
	return s
}

// Ready returns nil when every configured namespace is served and hosts may connect, otherwise one line saying why not.
func (t *Target) Ready() error {
	if t.draining.Load() {
		return errors.New("the target is draining")
	}
	for _, sub := range t.all() {
		for _, n := range sub.status().Namespaces {
			switch n.State {
			case NamespaceFailed:
				return fmt.Errorf("%s: %s", sub.NQN, n.Error)
			case NamespaceOpening:
				return fmt.Errorf("%s: namespace %d is being opened", sub.NQN, n.NSID)
			}
		}
	}
	return nil
}

// Alive asks the target itself for a sign of life: that the locks which commands take are free before ctx ends. No device
// keeps it from that.
func (t *Target) Alive(ctx context.Context) error {
	check := func() error {
		for _, sub := range t.all() {
			sub.status()
		}
		for _, k := range t.controllers() {
			k.status()
		}
		return nil
	}
	if err := t.pulse.start(&t.checks, check).wait(ctx); err != nil {
		return fmt.Errorf("the target %w", err)
	}
	return nil
}

// Health asks every device for a sign of life, the read of one block, until ctx ends. The error names all that have not
// answered and those that are gone, a line each; the target serves what the others have. That a read fails is a sign of
// life too: it is the host's business, and counted.
func (t *Target) Health(ctx context.Context) error {
	type question struct {
		*beat
		of   *disk
		name string
	}
	var asked []question
	for _, sub := range t.all() {
		for _, n := range sub.list() {
			if n = sub.acquire(n.NSID); n == nil {
				continue
			}
			for _, d := range n.disks {
				if !slices.ContainsFunc(asked, func(q question) bool { return q.of == d }) { // namespaces share a pool's
					asked = append(asked, question{d.pulse.start(&n.users, d.check), d, fmt.Sprintf("%s: %s of namespace %d", sub.NQN, d.name(), n.NSID)})
				}
			}
			n.users.Done()
		}
	}
	var errs []error
	for _, q := range asked {
		if err := q.wait(ctx); err != nil {
			errs = append(errs, fmt.Errorf("%s %w", q.name, err))
		}
	}
	return errors.Join(errs...)
}

// disk is a device that is asked for signs of life.
type disk struct {
	uring.Device
	pulse pulse
}

func (d *disk) name() string {
	i := d.Info()
	return cmp.Or(i.Path, i.Kind)
}

// check reads a block.
func (d *disk) check() error {
	// Not of the arena, which hosts may have used up. One block on a multiple of its size lies within two.
	size := d.BlockSize()
	b := make([]byte, 2*size)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & (size - 1)
	op := &uring.Op{Kind: uring.OpRead, Data: b[skip : skip+size]}
	if errors.Is(op.Do(d.Device), uring.ErrGone) {
		return errors.New("is gone")
	}
	return nil
}

// pulse is a check that is asked for now and then. At most one is in progress, however often it is asked for.
type pulse struct {
	mu  sync.Mutex
	now *beat // nil while none is in progress
}

// beat is one check.
type beat struct {
	since time.Time
	done  chan struct{} // closed when there is an err
	err   error
}

// start begins a check, counted among users, if none is in progress.
func (p *pulse) start(users *sync.WaitGroup, check func() error) *beat {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.now == nil {
		b := &beat{since: time.Now(), done: make(chan struct{})}
		p.now = b
		users.Go(func() {
			b.err = check()
			p.mu.Lock()
			p.now = nil
			p.mu.Unlock()
			close(b.done)
		})
	}
	return p.now
}

// wait returns the result, or says that there was none before ctx ended.
func (b *beat) wait(ctx context.Context) error {
	select {
	case <-b.done:
	case <-ctx.Done():
		select {
		case <-b.done: // it was late only here
		default:
			return fmt.Errorf("has not answered for %v", time.Since(b.since).Round(time.Millisecond))
		}
	}
	return b.err
}

// Quantile returns the latency that a share q of the commands, 0 to 1, did not exceed: interpolated inside its bucket,
// 0 when there were none.
func (h HistogramSnapshot) Quantile(q float64) time.Duration {
	rank, below := q*float64(h.Count), 0.0
	var low time.Duration
	for i, high := range h.Bounds[:min(len(h.Bounds), len(h.Counts))] {
		if n := float64(h.Counts[i]); n > 0 && below+n >= rank {
			return low + time.Duration(float64(high-low)*max(0, rank-below)/n)
		} else {
			below += n
		}
		low = high
	}
	if h.Count == 0 {
		return 0
	}
	return low // or above: the last bucket has no bound
}
