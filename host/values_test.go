package host

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/kvof/kvof/nvmeof"
)

var testKey = []byte("key")

// noParts checks that nothing but these keys is stored.
func onlyKeys(t *testing.T, m *memory, want ...string) {
	t.Helper()
	if got := m.keys(); !slices.Equal(got, want) {
		t.Errorf("keys are %q, not %q", got, want)
	}
}

func store(t *testing.T, v *Values, key, value []byte) {
	t.Helper()
	if err := v.Store(t.Context(), key, value, StoreAlways); err != nil {
		t.Fatal(err)
	}
}

// holds checks that a key holds a value, in each way it can be read.
func holds(t *testing.T, v *Values, key, want []byte) {
	t.Helper()
	ctx := t.Context()
	if size, err := v.Size(ctx, key); size != int64(len(want)) || err != nil {
		t.Fatal(size, len(want), err)
	}
	for _, n := range []int{0, 1, 47, len(want) / 2, len(want) - 1, len(want), len(want) + 1} {
		buf := bytes.Repeat([]byte{0xEE}, max(n, 0)+8)
		size, err := v.Retrieve(ctx, key, buf[:max(n, 0)])
		part := min(max(n, 0), len(want))
		if size != len(want) || err != nil || !bytes.Equal(buf[:part], want[:part]) || !bytes.Equal(buf[len(buf)-8:], bytes.Repeat([]byte{0xEE}, 8)) {
			t.Fatalf("%d of %d bytes: %d, %v", n, len(want), size, err)
		}
	}
	var b bytes.Buffer
	if n, err := v.RetrieveTo(ctx, key, &b); n != int64(len(want)) || err != nil || !bytes.Equal(b.Bytes(), want) {
		t.Fatal(n, len(want), err)
	}
}

// TestValuesPaths has each path read what any other has stored: by ranges, or without them if it carries that.
func TestValuesPaths(t *testing.T) {
	t.Run("retrieve", func(t *testing.T) { valuesPaths(t, newMemory(0)) })
	t.Run("ranges", func(t *testing.T) { valuesPaths(t, newMemory(0).withVendor()) })
}

func valuesPaths(t *testing.T, m *memory) {
	paths := map[string]*Values{}
	for name, limit := range map[string]uint64{"wide": 0, "narrow": 4096, "odd": 5000} {
		paths[name] = (&KV{path: &limited{m, limit}, ns: m.open().ns}).Values(0)
	}
	paths["asked"] = m.open().Values(4096)
	sizes := []int{0, 1, 16, 47, 48, 4095, 4096, 4097, 5000, 8192, 100000}
	for writer, v := range paths {
		for _, n := range sizes {
			key := fmt.Appendf(nil, "%s %d", writer, n)
			store(t, v, key, random(n))
			if size, err := v.StoreFrom(t.Context(), append(key, 's'), iotest.HalfReader(bytes.NewReader(random(n))), StoreAlways); size != int64(n) || err != nil {
				t.Fatal(size, err)
			}
		}
	}
	for writer := range paths {
		for reader, v := range paths {
			for _, n := range sizes {
				key := fmt.Appendf(nil, "%s %d", writer, n)
				whole := map[string]int{"wide": 1 << 30, "narrow": 4096, "odd": 5000, "asked": 4096}[writer]
				carries := map[string]int{"wide": 1 << 30, "narrow": 4096, "odd": 5000, "asked": 1 << 30}[reader]
				if min(n, whole) > carries && m.vendor == nil {
					if _, err := v.Retrieve(t.Context(), key, make([]byte, n)); !errors.Is(err, ErrTransferSize) {
						t.Errorf("%s reads what %s wrote, %d: %v", reader, writer, n, err)
					}
					if _, err := v.RetrieveTo(t.Context(), key, io.Discard); !errors.Is(err, ErrTransferSize) {
						t.Errorf("%s reads what %s wrote, %d: %v", reader, writer, n, err)
					}
					continue
				}
				holds(t, v, key, random(n))
				holds(t, v, append(key, 's'), random(n))
			}
		}
	}
	var listed []string
	for key, err := range paths["narrow"].List(t.Context(), nil) {
		if err != nil {
			t.Fatal(err)
		}
		listed = append(listed, string(key))
		if ok, err := paths["odd"].Exist(t.Context(), key); !ok || err != nil {
			t.Error(ok, err)
		}
	}
	if len(listed) != 2*len(sizes)*len(paths) {
		t.Errorf("%d keys listed", len(listed))
	}
	if s, err := paths["wide"].Sweep(t.Context(), 0); err != nil || s.Live == 0 || s.Deleted+s.Young+s.Unknown != 0 {
		t.Errorf("%+v %v", s, err)
	}
	for _, key := range listed {
		if err := paths["narrow"].Delete(t.Context(), []byte(key)); err != nil {
			t.Error(err)
		}
	}
	onlyKeys(t, m)
}

