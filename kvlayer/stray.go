package kvlayer

import (
	"slices"
	"sync"
	"sync/atomic"
)

// stray is a header that may live on the device and that nothing in memory stands for: its write failed, or what
// it was written for did, and it could not be marked dead. A recovery would count it.
type stray struct {
	seg *segment
	rec record // what is to lie there: dead
}

// strays of a store. As long as there is one of a key, no Store or Delete of that key completes; as long as there is one copied
// out of a segment, that segment is not marked free. So a recovery that finds it finds the last value of its key, or
// one whose Store had failed.
type strays struct {
	n    atomic.Int32
	mu   sync.Mutex // a leaf
	list []stray
}

func (s *strays) add(g *segment, r record) {
	r.kind = recordDead
	s.mu.Lock()
	defer s.mu.Unlock()
	s.list = append(s.list, stray{g, r})
	s.n.Store(int32(len(s.list)))
}

// bury marks those that f picks dead on the device. It stops at the first that cannot be.
func (s *strays) bury(sl *slot, f func(*stray) bool) error {
	if s.n.Load() == 0 {
		return nil
	}
	s.mu.Lock()
	list := slices.Clone(s.list)
	s.mu.Unlock()
	for i := range list {
		t := &list[i]
		if !f(t) {
			continue
		}
		if err := t.bury(sl); err != nil {
			return err
		}
		s.mu.Lock()
		s.list = slices.DeleteFunc(s.list, func(o stray) bool { return o == *t })
		s.n.Store(int32(len(s.list)))
		s.mu.Unlock()
	}
	return nil
}

func (t *stray) bury(sl *slot) error {
	g := t.seg
	p := g.dev.p
	g.meta.Lock() // it is not freed meanwhile
	defer g.meta.Unlock()
	p.mu.Lock()
	there := g.gen == t.rec.gen && g.state != segmentFree && g.state != segmentDraining
	p.mu.Unlock()
	if !there || g.dev.out.Load() {
		return nil
	}
	if err := g.writeRecord(sl, t.rec, nil); err != nil {
		return err
	}
	return g.dev.sync()
}

// buryStrays has a device's strays marked dead, should it take writes again.
func (d *device) buryStrays() {
	for _, s := range d.p.all() {
		if s.strays.n.Load() == 0 {
			continue
		}
		sl, err := d.p.slot()
		if err != nil {
			return
		}
		_ = s.strays.bury(sl, func(t *stray) bool { return t.seg.dev == d })
		d.p.putSlot(sl)
	}
}
