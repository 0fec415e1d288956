// Package linearizable looks for an order in which what several clients saw of a store could have happened: of the store itself,
// and of one behind a target.
package linearizable

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/host"
	"github.com/kvof/kvof/kvlayer"
	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/target/targettest"
	"github.com/kvof/kvof/uring"
	"github.com/kvof/kvof/uring/uringtest"
)

// action is an operation on one key, and what came of it.
type action struct {
	kind kind
	key  int
	id   uint64 // of the value stored, or retrieved
	out  outcome
}

type kind uint8

const (
	storeAlways kind = iota
	storeIfExists
	storeIfAbsent
	retrieval
	existence
	deletion
)

type outcome uint8

const (
	done    outcome = iota // it is there, or was
	absent                 // it is not
	present                // it should not be
)

// linear says what one key does, when one thing happens after the other. The
// state is the number of the key's value, 0 when it has none.
func linear(evicts bool) porcupine.Model {
	m := porcupine.NondeterministicModel{
		Init: func() []any { return []any{uint64(0)} },
		Step: func(state, in, _ any) (next []any) {
			states := []uint64{state.(uint64)}
			if evicts && states[0] != 0 {
				states = append(states, 0)
			}
			for _, s := range states {
				if n, ok := step(s, in.(action)); ok && !slices.Contains(next, any(n)) {
					next = append(next, n)
				}
			}
			return next
		},
		Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
			keys := map[int][]porcupine.Operation{}
			for _, o := range history {
				k := o.Input.(action).key
				keys[k] = append(keys[k], o)
			}
			var all [][]porcupine.Operation
			for _, h := range keys {
				all = append(all, h)
			}
			return all
		},
	}
	return m.ToModel()
}

// step tells whether a can happen to a key with value s, and what it then has.
func step(s uint64, a action) (uint64, bool) {
	switch {
	case a.kind == retrieval && a.out == done:
		return s, s != 0 && s == a.id
	case a.kind == retrieval, a.kind == existence && a.out == absent, a.kind == storeIfExists && a.out == absent:
		return s, s == 0
	case a.kind == existence:
		return s, s != 0
	case a.kind == deletion:
		return 0, (s != 0) == (a.out == done)
	case a.kind == storeIfAbsent && a.out == present:
		return s, s != 0
	case a.kind == storeIfAbsent:
		return a.id, s == 0
	case a.kind == storeIfExists:
		return a.id, s != 0
	}
	return a.id, true
}

// TestStep shows that the checker finds what it is there to find.
func TestStep(t *testing.T) {
	op := func(from, to int64, kind kind, id uint64, out outcome) porcupine.Operation {
		return porcupine.Operation{Call: from, Return: to, Input: action{kind: kind, id: id, out: out}}
	}
	for _, c := range []struct {
		name          string
		plain, evicts bool // linearizable in a store that never evicts, in one that may
		history       []porcupine.Operation
	}{
		{"read your write", true, true, []porcupine.Operation{op(1, 2, storeAlways, 1, done), op(3, 4, retrieval, 1, done)}},
		{"old value", false, false, []porcupine.Operation{op(1, 2, storeAlways, 1, done), op(3, 4, storeAlways, 2, done), op(5, 6, retrieval, 1, done)}},
		{"old value, in time", true, true, []porcupine.Operation{op(1, 2, storeAlways, 1, done), op(3, 6, storeAlways, 2, done), op(4, 5, retrieval, 1, done)}},
		{"new, then old", false, false, []porcupine.Operation{op(1, 2, storeAlways, 1, done), op(3, 9, storeAlways, 2, done), op(4, 5, retrieval, 2, done), op(6, 7, retrieval, 1, done)}},
		{"two winners", false, true, []porcupine.Operation{op(1, 4, storeIfAbsent, 1, done), op(2, 3, storeIfAbsent, 2, done)}},
		{"no winner", false, false, []porcupine.Operation{op(1, 4, storeIfAbsent, 1, present), op(2, 3, storeIfAbsent, 2, present)}},
		{"refused by the present", true, true, []porcupine.Operation{op(1, 2, storeIfAbsent, 1, done), op(3, 4, storeIfAbsent, 2, present), op(5, 6, retrieval, 1, done)}},
		{"replaced the absent", false, false, []porcupine.Operation{op(1, 2, storeIfExists, 1, done)}},
		{"back from the dead", false, false, []porcupine.Operation{op(1, 2, storeAlways, 1, done), op(3, 4, deletion, 0, done), op(5, 6, retrieval, 1, done)}},
		{"lost", false, true, []porcupine.Operation{op(1, 2, storeAlways, 1, done), op(3, 4, existence, 0, absent)}},
		{"lost and found", false, false, []porcupine.Operation{op(1, 2, storeAlways, 1, done), op(3, 4, existence, 0, absent), op(5, 6, retrieval, 1, done)}},
		{"deleted twice", false, false, []porcupine.Operation{op(1, 2, storeAlways, 1, done), op(3, 4, deletion, 0, done), op(5, 6, deletion, 0, done)}},
		{"deleted nothing", true, true, []porcupine.Operation{op(1, 2, deletion, 0, absent), op(3, 4, existence, 0, absent)}},
	} {
		if got := porcupine.CheckOperations(linear(false), c.history); got != c.plain {
			t.Errorf("%s: %v", c.name, got)
		}
		if got := porcupine.CheckOperations(linear(true), c.history); got != c.evicts {
			t.Errorf("%s, with eviction: %v", c.name, got)
		}
	}
}

