package host

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"slices"
	"sync"
	"testing"

	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/rdma/rdmatest"
)

// fake is a target as simple as can be: one goroutine per connection, each command carried out when it arrives.
// Namespace 1 is Key Value, namespace 2 is block.
type fake struct {
	t           testing.TB
	l           net.Listener
	net         *rdmatest.Net // when it listens on RDMA
	chunk       int           // bytes in one C2HData, R2T
	success     bool
	noCSI       bool
	noExistMany bool
	refuseDG    bool
	ioccsz      uint32
	mdts        uint8
	entries     []nvmeof.DiscoveryEntry
	intercept   func(c *fakeConn, cmd *nvmeof.Command) bool // true: dealt with

	mu     sync.Mutex
	genctr uint64
	kv     map[string][]byte
	disk   []byte
	aer    func(dw0 uint32) // completes the held AER
	conns  map[io.Closer]bool
	wg     sync.WaitGroup
}

type fakeConn struct {
	*fake
	net.Conn
	qid   uint16
	dg    nvmeof.Digests
	cc    uint32
	rdma  *fakeRDMA // in place of Conn
	wmu   sync.Mutex
	later []func() // commands that came while another's data was awaited
}

const fakeBlock = 512

func bareFake(t testing.TB) *fake {
	return &fake{t: t, chunk: 1 << 20, ioccsz: (64 + 4096) / 16, kv: map[string][]byte{}, disk: make([]byte, 1<<20), conns: map[io.Closer]bool{}}
}

func newFake(t testing.TB) *fake {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := bareFake(t)
	f.l = l
	f.wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			f.mu.Lock()
			f.conns[conn] = true
			f.mu.Unlock()
			f.wg.Go(func() {
				defer conn.Close()
				(&fakeConn{fake: f, Conn: conn}).serve()
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		f.dropAll()
		f.wg.Wait()
	})
	return f
}

func (f *fake) addr() string {
	if f.net != nil {
		return fakeRDMAAddr.String()
	}
	return f.l.Addr().String()
}

func (f *fake) dropAll() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for c := range f.conns {
		c.Close()
	}
}

// pdu reads one PDU; data is its data after the digest has been checked.
func (c *fakeConn) pdu() (p nvmeof.PDU, data []byte, err error) {
	b := make([]byte, nvmeof.MaxPDUHeader+nvmeof.DigestSize)
	if _, err = io.ReadFull(c, b[:8]); err != nil {
		return
	}
	n, terr := nvmeof.HeaderSize(b, true, c.dg)
	if terr != nil {
		c.t.Errorf("fake: %v", terr)
		return p, nil, terr
	}
	if _, err = io.ReadFull(c, b[8:n]); err != nil {
		return
	}
	if p, terr = nvmeof.DecodePDU(b, c.dg); terr != nil {
		c.t.Errorf("fake: %v", terr)
		return p, nil, terr
	}
	if b[0] == nvmeof.PDUH2CTermReq {
		return p, nil, io.EOF
	}
	rest := make([]byte, int(p.PLEN)-n)
	if _, err = io.ReadFull(c, rest); err != nil || len(rest) == 0 {
		return
	}
	data = rest[p.Pad():][:p.DataLen()]
	if c.dg.Data && binary.LittleEndian.Uint32(rest[len(rest)-4:]) != nvmeof.Digest(0, data) {
		c.t.Error("fake: data digest does not match")
	}
	return
}

func (c *fakeConn) send(b ...[]byte) {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	bufs := net.Buffers(b)
	bufs.WriteTo(c.Conn)
}

func (c *fakeConn) reply(cid uint16, dw0, dw1 uint32, st nvmeof.Status) {
	var b [nvmeof.CapsuleRspSize + nvmeof.DigestSize]byte
	cqe := nvmeof.MakeCompletion(dw0, dw1, 0, c.qid, cid, st)
	if c.rdma != nil {
		c.rdma.respond(cqe[:], 0)
		return
	}
	c.send(b[:nvmeof.EncodeResponse(b[:], &cqe, c.dg)])
}

