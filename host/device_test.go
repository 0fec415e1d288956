package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/kvof/kvof/nvmeof"
	"golang.org/x/sys/unix"
)

// attachment is a made-up /sys and /dev with Key Value namespaces behind them.
type attachment struct {
	deviceSystem
	t  *testing.T
	ns map[string]*attached // by character device
}

type attached struct {
	*memory
	nsid  uint32
	nguid byte
	errno error
	st    nvmeof.Status
	hold  chan bool // when set, I/O waits for it
	user  bool      // not root: the kernel passes nothing on but Identify and the specification's own I/O commands
}

func attach(t *testing.T) *attachment {
	a := &attachment{t: t, ns: map[string]*attached{}}
	a.deviceSystem = deviceSystem{sys: t.TempDir(), dev: t.TempDir(), ioctl: a.ioctl}
	return a
}

func (a *attachment) write(path, s string) {
	a.t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o777), os.WriteFile(path, []byte(s), 0o666)); err != nil {
		a.t.Fatal(err)
	}
}

// add attaches a namespace. disks are the directories with the limits, below the class directory.
func (a *attachment) add(name, nqn string, n *attached, disks ...string) {
	a.ns[name] = n
	a.write(filepath.Join(a.dev, name), "")
	a.write(filepath.Join(a.sys, name, "device", "subsysnqn"), nqn+"\n")
	for i, d := range disks {
		a.write(filepath.Join(a.sys, name, "device", d, "queue", "max_hw_sectors_kb"), fmt.Sprintln(1024-4*i))
		a.write(filepath.Join(a.sys, name, "device", d, "queue", "max_segments"), "256\n")
	}
}

func (a *attachment) ioctl(fd int, request uintptr, arg unsafe.Pointer) (int, error) {
	path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	n := a.ns[filepath.Base(path)]
	if err != nil || n == nil {
		return 0, syscall.ENOTTY
	}
	if request == ioctlID {
		return int(n.nsid), nil
	}
	p := (*passthru)(arg)
	var cmd nvmeof.Command
	cmd.SetHeader(p.opcode, 0, p.nsid)
	cmd.SetDW(2, p.cdw2)
	cmd.SetDW(3, p.cdw3)
	for i, v := range p.cdw10 {
		cmd.SetDW(10+i, v)
	}
	var buf []byte
	if request != 0xC0504E49 {
		buf = unsafe.Slice((*byte)(p.addr), p.dataLen)
	}
	if p.flags != 0 || p.metadata != 0 || p.timeout != 0 || p.nsid != n.nsid && request != 0xC0504E47 {
		a.t.Errorf("%+v", p)
		return 0, syscall.EINVAL
	}
	if n.user && (p.opcode >= 0x80 || request == 0xC0504E47 && p.opcode != nvmeof.OpIdentify) {
		return 0, syscall.EACCES
	}
	switch request {
	case 0xC0504E47:
		if p.opcode == nvmeof.OpGetLogPage {
			if p.nsid != nvmeof.BroadcastNSID || int(cmd.LogLength()) != len(buf) || !cmd.RAE() {
				a.t.Errorf("%+v", p)
			}
			var st nvmeof.Status
			errors.As(n.LogPage(context.Background(), cmd.LID(), cmd.LogOffset(), buf), &st)
			return int(st), nil
		}
		if p.opcode != nvmeof.OpIdentify || p.nsid != n.nsid || p.cdw10[0] != 5 || p.cdw10[1] != 1<<24 || p.dataLen != 4096 {
			a.t.Errorf("%+v", p)
		}
		if n.memory == nil { // of another command set
			return int(nvmeof.InvalidField | nvmeof.DNR), nil
		}
		(&nvmeof.IdentifyKV{NSZE: 1 << 30, MaxKey: 16, MaxValue: 64 << 20, NGUID: [16]byte{n.nguid}}).Encode(buf)
		return 0, nil
	case 0xC0504E49:
		var d data
		for _, v := range unsafe.Slice((*unix.Iovec)(p.addr), p.dataLen) {
			d.pieces = append(d.pieces, unsafe.Slice(v.Base, v.Len))
		}
		cqe, _, err := n.submit(context.Background(), cmd, d, false)
		p.result = uint64(cqe.DW0()) | uint64(cqe.DW1())<<32
		return int(cqe.Status()), err
	case 0xC0504E48:
		if n.hold != nil {
			<-n.hold
		}
		if n.errno != nil || n.st != 0 {
			return int(n.st), n.errno
		}
		cqe, _, err := n.submit(context.Background(), cmd, data{buf: buf}, false)
		p.result = uint64(cqe.DW0()) | uint64(cqe.DW1())<<32
		if errors.Is(err, ErrTransferSize) {
			return 0, syscall.EINVAL
		}
		return int(cqe.Status()), err
	}
	return 0, syscall.ENOTTY
}

