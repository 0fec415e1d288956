package tcp

import (
	"net"
	"sync/atomic"
	"testing"

	"github.com/kvof/kvof/internal/sock"
)

// TestSpinClosed: on a connection that was closed nothing is read, whatever the last read brought.
func TestSpinClosed(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	c, err := sock.New(a)
	if err != nil {
		t.Fatal(err)
	}
	s := spinner{sock: c, busy: new(atomic.Int32)}
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
