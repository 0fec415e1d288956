package kvlayer

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"
	"testing/cryptotest"
	"time"

	"github.com/google/uuid"

	"github.com/kvof/kvof/uring"
	"github.com/kvof/kvof/uring/uringtest"
)

var (
	seedsFlag = flag.Int("seeds", 0, "TestFaults: seeds for each kind of trouble (0: what two seconds allow)")
	seedFlag  = flag.Uint64("seed", 0, "TestFaults: this seed only (0: all)")
)

// trouble is what a run of TestFaults meets.
type trouble struct {
	name  string
	power bool            // cuts take the power, not just the process
	rates uringtest.Rates // of faults while the store is in use
	rot   bool            // bits flip on the device while the store is closed
}

func (c *trouble) damages() bool {
	r := c.rates
	return c.rot || r.ReadError+r.WriteError+r.FlushError+r.ReadFlip+r.WriteFlip > 0 || r.Space > 0
}

var troubles = []trouble{
	{name: "kill"},
	{name: "power", power: true},
	{name: "rot", rot: true},
	{name: "flips", rates: uringtest.Rates{ReadFlip: 0.01, WriteFlip: 0.01}},
	{name: "read errors", rates: uringtest.Rates{ReadError: 0.02}},
	{name: "write errors", rates: uringtest.Rates{WriteError: 0.04, FlushError: 0.05}},
	{name: "write errors and power", power: true, rates: uringtest.Rates{WriteError: 0.04, FlushError: 0.05}},
	{name: "full", rates: uringtest.Rates{Space: 5 << 18}},
	{name: "all", power: true, rot: true, rates: uringtest.Rates{ReadError: 0.005, WriteError: 0.005, FlushError: 0.01, ReadFlip: 0.005, WriteFlip: 0.005}},
}

// TestFaults cuts a store off at a random write, again and again, while its
// device does what devices do. What had completed (and was flushed, when the
// power went) is there; nothing wrong is ever returned. A seed repeats its run:
// the same operations meet the same faults. What goroutines do in between can
// differ a little, so that a failure may need some attempts (-count).
func TestFaults(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // goroutines take their turns in nearly the same order each time
	for _, c := range troubles {
		t.Run(c.name, func(t *testing.T) {
			from, to, end := uint64(1), uint64(*seedsFlag), time.Time{}
			switch {
			case *seedFlag != 0:
				from, to = *seedFlag, *seedFlag
			case to == 0:
				to, end = 50, time.Now().Add(2*time.Second)
			}
			var sum tally
			for seed := from; seed <= to && !t.Failed() && (end.IsZero() || time.Now().Before(end) || sum.lacks(c) != ""); seed++ {
				t.Run(fmt.Sprint(seed), func(t *testing.T) {
					defer func() {
						if t.Failed() {
							t.Logf("once more: go test ./kvlayer -run 'TestFaults/%s' -seed %d", c.name, seed)
						}
					}()
					cryptotest.SetGlobalRandom(t, seed)
					sum.add(runFaults(t, c, seed))
				})
			}
			t.Logf("%+v", sum)
			if *seedFlag == 0 && !t.Failed() {
				sum.check(t, c)
			}
		})
	}
}

// tally is what happened in runs, to show that something did.
type tally struct {
	cuts, stores, found, deletes, flushes int
	pins                                  int // found again after a cut
	lost                                  int // values gone by damage
	missing                               int // values gone for room, or never kept
	faults                                uringtest.Count
	stats                                 Stats // some of it, summed
}

func (s *tally) add(o tally) {
	s.cuts += o.cuts
	s.stores += o.stores
	s.found += o.found
	s.deletes += o.deletes
	s.flushes += o.flushes
	s.pins += o.pins
	s.lost += o.lost
	s.faults.Errors += o.faults.Errors
	s.faults.Flips += o.faults.Flips
	s.missing += o.missing
	s.count(o.stats)
}

func (s *tally) count(o Stats) {
	s.stats.Reclaimed += o.Reclaimed
	s.stats.Moved += o.Moved
	s.stats.NotAdmitted += o.NotAdmitted
	for i := range o.Evictions {
		s.stats.Evictions[i] += o.Evictions[i]
	}
}

