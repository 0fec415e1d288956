package main

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/kvlayer"
	"github.com/kvof/kvof/uring"
)

// setupOptions are the flags of kvof setup.
type setupOptions struct {
	drives, wipe []string
	rdma         []string
	listen       netip.Addr
	nqn          string
	hosts        []string
	kind         string // kv or block
}

func newSetupCommand() *cobra.Command {
	o := setupOptions{}
	var listen string
	cmd := &cobra.Command{
		Use:   "setup --drives DRIVE,... [--rdma DEVICE,...]",
		Short: "Prepare NVMe drives and print a configuration that serves them",
		Long: "Setup looks at the drives, the RDMA devices, the cores and the memory of this machine, prepares the drives it is given, and prints\n" +
			"a configuration for kvof serve; what it does it tells on standard error.\n\n" +
			"It refuses drives that are mounted or otherwise in use, and those that hold partitions, a file system or other data unless --wipe\n" +
			"names them; if it refuses one it changes none. A drive that holds a kvof store keeps it. A wiped drive loses everything.",
		Example: "  kvof setup --drives /dev/ng0n1,/dev/ng1n1 --wipe /dev/ng1n1 --rdma all > /etc/kvof/kvof.toml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if o.listen, err = netip.ParseAddr(listen); err != nil {
				return usageError{fmt.Errorf("--listen %s is not an IP address", listen)}
			}
			if o.kind != string(configs.KeyValue) && o.kind != string(configs.Block) {
				return usageError{fmt.Errorf("--type %s: write kv or block", o.kind)}
			}
			return setup(o, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&o.drives, "drives", nil, "the `DRIVES` to use: /dev/ng0n1, /dev/nvme0n1, links to them, or all that hold nothing or a kvof store (all)")
	f.StringSliceVar(&o.wipe, "wipe", nil, "`DRIVES` among them whose contents are to be erased")
	f.StringSliceVar(&o.rdma, "rdma", nil, "RDMA `DEVICES` to listen on too: names such as mlx5_0, or all")
	f.StringVar(&listen, "listen", "0.0.0.0", "IP `ADDRESS` to listen on over TCP, at ports 4420 and 8009")
	f.StringVar(&o.nqn, "nqn", "nqn.2026-11.dev.kvof:"+hostName(), "the subsystem's `NQN`")
	f.StringSliceVar(&o.hosts, "host", nil, "host `NQNS` that may connect; any, when there are none")
	f.StringVar(&o.kind, "type", string(configs.KeyValue), "what the drives become: kv, context blocks, or block, disks")
	_ = cmd.MarkFlagRequired("drives")
	return cmd
}

func hostName() string {
	name, _ := os.Hostname()
	return cmp.Or(strings.ToLower(name), "kvof")
}

func setup(o setupOptions, out, story io.Writer) error {
	drives, err := chooseDrives(o, story)
	if err != nil {
		return err
	}
	ports, err := rdmaPorts("/sys", o.rdma)
	if err != nil {
		return err
	}
	m := readMachine()
	fmt.Fprintf(story, "this machine: %s, %s of memory, %s of it in free huge pages, Linux %s\n", plural(m.cores, "core"), humanize.IBytes(m.memory), humanize.IBytes(m.huge), uring.Probe().Kernel)
	if m.huge == 0 {
		fmt.Fprintf(story, "  huge pages would save work: sysctl vm.nr_hugepages=%d before kvof starts\n", m.arena()>>21)
	}
	for _, p := range ports {
		fmt.Fprintf(story, "%s: %s at %s\n", p.device, p.netdev, p.addr)
	}
	if err := prepareDrives(drives, o, story); err != nil {
		return err
	}
	text := setupConfig(o, m, drives, ports)
	if _, err := configs.Parse("the configuration made", []byte(text)); err != nil {
		return err
	}
	_, err = io.WriteString(out, text)
	return err
}

// chosenDrive is a drive to be used, and erased before if wipe.
type chosenDrive struct {
	listedDrive
	wipe bool
}

