package kvlayer

import (
	"bytes"
	"errors"
	"testing"

	"github.com/kvof/kvof/uring"
)

const mib = 1 << 20

func TestValues(t *testing.T) {
	sizes := []int{0, 1, 511, 4096, 4097, 16 << 10, 16<<10 + 1, pieceSize - 1, pieceSize, pieceSize + 1, 256 << 10, 300_001, mib + 5, 5*mib + 17}
	devices(t, 128*mib, func(t *testing.T, dev uring.Device, a *uring.Arena) {
		s := open(t, dev, a, Options{})
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
		s = open(t, dev, a, Options{})
		defer s.Close()
		check()
	})
}

func TestLargestValue(t *testing.T) {
	devices(t, 1100*mib, func(t *testing.T, dev uring.Device, a *uring.Arena) {
		if _, ok := dev.(*disk); ok {
			t.Skip("slow for nothing new")
		}
		s := open(t, dev, a, Options{})
		defer s.Close()
		if s.MaxValue() != 64*mib {
			t.Fatalf("MaxValue %d", s.MaxValue())
		}
		v := value(1, 64*mib)
		mustPut(t, s, key(1), v)
		mustPut(t, s, key(2), v)
		if _, free := s.freeSegment(); free != len(s.segs)-1 {
			t.Fatal("two of the largest values do not share a segment")
		}
		mustGet(t, s, key(1), v)
		if err := put(s, key(3), make([]byte, 64*mib+1), StoreAlways); !errors.Is(err, ErrTooLarge) {
			t.Fatal(err)
		}
	})
}
