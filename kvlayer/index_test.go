package kvlayer

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

const testExtent = 4 << 20

func newTestIndex(t testing.TB) *index {
	s, err := newSlab()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.close)
	return newIndex(s, testExtent)
}

// scattered is a key like those of content hashes.
func scattered(n int) Key {
	var b [MaxKey]byte
	binary.BigEndian.PutUint64(b[:], uint64(n)*0x9E3779B97F4A7C15)
	binary.BigEndian.PutUint64(b[8:], uint64(n))
	return loadKey(b[:], MaxKey)
}

// partEntries are the entries of a value of size bytes.
func partEntries(k Key, seq uint64, size int64) (es []entry) {
	for part := range max(1, int((size+testExtent-1)/testExtent)) {
		es = append(es, makeEntry(k, part, seq, size, int64(seq)*16+int64(part)))
	}
	return es
}

// TestIndexModel compares the index with a map: dense keys and scattered ones, of
// several lengths, whole values and striped ones, from empty to many leaves and back.
func TestIndexModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s, err := newSlab()
		if err != nil {
			t.Fatal(err)
		}
		defer s.close()
		x := newIndex(s, testExtent)
		type val struct {
			seq  uint64
			size int64
		}
		model := map[Key]val{}
		seq := uint64(0)
		kind := rapid.IntRange(0, 2).Draw(t, "kind")
		name := func(i int) Key {
			switch kind {
			case 0:
				return key(i)
			case 1:
				return scattered(i)
			}
			k, _ := MakeKey(make([]byte, 1+i%16)) // keys that differ in their length alone, too
			k.hi = uint64(i/16) << 56
			return k
		}
		keys := rapid.SampledFrom([]int{500, 2000, 2000, 20_000}).Draw(t, "keys")
		if kind == 2 {
			keys = min(keys, 4096)
		}
		put := func(i int, size int64) {
			seq++
			k := name(i)
			old := x.replace(k, partEntries(k, seq, size), nil)
			v, had := model[k]
			if had != (len(old) > 0) || had && (old[0].seq() != v.seq || len(old) != len(partEntries(k, 0, v.size))) {
				t.Fatalf("replace returned %v, had %v", old, v)
			}
			model[k] = val{seq, size}
		}
		del := func(i int) {
			k := name(i)
			if old := x.replace(k, nil, nil); (len(old) > 0) != (model[k].seq != 0) {
				t.Fatal("removed what was not there, or not what was")
			}
			delete(model, k)
		}
		t.Repeat(map[string]func(*rapid.T){
			"put many": func(t *rapid.T) {
				from, n := rapid.IntRange(0, keys).Draw(t, "from"), rapid.IntRange(1, 6000).Draw(t, "n")
				for i := range n {
					put((from+i)%keys, int64(i%3)*3<<20)
				}
			},
			"delete many": func(t *rapid.T) {
				from, n := rapid.IntRange(0, keys).Draw(t, "from"), rapid.IntRange(1, 9000).Draw(t, "n")
				for i := range n {
					del((from + i) % keys)
				}
			},
			"put": func(t *rapid.T) {
				put(rapid.IntRange(0, keys-1).Draw(t, "key"), rapid.Int64Range(0, MaxValue).Draw(t, "size"))
			},
			"delete": func(t *rapid.T) { del(rapid.IntRange(0, keys-1).Draw(t, "key")) },
			"move": func(t *rapid.T) {
				k := name(rapid.IntRange(0, keys-1).Draw(t, "key"))
				e, ok := x.get(k, 0, 0)
				if !ok {
					return
				}
				if !x.update(e, func(e *entry) { e.meta |= entryPinned }) || x.update(makeEntry(k, 0, seq+1, 0, 0), func(*entry) {}) {
					t.Fatal("update changes what it names, and nothing else")
				}
				if e, _ = x.get(k, 0, 0); !e.pinned() {
					t.Fatal("not updated")
				}
			},
			"remove": func(t *rapid.T) {
				k := name(rapid.IntRange(0, keys-1).Draw(t, "key"))
				v, ok := model[k]
				if !ok {
					return
				}
				es := partEntries(k, v.seq, v.size)
				if old := x.remove(es[len(es)-1], nil); len(old) != len(es) {
					t.Fatalf("%d parts removed of %d", len(old), len(es))
				}
				delete(model, k)
			},
			"": func(t *rapid.T) {
				if int(x.keys.Load()) != len(model) {
					t.Fatalf("%d keys, want %d", x.keys.Load(), len(model))
				}
				for k, v := range model {
					got := x.all(nil, k)
					want := partEntries(k, v.seq, v.size)
					if !slices.EqualFunc(got, want, entry.same) {
						t.Fatalf("%v: %v, want %v", k, got, want)
					}
				}
				from := name(rapid.IntRange(0, keys-1).Draw(t, "from"))
				var want, got []Key
				for k := range model {
					if k.Compare(from) >= 0 {
						want = append(want, k)
					}
				}
				slices.SortFunc(want, Key.Compare)
				x.ascend(from, func(e entry) bool {
					got = append(got, e.key())
					return true
				})
				if !slices.Equal(got, want) {
					t.Fatalf("%d keys listed, want %d", len(got), len(want))
				}
			},
		})
	})
}

