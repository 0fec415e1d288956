package uring

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"unsafe"

	"github.com/pawelgaczynski/giouring"
	"golang.org/x/sys/unix"

	"github.com/kvof/kvof/nvmeof"
)

// fakeDrive is an NVMe drive with a kernel before it: a node, and the queues that lead to it. It is as strict as both.
type fakeDrive struct {
	t         testing.TB
	lba       int64
	limit     int64 // bytes of one command, as a controller's MDTS
	scattered int64 // and as the kernel maps
	fixable   int   // bytes of a registered buffer that works; 0: all do. Before Linux 6.12 large ones do not
	pids      []uint16
	oncs      uint16
	nvm       nvmeof.IdentifyNVMController

	mu       sync.Mutex
	mem      []byte
	gone     bool
	file     int // registered
	commands []fakeCommand
	answer   func(c *fakeCommand) (res int32, answered bool) // asked first, if there is one

	entries       [64]wideEntry
	filled, taken int
	done          []completion
	arrived       sync.Cond // more is done
	readable      int       // an eventfd, while something is
	hushed        bool
	signals       int // given while not hushed
	event         chan struct{}
	closed        bool
	chunks        map[int][]byte // registered buffers
}

// fakeCommand is a command as the drive got it.
type fakeCommand struct {
	uringCmd
	fixed, vector bool
	data          [][]byte
}

func (c *fakeCommand) lbas() (slba uint64, blocks int64) {
	return uint64(c.cdw[0]) | uint64(c.cdw[1])<<32, int64(c.cdw[2]&0xFFFF) + 1
}

const allONCS = nvmeof.ONCSCompare | nvmeof.ONCSDSM | nvmeof.ONCSWriteZeroes | nvmeof.ONCSVerify | nvmeof.ONCSCopy

func newFakeDrive(t testing.TB, lba int64) *fakeDrive {
	f := &fakeDrive{t: t, lba: lba, limit: 128 << 10, scattered: 128 << 10, oncs: allONCS, mem: make([]byte, testSize), event: make(chan struct{}, 1),
		chunks: map[int][]byte{}, file: -1}
	f.arrived.L = &f.mu
	var err error
	if f.readable, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(f.readable) })
	return f
}

func (f *fakeDrive) open(t testing.TB, o NVMeOptions) *NVMe {
	t.Helper()
	drive, err := identify(f)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { f.commands = nil }()
	d, err := startNVMe(f, drive, o, func(depth, flags uint32) (queues, []string, error) {
		if flags&wideRing != wideRing {
			t.Errorf("ring of flags %#x", flags)
		}
		return f, nil, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	d.find = func(*Drive) node {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.gone {
			return nil
		}
		return f
	}
	return d
}

// The node.

func (f *fakeDrive) path() string { return "/dev/null" }
func (f *fakeDrive) nsid() uint32 { return 1 }
func (f *fakeDrive) fd() int      { return 7 }
func (f *fakeDrive) claim() error { return nil }
func (f *fakeDrive) Close() error { return nil }

func (f *fakeDrive) attribute(name string) string {
	switch name {
	case "queue/max_hw_sectors_kb":
		return fmt.Sprint(f.limit >> 10)
	case "queue/max_segments":
		return fmt.Sprint(f.scattered / pageSize)
	}
	return ""
}

func (f *fakeDrive) command(admin bool, c uringCmd, b []byte) (uint32, error) {
	switch {
	case admin && c.opcode == nvmeof.OpIdentify && c.cdw[0] == nvmeof.CNSController:
		k := nvmeof.IdentifyController{Model: "fake", Serial: "F1", ONCS: f.oncs, VWC: 1}
		if f.pids != nil {
			k.CTRATT = nvmeof.CTRATTFDP
		}
		k.Encode(b)
	case admin && c.opcode == nvmeof.OpIdentify && c.cdw[0] == nvmeof.CNSNamespace:
		n := nvmeof.IdentifyNamespace{NSZE: uint64(int64(len(f.mem)) / f.lba), LBADS: uint8(len(fmt.Sprintf("%b", f.lba)) - 1), ENDGID: 1,
			NSFEAT: nvmeof.NSFEATOptimal, Limits: nvmeof.NamespaceLimits{NPWG: 7}}
		n.Encode(b)
	case admin && c.opcode == nvmeof.OpIdentify && c.cdw[0] == nvmeof.CNSControllerCSI:
		b[0], b[1], b[3] = f.nvm.VSL, f.nvm.WZSL, f.nvm.DMRL
		binary.LittleEndian.PutUint32(b[4:], f.nvm.DMRSL)
		binary.LittleEndian.PutUint64(b[8:], f.nvm.DMSL)
	case admin && c.opcode == nvmeof.OpGetFeatures && c.cdw == [6]uint32{nvmeof.FeatFDP, 1}:
		return 1, nil
	case !admin && c.opcode == nvmeof.OpIOMgmtRecv && c.cdw[0] == nvmeof.MgmtRUHStatus && c.cdw[1] == uint32(len(b)/4-1):
		binary.LittleEndian.PutUint16(b[14:], uint16(len(f.pids)))
		for i, p := range f.pids {
			binary.LittleEndian.PutUint16(b[nvmeof.RUHSHeader+i*nvmeof.RUHSSize:], p)
		}
	case admin && c.opcode == nvmeof.OpGetLogPage && c.cdw[0] == nvmeof.LogFDPConfigs|1023<<16 && c.cdw[1] == 1<<16:
		b[16+2], b[16] = 0x80, 64
		binary.LittleEndian.PutUint64(b[16+16:], 96<<20)
	default:
		return 0, nvmeof.InvalidField
	}
	return 0, nil
}

// The queues.

func (f *fakeDrive) sqe() *giouring.SubmissionQueueEntry {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.filled-f.taken == len(f.entries) {
		return nil
	}
	e := &f.entries[f.filled%len(f.entries)]
	*e = wideEntry{}
	f.filled++
	return &e.SubmissionQueueEntry
}

func (f *fakeDrive) ready() uint32 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return uint32(f.filled - f.taken)
}

func (f *fakeDrive) submit() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for ; f.taken < f.filled; f.taken++ {
		e := &f.entries[f.taken%len(f.entries)]
		f.done = append(f.done, completion{uint32(e.UserData), f.execute(e)})
	}
	rand.Shuffle(len(f.done), func(i, j int) { f.done[i], f.done[j] = f.done[j], f.done[i] })
	f.arrived.Broadcast()
	f.show()
	if !f.hushed {
		f.signals++
		f.wake()
	}
	return nil
}

