package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/kvof/kvof/host"
	"github.com/kvof/kvof/nvmeof"
)

// bench measures one kind of work. It works on units: keys of a Key Value namespace, or pieces of a block namespace,
// all of the same size. Each worker has one command in flight at a time.
type bench struct {
	c       *client
	kind    string
	op      string
	size    sizeFlag
	span    sizeFlag
	time    time.Duration
	count   int64
	units   int64 // --keys, or what fits into the span
	readPct int
	verify  bool
	keep    bool
	seed    uint64

	kv          *host.KV
	block       *host.Block
	lbas        uint64 // of a unit
	connections int
	random      bool
	gens        []generation // of each unit, with --verify
	next        atomic.Int64 // sequential work
	left        atomic.Int64 // with --count
	stop        atomic.Bool
}

// generation tells which contents of a unit a read may find: those of generations done to started. writing keeps
// writes of a unit apart, whose order could not be known otherwise.
type generation struct {
	writing       sync.Mutex
	started, done atomic.Uint32 // 0: never written by this run
}

type benchAction uint8

const (
	doRead benchAction = iota
	doWrite
	doExist
)

// benchWorker is one goroutine's share.
type benchWorker struct {
	*bench
	rng   *rand.PCG
	buf   []byte
	key   [nvmeof.MaxKeyLen]byte
	hists [3]*hdrhistogram.Histogram // by action, nanoseconds
	err   error
}

var benchOps = map[string][]string{
	"kv":    {"store", "retrieve", "exist", "mixed"},
	"block": {"read", "write", "randread", "randwrite", "randrw"},
}

func newBenchCommand() *cobra.Command {
	b := &bench{size: 2 << 20}
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure a Key Value or block namespace of any target",
		Long: "Measure a Key Value or block namespace of any target: throughput, latency, and the CPU time of this\n" +
			"process. One operation is one command. DATA IS OVERWRITTEN: keys named bench-0000000000 and so on, or blocks.",
		Args: cobra.NoArgs,
	}
	b.c = newClient(cmd, "depth", 4)
	f := cmd.Flags()
	f.StringVar(&b.kind, "type", "kv", "kv or block")
	f.StringVar(&b.op, "op", "", "kv: retrieve (default), store, exist, mixed; block: randread (default), randwrite, randrw, read, write")
	f.Var(&b.size, "size", "bytes of a value or of a block command")
	f.DurationVar(&b.time, "time", 10*time.Second, "how long to measure")
	f.Int64Var(&b.count, "count", 0, "stop after this many operations instead")
	f.Int64Var(&b.units, "keys", 64, "kv: number of keys")
	f.Var(&b.span, "span", "block: bytes of the namespace to use, from its start (default: all, with --verify at most 1GiB)")
	f.IntVar(&b.readPct, "read-percent", 70, "share of reads in mixed and randrw")
	f.BoolVar(&b.verify, "verify", false, "check all data that is read")
	f.BoolVar(&b.keep, "keep", false, "kv: leave the keys stored")
	f.Uint64Var(&b.seed, "seed", 1, "of the data and of the order")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return b.run(cmd.Context()) }
	return cmd
}

func (b *bench) run(ctx context.Context) (err error) {
	ops, ok := benchOps[b.kind]
	if !ok {
		return usageError{fmt.Errorf("type %q is neither kv nor block", b.kind)}
	}
	if b.op == "" {
		b.op = map[string]string{"kv": "retrieve", "block": "randread"}[b.kind]
	}
	switch {
	case !slices.Contains(ops, b.op):
		return usageError{fmt.Errorf("operation %q of type %s is not one of %s", b.op, b.kind, strings.Join(ops, ", "))}
	case b.units < 1 || b.readPct < 0 || b.readPct > 100 || b.time <= 0 || b.count < 0:
		return usageError{errors.New("a number is out of range")}
	case b.c.device != "" && b.kind != "kv":
		return usageError{errors.New("a --device is a Key Value namespace")}
	case b.verify && b.size < patternHeader:
		return usageError{fmt.Errorf("--verify needs sizes of %d bytes or more", patternHeader)}
	}
	b.random = b.op != "read" && b.op != "write" && b.op != "store"
	path, err := b.open(ctx)
	if err != nil {
		return err
	}
	defer path.Close()
	if b.verify {
		b.gens = make([]generation, b.units)
	}
	workers := make([]*benchWorker, b.c.depth*b.connections)
	for i := range workers {
		workers[i] = b.worker(i)
		if ctrl, ok := path.(*host.Controller); ok {
			if err := ctrl.Register(workers[i].buf); err != nil {
				return err
			}
		}
	}
	defer context.AfterFunc(ctx, func() {
		b.stop.Store(true)
		time.AfterFunc(2*time.Second, func() { path.Close() }) // for a target that hangs
	})()
	if b.kv != nil && !b.keep {
		defer func() { err = errors.Join(err, b.deleteKeys()) }()
	}
	if b.kv != nil && b.op != "store" || b.verify && b.op != "write" && b.op != "randwrite" {
		if err := b.each(workers, b.units, (*benchWorker).prepare); err != nil {
			return err
		}
	}
	for _, w := range workers {
		for _, h := range w.hists {
			h.Reset()
		}
	}
	return b.measure(ctx, workers)
}

