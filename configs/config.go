// Package configs reads the one TOML file that configures a kvof server.
//
// Reading is strict and complete: every unknown key, wrong type and impossible value is reported with
// its file and line, all of them at once. The package opens nothing that a configuration names.
package configs

import (
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/google/uuid"
)

//go:embed embedded.toml
var embedded []byte

// Default returns the configuration that is built in: one subsystem on 127.0.0.1 with a Key Value and a
// block namespace on sparse files below ./kvof-data. The caller owns the slice.
func Default() []byte { return append([]byte(nil), embedded...) }

// Config is a whole configuration, checked: what Load and Parse return can be served as it stands, as
// far as that can be known without opening anything.
type Config struct {
	LogLevel   slog.Level  `toml:"log_level"`
	Memory     Memory      `toml:"memory"`
	Management Management  `toml:"management"`
	Limits     Limits      `toml:"limits"`
	Listeners  []Listener  `toml:"listener"`
	Discovery  Discovery   `toml:"discovery"`
	Pools      []Pool      `toml:"pool"`
	Subsystems []Subsystem `toml:"subsystem"`
}

// Memory bounds what the server takes for payload.
type Memory struct {
	Arena Size `toml:"arena"` // bytes of payload buffers, shared by every connection and device
}

// Management is the HTTP endpoint for status, health and metrics.
type Management struct {
	Socket string         `toml:"socket"` // path of a Unix socket; empty for none
	Listen netip.AddrPort `toml:"listen"` // TCP address beside it; the zero AddrPort for none
}

// Limits bounds what hosts can make the server allocate.
type Limits struct {
	Controllers  int `toml:"controllers"`   // controllers at one time, 1 to 65519 (CNTLID 0001h to FFEFh)
	IOQueues     int `toml:"io_queues"`     // I/O queue pairs of one controller, 1 to 65535
	QueueEntries int `toml:"queue_entries"` // entries of one I/O queue, 2 to 65536: CAP.MQES is one less
}

// Transport is the way to a listener.
type Transport string

const (
	TransportTCP  Transport = "tcp"  // NVMe/TCP
	TransportRDMA Transport = "rdma" // NVMe/RDMA: RoCE, iWARP or InfiniBand
)

// Listener is one I/O port. It serves discovery too.
type Listener struct {
	Transport Transport      `toml:"transport"`
	Address   netip.AddrPort `toml:"address"` // an unspecified IP (0.0.0.0, ::) is advertised as the one that a host reached us on
}

// Discovery is the well-known discovery subsystem on ports of its own.
type Discovery struct {
	Addresses []netip.AddrPort `toml:"address"` // NVMe/TCP; usually port 8009
	Referrals []Referral       `toml:"referral"`
}

// Referral points hosts to another discovery service.
type Referral struct {
	Transport Transport      `toml:"transport"`
	Address   netip.AddrPort `toml:"address"`
}

// Subsystem is one NVM subsystem with its namespaces and the hosts that may connect.
type Subsystem struct {
	NQN          string      `toml:"nqn"`            // unique, at most 223 bytes
	Serial       string      `toml:"serial"`         // 1 to 20 printable ASCII characters; derived from the NQN when not configured
	AllowAnyHost bool        `toml:"allow_any_host"` // or Hosts, never both
	Hosts        []string    `toml:"hosts"`          // host NQNs that may connect
	Namespaces   []Namespace `toml:"namespace"`      // ascending NSID
}

// NamespaceType is the command set of a namespace.
type NamespaceType string

const (
	KeyValue NamespaceType = "kv"    // Key Value command set, CSI 01h
	Block    NamespaceType = "block" // NVM command set, CSI 00h
)

// DeviceKind is what a namespace keeps its bytes on.
type DeviceKind string

const (
	DeviceFile   DeviceKind = "file"   // a regular file: sparse, created when absent
	DeviceBlock  DeviceKind = "block"  // a block device such as /dev/sda
	DeviceNVMe   DeviceKind = "nvme"   // an NVMe drive, by NVMe commands: /dev/ng0n1, /dev/nvme0n1 or a link to either
	DeviceMemory DeviceKind = "memory" // anonymous memory: gone when the server stops
)

// Pool is one capacity over several devices, which Key Value namespaces share.
type Pool struct {
	Name    string     `toml:"name"` // unique
	Device  DeviceKind `toml:"device"`
	Devices []string   `toml:"devices"` // paths, cleaned, of files, block devices or drives; adding one needs nothing else
	Size    Size       `toml:"size"`    // bytes of each file; 0: all of a block device or drive
	Poll    bool       `toml:"poll"`    // as a namespace's, on NVMe drives
	Scrub   Size       `toml:"scrub"`   // bytes a second that are read and verified in the background; 0: none
}

// Equal tells that nothing differs.
func (p Pool) Equal(o Pool) bool {
	return p.Name == o.Name && p.Device == o.Device && p.Size == o.Size && p.Poll == o.Poll && p.Scrub == o.Scrub && slices.Equal(p.Devices, o.Devices)
}

// Eviction is what makes room in a full Key Value namespace.
type Eviction string

// The evictions, the default first. A namespace that does not say has EvictClock.
const (
	EvictClock       Eviction = "clock"        // what was not read since it was stored or last spared, oldest first
	EvictS3FIFO      Eviction = "s3-fifo"      // as that, but new values have a tenth of the space until they are read again
	EvictSecondTouch Eviction = "second-touch" // as clock, but only what is stored for a second time is kept
	EvictFIFO        Eviction = "fifo"         // the oldest: no value is ever written twice
	EvictNever       Eviction = "never"        // nothing: a full namespace refuses a Store
)