func (f *fakeDrive) reap(into []completion) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := copy(into, f.done)
	f.done = f.done[n:]
	f.show()
	return n
}

// show has the descriptor say whether something is done.
func (f *fakeDrive) show() {
	var count [8]byte
	_, _ = unix.Read(f.readable, count[:])
	if len(f.done) > 0 {
		_, _ = unix.Write(f.readable, oneEvent)
	}
}

func (f *fakeDrive) poll()             {}
func (f *fakeDrive) descriptor() int32 { return int32(f.readable) }

func (f *fakeDrive) hush(on bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hushed = on
}

func (f *fakeDrive) sleep() {
	f.mu.Lock()
	there := len(f.done) > 0 && !f.hushed
	f.mu.Unlock()
	if !there {
		<-f.event
	}
}

func (f *fakeDrive) completed() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.done) > 0
}

func (f *fakeDrive) block() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for len(f.done) == 0 {
		f.arrived.Wait()
	}
}

func (f *fakeDrive) wake() {
	select {
	case f.event <- struct{}{}:
	default:
	}
}

func (f *fakeDrive) reserve(n int) error { return nil }

func (f *fakeDrive) register(i int, b []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.chunks[i] = b
	return nil
}

func (f *fakeDrive) registerFile(fd int, update bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.file = fd
	return nil
}

func (f *fakeDrive) close() { f.closed = true }

// hostMemory is n bytes at an address that came through the kernel's interface.
func hostMemory(addr uint64, n int) []byte {
	return unsafe.Slice(*(**byte)(unsafe.Pointer(&addr)), n)
}

