package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/management"
	verbs "github.com/kvof/kvof/rdma"
	"github.com/kvof/kvof/target"
	"github.com/kvof/kvof/target/rdma"
	"github.com/kvof/kvof/target/tcp"
	"github.com/kvof/kvof/uring"
)

const (
	drainTime  = 20 * time.Second // for commands in flight, when the server stops
	closeTime  = 5 * time.Second  // for connections to go, after that, and for signs of life
	deviceTime = 15 * time.Second // between looks at the devices
)

func newServeCommand() *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Serve the namespaces of a configuration",
		Long: "Serve the namespaces of a configuration until SIGTERM or SIGINT, which drains commands in flight first.\n" +
			"SIGHUP reads the configuration again. Without --config the built-in one is served: a Key Value and a\nblock namespace on sparse files in ./kvof-data, on 127.0.0.1.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return serve(cmd.Context(), path) },
	}
	cmd.Flags().StringVarP(&path, "config", "c", "", "TOML file")
	return cmd
}

// loadConfig reads the configuration at path, the built-in one when path is empty.
func loadConfig(path string) (*configs.Config, error) {
	if path == "" {
		return configs.Parse("built-in configuration", configs.Default())
	}
	return configs.Load(path)
}

// server is a running kvof serve.
type server struct {
	path      string
	started   *configs.Config // what needs a restart to change is as this says
	cfg       *configs.Config // served
	level     *slog.LevelVar
	log       *slog.Logger
	notify    notifier
	target    *target.Target
	fabric    *rdma.Transport // nil when nothing listens over RDMA
	listeners []listener
}

// listener is a port of either transport.
type listener interface {
	StopAccepting()
	Close(ctx context.Context) error
}

func serve(ctx context.Context, path string) (err error) {
	s := &server{path: path, level: new(slog.LevelVar)}
	s.log = newLogger(os.Stderr, s.level)
	s.notify = notifier{s.log}
	if s.cfg, err = loadConfig(path); err != nil {
		return err
	}
	s.started = s.cfg
	s.level.Set(s.cfg.LogLevel)
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)

	sockets, err := inheritSockets()
	if err != nil {
		return err
	}
	arena, err := uring.NewArena(int(s.cfg.Memory.Arena))
	if err != nil {
		return err
	}
	s.target = target.New(arena, s.cfg.Limits, s.log)
	defer func() {
		if e := s.target.Close(); e != nil && err == nil {
			err = e
		}
		if e := arena.Close(); e != nil {
			s.log.Warn("arena", "error", e)
		}
	}()
	manage, err := management.Start(s.cfg.Management, s.target, version(), s.log)
	if err != nil {
		return err
	}
	defer manage.Close()
	s.notify.Status("opening namespaces")
	s.target.OnOpening(func(pool string, done, total int) {
		s.notify.Status(strings.TrimSpace(fmt.Sprintf("opening a store: %d of %d segments %s", done, total, pool)))
	})
	if err := s.target.Apply(s.cfg); err != nil {
		return err
	}
	defer s.closeListeners()
	if err := s.listen(sockets); err != nil {
		return err
	}
	for _, addr := range sockets.CloseUnused() {
		s.log.Warn("the socket unit opened an address that no listener has", "address", addr)
	}
	wctx, stop := context.WithCancel(ctx)
	defer stop()
	go s.notify.Watchdog(wctx, func() error {
		actx, cancel := context.WithTimeout(wctx, closeTime)
		defer cancel()
		return s.target.Alive(actx)
	})
	go s.watchDevices(wctx)
	manage.Serving()
	s.notify.Ready(s.summary())
	s.log.Info("serving", "namespaces", s.summary())
	for {
		select {
		case <-hup:
			s.reload()
		case <-ctx.Done():
			s.notify.Stopping("draining")
			s.log.Info("draining")
			for _, l := range s.listeners {
				l.StopAccepting()
			}
			s.target.Drain(drainTime)
			return nil
		}
	}
}

