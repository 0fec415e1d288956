// Package management is the endpoint that tells people and monitoring how a server is: HTTP on a Unix socket, and on
// TCP where the configuration says so. Pins are all that it changes in the server, and through the socket alone.
//
//	GET /v1/health   200 while the process works, 503 otherwise: then a restart helps; of devices that are gone or do not
//	                 answer, "degraded" and a line each: they do not keep the others from being served
//	GET /v1/ready    200 while all that is configured is served, 503 with the reason otherwise
//	GET /v1/status   target.Status as JSON
//	GET /metrics     Prometheus text format 0.0.4
//	PUT /v1/pin?subsystem=NQN&nsid=N&key=HEX, DELETE likewise
//	                 204: the key's value is never evicted, or again; 404 with the reason otherwise
package management

import (
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/target"
)

// Source is the server that is shown. Its methods may be called at any time, by many goroutines.
type Source interface {
	Status() target.Status
	Ready() error                     // nil: all that is configured is served
	Alive(ctx context.Context) error  // nil: the server itself works
	Health(ctx context.Context) error // nil: the devices answered before ctx ended; else a line for each that did not
	Pin(nqn string, nsid uint32, key []byte, on bool) error
}

const (
	maxConns   = 64              // of both listeners together; more are closed at once
	maxHeader  = 8 << 10         // bytes of a request
	healthTime = 5 * time.Second // for the devices to answer
)

// Server is a running endpoint. The nil Server is one that is not configured.
type Server struct {
	http    http.Server
	handler *handler
	conns   atomic.Int64
}

// Start opens the sockets of the configuration and serves src on them; /v1/ready says no until Serving is called. It
// returns nil without an error when nothing is configured. The caller closes the Server.
func Start(c configs.Management, src Source, version string, log *slog.Logger) (*Server, error) {
	var lns []net.Listener
	fail := func(err error) (*Server, error) {
		for _, ln := range lns {
			ln.Close()
		}
		return nil, fmt.Errorf("management endpoint: %w", err)
	}
	if c.Socket != "" {
		ln, err := listenUnix(c.Socket)
		if err != nil {
			return fail(err)
		}
		lns = append(lns, ln)
	}
	if c.Listen.IsValid() {
		ln, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(c.Listen))
		if err != nil {
			return fail(fmt.Errorf("%w: configure another management.listen", err))
		}
		lns = append(lns, ln)
	}
	if len(lns) == 0 {
		return nil, nil
	}
	s := &Server{handler: newHandler(src, version)}
	s.http = http.Server{Handler: s.handler, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug), MaxHeaderBytes: maxHeader,
		ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 5 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute, ConnState: s.connState}
	for _, ln := range lns {
		go func() {
			if err := s.http.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
				log.Error("management endpoint", "listener", ln.Addr().String(), "error", err)
			}
		}()
		log.Info("listening for management", "address", ln.Addr().String())
	}
	return s, nil
}

// Serving tells that the server's listeners are up: from now on Source.Ready decides what /v1/ready says.
func (s *Server) Serving() {
	if s != nil {
		s.handler.serving.Store(true)
	}
}

// Close ends the endpoint and removes its Unix socket. Requests in progress have a second.
func (s *Server) Close() {
	if s == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if s.http.Shutdown(ctx) != nil {
		s.http.Close()
	}
}

// connState keeps the number of connections below maxConns.
func (s *Server) connState(c net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew:
		if s.conns.Add(1) > maxConns {
			c.Close()
		}
	case http.StateClosed:
		s.conns.Add(-1)
	}
}

// handler answers the requests.
type handler struct {
	http.ServeMux
	src     Source
	version string
	serving atomic.Bool
}

func newHandler(src Source, version string) *handler {
	h := &handler{src: src, version: version}
	h.HandleFunc("GET /v1/health", h.health)
	h.HandleFunc("GET /v1/ready", h.ready)
	h.HandleFunc("GET /v1/status", h.status)
	h.HandleFunc("GET /metrics", h.metrics)
	h.HandleFunc("PUT /v1/pin", h.pin)
	h.HandleFunc("DELETE /v1/pin", h.pin)
	return h
}

// ServeHTTP refuses requests with a body, which none of the answers depends on.
func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	if r.ContentLength != 0 {
		w.Header().Set("Connection", "close") // and the body is left unread
		http.Error(w, "a request here has no body", http.StatusRequestEntityTooLarge)
		return
	}
	h.ServeMux.ServeHTTP(w, r)
}

// verdict answers a yes-or-no question in one line.
func verdict(w http.ResponseWriter, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	reply(w, "text/plain; charset=utf-8", []byte("ok\n"))
}

func reply(w http.ResponseWriter, contentType string, body []byte) {
	w.Header().Set("Content-Type", contentType)
	_, _ = w.Write(body) // a client that went away needs no answer
}

func (h *handler) health(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), healthTime)
	defer cancel()
	if err := h.src.Alive(ctx); err != nil {
		verdict(w, err)
	} else if err := h.src.Health(ctx); err != nil {
		reply(w, "text/plain; charset=utf-8", fmt.Appendf(nil, "degraded\n%v\n", err))
	} else {
		verdict(w, nil)
	}
}

func (h *handler) ready(w http.ResponseWriter, _ *http.Request) {
	if !h.serving.Load() {
		verdict(w, errors.New("the server is starting"))
		return
	}
	verdict(w, h.src.Ready())
}

func (h *handler) status(w http.ResponseWriter, _ *http.Request) {
	s := h.src.Status()
	s.Version = h.version
	body, err := json.Marshal(s)
	if err != nil { // a bug: every Status has a JSON form
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	reply(w, "application/json", append(body, '\n'))
}

// pin pins or unpins a key.
func (h *handler) pin(w http.ResponseWriter, r *http.Request) {
	if a, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); !ok || a.Network() != "unix" {
		http.Error(w, "pins are changed through the Unix socket", http.StatusForbidden)
		return
	}
	q := r.URL.Query()
	nsid, err := strconv.ParseUint(q.Get("nsid"), 10, 32)
	key, err2 := hex.DecodeString(q.Get("key"))
	if err = cmp.Or(err, err2); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if err := h.src.Pin(q.Get("subsystem"), uint32(nsid), key, r.Method == http.MethodPut); err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (h *handler) metrics(w http.ResponseWriter, _ *http.Request) {
	s := h.src.Status()
	s.Version = h.version
	var b bytes.Buffer
	writeMetrics(&b, s)
	reply(w, "text/plain; version=0.0.4; charset=utf-8", b.Bytes())
}
