package uring

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/bits"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
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
	maxRetries  = 100     // EAGAIN, EINTR and transfers that moved nothing
	retryDelay  = time.Millisecond
	maxRounds   = 8 // calls of io_uring_enter one Submit makes, at most, for itself and others

	blockDiscard = 0x12 << 8 // BLOCK_URING_CMD_DISCARD, _IO(0x12, 0)
)

// file is a Device on a regular file or block device.
type file struct {
	path   string
	f      *os.File
	fd     int
	block  bool
	direct bool
	size   int64
	align  int64
	arena  *Arena
	ring   *ring
	pinned pins
	reaped chan struct{} // closed when the completion goroutine has ended
	warns  []string

	mu         sync.Mutex
	pending    queue    // ops waiting for a slot
	slots      []*Op    // in the ring, by user_data
	free       []uint32 // slots to use
	elsewhere  int      // ops in a goroutine of their own, and timers
	submitting bool     // somebody fills entries and enters the kernel
	closing    bool
}

// queue is a FIFO of ops linked through next.
type queue struct{ head, tail *Op }

func (q *queue) push(o *Op) {
	o.next = nil
	if q.tail == nil {
		q.head = o
	} else {
		q.tail.next = o
	}
	q.tail = o
}

func (q *queue) pop() *Op {
	o := q.head
	if q.head = o.next; q.head == nil {
		q.tail = nil
	}
	o.next = nil
	return o
}

