package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/rdma"
)

// Options say how to connect. The zero value of each field but Addr gives a sensible default.
type Options struct {
	Transport    string        // [TCP], the default, or [RDMA]
	Addr         string        // host:port
	SubNQN       string        // the subsystem; the discovery subsystem by default
	HostNQN      string        // [DefaultHost]'s by default
	HostID       [16]byte      // [DefaultHost]'s when HostNQN is its too, else derived from HostNQN
	KATO         time.Duration // keep alive time-out, 15 s by default; negative: none
	QueueDepth   int           // commands in flight on an I/O queue, 128 by default; the controller may allow fewer
	IOQueues     int           // 1 by default; the controller may grant fewer; negative: none
	HeaderDigest bool          // ask for CRC32C header digests
	DataDigest   bool          // ask for CRC32C data digests
	DialTimeout  time.Duration // 10 s by default

	// Verbs is the RDMA to use, [rdma.System] by default.
	Verbs rdma.Verbs

	// Reconnect, when not 0, is for how long a lost connection is tried to be made again, at growing intervals, before the
	// controller ends. Meanwhile commands wait, and those that were in flight are sent again, unless doing something
	// twice would matter: then they return [ErrOutcomeUnknown].
	Reconnect time.Duration

	// OnEvent, when set, is called from a goroutine of the controller with DW0 of each asynchronous event, such as
	// [nvmeof.EventNamespaceChanged] and [nvmeof.EventDiscoveryChanged], after its log page has been read.
	OnEvent func(dw0 uint32)
}

// Transports.
const (
	TCP  = "tcp"
	RDMA = "rdma"
)

const (
	defaultKATO   = 15 * time.Second
	defaultDepth  = 128
	adminDepth    = 31 // hsqsize of an admin queue of 32 entries
	bringUpLimit  = 30 * time.Second
	shutdownLimit = 5 * time.Second
	// Between attempts to reconnect.
	minPause = 50 * time.Millisecond
	maxPause = 5 * time.Second
)

func (o *Options) setDefaults() error {
	o.Transport = cmp.Or(o.Transport, TCP)
	if o.SubNQN == "" {
		o.SubNQN = nvmeof.DiscoveryNQN
	}
	nqn, id := DefaultHost()
	if o.HostNQN == "" {
		o.HostNQN = nqn
	}
	if o.HostID == [16]byte{} {
		if o.HostID = id; o.HostNQN != nqn {
			o.HostID = hostID(o.HostNQN)
		}
	}
	for _, n := range []string{o.SubNQN, o.HostNQN} {
		if err := nvmeof.CheckNQN(n); err != nil {
			return err
		}
	}
	if o.KATO == 0 {
		o.KATO = defaultKATO
	}
	if o.QueueDepth <= 0 {
		o.QueueDepth = defaultDepth
	}
	o.QueueDepth = min(o.QueueDepth, maxDepth-1)
	if o.IOQueues == 0 {
		o.IOQueues = 1
	}
	if o.DialTimeout <= 0 {
		o.DialTimeout = 10 * time.Second
	}
	return nil
}

// DefaultHost is this machine's host NQN and host identifier: those of /etc/nvme when nvme-cli or the distribution
// set them up, else stable ones made from /etc/machine-id.
var DefaultHost = sync.OnceValues(func() (nqn string, id [16]byte) {
	read := func(path string) string {
		b, _ := os.ReadFile(path)
		return strings.TrimSpace(string(b))
	}
	nqn = read("/etc/nvme/hostnqn")
	if nvmeof.CheckNQN(nqn) != nil {
		u := uuid.New()
		if m := read("/etc/machine-id"); m != "" {
			u = uuid.NewSHA1(uuid.NameSpaceOID, []byte("kvof host "+m)) // machine-id itself is not to be shown to others
		}
		nqn = "nqn.2014-08.org.nvmexpress:uuid:" + u.String()
	}
	id = hostID(nqn)
	if u, err := uuid.Parse(read("/etc/nvme/hostid")); err == nil {
		id = u
	}
	return nqn, id
})

// hostID derives the host identifier from an NQN: its UUID when it is of that form, else a hash.
func hostID(nqn string) [16]byte {
	if _, s, ok := strings.Cut(nqn, ":uuid:"); ok {
		if u, err := uuid.Parse(s); err == nil {
			return u
		}
	}
	return uuid.NewSHA1(uuid.NameSpaceOID, []byte(nqn))
}

// Controller is a connection to one controller of a subsystem: an admin queue and its I/O queues. With
// [Options.Reconnect] it outlives its connections.
type Controller struct {
	opts   Options
	now    atomic.Pointer[association]
	ctx    context.Context         // ends with the controller
	cancel context.CancelCauseFunc // the cause is why
	wg     sync.WaitGroup          // watches now

	mu      sync.Mutex
	changed chan struct{} // closed when now changes
	memory  []registered  // registered
}