// TestValuesRanges replaces, deletes and damages a value between the ranges in which it is read.
func TestValuesRanges(t *testing.T) {
	const size = 50_000
	begin := func() (*memory, *Values) {
		m := newMemory(0).withVendor()
		store(t, m.open().Values(0), testKey, random(size))
		m.limit = 4096
		return m, m.open().Values(0)
	}
	read := func(v *Values) ([]byte, int, error) {
		buf := make([]byte, size+100)
		n, err := v.Retrieve(t.Context(), testKey, buf)
		return buf[:min(max(n, 0), len(buf))], n, err
	}
	m, v := begin()
	var ranges atomic.Int32
	third := make(chan bool)
	m.hook = func(op uint8, _ string) error { // the second range is not answered before the third has come
		switch ranges.Add(1) {
		case 2:
			<-third
		case 3:
			close(third)
		}
		return nil
	}
	if b, n, err := read(v); n != size || err != nil || !bytes.Equal(b, random(size)) {
		t.Errorf("%d bytes, %v", n, err)
	}
	// after has f run once, after some ranges.
	after := func(m *memory, ranges int, f func()) {
		m.hook = func(op uint8, _ string) error {
			m.mu.Lock()
			defer m.mu.Unlock()
			if ranges--; op == nvmeof.OpRetrieveRange && ranges == 0 {
				f()
			}
			return nil
		}
	}
	for _, ranges := range []int{2, 5, 13} {
		for _, now := range []int{size, 10, 2 * size} {
			m, v := begin()
			after(m, ranges, func() { m.kv["key"], m.tags["key"] = random(now + 1)[1:], 99 })
			if b, n, err := read(v); n != now || err != nil || !bytes.Equal(b, random(now + 1)[1:][:len(b)]) {
				t.Errorf("replaced by %d bytes after %d ranges: %d, %v", now, ranges, n, err)
			}
		}
		m, v := begin()
		after(m, ranges, func() { delete(m.kv, "key") })
		if _, _, err := read(v); !errors.Is(err, nvmeof.KeyDoesNotExist) {
			t.Errorf("deleted after %d ranges: %v", ranges, err)
		}
		m, v = begin()
		after(m, ranges, func() { m.kv["key"] = random(size - 1) }) // with the same tag
		if _, _, err := read(v); !errors.Is(err, ErrProtocol) {
			t.Errorf("of another size after %d ranges: %v", ranges, err)
		}
		m, v = begin()
		after(m, ranges, func() { m.vendor = nil }) // another target, which does not know the command
		if _, _, err := read(v); !errors.Is(err, ErrTransferSize) {
			t.Errorf("without the command after %d ranges: %v", ranges, err)
		}
	}
	m, v = begin()
	m.hook = func(op uint8, _ string) error {
		m.mu.Lock()
		defer m.mu.Unlock()
		if op == nvmeof.OpRetrieveRange {
			m.tags["key"]++
		}
		return nil
	}
	if _, _, err := read(v); err != ErrReplaced {
		t.Errorf("replaced again and again: %v", err)
	}
	m, v = begin()
	m.tags["key"] = 0
	if _, _, err := read(v); !errors.Is(err, ErrProtocol) {
		t.Errorf("without a tag: %v", err)
	}
	for _, offset := range []int64{-4, 1, 1 << 32} {
		if _, _, err := v.KV().RetrieveRange(t.Context(), testKey, make([]byte, 8), offset, 0); !errors.Is(err, nvmeof.InvalidField) {
			t.Errorf("offset %d: %v", offset, err)
		}
	}
}

