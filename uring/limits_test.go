package uring

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// inChild runs the calling test again in a process of its own, whose limits the
// test may ruin. It returns true there.
func inChild(t *testing.T) bool {
	t.Helper()
	if os.Getenv("URING_TEST_CHILD") == t.Name() {
		return true
	}
	cmd := exec.Command(os.Args[0], "-test.run", "^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), "URING_TEST_CHILD="+t.Name(), "GORACE=atexit_sleep_ms=0")
	out, err := cmd.CombinedOutput()
	if bytes.Contains(out, []byte("--- SKIP")) {
		t.Skipf("%s", out)
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return false
}

// TestMemlock runs as an ordinary user who may pin less than the arena has.
func TestMemlock(t *testing.T) {
	if !inChild(t) {
		return
	}
	dir, err := os.MkdirTemp("", "uring")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	const limit = 6 << 20
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: limit, Max: limit}); err != nil {
		t.Skip(err)
	}
	if os.Getuid() == 0 {
		if err := syscall.Setuid(65534); err != nil {
			t.Skip(err)
		}
		defer syscall.Setuid(0)
	}
	if f := Probe(); f.MemLock != limit || !f.IOURing {
		t.Fatalf("%+v", f)
	}
	open := func(name string, arena int) (Device, func()) {
		a := newArena(t, arena)
		b := a.Get(LargeBuf)
		t.Cleanup(b.Put)
		d, err := OpenFile(filepath.Join(dir, name), FileOptions{Size: 1 << 20, Arena: a})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { d.Close() })
		return d, func() {
			o := Op{Kind: OpWrite, Data: b.Data}
			if err := o.Do(d); err != nil {
				t.Fatal(err)
			}
			d.(*file).pinned.wait()
		}
	}
	check := func(d Device, registered int64, warning bool) {
		t.Helper()
		info := d.Info()
		if warned := strings.Contains(strings.Join(info.Warnings, "\n"), "LimitMEMLOCK"); warned != warning || info.Registered != registered {
			t.Errorf("%d bytes registered, want %d; warnings %q", info.Registered, registered, info.Warnings)
		}
	}
	d, _ := open("too much", 8<<20)
	check(d, 0, true) // known before the first op
	first, use := open("first", limit)
	check(first, 0, false)
	use()
	use()
	check(first, minChunk, false)
	second, use := open("second", limit) // the limit is for both together
	use()
	use()
	check(second, 0, true)
}

// TestSeccomp forbids io_uring, as container runtimes do.
func TestSeccomp(t *testing.T) {
	if !inChild(t) {
		return
	}
	const setup = 425
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS}, // the call's number
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: setup, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	runtime.LockOSThread() // for no_new_privs; the filter is for all threads
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		t.Skip(err)
	}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog))); errno != 0 {
		t.Skip(errno)
	}
	if f := Probe(); f.IOURing || !strings.Contains(f.Reason, "seccomp") {
		t.Errorf("%+v", f)
	}
	path := filepath.Join(t.TempDir(), "store")
	d, err := OpenFile(path, FileOptions{Size: 1 << 20})
	if err == nil {
		d.Close()
	}
	if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "seccomp") {
		t.Errorf("%v", err)
	}
}

func TestProbe(t *testing.T) {
	f := Probe()
	if !f.IOURing || f.Reason != "" || f.Kernel == "" || !strings.Contains(strings.Join(f.Ring, " "), "single_mmap") {
		t.Errorf("%+v", f)
	}
	if os.Getuid() == 0 && f.MemLock != math.MaxUint64 {
		t.Errorf("root may pin %d bytes only", f.MemLock)
	}
}

func TestExplain(t *testing.T) {
	for errno, says := range map[syscall.Errno]string{
		unix.ENOSYS: "Linux 6.1", unix.ENOMEM: "ulimit -l", unix.EMFILE: "ulimit -n", unix.EINVAL: "invalid argument",
	} {
		if s := explain(fmt.Errorf("wrapped: %w", errno)); !strings.Contains(s, says) {
			t.Errorf("%v: %s", errno, s)
		}
	}
}
