//go:build cgo && rdma

package rdma

import (
	"errors"
	"syscall"
	"testing"
)

func TestDMABufError(t *testing.T) {
	for errno, unsupported := range map[syscall.Errno]bool{syscall.ENOSYS: true, syscall.EOPNOTSUPP: true, syscall.EPROTONOSUPPORT: true,
		syscall.EBADF: false, syscall.EINVAL: false, syscall.ENOMEM: false} {
		if err := dmabufError(errno); !errors.Is(err, errno) || errors.Is(err, ErrNoDMABuf) != unsupported {
			t.Errorf("%d: %v", int(errno), err)
		}
	}
}
