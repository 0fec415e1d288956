package target_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/kvlayer"
	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/target"
	"github.com/kvof/kvof/uring"
)

// testDrive is a device in memory that takes what a drive takes, and keeps a log of it.
type testDrive struct {
	uring.Device
	mu   sync.Mutex
	log  []string
	fail error
}

func (d *testDrive) View(off, n int64) []byte { return nil }

func (d *testDrive) Submit(ops ...*uring.Op) {
	for _, o := range ops {
		o.Begin()
		o.Complete(d.do(o))
	}
}

func (d *testDrive) do(o *uring.Op) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := int64(len(o.Data))
	if o.Data == nil {
		n = o.Len
	}
	d.log = append(d.log, fmt.Sprintf("%v %d+%d %#x", o.Kind, o.Off, n, o.Control))
	if d.fail != nil {
		return d.fail
	}
	switch at := d.Device.View(o.Off, 0); o.Kind {
	case uring.OpCompare:
		if !bytes.Equal(d.Device.View(o.Off, n), o.Data) {
			return nvmeof.CompareFailure | nvmeof.DNR
		}
		return nil
	case uring.OpVerify:
		return nil
	case uring.OpCopy:
		for b := range slices.Chunk(o.Data, nvmeof.CopyRangeSize) {
			k := (int64(binary.LittleEndian.Uint16(b[16:])) + 1) * 512
			at = d.Device.View(o.Off, k)
			copy(at, d.Device.View(int64(binary.LittleEndian.Uint64(b[8:]))*512, k))
			o.Off += k
		}
		return nil
	}
	in := uring.Op{Kind: o.Kind, Off: o.Off, Len: o.Len, Data: o.Data}
	return in.Do(d.Device)
}

// TestForward wants block commands handed on to a drive that knows them, and done by kvof on one that does not.
func TestForward(t *testing.T) {
	const blocks = 4096 // of 512 bytes
	all := uint16(nvmeof.ONCSCompare | nvmeof.ONCSDSM | nvmeof.ONCSWriteZeroes | nvmeof.ONCSVerify | nvmeof.ONCSCopy)
	command := func(op uint8, slba uint64, dw12 uint32) (c nvmeof.Command) {
		c.SetHeader(op, 1, 1)
		c.SetDW(10, uint32(slba))
		c.SetDW(12, dw12)
		return c
	}
	list := func(n int, blocks uint64, ranges ...uint64) []byte {
		b := make([]byte, n)
		for i, slba := range ranges {
			if n/len(ranges) == nvmeof.CopyRangeSize {
				binary.LittleEndian.PutUint64(b[32*i+8:], slba)
				binary.LittleEndian.PutUint16(b[32*i+16:], uint16(blocks-1))
			} else {
				(&nvmeof.DSMRange{Blocks: uint32(blocks), SLBA: slba}).Encode(b[16*i:])
			}
		}
		return b
	}
	dsm := command(nvmeof.OpDSM, 2, 0) // three ranges
	dsm.SetDW(11, 1<<2)
	const fuaLR, deac = 3 << 30, 1 << 25
	for _, c := range []struct {
		name   string
		cmd    nvmeof.Command
		length uint32 // to read
		data   []byte
		st     nvmeof.Status
		with   []string // what a drive that knows everything gets
		bare   []string // and one that knows nothing; nil: the same
	}{
		{"read", command(nvmeof.OpRead, 3, fuaLR|7), 4096, nil, 0, []string{"read 1536+4096 0xc000"}, nil},
		{"read past the end", command(nvmeof.OpRead, blocks-1, 1), 1024, nil, nvmeof.LBAOutOfRange, nil, nil},
		{"write", command(nvmeof.OpWrite, 0, 1<<30|1), 0, bytes.Repeat([]byte{7}, 1024), 0, []string{"write 0+1024 0x4000"}, nil},
		{"write in pieces", command(nvmeof.OpWrite, 0, 3071), 0, make([]byte, 1536<<10), 0, []string{"write 0+1048576 0x0", "write 1048576+524288 0x0"}, nil},
		{"compare", command(nvmeof.OpCompare, 0, 0), 0, make([]byte, 512), 0, []string{"compare 0+512 0x0"}, []string{"read 0+512 0x0"}},
		{"compare others", command(nvmeof.OpCompare, 0, 0), 0, bytes.Repeat([]byte{9}, 512), nvmeof.CompareFailure, []string{"compare 0+512 0x0"}, []string{"read 0+512 0x0"}},
		{"zeroes", command(nvmeof.OpWriteZeroes, 8, deac|7), 0, nil, 0, []string{"zero 4096+4096 0x200"}, nil},
		{"verify", command(nvmeof.OpVerify, 8, fuaLR|7), 0, nil, 0, []string{"verify 4096+4096 0xc000"}, []string{"read 4096+4096 0xc000"}},
		{"flush", command(nvmeof.OpFlush, 0, 0), 0, nil, 0, []string{"flush 0+0 0x0"}, nil},
		{"deallocate", dsm, 0, list(48, 8, 0, 16, 32), 0, []string{"discard 0+4096 0x0", "discard 8192+4096 0x0", "discard 16384+4096 0x0"}, nil},
		{"deallocate past the end", dsm, 0, list(48, 8, 0, 16, blocks-7), nvmeof.LBAOutOfRange, nil, nil},
		{"copy", command(nvmeof.OpCopy, 100, 1<<30|1), 0, list(64, 2, 0, 8), 0, []string{"copy 51200+64 0x4000"}, []string{}},
		{"copy from beyond", command(nvmeof.OpCopy, 100, 1), 0, list(64, 2, 0, blocks-1), nvmeof.LBAOutOfRange, nil, []string{}},
		{"copy to beyond", command(nvmeof.OpCopy, blocks-3, 1), 0, list(64, 2, 0, 8), nvmeof.LBAOutOfRange, nil, []string{}},
		{"copy in another format", command(nvmeof.OpCopy, 100, 1<<8), 0, list(32, 2, 0), nvmeof.InvalidField, nil, []string{}},
	} {
		for _, oncs := range []uint16{all, 0} {
			tg, _ := newTarget(t, 16<<20, serving(configs.Namespace{NSID: 1, Type: configs.Block, Device: configs.DeviceMemory, Size: blocks * 512, LBASize: 512}))
			d := &testDrive{}
			drive := &uring.Drive{LBASize: 512, Scattered: 128 << 10, Controller: nvmeof.IdentifyController{ONCS: oncs}}
			tg.PutDrive(testNQN, 1, drive, func(dev uring.Device) uring.Device { d.Device = dev; return d })
			_, io := ready(t, tg, testNQN)
			x := io.do(c.cmd, max(c.length, uint32(len(c.data))), c.data, false)
			want, st := c.with, c.st
			if oncs == 0 && c.bare != nil {
				want = c.bare
				if len(want) == 0 {
					st = nvmeof.InvalidOpcode
				}
			}
			if got := x.cqe.Status().Code(); got != st {
				t.Errorf("%s, ONCS %#x: %v", c.name, oncs, got)
			}
			if len(want)+len(d.log) > 0 && !reflect.DeepEqual(d.log, want) {
				t.Errorf("%s, ONCS %#x: the drive got %q, want %q", c.name, oncs, d.log, want)
			}
			if c.name == "write" && c.st == 0 && d.Device.View(1023, 1)[0] != 7 {
				t.Errorf("%s: the data is not there", c.name)
			}
		}
	}
}

