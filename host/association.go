package host

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/rdma"
)

// association is a controller as the target knows it: its queues, from Connect until the first connection of them ends.
type association struct {
	opts      *Options
	transport transport
	id        uint16
	cap       nvmeof.CAP
	vs        uint32
	ident     nvmeof.IdentifyController
	admin     queue
	io        []queue
	next      atomic.Uint32 // I/O queue to try first
	ctx       context.Context
	cancel    context.CancelCauseFunc // ends background work; the cause is why the association ended
	wg        sync.WaitGroup

	mu     sync.Mutex
	queues []queue // all of them, for fail and stop
	failed bool
}

// transport connects the queues of one association.
type transport interface {
	// dial opens a connection and makes it a queue.
	dial(ctx context.Context, p queueParams) (queue, error)
	// register prepares memory for transfers until the transport is closed; see [Controller.Register]. It is buf's unless that is nil.
	register(b []byte, buf *rdma.DMABuf) error
	unregister(b []byte)
	// maxTransfer is how many bytes a command of the controller carries, 0 for any number.
	maxTransfer(ident *nvmeof.IdentifyController) uint64
	// close is called when all queues have ended.
	close()
}

func newTransport(o *Options) (transport, error) {
	switch o.Transport {
	case TCP:
		return tcpTransport{o}, nil
	case RDMA:
		return newRDMA(o)
	}
	return nil, fmt.Errorf("transport %q is not supported", o.Transport)
}

// queueParams describe a queue to connect.
type queueParams struct {
	id     uint16
	cntlid uint16 // of the controller, when id is not 0
	depth  int    // commands in flight
	// ident is the controller's, when id is not 0.
	ident  *nvmeof.IdentifyController
	onFail func(error) // called once, when the connection ends
}

// queue is a connected NVMe queue pair.
type queue interface {
	// do carries out one command: fills in identifier and SGL, sends it, waits. It returns the completion and how many
	// bytes arrived, -1 where that is not known. The error is never a [nvmeof.Status].
	do(ctx context.Context, cmd nvmeof.Command, d data) (nvmeof.Completion, int, error)
	depth() int
	load() int // commands in flight
	// fail ends the queue: everything waiting returns err. It does not wait and may be called again.
	fail(err error)
	// wait waits until nothing of a failed queue is left.
	wait()
}

// connectAssociation brings up an association. Its ctx ends with it.
func connectAssociation(ctx context.Context, o *Options) (*association, error) {
	t, err := newTransport(o)
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithTimeoutCause(ctx, bringUpLimit, fmt.Errorf("%s did not answer within %v", o.Addr, bringUpLimit))
	defer stop()
	a := &association{opts: o, transport: t, id: nvmeof.CNTLIDDynamic}
	a.ctx, a.cancel = context.WithCancelCause(context.Background())
	if err := a.bringUp(ctx); err != nil {
		a.fail(err)
		a.stop()
		return nil, fmt.Errorf("connect to %s at %s: %w", o.SubNQN, o.Addr, err)
	}
	return a, nil
}

func (a *association) bringUp(ctx context.Context) (err error) {
	if a.admin, err = a.connectQueue(ctx, 0, adminDepth); err != nil {
		return err
	}
	v, err := a.property(ctx, nvmeof.PropCAP, 8)
	if err != nil {
		return err
	}
	a.cap = nvmeof.CAP(v)
	if v, err = a.property(ctx, nvmeof.PropVS, 4); err != nil {
		return err
	}
	a.vs = uint32(v)
	if err := a.enable(ctx); err != nil {
		return err
	}
	page := make([]byte, nvmeof.IdentifySize)
	if err := a.identify(ctx, nvmeof.CNSController, 0, 0, page); err != nil {
		return fmt.Errorf("identify controller: %w", err)
	}
	if err := a.ident.Decode(page); err != nil {
		return err
	}
	if a.opts.KATO > 0 && (a.ident.KAS > 0 || !a.discovery()) {
		a.wg.Go(a.keepAlive)
	}
	if !a.discovery() && a.opts.IOQueues > 0 {
		if err := a.connectIO(ctx); err != nil {
			return err
		}
	}
	if a.opts.OnEvent != nil {
		return a.enableEvents(ctx)
	}
	return nil
}

// enable sets CC.EN and waits for CSTS.RDY.
func (a *association) enable(ctx context.Context) error {
	cc := uint32(nvmeof.CCEnable | nvmeof.CCIOSQES64 | nvmeof.CCIOCQES16)
	if a.cap.CommandSets() {
		cc |= nvmeof.CCCSSAll
	}
	if err := a.setProperty(ctx, nvmeof.PropCC, cc); err != nil {
		return fmt.Errorf("enable the controller: %w", err)
	}
	limit := time.Duration(max(a.cap.TO(), 1)) * 500 * time.Millisecond
	_, err := a.pollCSTS(ctx, limit, func(csts uint32) bool { return csts&nvmeof.CSTSReady != 0 })
	if err != nil {
		return fmt.Errorf("wait for the controller to be ready: %w", err)
	}
	return nil
}

