package uring

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func openFile(t testing.TB, o FileOptions) *file {
	t.Helper()
	if o.Size == 0 {
		o.Size = testSize
	}
	d, err := OpenFile(filepath.Join(t.TempDir(), "store"), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d.(*file)
}

// TestRefused gives every device what it must refuse, and the borders it must not.
func TestRefused(t *testing.T) {
	devices(t, func(t *testing.T, d Device, a *Arena) {
		b := a.Get(LargeBuf)
		defer b.Put()
		bs, size := int64(d.BlockSize()), d.Size()
		page := b.Data[:4096]
		tests := []struct {
			name string
			op   Op
			ok   bool
		}{
			{"last block", Op{Off: size - 4096, Data: page}, true},
			{"nothing at the end", Op{Off: size}, true},
			{"flush, fields left over", Op{Kind: OpFlush, Off: -7, Len: -7, Data: b.Data[1:3]}, true},
			{"discard, data left over", Op{Kind: OpDiscard, Len: 4096, Data: b.Data[1:3]}, true},
			{"zero of all", Op{Kind: OpZero, Len: size}, true},
			{"discard of all", Op{Kind: OpDiscard, Len: size}, true},
			{"past the end", Op{Off: size, Data: page}, false},
			{"across the end", Op{Kind: OpWrite, Off: size - bs, Data: b.Data[:8192]}, false},
			{"before the start", Op{Off: -4096, Data: page}, false},
			{"far out", Op{Off: 1<<63 - 4096, Data: page}, false},
			{"zero of a negative length", Op{Kind: OpZero, Len: -4096}, false},
			{"discard past the end", Op{Kind: OpDiscard, Off: 4096, Len: size}, false},
			{"discard of too much", Op{Kind: OpDiscard, Off: 4096, Len: 1<<63 - 1}, false},
			{"unknown", Op{Kind: OpCopy + 1}, false},
			{"odd offset", Op{Off: 1, Data: page}, bs == 1},
			{"odd length", Op{Kind: OpWrite, Data: page[:100]}, bs == 1},
			{"odd memory", Op{Data: b.Data[1:4097]}, bs == 1},
			{"odd discard", Op{Kind: OpDiscard, Off: 0, Len: 100}, bs == 1},
		}
		for i := range tests {
			c := &tests[i]
			if err := c.op.Do(d); (err == nil) != c.ok || err != nil && !errors.Is(err, ErrInvalid) {
				t.Errorf("%s: %v", c.name, err)
			}
		}
	})
}

func TestView(t *testing.T) {
	devices(t, func(t *testing.T, d Device, a *Arena) {
		isMemory := d.Info().Kind == "memory"
		for _, c := range []struct {
			off, n int64
			ok     bool
		}{{0, 10, true}, {testSize - 1, 1, true}, {testSize, 0, true}, {testSize, 1, false}, {-1, 1, false}, {1, -1, false}, {5, 1<<63 - 1, false}} {
			if v := d.View(c.off, c.n); (v != nil) != (c.ok && isMemory) || v != nil && (int64(len(v)) != c.n || int64(cap(v)) != c.n) {
				t.Errorf("View(%d, %d) has %d bytes", c.off, c.n, len(v))
			}
		}
		if !isMemory {
			return
		}
		copy(d.View(8190, 5), "hello")
		got := make([]byte, 5)
		o := Op{Off: 8190, Data: got}
		if err := o.Do(d); err != nil || string(got) != "hello" {
			t.Errorf("read %q after a write in place: %v", got, err)
		}
	})
}

// TestOverflow submits far more than the ring holds, at once and from many
// goroutines, and wants every op back once with the right bytes.
func TestOverflow(t *testing.T) {
	for _, depth := range []int{1, 4, 0} {
		t.Run(fmt.Sprint(depth), func(t *testing.T) {
			a := newArena(t, 16<<20)
			d := openFile(t, FileOptions{Depth: depth, Arena: a})
			const goroutines, each = 8, 64 // 512 ops of 4 KiB
			var wg sync.WaitGroup
			for g := range goroutines {
				wg.Go(func() {
					b := a.Get(LargeBuf)
					defer b.Put()
					for round := range byte(3) {
						ops := make([]*Op, each)
						for i := range ops {
							at := b.Data[i*4096:][:4096]
							for j := range at {
								at[j] = byte(g)<<3 ^ byte(i) ^ round
							}
							ops[i] = &Op{Kind: OpWrite, Off: int64(g*each+i) * 4096, Data: at}
						}
						d.Submit(ops...)
						for _, o := range ops {
							if err := o.Wait(); err != nil {
								t.Error(err)
							}
							o.Kind = OpRead
							clear(o.Data)
						}
						d.Submit(ops...)
						for i, o := range ops {
							if err := o.Wait(); err != nil {
								t.Error(err)
							}
							if want := bytes.Repeat([]byte{byte(g)<<3 ^ byte(i) ^ round}, 4096); !bytes.Equal(o.Data, want) {
								t.Errorf("goroutine %d, op %d, round %d: wrong bytes", g, i, round)
							}
						}
					}
				})
			}
			wg.Wait()
		})
	}
}

// TestCloseInFlight closes devices under their users: every op is answered,
// with success or ErrClosed.
func TestCloseInFlight(t *testing.T) {
	devices(t, func(t *testing.T, d Device, a *Arena) {
		b := a.Get(LargeBuf)
		defer b.Put()
		var wg, running sync.WaitGroup
		running.Add(4)
		for range 4 {
			wg.Go(func() {
				ops := make([]*Op, 100)
				for i := range ops {
					ops[i] = &Op{Kind: OpKind(i % 3), Off: int64(i) * 4096, Data: b.Data[:4096]}
				}
				for first := true; ; first = false {
					d.Submit(ops...)
					var last error
					for _, o := range ops {
						if err := o.Wait(); err != nil && !errors.Is(err, ErrClosed) {
							t.Error(err)
						} else {
							last = err
						}
					}
					if first {
						running.Done()
					}
					if last != nil {
						return
					}
				}
			})
		}
		running.Wait()
		for range 2 {
			wg.Go(func() {
				if err := d.Close(); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if d.View(0, 1) != nil {
			t.Error("View of a closed device")
		}
	})
}

// TestWaitAfterClose waits as one who looked just before the op ended, and was late for Close: the ring is no more.
func TestWaitAfterClose(t *testing.T) {
	d := openFile(t, FileOptions{})
	o := Op{Kind: OpFlush}
	o.Start(d)
	if err := d.Close(); err != nil { // which waits for the op
		t.Fatal(err)
	}
	d.park(&o)
}

func TestSubmitTwicePanics(t *testing.T) {
	d := openFile(t, FileOptions{})
	o := Op{Kind: OpFlush}
	o.Start(d)
	mustPanic(t, "second Submit", func() { o.Start(d) })
	if err := o.Wait(); err != nil {
		t.Error(err)
	}
}

func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	used := openFile(t, FileOptions{})
	full := filepath.Join(dir, "empty")
	if err := os.WriteFile(full, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, path string
		size       int64
		is         error
		says       string
	}{
		{"in use", used.path, 0, ErrInUse, "another server"},
		{"missing", filepath.Join(dir, "no"), 0, os.ErrNotExist, "give a size"},
		{"empty", full, 0, nil, "give a size"},
		{"a folder", dir, 1 << 20, nil, "neither"},
		{"not a disk", "/dev/null", 1 << 20, nil, "neither"},
		{"negative", full, -1, nil, "negative"},
		{"too large", full, 1<<63 - 4096, nil, "smaller size"},
		{"under a file", filepath.Join(full, "x"), 1 << 20, nil, "not a directory"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, err := OpenFile(c.path, FileOptions{Size: c.size})
			if err == nil {
				d.Close()
				t.Fatal("opened")
			}
			if c.is != nil && !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestReopen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	data := bytes.Repeat([]byte("kvof"), 1024)
	a := newArena(t, 2<<20)
	b := a.Get(len(data))
	defer b.Put()
	for i, size := range []int64{1<<20 + 1, 0, 4 << 20, 1 << 20} {
		d, err := OpenFile(path, FileOptions{Size: size, Arena: a})
		if err != nil {
			t.Fatal(err)
		}
		want := []int64{1<<20 + 512, 1<<20 + 512, 4 << 20, 4 << 20}[i]
		if d.(*file).align == 4096 && i < 2 {
			want = 1<<20 + 4096
		}
		if d.Size() != want {
			t.Errorf("opened with %d: size %d, want %d", size, d.Size(), want)
		}
		o := Op{Off: 8192, Data: b.Data}
		if i == 0 {
			copy(b.Data, data)
			o.Kind = OpWrite
		} else {
			clear(b.Data)
		}
		if err := o.Do(d); err != nil || !bytes.Equal(b.Data, data) {
			t.Errorf("data lost: %v", err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestCutShort takes the file away under the device: an error, never zeroes.
func TestCutShort(t *testing.T) {
	a := newArena(t, 2<<20)
	d := openFile(t, FileOptions{Arena: a})
	if err := os.Truncate(d.path, 8192+100); err != nil {
		t.Fatal(err)
	}
	b := a.Get(LargeBuf)
	defer b.Put()
	for _, off := range []int64{0, 8192, 1 << 20} {
		o := Op{Off: off, Data: b.Data}
		if err := o.Do(d); !errors.Is(err, ErrMedia) {
			t.Errorf("read at %d of a file cut to 8292 bytes: %v", off, err)
		}
	}
}

func TestNoSpace(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting is for root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Skip(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH) // the ring may let go of the file a moment later
	d, err := OpenFile(filepath.Join(dir, "store"), FileOptions{Size: 8 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if w := d.Info().Warnings; len(w) == 0 || !strings.Contains(w[0], "free space") {
		t.Errorf("no warning of a file larger than its file system: %q", w)
	}
	a := newArena(t, 4<<20)
	var failed error
	for off := int64(0); off < 2<<20 && failed == nil; off += LargeBuf {
		b := a.Get(LargeBuf)
		o := Op{Kind: OpWrite, Off: off, Data: b.Data}
		failed = o.Do(d)
		b.Put()
	}
	if !errors.Is(failed, ErrNoSpace) || !errors.Is(failed, unix.ENOSPC) {
		t.Errorf("2 MiB into 1 MiB: %v", failed)
	}
	o := Op{Kind: OpDiscard, Len: d.Size()}
	if err := o.Do(d); err != nil {
		t.Error(err)
	}
	b := a.Get(LargeBuf)
	defer b.Put()
	o = Op{Kind: OpWrite, Data: b.Data}
	if err := o.Do(d); err != nil {
		t.Errorf("after a discard: %v", err)
	}
}

// TestAdvance plays results the kernel seldom gives.
func TestAdvance(t *testing.T) {
	const eintr, eagain, canceled = -int32(unix.EINTR), -int32(unix.EAGAIN), -int32(unix.ECANCELED)
	for _, c := range []struct {
		name    string
		kind    OpKind
		results []int32 // all but the last leave the op unfinished
		is      error
	}{
		{"whole", OpRead, []int32{8192}, nil},
		{"in pieces", OpWrite, []int32{4096, 512, 3584}, nil},
		{"half a block too much", OpRead, []int32{4096 + 100, 4096}, nil},
		{"interrupted", OpRead, []int32{eintr, 4096, eagain, eintr, 4096}, nil},
		{"no worker at first", OpFlush, []int32{canceled, canceled, 0}, nil},
		{"nothing moves at first", OpWrite, []int32{0, 100, 8192}, nil},
		{"fails half way", OpWrite, []int32{4096, -int32(unix.EIO)}, ErrMedia},
		{"no space", OpWrite, []int32{-int32(unix.ENOSPC)}, ErrNoSpace},
		{"data lost", OpRead, []int32{-int32(unix.ENODATA)}, ErrMedia},
		{"flush", OpFlush, []int32{0}, nil},
		{"flush fails", OpFlush, []int32{eintr, -int32(unix.EIO)}, ErrMedia},
		{"zero", OpZero, []int32{0}, nil},
		{"zero by hand", OpZero, []int32{-int32(unix.EOPNOTSUPP), 4096, 4096}, nil},
		{"zero by hand fails", OpZero, []int32{-int32(unix.EOPNOTSUPP), 4096, -int32(unix.EREMOTEIO)}, unix.EREMOTEIO},
		{"discard not known here", OpDiscard, []int32{-int32(unix.EOPNOTSUPP)}, nil},
		{"discard fails", OpDiscard, []int32{-int32(unix.EIO)}, ErrMedia},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := &file{engine: engine{path: "it", align: 512}}
			s := &slot{op: &Op{Kind: c.kind, Len: 8192, Data: make([]byte, 8192)}, n: 8192}
			for i, res := range c.results {
				if v := d.advance(s, res); (v == ended) != (i == len(c.results)-1) || v != ended && v != repeat {
					t.Fatalf("result %d (%d): verdict %d, at %d, %v", i, res, v, s.moved, s.err)
				}
			}
			if !errors.Is(s.err, c.is) {
				t.Errorf("ended with %v", s.err)
			}
		})
	}
	for _, res := range []int32{0, eagain, canceled} { // a device that never moves ends in an error
		d := &file{engine: engine{path: "it", align: 512}}
		s := &slot{op: &Op{Data: make([]byte, 512)}, n: 512}
		tries := 0
		for ; d.advance(s, res) == repeat; tries++ {
		}
		if s.err == nil || tries != maxRetries {
			t.Errorf("%d forever: %v after %d tries", res, s.err, tries)
		}
	}
}

// TestSignals: signals, as Go's scheduler sends them to threads that run, keep the kernel from starting a worker for what it does not
// do at once: no op fails by that.
func TestSignals(t *testing.T) {
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			threads, _ := os.ReadDir("/proc/self/task")
			for range 100 {
				for _, thread := range threads {
					id, _ := strconv.Atoi(thread.Name())
					_ = unix.Tgkill(os.Getpid(), id, unix.SIGURG) // a thread that has gone is none
				}
			}
			select {
			case <-stop:
				return
			default:
			}
		}
	})
	defer wg.Wait()
	defer close(stop)
	path := filepath.Join(t.TempDir(), "file")
	for range 1000 { // the first op of a ring wants a new worker
		d, err := OpenFile(path, FileOptions{Size: 1 << 20})
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range []OpKind{OpFlush, OpZero, OpDiscard} {
			o := Op{Kind: k, Len: 4096}
			if err := o.Do(d); err != nil {
				t.Errorf("%v: %v", k, err)
			}
		}
		d.Close()
	}
}

// TestSlowPaths does on real devices what only other kernels need.
func TestSlowPaths(t *testing.T) {
	devices(t, func(t *testing.T, d Device, a *Arena) {
		f, ok := d.(*file)
		if !ok {
			t.Skip("memory has none")
		}
		b := a.Get(LargeBuf)
		defer b.Put()
		paths := map[string]func(o *Op){
			"zero by writing": func(o *Op) {
				o.Kind, o.manual = OpZero, true
				f.mu.Lock()
				f.pending.push(o)
				f.kick()
				f.mu.Unlock()
			},
		}
		if f.block {
			paths["discard by ioctl"] = func(o *Op) {
				o.Kind = OpDiscard
				f.mu.Lock()
				f.elsewhere++
				f.mu.Unlock()
				go f.discard(o)
			}
		}
		for name, path := range paths {
			for i := range b.Data {
				b.Data[i] = 0xAA
			}
			const off, n = 3 * 4096, 600 << 10 // more than one piece of zeroes
			for at := int64(0); at < testSize; at += LargeBuf {
				w := Op{Kind: OpWrite, Off: at, Data: b.Data}
				if err := w.Do(d); err != nil {
					t.Fatal(err)
				}
			}
			o := Op{Off: off, Len: n}
			o.Begin()
			o.engine = &f.engine
			path(&o)
			if err := o.Wait(); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			for at := int64(0); at < 1<<20; at += 4096 {
				r := Op{Off: at, Data: b.Data[:4096]}
				if err := r.Do(d); err != nil {
					t.Fatal(err)
				}
				want := byte(0xAA)
				if at >= off && at < off+n {
					want = 0
				}
				if !bytes.Equal(r.Data, bytes.Repeat([]byte{want}, 4096)) {
					t.Errorf("%s: block at %d is not all %#x", name, at, want)
				}
			}
		}
	})
}

// TestRegistered wants buffers registered as they are used, and only those.
func TestRegistered(t *testing.T) {
	a := newArena(t, 64<<20)
	d := openFile(t, FileOptions{Arena: a})
	if memlockLimit() < 64<<20 {
		t.Skip("memlock limit")
	}
	b := a.Get(LargeBuf)
	defer b.Put()
	for i := range b.Data {
		b.Data[i] = byte(i)
	}
	for deadline := time.Now().Add(5 * time.Second); d.Info().Registered == 0; {
		o := Op{Kind: OpWrite, Data: b.Data}
		if err := o.Do(d); err != nil {
			t.Fatal(err)
		}
		if time.Now().After(deadline) {
			t.Fatalf("nothing registered: %+v", d.Info())
		}
	}
	if got := d.Info().Registered; got != minChunk {
		t.Errorf("one buffer used, %d bytes registered", got)
	}
	if _, ok := d.pinned.find(&d.engine, b.Data); !ok {
		t.Error("a registered buffer goes unregistered")
	}
	for i, mem := range [][]byte{make([]byte, 4096), a.mem[minChunk-4096:][:8192]} {
		if _, ok := d.pinned.find(&d.engine, mem); ok {
			t.Errorf("memory %d is not registered, but taken so", i)
		}
	}
	got := a.Get(LargeBuf)
	defer got.Put()
	o := Op{Data: got.Data}
	if err := o.Do(d); err != nil || !bytes.Equal(got.Data, b.Data) {
		t.Errorf("READ_FIXED after WRITE_FIXED: %v", err)
	}
}

func TestOpAllocs(t *testing.T) {
	devices(t, func(t *testing.T, d Device, a *Arena) {
		if n, ok := d.(*NVMe); ok {
			if _, ok := n.ring.(*fakeDrive); ok {
				t.Skip("the pretended drive allocates")
			}
		}
		b := a.Get(4096)
		defer b.Put()
		var o Op
		o.Data = b.Data
		if err := o.Do(d); err != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond) // registration
		if n := testing.AllocsPerRun(100, func() {
			if err := o.Do(d); err != nil {
				t.Fatal(err)
			}
		}); n != 0 {
			t.Errorf("%v allocations per read", n)
		}
	})
}

// TestBlockInUse holds a block device as a mounted file system does.
func TestBlockInUse(t *testing.T) {
	path := loopDevice(t, testSize)
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	d, err := OpenFile(path, FileOptions{})
	if err == nil {
		d.Close()
	}
	if !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "mounted") {
		t.Errorf("%v", err)
	}
}

// TestCloseElsewhere closes while an op runs outside the ring.
func TestCloseElsewhere(t *testing.T) {
	d := openFile(t, FileOptions{})
	d.mu.Lock()
	d.elsewhere++
	d.mu.Unlock()
	closed := make(chan error)
	go func() { closed <- d.Close() }()
	select {
	case <-closed:
		t.Error("Close did not wait")
	case <-time.After(20 * time.Millisecond):
	}
	d.mu.Lock()
	d.elsewhere--
	d.mu.Unlock()
	d.ring.wake()
	if err := <-closed; err != nil {
		t.Error(err)
	}
}

// TestMemoryGivesBack wants a discard, from odd borders too, to free memory.
func TestMemoryGivesBack(t *testing.T) {
	const size = 64 << 20
	d, err := NewMemory(size)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	resident := func() (pages int64) {
		var all int64
		s, err := os.ReadFile("/proc/self/statm")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Sscan(string(s), &all, &pages); err != nil {
			t.Fatal(err)
		}
		return pages * int64(os.Getpagesize())
	}
	v := d.View(0, size)
	for i := range v {
		v[i] = 1
	}
	full := resident()
	o := Op{Kind: OpDiscard, Off: 100, Len: size - 300}
	if err := o.Do(d); err != nil {
		t.Fatal(err)
	}
	if freed := full - resident(); freed < size/2 {
		t.Errorf("discarding %d bytes freed %d", o.Len, freed)
	}
	if bytes.IndexByte(v, 0) != 100 || bytes.Count(v, []byte{1}) != 300 {
		t.Error("other bytes changed")
	}
}
