package client

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/host"
	"github.com/kvof/kvof/rdma"
	"github.com/kvof/kvof/rdma/rdmatest"
	"github.com/kvof/kvof/shim/keys"
	"github.com/kvof/kvof/target/targettest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is for what must happen soon, on a machine that may be busy.
const patience = 30 * time.Second

func urlOf(s *targettest.Server) string { return "tcp://" + s.Addr + "/" + s.NQN }

// open opens a client with time-outs for a busy machine, which ends with the test.
func open(t testing.TB, o Options) *Client {
	t.Helper()
	for _, d := range []*time.Duration{&o.Timeout, &o.LookupTimeout, &o.ConnectTimeout} {
		if *d == 0 {
			*d = patience
		}
	}
	if o.Reconnect == 0 {
		o.Reconnect = 20 * time.Millisecond
	}
	c, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func op(t testing.TB, c *Client, kind Kind, key string, data ...[]byte) Op {
	t.Helper()
	k, err := c.Key([]byte(key))
	if err != nil {
		t.Fatal(err)
	}
	return Op{Kind: kind, Key: k, Data: data}
}

// do runs operations as one batch and waits.
func do(t testing.TB, c *Client, ops ...Op) []Op {
	t.Helper()
	done := make(chan struct{})
	ended := make([]bool, len(ops))
	var mu sync.Mutex
	b := &Batch{Ops: ops, OnDone: func(*Batch) { close(done) }}
	for i := range ops {
		ops[i].Tag = uint64(i)
	}
	b.OnOp = func(o *Op) {
		mu.Lock()
		defer mu.Unlock()
		if ended[o.Tag] {
			t.Errorf("operation %d ended twice", o.Tag)
		}
		ended[o.Tag] = true
	}
	if err := c.Submit(b); err != nil {
		t.Fatal(err)
	}
	select {
	case <-done:
	case <-time.After(4 * patience):
		t.Fatal("a batch does not end")
	}
	if slices.Contains(ended, false) {
		t.Error("an operation did not end")
	}
	return ops
}

func want(t testing.TB, o Op, s Status, result uint64) {
	t.Helper()
	if o.Status != s || o.Result != result {
		t.Fatalf("%d: status %d (detail %x), result %d; want %d, %d", o.Kind, o.Status, o.Detail, o.Result, s, result)
	}
}

func random(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(n), byte(n >> 8)})
	_, _ = r.Read(b)
	return b
}

// eventually waits until f holds.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

const (
	short = "0123456789abcdef"                   // used as it is
	long  = "meta-llama/Llama-3.1-8B@0@1@a3f5c2" // hashed
)

func TestOperations(t *testing.T) {
	s := targettest.Serve(t, targettest.Options{MaxValue: 4 << 20})
	for _, sum := range []bool{true, false} {
		for _, digest := range []bool{false, true} {
			for _, key := range []string{short, long} {
				t.Run(fmt.Sprintf("sum=%v,digest=%v,%s", sum, digest, key), func(t *testing.T) {
					c := open(t, Options{Targets: urlOf(s), NoChecksum: !sum, HeaderDigest: digest, DataDigest: digest})
					want(t, do(t, c, op(t, c, Exist, key))[0], Miss, 0)
					want(t, do(t, c, op(t, c, Get, key, make([]byte, 10)))[0], Miss, 0)
					v := random(3<<20 + 5)
					want(t, do(t, c, op(t, c, Put, key, v[:1000], v[1000:1001], nil, v[1001:]))[0], OK, 0)
					want(t, do(t, c, op(t, c, Put, key, v))[0], Exists, 0)
					want(t, do(t, c, op(t, c, Exist, key))[0], OK, 0)

					// Into memory of its size, in pieces of all kinds.
					got := make([]byte, len(v))
					want(t, do(t, c, op(t, c, Get, key, got))[0], OK, uint64(len(v)))
					if !bytes.Equal(got, v) {
						t.Fatal("other bytes")
					}
					clear(got)
					want(t, do(t, c, op(t, c, Get, key, got[:1<<20], got[1<<20:1<<20+7], got[1<<20+7:]))[0], OK, uint64(len(v)))
					if !bytes.Equal(got, v) {
						t.Fatal("other bytes in pieces")
					}
					// Into more: the trailer lands in the midst of the memory, or across its end.
					for _, more := range []int{1, 63, 64, 65, 5000} {
						got := make([]byte, len(v)+more)
						want(t, do(t, c, op(t, c, Get, key, got[:100], got[100:]))[0], OK, uint64(len(v)))
						if !bytes.Equal(got[:len(v)], v) {
							t.Fatal("other bytes")
						}
					}
					// Into less, down to none: its size.
					for _, less := range []int{1, 63, 64, 65, len(v)} {
						want(t, do(t, c, op(t, c, Get, key, got[:len(v)-less]))[0], Truncated, uint64(len(v)))
					}
					o := op(t, c, Put, key, v[:64])
					o.Replace = true
					want(t, do(t, c, o)[0], OK, 0)
					want(t, do(t, c, op(t, c, Get, key, got))[0], OK, 64)
					o = op(t, c, Put, key) // nothing
					o.Replace = true
					want(t, do(t, c, o)[0], OK, 0)
					want(t, do(t, c, op(t, c, Get, key))[0], OK, 0)
					want(t, do(t, c, op(t, c, Delete, key))[0], OK, 0)
					want(t, do(t, c, op(t, c, Get, key, got))[0], Miss, 0)
					want(t, do(t, c, op(t, c, Put, key, make([]byte, 4<<20+1)))[0], TooLarge, 0)

					n := c.Counters()
					if n.GetMisses != 2 || n.Mismatches != 0 || n.Puts != 3 || n.PutExists != 1 || n.Deletes != 1 || n.Truncated != 5 || n.Errors != 1 || n.InFlight != 0 {
						t.Errorf("%+v", n)
					}
				})
			}
		}
	}
}

