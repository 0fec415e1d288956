package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/rdma"
)

// tcpTransport dials NVMe/TCP queues, each on a connection of its own.
type tcpTransport struct{ opts *Options }

// adminInCapsule is what every NVMe/TCP admin queue takes in a capsule, bytes (TCP, In-Capsule Data).
const adminInCapsule = 8192

func (t tcpTransport) register(_ []byte, buf *rdma.DMABuf) error {
	if buf != nil {
		return ErrDeviceMemory
	}
	return nil
}
func (t tcpTransport) unregister([]byte) {}
func (t tcpTransport) close()            {}

func (t tcpTransport) maxTransfer(*nvmeof.IdentifyController) uint64 { return 0 }

func (t tcpTransport) dial(ctx context.Context, p queueParams) (queue, error) {
	d := net.Dialer{Timeout: t.opts.DialTimeout}
	conn, err := d.DialContext(ctx, "tcp", t.opts.Addr)
	if err != nil {
		return nil, err
	}
	q := &tcpQueue{id: p.id, conn: conn.(*net.TCPConn), inCapsule: adminInCapsule, onFail: p.onFail}
	if p.id != 0 {
		q.inCapsule = ioInCapsule(p.ident)
	}
	if err = q.negotiate(ctx, nvmeof.Digests{Header: t.opts.HeaderDigest, Data: t.opts.DataDigest}); err == nil {
		err = q.start(p.depth)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return q, nil
}

// ioInCapsule is how many bytes of data a capsule of an I/O queue takes.
func ioInCapsule(ident *nvmeof.IdentifyController) int {
	if ident.ICDOFF != 0 {
		return 0
	}
	return int(min(ident.IOCCSZ*16-nvmeof.CommandSize, 1<<20))
}

// negotiate exchanges ICReq and ICResp.
func (q *tcpQueue) negotiate(ctx context.Context, dg nvmeof.Digests) (err error) {
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
