package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/dustin/go-humanize"
	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/kvof/kvof/host"
	"github.com/kvof/kvof/nvmeof"
)

const defaultAddress = "127.0.0.1:8009"

// client holds the flags with which every client command finds and reaches a namespace.
type client struct {
	cmd                      *cobra.Command
	address, transport       string
	nqn, hostNQN, device     string
	nsid                     uint32
	headerDigest, dataDigest bool
	depth, queues            int
	reconnect                time.Duration
	json                     bool
}

// newClient adds the flags to cmd; depthFlag is the name of the one for the queue depth.
func newClient(cmd *cobra.Command, depthFlag string, depth int) *client {
	c := &client{cmd: cmd}
	c.addressFlags()
	f := cmd.Flags()
	f.StringVarP(&c.nqn, "nqn", "n", "", "subsystem `NQN` (default: the only one that discovery shows)")
	f.Uint32Var(&c.nsid, "namespace", 0, "`NSID` (default: the only one of the kind needed)")
	f.IntVar(&c.depth, depthFlag, depth, "commands in flight on each connection")
	f.IntVar(&c.queues, "queues", 1, "connections, one I/O queue each")
	f.DurationVar(&c.reconnect, "reconnect", 10*time.Second, "for how long to try again when a connection is lost; 0 = not")
	f.StringVarP(&c.device, "device", "d", "", "a Key Value namespace that this machine's kernel has attached, instead: `/dev/ngXnY`, its subsystem's NQN, or its NGUID")
	for _, other := range []string{"address", "transport", "nqn", "queues", depthFlag, "reconnect", "hostnqn", "header-digest", "data-digest"} {
		cmd.MarkFlagsMutuallyExclusive("device", other)
	}
	return c
}

// addressFlags adds the flags that reaching a discovery controller takes.
func (c *client) addressFlags() {
	address := os.Getenv("KVOF_ADDRESS")
	if address == "" {
		address = defaultAddress
	}
	f := c.cmd.Flags()
	f.StringVarP(&c.address, "address", "a", address, "`HOST:PORT` of a discovery controller or an I/O port; also in KVOF_ADDRESS")
	f.StringVarP(&c.transport, "transport", "t", host.TCP, "tcp or rdma")
	f.StringVar(&c.hostNQN, "hostnqn", "", "this host's `NQN` (default: /etc/nvme/hostnqn, else one made from the machine id)")
	f.BoolVar(&c.headerDigest, "header-digest", false, "protect PDU headers with CRC32C")
	f.BoolVar(&c.dataDigest, "data-digest", false, "protect data with CRC32C")
	f.BoolVar(&c.json, "json", false, "print one JSON document, for scripts")
}

// discover asks the discovery controller at the address.
func (c *client) discover(ctx context.Context, referrals bool) ([]nvmeof.DiscoveryEntry, error) {
	if c.transport != host.TCP && c.transport != host.RDMA {
		return nil, usageError{fmt.Errorf("transport %q is neither tcp nor rdma", c.transport)}
	}
	if _, _, err := net.SplitHostPort(c.address); err != nil {
		return nil, usageError{fmt.Errorf("address %q is not HOST:PORT", c.address)}
	}
	entries, err := host.Discover(ctx, c.address, host.DiscoverOptions{Transport: c.transport, HostNQN: c.hostNQN, HeaderDigest: c.headerDigest, DataDigest: c.dataDigest, Referrals: referrals})
	if errors.Is(err, syscall.ECONNREFUSED) {
		return nil, fmt.Errorf("nothing listens on %s: start a target (kvof serve), or name another address with --address or KVOF_ADDRESS", c.address)
	}
	return entries, err
}

// connect finds the subsystem by discovery and connects to it.
func (c *client) connect(ctx context.Context) (*host.Controller, error) {
	if c.depth < 1 || c.queues < 1 {
		return nil, usageError{errors.New("queues and their depth are 1 or more")}
	}
	entries, err := c.discover(ctx, true)
	var status nvmeof.Status
	if err != nil && !(c.nqn != "" && errors.As(err, &status)) { // an I/O port may know no discovery, but the subsystem
		return nil, err
	}
	addr, nqn, err := c.choose(entries)
	if err != nil {
		return nil, err
	}
	return host.Connect(ctx, host.Options{Transport: c.transport, Addr: addr, SubNQN: nqn, HostNQN: c.hostNQN,
		HeaderDigest: c.headerDigest, DataDigest: c.dataDigest, QueueDepth: c.depth, IOQueues: c.queues, Reconnect: c.reconnect})
}

