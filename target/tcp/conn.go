package tcp

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kvof/kvof/internal/sock"
	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/target"
)

const (
	// maxH2CData is the largest H2CData PDU we accept, in bytes of data.
	maxH2CData = 1 << 20
	// readBuffer is the receive buffer: a burst of capsules with their data. Payload of H2CData PDUs bypasses it, but
	// for what came with the header.
	readBuffer = 32 << 10
	// maxRead is how many bytes of payload one read takes, at most.
	maxRead = 128 << 10
	// largePayload is how much data of a PDU makes it likely that more such PDUs follow. Then only aheadLarge bytes are read
	// into the receive buffer: headers, rather than payload to be copied.
	largePayload = 32 << 10
	aheadLarge   = 512
	// maxTransfers is how many commands of one connection may have an R2T outstanding.
	maxTransfers = 16
)

// setupTime is how long a host may take from connecting to a successful Connect.
var setupTime = 15 * time.Second

// conn is one NVMe/TCP connection: one queue.
type conn struct {
	l     *Listener
	nc    net.Conn
	sock  *sock.Conn
	name  string
	queue *target.Queue

	dg    nvmeof.Digests
	align int // of C2HData's data: HPDA in bytes

	// The reader's.
	buf       []byte
	r, w      int
	ahead     int           // bytes to read ahead
	connected bool          // a Connect succeeded
	want      atomic.Bool   // the host owes us bytes: the rest of a PDU
	last      uint64        // sock.Moved, when checkStall last looked
	still     time.Duration // for how long it has not changed

	spinner spinner
	tx      sender

	// Transfers from the host: requests by tag with an R2T outstanding, and those waiting for a place.
	xmu      sync.Mutex
	xfers    map[uint16]*transfer
	waiting  []*target.Request
	spare    []*transfer
	over     bool
	reason   atomic.Pointer[string]
	closeOne sync.Once
}

// transfer is one command's data on its way from the host.
type transfer struct {
	r   *target.Request
	got uint32
	bad bool // a data digest did not match
}

func newConn(l *Listener, nc net.Conn) (*conn, error) {
	s, err := sock.New(nc)
	if err != nil {
		return nil, err
	}
	c := &conn{l: l, nc: nc, sock: s, name: nc.RemoteAddr().String(), buf: make([]byte, readBuffer), ahead: readBuffer, xfers: map[uint16]*transfer{}}
	var local netip.AddrPort
	if a, ok := nc.LocalAddr().(*net.TCPAddr); ok {
		local = a.AddrPort()
	}
	c.spinner = spinner{sock: s, busy: &l.spinners}
	c.tx.init(c)
	c.queue = l.target.NewQueue(c, l.port, local)
	return c, nil
}

// Name implements target.Conn.
func (c *conn) Name() string { return c.name }

// Close implements target.Conn.
func (c *conn) Close(reason string) {
	c.closeOne.Do(func() {
		c.reason.Store(&reason)
		c.nc.Close()
	})
}

// serve runs the connection until it ends.
func (c *conn) serve() {
	go c.tx.loop()
	_ = c.nc.SetDeadline(time.Now().Add(c.l.setup))
	err := c.run()
	reason := ""
	if p := c.reason.Load(); p != nil {
		reason = *p
	}
	var te *nvmeof.TermError
	switch {
	case errors.As(err, &te):
		c.l.log.Warn("host broke the protocol", "peer", c.name, "error", err)
	case reason != "":
		c.l.log.Debug("connection closed", "peer", c.name, "reason", reason)
	default:
		c.l.log.Debug("connection ended", "peer", c.name, "error", err)
	}
	c.Close("")
	c.abortTransfers()
	c.tx.close()
	c.queue.Close()
	c.tx.stop()
}

var errEnded = errors.New("the host ended the connection")

// run sets the connection up and reads PDUs.
func (c *conn) run() error {
	err := c.setup()
	for err == nil {
		err = c.readPDU()
	}
	var te *nvmeof.TermError
	if errors.As(err, &te) && !nvmeof.IsTermReq(c.buf[c.r]) {
		c.terminate(te)
	}
	return err
}

