package management

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/target"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type fakeSource struct {
	status               target.Status
	ready, alive, health error
	pins                 []string
	pinErr               error
}

func (s *fakeSource) Pin(nqn string, nsid uint32, key []byte, on bool) error {
	s.pins = append(s.pins, fmt.Sprintf("%s %d %x %v", nqn, nsid, key, on))
	return s.pinErr
}
func (s *fakeSource) Status() target.Status        { return s.status }
func (s *fakeSource) Ready() error                 { return s.ready }
func (s *fakeSource) Alive(context.Context) error  { return s.alive }
func (s *fakeSource) Health(context.Context) error { return s.health }

// sample is a target with one command counted: 3 stores of 1.5 us, 100 us and 40 s.
func sample() target.Status {
	latency := target.HistogramSnapshot{Count: 3, Sum: 40*time.Second + 101500*time.Nanosecond,
		Bounds: []time.Duration{time.Microsecond, 2 * time.Microsecond, 128 * time.Microsecond}, Counts: []uint64{0, 1, 1, 1}}
	return target.Status{
		Subsystems: []target.SubsystemStatus{{NQN: `nqn.2026-11.dev.kvof:a"b\c`, Namespaces: []target.NamespaceStatus{
			{NSID: 1, Type: configs.KeyValue, State: target.NamespaceServed, Capacity: 1 << 40, Used: 1 << 20, BytesIn: 4096,
				Store: &target.StoreStatus{Keys: 3, Segments: map[string]int{"open": 2}, Evictions: map[string]uint64{"capacity": 6},
					EvictionAge: target.EvictionAges{Sum: 100, Bounds: []time.Duration{time.Second, time.Minute}, Counts: []uint64{3, 2, 1}}},
				Commands: []target.CommandStats{{Name: "store", Opcode: 1, Errors: 2, Latency: latency}}},
			{NSID: 2, Type: configs.Block, State: target.NamespaceFailed, Error: "gone"},
		}}},
		Controllers: []target.ControllerStatus{{CNTLID: 7, Subsystem: `nqn.2026-11.dev.kvof:a"b\c`, Queues: []target.QueueStatus{{}, {QID: 1, InFlight: 5}}}},
	}
}

func get(t *testing.T, h http.Handler, method, path string, body io.Reader) (status int, text string, header http.Header) {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(method, path, body))
	return w.Code, w.Body.String(), w.Header()
}

func TestAnswers(t *testing.T) {
	src := &fakeSource{status: sample()}
	h := newHandler(src, "v1.2.3")
	expect := func(method, path string, body io.Reader, status int, text string) {
		t.Helper()
		if gotStatus, got, _ := get(t, h, method, path, body); gotStatus != status || got != text {
			t.Errorf("%s %s: %d %q, want %d %q", method, path, gotStatus, got, status, text)
		}
	}
	expect("GET", "/v1/health", nil, 200, "ok\n")
	expect("GET", "/v1/ready", nil, 503, "the server is starting\n")
	h.serving.Store(true)
	expect("GET", "/v1/ready", nil, 200, "ok\n")
	src.ready, src.health = errors.New("the target is draining"), errors.New("the device of namespace 1 is silent")
	expect("GET", "/v1/ready", nil, 503, "the target is draining\n")
	expect("GET", "/v1/health", nil, 200, "degraded\nthe device of namespace 1 is silent\n")
	src.alive = errors.New("the target has not answered")
	expect("GET", "/v1/health", nil, 503, "the target has not answered\n")

	expect("POST", "/v1/status", nil, 405, "Method Not Allowed\n")
	expect("DELETE", "/metrics", nil, 405, "Method Not Allowed\n")
	expect("GET", "/v1/status", strings.NewReader("x"), 413, "a request here has no body\n")
	expect("GET", "/v1/status", io.MultiReader(strings.NewReader("x")), 413, "a request here has no body\n") // of unknown length
	expect("GET", "/", nil, 404, "404 page not found\n")
	expect("GET", "/v1/status/", nil, 404, "404 page not found\n")
}

