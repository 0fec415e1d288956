package uring

import (
	"errors"
	"fmt"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvof/kvof/nvmeof"
)

// Errors to test for with errors.Is. The error found carries a line for a
// person, and most wrap the kernel's errno as well.
var (
	ErrMedia       = errors.New("media error")               // EIO and its kin: the drive lost or could not take the data
	ErrNoSpace     = errors.New("no space")                  // ENOSPC, EDQUOT, EFBIG
	ErrInUse       = errors.New("in use")                    // another server, or the system, has the device
	ErrClosed      = errors.New("device is closed")          // submitted after Close
	ErrInvalid     = errors.New("invalid request")           // outside the device, or misaligned: the caller's fault
	ErrGone        = errors.New("device is gone")            // it was removed; ops work again once it is back, see DeviceInfo.Gone
	ErrUnavailable = errors.New("io_uring is not available") // see Features.Reason
)

// OpKind says what an Op does.
type OpKind uint8

const (
	OpRead    OpKind = iota // device to Data
	OpWrite                 // Data to device; durable after a later OpFlush
	OpFlush                 // makes durable every write that completed before it was submitted
	OpDiscard               // gives Len bytes at Off back to the drive: they read as zeroes or as before
	OpZero                  // makes Len bytes at Off read as zeroes

	// On NVMe drives alone, others refuse them: ErrInvalid.
	OpCompare // compares Data with the device
	OpVerify  // has the drive read and check Len bytes at Off
	OpCopy    // copies the source ranges in Data (Copy descriptor format 0) to Off
)

func (k OpKind) String() string {
	return [...]string{"read", "write", "flush", "discard", "zero", "compare", "verify", "copy"}[min(k, OpCopy)]
}

// transfers tells whether ops of the kind move Data from or to Off on.
func (k OpKind) transfers() bool { return k == OpRead || k == OpWrite || k == OpCompare }

// Op is one operation on a device. The zero value is ready; it is meant to
// live long and be reused, and must not be copied after its first use. From
// Submit until Wait has returned, the Op and its Data belong to the device.
type Op struct {
	Kind OpKind
	Off  int64  // byte offset on the device
	Len  int64  // bytes, for Discard and Zero
	Data []byte // for Read, Write and Compare; arena memory, or any other that does not move (not a goroutine's stack)

	// Unpaced has a large payload not wait for its turn behind others.
	Unpaced bool

	// On NVMe drives alone, others ignore them.
	Placement uint16 // of a Write: the namespace's placement handle, from 1 to DeviceInfo.Placements; 0: the device's default
	Control   uint16 // bits 31:16 of the command's CDW12, such as FUA (bit 14) and Deallocate (bit 9)

	// Then, when set, is called with the result as soon as there is one, and nobody Waits: by whoever takes the device's
	// completions, or submits. by is the Batch whose owner that is, or nil. It must not block.
	Then func(err error, by *Batch)

	done   chan struct{}
	err    error
	engine *engine   // that does it, of devices that have one
	place  *place    // of the batch that it came by
	next   *Op       // in the device's queue
	began  time.Time // when its turn came, if it is paced
	self   [1]*Op    // lets Start pass a slice without allocating one
	pos    int64     // bytes that commands were started for
	parts  int32     // commands in flight
	manual bool      // a Zero done by writing zeroes
	alone  bool      // shares no command with another
	busy   bool
}

// Start submits o alone. Unlike d.Submit(o), whose argument list escapes to the
// heap, it allocates nothing.
func (o *Op) Start(d Device) {
	o.self[0] = o
	d.Submit(o.self[:]...)
}

// Do is Start and Wait.
func (o *Op) Do(d Device) error {
	o.Start(d)
	return o.Wait()
}

// Wait returns o's result once it has completed: exactly once per Submit. A
// nil error means the whole of Data or Len. Errors wrap ErrMedia, ErrNoSpace,
// ErrInvalid, ErrGone or ErrClosed, and the errno where the kernel gave one, or
// the nvmeof.Status where a drive did.
func (o *Op) Wait() error {
	if o.engine != nil {
		o.engine.await(o)
	} else {
		<-o.done
	}
	o.busy = false
	return o.err
}

// Begin prepares o for a Device that was handed it. Only implementations of
// Device call it, first thing in Submit.
func (o *Op) Begin() {
	if o.busy {
		panic("uring: Op submitted again before Wait")
	}
	if o.done == nil {
		o.done = make(chan struct{}, 1)
	}
	o.busy, o.err, o.engine, o.place, o.next, o.began, o.pos, o.parts, o.manual, o.alone = true, nil, nil, nil, nil, time.Time{}, 0, 0, false, false
}

// Complete ends o with err. Only implementations of Device call it, once after
// each Begin; o may be reused by its owner from then on.
func (o *Op) Complete(err error) { o.complete(err, nil) }

func (o *Op) complete(err error, by *Batch) {
	if o.Then != nil {
		o.busy = false
		o.Then(err, by)
		return
	}
	o.err = err
	o.done <- struct{}{}
}

// size is how many bytes o spans on the device.
func (o *Op) size() int64 {
	switch o.Kind {
	case OpRead, OpWrite, OpCompare:
		return int64(len(o.Data))
	case OpDiscard, OpZero, OpVerify:
		return o.Len
	default:
		return 0
	}
}

