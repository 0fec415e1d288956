package uring

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvof/kvof/nvmeof"
)

func (f *fakeDrive) openFor(t testing.TB, o NVMeOptions) *NVMe {
	d := f.open(t, o)
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// TestCommands wants the exact command of each kind of op.
func TestCommands(t *testing.T) {
	f := newFakeDrive(t, 512)
	f.pids = []uint16{0, 0x101}
	d := f.openFor(t, NVMeOptions{Placement: 1})
	data := make([]byte, 4096)
	for _, c := range []struct {
		name string
		op   Op
		cmd  uringCmd
	}{
		{"read", Op{Off: 5 * 512, Data: data, Control: 1 << 14}, uringCmd{opcode: 2, dataLen: 4096, cdw: [6]uint32{5, 0, 7 | 1<<30}, timeout: commandTimeout}},
		{"write", Op{Kind: OpWrite, Off: 512, Data: data[:512]}, uringCmd{opcode: 1, dataLen: 512, cdw: [6]uint32{1, 0, 2 << 20, 0}, timeout: commandTimeout}},
		{"write, placed", Op{Kind: OpWrite, Data: data, Control: 1 << 14, Placement: 2},
			uringCmd{opcode: 1, dataLen: 4096, cdw: [6]uint32{0, 0, 7 | 1<<30 | 2<<20, 0x101 << 16}, timeout: commandTimeout}},
		{"write, placed nowhere", Op{Kind: OpWrite, Data: data, Placement: 3}, uringCmd{opcode: 1, dataLen: 4096, cdw: [6]uint32{0, 0, 7}, timeout: commandTimeout}},
		{"compare", Op{Kind: OpCompare, Data: data}, uringCmd{opcode: 5, dataLen: 4096, cdw: [6]uint32{0, 0, 7}, timeout: commandTimeout}},
		{"flush", Op{Kind: OpFlush}, uringCmd{opcode: 0, timeout: slowTimeout}},
		{"zero", Op{Kind: OpZero, Off: 1 << 20, Len: 1 << 20, Control: 1 << 9}, uringCmd{opcode: 8, cdw: [6]uint32{2048, 0, 2047 | 1<<25}, timeout: slowTimeout}},
		{"discard", Op{Kind: OpDiscard, Off: 1 << 20, Len: 1 << 20}, uringCmd{opcode: 9, dataLen: 16, cdw: [6]uint32{0, 4}, timeout: slowTimeout}},
		{"verify", Op{Kind: OpVerify, Off: 512, Len: 512}, uringCmd{opcode: 0xC, cdw: [6]uint32{1, 0, 0}, timeout: slowTimeout}},
		{"copy", Op{Kind: OpCopy, Off: 512 * 100, Data: make([]byte, 64)}, uringCmd{opcode: 0x19, dataLen: 64, cdw: [6]uint32{100, 0, 1}, timeout: slowTimeout}},
	} {
		f.commands = nil
		if err := c.op.Do(d); err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		c.cmd.nsid = 1
		got := f.commands[len(f.commands)-1].uringCmd
		if got.addr != 0 {
			got.addr = 0
		}
		if len(f.commands) != 1 || got != c.cmd {
			t.Errorf("%s: %d commands, %+v; want %+v", c.name, len(f.commands), got, c.cmd)
		}
	}
	for _, op := range []Op{{Kind: OpCopy}, {Kind: OpCopy, Data: data[:33]}, {Kind: OpCopy, Data: make([]byte, 257*32)}, {Kind: OpVerify, Off: testSize, Len: 512}} {
		if err := op.Do(d); !errors.Is(err, ErrInvalid) {
			t.Errorf("%v of %d bytes: %v", op.Kind, len(op.Data), err)
		}
	}
}

// TestSplit moves ops of all sizes through drives and kernels with all limits.
func TestSplit(t *testing.T) {
	for _, c := range []struct {
		lba, limit, scattered, size int64
		commands                    int
	}{
		{512, 128 << 10, 128 << 10, 128 << 10, 1},
		{512, 128 << 10, 128 << 10, 128<<10 + 512, 2},
		{512, 16 << 10, 512 << 10, 4 << 20, 256},
		{4096, 8 << 20, 512 << 10, 4 << 20, 8},
		{4096, 512 << 10, 512 << 10, 4<<20 - 4096, 8},
		{512, 4096, 4096, 5 * 512, 1},
	} {
		f := newFakeDrive(t, c.lba)
		f.limit, f.scattered = c.limit, c.scattered
		a := newArena(t, 8<<20)
		d := f.openFor(t, NVMeOptions{Arena: a})
		d.limit = d.drive.Scattered // as without huge pages
		mem := a.mem[:c.size]
		for i := range mem {
			mem[i] = byte(i>>9) + byte(i)*3
		}
		for _, kind := range []OpKind{OpWrite, OpCompare, OpRead} {
			f.commands = nil
			o := Op{Kind: kind, Off: 8192, Data: mem}
			if err := o.Do(d); err != nil {
				t.Fatalf("%+v: %v", c, err)
			}
			if len(f.commands) != c.commands {
				t.Errorf("%+v: %d commands", c, len(f.commands))
			}
			if !bytes.Equal(f.mem[8192:][:c.size], mem) {
				t.Fatalf("%+v: wrong bytes after %v", c, kind)
			}
			if kind == OpCompare {
				clear(mem)
			}
		}
	}
}

// TestLearnedLimit has memory that the kernel cannot map at once, though the drive could take it.
func TestLearnedLimit(t *testing.T) {
	f := newFakeDrive(t, 512)
	f.limit, f.scattered = 1<<20, 128<<10
	a := newArena(t, 8<<20)
	d := f.openFor(t, NVMeOptions{Arena: a})
	d.limit = 1 << 20 // as with huge pages
	for range 2 {
		f.commands = nil
		o := Op{Kind: OpWrite, Data: a.mem[:1<<20]}
		if err := o.Do(d); err != nil {
			t.Fatal(err)
		}
	}
	if len(f.commands) != 8 {
		t.Errorf("%d commands once the limit is known", len(f.commands))
	}
}

// TestBatches deallocates many ranges with few commands.
func TestBatches(t *testing.T) {
	for _, c := range []struct {
		nvm      nvmeof.IdentifyNVMController
		ops      int
		blocks   int64
		commands int
	}{
		{nvmeof.IdentifyNVMController{}, 300, 4, 3}, // the first goes alone: nobody was there to join it
		{nvmeof.IdentifyNVMController{DMRL: 10}, 100, 4, 11},
		{nvmeof.IdentifyNVMController{DMSL: 40}, 100, 4, 11},
		{nvmeof.IdentifyNVMController{DMRSL: 2}, 10, 4, 20},
	} {
		f := newFakeDrive(t, 512)
		f.nvm = c.nvm
		for i := range f.mem {
			f.mem[i] = 1
		}
		d := f.openFor(t, NVMeOptions{})
		ops := make([]*Op, c.ops)
		for i := range ops {
			ops[i] = &Op{Kind: OpDiscard, Off: int64(i) * 8192, Len: c.blocks * 512}
		}
		ops[0].Start(d)
		if err := ops[0].Wait(); err != nil {
			t.Fatal(err)
		}
		d.Submit(ops[1:]...)
		for _, o := range ops[1:] {
			if err := o.Wait(); err != nil {
				t.Fatal(err)
			}
		}
		if len(f.commands) > c.commands {
			t.Errorf("%+v: %d commands", c, len(f.commands))
		}
		if zero := bytes.Count(f.mem, []byte{0}); int64(zero) != int64(c.ops)*c.blocks*512 {
			t.Errorf("%+v: %d bytes deallocated", c, zero)
		}
	}
}

// TestNeighbours reads and writes pieces that are neighbours on the drive with one command, and finds the bad one.
func TestNeighbours(t *testing.T) {
	f := newFakeDrive(t, 4096)
	f.limit, f.scattered = 512<<10, 512<<10
	d := f.openFor(t, NVMeOptions{})
	a := newArena(t, 4<<20)
	ops := make([]*Op, 8)
	for i := range ops {
		at := a.mem[(7-i)*32<<10:][:32<<10]
		for j := range at {
			at[j] = byte(i + j)
		}
		ops[i] = &Op{Kind: OpWrite, Off: int64(i) * 32 << 10, Data: at}
	}
	do := func() (errs []error) {
		d.Submit(ops...)
		for _, o := range ops {
			errs = append(errs, o.Wait())
		}
		return errs
	}
	if errs := do(); errors.Join(errs...) != nil || len(f.commands) != 1 || !f.commands[0].vector || f.commands[0].dataLen != 8 {
		t.Fatalf("%v, %d commands", errs, len(f.commands))
	}
	for i, o := range ops {
		if !bytes.Equal(f.mem[o.Off:][:len(o.Data)], o.Data) {
			t.Errorf("piece %d went elsewhere", i)
		}
		o.Kind = OpRead
	}
	bad := uint64(3 * 8)
	f.answer = func(c *fakeCommand) (int32, bool) {
		slba, n := c.lbas()
		return int32(nvmeof.UnrecoveredReadError), slba <= bad && bad < slba+uint64(n)
	}
	for i, err := range do() {
		if (i == 3) != errors.Is(err, ErrMedia) || i == 3 && !errors.Is(err, nvmeof.UnrecoveredReadError) {
			t.Errorf("piece %d: %v", i, err)
		}
	}
	f.answer, f.commands = nil, nil
	ops[4].Placement = 2 // breaks the row
	ops[6].Control = 1 << 14
	if errs := do(); errors.Join(errs...) != nil || len(f.commands) != 5 {
		t.Errorf("%v, %d commands", errs, len(f.commands))
	}
}

// TestRegisteredPassthrough wants registered buffers used, small ones where the kernel cannot have large ones, and done
// without where it can have none.
func TestRegisteredPassthrough(t *testing.T) {
	if memlockLimit() < 8<<20 {
		t.Skip("memlock limit")
	}
	for _, c := range []struct {
		fixable, chunk int
		fixed          bool
	}{{0, minChunk, true}, {MediumBuf, MediumBuf, true}, {128 << 10, 128 << 10, true}, {4096, MediumBuf, false}} {
		f := newFakeDrive(t, 512)
		f.limit, f.scattered = int64(c.chunk), int64(c.chunk)
		f.fixable = c.fixable
		a := newArena(t, 8<<20)
		d := f.openFor(t, NVMeOptions{Arena: a})
		for range 2 { // the first use registers
			f.commands = nil
			o := Op{Kind: OpWrite, Data: a.mem[LargeBuf:][:4096]}
			if err := o.Do(d); err != nil {
				t.Fatal(err)
			}
			d.pinned.wait()
		}
		warned := strings.Contains(strings.Join(d.Info().Warnings, "\n"), "6.12")
		if len(f.commands) != 1 || f.commands[0].fixed != c.fixed || warned == c.fixed || d.pinned.chunk != c.chunk {
			t.Errorf("%+v: %+v, warned %v, chunks of %d", c, f.commands, warned, d.pinned.chunk)
		}
	}
}

// TestPassthroughResults plays what drive and kernel answer.
func TestPassthroughResults(t *testing.T) {
	const (
		again  = -int32(unix.EAGAIN)
		reset  = -int32(unix.EINTR)
		path   = int32(0x370)
		media  = int32(nvmeof.UnrecoveredReadError)
		refuse = -int32(unix.EINVAL)
	)
	for _, c := range []struct {
		name    string
		results []int32
		is      error
		not     error
	}{
		{"well", []int32{0}, nil, nil},
		{"crowded", []int32{again, again, 0}, nil, nil},
		{"no worker", []int32{-int32(unix.ECANCELED), 0}, nil, nil},
		{"reset", []int32{reset, path, 0}, nil, nil},
		{"not ready", []int32{int32(nvmeof.NamespaceNotReady), 0}, nil, nil},
		{"never ready", []int32{int32(nvmeof.NamespaceNotReady | nvmeof.DNR)}, nvmeof.NamespaceNotReady, ErrMedia},
		{"media", []int32{media}, ErrMedia, ErrInvalid},
		{"media status", []int32{media | int32(nvmeof.DNR)}, nvmeof.UnrecoveredReadError, nil},
		{"write fault", []int32{int32(nvmeof.WriteFault)}, ErrMedia, nil},
		{"compare", []int32{int32(nvmeof.CompareFailure)}, nvmeof.CompareFailure, ErrMedia},
		{"full", []int32{int32(nvmeof.CapacityExceeded)}, ErrNoSpace, nil},
		{"read-only drive", []int32{int32(nvmeof.WriteProtected)}, ErrMedia, nil},
		{"aborted by time", []int32{int32(nvmeof.AbortRequested)}, nvmeof.AbortRequested, ErrMedia},
		{"bad command", []int32{int32(nvmeof.InvalidField)}, ErrInvalid, nil},
		{"vendor's", []int32{0x7C1}, nvmeof.Status(0x7C1), ErrMedia},
		{"no passthrough", []int32{-int32(unix.EOPNOTSUPP)}, ErrUnavailable, nil},
		{"refused for a moment", []int32{refuse, refuse, 0}, nil, nil},
		{"pulled out", []int32{-int32(unix.ENODEV)}, ErrGone, ErrMedia},
		{"pulled out while it resets", []int32{reset, -int32(unix.ENODEV)}, ErrGone, ErrMedia},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFakeDrive(t, 512)
			d := &NVMe{node: f, drive: &Drive{Path: "/dev/null", Scattered: 4096}, limit: 4096, stopped: true}
			s := &slot{op: &Op{Data: make([]byte, 4096)}, ops: 1, n: 4096, total: 4096, now: 4096}
			for i, res := range c.results {
				if v := d.advance(s, res); (v == ended) != (i == len(c.results)-1) || v != ended && v != repeat && v != wait {
					t.Fatalf("result %d (%d): verdict %d, %v", i, res, v, s.err)
				}
			}
			if !errors.Is(s.err, c.is) || c.not != nil && errors.Is(s.err, c.not) {
				t.Errorf("ended with %v", s.err)
			}
		})
	}
	for res, want := range map[int32]error{again: unix.EAGAIN, reset: unix.EINTR, refuse: ErrInvalid, path: nvmeof.Status(0x370)} { // for ever
		d := &NVMe{node: newFakeDrive(t, 512), drive: &Drive{Scattered: 4096}, limit: 4096}
		s := &slot{op: &Op{Data: make([]byte, 4096)}, ops: 1, n: 4096, now: 4096}
		tries := 1
		for d.advance(s, res) != ended {
			tries++
		}
		if tries > maxRetries+1 || !errors.Is(s.err, want) {
			t.Errorf("%d for ever: %v after %d tries", res, s.err, tries)
		}
	}
}