func TestRangeEnd(t *testing.T) {
	for _, x := range []struct{ limit, from, granularity, want int64 }{
		{4096, 0, 1024, 4096}, {5000, 0, 1024, 4096}, {5000, 4096, 1024, 8192}, {1000, 0, 1024, 1000}, {1002, 0, 1024, 1000},
		{1000, 1000, 1024, 1024}, {4096, 7000, 1024, 10240}, {4096, 96_000, 1024, 100_000}, {4096, 0, 4, 4096},
	} {
		k := newMemory(uint64(x.limit)).open()
		if got := k.rangeEnd(make([]byte, 100_000), x.from, x.granularity); got != x.want {
			t.Errorf("%+v: %d", x, got)
		}
	}
}

// limited is a narrower path to a memory.
type limited struct {
	*memory
	limit uint64
}

func (l *limited) maxTransfer([]byte) uint64 { return l.limit }
func (l *limited) submit(ctx context.Context, cmd nvmeof.Command, d data, once bool) (nvmeof.Completion, int, error) {
	if l.limit != 0 && uint64(d.size()) > l.limit {
		return nvmeof.Completion{}, 0, tooLarge(d.size(), l.limit)
	}
	return l.memory.submit(ctx, cmd, d, once)
}

func TestValuesReplace(t *testing.T) {
	for _, edn := range []bool{false, true} {
		m := newMemory(4096)
		m.edn = edn
		v := m.open().Values(0)
		for i, n := range []int{10, 9000, 50000, 4096, 4097, 3} { // whole and split in turns
			value := random(n + i)
			store(t, v, testKey, value)
			holds(t, v, testKey, value)
			whole := n+i <= 4096
			if parts := (n + i + 4095) / 4096; whole && len(m.keys()) != 1 || !whole && len(m.keys()) != parts+2 {
				t.Errorf("%d bytes leave %d keys", n+i, len(m.keys()))
			}
		}
		if err := v.Delete(t.Context(), testKey); err != nil {
			t.Error(err)
		}
		if err := v.Delete(t.Context(), testKey); errors.Is(err, nvmeof.KeyDoesNotExist) != edn {
			t.Error(err)
		}
		onlyKeys(t, m)
	}
}

func TestValuesModes(t *testing.T) {
	m := newMemory(4096)
	v, ctx := m.open().Values(0), t.Context()
	for _, n := range []int{10, 10000} {
		for _, from := range []bool{false, true} {
			put := func(n int, mode StoreMode) error {
				if !from {
					return v.Store(ctx, testKey, random(n), mode)
				}
				_, err := v.StoreFrom(ctx, testKey, bytes.NewReader(random(n)), mode)
				return err
			}
			if err := put(n, StoreIfExists); !errors.Is(err, nvmeof.KeyDoesNotExist) {
				t.Error(err)
			}
			onlyKeys(t, m)
			if err := put(n, StoreIfAbsent); err != nil {
				t.Error(err)
			}
			if err := put(n+1, StoreIfAbsent); !errors.Is(err, nvmeof.KeyExists) {
				t.Error(err)
			}
			holds(t, v, testKey, random(n))
			if err := put(n+1, StoreIfExists); err != nil {
				t.Error(err)
			}
			holds(t, v, testKey, random(n+1))
			if err := v.Delete(ctx, testKey); err != nil {
				t.Error(err)
			}
			onlyKeys(t, m)
		}
	}
	if err := v.Store(ctx, nil, random(10000), 0); !errors.Is(err, nvmeof.InvalidKeySize) {
		t.Error(err)
	}
	short := m.open()
	short.ns.MaxKey = 8
	if err := short.Values(0).Store(ctx, testKey, random(10000), 0); !errors.Is(err, ErrTransferSize) {
		t.Error(err)
	}
	if _, err := m.open().Values(64).StoreFrom(ctx, testKey, bytes.NewReader(random(1000)), 0); err != nil {
		t.Error("a root may be larger than a part", err)
	}
	holds(t, v, testKey, random(1000))
	m.limit = 100
	if err := v.Store(ctx, []byte("b"), random(1000), 0); !errors.Is(err, ErrTransferSize) {
		t.Error("a root must fit into one command", err)
	}
}

