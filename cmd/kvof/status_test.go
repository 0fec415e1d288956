package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/management"
	"github.com/kvof/kvof/target"
	"github.com/kvof/kvof/uring"
)

type statusSource struct{ ready error }

func (statusSource) Pin(string, uint32, []byte, bool) error { return nil }
func (s statusSource) Ready() error                         { return s.ready }
func (statusSource) Alive(context.Context) error            { return nil }
func (statusSource) Health(context.Context) error           { return nil }
func (statusSource) Status() target.Status {
	hist := target.HistogramSnapshot{Count: 1500, Sum: 1500 * 3 * time.Millisecond, Bounds: []time.Duration{2 * time.Millisecond, 4 * time.Millisecond}, Counts: []uint64{0, 1500, 0}}
	return target.Status{
		Uptime: 3723,
		Ports:  []target.PortStatus{{ID: 1, Transport: "tcp", Address: "127.0.0.1:4420"}, {ID: 2, Transport: "tcp", Address: "127.0.0.1:8009", Discovery: true}},
		Kernel: uring.Features{Kernel: "6.12.1", IOURing: true, MemLock: 8 << 20},
		Arena:  uring.ArenaStats{Size: 256 << 20, Small: uring.ClassStats{Free: 2047, Used: 1}, Medium: uring.ClassStats{Free: 254, Used: 2}, Large: uring.ClassStats{Free: 160, Waits: 2}},
		Subsystems: []target.SubsystemStatus{{NQN: "nqn.2026-11.dev.kvof:embedded", AllowAnyHost: true, Namespaces: []target.NamespaceStatus{
			{NSID: 1, Type: configs.KeyValue, State: target.NamespaceServed, Used: 4 << 30, Capacity: 16 << 30, Store: &target.StoreStatus{Keys: 2048, Pool: "fast", Eviction: "clock", Hits: 1200, Misses: 30, Written: 5 << 30,
				WriteAmplification: 1.25, Evictions: map[string]uint64{"capacity": 10, "lost": 2}, EvictionAge: target.EvictionAges{Sum: 36000}, IndexBytes: 1 << 20, Corrupt: 1},
				Device:   uring.DeviceInfo{Kind: "file", Path: "kv.img", Direct: true, Registered: 1, Warnings: []string{"the drive is slow: buy another"}},
				Commands: []target.CommandStats{{Name: "store", Errors: 1, Latency: hist}, {Name: "retrieve"}}},
			{NSID: 2, Type: configs.Block, State: target.NamespaceServed, Capacity: 4 << 30, ReadOnly: true, Device: uring.DeviceInfo{Kind: "memory"}},
			{NSID: 3, Type: configs.Block, State: target.NamespaceFailed, Error: "namespace 3: no such drive", Device: uring.DeviceInfo{Kind: "block", Path: "/dev/sdz"}},
			{NSID: 4, Type: configs.Block, State: target.NamespaceServed, Capacity: 4 << 30, Device: uring.DeviceInfo{Kind: "nvme", Path: "/dev/ng0n1", Direct: true,
				Registered: 1, Features: []string{"passthrough", "nodrop", "registered_file", "iopoll"}, Placements: 8, Gone: true}},
		}}},
		Pools: []target.PoolStatus{{Name: "fast", Capacity: 30 << 30, Devices: []target.PoolDeviceStatus{
			{Device: uring.DeviceInfo{Kind: "file", Path: "a.img", Size: 16 << 30}, Live: 4 << 30, Segments: map[string]int{"free": 90, "open": 1, "sealed": 33, "full": 0}},
			{Device: uring.DeviceInfo{Kind: "file", Path: "b.img", Size: 16 << 30}, Member: 1, Lost: true}}}},
		Controllers: []target.ControllerStatus{{CNTLID: 1, HostNQN: "nqn.2014-08.org.nvmexpress:uuid:h\x1b[2J", Subsystem: "nqn.2026-11.dev.kvof:embedded",
			KATO: 5000, Since: time.Now(), Queues: []target.QueueStatus{{Peer: "192.0.2.1:40000"}, {QID: 1, InFlight: 4, Peer: "192.0.2.1:40001"}}}},
	}
}