// TestReset has commands wait out a reset of the controller.
func TestReset(t *testing.T) {
	f := newFakeDrive(t, 512)
	d := f.openFor(t, NVMeOptions{Depth: 2})
	left := 5
	f.answer = func(*fakeCommand) (int32, bool) {
		left--
		return -int32(unix.EINTR), left >= 0
	}
	ops := make([]*Op, 10)
	for i := range ops {
		ops[i] = &Op{Kind: OpWrite, Off: int64(i) * 700 << 10, Data: make([]byte, 300<<10)}
	}
	d.Submit(ops...)
	for _, o := range ops {
		if err := o.Wait(); err != nil {
			t.Error(err)
		}
	}
}

// TestWaiters has one waiter take its completions itself, and many leave them to the completion goroutine; nobody waits
// for ever.
func TestWaiters(t *testing.T) {
	f := newFakeDrive(t, 512)
	d := f.openFor(t, NVMeOptions{Depth: 4})
	do := func(n int, off int64) {
		o := Op{Kind: OpWrite, Off: off, Data: make([]byte, 4096)}
		for range n {
			if err := o.Do(d); err != nil {
				t.Error(err)
			}
		}
	}
	signals := func() int {
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.signals
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) { // it takes a moment until nobody listens
		before := signals()
		if do(100, 0); signals() == before {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the completion goroutine is woken for a waiter that is alone")
		}
	}
	var wg sync.WaitGroup
	for i := range int64(16) {
		wg.Go(func() { do(500, i*4096) })
	}
	wg.Wait()
}

