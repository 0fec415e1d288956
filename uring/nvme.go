package uring

import (
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"github.com/pawelgaczynski/giouring"
	"golang.org/x/sys/unix"

	"github.com/kvof/kvof/nvmeof"
)

// NVMeOptions says how to open an NVMe drive.
type NVMeOptions struct {
	Size      int64  // bytes at the drive's beginning to use; 0: all
	Arena     *Arena // whose buffers the ring registers as they come into use, memlock limit permitting; may be nil
	Depth     int    // commands the ring holds at once, rounded up to a power of two; 0 means 256
	Poll      bool   // ask the drive for completions instead of waiting for its interrupts: sooner, for a core while commands are in flight
	Placement int    // placement handle of writes that name none, from 1; 0: the drive's choice
}

const (
	// commandTimeout bounds a command that moves data, in milliseconds. When it is over the kernel aborts the command,
	// and as long after resets the controller. An op, and so its buffer, stays with the drive until the kernel has ended
	// the command one way or the other.
	commandTimeout = 8000
	slowTimeout    = 30000 // of all others

	// patience is how often a command that finds the controller resetting is tried again, a pause apart.
	patience = 80
	// doubts is how often one that the kernel refuses for no known reason is.
	doubts = 20

	maxBlocks      = 1 << 16 // logical blocks of one command: NLB has 16 bits
	maxRanges      = 256     // of one Dataset Management
	maxRangeBlocks = 1<<32 - 1
	maxVectors     = 64              // ops of one vectored command
	scratchSize    = 4096            // bytes beside each slot: ranges or iovecs
	longestWait    = 3 * time.Second // between looks for a drive that is gone

	uringFixed = 1 << 0 // IORING_URING_CMD_FIXED
	dsmAD      = 1 << 2 // Dataset Management, CDW11: deallocate
)

// NVMe is a Device on an NVMe namespace, driven by NVMe commands (IORING_OP_URING_CMD).
type NVMe struct {
	engine
	o        NVMeOptions
	drive    *Drive
	features []string
	lbads    uint8
	scratch  []byte            // scratchSize for each slot, off the heap
	find     func(*Drive) node // the drive, when it is back

	// With the engine's mutex.
	node     node  // nil while the drive is gone
	fixFile  bool  // it is the ring's registered file
	limit    int64 // bytes of one command that moves data
	unfixed  bool  // registered buffers do not work here
	lost     bool
	stopped  bool
	stop     chan struct{}
	watching sync.WaitGroup
}

// OpenNVMe opens an NVMe namespace: /dev/ng0n1, /dev/nvme0n1 or a link to either. It is held against mounting and locked
// against a second server: ErrInUse. Formats with metadata are refused, and LBAs of other than 512 or 4096 bytes.
// Without io_uring, or passthrough in it (Linux 6.1): ErrUnavailable.
//
// A drive that is removed ends its ops with ErrGone. Once it is back, under whatever name, ops work again.
func OpenNVMe(path string, o NVMeOptions) (*NVMe, error) {
	n, err := openNode(path)
	if err != nil {
		return nil, err
	}
	drive, err := identify(n)
	if err == nil {
		err = n.claim()
	}
	var d *NVMe
	if err == nil {
		d, err = startNVMe(n, drive, o, func(depth, flags uint32) (queues, []string, error) {
			r, err := newRing(depth, flags)
			if err != nil {
				return nil, nil, fmt.Errorf("uring: %w: %s", ErrUnavailable, explain(err))
			}
			return r, featureNames(r.features), nil
		})
	}
	if err != nil {
		n.Close()
		return nil, err
	}
	d.find = findDrive
	return d, nil
}

// startNVMe makes the device and sees whether registered buffers work: before Linux 6.12 not as parts of something large.
func startNVMe(n node, drive *Drive, o NVMeOptions, ring func(depth, flags uint32) (queues, []string, error)) (*NVMe, error) {
	small := min(MediumBuf, 1<<(bits.Len64(uint64(drive.Scattered))-1))
	for _, chunk := range []int{minChunk, small} {
		d, err := newNVMe(n, drive, o, chunk, ring)
		if err != nil {
			return nil, err
		}
		if err = d.probe(); err == nil && (!d.unfixed || chunk == small) {
			if chunk == small && !d.unfixed { // a command has its memory in one registered buffer
				d.limit = min(d.limit, int64(small))
			}
			return d, nil
		}
		d.end()
		if err != nil {
			return nil, err
		}
	}
	panic("unreachable")
}

