package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kvof/kvof/host"
	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/rdma"
	"github.com/kvof/kvof/shim/keys"
	"golang.org/x/sys/unix"
)

// Options say where and how to connect. The zero value of each field but Targets gives its default.
type Options struct {
	Targets        string     // list of targets: see kvof.h
	HostNQN        string     // this machine's
	Scope          keys.Scope // of hashed keys
	HashAll        bool       // hash all keys
	NoChecksum     bool       // neither make nor verify sums of payloads
	HeaderDigest   bool
	DataDigest     bool
	NoWait         bool          // Open returns at once
	Timeout        time.Duration // of get, put, delete; 3 s
	LookupTimeout  time.Duration // of exist; 500 ms
	ConnectTimeout time.Duration // to bring up one path, and how long Open waits; 5 s
	Reconnect      time.Duration // pause before a broken path is tried again, half to one and a half of it; 1 s
	KeepAlive      time.Duration // KATO; 5 s
	IOQueues       int           // connections of a path; 1
	QueueDepth     int           // commands in flight on one; 128, at most 1023
	MaxOps         int           // operations in flight; 65536

	verbs rdma.Verbs // for tests: nil is the system's
}

func (o *Options) setDefaults() error {
	set := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	set(&o.Timeout, 3*time.Second)
	set(&o.LookupTimeout, 500*time.Millisecond)
	set(&o.ConnectTimeout, 5*time.Second)
	set(&o.Reconnect, time.Second)
	set(&o.KeepAlive, 5*time.Second)
	for _, n := range []struct {
		v          *int
		preset, to int
		name       string
	}{{&o.IOQueues, 1, 1024, "io_queues"}, {&o.QueueDepth, 128, 1023, "queue_depth"}, {&o.MaxOps, 1 << 16, 1 << 24, "max_ops"}} {
		if *n.v == 0 {
			*n.v = n.preset
		}
		if *n.v < 0 || *n.v > n.to {
			return fmt.Errorf("%s is at most %d", n.name, n.to)
		}
	}
	if o.HostNQN != "" {
		if err := nvmeof.CheckNQN(o.HostNQN); err != nil {
			return err
		}
	}
	return nil
}

// Client is a set of targets.
type Client struct {
	opts     Options
	scheme   *keys.Scheme
	counters counters
	data     clock // of get, put, delete
	lookups  clock
	set      atomic.Pointer[[]*target] // by name

	ctx    context.Context // of operations; the cause is ErrClosed
	cancel context.CancelCauseFunc
	links  context.Context // of paths and sources, which end after operations
	unlink context.CancelFunc
	wg     sync.WaitGroup // goroutines but those of lines

	inflight atomic.Int64 // operations
	batches  atomic.Int64 // whose OnDone has not returned
	closed   atomic.Bool
	idle     chan struct{} // cap 1: batches may have become 0
	news     chan struct{} // cap 1: something about the targets changed

	mu      sync.Mutex
	fixed   []targetSpec
	sources []*source
	regions []region                 // registered memory
	devices atomic.Pointer[[]region] // of them those of a dma-buf, nil when there are none
}

// region is registered memory.
type region struct {
	mem []byte       // of a dma-buf only an address and a length
	buf *rdma.DMABuf // with a descriptor of the client's own, or nil
}

func (r region) overlaps(b []byte) bool { return rdma.Overlap(r.mem, b) }

func (r region) close() {
	if r.buf != nil && r.buf.FD >= 0 {
		_ = unix.Close(r.buf.FD)
	}
}