// execute does a command as kernel and drive would.
func (f *fakeDrive) execute(e *wideEntry) int32 {
	c := &fakeCommand{uringCmd: *(*uringCmd)(unsafe.Add(unsafe.Pointer(e), bigCmd)), fixed: e.OpcodeFlags&uringFixed != 0, vector: e.Off == uringIOVec}
	switch {
	case e.OpCode == giouring.OpNop:
		return 0
	case e.OpCode != giouring.OpUringCmd || e.Off != uringIO && e.Off != uringIOVec || e.Len != 0 || e.Addr != 0 || e.IoPrio != 0:
		f.t.Errorf("entry %+v", e.SubmissionQueueEntry)
		return -int32(unix.EINVAL)
	case e.Flags != giouring.SqeFixedFile || e.Fd != 0 || f.file == -1:
		return -int32(unix.EBADF)
	case f.gone:
		return -int32(unix.ENODEV)
	case c.timeout == 0 || c.nsid != 1 || c.metadata != 0 || c.flags != 0:
		f.t.Errorf("command %+v", c.uringCmd)
	}
	total := 0
	if c.vector {
		for _, v := range unsafe.Slice((*unix.Iovec)(unsafe.Pointer(unsafe.SliceData(hostMemory(c.addr, 1)))), c.dataLen) {
			c.data = append(c.data, unsafe.Slice(v.Base, v.Len))
			total += int(v.Len)
		}
	} else if c.dataLen > 0 {
		c.data = [][]byte{hostMemory(c.addr, int(c.dataLen))}
		total = int(c.dataLen)
	}
	if c.fixed {
		chunk := f.chunks[int(e.BufIG)]
		if off := int(address(c.data[0])) - int(address(chunk)); off < 0 || off+total > len(chunk) || c.vector {
			f.t.Errorf("%d bytes are not in registered buffer %d", total, e.BufIG)
			return -int32(unix.EFAULT)
		}
		if f.fixable > 0 && len(chunk) > f.fixable {
			return -int32(unix.EINVAL)
		}
	}
	f.commands = append(f.commands, *c)
	if f.answer != nil {
		if res, ok := f.answer(c); ok {
			return res
		}
	}
	if int64(total) > f.scattered {
		return -int32(unix.EINVAL)
	}
	slba, blocks := c.lbas()
	off, n := int64(slba)*f.lba, blocks*f.lba
	switch c.opcode {
	case nvmeof.OpFlush:
		return 0
	case nvmeof.OpDSM:
		return f.deallocate(c)
	case nvmeof.OpCopy:
		for b := c.data[0]; len(b) > 0; b = b[nvmeof.CopyRangeSize:] {
			from, k := int64(binary.LittleEndian.Uint64(b[8:]))*f.lba, (int64(binary.LittleEndian.Uint16(b[16:]))+1)*f.lba
			copy(f.mem[off:][:k], f.mem[from:][:k])
			off += k
		}
		return 0
	}
	if off+n > int64(len(f.mem)) {
		return int32(nvmeof.LBAOutOfRange | nvmeof.DNR)
	}
	at := f.mem[off:][:n]
	switch c.opcode {
	case nvmeof.OpWriteZeroes:
		clear(at)
		return 0
	case nvmeof.OpVerify:
		return 0
	}
	if int64(total) != n || n > f.limit {
		f.t.Errorf("%d bytes of memory for %d of LBAs, limit %d", total, n, f.limit)
		return int32(nvmeof.InvalidField | nvmeof.DNR)
	}
	for _, b := range c.data {
		switch c.opcode {
		case nvmeof.OpRead:
			copy(b, at)
		case nvmeof.OpWrite:
			copy(at, b)
		case nvmeof.OpCompare:
			if !bytes.Equal(at[:len(b)], b) {
				return int32(nvmeof.CompareFailure | nvmeof.DNR)
			}
		default:
			return int32(nvmeof.InvalidOpcode | nvmeof.DNR)
		}
		at = at[len(b):]
	}
	return 0
}

func (f *fakeDrive) deallocate(c *fakeCommand) int32 {
	n := int(c.cdw[0]&0xFF) + 1
	if c.cdw[1] != dsmAD || int(c.dataLen) != n*nvmeof.DSMRangeSize || f.nvm.DMRL > 0 && n > int(f.nvm.DMRL) {
		f.t.Errorf("Dataset Management %+v", c.uringCmd)
		return int32(nvmeof.InvalidField | nvmeof.DNR)
	}
	var all uint64
	for b := range slices.Chunk(c.data[0], nvmeof.DSMRangeSize) {
		var r nvmeof.DSMRange
		r.Decode(b)
		all += uint64(r.Blocks)
		if f.nvm.DMRSL > 0 && r.Blocks > f.nvm.DMRSL || f.nvm.DMSL > 0 && all > f.nvm.DMSL {
			f.t.Errorf("range of %d blocks, %d in all, limits %+v", r.Blocks, all, f.nvm)
		}
		clear(f.mem[int64(r.SLBA)*f.lba:][:int64(r.Blocks)*f.lba])
	}
	return 0
}
