package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/kvof/kvof/uring"
)

// usedBy says what of the running system uses a drive: its mounts, swap, partitions, and the devices that are made of
// it, each one line for a person. proc and sys are the mounts of those file systems.
func usedBy(proc, sys string, d *uring.Drive) (uses []string) {
	if d.Block == "" {
		return nil
	}
	name := filepath.Base(d.Block)
	parts, _ := filepath.Glob(filepath.Join(sys, "block", name, name+"p*"))
	dirs := append([]string{filepath.Join(sys, "block", name)}, parts...)
	mounts, _ := os.ReadFile(filepath.Join(proc, "self/mountinfo"))
	swaps, _ := os.ReadFile(filepath.Join(proc, "swaps"))
	for _, dir := range dirs {
		dev := "/dev/" + filepath.Base(dir)
		number, _ := os.ReadFile(filepath.Join(dir, "dev"))
		for line := range strings.Lines(string(mounts)) {
			// 36 35 259:1 / /mnt rw - ext4 /dev/nvme0n1p1 rw: the device's number is the third, its name the second after " - "
			f := strings.Fields(line)
			_, source, _ := strings.Cut(line, " - ")
			if s := strings.Fields(source); len(f) > 4 && len(s) > 1 && (f[2] == strings.TrimSpace(string(number)) || s[1] == dev) {
				uses = append(uses, fmt.Sprintf("%s is mounted at %s", dev, f[4]))
			}
		}
		for line := range strings.Lines(string(swaps)) {
			if f := strings.Fields(line); len(f) > 0 && f[0] == dev {
				uses = append(uses, dev+" is swap space")
			}
		}
		holders, _ := filepath.Glob(filepath.Join(dir, "holders", "*"))
		for _, h := range holders {
			uses = append(uses, fmt.Sprintf("%s is part of %s", dev, filepath.Base(h)))
		}
	}
	if n := len(parts); n > 0 {
		uses = append(uses, fmt.Sprintf("it has %s", plural(n, "partition")))
	}
	return uses
}

// What contentsOf tells apart from what it only names.
const (
	contentsEmpty = "empty"
	contentsKvof  = "a kvof store"
)

// signatures are what file systems, volume managers and partition tables leave at the beginning of a drive.
var signatures = []struct {
	at   int
	text string
	name string
}{
	{8, "kvofstor", contentsKvof},
	{0x438, "\x53\xef", "an ext2, ext3 or ext4 file system"},
	{0, "XFSB", "an XFS file system"},
	{0x10040, "_BHRfS_M", "a Btrfs file system"},
	{0x1018, "\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81", "a bcachefs file system"},
	{0x400, "\x10\x20\xf5\xf2", "an F2FS file system"},
	{3, "NTFS    ", "an NTFS file system"},
	{3, "EXFAT   ", "an exFAT file system"},
	{0x52, "FAT32   ", "a FAT file system"},
	{0x36, "FAT1", "a FAT file system"},
	{0x8001, "CD001", "an ISO 9660 file system"},
	{0, "LUKS\xba\xbe", "a LUKS volume"},
	{0x218, "LVM2 001", "an LVM physical volume"},
	{0x1000, "\xfc\x4e\x2b\xa9", "part of a Linux RAID array"},
	{0, "\xfc\x4e\x2b\xa9", "part of a Linux RAID array"},
	{4086, "SWAPSPACE2", "swap space"},
	{0x200, "EFI PART", "a GPT partition table"},
	{0x1000, "EFI PART", "a GPT partition table"},
	{0x1fe, "\x55\xaa", "an MBR partition table"},
}

const (
	edge   = 1 << 20 // bytes at either end of a drive that are looked at whole
	probes = 64      // blocks between them that are looked at
)

// contentsOf says what is on a drive of size bytes, as far as a look at its ends and a few places between can tell.
func contentsOf(r io.ReaderAt, size int64) (string, error) {
	read := func(off, n int64) ([]byte, error) {
		b := make([]byte, min(n, size-off))
		_, err := r.ReadAt(b, off)
		return b, err
	}
	head, err := read(0, edge)
	if err != nil {
		return "", err
	}
	for _, s := range signatures {
		if len(head) > s.at && bytes.HasPrefix(head[s.at:], []byte(s.text)) {
			return s.name, nil
		}
	}
	const unit = 4096
	empty := zero(head)
	for i := int64(0); empty && i <= probes; i++ {
		off, n := (size/(probes+1)*i)&^(unit-1), int64(unit)
		if i == probes {
			off, n = max(0, size-edge)&^(unit-1), edge
		}
		b, err := read(off, n)
		if err != nil {
			return "", err
		}
		empty = zero(b)
	}
	if empty {
		return contentsEmpty, nil
	}
	return "data of a kind that kvof does not know", nil
}

func zero(b []byte) bool {
	for len(b) > 0 {
		n := min(len(b), len(zeroes))
		if !bytes.Equal(b[:n], zeroes[:n]) {
			return false
		}
		b = b[n:]
	}
	return true
}

var zeroes [64 << 10]byte