// TestDriveIdentify wants the drive's own limits handed on, as far as they stay true.
func TestDriveIdentify(t *testing.T) {
	tg, _ := newTarget(t, 16<<20, serving(configs.Namespace{NSID: 1, Type: configs.Block, Device: configs.DeviceMemory, Size: 1 << 20, LBASize: 4096}))
	admin, _ := ready(t, tg, testNQN)
	identify := func() (k nvmeof.IdentifyController, n nvmeof.IdentifyNamespace) {
		if err := errors.Join(k.Decode(admin.do(nvmeof.MakeIdentify(nvmeof.CNSController, 0, 0), 4096, nil, false).out),
			n.Decode(admin.do(nvmeof.MakeIdentify(nvmeof.CNSNamespace, 1, 0), 4096, nil, false).out)); err != nil {
			t.Fatal(err)
		}
		return k, n
	}
	if k, n := identify(); k.ONCS&nvmeof.ONCSCopy != 0 || n.NSFEAT != 0 || n.DLFEAT != 9 || n.Limits != (nvmeof.NamespaceLimits{}) {
		t.Errorf("without a drive: %+v, %+v", k, n)
	}
	limits := nvmeof.NamespaceLimits{NAWUN: 1000, NAWUPF: 5, NACWU: 7, NOIOB: 32, NPWG: 7, NPWA: 3, NPDG: 15, NPDA: 1, NOWS: 31, MSSRL: 128, MCL: 512, MSRC: 127}
	drive := &uring.Drive{LBASize: 4096, Scattered: 128 << 10, Controller: nvmeof.IdentifyController{ONCS: nvmeof.ONCSCopy},
		Namespace: nvmeof.IdentifyNamespace{NSFEAT: 0xFF, DLFEAT: 2, Limits: limits}}
	tg.PutDrive(testNQN, 1, drive, func(d uring.Device) uring.Device { return d })
	limits.NAWUN, limits.NACWU = 31, 0
	if k, n := identify(); k.ONCS&nvmeof.ONCSCopy == 0 || k.OCFS != 1 || n.NSFEAT != 0x32 || n.DLFEAT != 2 || n.Limits != limits {
		t.Errorf("with a drive: %+v, %+v", k, n)
	}
}

func TestStatusOf(t *testing.T) {
	for _, c := range []struct {
		err  error
		want nvmeof.Status
	}{
		{nil, nvmeof.Success},
		{fmt.Errorf("x: %w", nvmeof.UnrecoveredReadError|nvmeof.DNR), nvmeof.UnrecoveredReadError | nvmeof.DNR},
		{errors.Join(nvmeof.WriteFault, uring.ErrMedia), nvmeof.WriteFault},
		{nvmeof.CompareFailure | nvmeof.DNR, nvmeof.CompareFailure | nvmeof.DNR},
		{nvmeof.AbortRequested, nvmeof.AbortRequested},
		{errors.Join(nvmeof.CapacityExceeded, uring.ErrNoSpace), nvmeof.CapacityExceeded | nvmeof.DNR},
		{nvmeof.Status(0x370), nvmeof.InternalError}, // our path to the drive is not the host's
		{nvmeof.Status(0x7C1), nvmeof.InternalError},
		{nvmeof.InvalidQueueID, nvmeof.InternalError},
		{fmt.Errorf("x: %w", uring.ErrGone), nvmeof.NamespaceNotReady},
		{uring.ErrMedia, nvmeof.UnrecoveredReadError},
		{kvlayer.ErrNotFound, nvmeof.KeyDoesNotExist | nvmeof.DNR},
		{os.ErrInvalid, nvmeof.InternalError},
	} {
		if got := target.StatusOf(c.err); got != c.want {
			t.Errorf("%v: %v, want %v", strings.ReplaceAll(fmt.Sprint(c.err), "\n", " and "), got, c.want)
		}
	}
}
