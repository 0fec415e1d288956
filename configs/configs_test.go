package configs_test

import (
	"errors"
	"flag"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/google/uuid"
	"github.com/rogpeppe/go-internal/txtar"

	"github.com/kvof/kvof/configs"
)

var update = flag.Bool("update", false, "rewrite the expected errors in testdata")

func TestExamplesLoad(t *testing.T) {
	files, err := filepath.Glob("*.toml")
	if err != nil || len(files) < 3 {
		t.Fatalf("found %d examples: %v", len(files), err)
	}
	for _, file := range files {
		if _, err := configs.Load(file); err != nil {
			t.Error(err)
		}
	}
}

func TestDefault(t *testing.T) {
	t.Setenv("RUNTIME_DIRECTORY", "/run/kvof")
	got, err := configs.Parse("default", configs.Default())
	if err != nil {
		t.Fatal(err)
	}
	want := &configs.Config{
		LogLevel:   slog.LevelInfo,
		Memory:     configs.Memory{Arena: 256 << 20},
		Management: configs.Management{Socket: "/run/kvof/kvof.sock"},
		Limits:     configs.Limits{Controllers: 1024, IOQueues: 64, QueueEntries: 128},
		Listeners:  []configs.Listener{{Transport: "tcp", Address: netip.MustParseAddrPort("127.0.0.1:4420")}},
		Discovery:  configs.Discovery{Addresses: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:8009")}},
		Subsystems: []configs.Subsystem{{
			NQN: "nqn.2026-11.dev.kvof:embedded",

			AllowAnyHost: true,
			Namespaces: []configs.Namespace{
				{NSID: 1, Type: configs.KeyValue, Device: configs.DeviceFile, Path: "kvof-data/kv.img", Size: 16 << 30, MaxValue: 64 << 20, LBASize: 4096},
				{NSID: 2, Type: configs.Block, Device: configs.DeviceFile, Path: "kvof-data/block.img", Size: 4 << 30, MaxValue: 64 << 20, LBASize: 4096},
			},
		}},
	}
	derived := cmpopts.IgnoreFields(configs.Namespace{}, "UUID", "NGUID")
	if diff := cmp.Diff(want, got, derived, cmpopts.IgnoreFields(configs.Subsystem{}, "Serial"), cmpopts.EquateComparable(netip.AddrPort{})); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// Hosts keep these identifiers: a version of kvof that derives others takes their namespaces away.
func TestDerivedIdentifiersStay(t *testing.T) {
	c, err := configs.Parse("default", configs.Default())
	if err != nil {
		t.Fatal(err)
	}
	s := c.Subsystems[0]
	got := []string{s.Serial, s.Namespaces[0].UUID.String(), s.Namespaces[0].NGUID.String(), s.Namespaces[1].UUID.String()}
	want := []string{"f13ede59ac33ca0ef2cd", "f1fadd2e-f3cb-5f71-8a7b-4e14d4606168", "f1fadd2ef3cb5f718a7b4e14d4606168", "aee20735-10c5-50c8-a4b7-0355da64b14e"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestConfiguredIdentifiers(t *testing.T) {
	c, err := configs.Load("tcp.toml")
	if err != nil {
		t.Fatal(err)
	}
	n := c.Subsystems[0].Namespaces[2]
	if n.UUID != uuid.MustParse("6f1b24ab-3b9c-4e4e-9a53-0e2f4c7b1d10") || n.NGUID.String() != "6f1b24ab3b9c4e4e9a530e2f4c7b1d10" {
		t.Errorf("UUID %v, NGUID %v", n.UUID, n.NGUID)
	}
}

// TestErrors reads the archives in testdata: a configuration and every message it must give.
func TestErrors(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("found %d cases: %v", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			a, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			input, want := a.Files[0], &a.Files[1]
			_, err = configs.Parse(input.Name, input.Data)
			var errs configs.Errors
			if !errors.As(err, &errs) {
				t.Fatalf("error is %v, want Errors", err)
			}
			got := errs.Error() + "\n"
			if *update {
				want.Data = []byte(got)
				if err := os.WriteFile(file, txtar.Format(a), 0o666); err != nil {
					t.Fatal(err)
				}
			}
			if diff := cmp.Diff(string(want.Data), got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if !slices.IsSortedFunc(errs, func(a, b configs.Error) int { return a.Line - b.Line }) {
				t.Error("errors are not in the order of lines")
			}
		})
	}
}

func TestLoadMissing(t *testing.T) {
	_, err := configs.Load(filepath.Join(t.TempDir(), "kvof.toml"))
	if err == nil || !strings.Contains(err.Error(), "no configuration file") {
		t.Errorf("error is %v", err)
	}
}

func TestChanges(t *testing.T) {
	base := string(configs.Default())
	for _, test := range []struct {
		name     string
		old, new string // replacement in the built-in configuration
		want     []string
	}{
		{"nothing", "", "", nil},
		{"log level", `"info"`, `"debug"`, nil},
		{"subsystem", `:embedded"`, `:other"`, nil},
		{"access", `allow_any_host = true`, `hosts = ["nqn.2026-11.dev.kvof:h"]`, nil},
		{"referral", `["127.0.0.1:8009"]`, "[\"127.0.0.1:8009\"]\nreferral = [{address = \"192.0.2.1:8009\"}]", nil},
		{"arena", `"256MiB"`, `"512MiB"`, []string{"memory.arena"}},
		{"listener", `:4420"`, `:4421"`, []string{"listener"}},
		{"discovery", `["127.0.0.1:8009"]`, `[]`, []string{"discovery.address"}},
		{"several", "[memory]", "[limits]\nio_queues = 3\n[management]\nsocket = \"\"\nlisten = \"127.0.0.1:1\"\n[memory]",
			[]string{"management.socket", "management.listen", "limits"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			before, err := configs.Parse("old", []byte(base))
			if err != nil {
				t.Fatal(err)
			}
			after, err := configs.Parse("new", []byte(strings.ReplaceAll(base, test.old, test.new)))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, configs.Changes(before, after)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestSize(t *testing.T) {
	for in, want := range map[string]configs.Size{
		"0": 0, "512": 512, "64MiB": 64 << 20, "64 mib": 64 << 20, "1.5GiB": 3 << 29, "2TB": 2e12, "7EiB": 7 << 60,
		"": -1, "-1": -1, "MiB": -1, "64MX": -1, "8EiB": -1, "99999999999EiB": -1, "NaN": -1,
	} {
		got := configs.Size(-1)
		if err := got.UnmarshalText([]byte(in)); got != want || (err == nil) != (want >= 0) {
			t.Errorf("%q: %d, %v; want %d", in, got, err, want)
		}
	}
}

// FuzzParse looks for panics, for errors without a place, and for configurations that read differently
// the second time.
func FuzzParse(f *testing.F) {
	examples, _ := filepath.Glob("*.toml")
	for _, file := range examples {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	cases, _ := filepath.Glob("testdata/*.txt")
	for _, file := range cases {
		a, err := txtar.ParseFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(a.Files[0].Data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := configs.Parse("fuzz", data)
		if (c == nil) == (err == nil) {
			t.Fatalf("configuration %v with error %v", c, err)
		}
		var errs configs.Errors
		if err != nil && (!errors.As(err, &errs) || len(errs) == 0) {
			t.Fatalf("error %v is not an Errors", err)
		}
		lines := strings.Count(string(data), "\n") + 1
		for _, e := range errs {
			if e.Line < 1 || e.Line > lines || e.Msg == "" {
				t.Errorf("%+v in a file of %d lines", e, lines)
			}
		}
		if again, _ := configs.Parse("fuzz", data); !cmp.Equal(c, again, cmpopts.EquateComparable(netip.AddrPort{})) {
			t.Error("read differently the second time")
		}
	})
}
