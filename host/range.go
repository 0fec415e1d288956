package host

import (
	"context"
	"errors"

	"github.com/kvof/kvof/nvmeof"
)

// RetrieveRange reads the bytes of a value from offset on into buf: the vendor specific command Retrieve Range
// (docs/vendor-commands.md). offset is a multiple of 4, less than 4 GiB. It returns the value's full size in bytes, so that
// min(size-offset, len(buf)) bytes have come, and its tag, which another value of this key does not have. With tag other than
// 0 the value must have that one, or the error is [nvmeof.ValueReplaced]. A target without it answers
// [nvmeof.InvalidOpcode].
func (k *KV) RetrieveRange(ctx context.Context, key, buf []byte, offset int64, tag uint32) (size int, is uint32, err error) {
	cmd, err := k.command(nvmeof.OpRetrieve, key, len(buf), 0)
	if err != nil {
		return 0, 0, err
	}
	if offset < 0 || offset%4 != 0 || offset != int64(uint32(offset)) {
		return 0, 0, nvmeof.InvalidField
	}
	cmd.SetRange(uint32(offset), tag)
	cqe, n, err := do(ctx, k.path, cmd, data{buf: buf})
	if err != nil {
		return 0, 0, err
	}
	size, is = int(cqe.DW0()), cqe.DW1()
	if want := min(max(0, size-int(offset)), len(buf)); n >= 0 && n != want {
		return 0, 0, protocolError("bytes of a %d-byte value from %d on: %d, not %d", size, offset, n, want)
	}
	if is == 0 || tag != 0 && is != tag {
		return 0, 0, protocolError("a value has tag %x, where %x was asked for", is, tag)
	}
	return size, is, nil
}

// rangeWindow is how many ranges of one value are in flight.
const rangeWindow = 8

// fetch reads what a key itself holds into buf, like [KV.Retrieve], in as many commands as that takes: all bytes are of one
// value. Where the target has no Retrieve Range the error for more than one command wraps [ErrTransferSize].
func (k *KV) fetch(ctx context.Context, key, buf []byte) (size int, err error) {
	limit := k.limit(buf)
	if int64(len(buf)) <= limit {
		return k.Retrieve(ctx, key, buf)
	}
	if v := k.vendorCommands(ctx); v.granularity != 0 {
		if size, err = k.fetchRanges(ctx, key, buf, v.granularity); !k.lacks(err) {
			return size, err
		}
	}
	size, err = k.Retrieve(ctx, key, buf[:limit])
	if n := min(size, len(buf)); err == nil && int64(n) > limit {
		err = tooLarge(n, uint64(limit))
	}
	return size, err
}

// fetchRanges is fetch by Retrieve Range: one, which tells the size, then the rest, several at a time.
func (k *KV) fetchRanges(ctx context.Context, key, buf []byte, granularity int64) (size int, err error) {
	first := k.rangeEnd(buf, 0, granularity)
	size, tag, err := k.RetrieveRange(ctx, key, buf[:first], 0, 0)
	if err != nil {
		return 0, err
	}
	buf = buf[:min(size, len(buf))]
	ends := []int64{first}
	for end := first; end < int64(len(buf)); ends = append(ends, end) {
		end = k.rangeEnd(buf, end, granularity)
	}
	err = each(len(ends)-1, rangeWindow, func(i int) error {
		n, _, err := k.RetrieveRange(ctx, key, buf[ends[i]:ends[i+1]], ends[i], tag)
		switch {
		case errors.Is(err, nvmeof.ValueReplaced), errors.Is(err, nvmeof.KeyDoesNotExist):
			return errAgain
		case err == nil && n != size:
			return protocolError("a value of %d bytes has %d", size, n)
		}
		return err
	})
	return size, err
}

// rangeEnd is where the range ends that begins at from: as much as one command carries to there, up to a multiple of the granularity
// if it comes so far.
func (k *KV) rangeEnd(buf []byte, from, granularity int64) int64 {
	end := from + k.limit(buf[from:])&^3
	if end >= int64(len(buf)) {
		return int64(len(buf))
	}
	if whole := end - end%granularity; whole > from {
		return whole
	}
	return end
}

// limit is how many bytes of whatever is stored one command brings to the start of b.
func (k *KV) limit(b []byte) int64 { return bounded(k.path.maxTransfer(b)) }