// data sends b in C2HData PDUs; flags are those of the last.
func (c *fakeConn) data(cid uint16, b []byte, flags uint8) {
	for off := 0; off < len(b); off += c.chunk {
		part := b[off:min(off+c.chunk, len(b))]
		fl := uint8(0)
		if off+len(part) == len(b) {
			fl = flags
		}
		h := make([]byte, nvmeof.DataPDUSize+nvmeof.DigestSize+64)
		h = h[:nvmeof.EncodeData(h, nvmeof.PDUC2HData, fl, cid, 0, uint32(off), len(part), 64, c.dg)]
		tail := make([]byte, 0, 4)
		if c.dg.Data {
			tail = binary.LittleEndian.AppendUint32(tail, nvmeof.Digest(0, part))
		}
		c.send(h, part, tail)
	}
}

func (c *fakeConn) read(cid uint16, b []byte, dw0 uint32, success bool) {
	if c.rdma != nil {
		c.rdma.write(cid, b)
		c.reply(cid, dw0, 0, nvmeof.Success)
		return
	}
	if success && c.success && len(b) > 0 {
		c.data(cid, b, nvmeof.FlagLast|nvmeof.FlagSuccess)
		return
	}
	c.data(cid, b, nvmeof.FlagLast)
	c.reply(cid, dw0, 0, nvmeof.Success)
}

// write fetches a command's data: in the capsule, or by R2Ts.
func (c *fakeConn) write(cmd *nvmeof.Command, inCapsule []byte) []byte {
	if c.rdma != nil {
		return c.rdma.read(cmd.CID())
	}
	sgl := cmd.SGL()
	n := int(sgl.Length())
	if sgl.ID() == nvmeof.SGLOffset || n == 0 {
		return inCapsule
	}
	b := make([]byte, n)
	for off := 0; off < n; off += c.chunk {
		end := min(off+c.chunk, n)
		h := make([]byte, nvmeof.DataPDUSize+nvmeof.DigestSize)
		c.send(h[:nvmeof.EncodeR2T(h, cmd.CID(), uint16(off/c.chunk+7), uint32(off), uint32(end-off), c.dg)])
		for got := off; got < end; {
			p, data, err := c.pdu()
			if err != nil {
				return nil
			}
			if p.Type != nvmeof.PDUH2CData { // a capsule of another command in between
				p.Raw = bytes.Clone(p.Raw)
				c.later = append(c.later, func() { c.handle(&p, data) })
				continue
			}
			if p.CCCID() != cmd.CID() || int(p.DATAO()) != got || p.TTAG() != uint16(off/c.chunk+7) || len(data) > 4096*3 || (p.Flags&nvmeof.FlagLast != 0) != (got+len(data) == end) {
				c.t.Errorf("fake: H2CData cid %d ttag %d off %d len %d flags %x in [%d, %d)", p.CCCID(), p.TTAG(), p.DATAO(), len(data), p.Flags, got, end)
			}
			got += copy(b[p.DATAO():], data)
		}
	}
	return b
}

func (c *fakeConn) serve() {
	p, _, err := c.pdu()
	if err != nil {
		return
	}
	ic, _ := nvmeof.DecodeIC(&p)
	if c.refuseDG {
		ic.Digest = nvmeof.Digests{}
	}
	var b [nvmeof.ICSize]byte
	// MAXH2CDATA of three pages and a data alignment of 16 bytes make the host work.
	nvmeof.EncodeIC(b[:], nvmeof.PDUICResp, nvmeof.IC{PDA: 3, Digest: ic.Digest, Max: 3 * 4096})
	c.send(b[:])
	c.dg = ic.Digest
	for {
		p, data, err := c.pdu()
		if err != nil {
			return
		}
		if p.Type != nvmeof.PDUCapsuleCmd {
			c.t.Errorf("fake: PDU type %02Xh", p.Type)
			return
		}
		c.handle(&p, data)
		for len(c.later) > 0 {
			next := c.later[0]
			c.later = c.later[1:]
			next()
		}
	}
}

func (c *fakeConn) handle(p *nvmeof.PDU, data []byte) {
	cmd := nvmeof.Command(p.Raw[8:])
	c.command(cmd, data)
}

func (c *fakeConn) command(cmd nvmeof.Command, data []byte) {
	if c.intercept != nil && c.intercept(c, &cmd) {
		return
	}
	if c.qid == 0 {
		c.adminCommand(&cmd, data)
	} else if cmd.Opcode() == nvmeof.OpFabrics {
		c.adminCommand(&cmd, data)
	} else if cmd.NSID() == 1 {
		c.kvCommand(&cmd, data)
	} else {
		c.blockCommand(&cmd, data)
	}
}

