package host

import (
	"bytes"
	"context"
	"errors"

	"github.com/kvof/kvof/nvmeof"
)

// pduVecs is how many pieces of memory a PDU may at least count on in one write: header, digest, and six of data.
const pduVecs = 8

// pieces is a command's data: one buffer, or several that follow each other on the wire. Of a slot's, sender or receiver
// use it, never both, and it keeps where they are.
type pieces struct {
	list [][]byte // none is empty
	size int      // bytes, of all
	i    int      // the piece of the last at
	base int      // bytes before it
}

func (p *pieces) set(bufs ...[]byte) {
	p.list, p.size, p.i, p.base = p.list[:0], 0, 0, 0
	for _, b := range bufs {
		if len(b) > 0 {
			p.list = append(p.list, b)
			p.size += len(b)
		}
	}
}

// drop forgets the caller's memory.
func (p *pieces) drop() {
	clear(p.list)
	p.list, p.size = p.list[:0], 0
}

// at returns what is left of the piece in which byte off lies, from that byte on; off is less than size.
func (p *pieces) at(off int) []byte {
	if off < p.base {
		p.i, p.base = 0, 0
	}
	for off-p.base >= len(p.list[p.i]) {
		p.base += len(p.list[p.i])
		p.i++
	}
	return p.list[p.i][off-p.base:]
}

// fit returns how many bytes from off on, at most n, lie in at most count pieces; a multiple of 4 if it is less than n.
func (p *pieces) fit(off, n, count int) int {
	got := 0
	for ; got < n && count > 0; count-- {
		got += len(p.at(off + got))
	}
	if got < n {
		return got &^ 3
	}
	return n
}

// gatherer is a path whose commands take data in pieces without a copy.
type gatherer interface {
	submitPieces(ctx context.Context, cmd *nvmeof.Command, bufs [][]byte) (cqe nvmeof.Completion, n int, err error)
}

func (c *Controller) submitPieces(ctx context.Context, cmd *nvmeof.Command, bufs [][]byte) (nvmeof.Completion, int, error) {
	if len(c.io) == 0 {
		return nvmeof.Completion{}, 0, errors.New("controller has no I/O queue")
	}
	if m, n := c.MaxTransfer(), length(bufs); m != 0 && uint64(n) > m {
		return nvmeof.Completion{}, 0, tooLarge(n, m)
	}
	return c.pick().doPieces(ctx, cmd, bufs)
}

func length(bufs [][]byte) (n int) {
	for _, b := range bufs {
		n += len(b)
	}
	return n
}

// StorePieces is [KV.Store] of a value that lies in several pieces of memory, in their order.
func (k *KV) StorePieces(ctx context.Context, key []byte, value [][]byte, m StoreMode) error {
	g, ok := k.path.(gatherer)
	if !ok {
		return k.Store(ctx, key, bytes.Join(value, nil), m)
	}
	cmd, err := k.commandFor(nvmeof.OpStore, key, length(value), uint8(m))
	if err != nil {
		return err
	}
	cqe, _, err := g.submitPieces(ctx, &cmd, value)
	return statusError(cqe, err)
}

// RetrievePieces is [KV.Retrieve] into several pieces of memory, in their order.
func (k *KV) RetrievePieces(ctx context.Context, key []byte, bufs [][]byte) (size int, err error) {
	total := length(bufs)
	g, ok := k.path.(gatherer)
	if !ok {
		b := make([]byte, total)
		if size, err = k.Retrieve(ctx, key, b); err == nil {
			for _, p := range bufs {
				b = b[copy(p, b):]
			}
		}
		return size, err
	}
	cmd, err := k.commandFor(nvmeof.OpRetrieve, key, total, 0)
	if err != nil {
		return 0, err
	}
	cqe, n, err := g.submitPieces(ctx, &cmd, bufs)
	if err = statusError(cqe, err); err != nil {
		return 0, err
	}
	size = int(cqe.DW0())
	if n != min(size, total) {
		return 0, protocolError("retrieve of a %d-byte value into %d bytes brought %d", size, total, n)
	}
	return size, nil
}
