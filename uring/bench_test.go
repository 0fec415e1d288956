package uring

import (
	"fmt"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// benchSize is what benchmarks read and write, in bytes.
const benchSize = 256 << 20

func cpuTime() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// benchOps keeps depth ops in flight from one goroutine. An op of more than
// LargeBuf is submitted as pieces of that size, as a store does.
func benchOps(b *testing.B, d Device, a *Arena, kind OpKind, size, depth int) {
	piece := min(size, LargeBuf)
	per := size / piece
	sets := make([][]*Op, depth)
	for i := range sets {
		for range per {
			buf := a.Get(piece)
			b.Cleanup(buf.Put)
			sets[i] = append(sets[i], &Op{Kind: kind, Data: buf.Data})
		}
	}
	var off int64
	submit := func(set []*Op) {
		if off += int64(size); off >= benchSize {
			off = 0
		}
		for i, o := range set {
			o.Off = off + int64(i*piece)
		}
		d.Submit(set...)
	}
	wait := func(set []*Op) {
		for _, o := range set {
			if err := o.Wait(); err != nil {
				b.Fatal(err)
			}
		}
	}
	for range 2 { // channels made, memory touched and registered
		for _, set := range sets {
			submit(set)
		}
		for _, set := range sets {
			wait(set)
		}
		time.Sleep(100 * time.Millisecond)
	}
	b.SetBytes(int64(size))
	b.ReportAllocs()
	cpu := cpuTime()
	b.ResetTimer()
	for i := range b.N {
		set := sets[i%depth]
		if i >= depth {
			wait(set)
		}
		submit(set)
	}
	for i := range min(b.N, depth) {
		wait(sets[i])
	}
	b.StopTimer()
	b.ReportMetric(float64(cpuTime()-cpu)/1e3/float64(b.N), "cpu-µs/op")
}

func BenchmarkDevice(b *testing.B) {
	a := newArena(b, 64<<20)
	mem, err := NewMemory(benchSize)
	if err != nil {
		b.Fatal(err)
	}
	source := a
	file := func(name string, a *Arena) Device {
		d, err := OpenFile(filepath.Join(b.TempDir(), name), FileOptions{Size: benchSize, Arena: a})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { d.Close() })
		buf := source.Get(LargeBuf)
		defer buf.Put()
		for off := int64(0); off < benchSize; off += LargeBuf { // holes would read too fast
			o := Op{Kind: OpWrite, Off: off, Data: buf.Data}
			if err := o.Do(d); err != nil {
				b.Fatal(err)
			}
		}
		return d
	}
	devs := []struct {
		name string
		d    Device
	}{{"memory", mem}, {"file", file("registered", a)}, {"unregistered", file("plain", nil)}}
	b.Cleanup(func() { mem.Close() })
	for _, dev := range devs {
		for _, kind := range []OpKind{OpRead, OpWrite} {
			for _, c := range []struct{ size, depth int }{{4 << 10, 1}, {4 << 10, 16}, {2 << 20, 1}, {2 << 20, 4}} {
				b.Run(fmt.Sprintf("%s/%v/%dKiB/depth%d", dev.name, kind, c.size>>10, c.depth), func(b *testing.B) {
					benchOps(b, dev.d, a, kind, c.size, c.depth)
				})
			}
		}
	}
}