// OpenFile opens a regular file or a block device. With o.Size a missing file
// is made, with its folder, and a smaller one grows; both stay sparse. Reads
// and writes go past the page cache (O_DIRECT) where the file system can. The
// device is locked (flock, and O_EXCL on a block device) against a second
// server: ErrInUse. Without io_uring: ErrUnavailable.
func OpenFile(path string, o FileOptions) (Device, error) {
	d := &file{path: path, arena: o.Arena, reaped: make(chan struct{})}
	err := d.open(o.Size)
	if err == nil {
		err = d.start(o)
	}
	if err != nil {
		if d.f != nil {
			d.f.Close()
		}
		return nil, err
	}
	go d.complete()
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
	if err := unix.Flock(d.fd, unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
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

// start makes the ring.
func (d *file) start(o FileOptions) error {
	depth := 256
	if o.Depth > 0 {
		depth = 1 << bits.Len(uint(min(o.Depth, 16384)-1))
	}
	r, err := newRing(uint32(depth))
	if err != nil {
		return fmt.Errorf("uring: %w: %s", ErrUnavailable, explain(err))
	}
	d.ring = r
	d.slots = make([]*Op, depth)
	d.free = make([]uint32, depth)
	for i := range d.free {
		d.free[i] = uint32(i)
	}
	d.pinned.init(d)
	return nil
}

// Submit implements Device.
func (d *file) Submit(ops ...*Op) {
	for _, o := range ops {
		o.Begin()
	}
	d.mu.Lock()
	for _, o := range ops {
		if d.closing {
			o.Complete(ErrClosed)
		} else if err := o.check(d.size, d.align, OpZero); err != nil {
			o.Complete(err)
		} else if o.size() == 0 && o.Kind != OpFlush {
			o.Complete(nil)
		} else {
			d.pending.push(o)
		}
	}
	if d.pending.head != nil {
		d.kick()
	}
	d.mu.Unlock()
}

// kick moves pending ops into the ring as far as there are slots. Callers hold
// d.mu, which it gives up while in the kernel; a caller that finds another
// submitting leaves its ops to that one. Nobody is kept at it for long: the
// completion goroutine takes over.
func (d *file) kick() {
	if d.submitting {
		return
	}
	d.submitting = true
	round := 0
	for ; d.fill(); round++ {
		if round == maxRounds {
			d.ring.wake()
			break
		}
		d.mu.Unlock()
		err := d.ring.submit()
		d.mu.Lock()
		if err != nil { // the kernel is short of memory; the entries stay queued
			d.elsewhere++
			time.AfterFunc(retryDelay, d.returned)
			break
		}
	}
	d.submitting = false
	if d.closing && round > 0 {
		d.ring.wake() // what was submitted may have ended before, and rest found us here
	}
}

// returned ends what elsewhere counts, and has the completion goroutine look.
func (d *file) returned() {
	d.mu.Lock()
	d.elsewhere--
	d.mu.Unlock()
	d.ring.wake()
}

// fill writes submission queue entries for pending ops, and reports whether
// there is anything to submit.
func (d *file) fill() bool {
	for d.pending.head != nil && len(d.free) > 0 {
		e := d.ring.sqe()
		if e == nil {
			break
		}
		o := d.pending.pop()
		last := len(d.free) - 1
		slot := d.free[last]
		d.free = d.free[:last]
		d.slots[slot] = o
		d.prepare(e, o)
		e.UserData = uint64(slot)
	}
	return d.ring.r.SQReady() > 0
}

// prepare describes to the kernel what of o is still to do.
func (d *file) prepare(e *giouring.SubmissionQueueEntry, o *Op) {
	switch {
	case o.Kind == OpRead:
		d.transfer(e, o.Data[o.pos:], o.Off+o.pos, giouring.OpRead, giouring.OpReadFixed)
	case o.Kind == OpWrite:
		d.transfer(e, o.Data[o.pos:], o.Off+o.pos, giouring.OpWrite, giouring.OpWriteFixed)
	case o.Kind == OpFlush:
		e.PrepareFsync(d.fd, giouring.FsyncDatasync)
	case o.Kind == OpZero && o.manual:
		z := zeroPages()
		d.transfer(e, z[:min(int64(len(z)), o.Len-o.pos)], o.Off+o.pos, giouring.OpWrite, giouring.OpWriteFixed)
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
	if i, ok := d.pinned.find(d, b); ok {
		e.OpCode, e.BufIG = fixed, uint16(i)
	}
}

// complete is the completion goroutine.
func (d *file) complete() {
	defer close(d.reaped)
	var batch [64]completion
	var done [64]*Op
	for {
		n := d.ring.reap(batch[:])
		if n == 0 {
			if d.rest() {
				return
			}
			d.ring.sleep()
			continue
		}
		finished := 0
		d.mu.Lock()
		for _, c := range batch[:n] {
			o := d.slots[c.slot]
			d.slots[c.slot] = nil
			d.free = append(d.free, c.slot)
			if d.advance(o, c.res) {
				done[finished] = o
				finished++
			}
		}
		d.kick() // continues short transfers, and fills the slots set free
		d.mu.Unlock()
		for i, o := range done[:finished] {
			o.Complete(o.err)
			done[i] = nil
		}
	}
}

// rest submits what others left, and reports whether the device is closing and
// has nothing left to do.
func (d *file) rest() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.kick()
	return d.closing && !d.submitting && d.elsewhere == 0 && d.pending.head == nil && len(d.free) == len(d.slots)
}

// advance takes the kernel's result for o and reports whether o is done. If
// not, the rest of it is pending again or runs elsewhere.
func (d *file) advance(o *Op, res int32) bool {
	errno := syscall.Errno(max(0, -res))
	if errno == 0 && (o.Kind == OpRead || o.Kind == OpWrite || o.manual) {
		n := int64(res)
		if o.pos+n < o.size() {
			n &^= d.align - 1 // a direct transfer goes on from a whole block
		}
		if o.pos += n; o.pos == o.size() {
			return true
		}
		if n > 0 {
			d.pending.push(o)
			return false
		}
		errno = unix.EAGAIN // nothing moved: end of a file cut short, or a passing shortage
		if o.retry == maxRetries {
			errno = unix.EIO
		}
	}
	switch {
	case errno == 0:
		return true
	case (errno == unix.EAGAIN || errno == unix.EINTR) && o.retry < maxRetries:
		o.retry++
		d.pending.push(o)
		return false
	case o.Kind == OpZero && !o.manual && unsupported(errno):
		o.manual = true
		d.pending.push(o)
		return false
	case o.Kind == OpDiscard && unsupported(errno) && d.block:
		d.elsewhere++
		go d.discard(o)
		return false
	case o.Kind == OpDiscard && unsupported(errno):
		return true // a hint, which this file system does not take
	}
	o.err = newOpError(o, d.path, errno)
	return true
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
		err = newOpError(o, d.path, errno)
	}
	o.Complete(err)
	d.returned()
}

// View implements Device.
func (d *file) View(off, n int64) []byte { return nil }

// Size implements Device.
func (d *file) Size() int64 { return d.size }

// BlockSize implements Device.
func (d *file) BlockSize() int { return int(d.align) }

// Info implements Device.
func (d *file) Info() DeviceInfo {
	i := DeviceInfo{
		Kind: "file", Path: d.path, Size: d.size, BlockSize: int(d.align), Direct: d.direct,
		Registered: d.pinned.bytes.Load(), Depth: len(d.slots), Features: featureNames(d.ring.features),
		Warnings: append([]string(nil), d.warns...),
	}
	if d.block {
		i.Kind = "block"
	}
	if !d.direct {
		i.Warnings = append(i.Warnings, d.path+" goes through the page cache: its file system has no direct I/O; use ext4, xfs or a block device")
	}
	if w := d.pinned.warning.Load(); w != nil {
		i.Warnings = append(i.Warnings, *w)
	}
	return i
}

// Close implements Device.
func (d *file) Close() error {
	d.mu.Lock()
	again := d.closing
	d.closing = true
	d.mu.Unlock()
	if again {
		<-d.reaped
		return nil
	}
	d.ring.wake()
	<-d.reaped
	d.pinned.wait()
	d.ring.close()
	_ = unix.Flock(d.fd, unix.LOCK_UN) // at once, even if the kernel keeps the file a little longer
	return d.f.Close()
}

// pins is the part of the arena that is registered with the ring. It grows
// chunk by chunk as buffers are used, so that memory never used is never
// pinned; ops on a chunk not registered yet work, at a higher cost.
type pins struct {
	chunk   int             // bytes, a power of two
	state   []atomic.Uint32 // per chunk
	bytes   atomic.Int64
	warning atomic.Pointer[string]
	mu      sync.Mutex // one registration at a time
	running sync.WaitGroup
}

const (
	minChunk    = 4 << 20
	maxChunks   = 1 << 14 // registered buffers a ring can have
	unpinned    = 0
	pinning     = 1
	pinned      = 2
	notPinnable = 3
)

func (p *pins) init(d *file) {
	if d.arena == nil {
		return
	}
	size := len(d.arena.mem)
	if limit := memlockLimit(); limit < uint64(size) {
		p.warn(fmt.Sprintf("%s runs without registered buffers: the memlock limit is %d KiB and the arena has %d MiB; raise it (ulimit -l unlimited, LimitMEMLOCK=infinity)", d.path, limit>>10, size>>20))
		return
	}
	p.chunk = minChunk
	for size > p.chunk*maxChunks {
		p.chunk *= 2
	}
	n := (size + p.chunk - 1) / p.chunk
	if err := d.ring.reserve(n); err != nil {
		p.warn(fmt.Sprintf("%s runs without registered buffers (%v): Linux 5.19 or later has them", d.path, err))
		return
	}
	p.state = make([]atomic.Uint32, n)
}

func (p *pins) warn(s string) { p.warning.Store(&s) }

// find returns the registered buffer that holds b. The first use of a chunk
// starts its registration, in the background.
func (p *pins) find(d *file, b []byte) (int, bool) {
	if p.state == nil {
		return 0, false
	}
	off, ok := d.arena.offset(b)
	if !ok {
		return 0, false
	}
	i := off / p.chunk
	if off+len(b) > (i+1)*p.chunk {
		return 0, false
	}
	s := &p.state[i]
	if s.Load() == unpinned && s.CompareAndSwap(unpinned, pinning) {
		p.running.Add(1)
		go p.register(d, i)
	}
	return i, s.Load() == pinned
}

func (p *pins) register(d *file, i int) {
	defer p.running.Done()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.warning.Load() != nil {
		p.state[i].Store(notPinnable)
		return
	}
	b := d.arena.mem[i*p.chunk : min((i+1)*p.chunk, len(d.arena.mem))]
	_ = unix.Madvise(b, unix.MADV_POPULATE_WRITE) // outside the ring's lock, which registering holds
	if err := d.ring.register(i, b); err != nil {
		p.state[i].Store(notPinnable)
		p.warn(fmt.Sprintf("%s runs with only %d MiB of registered buffers (%v): raise the memlock limit (ulimit -l unlimited, LimitMEMLOCK=infinity)", d.path, p.bytes.Load()>>20, err))
		return
	}
	p.bytes.Add(int64(len(b)))
	p.state[i].Store(pinned)
}

func (p *pins) wait() { p.running.Wait() }