// chooseDrives looks at the drives and refuses those that must not be touched.
func chooseDrives(o setupOptions, story io.Writer) (drives []chosenDrive, err error) {
	all := slices.Equal(o.drives, []string{"all"})
	var found []*uring.Drive
	if all {
		if found, err = uring.ListDrives(); err != nil {
			fmt.Fprintln(story, err)
		}
	}
	for _, path := range o.drives {
		if all {
			break
		}
		d, err := uring.ReadDrive(path)
		if err != nil {
			return nil, err
		}
		found = append(found, d)
	}
	wipe := map[string]bool{}
	for _, path := range o.wipe {
		d, err := uring.ReadDrive(path)
		if err != nil {
			return nil, err
		}
		wipe[d.Path] = true
	}
	refused := 0
	for _, d := range found {
		c := chosenDrive{describeDrive(d), wipe[d.Path]}
		delete(wipe, d.Path)
		fmt.Fprintf(story, "%s: %s %s, serial number %s, %s\n", d.Path, humanize.IBytes(uint64(d.Size)), quoteUnprintable(d.Model), quoteUnprintable(d.Serial), c.Contents)
		switch why := c.refusal(); {
		case slices.ContainsFunc(drives, func(x chosenDrive) bool { return x.Path == d.Path }):
			return nil, usageError{fmt.Errorf("%s is named twice", d.Path)}
		case why == "":
			drives = append(drives, c)
		default:
			refused++
			fmt.Fprintf(story, "  refused: %s\n", why)
		}
	}
	for path := range wipe {
		return nil, usageError{fmt.Errorf("--wipe %s: it is not among --drives", path)}
	}
	switch {
	case refused > 0 && !all:
		return nil, fmt.Errorf("%s refused; nothing was changed", plural(refused, "drive"))
	case len(drives) == 0:
		return nil, errors.New("there is no drive to use")
	}
	return drives, nil
}

// refusal says why a drive must not be used, and what to do; "" if it may be.
func (c *chosenDrive) refusal() string {
	partitioned := func(use string) bool { return strings.HasPrefix(use, "it has ") }
	mounted := slices.DeleteFunc(slices.Clone(c.Used), partitioned)
	switch {
	case c.Unfit != "":
		return c.Unfit
	case len(mounted) > 0:
		return strings.Join(mounted, ", ") + ": free it first"
	case c.wipe:
		return ""
	case len(c.Used) > 0:
		return strings.Join(c.Used, ", ") + ": to erase them name it with --wipe too"
	case c.Contents != contentsEmpty && c.Contents != contentsKvof:
		return "it holds " + c.Contents + ": to erase it name the drive with --wipe too"
	}
	return ""
}

// deviceReader reads a device through its ops.
type deviceReader struct {
	d     uring.Device
	arena *uring.Arena
}

func (r deviceReader) ReadAt(b []byte, off int64) (n int, err error) {
	for n < len(b) {
		buf := r.arena.Get(min(len(b)-n, uring.LargeBuf))
		op := uring.Op{Off: off + int64(n), Data: buf.Data}
		err = op.Do(r.d)
		n += copy(b[n:], buf.Data)
		buf.Put()
		if err != nil {
			return 0, err
		}
	}
	return n, nil
}