// probe reads the first blocks, so that what does not work here is known before it is needed: passthrough, and with
// registered buffers.
func (d *NVMe) probe() error {
	if d.arena == nil {
		return nil
	}
	b, ok := d.arena.TryGet(MediumBuf)
	if !ok {
		return nil
	}
	defer b.Put()
	for range 2 {
		o := Op{Data: b.Data[:min(MediumBuf, d.size)]}
		if err := o.Do(d); errors.Is(err, ErrUnavailable) || errors.Is(err, ErrGone) {
			return err // what else is wrong is for the user of the blocks
		}
		d.pinned.wait() // the first use registers
	}
	return nil
}

// newNVMe makes the device; n stays the caller's if it fails.
func newNVMe(n node, drive *Drive, o NVMeOptions, chunk int, ring func(depth, flags uint32) (queues, []string, error)) (*NVMe, error) {
	if err := drive.Unsupported(); err != nil {
		return nil, err
	}
	size := drive.Size
	if o.Size > size {
		return nil, fmt.Errorf("uring: %s has %d bytes: a size of %d is too large", drive.Path, size, o.Size)
	} else if o.Size > 0 {
		size = o.Size &^ int64(drive.LBASize-1)
	}
	if o.Placement < 0 || o.Placement > drive.Placements {
		return nil, fmt.Errorf("uring: %s has %d placement handles: there is no placement %d", drive.Path, drive.Placements, o.Placement)
	}
	if r := kernelRelease(); o.Poll && olderThan(r, 6, 12) {
		return nil, fmt.Errorf("uring: polling %s needs Linux 6.12 or later: Linux %s can leave polled commands without an end", drive.Path, r)
	}
	if o.Poll && !drive.PollQueues {
		return nil, fmt.Errorf("uring: %s has no queues to poll: load the kernel's driver with some (nvme.poll_queues=2) or do not ask for polling", drive.Path)
	}
	d := &NVMe{o: o, drive: drive, node: n, lbads: drive.Namespace.LBADS, limit: drive.Scattered, stop: make(chan struct{})}
	if o.Arena != nil && o.Arena.Stats().HugePages {
		d.limit = drive.MaxTransfer
	}
	d.engine = engine{path: drive.Path, size: size, align: int64(drive.LBASize), driver: d, arena: o.Arena, chunk: chunk, polled: o.Poll,
		kinds: fileKinds | kindsOf(OpCompare, OpVerify, OpCopy)}
	for kind, oncs := range map[OpKind]uint16{OpCompare: nvmeof.ONCSCompare, OpVerify: nvmeof.ONCSVerify, OpCopy: nvmeof.ONCSCopy} {
		if !drive.Has(oncs) {
			d.kinds &^= kindsOf(kind)
		}
	}
	if !drive.VolatileCache {
		d.skips |= kindsOf(OpFlush)
	}
	if !drive.Has(nvmeof.ONCSDSM) {
		d.skips |= kindsOf(OpDiscard)
	}
	depth := roundDepth(o.Depth)
	flags := uint32(wideRing)
	if o.Poll {
		flags |= giouring.SetupIOPoll
	}
	var err error
	if d.scratch, err = unix.Mmap(-1, 0, depth*scratchSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE); err != nil {
		return nil, fmt.Errorf("uring: %w", err)
	}
	if d.ring, d.features, err = ring(uint32(depth), flags); err != nil {
		_ = unix.Munmap(d.scratch)
		return nil, err
	}
	d.features = append([]string{"passthrough"}, d.features...)
	if d.fixFile = d.ring.registerFile(n.fd(), false) == nil; d.fixFile {
		d.features = append(d.features, "registered_file")
	}
	if o.Poll {
		d.features = append(d.features, "iopoll")
	}
	d.start(depth)
	return d, nil
}

// Drive describes the drive as it was when it was opened.
func (d *NVMe) Drive() *Drive { return d.drive }

