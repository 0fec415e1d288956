package rdmatest

import (
	"encoding/binary"
	"errors"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kvof/kvof/rdma"
)

// Bell is what a Channel in memory sleeps on: it rings, or a file can be read.
type Bell struct {
	mu     sync.Mutex
	fd     int
	closed bool
	poll   []unix.PollFd
}

// NewBell makes a bell that does not ring.
func NewBell() (*Bell, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	return &Bell{fd: fd, poll: make([]unix.PollFd, 1+rdma.MaxFiles)}, nil
}

var stroke = binary.NativeEndian.AppendUint64(nil, 1)

// Ring makes Wait return, now or the next time.
func (b *Bell) Ring() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.closed {
		_, _ = unix.Write(b.fd, stroke)
	}
}

// Wait sleeps until the bell rings, or one of the files can be read. One goroutine calls it at a time.
func (b *Bell) Wait(files []int32) error {
	n := min(len(files), rdma.MaxFiles)
	b.poll[0] = unix.PollFd{Fd: int32(b.fd), Events: unix.POLLIN}
	for i, f := range files[:n] {
		b.poll[1+i] = unix.PollFd{Fd: f, Events: unix.POLLIN}
	}
	if _, err := unix.Poll(b.poll[:1+n], -1); err != nil {
		if errors.Is(err, unix.EINTR) {
			return nil
		}
		return err
	}
	if b.poll[0].Revents != 0 {
		var count [8]byte
		_, _ = unix.Read(b.fd, count[:])
	}
	return nil
}

// Close frees the bell. Nobody is in Wait.
func (b *Bell) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return rdma.ErrClosed
	}
	b.closed = true
	return unix.Close(b.fd)
}
