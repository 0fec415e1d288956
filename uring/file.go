package uring

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"
	"unsafe"

	"github.com/pawelgaczynski/giouring"
	"golang.org/x/sys/unix"
)

// FileOptions says how to open a file or block device.
type FileOptions struct {
	Size  int64  // bytes: a regular file is created, or grown, to this; 0 takes it as it is. Ignored for block devices
	Arena *Arena // whose buffers the ring registers as they come into use, memlock limit permitting; may be nil
	Depth int    // ops the ring holds at once, rounded up to a power of two; 0 means 256
}

const (
	maxTransfer = 1 << 30 // bytes asked of the kernel at once, which itself stops a little short of 2 GiB

	blockDiscard = 0x12 << 8 // BLOCK_URING_CMD_DISCARD, _IO(0x12, 0)
)

// file is a Device on a regular file or block device.
type file struct {
	engine
	f        *os.File
	fd       int
	block    bool
	direct   bool
	features []string
	warns    []string
}

// OpenFile opens a regular file or a block device. With o.Size a missing file
// is made, with its folder, and a smaller one grows; both stay sparse. Reads
// and writes go past the page cache (O_DIRECT) where the file system can. The
// device is locked (flock, and O_EXCL on a block device) against a second
// server: ErrInUse. Without io_uring: ErrUnavailable.
func OpenFile(path string, o FileOptions) (Device, error) {
	d := &file{engine: engine{path: path, kinds: fileKinds, arena: o.Arena}}
	err := d.open(o.Size)
	depth := roundDepth(o.Depth)
	var r *ring
	if err == nil {
		if r, err = newRing(uint32(depth), 0); err != nil {
			err = fmt.Errorf("uring: %w: %s", ErrUnavailable, explain(err))
		}
	}
	if err != nil {
		if d.f != nil {
			d.f.Close()
		}
		return nil, err
	}
	d.driver, d.ring, d.features = d, r, featureNames(r.features)
	d.start(depth)
	return d, nil
}

// open finds and locks the file, and learns its size and alignment.
func (d *file) open(size int64) error {
	if size < 0 {
		return fmt.Errorf("uring: %s: size %d is negative", d.path, size)
	}
	flags := os.O_RDWR
	switch st, err := os.Stat(d.path); {
	case err == nil && st.Mode()&fs.ModeDevice != 0 && st.Mode()&fs.ModeCharDevice == 0:
		d.block = true
		flags |= unix.O_EXCL // refused while mounted, or part of an array
	case err == nil && !st.Mode().IsRegular():
		return fmt.Errorf("uring: %s is neither a regular file nor a block device", d.path)
	case errors.Is(err, fs.ErrNotExist) && size == 0:
		return fmt.Errorf("uring: %s does not exist: give a size to have it made (%w)", d.path, fs.ErrNotExist)
	case errors.Is(err, fs.ErrNotExist):
		if err := os.MkdirAll(filepath.Dir(d.path), 0o755); err != nil {
			return fmt.Errorf("uring: %w", err)
		}
		flags |= os.O_CREATE
	}
	f, err := os.OpenFile(d.path, flags|unix.O_DIRECT, 0o600)
	if d.direct = err == nil; errors.Is(err, unix.EINVAL) {
		f, err = os.OpenFile(d.path, flags, 0o600)
	}
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("uring: %s is %w: it is mounted or belongs to another server or array; unmount it or name another", d.path, ErrInUse)
	case err != nil:
		return fmt.Errorf("uring: %w", err)
	}
	d.f, d.fd = f, int(f.Fd())
	if err := lock(d.fd); errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("uring: %s is %w by another server (fuser %[1]s shows which): stop it or name another file", d.path, ErrInUse)
	} else if err != nil {
		return fmt.Errorf("uring: lock %s: %w", d.path, err)
	}
	d.align = d.alignment()

	if d.size, err = f.Seek(0, io.SeekEnd); err != nil {
		return fmt.Errorf("uring: %w", err)
	}
	if !d.block && d.size < size {
		d.size = roundUp(size, d.align)
		if err := f.Truncate(d.size); err != nil {
			return fmt.Errorf("uring: cannot grow %s to %d MiB (%w): choose a smaller size", d.path, d.size>>20, err)
		}
	}
	if d.size &^= d.align - 1; d.size == 0 {
		return fmt.Errorf("uring: %s is empty: give a size", d.path)
	}
	d.warnOvercommit()
	return nil
}

// alignment is what direct I/O asks of offsets, lengths and memory.
func (d *file) alignment() int64 {
	var v unix.Statfs_t
	if unix.Fstatfs(d.fd, &v) == nil && v.Type == unix.TMPFS_MAGIC && !d.block {
		d.direct = false // tmpfs takes O_DIRECT but is the page cache
		return 512
	}
	var st unix.Statx_t
	if err := unix.Statx(d.fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st); err == nil && st.Mask&unix.STATX_DIOALIGN != 0 {
		if st.Dio_offset_align == 0 {
			d.direct = false // open took O_DIRECT, but this file's I/O goes through the page cache
			return 512
		}
		return int64(min(4096, max(512, st.Dio_mem_align, st.Dio_offset_align)))
	}
	switch n, err := unix.IoctlGetInt(d.fd, unix.BLKSSZGET); {
	case d.block && err == nil && n >= 512 && n <= 4096:
		return int64(n)
	case d.direct:
		return 4096
	default:
		return 512
	}
}