// choose picks the address and NQN of the subsystem wanted from discovery records.
func (c *client) choose(entries []nvmeof.DiscoveryEntry) (addr, nqn string, err error) {
	var names []string
	for _, e := range entries {
		if host.Transport(&e) != c.transport || e.SubType != nvmeof.SubtypeNVM || c.nqn != "" && e.SubNQN != c.nqn {
			continue
		}
		if !slices.Contains(names, e.SubNQN) {
			names = append(names, e.SubNQN)
		}
		if a := net.JoinHostPort(e.TRAddr, e.TRSVCID); addr == "" || a == c.address {
			addr = a
		}
	}
	switch {
	case len(names) == 1:
		return addr, names[0], nil
	case c.nqn != "": // not listed, for this host or at all: the target says why
		return c.address, c.nqn, nil
	case len(names) == 0:
		return "", "", fmt.Errorf("discovery at %s shows no subsystem over %s for this host", c.address, c.transport)
	}
	return "", "", usageError{fmt.Errorf("choose a subsystem with --nqn:\n  %s", strings.Join(names, "\n  "))}
}

// namespace connects and finds the namespace of the command set wanted.
func (c *client) namespace(ctx context.Context, csi nvmeof.CSI) (*host.Controller, uint32, error) {
	ctrl, err := c.connect(ctx)
	if err != nil {
		return nil, 0, err
	}
	nsid, err := c.chooseNamespace(ctx, ctrl, csi)
	if err != nil {
		ctrl.Close()
		return nil, 0, err
	}
	return ctrl, nsid, nil
}

func (c *client) chooseNamespace(ctx context.Context, ctrl *host.Controller, csi nvmeof.CSI) (uint32, error) {
	if c.nsid != 0 {
		return c.nsid, nil
	}
	all, err := ctrl.Namespaces(ctx)
	if err != nil {
		return 0, err
	}
	var ids []string
	for _, ns := range all {
		if ns.CSI == csi {
			c.nsid = ns.NSID
			ids = append(ids, fmt.Sprint(ns.NSID))
		}
	}
	kind := map[nvmeof.CSI]string{nvmeof.CSIKV: "Key Value", nvmeof.CSINVM: "block"}[csi]
	switch len(ids) {
	case 0:
		return 0, fmt.Errorf("the subsystem has no %s namespace", kind)
	case 1:
		return c.nsid, nil
	}
	return 0, usageError{fmt.Errorf("choose a %s namespace with --namespace: %s", kind, strings.Join(ids, ", "))}
}

// openKV opens the Key Value namespace that the flags name. The closer ends the connection.
func (c *client) openKV(ctx context.Context) (*host.KV, io.Closer, error) {
	if c.device != "" {
		d, err := host.OpenDevice(c.device, c.nsid)
		if err != nil {
			return nil, nil, err
		}
		return d.KV(), d, nil
	}
	ctrl, nsid, err := c.namespace(ctx, nvmeof.CSIKV)
	if err != nil {
		return nil, nil, err
	}
	kv, err := ctrl.KV(ctx, nsid)
	if err != nil {
		ctrl.Close()
		return nil, nil, err
	}
	return kv, ctrl, nil
}

// withValues runs f with the values of the Key Value namespace that the flags name; for part see [host.KV.Values].
func (c *client) withValues(part int, f func(ctx context.Context, v *host.Values) error) error {
	ctx := c.cmd.Context()
	kv, closer, err := c.openKV(ctx)
	if err != nil {
		return err
	}
	defer closer.Close()
	return f(ctx, kv.Values(part))
}

// print writes v as JSON with --json, else the text.
func (c *client) print(v any, format string, args ...any) error {
	if c.json {
		e := json.NewEncoder(c.cmd.OutOrStdout())
		e.SetIndent("", "  ")
		return e.Encode(v)
	}
	_, err := fmt.Fprintf(c.cmd.OutOrStdout(), format, args...)
	return err
}