func (c *fakeConn) adminCommand(cmd *nvmeof.Command, data []byte) {
	cid := cmd.CID()
	page := make([]byte, nvmeof.IdentifySize)
	switch cmd.Opcode() {
	case nvmeof.OpFabrics:
		switch cmd.FCType() {
		case nvmeof.FCConnect:
			if c.rdma != nil {
				data = c.rdma.read(cid)
			}
			var d nvmeof.ConnectData
			if err := d.Decode(data); err != nil {
				c.t.Error(err)
			}
			if c.qid = cmd.ConnectQID(); c.qid == 0 && d.CNTLID != 0xFFFF || c.qid != 0 && d.CNTLID != 5 {
				c.t.Errorf("fake: CNTLID %d", d.CNTLID)
			}
			if d.SubNQN == "nqn.2014-08.org.example:absent" {
				c.reply(cid, nvmeof.ConnectInvalidDW0(nvmeof.ConnectOffSUBNQN, true), 0, nvmeof.ConnectInvalidParam|nvmeof.DNR)
				return
			}
			c.reply(cid, 5, 0, 0)
		case nvmeof.FCPropertyGet:
			switch cmd.PropertyOffset() {
			case nvmeof.PropCAP:
				v := uint64(nvmeof.MakeCAP(127, 4, 0))
				c.reply(cid, uint32(v), uint32(v>>32), 0)
			case nvmeof.PropVS:
				c.reply(cid, nvmeof.VersionNVMe20, 0, 0)
			case nvmeof.PropCSTS:
				csts := c.cc & nvmeof.CCEnable
				if nvmeof.CCSHN(c.cc) != 0 {
					csts |= nvmeof.CSTSSHSTDone
				}
				c.reply(cid, csts, 0, 0)
			}
		case nvmeof.FCPropertySet:
			c.cc = uint32(cmd.PropertyValue())
			c.reply(cid, 0, 0, 0)
		}
	case nvmeof.OpIdentify:
		var e interface{ Encode([]byte) }
		switch cmd.CNS() {
		case nvmeof.CNSController:
			e = &nvmeof.IdentifyController{CNTLID: 5, MAXCMD: 128, KAS: 10, IOCCSZ: c.ioccsz, IORCSZ: 1, MDTS: c.mdts, CNTRLTYPE: 1, OAES: nvmeof.AENNamespace, NN: 2, SGLS: 1 | 1<<2 | 1<<20, MSDBD: fakeDescriptors}
		case nvmeof.CNSActiveList:
			nvmeof.EncodeNSIDList(page, []uint32{1, 2}, cmd.NSID())
		case nvmeof.CNSDescriptors:
			if c.noCSI {
				c.reply(cid, 0, 0, nvmeof.InvalidField|nvmeof.DNR)
				return
			}
			e = &nvmeof.NamespaceIDs{NGUID: [16]byte{byte(cmd.NSID())}, CSI: nvmeof.CSI(2 - cmd.NSID())}
		case nvmeof.CNSNamespaceCSI:
			e = &nvmeof.IdentifyKV{NSZE: 1 << 30, MaxKey: 16, MaxValue: 64 << 20}
		case nvmeof.CNSNamespace:
			e = &nvmeof.IdentifyNamespace{NSZE: uint64(len(c.disk) / fakeBlock), NCAP: 1, LBADS: 9}
		}
		if e != nil {
			e.Encode(page)
		}
		c.read(cid, page, 0, true)
	case nvmeof.OpSetFeatures:
		c.reply(cid, 2|2<<16, 0, 0) // grants 3 I/O queues
	case nvmeof.OpKeepAlive:
		c.reply(cid, 0, 0, 0)
	case nvmeof.OpAsyncEvent:
		c.mu.Lock()
		c.aer = func(dw0 uint32) { c.reply(cid, dw0, 0, 0) }
		c.mu.Unlock()
	case nvmeof.OpGetLogPage:
		log := page
		if cmd.LID() == nvmeof.LogDiscovery {
			c.mu.Lock()
			log = nvmeof.EncodeDiscovery(nil, c.genctr, c.entries)
			c.mu.Unlock()
		}
		off := int(cmd.LogOffset())
		c.read(cid, log[off:min(off+int(cmd.LogLength()), len(log))], 0, true)
	default:
		c.reply(cid, 0, 0, nvmeof.InvalidOpcode|nvmeof.DNR)
	}
}