// TestValuesLowerLimit: what was stored before the namespace's limit was lowered can be read.
func TestValuesLowerLimit(t *testing.T) {
	m := newMemory(0)
	store(t, m.open().Values(0), testKey, random(9000))
	store(t, m.open().Values(8000), []byte("split"), random(9000))
	lower := m.open()
	lower.ns.MaxValue = 4096
	holds(t, lower.Values(0), testKey, random(9000))
	holds(t, lower.Values(0), []byte("split"), random(9000))
	store(t, lower.Values(0), testKey, random(5000))
	if len(m.kv[string(testKey)]) != rootHeader+2*8 {
		t.Error("not split")
	}
}

// TestValuesLikeRoot: a value that looks like a root comes back as it was.
func TestValuesLikeRoot(t *testing.T) {
	m := newMemory(4096)
	v := m.open().Values(0)
	store(t, v, []byte("a"), random(9000))
	for _, like := range [][]byte{m.kv["a"], rootMagic, append(bytes.Clone(rootMagic), random(9000)...)} {
		store(t, v, []byte("b"), like)
		holds(t, v, []byte("b"), like)
	}
	// The same under another key by another client is no value.
	m.kv["c"] = m.kv["a"]
	if _, err := v.Retrieve(t.Context(), []byte("c"), make([]byte, 9000)); !errors.Is(err, ErrDamaged) {
		t.Error(err)
	}
	if _, err := v.RetrieveTo(t.Context(), []byte("c"), io.Discard); !errors.Is(err, ErrDamaged) {
		t.Error(err)
	}
}

// TestValuesTampering changes each thing that is stored in turn.
func TestValuesTampering(t *testing.T) {
	m := newMemory(4096)
	v := m.open().Values(0)
	value := random(20000)
	store(t, v, testKey, value)
	saved := map[string][]byte{}
	for k, b := range m.kv {
		saved[k] = b
	}
	for k, b := range saved {
		changes := [][]byte{nil, b[:len(b)-1], append(bytes.Clone(b), 0)}
		for _, i := range []int{0, 16, 17, 20, 24, 30, 35, 40, 47, 48, len(b) - 1} {
			if i < len(b) {
				c := bytes.Clone(b)
				c[i] ^= 1
				changes = append(changes, c)
			}
		}
		_, i, part := parsePartKey([]byte(k))
		for j, c := range changes {
			m.kv[k] = c
			if c == nil {
				delete(m.kv, k)
			}
			buf := make([]byte, len(value))
			n, err := v.Retrieve(t.Context(), testKey, buf)
			var b bytes.Buffer
			_, err2 := v.RetrieveTo(t.Context(), testKey, &b)
			switch {
			case part && i == noteIndex: // does not matter to readers
				if n != len(value) || err != nil || err2 != nil {
					t.Errorf("note, change %d: %d %v", j, n, err)
				}
			case !part && c == nil:
				if !errors.Is(err, nvmeof.KeyDoesNotExist) || !errors.Is(err2, nvmeof.KeyDoesNotExist) {
					t.Error(err, err2)
				}
			case !part && !isRoot(c): // some other value
				if n != len(c) || err != nil || !bytes.Equal(buf[:n], c) {
					t.Errorf("change %d: %d %v", j, n, err)
				}
			default:
				if !errors.Is(err, ErrDamaged) || !errors.Is(err2, ErrDamaged) || !bytes.HasPrefix(value, b.Bytes()) {
					t.Errorf("key %q, change %d: %v, %v", k, j, err, err2)
				}
			}
			m.kv[k] = saved[k]
		}
	}
	holds(t, v, testKey, value)
	// What is damaged can be replaced and deleted.
	g, _, _ := parsePartKey([]byte(m.keys()[1]))
	delete(m.kv, string(partKey(g, 2)))
	store(t, v, testKey, value)
	holds(t, v, testKey, value)
	m.kv[string(testKey)][17] ^= 1
	store(t, v, testKey, value)
	holds(t, v, testKey, value)
	m.kv[string(testKey)][24] ^= 1
	if err := v.Delete(t.Context(), testKey); err != nil {
		t.Error(err)
	}
}

