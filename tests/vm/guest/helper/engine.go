package main

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"syscall"
	"time"
	"unsafe"

	"github.com/kvof/kvof/uring"
)

// engine keeps DEPTH operations of SIZE bytes in flight for SECONDS, at random places, on an NVMe drive or, as the
// baseline, its block device, from one goroutine and with registered buffers. It prints operations and MB a second,
// microseconds of CPU an operation, and the median and 99th percentile of latency in microseconds.
func engine(args []string) error {
	if len(args) < 5 {
		return fmt.Errorf("engine takes 5 arguments and options, not %d", len(args))
	}
	path, write := args[0], args[1] == "write"
	size, err1 := strconv.Atoi(args[2])
	depth, err2 := strconv.Atoi(args[3])
	seconds, err3 := strconv.ParseFloat(args[4], 64)
	if err1 != nil || err2 != nil || err3 != nil {
		return fmt.Errorf("numbers: %q", args[2:5])
	}
	arena, err := uring.NewArena(max(16<<20, 2*size*depth))
	if err != nil {
		return err
	}
	var d uring.Device
	if slices.Contains(args[5:], "block") {
		d, err = uring.OpenFile(path, uring.FileOptions{Arena: arena})
	} else {
		d, err = uring.OpenNVMe(path, uring.NVMeOptions{Arena: arena, Poll: slices.Contains(args[5:], "poll")})
	}
	if err != nil {
		return err
	}
	defer d.Close()

	// Large operations are pieces of a large buffer each, as in a store, or one of memory that lies together.
	piece := min(size, uring.LargeBuf)
	whole := slices.Contains(args[5:], "whole")
	kind := uring.OpRead
	if write {
		kind = uring.OpWrite
	}
	ops := make([][]*uring.Op, depth)
	starts := make([]time.Time, depth)
	for i := range ops {
		var first []byte
		for at := 0; at < size; at += piece {
			b := arena.Get(piece).Data
			if at == 0 {
				first = b
			}
			if !whole {
				ops[i] = append(ops[i], &uring.Op{Kind: kind, Data: b})
			} else if uintptr(unsafe.Pointer(&b[0]))-uintptr(unsafe.Pointer(&first[0])) != uintptr(at) {
				return fmt.Errorf("the arena's buffers do not lie together")
			}
		}
		if whole {
			ops[i] = []*uring.Op{{Kind: kind, Data: unsafe.Slice(&first[0], size)}}
		}
	}
	blocks := int(d.Size()) / size
	start := func(i int) {
		off := int64(rand.IntN(blocks)) * int64(size)
		for _, o := range ops[i] {
			o.Off = off
			off += int64(len(o.Data))
		}
		starts[i] = time.Now()
		d.Submit(ops[i]...)
	}
	wait := func(i int) (time.Duration, error) {
		for _, o := range ops[i] {
			if err := o.Wait(); err != nil {
				return 0, err
			}
		}
		return time.Since(starts[i]), nil
	}
	run := func(d time.Duration) (latency []time.Duration, err error) {
		for i := range ops {
			start(i)
		}
		for end := time.Now().Add(d); time.Now().Before(end); {
			for i := range ops {
				l, err := wait(i)
				if err != nil {
					return nil, err
				}
				latency = append(latency, l)
				start(i)
			}
		}
		for i := range ops {
			if _, err := wait(i); err != nil {
				return nil, err
			}
		}
		return latency, nil
	}
	if _, err := run(500 * time.Millisecond); err != nil { // memory touched and registered
		return err
	}
	before, began := cpu(), time.Now()
	latency, err := run(time.Duration(seconds * float64(time.Second)))
	if err != nil {
		return err
	}
	took, n := time.Since(began), float64(len(latency)+depth)
	slices.Sort(latency)
	at := func(q float64) int64 { return latency[int(q*float64(len(latency)-1))].Microseconds() }
	fmt.Printf("%.0f %.1f %.1f %d %d\n", n/took.Seconds(), n*float64(size)/1e6/took.Seconds(), float64(cpu()-before)/1e3/n, at(0.5), at(0.99))
	return nil
}

// cpu is the processor time of this process so far.
func cpu() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
