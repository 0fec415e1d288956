package target

import (
	"time"

	"github.com/kvof/kvof/nvmeof"
)

// fabrics runs a fabrics command (opcode 7Fh).
func (q *Queue) fabrics(r *Request) {
	c := &r.Cmd
	switch {
	case c.FCType() == nvmeof.FCConnect:
		q.connect(r)
	case q.ctrl == nil:
		r.fail(nvmeof.CommandSequenceError)
	case q.id == 0 && c.FCType() == nvmeof.FCPropertyGet:
		q.ctrl.traffic.Store(true)
		q.ctrl.propertyGet(r)
	case q.id == 0 && c.FCType() == nvmeof.FCPropertySet:
		q.ctrl.traffic.Store(true)
		q.ctrl.propertySet(r)
	default:
		r.fail(nvmeof.InvalidOpcode)
	}
}

// connectData takes the data of a Connect that did not come in the capsule.
type connectData struct {
	b [nvmeof.ConnectDataSize]byte
	n int
}

func (s *connectData) Ahead(off, limit int) []byte {
	return s.b[s.n+off : min(len(s.b), s.n+off+limit)]
}
func (s *connectData) Filled(n int) { s.n += n }
func (s *connectData) Abort()       {}

func (q *Queue) connect(r *Request) {
	switch {
	case q.ctrl != nil:
		r.fail(nvmeof.CommandSequenceError)
	case r.Length < nvmeof.ConnectDataSize:
		r.fail(nvmeof.DataSGLLength)
	default:
		s := new(connectData)
		r.receive(nvmeof.ConnectDataSize, s, func(r *Request) {
			var d nvmeof.ConnectData
			if err := d.Decode(s.b[:]); err != nil {
				r.fail(nvmeof.DataSGLLength)
				return
			}
			if r.Cmd.ConnectQID() == 0 {
				q.connectAdmin(r, &d)
			} else {
				q.connectIO(r, &d)
			}
		})
	}
}

// invalidParam refuses a Connect and names the field: its offset in bytes in the data or in the command.
func invalidParam(r *Request, off uint16, inData bool) {
	r.queue.target.log.Warn("connect refused: invalid parameter", "offset", off, "in_data", inData, "peer", r.queue.conn.Name(),
		"qid", r.Cmd.ConnectQID(), "sqsize", r.Cmd.ConnectSQSIZE())
	r.complete(nvmeof.ConnectInvalidParam|nvmeof.DNR, nvmeof.ConnectInvalidDW0(off, inData))
}

// connectable checks what both kinds of Connect share and finds the subsystem; nil when it has refused.
func (q *Queue) connectable(r *Request, d *nvmeof.ConnectData, maxSize int) *subsystem {
	if r.Cmd.ConnectRECFMT() != 0 {
		r.complete(nvmeof.ConnectIncompatible|nvmeof.DNR, 0)
		return nil
	}
	if n := int(r.Cmd.ConnectSQSIZE()) + 1; n < 2 || n > min(maxSize, q.most) {
		invalidParam(r, nvmeof.ConnectOffSQSIZE, false)
		return nil
	}
	if len(d.HostNQN) > nvmeof.MaxNQN { // an empty one is spdk_nvme_perf
		invalidParam(r, nvmeof.ConnectOffHOSTNQN, true)
		return nil
	}
	s := q.target.subsystem(d.SubNQN)
	if s == nil || q.port.Discovery && !s.discovery {
		invalidParam(r, nvmeof.ConnectOffSUBNQN, true)
		return nil
	}
	if !s.allows(d.HostNQN) {
		q.target.log.Warn("host is not allowed", "host", d.HostNQN, "subsystem", s.NQN, "peer", q.conn.Name())
		r.fail(nvmeof.ConnectInvalidHost)
		return nil
	}
	return s
}