// part implements driver.
func (d *NVMe) part(o *Op) int64 {
	left := o.size() - o.pos
	blocks := int64(maxBlocks)
	switch o.Kind {
	case OpRead, OpWrite, OpCompare:
		return min(left, d.limit)
	case OpDiscard:
		blocks = maxRangeBlocks
		if n := int64(d.drive.NVM.DMRSL); n > 0 {
			blocks = n
		}
		if n := d.drive.NVM.DMSL; n > 0 && n < uint64(blocks) {
			blocks = int64(n)
		}
	case OpZero:
		if o.manual = !d.drive.Has(nvmeof.ONCSWriteZeroes); o.manual {
			return min(left, LargeBuf, d.limit)
		}
		blocks = min(blocks, d.pages(d.drive.NVM.WZSL))
	case OpVerify:
		blocks = min(blocks, d.pages(d.drive.NVM.VSL))
	default:
		return left
	}
	return min(left, blocks<<d.lbads)
}

// pages is a limit given as a power of two of the smallest page, in blocks; 0 is none.
func (d *NVMe) pages(power uint8) int64 {
	if power == 0 || power > 30 {
		return maxBlocks
	}
	return max(1, int64(pageSize)<<power>>d.lbads)
}

// joins implements driver: what is deallocated goes into one command, and so do neighbours on the drive where buffers
// are not registered, as one command's mapping then costs less than several.
func (d *NVMe) joins(s *slot, o *Op) bool {
	if o.Kind != s.op.Kind {
		return false
	}
	switch o.Kind {
	case OpDiscard:
		most := maxRanges
		if n := int(d.drive.NVM.DMRL); n > 0 {
			most = min(most, n)
		}
		dmsl := d.drive.NVM.DMSL
		return s.ops < most && o.Len <= d.part(o) && (dmsl == 0 || uint64(s.total+o.Len)>>d.lbads <= dmsl)
	case OpRead, OpWrite:
		return (d.unfixed || d.pinned.state == nil) && s.ops < maxVectors && o.Off == s.op.Off+s.total && s.total+o.size() <= d.limit &&
			o.Control == s.op.Control && o.Placement == s.op.Placement && (int64(address(o.Data))|int64(address(s.op.Data))|s.total)&(pageSize-1) == 0
	}
	return false
}

// prepare implements driver.
func (d *NVMe) prepare(e *giouring.SubmissionQueueEntry, i uint32, s *slot) {
	o := s.op
	e.OpCode, e.Off = giouring.OpUringCmd, uringIO
	if d.fixFile {
		e.Flags = giouring.SqeFixedFile // the first, and only one
	} else if d.node != nil {
		e.Fd = int32(d.node.fd())
	} else {
		e.Fd = -1
	}
	c := (*uringCmd)(unsafe.Add(unsafe.Pointer(e), bigCmd))
	c.nsid, c.timeout = d.drive.NSID, slowTimeout
	at, left := s.pos+s.moved, s.n-s.moved
	control := uint32(o.Control) << 16
	switch o.Kind {
	case OpRead, OpWrite, OpCompare:
		c.opcode, c.timeout = [...]uint8{OpRead: nvmeof.OpRead, OpWrite: nvmeof.OpWrite, OpCompare: nvmeof.OpCompare}[o.Kind], commandTimeout
		if s.ops > 1 {
			s.now = s.total
			d.vector(e, c, i, s)
		} else {
			s.now = min(left, d.limit)
			d.data(e, c, s, o.Data[at:at+s.now])
		}
		d.blocks(c, o.Off+at, s.now, control)
		if o.Kind == OpWrite {
			d.place(c, int(o.Placement))
		}
	case OpFlush:
		c.opcode = nvmeof.OpFlush
	case OpDiscard:
		s.now = s.total
		d.ranges(c, i, s)
	case OpZero:
		s.now = left
		c.opcode = nvmeof.OpWriteZeroes
		if o.manual {
			c.opcode, control = nvmeof.OpWrite, 0
			d.data(e, c, s, zeroPages()[:left])
		}
		d.blocks(c, o.Off+at, left, control)
	case OpVerify:
		s.now = left
		c.opcode = nvmeof.OpVerify
		d.blocks(c, o.Off+at, left, control)
	case OpCopy:
		c.opcode = nvmeof.OpCopy
		d.data(e, c, s, o.Data)
		lba := uint64(o.Off) >> d.lbads
		c.cdw[0], c.cdw[1] = uint32(lba), uint32(lba>>32)
		c.cdw[2] = control | uint32(len(o.Data)/nvmeof.CopyRangeSize-1)&0xFF
	}
}

