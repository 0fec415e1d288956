package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/kvof/kvof/nvmeof"
)

// Options say how to connect. The zero value of each field but Addr gives a sensible default.
type Options struct {
	Transport    string        // "tcp", the default
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

	// OnEvent, when set, is called from a goroutine of the controller with DW0 of each asynchronous event, such as
	// [nvmeof.EventNamespaceChanged] and [nvmeof.EventDiscoveryChanged], after its log page has been read.
	OnEvent func(dw0 uint32)
}

const (
	defaultKATO   = 15 * time.Second
	defaultDepth  = 128
	adminDepth    = 31 // hsqsize of an admin queue of 32 entries
	bringUpLimit  = 30 * time.Second
	shutdownLimit = 5 * time.Second
	// adminInCapsule is what every NVMe/TCP admin queue takes in a capsule, bytes (TCP, In-Capsule Data).
	adminInCapsule = 8192
)

func (o *Options) setDefaults() error {
	if o.Transport == "" {
		o.Transport = "tcp"
	}
	if o.Transport != "tcp" {
		return fmt.Errorf("transport %q is not supported, only tcp is", o.Transport)
	}
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

// Controller is a connection to one controller of a subsystem: an admin queue and its I/O queues.
type Controller struct {
	opts   Options
	id     uint16
	cap    nvmeof.CAP
	vs     uint32
	ident  nvmeof.IdentifyController
	admin  *queue
	io     []*queue
	next   atomic.Uint32 // I/O queue to try first
	ctx    context.Context
	cancel context.CancelCauseFunc // ends background work; the cause is why the controller ended
	wg     sync.WaitGroup

	mu     sync.Mutex
	queues []*queue // all of them, for fail and stop
	failed bool
}

// Connect brings up a controller: connection, Connect, enabling, identification, I/O queues, keep alive. It gives up
// after 30 seconds, or when ctx ends. ctx does not matter to the controller afterwards.
func Connect(ctx context.Context, o Options) (*Controller, error) {
	if err := o.setDefaults(); err != nil {
		return nil, err
	}
	ctx, stop := context.WithTimeoutCause(ctx, bringUpLimit, fmt.Errorf("%s did not answer within %v", o.Addr, bringUpLimit))
	defer stop()
	c := &Controller{opts: o, id: nvmeof.CNTLIDDynamic}
	c.ctx, c.cancel = context.WithCancelCause(context.Background())
	if err := c.bringUp(ctx); err != nil {
		c.fail(ErrClosed)
		c.stop()
		return nil, fmt.Errorf("connect to %s at %s: %w", o.SubNQN, o.Addr, err)
	}
	return c, nil
}

func (c *Controller) bringUp(ctx context.Context) (err error) {
	if c.admin, err = c.connectQueue(ctx, 0, adminDepth, adminInCapsule); err != nil {
		return err
	}
	v, err := c.property(ctx, nvmeof.PropCAP, 8)
	if err != nil {
		return err
	}
	c.cap = nvmeof.CAP(v)
	if v, err = c.property(ctx, nvmeof.PropVS, 4); err != nil {
		return err
	}
	c.vs = uint32(v)
	if err := c.enable(ctx); err != nil {
		return err
	}
	page := make([]byte, nvmeof.IdentifySize)
	if err := c.identify(ctx, nvmeof.CNSController, 0, 0, page); err != nil {
		return fmt.Errorf("identify controller: %w", err)
	}
	if err := c.ident.Decode(page); err != nil {
		return err
	}
	if c.opts.KATO > 0 && (c.ident.KAS > 0 || !c.Discovery()) {
		c.wg.Go(c.keepAlive)
	}
	if !c.Discovery() && c.opts.IOQueues > 0 {
		if err := c.connectIO(ctx); err != nil {
			return err
		}
	}
	if c.opts.OnEvent != nil {
		return c.enableEvents(ctx)
	}
	return nil
}

// enable sets CC.EN and waits for CSTS.RDY.
func (c *Controller) enable(ctx context.Context) error {
	cc := uint32(nvmeof.CCEnable | nvmeof.CCIOSQES64 | nvmeof.CCIOCQES16)
	if c.cap.CommandSets() {
		cc |= nvmeof.CCCSSAll
	}
	if err := c.setProperty(ctx, nvmeof.PropCC, cc); err != nil {
		return fmt.Errorf("enable the controller: %w", err)
	}
	limit := time.Duration(max(c.cap.TO(), 1)) * 500 * time.Millisecond
	_, err := c.pollCSTS(ctx, limit, func(csts uint32) bool { return csts&nvmeof.CSTSReady != 0 })
	if err != nil {
		return fmt.Errorf("wait for the controller to be ready: %w", err)
	}
	return nil
}

func (c *Controller) pollCSTS(ctx context.Context, limit time.Duration, ok func(uint32) bool) (uint32, error) {
	ctx, stop := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not within %v", limit))
	defer stop()
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		v, err := c.property(ctx, nvmeof.PropCSTS, 4)
		csts := uint32(v)
		switch {
		case err != nil:
			return 0, err
		case csts&nvmeof.CSTSFatal != 0:
			return csts, errors.New("controller has a fatal status (CSTS.CFS)")
		case ok(csts):
			return csts, nil
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return csts, context.Cause(ctx)
		}
	}
}

