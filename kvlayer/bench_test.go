package kvlayer

import (
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kvof/kvof/uring"
)

func benchDevices(b *testing.B, f func(b *testing.B, s *Store)) {
	const size = 1 << 30
	b.Run("memory", func(b *testing.B) {
		dev, err := uring.NewMemory(size)
		if err != nil {
			b.Fatal(err)
		}
		defer dev.Close()
		s := open(b, dev, newArena(b), Options{})
		defer s.Close()
		f(b, s)
	})
	b.Run("file", func(b *testing.B) {
		a := newArena(b)
		s := open(b, newFile(b, size, a), a, Options{})
		defer s.Close()
		f(b, s)
	})
}

var benchSizes = []int64{4 << 10, 64 << 10, 2 << 20}

// BenchmarkStore replaces 16 keys round and round: fill, checksum, write, publish.
func BenchmarkStore(b *testing.B) {
	benchDevices(b, func(b *testing.B, s *Store) {
		for _, size := range benchSizes {
			b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
				b.SetBytes(size)
				b.ReportAllocs()
				var w Writer
				for i := 0; b.Loop(); i++ {
					if err := s.Create(&w, key(i%16), size, StoreAlways); err != nil {
						b.Fatal(err)
					}
					for m := w.Buffer(1 << 20); m != nil; m = w.Buffer(1 << 20) {
						w.Filled(len(m)) // as the kernel would fill it
					}
					if err := w.Commit(); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	})
}

func BenchmarkRetrieve(b *testing.B) {
	benchDevices(b, func(b *testing.B, s *Store) {
		for _, size := range benchSizes {
			b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
				for i := range 16 {
					mustPut(b, s, key(i), value(uint64(i), int(size)))
				}
				b.SetBytes(size)
				b.ReportAllocs()
				var r Reader
				for i := 0; b.Loop(); i++ {
					if err := s.Open(&r, key(i%16), size); err != nil {
						b.Fatal(err)
					}
					for {
						m, err := r.Next()
						if err == io.EOF {
							break
						}
						if err != nil {
							b.Fatal(err)
						}
						m.Put()
					}
					r.Close()
				}
			})
		}
	})
}

func BenchmarkExist(b *testing.B) {
	benchDevices(b, func(b *testing.B, s *Store) {
		if !s.p.mem {
			b.Skip("no I/O")
		}
		for i := range 10000 {
			mustPut(b, s, key(i), nil)
		}
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			if _, ok := s.Exist(key(i % 10000)); !ok {
				b.Fatal("gone")
			}
		}
	})
}

// BenchmarkFull compares a full device that evicts all the time with an empty one, a round of both
// for each iteration (so -benchtime 5x). First four workers store values that nobody reads: what is evicted is the
// oldest. Then three retrieve values of a fifth of the device, while one stores 256 MiB a second; and as these are
// touched, they are moved again and again when the device is full, also while four workers store. It reports medians.
func BenchmarkFull(b *testing.B) {
	defer func(d time.Duration) { maxWait = d }(maxWait)
	maxWait = 10 * time.Second // as outside of tests
	const size = 6 << 30
	for _, kind := range []string{"memory", "file"} {
		for _, n := range []int64{64 << 10, 2 << 20, 16 << 20} {
			b.Run(fmt.Sprintf("%s/%dKiB", kind, n>>10), func(b *testing.B) {
				a, err := uring.NewArena(64 << 20)
				if err != nil {
					b.Fatal(err)
				}
				defer a.Close()
				dev, err := uring.NewMemory(size)
				if kind == "file" {
					dev, err = uring.OpenFile(filepath.Join(b.TempDir(), "dev"), uring.FileOptions{Size: size, Arena: a})
				}
				if err != nil {
					b.Skip(err)
				}
				defer dev.Close()
				results := map[string][]float64{}
				fullRound(b, dev, a, n, map[string][]float64{}) // the device's own first time
				for b.Loop() {
					fullRound(b, dev, a, n, results)
				}
				b.ReportMetric(0, "ns/op")
				for name, all := range results {
					slices.Sort(all)
					b.ReportMetric(all[len(all)/2], name)
				}
			})
		}
	}
}

