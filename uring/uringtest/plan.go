package uringtest

import (
	"math/rand/v2"
	"sync"

	"github.com/kvof/kvof/uring"
)

// Rates say how often things go wrong: the parts of the ops of a kind to which
// they happen, 0 to 1.
type Rates struct {
	ReadError  float64 // half of them stay until the place is written again
	WriteError float64 // of the data, none or a part is written; half of them stay
	FlushError float64
	ReadFlip   float64 // a read returns a wrong bit, this once
	WriteFlip  float64 // a write leaves a wrong bit
	Space      int64   // bytes that a thin device beneath has, for blocks written for the first time; 0: all
	Late       int     // most ops that may overtake one submitted before them
}

// Plan decides on faults by chance. What happens to an op depends on the seed,
// on the op's kind and place and on how many of them there were at that place
// before, so that the same ops meet the same faults, whatever happens between
// them.
type Plan struct {
	seed uint64

	mu    sync.Mutex
	rates Rates
	nth   map[place]uint64
	bad   map[int64]bool // blocks that cannot be read
	stuck map[int64]bool // blocks that cannot be written
	used  map[int64]bool // blocks that were written
	done  Count
}

// Count is the number of faults that there were.
type Count struct {
	Errors int // ops that failed
	Flips  int // bits
}

type place struct {
	kind uring.OpKind
	off  int64
}

// NewPlan returns a plan without faults.
func NewPlan(seed uint64) *Plan {
	return &Plan{seed: seed, nth: map[place]uint64{}, bad: map[int64]bool{}, stuck: map[int64]bool{}, used: map[int64]bool{}}
}

// Set says how often things go wrong from now on. Blocks that cannot be read or written
// are repaired.
func (p *Plan) Set(r Rates) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rates = r
	clear(p.bad)
	clear(p.stuck)
}

// Count returns how many faults there were so far.
func (p *Plan) Count() Count {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.done
}

// Fault is the hook for Wrap.
func (p *Plan) Fault(o *uring.Op) (f Fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	at := place{o.Kind, o.Off}
	if o.Kind == uring.OpFlush {
		at.off = 0
	}
	p.nth[at]++
	rnd := rand.New(rand.NewPCG(p.seed^uint64(at.off)<<3^uint64(at.kind), p.nth[at]))
	chance := func(part float64) bool { return rnd.Float64() < part }
	f.Late = rnd.IntN(p.rates.Late + 1)
	first, end := o.Off/block, (o.Off+int64(len(o.Data))+block-1)/block
	n := max(1, len(o.Data))
	flip := func(b []byte) { b[rnd.IntN(len(b))] ^= 1 << rnd.IntN(8) } // called at most once, later
	switch o.Kind {
	case uring.OpRead:
		if chance(p.rates.ReadError) {
			f.Err = uring.ErrMedia
			if chance(0.5) {
				p.bad[first+rnd.Int64N(max(1, end-first))] = true
			}
		} else if chance(p.rates.ReadFlip) {
			f.Corrupt = flip
			p.done.Flips++
		}
		for b := first; b < end && f.Err == nil; b++ {
			if p.bad[b] {
				f.Err = uring.ErrMedia
			}
		}
	case uring.OpWrite:
		if chance(p.rates.WriteError) {
			f = Fault{Err: uring.ErrMedia, Torn: true, Keep: int64(rnd.IntN(n + 1)), Late: f.Late}
			if chance(0.5) {
				p.stuck[first+rnd.Int64N(max(1, end-first))] = true
			}
		} else if chance(p.rates.WriteFlip) {
			f.Corrupt = flip
			p.done.Flips++
		}
		for b := first; b < end; b++ {
			if p.stuck[b] && f.Err == nil {
				f = Fault{Err: uring.ErrMedia, Torn: true, Keep: (b - first) * block, Late: f.Late}
				break
			}
			delete(p.bad, b)
			if p.used[b] {
				continue
			}
			if p.rates.Space > 0 && int64(len(p.used)+1)*block > p.rates.Space {
				f = Fault{Err: uring.ErrNoSpace, Torn: true, Keep: (b - first) * block, Late: f.Late}
				break
			}
			p.used[b] = true
		}
	case uring.OpFlush:
		if chance(p.rates.FlushError) {
			f.Err = uring.ErrMedia
		}
	case uring.OpDiscard:
		for b := range p.used {
			if b >= o.Off/block && b < (o.Off+o.Len)/block {
				delete(p.used, b)
			}
		}
	}
	if f.Err != nil {
		p.done.Errors++
	}
	return f
}