// open connects and finds the namespace and the units.
func (b *bench) open(ctx context.Context) (path io.Closer, err error) {
	most := uint64(0) // bytes in one command
	if b.kind == "kv" {
		if b.kv, path, err = b.c.openKV(ctx); err != nil {
			return nil, err
		}
		most = b.kv.MaxValue()
	} else {
		ctrl, nsid, err := b.c.namespace(ctx, nvmeof.CSINVM)
		if err != nil {
			return nil, err
		}
		path, most = ctrl, ctrl.MaxTransfer()
		if b.block, err = ctrl.Block(ctx, nsid); err == nil {
			err = b.openBlock()
		}
		if err != nil {
			ctrl.Close()
			return nil, err
		}
	}
	if most != 0 && uint64(b.size) > most {
		path.Close()
		return nil, fmt.Errorf("%v is more than one command carries, %s", &b.size, humanize.IBytes(most))
	}
	b.connections = 1
	if ctrl, ok := path.(*host.Controller); ok {
		b.connections = ctrl.IOQueues()
	}
	return path, nil
}

func (b *bench) openBlock() error {
	ns := b.block.Info()
	if b.span == 0 {
		b.span = sizeFlag(ns.Size)
		if b.verify {
			b.span = min(b.span, 1<<30)
		}
	}
	b.span = min(b.span, sizeFlag(ns.Size))
	if b.size <= 0 || int(b.size)%ns.BlockSize != 0 || b.size > b.span {
		return usageError{fmt.Errorf("size %v: blocks are of %d bytes and the namespace has %s", &b.size, ns.BlockSize, humanize.IBytes(ns.Size))}
	}
	b.lbas = uint64(int(b.size) / ns.BlockSize)
	b.units = int64(b.span / b.size)
	return nil
}

func (b *bench) worker(i int) *benchWorker {
	w := &benchWorker{bench: b, rng: rand.NewPCG(b.seed, uint64(i)), buf: offHeap(int(b.size))}
	for j := range w.hists {
		w.hists[j] = hdrhistogram.New(100, int64(100*time.Second), 3)
	}
	fillPattern(w.buf, b.seed, uint64(i), 0)
	return w
}

// offHeap maps memory for a worker's data, which the collector then has nothing to do with.
func offHeap(n int) []byte {
	b, err := unix.Mmap(-1, 0, max(n, 1), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return make([]byte, n)
	}
	return b[:n]
}

// each runs do with the numbers below n, shared among the workers.
func (b *bench) each(workers []*benchWorker, n int64, do func(*benchWorker, int64) error) error {
	var next atomic.Int64
	return b.together(workers, func(w *benchWorker) error {
		for i := next.Add(1) - 1; i < n && !b.stop.Load(); i = next.Add(1) - 1 {
			if err := do(w, i); err != nil {
				return err
			}
		}
		return nil
	})
}

// together runs do in all workers; the first error stops all.
func (b *bench) together(workers []*benchWorker, do func(*benchWorker) error) error {
	var wg sync.WaitGroup
	for _, w := range workers {
		wg.Go(func() {
			if w.err = do(w); w.err != nil {
				b.stop.Store(true)
			}
		})
	}
	wg.Wait()
	for _, w := range workers {
		if w.err != nil {
			return w.err
		}
	}
	return nil
}

func (w *benchWorker) prepare(i int64) error {
	err := w.do(doWrite, i)
	return w.roomError(err)
}

// roomError says what a full namespace means, which refuses new values or evicts old ones.
func (b *bench) roomError(err error) error {
	if errors.Is(err, nvmeof.CapacityExceeded) || errors.Is(err, nvmeof.KeyDoesNotExist) {
		return fmt.Errorf("the namespace has no room for %d keys of %v: use fewer --keys", b.units, &b.size)
	}
	return err
}

