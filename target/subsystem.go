package target

import (
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/uring"
)

// subsystem is one NVM subsystem, or the discovery subsystem.
type subsystem struct {
	NQN       string
	discovery bool

	mu         sync.RWMutex
	cfg        configs.Subsystem
	namespaces map[uint32]*namespace
	failed     map[uint32]error // why configured namespaces could not be opened
}

func newSubsystem(c configs.Subsystem) *subsystem {
	return &subsystem{NQN: c.NQN, cfg: c, namespaces: map[uint32]*namespace{}, failed: map[uint32]error{}}
}

// allows tells whether a host may connect.
func (s *subsystem) allows(host string) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.cfg.AllowAnyHost || slices.Contains(s.cfg.Hosts, host)
}

// serial is the serial number of the subsystem's controllers.
func (s *subsystem) serial() string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.cfg.Serial
}

// acquire returns a namespace for one command, which calls users.Done when it is over; nil if there is none.
func (s *subsystem) acquire(nsid uint32) *namespace {
	s.mu.RLock()
	defer s.mu.RUnlock()
	n := s.namespaces[nsid]
	if n != nil {
		n.users.Add(1)
	}
	return n
}

// list returns the namespaces, by NSID.
func (s *subsystem) list() []*namespace {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var ns []*namespace
	for _, id := range slices.Sorted(maps.Keys(s.namespaces)) {
		ns = append(ns, s.namespaces[id])
	}
	return ns
}

// apply opens, replaces and closes namespaces so that they match c, and returns the identifiers of those that
// changed. A namespace that cannot be opened is left out.
func (s *subsystem) apply(c configs.Subsystem, arena *uring.Arena, p *pool, log *slog.Logger) (changed []uint32, err error) {
	want := map[uint32]configs.Namespace{}
	for _, n := range c.Namespaces {
		want[n.NSID] = n
	}
	s.mu.Lock()
	s.cfg = c
	clear(s.failed)
	var closing []*namespace
	for id, n := range s.namespaces {
		if w, ok := want[id]; ok && w == n.Namespace {
			delete(want, id)
			continue
		}
		delete(s.namespaces, id)
		closing = append(closing, n)
		changed = append(changed, id)
	}
	s.mu.Unlock()
	var errs []error
	for _, n := range closing {
		errs = append(errs, n.close())
	}
	for _, id := range slices.Sorted(maps.Keys(want)) {
		n, err := openNamespace(want[id], arena, p, log.With("subsystem", s.NQN, "nsid", id))
		if err != nil {
			errs = append(errs, err)
			s.mu.Lock()
			s.failed[id] = err
			s.mu.Unlock()
			continue
		}
		s.mu.Lock()
		s.namespaces[id] = n
		s.mu.Unlock()
		if !slices.Contains(changed, id) {
			changed = append(changed, id)
		}
	}
	return changed, errors.Join(errs...)
}

// leave closes the namespaces in pools that have changed.
func (s *subsystem) leave(changed map[string]bool) error {
	s.mu.Lock()
	var closing []*namespace
	for id, n := range s.namespaces {
		if n.Pool != "" && changed[n.Pool] {
			delete(s.namespaces, id)
			closing = append(closing, n)
		}
	}
	s.mu.Unlock()
	var err error
	for _, n := range closing {
		err = errors.Join(err, n.close())
	}
	return err
}

// removeAll takes all namespaces out; the caller closes them.
func (s *subsystem) removeAll() (ns []*namespace) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, n := range s.namespaces {
		ns = append(ns, n)
		delete(s.namespaces, id)
	}
	return ns
}
