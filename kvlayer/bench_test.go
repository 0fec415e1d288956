package kvlayer

import (
	"fmt"
	"io"
	"testing"

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
