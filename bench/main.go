// Command bench compares kvof with redis, memcached and SPDK on one machine: the same work in turn, one core for each
// server and one for each client, and prints Markdown. See RESULTS.md.
//
// Absolute figures drift on shared machines; the ratio of two runs that follow each other does so much less. So every
// round runs kvof and then each peer, and the ratios are made by round.
package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

type bench struct {
	kvof, peers, spdk string // programs; SPDK's folder, empty when there is none
	dir               string // for this run's files
	rounds            int
	time              time.Duration
	digests           bool
}

// figures is what one run of a client gives. Latencies are in microseconds.
type figures struct {
	mbps, iops          float64
	avg, p50, p99, p999 float64
	server, client      float64 // cores used
	others              float64 // cores that the rest of the machine used
}

// contestant is one way to do a comparison's work. The first of a comparison is kvof.
type contestant struct {
	name   string
	server *server
	client []string
	parse  func(out []byte, f *figures) error
}

// comparison is one kind of work.
type comparison struct {
	name, title string
	metric      metric
	size        int // bytes of an operation
	of          func(b *bench) []contestant
	needs       needs
}

// needs is what a comparison needs beside kvof.
type needs uint8

const (
	needsPeers needs = iota // redis and memcached
	needsSPDK
	needsShim // a C compiler
)

// metric is what ratios are made of.
type metric struct {
	name, want string
	of         func(figures) float64
}

var (
	throughput = func(want string) metric { return metric{"MB/s", want, func(f figures) float64 { return f.mbps }} }
	iops       = func(want string) metric { return metric{"IOPS", want, func(f figures) float64 { return f.iops }} }
	latency    = func(want string) metric { return metric{"p50", want, func(f figures) float64 { return f.p50 }} }
)

const (
	kib = 1 << 10
	mib = 1 << 20
)

var comparisons = []comparison{
	{"kv-store", "2 MiB Store and SET, four in flight", throughput("1.0 or more"), 2 * mib, keyValue("store", "set"), needsPeers},
	{"kv-retrieve", "2 MiB Retrieve and GET, four in flight", throughput("1.0 or more"), 2 * mib, keyValue("retrieve", "get"), needsPeers},
	{"block-read", "2 MiB block read, depth 4", throughput(""), 2 * mib, block("read", 2*mib, 4), needsSPDK},
	{"block-write", "2 MiB block write, depth 4", throughput(""), 2 * mib, block("write", 2*mib, 4), needsSPDK},
	{"block-4k", "4 KiB block random read, depth 32", iops("0.5 or more"), 4 * kib, block("randread", 4*kib, 32), needsSPDK},
	{"block-4k-q1", "4 KiB block random read, depth 1", latency("2.0 or less"), 4 * kib, block("randread", 4*kib, 1), needsSPDK},
	{"kv-store-spdk", "2 MiB Store against SPDK's block write, depth 4", throughput("0.9 or more"), 2 * mib, keyValueBlock("store", "write"), needsSPDK},
	{"kv-retrieve-spdk", "2 MiB Retrieve against SPDK's block read, depth 4", throughput("0.9 or more"), 2 * mib, keyValueBlock("retrieve", "read"), needsSPDK},
	{"shim-store-2m", "2 MiB Store through the C interface, four in flight", throughput("0.95 or more"), 2 * mib, shim("store", 2*mib, 4), needsShim},
	{"shim-store-16m", "16 MiB Store through the C interface, four in flight", throughput("0.95 or more"), 16 * mib, shim("store", 16*mib, 4), needsShim},
	{"shim-retrieve-2m", "2 MiB Retrieve through the C interface, four in flight", throughput("0.95 or more"), 2 * mib, shim("retrieve", 2*mib, 4), needsShim},
	{"shim-retrieve-16m", "16 MiB Retrieve through the C interface, four in flight", throughput("0.95 or more"), 16 * mib, shim("retrieve", 16*mib, 4), needsShim},
	{"shim-prefix", "exist-prefix of 1,000 keys through the C interface, one at a time", latency(""), 8, shimPrefix, needsShim},
}

