package uring

import (
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"unsafe"

	"github.com/pawelgaczynski/giouring"
	"golang.org/x/sys/unix"
)

// queues is a pair of a submission and a completion queue: a ring, or what a
// test puts in its place. Submission (sqe, ready, submit) is for one goroutine
// at a time, completion (reap, sleep, poll) for another.
type queues interface {
	// sqe returns a cleared submission queue entry to fill, or nil when the
	// queue is full.
	sqe() *giouring.SubmissionQueueEntry
	// ready is how many filled entries the kernel does not have yet.
	ready() uint32
	// submit hands all filled entries to the kernel. An error (EAGAIN, EBUSY:
	// it is short of memory) leaves the rest in the queue, for another submit.
	submit() error
	// reap takes what has completed, as far as into holds it.
	reap(into []completion) int
	// sleep returns when there are completions that it is told of, or wake was
	// called, since it last returned.
	sleep()
	wake()
	// hush stops, or resumes, sleep's being told of completions.
	hush(on bool)
	// completed tells whether there is anything to reap.
	completed() bool
	// block waits in the kernel until there is, or a signal came. Only for who reaps.
	block()
	// descriptor can be read, to poll(2), when there is something to reap; -1: there is none.
	descriptor() int32
	// poll looks for completions at the drive, where nobody is told of any.
	poll()
	// reserve makes n empty slots for registered buffers.
	reserve(n int) error
	// register pins b, at most 1 GiB, as registered buffer i.
	register(i int, b []byte) error
	// registerFile makes fd the one registered file; with update, in the place
	// of the one before. -1 is no file.
	registerFile(fd int, update bool) error
	// close frees all; nothing is in flight.
	close()
}

// ring is an io_uring with an eventfd for its completions. It hides what
// giouring leaves to its callers: entries are cleared, calls repeated after
// EINTR, files registered, and memory freed.
type ring struct {
	r        *giouring.Ring
	flags    uint32
	features uint32
	event    *os.File // in the netpoller
	conn     syscall.RawConn
	rouse    func(fd uintptr) bool // r.roused
	waited   bool                  // asked before in this sleep
	woken    atomic.Bool           // wake was called
	cqes     [64]*giouring.CompletionQueueEvent
}

// wideRing is a ring for NVMe passthrough: 128-byte entries, whose last 80
// bytes are the command's, and 32-byte completions.
const wideRing = giouring.SetupSQE128 | giouring.SetupCQE32

// wideEntry is an entry of such a ring.
type wideEntry struct {
	giouring.SubmissionQueueEntry
	_ [64]byte
}

// bigCmd is where struct io_uring_sqe has cmd, in bytes.
const bigCmd = 48

// completion is what a ring reports of one submission: the slot its entry
// named, and the result, negative for an errno.
type completion struct {
	slot uint32
	res  int32
}

// params is struct io_uring_params, whose fields giouring.Params hides.
type params struct {
	sqEntries, cqEntries, flags, sqThreadCPU, sqThreadIdle, features, wqFd uint32
	_                                                                      [3]uint32
	sqOff, cqOff                                                           [10]uint32
}

var _ = [1]struct{}{}[unsafe.Sizeof(params{})-unsafe.Sizeof(giouring.Params{})]

// innerRing and innerQueue are giouring.Ring and its SubmissionQueue, which
// keep to themselves what submit, close, hush and registerFile need.
type innerRing struct {
	sq    *innerQueue
	cq    *innerCompletions
	flags uint32
	fd    int
	_     [3]uint64
}

type innerQueue struct {
	_, tail, _, entries, flags, _, _ *uint32
	sqes                             unsafe.Pointer
	_                                [2]uint64
	sqeHead, sqeTail                 uint32
	_                                uint64
}

type innerCompletions struct {
	_, _, _, _, flags, _ *uint32
}

var (
	_ = [1]struct{}{}[unsafe.Sizeof(innerRing{})-unsafe.Sizeof(giouring.Ring{})]
	_ = [1]struct{}{}[unsafe.Sizeof(innerQueue{})-unsafe.Sizeof(giouring.SubmissionQueue{})]
)

func (r *ring) inner() *innerRing { return (*innerRing)(unsafe.Pointer(r.r)) }

// newRing makes a ring that takes entries submissions at once, a power of two,
// and twice as many completions. flags are IORING_SETUP_ bits.
func newRing(entries, flags uint32) (*ring, error) {
	p := params{flags: flags}
	g := giouring.NewRing()
	if err := g.QueueInitParams(entries, (*giouring.Params)(unsafe.Pointer(&p))); err != nil {
		return nil, err
	}
	r := &ring{r: g, flags: flags, features: p.features}
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		g.QueueExit()
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	r.event = os.NewFile(uintptr(fd), "eventfd")
	r.rouse = r.roused
	if r.conn, err = r.event.SyscallConn(); err == nil {
		_, err = g.RegisterEventFd(fd)
	}
	if err != nil {
		r.close()
		return nil, err
	}
	return r, nil
}

func (r *ring) sqe() *giouring.SubmissionQueueEntry {
	e := r.r.GetSQE()
	switch { // giouring leaves what the last command wrote
	case e == nil:
	case r.flags&giouring.SetupSQE128 != 0:
		*(*wideEntry)(unsafe.Pointer(e)) = wideEntry{}
	default:
		*e = giouring.SubmissionQueueEntry{}
	}
	return e
}

func (r *ring) ready() uint32 { return r.r.SQReady() }