// room is how many values the store says it has evicted for room, or not kept.
func room(o Stats) int { return int(o.Evictions[0] + o.NotAdmitted) }

// lacks says what has not happened yet and should in runs enough.
func (s *tally) lacks(c trouble) string {
	r := c.rates
	switch {
	case s.cuts == 0 || s.stores == 0 || s.found == 0 || s.deletes == 0 || s.flushes == 0 || s.pins == 0 || s.missing == 0 || s.stats.Reclaimed == 0 || s.stats.Moved == 0:
		return "something never happened"
	case (r.ReadError+r.WriteError+r.FlushError > 0 || r.Space > 0) && s.faults.Errors == 0:
		return "no op failed"
	case (c.rot || r.ReadFlip+r.WriteFlip > 0) && (s.faults.Flips == 0 || s.lost == 0):
		return "no bit flipped, or none mattered"
	}
	return ""
}

func (s *tally) check(t *testing.T, c trouble) {
	if what := s.lacks(c); what != "" {
		t.Error(what)
	}
	if !c.damages() && !c.power && s.lost > 0 {
		t.Error("lost values without damage")
	}
}

// fate is what is known about a key. Values are known by their numbers; 0 is
// none.
type fate struct {
	now   uint64   // after the last operation that completed
	doubt []uint64 // may be instead, as operations were cut off or failed
	since []uint64 // what it was since the last flush
	loose bool     // the power went while a change of it was not flushed: it may be lost
	pin   bool     // it was pinned, for sure
}

// faultRun is one seed's run.
type faultRun struct {
	*testing.T
	trouble
	tally
	rnd    *rand.Rand
	mems   []uring.Device
	plans  []*uringtest.Plan
	devs   []*uringtest.Device
	dev    *uringtest.Device // the first: they end together
	arena  *uring.Arena
	o      Options
	pool   *Pool
	s      *Store
	keys   []fate
	id     uint64 // of the newest value
	rotten bool   // bits have flipped on a device

	uncounted int // values that went with a cut
}

const late = 6 // ops that may overtake another

func runFaults(t *testing.T, c trouble, seed uint64) tally {
	r := &faultRun{T: t, trouble: c, rnd: rand.New(rand.NewPCG(seed, 0))}
	r.keys = make([]fate, 6+r.rnd.IntN(30))
	r.o = Options{Eviction: Eviction(r.rnd.IntN(5)), Flushed: r.rnd.IntN(4) == 0, Strict: r.rnd.IntN(2) == 0}
	var err error
	if r.arena, err = uring.NewArena(16 << 20); err != nil {
		t.Fatal(err)
	}
	for i := range 1 + r.rnd.IntN(2) {
		mem, err := uring.NewMemory(2<<20 + int64(r.rnd.IntN(16))*128<<10)
		if err != nil {
			t.Fatal(err)
		}
		plan := uringtest.NewPlan(seed + uint64(i)<<32)
		r.mems, r.plans, r.devs = append(r.mems, mem), append(r.plans, plan), append(r.devs, uringtest.Wrap(mem, plan.Fault))
	}
	uringtest.Together(r.devs...)
	r.dev = r.devs[0]
	defer func() {
		if t.Failed() {
			t.Logf("%d devices, eviction %v, flushed %v, strict %v", len(r.devs), r.o.Eviction, r.o.Flushed, r.o.Strict)
		}
	}()
	for range 6 {
		r.open()
		r.check()
		r.dev.CutAfter(1+r.rnd.IntN(200), c.power, r.rnd.Uint64())
		r.meet(c.rates)
		r.use()
		r.end()
	}
	r.open()
	r.check()
	r.end()
	for i, d := range r.devs {
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		n := r.plans[i].Count()
		r.faults.Errors += n.Errors
		r.faults.Flips += n.Flips
	}
	if err := r.arena.Close(); err != nil {
		t.Fatal(err) // a buffer was not put back
	}
	return r.tally
}