// setup exchanges ICReq and ICResp.
func (c *conn) setup() error {
	c.want.Store(true)
	b, err := c.peek(nvmeof.PDUHeaderSize)
	if err != nil {
		return err
	}
	if b[0] != nvmeof.PDUICReq {
		return &nvmeof.TermError{FES: nvmeof.FESSequence, Why: "the first PDU is not an ICReq"}
	}
	p, err := c.header()
	if err != nil {
		return err
	}
	ic, te := nvmeof.DecodeIC(&p)
	if te != nil {
		return te
	}
	c.r += nvmeof.ICSize
	c.align = (int(ic.PDA) + 1) * 4
	resp := make([]byte, nvmeof.ICSize)
	nvmeof.EncodeIC(resp, nvmeof.PDUICResp, nvmeof.IC{Digest: ic.Digest, Max: maxH2CData})
	if _, err := c.nc.Write(resp); err != nil {
		return err
	}
	c.dg = ic.Digest
	return nil
}

// readPDU reads and handles one PDU.
func (c *conn) readPDU() error {
	c.want.Store(c.w > c.r)
	if !c.connected && c.queue.Controller() != nil {
		c.connected = true
		_ = c.nc.SetDeadline(time.Time{})
	}
	p, err := c.header()
	if err != nil {
		return err
	}
	switch p.Type {
	case nvmeof.PDUCapsuleCmd:
		return c.capsule(&p)
	case nvmeof.PDUH2CData:
		return c.data(&p)
	case nvmeof.PDUH2CTermReq:
		t := p.Term()
		c.l.log.Warn("host sent a termination request", "peer", c.name, "fes", t.FES, "fei", t.FEI)
		return errEnded
	}
	return &nvmeof.TermError{FES: nvmeof.FESSequence, Why: fmt.Sprintf("PDU type %02Xh after connection set-up", p.Type)}
}

// header reads and validates the header of the next PDU; it stays in the buffer.
func (c *conn) header() (p nvmeof.PDU, err error) {
	b, err := c.peek(nvmeof.PDUHeaderSize)
	if err != nil {
		return p, err
	}
	n, te := nvmeof.HeaderSize(b, true, c.dg)
	if te != nil {
		return p, te
	}
	c.want.Store(true)
	if b, err = c.peek(n); err != nil {
		return p, err
	}
	if p, te = nvmeof.DecodePDU(b, c.dg); te != nil {
		return p, te
	}
	return p, nil
}

// capsule handles a command capsule. Data that comes in it is small: the whole PDU is read into the buffer first.
func (c *conn) capsule(p *nvmeof.PDU) error {
	n := p.DataLen()
	if n > target.InCapsule {
		return &nvmeof.TermError{FES: nvmeof.FESDataLimit, FEI: 4, Why: fmt.Sprintf("%d bytes of data in a capsule", n)}
	}
	plen := int(p.PLEN)
	b, err := c.peek(plen)
	if err != nil {
		return err
	}
	r := c.queue.NewRequest()
	if r == nil {
		return &nvmeof.TermError{FES: nvmeof.FESSequence, Why: "more commands than the queue has entries"}
	}
	copy(r.Cmd[:], b[nvmeof.PDUHeaderSize:])
	c.r += plen
	c.ahead = len(c.buf)
	st := nvmeof.Success
	if n > 0 {
		data := b[p.PDO : uint32(p.PDO)+n]
		if c.dg.Data && nvmeof.Digest(0, data) != leUint32(b[uint32(p.PDO)+n:]) {
			st = nvmeof.TransientTransport
		}
		r.Inline = data
	}
	sgl := r.Cmd.SGL()
	r.Length = sgl.Length()
	switch {
	case st != nvmeof.Success:
	case sgl.ID() == nvmeof.SGLOffset:
		switch off := sgl.Address(); {
		case r.Cmd.Direction() != nvmeof.HostToController && r.Length > 0:
			st = nvmeof.InvalidField | nvmeof.DNR
		case off > uint64(n):
			st = nvmeof.SGLOffsetInvalid | nvmeof.DNR
		case uint64(r.Length) > uint64(n)-off:
			st = nvmeof.DataSGLLength | nvmeof.DNR
		case n > 0:
			r.Inline = r.Inline[off : off+uint64(r.Length)]
		}
	case sgl.ID() == nvmeof.SGLTransport:
		if n > 0 {
			st = nvmeof.SGLTypeInvalid | nvmeof.DNR
		}
	default:
		// Hosts leave the descriptor of a command without data at zero.
		if sgl.Length() != 0 || n > 0 {
			st = nvmeof.SGLTypeInvalid | nvmeof.DNR
		}
	}
	if st != nvmeof.Success {
		r.Inline = nil
		c.queue.Refuse(r, st)
		return nil
	}
	c.queue.Execute(r)
	return nil
}

