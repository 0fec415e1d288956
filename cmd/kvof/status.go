package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/target"
)

// serviceSocket is the socket of the server that systemd runs.
const serviceSocket = "/run/kvof/kvof.sock"

const (
	statusTime = 10 * time.Second // for a server to answer
	maxAnswer  = 64 << 20         // bytes
)

func newStatusCommand() *cobra.Command {
	var socket string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show what a server on this machine is doing",
		Long: "Show the ports, namespaces, commands and controllers of a server on this machine.\n" +
			"The exit status is 1 when no server answers; one that is not ready yet does.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return status(cmd.Context(), cmd.OutOrStdout(), serverSocket(cmd, socket), asJSON)
		},
	}
	cmd.Flags().StringVar(&socket, "socket", configs.DefaultSocket(), "the server's management socket")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the server's JSON as it is")
	return cmd
}

// serverSocket is the socket to ask: unless the user has named one, the service's if there is no other.
func serverSocket(cmd *cobra.Command, socket string) string {
	if !cmd.Flags().Changed("socket") && !exists(socket) && exists(serviceSocket) {
		return serviceSocket
	}
	return socket
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func status(ctx context.Context, out io.Writer, socket string, asJSON bool) error {
	ctx, cancel := context.WithTimeout(ctx, statusTime)
	defer cancel()
	code, body, err := askServer(ctx, http.MethodGet, socket, "/v1/status")
	if err != nil {
		return err
	}
	if code != http.StatusOK {
		return fmt.Errorf("the server at %s: %s", socket, strings.TrimSpace(string(body)))
	}
	if asJSON {
		_, err := out.Write(body)
		return err
	}
	var s target.Status
	if err := json.Unmarshal(body, &s); err != nil {
		return fmt.Errorf("the server at %s speaks another language, is it another version? %w", socket, err)
	}
	code, body, err = askServer(ctx, http.MethodGet, socket, "/v1/ready")
	if err != nil {
		return err
	}
	state := "ready"
	if code != http.StatusOK {
		state = "not ready: " + strings.TrimSpace(string(body))
	}
	_, err = io.WriteString(out, statusPage(&s, state, time.Now()))
	return err
}

// askServer asks for one path of a server's management endpoint.
func askServer(ctx context.Context, method, socket, path string) (code int, body []byte, err error) {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	req, err := http.NewRequestWithContext(ctx, method, "http://kvof"+path, nil)
	if err != nil {
		return 0, nil, err
	}
	r, err := client.Do(req)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return 0, nil, fmt.Errorf("no server at %s: start one (kvof serve), or name its socket with --socket", socket)
	case errors.Is(err, fs.ErrPermission):
		return 0, nil, fmt.Errorf("this user may not ask the server at %s: be root, its user, or in its group", socket)
	case errors.Is(err, context.DeadlineExceeded):
		return 0, nil, fmt.Errorf("the server at %s has not answered for %v", socket, statusTime)
	case err != nil:
		return 0, nil, fmt.Errorf("asking the server: %w", err)
	}
	defer r.Body.Close()
	if body, err = io.ReadAll(io.LimitReader(r.Body, maxAnswer)); err != nil {
		return 0, nil, fmt.Errorf("asking the server: %w", err)
	}
	return r.StatusCode, body, nil
}

