package host

import (
	"context"

	"github.com/kvof/kvof/nvmeof"
)

// path carries the I/O commands of a namespace: a [Controller] or a [Device].
type path interface {
	// submit carries out a command, and returns how many bytes arrived, -1 where that is not known. The error is never a
	// [nvmeof.Status]. once says that the command must not be sent again when it is not known whether it was carried out.
	submit(ctx context.Context, cmd nvmeof.Command, d data, once bool) (cqe nvmeof.Completion, n int, err error)
	// maxTransfer is how many bytes from the start of b one command carries; 0 = no limit. A nil b is aligned best.
	maxTransfer(b []byte) uint64
	// LogPage reads part of a log page of the controller.
	LogPage(ctx context.Context, lid uint8, off uint64, b []byte) error
}

// data is a command's: one buffer, or several pieces of memory that follow each other.
type data struct {
	buf    []byte
	pieces [][]byte // in place of buf, when not nil
}

// size in bytes.
func (d data) size() int {
	n := len(d.buf)
	for _, p := range d.pieces {
		n += len(p)
	}
	return n
}

// do carries out a command that may be repeated.
func do(ctx context.Context, p path, cmd nvmeof.Command, d data) (nvmeof.Completion, int, error) {
	cqe, n, err := p.submit(ctx, cmd, d, false)
	return cqe, n, statusError(cqe, err)
}