func TestStatusIsJSON(t *testing.T) {
	want := sample()
	status, body, header := get(t, newHandler(&fakeSource{status: want}, "v1.2.3"), "GET", "/v1/status", nil)
	if status != 200 || header.Get("Content-Type") != "application/json" {
		t.Fatalf("%d %v", status, header)
	}
	var got target.Status
	d := json.NewDecoder(strings.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(&got); err != nil {
		t.Fatal(err)
	}
	want.Version = "v1.2.3"
	a, _ := json.Marshal(want)
	b, _ := json.Marshal(got)
	if string(a) != string(b) {
		t.Errorf("decoded and encoded again:\n%s\nwant\n%s", b, a)
	}
}

func TestMetrics(t *testing.T) {
	_, body, _ := get(t, newHandler(&fakeSource{status: sample()}, "v1.2.3"), "GET", "/metrics", nil)
	const ns = `subsystem="nqn.2026-11.dev.kvof:a\"b\\c",nsid="1"`
	for _, want := range []string{
		`kvof_info{version="v1.2.3"} 1`,
		`kvof_commands_total{` + ns + `,command="store"} 3`,
		`kvof_command_errors_total{` + ns + `,command="store"} 2`,
		`kvof_evictions_total{` + ns + `,reason="capacity"} 6`,
		`kvof_segments{` + ns + `,state="open"} 2`,
		"# TYPE kvof_eviction_age_seconds histogram",
		`kvof_eviction_age_seconds_bucket{` + ns + `,le="1"} 3`,
		`kvof_eviction_age_seconds_bucket{` + ns + `,le="60"} 5`,
		`kvof_eviction_age_seconds_bucket{` + ns + `,le="+Inf"} 6`,
		`kvof_eviction_age_seconds_sum{` + ns + `} 100`,
		`kvof_eviction_age_seconds_count{` + ns + `} 6`,
		"# TYPE kvof_command_duration_seconds histogram",
		`kvof_command_duration_seconds_bucket{` + ns + `,command="store",le="1e-06"} 0`,
		`kvof_command_duration_seconds_bucket{` + ns + `,command="store",le="2e-06"} 1`,
		`kvof_command_duration_seconds_bucket{` + ns + `,command="store",le="0.000128"} 2`,
		`kvof_command_duration_seconds_bucket{` + ns + `,command="store",le="+Inf"} 3`,
		`kvof_command_duration_seconds_sum{` + ns + `,command="store"} 40.0001015`,
		`kvof_command_duration_seconds_count{` + ns + `,command="store"} 3`,
		`kvof_namespace_capacity_bytes{` + ns + `} 1.099511627776e+12`,
		`kvof_received_bytes_total{` + ns + `} 4096`,
		`kvof_keys{` + ns + `} 3`,
		`kvof_namespace_served{` + ns + `,type="kv"} 1`,
		`kvof_namespace_served{` + strings.Replace(ns, `"1"`, `"2"`, 1) + `,type="block"} 0`,
		`kvof_queues 2`,
		`kvof_commands_in_flight 5`,
	} {
		if !strings.Contains(body, want+"\n") {
			t.Errorf("no line %s", want)
		}
	}
	if strings.Contains(body, `kvof_namespace_used_bytes{`+strings.Replace(ns, `"1"`, `"2"`, 1)) {
		t.Error("a namespace that failed has a size")
	}
	checkFormat(t, body)
}

// checkFormat checks the rules of the text format that a scraper relies on: each family is declared once, before its
// samples, and a sample appears once.
func checkFormat(t *testing.T, text string) {
	t.Helper()
	declared, seen := map[string]bool{}, map[string]bool{}
	family := ""
	for sc := bufio.NewScanner(strings.NewReader(text)); sc.Scan(); {
		line := sc.Text()
		if f := strings.Fields(line); f[0] == "#" {
			if f[1] == "TYPE" {
				if family = f[2]; declared[family] {
					t.Errorf("%s is declared twice", family)
				}
				declared[family] = true
			}
			continue
		}
		name, value := line[:strings.LastIndexByte(line, ' ')], line[strings.LastIndexByte(line, ' ')+1:]
		if !strings.HasPrefix(name, family) {
			t.Errorf("%s is in family %s", name, family)
		}
		if _, err := strconv.ParseFloat(value, 64); err != nil || seen[name] {
			t.Errorf("wrong or again: %s", line)
		}
		seen[name] = true
	}
	for _, name := range []string{"process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds", "go_goroutines", "go_memstats_heap_alloc_bytes"} {
		if !seen[name] {
			t.Errorf("no %s", name)
		}
	}
}

func start(t *testing.T, c configs.Management) (*Server, error) {
	t.Helper()
	return Start(c, &fakeSource{}, "v1.2.3", slog.New(slog.DiscardHandler))
}

func dial(path string) *http.Client {
	return &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}}}
}

