package target_test

import (
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/nvmeof"
)

const testNQN = "nqn.2026-11.dev.kvof:test"

// serving is a configuration of one subsystem for any host.
func serving(ns ...configs.Namespace) *configs.Config {
	return &configs.Config{Subsystems: []configs.Subsystem{{NQN: testNQN, Serial: "1", AllowAnyHost: true, Namespaces: ns}}}
}

func store(key string, size uint32) (c nvmeof.Command) {
	c.SetHeader(nvmeof.OpStore, 7, 1)
	c.SetKey([]byte(key))
	c.SetKV(size, 0)
	return c
}

// A namespace goes when its last command is over; hosts get no new command in meanwhile.
func TestRemoveBusyNamespace(t *testing.T) {
	tg, _ := newTarget(t, 16<<20, serving(configs.Namespace{NSID: 1, Type: configs.KeyValue, Device: configs.DeviceFile, Path: t.TempDir() + "/kv", Size: 64 << 20, MaxValue: 4 << 20}))
	_, io := ready(t, tg, testNQN)
	x := io.start(store("key", 100000), 100000, make([]byte, 100000), false, &command{hold: true})
	for pulled := false; !pulled; time.Sleep(time.Millisecond) {
		io.mu.Lock()
		pulled = x.pull
		io.mu.Unlock()
	}
	applied := make(chan error, 1)
	go func() { applied <- tg.Apply(serving()) }()
	for io.do(store("other", 0), 0, nil, false).cqe.Status().Code() != nvmeof.InvalidNamespace {
		time.Sleep(time.Millisecond)
	}
	select {
	case err := <-applied:
		t.Fatalf("the namespace went with a command in flight: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	io.release(1)
	await(t, x.done, "completion")
	if st := x.cqe.Status(); st != nvmeof.Success {
		t.Error(st)
	}
	if err := <-applied; err != nil {
		t.Error(err)
	}
}

// A command whose data never comes ends with its connection, and gives back what it held.
func TestEndWhilePulling(t *testing.T) {
	for _, device := range []configs.DeviceKind{configs.DeviceMemory, configs.DeviceFile} {
		t.Run(string(device), func(t *testing.T) {
			tg, arena := newTarget(t, 16<<20, serving(configs.Namespace{NSID: 1, Type: configs.KeyValue, Device: device, Path: t.TempDir() + "/kv", Size: 64 << 20, MaxValue: 4 << 20}))
			idle := arena.Stats()
			admin, io := ready(t, tg, testNQN)
			for range 20 {
				io.start(store("key", 4<<20), 4<<20, nil, false, &command{hold: true})
			}
			admin.end()
			await(t, io.gone, "end of the I/O queue")
			if s := arena.Stats(); s.Used() != idle.Used() {
				t.Errorf("in use: %+v, before %+v", s, idle)
			}
			if n := len(tg.Status().Controllers); n > 0 {
				t.Errorf("%d controllers are left", n)
			}
		})
	}
}

// Two subsystems share a pool, which gets a second device under way: values stay, and there is more room.
func TestPoolGrows(t *testing.T) {
	dir := t.TempDir()
	config := func(devices ...string) *configs.Config {
		c := serving(configs.Namespace{NSID: 1, Type: configs.KeyValue, Pool: "p", UUID: uuid.UUID{1}, MaxValue: 1 << 20, Eviction: configs.EvictNever})
		other := c.Subsystems[0]
		other.NQN += "2"
		other.Namespaces = []configs.Namespace{{NSID: 1, Type: configs.KeyValue, Pool: "p", UUID: uuid.UUID{2}, MaxValue: 1 << 20, Share: 4 << 20}}
		c.Subsystems = append(c.Subsystems, other)
		c.Pools = []configs.Pool{{Name: "p", Device: configs.DeviceFile, Size: 32 << 20}}
		for _, d := range devices {
			c.Pools[0].Devices = append(c.Pools[0].Devices, dir+d)
		}
		return c
	}
	tg, _ := newTarget(t, 16<<20, config("/a"))
	_, io := ready(t, tg, testNQN)
	if st := io.do(store("key", 100000), 100000, make([]byte, 100000), false).cqe.Status(); st != nvmeof.Success {
		t.Fatal(st)
	}
	before := tg.Status().Pools[0]
	if err := tg.Apply(config("/a", "/b")); err != nil {
		t.Fatal(err)
	}
	after := tg.Status().Pools[0]
	if len(before.Devices) != 1 || len(after.Devices) != 2 || after.Capacity < 2*before.Capacity || after.Devices[0].Live < 100000 {
		t.Errorf("before %+v, after %+v", before, after)
	}
	var exist nvmeof.Command
	exist.SetHeader(nvmeof.OpExist, 8, 1)
	exist.SetKey([]byte("key"))
	if st := io.do(exist, 0, nil, false).cqe.Status(); st != nvmeof.Success {
		t.Errorf("the value after that: %v", st)
	}
	if err := tg.Pin(testNQN, 1, []byte("key"), true); err != nil {
		t.Error(err)
	}
	if err := tg.Pin(testNQN+"2", 1, []byte("key"), true); err == nil {
		t.Error("a key of another tenant was pinned")
	}
	if err := tg.Apply(&configs.Config{}); err != nil || len(tg.Status().Pools) != 0 {
		t.Errorf("without the subsystems: %v, %+v", err, tg.Status().Pools)
	}
}
