// Package crash kills a real server, again and again, under the load of several hosts, and looks at what is left.
package crash

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kvof/kvof/host"
	"github.com/kvof/kvof/nvmeof"
)

var (
	cyclesFlag = flag.Int("cycles", 0, "how often the server is killed (0: 8 times; the long run is 300)")
	seedFlag   = flag.Uint64("seed", 0, "of the load and of the moments of death (0: by the clock)")
)

const (
	nqn      = "nqn.2026-11.dev.kvof:crash"
	hosts    = 3
	workers  = 4 // of each host and namespace, each with keys of its own
	patience = time.Minute
)

// space is a namespace under test.
type space struct {
	nsid    uint32
	policy  string // lines of its configuration
	keys    int    // of each worker
	largest int    // value, in bytes
	evicts  bool   // what is absent is to be in the server's log as evicted since it was stored; else nothing may be absent
}

// TestKill runs the cycles: start, perhaps die again while starting; compare every key with what its worker knows;
// work; die.
func TestKill(t *testing.T) {
	cycles, seed := *cyclesFlag, *seedFlag
	if cycles == 0 {
		if cycles = 8; testing.Short() {
			cycles = 3
		}
	}
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("-seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	spaces := []*space{
		{nsid: 1, policy: "device = \"file\"\npath = \"own\"\nsize = \"1GiB\"\neviction = \"never\"", keys: 8, largest: largest},
		{nsid: 2, policy: "pool = \"shared\"\nshare = \"48MiB\"\nstrict = true", keys: 32, largest: 1 << 20, evicts: true},
		{nsid: 3, policy: "pool = \"shared\"\nshare = \"24MiB\"\neviction = \"fifo\"\ndurability = \"flushed\"", keys: 32, largest: 1 << 20, evicts: true},
	}
	s := newServer(t, spaces)
	defer s.kill()
	var all []*worker
	for h := range hosts {
		for _, sp := range spaces {
			for range workers {
				all = append(all, newWorker(sp, h, seed, len(all)))
			}
		}
	}
	for cycle := range cycles {
		for rnd.IntN(4) == 0 {
			s.start()
			time.Sleep(time.Duration(rnd.IntN(100)) * time.Millisecond)
			s.kill()
		}
		s.start()
		s.await()
		together(t, s, spaces, all, (*worker).check, time.Now().Add(patience))
		if cycle%4 == 0 {
			checkList(t, s, spaces, all)
		}
		if t.Failed() {
			t.Fatalf("cycle %d; the server said:\n%s", cycle, s.said())
		}
		life := time.Duration(50+rnd.IntN(1000)) * time.Millisecond
		died := make(chan struct{})
		time.AfterFunc(life, func() {
			s.kill()
			close(died)
		})
		together(t, s, spaces, all, (*worker).load, time.Time{})
		<-died
		s.account(all)
		if t.Failed() {
			t.Fatalf("cycle %d; the server said:\n%s", cycle, s.said())
		}
	}
	s.start()
	s.await()
	together(t, s, spaces, all, (*worker).check, time.Now().Add(patience))
	checkList(t, s, spaces, all)
	s.account(all)
	if t.Failed() {
		t.Fatalf("the server said:\n%s", s.said())
	}
	var sum tally
	for _, w := range all {
		sum.add(w.tally)
	}
	t.Logf("%d cycles: %+v", cycles, sum)
	if sum.stored == 0 || sum.retrieved == 0 || sum.deleted == 0 || sum.found == 0 || sum.doubtful == 0 || cycles >= 50 && sum.evicted == 0 {
		t.Error("something never happened") // a short run on a busy machine may not fill a namespace
	}
}

// server is the server's process.
type server struct {
	t      *testing.T
	binary string
	config string
	addr   string

	cmd     *exec.Cmd
	log     bytes.Buffer
	evicted map[string][]eviction // by key
}

// eviction is what the server logs just before a value is gone.
type eviction struct {
	at   time.Time // to the millisecond below
	size int
}

