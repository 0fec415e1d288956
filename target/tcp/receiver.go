package tcp

import (
	"io"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// lowWater is how many bytes of a payload a reader sleeps for at least: woken for each segment, it would do little but
	// wake and sleep, and have the sender's processor wake it.
	lowWater = 256 << 10
	// spinTime is how long a reader looks for data before it sleeps, if its host has lately answered that fast. To
	// sleep and be woken costs more than that.
	spinTime = 30 * time.Microsecond
	// spinStreak is how many reads in a row may spin: then one sleeps, so that the poller's other sockets get their turn.
	spinStreak = 32
	// spinScore is how surely a host is fast: it goes up and down with each read that waited.
	spinScore = 8
)

// receiver reads from a socket. Before it sleeps it looks a while for data that is about to come, and of data that is owed
// it has the kernel collect some. An idle connection never spins.
type receiver struct {
	raw    syscall.RawConn
	busy   *atomic.Int32 // receivers of the listener that spin
	score  int
	streak int
	low    int // SO_RCVLOWAT

	b    []byte
	want int
	n    int
	err  error
	once func(fd uintptr) bool
	wait func(fd uintptr) bool
}

func (s *receiver) init(raw syscall.RawConn, busy *atomic.Int32) {
	s.raw, s.busy, s.low = raw, busy, 1
	s.once = func(fd uintptr) bool {
		s.receive(fd)
		return true
	}
	s.wait = func(fd uintptr) bool {
		s.receive(fd)
		if s.err != syscall.EAGAIN {
			return true
		}
		if s.low != s.want && unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVLOWAT, s.want) == nil {
			s.low = s.want
		}
		return false
	}
}

func (s *receiver) receive(fd uintptr) {
	for {
		s.n, s.err = syscall.Read(int(fd), s.b)
		switch {
		case s.err == syscall.EINTR:
			continue
		case s.err != nil:
			s.n = 0
		case s.n == 0:
			s.err = io.EOF
		}
		return
	}
}

// read reads into b, at least one byte. Where there is none yet it sleeps until there are want, which the peer owes and
// will send whatever we do.
func (s *receiver) read(b []byte, want int) (int, error) {
	s.b, s.want, s.n, s.err = b, min(want, lowWater), 0, nil
	err := s.raw.Read(s.wait)
	s.b = nil
	if err == nil {
		err = s.err
	}
	return s.n, err
}

// spin returns how many bytes it read into b before spinTime was over; 0 if none came or it is not worth a try.
func (s *receiver) spin(b []byte) int {
	if s.score < spinScore/2 || s.streak >= spinStreak {
		s.streak = 0
		return 0
	}
	s.streak++
	defer s.busy.Add(-1)
	if int(s.busy.Add(1)) > max(1, runtime.GOMAXPROCS(0)/2) {
		return 0
	}
	s.b, s.n = b, 0 // a closed connection does not try
	for start := time.Now(); ; runtime.Gosched() {
		if s.raw.Read(s.once) != nil || s.n > 0 || time.Since(start) > spinTime { // errors: the read that follows meets them too
			s.b = nil
			return s.n
		}
	}
}

// waited tells how long a read took that slept.
func (s *receiver) waited(d time.Duration) {
	if d < 2*spinTime {
		s.score = min(s.score+1, spinScore)
	} else {
		s.score = max(s.score-2, 0)
	}
}
