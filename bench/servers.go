package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// One core for each side. Go programs follow the affinity with GOMAXPROCS.
const (
	serverCore = "0"
	clientCore = "1"
)

const (
	kvNQN    = "nqn.2026-11.dev.kvof:bench-kv"
	blockNQN = "nqn.2026-11.dev.kvof:bench-block"
	spdkNQN  = "nqn.2016-06.io.spdk:cnode1"
)

// server is a process on the server's core. It is stopped (SIGSTOP) while another's turn is measured: SPDK polls.
type server struct {
	name string
	port int
	args func(dir string) ([]string, error) // may write files into dir
	warm func(b *bench, s *server) error    // touches all of its memory once: first touches are dear in virtual machines

	cmd *exec.Cmd
	log bytes.Buffer
}

func (s *server) address() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port)) }

// freePort is one that nobody listens on now.
func freePort() int {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0 // the server will say what is wrong
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func (s *server) start(b *bench) error {
	args, err := s.args(b.dir)
	if err != nil {
		return err
	}
	s.log.Reset()
	s.cmd = exec.Command("taskset", append([]string{"-c", serverCore}, args...)...)
	s.cmd.Stdout, s.cmd.Stderr = &s.log, &s.log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		return err
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		c, err := net.Dial("tcp", s.address())
		if err == nil {
			c.Close()
			break
		}
		if time.Now().After(deadline) {
			s.stop()
			return fmt.Errorf("%s does not listen: %s", s.name, &s.log)
		}
	}
	if s.warm != nil {
		if err := s.warm(b, s); err != nil {
			return fmt.Errorf("warm %s: %w", s.name, err)
		}
	}
	return s.pause()
}

func (s *server) pause() error  { return s.cmd.Process.Signal(syscall.SIGSTOP) }
func (s *server) resume() error { return s.cmd.Process.Signal(syscall.SIGCONT) }

func (s *server) stop() {
	_ = s.resume()
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	t := time.AfterFunc(5*time.Second, func() { _ = s.cmd.Process.Kill() })
	_ = s.cmd.Wait()
	t.Stop()
}

// kvofServer serves a Key Value and a block namespace in memory, each in a subsystem of its own.
func (b *bench) kvofServer() *server {
	const config = `log_level = "error"
[memory]
arena = "128MiB"
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
device = "memory"
size = "2GiB"
[[subsystem]]
nqn = %q
allow_any_host = true
[[subsystem.namespace]]
nsid = 1
type = "block"
device = "memory"
size = "512MiB"
lba_size = 4096
`
	s := &server{name: "kvof", port: freePort()}
	s.args = func(dir string) ([]string, error) {
		path := filepath.Join(dir, "kvof.toml")
		text := fmt.Sprintf(config, filepath.Join(dir, "kvof.sock"), s.port, kvNQN, blockNQN)
		return []string{b.kvof, "serve", "--config", path}, os.WriteFile(path, []byte(text), 0o600)
	}
	s.warm = func(b *bench, s *server) error {
		kv := b.kvofBench(s, kvNQN, "kv", "store", 2<<20, "--depth=4", "--count=1200")
		return errors.Join(b.quietly(kv), b.warmBlock(s, blockNQN))
	}
	return s
}

// warmBlock writes all of a block namespace, in pieces that any target takes.
func (b *bench) warmBlock(s *server, nqn string) error {
	return b.quietly(b.kvofBench(s, nqn, "block", "write", 128<<10, "--depth=16", "--count=4096"))
}

