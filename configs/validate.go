package configs

import (
	"crypto/sha256"
	"encoding/hex"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/google/uuid"

	"github.com/kvof/kvof/nvmeof"
)

func (c *Config) defaults() {
	*c = Config{
		LogLevel:   slog.LevelInfo,
		Memory:     Memory{Arena: 256 << 20},
		Management: Management{Socket: DefaultSocket()},
		Limits:     Limits{Controllers: 1024, IOQueues: 64, QueueEntries: 128},
	}
}

func (l *Listener) defaults() { l.Transport = TransportTCP }
func (r *Referral) defaults() { r.Transport = TransportTCP }
func (p *Pool) defaults()     { p.Device = DeviceFile }
func (n *Namespace) defaults() {
	n.Device, n.MaxValue, n.LBASize = DeviceFile, MaxValue, 4096
}

// derive fills in what follows from the rest of a checked configuration.
func (c *Config) derive() {
	for _, p := range c.Pools {
		for i := range p.Devices {
			p.Devices[i] = filepath.Clean(p.Devices[i])
		}
	}
	for i := range c.Subsystems {
		s := &c.Subsystems[i]
		if s.Serial == "" {
			sum := sha256.Sum256([]byte(s.NQN))
			s.Serial = hex.EncodeToString(sum[:10])
		}
		for j := range s.Namespaces {
			n := &s.Namespaces[j]
			if n.UUID == uuid.Nil {
				n.UUID = uuid.NewSHA1(uuid.NameSpaceURL, []byte(s.NQN+"/"+strconv.FormatUint(uint64(n.NSID), 10)))
			}
			if n.NGUID == (NGUID{}) {
				n.NGUID = NGUID(n.UUID)
			}
			if n.Path != "" {
				n.Path = filepath.Clean(n.Path)
			}
		}
		slices.SortFunc(s.Namespaces, func(a, b Namespace) int { return int(a.NSID) - int(b.NSID) })
	}
}

// Bounds of what can be configured.
const (
	minArena      = 16 << 20
	maxArena      = 1 << 40
	maxCNTLIDs    = 0xffef
	maxDevices    = 64   // of a pool, in its life: kvlayer
	maxNSID       = 1024 // hosts walk small lists; no drive has more
	maxSocketPath = 107  // sun_path, without its NUL
	kvBlock       = 4096
	maxPlacement  = 128 // placement handles of a namespace
)

func (d *decoder) validate(c *Config) {
	d.within("memory.arena", c.Memory.Arena, minArena, maxArena)
	d.within("limits.controllers", c.Limits.Controllers, 1, maxCNTLIDs)
	d.within("limits.io_queues", c.Limits.IOQueues, 1, 0xffff)
	d.within("limits.queue_entries", c.Limits.QueueEntries, 2, 0x10000)
	if len(c.Management.Socket) > maxSocketPath {
		d.errorf("management.socket", "management.socket: the path is longer than %d bytes", maxSocketPath)
	}
	d.addresses(c)
	for i, r := range c.Discovery.Referrals {
		d.port(index("discovery.referral", i), r.Transport, r.Address)
	}

	nqns, files, ids, pools := seen{}, seen{}, seen{}, seen{}
	for i := range c.Pools {
		d.pool(index("pool", i), &c.Pools[i], pools, files)
	}
	for i := range c.Subsystems {
		path := index("subsystem", i)
		d.subsystem(path, &c.Subsystems[i], nqns)
		nsids := seen{}
		for j := range c.Subsystems[i].Namespaces {
			d.namespace(index(join(path, "namespace"), j), &c.Subsystems[i].Namespaces[j], nsids, files, ids, pools)
		}
	}
}

// seen remembers where each of some unique values stands.
type seen map[string]string

// unique reports a value that stands somewhere else already.
func (d *decoder) unique(s seen, path, value string) {
	if first, ok := s[value]; ok {
		d.errorf(path, "%s: %s is in use on line %d", keyName(path), value, d.line(first))
		return
	}
	s[value] = path
}

// need reports a key that has no value; the line is that of the table that lacks it.
func (d *decoder) need(path string, missing bool) (ok bool) {
	if missing {
		d.errorf(path, "%s is missing", keyName(path))
	}
	return !missing
}

func (d *decoder) within(path string, v any, low, high int64) {
	n, isSize := int64(0), false
	switch v := v.(type) {
	case Size:
		n, isSize = int64(v), true
	case int:
		n = int64(v)
	case uint32:
		n = int64(v)
	}
	switch {
	case n >= low && n <= high:
	case isSize:
		d.errorf(path, "%s: %s is out of range: %s to %s", keyName(path), Size(n), Size(low), Size(high))
	default:
		d.errorf(path, "%s: %d is out of range: %d to %d", keyName(path), n, low, high)
	}
}

