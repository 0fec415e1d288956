package tcp

import (
	"runtime"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// spinTime is how long a reader looks for data before it sleeps, if its host has lately answered that fast. To
	// sleep and be woken costs more than that.
	spinTime = 30 * time.Microsecond
	// spinStreak is how many reads in a row may spin: then one sleeps, so that the poller's other sockets get their turn.
	spinStreak = 32
	// spinScore is how surely a host is fast: it goes up and down with each read that waited.
	spinScore = 8
)

// spinner reads from a socket that is about to have data without going to sleep. An idle connection never spins.
type spinner struct {
	raw    syscall.RawConn
	busy   *atomic.Int32 // spinners of the listener
	score  int
	streak int

	b   []byte
	n   int
	try func(fd uintptr) bool
}

func (s *spinner) init(raw syscall.RawConn, busy *atomic.Int32) {
	s.raw, s.busy = raw, busy
	s.try = func(fd uintptr) bool {
		n, err := syscall.Read(int(fd), s.b)
		if s.n = n; err != nil {
			s.n = 0 // whatever it is, the read that follows meets it too
		}
		return true
	}
}

// read returns how many bytes it read into b before spinTime was over; 0 if none came or it is not worth a try.
func (s *spinner) read(b []byte) int {
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
		if s.raw.Read(s.try) != nil || s.n > 0 || time.Since(start) > spinTime {
			s.b = nil
			return s.n
		}
	}
}

// waited tells how long a read took that slept.
func (s *spinner) waited(d time.Duration) {
	if d < 2*spinTime {
		s.score = min(s.score+1, spinScore)
	} else {
		s.score = max(s.score-2, 0)
	}
}
