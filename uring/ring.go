package uring

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"unsafe"

	"github.com/pawelgaczynski/giouring"
	"golang.org/x/sys/unix"
)

// ring is an io_uring with an eventfd for its completions. Submission
// (sqe, submit) is for one goroutine at a time, completion (reap, sleep) for
// another. It hides what giouring leaves to its callers: entries are cleared,
// calls repeated after EINTR, and memory freed.
type ring struct {
	r        *giouring.Ring
	features uint32
	event    *os.File // in the netpoller
	count    [8]byte  // read from event
	cqes     [64]*giouring.CompletionQueueEvent
}

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

// newRing makes a ring that takes entries submissions at once, a power of two,
// and twice as many completions.
func newRing(entries uint32) (*ring, error) {
	var p params
	g := giouring.NewRing()
	if err := g.QueueInitParams(entries, (*giouring.Params)(unsafe.Pointer(&p))); err != nil {
		return nil, err
	}
	r := &ring{r: g, features: p.features}
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		g.QueueExit()
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	r.event = os.NewFile(uintptr(fd), "eventfd")
	if _, err := g.RegisterEventFd(fd); err != nil {
		r.close()
		return nil, err
	}
	return r, nil
}

// sqe returns a cleared submission queue entry to fill, or nil when the queue
// is full.
func (r *ring) sqe() *giouring.SubmissionQueueEntry {
	e := r.r.GetSQE()
	if e != nil {
		*e = giouring.SubmissionQueueEntry{} // giouring leaves what the last command wrote
	}
	return e
}

// submit hands all filled entries to the kernel. An error (EAGAIN, EBUSY: it is
// short of memory) leaves the rest in the queue, for another submit.
func (r *ring) submit() error {
	for r.r.SQReady() > 0 {
		if _, err := r.r.Submit(); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
	return nil
}

// reap takes what has completed, as far as into holds it.
func (r *ring) reap(into []completion) int {
	n := int(r.r.PeekBatchCQE(r.cqes[:min(len(into), len(r.cqes))]))
	for i, c := range r.cqes[:n] {
		into[i] = completion{uint32(c.UserData), c.Res}
	}
	r.r.CQAdvance(uint32(n))
	return n
}

// sleep returns after completions arrived, or wake was called, since it last
// returned.
func (r *ring) sleep() { _, _ = r.event.Read(r.count[:]) }

func (r *ring) wake() { _, _ = r.event.Write(oneEvent) }

var oneEvent = binary.NativeEndian.AppendUint64(nil, 1)

// reserve makes n empty slots for registered buffers.
func (r *ring) reserve(n int) error {
	_, err := r.r.RegisterBuffersSparse(uint32(n))
	return err
}

// register pins b, at most 1 GiB, as registered buffer i.
func (r *ring) register(i int, b []byte) error {
	v := []syscall.Iovec{{Base: unsafe.SliceData(b)}}
	v[0].SetLen(len(b))
	var tag uint64
	_, err := r.r.RegisterBuffersUpdateTag(uint32(i), v, &tag, 1)
	runtime.KeepAlive(v)
	return err
}

// close frees the ring; nothing is in flight.
func (r *ring) close() {
	r.r.QueueExit() // right for 64-byte entries; with SQE128 it would leak half
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