// under is a store under test, and what its clients see of it. A method returns
// false when the store refused for want of space, which changes nothing.
type under interface {
	do(t testing.TB, client int, key []byte, a *action) bool
	list(t testing.TB, client int, yield func(key []byte) bool)
}

// direct is the store itself.
type direct struct{ *kvlayer.Store }

func (d direct) do(t testing.TB, _ int, key []byte, a *action) bool {
	k, err := kvlayer.MakeKey(key)
	if err != nil {
		t.Fatal(err)
	}
	switch a.kind {
	case retrieval:
		var v []byte
		if v, err = d.retrieve(k); err == nil {
			a.id = number(t, v)
		}
	case existence:
		if _, ok := d.Exist(k); !ok {
			err = kvlayer.ErrNotFound
		}
	case deletion:
		existed := false
		if existed, err = d.Delete(k); err == nil && !existed {
			err = kvlayer.ErrNotFound
		}
	default:
		var w kvlayer.Writer
		mode := [...]kvlayer.Mode{storeAlways: kvlayer.StoreAlways, storeIfExists: kvlayer.StoreIfExists, storeIfAbsent: kvlayer.StoreIfAbsent}[a.kind]
		v := value(a.id)
		if err = d.Create(&w, k, int64(len(v)), mode); err == nil {
			for len(v) > 0 {
				n := copy(w.Buffer(len(v)), v)
				w.Filled(n)
				v = v[n:]
			}
			runtime.Gosched() // to meet others
			err = w.Commit()
		}
	}
	switch {
	case err == nil:
		a.out = done
	case errors.Is(err, kvlayer.ErrNotFound):
		a.out = absent
	case errors.Is(err, kvlayer.ErrExists):
		a.out = present
	case errors.Is(err, kvlayer.ErrNoSpace):
		return false
	default:
		t.Errorf("kind %d of key %q: %v", a.kind, key, err)
	}
	return true
}

func (d direct) retrieve(k kvlayer.Key) (v []byte, err error) {
	var r kvlayer.Reader
	if err := d.Open(&r, k, kvlayer.MaxValue); err != nil {
		return nil, err
	}
	defer r.Close()
	for {
		b, err := r.Next()
		if err == io.EOF {
			return v, nil
		} else if err != nil {
			return nil, err
		}
		v = append(v, b.Data...)
		b.Put()
	}
}

func (d direct) list(t testing.TB, _ int, yield func([]byte) bool) {
	d.List(kvlayer.Key{}, func(k kvlayer.Key, _ int64) bool { return yield(k.Append(nil)) })
}

// remote is the store behind a target, with a controller for each client.
type remote []*host.KV

