package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvof/kvof/uring"
)

func TestContentsOf(t *testing.T) {
	const size = 64 << 20
	put := func(off int, text string) []byte {
		b := make([]byte, size)
		copy(b[off:], text)
		return b
	}
	for name, b := range map[string][]byte{
		contentsEmpty: make([]byte, size), contentsKvof: put(8, "kvofstor"), "an ext2, ext3 or ext4 file system": put(0x438, "\x53\xef"),
		"an XFS file system": put(0, "XFSB"), "a Btrfs file system": put(0x10040, "_BHRfS_M"), "a LUKS volume": put(0, "LUKS\xba\xbe"),
		"an LVM physical volume": put(0x218, "LVM2 001"), "swap space": put(4086, "SWAPSPACE2"), "a GPT partition table": put(4096, "EFI PART"),
		"an MBR partition table": put(0x1fe, "\x55\xaa"),
	} {
		if got, err := contentsOf(bytes.NewReader(b), size); err != nil || got != name {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	for _, off := range []int{0, edge - 1, (size / (probes + 1) * 30) &^ 4095, size - edge, size - 1} {
		if got, err := contentsOf(bytes.NewReader(put(off, "x")), size); err != nil || !strings.HasPrefix(got, "data") {
			t.Errorf("a byte at %d: %q, %v", off, got, err)
		}
	}
	if _, err := contentsOf(bytes.NewReader(make([]byte, 4096)), size); err == nil {
		t.Error("a drive that cannot be read has contents")
	}
	if got, err := contentsOf(bytes.NewReader(make([]byte, 8192)), 8192); err != nil || got != contentsEmpty {
		t.Errorf("a small one: %q, %v", got, err)
	}
}

func TestUsedBy(t *testing.T) {
	root := t.TempDir()
	write := func(path, text string) {
		t.Helper()
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("sys/block/nvme0n1/dev", "259:0\n")
	write("sys/block/nvme0n1/nvme0n1p1/dev", "259:1\n")
	write("sys/block/nvme0n1/nvme0n1p2/dev", "259:2\n")
	write("sys/block/nvme0n1/nvme0n1p2/holders/dm-0", "")
	write("sys/block/nvme1n1/dev", "259:3\n")
	write("sys/block/nvme2n1/dev", "259:4\n")
	write("sys/block/nvme3n1/dev", "259:5\n")
	write("proc/self/mountinfo", "30 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n36 30 259:1 / /boot rw shared:1 - vfat /dev/nvme0n1p1 rw\n40 30 0:50 / /data rw - btrfs /dev/nvme1n1 rw\n")
	write("proc/swaps", "Filename Type Size Used Priority\n/dev/nvme2n1 partition 1 0 -2\n")
	for block, want := range map[string][]string{
		"/dev/nvme0n1": {"/dev/nvme0n1p1 is mounted at /boot", "/dev/nvme0n1p2 is part of dm-0", "it has 2 partitions"},
		"/dev/nvme1n1": {"/dev/nvme1n1 is mounted at /data"}, "/dev/nvme2n1": {"/dev/nvme2n1 is swap space"}, "/dev/nvme3n1": nil, "": nil,
	} {
		if d := cmp.Diff(want, usedBy(filepath.Join(root, "proc"), filepath.Join(root, "sys"), &uring.Drive{Block: block})); d != "" {
			t.Errorf("%s: %s", block, d)
		}
	}
}

func TestPrintDrives(t *testing.T) {
	drive := func(path string) *uring.Drive {
		return &uring.Drive{Path: path, Size: 1 << 40, LBASize: 4096, MaxTransfer: 512 << 10, VolatileCache: true, Placements: 8, Model: "M\x1b", Serial: "S"}
	}
	list := []listedDrive{
		{Drive: drive("/dev/ng0n1"), Contents: contentsEmpty},
		{Drive: drive("/dev/ng1n1"), Contents: "an XFS file system", Used: []string{"/dev/nvme1n1 is mounted at /x"}},
		{Drive: drive("/dev/ng2n1"), Unfit: "no"},
	}
	const want = `DRIVE       SIZE     LBA   COMMAND  CACHE     PLACEMENTS  MODEL  SERIAL  CONTENTS
/dev/ng0n1  1.0 TiB  4096  512 KiB  volatile  8           M\x1b  S       empty
/dev/ng1n1  1.0 TiB  4096  512 KiB  volatile  8           M\x1b  S       in use: /dev/nvme1n1 is mounted at /x
/dev/ng2n1  1.0 TiB  4096  512 KiB  volatile  8           M\x1b  S       unfit: no
`
	var b bytes.Buffer
	if err := printDrives(&b, list, false); err != nil || b.String() != want {
		t.Errorf("%v\n%s", err, b.String())
	}
	b.Reset()
	var got []struct {
		Path, Model string
		Used        []string
		LBASize     int `json:"lba_size"`
	}
	if err := printDrives(&b, list, true); err != nil || json.Unmarshal(b.Bytes(), &got) != nil || len(got) != 3 || got[1].LBASize != 4096 || len(got[1].Used) != 1 {
		t.Errorf("%v\n%s", err, b.String())
	}
}
