package target

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"sync"
	"sync/atomic"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/kvlayer"
	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/uring"
)

// namespace is one namespace of a subsystem with the device below it.
type namespace struct {
	configs.Namespace
	csi    nvmeof.CSI
	dev    uring.Device
	drive  *uring.Drive // block only: the NVMe drive that does the commands itself; nil on other devices
	arena  *uring.Arena
	store  *kvlayer.Store // Key Value only, as is kv, which has dev
	kv     *storage
	blocks uint64      // logical blocks; of 4096 bytes for Key Value
	lbads  uint8       // log2 of the logical block size
	inline bool        // commands never wait for the device: they run on the connection's reader
	ednek  atomic.Bool // feature 20h
	stats  commandStats
	users  sync.WaitGroup // commands in flight
	shadow shadow
	disks  []*disk // all devices, those of its pool
	pool   *pool
	own    hold // of the arena, for good
}

// openNamespace opens the device and, for a Key Value namespace, the store on it.
func openNamespace(c configs.Namespace, arena *uring.Arena, p *pool, log *slog.Logger) (*namespace, error) {
	if c.Type == configs.KeyValue {
		return openKV(c, arena, p, log)
	}
	n := &namespace{Namespace: c, arena: arena, pool: p}
	var err error
	if n.dev, err = openDevice(c, arena); err != nil {
		return nil, fmt.Errorf("namespace %d: %w", c.NSID, err)
	}
	n.disks = []*disk{{Device: n.dev}}
	if n.inline = n.dev.View(0, 1) != nil; !n.inline {
		if err := p.takeForGood(hold{medium: 1}); err != nil { // for Compare
			n.dev.Close()
			return nil, fmt.Errorf("namespace %d: %w", c.NSID, err)
		}
		n.own = hold{medium: 1}
	}
	if d, ok := n.dev.(*uring.NVMe); ok {
		n.drive = d.Drive()
		c.LBASize = cmp.Or(c.LBASize, configs.Size(n.drive.LBASize))
		if int(c.LBASize) != n.drive.LBASize {
			err = fmt.Errorf("%s has LBAs of %d bytes: leave lba_size out, or make it that", c.Path, n.drive.LBASize)
		}
	}
	lba := uint64(c.LBASize)
	if bs := n.dev.BlockSize(); int64(lba)%int64(bs) != 0 {
		err = fmt.Errorf("%s needs blocks of %d bytes: lba_size = %d is too small", c.Path, bs, lba)
	}
	if err != nil {
		n.dev.Close()
		p.giveForGood(n.own)
		return nil, fmt.Errorf("namespace %d: %w", c.NSID, err)
	}
	if n.inline {
		p.memories.add(payload{n.dev.View(0, n.dev.Size()), n.dev})
	}
	n.lbads = uint8(bits.TrailingZeros64(lba))
	n.blocks = uint64(n.dev.Size()) >> n.lbads
	return n, nil
}

// openKV opens a Key Value namespace.
func openKV(c configs.Namespace, arena *uring.Arena, p *pool, log *slog.Logger) (*namespace, error) {
	n := &namespace{Namespace: c, arena: arena, pool: p, csi: nvmeof.CSIKV, lbads: 12}
	n.ednek.Store(c.EDNEK)
	var err error
	if n.kv, err = p.storageOf(c, arena, log); err != nil {
		return nil, fmt.Errorf("namespace %d: %w", c.NSID, err)
	}
	n.dev, n.disks, n.inline = n.kv.devs[0], n.kv.disks, n.kv.memory
	if n.store, err = n.kv.pool.Store(n.kv.tenant(c), policyOf(c, log)); err != nil {
		return nil, errors.Join(fmt.Errorf("namespace %d: %w", c.NSID, err), p.release(n.kv))
	}
	for _, d := range n.kv.devs {
		n.blocks += uint64(d.Size()) >> n.lbads
	}
	if c.Quota > 0 {
		n.blocks = min(n.blocks, uint64(c.Quota)>>n.lbads)
	}
	return n, nil
}