func (a *association) pollCSTS(ctx context.Context, limit time.Duration, ok func(uint32) bool) (uint32, error) {
	ctx, stop := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not within %v", limit))
	defer stop()
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		v, err := a.property(ctx, nvmeof.PropCSTS, 4)
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
func (a *association) connectIO(ctx context.Context) error {
	if a.ident.IOCCSZ < nvmeof.CommandSize/16 {
		return protocolError("IOCCSZ is %d", a.ident.IOCCSZ)
	}
	n := min(a.opts.IOQueues, 65535)
	var cmd nvmeof.Command
	cmd.SetHeader(nvmeof.OpSetFeatures, 0, 0)
	cmd.SetDW(10, nvmeof.FeatQueues)
	cmd.SetDW(11, uint32(n-1)|uint32(n-1)<<16)
	cqe, err := a.do(ctx, &cmd, nil)
	if err != nil {
		return fmt.Errorf("set the number of queues: %w", err)
	}
	n = min(n, int(cqe.DW0()&0xFFFF)+1, int(cqe.DW0()>>16)+1)
	depth := min(a.opts.QueueDepth, int(a.cap.MQES()))
	if m := int(a.ident.MAXCMD); m > 0 {
		depth = min(depth, m-1)
	}
	if depth < 1 {
		return protocolError("the controller allows queues of %d entries", a.cap.MQES()+1)
	}
	for i := range n {
		q, err := a.connectQueue(ctx, uint16(i+1), depth)
		if err != nil {
			return fmt.Errorf("I/O queue %d: %w", i+1, err)
		}
		a.io = append(a.io, q)
	}
	return nil
}

// connectQueue makes a connection a queue of the controller. depth is the number of commands in flight, and so the 0's
// based size of the queue, which must never be full.
func (a *association) connectQueue(ctx context.Context, id uint16, depth int) (queue, error) {
	q, err := a.transport.dial(ctx, queueParams{id: id, cntlid: a.id, depth: depth, ident: &a.ident, onFail: a.fail})
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	if a.failed {
		err = context.Cause(a.ctx)
	} else {
		a.queues = append(a.queues, q)
	}
	a.mu.Unlock()
	if err != nil {
		q.fail(err)
		q.wait()
		return nil, err
	}
	return q, a.connectCommand(ctx, q, id, q.depth())
}

func (a *association) connectCommand(ctx context.Context, q queue, id uint16, depth int) error {
	b := make([]byte, nvmeof.ConnectDataSize)
	(&nvmeof.ConnectData{HostID: a.opts.HostID, CNTLID: a.id, SubNQN: a.opts.SubNQN, HostNQN: a.opts.HostNQN}).Encode(b)
	kato := uint32(0)
	if id == 0 {
		kato = uint32(max(a.opts.KATO, 0).Milliseconds())
	}
	cmd := nvmeof.MakeConnect(0, id, uint16(depth), 0, kato)
	cqe, _, err := q.do(ctx, cmd, data{buf: b})
	if err != nil {
		return err
	}
	if st := cqe.Status(); st != nvmeof.Success {
		if st.Code() == nvmeof.ConnectInvalidParam {
			return fmt.Errorf("%w: %s", st, connectField(cqe.DW0()))
		}
		return st
	}
	if id == 0 {
		a.id = uint16(cqe.DW0())
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

// fail ends the association; the first cause counts.
func (a *association) fail(err error) {
	a.mu.Lock()
	if a.failed {
		a.mu.Unlock()
		return
	}
	a.failed = true
	a.cancel(err)
	queues := a.queues
	a.mu.Unlock()
	for _, q := range queues {
		q.fail(err)
	}
}

// stop waits for all goroutines of a failed association.
func (a *association) stop() {
	for _, q := range a.queues { // fixed, since fail
		q.wait()
	}
	a.wg.Wait()
	a.transport.close()
}

// shutdown shuts the controller down in an orderly way (CC.SHN), for at most 5 seconds.
func (a *association) shutdown() error {
	ctx, stop := context.WithTimeout(a.ctx, shutdownLimit)
	defer stop()
	cc := uint32(nvmeof.CCEnable | nvmeof.CCIOSQES64 | nvmeof.CCIOCQES16 | nvmeof.CCSHNNormal)
	if a.cap.CommandSets() {
		cc |= nvmeof.CCCSSAll
	}
	if err := a.setProperty(ctx, nvmeof.PropCC, cc); err != nil {
		return err
	}
	_, err := a.pollCSTS(ctx, shutdownLimit, func(csts uint32) bool { return csts&nvmeof.CSTSSHSTMask == nvmeof.CSTSSHSTDone })
	return err
}

func (a *association) discovery() bool {
	return a.opts.SubNQN == nvmeof.DiscoveryNQN || a.ident.CNTRLTYPE == nvmeof.ControllerDiscovery
}

// maxTransfer is the largest data of one command in bytes: the controller's MDTS, or the transport's limit; 0 = no limit.
func (a *association) maxTransfer() uint64 {
	m := a.transport.maxTransfer(&a.ident)
	if a.ident.MDTS == 0 || a.ident.MDTS > 40 {
		return m
	}
	mdts := uint64(4096) << (a.cap >> 48 & 15) << a.ident.MDTS // in pages of MPSMIN
	if m == 0 {
		return mdts
	}
	return min(m, mdts)
}

// do sends an admin or fabrics command.
func (a *association) do(ctx context.Context, cmd *nvmeof.Command, buf []byte) (nvmeof.Completion, error) {
	cqe, _, err := a.admin.do(ctx, *cmd, data{buf: buf})
	return cqe, statusError(cqe, err)
}

// submit sends an I/O command on the least busy I/O queue.
func (a *association) submit(ctx context.Context, cmd nvmeof.Command, d data) (nvmeof.Completion, int, error) {
	if len(a.io) == 0 {
		return nvmeof.Completion{}, 0, errors.New("controller has no I/O queue")
	}
	if m := a.maxTransfer(); m != 0 && uint64(d.size()) > m {
		return nvmeof.Completion{}, 0, tooLarge(d.size(), m)
	}
	return a.pick().do(ctx, cmd, d)
}

// pick chooses the least busy I/O queue, in turns among equals.
func (a *association) pick() queue {
	if len(a.io) == 1 {
		return a.io[0]
	}
	first := int(a.next.Add(1))
	best := a.io[first%len(a.io)]
	for i := 1; i < len(a.io); i++ {
		if q := a.io[(first+i)%len(a.io)]; q.load() < best.load() {
			best = q
		}
	}
	return best
}

func (a *association) property(ctx context.Context, off uint32, size int) (uint64, error) {
	cmd := nvmeof.MakePropertyGet(off, size)
	cqe, err := a.do(ctx, &cmd, nil)
	if err != nil {
		return 0, fmt.Errorf("property %02Xh: %w", off, err)
	}
	return uint64(cqe.DW0()) | uint64(cqe.DW1())<<32, nil
}

func (a *association) setProperty(ctx context.Context, off, v uint32) error {
	cmd := nvmeof.MakePropertySet(off, v)
	_, err := a.do(ctx, &cmd, nil)
	return err
}

func (a *association) identify(ctx context.Context, cns uint8, nsid uint32, csi nvmeof.CSI, page []byte) error {
	cmd := nvmeof.MakeIdentify(cns, nsid, csi)
	_, err := a.do(ctx, &cmd, page)
	return err
}

func (a *association) logPage(ctx context.Context, lid uint8, off uint64, b []byte) error {
	cmd := nvmeof.MakeGetLogPage(lid, nvmeof.BroadcastNSID, uint32(len(b)), off, 0, false)
	_, err := a.do(ctx, &cmd, b)
	return err
}

// keepAlive tells the controller every KATO/2 that the host is there. When it does not answer within KATO, the
// controller is lost.
func (a *association) keepAlive() {
	t := time.NewTicker(a.opts.KATO / 2)
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-a.ctx.Done():
			return
		}
		ctx, stop := context.WithTimeout(a.ctx, a.opts.KATO)
		var cmd nvmeof.Command
		cmd.SetHeader(nvmeof.OpKeepAlive, 0, 0)
		_, err := a.do(ctx, &cmd, nil)
		stop()
		if err != nil {
			a.fail(fmt.Errorf("%w: keep alive: %w", ErrConnectionLost, err))
			return
		}
	}
}

// enableEvents turns on the events the controller offers, and holds an Asynchronous Event Request.
func (a *association) enableEvents(ctx context.Context) error {
	mask := a.ident.OAES & (nvmeof.AENNamespace | nvmeof.AENDiscovery)
	if mask == 0 {
		return nil
	}
	var cmd nvmeof.Command
	cmd.SetHeader(nvmeof.OpSetFeatures, 0, 0)
	cmd.SetDW(10, nvmeof.FeatAsyncEvent)
	cmd.SetDW(11, mask)
	if _, err := a.do(ctx, &cmd, nil); err != nil {
		return fmt.Errorf("enable events: %w", err)
	}
	a.wg.Go(a.events)
	return nil
}

func (a *association) events() {
	page := make([]byte, nvmeof.ChangedNamespacesSize)
	for {
		var cmd nvmeof.Command
		cmd.SetHeader(nvmeof.OpAsyncEvent, 0, 0)
		cqe, err := a.do(a.ctx, &cmd, nil)
		if err != nil {
			return // the controller ended, or does not take the request
		}
		if lid := uint8(cqe.DW0() >> 16); lid != 0 {
			// Reading the page allows the next event of its kind.
			if a.logPage(a.ctx, lid, 0, page[:logSize(lid)]) != nil && a.ctx.Err() != nil {
				return
			}
		}
		a.opts.OnEvent(cqe.DW0())
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
