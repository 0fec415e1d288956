package kvlayer

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/kvof/kvof/uring"
	"pgregory.net/rapid"
)

const mib = 1 << 20

func TestKey(t *testing.T) {
	for _, n := range []int{0, 17, 64} {
		if _, err := MakeKey(make([]byte, n)); !errors.Is(err, ErrKeySize) {
			t.Errorf("a key of %d bytes: %v", n, err)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		gen := rapid.SliceOfN(rapid.SampledFrom([]byte{0, 1, 255}), 1, MaxKey)
		a, b := gen.Draw(t, "a"), gen.Draw(t, "b")
		ka, _ := MakeKey(a)
		kb, _ := MakeKey(b)
		if ka.Compare(kb) != bytes.Compare(a, b) || (ka == kb) != bytes.Equal(a, b) || !bytes.Equal(ka.Append(nil), a) {
			t.Fatalf("%v and %v: %d", ka, kb, ka.Compare(kb))
		}
	})
}

func TestValues(t *testing.T) {
	sizes := []int{0, 1, 511, 4096, 4097, 16 << 10, 16<<10 + 1, pieceSize - 1, pieceSize, pieceSize + 1, 256 << 10, 300_001, mib + 5, 5*mib + 17}
	devices(t, 128*mib, func(t *testing.T, dev uring.Device, a *uring.Arena) {
		s := open(t, dev, a, never)
		for i, n := range sizes {
			mustPut(t, s, key(i), value(uint64(i), n))
		}
		check := func() {
			for i, n := range sizes {
				v := value(uint64(i), n)
				mustGet(t, s, key(i), v)
				for _, limit := range []int{0, 1, 4096, pieceSize, pieceSize + 1, 2*pieceSize - 1, n - 1, n} {
					limit = min(max(0, limit), n)
					if got, err := get(s, key(i), int64(limit)); err != nil || !bytes.Equal(got, v[:limit]) {
						t.Fatalf("%d of %d bytes: %d, %v", limit, n, len(got), err)
					}
				}
				if size, ok := s.Exist(key(i)); !ok || size != int64(n) {
					t.Fatalf("Exist: %d, %v, want %d", size, ok, n)
				}
			}
		}
		check()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Delete(key(0)); !errors.Is(err, ErrClosed) {
			t.Fatalf("Delete after Close: %v", err)
		}
		s = open(t, dev, a, never)
		defer s.Close()
		check()
	})
}

// getRange reads a range; the Reader's Tag is that of the value it came from.
func getRange(s *Store, k Key, offset, limit int64, tag uint32) (b []byte, size int64, is uint32, err error) {
	var r Reader
	if err := s.OpenRange(&r, k, offset, limit, tag); err != nil {
		return nil, 0, 0, err
	}
	defer r.Close()
	b, err = readAll(&r)
	return b, r.Size(), r.Tag(), err
}

