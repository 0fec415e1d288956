package uring

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kvof/kvof/nvmeof"
)

// Drive is an NVMe namespace and its controller, as they describe themselves. Sizes are in bytes.
type Drive struct {
	Path     string `json:"path"`            // the generic device: /dev/ng0n1
	Block    string `json:"block,omitempty"` // the kernel's block device: /dev/nvme0n1
	Link     string `json:"link,omitempty"`  // a name that stays: /dev/disk/by-id/...
	Model    string `json:"model"`
	Serial   string `json:"serial"`
	Firmware string `json:"firmware"`
	NSID     uint32 `json:"nsid"`
	ID       string `json:"id,omitempty"` // NGUID or EUI64, hexadecimal

	Size          int64 `json:"size"`
	LBASize       int   `json:"lba_size"`
	Metadata      int   `json:"metadata"`      // of each LBA
	MaxTransfer   int64 `json:"max_transfer"`  // of one command, as far as drive and kernel allow with memory in one piece
	Scattered     int64 `json:"scattered"`     // of one command, with memory scattered in pages
	OptimalWrite  int64 `json:"optimal_write"` // writes of a multiple of it, aligned to it, are best; 0: not stated
	VolatileCache bool  `json:"volatile_cache"`
	PollQueues    bool  `json:"poll_queues"` // the kernel's driver has queues to poll

	Placements  int   `json:"placements"`             // placement handles of Flexible Data Placement; 0: not enabled
	ReclaimUnit int64 `json:"reclaim_unit,omitempty"` // of Flexible Data Placement

	Controller nvmeof.IdentifyController    `json:"-"`
	Namespace  nvmeof.IdentifyNamespace     `json:"-"`
	NVM        nvmeof.IdentifyNVMController `json:"-"`

	pids []uint16 // placement identifiers, by handle
}

// Unsupported says why kvof cannot use the drive; nil if it can.
func (d *Drive) Unsupported() error {
	switch {
	case d.Metadata > 0:
		return fmt.Errorf("uring: %s has %d bytes of metadata with every LBA, which kvof does not use: format it without (nvme format --lbaf)", d.Path, d.Metadata)
	case d.LBASize != 512 && d.LBASize != 4096:
		return fmt.Errorf("uring: %s has LBAs of %d bytes: format it with 512 or 4096 (nvme format --lbaf)", d.Path, d.LBASize)
	case d.Size == 0:
		return fmt.Errorf("uring: %s has no capacity", d.Path)
	}
	return nil
}

// same tells whether two descriptions are of one namespace.
func (d *Drive) same(o *Drive) bool {
	return d.Model == o.Model && d.Serial == o.Serial && d.NSID == o.NSID && d.ID == o.ID && d.Size == o.Size && d.LBASize == o.LBASize
}

// Has tells whether the controller has an optional command: an ONCS bit.
func (d *Drive) Has(oncs uint16) bool { return d.Controller.ONCS&oncs != 0 }

// ReadDrive identifies the NVMe namespace at path: /dev/ng0n1, /dev/nvme0n1, or a link to either.
func ReadDrive(path string) (*Drive, error) {
	n, err := openNode(path)
	if err != nil {
		return nil, err
	}
	defer n.Close()
	return identify(n)
}

// ListDrives identifies all NVMe namespaces of this machine, by path. Those that do not answer, or belong to other
// command sets, are left out; the error, with what was found, tells why.
func ListDrives() ([]*Drive, error) {
	paths, err := filepath.Glob("/dev/ng*n*")
	if err != nil {
		return nil, err
	}
	slices.SortFunc(paths, func(a, b string) int { return cmp.Or(len(a)-len(b), cmp.Compare(a, b)) })
	var drives []*Drive
	var errs []error
	for _, path := range paths {
		if d, err := ReadDrive(path); err != nil {
			errs = append(errs, err)
		} else {
			drives = append(drives, d)
		}
	}
	return drives, errors.Join(errs...)
}