// TestAlone: once several have waited at a time, the next ones do not believe that they are alone.
func TestAlone(t *testing.T) {
	var g engine
	if !g.alone() || !g.reaping.Load() {
		t.Error("a waiter that is alone leaves completions to others")
	}
	for name, crowd := range map[string]func(bool){
		"completions are taken": func(on bool) { g.reaping.Store(on) },
		"others wait":           func(on bool) { g.reaping.Store(false); g.parked.Store(map[bool]int32{true: 1}[on]) },
	} {
		crowd(true)
		if g.alone() {
			t.Errorf("alone, and %s", name)
		}
		crowd(false)
		for i := range companyFor {
			if g.alone() {
				t.Fatalf("alone %d waiters after %s", i, name)
			}
		}
		if !g.alone() {
			t.Errorf("not alone for long after %s", name)
		}
	}
}

// TestGone pulls the drive out under load, and puts it back.
func TestGone(t *testing.T) {
	f := newFakeDrive(t, 512)
	d := f.openFor(t, NVMeOptions{Depth: 8})
	for round := range 2 {
		ops := make([]*Op, 64)
		for i := range ops {
			ops[i] = &Op{Kind: OpKind(i % 5), Off: int64(i) * 4096, Len: 4096, Data: make([]byte, (100+i%2*200)<<10)} // those of 100 KiB are paced
		}
		calls := 0
		f.mu.Lock()
		f.answer = func(*fakeCommand) (int32, bool) {
			if calls++; calls > 40 {
				f.gone = true
			}
			return -int32(unix.EINTR), f.gone && calls < 50
		}
		f.mu.Unlock()
		d.Submit(ops...)
		failed := 0
		for _, o := range ops {
			if err := o.Wait(); errors.Is(err, ErrGone) {
				failed++
			} else if err != nil {
				t.Error(err)
			}
		}
		if failed == 0 {
			t.Error("nobody noticed")
		}
		info := d.Info()
		if !info.Gone || !strings.Contains(strings.Join(info.Warnings, ""), "serial number F1") {
			t.Errorf("%+v", info)
		}
		o := Op{Data: make([]byte, 512)}
		if err := o.Do(d); !errors.Is(err, ErrGone) || errors.Is(err, ErrMedia) {
			t.Error(err)
		}
		if round == 1 {
			return // and closes without it
		}
		f.mu.Lock()
		f.gone, f.answer = false, nil
		f.mu.Unlock()
		for end := time.Now().Add(20 * time.Second); d.Info().Gone; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("the drive is back, but not used")
			}
		}
		if err := o.Do(d); err != nil {
			t.Error(err)
		}
	}
}

