package uring

import (
	"encoding/binary"
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"
)

func mustPanic(t *testing.T, what string, f func()) {
	t.Helper()
	defer func() {
		if recover() == nil {
			t.Errorf("%s did not panic", what)
		}
	}()
	f()
}

func TestArenaLayout(t *testing.T) {
	for _, size := range []int{1, 2 << 20, 3 << 20, 16 << 20, 37 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			a := newArena(t, size)
			s := a.Stats()
			if want := roundUp(size, hugePage); s.Size != int64(want) || s.Small.Free*SmallBuf+s.Medium.Free*MediumBuf+s.Large.Free*LargeBuf != want {
				t.Fatalf("%d bytes asked: %+v does not cover %d", size, s, want)
			}
			if share := float64(s.Small.Free*SmallBuf) / float64(s.Size); share < 0.12 || share > 0.2 {
				t.Errorf("small buffers have %.2f of the arena", share)
			}
			for _, n := range []int{SmallBuf, MediumBuf, LargeBuf} {
				seen := map[uintptr]bool{}
				for {
					b, ok := a.TryGet(n)
					if !ok {
						break
					}
					defer b.Put()
					p := address(b.Data)
					if _, inside := a.offset(b.Data); !inside || seen[p] || p%uintptr(n) != 0 || len(b.Data) != n || cap(b.Data) != n {
						t.Fatalf("buffer at %#x of %d bytes, cap %d: outside, handed out twice or misaligned", p, len(b.Data), cap(b.Data))
					}
					seen[p] = true
				}
			}
			if s := a.Stats(); s.Small.Free+s.Medium.Free+s.Large.Free != 0 || s.Large.Used == 0 {
				t.Errorf("after taking all: %+v", s)
			}
		})
	}
}

func TestArenaGet(t *testing.T) {
	a := newArena(t, 2<<20)
	for _, c := range []struct{ n, size int }{{0, SmallBuf}, {1, SmallBuf}, {SmallBuf, SmallBuf}, {SmallBuf + 1, MediumBuf}, {MediumBuf, MediumBuf}, {MediumBuf + 1, LargeBuf}, {LargeBuf, LargeBuf}} {
		b := a.Get(c.n)
		if len(b.Data) != c.n || cap(b.Data) != c.size {
			t.Errorf("Get(%d) has length %d of %d, want %d", c.n, len(b.Data), cap(b.Data), c.size)
		}
		b.Put()
	}
	for _, n := range []int{-1, LargeBuf + 1} {
		mustPanic(t, fmt.Sprintf("Get(%d)", n), func() { a.Get(n) })
	}

	b := a.Get(1)
	b.Put()
	mustPanic(t, "second Put", func() { b.Put() })
	c := a.Get(1) // the same buffer again
	mustPanic(t, "Put through a stale Buf", func() { b.Put() })
	if err := a.Close(); err == nil {
		t.Error("Close with a buffer out succeeded")
	}
	c.Put()

	mine := []byte("mine")
	v := View(mine)
	v.Put()
	v.Put()
	Buf{}.Put()
	if &v.Data[0] != &mine[0] {
		t.Error("View copied")
	}
	if n := testing.AllocsPerRun(100, func() { a.Get(100).Put() }); n != 0 {
		t.Errorf("Get and Put allocate %v times", n)
	}
}

func TestArenaSizes(t *testing.T) {
	for _, size := range []int{0, -1, 1 << 60} {
		if a, err := NewArena(size); err == nil {
			a.Close()
			t.Errorf("an arena of %d bytes was made", size)
		}
	}
}

// TestArenaFIFO has many goroutines wait for the one buffer that moves, and
// wants them served in the order they came.
func TestArenaFIFO(t *testing.T) {
	a := newArena(t, 2<<20)
	var held []Buf
	for {
		b, ok := a.TryGet(LargeBuf)
		if !ok {
			break
		}
		held = append(held, b)
	}
	for round := range 3 { // waiters and their queue are reused
		const n = 50
		order := make(chan int, n)
		var wg sync.WaitGroup
		for i := range n {
			before := a.Stats().Large.Waits
			wg.Go(func() {
				b := a.Get(LargeBuf)
				order <- i
				b.Put()
			})
			for a.Stats().Large.Waits == before {
				runtime.Gosched()
			}
		}
		if b, ok := a.TryGet(LargeBuf); ok {
			t.Fatalf("TryGet overtook the queue with %v", b.index)
		}
		last := len(held) - 1
		held[last].Put()
		wg.Wait()
		for want := range n {
			if got := <-order; got != want {
				t.Fatalf("round %d: waiter %d was served in place %d", round, got, want)
			}
		}
		held[last] = a.Get(LargeBuf)
	}
	for _, b := range held {
		b.Put()
	}
}

// TestArenaWaitAllocs wants no allocation from Gets that wait, once warm.
func TestArenaWaitAllocs(t *testing.T) {
	a := newArena(t, 2<<20)
	var held []Buf
	for b, ok := a.TryGet(1); ok; b, ok = a.TryGet(1) {
		held = append(held, b)
	}
	type later struct {
		b     Buf
		waits uint64 // Put b once more than these have waited
	}
	put := make(chan later)
	go func() {
		for l := range put {
			for a.Stats().Small.Waits == l.waits {
				runtime.Gosched()
			}
			l.b.Put()
		}
	}()
	last := len(held) - 1
	n := testing.AllocsPerRun(100, func() {
		put <- later{held[last], a.Stats().Small.Waits}
		held[last] = a.Get(1)
	})
	close(put)
	if n != 0 {
		t.Errorf("a Get that waits allocates %v times", n)
	}
	for _, b := range held {
		b.Put()
	}
}

// TestArenaOwners has more goroutines than buffers mark what they hold.
func TestArenaOwners(t *testing.T) {
	a := newArena(t, 2<<20)
	var wg sync.WaitGroup
	for g := range 40 {
		wg.Go(func() {
			for i := range 300 {
				b := a.Get(LargeBuf - g)
				mark := uint64(g)<<32 | uint64(i)
				binary.LittleEndian.PutUint64(b.Data, mark)
				if i%50 == 0 {
					time.Sleep(time.Microsecond)
				}
				runtime.Gosched()
				if got := binary.LittleEndian.Uint64(b.Data); got != mark {
					t.Errorf("buffer of %x was marked by %x", mark, got)
				}
				b.Put()
			}
		})
	}
	wg.Wait()
	if s := a.Stats(); s.Large.Used != 0 || s.Large.Waits == 0 {
		t.Errorf("%+v", s)
	}
}