// connectIO asks for the I/O queues and connects them.
func (c *Controller) connectIO(ctx context.Context) error {
	if c.ident.IOCCSZ < nvmeof.CommandSize/16 {
		return protocolError("IOCCSZ is %d", c.ident.IOCCSZ)
	}
	n := min(c.opts.IOQueues, 65535)
	var cmd nvmeof.Command
	cmd.SetHeader(nvmeof.OpSetFeatures, 0, 0)
	cmd.SetDW(10, nvmeof.FeatQueues)
	cmd.SetDW(11, uint32(n-1)|uint32(n-1)<<16)
	cqe, err := c.Admin(ctx, &cmd, nil)
	if err != nil {
		return fmt.Errorf("set the number of queues: %w", err)
	}
	n = min(n, int(cqe.DW0()&0xFFFF)+1, int(cqe.DW0()>>16)+1)
	depth := min(c.opts.QueueDepth, int(c.cap.MQES()))
	if m := int(c.ident.MAXCMD); m > 0 {
		depth = min(depth, m-1)
	}
	if depth < 1 {
		return protocolError("the controller allows queues of %d entries", c.cap.MQES()+1)
	}
	inCapsule := 0
	if c.ident.ICDOFF == 0 {
		inCapsule = int(min(c.ident.IOCCSZ*16-nvmeof.CommandSize, 1<<20))
	}
	for i := range n {
		q, err := c.connectQueue(ctx, uint16(i+1), depth, inCapsule)
		if err != nil {
			return fmt.Errorf("I/O queue %d: %w", i+1, err)
		}
		c.io = append(c.io, q)
	}
	return nil
}

// connectQueue opens a connection, negotiates, and makes it a queue of the controller. depth is the number of
// commands in flight, and so the 0's based size of the queue, which must never be full.
func (c *Controller) connectQueue(ctx context.Context, id uint16, depth, inCapsule int) (*queue, error) {
	d := net.Dialer{Timeout: c.opts.DialTimeout}
	conn, err := d.DialContext(ctx, "tcp", c.opts.Addr)
	if err != nil {
		return nil, err
	}
	q := &queue{id: id, conn: conn.(*net.TCPConn), inCapsule: inCapsule, onFail: c.fail}
	if err := q.negotiate(ctx, nvmeof.Digests{Header: c.opts.HeaderDigest, Data: c.opts.DataDigest}); err != nil {
		conn.Close()
		return nil, err
	}
	c.mu.Lock()
	if c.failed {
		err = context.Cause(c.ctx)
	} else if err = q.start(depth); err == nil {
		c.queues = append(c.queues, q)
	}
	c.mu.Unlock()
	if err != nil {
		conn.Close()
		return nil, err
	}
	return q, c.connectCommand(ctx, q, depth)
}