// TestMismatch: what is not the key's value, or not all of it, is a miss.
func TestMismatch(t *testing.T) {
	s := targettest.Serve(t, targettest.Options{})
	c := open(t, Options{Targets: urlOf(s)})
	k, _ := c.Key([]byte(long))
	ctrl, err := host.Connect(t.Context(), host.Options{Addr: s.Addr, SubNQN: s.NQN})
	if err != nil {
		t.Fatal(err)
	}
	defer ctrl.Close()
	kv, err := ctrl.KV(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	v := random(100_000)
	want(t, do(t, c, op(t, c, Put, long, v))[0], OK, 0)
	good := make([]byte, len(v)+keys.TrailerSize)
	if n, err := kv.Retrieve(t.Context(), k.Bytes(), good); err != nil || n != len(good) || !bytes.Equal(good[:len(v)], v) {
		t.Fatal("the payload is not in front: ", n, err)
	}
	other, _ := c.Key([]byte(long + "x"))
	foreign := bytes.Clone(good)
	sum := keys.SumOf(v)
	other.PutTrailer(foreign[len(v):], uint64(len(v)), &sum)
	flip := func(i int) []byte { b := bytes.Clone(good); b[i] ^= 1; return b }
	misses := 0
	for name, b := range map[string][]byte{
		"empty": {}, "short": good[:10], "cut": good[:len(good)-1], "no trailer": good[:len(v)], "no beginning": good[1:], "longer": append(bytes.Clone(good), 0),
		"first byte": flip(0), "last byte": flip(len(v) - 1), "trailer": flip(len(v) + 30), "another key": foreign,
	} {
		if err := kv.Store(t.Context(), k.Bytes(), b, host.StoreAlways); err != nil {
			t.Fatal(err)
		}
		for _, size := range []int{len(v) + 1000, len(v) + 1} {
			o := do(t, c, op(t, c, Get, long, make([]byte, size)))[0]
			if o.Status != Miss {
				t.Errorf("%s: status %d", name, o.Status)
			}
			misses++
		}
	}
	if n := c.Counters(); n.Mismatches != uint64(misses) || n.GetMisses != uint64(misses) {
		t.Errorf("%d misses: %+v", misses, n)
	}
	if err := kv.Store(t.Context(), k.Bytes(), flip(5), host.StoreAlways); err != nil {
		t.Fatal(err)
	}
	lax := open(t, Options{Targets: urlOf(s), NoChecksum: true})
	want(t, do(t, lax, op(t, lax, Get, long, make([]byte, len(v))))[0], OK, uint64(len(v)))
	tenant := open(t, Options{Targets: urlOf(s), Scope: keys.Scope{Tenant: "b"}})
	want(t, do(t, tenant, op(t, tenant, Get, long, make([]byte, len(v))))[0], Miss, 0)
}

func TestBatches(t *testing.T) {
	a := targettest.Serve(t, targettest.Options{NQN: "nqn.2026-11.dev.kvof:a"})
	b := targettest.Serve(t, targettest.Options{NQN: "nqn.2026-11.dev.kvof:b"})
	for _, targets := range []string{urlOf(a), "x=" + urlOf(a) + ", " + urlOf(b) + "|" + urlOf(b) + "?ns=1"} {
		c := open(t, Options{Targets: targets, IOQueues: 2, Scope: keys.Scope{Salt: targets}})
		const n = 300
		var puts, exists, prefix, gets, mixed []Op
		for i := range n {
			key := fmt.Sprintf("a key that is hashed, %d", i)
			if i != 200 && i != 250 {
				puts = append(puts, op(t, c, Put, key, random(1000*i+1)))
			}
			exists, prefix = append(exists, op(t, c, Exist, key)), append(prefix, op(t, c, ExistPrefix, key))
			gets = append(gets, op(t, c, Get, key, make([]byte, 1000*i+1)))
		}
		mixed = append(slices.Clone(gets[:20]), exists[190:210]...)
		mixed = append(mixed, Op{Kind: Get, Status: Invalid})
		for _, o := range do(t, c, puts...) {
			want(t, o, OK, 0)
		}
		for i, o := range do(t, c, exists...) {
			if (o.Status == OK) == (i == 200 || i == 250) {
				t.Fatalf("exist %d: %d", i, o.Status)
			}
		}
		for i, o := range do(t, c, prefix...)[:201] {
			if (o.Status == OK) == (i == 200) {
				t.Fatalf("prefix %d: %d", i, o.Status)
			}
		}
		for i, o := range do(t, c, gets...) {
			if i == 200 || i == 250 {
				want(t, o, Miss, 0)
			} else if want(t, o, OK, uint64(1000*i+1)); !bytes.Equal(o.Data[0], random(1000*i+1)) {
				t.Fatalf("get %d: other bytes", i)
			}
		}
		m := do(t, c, mixed...)
		want(t, m[40], Invalid, 0)
		want(t, m[30], Miss, 0)
		want(t, m[29], OK, 0)
		done := make(chan struct{})
		if err := c.Submit(&Batch{OnDone: func(*Batch) { close(done) }}); err != nil {
			t.Fatal(err)
		}
		<-done // an empty batch
		if len(*c.set.Load()) == 2 {
			for _, x := range c.Describe().Targets {
				if used := c.Counters().PathsUp; used != 3 || len(x.Paths) == 0 {
					t.Errorf("%d paths up of %v", used, c.Describe())
				}
			}
			for _, s := range []*targettest.Server{a, b} {
				if k := s.Target.Status().Subsystems[0].Namespaces[0].Store.Keys; k < n/5 {
					t.Errorf("%s holds %d keys of %d", s.NQN, k, n)
				}
			}
		}
	}
}

func TestManyThreads(t *testing.T) {
	s := targettest.Serve(t, targettest.Options{})
	c := open(t, Options{Targets: urlOf(s), QueueDepth: 8, IOQueues: 2, MaxOps: 200})
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(g), 1))
			for range 30 {
				key := fmt.Sprintf("thread %d, key %d with a long name", g, r.IntN(5))
				v := random(r.IntN(200_000))
				p := op(t, c, Put, key, v)
				p.Replace = true
				if o := do(t, c, p)[0]; o.Status != OK {
					t.Errorf("put: %d", o.Status)
				}
				got := make([]byte, len(v))
				if o := do(t, c, op(t, c, Get, key, got))[0]; o.Status != OK || !bytes.Equal(got, v) {
					t.Errorf("get: %d", o.Status)
				}
			}
		})
	}
	wg.Wait()
	ops := make([]Op, 201)
	if err := c.Submit(&Batch{Ops: ops}); err != ErrAgain {
		t.Errorf("more than MaxOps: %v", err)
	}
	if n := c.Counters().InFlight; n != 0 {
		t.Errorf("%d in flight", n)
	}
}