func TestOpenDevice(t *testing.T) {
	a := attach(t)
	a.add("ng0n1", "nqn.a", &attached{nsid: 1}, "nvme0n1")
	a.add("ng0n2", "nqn.a", &attached{memory: newMemory(0), nsid: 2, nguid: 2}, "nvme0n2", "nvme0n1")
	a.add("ng1n1", "nqn.b", &attached{memory: newMemory(0), nsid: 1, nguid: 3}, "nvme1n1", "nvme1/nvme1c1n1", "nvme2/nvme1c2n1")
	a.add("ng1n12", "nqn.b", &attached{memory: newMemory(0), nsid: 12, nguid: 4})
	a.write(filepath.Join(a.dev, "file"), "")
	if err := os.Symlink("ng0n2", filepath.Join(a.dev, "link")); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name  string
		nsid  uint32
		path  string // or a part of the error
		limit uint64
	}{
		{a.dev + "/ng0n2", 0, "/ng0n2", 1 << 20},
		{a.dev + "/link", 0, "/link", 1 << 20},
		{a.dev + "/ng0n2", 2, "/ng0n2", 1 << 20},
		{a.dev + "/ng0n2", 1, "is namespace 2", 0},
		{a.dev + "/ng0n1", 0, "not a Key Value namespace", 0},
		{a.dev + "/file", 0, "not the character device", 0},
		{a.dev + "/ng9n9", 0, "no such file", 0},
		{"nqn.a", 0, "/ng0n2", 1 << 20},
		{"nqn.b", 0, "more than one Key Value namespace", 0},
		{"nqn.b", 1, "/ng1n1", 1<<20 - 8192},
		{"nqn.b", 12, "/ng1n12", 128 << 10},
		{"nqn.b", 3, "no attached", 0},
		{"nqn.c", 0, "no attached", 0},
		{"03000000-0000-0000-0000-000000000000", 0, "/ng1n1", 1<<20 - 8192},
		{"04000000000000000000000000000000", 0, "/ng1n12", 128 << 10},
		{"05000000000000000000000000000000", 0, "no attached", 0},
	} {
		d, err := a.open(tc.name, tc.nsid)
		if err != nil {
			if tc.limit != 0 || !strings.Contains(err.Error(), tc.path) {
				t.Errorf("%s: %v", tc.name, err)
			}
			continue
		}
		if d.Path() != a.dev+tc.path || d.MaxTransfer() != tc.limit || d.KV().MaxValue() != tc.limit {
			t.Errorf("%s: %s, %d bytes", tc.name, d.Path(), d.MaxTransfer())
		}
		d.Close()
	}
}

