package client

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kvof/kvof/host"
	"github.com/kvof/kvof/nvmeof"
	"github.com/zeebo/xxh3"
)

// dataWindow bounds the bytes in flight to one target, so that a time-out measures the target and not the line before it. A single
// operation may be larger.
const dataWindow = 64 << 20

// lookupWorkers is how many batches' lookups are in flight to one target.
const lookupWorkers = 64

// target holds a share of the keys.
type target struct {
	client  *Client
	name    string
	seed    uint64
	data    line
	lookups line
	next    atomic.Uint32           // path to try first
	paths   atomic.Pointer[[]*path] // changed under client.mu
}

func newTarget(c *Client, name string) *target {
	t := &target{client: c, name: name, seed: xxh3.HashString(name)}
	t.data.init(t, c.opts.QueueDepth*c.opts.IOQueues, dataWindow)
	t.lookups.init(t, lookupWorkers, 0)
	t.paths.Store(new([]*path))
	return t
}

// score decides which target a key belongs to: the one with the highest. docs/shim.md specifies it.
func (t *target) score(key []byte) uint64 { return xxh3.HashSeed(key, t.seed) }

// up counts the paths that work.
func (t *target) up() (n int) {
	for _, p := range *t.paths.Load() {
		if p.live.Load() != nil {
			n++
		}
	}
	return n
}

// pick returns the path that works with the least in flight, in turns among equals, but not one that was tried; nil if there is none.
// RDMA goes before TCP. With device it is one that carries data from and to the memory of dma-bufs.
func (t *target) pick(tried *path, device bool) (best *path, live *connection) {
	paths := *t.paths.Load()
	if len(paths) == 0 {
		return nil, nil
	}
	first := int(t.next.Add(1)) % len(paths)
	for i := range paths {
		p := paths[(first+i)%len(paths)]
		if l := p.live.Load(); l != nil && p != tried && !(device && l.hostOnly.Load()) && (best == nil || p.better(best)) {
			best, live = p, l
		}
	}
	return best, live
}

// task is what a line carries out: an Op or a lookup.
type task interface {
	cost() uint64 // bytes
	clock() *clock
	inDevice() bool // data is in memory of a dma-buf
	do(ctx context.Context, kv *host.KV) error
	end(s Status, detail uint32)
}

// carry carries out a task on one of the target's paths, on another one when that breaks.
func (t *target) carry(k task) {
	ctx := k.clock().context()
	var tried *path
	for {
		p, live := t.pick(tried, k.inDevice())
		switch {
		case t.client.ctx.Err() != nil:
			k.end(Cancelled, 0)
			return
		case p == nil && k.inDevice() && t.up() > 0:
			k.end(Unsupported, 0)
			return
		case p == nil:
			k.end(Unavailable, 0)
			return
		}
		beat := p.beats.Load()
		p.load.Add(1)
		err := k.do(ctx, live.kv)
		p.load.Add(-1)
		if v, ok := err.(verdict); ok {
			p.beats.Add(1)
			if v == errMismatch {
				t.client.counters.mismatches.Add(1)
			}
			k.end(Status(v), 0)
			return
		}
		s, detail, lost := statusOf(err)
		switch {
		case lost:
			p.drop(live, err)
			if other, _ := t.pick(p, k.inDevice()); tried == nil && other != nil {
				tried = p
				t.client.counters.retries.Add(1)
				continue
			}
		case s != Timeout:
			p.beats.Add(1)
		case p.beats.Load() == beat: // nothing at all has come back since this began
			p.drop(live, errTimeout)
		}
		k.end(s, detail)
		return
	}
}

// line is tasks that wait for their turn at one target.
type line struct {
	target  *target
	run     func()
	workers int    // at most
	window  uint64 // bytes, 0 = no limit

	mu     sync.Mutex
	tasks  []task // from head on
	head   int
	active int
	bytes  uint64 // of those that run
}

func (l *line) init(t *target, workers int, window uint64) {
	l.target, l.workers, l.window = t, workers, window
	l.run = l.work
}

// add never waits.
func (l *line) add(k task) {
	l.mu.Lock()
	l.tasks = append(l.tasks, k)
	start := l.startable()
	if start {
		l.active++
	}
	l.mu.Unlock()
	if start {
		go l.run()
	}
}

// ready tells whether the first task may start now; the caller holds the mutex.
func (l *line) ready() bool {
	return l.head < len(l.tasks) && (l.window == 0 || l.bytes == 0 || l.bytes+l.tasks[l.head].cost() <= l.window)
}

// startable tells whether another worker has something to do.
func (l *line) startable() bool { return l.active < l.workers && l.ready() }

func (l *line) work() {
	l.mu.Lock()
	for l.ready() {
		k := l.tasks[l.head]
		l.tasks[l.head] = nil
		if l.head++; l.head == len(l.tasks) {
			l.tasks, l.head = l.tasks[:0], 0
		} else if l.head >= 1024 && 2*l.head >= len(l.tasks) {
			n := copy(l.tasks, l.tasks[l.head:])
			clear(l.tasks[n:])
			l.tasks, l.head = l.tasks[:n], 0
		}
		cost := k.cost()
		l.bytes += cost
		more := l.startable()
		if more {
			l.active++
		}
		l.mu.Unlock()
		if more {
			go l.run()
		}
		l.target.carry(k)
		l.mu.Lock()
		l.bytes -= cost
	}
	l.active--
	l.mu.Unlock()
}