// check refuses what lies outside the device or off its alignment, and kinds
// of ops that the device does not know.
func (o *Op) check(size, align int64, kinds kindSet) error {
	n, mem := o.size(), int64(0)
	if o.Kind.transfers() {
		mem = int64(address(o.Data))
	}
	switch {
	case !kinds.has(o.Kind):
		return fmt.Errorf("uring: %w: no operation %d", ErrInvalid, o.Kind)
	case o.Kind != OpFlush && (o.Off < 0 || n < 0 || o.Off > size || n > size-o.Off):
		return fmt.Errorf("uring: %w: %v of %d bytes at %d on a device of %d", ErrInvalid, o.Kind, n, o.Off, size)
	case o.Kind == OpFlush:
	case o.Kind == OpCopy && (len(o.Data) == 0 || len(o.Data)%nvmeof.CopyRangeSize != 0 || len(o.Data) > nvmeof.MaxCopyRanges*nvmeof.CopyRangeSize):
		return fmt.Errorf("uring: %w: %d bytes are no source ranges of a copy", ErrInvalid, len(o.Data))
	case (mem|n|o.Off)&(align-1) != 0:
		return fmt.Errorf("uring: %w: %v of %d bytes at %d is not aligned to %d, or its memory is not", ErrInvalid, o.Kind, n, o.Off, align)
	}
	return nil
}

// Device is storage addressed by bytes. All methods may be called from any
// goroutine. Ops in flight together complete in any order: ordering is the
// caller's, by waiting.
type Device interface {
	// Submit starts ops and does not wait for them; each is then Waited for.
	// Ops of one call go to the kernel together. The slice itself is not kept.
	// On a memory device ops have completed when it returns.
	Submit(ops ...*Op)
	// View returns n bytes at off of a memory device, to read and write in
	// place, valid until Close. It is nil on others, or outside the device.
	View(off, n int64) []byte
	// Size is the capacity in bytes, a multiple of BlockSize.
	Size() int64
	// BlockSize is the alignment in bytes, a power of two, that Off, lengths
	// and the address of Data must have: 512 or 4096, and 1 for memory.
	BlockSize() int
	// Info describes the device to a person.
	Info() DeviceInfo
	// Close waits for ops in flight and frees the device. Ops submitted later
	// complete with ErrClosed.
	Close() error
}

// DeviceInfo describes a device to a person.
type DeviceInfo struct {
	Kind       string   `json:"kind"` // "file", "block", "nvme" or "memory"
	Path       string   `json:"path,omitempty"`
	Size       int64    `json:"size"`               // bytes
	BlockSize  int      `json:"block_size"`         // bytes
	Direct     bool     `json:"direct"`             // O_DIRECT: past the page cache
	Registered int64    `json:"registered"`         // bytes of the arena registered with the ring so far
	Depth      int      `json:"depth"`              // ops the ring holds at once; more wait in line
	Window     int64    `json:"window,omitempty"`   // bytes of large payloads in flight at once; more wait in line
	Features   []string `json:"features,omitempty"` // of the ring
	Warnings   []string `json:"warnings,omitempty"` // each one line, saying what to do

	Gone        bool  `json:"gone,omitempty"`         // the drive was removed: every op ends with ErrGone until it is back
	Placements  int   `json:"placements,omitempty"`   // placement handles that Op.Placement may name
	ReclaimUnit int64 `json:"reclaim_unit,omitempty"` // bytes that the drive erases together, where it says so
}

// opError is an Op's failure.
type opError struct {
	kind  OpKind
	path  string
	off   int64
	cause error // the kernel's errno, or the drive's nvmeof.Status
	class error // or nil
}

func newOpError(o *Op, off int64, path string, cause error) error {
	e := &opError{kind: o.Kind, path: path, off: off, cause: cause}
	switch c := cause.(type) {
	case syscall.Errno:
		e.class = errnoClass(c)
	case nvmeof.Status:
		e.class = statusClass(c)
	}
	return e
}

func errnoClass(errno syscall.Errno) error {
	switch errno {
	case unix.EIO, unix.ENODATA, unix.EILSEQ, unix.EREMOTEIO, unix.ENXIO, unix.ENODEV, unix.ETIMEDOUT, unix.ENOLINK, unix.EBADE, unix.EUCLEAN:
		return ErrMedia
	case unix.ENOSPC, unix.EDQUOT, unix.EFBIG:
		return ErrNoSpace
	case unix.EINVAL, unix.EFAULT:
		return ErrInvalid
	}
	return nil
}

func statusClass(st nvmeof.Status) error {
	switch st = st.Code(); {
	case st == nvmeof.CompareFailure:
		return nil
	case st>>8 == 2, st == nvmeof.InternalError, st == nvmeof.DataTransferError, st == nvmeof.WriteProtected:
		return ErrMedia
	case st == nvmeof.CapacityExceeded:
		return ErrNoSpace
	case st == nvmeof.InvalidOpcode, st == nvmeof.InvalidField, st == nvmeof.InvalidNamespace, st == nvmeof.LBAOutOfRange:
		return ErrInvalid
	}
	return nil
}

func (e *opError) Error() string {
	s := fmt.Sprintf("uring: %v at byte %d of %s: %v", e.kind, e.off, e.path, e.cause)
	_, drive := e.cause.(nvmeof.Status)
	switch {
	case e.class == ErrMedia:
		s = "media error: " + s + "; check the drive (dmesg, smartctl)"
	case e.class == ErrNoSpace && !drive:
		s += "; free space on its file system"
	}
	return s
}

func (e *opError) Unwrap() []error {
	if e.class == nil {
		return []error{e.cause}
	}
	return []error{e.cause, e.class}
}
