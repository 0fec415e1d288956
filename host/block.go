package host

import (
	"context"
	"fmt"

	"github.com/kvof/kvof/nvmeof"
)

// Block is a block namespace. Addresses and counts are in logical blocks of [Block.BlockSize] bytes; one call is one
// command, of at most 65536 blocks and the controller's MDTS.
type Block struct {
	c  *Controller
	ns Namespace
}

// Range is a run of logical blocks.
type Range struct {
	LBA    uint64
	Blocks uint32
}

const (
	maxBlocks = 1 << 16
	maxRanges = 256
	dsmAD     = 1 << 2 // Attribute - Deallocate
)

// Info describes the namespace as it was when it was opened.
func (b *Block) Info() Namespace { return b.ns }

// BlockSize is the size of a logical block in bytes.
func (b *Block) BlockSize() int { return b.ns.BlockSize }

// Blocks is the namespace's size in logical blocks.
func (b *Block) Blocks() uint64 { return b.ns.Size / uint64(b.ns.BlockSize) }

// Read reads len(buf) bytes, whole blocks, from lba on.
func (b *Block) Read(ctx context.Context, lba uint64, buf []byte) error {
	n, err := b.transfer(ctx, nvmeof.OpRead, lba, buf)
	if err == nil && n >= 0 && n != len(buf) {
		return protocolError("read of %d bytes brought %d", len(buf), n)
	}
	return err
}

// Write writes buf, whole blocks, from lba on. buf must not change until Write returns; see [KV.Store] for ctx.
func (b *Block) Write(ctx context.Context, lba uint64, buf []byte) error {
	_, err := b.transfer(ctx, nvmeof.OpWrite, lba, buf)
	return err
}

// Compare returns [nvmeof.CompareFailure] when the blocks from lba on differ from buf.
func (b *Block) Compare(ctx context.Context, lba uint64, buf []byte) error {
	_, err := b.transfer(ctx, nvmeof.OpCompare, lba, buf)
	return err
}

// Verify checks that blocks can be read, without transferring them.
func (b *Block) Verify(ctx context.Context, lba uint64, blocks int) error {
	return b.span(ctx, nvmeof.OpVerify, lba, blocks)
}

// WriteZeroes makes blocks read as zeroes.
func (b *Block) WriteZeroes(ctx context.Context, lba uint64, blocks int) error {
	return b.span(ctx, nvmeof.OpWriteZeroes, lba, blocks)
}

// Deallocate tells that up to 256 ranges of blocks hold nothing of use any more.
func (b *Block) Deallocate(ctx context.Context, ranges ...Range) error {
	if len(ranges) == 0 || len(ranges) > maxRanges {
		return fmt.Errorf("%d ranges, 1 to %d are allowed", len(ranges), maxRanges)
	}
	list := make([]byte, len(ranges)*nvmeof.DSMRangeSize)
	for i, r := range ranges {
		d := nvmeof.DSMRange{Blocks: r.Blocks, SLBA: r.LBA}
		d.Encode(list[i*nvmeof.DSMRangeSize:])
	}
	var cmd nvmeof.Command
	cmd.SetHeader(nvmeof.OpDSM, 0, b.ns.NSID)
	cmd.SetDW(10, uint32(len(ranges)-1))
	cmd.SetDW(11, dsmAD)
	_, _, err := do(ctx, b.c, cmd, data{buf: list})
	return err
}

// Flush makes all completed writes durable.
func (b *Block) Flush(ctx context.Context) error { return flush(ctx, b.c, b.ns.NSID) }

func (b *Block) transfer(ctx context.Context, op uint8, lba uint64, buf []byte) (int, error) {
	if len(buf)%b.ns.BlockSize != 0 {
		return 0, fmt.Errorf("%d bytes are not whole blocks of %d", len(buf), b.ns.BlockSize)
	}
	cmd, err := b.command(op, lba, len(buf)/b.ns.BlockSize)
	if err != nil {
		return 0, err
	}
	_, n, err := do(ctx, b.c, cmd, data{buf: buf})
	return n, err
}

func (b *Block) span(ctx context.Context, op uint8, lba uint64, blocks int) error {
	cmd, err := b.command(op, lba, blocks)
	if err != nil {
		return err
	}
	_, _, err = do(ctx, b.c, cmd, data{})
	return err
}

func (b *Block) command(op uint8, lba uint64, blocks int) (cmd nvmeof.Command, err error) {
	if blocks < 1 || blocks > maxBlocks {
		return cmd, fmt.Errorf("%d blocks, 1 to %d are allowed in one command", blocks, maxBlocks)
	}
	cmd.SetHeader(op, 0, b.ns.NSID)
	cmd.SetDW(10, uint32(lba))
	cmd.SetDW(11, uint32(lba>>32))
	cmd.SetDW(12, uint32(blocks-1))
	return cmd, nil
}
