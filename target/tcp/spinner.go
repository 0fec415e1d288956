package tcp

import (
	"runtime"
	"sync/atomic"
	"time"

	"github.com/kvof/kvof/internal/sock"
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

// spinner looks a while for data that is about to come, before its connection's reader sleeps. An idle connection never spins.
type spinner struct {
	sock   *sock.Conn
	busy   *atomic.Int32 // spinners of the listener that spin
	score  int
	streak int
}

// spin returns how many bytes it read into b before spinTime was over; 0 if none came or it is not worth a try.
func (s *spinner) spin(b []byte) int {
	if s.score < spinScore/2 || s.streak >= spinStreak {
		s.streak = 0
		return 0
	}
	s.streak++
	defer s.busy.Add(-1)
	if int(s.busy.Add(1)) > max(1, runtime.GOMAXPROCS(0)/2) {
		return 0
	}
	for start := time.Now(); ; runtime.Gosched() {
		if n := s.sock.TryRead(b); n > 0 || time.Since(start) > spinTime {
			return n
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