// keyValue compares Key Value work with redis and memcached: one connection with four requests in flight, as NVMe
// queues are used, and four connections with one each, as those servers are mostly used.
func keyValue(ours, theirs string) func(*bench) []contestant {
	return func(b *bench) []contestant {
		k, r, m := b.kvofServer(), b.redisServer(), b.memcachedServer()
		return []contestant{
			b.contestant("kvof, 1 x 4", k, b.kvofBench(k, kvNQN, "kv", ours, 2*mib, "--depth=4", "--keep", b.timeFlag()), parseJSON),
			b.contestant("redis, 1 x 4", r, b.peerBench(r, "redis", theirs, 1, 4, b.timeFlag()), parseJSON),
			b.contestant("redis, 4 x 1", r, b.peerBench(r, "redis", theirs, 4, 1, b.timeFlag()), parseJSON),
			b.contestant("memcached, 1 x 4", m, b.peerBench(m, "memcached", theirs, 1, 4, b.timeFlag()), parseJSON),
			b.contestant("memcached, 4 x 1", m, b.peerBench(m, "memcached", theirs, 4, 1, b.timeFlag()), parseJSON),
		}
	}
}

// block compares block work with SPDK's target, SPDK's own tool being the host of both.
func block(op string, size, depth int) func(*bench) []contestant {
	return func(b *bench) []contestant {
		k, s := b.kvofServer(), b.spdkServer("SPDK, 128 KiB", 128*kib)
		c := []contestant{
			b.contestant("kvof", k, b.spdkPerf(k, blockNQN, op, size, depth), parsePerf),
			b.contestant("SPDK, 128 KiB", s, b.spdkPerf(s, spdkNQN, op, size, depth), parsePerf),
		}
		if size > 128*kib {
			s := b.spdkServer("SPDK, 2 MiB", 2*mib)
			c = append(c, b.contestant("SPDK, 2 MiB", s, b.spdkPerf(s, spdkNQN, op, size, depth), parsePerf))
		}
		return c
	}
}

// keyValueBlock compares Key Value work with SPDK's block work, with the host of each, and with kvof's for both.
func keyValueBlock(ours, theirs string) func(*bench) []contestant {
	return func(b *bench) []contestant {
		k, s, l := b.kvofServer(), b.spdkServer("SPDK, 128 KiB", 128*kib), b.spdkServer("SPDK, 2 MiB", 2*mib)
		return []contestant{
			b.contestant("kvof, KV", k, b.kvofBench(k, kvNQN, "kv", ours, 2*mib, "--depth=4", "--keep", b.timeFlag()), parseJSON),
			b.contestant("SPDK, 128 KiB, its host", s, b.spdkPerf(s, spdkNQN, theirs, 2*mib, 4), parsePerf),
			b.contestant("SPDK, 2 MiB, its host", l, b.spdkPerf(l, spdkNQN, theirs, 2*mib, 4), parsePerf),
			b.contestant("SPDK, 2 MiB, kvof's host", l, b.kvofBench(l, spdkNQN, "block", theirs, 2*mib, "--depth=4", b.timeFlag()), parseJSON),
		}
	}
}

func (b *bench) contestant(name string, s *server, client []string, parse func([]byte, *figures) error) contestant {
	return contestant{name, s, client, parse}
}

func (b *bench) timeFlag() string { return "--time=" + b.time.String() }

// kvofBench is the command line of kvof's host.
func (b *bench) kvofBench(s *server, nqn, kind, op string, size int, more ...string) []string {
	args := []string{b.kvof, "bench", "--json", "--address=" + s.address(), "--nqn=" + nqn, "--namespace=1", "--type=" + kind, "--op=" + op, "--size=" + strconv.Itoa(size)}
	if b.digests {
		args = append(args, "--header-digest", "--data-digest")
	}
	return append(args, more...)
}