// genericPath is the generic device of an NVMe namespace that path names in some way.
func genericPath(path string) (string, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", fmt.Errorf("uring: %w", err)
	}
	dir, name := filepath.Split(real)
	switch rest, block := strings.CutPrefix(name, "nvme"); {
	case block && partition(rest):
		return "", fmt.Errorf("uring: %s is a partition: name the whole drive", path)
	case block && namespaceName(rest):
		return dir + "ng" + rest, nil
	}
	if rest, ok := strings.CutPrefix(name, "ng"); ok && namespaceName(rest) {
		return real, nil
	}
	return "", fmt.Errorf("uring: %s is no NVMe namespace: name one as /dev/ng0n1 or /dev/nvme0n1", path)
}

// namespaceName and partition know the ends of device names: 0n1, and 0n1p2.
func namespaceName(s string) bool {
	c, n, ok := strings.Cut(s, "n")
	_, err1 := strconv.ParseUint(c, 10, 31)
	_, err2 := strconv.ParseUint(n, 10, 31)
	return ok && err1 == nil && err2 == nil
}

func partition(s string) bool {
	n, p, ok := strings.Cut(s, "p")
	_, err := strconv.ParseUint(p, 10, 31)
	return ok && err == nil && namespaceName(n)
}

// uringCmd is struct nvme_uring_cmd.
type uringCmd struct {
	opcode, flags    uint8
	_                uint16
	nsid, cdw2, cdw3 uint32
	metadata         uint64
	addr             uint64
	metadataLen      uint32
	dataLen          uint32    // bytes; of a vectored command, iovecs
	cdw              [6]uint32 // CDW10 to CDW15
	timeout          uint32    // milliseconds
	_                uint32
}

// passthru64 is struct nvme_passthru_cmd64.
type passthru64 struct {
	uringCmd
	result uint64
}

// Requests of the kernel's NVMe devices (linux/nvme_ioctl.h), for ioctl(2) and as cmd_op of IORING_OP_URING_CMD.
const (
	ioctlID      = 0x4E40     // NVME_IOCTL_ID
	ioctlAdmin64 = 0xC0504E47 // NVME_IOCTL_ADMIN64_CMD
	ioctlIO64    = 0xC0504E48 // NVME_IOCTL_IO64_CMD
	uringIO      = 0xC0484E80 // NVME_URING_CMD_IO
	uringIOVec   = 0xC0484E81 // NVME_URING_CMD_IO_VEC
)

// node is an open NVMe namespace, or what a test puts in its place.
type node interface {
	// path is that of the generic device.
	path() string
	nsid() uint32
	// command runs an admin or I/O command and waits for it. An error of the drive is an nvmeof.Status.
	command(admin bool, c uringCmd, data []byte) (dw0 uint32, err error)
	// attribute reads an attribute of the block device from sysfs; "" if there is none.
	attribute(name string) string
	// claim keeps other servers and the system away from the drive until Close: ErrInUse.
	claim() error
	fd() int
	Close() error
}

// device is an open /dev/ngXnY.
type device struct {
	*os.File
	ns    uint32
	block *os.File // the block device, held so that nobody mounts it; nil unless claimed
}

// openNode opens the generic device of a namespace.
func openNode(path string) (node, error) {
	generic, err := genericPath(path)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(generic, os.O_RDWR, 0)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("uring: %w: NVMe drives are opened as root, or by a user with CAP_SYS_ADMIN who may write to the device", err)
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("uring: %w: the drive is not there, or the kernel is older than Linux 5.13", err)
	case err != nil:
		return nil, fmt.Errorf("uring: %w", err)
	}
	ns, err := unix.IoctlRetInt(int(f.Fd()), ioctlID)
	if err != nil || ns <= 0 {
		f.Close()
		return nil, fmt.Errorf("uring: %s does not say which namespace it is: %w", path, cmp.Or(err, error(unix.ENOTTY)))
	}
	return &device{File: f, ns: uint32(ns)}, nil
}

func (d *device) path() string { return d.Name() }
func (d *device) nsid() uint32 { return d.ns }
func (d *device) fd() int      { return int(d.Fd()) }