// TestIndexParallel reads without locks while others write: what is there all the
// time is found all the time, whole.
func TestIndexParallel(t *testing.T) {
	x := newTestIndex(t)
	const fixed = 3000
	for i := range fixed {
		k := scattered(i)
		x.replace(k, partEntries(k, 1, 10<<20), nil)
	}
	var stop atomic.Bool
	var writers, readers sync.WaitGroup
	for g := range 2 {
		writers.Go(func() {
			for round := range 2 {
				for i := range 10000 {
					k := scattered(fixed + 2*i + g)
					x.replace(k, partEntries(k, uint64(round+2), 0), nil)
				}
				for i := range 10000 {
					x.replace(scattered(fixed+2*i+g), nil, nil)
				}
			}
		})
		readers.Go(func() {
			for i := 0; !stop.Load(); i++ {
				k := scattered(i % fixed)
				if _, ok := x.get(k, 2, 1); !ok {
					t.Error("a key that is there was not found")
					return
				}
				if es := x.all(nil, k); len(es) != 3 {
					t.Errorf("%d parts of 3", len(es))
					return
				}
				if i%5000 == 0 {
					n := 0
					x.ascend(Key{}, func(e entry) bool {
						if e.size() > 0 {
							n++
						}
						return true
					})
					if n != fixed {
						t.Errorf("%d keys listed of %d that are always there", n, fixed)
						return
					}
				}
			}
		})
	}
	writers.Wait()
	stop.Store(true)
	readers.Wait()
}

// TestIndexSize fills and empties an index in order, as a log does, and at random:
// the bytes of an entry, and that memory serves again.
func TestIndexSize(t *testing.T) {
	const n = 60_000
	for name, k := range map[string]func(int) Key{"dense": key, "scattered": scattered} {
		x := newTestIndex(t)
		for i := range n {
			x.replace(k(i), partEntries(k(i), 1, 1), nil)
		}
		perEntry := float64(x.size()) / n
		if t.Logf("%s: %.1f bytes an entry, %d leaves", name, perEntry, len(x.dir.Load().leaves)); perEntry > 48 {
			t.Errorf("%s: %.1f bytes an entry", name, perEntry)
		}
		peak := x.slab.bytes()
		for i := range 3 * n { // as many keys come as go
			x.replace(k(i), nil, nil)
			x.replace(k(n+i), partEntries(k(n+i), 1, 1), nil)
		}
		if x.slab.bytes() > peak*5/4 {
			t.Errorf("%s: %d bytes mapped, %d before", name, x.slab.bytes(), peak)
		}
		for i := 3 * n; i < 4*n; i++ {
			x.replace(k(i), nil, nil)
		}
		if n := len(x.dir.Load().leaves); n != 1 || x.keys.Load() != 0 {
			t.Errorf("%s: %d leaves of nothing", name, n)
		}
	}
}

// size is all the memory of an index, in bytes.
func (x *index) size() int64 {
	return x.slab.bytes() + int64(len(x.dir.Load().leaves))*int64(24+8+unsafe.Sizeof(leaf{}))
}

// mixed is a key like a hash's result.
func mixed(n int) Key {
	var b [MaxKey]byte
	h := uint64(n) * 0x9E3779B97F4A7C15
	h = (h ^ h>>30) * 0xBF58476D1CE4E5B9
	h = (h ^ h>>27) * 0x94D049BB133111EB
	binary.BigEndian.PutUint64(b[:], h^h>>31)
	binary.BigEndian.PutUint64(b[8:], uint64(n))
	return loadKey(b[:], MaxKey)
}

func fillIndex(x *index, n int) {
	var wg sync.WaitGroup
	workers := runtime.GOMAXPROCS(0)
	for w := range workers {
		wg.Go(func() {
			var es, old [1]entry
			for i := w; i < n; i += workers {
				k := mixed(i)
				es[0] = makeEntry(k, 0, 1, 2<<20, int64(i))
				x.replace(k, es[:], old[:0])
			}
		})
	}
	wg.Wait()
}