func TestDescribed(t *testing.T) {
	f := newFakeDrive(t, 512)
	f.pids = []uint16{3, 4, 5}
	f.limit, f.scattered = 2<<20, 512<<10
	d, err := identify(f)
	if err != nil {
		t.Fatal(err)
	}
	want := Drive{Path: "/dev/null", Model: "fake", Serial: "F1", NSID: 1, Size: testSize, LBASize: 512, MaxTransfer: 2 << 20, Scattered: 512 << 10,
		OptimalWrite: 4096, VolatileCache: true, Placements: 3, ReclaimUnit: 96 << 20, pids: f.pids}
	want.Controller, want.Namespace, want.NVM = d.Controller, d.Namespace, d.NVM
	if !reflect.DeepEqual(*d, want) {
		t.Errorf("%+v\nwant %+v", *d, want)
	}
}

func TestUnfit(t *testing.T) {
	fit := Drive{Path: "/dev/ng9n9", Size: 1 << 20, LBASize: 4096, Placements: 2, Namespace: nvmeof.IdentifyNamespace{LBADS: 12}}
	for _, c := range []struct {
		change func(d *Drive, o *NVMeOptions)
		says   string
	}{
		{func(d *Drive, o *NVMeOptions) { d.Metadata = 8 }, "8 bytes of metadata"},
		{func(d *Drive, o *NVMeOptions) { d.LBASize = 8192 }, "LBAs of 8192"},
		{func(d *Drive, o *NVMeOptions) { d.Size = 0 }, "no capacity"},
		{func(d *Drive, o *NVMeOptions) { o.Size = 2 << 20 }, "too large"},
		{func(d *Drive, o *NVMeOptions) { o.Placement = 3 }, "no placement 3"},
		{func(d *Drive, o *NVMeOptions) { o.Poll = true }, "nvme.poll_queues"},
	} {
		d, o := fit, NVMeOptions{}
		c.change(&d, &o)
		n, err := newNVMe(newFakeDrive(t, 512), &d, o, minChunk, nil)
		if err == nil || !strings.Contains(err.Error(), c.says) || n != nil {
			t.Errorf("%s: %v", c.says, err)
		}
	}
}