// clock makes the contexts of operations. All that begin within an eighth of the time-out share one, so that none is made for each.
type clock struct {
	client  *Client
	timeout time.Duration

	mu    sync.Mutex
	now   context.Context
	until time.Time
	stop  context.CancelFunc
}

func (k *clock) context() context.Context {
	t := time.Now()
	k.mu.Lock()
	defer k.mu.Unlock()
	if t.After(k.until) {
		tick := k.timeout / 8
		k.until = t.Add(tick)
		// Nobody stops it: it ends by itself, at its deadline or with the client.
		k.now, k.stop = context.WithTimeoutCause(k.client.ctx, k.timeout+tick, errTimeout)
	}
	return k.now
}

// path is one way to a target: it connects again and again until it is removed.
type path struct {
	target *target
	spec   pathSpec
	cancel context.CancelFunc
	live   atomic.Pointer[connection]
	load   atomic.Int32  // commands in flight
	beats  atomic.Uint64 // commands that the target has answered

	mu    sync.Mutex
	err   error // the last
	since time.Time
}

// connection is a path that works.
type connection struct {
	ctrl *host.Controller
	kv   *host.KV
	lost chan struct{}
	// hostOnly is set when it did not take the memory of some dma-buf.
	hostOnly atomic.Bool
}

func (l *connection) register(r region) error {
	if r.buf != nil {
		return l.ctrl.RegisterDMABuf(r.mem, *r.buf)
	}
	return l.ctrl.Register(r.mem)
}

func (p *path) better(o *path) bool {
	if p.spec.transport != o.spec.transport {
		return p.spec.transport == schemeRDMA
	}
	return p.load.Load() < o.load.Load()
}

func (p *path) note(err error) {
	p.mu.Lock()
	p.err, p.since = err, time.Now()
	p.mu.Unlock()
}

// drop gives a connection up. It does nothing when that was done already.
func (p *path) drop(l *connection, err error) {
	if p.live.CompareAndSwap(l, nil) {
		p.note(err)
		close(l.lost)
	}
}

// run keeps the path connected until ctx ends.
func (p *path) run(ctx context.Context) {
	c := p.target.client
	defer c.wg.Done()
	for ctx.Err() == nil {
		l, err := p.connect(ctx)
		if err != nil {
			if ctx.Err() == nil {
				c.counters.connectFailures.Add(1)
				p.note(err)
				c.changed()
			}
		} else {
			p.note(p.begin(l))
			c.counters.connects.Add(1)
			c.changed()
			select {
			case <-l.lost:
			case <-l.ctrl.Done():
				p.drop(l, l.ctrl.Err())
			case <-ctx.Done():
				p.live.CompareAndSwap(l, nil)
			}
			if ctx.Err() == nil {
				c.counters.disconnects.Add(1)
			}
			c.changed()
			c.wg.Go(func() { _ = l.ctrl.Close() }) // takes seconds when the target hangs
		}
		// Neither all paths at the same moment, nor too soon.
		pause := c.opts.Reconnect/2 + rand.N(c.opts.Reconnect)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

// begin makes a connection known, with the memory that is registered. An error does not keep it from working.
func (p *path) begin(l *connection) error {
	c := p.target.client
	c.mu.Lock()
	defer c.mu.Unlock()
	var errs []error
	for _, r := range c.regions {
		err := l.register(r)
		if r.buf != nil && err != nil {
			l.hostOnly.Store(true)
		}
		if !errors.Is(err, host.ErrDeviceMemory) {
			errs = append(errs, err)
		}
	}
	p.live.Store(l)
	return errors.Join(errs...)
}

func (p *path) connect(ctx context.Context) (*connection, error) {
	o := &p.target.client.opts
	ctx, cancel := context.WithTimeoutCause(ctx, o.ConnectTimeout, fmt.Errorf("%s did not answer within %v", p.spec.addr, o.ConnectTimeout))
	defer cancel()
	tcp := p.spec.transport == schemeTCP // only it has digests
	ctrl, err := host.Connect(ctx, host.Options{Transport: p.spec.transport, Addr: p.spec.addr, SubNQN: p.spec.nqn, HostNQN: o.HostNQN, KATO: o.KeepAlive,
		QueueDepth: o.QueueDepth, IOQueues: o.IOQueues, HeaderDigest: o.HeaderDigest && tcp, DataDigest: o.DataDigest && tcp, DialTimeout: o.ConnectTimeout, Verbs: o.verbs})
	if err != nil {
		return nil, err
	}
	nsid := p.spec.nsid
	if nsid == 0 {
		nsid, err = firstKV(ctx, ctrl)
	}
	var kv *host.KV
	if err == nil {
		kv, err = ctrl.KV(ctx, nsid)
	}
	if err == nil {
		_, err = kv.ExistPrefix(ctx, nil) // finds out how to look keys up
	}
	if err != nil {
		p.target.client.wg.Go(func() { _ = ctrl.Close() })
		return nil, fmt.Errorf("%v: %w", p.spec, err)
	}
	return &connection{ctrl: ctrl, kv: kv, lost: make(chan struct{})}, nil
}

func firstKV(ctx context.Context, ctrl *host.Controller) (uint32, error) {
	all, err := ctrl.Namespaces(ctx)
	if err != nil {
		return 0, err
	}
	i := slices.IndexFunc(all, func(n host.Namespace) bool { return n.CSI == nvmeof.CSIKV })
	if i < 0 {
		return 0, fmt.Errorf("%w: the subsystem has no Key Value namespace", host.ErrNoNamespace)
	}
	return all[i].NSID, nil
}
