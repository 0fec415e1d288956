package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/kvof/kvof/host"
	"github.com/kvof/kvof/kvlayer"
	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/uring"
)

// replay plays a trace of requests to a cache of context blocks: each request retrieves its blocks, then stores those
// that were not there.
type replay struct {
	c        *client
	target   bool
	capacity capacityFlag
	eviction evictionFlag
	size     sizeFlag // of a value, bytes
	requests int      // of the trace; 0: all
	keep     bool
}

func newReplayCommand() *cobra.Command {
	r := &replay{capacity: capacityFlag{part: 0.05}, size: 2 << 20}
	cmd := &cobra.Command{
		Use:   "replay TRACE",
		Short: "Replay a trace of cache requests, for hit ratios, writes and latencies",
		Long: "Replay a trace of cache requests: JSON lines with hash_ids, the blocks of a request from its first to its last,\n" +
			"as Mooncake published them. Each request retrieves its blocks, then stores those that were missing; the next one\n" +
			"begins when it is done. The cache is a store of kvof's own, on a simulated drive in memory that keeps only what is\n" +
			"not zero, or with --target a Key Value namespace.",
		Args: cobra.ExactArgs(1),
	}
	r.c = newClient(cmd, "depth", 1)
	f := cmd.Flags()
	f.BoolVar(&r.target, "target", false, "replay against a target; keys stored are deleted at the end")
	f.Var(&r.capacity, "capacity", "of the store: a percentage of the different blocks, or bytes")
	f.Var(&r.eviction, "eviction", "of the store: "+strings.Join(evictions(), ", "))
	f.Var(&r.size, "value-size", "bytes of a block's value")
	f.IntVar(&r.requests, "requests", 0, "replay only so many requests")
	f.BoolVar(&r.keep, "keep", false, "with --target: leave the keys stored")
	for _, own := range []string{"capacity", "eviction"} {
		cmd.MarkFlagsMutuallyExclusive("target", own)
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error { return r.run(cmd.Context(), args[0]) }
	return cmd
}

// capacityFlag is a number of bytes, or a part of the different blocks.
type capacityFlag struct {
	bytes sizeFlag
	part  float64 // 0 to 1, if bytes is 0
}

func (c *capacityFlag) String() string {
	if c.bytes > 0 {
		return c.bytes.String()
	}
	return strconv.FormatFloat(c.part*100, 'g', -1, 64) + "%"
}
func (c *capacityFlag) Type() string { return "SIZE" }
func (c *capacityFlag) Set(v string) error {
	if p, ok := strings.CutSuffix(v, "%"); ok {
		part, err := strconv.ParseFloat(p, 64)
		if err != nil || !(part > 0 && part <= 1000) {
			return fmt.Errorf("%q is not a percentage such as 5%%", v)
		}
		*c = capacityFlag{part: part / 100}
		return nil
	}
	if err := c.bytes.Set(v); err != nil || c.bytes == 0 {
		return fmt.Errorf("%q is neither a percentage such as 5%% nor a size such as 20GiB", v)
	}
	return nil
}

// evictionFlag is a way of eviction, by its name.
type evictionFlag kvlayer.Eviction

func evictions() (names []string) {
	for e := kvlayer.EvictClock; e <= kvlayer.EvictNever; e++ {
		names = append(names, e.String())
	}
	return names
}

func (e *evictionFlag) String() string { return kvlayer.Eviction(*e).String() }
func (e *evictionFlag) Type() string   { return "MODE" }
func (e *evictionFlag) Set(v string) error {
	i := slices.Index(evictions(), v)
	if i < 0 {
		return fmt.Errorf("%q is not one of %s", v, strings.Join(evictions(), ", "))
	}
	*e = evictionFlag(i)
	return nil
}

// trace is what a trace asks for.
type trace struct {
	requests [][]uint64 // block ids
	blocks   int        // of all requests
	unique   int        // different ones
}

// maxTraceLine bounds a line of a trace, in bytes: a request of a million blocks.
const maxTraceLine = 16 << 20

// readTrace reads JSON lines with hash_ids, at most so many if limit is not 0.
func readTrace(r io.Reader, limit int) (*trace, error) {
	t := &trace{}
	seen := make(map[uint64]struct{})
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxTraceLine)
	for n := 1; lines.Scan() && (limit == 0 || len(t.requests) < limit); n++ {
		if len(lines.Bytes()) == 0 {
			continue
		}
		var request struct {
			IDs []uint64 `json:"hash_ids"`
		}
		if err := json.Unmarshal(lines.Bytes(), &request); err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		if request.IDs == nil {
			return nil, fmt.Errorf("line %d has no hash_ids", n)
		}
		t.requests = append(t.requests, request.IDs)
		t.blocks += len(request.IDs)
		for _, id := range request.IDs {
			seen[id] = struct{}{}
		}
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	if t.blocks == 0 {
		return nil, errors.New("it asks for no blocks")
	}
	t.unique = len(seen)
	return t, nil
}

// tally counts what became of the requests.
type tally struct {
	blocks  int
	hits    int
	prefix  int // hits whose request found all its earlier blocks, too
	refused int // Stores for which there was no room
}

// count counts the blocks of a request that were found.
func (t *tally) count(found []bool) {
	whole := true
	for _, f := range found {
		t.blocks++
		if whole = whole && f; f {
			t.hits++
		}
		if whole {
			t.prefix++
		}
	}
}

func (t *tally) ratio(n int) float64 { return float64(n) / float64(max(1, t.blocks)) }

// cache is what is replayed against. Its methods are called by one goroutine of each worker number.
type cache interface {
	retrieve(worker int, id uint64) (found bool, err error)
	store(worker int, id uint64) (kept bool, err error) // false: there is no room
}

func (r *replay) run(ctx context.Context, path string) error {
	if r.size < blockHead || r.size > kvlayer.MaxValue || r.c.depth < 1 || r.c.queues < 1 || r.requests < 0 {
		return usageError{errors.New("a number is out of range")}
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	t, err := readTrace(f, r.requests)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	out := &replayJSON{Trace: path, Requests: len(t.requests), Blocks: t.blocks, Unique: t.unique, ValueSize: int64(r.size)}
	if r.target {
		return r.againstTarget(ctx, t, out)
	}
	return r.againstStore(ctx, t, out)
}

// play replays t against c.
func (r *replay) play(ctx context.Context, t *trace, c cache, out *replayJSON, after func()) error {
	workers := r.c.depth * r.c.queues
	var hists [2][]*hdrhistogram.Histogram // of retrieves and stores, by worker
	for i := range hists {
		for range workers {
			hists[i] = append(hists[i], hdrhistogram.New(100, int64(100*time.Second), 3))
		}
	}
	timed := func(kind, worker int, id uint64, do func(int, uint64) (bool, error)) (bool, error) {
		start := time.Now()
		ok, err := do(worker, id)
		if !ok || err != nil { // a miss costs nothing
			return false, err
		}
		if hists[kind][worker].RecordValue(int64(time.Since(start))) != nil {
			return false, fmt.Errorf("an operation took %v", time.Since(start))
		}
		return true, nil
	}
	var sum tally
	var found, kept []bool
	start := time.Now()
	for _, ids := range t.requests {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		found = slices.Grow(found[:0], len(ids))[:len(ids)]
		if err := share(workers, len(ids), func(w, i int) (err error) {
			found[i], err = timed(0, w, ids[i], c.retrieve)
			return err
		}); err != nil {
			return err
		}
		sum.count(found)
		missing := ids[:0] // the trace is not needed again
		for i, id := range ids {
			if !found[i] {
				missing = append(missing, id)
			}
		}
		kept = slices.Grow(kept[:0], len(missing))[:len(missing)]
		if err := share(workers, len(missing), func(w, i int) (err error) {
			kept[i], err = timed(1, w, missing[i], c.store)
			return err
		}); err != nil {
			return err
		}
		for _, ok := range kept {
			if !ok {
				sum.refused++
			}
		}
		after()
	}
	elapsed := time.Since(start)
	out.Seconds = elapsed.Seconds()
	for i, row := range []*benchRow{&out.Retrieve, &out.Store} {
		for _, h := range hists[i][1:] {
			hists[i][0].Merge(h)
		}
		*row = newBenchRow(hists[i][0], int64(r.size), elapsed)
	}
	out.Hits, out.PrefixHits, out.Refused = sum.hits, sum.prefix, sum.refused
	out.HitRatio, out.PrefixHitRatio = sum.ratio(sum.hits), sum.ratio(sum.prefix)
	out.Ceiling = sum.ratio(t.blocks - t.unique)
	out.Stored = sum.blocks - sum.hits - sum.refused
	out.BytesStored = int64(out.Stored) * int64(r.size)
	return nil
}

// share has workers do all n things; the first error ends it.
func share(workers, n int, do func(worker, i int) error) error {
	if workers = min(workers, n); workers <= 1 {
		for i := range n {
			if err := do(0, i); err != nil {
				return err
			}
		}
		return nil
	}
	var next atomic.Int64
	errs := make([]error, workers)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(n) && errs[w] == nil; i = next.Add(1) - 1 {
				if errs[w] = do(w, int(i)); errs[w] != nil {
					next.Store(int64(n))
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// A block's value begins with its id and size, and the rest is zeroes.
const blockHead = 16 // bytes

func putHead(b []byte, id uint64, size sizeFlag) {
	binary.LittleEndian.PutUint64(b, id)
	binary.LittleEndian.PutUint64(b[8:], uint64(size))
}

func isHead(b []byte, id uint64, size sizeFlag) bool {
	return len(b) >= blockHead && binary.LittleEndian.Uint64(b) == id && binary.LittleEndian.Uint64(b[8:]) == uint64(size)
}

// blockKey is "replay--" and the block's id.
func blockKey(id uint64) (k [nvmeof.MaxKeyLen]byte) {
	copy(k[:], "replay--")
	binary.BigEndian.PutUint64(k[8:], id)
	return k
}

func wrongBlock(id uint64) error {
	return fmt.Errorf("WRONG DATA: block %d is not what was stored", id)
}

// againstStore replays against a store of its own.
func (r *replay) againstStore(ctx context.Context, t *trace, out *replayJSON) (err error) {
	want := int64(r.capacity.bytes)
	if want == 0 {
		want = int64(r.capacity.part * float64(t.unique) * float64(r.size))
	}
	arena, err := uring.NewArena(64 << 20)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, arena.Close()) }()
	s, dev, err := r.openStore(arena, max(1, want/int64(r.size)))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	c := &storeCache{s: s, size: r.size, workers: make([]storeWorker, r.c.depth*r.c.queues)}
	held := 0.0 // values, summed over the second half of the requests, when the store is full
	n := 0
	if err := r.play(ctx, t, c, out, func() {
		if n++; n > len(t.requests)/2 {
			held += float64(s.Stats().Keys)
		}
	}); err != nil {
		return err
	}
	st := s.Stats()
	out.Eviction = r.eviction.String()
	out.Capacity = want
	out.Kept = held / float64(len(t.requests)-len(t.requests)/2)
	out.NotAdmitted = int(st.NotAdmitted)
	out.BytesWritten = dev.written.Load()
	if kept := out.BytesStored - int64(out.NotAdmitted)*int64(r.size); kept > 0 {
		out.WriteAmplification = float64(out.BytesWritten) / float64(kept)
	}
	return r.report(out)
}

// openStore opens a new store that holds so many values on average. Its device is made larger until there is room for
// them and for two segments, which are being filled or kept free.
func (r *replay) openStore(arena *uring.Arena, values int64) (*kvlayer.Store, *simulated, error) {
	const extent = 4 << 20 // bytes of a value after which a record with a block of its own begins
	parts := (int64(r.size) + extent - 1) / extent
	need := values * ((int64(r.size)+simulatedBlock-1)&^(simulatedBlock-1) + parts*simulatedBlock)
	for size := need + 16<<20; ; {
		dev := newSimulated(size &^ (simulatedBlock - 1))
		s, err := kvlayer.Open(dev, arena, kvlayer.Options{Eviction: kvlayer.Eviction(r.eviction)})
		if err != nil {
			return nil, nil, err
		}
		st := s.Stats()
		missing := need + 2*st.SegmentSize - st.Capacity
		if missing <= 0 && st.MaxValue >= int64(r.size) {
			return s, dev, nil
		}
		if err := s.Close(); err != nil {
			return nil, nil, err
		}
		size += max(1<<20, missing)
	}
}

// storeCache is a store of its own.
type storeCache struct {
	s       *kvlayer.Store
	size    sizeFlag
	workers []storeWorker
}

type storeWorker struct {
	w kvlayer.Writer
	r kvlayer.Reader
}

func (c *storeCache) key(id uint64) kvlayer.Key {
	b := blockKey(id)
	k, _ := kvlayer.MakeKey(b[:]) // never fails
	return k
}

func (c *storeCache) retrieve(worker int, id uint64) (bool, error) {
	r := &c.workers[worker].r
	if err := c.s.Open(r, c.key(id), int64(c.size)); errors.Is(err, kvlayer.ErrNotFound) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	defer r.Close()
	for first := true; ; first = false {
		b, err := r.Next()
		if err == io.EOF {
			return true, nil
		}
		if err != nil {
			return false, err
		}
		if first && !isHead(b.Data, id, c.size) {
			err = wrongBlock(id)
		}
		b.Put()
		if err != nil {
			return false, err
		}
	}
}

func (c *storeCache) store(worker int, id uint64) (bool, error) {
	w := &c.workers[worker].w
	err := c.s.Create(w, c.key(id), int64(c.size), kvlayer.StoreAlways)
	if err == nil {
		for first := true; ; first = false {
			b := w.Buffer(1 << 20)
			if b == nil {
				break
			}
			clear(b)
			if first {
				putHead(b, id, c.size)
			}
			w.Filled(len(b))
		}
		err = w.Commit()
	}
	if errors.Is(err, kvlayer.ErrNoSpace) {
		return false, nil
	}
	return err == nil, err
}

// againstTarget replays against a Key Value namespace.
func (r *replay) againstTarget(ctx context.Context, t *trace, out *replayJSON) (err error) {
	kv, closer, err := r.c.openKV(ctx)
	if err != nil {
		return err
	}
	defer closer.Close()
	if m := kv.MaxValue(); m != 0 && uint64(r.size) > m {
		return fmt.Errorf("%v is more than the largest value that one command takes, %s", &r.size, humanize.IBytes(m))
	}
	c := &targetCache{ctx: ctx, kv: kv, size: r.size, in: make([][]byte, r.c.depth*r.c.queues), out: make([][]byte, r.c.depth*r.c.queues)}
	for i := range c.in {
		c.in[i], c.out[i] = offHeap(int(r.size)), offHeap(int(r.size))
	}
	if !r.keep {
		ids := make(map[uint64]struct{}, t.unique)
		for _, request := range t.requests {
			for _, id := range request {
				ids[id] = struct{}{}
			}
		}
		defer func() { err = errors.Join(err, c.deleteAll(ids)) }()
	}
	if err := r.play(ctx, t, c, out, func() {}); err != nil {
		return err
	}
	return r.report(out)
}

// targetCache is a Key Value namespace.
type targetCache struct {
	ctx     context.Context
	kv      *host.KV
	size    sizeFlag
	in, out [][]byte // by worker
}

func (c *targetCache) retrieve(worker int, id uint64) (bool, error) {
	k, b := blockKey(id), c.in[worker]
	switch n, err := c.kv.Retrieve(c.ctx, k[:], b); {
	case errors.Is(err, nvmeof.KeyDoesNotExist):
		return false, nil
	case err != nil:
		return false, err
	case n != len(b) || !isHead(b, id, c.size):
		return false, wrongBlock(id)
	}
	return true, nil
}

func (c *targetCache) store(worker int, id uint64) (bool, error) {
	k, b := blockKey(id), c.out[worker]
	putHead(b, id, c.size)
	err := c.kv.Store(c.ctx, k[:], b, host.StoreAlways)
	if errors.Is(err, nvmeof.CapacityExceeded) {
		return false, nil
	}
	return err == nil, err
}

// deleteAll deletes the blocks' keys, also when the replay was interrupted.
func (c *targetCache) deleteAll(ids map[uint64]struct{}) error {
	for id := range ids {
		k := blockKey(id)
		if err := c.kv.Delete(context.WithoutCancel(c.ctx), k[:]); err != nil && !errors.Is(err, nvmeof.KeyDoesNotExist) {
			return err
		}
	}
	return nil
}

// replayJSON is the result in JSON output. Sizes are in bytes, latencies in microseconds.
type replayJSON struct {
	Trace     string `json:"trace"`
	Requests  int    `json:"requests"`
	Blocks    int    `json:"blocks"`
	Unique    int    `json:"unique"`
	ValueSize int64  `json:"value_size"`

	Hits           int     `json:"hits"`
	HitRatio       float64 `json:"hit_ratio"`
	PrefixHits     int     `json:"prefix_hits"`
	PrefixHitRatio float64 `json:"prefix_hit_ratio"`
	Ceiling        float64 `json:"ceiling"` // of both ratios: all but the first use of each block
	Stored         int     `json:"stored"`
	Refused        int     `json:"refused"`
	BytesStored    int64   `json:"bytes_stored"`

	// Not known of a target.
	Eviction           string  `json:"eviction,omitempty"`
	Capacity           int64   `json:"capacity,omitempty"`
	Kept               float64 `json:"kept,omitempty"` // values there on average, in the second half
	NotAdmitted        int     `json:"not_admitted,omitempty"`
	BytesWritten       int64   `json:"bytes_written,omitempty"`       // to the drive
	WriteAmplification float64 `json:"write_amplification,omitempty"` // that, for each byte of a value that was kept

	Seconds  float64  `json:"seconds"`
	Retrieve benchRow `json:"retrieve"` // of hits
	Store    benchRow `json:"store"`
}

func (r *replay) report(out *replayJSON) error {
	var text strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&text, "%-17s "+format+"\n", append([]any{name}, args...)...)
	}
	line("trace", "%d requests for %d blocks, %d different ones of %v", out.Requests, out.Blocks, out.Unique, &r.size)
	if !r.target {
		line("store", "%s, %s; on average %.0f values, %.1f%% of the different ones", out.Eviction, humanize.IBytes(uint64(out.Capacity)), out.Kept, 100*out.Kept/float64(out.Unique))
	}
	line("hit ratio", "%.3f", out.HitRatio)
	line("prefix hit ratio", "%.3f of at most %.3f", out.PrefixHitRatio, out.Ceiling)
	line("stored", "%d values, %s", out.Stored, humanize.IBytes(uint64(out.BytesStored)))
	if out.NotAdmitted > 0 {
		line("not admitted", "%d of them", out.NotAdmitted)
	}
	if out.Refused > 0 {
		line("refused", "%d", out.Refused)
	}
	if !r.target {
		line("written", "%s, write amplification %.3f", humanize.IBytes(uint64(out.BytesWritten)), out.WriteAmplification)
	}
	for _, l := range []struct {
		name string
		benchRow
	}{{"retrieve", out.Retrieve}, {"store", out.Store}} {
		line(l.name, "p50 %s  p99 %s  p99.9 %s", latency(l.P50), latency(l.P99), latency(l.P999))
	}
	return r.c.print(out, "%s", text.String())
}
