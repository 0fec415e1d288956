package main

import (
	"archive/tar"
	"bytes"
	"cmp"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/kvof/kvof/host"
	"github.com/kvof/kvof/nvmeof"
)

func TestParseKey(t *testing.T) {
	for _, test := range []struct {
		flags keyFlags
		arg   string
		want  string // hexadecimal; empty: an error
	}{
		{keyFlags{}, "a", "61"},
		{keyFlags{}, "exactly sixteen!", hex.EncodeToString([]byte("exactly sixteen!"))},
		{keyFlags{}, "seventeen bytes !", ""},
		{keyFlags{}, "", ""},
		{keyFlags{}, "00112233445566778899AABBCCDDEEFF", "00112233445566778899aabbccddeeff"},
		{keyFlags{}, "00112233445566778899AABBCCDDEEFG", ""},
		{keyFlags{}, "0011", "30303131"},
		{keyFlags{hex: true}, "0011", "0011"},
		{keyFlags{hex: true}, "001", ""},
		{keyFlags{hex: true}, "00112233445566778899aabbccddeeff00", ""},
		{keyFlags{hash: true}, "abc", "ba7816bf8f01cfea414140de5dae2223"},
	} {
		got, err := test.flags.parse(test.arg)
		if hex.EncodeToString(got) != test.want || (err == nil) != (test.want != "") {
			t.Errorf("%+v %q: %x, %v", test.flags, test.arg, got, err)
		}
	}
}

func TestKeyText(t *testing.T) {
	for key, want := range map[string]string{"abc": "abc", "a b": "612062", "\x00": "00", "\xff": "ff", "é": "é", "\x1b[2J": "1b5b324a"} {
		if got := keyText([]byte(key)); got != want {
			t.Errorf("%q: %q", key, got)
		}
	}
}

func TestChoose(t *testing.T) {
	record := func(nqn, port string) nvmeof.DiscoveryEntry {
		return nvmeof.DiscoveryEntry{TRType: nvmeof.TRTypeTCP, SubType: nvmeof.SubtypeNVM, SubNQN: nqn, TRAddr: "::1", TRSVCID: port}
	}
	rdma := record("nqn.c", "4")
	rdma.TRType = nvmeof.TRTypeRDMA
	two := []nvmeof.DiscoveryEntry{record("nqn.a", "1"), record("nqn.a", "2"), record("nqn.b", "3"), rdma}
	for _, test := range []struct {
		nqn, address string
		entries      []nvmeof.DiscoveryEntry
		addr, name   string
		transport    string
	}{
		{"", "x:1", two[:2], "[::1]:1", "nqn.a", ""},
		{"", "[::1]:2", two[:2], "[::1]:2", "nqn.a", ""}, // the port that was asked
		{"", "x:1", two, "", "", ""},
		{"nqn.b", "x:1", two, "[::1]:3", "nqn.b", ""},
		{"nqn.c", "x:1", two, "x:1", "nqn.c", ""},
		{"", "x:1", nil, "", "", ""},
		{"", "x:1", two, "[::1]:4", "nqn.c", host.RDMA},
		{"nqn.a", "x:1", two, "x:1", "nqn.a", host.RDMA},
	} {
		c := client{nqn: test.nqn, address: test.address, transport: cmp.Or(test.transport, host.TCP)}
		addr, name, err := c.choose(test.entries)
		if addr != test.addr || name != test.name || (err == nil) != (test.name != "") {
			t.Errorf("%+v: %s %s %v", test, addr, name, err)
		}
	}
}

// TestExtractStaysInside gives archives that would write where they should not.
func TestExtractStaysInside(t *testing.T) {
	reg := func(name string) tar.Header { return tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644} }
	link := func(name, to string) tar.Header {
		return tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to}
	}
	outside := t.TempDir()
	for _, entries := range [][]tar.Header{
		{reg("../x")}, {reg("/x")}, {reg("a/../../x")}, {reg(".")}, {reg("a//b")}, {reg("./a")},
		{{Typeflag: tar.TypeDir, Name: "../x/"}},
		{{Typeflag: tar.TypeLink, Name: "x", Linkname: "/etc/passwd"}},
		{{Typeflag: tar.TypeFifo, Name: "x"}}, {{Typeflag: tar.TypeChar, Name: "x"}},
		{link("l", "/etc")}, {link("a/b", "../../x")}, {link("l", outside), reg("l/x")},
	} {
		dir := filepath.Join(t.TempDir(), "in")
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range entries {
			if err := w.WriteHeader(&h); err != nil {
				t.Fatal(err)
			}
		}
		w.Close()
		if _, err := extractTree(dir, &b); err == nil {
			t.Errorf("%+v was extracted", entries)
		}
		if found, _ := os.ReadDir(filepath.Dir(dir)); len(found) != 1 {
			t.Errorf("%+v: %v", entries, found)
		}
	}
	// Through a link that was there before.
	dir := t.TempDir()
	if err := os.Symlink(outside, filepath.Join(dir, "l")); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	h := reg("l/x")
	if err := errors.Join(w.WriteHeader(&h), w.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := extractTree(dir, &b); err == nil {
		t.Error("written through a link")
	}
	if found, _ := os.ReadDir(outside); len(found) > 0 {
		t.Error(found)
	}
}

func FuzzExtract(f *testing.F) {
	var b bytes.Buffer
	if _, err := archiveTree("testdata", &b); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		_, _ = extractTree(filepath.Join(dir, "in"), io.LimitReader(bytes.NewReader(b), 1<<20))
		if found, _ := os.ReadDir(dir); len(found) > 1 {
			t.Error(found)
		}
	})
}

func TestPattern(t *testing.T) {
	for _, n := range []int{8, 9, 16, 23, 4096, 100001} {
		b := make([]byte, n)
		fillPattern(b, 1, 2, 3)
		if patternGeneration(b, 1, 2) != 3 || !isPattern(b, 1, 2, 3) {
			t.Errorf("%d bytes are not their own pattern", n)
		}
		if n > 8 && (isPattern(b, 2, 2, 3) || isPattern(b, 1, 3, 3) || isPattern(b, 1, 2, 4)) {
			t.Error("patterns do not differ")
		}
		for _, i := range []int{0, n / 2, n - 1} {
			c := bytes.Clone(b)
			c[i] ^= 0x10
			if isPattern(c, 1, 2, 3) {
				t.Errorf("a wrong byte at %d of %d is not seen", i, n)
			}
		}
	}
}
