package uring

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testSize = 8 << 20

func newArena(t testing.TB, size int) *Arena {
	t.Helper()
	a, err := NewArena(size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	return a
}

// testDrives are NVMe namespaces whose contents tests may destroy, from $KVOF_TEST_DRIVES: /dev/ng0n1,/dev/ng1n1
func testDrives() []string {
	return strings.FieldsFunc(os.Getenv("KVOF_TEST_DRIVES"), func(r rune) bool { return r == ',' })
}

// devices calls f with each kind of device there is on this machine.
func devices(t *testing.T, f func(t *testing.T, d Device, a *Arena)) {
	open := map[string]func(t *testing.T, a *Arena) (Device, error){
		"memory": func(t *testing.T, a *Arena) (Device, error) { return NewMemory(testSize) },
		"direct": func(t *testing.T, a *Arena) (Device, error) {
			return OpenFile(filepath.Join(t.TempDir(), "new", "store"), FileOptions{Size: testSize, Arena: a})
		},
		"buffered": func(t *testing.T, a *Arena) (Device, error) {
			dir, err := os.MkdirTemp("/dev/shm", "uring")
			if err != nil {
				t.Skip(err)
			}
			t.Cleanup(func() { os.RemoveAll(dir) })
			return OpenFile(filepath.Join(dir, "store"), FileOptions{Size: testSize})
		},
		"nvme512": func(t *testing.T, a *Arena) (Device, error) {
			return newFakeDrive(t, 512).open(t, NVMeOptions{Arena: a}), nil
		},
		"nvme4096": func(t *testing.T, a *Arena) (Device, error) {
			return newFakeDrive(t, 4096).open(t, NVMeOptions{Depth: 4}), nil
		},
		"block": func(t *testing.T, a *Arena) (Device, error) {
			return OpenFile(loopDevice(t, testSize), FileOptions{Arena: a})
		},
	}
	for _, path := range testDrives() {
		open["drive "+path] = func(t *testing.T, a *Arena) (Device, error) {
			return OpenNVMe(path, NVMeOptions{Size: testSize, Arena: a})
		}
	}
	for name, open := range open {
		t.Run(name, func(t *testing.T) {
			a := newArena(t, 16<<20)
			d, err := open(t, a)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := d.Close(); err != nil {
					t.Error(err)
				}
			})
			f(t, d, a)
		})
	}
}

// TestModel does random ops and compares with a byte slice that gets the same.
func TestModel(t *testing.T) {
	devices(t, func(t *testing.T, d Device, a *Arena) {
		name := d.Info().Path
		model := make([]byte, testSize)
		unit := max(512, int64(d.BlockSize()))
		ops := make([]Op, 8)
		rapid.Check(t, func(t *rapid.T) {
			var batch []*Op
			var want [][]byte
			// Each op of a batch keeps to its own part, as order within one is open.
			const part = testSize / 8
			for i := range ops {
				o := &ops[i]
				o.Kind = rapid.SampledFrom([]OpKind{OpRead, OpRead, OpWrite, OpWrite, OpFlush, OpDiscard, OpZero}).Draw(t, "kind")
				o.Off = int64(i)*part + unit*rapid.Int64Range(0, part/unit-1).Draw(t, "off")
				room := min(LargeBuf, int64(i+1)*part-o.Off)
				o.Len = unit * rapid.Int64Range(0, room/unit).Draw(t, "len")
				at := model[o.Off : o.Off+o.Len]
				o.Data = nil
				switch o.Kind {
				case OpRead, OpWrite:
					b := a.Get(int(o.Len))
					defer b.Put()
					o.Data = b.Data
					if o.Kind == OpWrite {
						seed := rapid.Byte().Draw(t, "seed")
						for j := range b.Data {
							b.Data[j] = seed + byte(j>>9) + byte(j)
						}
						copy(at, b.Data)
					} else {
						for j := range b.Data {
							b.Data[j] = 0xEE
						}
					}
				case OpDiscard, OpZero:
					clear(at) // files, loop devices and our drive discard to zeroes
					if strings.HasPrefix(name, "/dev/ng") {
						o.Kind = OpZero // others may not
					}
				}
				batch, want = append(batch, o), append(want, at)
			}
			d.Submit(batch...)
			for i, o := range batch {
				if err := o.Wait(); err != nil {
					t.Fatal(err)
				}
				if o.Kind == OpRead && !bytes.Equal(o.Data, want[i]) {
					t.Fatalf("read of %d bytes at %d differs from what was written", len(o.Data), o.Off)
				}
			}
		})
		t.Logf("%+v", d.Info())
	})
}

func TestOlderThan(t *testing.T) {
	for release, want := range map[string]bool{
		"6.1.0-50-amd64": true, "5.15.0": true, "6.11.9": true, "6.12.1": false, "6.12": false, "7.3.4+deb13-amd64": false, "unknown": false,
	} {
		if olderThan(release, 6, 12) != want {
			t.Errorf("olderThan(%q, 6, 12) is not %v", release, want)
		}
	}
}

// counted counts Submits.
type counted struct {
	Device
	submits int
}

func (d *counted) Submit(ops ...*Op) {
	d.submits++
	d.Device.Submit(ops...)
}

// TestBatch sends ops for two devices in runs: each goes in one Submit, at most 16 together.
func TestBatch(t *testing.T) {
	devs := make([]*counted, 2)
	for i := range devs {
		m, err := NewMemory(4096)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		devs[i] = &counted{Device: m}
	}
	var b Batch
	ops := make([]Op, 40)
	for i := range ops {
		ops[i] = Op{Kind: OpWrite, Off: int64(i), Data: []byte{byte(i)}}
		b.Add(devs[i/20], &ops[i])
	}
	b.Submit()
	b.Submit()
	for i := range ops {
		if err := ops[i].Wait(); err != nil || devs[i/20].View(int64(i), 1)[0] != byte(i) {
			t.Fatalf("op %d: %v", i, err)
		}
	}
	for i, d := range devs {
		if d.submits != 2 {
			t.Errorf("device %d had %d Submits", i, d.submits)
		}
	}
	o := &ops[0]
	if n := testing.AllocsPerRun(100, func() { b.Add(devs[0].Device, o); b.Submit(); _ = o.Wait() }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestThen has ops end by a call, beside others that are waited for.
func TestThen(t *testing.T) {
	devices(t, func(t *testing.T, d Device, a *Arena) {
		const ops = 200
		ended := make(chan error, ops)
		all := make([]Op, ops)
		b := a.Get(SmallBuf)
		defer b.Put()
		for i := range all {
			o := &all[i]
			o.Kind, o.Off, o.Data, o.Then = OpRead, int64(i)*4096, b.Data[:4096], func(err error, _ *Batch) { ended <- err }
			if i%10 == 0 {
				o.Off = testSize // outside
			}
			o.Start(d)
			if i%7 == 0 {
				var w Op
				w.Kind = OpFlush
				if err := w.Do(d); err != nil {
					t.Error(err)
				}
			}
		}
		bad := 0
		for range all {
			if err := <-ended; errors.Is(err, ErrInvalid) {
				bad++
			} else if err != nil {
				t.Error(err)
			}
		}
		if bad != ops/10 {
			t.Errorf("%d of %d bad ops refused", bad, ops/10)
		}
		for i := range 50 { // one at a time, and again
			all[i].Off = 0
			all[i].Start(d)
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
	})
}