// Pull implements target.Conn: it sends one R2T for all of the command's data, now or when there is a place.
func (c *conn) Pull(r *target.Request) {
	c.xmu.Lock()
	switch {
	case c.over:
		c.xmu.Unlock()
		r.Aborted()
	case len(c.xfers) >= maxTransfers:
		c.waiting = append(c.waiting, r)
		c.xmu.Unlock()
	default:
		// With xmu held: a host that guesses the tag and sends before the R2T must not end the command meanwhile.
		c.begin(r)
		flush := c.tx.r2t(r)
		c.xmu.Unlock()
		if flush {
			c.tx.flush()
		}
	}
}

// begin notes a transfer; the caller holds xmu and sends the R2T.
func (c *conn) begin(r *target.Request) {
	var x *transfer
	if n := len(c.spare); n > 0 {
		x, c.spare = c.spare[n-1], c.spare[:n-1]
	} else {
		x = new(transfer)
	}
	*x = transfer{r: r}
	c.xfers[r.Tag] = x
}

// data handles an H2CData PDU: its data goes straight to where the command wants it.
func (c *conn) data(p *nvmeof.PDU) error {
	n, off := p.DATAL(), p.DATAO()
	c.xmu.Lock()
	x := c.xfers[p.TTAG()]
	c.xmu.Unlock()
	switch {
	case x == nil || x.r.Cmd.CID() != p.CCCID():
		return &nvmeof.TermError{FES: nvmeof.FESInvalidField, FEI: 10, Why: fmt.Sprintf("H2CData for transfer tag %d, which has no R2T", p.TTAG())}
	case n > maxH2CData:
		return &nvmeof.TermError{FES: nvmeof.FESDataLimit, FEI: 16, Why: fmt.Sprintf("H2CData of %d bytes", n)}
	case off != x.got || n > x.r.PullLength-x.got:
		return &nvmeof.TermError{FES: nvmeof.FESDataOutOfRange, FEI: 12, Why: fmt.Sprintf("H2CData at %d for %d bytes, %d expected of %d", off, n, x.got, x.r.PullLength)}
	case (p.Flags&nvmeof.FlagLast != 0) != (x.got+n == x.r.PullLength):
		return &nvmeof.TermError{FES: nvmeof.FESInvalidField, FEI: 1, Why: "LAST_PDU flag of H2CData is wrong"}
	}
	crc, digest := uint32(0), c.dg.Data
	if _, err := c.peek(int(p.PDO)); err != nil { // the padding is not part of the header
		return err
	}
	c.r += int(p.PDO)
	for left := int(n); left > 0; {
		// Not more than stays in the cache until it is checksummed.
		b := x.r.Buffer(min(left, maxRead))
		m := copy(b, c.buf[c.r:c.w])
		c.r += m
		if m == 0 {
			var err error
			if m, err = c.read(b, left); err != nil {
				return err
			}
		}
		if digest {
			crc = nvmeof.Digest(crc, b[:m])
		}
		x.r.Filled(m)
		left -= m
	}
	x.got += n
	if n >= largePayload {
		c.ahead = aheadLarge
	}
	if digest {
		b, err := c.peek(nvmeof.DigestSize)
		if err != nil {
			return err
		}
		x.bad = x.bad || leUint32(b) != crc
		c.r += nvmeof.DigestSize
	}
	if x.got == x.r.PullLength {
		c.endTransfer(x)
	}
	return nil
}