func fullRound(b *testing.B, dev uring.Device, a *uring.Arena, n int64, results map[string][]float64) {
	add := func(name string, v float64) { results[name] = append(results[name], v) }
	for _, hot := range []bool{false, true} {
		f := openFull(b, dev, a, n, hot)
		emptyStores, emptyTail := f.stores(b, dev.Size()/8)
		var emptyRetrieves, emptyReads float64
		if hot {
			emptyRetrieves, emptyReads = f.retrieves(b, time.Second)
		}
		for f.s.Stats().Evictions[0] == 0 {
			f.stores(b, dev.Size()/16)
		}
		before := f.s.Stats()
		stores, tail := f.stores(b, dev.Size()/8)
		if hot {
			retrieves, reads := f.retrieves(b, time.Second)
			add("retrieve-MB/s", retrieves)
			add("retrieve-full/empty", retrieves/emptyRetrieves)
			add("retrieve-p99.9-µs", reads)
			add("retrieve-p99.9-µs-empty", emptyReads)
			add("store-moving-full/empty", stores/emptyStores)
			st := f.s.Stats()
			add("moved/stored", float64(st.Moved-before.Moved)/float64(st.Written-before.Written))
		} else {
			add("store-MB/s", stores)
			add("store-full/empty", stores/emptyStores)
			add("store-p99.9-µs", tail)
			add("store-p99.9-µs-empty", emptyTail)
			add("full-%", float64(f.s.Stats().Used)*100/float64(dev.Size()))
			add("waits", float64(f.s.p.asks))
		}
		f.s.Close()
	}
}

// openFull makes a store with the values that are retrieved, a fifth of the device. If they are to be hot,
// they have been, so that they are known to be.
func openFull(b *testing.B, dev uring.Device, a *uring.Arena, n int64, hot bool) *fullBench {
	format(b, dev)
	s, err := Open(dev, a, Options{})
	if err != nil {
		b.Fatal(err)
	}
	f := &fullBench{s: s, n: n, hot: int(dev.Size() / 5 / n), source: value(1, 128<<10)}
	f.next.Store(int64(f.hot))
	var w Writer
	for k := range f.hot {
		f.store(b, &w, k)
	}
	if hot {
		f.retrieves(b, time.Second)
	}
	return f
}

func format(b *testing.B, dev uring.Device) {
	op := uring.Op{Kind: uring.OpZero, Len: 128 << 10}
	if err := op.Do(dev); err != nil {
		b.Fatal(err)
	}
}

type fullBench struct {
	s    *Store
	n    int64        // bytes of a value
	hot  int          // keys below that are retrieved
	next atomic.Int64 // key to be stored

	source []byte // of all values
}

func (f *fullBench) store(b *testing.B, w *Writer, k int) {
	if err := f.s.Create(w, mixed(k), f.n, StoreAlways); err != nil {
		b.Error(err)
		return
	}
	for m := w.Buffer(len(f.source)); m != nil; m = w.Buffer(len(f.source)) {
		w.Filled(copy(m, f.source)) // as the kernel fills it from a socket
	}
	if err := w.Commit(); err != nil {
		b.Error(err)
	}
}

// retrieve tells whether the value is there, which it has read.
func (f *fullBench) retrieve(b *testing.B, r *Reader, k int) bool {
	if err := f.s.Open(r, mixed(k), f.n); err != nil {
		return false
	}
	defer r.Close()
	for {
		m, err := r.Next()
		if err == io.EOF {
			return true
		}
		if err != nil {
			b.Error(err)
			return false
		}
		m.Put()
	}
}

// stores stores new values of so many bytes, four at a time.
func (f *fullBench) stores(b *testing.B, bytes int64) (mbs, tail float64) {
	var left atomic.Int64
	left.Store(bytes / f.n)
	return f.run(4, func(_ int, took func(time.Duration)) {
		var w Writer
		for left.Add(-1) >= 0 {
			start := time.Now()
			f.store(b, &w, int(f.next.Add(1)-1))
			took(time.Since(start))
		}
	})
}

// retrieves retrieves hot values, three at a time, and stores new ones at its pace.
func (f *fullBench) retrieves(b *testing.B, d time.Duration) (mbs, tail float64) {
	const pace = 256 << 20 // bytes a second
	begin := time.Now()
	return f.run(4, func(worker int, took func(time.Duration)) {
		var w Writer
		var r Reader
		for i := int64(1); time.Since(begin) < d; i++ {
			if worker == 0 {
				f.store(b, &w, int(f.next.Add(1)-1))
				time.Sleep(time.Until(begin.Add(time.Duration(i * f.n * int64(time.Second) / pace))))
				continue
			}
			k := rand.IntN(f.hot)
			if start := time.Now(); f.retrieve(b, &r, k) {
				took(time.Since(start))
			} else {
				f.store(b, &w, k) // evicted unread, or moved from under three quarters of its segment
			}
		}
	})
}

// run has workers work, and returns the megabytes a second of what they timed, and the 99.9th
// percentile in microseconds.
func (f *fullBench) run(workers int, work func(worker int, took func(time.Duration))) (mbs, tail float64) {
	all := make([][]time.Duration, workers)
	begin := time.Now()
	var wg sync.WaitGroup
	for i := range workers {
		wg.Go(func() { work(i, func(d time.Duration) { all[i] = append(all[i], d) }) })
	}
	wg.Wait()
	elapsed := time.Since(begin).Seconds()
	times := slices.Concat(all...)
	slices.Sort(times)
	return float64(len(times)) * float64(f.n) / 1e6 / elapsed, float64(times[len(times)*999/1000].Microseconds())
}
