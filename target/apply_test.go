package target_test

import (
	"testing"
	"time"

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
	tg, _ := newTarget(t, 8<<20, serving(configs.Namespace{NSID: 1, Type: configs.KeyValue, Device: configs.DeviceFile, Path: t.TempDir() + "/kv", Size: 64 << 20, MaxValue: 4 << 20}))
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
			tg, arena := newTarget(t, 8<<20, serving(configs.Namespace{NSID: 1, Type: configs.KeyValue, Device: device, Path: t.TempDir() + "/kv", Size: 64 << 20, MaxValue: 4 << 20}))
			idle := arena.Stats()
			admin, io := ready(t, tg, testNQN)
			for range 20 {
				io.start(store("key", 4<<20), 4<<20, nil, false, &command{hold: true})
			}
			admin.end()
			await(t, io.gone, "end of the I/O queue")
			if s := arena.Stats(); s.Large.Used != idle.Large.Used || s.Small.Used != idle.Small.Used {
				t.Errorf("in use: %+v, before %+v", s, idle)
			}
			if n := len(tg.Status().Controllers); n > 0 {
				t.Errorf("%d controllers are left", n)
			}
		})
	}
}
