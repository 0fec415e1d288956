package host

import (
	"context"
	"sync"
	"sync/atomic"

	"github.com/kvof/kvof/nvmeof"
)

const (
	// existWorkers is how many Exist commands are in flight for one call where the target has no Exist Many.
	existWorkers = 32
	// existStride is how many keys ExistPrefix asks for at a time there, so as not to ask for many that do not matter.
	existStride = 4 * existWorkers
)

// ExistPrefix returns how many keys exist before the first that does not: one round trip for all of them where the target
// has the vendor specific command Exist Many (docs/vendor-commands.md), pipelined Exist commands elsewhere.
func (k *KV) ExistPrefix(ctx context.Context, keys [][]byte) (int, error) {
	found := make([]bool, len(keys))
	stride := len(keys)
	if !k.vendorCommands(ctx).existMany {
		stride = existStride
	}
	for i := 0; i < len(keys); i += stride {
		part := found[i:min(i+stride, len(keys))]
		if err := k.ExistMany(ctx, keys[i:][:len(part)], part); err != nil {
			return 0, err
		}
		for j, ok := range part {
			if !ok {
				return i + j, nil
			}
		}
	}
	return len(keys), nil
}

// ExistMany sets found[i] to whether keys[i] exists; found is as long as keys, and undefined after an error. It takes one
// round trip, or where the target has no Exist Many, as few as its queue depth allows.
func (k *KV) ExistMany(ctx context.Context, keys [][]byte, found []bool) error {
	for _, key := range keys {
		if len(key) == 0 || len(key) > nvmeof.MaxKeyLen {
			return nvmeof.InvalidKeySize
		}
	}
	if !k.vendorCommands(ctx).existMany {
		return k.existEach(ctx, keys, found)
	}
	n := (len(keys) + nvmeof.MaxExistMany - 1) / nvmeof.MaxExistMany
	err := each(n, n, func(i int) error {
		first := i * nvmeof.MaxExistMany
		last := min(first+nvmeof.MaxExistMany, len(keys))
		return k.existChunk(ctx, keys[first:last], found[first:last])
	})
	if k.lacks(err) {
		return k.existEach(ctx, keys, found)
	}
	return err
}

func (k *KV) existEach(ctx context.Context, keys [][]byte, found []bool) error {
	return each(len(keys), existWorkers, func(i int) (err error) {
		found[i], err = k.Exist(ctx, keys[i])
		return err
	})
}

// each calls f with 0 to n-1, up to workers at a time, the caller's goroutine among them, and returns one of the errors.
// After an error it starts no more.
func each(n, workers int, f func(i int) error) error {
	var next atomic.Int64
	var first atomic.Pointer[error]
	work := func() {
		for {
			i := int(next.Add(1)) - 1
			if i >= n || first.Load() != nil {
				return
			}
			if err := f(i); err != nil {
				first.CompareAndSwap(nil, &err)
			}
		}
	}
	var wg sync.WaitGroup
	for range min(n, workers) - 1 {
		wg.Go(work)
	}
	work()
	wg.Wait()
	if err := first.Load(); err != nil {
		return *err
	}
	return nil
}

// existCommand is what one Exist Many needs.
type existCommand struct {
	cmd  nvmeof.Command
	data [nvmeof.MaxExistManySize]byte
}

var existCommands = sync.Pool{New: func() any { return new(existCommand) }}

// existChunk asks for up to MaxExistMany keys.
func (k *KV) existChunk(ctx context.Context, keys [][]byte, found []bool) error {
	c := existCommands.Get().(*existCommand)
	defer existCommands.Put(c)
	l := nvmeof.NewKeyList(c.data[:])
	for _, key := range keys {
		l.Add(key)
	}
	list := l.Bytes()
	c.cmd = nvmeof.MakeExistMany(k.ns.NSID, uint32(len(list)))
	cqe, _, err := k.path.submit(ctx, c.cmd, data{buf: list}, false)
	if err = statusError(cqe, err); err != nil {
		return err
	}
	bits := cqe.Found()
	for i := range keys {
		found[i] = bits>>i&1 != 0
	}
	return nil
}
