package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"kvof": main})
}

// serverConfig has a Key Value and a block namespace in memory.
const serverConfig = `
log_level = "warn"
[memory]
arena = "32MiB"
[management]
socket = "%s"
[[listener]]
transport = "tcp"
address = "%s"
[discovery]
address = ["%s"]
[[subsystem]]
nqn = "nqn.2026-11.dev.kvof:test"
allow_any_host = true
[[subsystem.namespace]]
nsid = 1
type = "kv"
max_value = "16MiB"
device = "memory"
size = "128MiB"
[[subsystem.namespace]]
nsid = 2
type = "block"
device = "memory"
size = "16MiB"
lba_size = 512
`

// TestScripts runs testdata/script. Each script finds a configuration in memory.toml, the addresses it names in
// IO_ADDRESS and KVOF_ADDRESS, and the command "await", which waits until a server listens there.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			io, discovery := freeAddresses(t)
			env.Setenv("IO_ADDRESS", io)
			env.Setenv("KVOF_ADDRESS", discovery)
			return os.WriteFile(filepath.Join(env.WorkDir, "memory.toml"), fmt.Appendf(nil, serverConfig, filepath.Join(env.WorkDir, "kvof.sock"), io, discovery), 0o600)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"await": await},
	})
}

// freeAddresses returns two addresses, held together so that they differ.
func freeAddresses(t *testing.T) (a, b string) {
	for _, addr := range []*string{&a, &b} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		*addr = l.Addr().String()
	}
	return a, b
}

func await(ts *testscript.TestScript, _ bool, _ []string) {
	for range 500 {
		if c, err := net.Dial("tcp", ts.Getenv("KVOF_ADDRESS")); err == nil {
			c.Close()
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	ts.Fatalf("no server came up")
}