var errCrash = errors.New("crashed")

// crash ends every command from the n-th on that changes something.
func crash(m *memory, n int64) {
	var left atomic.Int64
	left.Store(n)
	m.hook = func(op uint8, _ string) error {
		if (op == nvmeof.OpStore || op == nvmeof.OpDelete) && left.Add(-1) < 0 {
			return errCrash
		}
		return nil
	}
}

// TestValuesCrash has the writer die after each of its steps: readers see the value before, or the new one, whole, and a
// sweep leaves nothing else.
func TestValuesCrash(t *testing.T) {
	before, after := random(10000), random(20000)
	for name, step := range map[string]func(v *Values) error{
		"store":     func(v *Values) error { return v.Store(t.Context(), testKey, after, StoreAlways) },
		"if absent": func(v *Values) error { return v.Store(t.Context(), testKey, after, StoreIfAbsent) },
		"if exists": func(v *Values) error { return v.Store(t.Context(), testKey, after, StoreIfExists) },
		"whole":     func(v *Values) error { return v.Store(t.Context(), testKey, after[:10], StoreAlways) },
		"stream": func(v *Values) error {
			_, err := v.StoreFrom(t.Context(), testKey, bytes.NewReader(after), StoreAlways)
			return err
		},
		"delete": func(v *Values) error { return v.Delete(t.Context(), testKey) },
		"bad reader": func(v *Values) error {
			_, err := v.StoreFrom(t.Context(), testKey, io.MultiReader(bytes.NewReader(after), iotest.ErrReader(errCrash)), StoreAlways)
			return err
		},
	} {
		for _, old := range [][]byte{nil, before[:100], before} {
			for n := int64(0); ; n++ {
				m := newMemory(4096)
				v := m.open().Values(0)
				if old != nil {
					store(t, v, testKey, old)
				}
				crash(m, n)
				err := step(v)
				m.hook = nil
				buf := make([]byte, 30000)
				size, rerr := v.Retrieve(t.Context(), testKey, buf)
				got := buf[:size]
				switch {
				case errors.Is(rerr, nvmeof.KeyDoesNotExist):
					if old != nil && name != "delete" {
						t.Fatalf("%s, step %d: the value is gone", name, n)
					}
				case rerr != nil:
					t.Fatalf("%s, step %d: %v", name, n, rerr)
				case !bytes.Equal(got, old) && !bytes.Equal(got, after) && !bytes.Equal(got, after[:10]):
					t.Fatalf("%s, step %d: half a value", name, n)
				case err == nil && bytes.Equal(got, old) && name != "delete":
					t.Fatalf("%s, step %d: not stored, and no error", name, n)
				}
				if s, err := v.Sweep(t.Context(), time.Hour); err != nil || s.Deleted != 0 {
					t.Fatalf("%s, step %d: young parts: %+v %v", name, n, s, err)
				}
				if s, err := v.Sweep(t.Context(), -time.Hour); err != nil || s.Unknown+s.Young != 0 {
					t.Fatalf("%s, step %d: %+v %v", name, n, s, err)
				}
				switch size2, err := v.Retrieve(t.Context(), testKey, buf); {
				case size2 != size || !errors.Is(err, rerr) && err != rerr:
					t.Fatalf("%s, step %d: the sweep took the value: %v", name, n, err)
				case rerr != nil:
					onlyKeys(t, m)
				default:
					if err := v.Delete(t.Context(), testKey); err != nil {
						t.Fatal(err)
					}
					onlyKeys(t, m)
				}
				if err == nil && n > 30 || n > 60 {
					break
				}
			}
		}
	}
}

// TestValuesUnknown loses the answer to each store in turn: what may be referred to is not deleted.
func TestValuesUnknown(t *testing.T) {
	value := random(10000)
	for n := range 6 {
		for _, mode := range []StoreMode{StoreAlways, StoreIfAbsent} {
			m := newMemory(4096)
			v := m.open().Values(0)
			left, lost := n, false
			lossy := &KV{path: losing{m, func(op uint8) bool {
				left--
				lost = lost || left == -1
				return left == -1
			}}, ns: v.kv.ns}
			err := lossy.Values(0).Store(t.Context(), testKey, value, mode)
			if err == nil {
				holds(t, v, testKey, value)
			} else if !errors.Is(err, ErrOutcomeUnknown) {
				t.Error(err)
			} else if ok, _ := v.Exist(t.Context(), testKey); ok {
				holds(t, v, testKey, value)
			}
			if !lost && n < 4 {
				t.Error("nothing was lost")
			}
		}
	}
}