// negotiate exchanges ICReq and ICResp.
func (q *queue) negotiate(ctx context.Context, dg nvmeof.Digests) (err error) {
	stop := context.AfterFunc(ctx, func() { q.conn.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() {
			err = context.Cause(ctx)
		}
	}()
	var b [nvmeof.ICSize]byte
	nvmeof.EncodeIC(b[:], nvmeof.PDUICReq, nvmeof.IC{Digest: dg})
	if _, err := q.conn.Write(b[:]); err != nil {
		return err
	}
	if _, err := io.ReadFull(q.conn, b[:nvmeof.PDUHeaderSize]); err != nil {
		return fmt.Errorf("no answer to the connection set-up: %w", err)
	}
	n, terr := nvmeof.HeaderSize(b[:], false, nvmeof.Digests{})
	if terr != nil || b[0] != nvmeof.PDUICResp {
		return protocolError("the answer to the connection set-up is not an ICResp")
	}
	if _, err := io.ReadFull(q.conn, b[nvmeof.PDUHeaderSize:n]); err != nil {
		return err
	}
	p, terr := nvmeof.DecodePDU(b[:], nvmeof.Digests{})
	if terr != nil {
		return fmt.Errorf("%w: %w", ErrProtocol, terr)
	}
	ic, terr := nvmeof.DecodeIC(&p)
	if terr != nil {
		return fmt.Errorf("%w: %w", ErrProtocol, terr)
	}
	if ic.Digest.Header && !dg.Header || ic.Digest.Data && !dg.Data {
		return protocolError("the target turned on digests that were not asked for")
	}
	if ic.Digest != dg {
		return errors.New("the target does not support the digests asked for")
	}
	q.dg, q.align, q.maxData = ic.Digest, 4*(int(ic.PDA)+1), int(min(ic.Max, 1<<30))
	return nil
}

func (c *Controller) connectCommand(ctx context.Context, q *queue, depth int) error {
	data := make([]byte, nvmeof.ConnectDataSize)
	(&nvmeof.ConnectData{HostID: c.opts.HostID, CNTLID: c.id, SubNQN: c.opts.SubNQN, HostNQN: c.opts.HostNQN}).Encode(data)
	kato := uint32(0)
	if q.id == 0 {
		kato = uint32(max(c.opts.KATO, 0).Milliseconds())
	}
	limit := q.inCapsule
	q.inCapsule = max(limit, len(data)) // Connect's data is always in the capsule
	cmd := nvmeof.MakeConnect(0, q.id, uint16(depth), 0, kato)
	cqe, _, err := q.do(ctx, &cmd, data)
	q.inCapsule = limit
	if err != nil {
		return err
	}
	if st := cqe.Status(); st != nvmeof.Success {
		if st.Code() == nvmeof.ConnectInvalidParam {
			return fmt.Errorf("%w: %s", st, connectField(cqe.DW0()))
		}
		return st
	}
	if q.id == 0 {
		c.id = uint16(cqe.DW0())
		if cqe.DW0()>>17&3 != 0 {
			return errors.New("the controller demands authentication, which is not supported")
		}
	}
	return nil
}

// connectField names the parameter that a Connect completion's DW0 points at.
func connectField(dw0 uint32) string {
	names := map[uint32]string{
		nvmeof.ConnectOffRECFMT: "RECFMT", nvmeof.ConnectOffQID: "QID", nvmeof.ConnectOffSQSIZE: "SQSIZE",
		1<<16 | nvmeof.ConnectOffHOSTID: "HOSTID", 1<<16 | nvmeof.ConnectOffCNTLID: "CNTLID",
		1<<16 | nvmeof.ConnectOffSUBNQN: "SUBNQN", 1<<16 | nvmeof.ConnectOffHOSTNQN: "HOSTNQN",
	}
	if n, ok := names[dw0]; ok {
		return n
	}
	return fmt.Sprintf("at offset %d", dw0&0xFFFF)
}

// fail ends the controller; the first cause counts.
func (c *Controller) fail(err error) {
	c.mu.Lock()
	if c.failed {
		c.mu.Unlock()
		return
	}
	c.failed = true
	c.cancel(err)
	queues := c.queues
	c.mu.Unlock()
	for _, q := range queues {
		q.fail(err)
	}
}

// stop waits for all goroutines of a failed controller.
func (c *Controller) stop() {
	for _, q := range c.queues { // fixed, since fail
		q.wg.Wait()
	}
	c.wg.Wait()
}

// Close shuts the controller down in an orderly way (CC.SHN, for at most 5 seconds) and disconnects. Commands under
// way return [ErrClosed]. It must not be called from OnEvent.
func (c *Controller) Close() error {
	ctx, stop := context.WithTimeout(c.ctx, shutdownLimit)
	defer stop()
	cc := uint32(nvmeof.CCEnable | nvmeof.CCIOSQES64 | nvmeof.CCIOCQES16 | nvmeof.CCSHNNormal)
	if c.cap.CommandSets() {
		cc |= nvmeof.CCCSSAll
	}
	err := c.setProperty(ctx, nvmeof.PropCC, cc)
	if err == nil {
		_, err = c.pollCSTS(ctx, shutdownLimit, func(csts uint32) bool { return csts&nvmeof.CSTSSHSTMask == nvmeof.CSTSSHSTDone })
	}
	if errors.Is(err, ErrClosed) {
		err = nil // closed before
	}
	c.fail(ErrClosed)
	c.stop()
	return err
}

// Done is closed when the controller has ended; Err then says why.
func (c *Controller) Done() <-chan struct{} { return c.ctx.Done() }

// Err is nil while the controller is up, then why it ended.
func (c *Controller) Err() error { return context.Cause(c.ctx) }

// ID is the controller identifier (CNTLID).
func (c *Controller) ID() uint16 { return c.id }

// Version is the VS property.
func (c *Controller) Version() uint32 { return c.vs }

// Identify is the controller's Identify data.
func (c *Controller) Identify() nvmeof.IdentifyController { return c.ident }

// Discovery tells whether this is a discovery controller.
func (c *Controller) Discovery() bool {
	return c.opts.SubNQN == nvmeof.DiscoveryNQN || c.ident.CNTRLTYPE == nvmeof.ControllerDiscovery
}

// IOQueues is the number of I/O queues.
func (c *Controller) IOQueues() int { return len(c.io) }

// QueueDepth is the number of commands that can be in flight on each I/O queue.
func (c *Controller) QueueDepth() int {
	if len(c.io) == 0 {
		return 0
	}
	return len(c.io[0].slots)
}

// MaxTransfer is the largest data of one command in bytes (MDTS); 0 = no limit.
func (c *Controller) MaxTransfer() uint64 {
	if c.ident.MDTS == 0 || c.ident.MDTS > 40 {
		return 0
	}
	page := uint64(4096) << (c.cap >> 48 & 15) // MPSMIN
	return page << c.ident.MDTS
}

func (c *Controller) maxTransfer([]byte) uint64 { return c.MaxTransfer() }

// Admin sends an admin or fabrics command with its data in or for buf, and waits. Identifier and SGL are filled in.
// A status other than success is returned as the error.
func (c *Controller) Admin(ctx context.Context, cmd *nvmeof.Command, buf []byte) (nvmeof.Completion, error) {
	cqe, _, err := c.admin.do(ctx, cmd, buf)
	return cqe, statusError(cqe, err)
}

// IO sends an I/O command on the least busy I/O queue; see [Controller.Admin]. It also returns how many bytes arrived
// in buf.
func (c *Controller) IO(ctx context.Context, cmd *nvmeof.Command, buf []byte) (nvmeof.Completion, int, error) {
	return do(ctx, c, cmd, buf)
}

// submit is IO without statuses as errors.
func (c *Controller) submit(ctx context.Context, cmd *nvmeof.Command, buf []byte) (nvmeof.Completion, int, error) {
	if len(c.io) == 0 {
		return nvmeof.Completion{}, 0, errors.New("controller has no I/O queue")
	}
	if m := c.MaxTransfer(); m != 0 && uint64(len(buf)) > m {
		return nvmeof.Completion{}, 0, tooLarge(len(buf), m)
	}
	return c.pick().do(ctx, cmd, buf)
}

// pick chooses the least busy I/O queue, in turns among equals.
func (c *Controller) pick() *queue {
	if len(c.io) == 1 {
		return c.io[0]
	}
	first := int(c.next.Add(1))
	best := c.io[first%len(c.io)]
	for i := 1; i < len(c.io); i++ {
		if q := c.io[(first+i)%len(c.io)]; q.load() < best.load() {
			best = q
		}
	}
	return best
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

func (c *Controller) property(ctx context.Context, off uint32, size int) (uint64, error) {
	cmd := nvmeof.MakePropertyGet(off, size)
	cqe, err := c.Admin(ctx, &cmd, nil)
	if err != nil {
		return 0, fmt.Errorf("property %02Xh: %w", off, err)
	}
	return uint64(cqe.DW0()) | uint64(cqe.DW1())<<32, nil
}

func (c *Controller) setProperty(ctx context.Context, off, v uint32) error {
	cmd := nvmeof.MakePropertySet(off, v)
	_, err := c.Admin(ctx, &cmd, nil)
	return err
}

func (c *Controller) identify(ctx context.Context, cns uint8, nsid uint32, csi nvmeof.CSI, page []byte) error {
	cmd := nvmeof.MakeIdentify(cns, nsid, csi)
	_, err := c.Admin(ctx, &cmd, page)
	return err
}

// LogPage reads len(b) bytes (a multiple of 4) of a log page from offset off. The event that named the page is
// cleared.
func (c *Controller) LogPage(ctx context.Context, lid uint8, off uint64, b []byte) error {
	cmd := nvmeof.MakeGetLogPage(lid, nvmeof.BroadcastNSID, uint32(len(b)), off, 0, false)
	_, err := c.Admin(ctx, &cmd, b)
	return err
}

// keepAlive tells the controller every KATO/2 that the host is there. When it does not answer within KATO, the
// controller is lost.
func (c *Controller) keepAlive() {
	t := time.NewTicker(c.opts.KATO / 2)
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-c.ctx.Done():
			return
		}
		ctx, stop := context.WithTimeout(c.ctx, c.opts.KATO)
		var cmd nvmeof.Command
		cmd.SetHeader(nvmeof.OpKeepAlive, 0, 0)
		_, err := c.Admin(ctx, &cmd, nil)
		stop()
		if err != nil {
			c.fail(fmt.Errorf("%w: keep alive: %w", ErrConnectionLost, err))
			return
		}
	}
}

