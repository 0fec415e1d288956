package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
)

// prepareShim builds libkvof.so and its measuring program, once.
func (b *bench) prepareShim() error {
	program := filepath.Join(b.dir, "shim")
	if _, err := os.Stat(program); err == nil {
		return nil
	}
	lib := exec.Command("go", "build", "-buildmode=c-shared", "-o", filepath.Join(b.dir, "libkvof.so"), "./shim/c")
	lib.Env = append(os.Environ(), "CGO_ENABLED=1")
	for _, cmd := range []*exec.Cmd{lib, exec.Command("gcc", "-O2", "-Ishim/c", "-o", program, "shim/c/bench/bench.c", "-L"+b.dir, "-lkvof", "-Wl,-rpath,"+b.dir)} {
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%v: %w\n%s", cmd.Args, err, out)
		}
	}
	return nil
}

// shimBench is the command line of libkvof's measuring program.
func (b *bench) shimBench(s *server, op string, n, depth int, more ...string) []string {
	return append([]string{filepath.Join(b.dir, "shim"), "tcp://" + s.address() + "/" + kvNQN, op, strconv.Itoa(n), strconv.Itoa(depth), strconv.Itoa(int(b.time.Seconds()))}, more...)
}

// shim compares the C interface with the Go host it is made of: with keys that are used as they are, and with hashed ones, whose
// values are summed.
func shim(op string, size, depth int) func(*bench) []contestant {
	return func(b *bench) []contestant {
		k := b.kvofServer()
		keys := "--keys=" + strconv.Itoa(min(64, 256*mib/size)) // as the measuring program has
		return []contestant{
			b.contestant("libkvof", k, b.shimBench(k, op, size, depth), parseJSON),
			b.contestant("kvof's host", k, b.kvofBench(k, kvNQN, "kv", op, size, keys, "--depth="+strconv.Itoa(depth), "--keep", b.timeFlag()), parseJSON),
			b.contestant("libkvof, hashed keys", k, b.shimBench(k, op, size, depth, "hash"), parseJSON),
		}
	}
}

func shimPrefix(b *bench) []contestant {
	k := b.kvofServer()
	return []contestant{
		b.contestant("libkvof", k, b.shimBench(k, "exist-prefix", 1000, 1), parseJSON),
		b.contestant("libkvof, hashed keys", k, b.shimBench(k, "exist-prefix", 1000, 1, "hash"), parseJSON),
	}
}