func (b *bench) peerBench(s *server, protocol, op string, connections, depth int, more ...string) []string {
	return append([]string{b.peers, "-protocol=" + protocol, "-address=" + s.address(), "-op=" + op,
		fmt.Sprint("-connections=", connections), fmt.Sprint("-depth=", depth)}, more...)
}

// spdkPerf is the command line of SPDK's host.
func (b *bench) spdkPerf(s *server, nqn, op string, size, depth int) []string {
	args := []string{filepath.Join(b.spdk, "build/bin/spdk_nvme_perf"), "--no-huge", "-s", "1024", "-c", "0x2", "-L", "-w", op,
		"-o", strconv.Itoa(size), "-q", strconv.Itoa(depth), "-t", strconv.Itoa(int(b.time.Seconds())),
		"-r", fmt.Sprintf("trtype:TCP adrfam:IPv4 traddr:127.0.0.1 trsvcid:%d subnqn:%s", s.port, nqn)}
	if b.digests {
		args = append(args, "-H", "-I")
	}
	return args
}

func parseJSON(out []byte, f *figures) error {
	var r struct {
		Total struct {
			MBps float64 `json:"mb_per_s"`
			IOPS float64 `json:"iops"`
			Avg  float64 `json:"avg_us"`
			P50  float64 `json:"p50_us"`
			P99  float64 `json:"p99_us"`
			P999 float64 `json:"p99_9_us"`
		} `json:"total"`
	}
	err := json.Unmarshal(out, &r)
	f.mbps, f.iops, f.avg, f.p50, f.p99, f.p999 = r.Total.MBps, r.Total.IOPS, r.Total.Avg, r.Total.P50, r.Total.P99, r.Total.P999
	return err
}

// parsePerf reads the totals and the latency summary of spdk_nvme_perf.
func parsePerf(out []byte, f *figures) error {
	quantiles := map[string]*float64{"50.00000%": &f.p50, "99.00000%": &f.p99, "99.90000%": &f.p999}
	for line := range strings.Lines(string(out)) {
		w := strings.Fields(line)
		switch {
		case len(w) >= 7 && w[0] == "Total" && w[1] == ":": // IOPS, MiB/s, average, min, max
			f.iops, _ = strconv.ParseFloat(w[2], 64)
			f.mbps, _ = strconv.ParseFloat(w[3], 64)
			f.mbps *= mib / 1e6
			f.avg, _ = strconv.ParseFloat(w[4], 64)
		case len(w) == 3 && w[1] == ":" && quantiles[w[0]] != nil:
			*quantiles[w[0]], _ = strconv.ParseFloat(strings.TrimSuffix(w[2], "us"), 64)
		}
	}
	if f.iops == 0 || f.p50 == 0 {
		return fmt.Errorf("spdk_nvme_perf has no result:\n%s", out)
	}
	return nil
}

// client runs a client on its core.
func (b *bench) client(args []string) *exec.Cmd {
	return exec.Command("taskset", append([]string{"-c", clientCore}, args...)...)
}

