package kvlayer

import (
	"errors"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/kvof/kvof/uring"
)

type segmentState uint8

const (
	segmentEmpty segmentState = iota // nothing in it counts
	segmentOpen                      // the log's end
	segmentSealed
)

// segment is what memory knows of one. Store.mu guards all but pins.
type segment struct {
	off     int64 // on the device
	gen     uint64
	tail    int64        // where the next record goes, relative to off
	live    int64        // bytes of live records and of writes in progress
	writers int          // writes in progress
	pins    atomic.Int64 // Readers. Raised only under Store.mu, through a live entry
	state   segmentState
}

// reusable tells that nobody needs anything in g: a segment is free once all in it is dead.
func (s *Store) reusable(g *segment) bool {
	return g != s.open && g.live == 0 && g.writers == 0 && g.pins.Load() == 0
}

// freeSegment counts the free segments and returns one of them: the one unused
// for longest, but one that was used, so that files and memory grow only as
// needed. Under mu.
func (s *Store) freeSegment() (free *segment, n int) {
	for i := range s.segs {
		if g := &s.segs[i]; s.reusable(g) {
			if n++; free == nil || g.gen-1 < free.gen-1 { // 0, never used, wraps to last
				free = g
			}
		}
	}
	return free, n
}

// drop notes that n bytes of live records in g died. Under mu.
func (s *Store) drop(g *segment, n int64) {
	g.live -= n
	s.used -= n
}

func (s *Store) room() int64 {
	if s.open == nil {
		return 0
	}
	return s.super.segSize - s.open.tail
}

// take takes n bytes at the log's end for a write. Under mu.
func (s *Store) take(n int64) (g *segment, off int64, ok bool) {
	if s.room() < n {
		return nil, 0, false
	}
	g = s.open
	off = g.off + g.tail
	g.tail += n
	g.live += n
	g.writers++
	return g, off, true
}

// giveBack undoes take. The space is there again at once if it is the log's
// last, and dead space otherwise, or when a header may lie in it. Under mu.
func (s *Store) giveBack(g *segment, off, n int64, written bool) {
	g.live -= n
	g.writers--
	if g != s.open || written {
		return
	}
	start, end := off-g.off, off-g.off+n
	s.holes[end] = start
	for {
		start, ok := s.holes[g.tail]
		if !ok {
			return
		}
		delete(s.holes, g.tail)
		g.tail = start
	}
}

// waitForSpace is how long a Store waits for Readers and writes in progress
// that stand in the way of making room. Only tests change it.
var waitForSpace = 50 * time.Millisecond

// makeRoom sees to it that the log's end has room for n bytes, or fails with
// ErrNoSpace. The room may be gone again when it returns.
func (s *Store) makeRoom(n int64) error {
	s.alloc.Lock()
	defer s.alloc.Unlock()
	sl, err := s.slot()
	if err != nil {
		return err
	}
	defer s.putSlot(sl)
	var deadline time.Time
	for {
		s.mu.Lock()
		fits, full := s.room() >= n, s.used+n > s.capacity
		free, nfree := s.freeSegment()
		var victim *segment
		var busy bool
		if !fits && !full && nfree < 2 { // the last free segment is for cleaning
			victim, busy = s.victim(n, nfree)
			s.cleaning = victim != nil
		}
		s.mu.Unlock()

		switch {
		case fits:
			return nil
		case full:
			return ErrNoSpace
		case nfree >= 2:
			err = s.advance(sl, free)
		case victim != nil:
			err = s.clean(sl, victim)
		case !busy, !deadline.IsZero() && time.Now().After(deadline):
			return ErrNoSpace
		default:
			if deadline.IsZero() {
				deadline = time.Now().Add(waitForSpace)
			}
			time.Sleep(time.Millisecond)
		}
		if err != nil {
			return err
		}
	}
}

