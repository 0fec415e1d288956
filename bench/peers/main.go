// Command peers measures SET and GET of redis and memcached as `kvof bench` measures Store and Retrieve, and prints the
// same figures. It copies no payload, so that the server is what is measured, not the client.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

var (
	protocol = flag.String("protocol", "redis", "redis or memcached")
	address  = flag.String("address", "127.0.0.1:6379", "HOST:PORT of the server")
	op       = flag.String("op", "get", "get or set")
	size     = flag.Int("size", 2<<20, "bytes of a value")
	conns    = flag.Int("connections", 4, "connections")
	depth    = flag.Int("depth", 1, "requests in flight on each connection")
	keys     = flag.Int("keys", 64, "number of keys")
	duration = flag.Duration("time", 3*time.Second, "how long to measure")
)

// dialect is what differs between the two servers.
type dialect struct {
	set, get   func(key string, size int) string // the request; a value and \r\n follow a set
	stored     string                            // the answer to a set
	value      func(line string) (int, bool)     // size in the line before a value
	afterValue string
}

var dialects = map[string]dialect{
	"redis": {
		set: func(key string, n int) string {
			return fmt.Sprintf("*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n", len(key), key, n)
		},
		get:        func(key string, _ int) string { return fmt.Sprintf("*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n", len(key), key) },
		stored:     "+OK",
		value:      func(line string) (int, bool) { return number(strings.TrimPrefix(line, "$")) },
		afterValue: "\r\n",
	},
	"memcached": {
		set:    func(key string, n int) string { return fmt.Sprintf("set %s 0 0 %d\r\n", key, n) },
		get:    func(key string, _ int) string { return "get " + key + "\r\n" },
		stored: "STORED",
		value: func(line string) (int, bool) { // VALUE key flags size
			f := strings.Fields(line)
			if len(f) != 4 {
				return 0, false
			}
			return number(f[3])
		},
		afterValue: "\r\nEND\r\n",
	},
}

func number(s string) (int, bool) {
	n, err := strconv.Atoi(s)
	return n, err == nil
}

// conn is one connection. Requests are answered in order.
type conn struct {
	dialect
	c       net.Conn
	r       *bufio.Reader // small: nearly all of a value goes around it, straight into its buffer
	buffers [][]byte      // a value's for each request in flight, in turn, as of a client with several values
	out, in int           // requests sent, and answered
	tail    []byte
	hist    *hdrhistogram.Histogram
}

func dial() (*conn, error) {
	d, ok := dialects[*protocol]
	if !ok {
		return nil, fmt.Errorf("protocol %q is neither redis nor memcached", *protocol)
	}
	c, err := net.Dial("tcp", *address)
	if err != nil {
		return nil, err
	}
	x := &conn{dialect: d, c: c, r: bufio.NewReaderSize(c, 256), buffers: make([][]byte, *depth),
		tail: make([]byte, len(d.afterValue)), hist: hdrhistogram.New(100, int64(100*time.Second), 3)}
	for i := range x.buffers {
		x.buffers[i] = make([]byte, *size)
		for j := range x.buffers[i] {
			x.buffers[i][j] = byte(j * 7)
		}
	}
	return x, nil
}

// buffer is that of the n-th request.
func (x *conn) buffer(n int) []byte { return x.buffers[n%len(x.buffers)] }

var crlf = []byte("\r\n")

func (x *conn) send(set bool, i int64) error {
	key, value := fmt.Sprintf("bench-%010d", i%int64(*keys)), x.buffer(x.out)
	x.out++
	if !set {
		_, err := io.WriteString(x.c, x.get(key, *size))
		return err
	}
	b := net.Buffers{[]byte(x.set(key, *size)), value, crlf} // one writev
	_, err := b.WriteTo(x.c)
	return err
}

func (x *conn) receive(set bool) error {
	value := x.buffer(x.in)
	x.in++
	line, err := x.r.ReadString('\n')
	if err != nil {
		return err
	}
	line = strings.TrimSuffix(line, "\r\n")
	if set {
		if line != x.stored {
			return fmt.Errorf("set: the server answers %q", line)
		}
		return nil
	}
	if n, ok := x.value(line); !ok || n != *size {
		return fmt.Errorf("get: the server answers %q", line)
	}
	if _, err = io.ReadFull(x.r, value); err == nil {
		_, err = io.ReadFull(x.r, x.tail)
	}
	if err == nil && string(x.tail) != x.afterValue {
		err = errors.New("get: the value does not end where it should")
	}
	return err
}