// TestRestart: a target that goes makes misses at once, and one that comes back works again, with no help.
func TestRestart(t *testing.T) {
	s := targettest.Serve(t, targettest.Options{})
	c := open(t, Options{Targets: urlOf(s)})
	v := random(1 << 20)
	want(t, do(t, c, op(t, c, Put, long, v))[0], OK, 0)
	s.Stop()
	start := time.Now()
	for _, kind := range []Kind{Get, Exist, Put, Delete, ExistPrefix} {
		want(t, do(t, c, op(t, c, kind, long, v))[0], Unavailable, 0)
	}
	if d := time.Since(start); d > patience/2 {
		t.Errorf("took %v", d)
	}
	eventually(t, "failed connects", func() bool { n := c.Counters(); return n.ConnectFailures > 0 && n.TargetsUp == 0 && n.Disconnects == 1 })
	targettest.Serve(t, targettest.Options{Addr: s.Addr})
	eventually(t, "a new connection", func() bool { return do(t, c, op(t, c, Put, long, v))[0].Status == OK })
	want(t, do(t, c, op(t, c, Get, long, v))[0], OK, 1<<20)
	if n := c.Counters(); n.Connects != 2 || n.Unavailable == 0 || n.Errors != 0 {
		t.Errorf("%+v", n)
	}
}

