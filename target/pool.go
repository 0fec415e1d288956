package target

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/kvof/kvof/uring"
)

// pool promises the arena's buffers. A command is promised all that it will hold at one time before it asks its host for
// data or reads its first byte, so nobody who holds a buffer, and no connection's reader, ever waits for another.
type pool struct {
	storages             storages // of Key Value namespaces
	large, medium, small *semaphore.Weighted
	inline               *semaphore.Weighted // of two small buffers each, for commands whose data came in the capsule
	spare                hold                // what namespaces may still take for good
	memories             memories
}

// hold is what a command, or a namespace, has been promised: buffers of each class.
type hold struct{ large, medium, small int64 }

func (h hold) bytes() int {
	return int(h.large*uring.LargeBuf + h.medium*uring.MediumBuf + h.small*uring.SmallBuf)
}

// The most large buffers that one command holds: those at the device, and the one being filled or those being sent.
const (
	writeHold = window + 1
	readHold  = window + sendWindow
)

// sendWindow is how many pieces of one command's data wait for the host to take them.
const sendWindow = 2

// holdFor is what a command holds that moves n bytes through at most so many large buffers. The last piece may be smaller.
func holdFor(n, most int64) hold {
	h := hold{large: n / uring.LargeBuf}
	switch rest := n % uring.LargeBuf; {
	case rest > uring.MediumBuf:
		h.large++
	case rest > uring.SmallBuf:
		h.medium = 1
	case rest > 0:
		h.small = 1
	}
	h.large = min(h.large, most)
	return h
}

func newPool(arena *uring.Arena) *pool {
	s := arena.Stats()
	count := func(c uring.ClassStats) int64 { return int64(c.Free + c.Used) }
	small, medium, large := count(s.Small), count(s.Medium), count(s.Large)
	p := &pool{large: semaphore.NewWeighted(large), medium: semaphore.NewWeighted(medium), small: semaphore.NewWeighted(small / 2),
		inline: semaphore.NewWeighted(small / 4), spare: hold{large: large - readHold, medium: medium - 1}}
	p.memories.add(payload{b: arena.Memory()})
	return p
}

// take waits for buffers. Large before small, always, so that waiters never wait for each other.
func (p *pool) take(h hold) {
	if h.large > 0 {
		_ = p.large.Acquire(context.Background(), h.large)
	}
	if h.medium > 0 {
		_ = p.medium.Acquire(context.Background(), h.medium)
	}
	if h.small > 0 {
		_ = p.small.Acquire(context.Background(), h.small)
	}
}

// tryTake is take for callers that cannot wait: false means that somebody does.
func (p *pool) tryTake(h hold) bool {
	if h.large > 0 && !p.large.TryAcquire(h.large) {
		return false
	}
	if h.medium > 0 && !p.medium.TryAcquire(h.medium) {
		p.large.Release(h.large)
		return false
	}
	if h.small > 0 && !p.small.TryAcquire(h.small) {
		p.large.Release(h.large)
		p.medium.Release(h.medium)
		return false
	}
	return true
}

func (p *pool) give(h hold) {
	p.large.Release(h.large)
	p.medium.Release(h.medium)
	p.small.Release(h.small)
}

// takeForGood gives a namespace large and medium buffers for as long as it is open; enough stay for the largest command.
func (p *pool) takeForGood(h hold) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	err := errors.New("the buffer arena is used up: make memory.arena larger")
	if h.large > p.spare.large || h.medium > p.spare.medium || p.large.Acquire(ctx, h.large) != nil {
		return err
	}
	if p.medium.Acquire(ctx, h.medium) != nil {
		p.large.Release(h.large)
		return err
	}
	p.spare.large -= h.large
	p.spare.medium -= h.medium
	return nil
}

func (p *pool) giveForGood(h hold) {
	p.spare.large += h.large
	p.spare.medium += h.medium
	p.give(h)
}