// registered is memory of a caller's.
type registered struct {
	b   []byte
	buf *rdma.DMABuf // that it is of, or nil
}

// Connect brings up a controller: connection, Connect, enabling, identification, I/O queues, keep alive. It gives up
// after 30 seconds, or when ctx ends. ctx does not matter to the controller afterwards.
func Connect(ctx context.Context, o Options) (*Controller, error) {
	if err := o.setDefaults(); err != nil {
		return nil, err
	}
	c := &Controller{opts: o, changed: make(chan struct{})}
	a, err := connectAssociation(ctx, &c.opts)
	if err != nil {
		return nil, err
	}
	c.ctx, c.cancel = context.WithCancelCause(context.Background())
	_ = c.adopt(a) // there is nothing to register yet
	return c, nil
}

// adopt makes a the controller's association.
func (c *Controller) adopt(a *association) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, m := range c.memory {
		if err := a.transport.register(m.b, m.buf); err != nil {
			return err
		}
	}
	if c.ctx.Err() != nil {
		return context.Cause(c.ctx)
	}
	c.now.Store(a)
	close(c.changed)
	c.changed = make(chan struct{})
	c.wg.Add(1)
	context.AfterFunc(a.ctx, func() {
		defer c.wg.Done()
		c.lost(a)
	})
	return nil
}

// lost follows the end of an association.
func (c *Controller) lost(a *association) {
	cause := context.Cause(a.ctx)
	if c.opts.Reconnect <= 0 || cause == ErrClosed {
		c.cancel(cause)
		return
	}
	a.stop()
	end := time.Now().Add(c.opts.Reconnect)
	for pause := minPause; ; pause = min(2*pause, maxPause) {
		select {
		case <-time.After(pause/2 + rand.N(pause)): // hosts that lost one target together come back one by one
		case <-c.ctx.Done():
			return
		}
		ctx, stop := context.WithDeadlineCause(c.ctx, end, fmt.Errorf("not within %v", c.opts.Reconnect))
		next, err := connectAssociation(ctx, &c.opts)
		stop()
		if err == nil {
			if err = c.adopt(next); err == nil {
				return
			}
			next.fail(err)
			next.stop()
		}
		var st nvmeof.Status
		if errors.As(err, &st) && !st.Retry() || time.Now().After(end) {
			c.cancel(fmt.Errorf("%w, then reconnecting failed: %w", cause, err))
			return
		}
	}
}

// next waits for the association after a, of which a command has returned err.
func (c *Controller) next(ctx context.Context, a *association, err error) (*association, error) {
	for {
		c.mu.Lock()
		now, changed := c.now.Load(), c.changed
		c.mu.Unlock()
		if now != a {
			return now, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, err
		case <-c.ctx.Done():
			return nil, fmt.Errorf("%w: %w", err, context.Cause(c.ctx))
		}
	}
}

// Close shuts the controller down in an orderly way (CC.SHN, for at most 5 seconds) and disconnects. Commands under
// way return [ErrClosed]. It must not be called from OnEvent.
func (c *Controller) Close() error {
	a := c.now.Load()
	err := a.shutdown()
	if errors.Is(err, ErrClosed) {
		err = nil // closed before
	}
	c.cancel(ErrClosed)
	c.mu.Lock() // the last association is adopted, or none will be
	a = c.now.Load()
	c.mu.Unlock()
	a.fail(ErrClosed)
	c.wg.Wait()
	a.stop()
	return err
}

// Done is closed when the controller has ended; Err then says why.
func (c *Controller) Done() <-chan struct{} { return c.ctx.Done() }

// Err is nil while the controller is up, or reconnects, then why it ended.
func (c *Controller) Err() error { return context.Cause(c.ctx) }

// ID is the controller identifier (CNTLID).
func (c *Controller) ID() uint16 { return c.now.Load().id }

// Version is the VS property.
func (c *Controller) Version() uint32 { return c.now.Load().vs }

// Identify is the controller's Identify data.
func (c *Controller) Identify() nvmeof.IdentifyController { return c.now.Load().ident }

// Discovery tells whether this is a discovery controller.
func (c *Controller) Discovery() bool { return c.now.Load().discovery() }

// IOQueues is the number of I/O queues.
func (c *Controller) IOQueues() int { return len(c.now.Load().io) }

// QueueDepth is the number of commands that can be in flight on each I/O queue.
func (c *Controller) QueueDepth() int {
	if io := c.now.Load().io; len(io) > 0 {
		return io[0].depth()
	}
	return 0
}