// addresses checks everything that the server binds.
func (d *decoder) addresses(c *Config) {
	type bound struct {
		path string
		addr netip.AddrPort
		rdma bool // its ports are others than those of TCP
	}
	var all []bound
	for i, l := range c.Listeners {
		path := index("listener", i)
		d.port(path, l.Transport, l.Address)
		all = append(all, bound{join(path, "address"), l.Address, l.Transport == TransportRDMA})
	}
	for i, a := range c.Discovery.Addresses {
		all = append(all, bound{index("discovery.address", i), a, false})
	}
	if len(all) == 0 {
		d.errorf("listener", "no listener: add a [[listener]] with an address such as 127.0.0.1:4420")
	}
	all = append(all, bound{"management.listen", c.Management.Listen, false})
	for i, b := range all {
		for _, a := range all[:i] {
			if a.rdma == b.rdma && collide(a.addr, b.addr) {
				d.errorf(b.path, "%s: %s is in use on line %d", keyName(b.path), b.addr, d.line(a.path))
			}
		}
	}
}

// collide says whether two addresses cannot both be bound.
func collide(a, b netip.AddrPort) bool {
	covers := func(a, b netip.Addr) bool { // [::] takes IPv4 as well
		return a == b || a.IsUnspecified() && (a.Is6() || b.Is4())
	}
	return a.IsValid() && b.IsValid() && a.Port() == b.Port() && a.Port() != 0 &&
		(covers(a.Addr(), b.Addr()) || covers(b.Addr(), a.Addr()))
}

// port checks what listeners and referrals share.
func (d *decoder) port(path string, t Transport, addr netip.AddrPort) {
	d.need(join(path, "address"), !addr.IsValid())
	if t != TransportTCP && t != TransportRDMA {
		d.errorf(join(path, "transport"), "%s: %q is not a transport: write tcp or rdma", keyName(join(path, "transport")), t)
	}
}

func (d *decoder) nqn(path, nqn string) {
	if err := nvmeof.CheckNQN(nqn); err != nil {
		d.errorf(path, "%s: %v", keyName(path), err)
	}
}

func (d *decoder) subsystem(path string, s *Subsystem, nqns seen) {
	at := join(path, "nqn")
	switch {
	case !d.need(at, s.NQN == ""):
	case s.NQN == nvmeof.DiscoveryNQN:
		d.errorf(at, "%s: %s is the discovery subsystem, which is always there", keyName(at), s.NQN)
	default:
		d.nqn(at, s.NQN)
		d.unique(nqns, at, s.NQN)
	}
	at = join(path, "serial")
	if d.has(at) && !validSerial(s.Serial) {
		d.errorf(at, "%s: %q is not 1 to 20 printable ASCII characters", keyName(at), s.Serial)
	}
	at = join(path, "hosts")
	hosts := seen{}
	for i, h := range s.Hosts {
		d.nqn(index(at, i), h)
		d.unique(hosts, index(at, i), h)
	}
	switch {
	case s.AllowAnyHost && d.has(at):
		d.errorf(join(path, "allow_any_host"), "%s and %s exclude each other: keep one", keyName(join(path, "allow_any_host")), keyName(at))
	case !s.AllowAnyHost && len(s.Hosts) == 0:
		d.errorf(at, "no host can connect to the subsystem: list NQNs in hosts, or set allow_any_host = true")
	}
}

func validSerial(s string) bool {
	for _, r := range s {
		if r < ' ' || r > '~' {
			return false
		}
	}
	return len(s) >= 1 && len(s) <= 20
}

// pool checks one pool.
func (d *decoder) pool(path string, p *Pool, pools, files seen) {
	key := func(name string) string { return join(path, name) }
	if d.need(key("name"), p.Name == "") {
		d.unique(pools, key("name"), p.Name)
	}
	if d.need(key("devices"), len(p.Devices) == 0) && len(p.Devices) > maxDevices {
		d.errorf(key("devices"), "%s: a pool has at most %d devices", keyName(key("devices")), maxDevices)
	}
	for i, dev := range p.Devices {
		d.unique(files, index(key("devices"), i), absolute(dev))
	}
	switch p.Device {
	case DeviceFile:
		d.need(key("size"), p.Size == 0)
	case DeviceBlock, DeviceNVMe:
	default:
		d.errorf(key("device"), "%s: %q is not a kind of device for a pool: write file, block or nvme", keyName(key("device")), p.Device)
	}
	if p.Size%kvBlock != 0 {
		d.errorf(key("size"), "%s: %d bytes is not a multiple of the block size, %d", keyName(key("size")), int64(p.Size), kvBlock)
	}
	if p.Device != DeviceNVMe && d.has(key("poll")) {
		d.errorf(key("poll"), "%s means nothing for a %s device", keyName(key("poll")), p.Device)
	}
}