// blocks sets the blocks of a command, and CDW12's bits 31:16.
func (d *NVMe) blocks(c *uringCmd, off, n int64, control uint32) {
	lba := uint64(off) >> d.lbads
	c.cdw[0], c.cdw[1], c.cdw[2] = uint32(lba), uint32(lba>>32), control|uint32(n>>d.lbads-1)
}

// data sets the memory of a command.
func (d *NVMe) data(e *giouring.SubmissionQueueEntry, c *uringCmd, s *slot, b []byte) {
	c.addr, c.dataLen = uint64(address(b)), uint32(len(b))
	s.fixed = false
	if d.unfixed || s.plain {
		return
	}
	if i, ok := d.pinned.find(&d.engine, b); ok {
		s.fixed = true
		e.OpcodeFlags, e.BufIG = uringFixed, uint16(i)
	}
}

// vector sets the memory of a command that is for several ops.
func (d *NVMe) vector(e *giouring.SubmissionQueueEntry, c *uringCmd, i uint32, s *slot) {
	v := (*[maxVectors]unix.Iovec)(unsafe.Pointer(&d.scratch[int(i)*scratchSize]))
	o := s.op
	for n := range s.ops {
		v[n].Base = unsafe.SliceData(o.Data)
		v[n].SetLen(len(o.Data))
		o = o.next
	}
	e.Off = uringIOVec
	c.addr, c.dataLen = uint64(uintptr(unsafe.Pointer(v))), uint32(s.ops)
}

// ranges makes a Dataset Management command.
func (d *NVMe) ranges(c *uringCmd, i uint32, s *slot) {
	b := d.scratch[int(i)*scratchSize:][:scratchSize]
	o, off, n := s.op, s.op.Off+s.pos, s.n
	for at := 0; ; {
		r := nvmeof.DSMRange{SLBA: uint64(off) >> d.lbads, Blocks: uint32(n >> d.lbads)}
		r.Encode(b[at*nvmeof.DSMRangeSize:])
		if at++; at == s.ops {
			break
		}
		o = o.next
		off, n = o.Off, o.Len
	}
	c.opcode, c.addr, c.dataLen = nvmeof.OpDSM, uint64(address(b)), uint32(s.ops*nvmeof.DSMRangeSize)
	c.cdw[0], c.cdw[1] = uint32(s.ops-1), dsmAD
}

// place sets the placement directive of a write.
func (d *NVMe) place(c *uringCmd, handle int) {
	if handle == 0 {
		handle = d.o.Placement
	}
	if handle > 0 && handle <= len(d.drive.pids) {
		c.cdw[2] |= nvmeof.DirectivePlacement << 20
		c.cdw[3] = uint32(d.drive.pids[handle-1]) << 16
	}
}

// advance implements driver. A result below zero is the kernel's errno; above, the drive's status.
func (d *NVMe) advance(s *slot, res int32) verdict {
	o := s.op
	switch {
	case res == 0:
		if s.plain && !d.unfixed {
			d.unfixed = true
			d.pinned.warn(d.path + " runs without registered buffers: they need Linux 6.12, or memory that is not in huge pages")
		}
		if s.moved += s.now; s.now == 0 || s.moved >= s.n { // of a command for several ops all has moved
			return ended
		}
		return repeat
	case res > 0:
		st := nvmeof.Status(res)
		switch {
		case st.Retry() && passing(st) && s.retry < patience:
			s.retry++
			return wait
		case s.ops > 1 && o.Kind.transfers():
			return apart // which of them it is
		}
		s.err = newOpError(o, o.Off+s.pos+s.moved, d.path, st)
		return ended
	}
	errno := syscall.Errno(-res)
	switch {
	case errno == unix.ENODEV, errno == unix.ENXIO, errno == unix.EBADF, d.absent():
		d.lose()
		s.err = d.goneError()
		return ended
	case errno == unix.EINVAL && s.ops > 1 && o.Kind.transfers():
		return apart
	case errno == unix.EINVAL && s.now > d.drive.Scattered && o.Kind.transfers():
		d.limit = d.drive.Scattered
		return repeat
	case errno == unix.EINVAL && s.fixed:
		s.plain = true
		return repeat
	case transient(errno) && s.retry < maxRetries:
		s.retry++
		return repeat
	case errno == unix.EINTR && s.retry < patience, // by a reset of the controller
		(errno == unix.ENOMEM || errno == unix.EINVAL || errno == unix.EWOULDBLOCK) && s.retry < doubts: // as without a path
		s.retry++
		return wait
	case errno == unix.EOPNOTSUPP || errno == unix.ENOTTY:
		s.err = fmt.Errorf("uring: %s: %w for NVMe commands: this kernel has no NVMe passthrough; run Linux 6.1 or later", d.path, ErrUnavailable)
		return ended
	}
	s.err = newOpError(o, o.Off+s.pos+s.moved, d.path, errno)
	return ended
}