// enableEvents turns on the events the controller offers, and holds an Asynchronous Event Request.
func (c *Controller) enableEvents(ctx context.Context) error {
	mask := c.ident.OAES & (nvmeof.AENNamespace | nvmeof.AENDiscovery)
	if mask == 0 {
		return nil
	}
	var cmd nvmeof.Command
	cmd.SetHeader(nvmeof.OpSetFeatures, 0, 0)
	cmd.SetDW(10, nvmeof.FeatAsyncEvent)
	cmd.SetDW(11, mask)
	if _, err := c.Admin(ctx, &cmd, nil); err != nil {
		return fmt.Errorf("enable events: %w", err)
	}
	c.wg.Go(c.events)
	return nil
}

func (c *Controller) events() {
	page := make([]byte, nvmeof.ChangedNamespacesSize)
	for {
		var cmd nvmeof.Command
		cmd.SetHeader(nvmeof.OpAsyncEvent, 0, 0)
		cqe, err := c.Admin(c.ctx, &cmd, nil)
		if err != nil {
			return // the controller ended, or does not take the request
		}
		if lid := uint8(cqe.DW0() >> 16); lid != 0 {
			// Reading the page allows the next event of its kind.
			if c.LogPage(c.ctx, lid, 0, page[:logSize(lid)]) != nil && c.ctx.Err() != nil {
				return
			}
		}
		c.opts.OnEvent(cqe.DW0())
	}
}

// logSize is how much of a log page to read to clear its event.
func logSize(lid uint8) int {
	switch lid {
	case nvmeof.LogSMART:
		return nvmeof.SMARTSize
	case nvmeof.LogDiscovery:
		return nvmeof.DiscoveryHeaderSize
	case nvmeof.LogChangedNamespaces:
		return nvmeof.ChangedNamespacesSize
	}
	return nvmeof.ErrorEntrySize
}
