package uringtest

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/kvof/kvof/uring"
)

func memory(t *testing.T, size int64) uring.Device {
	mem, err := uring.NewMemory(size)
	if err != nil {
		t.Fatal(err)
	}
	return mem
}

// blockOf is a block that begins with s.
func blockOf(s string) []byte { return append([]byte(s), make([]byte, block-len(s))...) }

func TestFaults(t *testing.T) {
	broken := errors.New("broken")
	held := make(chan struct{})
	flip := func(b []byte) { b[1] ^= 0xFF }
	for _, c := range []struct {
		name    string
		kind    uring.OpKind
		fault   Fault
		err     error
		device  string // what the device then has
		reading string // what a read got
	}{
		{"no fault, write", uring.OpWrite, Fault{}, nil, "NEW!", ""},
		{"no fault, read", uring.OpRead, Fault{}, nil, "old.", "old."},
		{"write fails", uring.OpWrite, Fault{Err: broken}, broken, "old.", ""},
		{"read fails", uring.OpRead, Fault{Err: broken}, broken, "old.", "NEW!"},
		{"flush fails", uring.OpFlush, Fault{Err: broken}, broken, "old.", ""},
		{"write torn", uring.OpWrite, Fault{Torn: true, Keep: 2, Err: broken}, broken, "NEd.", ""},
		{"write torn and reported well", uring.OpWrite, Fault{Torn: true, Keep: 2}, nil, "NEd.", ""},
		{"write lost", uring.OpWrite, Fault{Torn: true}, nil, "old.", ""},
		{"write corrupted", uring.OpWrite, Fault{Corrupt: flip}, nil, "N\xbaW!", ""},
		{"read corrupted", uring.OpRead, Fault{Corrupt: flip}, nil, "old.", "o\x93d."},
		{"held", uring.OpWrite, Fault{Hold: held}, nil, "NEW!", ""},
		{"late", uring.OpWrite, Fault{Delay: 20 * time.Millisecond}, nil, "NEW!", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			mem := memory(t, 2*block)
			copy(mem.View(0, 4), "old.")
			d := Wrap(mem, func(o *uring.Op) Fault {
				if o.Kind != c.kind {
					t.Errorf("hook saw a %v", o.Kind)
				}
				return c.fault
			})
			if d.View(0, 4) != nil {
				t.Error("a way around the hook")
			}
			data := blockOf("NEW!")
			o := uring.Op{Kind: c.kind, Data: data}
			start := time.Now()
			o.Start(d)
			if c.fault.Hold != nil {
				if string(mem.View(0, 4)) != "old." {
					t.Error("a held write has started")
				}
				close(held)
			}
			if err := o.Wait(); !errors.Is(err, c.err) {
				t.Errorf("result %v", err)
			}
			if time.Since(start) < c.fault.Delay {
				t.Error("came early")
			}
			if got := mem.View(0, 4); string(got) != c.device {
				t.Errorf("device has %q, want %q", got, c.device)
			}
			if c.kind == uring.OpRead && string(data[:4]) != c.reading {
				t.Errorf("read %q, want %q", data[:4], c.reading)
			}
			if c.kind == uring.OpWrite && string(data[:4]) != "NEW!" {
				t.Error("the writer's memory changed")
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestMisaligned(t *testing.T) {
	d := Wrap(memory(t, 2*block), nil)
	defer d.Close()
	for _, o := range []*uring.Op{
		{Kind: uring.OpWrite, Data: make([]byte, 100)},
		{Kind: uring.OpRead, Off: 512, Data: make([]byte, block)},
		{Kind: uring.OpZero, Len: 1},
	} {
		if err := o.Do(d); !errors.Is(err, uring.ErrInvalid) {
			t.Errorf("%v: %v", o.Kind, err)
		}
	}
}

// TestCut looks at what cuts leave, over many seeds: everything that may be,
// and nothing else.
func TestCut(t *testing.T) {
	const (
		flushed = 0 * block
		cached  = 1 * block // carried out, not flushed
		again   = 2 * block // the same, over what was flushed
		last    = 3 * block // the write that the cut tears
		flying  = 4 * block
		zeroed  = 5 * block
	)
	old, new := bytes.Repeat([]byte("o"), block), bytes.Repeat([]byte("n"), block)
	for _, power := range []bool{false, true} {
		seen := map[int64]map[string]bool{}
		for seed := range uint64(200) {
			mem := memory(t, 8*block)
			for b := range int64(8) {
				copy(mem.View(b*block, block), old)
			}
			held := make(chan struct{})
			d := Wrap(mem, func(o *uring.Op) Fault {
				if o.Off == flying && o.Kind == uring.OpWrite {
					return Fault{Hold: held}
				}
				return Fault{}
			})
			do := func(want error, kind uring.OpKind, off int64) {
				o := uring.Op{Kind: kind, Off: off, Data: bytes.Clone(new)}
				if kind == uring.OpZero {
					o.Data, o.Len = nil, block
				}
				if err := o.Do(d); !errors.Is(err, want) {
					t.Fatalf("%v at %d: %v, want %v", kind, off, err, want)
				}
			}
			d.CutAfter(5, power, seed)
			do(nil, uring.OpWrite, flushed)
			do(nil, uring.OpWrite, again)
			do(nil, uring.OpFlush, 0)
			do(nil, uring.OpWrite, cached)
			do(nil, uring.OpZero, zeroed)
			air := uring.Op{Kind: uring.OpWrite, Off: flying, Data: bytes.Clone(new)}
			air.Start(d)
			if d.Off() {
				t.Fatal("off before its time")
			}
			do(ErrOff, uring.OpWrite, last)
			if !d.Off() {
				t.Fatal("not off")
			}
			do(ErrOff, uring.OpFlush, 0)
			do(ErrOff, uring.OpRead, 0)
			do(ErrOff, uring.OpWrite, flushed)
			left := bytes.Clone(mem.View(0, 8*block))
			d.Restart()
			close(held)
			if err := air.Wait(); !errors.Is(err, ErrOff) {
				t.Fatalf("a write of the time before: %v", err)
			}
			if !bytes.Equal(left, mem.View(0, 8*block)) {
				t.Fatal("a write of the time before reached the device")
			}
			for _, off := range []int64{flushed, cached, again, last, flying, zeroed} {
				if seen[off] == nil {
					seen[off] = map[string]bool{}
				}
				b := left[off : off+block]
				what := "torn"
				switch {
				case bytes.Equal(b, old):
					what = "old"
				case bytes.Equal(b, new):
					what = "new"
				case bytes.Equal(b, make([]byte, block)):
					what = "zero"
				}
				for s := range slices.Chunk(b, sector) {
					if !bytes.Equal(s, old[:sector]) && !bytes.Equal(s, new[:sector]) && !bytes.Equal(s, make([]byte, sector)) {
						t.Fatal("a torn sector")
					}
				}
				seen[off][what] = true
			}
			do(nil, uring.OpWrite, last)
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
		}
		any, whole := map[string]bool{"old": true, "new": true, "torn": true}, map[string]bool{"new": true}
		want := map[int64]map[string]bool{flushed: whole, again: whole, cached: whole, last: any, flying: any, zeroed: {"zero": true}}
		if power {
			want[cached] = any
			want[zeroed] = map[string]bool{"old": true, "zero": true, "torn": true}
		}
		if fmt.Sprint(seen) != fmt.Sprint(want) {
			t.Errorf("power %v: left %v, want %v", power, seen, want)
		}
	}
}

// TestPlan runs the same ops twice, in another order, and finds the same faults.
func TestPlan(t *testing.T) {
	run := func(seed uint64, backwards bool) (string, Count) {
		mem := memory(t, 64*block)
		p := NewPlan(seed)
		p.Set(Rates{ReadError: 0.1, WriteError: 0.1, FlushError: 0.1, ReadFlip: 0.1, WriteFlip: 0.1, Space: 60 * block, Late: 5})
		d := Wrap(mem, p.Fault)
		var ops []*uring.Op
		for i := range 60 {
			ops = append(ops, &uring.Op{Kind: []uring.OpKind{uring.OpWrite, uring.OpRead}[i%2], Off: int64(i/2) * block, Data: make([]byte, block)})
		}
		if backwards {
			slices.Reverse(ops)
		}
		for range 3 {
			d.Submit(ops...)
			for _, o := range ops {
				_ = o.Wait()
			}
		}
		left := fmt.Sprintf("%x", mem.View(0, 64*block))
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		return left, p.Count()
	}
	one, n := run(1, false)
	if again, m := run(1, true); again != one || n != m {
		t.Errorf("the same seed: %v and %v faults, the same contents: %v", n, m, again == one)
	}
	if other, _ := run(2, false); other == one {
		t.Error("another seed, the same faults")
	}
	if n.Errors < 10 || n.Flips < 5 {
		t.Errorf("%+v", n)
	}
}

func TestTogether(t *testing.T) {
	a, b := Wrap(memory(t, 2*block), nil), Wrap(memory(t, 2*block), nil)
	Together(a, b)
	defer a.Close()
	defer b.Close()
	write := func(d *Device) error { return (&uring.Op{Kind: uring.OpWrite, Data: make([]byte, block)}).Do(d) }
	a.CutAfter(3, true, 1)
	for i, want := range []error{nil, nil, ErrOff, ErrOff} {
		if err := write([]*Device{a, b}[i%2]); !errors.Is(err, want) || a.Off() != b.Off() {
			t.Errorf("write %d: %v", i, err)
		}
	}
	b.Restart()
	if err := errors.Join(write(a), write(b)); err != nil {
		t.Error(err)
	}
}

// TestOvertaking shows that ops submitted together are carried out in another order.
func TestOvertaking(t *testing.T) {
	p := NewPlan(1)
	p.Set(Rates{Late: 4})
	var order []int64
	d := Wrap(memory(t, 64*block), func(o *uring.Op) Fault {
		f := p.Fault(o)
		f.Corrupt = func([]byte) { order = append(order, o.Off/block) }
		return f
	})
	defer d.Close()
	ops := make([]*uring.Op, 30)
	for i := range ops {
		ops[i] = &uring.Op{Off: int64(i) * block, Data: make([]byte, block)}
	}
	d.Submit(ops...)
	for _, o := range ops {
		if err := o.Wait(); err != nil {
			t.Fatal(err)
		}
	}
	if len(order) != len(ops) || slices.IsSorted(order) {
		t.Error(order)
	}
	for i, n := range order {
		if n > int64(i)+8 || n < int64(i)-8 {
			t.Errorf("place %d has op %d", i, n)
		}
	}
}

func TestRates(t *testing.T) {
	mem := memory(t, 64*block)
	p := NewPlan(1)
	d := Wrap(mem, p.Fault)
	defer d.Close()
	do := func(kind uring.OpKind, b, n int64) error {
		o := uring.Op{Kind: kind, Off: b * block}
		if kind == uring.OpDiscard {
			o.Len = n * block
		} else {
			o.Data = make([]byte, n*block)
		}
		return o.Do(d)
	}
	p.Set(Rates{Space: 4 * block})
	for b, want := range []error{nil, nil, nil, nil, uring.ErrNoSpace} {
		if err := do(uring.OpWrite, int64(b), 1); !errors.Is(err, want) {
			t.Errorf("write of block %d: %v", b, err)
		}
	}
	if err := do(uring.OpWrite, 1, 2); err != nil {
		t.Errorf("over what is there: %v", err)
	}
	if err := do(uring.OpDiscard, 0, 2); err != nil {
		t.Fatal(err)
	}
	if err := do(uring.OpWrite, 8, 2); err != nil {
		t.Errorf("after a discard: %v", err)
	}
	p.Set(Rates{ReadError: 1})
	for b := range int64(8) {
		if err := do(uring.OpRead, b, 1); !errors.Is(err, uring.ErrMedia) {
			t.Errorf("read: %v", err)
		}
	}
	p.mu.Lock()
	p.rates = Rates{}
	p.mu.Unlock()
	stay := 0
	for b := range int64(8) {
		if do(uring.OpRead, b, 1) != nil {
			stay++
			if do(uring.OpWrite, b, 1) != nil || do(uring.OpRead, b, 1) != nil {
				t.Error("a write does not repair")
			}
		}
	}
	if stay == 0 || stay == 8 {
		t.Errorf("%d of 8 errors stay", stay)
	}
}
