package main

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"github.com/google/uuid"

	"github.com/kvof/kvof/kvlayer"
	"github.com/kvof/kvof/uring"
)

// engine keeps DEPTH operations of SIZE bytes in flight for SECONDS, at random places, on an NVMe drive or, as the
// baseline, its block device or a file, from one goroutine and with registered buffers. It prints operations and MB a
// second, microseconds of CPU an operation, and the median and 99th percentile of latency in microseconds. With "store"
// they are values in a store on the device, read by as many goroutines and verified.
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
	if slices.Contains(args[5:], "store") {
		return values(d, arena, size, depth, time.Duration(seconds*float64(time.Second)))
	}

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
	// Of one goroutine the operations are waited for in turn; of several each has its own.
	lanes := 1
	if slices.Contains(args[5:], "each") {
		lanes = depth
	}
	lane := func(first int, end time.Time) (latency []time.Duration, err error) {
		for i := first; i < depth; i += lanes {
			start(i)
		}
		for running := true; running; {
			running = time.Now().Before(end)
			for i := first; i < depth; i += lanes {
				l, err := wait(i)
				if err != nil {
					return nil, err
				}
				latency = append(latency, l)
				if running {
					start(i)
				}
			}
		}
		return latency, nil
	}
	run := func(d time.Duration) ([]time.Duration, error) {
		latencies, errs := make([][]time.Duration, lanes), make([]error, lanes)
		end := time.Now().Add(d)
		var wg sync.WaitGroup
		for i := range lanes {
			wg.Go(func() { latencies[i], errs[i] = lane(i, end) })
		}
		wg.Wait()
		return slices.Concat(latencies...), errors.Join(errs...)
	}
	if _, err := run(500 * time.Millisecond); err != nil { // memory touched and registered
		return err
	}
	before, began := cpu(), time.Now()
	latency, err := run(time.Duration(seconds * float64(time.Second)))
	if err != nil {
		return err
	}
	report(latency, size, time.Since(began), cpu()-before)
	return nil
}

// report prints the figures of operations of size bytes.
func report(latency []time.Duration, size int, took, cpu time.Duration) {
	slices.Sort(latency)
	n := float64(len(latency))
	at := func(q float64) int64 { return latency[int(q*(n-1))].Microseconds() }
	fmt.Printf("%.0f %.1f %.1f %d %d\n", n/took.Seconds(), n*float64(size)/1e6/took.Seconds(), float64(cpu)/1e3/n, at(0.5), at(0.99))
}

// values reads values of a new store on d, at random, from depth goroutines.
func values(d uring.Device, arena *uring.Arena, size, depth int, during time.Duration) (err error) {
	zero := uring.Op{Kind: uring.OpZero, Len: 1 << 20} // a device that is empty is formatted
	if err := zero.Do(d); err != nil {
		return err
	}
	p, err := kvlayer.OpenPool([]uring.Device{d}, arena, kvlayer.PoolOptions{})
	if err != nil {
		return err
	}
	defer p.Close()
	s, err := p.Store(uuid.Nil, kvlayer.Options{})
	if err != nil {
		return err
	}
	defer s.Close()
	keys := make([]kvlayer.Key, 64)
	var w kvlayer.Writer
	for i := range keys {
		if keys[i], err = kvlayer.MakeKey([]byte{1, byte(i)}); err != nil {
			return err
		}
		if err := s.Create(&w, keys[i], int64(size), kvlayer.StoreAlways); err != nil {
			return err
		}
		for b := w.Buffer(size); b != nil; b = w.Buffer(size) {
			w.Filled(len(b))
		}
		if err := w.Commit(); err != nil {
			return err
		}
	}
	run := func(during time.Duration) ([]time.Duration, error) {
		latencies, errs := make([][]time.Duration, depth), make([]error, depth)
		end := time.Now().Add(during)
		var wg sync.WaitGroup
		for i := range depth {
			wg.Go(func() {
				var r kvlayer.Reader
				for start := time.Now(); start.Before(end); {
					if errs[i] = retrieve(s, &r, keys[rand.IntN(len(keys))], size); errs[i] != nil {
						return
					}
					now := time.Now()
					latencies[i] = append(latencies[i], now.Sub(start))
					start = now
				}
			})
		}
		wg.Wait()
		return slices.Concat(latencies...), errors.Join(errs...)
	}
	if _, err := run(during / 4); err != nil {
		return err
	}
	before, began := cpu(), time.Now()
	latency, err := run(during)
	if err == nil {
		report(latency, size, time.Since(began), cpu()-before)
	}
	return err
}

// retrieve reads a value to its end.
func retrieve(s *kvlayer.Store, r *kvlayer.Reader, k kvlayer.Key, size int) error {
	err := s.Open(r, k, int64(size))
	defer r.Close()
	for err == nil {
		var b uring.Buf
		if b, err = r.Next(); err == nil {
			b.Put()
		}
	}
	if err == io.EOF {
		err = nil
	}
	return err
}

// cpu is the processor time of this process so far.
func cpu() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