// work sends requests for the numbers that next gives until it gives none, with depth in flight.
func (x *conn) work(set bool, next func() (int64, bool)) error {
	if *depth == 1 {
		for i, ok := next(); ok; i, ok = next() {
			start := time.Now()
			if err := errors.Join(x.send(set, i), x.receive(set)); err != nil {
				return err
			}
			x.done(start)
		}
		return nil
	}
	room := make(chan struct{}, *depth)     // a place for each request in flight
	started := make(chan time.Time, *depth) // when each was sent, in order
	failed := make(chan error, 1)           // of the sender
	go func() {
		defer close(started)
		for i, ok := next(); ok; i, ok = next() {
			room <- struct{}{}
			started <- time.Now()
			if err := x.send(set, i); err != nil {
				failed <- err
				return
			}
		}
		failed <- nil
	}()
	for start := range started {
		if err := x.receive(set); err != nil {
			return err
		}
		x.done(start)
		<-room
	}
	return <-failed
}

func (x *conn) done(start time.Time) { _ = x.hist.RecordValue(int64(time.Since(start))) }

// together runs f for all connections.
func together(all []*conn, f func(*conn) error) error {
	errs := make([]error, len(all))
	var wg sync.WaitGroup
	for i, x := range all {
		wg.Go(func() { errs[i] = f(x) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// result has the fields of `kvof bench --json`.
type result struct {
	Op          string  `json:"op"`
	Size        int     `json:"size"`
	Depth       int     `json:"depth"`
	Connections int     `json:"connections"`
	Seconds     float64 `json:"seconds"`
	CPUSeconds  float64 `json:"cpu_seconds"` // of this process
	Total       row     `json:"total"`
}

type row struct {
	Count int64   `json:"count"`
	MBps  float64 `json:"mb_per_s"` // 10^6 bytes
	IOPS  float64 `json:"iops"`
	Avg   float64 `json:"avg_us"`
	P50   float64 `json:"p50_us"`
	P99   float64 `json:"p99_us"`
	P999  float64 `json:"p99_9_us"`
	Max   float64 `json:"max_us"`
}

func run() error {
	set := *op == "set"
	if !set && *op != "get" || *size < 1 || *conns < 1 || *depth < 1 || *keys < 1 {
		return errors.New("op is get or set, and numbers are 1 or more")
	}
	all := make([]*conn, *conns)
	for i := range all {
		var err error
		if all[i], err = dial(); err != nil {
			return err
		}
	}
	var n atomic.Int64
	if !set {
		if err := together(all, func(x *conn) error {
			return x.work(true, func() (int64, bool) { i := n.Add(1) - 1; return i, i < int64(*keys) })
		}); err != nil {
			return err
		}
	}
	for _, x := range all {
		x.hist.Reset()
	}
	var stop atomic.Bool
	n.Store(0)
	time.AfterFunc(*duration, func() { stop.Store(true) })
	cpu, start := cpuTime(), time.Now()
	if err := together(all, func(x *conn) error {
		return x.work(set, func() (int64, bool) { return n.Add(1) - 1, !stop.Load() })
	}); err != nil {
		return err
	}
	s, used := time.Since(start).Seconds(), cpuTime()-cpu
	h := hdrhistogram.New(100, int64(100*time.Second), 3)
	for _, x := range all {
		h.Merge(x.hist)
	}
	us := func(ns int64) float64 { return float64(ns) / 1e3 }
	e := json.NewEncoder(os.Stdout)
	e.SetIndent("", "  ")
	return e.Encode(result{Op: *op, Size: *size, Depth: *depth, Connections: *conns, Seconds: s, CPUSeconds: used.Seconds(), Total: row{
		Count: h.TotalCount(), MBps: float64(h.TotalCount()) * float64(*size) / s / 1e6, IOPS: float64(h.TotalCount()) / s,
		Avg: h.Mean() / 1e3, P50: us(h.ValueAtQuantile(50)), P99: us(h.ValueAtQuantile(99)), P999: us(h.ValueAtQuantile(99.9)), Max: us(h.Max()),
	}})
}

func cpuTime() time.Duration {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		return 0
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

func main() {
	log.SetFlags(0)
	flag.Parse()
	if err := run(); err != nil {
		log.Fatal("peers: ", err)
	}
}