func (q *Queue) connectAdmin(r *Request, d *nvmeof.ConnectData) {
	s := q.connectable(r, d, q.target.limits.QueueEntries)
	if s == nil {
		return
	}
	if d.CNTLID != nvmeof.CNTLIDDynamic {
		invalidParam(r, nvmeof.ConnectOffCNTLID, true)
		return
	}
	k := &Controller{HostNQN: d.HostNQN, HostID: d.HostID, target: q.target, sub: s, since: time.Now(), admin: q,
		queues: map[uint16]*Queue{}, features: map[uint8]uint32{}}
	if !q.target.addController(k) {
		r.complete(nvmeof.ConnectBusy, 0)
		return
	}
	k.mu.Lock()
	q.attach(r, k)
	k.mu.Unlock()
	k.setKATO(time.Duration(r.Cmd.ConnectKATO()) * time.Millisecond)
	q.target.log.Debug("controller connected", "cntlid", k.ID, "host", k.HostNQN, "subsystem", s.NQN, "peer", q.conn.Name())
	r.complete(nvmeof.Success, uint32(k.ID))
}

func (q *Queue) connectIO(r *Request, d *nvmeof.ConnectData) {
	s := q.connectable(r, d, q.target.limits.QueueEntries)
	if s == nil {
		return
	}
	k := q.target.controller(d.CNTLID)
	if k == nil || k.sub != s || s.discovery {
		invalidParam(r, nvmeof.ConnectOffCNTLID, true)
		return
	}
	if k.HostNQN != d.HostNQN {
		invalidParam(r, nvmeof.ConnectOffHOSTNQN, true)
		return
	}
	if k.HostID != d.HostID {
		invalidParam(r, nvmeof.ConnectOffHOSTID, true)
		return
	}
	id := r.Cmd.ConnectQID()
	k.mu.Lock()
	switch {
	case !k.ready() || k.ended || k.queues[id] != nil:
		k.mu.Unlock()
		r.fail(nvmeof.CommandSequenceError)
		return
	case id > k.granted:
		k.mu.Unlock()
		invalidParam(r, nvmeof.ConnectOffQID, false)
		return
	}
	q.attach(r, k)
	k.queues[id] = q
	k.mu.Unlock()
	r.complete(nvmeof.Success, uint32(k.ID))
}

// attach makes the queue the controller's. The connection's other goroutines learn of it by the completion that follows.
func (q *Queue) attach(r *Request, k *Controller) {
	q.id, q.size = r.Cmd.ConnectQID(), uint32(r.Cmd.ConnectSQSIZE())+1
	q.noFC = r.Cmd.ConnectCATTR()&nvmeof.CATTRNoFlowControl != 0
	q.ctrl = k
	k.traffic.Store(true)
}

// capabilities is CAP: ready within 7.5 s, CQR, both command sets.
func (k *Controller) capabilities() nvmeof.CAP {
	return nvmeof.MakeCAP(uint16(k.target.limits.QueueEntries-1), 15, 0)
}

func (k *Controller) propertyGet(r *Request) {
	k.mu.Lock()
	cc, csts := k.cc, k.csts
	k.mu.Unlock()
	var v uint64
	size := 4
	switch r.Cmd.PropertyOffset() {
	case nvmeof.PropCAP:
		v, size = uint64(k.capabilities()), 8
	case nvmeof.PropVS:
		v = nvmeof.VersionNVMe20
	case nvmeof.PropCC:
		v = uint64(cc)
	case nvmeof.PropCSTS:
		v = uint64(csts)
	default:
		r.fail(nvmeof.InvalidField)
		return
	}
	if r.Cmd.PropertySize() != size {
		r.fail(nvmeof.InvalidField)
		return
	}
	r.completeQuad(v)
}

func (k *Controller) propertySet(r *Request) {
	if r.Cmd.PropertyOffset() != nvmeof.PropCC || r.Cmd.PropertySize() != 4 {
		r.fail(nvmeof.InvalidField)
		return
	}
	k.setCC(uint32(r.Cmd.PropertyValue()))
	r.complete(nvmeof.Success, 0)
}
