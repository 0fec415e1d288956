package kvlayer

import (
	"io"
	"sync/atomic"
	"time"
)

// scrubber reads and verifies all values, round and round.
type scrubber struct {
	rate  atomic.Int64 // bytes a second; 0: off
	bytes atomic.Uint64
}

// SetScrub changes how many bytes a second are read and verified in the background; 0: none.
func (p *Pool) SetScrub(rate int64) { p.scrub.rate.Store(rate) }

func (p *Pool) scrubAll() {
	var r Reader
	for !p.pause(time.Second) {
		for _, s := range p.all() {
			s.index.each(func(es []entry) bool {
				for _, e := range es {
					if e.part() > 0 || p.closed.Load() {
						continue
					}
					rate := p.scrub.rate.Load()
					if rate <= 0 {
						return false
					}
					start := time.Now()
					n := s.verify(&r, e.key())
					p.scrub.bytes.Add(uint64(n))
					if p.pause(time.Duration(float64(n)/float64(rate)*1e9) - time.Since(start)) {
						return false
					}
				}
				return true
			})
		}
	}
}

// pause waits; true tells that the pool ends.
func (p *Pool) pause(d time.Duration) bool {
	if d <= 0 {
		return p.closed.Load()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-p.stop:
		return true
	case <-t.C:
		return false
	}
}

// verify reads k's value. What is wrong with it is counted and logged where it is found.
func (s *Store) verify(r *Reader, k Key) (n int64) {
	if s.open(r, k, 0, MaxValue, 0, 0) != nil {
		return block
	}
	defer r.Close()
	for {
		b, err := r.Next()
		n += int64(len(b.Data))
		b.Put()
		if err != nil {
			if err != io.EOF {
				s.o.Log.Warn("scrub", "key", k, "error", err)
			}
			return n + block
		}
	}
}