// quietly runs a client whose figures do not matter.
func (b *bench) quietly(args []string) error {
	if out, err := b.client(args).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

// turn is one contestant's run.
func (b *bench) turn(c contestant) (f figures, err error) {
	if err := c.server.resume(); err != nil {
		return f, err
	}
	defer c.server.pause()
	time.Sleep(100 * time.Millisecond)
	cmd := b.client(c.client)
	var out, problems bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problems
	if err := cmd.Start(); err != nil {
		return f, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	wait := watch(ctx, c.server.cmd.Process.Pid, cmd.Process.Pid)
	err = cmd.Wait()
	end := time.Now()
	cancel()
	u := wait()
	if err != nil {
		return f, fmt.Errorf("%s: %w\n%s%s", strings.Join(c.client, " "), err, &out, &problems)
	}
	f.server, f.client, f.others = u.cores(end, b.time)
	return f, c.parse(out.Bytes(), &f)
}

// What others may use of the machine during a turn, in cores, and how often a turn is repeated to get there.
const (
	calm    = 0.15
	repeats = 3
)

// calmTurn is the least disturbed of a few turns, as a rule the first.
func (b *bench) calmTurn(c contestant) (best figures, err error) {
	for i := range repeats {
		f, err := b.turn(c)
		if err != nil {
			return f, err
		}
		if i == 0 || f.others < best.others {
			best = f
		}
		if best.others < calm {
			break
		}
	}
	return best, nil
}

// compare runs all rounds of a comparison and prints its table.
func (b *bench) compare(cmp comparison) error {
	all := cmp.of(b)
	var running []*server
	defer func() {
		for _, s := range running {
			s.stop()
		}
	}()
	for _, c := range all {
		if slices.Contains(running, c.server) {
			continue
		}
		if err := c.server.start(b); err != nil {
			return err
		}
		running = append(running, c.server)
	}
	runs := make([][]figures, len(all))
	for round := range b.rounds {
		for i, c := range all {
			f, err := b.calmTurn(c)
			if err != nil {
				return err
			}
			fmt.Fprintf(os.Stderr, "%s %d/%d %-24s %8.0f MB/s %8.0f IOPS  p50 %6.0f us  server %.2f client %.2f others %.2f cores\n",
				cmp.name, round+1, b.rounds, c.name, f.mbps, f.iops, f.p50, f.server, f.client, f.others)
			runs[i] = append(runs[i], f)
		}
	}
	b.print(cmp, all, runs)
	return nil
}

func (b *bench) print(cmp comparison, all []contestant, runs [][]figures) {
	digests := ""
	if b.digests {
		digests = ", with header and data digests"
	}
	fmt.Printf("### %s: %s%s\n\n", cmp.name, cmp.title, digests)
	work, cost := "MB/s", "server CPU s/GB"
	rate := func(f figures) float64 { return f.mbps }
	spent := func(f figures) float64 { return f.server / f.mbps * 1e3 }
	if cmp.size < 64*kib {
		work, cost = "IOPS", "server CPU us/op"
		rate = func(f figures) float64 { return f.iops }
		spent = func(f figures) float64 { return f.server / f.iops * 1e6 }
	}
	fmt.Printf("| | %s | min-max | p50 us | p99 us | p99.9 us | %s | server cores | client cores | others |\n|---|---|---|---|---|---|---|---|---|---|\n", work, cost)
	for i, c := range all {
		col := func(of func(figures) float64) []float64 { return column(runs[i], of) }
		rates := col(rate)
		fmt.Printf("| %s | %.0f | %.0f-%.0f | %s | %s | %s | %.3g | %.2f | %.2f | %.2f |\n", c.name, median(rates), slices.Min(rates), slices.Max(rates),
			micros(median(col(func(f figures) float64 { return f.p50 }))), micros(median(col(func(f figures) float64 { return f.p99 }))),
			micros(median(col(func(f figures) float64 { return f.p999 }))), median(col(spent)),
			median(col(func(f figures) float64 { return f.server })), median(col(func(f figures) float64 { return f.client })),
			median(col(func(f figures) float64 { return f.others })))
	}
	fmt.Printf("\n| %s, by round | median | min | max | wanted |\n|---|---|---|---|---|\n", cmp.metric.name)
	for i, c := range all[1:] {
		var ratios []float64
		for r, peer := range runs[i+1] {
			ratios = append(ratios, cmp.metric.of(runs[0][r])/cmp.metric.of(peer))
		}
		fmt.Printf("| %s / %s | **%.2f** | %.2f | %.2f | %s |\n", all[0].name, c.name, median(ratios), slices.Min(ratios), slices.Max(ratios), cmp.metric.want)
	}
	fmt.Println()
}

func micros(v float64) string {
	if v < 100 {
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 0, 64)
}

func column(runs []figures, of func(figures) float64) (v []float64) {
	for _, f := range runs {
		v = append(v, of(f))
	}
	return v
}

func median[T cmp.Ordered](v []T) T {
	s := slices.Sorted(slices.Values(v))
	return s[len(s)/2]
}

func main() {
	log.SetFlags(0)
	log.SetPrefix("bench: ")
	b := &bench{spdk: os.Getenv("SPDK_DIR")}
	flag.StringVar(&b.kvof, "kvof", "bin/kvof", "the kvof binary (make build)")
	flag.IntVar(&b.rounds, "rounds", 5, "rounds of each comparison")
	flag.DurationVar(&b.time, "time", 2*time.Second, "of one measurement, in whole seconds as SPDK's host takes them")
	flag.BoolVar(&b.digests, "digests", false, "with header and data digests (SPDK comparisons)")
	names := []string{"idle", "allocs"}
	for _, c := range comparisons {
		names = append(names, c.name)
	}
	flag.Usage = func() {
		fmt.Fprintf(flag.CommandLine.Output(), "Usage: go run ./bench [flags] [NAME...]\n\nNames (default: all that can run): %s\n"+
			"Comparisons with SPDK need SPDK_DIR, the folder of a build with nvmf_tgt and spdk_nvme_perf.\n\n", strings.Join(names, " "))
		flag.PrintDefaults()
	}
	flag.Parse()
	for _, n := range flag.Args() {
		if !slices.Contains(names, n) {
			log.Fatalf("%q is none of: %s", n, strings.Join(names, " "))
		}
	}
	if b.time < time.Second || b.time%time.Second != 0 || b.rounds < 1 {
		log.Fatal("-time is in whole seconds, and there is a round at least")
	}
	if err := b.run(flag.Args()); err != nil {
		log.Fatal(err)
	}
}

func (b *bench) run(names []string) (err error) {
	if b.kvof, err = filepath.Abs(b.kvof); err != nil {
		return err
	}
	if _, err := os.Stat(b.kvof); err != nil {
		return fmt.Errorf("%w: run make build, or name a binary with -kvof", err)
	}
	if b.dir, err = os.MkdirTemp("", "kvof-bench-"); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	for _, c := range comparisons {
		if len(names) > 0 && !slices.Contains(names, c.name) {
			continue
		}
		if c.needs == needsSPDK && b.spdk == "" {
			if len(names) > 0 {
				return fmt.Errorf("%s needs SPDK_DIR", c.name)
			}
			fmt.Printf("### %s: left out, SPDK_DIR is not set\n\n", c.name)
			continue
		}
		switch c.needs {
		case needsPeers:
			err = b.preparePeers()
		case needsShim:
			err = b.prepareShim()
		}
		if err != nil {
			return err
		}
		if err := b.compare(c); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
	}
	for _, part := range []struct {
		name string
		run  func() error
	}{{"idle", b.idle}, {"allocs", b.allocs}} {
		if len(names) == 0 || slices.Contains(names, part.name) {
			if err := part.run(); err != nil {
				return fmt.Errorf("%s: %w", part.name, err)
			}
		}
	}
	return nil
}

// preparePeers builds the client for redis and memcached, and installs these.
func (b *bench) preparePeers() error {
	if b.peers != "" {
		return nil
	}
	if err := install(); err != nil {
		return err
	}
	path := filepath.Join(b.dir, "peers")
	if out, err := exec.Command("go", "build", "-o", path, "github.com/kvof/kvof/bench/peers").CombinedOutput(); err != nil {
		return fmt.Errorf("build the client: %w\n%s", err, out)
	}
	b.peers = path
	return nil
}