// MaxTransfer is the largest data of one command in bytes: the controller's MDTS, or what the transport carries; 0 = no
// limit.
func (c *Controller) MaxTransfer() uint64 { return c.now.Load().maxTransfer() }

func (c *Controller) maxTransfer([]byte) uint64 { return c.MaxTransfer() }

// Register prepares memory for transfers: RDMA then reads and writes it without more ado, where other memory is
// registered for each command, which takes about as long as a copy of it. Over TCP it does nothing. b stays reachable, and in memory,
// until Unregister with the same b, when no command uses it any more.
func (c *Controller) Register(b []byte) error { return c.register(registered{b: b}) }

// RegisterDMABuf makes the memory of another device, such as a GPU, known: RDMA then reads and writes it, and no processor. Of b only
// the address and the length count, which is how data names the memory; b need not be mapped, and is not to be passed to what looks at
// bytes: [Values], and [KV.List]. A command's data may be in such memory and in other memory, each piece in one of them. It fails with
// an error that wraps [ErrDeviceMemory] where the path does not carry it, and data must not be in it then. buf.FD stays the caller's,
// open until Unregister with the same b.
func (c *Controller) RegisterDMABuf(b []byte, buf rdma.DMABuf) error {
	return c.register(registered{b, &buf})
}

func (c *Controller) register(m registered) error {
	if len(m.b) == 0 {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.now.Load().transport.register(m.b, m.buf); err != nil {
		return err
	}
	c.memory = append(c.memory, m)
	return nil
}

// Unregister takes back what Register or RegisterDMABuf did.
func (c *Controller) Unregister(b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, m := range c.memory {
		if len(b) > 0 && &m.b[0] == &b[0] && len(m.b) == len(b) {
			c.memory = slices.Delete(c.memory, i, i+1)
			c.now.Load().transport.unregister(b)
			return
		}
	}
}

// Admin sends an admin or fabrics command with its data in or for buf, and waits. Identifier and SGL are filled in.
// A status other than success is returned as the error.
func (c *Controller) Admin(ctx context.Context, cmd *nvmeof.Command, buf []byte) (nvmeof.Completion, error) {
	once := true
	switch cmd.Opcode() {
	case nvmeof.OpIdentify, nvmeof.OpGetLogPage, nvmeof.OpGetFeatures:
		once = false
	}
	cqe, _, err := c.carry(ctx, true, *cmd, data{buf: buf}, once)
	return cqe, statusError(cqe, err)
}

// IO sends an I/O command on the least busy I/O queue, once; see [Controller.Admin]. It also returns how many bytes
// arrived in buf, -1 where that is not known.
func (c *Controller) IO(ctx context.Context, cmd *nvmeof.Command, buf []byte) (nvmeof.Completion, int, error) {
	cqe, n, err := c.submit(ctx, *cmd, data{buf: buf}, true)
	return cqe, n, statusError(cqe, err)
}

func (c *Controller) submit(ctx context.Context, cmd nvmeof.Command, d data, once bool) (nvmeof.Completion, int, error) {
	return c.carry(ctx, false, cmd, d, once)
}

// carry has the current association carry a command out, and the next one, if there is to be one, when the connection
// ends before the completion comes.
func (c *Controller) carry(ctx context.Context, admin bool, cmd nvmeof.Command, d data, once bool) (cqe nvmeof.Completion, n int, err error) {
	for a := c.now.Load(); ; {
		if admin {
			cqe, n, err = a.admin.do(ctx, cmd, d)
		} else {
			cqe, n, err = a.submit(ctx, cmd, d)
		}
		if err == nil || c.opts.Reconnect <= 0 || !errors.Is(err, ErrConnectionLost) || once && errors.Is(err, ErrOutcomeUnknown) || ctx.Err() != nil {
			return cqe, n, err
		}
		if a, err = c.next(ctx, a, err); err != nil {
			return cqe, n, err
		}
	}
}

// LogPage reads len(b) bytes (a multiple of 4) of a log page from offset off. The event that named the page is
// cleared.
func (c *Controller) LogPage(ctx context.Context, lid uint8, off uint64, b []byte) error {
	cmd := nvmeof.MakeGetLogPage(lid, nvmeof.BroadcastNSID, uint32(len(b)), off, 0, false)
	_, err := c.Admin(ctx, &cmd, b)
	return err
}

func (c *Controller) identify(ctx context.Context, cns uint8, nsid uint32, csi nvmeof.CSI, page []byte) error {
	cmd := nvmeof.MakeIdentify(cns, nsid, csi)
	_, err := c.Admin(ctx, &cmd, page)
	return err
}

func statusError(cqe nvmeof.Completion, err error) error {
	if err != nil {
		return err
	}
	if st := cqe.Status(); st != nvmeof.Success {
		return st
	}
	return nil
}