func (d *device) claim() error {
	block := filepath.Join(filepath.Dir(d.Name()), blockName(d.Name()))
	f, err := os.OpenFile(block, os.O_RDONLY|unix.O_EXCL, 0)
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("uring: %s is %w: it is mounted or belongs to another server or array; unmount it or name another", block, ErrInUse)
	case err != nil && !errors.Is(err, fs.ErrNotExist): // in a container there may be the generic device alone
		return fmt.Errorf("uring: %w", err)
	}
	d.block = f
	if err := lock(d.fd()); errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("uring: %s is %w by another server (fuser %[1]s shows which): stop it or name another drive", d.Name(), ErrInUse)
	} else if err != nil {
		return fmt.Errorf("uring: lock %s: %w", d.Name(), err)
	}
	return nil
}

func (d *device) Close() error {
	if d.block != nil {
		d.block.Close()
	}
	_ = unix.Flock(d.fd(), unix.LOCK_UN) // at once, even if the kernel keeps the file a little longer
	return d.File.Close()
}

func (d *device) command(admin bool, c uringCmd, data []byte) (uint32, error) {
	var pin runtime.Pinner
	defer pin.Unpin()
	p := &passthru64{uringCmd: c}
	if len(data) > 0 {
		pin.Pin(unsafe.SliceData(data))
		p.addr, p.dataLen = uint64(address(data)), uint32(len(data))
	}
	request := uintptr(ioctlIO64)
	if admin {
		request = ioctlAdmin64
	}
	status, _, errno := unix.Syscall(unix.SYS_IOCTL, d.Fd(), request, uintptr(unsafe.Pointer(p)))
	runtime.KeepAlive(p)
	switch {
	case errno != 0:
		return 0, errno
	case status != 0:
		return 0, nvmeof.Status(status)
	}
	return uint32(p.result), nil
}

// block is the name of the kernel's block device for a generic device.
func blockName(generic string) string {
	return "nvme" + strings.TrimPrefix(filepath.Base(generic), "ng")
}

func (d *device) attribute(name string) string {
	b, _ := os.ReadFile(filepath.Join("/sys/block", blockName(d.Name()), name))
	return strings.TrimSpace(string(b))
}

// pageSize is the unit of MDTS and its kin: the smallest page of a controller, which is 4 KiB on all known ones. One
// with larger pages only gets smaller commands.
const pageSize = 4096

// adminTimeout is for commands that identify, in milliseconds.
const adminTimeout = 10000

// identify asks a namespace and its controller what they are.
func identify(n node) (*Drive, error) {
	d := &Drive{Path: n.path(), NSID: n.nsid()}
	ask := func(cns uint32, s interface{ Decode([]byte) error }) error {
		b := make([]byte, nvmeof.IdentifySize)
		c := uringCmd{opcode: nvmeof.OpIdentify, nsid: d.NSID, timeout: adminTimeout, cdw: [6]uint32{cns}}
		if cns != nvmeof.CNSNamespace {
			c.nsid = 0
		}
		if _, err := n.command(true, c, b); err != nil {
			return fmt.Errorf("uring: identify %s: %w", d.Path, err)
		}
		return s.Decode(b)
	}
	if err := cmp.Or(ask(nvmeof.CNSController, &d.Controller), ask(nvmeof.CNSNamespace, &d.Namespace)); err != nil {
		return nil, err
	}
	if err := ask(nvmeof.CNSControllerCSI, &d.NVM); err != nil {
		d.NVM = nvmeof.IdentifyNVMController{} // older than NVMe 2.0: no such limits
	}
	k, ns := &d.Controller, &d.Namespace
	d.Model, d.Serial, d.Firmware = k.Model, k.Serial, k.Firmware
	switch {
	case ns.NGUID != [16]byte{}:
		d.ID = fmt.Sprintf("%x", ns.NGUID)
	case ns.EUI64 != [8]byte{}:
		d.ID = fmt.Sprintf("%x", ns.EUI64)
	}
	if ns.LBADS < 9 || ns.LBADS > 16 || ns.NSZE > 1<<62>>ns.LBADS {
		return nil, fmt.Errorf("uring: %s says it has %d LBAs of 2^%d bytes, which kvof cannot use", d.Path, ns.NSZE, ns.LBADS)
	}
	d.LBASize, d.Metadata, d.Size = 1<<ns.LBADS, int(ns.MS), int64(ns.NSZE)<<ns.LBADS
	d.VolatileCache = k.VWC&1 != 0
	if ns.Optimal() {
		d.OptimalWrite = (int64(cmp.Or(ns.Limits.NOWS, ns.Limits.NPWG)) + 1) << ns.LBADS
	}
	d.limits(n)
	d.placement(n)
	d.names(n)
	return d, nil
}

