package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/host"
	"github.com/kvof/kvof/target"
	"github.com/kvof/kvof/target/tcp"
	"github.com/kvof/kvof/uring"
)

// path is a whole path in this process: host, loopback, target, device. What is counted is both sides' together.
type path struct {
	kv    *host.KV
	block *host.Block
}

const pathDepth = 4

func newPath(t testing.TB, device string) path {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	where := func(name string) string {
		if device == "memory" {
			return ""
		}
		return fmt.Sprintf("path = %q", filepath.Join(dir, name))
	}
	cfg, err := configs.Parse("path", fmt.Appendf(nil, `
[[listener]]
transport = "tcp"
address = "127.0.0.1:4420"
[[subsystem]]
nqn = %[1]q
allow_any_host = true
[[subsystem.namespace]]
nsid = 1
type = "kv"
device = %[2]q
size = "256MiB"
%[3]s
[[subsystem.namespace]]
nsid = 2
type = "block"
device = %[2]q
size = "64MiB"
lba_size = 4096
%[4]s
`, kvNQN, device, where("kv.img"), where("block.img")))
	check(err)
	arena, err := uring.NewArena(64 * mib)
	check(err)
	t.Cleanup(func() { check(arena.Close()) })
	log := slog.New(slog.DiscardHandler)
	tg := target.New(arena, cfg.Limits, log)
	t.Cleanup(func() { check(tg.Close()) })
	check(tg.Apply(cfg))
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	l := tcp.Listen(tg, ln, false, log)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		check(l.Close(ctx))
	})
	c, err := host.Connect(t.Context(), host.Options{Addr: l.Addr().String(), SubNQN: kvNQN, QueueDepth: pathDepth})
	check(err)
	t.Cleanup(func() { c.Close() })
	var p path
	p.kv, err = c.KV(t.Context(), 1)
	check(err)
	p.block, err = c.Block(t.Context(), 2)
	check(err)
	return p
}

// pathWork is what is measured: one operation of a size by worker w.
var pathWork = []struct {
	name string
	size int
	do   func(ctx context.Context, p path, w int, key, buf []byte) error
}{
	{"store/2MiB", 2 * mib, func(ctx context.Context, p path, w int, key, buf []byte) error {
		return p.kv.Store(ctx, key, buf, host.StoreAlways)
	}},
	{"retrieve/2MiB", 2 * mib, func(ctx context.Context, p path, w int, key, buf []byte) error {
		_, err := p.kv.Retrieve(ctx, key, buf)
		return err
	}},
	{"write/2MiB", 2 * mib, func(ctx context.Context, p path, w int, key, buf []byte) error {
		return p.block.Write(ctx, uint64(w*512), buf)
	}},
	{"read/2MiB", 2 * mib, func(ctx context.Context, p path, w int, key, buf []byte) error {
		return p.block.Read(ctx, uint64(w*512), buf)
	}},
	{"read/4KiB", 4 * kib, func(ctx context.Context, p path, w int, key, buf []byte) error {
		return p.block.Read(ctx, uint64(w), buf)
	}},
}

var pathDevices = []string{"memory", "file"}

// pathWorker returns a worker's key and buffer, with its value stored.
func pathWorker(t testing.TB, p path, w, size int) (key, buf []byte) {
	key, buf = fmt.Appendf(nil, "bench-%d", w), make([]byte, size)
	if err := p.kv.Store(t.Context(), key, buf, host.StoreAlways); err != nil {
		t.Fatal(err)
	}
	return key, buf
}

func BenchmarkPath(b *testing.B) {
	for _, device := range pathDevices {
		for _, work := range pathWork {
			b.Run(device+"/"+work.name, func(b *testing.B) {
				p := newPath(b, device)
				var keys, bufs [pathDepth][]byte
				for w := range pathDepth {
					keys[w], bufs[w] = pathWorker(b, p, w, work.size)
				}
				b.SetBytes(int64(work.size))
				b.ReportAllocs()
				var left atomic.Int64
				left.Store(int64(b.N))
				var wg sync.WaitGroup
				b.ResetTimer()
				for w := range pathDepth {
					wg.Go(func() {
						for left.Add(-1) >= 0 {
							if err := work.do(b.Context(), p, w, keys[w], bufs[w]); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				wg.Wait()
				b.StopTimer()
			})
		}
	}
}

// TestPathAllocates holds the promise that an I/O allocates nothing, on either side.
func TestPathAllocates(t *testing.T) {
	for _, device := range pathDevices {
		p := newPath(t, device)
		for _, work := range pathWork {
			key, buf := pathWorker(t, p, 0, work.size)
			once := func() {
				if err := work.do(t.Context(), p, 0, key, buf); err != nil {
					t.Error(err)
				}
			}
			for range 20 { // what is made once and kept
				once()
			}
			allocs := testing.AllocsPerRun(200, once)
			if allocs >= 1 { // the average, rounded down: keep alives, new segments and the like do not count
				t.Errorf("%s on %s: %v allocations for each operation", work.name, device, allocs)
			}
		}
	}
}