// endTransfer hands a command whose data is complete back, and starts the next transfer.
func (c *conn) endTransfer(x *transfer) {
	r, st := x.r, nvmeof.Success
	if x.bad {
		st = nvmeof.TransientTransport
	}
	c.xmu.Lock()
	delete(c.xfers, r.Tag)
	c.spare = append(c.spare, x)
	var next *target.Request
	if len(c.waiting) > 0 {
		next = c.waiting[0]
		c.waiting = c.waiting[1:]
		c.begin(next)
	}
	c.xmu.Unlock()
	if next != nil && c.tx.r2t(next) {
		c.tx.flush()
	}
	r.Received(st)
}

// abortTransfers ends all transfers: the reader has stopped.
func (c *conn) abortTransfers() {
	c.xmu.Lock()
	c.over = true
	var rs []*target.Request
	for _, x := range c.xfers {
		rs = append(rs, x.r)
	}
	rs = append(rs, c.waiting...)
	c.xfers, c.waiting = nil, nil
	c.xmu.Unlock()
	for _, r := range rs {
		r.Aborted()
	}
}

// peek returns the next n bytes without consuming them; n is at most the buffer's size.
func (c *conn) peek(n int) ([]byte, error) {
	for c.w-c.r < n {
		if c.r > 0 && (c.r == c.w || c.r+n > len(c.buf)) {
			c.w = copy(c.buf, c.buf[c.r:c.w])
			c.r = 0
		}
		c.tx.flush()
		b := c.buf[c.w:max(c.r+n, min(c.w+c.ahead, len(c.buf)))]
		m := c.spinner.spin(b)
		if m == 0 {
			start := time.Now()
			var err error
			if m, err = c.read(b, 1); err != nil {
				return nil, err
			}
			c.spinner.waited(time.Since(start))
		}
		c.w += m
		c.want.Store(true) // be it a part of the first eight bytes
	}
	return c.buf[c.r : c.r+n], nil
}

// read reads from the socket, having sent what has been answered; the host owes us want bytes.
func (c *conn) read(b []byte, want int) (int, error) {
	c.tx.flush()
	return c.sock.Read(b, nil, want)
}

// terminate tells the host why the connection ends, as far as it still listens.
func (c *conn) terminate(te *nvmeof.TermError) {
	var header []byte
	if n := c.w - c.r; n >= nvmeof.PDUHeaderSize {
		header = c.buf[c.r : c.r+min(n, nvmeof.MaxPDUHeader)]
	}
	c.tx.flush()
	_ = c.nc.SetDeadline(time.Now().Add(time.Second))
	c.tx.term(nvmeof.AppendTerm(nil, nvmeof.PDUC2HTermReq, te, header))
	// The host must read the request before the socket's reset discards it: wait for it to close, for a moment.
	if hc, ok := c.nc.(interface{ CloseWrite() error }); ok {
		_ = hc.CloseWrite()
	}
	_, _ = io.CopyN(io.Discard, c.nc, 1<<20)
}

// checkStall ends the connection when the host owes us bytes, or takes none of ours, and nothing has moved for
// the listener's limit. It is called once in every period d.
func (c *conn) checkStall(d time.Duration) {
	c.xmu.Lock()
	owed := len(c.xfers) > 0
	c.xmu.Unlock()
	moved := c.sock.Moved()
	if !(owed || c.want.Load() || c.tx.blocked()) || moved != c.last {
		c.last, c.still = moved, 0
		return
	}
	if c.still += d; c.still >= c.l.stall {
		c.l.log.Warn("connection stalled", "peer", c.name, "after", c.still)
		c.Close("the peer stalled")
	}
}

func leUint32(b []byte) uint32 {
	return uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 | uint32(b[3])<<24
}