// prepareDrives takes hold of the drives, erases those that are to be, and makes a pool of them where one is wanted.
func prepareDrives(drives []chosenDrive, o setupOptions, story io.Writer) (err error) {
	arena, err := uring.NewArena((16 + len(drives)) << 20)
	if err != nil {
		return err
	}
	defer func() { err = cmp.Or(err, arena.Close()) }()
	var devs []uring.Device
	var erased []string
	defer func() {
		for _, d := range devs {
			err = cmp.Or(err, d.Close())
		}
		for _, block := range erased {
			rereadPartitions(block) // which nobody can while it is held
		}
	}()
	for i := range drives {
		c := &drives[i]
		d, err := uring.OpenNVMe(c.Path, uring.NVMeOptions{Arena: arena})
		if err != nil {
			return err
		}
		devs = append(devs, d)
		// Nobody else can change it from here on.
		contents, err := contentsOf(deviceReader{d, arena}, d.Size())
		if err != nil {
			return err
		}
		if contents != c.Contents {
			return fmt.Errorf("%s held %s and now holds %s: somebody else uses it", c.Path, c.Contents, contents)
		}
	}
	for i, c := range drives {
		if c.wipe && c.Contents != contentsEmpty {
			fmt.Fprintf(story, "%s: erasing %s\n", c.Path, c.Contents)
			if err := erase(devs[i]); err != nil {
				return err
			}
			erased = append(erased, c.Block)
		}
	}
	if o.kind != string(configs.KeyValue) {
		return nil
	}
	p, err := kvlayer.OpenPool(devs, arena, kvlayer.PoolOptions{})
	if err != nil {
		return fmt.Errorf("%w; to begin anew name the drives with --wipe", err)
	}
	fmt.Fprintf(story, "a pool of %s, %s\n", plural(len(devs), "drive"), humanize.IBytes(uint64(p.Capacity())))
	return p.Close()
}

// erase deallocates the whole drive and writes zeroes over both its ends, where everything begins.
func erase(d uring.Device) error {
	n := min(edge, d.Size())
	for _, op := range []*uring.Op{
		{Kind: uring.OpDiscard, Len: d.Size()},
		{Kind: uring.OpZero, Len: n},
		{Kind: uring.OpZero, Off: d.Size() - n, Len: n},
		{Kind: uring.OpFlush},
	} {
		if err := op.Do(d); err != nil {
			return err
		}
	}
	return nil
}

// rereadPartitions has the kernel forget the partitions of a block device that was erased.
func rereadPartitions(block string) {
	if f, err := os.Open(block); err == nil {
		_ = unix.IoctlSetInt(int(f.Fd()), unix.BLKRRPART, 0)
		f.Close()
	}
}

// machine is what setup knows of the machine, in bytes.
type machine struct {
	cores        int
	memory, huge uint64
}

func readMachine() machine {
	m := machine{cores: runtime.NumCPU()}
	b, _ := os.ReadFile("/proc/meminfo")
	m.memory, m.huge = parseMeminfo(string(b))
	return m
}

// parseMeminfo returns the memory, and the free huge pages of 2 MiB, in bytes.
func parseMeminfo(text string) (memory, huge uint64) {
	fields := map[string]uint64{}
	s := bufio.NewScanner(strings.NewReader(text))
	for s.Scan() {
		if name, value, ok := strings.Cut(s.Text(), ":"); ok {
			fields[name], _ = strconv.ParseUint(strings.Fields(value + " 0")[0], 10, 64)
		}
	}
	if fields["Hugepagesize"] == 2048 {
		huge = fields["HugePages_Free"] << 21
	}
	return fields["MemTotal"] << 10, huge
}

// arena is how much of the memory to take for payload: the huge pages if they are of any use, an eighth otherwise.
func (m machine) arena() uint64 {
	const low, high = 64 << 20, 4 << 30
	if m.huge >= low {
		return min(m.huge, high)
	}
	return max(low, min(m.memory/8, high)) &^ (1<<20 - 1)
}

// rdmaPort is an RDMA device with the address that hosts reach it at.
type rdmaPort struct {
	device, netdev string
	addr           netip.Addr
}

