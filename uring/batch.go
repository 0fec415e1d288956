package uring

import "sync/atomic"

// Batch is ops that go to a device together, in one call into the kernel. The zero value is ready; what happens for each op allocates
// nothing. A batch is used by one goroutine, its owner.
//
// The owner of ops with Then takes their completions itself, so that none of them wakes another thread: it calls Reap whenever it is
// awake, and sleeps on the files that Hold names. Ops that somebody waits for never rely on it while it is awake: it may wait for
// what they hold.
type Batch struct {
	dev    Device
	ops    [16]*Op
	n      int
	places []*place
}

// place is a batch at a device. It is present when its owner is awake, or sleeps and holds the device's completions: nobody else is
// told of the ends of its ops.
type place struct {
	engine  *engine
	flying  atomic.Int32 // ops with Then in flight; changes with the engine's mutex
	present bool         // engine.owned counts them; changes with the mutex, by the owner alone
	held    bool         // the owner has set engine.reaping; the owner's
}

// Add adds o, for d. Ops before it that are for another device are submitted, as are more than 16.
func (b *Batch) Add(d Device, o *Op) {
	if d != b.dev || b.n == len(b.ops) {
		b.Submit()
		b.dev = d
	}
	b.ops[b.n] = o
	b.n++
}

// Submit submits what was added.
func (b *Batch) Submit() {
	if b.n == 0 {
		return
	}
	ops := b.ops[:b.n]
	b.n = 0
	if d, ok := b.dev.(interface{ waitable() *engine }); ok && ops[0].Then != nil {
		if g := d.waitable(); g != nil {
			p := b.at(g)
			g.come(p)
			g.submit(p, ops)
			return
		}
	}
	b.dev.Submit(ops...)
}

// at returns the batch's place at g.
func (b *Batch) at(g *engine) *place {
	for _, p := range b.places {
		if p.engine == g {
			return p
		}
	}
	kept := b.places[:0] // devices come and go
	for _, p := range b.places {
		if p.held || p.flying.Load() > 0 {
			kept = append(kept, p)
		}
	}
	clear(b.places[len(kept):])
	p := &place{engine: g}
	b.places = append(kept, p)
	return p
}

// Busy tells whether ops with Then are in flight.
func (b *Batch) Busy() bool {
	for _, p := range b.places {
		if p.flying.Load() > 0 {
			return true
		}
	}
	return false
}

// Reap takes what has completed where ops of the batch are in flight, and calls their Thens, with b. These must not add to it.
func (b *Batch) Reap() {
	for _, p := range b.places {
		g := p.engine
		if !p.held {
			if p.flying.Load() == 0 {
				continue
			}
			g.come(p)
			if !g.reaping.CompareAndSwap(false, true) { // before the ring is touched: it may be gone
				continue
			}
		}
		p.held = false
		g.harvest(b)
		g.release()
	}
}

// Hold is called before the owner sleeps. It appends to list, as far as its memory goes, the files that can be read when there is
// something to Reap: the owner is woken by them, until it calls Reap. Completions of other devices are taken by others meanwhile.
func (b *Batch) Hold(list []int32) []int32 {
	for _, p := range b.places {
		switch g := p.engine; {
		case p.flying.Load() == 0:
		case len(list) < cap(list) && g.reaping.CompareAndSwap(false, true):
			p.held = true
			g.ring.hush(true) // who needs to be told otherwise is seen by release
			list = append(list, g.ring.descriptor())
		default:
			g.leave(p)
		}
	}
	return list
}

// waitable returns the engine if a batch's owner can wait for its completions.
func (g *engine) waitable() *engine {
	if g.polled || g.ring.descriptor() < 0 {
		return nil
	}
	return g
}

// begun notes, with the mutex, that an op of p is in flight.
func (g *engine) begun(p *place, o *Op) {
	o.place = p
	p.flying.Add(1)
	if p.present {
		g.owned++
	}
}

// over ends, with the mutex, what begun began.
func (g *engine) over(o *Op) {
	if p := o.place; p != nil {
		o.place = nil
		p.flying.Add(-1)
		if p.present {
			g.owned--
		}
	}
}

// come has p's owner take the completions of its ops.
func (g *engine) come(p *place) {
	if !p.present {
		g.mu.Lock()
		p.present = true
		g.owned += int(p.flying.Load())
		g.mu.Unlock()
	}
}

// leave has others do so.
func (g *engine) leave(p *place) {
	if p.present {
		g.mu.Lock()
		p.present = false
		g.owned -= int(p.flying.Load())
		g.alert()
		g.mu.Unlock()
	}
}
