//go:build cgo

package main

import (
	"bufio"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/shim/keys"
	"github.com/kvof/kvof/target/targettest"
)

// library builds libkvof.so into a folder of the test's.
func library(t *testing.T) string {
	t.Helper()
	if _, err := exec.LookPath("gcc"); err != nil {
		t.Skip("no C compiler")
	}
	dir := t.TempDir()
	command(t, "go", "build", "-buildmode=c-shared", "-o", filepath.Join(dir, "libkvof.so"), ".")
	return dir
}

func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// compile makes a program of a C file.
func compile(t *testing.T, dir, name, source string, flags ...string) string {
	t.Helper()
	program := filepath.Join(dir, name)
	args := append([]string{"-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-I.", "-o", program, source}, flags...)
	command(t, "gcc", append(args, "-L"+dir, "-lkvof", "-Wl,-rpath,"+dir, "-pthread")...)
	return program
}

// vectors writes the key vectors as test.c reads them.
func vectors(t *testing.T, dir string) string {
	b, err := os.ReadFile("../keys/testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var v struct {
		Keys []struct {
			Scope   keys.Scope
			HashAll bool   `json:"hash_all"`
			Key     string `json:"key_hex"`
			NVMe    string `json:"nvme_key_hex"`
			Hashed  bool
			Digest  string `json:"digest_hex"`
		}
	}
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for _, k := range v.Keys {
		s := k.Scope
		for _, f := range []string{s.Tenant, s.Model, s.Rank, s.Group, s.Salt} {
			fmt.Fprintf(&out, "%s ", or(hex.EncodeToString([]byte(f))))
		}
		fmt.Fprintf(&out, "%d %s %s %d %s\n", number(k.HashAll), k.Key, k.NVMe, number(k.Hashed), or(k.Digest))
	}
	path := filepath.Join(dir, "vectors")
	if err := os.WriteFile(path, []byte(out.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func or(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func number(b bool) int {
	if b {
		return 1
	}
	return 0
}

// TestC runs the suite of testdata/test.c as it is, and with the address and the undefined behaviour sanitizer.
func TestC(t *testing.T) {
	dir := library(t)
	list := vectors(t, dir)
	for _, flags := range [][]string{nil, {"-fsanitize=address,undefined", "-fno-sanitize-recover=all"}} {
		t.Run(strings.Join(flags, " "), func(t *testing.T) {
			program := compile(t, dir, "test"+fmt.Sprint(len(flags)), "testdata/test.c", flags...)
			s := targettest.Serve(t, targettest.Options{Size: 512 << 20})
			relay := targettest.NewRelay(t, s.Addr)
			second := targettest.Serve(t, targettest.Options{NQN: targettest.NQN + "2"})
			second.Apply(configs.Namespace{NSID: 1, Type: configs.KeyValue, Device: configs.DeviceMemory, Size: 64 << 20, MaxValue: 4 << 20, MaxKeys: 3})
			first := "tcp://" + s.Addr + "/" + s.NQN
			cmd := exec.Command(program, first, list, "tcp://"+relay.Addr+"/"+s.NQN, first+",tcp://"+second.Addr+"/"+second.NQN)
			cmd.Stderr = os.Stderr
			in, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			for lines := bufio.NewScanner(out); lines.Scan(); {
				switch line := lines.Text(); line {
				case "!freeze":
					relay.Freeze(true)
				case "!thaw":
					relay.Freeze(false)
				case "!stop the second":
					second.Stop()
				case "!stop":
					s.Stop()
				case "!start":
					s = targettest.Serve(t, targettest.Options{Addr: s.Addr})
				default:
					t.Log(line)
					continue
				}
				if _, err := io.WriteString(in, "done\n"); err != nil {
					t.Error(err)
				}
			}
			if err := cmd.Wait(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestExample(t *testing.T) {
	dir := library(t)
	s := targettest.Serve(t, targettest.Options{Discovery: true})
	got := command(t, compile(t, dir, "example", "example/example.c"), "discover://"+s.Discovery)
	want := `put: 8 of 8, 8 of them in a row, 16777216 bytes: success
exist: 8 of 8, 8 of them in a row, 0 bytes: success
get: 8 of 8, 8 of them in a row, 16777216 bytes: success
`
	if got != want {
		t.Error(got)
	}
	// The header is C++ too.
	if _, err := exec.LookPath("g++"); err == nil {
		command(t, "g++", "-x", "c++", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "kvof.h")
	}
}