// rdmaPorts finds the active RDMA devices among names, or all of them.
func rdmaPorts(sys string, names []string) (ports []rdmaPort, err error) {
	if slices.Equal(names, []string{"all"}) {
		names = nil
		found, _ := filepath.Glob(filepath.Join(sys, "class/infiniband/*"))
		for _, f := range found {
			names = append(names, filepath.Base(f))
		}
		if len(names) == 0 {
			return nil, errors.New("this machine has no RDMA device: leave --rdma out, or see rdma-core's rdma link")
		}
	}
	for _, name := range names {
		dir := filepath.Join(sys, "class/infiniband", name)
		if _, err := os.Stat(dir); err != nil {
			return nil, fmt.Errorf("there is no RDMA device %s: rdma link shows those there are", name)
		}
		state, _ := os.ReadFile(filepath.Join(dir, "ports/1/state"))
		if !strings.Contains(string(state), "ACTIVE") {
			return nil, fmt.Errorf("the RDMA device %s is not active (%s): set its network interface up", name, strings.TrimSpace(string(state)))
		}
		netdev, _ := os.ReadFile(filepath.Join(dir, "ports/1/gid_attrs/ndevs/0"))
		p := rdmaPort{device: name, netdev: strings.TrimSpace(string(netdev))}
		if p.addr, err = addressOf(p.netdev); err != nil {
			return nil, fmt.Errorf("the RDMA device %s: %w", name, err)
		}
		ports = append(ports, p)
	}
	return ports, nil
}

// addressOf is the address that hosts reach a network interface at, IPv4 before IPv6.
func addressOf(netdev string) (best netip.Addr, err error) {
	i, err := net.InterfaceByName(netdev)
	if err != nil {
		return best, fmt.Errorf("its network interface %q: %w", netdev, err)
	}
	addrs, err := i.Addrs()
	if err != nil {
		return best, err
	}
	for _, a := range addrs {
		p, err := netip.ParsePrefix(a.String())
		if err == nil && !p.Addr().IsLinkLocalUnicast() && (!best.IsValid() || p.Addr().Is4() && !best.Is4()) {
			best = p.Addr()
		}
	}
	if !best.IsValid() {
		return best, fmt.Errorf("its network interface %s has no IP address: give it one", netdev)
	}
	return best, nil
}

// label is a drive for a comment.
func (c *chosenDrive) label() string {
	return fmt.Sprintf("%s %s, serial number %s", humanize.IBytes(uint64(c.Size)), quoteUnprintable(c.Model), quoteUnprintable(c.Serial))
}

// setupConfig is the configuration that serves the drives: as one pool for context blocks, or each as a disk.
func setupConfig(o setupOptions, m machine, drives []chosenDrive, ports []rdmaPort) string {
	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	p("# Made by kvof setup for %s and %s. kvof check FILE says whether it can be served after a change.", plural(m.cores, "core"), plural(len(drives), "drive"))
	p("\n[memory]\n# Payload buffers of the whole server.\narena = \"%dMiB\"", m.arena()>>20)
	p("\n[[listener]]\ntransport = \"tcp\"\naddress = \"%s\"", netip.AddrPortFrom(o.listen, 4420))
	for _, r := range ports {
		p("\n# %s, at %s\n[[listener]]\ntransport = \"rdma\"\naddress = \"%s\"", r.device, r.netdev, netip.AddrPortFrom(r.addr, 4420))
	}
	p("\n[discovery]\naddress = [\"%s\"]", netip.AddrPortFrom(o.listen, 8009))
	kv := o.kind == string(configs.KeyValue)
	if kv {
		p("\n# One capacity over all drives; adding one to the list makes it larger.\n[[pool]]\nname = \"drives\"\ndevice = \"nvme\"\ndevices = [")
		for _, d := range drives {
			p("    %q,  # %s", cmp.Or(d.Link, d.Path), d.label())
		}
		p("]")
	}
	p("\n[[subsystem]]\nnqn = %q", o.nqn)
	if len(o.hosts) > 0 {
		p("hosts = [\"%s\"]", strings.Join(o.hosts, `", "`))
	} else {
		p("allow_any_host = true  # or hosts = [\"NQN\", ...]: those that may connect")
	}
	if kv {
		p("\n[[subsystem.namespace]]\nnsid = 1\ntype = \"kv\"\npool = \"drives\"")
		return b.String()
	}
	for i, d := range drives {
		p("\n# %s\n[[subsystem.namespace]]\nnsid = %d\ntype = \"block\"\ndevice = \"nvme\"\npath = %q", d.label(), i+1, cmp.Or(d.Link, d.Path))
	}
	return b.String()
}