// meet has the devices do wrong from now on.
func (r *faultRun) meet(rates uringtest.Rates) {
	rates.Late = late
	for _, p := range r.plans {
		p.Set(rates)
	}
}

// damaged tells whether anything has gone wrong that may cost values.
func (r *faultRun) damaged() bool {
	return r.rotten || slices.ContainsFunc(r.plans, func(p *uringtest.Plan) bool { return p.Count() != uringtest.Count{} })
}

// open opens the store, after some attempts that are cut off or meet faults. One that met faults may do, too.
func (r *faultRun) open() {
	for r.rnd.IntN(3) == 0 {
		rates := uringtest.Rates{}
		if r.rnd.IntN(2) == 0 {
			rates = r.rates
		}
		r.meet(rates)
		stay := r.rnd.IntN(2) == 0
		if !stay {
			r.dev.CutAfter(1+r.rnd.IntN(40), r.power, r.rnd.Uint64())
		}
		err := r.tryOpen()
		if err != nil && !r.dev.Off() && !r.damages() {
			r.Fatalf("open: %v", err)
		}
		if stay && err == nil {
			r.meet(uringtest.Rates{})
			return
		}
		r.end()
	}
	r.meet(uringtest.Rates{})
	if err := r.tryOpen(); err != nil {
		r.Fatalf("open: %v", err)
	}
}

func (r *faultRun) tryOpen() (err error) {
	devs := make([]uring.Device, len(r.devs))
	for i, d := range r.devs {
		devs[i] = d
	}
	if r.pool, err = OpenPool(devs, r.arena, PoolOptions{}); err == nil {
		r.s, err = r.pool.Store(uuid.Nil, r.o)
	}
	return err
}

// end ends the process, or the power.
func (r *faultRun) end() {
	r.dev.Cut()
	if r.s != nil {
		_ = r.s.Close()
	}
	if r.pool != nil {
		_ = r.pool.Close()
	}
	if r.s != nil {
		r.count(r.s.Stats())
		if n := r.missing - room(r.stats) - r.uncounted; n > 0 {
			r.Errorf("%d values are missing that were not evicted", n)
			r.uncounted += n
		}
	}
	r.s, r.pool = nil, nil
	r.cuts++
	r.dev.Restart()
	for r.rot && r.rnd.IntN(2) == 0 {
		mem := r.mems[r.rnd.IntN(len(r.mems))]
		b := mem.View(0, mem.Size())
		b[r.rnd.IntN(len(b))] ^= 1 << r.rnd.IntN(8)
		r.faults.Flips++
		r.rotten = true
	}
	if r.power {
		for i := range r.keys {
			f := &r.keys[i]
			f.loose = f.loose || len(f.since)+len(f.doubt) > 1
			f.doubt = append(f.doubt, f.since...)
			slices.Sort(f.doubt)
			f.doubt = slices.Compact(f.doubt)
		}
	}
}

// use works with the store until the cut.
func (r *faultRun) use() {
	var w [3]Writer // in progress together
	var key [3]int
	var ids [3]uint64
	for step := 0; !r.dev.Off() && step < 300; step++ {
		i, k := r.rnd.IntN(len(w)), r.rnd.IntN(len(r.keys))
		switch n := r.rnd.IntN(21); {
		case n == 20:
			r.pin(k)
		case n == 0:
			r.flush()
		case n < 3:
			r.delete(k)
		case n < 6:
			r.retrieve(k)
		case n < 8:
			r.burst()
		case ids[i] == 0:
			r.id++
			switch err := r.s.Create(&w[i], faultKey(k), int64(sizeOf(r.id)), StoreAlways); {
			case err == nil:
				key[i], ids[i] = k, r.id
				send(&w[i], valueOf(r.id))
			case errors.Is(err, ErrNoSpace):
				r.delete(k)
			case !r.dev.Off() && !r.damages():
				r.Fatalf("create: %v", err)
			}
		case n == 8:
			w[i].Abort()
			ids[i] = 0
		default:
			r.stored(key[i], ids[i], w[i].Commit())
			ids[i] = 0
		}
	}
	for i := range w {
		w[i].Abort()
	}
}