func TestPin(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kvof.sock")
	src := &fakeSource{}
	s, err := Start(configs.Management{Socket: path, Listen: netip.MustParseAddrPort("127.0.0.1:0")}, src, "v1.2.3", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ask := func(method, query string, want int) {
		t.Helper()
		req, _ := http.NewRequest(method, "http://kvof/v1/pin?"+query, nil)
		r, err := dial(path).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		r.Body.Close()
		if r.StatusCode != want {
			t.Errorf("%s %s: %d, want %d", method, query, r.StatusCode, want)
		}
	}
	ask("PUT", "subsystem=nqn.a&nsid=3&key=0aff", 204)
	ask("DELETE", "subsystem=nqn.a&nsid=3&key=0aff", 204)
	ask("PUT", "subsystem=nqn.a&nsid=x&key=0aff", 400)
	ask("PUT", "subsystem=nqn.a&nsid=3&key=0", 400)
	src.pinErr = errors.New("no such key")
	ask("PUT", "subsystem=nqn.a&nsid=3&key=01", 404)
	if want := []string{"nqn.a 3 0aff true", "nqn.a 3 0aff false", "nqn.a 3 01 true"}; !slices.Equal(src.pins, want) {
		t.Errorf("%q", src.pins)
	}
	if code, _, _ := get(t, s.handler, "PUT", "/v1/pin?subsystem=nqn.a&nsid=3&key=01", nil); code != 403 { // not through a Unix socket
		t.Errorf("through TCP: %d", code)
	}
}

func TestUnixSocket(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o077))
	path := filepath.Join(t.TempDir(), "run", "kvof.sock")
	s, err := start(t, configs.Management{Socket: path})
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode() != os.ModeSocket|0o660 {
		t.Errorf("the socket is %v, %v", info.Mode(), err)
	}
	for _, want := range []int{503, 200} {
		r, err := dial(path).Get("http://kvof/v1/ready")
		if err != nil {
			t.Fatal(err)
		}
		r.Body.Close()
		if r.StatusCode != want {
			t.Errorf("ready: %d, want %d", r.StatusCode, want)
		}
		s.Serving()
	}
	if _, err := start(t, configs.Management{Socket: path}); err == nil || !strings.Contains(err.Error(), "another server has "+path) {
		t.Errorf("a second server: %v", err)
	}
	if r, err := dial(path).Get("http://kvof/v1/health"); err != nil {
		t.Errorf("the first server after that: %v", err)
	} else {
		r.Body.Close()
	}
	s.Close()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Close: %v", err)
	}
}

func TestStaleSocketIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kvof.sock")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
	s, err := start(t, configs.Management{Socket: path})
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
}

func TestSocketErrorsSayWhatToDo(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		file:                     "not a socket",
		"/nowhere/kvof/x.sock":   "make /nowhere, or",
		"/proc/nowhere/x/y.sock": "make /proc/nowhere, or",
	} {
		_, err := start(t, configs.Management{Socket: path})
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", path, err)
		}
	}
	if b, _ := os.ReadFile(file); string(b) != "precious" {
		t.Error("the file is gone")
	}
}

func TestNothingConfigured(t *testing.T) {
	s, err := start(t, configs.Management{})
	if s != nil || err != nil {
		t.Fatal(s, err)
	}
	s.Serving()
	s.Close()
}

// TestConnectionsAreBounded holds as many connections as there may be: one more is closed, and those go on.
func TestConnectionsAreBounded(t *testing.T) {
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := free.Addr().String()
	free.Close()
	s, err := start(t, configs.Management{Listen: netip.MustParseAddrPort(addr)})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ask := func(c net.Conn) error {
		c.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.WriteString(c, "GET /v1/health HTTP/1.1\r\nHost: kvof\r\n\r\n"); err != nil {
			return err
		}
		_, err := http.ReadResponse(bufio.NewReader(c), nil)
		return err
	}
	var conns []net.Conn
	for range maxConns + 1 {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns = append(conns, c)
		if err := ask(c); (err == nil) != (len(conns) <= maxConns) {
			t.Fatalf("connection %d: %v", len(conns), err)
		}
	}
	if err := ask(conns[0]); err != nil {
		t.Error(err)
	}
	conns[0].Close()
	for end := time.Now().Add(10 * time.Second); ; {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		err = ask(c)
		c.Close()
		if err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("no place after one was given up: ", err)
		}
	}
}