// passing tells of a status that says more of the moment than of the command: the controller resets, or is not ready.
func passing(st nvmeof.Status) bool {
	switch st = st.Code(); {
	case st>>8 == 3: // path related: also what the kernel says of a controller that it resets
		return true
	case st == nvmeof.AbortSQDeleted, st == nvmeof.NamespaceNotReady, st == nvmeof.CommandInterrupted, st == nvmeof.TransientTransport:
		return true
	}
	return false
}

// absent tells whether the drive's device is no longer there.
func (d *NVMe) absent() bool {
	if d.node == nil {
		return true
	}
	_, err := os.Stat(d.node.path())
	return errors.Is(err, fs.ErrNotExist)
}

func (d *NVMe) goneError() error {
	return fmt.Errorf("uring: %s (%s, serial number %s): %w", d.path, d.drive.Model, d.drive.Serial, ErrGone)
}

// lose notes, with the mutex, that the drive is gone, and has a goroutine wait for it.
func (d *NVMe) lose() {
	if !d.lost && !d.stopped {
		d.lost = true
		d.watching.Add(1)
		go d.await()
	}
}

// await ends all ops, lets go of the drive that is gone so that the kernel can forget it, and looks for it until it is
// back.
func (d *NVMe) await() {
	defer d.watching.Done()
	d.fail(d.goneError())
	for pause := longestWait / 16; ; pause = min(2*pause, longestWait) {
		select {
		case <-d.stop:
			return
		case <-time.After(pause):
		}
		if !d.release() {
			continue
		}
		if n := d.find(d.drive); n != nil && d.resume(n) {
			return
		}
	}
}

// release closes the drive once nothing of it is in the ring, and reports whether it is closed.
func (d *NVMe) release() bool {
	d.mu.Lock()
	n := d.node
	idle := len(d.free) == len(d.slots)
	if idle {
		d.node = nil
	}
	d.mu.Unlock()
	if n == nil || !idle {
		return n == nil
	}
	if d.fixFile {
		_ = d.ring.registerFile(-1, true)
	}
	n.Close()
	return true
}

// resume goes on with a drive that is back.
func (d *NVMe) resume(n node) bool {
	if n.claim() != nil {
		n.Close()
		return false
	}
	d.mu.Lock()
	if d.fixFile {
		d.fixFile = d.ring.registerFile(n.fd(), true) == nil
	}
	d.node, d.path, d.lost = n, n.path(), false
	d.mu.Unlock()
	d.fail(nil)
	return true
}

// findDrive finds a drive under whatever name it has now; nil while it is not there.
func findDrive(was *Drive) node {
	paths, _ := filepath.Glob("/dev/ng*n*")
	for _, path := range append([]string{was.Path}, paths...) {
		n, err := openNode(path)
		if err != nil {
			continue
		}
		if drive, err := identify(n); err == nil && drive.same(was) {
			return n
		}
		n.Close()
	}
	return nil
}

// Info implements Device.
func (d *NVMe) Info() DeviceInfo {
	i := d.describe(DeviceInfo{Kind: "nvme", Direct: true, Features: d.features, Placements: d.drive.Placements, ReclaimUnit: d.drive.ReclaimUnit})
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.lost && !d.stopped && d.absent() {
		d.lose()
	}
	if i.Gone = d.lost; i.Gone {
		i.Warnings = append(i.Warnings, fmt.Sprintf("%s (%s, serial number %s) is gone: put it back, it is used again by itself", d.path, d.drive.Model, d.drive.Serial))
	}
	return i
}

// Close implements Device.
func (d *NVMe) Close() error {
	d.mu.Lock()
	if !d.stopped {
		d.stopped = true
		close(d.stop)
	}
	d.mu.Unlock()
	d.watching.Wait()
	if !d.end() || d.node == nil {
		return nil
	}
	return d.node.Close()
}

// end is Close but for the drive.
func (d *NVMe) end() bool {
	if !d.finishAll() {
		return false
	}
	_ = unix.Munmap(d.scratch)
	return true
}
