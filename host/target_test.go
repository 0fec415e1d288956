package host_test

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/host"
	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/rdma"
	"github.com/kvof/kvof/rdma/rdmatest"
	"github.com/kvof/kvof/target/targettest"
)

// serveBoth starts our own target on both transports, with a Key Value and a block namespace in memory, and returns how to
// reach it over each.
func serveBoth(t *testing.T, caps rdma.Caps) (far *rdmatest.Device, ways map[string]host.Options) {
	s := targettest.Serve(t, targettest.Options{RDMA: true, HostCaps: caps})
	s.Apply(configs.Namespace{NSID: 1, Type: configs.KeyValue, Device: configs.DeviceMemory, Size: 512 << 20, MaxValue: configs.MaxValue},
		configs.Namespace{NSID: 2, Type: configs.Block, Device: configs.DeviceMemory, Size: 16 << 20, LBASize: 4096})
	return s.Host, map[string]host.Options{
		"tcp":  {SubNQN: s.NQN, Addr: s.Addr},
		"rdma": {SubNQN: s.NQN, Addr: s.RDMA, Transport: host.RDMA, Verbs: s.Verbs},
	}
}

// TestOwnTarget has both ends of ours talk over both transports: whole values in one command, also larger than one descriptor
// describes, registered or not; what one transport stores the other reads.
func TestOwnTarget(t *testing.T) {
	small := rdmatest.DefaultCaps()
	small.MaxMRSize = 8 << 20
	for name, caps := range map[string]rdma.Caps{"default": rdmatest.DefaultCaps(), "small": small} {
		t.Run(name, func(t *testing.T) {
			far, ways := serveBoth(t, caps)
			ctx := t.Context()
			all := map[string]*host.KV{}
			for way, o := range ways {
				entries, err := host.Discover(ctx, o.Addr, host.DiscoverOptions{Transport: o.Transport, Verbs: o.Verbs})
				if err != nil || len(entries) < 2 {
					t.Fatal(way, entries, err)
				}
				c, err := host.Connect(ctx, o)
				if err != nil {
					t.Fatal(way, err)
				}
				t.Cleanup(func() { c.Close() })
				if all[way], err = c.KV(ctx, 1); err != nil {
					t.Fatal(way, err)
				}
				b, err := c.Block(ctx, 2)
				if err != nil {
					t.Fatal(way, err)
				}
				for _, n := range []int{1, 2, 300} {
					v, got := fill(n*4096, 7), make([]byte, n*4096)
					if err := errors.Join(b.Write(ctx, 5, v), b.Read(ctx, 5, got)); err != nil || !bytes.Equal(v, got) {
						t.Fatal(way, n, err)
					}
				}
			}
			buf := make([]byte, 64<<20)
			sizes := []int{17<<20 + 5}
			if name == "default" {
				sizes = []int{0, 1, 4096, 8192, 8193, 100000, 2 << 20, 16<<20 - 1, 16 << 20, 17<<20 + 5, 64 << 20}
			}
			for i, n := range sizes {
				for from, kv := range all {
					key := fmt.Appendf(nil, "%s %d", from, n)
					v := fill(n, byte(i))
					if err := kv.Store(ctx, key, v, host.StoreAlways); err != nil {
						t.Fatal(from, n, err)
					}
					for to, kv := range all {
						clear(buf)
						if got, err := kv.Retrieve(ctx, key, buf[:n]); got != n || err != nil || !bytes.Equal(buf[:n], v) {
							t.Fatal(from, to, n, got, err)
						}
					}
					if err := kv.Delete(ctx, key); err != nil {
						t.Fatal(err)
					}
				}
			}
			if m := all["rdma"].MaxValue(); m != 64<<20 {
				t.Error(m)
			}
			if far.Registrations == 0 {
				t.Error("the host's device was not used")
			}
		})
	}
}

// TestOwnTargetRanges stores values in one command and reads them by paths that carry less, while they are replaced too.
func TestOwnTargetRanges(t *testing.T) {
	_, ways := serveBoth(t, rdmatest.DefaultCaps())
	for way, o := range ways {
		c, err := host.Connect(t.Context(), o)
		if err != nil {
			t.Fatal(way, err)
		}
		t.Cleanup(func() { c.Close() })
		kv, err := c.KV(t.Context(), 1)
		if err != nil {
			t.Fatal(way, err)
		}
		key := []byte("key of " + way)
		for i, n := range []int{1<<20 + 1, 5<<20 + 7, 16 << 20} {
			want := fill(n, byte(i))
			if err := kv.Store(t.Context(), key, want, host.StoreAlways); err != nil {
				t.Fatal(way, n, err)
			}
			for _, limit := range []uint64{1 << 20, 1020 << 10, 300_000} {
				var got bytes.Buffer
				if size, err := kv.Narrow(limit).Values(0).RetrieveTo(t.Context(), key, &got); size != int64(n) || err != nil || !bytes.Equal(got.Bytes(), want) {
					t.Fatalf("%s, %d bytes by %d: %d, %v", way, n, limit, size, err)
				}
			}
		}
		values := [][]byte{fill(3<<20, 1), fill(3<<20, 2)}
		if err := kv.Store(t.Context(), key, values[1], host.StoreAlways); err != nil {
			t.Fatal(way, err)
		}
		var writer sync.WaitGroup
		stop := make(chan bool)
		writer.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				if err := kv.Store(t.Context(), key, values[i%2], host.StoreAlways); err != nil {
					t.Error(way, err)
					return
				}
			}
		})
		buf, whole := make([]byte, 3<<20), 0
		for range 20 {
			switch _, err := kv.Narrow(256<<10).Values(0).Retrieve(t.Context(), key, buf); {
			case errors.Is(err, host.ErrReplaced):
			case err != nil || !bytes.Equal(buf, values[0]) && !bytes.Equal(buf, values[1]):
				t.Error(way, "neither value", err)
			default:
				whole++
			}
		}
		close(stop)
		writer.Wait()
		t.Logf("%s: %d of 20 values read while they were replaced", way, whole)
	}
}

func fill(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range min(n, 4099) { // no multiple of a page or a piece
		b[i] = byte(i*i>>3) + seed
	}
	for have := 4099; have < n; have *= 2 {
		copy(b[have:], b[:have])
	}
	return b
}

// TestOwnTargetParallel keeps both transports busy with values of all sizes.
func TestOwnTargetParallel(t *testing.T) {
	_, ways := serveBoth(t, rdmatest.DefaultCaps())
	var wg sync.WaitGroup
	for way, o := range ways {
		o.IOQueues, o.QueueDepth = 2, 8
		c, err := host.Connect(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		kv, err := c.KV(t.Context(), 1)
		if err != nil {
			t.Fatal(err)
		}
		for g := range 16 {
			wg.Go(func() {
				key, buf := fmt.Appendf(nil, "%s %d", way, g), make([]byte, 1<<20)
				if err := c.Register(buf); err != nil {
					t.Error(err)
				}
				for i := range 10 {
					v := fill(1+(g*7919+i*104729)%len(buf), byte(g+i))
					if err := kv.Store(t.Context(), key, v, host.StoreAlways); err != nil {
						t.Error(way, err)
						return
					}
					n, err := kv.Retrieve(t.Context(), key, buf)
					if err != nil || !bytes.Equal(buf[:n], v) {
						t.Error(way, "value differs", n, err)
						return
					}
				}
				if err := kv.Delete(t.Context(), key); err != nil && !errors.Is(err, nvmeof.KeyDoesNotExist) {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
}