// Open makes a client and waits until every target that is known has a path, for at most ConnectTimeout; it fails if none has by then.
func Open(o Options) (*Client, error) {
	specs, err := parseTargets(o.Targets)
	if err == nil {
		err = o.setDefaults()
	}
	if err != nil {
		return nil, err
	}
	c := &Client{opts: o, scheme: keys.NewScheme(o.Scope, o.HashAll), idle: make(chan struct{}, 1), news: make(chan struct{}, 1)}
	c.ctx, c.cancel = context.WithCancelCause(context.Background())
	c.links, c.unlink = context.WithCancel(context.Background())
	c.data.client, c.data.timeout = c, o.Timeout
	c.lookups.client, c.lookups.timeout = c, o.LookupTimeout
	c.set.Store(new([]*target))
	for _, s := range specs {
		if s.discovery == nil {
			c.fixed = append(c.fixed, s.target)
		} else {
			c.sources = append(c.sources, &source{client: c, spec: s})
		}
	}
	c.assemble()
	for _, s := range c.sources {
		c.wg.Add(1)
		go s.run(c.links)
	}
	if o.NoWait {
		return c, nil
	}
	limit := time.NewTimer(o.ConnectTimeout)
	defer limit.Stop()
	for waiting := true; waiting && !c.connected(); {
		select {
		case <-c.news:
		case <-limit.C:
			waiting = false
		}
	}
	for _, t := range *c.set.Load() {
		if t.up() > 0 {
			return c, nil
		}
	}
	err = fmt.Errorf("%w: %s", ErrUnavailable, strings.Join(c.problems(), "; "))
	c.Close()
	return nil, err
}

// connected tells whether every target is known and has a path.
func (c *Client) connected() bool {
	for _, s := range c.sources {
		s.mu.Lock()
		read := s.read
		s.mu.Unlock()
		if !read {
			return false
		}
	}
	for _, t := range *c.set.Load() {
		if t.up() == 0 {
			return false
		}
	}
	return true
}

// problems are the last errors of all that does not work.
func (c *Client) problems() (all []string) {
	for _, s := range c.sources {
		s.mu.Lock()
		if s.err != nil {
			all = append(all, s.err.Error())
		}
		s.mu.Unlock()
	}
	set := *c.set.Load()
	for _, t := range set {
		for _, p := range *t.paths.Load() {
			p.mu.Lock()
			if p.err != nil {
				all = append(all, p.err.Error())
			}
			p.mu.Unlock()
		}
	}
	if len(set) == 0 {
		all = append(all, "no target is known")
	}
	return all
}

func (c *Client) changed() {
	select {
	case c.news <- struct{}{}:
	default:
	}
}

// assemble makes the set of targets what configuration and discovery say. Targets and paths that stay are not touched.
func (c *Client) assemble() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.links.Err() != nil {
		return
	}
	specs := slices.Clone(c.fixed)
	for _, s := range c.sources {
		s.mu.Lock()
		specs = append(specs, s.found...)
		s.mu.Unlock()
	}
	old := *c.set.Load()
	var set []*target
	for _, spec := range specs {
		if slices.ContainsFunc(set, func(t *target) bool { return t.name == spec.name }) {
			continue // two discovery controllers know it
		}
		var t *target
		if i := slices.IndexFunc(old, func(t *target) bool { return t.name == spec.name }); i >= 0 {
			t = old[i]
		} else {
			t = newTarget(c, spec.name)
		}
		c.setPaths(t, spec.paths)
		set = append(set, t)
	}
	for _, t := range old {
		if !slices.Contains(set, t) {
			c.setPaths(t, nil)
		}
	}
	slices.SortFunc(set, func(a, b *target) int { return strings.Compare(a.name, b.name) })
	c.set.Store(&set)
	c.changed()
}

// setPaths begins new paths and ends those that are gone; the caller holds the mutex.
func (c *Client) setPaths(t *target, specs []pathSpec) {
	old := *t.paths.Load()
	var paths []*path
	for _, spec := range specs {
		if slices.ContainsFunc(paths, func(p *path) bool { return p.spec == spec }) {
			continue
		}
		i := slices.IndexFunc(old, func(p *path) bool { return p.spec == spec })
		if i >= 0 {
			paths = append(paths, old[i])
			continue
		}
		p := &path{target: t, spec: spec, since: time.Now()}
		var ctx context.Context
		ctx, p.cancel = context.WithCancel(c.links)
		c.wg.Add(1)
		go p.run(ctx)
		paths = append(paths, p)
	}
	t.paths.Store(&paths)
	for _, p := range old {
		if !slices.Contains(paths, p) {
			p.cancel()
		}
	}
}