// watchDevices tells the log and the service manager of devices that are gone or do not answer, until ctx ends. Nothing
// is restarted for them: that would cost the hosts the other devices too, and a drive that hangs keeps a process from ending.
func (s *server) watchDevices(ctx context.Context) {
	tick := time.NewTicker(deviceTime)
	defer tick.Stop()
	for degraded := false; ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		hctx, cancel := context.WithTimeout(ctx, closeTime)
		err := s.target.Health(hctx)
		cancel()
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			if !degraded {
				s.log.Error("degraded", "error", err)
			}
			s.notify.Status("degraded: " + err.Error())
		case degraded:
			s.log.Info("all devices answer again")
			s.notify.Status("all devices answer again")
		}
		degraded = err != nil
	}
}

// listen opens the ports of the configuration.
func (s *server) listen(sockets *sockets) error {
	for _, l := range s.cfg.Listeners {
		if l.Transport == configs.TransportRDMA {
			if err := s.listenRDMA(l.Address); err != nil {
				return err
			}
			continue
		}
		ln, err := sockets.Listen(l.Address)
		if err != nil {
			return err
		}
		s.listeners = append(s.listeners, tcp.Listen(s.target, ln, false, s.log))
		s.log.Info("listening", "transport", l.Transport, "address", ln.Addr().String())
	}
	for _, addr := range s.cfg.Discovery.Addresses {
		ln, err := sockets.Listen(addr)
		if err != nil {
			return err
		}
		s.listeners = append(s.listeners, tcp.Listen(s.target, ln, true, s.log))
		s.log.Info("listening for discovery", "address", ln.Addr().String())
	}
	return nil
}

// listenRDMA opens a port over RDMA; the first one opens rdma-core.
func (s *server) listenRDMA(addr netip.AddrPort) error {
	if s.fabric == nil {
		v, err := verbs.System()
		if err != nil {
			return fmt.Errorf("listener %s: %w", addr, err)
		}
		s.fabric = rdma.New(s.target, v, s.log)
	}
	ln, err := s.fabric.Listen(addr, false)
	if err != nil {
		return err
	}
	s.listeners = append(s.listeners, ln)
	s.log.Info("listening", "transport", configs.TransportRDMA, "address", ln.Addr().String())
	return nil
}

func (s *server) closeListeners() {
	ctx, cancel := context.WithTimeout(context.Background(), closeTime)
	defer cancel()
	for _, l := range s.listeners {
		if err := l.Close(ctx); err != nil {
			s.log.Warn("connections are left", "error", err)
		}
	}
	if s.fabric != nil {
		if err := s.fabric.Close(); err != nil {
			s.log.Warn("RDMA", "error", err)
		}
	}
}

// reload applies what of the configuration has changed and can change live. A configuration with a mistake changes
// nothing.
func (s *server) reload() {
	s.notify.Reloading()
	defer func() { s.notify.Ready(s.summary()) }()
	cfg, err := loadConfig(s.path)
	if err != nil {
		for line := range strings.SplitSeq(err.Error(), "\n") {
			s.log.Error("reload: nothing changed", "error", line)
		}
		return
	}
	for _, key := range configs.Changes(s.started, cfg) {
		s.log.Warn("reload: a change needs a restart", "key", key)
	}
	s.level.Set(cfg.LogLevel)
	if err := s.target.Apply(cfg); err != nil {
		s.log.Error("reload", "error", err)
	}
	s.cfg = cfg
	s.log.Info("reloaded", "namespaces", s.summary())
}

// summary says in one line what is served.
func (s *server) summary() string {
	n := 0
	for _, sub := range s.cfg.Subsystems {
		n += len(sub.Namespaces)
	}
	return fmt.Sprintf("%d subsystems, %d namespaces", len(s.cfg.Subsystems), n)
}
