package host

import (
	"io"
	"net"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxVecs is how many pieces one sendmsg gathers; the kernel's limit is 1024.
const maxVecs = 128

// socket does scattered reads and gathered writes on a TCP connection without allocating, which net.Conn does not
// offer. One goroutine may read while another writes.
type socket struct {
	raw syscall.RawConn

	rvec  [2]unix.Iovec
	rlow  int // SO_RCVLOWAT
	rwant int
	rn    int
	rerr  error
	rfunc func(uintptr) bool // tryRead, bound once

	wvec  []unix.Iovec // what is left to send
	msg   unix.Msghdr
	wait  bool // send waits until the socket takes everything
	werr  error
	wfunc func(uintptr) bool
}

func newSocket(c *net.TCPConn) (*socket, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	s := &socket{raw: raw, rlow: 1}
	s.rfunc, s.wfunc = s.tryRead, s.tryWrite
	return s, nil
}

// lowWater is how many bytes of a payload a reader sleeps for at least: woken for each segment, it would do little but
// wake and sleep, and have the sender's processor wake it.
const lowWater = 256 << 10

// read waits for bytes, those that a holds if there are none, and fills a, then b; a may be empty, b must not be.
func (s *socket) read(a, b []byte) (int, error) {
	s.rvec, s.rwant = [2]unix.Iovec{}, 1
	if len(a) > 0 {
		s.rvec[0], s.rwant = vec(a), min(len(a), lowWater)
	}
	s.rvec[1] = vec(b)
	if err := s.raw.Read(s.rfunc); err != nil {
		return 0, err
	}
	s.rvec = [2]unix.Iovec{} // the caller's buffer may be collected
	if s.rerr != nil {
		return 0, s.rerr
	}
	if s.rn == 0 {
		return 0, io.EOF
	}
	return s.rn, nil
}

func (s *socket) tryRead(fd uintptr) bool {
	for {
		n, _, e := syscall.Syscall(unix.SYS_READV, fd, uintptr(unsafe.Pointer(&s.rvec)), 2)
		switch e {
		case 0:
			s.rn, s.rerr = int(n), nil
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			if s.rlow != s.rwant && unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVLOWAT, s.rwant) == nil {
				s.rlow = s.rwant
			}
			return false
		default:
			s.rn, s.rerr = 0, e
		}
		return true
	}
}

// write sends s.wvec. When wait is false and the socket is full it returns with the rest still in s.wvec.
func (s *socket) write(wait bool) error {
	s.wait, s.werr = wait, nil
	if err := s.raw.Write(s.wfunc); err != nil {
		return err
	}
	return s.werr
}

func (s *socket) tryWrite(fd uintptr) bool {
	for len(s.wvec) > 0 {
		s.msg.Iov = &s.wvec[0]
		s.msg.SetIovlen(len(s.wvec))
		n, _, e := syscall.Syscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&s.msg)), unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
		switch e {
		case 0:
			s.sent(int(n))
		case unix.EINTR:
		case unix.EAGAIN:
			return !s.wait
		default:
			s.werr = e
			return true
		}
	}
	return true
}

// sent drops n bytes from the front of wvec.
func (s *socket) sent(n int) {
	for n > 0 {
		v := &s.wvec[0]
		if uint64(n) < v.Len {
			v.Base = (*byte)(unsafe.Add(unsafe.Pointer(v.Base), n))
			v.Len -= uint64(n)
			return
		}
		n -= int(v.Len)
		*v = unix.Iovec{}
		s.wvec = s.wvec[1:]
	}
}

func vec(b []byte) unix.Iovec {
	v := unix.Iovec{Base: unsafe.SliceData(b)}
	v.SetLen(len(b))
	return v
}