func newServer(t *testing.T, spaces []*space) *server {
	dir := t.TempDir()
	s := &server{t: t, binary: filepath.Join(dir, "kvof"), config: filepath.Join(dir, "kvof.toml"), evicted: map[string][]eviction{}}
	build := exec.Command("go", "build", "-o", s.binary, "github.com/kvof/kvof/cmd/kvof")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = l.Addr().String()
	l.Close()
	cfg := fmt.Appendf(nil, `log_level = "debug"
[memory]
arena = "128MiB"
[management]
socket = %q
[[listener]]
transport = "tcp"
address = %q
[[pool]]
name = "shared"
device = "file"
devices = ["shared0", "shared1"]
size = "96MiB"
scrub = "16MiB"
[[subsystem]]
nqn = %q
allow_any_host = true
`, filepath.Join(dir, "kvof.sock"), s.addr, nqn)
	for _, sp := range spaces {
		cfg = fmt.Appendf(cfg, "[[subsystem.namespace]]\nnsid = %d\ntype = \"kv\"\n%s\n", sp.nsid, sp.policy)
	}
	if err := os.WriteFile(s.config, cfg, 0o600); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *server) start() {
	s.log.Reset()
	s.cmd = exec.Command(s.binary, "serve", "-c", s.config)
	s.cmd.Dir = filepath.Dir(s.config)
	s.cmd.Stdout, s.cmd.Stderr = &s.log, &s.log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
}

// await waits until the server listens.
func (s *server) await() {
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		c, err := net.Dial("tcp", s.addr)
		if err == nil {
			c.Close()
			return
		}
		if time.Now().After(end) {
			s.kill()
			s.t.Fatalf("the server does not listen: %v; it said:\n%s", err, s.said())
		}
	}
}

// kill is kill -9.
func (s *server) kill() {
	if s.cmd != nil {
		_ = s.cmd.Process.Kill()
		_ = s.cmd.Wait()
		s.cmd = nil
		s.learn()
	}
}

// said is the server's log, but for what is only for account, once it is dead.
func (s *server) said() string {
	s.kill()
	return regexp.MustCompile(`(?m)^\S+ DEBUG .*\n`).ReplaceAllString(s.log.String(), "")
}

var evictedLine = regexp.MustCompile(`(?m)^(\S+) DEBUG +evicted .*key=([0-9a-f]+) size=(\d+) reason=(\w+)$`)

// learn takes in what a dead server has logged.
func (s *server) learn() {
	log := s.log.String()
	for _, m := range evictedLine.FindAllStringSubmatch(log, -1) {
		at, err := time.Parse(time.RFC3339Nano, m[1])
		size, err2 := strconv.Atoi(m[3])
		if err != nil || err2 != nil || m[4] != "capacity" {
			s.t.Errorf("a value went, and not for room: %s", m[0])
		}
		s.evicted[m[2]] = append(s.evicted[m[2]], eviction{at, size})
	}
	for _, line := range strings.Split(log, "\n") {
		if strings.Contains(line, "corrupt") || strings.Contains(line, "unreadable") || strings.Contains(line, "damaged") {
			s.t.Errorf("nothing was damaged: %s", line)
		}
	}
}

// account looks whether the server, in any of its lives, had evicted what the workers have missed.
func (s *server) account(all []*worker) {
	s.kill()
	for _, w := range all {
		for _, m := range w.missed {
			if !slices.ContainsFunc(s.evicted[m.key], func(e eviction) bool {
				return slices.Contains(m.sizes, e.size) && !e.at.Before(m.begun.Truncate(time.Millisecond))
			}) {
				s.t.Errorf("namespace %d, worker %d: key %s, of %d bytes, begun at %v, is absent and was not evicted since: %v", w.space.nsid, w.name, m.key, m.sizes, m.begun, s.evicted[m.key])
			}
			w.evicted++
		}
		w.missed = nil
	}
}

// together has all workers do something, each host's over a connection of its own.
func together(t *testing.T, s *server, spaces []*space, all []*worker, do func(*worker, *testing.T, *host.KV), deadline time.Time) {
	ctx := context.Background()
	if !deadline.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, deadline)
		defer cancel()
	}
	var wg sync.WaitGroup
	for h := range hosts {
		c, err := host.Connect(ctx, host.Options{Addr: s.addr, SubNQN: nqn, HostNQN: fmt.Sprintf("%s-host%d", nqn, h), DataDigest: h == 1})
		if err != nil {
			if deadline.IsZero() {
				continue // it has died already
			}
			t.Error(err)
			return
		}
		defer c.Close()
		for _, sp := range spaces {
			kv, err := c.KV(ctx, sp.nsid)
			if err != nil {
				if !deadline.IsZero() {
					t.Error(err)
				}
				continue
			}
			for _, w := range all {
				if w.host == h && w.space == sp {
					wg.Go(func() { do(w, t, kv) })
				}
			}
		}
	}
	wg.Wait()
}

