package main

import (
	"bytes"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/uring"
)

func TestRefusal(t *testing.T) {
	for _, c := range []struct {
		name string
		d    chosenDrive
		says string // "": it is used
	}{
		{"empty", chosenDrive{listedDrive: listedDrive{Contents: contentsEmpty}}, ""},
		{"a store", chosenDrive{listedDrive: listedDrive{Contents: contentsKvof}}, ""},
		{"a file system", chosenDrive{listedDrive: listedDrive{Contents: "an XFS file system"}}, "it holds an XFS file system: to erase it name the drive with --wipe"},
		{"a file system to erase", chosenDrive{listedDrive{Contents: "an XFS file system"}, true}, ""},
		{"partitions", chosenDrive{listedDrive: listedDrive{Contents: "a GPT partition table", Used: []string{"it has 2 partitions"}}}, "--wipe"},
		{"partitions to erase", chosenDrive{listedDrive{Contents: "a GPT partition table", Used: []string{"it has 2 partitions"}}, true}, ""},
		{"mounted", chosenDrive{listedDrive{Contents: contentsEmpty, Used: []string{"/dev/x is mounted at /y"}}, true}, "mounted at /y: free it first"},
		{"metadata", chosenDrive{listedDrive{Contents: contentsEmpty, Unfit: "it has metadata"}, true}, "metadata"},
		{"unreadable", chosenDrive{listedDrive: listedDrive{Contents: "unknown: EIO"}}, "unknown"},
	} {
		if got := c.d.refusal(); (got == "") != (c.says == "") || !strings.Contains(got, c.says) {
			t.Errorf("%s: %q", c.name, got)
		}
	}
}

func TestSetupConfig(t *testing.T) {
	drive := func(path, link string) chosenDrive {
		return chosenDrive{listedDrive: listedDrive{Drive: &uring.Drive{Path: path, Link: link, Size: 1 << 40, Model: "m\n", Serial: "s"}}}
	}
	drives := []chosenDrive{drive("/dev/ng0n1", ""), drive("/dev/ng1n1", "/dev/disk/by-id/nvme-M_S")}
	o := setupOptions{listen: netip.MustParseAddr("192.0.2.1"), nqn: "nqn.2026-11.dev.kvof:test", hosts: []string{"nqn.2026-11.dev.kvof:a", "nqn.2026-11.dev.kvof:b"}, kind: "kv"}
	ports := []rdmaPort{{"mlx5_0", "eth0", netip.MustParseAddr("192.0.2.1")}, {"mlx5_1", "eth1", netip.MustParseAddr("2001:db8::1")}}
	c, err := configs.Parse("made", []byte(setupConfig(o, machine{cores: 8, memory: 64 << 30}, drives, ports)))
	if err != nil {
		t.Fatal(err)
	}
	s := c.Subsystems[0]
	if c.Memory.Arena != 4<<30 || len(c.Listeners) != 3 || c.Listeners[2].Address.String() != "[2001:db8::1]:4420" || s.NQN != o.nqn || len(s.Hosts) != 2 ||
		len(s.Namespaces) != 1 || s.Namespaces[0].Pool != c.Pools[0].Name || c.Pools[0].Device != configs.DeviceNVMe ||
		!slices.Equal(c.Pools[0].Devices, []string{"/dev/ng0n1", "/dev/disk/by-id/nvme-M_S"}) {
		t.Errorf("%+v", c)
	}
	o.hosts, o.kind = nil, "block"
	if c, err = configs.Parse("made", []byte(setupConfig(o, machine{cores: 1}, drives[:1], nil))); err != nil {
		t.Fatal(err)
	} else if n := c.Subsystems[0].Namespaces[0]; c.Memory.Arena != 64<<20 || !c.Subsystems[0].AllowAnyHost || n.Type != configs.Block || n.Device != configs.DeviceNVMe || n.Path != "/dev/ng0n1" {
		t.Errorf("%+v", c)
	}
}

func TestMachine(t *testing.T) {
	memory, huge := parseMeminfo("MemTotal:       16384000 kB\nHugePages_Total:     256\nHugePages_Free:      128\nHugepagesize:       2048 kB\nstrange\nempty:\n")
	if memory != 16384000<<10 || huge != 256<<20 {
		t.Errorf("%d, %d", memory, huge)
	}
	if _, huge := parseMeminfo("HugePages_Free: 4\nHugepagesize: 1048576 kB\n"); huge != 0 {
		t.Errorf("pages of 1 GiB are taken for %d", huge)
	}
	for m, want := range map[machine]uint64{{memory: 8 << 30}: 1 << 30, {memory: 1 << 20}: 64 << 20, {memory: 1 << 40}: 4 << 30, {memory: 8 << 30, huge: 2 << 20}: 1 << 30,
		{memory: 8 << 30, huge: 200 << 20}: 200 << 20} {
		if got := m.arena(); got != want {
			t.Errorf("%+v: %d, want %d", m, got, want)
		}
	}
}

func TestRDMAPorts(t *testing.T) {
	sys := t.TempDir()
	if _, err := rdmaPorts(sys, []string{"all"}); err == nil || !strings.Contains(err.Error(), "no RDMA device") {
		t.Error(err)
	}
	for path, text := range map[string]string{"rxe0/ports/1/state": "4: ACTIVE\n", "rxe0/ports/1/gid_attrs/ndevs/0": "lo\n", "down0/ports/1/state": "1: DOWN\n",
		"odd0/ports/1/state": "4: ACTIVE\n"} {
		path = filepath.Join(sys, "class/infiniband", path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ports, err := rdmaPorts(sys, []string{"rxe0"})
	if d := cmp.Diff([]rdmaPort{{"rxe0", "lo", netip.MustParseAddr("127.0.0.1")}}, ports, cmp.AllowUnexported(rdmaPort{}), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" || err != nil {
		t.Errorf("%v\n%s", err, d)
	}
	for name, says := range map[string]string{"none": "rdma link", "down0": "not active (1: DOWN)", "odd0": "interface", "all": "not active"} {
		if _, err := rdmaPorts(sys, []string{name}); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestDeviceReader reads what the drive holds through its ops.
func TestDeviceReader(t *testing.T) {
	d, err := uring.NewMemory(4 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	arena, err := uring.NewArena(2 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer arena.Close()
	copy(d.View(edge, 4), "kvof")
	b := make([]byte, edge)
	if n, err := (deviceReader{d, arena}).ReadAt(b, 4096); n != len(b) || err != nil || !bytes.Equal(b[edge-4096:][:4], []byte("kvof")) {
		t.Errorf("%d, %v", n, err)
	}
	if _, err := (deviceReader{d, arena}).ReadAt(b, 4<<20); err == nil {
		t.Error("what is beyond the end is read")
	}
}