func (r remote) do(t testing.TB, client int, key []byte, a *action) bool {
	kv, err := r[client], error(nil)
	switch a.kind {
	case retrieval:
		b, n := make([]byte, largest), 0
		if n, err = kv.Retrieve(t.Context(), key, b); err == nil {
			a.id = number(t, b[:n])
		}
	case existence:
		ok := false
		if ok, err = kv.Exist(t.Context(), key); err == nil && !ok {
			err = nvmeof.KeyDoesNotExist
		}
	case deletion:
		err = kv.Delete(t.Context(), key)
	default:
		mode := [...]host.StoreMode{storeAlways: host.StoreAlways, storeIfExists: host.StoreIfExists, storeIfAbsent: host.StoreIfAbsent}[a.kind]
		err = kv.Store(t.Context(), key, value(a.id), mode)
	}
	switch {
	case err == nil:
		a.out = done
	case errors.Is(err, nvmeof.KeyDoesNotExist):
		a.out = absent
	case errors.Is(err, nvmeof.KeyExists):
		a.out = present
	case errors.Is(err, nvmeof.CapacityExceeded):
		return false
	default:
		t.Errorf("kind %d of key %q: %v", a.kind, key, err)
	}
	return true
}

func (r remote) list(t testing.TB, client int, yield func([]byte) bool) {
	for key, err := range r[client].List(t.Context(), nil) {
		if err != nil {
			t.Fatal(err)
		}
		if !yield(key) {
			return
		}
	}
}

const largest = 150_000 // bytes of a value

// value is number id, which it begins with.
func value(id uint64) []byte {
	b := make([]byte, [...]int{3000, 60_000, 60_000, largest}[(id+1)%4])
	for i := range len(b) / 8 {
		binary.LittleEndian.PutUint64(b[8*i:], id+uint64(i)*(id|1))
	}
	return b
}

// number finds out which value v is, and that it is that one from its first to its last byte.
func number(t testing.TB, v []byte) uint64 {
	if len(v) < 8 {
		t.Errorf("a value of %d bytes", len(v))
		return 0
	}
	id := binary.LittleEndian.Uint64(v)
	if !bytes.Equal(v, value(id)) {
		t.Errorf("a value of %d bytes that begins as number %d, and is not it", len(v), id)
	}
	return id
}

const clients = 5

