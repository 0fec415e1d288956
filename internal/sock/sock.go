// Package sock reads and writes TCP connections as their data path needs it: scattered, gathered, and without allocating,
// which net.Conn does not offer.
//
// Its system calls never block, so they are made without a word to Go's scheduler (syscall.RawSyscall). It takes a call that
// lasts longer than 20 us, as copying payload does, for one that sleeps: its monitor then takes the processor away from
// the goroutine, which has to find another one afterwards, and looks again every 20 us for more, all on the cores that copy.
package sock

import (
	"io"
	"net"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// maxVecs is how many pieces one call gathers: the kernel's limit, UIO_MAXIOV.
	maxVecs = 1024
	// chunk is how many bytes one call copies, about: nothing stops the goroutine meanwhile, and the garbage collector
	// waits for it at times.
	chunk = 1 << 20
	// LowWater is how many bytes of a payload a reader sleeps for at least: woken for each segment, it would do little but
	// wake and sleep, and have the sender's processor wake it.
	LowWater = 256 << 10
)

// Conn is a connection. One goroutine may read while another writes. The net.Conn closes it, and has its deadlines.
type Conn struct {
	raw   syscall.RawConn
	moved atomic.Uint64

	rvec  [2]unix.Iovec
	rwait bool
	owed  int
	low   int // SO_RCVLOWAT
	rn    int
	rerr  error
	rfunc func(uintptr) bool // tryRead, bound once

	wvec  []unix.Iovec // what is left to send
	wwait bool
	werr  error
	wfunc func(uintptr) bool
}

// New returns c's Conn. It fails where c is no socket, or closed.
func New(c net.Conn) (*Conn, error) {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return nil, unix.ENOTSOCK
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil, err
	}
	s := &Conn{raw: raw, low: 1}
	s.rfunc, s.wfunc = s.tryRead, s.tryWrite
	return s, nil
}

// Moved is how many bytes have been received and sent. Anybody may ask.
func (c *Conn) Moved() uint64 { return c.moved.Load() }

// Read fills a, then b, as far as there are bytes: at least one, io.EOF after the last. Where there is none yet it sleeps,
// until there are owed bytes, or LowWater: the peer will send them whatever we do.
func (c *Conn) Read(a, b []byte, owed int) (int, error) {
	if len(a) > chunk {
		a, b = a[:chunk], nil
	}
	c.rvec[0], c.rvec[1], c.owed = Vec(a), Vec(b), min(owed, LowWater)
	return c.read(true)
}

// TryRead is Read of what is there. It returns 0 where nothing is, and where Read fails.
func (c *Conn) TryRead(b []byte) int {
	c.rvec[0] = Vec(b)
	n, _ := c.read(false)
	return n
}

func (c *Conn) read(wait bool) (int, error) {
	c.rwait, c.rn, c.rerr = wait, 0, nil
	err := c.raw.Read(c.rfunc)
	c.rvec = [2]unix.Iovec{} // the caller's buffers may be collected
	if err == nil {
		err = c.rerr
	}
	return c.rn, err
}

func (c *Conn) tryRead(fd uintptr) bool {
	for {
		n, _, e := syscall.RawSyscall(unix.SYS_READV, fd, uintptr(unsafe.Pointer(&c.rvec)), 2)
		switch {
		case e == unix.EINTR:
			continue
		case e == unix.EAGAIN && c.rwait:
			c.sleepFor(fd)
			return false
		case e != 0:
			c.rerr = e
		case n == 0:
			c.rerr = io.EOF
		default:
			c.rn = int(n)
			c.moved.Add(uint64(n))
		}
		return true
	}
}

// sleepFor sets how many bytes wake the reader.
func (c *Conn) sleepFor(fd uintptr) {
	if c.low == c.owed {
		return
	}
	n := int32(c.owed)
	if _, _, e := syscall.RawSyscall6(unix.SYS_SETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_RCVLOWAT, uintptr(unsafe.Pointer(&n)), unsafe.Sizeof(n), 0); e == 0 {
		c.low = c.owed
	}
}

// Write sends v and returns what is left of it: nothing, but after an error, or where the socket is full and wait is not
// set. It changes v's elements.
func (c *Conn) Write(v []unix.Iovec, wait bool) (left []unix.Iovec, err error) {
	c.wvec, c.wwait, c.werr = v, wait, nil
	if err = c.raw.Write(c.wfunc); err == nil {
		err = c.werr
	}
	left, c.wvec = c.wvec, nil
	return left, err
}

func (c *Conn) tryWrite(fd uintptr) bool {
	for len(c.wvec) > 0 {
		first := c.wvec[0]
		msg := unix.Msghdr{Iov: &c.wvec[0]}
		msg.SetIovlen(burst(c.wvec))
		if first.Len > chunk { // a part of it: the socket may empty as fast as it fills
			first.SetLen(chunk)
			msg.Iov = &first
			msg.SetIovlen(1)
		}
		n, _, e := syscall.RawSyscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&msg)), unix.MSG_NOSIGNAL)
		switch e {
		case 0:
			c.moved.Add(uint64(n))
			c.wvec = after(c.wvec, uint64(n))
		case unix.EINTR:
		case unix.EAGAIN:
			return !c.wwait
		default:
			c.werr = e
			return true
		}
	}
	return true
}

// burst is how many of v one call sends.
func burst(v []unix.Iovec) int {
	bytes := uint64(0)
	for i := range v {
		if bytes >= chunk || i == maxVecs {
			return i
		}
		bytes += uint64(v[i].Len)
	}
	return len(v)
}

// after drops n bytes from the front of v.
func after(v []unix.Iovec, n uint64) []unix.Iovec {
	for n > 0 {
		if n < uint64(v[0].Len) {
			v[0].Base = (*byte)(unsafe.Add(unsafe.Pointer(v[0].Base), n))
			v[0].SetLen(int(uint64(v[0].Len) - n))
			break
		}
		n -= uint64(v[0].Len)
		v[0] = unix.Iovec{} // may be collected
		v = v[1:]
	}
	return v
}

// Vec describes b to the kernel.
func Vec(b []byte) unix.Iovec {
	v := unix.Iovec{Base: unsafe.SliceData(b)}
	v.SetLen(len(b))
	return v
}
