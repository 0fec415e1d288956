package uring

import (
	"errors"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// owner is a goroutine's batch of reads, and what has become of them.
type owner struct {
	testing.TB
	batch   Batch
	ops     []Op
	mine    int // ended by Reap
	ended   chan *Op
	waiting []unix.PollFd
	files   []int32
}

func newOwner(t testing.TB, a *Arena, n int) *owner {
	w := &owner{TB: t, ops: make([]Op, n), ended: make(chan *Op, n), waiting: make([]unix.PollFd, 0, 8), files: make([]int32, 0, 8)}
	b := a.Get(SmallBuf)
	t.Cleanup(b.Put)
	for i := range w.ops {
		o := &w.ops[i]
		o.Kind, o.Off, o.Data = OpRead, int64(i)*4096, b.Data[i%4*4096:][:4096]
		o.Then = func(err error, by *Batch) {
			if err != nil {
				t.Error(err)
			}
			if by == &w.batch {
				w.mine++
			}
			w.ended <- o
		}
	}
	return w
}

// sleep waits as a lane does.
func (w *owner) sleep(timeout time.Duration) {
	w.waiting = w.waiting[:0]
	for _, f := range w.batch.Hold(w.files[:0]) {
		w.waiting = append(w.waiting, unix.PollFd{Fd: f, Events: unix.POLLIN})
	}
	if _, err := unix.Poll(w.waiting, int(timeout.Milliseconds())); err != nil && !errors.Is(err, unix.EINTR) {
		w.Error(err)
	}
}

// round has the first n ops end.
func (w *owner) round(d Device, n int) {
	for i := range n {
		w.batch.Add(d, &w.ops[i])
	}
	w.batch.Submit()
	for end := time.Now().Add(20 * time.Second); n > 0; {
		w.batch.Reap()
		select {
		case <-w.ended:
			n--
			continue
		default:
		}
		if time.Now().After(end) {
			w.Fatalf("%d ops do not end", n)
		}
		w.sleep(time.Millisecond) // others may have taken some
	}
}

// TestOwner has the owner of a batch take its completions itself, alone, and beside others that wait, own and sleep.
func TestOwner(t *testing.T) {
	devices(t, func(t *testing.T, d Device, a *Arena) {
		w := newOwner(t, a, 32)
		for range 50 {
			w.round(d, 1)
		}
		if e, ok := d.(interface{ waitable() *engine }); ok && e.waitable() != nil && w.mine < 40 {
			t.Errorf("others took %d of 50 completions", 50-w.mine)
		}
		var wg sync.WaitGroup
		for range 2 {
			w := newOwner(t, a, 32)
			wg.Go(func() {
				for i := range 300 {
					w.round(d, 1+i%len(w.ops))
				}
			})
		}
		for i := range 4 {
			b := a.Get(SmallBuf)
			wg.Go(func() {
				defer b.Put()
				o := Op{Kind: OpRead, Off: int64(i) * 4096, Data: b.Data[:4096]}
				for range 1000 {
					if err := o.Do(d); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		if _, ok := d.(*NVMe); ok {
			return // the pretended drive allocates
		}
		if n := testing.AllocsPerRun(100, func() { w.round(d, 4) }); n != 0 {
			t.Errorf("%v allocations", n)
		}
	})
}

// TestOwnerBlocks has owners wait for other things than their files: nobody else is kept.
func TestOwnerBlocks(t *testing.T) {
	devices(t, func(t *testing.T, d Device, a *Arena) {
		w, b := newOwner(t, a, 32), a.Get(SmallBuf)
		defer b.Put()
		for i := range 100 {
			for k := range w.ops {
				w.batch.Add(d, &w.ops[k])
			}
			w.batch.Submit()
			if i%3 == 0 {
				w.batch.Reap()
			}
			ended := make(chan error)
			go func() {
				o := Op{Kind: OpRead, Data: b.Data[:4096]}
				ended <- o.Do(d)
			}()
			select {
			case err := <-ended:
				if err != nil {
					t.Error(err)
				}
			case <-time.After(20 * time.Second):
				t.Fatal("a waiter relies on an owner that is awake")
			}
			if i%2 == 0 { // without memory for its files it leaves all to others
				w.batch.Hold(nil)
			}
			for range w.ops {
				for len(w.ended) == 0 && i%2 > 0 {
					w.batch.Reap()
					w.sleep(time.Millisecond)
				}
				select {
				case <-w.ended:
				case <-time.After(20 * time.Second):
					t.Fatal("what an owner left does not end")
				}
			}
			w.batch.Reap()
		}
	})
}

// TestOwnerLost takes a drive away under the reads of an owner that sleeps, and gives it back.
func TestOwnerLost(t *testing.T) {
	f := newFakeDrive(t, 512)
	d := f.openFor(t, NVMeOptions{Depth: 4})
	var b Batch
	ended := make(chan error, 32)
	ops := make([]Op, cap(ended))
	for i := range ops {
		ops[i] = Op{Kind: OpRead, Off: int64(i) * 4096, Data: make([]byte, 4096), Then: func(err error, _ *Batch) { ended <- err }}
	}
	for round := range 20 {
		f.mu.Lock()
		f.gone = round%2 == 0
		f.mu.Unlock()
		for end := time.Now().Add(20 * time.Second); d.Info().Gone && round%2 > 0; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("the drive is back, but not used")
			}
		}
		for i := range ops {
			b.Add(d, &ops[i])
		}
		b.Submit()
		for n, end := 0, time.Now().Add(20*time.Second); n < len(ops); {
			b.Reap()
			for ; len(ended) > 0; n++ {
				if err := <-ended; errors.Is(err, ErrGone) != (round%2 == 0) {
					t.Error(err)
				}
			}
			var files []unix.PollFd
			for _, f := range b.Hold(make([]int32, 0, 1)) {
				files = append(files, unix.PollFd{Fd: f, Events: unix.POLLIN})
			}
			if _, err := unix.Poll(files, 10); err != nil && !errors.Is(err, unix.EINTR) || time.Now().After(end) {
				t.Fatalf("%d of %d reads have ended: %v", n, len(ops), err)
			}
		}
		b.Reap()
	}
}

// TestOwnerGone closes a device while an owner of ops holds its completions, and has a batch forget it.
func TestOwnerGone(t *testing.T) {
	devices(t, func(t *testing.T, d Device, a *Arena) {
		w := newOwner(t, a, 32)
		for k := range w.ops {
			w.batch.Add(d, &w.ops[k])
		}
		w.batch.Submit()
		files := w.batch.Hold(w.files[:0])
		closed := make(chan error)
		go func() { closed <- d.Close() }()
		for range w.ops {
			for len(w.ended) == 0 {
				w.batch.Reap()
				w.sleep(time.Millisecond)
			}
			<-w.ended
		}
		w.batch.Reap()
		if err := <-closed; err != nil {
			t.Error(err)
		}
		if files = w.batch.Hold(files[:0]); len(files) > 0 {
			t.Error("a closed device is waited for")
		}
		w.batch.Reap()
	})
}