func TestRange(t *testing.T) {
	devices(t, 128*mib, func(t *testing.T, dev uring.Device, a *uring.Arena) {
		s := open(t, dev, a, never)
		defer func() { s.Close() }()
		extent := int(s.p.super.extent)
		var tags []uint32
		sizes := []int{0, 1, 4097, pieceSize, 3*pieceSize + 5, extent, 2*extent + pieceSize + 100}
		for i, n := range sizes {
			v := value(uint64(i), n)
			mustPut(t, s, key(i), v)
			_, _, tag, err := getRange(s, key(i), 0, 0, 0)
			if err != nil || tag == 0 || slices.Contains(tags, tag) {
				t.Fatalf("tag %x of %x: %v", tag, tags, err)
			}
			tags = append(tags, tag)
			edges := []int{-1, 0, 4, n - 1, n, 1 << 40, pieceSize - 1, 2*pieceSize + 8, extent - 4, extent, 2*extent + 1}
			for _, from := range edges {
				for _, limit := range []int{0, 1, pieceSize, 2*pieceSize + 1, extent + 2*pieceSize, math.MaxInt} {
					lo := min(max(0, from), n)
					want := v[lo:]
					want = want[:min(limit, len(want))]
					got, size, is, err := getRange(s, key(i), int64(from), int64(limit), tag*uint32(limit%2))
					if err != nil || size != int64(n) || is != tag || !bytes.Equal(got, want) {
						t.Fatalf("%d bytes from %d of %d: %d bytes, size %d, tag %x for %x, %v", limit, from, n, len(got), size, is, tag, err)
					}
				}
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = open(t, dev, a, never)
		for i, tag := range tags {
			if _, _, is, err := getRange(s, key(i), 0, 1, tag); err != nil || is != tag {
				t.Fatalf("opened again: tag %x, not %x: %v", is, tag, err)
			}
		}
		k := len(sizes) - 1
		old, n := tags[k], int64(sizes[k])
		mustPut(t, s, key(k), value(9, sizes[k]))
		if _, _, _, err := getRange(s, key(k), n-10, 10, old); !errors.Is(err, ErrReplaced) {
			t.Fatalf("the value was replaced: %v", err)
		}
		got, _, tag, err := getRange(s, key(k), n-10, 20, 0)
		if err != nil || tag == old || !bytes.Equal(got, value(9, sizes[k])[n-10:]) {
			t.Fatalf("the new value: tag %x after %x, %v", tag, old, err)
		}
		if _, err := s.Delete(key(k)); err != nil {
			t.Fatal(err)
		}
		if _, _, _, err := getRange(s, key(k), n-10, 10, tag); !errors.Is(err, ErrNotFound) {
			t.Fatalf("the value was deleted: %v", err)
		}
	})
}

// TestRangeStats counts a value that is read in ranges once.
func TestRangeStats(t *testing.T) {
	s := open(t, newDisk(8*mib), newArena(t), Options{Eviction: EvictS3FIFO})
	defer s.Close()
	mustPut(t, s, key(1), value(1, 3*pieceSize))
	for off := range int64(3) {
		if _, _, _, err := getRange(s, key(1), off*pieceSize, pieceSize, 0); err != nil {
			t.Fatal(err)
		}
	}
	_, _, _, _ = getRange(s, key(2), pieceSize, pieceSize, 0)
	e, _ := s.index.get(key(1), 0, 0)
	if st := s.Stats(); st.Hits != 1 || st.Misses != 0 || e.touches() != 1 {
		t.Fatalf("%d hits, %d misses, %d touches", st.Hits, st.Misses, e.touches())
	}
}

func TestLargestValue(t *testing.T) {
	if testing.Short() {
		t.Skip("moves hundreds of MiB")
	}
	devices(t, 1100*mib, func(t *testing.T, dev uring.Device, a *uring.Arena) {
		if _, ok := dev.(*disk); ok {
			t.Skip("slow for nothing new")
		}
		s := open(t, dev, a, never)
		defer s.Close()
		if s.MaxValue() != 64*mib {
			t.Fatalf("MaxValue %d", s.MaxValue())
		}
		v := value(1, 64*mib)
		mustPut(t, s, key(1), v)
		mustPut(t, s, key(2), v)
		if st := s.Stats(); st.FreeSegments != st.Segments-1 {
			t.Fatal("two of the largest values do not share a segment")
		}
		mustGet(t, s, key(1), v)
		if err := put(s, key(3), make([]byte, 64*mib+1), StoreAlways); !errors.Is(err, ErrTooLarge) {
			t.Fatal(err)
		}
	})
}

func TestModes(t *testing.T) {
	devices(t, 8*mib, func(t *testing.T, dev uring.Device, a *uring.Arena) {
		s := open(t, dev, a, Options{MaxKeys: 2, MaxValue: 5000, Eviction: EvictNever})
		defer s.Close()
		step := func(k int, v string, m Mode, want error) {
			t.Helper()
			if err := put(s, key(k), []byte(v), m); !errors.Is(err, want) {
				t.Fatalf("store %d, mode %d: %v, want %v", k, m, err, want)
			}
		}
		step(1, "a", StoreIfExists, ErrNotFound)
		step(1, "b", StoreIfAbsent, nil)
		step(1, "c", StoreIfAbsent, ErrExists)
		step(1, "d", StoreIfExists, nil)
		mustGet(t, s, key(1), []byte("d"))
		step(2, string(make([]byte, 5001)), StoreAlways, ErrTooLarge)
		step(2, "e", StoreAlways, nil)
		step(3, "f", StoreAlways, ErrNoSpace) // MaxKeys
		step(2, "g", StoreAlways, nil)
		if existed, err := s.Delete(key(1)); !existed || err != nil {
			t.Fatal(existed, err)
		}
		if existed, err := s.Delete(key(1)); existed || err != nil {
			t.Fatal(existed, err)
		}
		if _, err := get(s, key(1), 1); !errors.Is(err, ErrNotFound) {
			t.Fatal(err)
		}
		step(3, "h", StoreAlways, nil)
		if err := s.Create(new(Writer), Key{}, 1, StoreAlways); !errors.Is(err, ErrKeySize) {
			t.Fatal(err)
		}
		if err := s.Create(new(Writer), key(2), -1, StoreAlways); !errors.Is(err, ErrTooLarge) {
			t.Fatal(err)
		}
		var w Writer
		if err := s.Create(&w, key(2), 2, StoreAlways); err != nil {
			t.Fatal(err)
		}
		if err := s.Create(&w, key(2), 2, StoreAlways); err == nil {
			t.Fatal("a Writer was used twice at once")
		}
		w.Filled(1 << 30) // more than there is, and without Buffer
		w.Filled(-1)
		copy(w.Buffer(1), "x")
		w.Filled(1)
		if !s.p.mem {
			if err := w.Commit(); err == nil {
				t.Fatal("half a value was committed")
			}
		}
		w.Abort()
		mustGet(t, s, key(2), []byte("g"))
	})
}

// recordSpan is what a value of size bytes takes.
func recordSpan(s *Store, size int) (n int64) {
	for i := range s.index.partsOf(int64(size)) {
		n += span(partSize(int64(size), i, s.p.super.extent))
	}
	return n
}

// TestModel runs random operations against a map, reopening now and then.
func TestModel(t *testing.T) {
	arena := newArena(t)
	rapid.Check(t, func(t *rapid.T) {
		var dev uring.Device = newDisk(2*mib + rapid.Int64Range(0, 20).Draw(t, "size")*100<<10&^(block-1))
		if rapid.Bool().Draw(t, "memory") {
			m, err := uring.NewMemory(dev.Size())
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			dev = m
		}
		s, err := Open(dev, arena, never)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { s.Close() }()
		type val struct {
			id   uint64
			size int
		}
		model := map[Key]val{}
		id := uint64(0)
		keys := rapid.Map(rapid.IntRange(0, 11), key)
		sizes := rapid.OneOf(rapid.IntRange(0, 5), rapid.IntRange(0, 300<<10), rapid.Just(40<<10))
		check := func(t *rapid.T, k Key) {
			got, err := get(s, k, MaxValue)
			if v, ok := model[k]; !ok && !errors.Is(err, ErrNotFound) || ok && (err != nil || !bytes.Equal(got, value(v.id, v.size))) {
				t.Fatalf("key %v: %d bytes, %v; stored: %v", k, len(got), err, ok)
			}
		}
		store := func(t *rapid.T) {
			k, n, m := keys.Draw(t, "key"), sizes.Draw(t, "bytes"), Mode(rapid.IntRange(0, 2).Draw(t, "mode"))
			id++
			_, had := model[k]
			err := put(s, k, value(id, n), m)
			switch {
			case had && m == StoreIfAbsent && errors.Is(err, ErrExists):
			case !had && m == StoreIfExists && errors.Is(err, ErrNotFound):
			case int64(n) > s.MaxValue() && errors.Is(err, ErrTooLarge):
			case errors.Is(err, ErrNoSpace):
				// Justified only if no segment can have room for it.
				if st := s.Stats(); st.Used <= st.Capacity-int64(st.Segments-1)*(recordSpan(s, n)+2*span(s.p.super.extent)) {
					t.Fatalf("%v at %d of %d bytes used, for %d", err, st.Used, st.Capacity, n)
				}
			case err == nil && (m == StoreAlways || had == (m == StoreIfExists)) && int64(n) <= s.MaxValue():
				model[k] = val{id, n}
			default:
				t.Fatalf("store of %d bytes, mode %d, had %v: %v", n, m, had, err)
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"store":       store,
			"store again": store,
			"abort": func(t *rapid.T) {
				var a, b Writer
				n := sizes.Draw(t, "bytes")
				if s.Create(&a, key(100), int64(n), StoreAlways) == nil && s.Create(&b, key(101), int64(n), StoreAlways) == nil {
					b.Filled(copy(b.Buffer(n), "half"))
				}
				before := s.Stats().Used
				a.Abort()
				b.Abort()
				a.Abort()
				if before < s.Stats().Used {
					t.Fatal("Abort took space")
				}
			},
			"delete": func(t *rapid.T) {
				k := keys.Draw(t, "key")
				_, had := model[k]
				if existed, err := s.Delete(k); err != nil || existed != had {
					t.Fatalf("Delete: %v, %v, want %v", existed, err, had)
				}
				delete(model, k)
			},
			"get": func(t *rapid.T) { check(t, keys.Draw(t, "key")) },
			"reopen": func(t *rapid.T) {
				before := s.Stats()
				s.Close()
				if s, err = Open(dev, arena, never); err != nil {
					t.Fatal(err)
				}
				if after := s.Stats(); before.Used != after.Used || before.Keys != after.Keys {
					t.Fatalf("before %+v, after %+v", before, after)
				}
			},
			"": func(t *rapid.T) {
				n := 0
				last := Key{}
				s.List(Key{}, func(k Key, size int64) bool {
					v, ok := model[k]
					if !ok || size != int64(v.size) || k.Compare(last) <= 0 {
						t.Fatalf("List: %v of %d bytes", k, size)
					}
					n++
					last = k
					return true
				})
				used := int64(0)
				for _, v := range model {
					used += recordSpan(s, v.size)
				}
				if st := s.Stats(); n != len(model) || st.Keys != n || st.Used != used {
					t.Fatalf("%d keys listed of %d, %+v, want %d used", n, len(model), st, used)
				}
			},
		})
		for i := range 12 {
			check(t, key(i))
		}
	})
}

// TestFull fills a device, which must take exactly what fits; then each delete
// makes room for one more, wherever it was, also after a restart.
func TestFull(t *testing.T) {
	devices(t, 4*mib, func(t *testing.T, dev uring.Device, a *uring.Arena) {
		s := open(t, dev, a, never)
		const size = 50 << 10
		st := s.Stats()
		fit := (st.Segments - 1) * int((st.SegmentSize-2*block)/span(size))
		n := 0
		for put(s, key(n), value(uint64(n), size), StoreAlways) == nil {
			n++
		}
		if n != fit {
			t.Fatalf("%d values fit, want %d", n, fit)
		}
		live := make([]int, n)
		for i := range live {
			live[i] = i
		}
		for round := range 300 {
			i := rand.IntN(len(live))
			if _, err := s.Delete(key(live[i])); err != nil {
				t.Fatal(err)
			}
			if round%50 == 7 {
				s.Close()
				s = open(t, dev, a, never)
			}
			if err := put(s, key(n+round), value(uint64(n+round), size), StoreAlways); err != nil {
				t.Fatalf("round %d: %v, %+v", round, err, s.Stats())
			}
			live[i] = n + round
			if err := put(s, key(-1), value(0, size), StoreAlways); !errors.Is(err, ErrNoSpace) {
				t.Fatalf("one too many in round %d: %v, %+v", round, err, s.Stats())
			}
		}
		for _, i := range live {
			mustGet(t, s, key(i), value(uint64(i), size))
		}
		if s.Stats().Reclaimed == 0 {
			t.Fatal("nothing was cleaned")
		}
		s.Close()
	})
}

// TestPinned deletes what a Reader reads, and reuses all the space it can.
func TestPinned(t *testing.T) {
	devices(t, 4*mib, func(t *testing.T, dev uring.Device, a *uring.Arena) {
		s := open(t, dev, a, never)
		defer s.Close()
		want := value(7, 300<<10)
		mustPut(t, s, key(7), want)
		var r Reader
		if err := s.Open(&r, key(7), MaxValue); err != nil {
			t.Fatal(err)
		}
		b, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Delete(key(7)); err != nil {
			t.Fatal(err)
		}
		for i := range 200 {
			mustPut(t, s, key(i%5), value(uint64(i), 100<<10))
		}
		got := slices.Clone(b.Data) // a view has not changed either
		b.Put()
		for {
			b, err := r.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, b.Data...)
			b.Put()
		}
		r.Close()
		if !bytes.Equal(got, want) {
			t.Fatal("the value changed under its Reader")
		}
	})
}

// TestParallel replaces, deletes and reads from many goroutines on a device
// that is nearly full, so that it is cleaned all the time. Values tell their
// key and version.
func TestParallel(t *testing.T) {
	devices(t, 4*mib, func(t *testing.T, dev uring.Device, a *uring.Arena) {
		s := open(t, dev, a, never)
		const keys, size = 24, 70_000
		var completed [keys]atomic.Uint64 // newest version whose Store completed
		var wg sync.WaitGroup
		rounds := 150
		if testing.Short() {
			rounds = 30
		}
		for g := range 6 {
			wg.Go(func() { // owns keys g, g+6, ...
				var w Writer
				for round := range rounds {
					k := g + 6*rand.IntN(keys/6)
					version := uint64(k)<<32 | uint64(round+1)
					if round%11 == 10 {
						completed[k].Store(0)
						if _, err := s.Delete(key(k)); err != nil {
							t.Error(err)
						}
						continue
					}
					err := s.Create(&w, key(k), size, StoreAlways)
					if errors.Is(err, ErrNoSpace) {
						continue // writes in progress may hold all the room for a while
					} else if err != nil {
						t.Error(err)
						return
					}
					send(&w, value(version, size))
					if round%7 == 6 {
						w.Abort()
					} else if err := w.Commit(); err != nil {
						t.Error(err)
						return
					} else {
						completed[k].Store(version)
					}
				}
			})
			wg.Go(func() {
				for range 2 * rounds {
					k := rand.IntN(keys)
					oldest := completed[k].Load()
					got, err := get(s, key(k), size)
					if errors.Is(err, ErrNotFound) {
						continue
					}
					if err != nil || len(got) != size {
						t.Errorf("key %d: %d bytes, %v", k, len(got), err)
						return
					}
					// Version n's first bytes name it; the deleter resets oldest.
					version := uint64(0)
					for v := uint64(1); v <= uint64(rounds); v++ {
						if n := uint64(k)<<32 | v; binary.LittleEndian.Uint64(got) == rand.New(rand.NewPCG(n, 1)).Uint64() {
							version = n
						}
					}
					if version == 0 || !bytes.Equal(got, value(version, size)) || version < oldest {
						t.Errorf("key %d: version %x, at least %x expected", k, version, oldest)
						return
					}
				}
			})
		}
		wg.Wait()
		if s.Stats().Reclaimed == 0 && !testing.Short() { // a short run on a busy machine may not fill the store
			t.Error("nothing was cleaned")
		}
		// A restart finds the same values: no copy that cleaning made of a dead one is left.
		before := map[Key][]byte{}
		s.List(Key{}, func(k Key, _ int64) bool {
			v, err := get(s, k, size)
			if err != nil {
				t.Error(err)
			}
			before[k] = v
			return true
		})
		if st := s.Stats(); st.Used != int64(len(before))*recordSpan(s, size) {
			t.Errorf("%d bytes used for %d values", st.Used, len(before))
		}
		s.Close()
		s = open(t, dev, a, never)
		defer s.Close()
		if n := s.Stats().Keys; n != len(before) {
			t.Errorf("%d keys after a restart, %d before", n, len(before))
		}
		for k, v := range before {
			mustGet(t, s, k, v)
		}
	})
}

func TestOneWinner(t *testing.T) {
	devices(t, 8*mib, func(t *testing.T, dev uring.Device, a *uring.Arena) {
		s := open(t, dev, a, never)
		defer s.Close()
		for round := range 20 {
			var won atomic.Int32
			var winner atomic.Uint64
			var start, wg sync.WaitGroup
			start.Add(1)
			for g := range uint64(8) {
				var w Writer
				v := value(g, 20_000)
				if err := s.Create(&w, key(round), int64(len(v)), StoreIfAbsent); err != nil {
					t.Fatal(err)
				}
				wg.Go(func() {
					start.Wait()
					send(&w, v)
					switch err := w.Commit(); {
					case err == nil:
						won.Add(1)
						winner.Store(g)
					case !errors.Is(err, ErrExists):
						t.Error(err)
					}
				})
			}
			start.Done()
			wg.Wait()
			if won.Load() != 1 {
				t.Fatalf("%d winners", won.Load())
			}
			mustGet(t, s, key(round), value(winner.Load(), 20_000))
		}
	})
}

// TestAbort gives up what it takes, again and again.
func TestAbort(t *testing.T) {
	s := open(t, newDisk(2*mib), newArena(t), never)
	defer s.Close()
	var w [4]Writer
	for round := range 100 {
		for i := range w {
			if err := s.Create(&w[i], key(i), 40<<10, StoreAlways); err != nil {
				t.Fatal(round, err)
			}
			send(&w[i], value(1, 30<<10))
		}
		for _, i := range rand.Perm(len(w)) {
			w[i].Abort()
		}
		if n := s.used.Load(); n != 0 {
			t.Fatalf("%d bytes used", n)
		}
	}
}

func TestList(t *testing.T) {
	dev, err := uring.NewMemory(16 * mib)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	s := open(t, dev, nil, never)
	defer s.Close()
	for i := range 500 {
		mustPut(t, s, key(2*i), nil)
	}
	next := 101 // absent: a lower bound
	s.List(key(next), func(k Key, _ int64) bool {
		if next++; k != key(next) {
			t.Fatalf("%v, want %v", k, key(next))
		}
		next++
		if _, err := s.Delete(k); err != nil { // yield may call the store
			t.Fatal(err)
		}
		return next < 901
	})
	if n := s.Stats().Keys; next != 901 || n != 100 {
		t.Fatalf("ended at %d with %d keys", next, n)
	}
}
