package main

import (
	"bytes"
	"encoding/hex"
	"io"
	"os"
	"strings"
	"testing"

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
	}{
		{"", "x:1", two[:2], "[::1]:1", "nqn.a"},
		{"", "[::1]:2", two[:2], "[::1]:2", "nqn.a"}, // the port that was asked
		{"", "x:1", two, "", ""},
		{"nqn.b", "x:1", two, "[::1]:3", "nqn.b"},
		{"nqn.c", "x:1", two, "x:1", "nqn.c"},
		{"", "x:1", nil, "", ""},
	} {
		c := client{nqn: test.nqn, address: test.address}
		addr, name, err := c.choose(test.entries)
		if addr != test.addr || name != test.name || (err == nil) != (test.name != "") {
			t.Errorf("%+v: %s %s %v", test, addr, name, err)
		}
	}
}

// TestManifestEscapes gives manifests that would write where they should not.
func TestManifestEscapes(t *testing.T) {
	chunk := strings.Repeat("00", 16)
	for _, files := range []string{
		`{"path":"../x"}`, `{"path":"/x"}`, `{"path":"a/../../x"}`, `{"path":""}`, `{"path":"."}`, `{"path":"a\u0000b"}`,
		`{"path":"a","link":"/etc"}`, `{"path":"a/b","link":"../../x"}`,
		`{"path":"a","mode":2541}`,
		`{"path":"a","size":10,"chunk":4,"chunks":["` + chunk + `"]}`,
		`{"path":"a","size":-1}`, `{"path":"a","size":1,"chunk":0,"chunks":["` + chunk + `"]}`,
		`{"path":"a","size":9223372036854775807,"chunk":1073741824,"chunks":["` + chunk + `"]}`,
		`{"path":"a","size":4,"chunk":4,"chunks":["00"]}`,
		`{"path":"a","dir":true,"size":4,"chunk":4,"chunks":["` + chunk + `"]}`,
	} {
		if _, err := decodeManifest([]byte(manifestMagic + `{"tree":true,"files":[` + files + `]}`)); err == nil {
			t.Errorf("%s was accepted", files)
		}
	}
	for _, m := range []string{``, `{}`, `{"files":[]}`, `{"files":[{"dir":true}]}`, `[`} {
		if _, err := decodeManifest([]byte(manifestMagic + m)); err == nil {
			t.Errorf("%s was accepted", m)
		}
	}
	good := `{"tree":true,"files":[{"path":"a/b","link":"../c","mode":511},{"path":"d","size":5,"chunk":4,"chunks":["` + chunk + `","` + chunk + `"]}]}`
	if _, err := decodeManifest([]byte(manifestMagic + good)); err != nil {
		t.Error(err)
	}
}

// TestRestoreStaysInside restores through a symbolic link that leads outside.
func TestRestoreStaysInside(t *testing.T) {
	dir, outside := t.TempDir(), t.TempDir()
	m := &manifest{Tree: true, Files: []manifestEntry{{Path: "l", Link: outside}, {Path: "l/x", Mode: 0o644}}}
	err := restore(dir, m, func(*manifestEntry) func(io.Writer) error {
		return func(w io.Writer) error { return nil }
	})
	if entries, _ := os.ReadDir(outside); err == nil || len(entries) > 0 {
		t.Error(err, entries)
	}
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
