package uring

import (
	"bufio"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Features is what this system offers to devices.
type Features struct {
	Kernel  string   `json:"kernel"`           // release, as uname -r
	IOURing bool     `json:"io_uring"`         // a ring can be made
	Reason  string   `json:"reason,omitempty"` // if not: why, and what to do
	Ring    []string `json:"ring,omitempty"`   // IORING_FEAT_ names, in lower case
	MemLock uint64   `json:"memlock"`          // bytes this process may pin: math.MaxUint64 without limit
}

// Probe looks at the system by making a small ring.
func Probe() Features {
	f := Features{Kernel: kernelRelease(), MemLock: memlockLimit()}
	r, err := newRing(8, 0)
	if err != nil {
		f.Reason = explain(err)
		return f
	}
	defer r.close()
	f.IOURing, f.Ring = true, featureNames(r.features)
	return f
}

// explain says in one line why no ring could be made, and what to do.
func explain(err error) string {
	switch {
	case errors.Is(err, unix.ENOSYS):
		return "this kernel has no io_uring: run Linux 6.1 or later, with CONFIG_IO_URING"
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		switch v, _ := os.ReadFile("/proc/sys/kernel/io_uring_disabled"); strings.TrimSpace(string(v)) {
		case "2":
			return "io_uring is switched off: sysctl kernel.io_uring_disabled=0"
		case "1":
			return "io_uring is for privileged processes only: sysctl kernel.io_uring_disabled=0, or add the server's group as kernel.io_uring_group"
		}
		return "a security policy forbids io_uring (seccomp in a container, or SELinux): allow io_uring_setup, io_uring_enter and io_uring_register"
	case errors.Is(err, unix.ENOMEM):
		return "no memory for a ring: raise the memlock limit (ulimit -l, LimitMEMLOCK=), or free memory"
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
		return "too many open files: raise the limit (ulimit -n, LimitNOFILE=)"
	}
	return fmt.Sprintf("cannot make a ring: %v", err)
}

func kernelRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// olderThan reports whether a kernel release, as uname -r prints it, is older than major.minor. What it cannot read is not.
func olderThan(release string, major, minor int) bool {
	var a, b int
	if n, _ := fmt.Sscanf(release, "%d.%d", &a, &b); n < 2 {
		return false
	}
	return a < major || a == major && b < minor
}

// memlockLimit returns how many bytes this process may pin: RLIMIT_MEMLOCK,
// which CAP_IPC_LOCK lifts.
func memlockLimit() uint64 {
	if f, err := os.Open("/proc/self/status"); err == nil {
		defer f.Close()
		for s := bufio.NewScanner(f); s.Scan(); {
			if hex, ok := strings.CutPrefix(s.Text(), "CapEff:\t"); ok {
				if caps, err := strconv.ParseUint(hex, 16, 64); err == nil && caps&(1<<unix.CAP_IPC_LOCK) != 0 {
					return math.MaxUint64
				}
			}
		}
	}
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_MEMLOCK, &l) != nil {
		return 0
	}
	return l.Cur // RLIM_INFINITY is all ones
}