// TestHang: a target that hangs costs its operations their time-out once, and afterwards nothing, until it is back.
func TestHang(t *testing.T) {
	s := targettest.Serve(t, targettest.Options{})
	r := targettest.NewRelay(t, s.Addr)
	const limit = 400 * time.Millisecond
	c := open(t, Options{Targets: "tcp://" + r.Addr + "/" + s.NQN, Timeout: limit, LookupTimeout: limit, ConnectTimeout: 2 * time.Second})
	v := random(1 << 20)
	eventually(t, "a put on a busy machine", func() bool { return do(t, c, op(t, c, Put, long, v))[0].Status.Success() })
	r.Freeze(true)
	start := time.Now()
	var ops []Op
	for i := range 200 { // more than fit into flight
		ops = append(ops, op(t, c, Get, fmt.Sprintf("a long key with a number, %d", i), make([]byte, 1<<20)), op(t, c, Put, fmt.Sprintf("another long key, %d", i), v), op(t, c, Exist, long))
	}
	for _, o := range do(t, c, ops...) {
		if o.Status != Timeout && o.Status != Unavailable {
			t.Fatalf("status %d of a target that hangs", o.Status)
		}
	}
	if d := time.Since(start); d < limit/2 || d > 20*limit {
		t.Errorf("the first batch took %v", d)
	}
	eventually(t, "the path is given up", func() bool { return c.Counters().PathsUp == 0 })
	start = time.Now()
	want(t, do(t, c, op(t, c, Get, long, v))[0], Unavailable, 0)
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("a later get took %v", d)
	}
	r.Freeze(false)
	eventually(t, "the target is used again", func() bool { return do(t, c, op(t, c, Get, long, v))[0].Status == OK })
	if n := c.Counters(); n.Timeouts == 0 || n.Disconnects == 0 {
		t.Errorf("%+v", n)
	}
}

// TestFailover: of two paths to a target one breaks, and no operation is lost.
func TestFailover(t *testing.T) {
	s := targettest.Serve(t, targettest.Options{})
	r := targettest.NewRelay(t, s.Addr)
	c := open(t, Options{Targets: urlOf(s) + "|tcp://" + r.Addr + "/" + s.NQN})
	v := random(300_000)
	for round := range 5 {
		var puts, gets []Op
		for i := range 100 {
			key := fmt.Sprintf("a long key of round %d, %d", round, i)
			puts, gets = append(puts, op(t, c, Put, key, v)), append(gets, op(t, c, Get, key, make([]byte, len(v))))
		}
		eventually(t, "both paths", func() bool { return c.Counters().PathsUp == 2 })
		stop := time.AfterFunc(time.Duration(round)*3*time.Millisecond, r.Cut)
		for _, o := range append(do(t, c, puts...), do(t, c, gets...)...) {
			if !o.Status.Success() { // a put that another path repeats may find itself
				t.Fatalf("kind %d: status %d", o.Kind, o.Status)
			}
		}
		stop.Stop()
		r.Cut()
		eventually(t, "the cut is seen", func() bool { return c.Counters().Disconnects > uint64(round) })
	}
	if n := c.Counters(); n.Disconnects < 5 {
		t.Errorf("%+v", n)
	}
}