// statusPage is the status for a person.
func statusPage(s *target.Status, state string, now time.Time) string {
	var b strings.Builder
	fmt.Fprintf(&b, "kvof %s: %s, up %v\n", s.Version, state, (time.Duration(s.Uptime) * time.Second))
	ring := "io_uring"
	if !s.Kernel.IOURing {
		ring = "no io_uring: " + s.Kernel.Reason
	}
	memlock := "without limit"
	if s.Kernel.MemLock != math.MaxUint64 {
		memlock = "limit " + humanize.IBytes(s.Kernel.MemLock)
	}
	fmt.Fprintf(&b, "Linux %s, %s, memlock %s\n", s.Kernel.Kernel, ring, memlock)
	pages := "normal pages"
	if s.Arena.HugePages {
		pages = "huge pages"
	}
	small, medium, large := s.Arena.Small, s.Arena.Medium, s.Arena.Large
	fmt.Fprintf(&b, "arena of %s in %s: %d of %d small, %d of %d medium and %d of %d large buffers in use, %d waits\n", humanize.IBytes(uint64(s.Arena.Size)), pages,
		small.Used, small.Used+small.Free, medium.Used, medium.Used+medium.Free, large.Used, large.Used+large.Free, small.Waits+medium.Waits+large.Waits)

	w := newTable(&b, "\nPORT\tTRANSPORT\tADDRESS\tSERVES")
	for _, p := range s.Ports {
		serves := "all subsystems"
		if p.Discovery {
			serves = "discovery"
		}
		fmt.Fprintf(w, "%d\t%s\t%s\t%s\n", p.ID, p.Transport, p.Address, serves)
	}
	w.Flush()

	if len(s.Fabrics) > 0 {
		w := newTable(&b, "\nRDMA DEVICE\tTRANSPORT\tPORT\tQUEUE PAIRS\tRECEIVES\tREGISTERED\tCOMMANDS")
		for _, f := range s.Fabrics {
			fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%d\t%s\t%d\n", f.Device, f.Transport, f.Port, f.QueuePairs, f.Receives, humanize.IBytes(uint64(f.Registered)), f.Commands)
		}
		w.Flush()
	}

	for _, sub := range s.Subsystems {
		access := "any host"
		if !sub.AllowAnyHost {
			access = plural(len(sub.Hosts), "host")
		}
		fmt.Fprintf(&b, "\nSubsystem %s (%s)\n", sub.NQN, access)
		w := newTable(&b, "NSID\tTYPE\tSTATE\tUSED\tCAPACITY\tFULL\tKEYS\tDEVICE")
		var notes []string
		for _, n := range sub.Namespaces {
			fmt.Fprintln(w, namespaceRow(&n))
			if n.Error != "" {
				notes = append(notes, n.Error)
			}
			for _, warning := range n.Device.Warnings {
				notes = append(notes, fmt.Sprintf("namespace %d: %s", n.NSID, warning))
			}
		}
		w.Flush()
		for _, note := range notes {
			fmt.Fprintf(&b, "  ! %s\n", note)
		}
		b.WriteString(storeTable(&sub))
		b.WriteString(commandTable(&sub))
	}

	for _, p := range s.Pools {
		w := newTable(&b, fmt.Sprintf("\nPool %s (%s)\nDEVICE\tSTATE\tSIZE\tLIVE\tSEGMENTS", p.Name, humanize.IBytes(uint64(p.Capacity))))
		for _, d := range p.Devices {
			state := "in use"
			if d.Lost {
				state = "LOST"
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", cmp.Or(d.Device.Path, d.Device.Kind), state, humanize.IBytes(uint64(d.Device.Size)), humanize.IBytes(uint64(d.Live)), counts(d.Segments))
		}
		w.Flush()
	}
	if len(s.Controllers) == 0 {
		b.WriteString("\nNo host is connected.\n")
		return b.String()
	}
	w = newTable(&b, "\nCNTLID\tHOST\tPEER\tQUEUES\tIN FLIGHT\tKATO\tCONNECTED\tSUBSYSTEM")
	for _, k := range s.Controllers {
		inflight, peer := 0, ""
		for _, q := range k.Queues {
			inflight += q.InFlight
			peer = cmp.Or(peer, q.Peer)
		}
		fmt.Fprintf(w, "%d\t%s\t%s\t%d\t%d\t%v\t%v\t%s\n", k.CNTLID, quoteUnprintable(k.HostNQN), peer, len(k.Queues), inflight,
			time.Duration(k.KATO)*time.Millisecond, now.Sub(k.Since).Round(time.Second), k.Subsystem)
	}
	w.Flush()
	return b.String()
}

func newTable(b *strings.Builder, header string) *tabwriter.Writer {
	w := tabwriter.NewWriter(b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, header)
	return w
}

// storeTable shows how the stores of a subsystem's Key Value namespaces fare; it is empty when there are none.
func storeTable(sub *target.SubsystemStatus) string {
	var b strings.Builder
	w := newTable(&b, "\nNSID\tPOOL\tEVICTION\tHITS\tMISSES\tEVICTED\tMEAN AGE\tWRITTEN\tAMPLIFICATION\tINDEX\tCORRUPT")
	any := false
	for _, n := range sub.Namespaces {
		k := n.Store
		if k == nil {
			continue
		}
		any = true
		evicted, age := uint64(0), time.Duration(0)
		for _, v := range k.Evictions {
			evicted += v
		}
		if v := k.Evictions["capacity"]; v > 0 {
			age = time.Duration(k.EvictionAge.Sum/v) * time.Second
		}
		fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\t%v\t%s\t%.2f\t%s\t%d\n", n.NSID, cmp.Or(k.Pool, "own"), k.Eviction, humanize.Comma(int64(k.Hits)), humanize.Comma(int64(k.Misses)),
			humanize.Comma(int64(evicted)), age, humanize.IBytes(k.Written), k.WriteAmplification, humanize.IBytes(uint64(k.IndexBytes)), k.Corrupt)
	}
	if !any {
		return ""
	}
	w.Flush()
	return b.String()
}

