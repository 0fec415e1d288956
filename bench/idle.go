package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/kvof/kvof/host"
)

// What the idle server holds: 5 connections for each controller, as a machine with four cores makes.
const (
	idleControllers = 100
	idleQueues      = 4
	idleDepth       = 127 // the most that the default limits grant
	idleTime        = 10 * time.Second
	idleArena       = 96 * mib
)

// idle measures what a server with controllers that do nothing costs. Its namespaces are on files, so that it has rings
// and registered memory, and their contents are not in the figures.
func (b *bench) idle() error {
	const config = `log_level = "error"
[memory]
arena = "%d"
[management]
socket = %q
[[listener]]
transport = "tcp"
address = "127.0.0.1:%d"
[[subsystem]]
nqn = %q
allow_any_host = true
[[subsystem.namespace]]
nsid = 1
type = "kv"
device = "file"
path = %q
size = "1GiB"
[[subsystem.namespace]]
nsid = 2
type = "block"
device = "file"
path = %q
size = "1GiB"
lba_size = 4096
`
	s := &server{name: "kvof", port: freePort()}
	s.args = func(dir string) ([]string, error) {
		path := filepath.Join(dir, "idle.toml")
		text := fmt.Sprintf(config, idleArena, filepath.Join(dir, "idle.sock"), s.port, kvNQN, filepath.Join(dir, "kv.img"), filepath.Join(dir, "block.img"))
		return []string{b.kvof, "serve", "--config", path}, os.WriteFile(path, []byte(text), 0o600)
	}
	if err := s.start(b); err != nil {
		return err
	}
	defer s.stop()
	if err := s.resume(); err != nil {
		return err
	}
	pid := s.cmd.Process.Pid
	fmt.Printf("### idle: %d controllers of %d I/O queues, depth %d\n\n| controllers | RSS MiB | of it the arena | beyond the arena | CPU, %% of a core over %v |\n|---|---|---|---|---|\n",
		idleControllers, idleQueues, idleDepth, idleTime)
	row := func(n int) error {
		time.Sleep(time.Second)
		before, err := ran(pid)
		if err != nil {
			return fmt.Errorf("%w: %s", err, &s.log)
		}
		time.Sleep(idleTime)
		after, err := ran(pid)
		if err != nil {
			return fmt.Errorf("%w: %s", err, &s.log)
		}
		rss, arena, err := resident(pid)
		fmt.Printf("| %d | %.1f | %.1f | **%.1f** | **%.3f** |\n", n, rss/mib, arena/mib, (rss-arena)/mib, float64(after-before)/float64(idleTime)*100)
		return err
	}
	if err := row(0); err != nil {
		return err
	}
	for i := range idleControllers {
		c, err := host.Connect(context.Background(), host.Options{Transport: "tcp", Addr: s.address(), SubNQN: kvNQN,
			HostNQN: fmt.Sprintf("nqn.2026-11.dev.kvof:bench-host-%d", i), IOQueues: idleQueues, QueueDepth: idleDepth})
		if err != nil {
			return err
		}
		defer c.Close()
		if c.IOQueues() != idleQueues {
			return fmt.Errorf("controller has %d I/O queues", c.IOQueues())
		}
	}
	if err := row(idleControllers); err != nil {
		return err
	}
	fmt.Println()
	return nil
}

// ran is the CPU time of a process's threads, to the nanosecond. Those of Go programs do not end.
func ran(pid int) (sum time.Duration, err error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil || len(tasks) == 0 {
		return 0, fmt.Errorf("process %d is gone", pid)
	}
	for _, path := range tasks {
		stat, err := os.ReadFile(path)
		if err != nil {
			return 0, err
		}
		first, _, _ := strings.Cut(string(stat), " ")
		n, err := strconv.ParseInt(first, 10, 64)
		if err != nil {
			return 0, err
		}
		sum += time.Duration(n)
	}
	return sum, nil
}

// resident returns a process's resident bytes, and those in the mapping of the arena, which is known by its size.
func resident(pid int) (all, arena float64, err error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return 0, 0, err
	}
	size := 0
	for line := range strings.Lines(string(maps)) {
		f := strings.Fields(line)
		if len(f) != 3 || f[2] != "kB" {
			continue
		}
		n, _ := strconv.Atoi(f[1])
		switch f[0] {
		case "Size:":
			size = n * kib
		case "Rss:":
			all += float64(n * kib)
			if size == idleArena {
				arena += float64(n * kib)
			}
		}
	}
	return all, arena, nil
}

// allocs runs the Go benchmarks of the rooms on the I/O path.
func (b *bench) allocs() error {
	args := []string{"test", "-run=^$", "-bench=.", "-benchmem", "-benchtime=200ms", "./bench", "./target/...", "./host", "./uring", "./kvlayer", "./nvmeof"}
	out, err := exec.Command("go", args...).Output()
	if err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	fmt.Printf("### allocs: go %s\n\n| benchmark | ns/op | MB/s | B/op | allocs/op |\n|---|---|---|---|---|\n", strings.Join(args, " "))
	room := ""
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		if len(f) == 2 && f[0] == "pkg:" {
			room = filepath.Base(f[1])
		}
		if len(f) < 4 || !strings.HasPrefix(f[0], "Benchmark") {
			continue
		}
		v := map[string]string{}
		for i := 2; i+1 < len(f); i += 2 {
			v[f[i+1]] = f[i]
		}
		fmt.Printf("| %s %s | %s | %s | %s | %s |\n", room, strings.TrimPrefix(f[0], "Benchmark"), v["ns/op"], v["MB/s"], v["B/op"], v["allocs/op"])
	}
	fmt.Println()
	return nil
}
