package host

import (
	"bytes"
	"context"
	"fmt"
	"iter"
	"math"
	"sync/atomic"

	"github.com/kvof/kvof/nvmeof"
)

// KV is a Key Value namespace. Keys are 1 to 16 opaque bytes, and their length is part of their identity.
type KV struct {
	path   path
	ns     Namespace
	vendor atomic.Pointer[vendor] // nil: not asked yet
}

// StoreMode is a condition on a Store.
type StoreMode uint8

// The zero StoreMode stores in any case.
const (
	StoreAlways   StoreMode = 0
	StoreIfExists StoreMode = nvmeof.StoreIfExists // else nvmeof.KeyDoesNotExist
	StoreIfAbsent StoreMode = nvmeof.StoreIfAbsent // else nvmeof.KeyExists
)

// Info describes the namespace as it was when it was opened.
func (k *KV) Info() Namespace { return k.ns }

// MaxValue is the largest value in bytes that one Store takes: the namespace's limit or that of the path to it. 0 = no
// limit is known. See [Values] for larger ones.
func (k *KV) MaxValue() uint64 { return k.maxValue(nil) }

// maxValue is the largest value that one command carries from or to the start of b.
func (k *KV) maxValue(b []byte) uint64 {
	m := k.path.maxTransfer(b)
	switch v := k.ns.MaxValue; {
	case v == 0:
		return m
	case m == 0:
		return v
	default:
		return min(v, m)
	}
}

// command builds a command with size bytes of data.
func (k *KV) command(op uint8, key []byte, size int, option uint8) (cmd nvmeof.Command, err error) {
	if len(key) > nvmeof.MaxKeyLen || len(key) == 0 && op != nvmeof.OpList {
		return cmd, nvmeof.InvalidKeySize
	}
	if size > math.MaxUint32 {
		return cmd, nvmeof.InvalidValueSize
	}
	cmd.SetHeader(op, 0, k.ns.NSID)
	cmd.SetKey(key)
	cmd.SetKV(uint32(size), option)
	return cmd, nil
}

// Store stores a value, empty ones too. value must not change until Store returns. When ctx ends before the value
// has been sent, the connection is given up with it.
func (k *KV) Store(ctx context.Context, key, value []byte, m StoreMode) error {
	return k.store(ctx, key, data{buf: value}, m)
}

// StorePieces is [KV.Store] of a value that lies in several pieces of memory, in their order.
func (k *KV) StorePieces(ctx context.Context, key []byte, value [][]byte, m StoreMode) error {
	return k.store(ctx, key, data{pieces: value}, m)
}

func (k *KV) store(ctx context.Context, key []byte, d data, m StoreMode) error {
	cmd, err := k.command(nvmeof.OpStore, key, d.size(), uint8(m))
	if err != nil {
		return err
	}
	cqe, _, err := k.path.submit(ctx, cmd, d, m == StoreIfAbsent) // a second time it is there
	return statusError(cqe, err)
}

// Retrieve reads a value into buf and returns its full size, which may be more than len(buf): then buf holds its
// first bytes. An empty buf asks for the size only.
func (k *KV) Retrieve(ctx context.Context, key, buf []byte) (size int, err error) {
	return k.retrieve(ctx, key, data{buf: buf})
}

// RetrievePieces is [KV.Retrieve] into several pieces of memory, in their order.
func (k *KV) RetrievePieces(ctx context.Context, key []byte, bufs [][]byte) (size int, err error) {
	return k.retrieve(ctx, key, data{pieces: bufs})
}

func (k *KV) retrieve(ctx context.Context, key []byte, d data) (size int, err error) {
	room := d.size()
	cmd, err := k.command(nvmeof.OpRetrieve, key, room, 0)
	if err != nil {
		return 0, err
	}
	cqe, n, err := do(ctx, k.path, cmd, d)
	if err != nil {
		return 0, err
	}
	size = int(cqe.DW0())
	if n >= 0 && n != min(size, room) {
		return 0, protocolError("retrieve of a %d-byte value into %d bytes brought %d", size, room, n)
	}
	return size, nil
}

// Exist reports whether a key is present.
func (k *KV) Exist(ctx context.Context, key []byte) (bool, error) {
	cmd, err := k.command(nvmeof.OpExist, key, 0, 0)
	if err != nil {
		return false, err
	}
	cqe, _, err := k.path.submit(ctx, cmd, data{}, false)
	if err == nil && cqe.Status().Code() == nvmeof.KeyDoesNotExist {
		return false, nil
	}
	err = statusError(cqe, err)
	return err == nil, err
}

// Delete deletes a key. Whether deleting an absent key is an error ([nvmeof.KeyDoesNotExist]) is a setting of the
// namespace (EDNEK).
func (k *KV) Delete(ctx context.Context, key []byte) error {
	cmd, err := k.command(nvmeof.OpDelete, key, 0, 0)
	if err != nil {
		return err
	}
	cqe, _, err := k.path.submit(ctx, cmd, data{}, true) // a second time it may be absent
	return statusError(cqe, err)
}

// Flush makes all completed stores durable.
func (k *KV) Flush(ctx context.Context) error { return flush(ctx, k.path, k.ns.NSID) }

func flush(ctx context.Context, p path, nsid uint32) error {
	var cmd nvmeof.Command
	cmd.SetHeader(nvmeof.OpFlush, 0, nsid)
	_, _, err := do(ctx, p, cmd, data{})
	return err
}

// listBuffer holds 3276 keys of 16 bytes.
const listBuffer = 64 << 10

// List yields all keys from the first that is not below from, in the target's order; nil from begins at the start.
// The order is stable, but keys stored or deleted meanwhile may be missed. Each key is valid until the next.
func (k *KV) List(ctx context.Context, from []byte) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		size := uint64(listBuffer)
		if m := k.path.maxTransfer(nil); m != 0 {
			size = min(size, m)
		}
		buf := make([]byte, size)
		last := bytes.Clone(from)
		for first := true; ; first = false {
			n, err := k.listPage(ctx, last, buf)
			if err != nil {
				yield(nil, err)
				return
			}
			fresh := 0
			err = nvmeof.DecodeKeyList(buf[:n], func(key []byte) bool {
				if !first && fresh == 0 && bytes.Equal(key, last) {
					return true // where the last page ended
				}
				fresh++
				last = append(last[:0], key...)
				if !yield(key, nil) {
					fresh = -1
				}
				return fresh > 0
			})
			if err != nil {
				yield(nil, fmt.Errorf("%w: %w", ErrProtocol, err))
				return
			}
			if fresh <= 0 {
				return
			}
		}
	}
}

// listPage reads one List reply.
func (k *KV) listPage(ctx context.Context, from, buf []byte) (int, error) {
	cmd, err := k.command(nvmeof.OpList, from, len(buf), 0)
	if err != nil {
		return 0, err
	}
	_, n, err := do(ctx, k.path, cmd, data{buf: buf})
	if n < 0 {
		n = len(buf) // the list says itself how long it is
	}
	return n, err
}