func TestGenericPath(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ng0n1", "nvme0n1", "nvme12n34", "nvme0n1p2", "nvme0", "ng1", "sda", "ngxn1", "nvme0n"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("nvme12n34", filepath.Join(dir, "nvme-MODEL_SERIAL")); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"ng0n1": "ng0n1", "nvme0n1": "ng0n1", "nvme12n34": "ng12n34", "nvme-MODEL_SERIAL": "ng12n34",
		"nvme0n1p2": "partition", "nvme0": "no NVMe namespace", "ng1": "no NVMe", "sda": "no NVMe", "ngxn1": "no NVMe", "nvme0n": "no NVMe", "absent": "no such file",
	} {
		got, err := genericPath(filepath.Join(dir, name))
		if err == nil && got != filepath.Join(dir, want) || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if _, err := OpenNVMe("/dev/null", NVMeOptions{}); err == nil {
		t.Error("/dev/null is opened")
	}
	if _, err := ListDrives(); err != nil {
		t.Log(err) // as on machines where drives are for root
	}
}

// liar is a drive that says of itself whatever a fuzzer likes.
type liar struct {
	*fakeDrive
	b []byte
}

func (l *liar) command(admin bool, c uringCmd, b []byte) (uint32, error) {
	n := copy(b, l.b)
	l.b = l.b[n:]
	return 1, nil
}