// checkList compares List with what the workers have found.
func checkList(t *testing.T, s *server, spaces []*space, all []*worker) {
	c, err := host.Connect(t.Context(), host.Options{Addr: s.addr, SubNQN: nqn})
	if err != nil {
		t.Error(err)
		return
	}
	defer c.Close()
	for _, sp := range spaces {
		kv, err := c.KV(t.Context(), sp.nsid)
		if err != nil {
			t.Error(err)
			continue
		}
		listed := map[string]bool{}
		for key, err := range kv.List(t.Context(), nil) {
			if err != nil {
				t.Error(err)
				break
			}
			listed[string(key)] = true
		}
		for _, w := range all {
			if w.space != sp {
				continue
			}
			for k := range w.fates {
				key := string(w.key(k))
				if there := w.fates[k].now != 0; there && !listed[key] && sp.evicts {
					w.miss(k)
				} else if there != listed[key] {
					t.Errorf("namespace %d: %s: List shows it: %v, Retrieve: %v", sp.nsid, key, listed[key], there)
				}
				delete(listed, key)
			}
		}
		for key := range listed {
			t.Errorf("namespace %d: List shows %q, which nobody stored", sp.nsid, key)
		}
	}
}

// tally is what workers have done.
type tally struct{ stored, retrieved, deleted, flushed, refused, found, doubtful, evicted int }

func (s *tally) add(o tally) {
	s.stored += o.stored
	s.retrieved += o.retrieved
	s.deleted += o.deleted
	s.flushed += o.flushed
	s.refused += o.refused
	s.found += o.found
	s.doubtful += o.doubtful
	s.evicted += o.evicted
}

// fate is what is known about a key. Values are known by their numbers; 0 is none.
type fate struct {
	now   uint64
	doubt []uint64  // what may be there instead: the operation that was cut off
	begun time.Time // when its Store began
}

// missing is a value that was stored and is absent.
type missing struct {
	key   string // hexadecimal
	sizes []int  // more than one, when the Store of another was cut off
	begun time.Time
}

// worker is one client of a namespace.
type worker struct {
	tally
	space *space
	host  int
	name  int
	rnd   *rand.Rand
	fates []fate
	next  uint64 // number of a value
	buf   []byte
	want  []byte

	missed []missing // in this life of the server
}

func newWorker(sp *space, h int, seed uint64, name int) *worker {
	return &worker{space: sp, host: h, name: name, rnd: rand.New(rand.NewPCG(seed, uint64(name)+1)),
		fates: make([]fate, sp.keys), next: uint64(name) << 32, buf: make([]byte, largest), want: make([]byte, largest)}
}

func (w *worker) key(k int) []byte { return fmt.Appendf(nil, "w%d-%d", w.name, k) }

const largest = 6 << 20 // bytes of a value

// size is that of a value, in bytes.
func (w *worker) size(id uint64) int {
	r := rand.New(rand.NewPCG(id, 0))
	switch r.IntN(8) {
	case 0:
		return r.IntN(2) // nearly nothing
	case 1, 2:
		return r.IntN(8 << 10)
	case 3:
		return w.space.largest - r.IntN(4)*1000
	case 4:
		return min(2<<20, w.space.largest)
	}
	return r.IntN(256 << 10)
}

// value writes value number id.
func (w *worker) value(id uint64) []byte {
	b := w.want[:w.size(id)]
	r := rand.New(rand.NewPCG(id, 1))
	word, step := r.Uint64(), r.Uint64()|1
	for i := 0; i+8 <= len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], word)
		word += step
	}
	for i := len(b) &^ 7; i < len(b); i++ {
		b[i] = byte(id) + byte(i)
	}
	return b
}