// policy checks what a Key Value namespace says about its values.
func (d *decoder) policy(path string, n *Namespace) {
	key := func(name string) string { return join(path, name) }
	if n.Eviction != "" && !slices.Contains(Evictions, n.Eviction) {
		d.errorf(key("eviction"), "%s: %q is not an eviction: write clock, s3-fifo, second-touch, fifo or never", keyName(key("eviction")), n.Eviction)
	}
	if n.Durability != "" && n.Durability != Written && n.Durability != Flushed {
		d.errorf(key("durability"), "%s: %q is not a durability: write written or flushed", keyName(key("durability")), n.Durability)
	}
	if n.Quota > 0 && n.Share > n.Quota {
		d.errorf(key("share"), "%s: %v is more than the quota, %v", keyName(key("share")), n.Share, n.Quota)
	}
}

func (d *decoder) namespace(path string, n *Namespace, nsids, files, ids, pools seen) {
	key := func(name string) string { return join(path, name) }

	if d.need(key("nsid"), n.NSID == 0 && !d.has(key("nsid"))) {
		d.within(key("nsid"), n.NSID, 1, maxNSID)
		d.unique(nsids, key("nsid"), strconv.FormatUint(uint64(n.NSID), 10))
	}
	if n.UUID != uuid.Nil {
		d.unique(ids, key("uuid"), n.UUID.String())
	}
	if n.NGUID != (NGUID{}) {
		d.unique(ids, key("nguid"), n.NGUID.String())
	}

	// Only keys of the namespace's own type, and of its device, mean anything.
	meaningless := func(where string, names ...string) {
		for _, name := range names {
			if d.has(key(name)) {
				d.errorf(key(name), "%s means nothing for a %s", keyName(key(name)), where)
			}
		}
	}
	foreign := func(names ...string) { meaningless(string(n.Type)+" namespace", names...) }
	unit := Size(0)
	switch n.Type {
	case KeyValue:
		unit = kvBlock
		foreign("lba_size")
		d.within(key("max_value"), n.MaxValue, 1, int64(MaxValue))
		d.policy(path, n)
	case Block:
		unit = n.LBASize
		foreign("max_value", "max_keys", "ednek", "pool", "eviction", "quota", "share", "ttl", "durability", "strict", "scrub")
		if n.Device == DeviceNVMe && !d.has(key("lba_size")) {
			n.LBASize, unit = 0, 1
		} else if unit != 512 && unit != 4096 {
			d.errorf(key("lba_size"), "%s: %d is not an LBA size: write 512 or 4096", keyName(key("lba_size")), int64(n.LBASize))
			unit = 0
		}
	case "":
		d.need(key("type"), true)
	default:
		d.errorf(key("type"), "%s: %q is not a namespace type: write kv or block", keyName(key("type")), n.Type)
	}
	if unit > 0 && n.Size%unit != 0 {
		d.errorf(key("size"), "%s: %d bytes is not a multiple of the block size, %d", keyName(key("size")), int64(n.Size), int64(unit))
	}

	if n.Pool != "" && n.Type == KeyValue {
		if pools[n.Pool] == "" {
			d.errorf(key("pool"), "%s: there is no [[pool]] with the name %q", keyName(key("pool")), n.Pool)
		}
		n.Device = ""
		meaningless("namespace in a pool", "device", "path", "size", "scrub", "poll", "placement")
		return
	}
	switch n.Device {
	case DeviceFile, DeviceBlock, DeviceNVMe:
		if d.need(key("path"), n.Path == "") {
			d.unique(files, key("path"), absolute(n.Path))
		}
		if n.Device == DeviceFile {
			d.need(key("size"), n.Size == 0)
		}
	case DeviceMemory:
		d.need(key("size"), n.Size == 0)
		meaningless("memory device", "path")
	default:
		d.errorf(key("device"), "%s: %q is not a kind of device: write file, block, nvme or memory", keyName(key("device")), n.Device)
	}
	if n.Device == DeviceNVMe {
		d.within(key("placement"), n.Placement, 0, maxPlacement)
	} else {
		meaningless(string(n.Device)+" device", "poll", "placement")
	}
}

// absolute makes two names of one file equal where that can be seen without opening it.
func absolute(path string) string {
	if abs, err := filepath.Abs(path); err == nil {
		return abs
	}
	return filepath.Clean(path)
}