func (b *bench) redisServer() *server {
	s := &server{name: "redis", port: freePort(), warm: warmPeer("redis")}
	s.args = func(string) ([]string, error) {
		return []string{"redis-server", "--port", strconv.Itoa(s.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--io-threads", "1"}, nil
	}
	return s
}

func (b *bench) memcachedServer() *server {
	s := &server{name: "memcached", port: freePort(), warm: warmPeer("memcached")}
	s.args = func(string) ([]string, error) {
		return []string{"memcached", "-u", "nobody", "-l", "127.0.0.1", "-p", strconv.Itoa(s.port), "-t", "1", "-m", "2048", "-I", "8m", "-U", "0"}, nil
	}
	return s
}

func warmPeer(protocol string) func(*bench, *server) error {
	return func(b *bench, s *server) error {
		return b.quietly(b.peerBench(s, protocol, "set", 4, 1, "-time=1500ms"))
	}
}

// spdkServer is SPDK's nvmf_tgt with a malloc bdev; maxIO is the transport's max_io_size.
func (b *bench) spdkServer(name string, maxIO int) *server {
	const config = `{"subsystems": [
{"subsystem": "bdev", "config": [
  {"method": "bdev_malloc_create", "params": {"name": "Malloc0", "num_blocks": 131072, "block_size": 4096}}]},
{"subsystem": "nvmf", "config": [
  {"method": "nvmf_create_transport", "params": {"trtype": "TCP", "max_io_size": %d}},
  {"method": "nvmf_create_subsystem", "params": {"nqn": %[2]q, "allow_any_host": true, "serial_number": "SPDK1"}},
  {"method": "nvmf_subsystem_add_ns", "params": {"nqn": %[2]q, "namespace": {"bdev_name": "Malloc0"}}},
  {"method": "nvmf_subsystem_add_listener", "params": {"nqn": %[2]q,
    "listen_address": {"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": "%[3]d"}}}]}]}
`
	s := &server{name: name, port: freePort()}
	s.args = func(dir string) ([]string, error) {
		path := filepath.Join(dir, fmt.Sprintf("spdk-%d.json", s.port))
		text := fmt.Sprintf(config, maxIO, spdkNQN, s.port)
		return []string{filepath.Join(b.spdk, "build/bin/nvmf_tgt"), "-m", "0x1", "--no-huge", "-s", "2048", "--disable-cpumask-locks",
			"-r", filepath.Join(dir, fmt.Sprintf("spdk-%d.sock", s.port)), "-c", path}, os.WriteFile(path, []byte(text), 0o600)
	}
	s.warm = func(b *bench, s *server) error { return b.warmBlock(s, spdkNQN) }
	return s
}

// install gets the Debian packages of the two servers when they are missing.
func install() error {
	for _, name := range []string{"redis-server", "memcached"} {
		if _, err := exec.LookPath(name); err == nil {
			continue
		}
		fmt.Fprintln(os.Stderr, "bench: installing", name)
		if out, err := exec.Command("apt-get", "install", "-y", "--no-install-recommends", name).CombinedOutput(); err != nil {
			return fmt.Errorf("%s is missing, and installing it failed: %w\n%s", name, err, out)
		}
	}
	return nil
}

// cpuOf is the CPU time that a process has used, and whether it is there.
func cpuOf(pid int) (time.Duration, bool) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, false
	}
	f := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	user, _ := strconv.Atoi(f[11])
	system, _ := strconv.Atoi(f[12])
	return time.Duration(user+system) * 10 * time.Millisecond, true // USER_HZ is 100
}

// busy is the CPU time that the whole machine has used or, stolen, could not use.
func busy() time.Duration {
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	f := strings.Fields(string(stat[:bytes.IndexByte(stat, '\n')])) // cpu user nice system idle iowait irq softirq steal
	sum := 0
	for _, i := range []int{1, 2, 3, 6, 7, 8} {
		n, _ := strconv.Atoi(f[i])
		sum += n
	}
	return time.Duration(sum) * 10 * time.Millisecond
}

// usage is CPU time, sampled while a client runs.
type usage struct {
	at   []time.Time
	cpus [][3]time.Duration // server, client, whole machine
}

// watch samples until ctx ends.
func watch(ctx context.Context, server, client int) (wait func() *usage) {
	u, done := new(usage), make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			var now [3]time.Duration
			now[0], _ = cpuOf(server)
			now[1], _ = cpuOf(client)
			now[2] = busy()
			u.at, u.cpus = append(u.at, time.Now()), append(u.cpus, now)
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	}()
	return func() *usage { <-done; return u }
}

// cores are the cores used in the middle of the last d before end: by the server, the client, and others.
func (u *usage) cores(end time.Time, d time.Duration) (server, client, others float64) {
	first, last := -1, -1
	for j, at := range u.at {
		if at.After(end.Add(-d*85/100)) && at.Before(end.Add(-d*15/100)) {
			if first < 0 {
				first = j
			}
			last = j
		}
	}
	if first == last {
		return 0, 0, 0
	}
	share := func(i int) float64 {
		return float64(u.cpus[last][i]-u.cpus[first][i]) / float64(u.at[last].Sub(u.at[first]))
	}
	server, client = share(0), share(1)
	return server, client, max(0, share(2)-server-client)
}
