package host

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"unsafe"

	"github.com/kvof/kvof/internal/sock"
	"github.com/kvof/kvof/nvmeof"
	"golang.org/x/sys/unix"
)

// Device is a Key Value namespace that the kernel's own host has attached, driven through its generic character
// device, /dev/ngXnY. Each command is one ioctl, which the kernel carries out straight from and to the caller's
// buffer. The kernel knows no way to give a command up: a call returns when the kernel has finished with the buffer,
// whatever its context says, after the kernel's own time-out (30 s by default) at the latest.
type Device struct {
	path     string
	fd       int
	ioctl    ioctlFunc
	ns       Namespace
	maxBytes uint64 // of one command
	maxPages uint64 // that its data may touch
	free     chan *deviceSlot
	closed   chan struct{}
	once     sync.Once
}

// deviceDepth is how many commands are with the kernel at once, each on a thread of its own.
const deviceDepth = 32

// Without sysfs to say what the controller takes in one command: what every one does.
const defaultDeviceTransfer = 128 << 10

// ioctlFunc returns what the system call does: a positive number is an NVMe status.
type ioctlFunc func(fd int, request uintptr, arg unsafe.Pointer) (int, error)

func ioctl(fd int, request uintptr, arg unsafe.Pointer) (int, error) {
	n, _, e := syscall.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
	if e != 0 {
		return 0, e
	}
	return int(n), nil
}

// passthru is struct nvme_passthru_cmd64 (linux/nvme_ioctl.h).
type passthru struct {
	opcode, flags uint8
	_             uint16
	nsid          uint32
	cdw2, cdw3    uint32
	metadata      uint64
	addr          unsafe.Pointer
	metadataLen   uint32
	dataLen       uint32
	cdw10         [6]uint32
	timeout       uint32 // ms; 0 = the kernel's default
	_             uint32
	result        uint64 // DW0, DW1
}

// deviceSlot is what one command needs.
type deviceSlot struct {
	passthru
	vecs []unix.Iovec // of data in pieces
}

const (
	ioctlID    = 'N'<<8 | 0x40
	ioctlAdmin = 3<<30 | unsafe.Sizeof(passthru{})<<16 | 'N'<<8 | 0x47 // NVME_IOCTL_ADMIN64_CMD
	ioctlIO    = 3<<30 | unsafe.Sizeof(passthru{})<<16 | 'N'<<8 | 0x48 // NVME_IOCTL_IO64_CMD
	ioctlIOVec = 3<<30 | unsafe.Sizeof(passthru{})<<16 | 'N'<<8 | 0x49 // NVME_IOCTL_IO64_CMD_VEC, since Linux 5.18

	maxDeviceVecs = 1024 // UIO_MAXIOV
)

// deviceSystem is where devices are found.
type deviceSystem struct {
	sys, dev string
	ioctl    ioctlFunc
}

// OpenDevice opens an attached Key Value namespace: by the path of its character device, by the NQN of its subsystem,
// or by its NGUID in hexadecimal. nsid is needed only where an NQN has several Key Value namespaces; else it is 0.
func OpenDevice(name string, nsid uint32) (*Device, error) {
	return deviceSystem{sys: "/sys/class/nvme-generic", dev: "/dev", ioctl: ioctl}.open(name, nsid)
}

func (s deviceSystem) open(name string, nsid uint32) (*Device, error) {
	nguid, err := hex.DecodeString(strings.ReplaceAll(name, "-", ""))
	switch {
	case strings.ContainsRune(name, '/'):
		d, err := s.openPath(name)
		if err == nil && nsid != 0 && d.ns.NSID != nsid {
			d.Close()
			return nil, fmt.Errorf("%w: %s is namespace %d", ErrNoNamespace, name, d.ns.NSID)
		}
		return d, err
	case err == nil && len(nguid) == 16:
		return s.find(name, func(string) bool { return true }, func(ns *Namespace) bool { return ns.NGUID == [16]byte(nguid) })
	default:
		return s.find(name, func(dir string) bool {
			b, err := os.ReadFile(filepath.Join(dir, "device", "subsysnqn"))
			return err == nil && strings.TrimSpace(string(b)) == name
		}, func(ns *Namespace) bool { return nsid == 0 || ns.NSID == nsid })
	}
}