// Evictions are all of them.
var Evictions = []Eviction{EvictClock, EvictS3FIFO, EvictSecondTouch, EvictFIFO, EvictNever}

// Durability is when a Store completes.
type Durability string

const (
	Written Durability = "written" // it survives a kill of the server; the default
	Flushed Durability = "flushed" // it survives a power cut
)

// Duration is a length of time, written as "90s", "12h" or "1h30m".
type Duration time.Duration

func (d Duration) String() string { return time.Duration(d).String() }

// UnmarshalText reads what time.ParseDuration does; a duration is not negative.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil || v < 0 {
		return fmt.Errorf("%s is not a duration: write 90s, 12h or 1h30m", strconv.Quote(string(b)))
	}
	*d = Duration(v)
	return nil
}

// MaxValue is the largest value that a Key Value namespace can be configured to take, in bytes.
const MaxValue Size = 64 << 20

// Namespace is one namespace of a subsystem.
type Namespace struct {
	NSID     uint32        `toml:"nsid"` // 1 to FFFFFFFEh, unique in its subsystem
	Type     NamespaceType `toml:"type"`
	Device   DeviceKind    `toml:"device"`
	Path     string        `toml:"path"` // of a file, block device or drive, cleaned; relative paths start at the working directory
	Size     Size          `toml:"size"` // bytes; 0: all of a block device or drive
	ReadOnly bool          `toml:"read_only"`

	// Identifiers that hosts keep: derived from the subsystem's NQN and the NSID when not configured.
	UUID  uuid.UUID `toml:"uuid"`
	NGUID NGUID     `toml:"nguid"` // the UUID's bytes when not configured

	// Key Value only.
	MaxValue Size   `toml:"max_value"` // bytes, at most 64 MiB
	MaxKeys  uint32 `toml:"max_keys"`  // 0: no limit but space
	EDNEK    bool   `toml:"ednek"`     // initial Error on Delete of Non-Existent Key (feature 20h, bit 0)

	Pool       string     `toml:"pool"`       // name of the pool that has its values, in place of a device of its own
	Eviction   Eviction   `toml:"eviction"`   // empty: EvictClock
	Quota      Size       `toml:"quota"`      // most bytes that it takes; 0: all there are
	Share      Size       `toml:"share"`      // bytes that no other namespace of its pool can take from it
	TTL        Duration   `toml:"ttl"`        // values older than that are gone; 0: no limit
	Durability Durability `toml:"durability"` // empty: Written
	Strict     bool       `toml:"strict"`     // a damaged value is an Unrecovered Read Error until it is replaced; otherwise it is a key that does not exist
	Scrub      Size       `toml:"scrub"`      // as a pool's, for a device of its own

	// Block only.
	LBASize Size `toml:"lba_size"` // 512 or 4096; 0: the drive's own, as a whole drive's must be

	// On NVMe drives only.
	Poll      bool   `toml:"poll"`      // look for completions instead of waiting for interrupts; needs poll queues in the kernel's driver
	Placement uint32 `toml:"placement"` // Flexible Data Placement: the placement handle that is written to, from 1; 0: as kvof or the drive thinks best
}

// NGUID is a Namespace Globally Unique Identifier: 16 bytes in the order of the wire.
type NGUID [16]byte

func (g NGUID) String() string { return hex.EncodeToString(g[:]) }

// UnmarshalText reads 32 hexadecimal digits.
func (g *NGUID) UnmarshalText(b []byte) error {
	if len(b) != 2*len(g) {
		return errors.New("an NGUID is 32 hexadecimal digits")
	}
	if _, err := hex.Decode(g[:], b); err != nil {
		return errors.New("an NGUID is 32 hexadecimal digits")
	}
	return nil
}

// Size is a number of bytes, never negative.
type Size int64

func (s Size) String() string { return humanize.IBytes(uint64(s)) }

// UnmarshalText reads a number with an optional unit: "4GiB", "1.5 TiB", "2GB", "65536".
func (s *Size) UnmarshalText(b []byte) error {
	n, err := humanize.ParseBytes(string(b))
	if err != nil || n > math.MaxInt64 {
		return fmt.Errorf("%s is not a size: write a number of bytes, or one with a unit such as 64MiB", strconv.Quote(string(b)))
	}
	*s = Size(n)
	return nil
}

// maxFile bounds a configuration file, in bytes: far more than anybody writes.
const maxFile = 1 << 20

// Load reads and checks the file at path. An error about its contents is an Errors.
func Load(path string) (*Config, error) {
	data, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("no configuration file %s", path)
	case err != nil:
		return nil, fmt.Errorf("reading the configuration: %w", err)
	}
	return Parse(path, data)
}

// DefaultSocket is the management socket of a server that configures none, and where clients look first:
// in the service's runtime directory, /run/kvof for root, the user's own runtime directory otherwise.
func DefaultSocket() string {
	dir := os.Getenv("RUNTIME_DIRECTORY")
	if dir == "" && os.Geteuid() == 0 {
		dir = "/run/kvof"
	}
	if dir == "" {
		if run := os.Getenv("XDG_RUNTIME_DIR"); run != "" {
			dir = filepath.Join(run, "kvof")
		} else {
			dir = filepath.Join(os.TempDir(), "kvof-"+strconv.Itoa(os.Getuid()))
		}
	}
	return filepath.Join(dir, "kvof.sock")
}