// counts writes what is not zero, by name.
func counts(m map[string]int) string {
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(m)) {
		if m[name] > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", m[name], name))
		}
	}
	return strings.Join(parts, ", ")
}

// commandTable shows the commands that a subsystem's hosts have sent; it is empty when there were none.
func commandTable(sub *target.SubsystemStatus) string {
	var b strings.Builder
	w := newTable(&b, "\nNSID\tCOMMAND\tCOUNT\tERRORS\tMEAN\tP50\tP99")
	any := false
	for _, n := range sub.Namespaces {
		for _, c := range n.Commands {
			if l := c.Latency; l.Count > 0 {
				any = true
				fmt.Fprintf(w, "%d\t%s\t%s\t%d\t%v\t%v\t%v\n", n.NSID, c.Name, humanize.Comma(int64(l.Count)), c.Errors,
					twoDigits(l.Sum/time.Duration(l.Count)), twoDigits(l.Quantile(0.5)), twoDigits(l.Quantile(0.99)))
			}
		}
	}
	if !any {
		return ""
	}
	w.Flush()
	return b.String()
}

func namespaceRow(n *target.NamespaceStatus) string {
	state := string(n.State)
	if n.ReadOnly {
		state += ", read-only"
	}
	if n.Device.Gone {
		state += ", drive gone"
	}
	device := n.Device.Kind
	if n.Device.Path != "" {
		device += " " + n.Device.Path
	}
	if n.State != target.NamespaceServed {
		return fmt.Sprintf("%d\t%s\t%s\t\t\t\t\t%s", n.NSID, n.Type, state, device)
	}
	if n.Store != nil && n.Store.Pool != "" {
		device = "pool " + n.Store.Pool
	} else if n.Device.Kind == string(configs.DeviceNVMe) {
		for _, f := range []string{"iopoll", "registered_file"} {
			if slices.Contains(n.Device.Features, f) {
				device += ", " + strings.ReplaceAll(f, "_", " ")
			}
		}
		if n.Device.Placements > 0 {
			device += fmt.Sprintf(", %d placement handles", n.Device.Placements)
		}
	} else if n.Device.Direct {
		device += ", direct I/O"
	} else if n.Device.Kind != string(configs.DeviceMemory) {
		device += ", page cache"
	}
	if n.Device.Registered > 0 && (n.Store == nil || n.Store.Pool == "") {
		device += ", registered buffers"
	}
	if n.Store == nil {
		return fmt.Sprintf("%d\t%s\t%s\t\t%s\t\t\t%s", n.NSID, n.Type, state, humanize.IBytes(uint64(n.Capacity)), device)
	}
	return fmt.Sprintf("%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s", n.NSID, n.Type, state, humanize.IBytes(uint64(n.Used)), humanize.IBytes(uint64(n.Capacity)),
		bar(n.Used, n.Capacity), humanize.Comma(int64(n.Store.Keys)), device)
}

// bar draws how full something is. Only what is empty shows as empty, only what is full as full.
func bar(used, capacity int64) string {
	const width = 10
	share := 0.0
	if capacity > 0 {
		share = min(1, max(0, float64(used)/float64(capacity)))
	}
	filled := int(math.Ceil(share * width))
	percent := int(share * 100)
	return fmt.Sprintf("%s%s %d%%", strings.Repeat("#", filled), strings.Repeat(".", width-filled), percent)
}

// twoDigits rounds to two significant digits: a histogram with buckets that double knows no more.
func twoDigits(d time.Duration) time.Duration {
	unit := time.Duration(1)
	for d/unit >= 100 {
		unit *= 10
	}
	return d.Round(unit)
}

// quoteUnprintable makes a host's text safe to show on a terminal.
func quoteUnprintable(s string) string {
	q := fmt.Sprintf("%q", s)
	return q[1 : len(q)-1]
}