func serveStatus(t *testing.T, src management.Source) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "kvof.sock")
	m, err := management.Start(configs.Management{Socket: socket}, src, "v1.2.3", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	m.Serving()
	return socket
}

func TestStatusPage(t *testing.T) {
	const want = `kvof v1.2.3: ready, up 1h2m3s
Linux 6.12.1, io_uring, memlock limit 8.0 MiB
arena of 256 MiB in normal pages: 1 of 2048 small, 2 of 256 medium and 0 of 160 large buffers in use, 2 waits

PORT  TRANSPORT  ADDRESS         SERVES
1     tcp        127.0.0.1:4420  all subsystems
2     tcp        127.0.0.1:8009  discovery

Subsystem nqn.2026-11.dev.kvof:embedded (any host)
NSID  TYPE   STATE               USED     CAPACITY  FULL            KEYS   DEVICE
1     kv     served              4.0 GiB  16 GiB    ###....... 25%  2,048  pool fast
2     block  served, read-only            4.0 GiB                          memory
3     block  failed                                                        block /dev/sdz
4     block  served, drive gone           4.0 GiB                          nvme /dev/ng0n1, iopoll, registered file, 8 placement handles, registered buffers
  ! namespace 1: the drive is slow: buy another
  ! namespace 3: no such drive

NSID  POOL  EVICTION  HITS   MISSES  EVICTED  MEAN AGE  WRITTEN  AMPLIFICATION  INDEX    CORRUPT
1     fast  clock     1,200  30      12       1h0m0s    5.0 GiB  1.25           1.0 MiB  1

NSID  COMMAND  COUNT  ERRORS  MEAN  P50  P99
1     store    1,500  1       3ms   3ms  4ms

Pool fast (30 GiB)
DEVICE  STATE   SIZE    LIVE     SEGMENTS
a.img   in use  16 GiB  4.0 GiB  90 free, 1 open, 33 sealed
b.img   LOST    16 GiB  0 B      

CNTLID  HOST                                      PEER             QUEUES  IN FLIGHT  KATO  CONNECTED  SUBSYSTEM
1       nqn.2014-08.org.nvmexpress:uuid:h\x1b[2J  192.0.2.1:40000  2       4          5s    0s         nqn.2026-11.dev.kvof:embedded
`
	status, stdout, stderr := runForTest(t, "status", "--socket", serveStatus(t, statusSource{}))
	if status != exitOK || stderr != "" {
		t.Errorf("exit status %d, stderr %s", status, stderr)
	}
	if d := cmp.Diff(want, stdout); d != "" {
		t.Error(d)
	}
	status, stdout, _ = runForTest(t, "status", "--socket", serveStatus(t, statusSource{errors.New("the target is draining")}))
	if first, _, _ := strings.Cut(stdout, "\n"); status != exitOK || first != "kvof v1.2.3: not ready: the target is draining, up 1h2m3s" {
		t.Errorf("exit status %d: %s", status, first)
	}
}

func TestStatusJSON(t *testing.T) {
	status, stdout, _ := runForTest(t, "status", "--json", "--socket", serveStatus(t, statusSource{}))
	var got struct {
		Version     string
		Controllers []struct{ CNTLID int }
	}
	if err := json.Unmarshal([]byte(stdout), &got); err != nil || status != exitOK || got.Version != "v1.2.3" || len(got.Controllers) != 1 {
		t.Errorf("exit status %d, %v, %+v", status, err, got)
	}
}

func TestStatusWithoutServer(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "kvof.sock")
	status, _, stderr := runForTest(t, "status", "--socket", socket)
	want := fmt.Sprintf("kvof: no server at %s: start one (kvof serve), or name its socket with --socket\n", socket)
	if status != exitFailure || stderr != want {
		t.Errorf("exit status %d, %s", status, stderr)
	}
}

func TestBar(t *testing.T) {
	for _, test := range []struct {
		used, capacity int64
		want           string
	}{{0, 100, ".......... 0%"}, {1, 1000, "#......... 0%"}, {50, 100, "#####..... 50%"}, {999, 1000, "########## 99%"}, {100, 100, "########## 100%"}, {0, 0, ".......... 0%"}} {
		if got := bar(test.used, test.capacity); got != test.want {
			t.Errorf("%d of %d: %s", test.used, test.capacity, got)
		}
	}
}