func (b *bench) deleteKeys() error {
	var w benchWorker
	for i := range b.units {
		if err := b.kv.Delete(context.Background(), w.unitKey(i)); err != nil && !errors.Is(err, nvmeof.KeyDoesNotExist) {
			return fmt.Errorf("delete the keys: %w", err)
		}
	}
	return nil
}

func (b *bench) measure(ctx context.Context, workers []*benchWorker) error {
	b.left.Store(b.count)
	if b.count == 0 {
		t := time.AfterFunc(b.time, func() { b.stop.Store(true) })
		defer t.Stop()
	}
	before, start := cpuTime(), time.Now()
	err := b.together(workers, (*benchWorker).loop)
	elapsed, cpu := time.Since(start), cpuTime()-before
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return err
	}
	return b.report(workers, elapsed, cpu)
}

// loop is what is measured: it allocates nothing.
func (w *benchWorker) loop() error {
	now := time.Now()
	for !w.stop.Load() && (w.count == 0 || w.left.Add(-1) >= 0) {
		a, i := w.choose()
		if err := w.do(a, i); err != nil {
			return err
		}
		then := now
		now = time.Now()
		if err := w.hists[a].RecordValue(int64(now.Sub(then))); err != nil {
			return fmt.Errorf("an operation took %v", now.Sub(then))
		}
	}
	return nil
}

// choose picks the next operation.
func (w *benchWorker) choose() (benchAction, int64) {
	i := int64(0)
	if w.random {
		i = int64(w.rng.Uint64() % uint64(w.units))
	} else {
		i = (w.next.Add(1) - 1) % w.units
	}
	switch w.op {
	case "retrieve", "read", "randread":
		return doRead, i
	case "exist":
		return doExist, i
	case "mixed", "randrw":
		if int(w.rng.Uint64()%100) < w.readPct {
			return doRead, i
		}
	}
	return doWrite, i
}

// do carries out one command.
func (w *benchWorker) do(a benchAction, i int64) error {
	ctx := context.Background()
	switch {
	case a == doExist:
		ok, err := w.kv.Exist(ctx, w.unitKey(i))
		if err == nil && !ok {
			err = fmt.Errorf("key %s is absent", w.unitKey(i))
		}
		return err
	case a == doRead:
		low := uint32(0)
		if w.verify {
			low = w.gens[i].done.Load()
		}
		if err := w.read(ctx, i); err != nil || !w.verify {
			return err
		}
		return w.check(i, low, w.gens[i].started.Load())
	}
	if w.verify {
		i = w.lockUnit(i)
		g := &w.gens[i]
		gen := g.started.Add(1)
		fillPattern(w.buf, w.seed, uint64(i), gen)
		defer g.writing.Unlock()
		defer g.done.Store(gen)
	}
	if w.kv != nil {
		return w.kv.Store(ctx, w.unitKey(i), w.buf, host.StoreAlways)
	}
	return w.block.Write(ctx, uint64(i)*w.lbas, w.buf)
}

// lockUnit locks unit i for writing, or the next one that is free; when none is, it waits.
func (w *benchWorker) lockUnit(i int64) int64 {
	for range w.units {
		if w.gens[i].writing.TryLock() {
			return i
		}
		i = (i + 1) % w.units
	}
	w.gens[i].writing.Lock()
	return i
}

func (w *benchWorker) read(ctx context.Context, i int64) error {
	if w.block != nil {
		return w.block.Read(ctx, uint64(i)*w.lbas, w.buf)
	}
	n, err := w.kv.Retrieve(ctx, w.unitKey(i), w.buf)
	if err == nil && n != len(w.buf) {
		err = fmt.Errorf("value of %s has %d bytes, not %d", w.unitKey(i), n, len(w.buf))
	}
	return w.roomError(err)
}

// check verifies a unit that was read: a generation from low to high, whole.
func (w *benchWorker) check(i int64, low, high uint32) error {
	gen := patternGeneration(w.buf, w.seed, uint64(i))
	if gen < low || gen > high || !isPattern(w.buf, w.seed, uint64(i), gen) {
		where := fmt.Sprintf("block %d", uint64(i)*w.lbas)
		if w.kv != nil {
			where = string(w.unitKey(i))
		}
		return fmt.Errorf("WRONG DATA at %s: it is not what was written as generation %d to %d", where, low, high)
	}
	return nil
}

// unitKey is "bench-" and ten digits.
func (w *benchWorker) unitKey(i int64) []byte {
	copy(w.key[:], "bench-")
	for p := len(w.key) - 1; p >= len("bench-"); p-- {
		w.key[p] = byte('0' + i%10)
		i /= 10
	}
	return w.key[:]
}

