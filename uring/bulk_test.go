package uring

import (
	"bytes"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestBulkWindow runs devices of different speeds, of which always more is wanted than they do, in simulated time: a piece takes
// some time however little there is to do, and all together what the device moves in a second.
func TestBulkWindow(t *testing.T) {
	for _, c := range []struct {
		name       string
		alone      time.Duration // of a piece
		rate       int64         // bytes a second
		from, upTo int64         // window, bytes
	}{
		{"drive", 110 * time.Microsecond, 7e9, minBulk, minBulk},
		{"fast drive", 120 * time.Microsecond, 14e9, 3 << 20, 4 << 20},
		{"slow drive", 4 * time.Millisecond, 100e6, minBulk, minBulk},
		{"volume across a network", time.Millisecond, 4e9, 7 << 20, 9 << 20},
		{"far away", 50 * time.Millisecond, 10e9, maxBulk, maxBulk},
	} {
		t.Run(c.name, func(t *testing.T) {
			var b bulk
			b.push(new(Op)) // one always waits
			type piece struct{ from, to time.Time }
			var flight []piece
			now, free := time.Unix(1, 0), time.Unix(1, 0)
			for range 20_000 {
				for ; b.moving < b.limit(); b.moving += LargeBuf {
					free = latest(free, now).Add(time.Duration(LargeBuf * int64(time.Second) / c.rate))
					flight = append(flight, piece{now, latest(free, now.Add(c.alone))})
				}
				p := flight[0]
				flight = flight[1:]
				now = latest(now, p.to)
				b.moving -= LargeBuf
				b.took(now, now.Sub(p.from), LargeBuf)
			}
			if w := b.limit(); w < c.from || w > c.upTo {
				t.Errorf("%d KiB in flight, wanted %d to %d", w>>10, c.from>>10, c.upTo>>10)
			}
		})
	}
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// TestBulkIdle: a device that had nothing to do meanwhile is not taken for a slow one.
func TestBulkIdle(t *testing.T) {
	var b bulk
	now := time.Unix(1, 0)
	for range 3 * bulkPeriod {
		now = now.Add(time.Second)
		b.took(now, time.Millisecond, LargeBuf) // nobody waits
	}
	if b.window != 0 {
		t.Errorf("a window of %d bytes", b.window)
	}
}

// TestBulkOrder: pieces are let in in the order they came, one for each that ends.
func TestBulkOrder(t *testing.T) {
	var b bulk
	var to queue
	ops := make([]*Op, 20)
	for i := range ops {
		ops[i] = &Op{Kind: OpWrite, Data: make([]byte, LargeBuf)}
		b.push(ops[i])
	}
	in := 0
	admitted := func(n int) {
		t.Helper()
		b.admit(&to)
		for ; to.head != nil; in++ {
			if to.pop() != ops[in] {
				t.Fatalf("not number %d", in)
			}
		}
		if in != n {
			t.Fatalf("%d are in, not %d", in, n)
		}
	}
	admitted(minBulk / LargeBuf)
	admitted(minBulk / LargeBuf)
	b.over(ops[3])
	admitted(minBulk/LargeBuf + 1)
	b.over(ops[0])
	b.over(ops[1])
	admitted(minBulk/LargeBuf + 3)
	b.all(&to)
	admitted(len(ops))
	for i := range ops {
		if i != 0 && i != 1 && i != 3 {
			b.over(ops[i])
		}
	}
	if b.moving != 0 {
		t.Errorf("%d bytes are left", b.moving)
	}
}

// TestBulk writes and reads back all of a device in large operations that it gets together, with small ones among them.
func TestBulk(t *testing.T) {
	devices(t, func(t *testing.T, d Device, a *Arena) {
		mem, err := unix.Mmap(-1, 0, 2*testSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Munmap(mem)
		wrote, read := mem[:testSize], mem[testSize:]
		for i := range wrote {
			wrote[i] = byte(i>>12 ^ i)
		}
		all := func(kind OpKind, b []byte) {
			var ops []*Op
			for at := 0; at < testSize; at += LargeBuf {
				small := 4096 * (at / LargeBuf % 3)
				ops = append(ops, &Op{Kind: kind, Off: int64(at), Data: b[at : at+small]},
					&Op{Kind: kind, Off: int64(at + small), Data: b[at+small : at+LargeBuf]})
			}
			d.Submit(ops...)
			for _, o := range ops {
				if err := o.Wait(); err != nil {
					t.Error(err)
				}
			}
		}
		all(OpWrite, wrote)
		all(OpRead, read)
		if !bytes.Equal(wrote, read) {
			t.Error("other data came back")
		}
	})
}