// victim chooses the segment to clean for a write of n bytes: the emptiest one,
// if cleaning it is certain to make room. busy tells that the answer may change
// when Readers or writes in progress end. Under mu.
func (s *Store) victim(n int64, nfree int) (v *segment, busy bool) {
	for i := range s.segs {
		switch g := &s.segs[i]; {
		case g.state == segmentEmpty || s.reusable(g) || g == s.open && nfree == 0:
		case g.writers > 0 || g.live == 0 && g != s.open:
			busy = true
		case v == nil || g.live < v.live:
			v = g
		}
	}
	switch {
	case v == nil:
	case nfree > 0 && v.live+n <= s.super.segSize-block: // all of it fits into the free segment, and n behind it
	case nfree == 0 && v.live <= s.room(): // what an interrupted cleaning left
	default:
		v = nil
	}
	return v, busy
}

// advance seals the open segment and opens g. Under alloc.
func (s *Store) advance(sl *slot, g *segment) error {
	s.mu.Lock()
	old := s.open
	s.open = nil
	clear(s.holes)
	s.mu.Unlock()
	if old != nil {
		if err := s.seal(sl, old); err != nil {
			return err
		}
	}
	// The random half keeps a generation from coming back should the header with the newest get lost.
	s.gen = (s.gen>>32+1)<<32 | uint64(rand.Uint32())
	if err := s.writeSegment(sl, g, s.gen, false); err != nil {
		return err
	}
	s.mu.Lock()
	g.gen, g.tail, g.state = s.gen, block, segmentOpen
	s.open = g
	s.mu.Unlock()
	return nil
}

func (s *Store) writeSegment(sl *slot, g *segment, gen uint64, free bool) error {
	h := segmentHeader{id: s.super.id, index: (g.off - dataStart) / s.super.segSize, gen: gen, free: free}
	putSegment(s.header(sl, g.off, block), s.super.seed, h)
	return s.writeHeader(sl, g.off, block)
}

// seal ends g, which nobody appends to any more: a recovery need not look behind it.
func (s *Store) seal(sl *slot, g *segment) error {
	s.mu.Lock()
	g.state = segmentSealed
	off := g.off + g.tail
	s.mu.Unlock()
	if off == g.off+s.super.segSize {
		return nil
	}
	putRecord(s.header(sl, off, block), s.super.seed, record{kind: recordSeal, off: off, gen: g.gen}, nil)
	return s.writeHeader(sl, off, block)
}

// move is a record on its way out of a segment being cleaned.
type move struct {
	e    entry
	to   *segment
	off  int64
	done bool // its header is written there
}

// clean moves v's live records to the log's end, going on in the free segment
// when that is full, and so makes v free. Under alloc, with cleaning set.
//
// Until v's header says so, v's records count, and no copy has a header; then
// the copies do. The headers are written while no record's header changes
// (moving), so that no recovery finds a value that was replaced or deleted.
func (s *Store) clean(sl *slot, v *segment) (err error) {
	var moves []move
	defer func() {
		s.mu.Lock()
		s.cleaning = false
		for _, m := range moves { // what is left of them could not be moved
			s.giveBack(m.to, m.off, m.e.span(), true)
		}
		s.mu.Unlock()
	}()
	if v == s.open {
		if err := s.nextSegment(sl); err != nil {
			return err
		}
	}

	found, err := s.liveRecords(sl, v)
	if err != nil {
		return err
	}
	for _, e := range found {
		m := move{e: e}
		for ok := false; !ok; {
			s.mu.Lock()
			m.to, m.off, ok = s.take(e.span())
			s.mu.Unlock()
			if !ok {
				if err := s.nextSegment(sl); err != nil {
					return err
				}
			}
		}
		moves = append(moves, m)
		if err := s.copyValue(&sl.op, &m); err != nil {
			return err
		}
	}

	s.moving.Lock()
	defer s.moving.Unlock()
	for i := range moves {
		m := &moves[i]
		if e, ok := s.lookup(m.e.key); !ok || e != m.e {
			continue // replaced or deleted meanwhile
		}
		if m.done, err = s.copyHeader(sl, m); err != nil {
			break
		}
	}
	if err == nil {
		err = s.flush(sl) // the copies are durable before the originals go
	}
	if err == nil {
		err = s.writeSegment(sl, v, v.gen, true)
	}
	if err != nil {
		for i := range moves {
			if m := &moves[i]; m.done {
				e := m.e
				e.off = m.off
				err = errors.Join(err, s.kill(sl, e, m.to.gen))
			}
		}
		return err
	}
	s.mu.Lock()
	for _, m := range moves {
		e := m.e
		if cur, ok := s.index.Get(e); !ok || cur != e {
			s.giveBack(m.to, m.off, e.span(), true)
			continue
		}
		if v.live -= e.span(); m.done {
			e.off = m.off
			s.index.Set(e)
			m.to.writers--
			s.c.moved.Add(uint64(e.span()))
		} else { // its header was unreadable: so would be the value
			s.index.Delete(e)
			s.used -= e.span()
			s.giveBack(m.to, m.off, e.span(), true)
		}
	}
	moves = nil
	s.mu.Unlock()
	s.c.cleaned.Add(1)
	return nil
}