// openDevice opens the device that a namespace is configured for.
func openDevice(c configs.Namespace, arena *uring.Arena) (uring.Device, error) {
	switch c.Device {
	case configs.DeviceMemory:
		return uring.NewMemory(int64(c.Size))
	case configs.DeviceNVMe:
		d, err := uring.OpenNVMe(c.Path, uring.NVMeOptions{Size: int64(c.Size), Arena: arena, Poll: c.Poll, Placement: int(c.Placement)})
		if err != nil {
			return nil, err // not a nil *NVMe
		}
		return d, nil
	}
	return uring.OpenFile(c.Path, uring.FileOptions{Size: int64(c.Size), Arena: arena})
}

// close waits for the commands in flight and closes store and device.
func (n *namespace) close() error {
	n.users.Wait()
	n.shadow.buf.Put()
	if n.store != nil {
		return errors.Join(n.store.Close(), n.pool.release(n.kv))
	}
	if n.inline {
		n.pool.memories.remove(n.dev.View(0, n.dev.Size()))
	}
	err := n.dev.Close()
	n.pool.giveForGood(n.own)
	return err
}

// execute runs an I/O command of either command set.
func (n *namespace) execute(r *Request) {
	if n.csi == nvmeof.CSIKV {
		kvCommand(r)
	} else {
		blockCommand(r)
	}
}

// flush is the Flush command of both command sets.
func flush(r *Request) { r.complete(statusOf(r.ns.flush()), 0) }

// flush makes everything that has completed durable.
func (n *namespace) flush() error {
	if n.store != nil {
		return n.store.Flush()
	}
	var op uring.Op
	op.Kind = uring.OpFlush
	return op.Do(n.dev)
}

// usage returns the bytes in use, for NUSE.
func (n *namespace) usage() uint64 {
	if n.store != nil {
		return uint64(n.store.Stats().Used)
	}
	return n.blocks << n.lbads
}

func (n *namespace) nsattr() uint8 {
	if n.ReadOnly {
		return 1
	}
	return 0
}

// forwards tells whether the drive below does the commands of an ONCS bit itself.
func (n *namespace) forwards(oncs uint16) bool { return n.drive != nil && n.drive.Has(oncs) }

// missing is statusOf for a Retrieve: a value that is damaged or cannot be read is, where it can be made again, one that is
// not there.
func (n *namespace) missing(err error) nvmeof.Status {
	if !n.Strict && (errors.Is(err, kvlayer.ErrCorrupt) || errors.Is(err, uring.ErrMedia)) {
		err = kvlayer.ErrNotFound
	}
	return statusOf(err)
}

// statusOf is where the errors of store and device become NVMe statuses.
func statusOf(err error) nvmeof.Status {
	if err == nil {
		return nvmeof.Success
	}
	var drives nvmeof.Status // errors.As puts it on the heap
	switch {
	case errors.Is(err, kvlayer.ErrNotFound):
		return nvmeof.KeyDoesNotExist | nvmeof.DNR
	case errors.Is(err, kvlayer.ErrExists):
		return nvmeof.KeyExists | nvmeof.DNR
	case errors.Is(err, kvlayer.ErrReplaced):
		return nvmeof.ValueReplaced | nvmeof.DNR
	case errors.Is(err, kvlayer.ErrNoSpace), errors.Is(err, uring.ErrNoSpace):
		return nvmeof.CapacityExceeded | nvmeof.DNR
	case errors.Is(err, kvlayer.ErrTooLarge):
		return nvmeof.InvalidValueSize | nvmeof.DNR
	case errors.Is(err, kvlayer.ErrCorrupt):
		return nvmeof.UnrecoveredError | nvmeof.DNR
	case errors.Is(err, errMiscompare):
		return nvmeof.CompareFailure | nvmeof.DNR
	case errors.Is(err, uring.ErrGone):
		return nvmeof.NamespaceNotReady // until it is back
	case errors.As(err, &drives) && drives.Code()>>8 != 1 && drives.Code()>>8 < 3:
		return drives // of commands in general and of media; others are about our path to the drive, or the vendor's own
	case errors.Is(err, uring.ErrMedia):
		return nvmeof.UnrecoveredReadError
	}
	return nvmeof.InternalError
}