// submit is giouring's Submit, without a word to Go's scheduler: the call does not wait, and to announce it (syscall.Syscall)
// would wake the scheduler's monitor for each operation of a server that is not busy.
func (r *ring) submit() error {
	q := r.inner().sq
	q.sqeHead = q.sqeTail
	atomic.StoreUint32(q.tail, q.sqeTail)
	for n := r.r.SQReady(); n > 0; n = r.r.SQReady() {
		var flags uint32
		if r.flags&giouring.SetupIOPoll != 0 || atomic.LoadUint32(q.flags)&(giouring.SQCQOverflow|giouring.SQTaskrun) != 0 {
			flags = giouring.EnterGetEvents
		}
		if _, _, e := syscall.RawSyscall6(unix.SYS_IO_URING_ENTER, uintptr(r.inner().fd), uintptr(n), 0, uintptr(flags), 0, 0); e != 0 && e != unix.EINTR {
			return e
		}
	}
	return nil
}

func (r *ring) reap(into []completion) int {
	n := int(r.r.PeekBatchCQE(r.cqes[:min(len(into), len(r.cqes))]))
	for i, c := range r.cqes[:n] {
		into[i] = completion{uint32(c.UserData), c.Res}
	}
	r.r.CQAdvance(uint32(n))
	return n
}

// sleep waits for the eventfd's next signal. It never reads it: to the netpoller, which is edge-triggered, every signal is
// a new one, and that saves two system calls.
func (r *ring) sleep() {
	r.waited = false
	_ = r.conn.Read(r.rouse)
}

// roused tells whether sleep is over. It is asked once that signals count, for what came before, and after the first.
func (r *ring) roused(uintptr) bool {
	if r.waited || r.woken.Load() || r.completed() && !r.hushed() {
		r.woken.Store(false)
		return true
	}
	r.waited = true
	return false
}

func (r *ring) poll() { _, _ = r.r.GetEvents() }

// block needs no loop for EINTR: its caller has one.
func (r *ring) block() { _, _ = r.r.Enter(0, 1, giouring.EnterGetEvents, nil) }

func (r *ring) descriptor() int32 { return int32(r.inner().fd) }

func (r *ring) completed() bool { return r.r.CQReady() > 0 }

// hush sets IORING_CQ_EVENTFD_DISABLED, which giouring's toggle cannot.
func (r *ring) hush(on bool) {
	if flags := r.inner().cq.flags; flags != nil {
		var v uint32
		if on {
			v = giouring.CQEventFdDisabled
		}
		atomic.StoreUint32(flags, v)
	}
}

func (r *ring) hushed() bool {
	flags := r.inner().cq.flags
	return flags != nil && atomic.LoadUint32(flags)&giouring.CQEventFdDisabled != 0
}

func (r *ring) wake() {
	r.woken.Store(true)
	_, _ = r.event.Write(oneEvent)
}

var oneEvent = binary.NativeEndian.AppendUint64(nil, 1)

func (r *ring) reserve(n int) error {
	_, err := r.r.RegisterBuffersSparse(uint32(n))
	return err
}

func (r *ring) register(i int, b []byte) error {
	v := []syscall.Iovec{{Base: unsafe.SliceData(b)}}
	v[0].SetLen(len(b))
	var tag uint64
	_, err := r.r.RegisterBuffersUpdateTag(uint32(i), v, &tag, 1)
	runtime.KeepAlive(v)
	return err
}

func (r *ring) registerFile(fd int, update bool) error {
	fds := &[1]int32{int32(fd)}
	var pin runtime.Pinner
	pin.Pin(fds)
	defer pin.Unpin()
	opcode, arg := uintptr(giouring.RegisterFiles), unsafe.Pointer(fds)
	var u struct {
		offset, _ uint32
		fds       uint64
	}
	if update { // struct io_uring_files_update
		u.fds = uint64(uintptr(unsafe.Pointer(fds)))
		opcode, arg = uintptr(giouring.RegisterFilesUpdate), unsafe.Pointer(&u)
	}
	_, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.inner().fd), opcode, uintptr(arg), 1, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func (r *ring) close() {
	if in := r.inner(); r.flags&giouring.SetupSQE128 != 0 { // QueueExit unmaps only the first half of wide entries
		page := uintptr(os.Getpagesize())
		n := uintptr(*in.sq.entries) * unsafe.Sizeof(giouring.SubmissionQueueEntry{})
		if head, all := roundUp(n, page), roundUp(2*n, page); all > head {
			_ = unix.MunmapPtr(unsafe.Add(in.sq.sqes, head), all-head)
		}
	}
	r.r.QueueExit()
	r.event.Close()
}

var ringFeatures = [...]string{
	"single_mmap", "nodrop", "submit_stable", "rw_cur_pos", "cur_personality", "fast_poll", "poll_32bits",
	"sqpoll_nonfixed", "ext_arg", "native_workers", "rsrc_tags", "cqe_skip", "linked_file", "reg_reg_ring",
	"recvsend_bundle", "min_timeout", "rw_attr", "no_iowait",
}

// featureNames spells out IORING_FEAT_ bits.
func featureNames(bits uint32) []string {
	var names []string
	for i, name := range ringFeatures {
		if bits&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	return names
}

// zeroes is what a Zero writes where the kernel has no cheaper way: memory that
// is never written, so all its pages are the kernel's one zero page.
var zeroes atomic.Pointer[[]byte]

func zeroPages() []byte {
	if z := zeroes.Load(); z != nil {
		return *z
	}
	m, err := unix.Mmap(-1, 0, LargeBuf, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil
	}
	if !zeroes.CompareAndSwap(nil, &m) {
		_ = unix.Munmap(m)
	}
	return *zeroes.Load()
}