// MaxOps is how many operations can be in flight, and so in one batch.
func (c *Client) MaxOps() int { return c.opts.MaxOps }

// Key maps a caller's key to an NVMe key.
func (c *Client) Key(b []byte) (keys.Key, error) { return c.scheme.Key(b) }

// Submit starts a batch. It never waits. An error means that the batch was not taken.
func (c *Client) Submit(b *Batch) error {
	c.batches.Add(1)
	if c.closed.Load() {
		c.released()
		return ErrClosed
	}
	n := int64(len(b.Ops))
	if c.inflight.Add(n) > int64(c.opts.MaxOps) {
		c.inflight.Add(-n)
		c.released()
		return ErrAgain
	}
	// One more than there are, so that the batch is not over while it is being started.
	b.left.Store(n + 1)
	set := *c.set.Load()
	var few [8]*lookup
	groups := few[:]
	if len(set) > len(few) {
		groups = make([]*lookup, len(set))
	}
	for i := range b.Ops {
		o := &b.Ops[i]
		o.client, o.batch = c, b
		if o.Status == Invalid {
			o.end(Invalid, 0)
			continue
		}
		o.Status, o.Detail, o.Result, o.size = Pending, 0, 0, 0
		for _, d := range o.Data {
			o.size += uint64(len(d))
		}
		o.device = c.inDevice(o.Data)
		t := owner(set, o.Key.Bytes())
		switch {
		case t < 0:
			o.end(Unavailable, 0)
		case o.Kind == Exist || o.Kind == ExistPrefix:
			l := groups[t]
			if l == nil {
				l = lookups.Get().(*lookup)
				l.client, l.prefix = c, len(set) == 1
				groups[t] = l
			}
			l.ops = append(l.ops, o)
			l.prefix = l.prefix && o.Kind == ExistPrefix
		default:
			set[t].data.add(o)
		}
	}
	for t, l := range groups {
		if l != nil {
			set[t].lookups.add(l)
		}
	}
	c.step(b)
	return nil
}

// step ends one of those that a batch waits for.
func (c *Client) step(b *Batch) {
	if b.left.Add(-1) == 0 {
		b.OnDone(b)
		c.released()
	}
}

// owner is the index of the target that a key belongs to, -1 if there is none.
func owner(set []*target, key []byte) int {
	best, at := uint64(0), -1
	for i, t := range set {
		if len(set) == 1 {
			return 0
		}
		if s := t.score(key); at < 0 || s > best {
			best, at = s, i
		}
	}
	return at
}

// released counts a batch as returned.
func (c *Client) released() {
	if c.batches.Add(-1) == 0 && c.closed.Load() {
		select {
		case c.idle <- struct{}{}:
		default:
		}
	}
}

// Close cancels all operations, waits until they have ended, and disconnects. It takes a few seconds when a target hangs.
func (c *Client) Close() {
	if c.closed.Swap(true) {
		return
	}
	c.cancel(ErrClosed)
	for c.batches.Load() > 0 {
		<-c.idle
	}
	c.mu.Lock() // assemble starts nothing any more
	c.unlink()
	c.mu.Unlock()
	c.wg.Wait()
	for _, r := range c.regions {
		r.close()
	}
}

