package rdma

import (
	"errors"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

type fakeQP struct {
	QP
	h uintptr
}

func (q fakeQP) Handle() uintptr { return q.h }

type fakeSRQ struct{ SRQ }

func (q fakeSRQ) Handle() uintptr { return 99 }

func TestBatch(t *testing.T) {
	var b Batch
	a := SGE{Addr: 1, Length: 2, LKey: 3}
	c := SGE{Addr: 4, Length: 5, LKey: 6}
	fill := func() {
		b.Reset()
		b.Send(fakeQP{h: 7})
		b.Add(WR{ID: 1, Op: OpWrite}, a, c)
		b.Add(WR{ID: 2, Op: OpSend}, c)
		b.Recv(fakeSRQ{})
		b.Add(WR{ID: 3}, a)
	}
	fill()
	type seen struct {
		Queue uintptr
		Recv  bool
		IDs   []uint64
		SGEs  [][]SGE
	}
	var got []seen
	b.Chains(func(q uintptr, recv bool, wrs []WR) (int, syscall.Errno) {
		s := seen{Queue: q, Recv: recv}
		for i := range wrs {
			s.IDs = append(s.IDs, wrs[i].ID)
			s.SGEs = append(s.SGEs, b.SGEs(&wrs[i]))
		}
		got = append(got, s)
		if recv {
			return 0, syscall.ENOMEM
		}
		return len(wrs), 0
	})
	want := []seen{{7, false, []uint64{1, 2}, [][]SGE{{a, c}, {c}}}, {99, true, []uint64{3}, [][]SGE{{a}}}}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if n, err := b.Posted(0); n != 2 || err != nil {
		t.Errorf("Posted(0) = %d, %v", n, err)
	}
	if n, err := b.Posted(1); n != 0 || !errors.Is(err, syscall.ENOMEM) {
		t.Errorf("Posted(1) = %d, %v", n, err)
	}
	if n := testing.AllocsPerRun(100, fill); n != 0 {
		t.Errorf("filling a batch allocates %v times", n)
	}
}

func TestRegion(t *testing.T) {
	mem := make([]byte, 100)
	var closed int
	r, err := NewRegion(mem, 40, func(part []byte) (MR, error) {
		return MR{LKey: uint32(len(part)), RKey: uint32(len(part)) + 1, Close: func() error { closed++; return nil }}, nil
	})
	if err != nil || r.Parts() != 4 || r.Len() != 100 { // of 32 bytes
		t.Fatalf("%d parts, %v", r.Parts(), err)
	}
	var lens []uint32
	for b := mem[20:100]; len(b) > 0; {
		s, rkey := r.Split(b)
		if rkey != s.LKey+1 {
			t.Errorf("key %d of another part", rkey)
		}
		lens = append(lens, s.Length)
		b = b[s.Length:]
	}
	if d := cmp.Diff([]uint32{12, 32, 32, 4}, lens); d != "" {
		t.Error(d)
	}
	for _, c := range []struct {
		b    []byte
		want bool
	}{{mem, true}, {mem[99:], true}, {make([]byte, 1), false}, {nil, false}} {
		if got := r.Contains(c.b); got != c.want {
			t.Errorf("Contains(%d bytes) = %v", len(c.b), got)
		}
	}
	if err := r.Close(); err != nil || closed != 4 {
		t.Errorf("closed %d, %v", closed, err)
	}
	n := 0
	if _, err := NewRegion(mem, 40, func([]byte) (MR, error) {
		if n++; n == 3 {
			return MR{}, syscall.ENOMEM
		}
		return MR{Close: func() error { closed++; return nil }}, nil
	}); !errors.Is(err, syscall.ENOMEM) || closed != 6 {
		t.Errorf("after a failure %d are closed, %v", closed, err)
	}
}
