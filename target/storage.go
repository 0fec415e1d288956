package target

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/kvlayer"
	"github.com/kvof/kvof/uring"
)

// storage is what Key Value namespaces have their values in: the devices of one [[pool]], or one of a namespace's own.
type storage struct {
	cfg    configs.Pool // without a name: a namespace's own
	devs   []uring.Device
	disks  []*disk // devs
	pool   *kvlayer.Pool
	memory bool // all devices are memory: commands never wait for them
	own    hold // of the arena, for good
	users  int  // namespaces; only Apply and Close change it
}

// storages are those that are open, by name. Only Apply and Close change them.
type storages struct {
	mu       sync.Mutex
	want     map[string]configs.Pool
	open     map[string]*storage
	progress func(what string, done, total int)
}

// configure says what pools there are, and returns the names of those that are open as they no longer should be.
func (s *storages) configure(pools []configs.Pool) (changed map[string]bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.want = map[string]configs.Pool{}
	for _, p := range pools {
		s.want[p.Name] = p
	}
	changed = map[string]bool{}
	for name, st := range s.open {
		changed[name] = !st.cfg.Equal(s.want[name])
	}
	return changed
}

// storageOf returns the storage of a Key Value namespace, which it opens if need be; release gives it back.
func (p *pool) storageOf(c configs.Namespace, arena *uring.Arena, log *slog.Logger) (*storage, error) {
	s := &p.storages
	if c.Pool == "" {
		return p.openStorage(configs.Pool{Device: c.Device, Devices: []string{c.Path}, Size: c.Size, Poll: c.Poll, Scrub: c.Scrub}, int(c.Placement), arena, log)
	}
	s.mu.Lock() // but not while a device is waited for
	st, want := s.open[c.Pool], s.want[c.Pool]
	s.mu.Unlock()
	if st == nil {
		var err error
		if st, err = p.openStorage(want, 0, arena, log.With("pool", c.Pool)); err != nil {
			return nil, fmt.Errorf("pool %s: %w", c.Pool, err)
		}
		s.mu.Lock()
		if s.open == nil {
			s.open = map[string]*storage{}
		}
		s.open[c.Pool] = st
		s.mu.Unlock()
	}
	st.users++
	return st, nil
}

// openStorage opens the devices, of several those that can be opened, and the pool on them.
func (p *pool) openStorage(c configs.Pool, placement int, arena *uring.Arena, log *slog.Logger) (st *storage, err error) {
	st = &storage{cfg: c, memory: true}
	defer func() {
		if err != nil {
			st.closeDevices(p)
		}
	}()
	var failed error
	for _, path := range c.Devices {
		dev, err := openDevice(configs.Namespace{Device: c.Device, Path: path, Size: c.Size, Poll: c.Poll, Placement: uint32(placement)}, arena)
		if err != nil {
			failed = errors.Join(failed, err)
			log.Error("cannot open a device", "path", path, "error", err)
			continue
		}
		if view := dev.View(0, dev.Size()); view != nil {
			p.memories.add(payload{view, dev})
		} else {
			st.memory = false
		}
		st.devs, st.disks = append(st.devs, dev), append(st.disks, &disk{Device: dev})
	}
	if len(st.devs) == 0 {
		return st, failed
	}
	if !st.memory {
		large, medium := kvlayer.Buffers(len(st.devs))
		own := hold{large: int64(large), medium: int64(medium)}
		if err := p.takeForGood(own); err != nil {
			return st, err
		}
		st.own = own
	}
	st.pool, err = kvlayer.OpenPool(st.devs, arena, kvlayer.PoolOptions{Log: log, Scrub: int64(c.Scrub), Progress: p.storages.report(c.Name, log)})
	return st, err
}

// report tells about the opening of a pool now and then.
func (s *storages) report(name string, log *slog.Logger) func(done, total int) {
	last := time.Now()
	return func(done, total int) {
		if time.Since(last) < time.Second {
			return
		}
		last = time.Now()
		log.Info("opening a store", "segments", done, "of", total)
		if s.progress != nil {
			s.progress(name, done, total)
		}
	}
}

