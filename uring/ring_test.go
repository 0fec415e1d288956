package uring

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/pawelgaczynski/giouring"
)

func newTestRing(t *testing.T, entries, flags uint32) *ring {
	t.Helper()
	r, err := newRing(entries, flags)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// finish submits what is filled and returns n results.
func finish(t *testing.T, r *ring, n int) (all []completion) {
	t.Helper()
	if err := r.submit(); err != nil {
		t.Fatal(err)
	}
	var some [64]completion
	for end := time.Now().Add(20 * time.Second); len(all) < n; {
		all = append(all, some[:r.reap(some[:])]...)
		if time.Now().After(end) {
			t.Fatalf("%d of %d completions", len(all), n)
		}
	}
	return all
}

// TestRingLaps goes round rings of both kinds several times: every entry comes clear, whatever was in it, and every
// completion is read from its place.
func TestRingLaps(t *testing.T) {
	for name, flags := range map[string]uint32{"narrow": 0, "wide": wideRing} {
		t.Run(name, func(t *testing.T) {
			r := newTestRing(t, 8, flags)
			defer r.close()
			size := unsafe.Sizeof(giouring.SubmissionQueueEntry{})
			if flags != 0 {
				size = unsafe.Sizeof(wideEntry{})
			}
			for lap := range uint64(5) {
				for i := range uint64(8) {
					e := r.sqe()
					b := unsafe.Slice((*byte)(unsafe.Pointer(e)), size)
					if !bytes.Equal(b, make([]byte, size)) {
						t.Fatalf("lap %d, entry %d: % x", lap, i, b)
					}
					for j := range b {
						b[j] = 0xFF // as the command before left it
					}
					*e = giouring.SubmissionQueueEntry{OpCode: giouring.OpNop, UserData: lap<<8 | i}
				}
				if r.sqe() != nil || r.ready() != 8 {
					t.Fatal("the queue holds more than it should")
				}
				seen := map[uint32]bool{}
				for _, c := range finish(t, r, 8) {
					if c.res != 0 || uint64(c.slot)>>8 != lap || seen[c.slot] {
						t.Fatalf("lap %d: %+v", lap, c)
					}
					seen[c.slot] = true
				}
			}
		})
	}
}

// TestRingFile reads through a registered file, and through another in its place.
func TestRingFile(t *testing.T) {
	r := newTestRing(t, 8, wideRing)
	defer r.close()
	a := newArena(t, 2<<20)
	b := a.Get(4096)
	defer b.Put()
	for i, text := range []string{"first", "second"} {
		f, err := os.Create(filepath.Join(t.TempDir(), text))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteString(text); err != nil {
			t.Fatal(err)
		}
		if err := r.registerFile(int(f.Fd()), i > 0); err != nil {
			t.Fatal(err)
		}
		f.Close() // the ring has its own hold
		e := r.sqe()
		e.OpCode, e.Flags, e.Addr, e.Len = giouring.OpRead, giouring.SqeFixedFile, uint64(address(b.Data)), 4096
		if c := finish(t, r, 1)[0]; int(c.res) != len(text) || string(b.Data[:c.res]) != text {
			t.Errorf("%d, %q", c.res, b.Data[:10])
		}
	}
	if err := r.registerFile(-1, true); err != nil {
		t.Fatal(err)
	}
	e := r.sqe()
	e.OpCode, e.Flags, e.Addr, e.Len = giouring.OpRead, giouring.SqeFixedFile, uint64(address(b.Data)), 4096
	if c := finish(t, r, 1)[0]; c.res >= 0 {
		t.Errorf("a read of no file: %d", c.res)
	}
	if err := r.registerFile(1<<20, false); err == nil {
		t.Error("a file that is not open is registered")
	}
}

// TestRingFreed wants all mappings of rings gone with them.
func TestRingFreed(t *testing.T) {
	mapped := func() int {
		b, err := os.ReadFile("/proc/self/maps")
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(b), "io_uring")
	}
	before := mapped()
	for _, entries := range []uint32{1, 8, 64, 256} {
		for _, flags := range []uint32{0, wideRing} {
			r := newTestRing(t, entries, flags)
			if mapped() == before {
				t.Fatal("a ring has no mapping: this test sees nothing")
			}
			r.close()
			if n := mapped() - before; n != 0 {
				t.Errorf("%d entries, flags %#x: %d mappings are left", entries, flags, n)
			}
		}
	}
}