// TestIndexCollector fills an index while others allocate: what the garbage collector has to do does
// not depend on its entries. With KVOF_KEYS, such as 100000000, of that many entries, and then 99 of 100 times that
// the collector stops the program are no longer than 1 ms; how long the longest is with and without
// entries is told, as on a busy machine a program may wait for a processor meanwhile.
func TestIndexCollector(t *testing.T) {
	n, _ := strconv.Atoi(os.Getenv("KVOF_KEYS"))
	timed := n > 0
	if !timed {
		n = 300_000
	}
	heap := func() int64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	x := newTestIndex(t)
	collect(t, "no entry", timed)
	heapBefore, residentBefore := heap(), resident(t)
	start := time.Now()
	stop := allocating()
	fillIndex(x, n)
	filled := time.Since(start)
	for i := 0; i < n; i += 10 {
		if _, ok := x.get(mixed(i), 0, 1); !ok {
			t.Fatalf("key %d of %d is gone", i, n)
		}
	}
	found := time.Since(start) - filled
	stop()
	grown := heap() - heapBefore
	size := float64(x.size()) / float64(n)
	rss := float64(resident(t)-residentBefore) / float64(n)
	t.Logf("%d entries, filled in %v, a tenth looked up in %v: %.1f B an entry, %.1f B resident (all of the process), %.2f B of them on the heap",
		n, filled.Round(time.Millisecond), found.Round(time.Millisecond), size, rss, float64(grown)/float64(n))
	if size > 48 || grown > int64(n/2)+1<<19 { // half a MiB is scratch
		t.Errorf("%.1f B an entry, %d B of all on the heap", size, grown)
	}
	if pause := collect(t, fmt.Sprint(n, " entries"), timed); pause > 1000 {
		t.Errorf("a pause of up to %.0f µs", pause)
	}
	runtime.KeepAlive(x)
}

// allocating is a program with 64 MiB of small objects, all of which it makes anew, again and again.
func allocating() (stop func()) {
	var stopped atomic.Bool
	var others sync.WaitGroup
	others.Go(func() {
		live := make([]*[128]byte, 1<<19)
		for i := 0; !stopped.Load(); i++ {
			live[i%len(live)] = new([128]byte)
			if i%1000 == 0 {
				time.Sleep(time.Millisecond)
			}
		}
	})
	return func() {
		stopped.Store(true)
		others.Wait()
	}
}

// collect runs the collector many times beside such a program, and returns how long 99 % of the pauses are at most, in microseconds.
func collect(t *testing.T, what string, timed bool) float64 {
	if !timed {
		return 0
	}
	defer allocating()()
	before := pauses()
	for range 300 {
		runtime.GC()
		time.Sleep(10 * time.Millisecond)
	}
	after := pauses()
	t.Logf("%s: %d pauses of the collector, half of them up to %.0f µs, 99 %% up to %.0f µs, the longest up to %.0f µs", what,
		collections(before, after), quantile(before, after, 0.5), quantile(before, after, 0.99), quantile(before, after, 1))
	return quantile(before, after, 0.99)
}

// BenchmarkIndex looks keys up at random in indices of different sizes.
func BenchmarkIndex(b *testing.B) {
	for _, n := range []int{100_000, 1_000_000, 10_000_000} {
		b.Run(strconv.Itoa(n/1000)+"k", func(b *testing.B) { benchIndex(b, n) })
	}
}

func benchIndex(b *testing.B, n int) {
	x := newTestIndex(b)
	fillIndex(x, n)
	perEntry := float64(x.size()) / float64(n)
	pick := make([]uint32, 1<<20) // far smaller than keys, so that these do not take the cache
	for i := range pick {
		pick[i] = uint32(rand.IntN(n))
	}
	run := func(name string, f func(k Key, i int)) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			n, cpu := 0, threadTime()
			for ; b.Loop(); n++ {
				f(mixed(int(pick[n&(len(pick)-1)])), n)
			}
			b.ReportMetric(float64(threadTime()-cpu)/float64(n), "cpu-ns/op") // what a busy machine does not change
			b.ReportMetric(perEntry, "B/entry")
		})
	}
	run("hit", func(k Key, _ int) {
		if _, ok := x.get(k, 0, 1); !ok {
			b.Fatal("gone")
		}
	})
	run("miss", func(k Key, _ int) {
		k.lo |= 1 << 63
		if _, ok := x.get(k, 0, 1); ok {
			b.Fatal("found")
		}
	})
	run("replace", func(k Key, i int) {
		var old [1]entry
		x.replace(k, []entry{makeEntry(k, 0, 2, 2<<20, int64(i))}, old[:0])
	})
	run("list1000", func(k Key, _ int) {
		left := 1000
		x.ascend(k, func(entry) bool { left--; return left > 0 })
	})
}

// threadTime is the CPU time of this thread.
func threadTime() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_THREAD, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func pauses() *metrics.Float64Histogram {
	s := []metrics.Sample{{Name: "/sched/pauses/total/gc:seconds"}}
	metrics.Read(s)
	return s[0].Value.Float64Histogram()
}

// resident is the memory of this process, in bytes.
func resident(t *testing.T) int64 {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Skip(err)
	}
	pages, _ := strconv.ParseInt(strings.Fields(string(b))[1], 10, 64)
	return pages * int64(os.Getpagesize())
}

// collections counts the pauses between two readings.
func collections(a, b *metrics.Float64Histogram) (n uint64) {
	for i := range b.Counts {
		n += b.Counts[i] - a.Counts[i]
	}
	return n
}

// quantile is the upper bound in microseconds of that part of the pauses between two readings.
func quantile(a, b *metrics.Float64Histogram, part float64) float64 {
	n, want := uint64(0), uint64(math.Ceil(part*float64(collections(a, b))))
	for i := range b.Counts {
		if n += b.Counts[i] - a.Counts[i]; n >= want {
			return b.Buckets[i+1] * 1e6
		}
	}
	return 0
}