func TestDeviceKV(t *testing.T) {
	a := attach(t)
	m := newMemory(1 << 20)
	a.add("ng0n1", "nqn.a", &attached{memory: m, nsid: 1}, "nvme0n1")
	d, err := a.open("nqn.a", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	kv, ctx := d.KV(), t.Context()
	page := make([]byte, 1<<20+2*os.Getpagesize())
	page = page[os.Getpagesize()-int(uintptr(unsafe.Pointer(&page[0]))%uintptr(os.Getpagesize())):]
	for _, n := range []int{0, 1, 4096, 1 << 20} {
		key, v := fmt.Appendf(nil, "key%d", n), page[:n]
		copy(v, random(n))
		if err := kv.Store(ctx, key, v, StoreIfAbsent); err != nil {
			t.Fatal(err)
		}
		if err := kv.Store(ctx, key, v, StoreIfAbsent); !errors.Is(err, nvmeof.KeyExists) {
			t.Fatal(err)
		}
		got := bytes.Clone(page[:n])
		clear(page)
		if size, err := kv.Retrieve(ctx, key, page[:n]); size != n || err != nil || !bytes.Equal(got, page[:n]) {
			t.Fatal(size, err)
		}
		if ok, err := kv.Exist(ctx, key); !ok || err != nil {
			t.Fatal(ok, err)
		}
	}
	// One byte off a page, the data touches a page more.
	if err := kv.Store(ctx, []byte("k"), page[1:1<<20+1], 0); !errors.Is(err, ErrTransferSize) {
		t.Error(err)
	}
	if err := kv.Store(ctx, []byte("k"), page[1:1<<20+1-4096], 0); err != nil {
		t.Error(err)
	}
	pieces := [][]byte{page[:10], {}, page[100:5000], page[4096*3:][:4096]}
	if err := kv.StorePieces(ctx, []byte("k"), pieces, 0); err != nil {
		t.Error(err)
	}
	want := bytes.Join(pieces, nil)
	clear(page)
	if size, err := kv.RetrievePieces(ctx, []byte("k"), pieces); size != len(want) || err != nil || !bytes.Equal(bytes.Join(pieces, nil), want) {
		t.Error(size, err)
	}
	tiny := make([][]byte, 257) // each touches a page
	for i := range tiny {
		tiny[i] = page[i:][:1]
	}
	if err := kv.StorePieces(ctx, []byte("k"), tiny, 0); !errors.Is(err, ErrTransferSize) {
		t.Error(err)
	}
	if err := kv.StorePieces(ctx, []byte("k"), tiny[1:], 0); err != nil {
		t.Error(err)
	}
	n := 0
	for _, err := range kv.List(ctx, nil) {
		if n++; err != nil {
			t.Fatal(err)
		}
	}
	if n != 5 {
		t.Errorf("%d keys", n)
	}
	if err := kv.Delete(ctx, []byte("key0")); err != nil {
		t.Error(err)
	}
	if _, err := kv.Retrieve(ctx, []byte("key0"), nil); !errors.Is(err, nvmeof.KeyDoesNotExist) {
		t.Error(err)
	}
	if err := kv.Flush(ctx); err != nil {
		t.Error(err)
	}
}

func TestDeviceErrors(t *testing.T) {
	a := attach(t)
	n := &attached{memory: newMemory(0), nsid: 1}
	a.add("ng0n1", "nqn.a", n)
	d, err := a.open(filepath.Join(a.dev, "ng0n1"), 0)
	if err != nil {
		t.Fatal(err)
	}
	kv, ctx := d.KV(), t.Context()
	for _, tc := range []struct {
		errno   error
		st      nvmeof.Status
		want    error
		unknown bool
	}{
		{nil, nvmeof.CapacityExceeded | nvmeof.DNR, nvmeof.CapacityExceeded, false},
		{nil, hostPathError, ErrConnectionLost, false},
		{nil, hostAborted, ErrConnectionLost, true},
		{syscall.ENODEV, 0, ErrConnectionLost, false},
		{syscall.EACCES, 0, syscall.EACCES, false},
		{syscall.EINVAL, 0, syscall.EINVAL, false},
	} {
		n.errno, n.st = tc.errno, tc.st
		err := kv.Store(ctx, []byte("k"), []byte("v"), 0)
		if !errors.Is(err, tc.want) || errors.Is(err, ErrOutcomeUnknown) != tc.unknown {
			t.Errorf("%v, %v: %v", tc.errno, tc.st, err)
		}
	}
	n.errno, n.st, n.hold = nil, 0, make(chan bool)
	done := make(chan error)
	for range deviceDepth {
		go func() { done <- kv.Store(ctx, []byte("k"), []byte("v"), 0) }()
	}
	for len(d.free) > 0 {
		time.Sleep(time.Millisecond)
	}
	stopped, cancel := context.WithCancel(ctx)
	cancel()
	if err := kv.Store(stopped, []byte("k"), []byte("v"), 0); err != context.Canceled {
		t.Error(err)
	}
	closed := make(chan error)
	go func() { closed <- d.Close() }()
	<-d.closed
	if err := kv.Flush(ctx); err != ErrClosed {
		t.Error(err)
	}
	close(n.hold)
	for range deviceDepth {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if err := d.Close(); err != ErrClosed {
		t.Error(err)
	}
}

// TestDeviceVendor has both vendor specific commands go through the kernel, and do without them for who is not root.
func TestDeviceVendor(t *testing.T) {
	for _, user := range []bool{false, true} {
		a := attach(t)
		n := &attached{memory: newMemory(0).withVendor(), nsid: 1, user: user}
		var many, ranges, single atomic.Int32
		n.hook = func(op uint8, _ string) error {
			switch op {
			case nvmeof.OpExistMany:
				many.Add(1)
			case nvmeof.OpRetrieveRange:
				ranges.Add(1)
			case nvmeof.OpExist:
				single.Add(1)
			}
			return nil
		}
		a.add("ng0n1", "nqn.a", n, "nvme0n1")
		d, err := a.open("nqn.a", 0)
		if err != nil {
			t.Fatal(err)
		}
		kv := d.KV()
		var keys [][]byte
		for i := range 200 {
			keys = append(keys, fmt.Appendf(nil, "k%d", i))
			if i != 150 {
				n.kv[string(keys[i])] = nil
			}
		}
		if run, err := kv.ExistPrefix(t.Context(), keys); run != 150 || err != nil {
			t.Error(run, err)
		}
		if (many.Load() == 4) == user || (single.Load() == 0) == user {
			t.Errorf("user %v: %d Exist Many, %d Exist", user, many.Load(), single.Load())
		}
		want := random(5<<20 + 3)
		n.kv["large"], n.tags["large"] = want, 7
		got := make([]byte, len(want)+1)
		size, err := kv.Values(0).Retrieve(t.Context(), []byte("large"), got[1:])
		switch {
		case user && !errors.Is(err, ErrTransferSize):
			t.Error(err)
		case !user && (size != len(want) || err != nil || !bytes.Equal(got[1:], want) || ranges.Load() != 6):
			t.Error(size, err, ranges.Load())
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if err := d.LogPage(t.Context(), nvmeof.LogVendor, 0, make([]byte, 512)); err != ErrClosed {
			t.Error(err)
		}
	}
}