func (c *fakeConn) kvCommand(cmd *nvmeof.Command, data []byte) {
	k, cid := cmd.Key(), cmd.CID()
	key := string(k[:cmd.KeyLen()])
	c.mu.Lock()
	v, ok := c.kv[key]
	c.mu.Unlock()
	switch cmd.Opcode() {
	case nvmeof.OpStore:
		if ok && cmd.KVOption() == nvmeof.StoreIfAbsent {
			c.reply(cid, 0, 0, nvmeof.KeyExists)
			return
		}
		v := c.write(cmd, data)
		c.mu.Lock()
		c.kv[key] = v
		c.mu.Unlock()
		c.reply(cid, 0, 0, 0)
	case nvmeof.OpRetrieve:
		if !ok {
			c.reply(cid, 0, 0, nvmeof.KeyDoesNotExist)
			return
		}
		c.read(cid, v[:min(len(v), int(cmd.KVSize()))], uint32(len(v)), false)
	case nvmeof.OpExist:
		if ok {
			c.reply(cid, 0, 0, 0)
		} else {
			c.reply(cid, 0, 0, nvmeof.KeyDoesNotExist)
		}
	case nvmeof.OpExistMany:
		if c.noExistMany {
			c.reply(cid, 0, 0, nvmeof.InvalidOpcode|nvmeof.DNR)
			return
		}
		var found uint64
		i := 0
		if err := nvmeof.DecodeKeyList(c.write(cmd, data), func(k []byte) bool {
			c.mu.Lock()
			if _, ok := c.kv[string(k)]; ok {
				found |= 1 << i
			}
			c.mu.Unlock()
			i++
			return true
		}); err != nil || i > nvmeof.MaxExistMany {
			c.t.Errorf("fake: Exist Many of %d keys: %v", i, err)
		}
		c.reply(cid, uint32(found), uint32(found>>32), 0)
	case nvmeof.OpDelete:
		c.mu.Lock()
		delete(c.kv, key)
		c.mu.Unlock()
		c.reply(cid, 0, 0, 0)
	case nvmeof.OpList:
		var keys [][]byte
		c.mu.Lock()
		for k := range c.kv {
			if k >= key {
				keys = append(keys, []byte(k))
			}
		}
		c.mu.Unlock()
		slices.SortFunc(keys, bytes.Compare)
		l := nvmeof.NewKeyList(make([]byte, 0, min(cmd.KVSize(), 256)))
		for _, k := range keys {
			if !l.Add(k) {
				break
			}
		}
		c.read(cid, l.Bytes(), 0, false)
	default:
		c.reply(cid, 0, 0, 0)
	}
}

func (c *fakeConn) blockCommand(cmd *nvmeof.Command, data []byte) {
	cid := cmd.CID()
	off := cmd.SLBA() * fakeBlock
	n := uint64(cmd.DW(12)&0xFFFF+1) * fakeBlock
	if cmd.Opcode() != nvmeof.OpDSM && off+n > uint64(len(c.disk)) {
		c.reply(cid, 0, 0, nvmeof.LBAOutOfRange|nvmeof.DNR)
		return
	}
	switch cmd.Opcode() {
	case nvmeof.OpRead:
		c.mu.Lock()
		b := bytes.Clone(c.disk[off : off+n])
		c.mu.Unlock()
		c.read(cid, b, 0, true)
		return
	case nvmeof.OpWrite:
		b := c.write(cmd, data)
		c.mu.Lock()
		copy(c.disk[off:off+n], b)
		c.mu.Unlock()
	case nvmeof.OpCompare:
		b := c.write(cmd, data)
		c.mu.Lock()
		same := bytes.Equal(c.disk[off:off+n], b)
		c.mu.Unlock()
		if !same {
			c.reply(cid, 0, 0, nvmeof.CompareFailure)
			return
		}
	case nvmeof.OpWriteZeroes:
		c.mu.Lock()
		clear(c.disk[off : off+n])
		c.mu.Unlock()
	case nvmeof.OpDSM:
		c.mu.Lock()
		for b := c.write(cmd, data); len(b) > 0; b = b[nvmeof.DSMRangeSize:] {
			var r nvmeof.DSMRange
			r.Decode(b)
			clear(c.disk[r.SLBA*fakeBlock:][:r.Blocks*fakeBlock])
		}
		c.mu.Unlock()
	}
	c.reply(cid, 0, 0, 0)
}
