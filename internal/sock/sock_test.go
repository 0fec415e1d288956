package sock

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pair is a Conn, its net.Conn, and the other end.
func pair(tb testing.TB) (s *Conn, own, peer net.Conn) {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	defer l.Close()
	if own, err = net.Dial("tcp", l.Addr().String()); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { own.Close() })
	if peer, err = l.Accept(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { peer.Close() })
	if s, err = New(own); err != nil {
		tb.Fatal(err)
	}
	return s, own, peer
}

// TestLowWater: a reader that is owed bytes sleeps until they are there, and is not kept asleep by bytes that never come.
func TestLowWater(t *testing.T) {
	s, _, peer := pair(t)
	send := func(n, times int) {
		go func() {
			for range times {
				time.Sleep(10 * time.Millisecond)
				if _, err := peer.Write(make([]byte, n)); err != nil {
					t.Error(err)
				}
			}
		}()
	}
	buf := make([]byte, 1<<20)
	read := func(owed, least int) {
		t.Helper()
		if n, err := s.Read(buf, nil, owed); n < least || err != nil {
			t.Fatalf("%d bytes, %v; wanted %d", n, err, least)
		}
	}
	send(10_000, 10)
	read(100_000, 100_000) // asleep from the beginning
	send(3, 1)
	read(1, 3)
	send(LowWater/4, 5)
	read(len(buf), LowWater)
	read(LowWater/4, 1) // is there, or comes
	send(10, 1)
	time.AfterFunc(50*time.Millisecond, func() { peer.Close() })
	read(1000, 10)
	if n, err := s.Read(buf, nil, 1000); n != 0 || err != io.EOF {
		t.Errorf("%d bytes, %v after the end", n, err)
	}
	if s.Moved() != 100_000+3+5*LowWater/4+10 {
		t.Errorf("%d bytes moved", s.Moved())
	}
}

// TestScatter: what comes fills the first buffer, then the second.
func TestScatter(t *testing.T) {
	s, own, peer := pair(t)
	a, b := make([]byte, 5), make([]byte, 100)
	if n := s.TryRead(b); n != 0 {
		t.Errorf("%d bytes of nothing", n)
	}
	if _, err := peer.Write([]byte("hello world")); err != nil {
		t.Fatal(err)
	}
	if n, err := s.Read(a, b, 11); n != 11 || err != nil || string(a) != "hello" || string(b[:6]) != " world" {
		t.Errorf("%d bytes, %v: %q %q", n, err, a, b[:6])
	}
	large := make([]byte, 3*chunk)
	go peer.Write(large)
	for got := 0; got < len(large); {
		n, err := s.Read(large[got:], b, len(large)-got)
		if err != nil || n > max(chunk, len(b)) {
			t.Fatalf("%d bytes at once, %v", n, err)
		}
		got += n
	}
	own.Close()
	if n, err := s.Read(a, b, 1); n != 0 || err == nil {
		t.Errorf("%d bytes, %v of a closed connection", n, err)
	}
	if n := s.TryRead(b); n != 0 {
		t.Errorf("%d bytes of a closed connection", n)
	}
}

// TestWrite: a full socket takes a part, and the rest when it may wait; pieces of any sizes arrive in order.
func TestWrite(t *testing.T) {
	s, _, peer := pair(t)
	var want []byte
	var v []unix.Iovec
	for i := range 3000 {
		b := bytes.Repeat([]byte{byte(i)}, 1+i*7919%20_000)
		want, v = append(want, b...), append(v, Vec(b))
	}
	large := bytes.Repeat([]byte("large"), chunk)
	want, v = append(want, large...), append(v, Vec(large))
	left, err := s.Write(v, false)
	if err != nil || len(left) == 0 || len(left) == len(v) {
		t.Fatalf("%d of %d pieces are left, %v: nobody reads", len(left), len(v), err)
	}
	got := make(chan []byte)
	go func() {
		b := make([]byte, len(want))
		n, _ := io.ReadFull(peer, b)
		got <- b[:n]
	}()
	if left, err = s.Write(left, true); err != nil || len(left) > 0 {
		t.Fatalf("%d pieces are left, %v", len(left), err)
	}
	if !bytes.Equal(<-got, want) {
		t.Error("other bytes came")
	}
	if s.Moved() != uint64(len(want)) {
		t.Errorf("%d of %d bytes moved", s.Moved(), len(want))
	}
	peer.Close()
	for range 100 {
		if left, err = s.Write([]unix.Iovec{Vec(want[:100_000])}, true); err != nil {
			return
		}
	}
	t.Errorf("%d pieces are left, %v, of a connection that the peer has ended", len(left), err)
}

func TestBurst(t *testing.T) {
	sizes := func(n ...int) (v []unix.Iovec) {
		for _, n := range n {
			v = append(v, Vec(make([]byte, n)))
		}
		return v
	}
	for name, test := range map[string]struct {
		v    []unix.Iovec
		want int
	}{
		"little":         {sizes(24, 100, 0), 3},
		"one large":      {sizes(5*chunk, 1), 1},
		"header, data":   {sizes(24, chunk, 24), 2},
		"data and other": {sizes(24, chunk-25, 1, 1), 3},
		"many":           {make([]unix.Iovec, 5000), maxVecs},
	} {
		if n := burst(test.v); n != test.want {
			t.Errorf("%s: %d", name, n)
		}
	}
}

// BenchmarkExchange is 64 KiB there and back, in two pieces.
func BenchmarkExchange(b *testing.B) {
	s, _, peer := pair(b)
	p, err := New(peer)
	if err != nil {
		b.Fatal(err)
	}
	go func() {
		in, v := make([]byte, 64<<10), make([]unix.Iovec, 1)
		for {
			n, err := p.Read(in, nil, len(in))
			v[0] = Vec(in[:n])
			if err != nil {
				return
			}
			if _, err := p.Write(v, true); err != nil {
				return
			}
		}
	}()
	buf, v := make([]byte, 64<<10), make([]unix.Iovec, 2)
	b.SetBytes(int64(len(buf)))
	b.ReportAllocs()
	for b.Loop() {
		v[0], v[1] = Vec(buf[:24]), Vec(buf[24:])
		if _, err := s.Write(v, true); err != nil {
			b.Fatal(err)
		}
		for n := 0; n < len(buf); {
			m, err := s.Read(buf[n:], nil, len(buf)-n)
			if err != nil {
				b.Fatal(err)
			}
			n += m
		}
	}
}