// burst lets some goroutines work at once, each with keys of its own.
func (r *faultRun) burst() {
	done := make(chan tally)
	n := min(4, len(r.keys))
	for g := range n {
		b := *r
		b.tally = tally{}
		b.rnd = rand.New(rand.NewPCG(r.rnd.Uint64(), 0))
		b.id = r.id
		r.id += 4
		go func() {
			for range 4 {
				k := g + n*b.rnd.IntN(len(b.keys)/n)
				switch b.rnd.IntN(4) {
				case 0:
					b.delete(k)
				case 1:
					b.retrieve(k)
				default:
					b.id++
					b.stored(k, b.id, put(b.s, faultKey(k), valueOf(b.id), StoreAlways))
				}
			}
			done <- b.tally
		}()
	}
	for range n {
		r.add(<-done)
	}
}

// stored notes how a Store ended.
func (r *faultRun) stored(k int, id uint64, err error) {
	f := &r.keys[k]
	switch {
	case err == nil && !r.dev.Off():
		r.set(f, id)
		r.stores++
	case errors.Is(err, ErrNoSpace) && !errors.Is(err, uring.ErrNoSpace):
	default:
		f.doubt = append(f.doubt, id)
		r.failed("store", err)
	}
}

func (r *faultRun) delete(k int) {
	f := &r.keys[k]
	existed, err := r.s.Delete(faultKey(k))
	switch {
	case err == nil && !existed:
		if f.now != 0 && !slices.Contains(f.doubt, 0) && !r.dev.Off() {
			r.gone(k, ErrNotFound)
		}
	case err == nil && !r.dev.Off():
		r.set(f, 0)
		r.deletes++
	default:
		f.doubt = append(f.doubt, 0)
		r.failed("delete", err)
	}
}

// pin pins a key, or unpins it.
func (r *faultRun) pin(k int) {
	f := &r.keys[k]
	on := !f.pin && r.rnd.IntN(2) == 0
	f.pin = false
	switch err := r.s.Pin(faultKey(k), on); {
	case err == nil:
		f.pin = on && !r.dev.Off()
	case !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrCorrupt):
		r.failed("pin", err)
	case f.now != 0 && !slices.Contains(f.doubt, 0) && !r.dev.Off():
		r.gone(k, err)
	}
}

func (r *faultRun) flush() {
	if err := r.s.Flush(); err != nil || r.dev.Off() {
		r.failed("flush", err)
		return
	}
	r.flushes++
	for i := range r.keys {
		f := &r.keys[i]
		f.since = append(f.since[:0], f.now)
		f.since = append(f.since, f.doubt...)
	}
}

// failed stops a run in which something failed for no reason.
func (r *faultRun) failed(what string, err error) {
	if err != nil && !r.dev.Off() && !r.damages() {
		r.Errorf("%s: %v", what, err)
	}
}

// retrieve reads a key and compares it with what may be there.
func (r *faultRun) retrieve(k int) {
	f := &r.keys[k]
	got, err := get(r.s, faultKey(k), MaxValue)
	switch {
	case err != nil && r.dev.Off():
	case err != nil:
		for _, id := range append(f.doubt, f.now) {
			if id == 0 && errors.Is(err, ErrNotFound) {
				r.settle(f, 0)
				return
			}
		}
		r.gone(k, err)
	default:
		for _, id := range append(f.doubt, f.now) {
			if id != 0 && len(got) == sizeOf(id) && bytes.Equal(got, valueOf(id)) {
				r.settle(f, id)
				r.found++
				return
			}
		}
		what := "that nobody stored"
		for id := range r.id + 1 {
			if len(got) == sizeOf(id) && bytes.Equal(got, valueOf(id)) {
				what = fmt.Sprint("number ", id)
			}
		}
		r.Errorf("key %d: a wrong value of %d bytes, %s; it is %d, or one of %d", k, len(got), what, f.now, f.doubt)
	}
}