// benchJSON is the result in JSON output. Latencies are in microseconds.
type benchJSON struct {
	Type        string               `json:"type"`
	Op          string               `json:"op"`
	Size        int64                `json:"size"`
	Depth       int                  `json:"depth"`
	Connections int                  `json:"connections"`
	Seconds     float64              `json:"seconds"`
	CPUSeconds  float64              `json:"cpu_seconds"` // of this process
	Verified    bool                 `json:"verified"`
	Digests     map[string]bool      `json:"digests"`
	Total       benchRow             `json:"total"`
	Operations  map[string]*benchRow `json:"operations"`
}

type benchRow struct {
	Count int64   `json:"count"`
	MBps  float64 `json:"mb_per_s"` // 10^6 bytes
	IOPS  float64 `json:"iops"`
	Avg   float64 `json:"avg_us"`
	P50   float64 `json:"p50_us"`
	P99   float64 `json:"p99_us"`
	P999  float64 `json:"p99_9_us"`
	Max   float64 `json:"max_us"`
}

// newBenchRow describes operations that each moved so many bytes.
func newBenchRow(h *hdrhistogram.Histogram, bytes int64, elapsed time.Duration) benchRow {
	s, us := elapsed.Seconds(), 1e-3
	return benchRow{
		Count: h.TotalCount(), MBps: float64(h.TotalCount()*bytes) / s / 1e6, IOPS: float64(h.TotalCount()) / s,
		Avg: h.Mean() * us, P50: float64(h.ValueAtQuantile(50)) * us, P99: float64(h.ValueAtQuantile(99)) * us,
		P999: float64(h.ValueAtQuantile(99.9)) * us, Max: float64(h.Max()) * us,
	}
}

func (b *bench) report(workers []*benchWorker, elapsed time.Duration, cpu time.Duration) error {
	out := benchJSON{Type: b.kind, Op: b.op, Size: int64(b.size), Depth: b.c.depth, Connections: b.connections,
		Seconds: elapsed.Seconds(), CPUSeconds: cpu.Seconds(), Verified: b.verify,
		Digests: map[string]bool{"header": b.c.headerDigest, "data": b.c.dataDigest}, Operations: map[string]*benchRow{}}
	names := [...]string{doRead: "read", doWrite: "write", doExist: "exist"}
	if b.kv != nil {
		names[doRead], names[doWrite] = "retrieve", "store"
	}
	total := hdrhistogram.New(100, int64(100*time.Second), 3)
	var text strings.Builder
	line := func(name string, r benchRow) {
		fmt.Fprintf(&text, "%-9s %9.1f MB/s %9.0f IOPS   avg %s  p50 %s  p99 %s  p99.9 %s  max %s\n", name, r.MBps, r.IOPS,
			latency(r.Avg), latency(r.P50), latency(r.P99), latency(r.P999), latency(r.Max))
	}
	moved := int64(0)
	for a, name := range names {
		sum := hdrhistogram.New(100, int64(100*time.Second), 3)
		for _, w := range workers {
			sum.Merge(w.hists[a])
		}
		if sum.TotalCount() == 0 {
			continue
		}
		bytes := int64(b.size)
		if benchAction(a) == doExist {
			bytes = 0
		}
		moved += sum.TotalCount() * bytes
		total.Merge(sum)
		r := newBenchRow(sum, bytes, elapsed)
		out.Operations[name] = &r
		line(name, r)
	}
	out.Total = newBenchRow(total, 0, elapsed)
	out.Total.MBps = float64(moved) / elapsed.Seconds() / 1e6
	if len(out.Operations) > 1 {
		line("total", out.Total)
	}
	verified := ""
	if b.verify {
		verified = ", all data verified"
	}
	return b.c.print(out, "%s %s of %v, depth %d on %d connections, %.1f s, %.2f cores used here%s\n%s", b.kind, b.op, &b.size,
		b.c.depth, out.Connections, elapsed.Seconds(), cpu.Seconds()/elapsed.Seconds(), verified, text.String())
}

// latency shows microseconds in a readable unit.
func latency(us float64) string {
	switch {
	case us >= 1e6:
		return fmt.Sprintf("%.2fs", us/1e6)
	case us >= 1e3:
		return fmt.Sprintf("%.2fms", us/1e3)
	}
	return fmt.Sprintf("%.0fus", us)
}

// cpuTime is the CPU time of this process, user and system.
func cpuTime() time.Duration {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		return 0
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}