// Register prepares memory, which is not Go's, for the operations that will use it: over RDMA with all devices in use, now and after every
// reconnect. Over TCP there is nothing to prepare. Registering the same region twice does nothing.
//
// With buf the memory is a dma-buf's, and of b only address and length count, which is how operations name it. At least one of the
// connections that are up must take it, or the error is ErrUnsupported; the others carry no data from or to such memory. The client
// duplicates the descriptor; with a negative one the error alone tells whether a dma-buf would be taken.
func (c *Client) Register(b []byte, buf *rdma.DMABuf) (err error) {
	if len(b) == 0 {
		return errors.New("the region has no memory")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range c.regions {
		if r.overlaps(b) {
			if &r.mem[0] == &b[0] && len(r.mem) == len(b) && (r.buf != nil) == (buf != nil) {
				return nil
			}
			return errors.New("the region overlaps another one")
		}
	}
	r := region{mem: b}
	if buf != nil {
		own := *buf
		if own.FD >= 0 {
			if own.FD, err = unix.FcntlInt(uintptr(buf.FD), unix.F_DUPFD_CLOEXEC, 0); err != nil {
				return fmt.Errorf("dma-buf: %w", err)
			}
		}
		r.buf = &own
	}
	if err := c.registerAll(r); err != nil {
		r.close()
		return err
	}
	c.regions = append(c.regions, r)
	c.noteDevices()
	return nil
}

// registerAll registers a region with all connections that work, or none; the caller holds the mutex.
func (c *Client) registerAll(r region) error {
	taken := false
	var refused []*connection
	for l := range c.connections() {
		err := l.register(r)
		switch {
		case err == nil:
			taken = true
		case l.ctrl.Err() != nil: // what has ended needs it no more
		case errors.Is(err, host.ErrDeviceMemory):
			refused = append(refused, l)
		default:
			for l := range c.connections() {
				l.ctrl.Unregister(r.mem)
			}
			return err
		}
	}
	if r.buf != nil && !taken {
		return ErrUnsupported
	}
	for _, l := range refused {
		l.hostOnly.Store(true)
	}
	return nil
}

// noteDevices makes the regions of dma-bufs known to Submit; the caller holds the mutex.
func (c *Client) noteDevices() {
	var devices []region
	for _, r := range c.regions {
		if r.buf != nil {
			devices = append(devices, r)
		}
	}
	if devices == nil {
		c.devices.Store(nil)
		return
	}
	c.devices.Store(&devices)
}

// inDevice tells whether any of an operation's memory is a dma-buf's.
func (c *Client) inDevice(data [][]byte) bool {
	devices := c.devices.Load()
	if devices == nil {
		return false
	}
	for _, r := range *devices {
		if slices.ContainsFunc(data, r.overlaps) {
			return true
		}
	}
	return false
}

// Unregister ends the registration of the region with this first byte.
func (c *Client) Unregister(first *byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := slices.IndexFunc(c.regions, func(r region) bool { return &r.mem[0] == first })
	if i < 0 {
		return errors.New("no region begins at this address")
	}
	for l := range c.connections() {
		l.ctrl.Unregister(c.regions[i].mem)
	}
	c.regions[i].close()
	c.regions = slices.Delete(c.regions, i, i+1)
	c.noteDevices()
	return nil
}

// connections are those that work; the caller holds the mutex, so that none is added meanwhile.
func (c *Client) connections() iter.Seq[*connection] {
	return func(yield func(*connection) bool) {
		for _, t := range *c.set.Load() {
			for _, p := range *t.paths.Load() {
				if l := p.live.Load(); l != nil && !yield(l) {
					return
				}
			}
		}
	}
}

type counters struct {
	hits, misses, getBytes, puts, exists, putBytes, existHits, existMisses, deletes atomic.Uint64
	mismatches, truncated, unavailable, timeouts, full, errors, cancelled           atomic.Uint64
	connects, disconnects, connectFailures, retries                                 atomic.Uint64
}

// count counts an operation by how it ended.
func (c *Client) count(o *Op) {
	n := &c.counters
	switch o.Status {
	case OK:
		switch o.Kind {
		case Get:
			n.hits.Add(1)
			n.getBytes.Add(o.Result)
		case Put:
			n.puts.Add(1)
			n.putBytes.Add(o.size)
		case Delete:
			n.deletes.Add(1)
		default:
			n.existHits.Add(1)
		}
	case Exists:
		n.exists.Add(1)
	case Miss:
		switch o.Kind {
		case Get:
			n.misses.Add(1)
		case Delete:
			n.deletes.Add(1)
		default:
			n.existMisses.Add(1)
		}
	case Truncated:
		n.truncated.Add(1)
	case Unavailable:
		n.unavailable.Add(1)
	case Timeout:
		n.timeouts.Add(1)
	case Full:
		n.full.Add(1)
	case Cancelled:
		n.cancelled.Add(1)
	default:
		n.errors.Add(1)
	}
}

// Counters are what struct kvof_counters has.
type Counters struct {
	Targets, TargetsUp, Paths, PathsUp, InFlight                                             uint32
	GetHits, GetMisses, GetBytes, Puts, PutExists, PutBytes, ExistHits, ExistMisses, Deletes uint64
	Mismatches, Truncated, Unavailable, Timeouts, Full, Errors, Cancelled                    uint64
	Connects, Disconnects, ConnectFailures, Retries                                          uint64
}

// Counters returns what happened so far.
func (c *Client) Counters() Counters {
	n := &c.counters
	s := Counters{InFlight: uint32(max(0, c.inflight.Load())),
		GetHits: n.hits.Load(), GetMisses: n.misses.Load(), GetBytes: n.getBytes.Load(), Puts: n.puts.Load(), PutExists: n.exists.Load(), PutBytes: n.putBytes.Load(),
		ExistHits: n.existHits.Load(), ExistMisses: n.existMisses.Load(), Deletes: n.deletes.Load(),
		Mismatches: n.mismatches.Load(), Truncated: n.truncated.Load(), Unavailable: n.unavailable.Load(), Timeouts: n.timeouts.Load(), Full: n.full.Load(),
		Errors: n.errors.Load(), Cancelled: n.cancelled.Load(),
		Connects: n.connects.Load(), Disconnects: n.disconnects.Load(), ConnectFailures: n.connectFailures.Load(), Retries: n.retries.Load()}
	for _, t := range *c.set.Load() {
		s.Targets++
		up := t.up()
		if s.PathsUp += uint32(up); up > 0 {
			s.TargetsUp++
		}
		s.Paths += uint32(len(*t.paths.Load()))
	}
	return s
}

// Description is a client's targets for people: its JSON is what kvof_describe returns.
type Description struct {
	Targets   []TargetDescription    `json:"targets"`
	Discovery []DiscoveryDescription `json:"discovery,omitempty"`
}

// TargetDescription is one target.
type TargetDescription struct {
	Name  string            `json:"name"`
	Paths []PathDescription `json:"paths"`
}

// PathDescription is one path of a target.
type PathDescription struct {
	Transport string    `json:"transport"`
	Address   string    `json:"address"`
	Subsystem string    `json:"subsystem"`
	Up        bool      `json:"up"`
	NSID      uint32    `json:"nsid,omitempty"`
	Since     time.Time `json:"since"` // of this state or error
	Error     string    `json:"error,omitempty"`
	InFlight  int32     `json:"in_flight"`
}

// DiscoveryDescription is one discovery source.
type DiscoveryDescription struct {
	Addresses []string `json:"addresses"`
	Read      bool     `json:"read"` // at least once
	Error     string   `json:"error,omitempty"`
}

// Describe returns the targets' present state.
func (c *Client) Describe() Description {
	d := Description{Targets: []TargetDescription{}}
	for _, t := range *c.set.Load() {
		x := TargetDescription{Name: t.name, Paths: []PathDescription{}}
		for _, p := range *t.paths.Load() {
			y := PathDescription{Transport: p.spec.transport, Address: p.spec.addr, Subsystem: p.spec.nqn, NSID: p.spec.nsid, InFlight: p.load.Load()}
			if l := p.live.Load(); l != nil {
				y.Up, y.NSID = true, l.kv.Info().NSID
			}
			p.mu.Lock()
			if y.Since = p.since; p.err != nil {
				y.Error = p.err.Error()
			}
			p.mu.Unlock()
			x.Paths = append(x.Paths, y)
		}
		d.Targets = append(d.Targets, x)
	}
	for _, s := range c.sources {
		x := DiscoveryDescription{Addresses: s.spec.discovery}
		s.mu.Lock()
		if x.Read = s.read; s.err != nil {
			x.Error = s.err.Error()
		}
		s.mu.Unlock()
		d.Discovery = append(d.Discovery, x)
	}
	return d
}

// String is the description as JSON.
func (d Description) String() string {
	b, err := json.Marshal(d)
	if err != nil {
		return err.Error() // cannot be: it has no type that fails
	}
	return string(b)
}