// losing carries out stores and loses the answers it is told to lose.
type losing struct {
	*memory
	lose func(op uint8) bool
}

func (l losing) submit(ctx context.Context, cmd nvmeof.Command, d data, once bool) (nvmeof.Completion, int, error) {
	cqe, n, err := l.memory.submit(ctx, cmd, d, once)
	l.mu.Lock()
	defer l.mu.Unlock()
	if cmd.Opcode() == nvmeof.OpStore && l.lose(cmd.Opcode()) {
		return nvmeof.Completion{}, 0, fmt.Errorf("%w: %w", ErrConnectionLost, ErrOutcomeUnknown)
	}
	return cqe, n, err
}

// TestValuesCancel gives up in the middle of a store: nothing is left of it.
func TestValuesCancel(t *testing.T) {
	m := newMemory(4096)
	v := m.open().Values(0)
	ctx, cancel := context.WithCancel(t.Context())
	m.hook = func(op uint8, key string) error {
		if _, i, ok := parsePartKey([]byte(key)); ok && op == nvmeof.OpStore {
			time.Sleep(time.Millisecond)
			if i == 30 {
				cancel()
			}
		}
		return nil
	}
	if err := v.Store(ctx, testKey, random(300000), 0); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	onlyKeys(t, m)
	if m.most < 2 || m.most > partWindow {
		t.Errorf("%d commands in flight", m.most)
	}
}