// defaultTransfer is what one command moves when nothing says how much it may, in bytes; every drive and kernel allows it.
const defaultTransfer = 128 << 10

// limits learns how large a command may be, from the drive and from the kernel's queue.
func (d *Drive) limits(n node) {
	number := func(name string) int64 {
		v, _ := strconv.ParseInt(n.attribute(name), 10, 64)
		return v
	}
	d.MaxTransfer, d.Scattered = defaultTransfer, defaultTransfer
	if kb := number("queue/max_hw_sectors_kb"); kb > 0 {
		d.MaxTransfer = kb << 10
	}
	if m := d.Controller.MDTS; m > 0 && m < 32 {
		d.MaxTransfer = min(d.MaxTransfer, pageSize<<m)
	}
	d.MaxTransfer = max(min(d.MaxTransfer, int64(d.LBASize)<<16)&^(pageSize-1), pageSize) // NLB has 16 bits
	if segments := number("queue/max_segments"); segments > 0 {
		d.Scattered = segments * pageSize
	}
	d.Scattered = min(d.Scattered, d.MaxTransfer)
	d.PollQueues = n.attribute("queue/io_poll") == "1"
}

// placement learns the placement handles, where Flexible Data Placement is enabled.
func (d *Drive) placement(n node) {
	if d.Controller.CTRATT&nvmeof.CTRATTFDP == 0 {
		return
	}
	group := uint32(d.Namespace.ENDGID)
	feature, err := n.command(true, uringCmd{opcode: nvmeof.OpGetFeatures, timeout: adminTimeout, cdw: [6]uint32{nvmeof.FeatFDP, group}}, nil)
	if err != nil || feature&1 == 0 {
		return
	}
	b := make([]byte, nvmeof.RUHSHeader+128*nvmeof.RUHSSize) // a namespace has at most 128 placement handles
	c := uringCmd{opcode: nvmeof.OpIOMgmtRecv, nsid: d.NSID, timeout: adminTimeout, cdw: [6]uint32{nvmeof.MgmtRUHStatus, uint32(len(b)/4 - 1)}}
	if _, err := n.command(false, c, b); err != nil {
		return
	}
	d.pids = nvmeof.DecodePlacements(b)
	d.Placements = len(d.pids)

	b = make([]byte, pageSize)
	numd := uint32(len(b)/4 - 1)
	c = uringCmd{opcode: nvmeof.OpGetLogPage, timeout: adminTimeout, cdw: [6]uint32{nvmeof.LogFDPConfigs | numd<<16, numd>>16 | group<<16}}
	if _, err := n.command(true, c, b); err == nil {
		if cs, i := nvmeof.DecodeFDPConfigs(b), int(feature>>8&0xFF); i < len(cs) && cs[i].ReclaimUnit < 1<<62 {
			d.ReclaimUnit = int64(cs[i].ReclaimUnit)
		}
	}
}

// names finds the block device and a name that stays when drives are counted in another order.
func (d *Drive) names(n node) {
	if n.attribute("size") == "" {
		return
	}
	d.Block = filepath.Join(filepath.Dir(d.Path), blockName(d.Path))
	links, _ := filepath.Glob("/dev/disk/by-id/nvme-*")
	for _, l := range links {
		// Model and serial number are for people; the other names are made of identifiers.
		if real, err := filepath.EvalSymlinks(l); err == nil && real == d.Block &&
			(d.Link == "" || strings.HasPrefix(filepath.Base(d.Link), "nvme-eui.") || strings.HasPrefix(filepath.Base(d.Link), "nvme-nvme.")) {
			d.Link = l
		}
	}
}