// find opens the one device whose directory in sysfs and whose namespace match.
func (s deviceSystem) find(name string, matchDir func(string) bool, match func(*Namespace) bool) (found *Device, err error) {
	dirs, _ := filepath.Glob(filepath.Join(s.sys, "ng*"))
	for _, dir := range dirs {
		if !matchDir(dir) {
			continue
		}
		d, e := s.openPath(filepath.Join(s.dev, filepath.Base(dir)))
		switch {
		case e != nil:
			if !errors.Is(e, ErrNoNamespace) { // of another command set
				err = e
			}
		case !match(&d.ns):
			d.Close()
		case found != nil:
			d.Close()
			found.Close()
			return nil, fmt.Errorf("%s has more than one Key Value namespace attached: %s is namespace %d, %s is %d", name, found.path, found.ns.NSID, d.path, d.ns.NSID)
		default:
			found = d
		}
	}
	switch {
	case found != nil:
		return found, nil
	case err != nil:
		return nil, fmt.Errorf("%w: %s is not attached, or this device of it: %w", ErrNoNamespace, name, err)
	}
	return nil, fmt.Errorf("%w: no attached Key Value namespace of %s", ErrNoNamespace, name)
}

func (s deviceSystem) openPath(path string) (*Device, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	d := &Device{path: path, fd: fd, ioctl: s.ioctl, free: make(chan *deviceSlot, deviceDepth), closed: make(chan struct{})}
	for range deviceDepth {
		d.free <- new(deviceSlot)
	}
	if err := d.identify(); err != nil {
		d.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	name, err := filepath.EvalSymlinks(path)
	if err != nil {
		name = path
	}
	d.limits(filepath.Join(s.sys, filepath.Base(name)))
	return d, nil
}

func (d *Device) identify() error {
	nsid, err := d.ioctl(d.fd, ioctlID, nil)
	switch {
	case errors.Is(err, unix.ENOTTY):
		return errors.New("not the character device of an NVMe namespace")
	case err != nil:
		return err
	}
	d.ns = Namespace{NSID: uint32(nsid), CSI: nvmeof.CSIKV}
	page := make([]byte, nvmeof.IdentifySize)
	cmd := nvmeof.MakeIdentify(nvmeof.CNSNamespaceCSI, d.ns.NSID, nvmeof.CSIKV)
	if err := d.admin(cmd, page, new(deviceSlot)); err != nil {
		var st nvmeof.Status
		if errors.As(err, &st) {
			return fmt.Errorf("%w: namespace %d is not a Key Value namespace (%w)", ErrNoNamespace, d.ns.NSID, st)
		}
		return err
	}
	return d.ns.decodeKV(page)
}

// limits learns how much one command carries: the kernel does not split passthrough commands, and refuses larger ones.
// The namespace's disk, hidden for Key Value, has the figures of its queue; a multipath one has a disk per path.
func (d *Device) limits(dir string) {
	d.maxBytes, d.maxPages = defaultDeviceTransfer, defaultDeviceTransfer/uint64(os.Getpagesize())
	_, ns, _ := strings.Cut(strings.TrimPrefix(filepath.Base(dir), "ng"), "n")
	least := func(name string, unit uint64) (m uint64) {
		for _, pattern := range []string{"device/nvme*n" + ns, "device/nvme*/nvme*n" + ns} {
			files, _ := filepath.Glob(filepath.Join(dir, pattern, "queue", name))
			for _, f := range files {
				b, _ := os.ReadFile(f)
				if v, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 32); err == nil && v > 0 && (m == 0 || v*unit < m) {
					m = v * unit
				}
			}
		}
		return m
	}
	if b, p := least("max_hw_sectors_kb", 1024), least("max_segments", 1); b != 0 && p != 0 {
		d.maxBytes, d.maxPages = b, p
	}
}

// Path is the path of the character device.
func (d *Device) Path() string { return d.path }

// KV is the namespace.
func (d *Device) KV() *KV { return &KV{path: d, ns: d.ns} }

// MaxTransfer is the largest data of one command in bytes, for data that begins on a page; other data may be a page
// smaller.
func (d *Device) MaxTransfer() uint64 { return d.maxTransfer(nil) }

func (d *Device) maxTransfer(b []byte) uint64 {
	page := uint64(os.Getpagesize())
	return min(d.maxBytes, d.maxPages*page-uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b))))%page)
}

// fits tells whether one command carries data in pieces.
func (d *Device) fits(pieces [][]byte) bool {
	page := uint64(os.Getpagesize())
	bytes, pages := uint64(0), uint64(0)
	for _, p := range pieces {
		first := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(p)))) % page
		bytes += uint64(len(p))
		pages += (first + uint64(len(p)) + page - 1) / page
	}
	return bytes <= d.maxBytes && pages <= d.maxPages && len(pieces) <= maxDeviceVecs
}