// OnOpening has f told now and then how far the opening of a store has come, in segments. Before Apply.
func (t *Target) OnOpening(f func(pool string, done, total int)) { t.pool.storages.progress = f }

// release ends a namespace's use of its storage.
func (p *pool) release(st *storage) error {
	s := &p.storages
	if st.cfg.Name != "" {
		if st.users--; st.users > 0 {
			return nil
		}
		s.mu.Lock()
		delete(s.open, st.cfg.Name)
		s.mu.Unlock()
	}
	return errors.Join(st.pool.Close(), st.closeDevices(p))
}

func (st *storage) closeDevices(p *pool) (err error) {
	for _, d := range st.devs {
		if view := d.View(0, d.Size()); view != nil {
			p.memories.remove(view)
		}
		err = errors.Join(err, d.Close())
	}
	p.giveForGood(st.own)
	return err
}

// tenant is a namespace's identity in its storage.
func (st *storage) tenant(c configs.Namespace) uuid.UUID {
	if st.cfg.Name == "" {
		return uuid.Nil // it has all of it, whatever its name
	}
	return c.UUID
}

// evictions are the store's names for the configuration's.
var evictions = map[configs.Eviction]kvlayer.Eviction{
	"": kvlayer.EvictClock, configs.EvictClock: kvlayer.EvictClock, configs.EvictS3FIFO: kvlayer.EvictS3FIFO,
	configs.EvictSecondTouch: kvlayer.EvictSecondTouch, configs.EvictFIFO: kvlayer.EvictFIFO, configs.EvictNever: kvlayer.EvictNever,
}

// policyOf is a Key Value namespace's policy.
func policyOf(c configs.Namespace, log *slog.Logger) kvlayer.Options {
	return kvlayer.Options{MaxValue: int64(c.MaxValue), MaxKeys: int(c.MaxKeys), Eviction: evictions[c.Eviction], Quota: int64(c.Quota), Share: int64(c.Share),
		TTL: time.Duration(c.TTL), Flushed: c.Durability == configs.Flushed, Strict: c.Strict, Log: log}
}

// Pin keeps a key's value from being evicted, or no longer. The error is for a person.
func (t *Target) Pin(nqn string, nsid uint32, key []byte, on bool) error {
	k, err := kvlayer.MakeKey(key)
	if err != nil {
		return err
	}
	t.mu.RLock()
	sub := t.subsystems[nqn]
	t.mu.RUnlock()
	if sub == nil {
		return fmt.Errorf("no subsystem %s", nqn)
	}
	n := sub.acquire(nsid)
	if n == nil {
		return fmt.Errorf("no namespace %d in subsystem %s", nsid, nqn)
	}
	defer n.users.Done()
	if n.store == nil {
		return fmt.Errorf("namespace %d of %s is no Key Value namespace", nsid, nqn)
	}
	if err := n.store.Pin(k, on); err != nil {
		return fmt.Errorf("key %v: %w", k, err)
	}
	return nil
}

// PoolStatus is a pool of devices that is open.
type PoolStatus struct {
	Name     string             `json:"name"`
	Capacity int64              `json:"capacity"` // bytes of records
	Devices  []PoolDeviceStatus `json:"devices"`
}

// PoolDeviceStatus is one device of a pool.
type PoolDeviceStatus struct {
	Member   int              `json:"member"`
	Lost     bool             `json:"lost"`
	Device   uring.DeviceInfo `json:"device"`
	Live     int64            `json:"live"`     // bytes of live records
	Segments map[string]int   `json:"segments"` // by state
}

func (s *storages) status() []PoolStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := []PoolStatus{}
	for _, st := range s.open {
		all = append(all, st.status())
	}
	return all
}

func (st *storage) status() PoolStatus {
	ps := PoolStatus{Name: st.cfg.Name, Capacity: st.pool.Capacity()}
	for _, d := range st.pool.Devices() {
		ds := PoolDeviceStatus{Member: d.Member, Lost: d.Lost, Device: d.Info, Live: d.Live, Segments: map[string]int{}}
		for i, n := range d.States {
			ds.Segments[kvlayer.SegmentStates[i]] = n
		}
		ps.Devices = append(ps.Devices, ds)
	}
	return ps
}
