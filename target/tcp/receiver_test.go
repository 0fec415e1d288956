package tcp

import (
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"
)

// receiverPair is a receiver and the other end of its connection.
func receiverPair(t *testing.T) (s *receiver, own, peer net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if own, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { own.Close() })
	if peer, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { peer.Close() })
	raw, err := own.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	s = new(receiver)
	s.init(raw, new(atomic.Int32))
	return s, own, peer
}

// TestLowWater: a reader that is owed bytes sleeps until they are there, and is not kept asleep by bytes that never come.
func TestLowWater(t *testing.T) {
	s, _, peer := receiverPair(t)
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
	read := func(want, least int) {
		t.Helper()
		if n, err := s.read(buf, want); n < least || err != nil {
			t.Fatalf("%d bytes, %v; wanted %d", n, err, least)
		}
	}
	send(10_000, 10)
	read(100_000, 100_000) // asleep from the beginning
	send(3, 1)
	read(1, 3)
	send(lowWater/4, 5)
	read(len(buf), lowWater)
	read(lowWater/4, 1) // is there, or comes
	send(10, 1)
	time.AfterFunc(50*time.Millisecond, func() { peer.Close() })
	read(1000, 10)
	if n, err := s.read(buf, 1000); n != 0 || err != io.EOF {
		t.Errorf("%d bytes, %v after the end", n, err)
	}
}

// TestSpinClosed: on a connection that was closed nothing is read, whatever the last read brought.
func TestSpinClosed(t *testing.T) {
	s, a, b := receiverPair(t)
	if _, err := b.Write(make([]byte, 24)); err != nil {
		t.Fatal(err)
	}
	buf, n := make([]byte, 100), 0
	for n < 24 {
		s.score, s.streak = spinScore, 0
		n += s.spin(buf)
	}
	a.Close()
	s.score, s.streak = spinScore, 0
	if n := s.spin(buf); n != 0 {
		t.Errorf("%d bytes came out of a closed connection", n)
	}
}