func TestFull(t *testing.T) {
	s := targettest.Serve(t, targettest.Options{Size: 64 << 20, MaxValue: 4 << 20})
	s.Apply(configs.Namespace{NSID: 1, Type: configs.KeyValue, Device: configs.DeviceMemory, Size: 64 << 20, MaxValue: 4 << 20, MaxKeys: 3},
		configs.Namespace{NSID: 3, Type: configs.KeyValue, Device: configs.DeviceMemory, Size: 64 << 20, ReadOnly: true})
	c := open(t, Options{Targets: urlOf(s)})
	for i := range 4 {
		o := do(t, c, op(t, c, Put, fmt.Sprint(i), []byte("value")))[0]
		if i < 3 && o.Status != OK || i == 3 && o.Status != Full {
			t.Errorf("put %d: %d", i, o.Status)
		}
	}
	ro := open(t, Options{Targets: urlOf(s) + "?ns=3"})
	want(t, do(t, ro, op(t, ro, Put, "k", []byte("v")))[0], ReadOnly, 0)
}

// TestClose ends operations that would not end by themselves.
func TestClose(t *testing.T) {
	s := targettest.Serve(t, targettest.Options{})
	r := targettest.NewRelay(t, s.Addr)
	c := open(t, Options{Targets: "tcp://" + r.Addr + "/" + s.NQN})
	r.Freeze(true)
	var ops []Op
	for i := range 300 {
		ops = append(ops, op(t, c, Get, fmt.Sprint(i), make([]byte, 1000)), op(t, c, Put, fmt.Sprint(i), make([]byte, 100_000)), op(t, c, Exist, "k"))
	}
	done := make(chan struct{})
	if err := c.Submit(&Batch{Ops: ops, OnDone: func(*Batch) { close(done) }}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(20 * time.Millisecond)
	c.Close()
	select {
	case <-done:
	default:
		t.Fatal("Close returned before the operations ended")
	}
	for i, o := range ops {
		if o.Status != Cancelled && o.Status != Unavailable {
			t.Fatalf("operation %d: status %d", i, o.Status)
		}
	}
	if err := c.Submit(&Batch{Ops: ops[:1]}); err != ErrClosed {
		t.Error(err)
	}
}

func TestDiscovery(t *testing.T) {
	a := targettest.Serve(t, targettest.Options{Discovery: true})
	c := open(t, Options{Targets: "discover://127.0.0.1:1|discover://" + a.Discovery, ConnectTimeout: patience})
	if d := c.Describe(); len(d.Targets) != 1 || d.Targets[0].Name != a.NQN || !d.Discovery[0].Read {
		t.Fatal(d)
	}
	want(t, do(t, c, op(t, c, Put, long, []byte("v")))[0], OK, 0)
	one := open(t, Options{Targets: "me=discover://" + a.Discovery + "/" + a.NQN})
	if d := one.Describe(); len(d.Targets) != 1 || d.Targets[0].Name != "me" {
		t.Fatal(d)
	}
	want(t, do(t, one, op(t, one, Get, long, make([]byte, 1)))[0], OK, 1)

	// The log changes: another subsystem, then neither.
	ns := []configs.Namespace{{NSID: 1, Type: configs.KeyValue, Device: configs.DeviceMemory, Size: 64 << 20}}
	both := &configs.Config{Subsystems: []configs.Subsystem{{NQN: a.NQN, Serial: "1", AllowAnyHost: true, Namespaces: ns}, {NQN: a.NQN + "2", Serial: "2", AllowAnyHost: true, Namespaces: ns}}}
	if err := a.Target.Apply(both); err != nil {
		t.Fatal(err)
	}
	eventually(t, "two targets", func() bool { n := c.Counters(); return n.Targets == 2 && n.TargetsUp == 2 })
	if err := a.Target.Apply(&configs.Config{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "no target", func() bool { return c.Counters().Targets == 0 })
	want(t, do(t, c, op(t, c, Exist, long))[0], Unavailable, 0)
}

func TestOpen(t *testing.T) {
	start := time.Now()
	_, err := Open(Options{Targets: "tcp://127.0.0.1:1/nqn.2026-11.dev.kvof:x", ConnectTimeout: 300 * time.Millisecond, Reconnect: 10 * time.Millisecond})
	if !errors.Is(err, ErrUnavailable) || time.Since(start) > patience {
		t.Error(err)
	}
	if _, err := Open(Options{Targets: "discover://127.0.0.1:1", ConnectTimeout: 300 * time.Millisecond, Reconnect: 10 * time.Millisecond}); !errors.Is(err, ErrUnavailable) {
		t.Error(err)
	}
	c := open(t, Options{Targets: "tcp://127.0.0.1:1/nqn.2026-11.dev.kvof:x,discover://127.0.0.1:1", NoWait: true})
	want(t, do(t, c, op(t, c, Get, "k", nil))[0], Unavailable, 0)
	s := targettest.Serve(t, targettest.Options{})
	part := open(t, Options{Targets: urlOf(s) + ",tcp://127.0.0.1:1/nqn.2026-11.dev.kvof:x", ConnectTimeout: time.Second})
	if n := part.Counters(); n.TargetsUp != 1 || n.Targets != 2 {
		t.Errorf("%+v", n)
	}
	mem := make([]byte, 0x3000)
	if err := part.Register(mem[0x1000:0x2000], nil); err != nil {
		t.Error(err)
	}
	for _, r := range [][2]int{{0x1fff, 0x2001}, {0x800, 0x1001}, {0x1100, 0x1104}, {0x1000, 0x1fff}, {5, 5}} {
		if part.Register(mem[r[0]:r[1]], nil) == nil {
			t.Errorf("%x was registered", r)
		}
	}
	if err := errors.Join(part.Register(mem[0x1000:0x2000], nil), part.Register(mem[0x2000:], nil), part.Unregister(&mem[0x1000]), part.Register(mem[0x1fff:0x2000], nil)); err != nil {
		t.Error(err)
	}
	if part.Unregister(&mem[0x1000]) == nil || part.Register(mem[:1], &rdma.DMABuf{FD: -1}) != ErrUnsupported {
		t.Error("unknown memory was accepted")
	}
}

// TestRDMA moves values over RDMA, from and to memory that is registered and memory that is not, and goes on over TCP without it.
func TestRDMA(t *testing.T) {
	s := targettest.Serve(t, targettest.Options{RDMA: true})
	c := open(t, Options{Targets: urlOf(s) + "|rdma://" + s.RDMA + "/" + s.NQN, DataDigest: true, verbs: s.Verbs})
	eventually(t, "both paths", func() bool { return c.Counters().PathsUp == 2 })
	v := random(3<<20 + 100)
	in, out := bytes.Clone(v), make([]byte, len(v)+1000)
	if err := c.Register(in, nil); err != nil {
		t.Fatal(err)
	}
	for i, key := range []string{short, long} {
		for j, cut := range []int{0, 1, 100_000, 2 << 20} {
			name := fmt.Sprint(key[i:], j)
			if key == short {
				name = fmt.Sprint("key", j)
			}
			want(t, do(t, c, op(t, c, Put, name, in[:cut], in[cut:]))[0], OK, 0)
			for range 2 {
				clear(out)
				want(t, do(t, c, op(t, c, Get, name, out[:cut], out[cut:len(v)]))[0], OK, uint64(len(v)))
				if !bytes.Equal(out[:len(v)], v) {
					t.Fatalf("%s: other bytes", name)
				}
				want(t, do(t, c, op(t, c, Get, name, out))[0], OK, uint64(len(v)))
				if err := c.Register(out, nil); err != nil { // the second time it is
					t.Fatal(err)
				}
			}
			if err := c.Unregister(&out[0]); err != nil {
				t.Fatal(err)
			}
			want(t, do(t, c, op(t, c, ExistPrefix, name))[0], OK, 0)
		}
	}
	for _, st := range s.Target.Status().Controllers { // RDMA goes before TCP
		for _, q := range st.Queues {
			if q.QID > 0 && q.InFlight > 0 {
				t.Error("a command is left")
			}
		}
	}
	rdmaPath := (*(*c.set.Load())[0].paths.Load())[1]
	if n := rdmaPath.beats.Load(); n < 8*6 {
		t.Errorf("%d commands over RDMA", n)
	}
	rdmaPath.drop(rdmaPath.live.Load(), errors.New("test"))
	want(t, do(t, c, op(t, c, Get, long[1:]+"0", out[:len(v)]))[0], OK, uint64(len(v)))
	eventually(t, "RDMA again, with the memory registered", func() bool { return c.Counters().PathsUp == 2 })
	want(t, do(t, c, op(t, c, Get, long[1:]+"0", out[:len(v)]))[0], OK, uint64(len(v)))
}

// TestDMABuf moves values between the target and the memory of a device, which no processor may touch.
func TestDMABuf(t *testing.T) {
	for name, key := range map[string]string{"as it is": short[:10], "hashed": long} {
		t.Run(name, func(t *testing.T) {
			s := targettest.Serve(t, targettest.Options{RDMA: true})
			c := open(t, Options{Targets: urlOf(s) + "|rdma://" + s.RDMA + "/" + s.NQN, verbs: s.Verbs})
			eventually(t, "the path over RDMA", func() bool { return c.Counters().PathsUp == 2 })
			v := random(1<<20 + 100)
			mem, content, buf := rdmatest.DMABuf(t, 4<<20, 4096+8)
			if err := errors.Join(c.Register(mem, &buf), c.Register(mem, &buf)); err != nil {
				t.Fatal(err)
			}
			if c.Register(mem, nil) == nil {
				t.Error("the memory of a dma-buf was registered as the host's")
			}
			host := random(100)
			for i, size := range []int{1, 64, 4096, 100_000, len(v)} {
				put, get := mem[:size], mem[2<<20:]
				copy(content, v[:size])
				k := fmt.Sprint(key, i)
				want(t, do(t, c, op(t, c, Put, k, put[:size/2], put[size/2:], host))[0], OK, 0)
				// Of the right size, the last piece in other memory; and larger.
				clear(content)
				back := make([]byte, len(host))
				want(t, do(t, c, op(t, c, Get, k, get[:size], back))[0], OK, uint64(size+len(host)))
				if !bytes.Equal(content[2<<20:][:size], v[:size]) || !bytes.Equal(back, host) {
					t.Fatalf("%d bytes: other bytes", size)
				}
				clear(content)
				want(t, do(t, c, op(t, c, Get, k, get[:size/3], get[1<<20:]))[0], OK, uint64(size+len(host)))
				if got := append(bytes.Clone(content[2<<20:][:size/3]), content[3<<20:]...); !bytes.Equal(got[:size+len(host)], append(bytes.Clone(v[:size]), host...)) {
					t.Fatalf("%d bytes into more: other bytes", size)
				}
				want(t, do(t, c, op(t, c, Get, k, get[:size/2]))[0], Truncated, uint64(size+len(host)))
			}
			// What was stored from a device is read into other memory, and the other way round.
			k := fmt.Sprint(key, 4)
			out := make([]byte, len(v)+len(host))
			want(t, do(t, c, op(t, c, Get, k, out))[0], OK, uint64(len(out)))
			if !bytes.Equal(out[:len(v)], v) {
				t.Error("other bytes")
			}
			want(t, do(t, c, op(t, c, Put, k+"b", out))[0], OK, 0)
			clear(content)
			want(t, do(t, c, op(t, c, Get, k+"b", mem[:len(out)]))[0], OK, uint64(len(out)))
			if !bytes.Equal(content[:len(out)], out) {
				t.Error("other bytes")
			}
			want(t, do(t, c, op(t, c, Get, key+"absent", mem))[0], Miss, 0)
			// TCP carries none of it, and the rest as ever. A path that comes back carries it again.
			p := (*(*c.set.Load())[0].paths.Load())[1]
			eventually(t, "both paths", func() bool { return c.Counters().PathsUp == 2 })
			live := p.live.Load()
			live.hostOnly.Store(true)
			got := do(t, c, op(t, c, Get, k, mem), op(t, c, Put, k+"c", mem[:1]), op(t, c, Get, k, out), op(t, c, Get, k, out, mem[:1]))
			for i, st := range []Status{Unsupported, Unsupported, OK, Unsupported} {
				if got[i].Status != st {
					t.Errorf("%d: status %d, want %d", i, got[i].Status, st)
				}
			}
			p.drop(live, errors.New("test"))
			eventually(t, "RDMA again, with the memory registered", func() bool { return c.Counters().PathsUp == 2 })
			want(t, do(t, c, op(t, c, Get, k, mem[:len(out)]))[0], OK, uint64(len(out)))
			if err := c.Unregister(&mem[0]); err != nil || c.devices.Load() != nil {
				t.Error(err)
			}
		})
	}
}

// TestNoDMABuf has dma-bufs that nobody takes.
func TestNoDMABuf(t *testing.T) {
	mem, _, buf := rdmatest.DMABuf(t, 8192, 0)
	s := targettest.Serve(t, targettest.Options{RDMA: true})
	s.Host.NoDMABuf = true
	for _, url := range []string{urlOf(s), "rdma://" + s.RDMA + "/" + s.NQN} {
		c := open(t, Options{Targets: url, verbs: s.Verbs})
		for _, buf := range []rdma.DMABuf{buf, {FD: -1}} {
			if err := c.Register(mem, &buf); err != ErrUnsupported {
				t.Errorf("%s: %v", url, err)
			}
		}
		if len(c.regions) != 0 {
			t.Error("it counts as registered")
		}
		c.Close()
	}
	s.Host.NoDMABuf = false
	c := open(t, Options{Targets: "rdma://" + s.RDMA + "/" + s.NQN, verbs: s.Verbs})
	if err := c.Register(mem, &rdma.DMABuf{FD: -1}); err == nil || err == ErrUnsupported {
		t.Error("does not tell that dma-bufs are taken:", err)
	}
	if err := c.Register(mem, &rdma.DMABuf{FD: buf.FD, Offset: 4096}); err == nil || err == ErrUnsupported || len(c.regions) != 0 {
		t.Error(err)
	}
}

func TestParse(t *testing.T) {
	const nqn = "nqn.2026-11.dev.kvof:a"
	for in, want := range map[string]string{
		"tcp://h/" + nqn: "[{{NQN [{tcp h:4420 NQN 0}]} []  0 }]",
		" x = tcp://h:1/" + nqn + " | rdma://[::1]/" + nqn + "?ns=2 ": "[{{x [{tcp h:1 NQN 0} {rdma [::1]:4420 NQN 2}]} []  0 }]",
		"tcp://h/" + nqn + "?ns=1,tcp://h/" + nqn + "?ns=2":           "[{{NQN?ns=1 [{tcp h:4420 NQN 1}]} []  0 } {{NQN?ns=2 [{tcp h:4420 NQN 2}]} []  0 }]",
		"discover://a|discover://b:7":                                 "[{{ []} [a:8009 b:7]  0 }]",
		"y=discover://a/" + nqn + "?ns=3":                             "[{{ []} [a:8009] NQN 3 y}]",
	} {
		got, err := parseTargets(in)
		if s := strings.ReplaceAll(fmt.Sprint(got), nqn, "NQN"); err != nil || s != want {
			t.Errorf("%s: %s, %v; want %s", in, s, err, want)
		}
	}
	for _, in := range []string{"", "tcp://h", "tcp:///" + nqn, "h/" + nqn, "tcp://h/nqn", "http://h/" + nqn, "tcp://h/" + nqn + ",tcp://g/" + nqn, "=tcp://h/" + nqn,
		"tcp://h/" + nqn + "?ns=0", "tcp://h/" + nqn + "?ns=x", "tcp://h/" + nqn + "?nsid=1", "tcp://h/" + nqn + "|discover://h", "discover://a|discover://b/" + nqn,
		"z=discover://a", "tcp://h/" + nqn + ",", "tcp://u@h/" + nqn, "tcp://h:x/" + nqn, "a=tcp://h/" + nqn + ",a=tcp://g/" + nqn + "2", "tcp://h/" + nqn + "#f"} {
		if got, err := parseTargets(in); err == nil {
			t.Errorf("%q: %v", in, got)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("tcp://h:1/nqn.2026-11.dev.kvof:a?ns=1|rdma://[::1]/nqn.2026-11.dev.kvof:a,x=discover://b")
	f.Fuzz(func(t *testing.T, s string) {
		sources, err := parseTargets(s)
		for _, src := range sources {
			if err == nil && (len(src.discovery) == 0) == (len(src.target.paths) == 0 || src.target.name == "") {
				t.Fatalf("%q: %+v", s, src)
			}
		}
	})
}

// TestShares: targets get about equal shares of the keys, and a target more moves only its share.
func TestShares(t *testing.T) {
	var set []*target
	c := &Client{opts: Options{QueueDepth: 1, IOQueues: 1}}
	for i := range 5 {
		set = append(set, newTarget(c, fmt.Sprintf("nqn.2026-11.dev.kvof:%d", i)))
	}
	const n = 20000
	var shares [5]int
	moved := 0
	for i := range n {
		k, _ := keys.NewScheme(keys.Scope{}, false).Key(fmt.Appendf(nil, "a key with a number, %d", i))
		five, four := owner(set, k.Bytes()), owner(set[:4], k.Bytes())
		shares[five]++
		if five != four {
			if moved++; five != 4 {
				t.Fatal("a key moved between targets that stay")
			}
		}
	}
	for i, s := range shares {
		if s < n/6 || s > n/4 {
			t.Errorf("target %d has %d of %d", i, s, n)
		}
	}
	if moved != shares[4] {
		t.Errorf("%d keys moved, the new target has %d", moved, shares[4])
	}
}