// liveRecords returns the entries of v's live records.
func (s *Store) liveRecords(sl *slot, v *segment) (found []entry, err error) {
	s.moving.Lock()
	defer s.moving.Unlock()
	n := int64(0)
	_, _, err = s.scan(v, &sl.op, s.copyBuf.Data, func(r record) {
		if e, ok := s.lookup(r.key); ok && e.off == r.off {
			found = append(found, e)
			n += e.span()
		}
	})
	s.mu.RLock()
	defer s.mu.RUnlock()
	if err == nil && n != v.live { // some header is damaged: only the index knows that record
		found = found[:0]
		s.index.Scan(func(e entry) bool {
			if s.segmentOf(e.off) == v {
				found = append(found, e)
			}
			return true
		})
	}
	return found, err
}

// nextSegment lets a cleaning go on in a free segment.
func (s *Store) nextSegment(sl *slot) error {
	s.mu.Lock()
	g, _ := s.freeSegment()
	s.mu.Unlock()
	if g == nil {
		return ErrNoSpace
	}
	return s.advance(sl, g)
}

// copyValue copies m's data, as it is: its checksums go with it.
func (s *Store) copyValue(op *uring.Op, m *move) error {
	h := headerLen(int64(m.e.size))
	from, to, n := m.e.off+h, m.off+h, m.e.span()-h
	for step := int64(len(s.copyBuf.Data)); n > 0; n -= step {
		step = min(step, n)
		if s.mem {
			step = n
		}
		b, err := s.read(op, s.copyBuf.Data, from, step)
		if errors.Is(err, uring.ErrMedia) {
			s.c.corrupt.Add(1)
			s.log.Warn("a value became unreadable", "key", m.e.key, "offset", from, "error", err)
			clear(b) // the checksum tells
		} else if err != nil {
			return err
		}
		if s.mem {
			copy(s.dev.View(to, step), b)
		} else if err := s.transfer(op, uring.OpWrite, to, b); err != nil {
			return err
		}
		from, to = from+step, to+step
	}
	return nil
}

// copyHeader writes m's header at its new place; false if the old one is unreadable.
func (s *Store) copyHeader(sl *slot, m *move) (bool, error) {
	n := headerLen(int64(m.e.size))
	b, err := s.read(&sl.op, sl.mem, m.e.off, n)
	r, ok := parseRecord(b, s.super.seed)
	if err != nil || !ok || !r.is(m.e, s.segmentOf(m.e.off).gen) {
		s.c.corrupt.Add(1)
		s.log.Warn("a value's header is unreadable: the value is lost", "key", m.e.key, "offset", m.e.off, "error", err)
		return false, nil
	}
	sums := appendSums(nil, b, r)
	r.off, r.gen = m.off, m.to.gen
	putRecord(s.header(sl, m.off, n), s.super.seed, r, sums)
	return true, s.writeHeader(sl, m.off, n)
}

// restoreReserve ends the cleaning that a crash interrupted, whose copies took
// the segment that is kept free: what is left to move fits behind them.
func (s *Store) restoreReserve(sl *slot) error {
	s.mu.Lock()
	if s.open != nil && s.open.live == 0 {
		s.open = nil
	}
	_, nfree := s.freeSegment()
	var v *segment
	if nfree == 0 {
		v, _ = s.victim(0, 0)
		s.cleaning = v != nil
	}
	s.mu.Unlock()
	switch {
	case v != nil:
		return s.clean(sl, v)
	case nfree == 0:
		s.log.Warn("no segment is free to clean into: space comes back only as whole segments die")
	}
	return nil
}