// progress shows a bar for size bytes (-1: not known) on a terminal, and nothing elsewhere.
func (c *client) progress(size int64, what string) *progressbar.ProgressBar {
	w := io.Discard
	if f, ok := c.cmd.ErrOrStderr().(*os.File); ok && !c.json && term.IsTerminal(int(f.Fd())) {
		w = f
	}
	return progressbar.NewOptions64(size, progressbar.OptionSetWriter(w), progressbar.OptionSetDescription(what),
		progressbar.OptionShowBytes(true), progressbar.OptionUseIECUnits(true), progressbar.OptionClearOnFinish(),
		progressbar.OptionThrottle(100*1e6), progressbar.OptionSetVisibility(w != io.Discard))
}

// keyFlags say how KEY arguments are read.
type keyFlags struct{ hash, hex bool }

func (k *keyFlags) add(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&k.hash, "hash-key", false, "use the first 16 bytes of the SHA-256 of KEY, which may then be of any length")
	cmd.Flags().BoolVar(&k.hex, "hex-key", false, "KEY is 1 to 16 bytes in hexadecimal")
	cmd.MarkFlagsMutuallyExclusive("hash-key", "hex-key")
}

// parse reads a KEY argument: text of up to 16 bytes is the key, 32 hexadecimal digits are a 16-byte key.
func (k *keyFlags) parse(arg string) ([]byte, error) {
	raw, err := hex.DecodeString(arg)
	switch {
	case arg == "":
		return nil, usageError{errors.New("KEY is empty")}
	case k.hash:
		sum := sha256.Sum256([]byte(arg))
		return sum[:nvmeof.MaxKeyLen], nil
	case k.hex && (err != nil || len(raw) > nvmeof.MaxKeyLen):
		return nil, usageError{fmt.Errorf("key %q is not 1 to 16 bytes in hexadecimal", arg)}
	case k.hex, err == nil && len(raw) == nvmeof.MaxKeyLen:
		return raw, nil
	case len(arg) > nvmeof.MaxKeyLen:
		return nil, usageError{fmt.Errorf("key %q is %d bytes long: a key is up to 16 bytes of text or 32 hexadecimal digits (--hash-key takes any text)", arg, len(arg))}
	}
	return []byte(arg), nil
}

func (k *keyFlags) parseAll(args []string) ([][]byte, error) {
	keys := make([][]byte, len(args))
	for i, a := range args {
		var err error
		if keys[i], err = k.parse(a); err != nil {
			return nil, err
		}
	}
	return keys, nil
}

// keyText shows a key: as text when it is printable and could be given as such, else in hexadecimal.
func keyText(key []byte) string {
	s := string(key)
	odd := func(r rune) bool { return !unicode.IsPrint(r) || r == ' ' }
	if !utf8.Valid(key) || strings.ContainsFunc(s, odd) {
		return hex.EncodeToString(key)
	}
	return s
}

// keyJSON identifies a key in JSON output.
type keyJSON struct {
	Key string `json:"key"` // as keyText shows it
	Hex string `json:"hex"`
}

func newKeyJSON(key []byte) keyJSON { return keyJSON{keyText(key), hex.EncodeToString(key)} }

// storeError says what a person can do about a status.
func storeError(key []byte, err error) error {
	switch {
	case errors.Is(err, nvmeof.KeyDoesNotExist):
		return fmt.Errorf("key %s is absent", keyText(key))
	case errors.Is(err, nvmeof.KeyExists):
		return fmt.Errorf("key %s exists", keyText(key))
	case errors.Is(err, nvmeof.CapacityExceeded):
		return fmt.Errorf("the namespace is full: delete keys, or give it a larger device (%w)", err)
	case errors.Is(err, host.ErrTransferSize):
		return fmt.Errorf("%w: store it with --part for this path", err)
	}
	return err
}

// sizeFlag is a number of bytes on the command line, such as 2MiB.
type sizeFlag int64

func (s *sizeFlag) String() string { return strings.ReplaceAll(humanize.IBytes(uint64(*s)), " ", "") }
func (s *sizeFlag) Type() string   { return "SIZE" }
func (s *sizeFlag) Set(v string) error {
	n, err := humanize.ParseBytes(v)
	if err != nil || n > 1<<62 {
		return fmt.Errorf("%q is not a size such as 4KiB or 2MiB", v)
	}
	*s = sizeFlag(n)
	return nil
}