// stores runs f on each kind of store.
func stores(t *testing.T, f func(t *testing.T, u under, evicts bool)) {
	for _, c := range []struct {
		name string
		open func(t *testing.T) (uring.Device, *uring.Arena)
	}{
		{"memory", func(t *testing.T) (uring.Device, *uring.Arena) {
			return newMemory(t, 64<<20), uringtest.NewArena(t, 32<<20)
		}},
		{"drive", func(t *testing.T) (uring.Device, *uring.Arena) { // ops overtake each other, and some wait
			var n atomic.Uint32
			p := uringtest.NewPlan(1)
			p.Set(uringtest.Rates{Late: 5})
			return uringtest.Wrap(newMemory(t, 64<<20), func(o *uring.Op) uringtest.Fault {
				f := p.Fault(o)
				if n.Add(1)%7 == 0 {
					f.Delay = 200 * time.Microsecond
				}
				return f
			}), uringtest.NewArena(t, 32<<20)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dev, arena := c.open(t)
			s, err := kvlayer.Open(dev, arena, kvlayer.Options{})
			if err != nil {
				t.Fatal(err)
			}
			f(t, direct{s}, false)
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	for _, device := range []configs.DeviceKind{configs.DeviceMemory, configs.DeviceFile} {
		t.Run("target/"+string(device), func(t *testing.T) { f(t, newRemote(t, device), false) })
	}
}

func newMemory(t *testing.T, size int64) uring.Device {
	d, err := uring.NewMemory(size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// newRemote serves a namespace over TCP and connects the clients.
func newRemote(t *testing.T, device configs.DeviceKind) remote {
	ns := configs.Namespace{NSID: 3, Type: configs.KeyValue, Device: device, Size: 64 << 20, MaxValue: configs.MaxValue, EDNEK: true}
	if device == configs.DeviceFile {
		ns.Path = filepath.Join(t.TempDir(), "kv")
	}
	s := targettest.Serve(t, targettest.Options{})
	s.Apply(ns)
	r := make(remote, clients)
	for i := range r {
		c, err := host.Connect(t.Context(), host.Options{Addr: s.Addr, SubNQN: s.NQN})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if r[i], err = c.KV(t.Context(), ns.NSID); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

// TestLinearizable lets clients work on few keys at once, in short rounds with
// keys of their own, and looks for an order in which one after the other would
// have seen what they saw.
func TestLinearizable(t *testing.T) {
	rounds := 40
	if testing.Short() {
		rounds = 8
	}
	stores(t, func(t *testing.T, u under, evicts bool) {
		const keys, ops = 2, 14
		var id atomic.Uint64
		overlaps := 0
		for round := range rounds {
			var clock atomic.Int64
			var wg sync.WaitGroup
			histories := make([][]porcupine.Operation, clients)
			for c := range clients {
				rnd := rand.New(rand.NewPCG(uint64(round), uint64(c)))
				wg.Go(func() {
					for range ops {
						a := action{kind: [...]kind{storeAlways, storeAlways, storeIfAbsent, storeIfAbsent, storeIfExists, retrieval, retrieval, retrieval, existence, deletion, deletion}[rnd.IntN(11)], key: rnd.IntN(keys)}
						if a.kind <= storeIfAbsent {
							a.id = id.Add(1)
						}
						call := clock.Add(1)
						if u.do(t, c, fmt.Appendf(nil, "%d-%d", round, a.key), &a) {
							histories[c] = append(histories[c], porcupine.Operation{ClientId: c, Input: a, Call: call, Return: clock.Add(1)})
						}
					}
				})
			}
			wg.Wait()
			history := slices.Concat(histories...)
			for _, o := range history {
				if o.Return > o.Call+1 {
					overlaps++
				}
			}
			if r := porcupine.CheckOperationsTimeout(linear(evicts), history, time.Minute); r != porcupine.Ok {
				slices.SortFunc(history, func(a, b porcupine.Operation) int { return int(a.Call - b.Call) })
				for _, o := range history {
					t.Logf("client %d, %d to %d: %+v", o.ClientId, o.Call, o.Return, o.Input)
				}
				t.Fatalf("round %d: %v", round, r)
			}
			for k := range keys {
				u.do(t, 0, fmt.Appendf(nil, "%d-%d", round, k), &action{kind: deletion})
			}
		}
		if overlaps < rounds {
			t.Errorf("only %d operations met others", overlaps)
		}
	})
}

// TestListStable lists while keys come, go and are replaced: those that are
// there all the time show exactly once, always in the same order, and nothing
// shows that was never stored.
func TestListStable(t *testing.T) {
	stores(t, func(t *testing.T, u under, evicts bool) {
		const steady, passing = 500, 50 // even numbers stay
		put := func(client int, k string, id uint64) {
			u.do(t, client, []byte(k), &action{kind: storeAlways, id: id})
		}
		const small = 3 // a value of 3000 bytes
		for i := range steady {
			put(0, fmt.Sprintf("steady%d", i), small)
		}
		var stop atomic.Bool
		var wg sync.WaitGroup
		for c := range clients - 1 {
			rnd := rand.New(rand.NewPCG(1, uint64(c)))
			wg.Go(func() {
				for !stop.Load() {
					switch k := fmt.Sprintf("passing%d", rnd.IntN(passing)); rnd.IntN(3) {
					case 0:
						put(c, k, small)
					case 1:
						u.do(t, c, []byte(k), &action{kind: deletion})
					default:
						put(c, fmt.Sprintf("steady%d", rnd.IntN(steady)), small) // replaced, and there all the time
					}
				}
			})
		}
		var first []string
		for range 20 {
			var order []string
			seen := map[string]bool{}
			u.list(t, clients-1, func(key []byte) bool {
				k := string(key)
				if seen[k] {
					t.Errorf("%s shows twice", k)
				}
				seen[k] = true
				switch n := 0; {
				case bytes.HasPrefix(key, []byte("steady")):
					order = append(order, k)
				default:
					if _, err := fmt.Sscanf(k, "passing%d", &n); err != nil || n >= passing {
						t.Errorf("%q was never stored", k)
					}
				}
				return true
			})
			if len(order) != steady {
				t.Errorf("%d keys of %d show", len(order), steady)
			}
			if first == nil {
				first = order
			} else if !slices.Equal(first, order) {
				t.Error("the order has changed")
			}
		}
		stop.Store(true)
		wg.Wait()
	})
}