// set notes an operation that completed.
func (r *faultRun) set(f *fate, id uint64) {
	since := append(f.since, f.doubt...) // a power cut can lose the end of what had failed, too
	switch was := f.now; {
	case !r.damaged():
		f.doubt = nil
	case id != 0 && r.o.Eviction == EvictSecondTouch: // not kept, and what was there could not be read
		f.doubt = append(f.doubt, was)
	default:
		f.doubt = nil
	}
	f.now, f.loose, f.pin = id, false, false
	if r.o.Flushed {
		since = since[:0]
	}
	f.since = append(since, id)
}

// settle notes what a key has of all that it may have. With damage the rest may show again: a recovery that could
// not read something forgets what the next one finds.
func (r *faultRun) settle(f *fate, id uint64) {
	f.pin = f.pin && id == f.now
	if !r.damages() && !r.dev.Off() {
		f.now, f.doubt = id, nil
	}
}

// gone accepts that a key's value cannot be had, when there is a reason.
func (r *faultRun) gone(k int, err error) {
	f := &r.keys[k]
	switch {
	case r.damaged() || f.loose:
		r.lost++
		f.doubt = append(f.doubt, 0)
	case r.o.Eviction != EvictNever && !f.pin && errors.Is(err, ErrNotFound):
		r.missing++
		if f.now, f.doubt = 0, nil; r.power {
			f.since = append(f.since, 0)
		}
	default:
		r.Errorf("key %d: %v; it is %d, or one of %d", k, err, f.now, f.doubt)
	}
}

// check looks at all keys, in all the ways there are.
func (r *faultRun) check() {
	listed := map[Key]int64{}
	r.s.List(Key{}, func(k Key, size int64) bool {
		listed[k] = size
		return true
	})
	pinned := map[Key]bool{}
	r.s.Pinned(func(k Key, _ int64) bool {
		pinned[k] = true
		return true
	})
	for k := range r.keys {
		if f := &r.keys[k]; f.pin && pinned[faultKey(k)] {
			r.pins++
		} else if f.pin && !r.power && !r.damages() && len(f.doubt) == 0 {
			r.Errorf("key %d is not pinned any more", k)
		} else {
			f.pin = false
		}
		size, ok := r.s.Exist(faultKey(k))
		n, was := listed[faultKey(k)]
		if evicted := was && !ok && r.o.Eviction != EvictNever; (was != ok || n != size) && !evicted {
			r.Errorf("key %d: Exist says %d, %v; List %d, %v", k, size, ok, n, was)
		}
		delete(listed, faultKey(k))
		r.retrieve(k)
		if r.power { // what is there after a cut is there for good
			r.keys[k].since = append(r.keys[k].since[:0], r.keys[k].now)
			r.keys[k].since = append(r.keys[k].since, r.keys[k].doubt...)
		}
	}
	// A segment that was being reclaimed at the cut may be free, and what was in it not counted.
	if n := r.missing - room(r.stats) - room(r.s.Stats()) - r.uncounted; n > 16*len(r.devs) {
		r.Errorf("%d values are missing that were not evicted", n)
	} else {
		r.uncounted += max(0, n)
	}
	if len(listed) > 0 {
		r.Errorf("List shows keys that nobody stored: %v", listed)
	}
}

func faultKey(k int) Key {
	b := binary.LittleEndian.AppendUint32([]byte("key"), uint32(k))
	key, err := MakeKey(b[:4+k%4]) // of different lengths
	if k > 255 || err != nil {
		panic("too many keys")
	}
	return key
}

const sizeMax = 150_000

// sizeOf is the size in bytes of value number id.
func sizeOf(id uint64) int {
	return [...]int{0, 3000, 60_000, 60_000, 60_000, sizeMax}[rand.New(rand.NewPCG(id, 1)).IntN(6)]
}

func valueOf(id uint64) []byte {
	b := make([]byte, sizeOf(id))
	r := rand.New(rand.NewPCG(id, 2))
	word, step := r.Uint64(), r.Uint64()|1
	for i := range len(b) / 8 {
		binary.LittleEndian.PutUint64(b[8*i:], word)
		word += step
	}
	return b
}