// TestValuesConcurrent has writers replace and delete one value while others read it. Each value has one byte throughout.
func TestValuesConcurrent(t *testing.T) {
	m := newMemory(4096)
	v := m.open().Values(0)
	ctx := t.Context()
	var stop atomic.Bool
	var readers, writers sync.WaitGroup
	var seen atomic.Int64
	check := func(b []byte) {
		if len(b) > 0 && !bytes.Equal(b, bytes.Repeat(b[:1], len(b))) {
			t.Error("bytes of two values")
			stop.Store(true)
		}
		seen.Add(1)
	}
	fine := func(err error) bool {
		return err == nil || errors.Is(err, nvmeof.KeyDoesNotExist) || errors.Is(err, ErrReplaced)
	}
	for range 3 {
		readers.Go(func() {
			buf := make([]byte, 40000)
			for !stop.Load() {
				n, err := v.Retrieve(ctx, testKey, buf)
				if err == nil {
					check(buf[:n])
				}
				var b bytes.Buffer
				if _, err2 := v.RetrieveTo(ctx, testKey, &b); !fine(err) || !fine(err2) {
					t.Error(err, err2)
					return
				}
				check(b.Bytes())
			}
		})
	}
	for g := range 4 {
		writers.Go(func() {
			r := rand.New(rand.NewPCG(1, uint64(g)))
			for i := range 100 {
				value := bytes.Repeat([]byte{byte(g<<6 | i)}, 1+r.IntN(40000))
				var err error
				if i%10 == 9 {
					err = v.Delete(ctx, testKey)
				} else {
					err = v.Store(ctx, testKey, value, StoreAlways)
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	writers.Wait()
	stop.Store(true)
	readers.Wait()
	if seen.Load() < 10 {
		t.Errorf("only %d values were read", seen.Load())
	}
	store(t, v, testKey, random(12345))
	if _, err := v.Sweep(ctx, -time.Hour); err != nil { // losers' parts
		t.Error(err)
	}
	holds(t, v, testKey, random(12345))
	if n := len(m.keys()); n != 1+4+1 {
		t.Errorf("%d keys are left", n)
	}
}

// TestValuesReplacedMidway: what was passed on cannot be taken back.
func TestValuesReplacedMidway(t *testing.T) {
	m := newMemory(4096)
	v := m.open().Values(0)
	store(t, v, testKey, random(200000))
	var once sync.Once
	w := writerFunc(func(b []byte) (int, error) {
		once.Do(func() { store(t, v, testKey, random(5000)) })
		return len(b), nil
	})
	n, err := v.RetrieveTo(t.Context(), testKey, w)
	if !errors.Is(err, ErrReplaced) || n == 0 || n >= 200000 {
		t.Error(n, err)
	}
	failing := writerFunc(func([]byte) (int, error) { return 0, errCrash })
	if _, err := v.RetrieveTo(t.Context(), testKey, failing); err != errCrash {
		t.Error(err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

func TestSweepUnknown(t *testing.T) {
	m := newMemory(4096)
	v := m.open().Values(0)
	m.kv[string(partKey(1, 0))] = random(10) // no note
	m.kv[string(partKey(2, 0))] = random(10) // a note that is none
	m.kv[string(partKey(2, noteIndex))] = random(noteSize)
	r := root{generation: 3, size: 5000, part: 4096, digests: make([]uint64, 2)}
	b := r.encode(testKey)
	b[16] = 2 // of a later format
	m.kv[string(testKey)] = b
	m.kv[string(partKey(3, 0))] = random(10)
	m.kv[string(partKey(3, noteIndex))] = (&note{testKey, time.Unix(0, 0)}).encode()
	want := len(m.keys())
	s, err := v.Sweep(t.Context(), 0)
	if err != nil || s.Unknown != 3 || s.Deleted != 0 || len(m.keys()) != want {
		t.Errorf("%+v %v", s, err)
	}
	if _, err := v.Size(t.Context(), testKey); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "format 2") {
		t.Error(err)
	}
}

// TestSplitFormat pins what is stored, byte by byte, to docs/split-values.md.
func TestSplitFormat(t *testing.T) {
	r := root{generation: 0x0102030405060708, size: 5000, part: 4096, digests: []uint64{0x1112131415161718, 0x2122232425262728}}
	want := "6b766f662073706c69742076616c7565" + "01000000" + "00100000" + "8813000000000000" + "0807060504030201"
	if got := fmt.Sprintf("%x", r.encode([]byte("k"))); got[:80] != want || got[96:] != "1817161514131211"+"2827262524232221" {
		t.Error(got)
	}
	if got := fmt.Sprintf("%x", partKey(r.generation, 0x0a0b0c)); got != "ff6b766f66"+"0102030405060708"+"0a0b0c" {
		t.Error(got)
	}
	n := note{[]byte("kk"), time.Unix(0x55443322, 0)}
	want = "6b766f662073706c6974207061727473" + "01000000" + "02000000" + "6b6b" + strings.Repeat("00", 14) + "2233445500000000" + strings.Repeat("00", 8)
	if got := fmt.Sprintf("%x", n.encode()); got[:112] != want {
		t.Error(got)
	}
}

func FuzzRoot(f *testing.F) {
	r := root{generation: 7, size: 5000, part: 4096, digests: []uint64{1, 2}}
	f.Add(r.encode(testKey), 64)
	f.Add((&note{testKey, time.Unix(1, 0)}).encode(), 64)
	f.Fuzz(func(t *testing.T, b []byte, size int) {
		if r, err := decodeRootHeader(b, size); err == nil && (r.parts() < 1 || r.parts() > maxParts || r.length(r.parts()-1) < 1) {
			t.Errorf("%+v", r)
		}
		if r, err := decodeRoot(testKey, b); err == nil && (int64(len(r.digests)) != r.parts() || !bytes.Equal(r.encode(testKey), b)) {
			t.Errorf("%+v", r)
		}
		if n, err := decodeNote(b); err == nil && (len(n.key) < 1 || len(n.key) > 16) {
			t.Errorf("%+v", n)
		}
		if len(b) >= 48 { // with the right checksum, which a fuzzer does not find
			b := bytes.Clone(b)
			binary.LittleEndian.PutUint64(b[40:], rootDigest(testKey, b))
			if r, err := decodeRoot(testKey, b); err == nil && (int64(len(r.digests)) != r.parts() || !bytes.Equal(r.encode(testKey), b)) {
				t.Errorf("%+v", r)
			}
		}
	})
}