// FuzzDrive believes nothing of what a drive says: the device either refuses it or does I/O in sane commands.
func FuzzDrive(f *testing.F) {
	k := nvmeof.IdentifyController{Model: "m", CTRATT: nvmeof.CTRATTFDP, MDTS: 1, ONCS: allONCS}
	n := nvmeof.IdentifyNamespace{NSZE: 1 << 20, LBADS: 12}
	b := make([]byte, 3*nvmeof.IdentifySize+8192)
	k.Encode(b)
	n.Encode(b[nvmeof.IdentifySize:])
	binary.LittleEndian.PutUint64(b[2*nvmeof.IdentifySize:], 0x0102030405060708)
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		fake := newFakeDrive(t, 512)
		d, err := identify(&liar{fake, b})
		if err != nil {
			return
		}
		_ = fmt.Sprintf("%+v", d)
		if d.Unsupported() != nil {
			return
		}
		if d.Size <= 0 || d.MaxTransfer < 4096 || d.Scattered < 4096 || d.Scattered > d.MaxTransfer || d.MaxTransfer > int64(d.LBASize)<<16 {
			t.Fatalf("%+v", d)
		}
		v := &NVMe{drive: d, lbads: d.Namespace.LBADS, limit: d.Scattered}
		for kind := range OpCopy {
			o := &Op{Kind: kind, Len: 1 << 40, Data: make([]byte, 1<<20)}
			if n := v.part(o); kind != OpFlush && (n <= 0 || n%int64(d.LBASize) != 0 || kind != OpDiscard && n>>v.lbads > maxBlocks) {
				t.Fatalf("%v: a command of %d bytes, %+v", kind, n, d)
			}
		}
	})
}