// Close closes the device. Commands under way are waited for, later ones return [ErrClosed].
func (d *Device) Close() error {
	err := ErrClosed
	d.once.Do(func() {
		close(d.closed)
		for range cap(d.free) {
			<-d.free
		}
		err = unix.Close(d.fd)
	})
	return err
}

// slot waits for a slot; the caller gives it back to d.free.
func (d *Device) slot(ctx context.Context) (s *deviceSlot, err error) {
	select {
	case s = <-d.free:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-d.closed:
		return nil, ErrClosed
	}
	select {
	case <-d.closed:
		d.free <- s
		return nil, ErrClosed
	default:
		return s, nil
	}
}

func (d *Device) submit(ctx context.Context, cmd nvmeof.Command, data data, _ bool) (nvmeof.Completion, int, error) {
	s, err := d.slot(ctx)
	if err != nil {
		return nvmeof.Completion{}, 0, err
	}
	defer func() { d.free <- s }()
	size := data.size()
	if m := d.maxTransfer(data.buf); uint64(size) > m || !d.fits(data.pieces) {
		return nvmeof.Completion{}, 0, tooLarge(size, m)
	}
	cqe, err := d.call(ioctlIO, &cmd, data, s)
	n := 0
	if err == nil && cqe.Status() == nvmeof.Success && cmd.Direction() == nvmeof.ControllerToHost {
		n = -1 // the kernel does not tell
	}
	return cqe, n, err
}

// admin carries out an admin command that reads a page: the kernel passes it on to the namespace's controller.
func (d *Device) admin(cmd nvmeof.Command, page []byte, s *deviceSlot) error {
	cqe, err := d.call(ioctlAdmin, &cmd, data{buf: page}, s)
	return statusError(cqe, err)
}

// LogPage reads len(b) bytes (a multiple of 4) of a log page of the namespace's controller from offset off. An
// event that named the page stays: the kernel's host wants it. The kernel lets only root (CAP_SYS_ADMIN): for others the
// error wraps [fs.ErrPermission].
func (d *Device) LogPage(ctx context.Context, lid uint8, off uint64, b []byte) error {
	s, err := d.slot(ctx)
	if err != nil {
		return err
	}
	defer func() { d.free <- s }()
	return d.admin(nvmeof.MakeGetLogPage(lid, nvmeof.BroadcastNSID, uint32(len(b)), off, 0, true), b, s)
}

// Statuses that the kernel's host makes up (linux/nvme.h).
const (
	hostPathError = 0x370 // there was no connection to send the command on
	hostAborted   = 0x371 // the connection ended while the command was in flight
)

func (d *Device) call(request uintptr, cmd *nvmeof.Command, data data, s *deviceSlot) (nvmeof.Completion, error) {
	s.passthru = passthru{opcode: cmd.Opcode(), nsid: cmd.NSID(), cdw2: cmd.DW(2), cdw3: cmd.DW(3), dataLen: uint32(len(data.buf))}
	for i := range s.cdw10 {
		s.cdw10[i] = cmd.DW(10 + i)
	}
	switch {
	case len(data.pieces) > 0:
		request = ioctlIOVec
		for _, p := range data.pieces {
			s.vecs = append(s.vecs, sock.Vec(p))
		}
		s.addr, s.dataLen = unsafe.Pointer(&s.vecs[0]), uint32(len(s.vecs))
	case len(data.buf) > 0:
		s.addr = unsafe.Pointer(unsafe.SliceData(data.buf))
	}
	n, err := d.ioctl(d.fd, request, unsafe.Pointer(&s.passthru))
	s.addr = nil // the caller's memory is not kept
	clear(s.vecs)
	s.vecs = s.vecs[:0]
	st := nvmeof.Status(n)
	switch {
	case errors.Is(err, fs.ErrPermission):
		err = fmt.Errorf("the kernel does not pass command %02Xh on for this user: %w", cmd.Opcode(), err)
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		err = fmt.Errorf("%w: %s: %w", ErrConnectionLost, d.path, err)
	case err != nil:
		err = fmt.Errorf("command %02Xh with %d bytes on %s: %w", cmd.Opcode(), data.size(), d.path, err)
	case st.Code() == hostPathError:
		err = fmt.Errorf("%w: %s", ErrConnectionLost, d.path)
	case st.Code() == hostAborted:
		err = fmt.Errorf("%w: %s: %w", ErrConnectionLost, d.path, ErrOutcomeUnknown)
	}
	return nvmeof.MakeCompletion(uint32(s.result), uint32(s.result>>32), 0, 0, 0, st), err
}