// load works until the server dies.
func (w *worker) load(t *testing.T, kv *host.KV) {
	for !t.Failed() {
		k := w.rnd.IntN(len(w.fates))
		var err error
		switch n := w.rnd.IntN(20); {
		case n < 10:
			err = w.store(t, kv, k, host.StoreAlways)
		case n < 12:
			err = w.store(t, kv, k, host.StoreIfAbsent)
		case n < 16:
			err = w.retrieve(t, kv, k)
		case n < 19:
			err = w.delete(t, kv, k)
		default:
			if err = kv.Flush(t.Context()); err == nil {
				w.flushed++
			}
		}
		if errors.Is(err, host.ErrConnectionLost) || errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Errorf("worker %d, key %d: %v", w.name, k, err)
			return
		}
	}
}

// check looks at all keys, and settles what was in doubt.
func (w *worker) check(t *testing.T, kv *host.KV) {
	for k := range w.fates {
		f := &w.fates[k]
		if len(f.doubt) > 0 {
			w.doubtful++
		}
		if err := w.retrieve(t, kv, k); err != nil {
			t.Errorf("worker %d, key %d: %v", w.name, k, err)
		}
		if f.now != 0 {
			w.found++
		}
	}
}

func (w *worker) store(t *testing.T, kv *host.KV, k int, m host.StoreMode) error {
	w.next++
	id, f := w.next, &w.fates[k]
	v := w.value(id)
	begun := time.Now()
	err := kv.Store(t.Context(), w.key(k), v, m)
	switch {
	case err == nil && m == host.StoreIfAbsent && f.now != 0 && !w.space.evicts:
		t.Errorf("worker %d, key %d: stored as if it were absent, over number %d", w.name, k, f.now)
	case err == nil:
		if m == host.StoreIfAbsent && f.now != 0 {
			w.miss(k)
		}
		f.now, f.doubt, f.begun = id, nil, begun
		w.stored++
	case errors.Is(err, nvmeof.KeyExists):
		if err = nil; f.now == 0 {
			t.Errorf("worker %d, key %d: it exists, though deleted or never stored", w.name, k)
		}
	case errors.Is(err, nvmeof.CapacityExceeded):
		w.refused++
		err = nil
	default:
		if f.doubt = append(f.doubt, id); f.now == 0 {
			f.begun = begun
		}
	}
	return err
}

// miss notes that a key's value is absent.
func (w *worker) miss(k int) {
	f := &w.fates[k]
	m := missing{key: hex.EncodeToString(w.key(k)), begun: f.begun}
	for _, id := range append(f.doubt, f.now) {
		m.sizes = append(m.sizes, w.size(id))
	}
	w.missed = append(w.missed, m)
}

func (w *worker) delete(t *testing.T, kv *host.KV, k int) error {
	f := &w.fates[k]
	err := kv.Delete(t.Context(), w.key(k))
	if err != nil {
		f.doubt = append(f.doubt, 0)
	} else {
		f.now, f.doubt = 0, nil
		w.deleted++
	}
	return err
}

// retrieve compares what is there with what may be.
func (w *worker) retrieve(t *testing.T, kv *host.KV, k int) error {
	f := &w.fates[k]
	n, err := kv.Retrieve(t.Context(), w.key(k), w.buf)
	if errors.Is(err, nvmeof.KeyDoesNotExist) {
		for _, id := range append(f.doubt, f.now) {
			if id == 0 {
				f.now, f.doubt = 0, nil
				return nil
			}
		}
		if w.space.evicts {
			w.miss(k)
			f.now, f.doubt = 0, nil
			return nil
		}
		t.Errorf("namespace %d, worker %d, key %d: absent, and it is number %d, or one of %d", w.space.nsid, w.name, k, f.now, f.doubt)
		return nil
	}
	if err != nil {
		return err
	}
	for _, id := range append(f.doubt, f.now) {
		if id != 0 && n == w.size(id) && bytes.Equal(w.buf[:n], w.value(id)) {
			f.now, f.doubt = id, nil
			w.retrieved++
			return nil
		}
	}
	t.Errorf("namespace %d, worker %d, key %d: a wrong value of %d bytes; it is number %d, or one of %d", w.space.nsid, w.name, k, n, f.now, f.doubt)
	return nil
}