// warnOvercommit tells of a sparse file that its file system cannot fill.
func (d *file) warnOvercommit() {
	var v unix.Statfs_t
	var st unix.Stat_t
	if d.block || unix.Fstatfs(d.fd, &v) != nil || unix.Fstat(d.fd, &st) != nil {
		return
	}
	if missing := d.size - st.Blocks*512 - int64(v.Bavail)*v.Bsize; missing > 0 {
		d.warns = append(d.warns, fmt.Sprintf("%s is sparse and its file system has %d MiB too little to fill it: free space or choose a smaller size", d.path, missing>>20+1))
	}
}

// part implements driver: the kernel takes any size, and stops short if it must.
func (d *file) part(o *Op) int64 { return o.size() }

// joins implements driver.
func (d *file) joins(s *slot, o *Op) bool { return false }

// prepare implements driver.
func (d *file) prepare(e *giouring.SubmissionQueueEntry, i uint32, s *slot) {
	o := s.op
	off, left := o.Off+s.moved, s.n-s.moved
	switch {
	case o.Kind == OpRead:
		d.transfer(e, o.Data[s.moved:], off, giouring.OpRead, giouring.OpReadFixed)
	case o.Kind == OpWrite:
		d.transfer(e, o.Data[s.moved:], off, giouring.OpWrite, giouring.OpWriteFixed)
	case o.Kind == OpFlush:
		e.PrepareFsync(d.fd, giouring.FsyncDatasync)
	case o.Kind == OpZero && o.manual:
		z := zeroPages()
		d.transfer(e, z[:min(int64(len(z)), left)], off, giouring.OpWrite, giouring.OpWriteFixed)
	case o.Kind == OpZero:
		e.PrepareFallocate(d.fd, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, uint64(o.Off), uint64(o.Len))
	case d.block:
		e.OpCode, e.Fd, e.Off, e.Addr, e.Addr3 = giouring.OpUringCmd, int32(d.fd), blockDiscard, uint64(o.Off), uint64(o.Len)
	default:
		e.PrepareFallocate(d.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, uint64(o.Off), uint64(o.Len))
	}
}

func (d *file) transfer(e *giouring.SubmissionQueueEntry, b []byte, off int64, op, fixed uint8) {
	e.OpCode, e.Fd, e.Off = op, int32(d.fd), uint64(off)
	e.Addr, e.Len = uint64(address(b)), uint32(min(len(b), maxTransfer))
	if i, ok := d.pinned.find(&d.engine, b); ok {
		e.OpCode, e.BufIG = fixed, uint16(i)
	}
}

// advance implements driver.
func (d *file) advance(s *slot, res int32) verdict {
	o := s.op
	errno := syscall.Errno(max(0, -res))
	if errno == 0 && (o.Kind == OpRead || o.Kind == OpWrite || o.manual) {
		n := int64(res)
		if s.moved+n < s.n {
			n &^= d.align - 1 // a direct transfer goes on from a whole block
		}
		if s.moved += n; s.moved == s.n {
			return ended
		}
		if n > 0 {
			return repeat
		}
		errno = unix.EAGAIN // nothing moved: end of a file cut short, or a passing shortage
		if s.retry == maxRetries {
			errno = unix.EIO
		}
	}
	switch {
	case errno == 0:
		return ended
	case (transient(errno) || errno == unix.EINTR) && s.retry < maxRetries:
		s.retry++
		return repeat
	case o.Kind == OpZero && !o.manual && unsupported(errno):
		o.manual = true
		return repeat
	case o.Kind == OpDiscard && unsupported(errno) && d.block:
		d.elsewhere++
		go d.discard(o)
		return given
	case o.Kind == OpDiscard && unsupported(errno):
		return ended // a hint, which this file system does not take
	}
	s.err = newOpError(o, o.Off+s.moved, d.path, errno)
	return ended
}

func unsupported(e syscall.Errno) bool {
	return e == unix.EOPNOTSUPP || e == unix.EINVAL || e == unix.ENOTTY || e == unix.ENOSYS
}

// discard is OpDiscard on a block device for kernels without
// BLOCK_URING_CMD_DISCARD (before 6.12).
func (d *file) discard(o *Op) {
	r := [2]uint64{uint64(o.Off), uint64(o.Len)}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(d.fd), unix.BLKDISCARD, uintptr(unsafe.Pointer(&r)))
	var err error
	if errno != 0 && !unsupported(errno) {
		err = newOpError(o, o.Off, d.path, errno)
	}
	o.Complete(err)
	d.returned()
}

// Info implements Device.
func (d *file) Info() DeviceInfo {
	i := d.describe(DeviceInfo{Kind: "file", Direct: d.direct, Features: d.features, Warnings: append([]string(nil), d.warns...)})
	if d.block {
		i.Kind = "block"
	}
	if !d.direct {
		i.Warnings = append(i.Warnings, d.path+" goes through the page cache: its file system has no direct I/O; use ext4, xfs or a block device")
	}
	return i
}

// lock locks a file against other servers: EWOULDBLOCK if one has it. It waits a
// little, as the kernel ends the rings of a killed server, and lets go of its
// files, only after the process has gone.
func lock(fd int) error {
	for end := time.Now().Add(2 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(end) {
			return err
		}
	}
}

// Close implements Device.
func (d *file) Close() error {
	if !d.finishAll() {
		return nil
	}
	_ = unix.Flock(d.fd, unix.LOCK_UN) // at once, even if the kernel keeps the file a little longer
	return d.f.Close()
}
