package target

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kvof/kvof/nvmeof"
)

const (
	// maxAERs is how many Asynchronous Event Requests a controller holds (AERL + 1).
	maxAERs = 4
	// discoveryKATO ends a discovery controller whose host asked for no keep alive and went silent.
	discoveryKATO = 2 * time.Minute
	// errorEntries is how many errors a controller remembers for log page 01h.
	errorEntries = 64
)

// Controller is one host's association with a subsystem: an admin queue and its I/O queues.
type Controller struct {
	ID      uint16
	HostNQN string
	HostID  [16]byte

	target  *Target
	sub     *subsystem
	since   time.Time
	traffic atomic.Bool   // a command came since the keep alive timer last looked (TBKAS)
	enabled atomic.Uint32 // CSTS.RDY: read for each command

	mu       sync.Mutex
	cc, csts uint32
	kato     time.Duration
	timer    *time.Timer
	admin    *Queue
	queues   map[uint16]*Queue // I/O queues
	granted  uint16            // I/O queues
	ended    bool
	aers     []*Request
	events   []uint32 // waiting for an AER
	masked   map[uint32]bool
	aec      uint32 // feature 0Bh
	changed  []uint32
	features map[uint8]uint32
	behavior [512]byte // feature 16h
	errors   []nvmeof.ErrorEntry
	errCount uint64
}

// ready tells whether the controller takes commands other than fabrics ones.
func (k *Controller) ready() bool { return k.enabled.Load()&nvmeof.CSTSReady != 0 }

// all returns the queues, the admin queue last. The caller holds mu.
func (k *Controller) all() (qs []*Queue) {
	for _, q := range k.queues {
		qs = append(qs, q)
	}
	if k.admin != nil {
		qs = append(qs, k.admin)
	}
	return qs
}

// busy tells whether commands other than held AERs are in flight.
func (k *Controller) busy() bool {
	k.mu.Lock()
	qs, held := k.all(), len(k.aers)
	k.mu.Unlock()
	n := 0
	for _, q := range qs {
		n += q.busy()
	}
	return n > held
}

// end closes all connections of the controller; it goes away as they do.
func (k *Controller) end(reason string) {
	k.mu.Lock()
	if k.ended {
		k.mu.Unlock()
		return
	}
	k.ended = true
	qs := k.all()
	k.mu.Unlock()
	for _, q := range qs {
		q.conn.Close(reason)
	}
}

// detach is told first that a queue's connection has ended: it lets go of what the queue's requests wait for.
func (k *Controller) detach(q *Queue) {
	if q.id != 0 {
		return
	}
	k.mu.Lock()
	aers := k.aers
	k.aers = nil
	if k.timer != nil {
		k.timer.Stop()
		k.timer = nil
	}
	k.mu.Unlock()
	k.end("the admin queue's connection ended")
	for _, r := range aers {
		r.complete(nvmeof.AbortSQDeleted, 0)
	}
}

// gone is told last, when no command of the queue is left.
func (k *Controller) gone(q *Queue) {
	k.mu.Lock()
	if q.id == 0 {
		k.admin = nil
	} else if k.queues[q.id] == q {
		delete(k.queues, q.id)
	}
	last := k.admin == nil && len(k.queues) == 0
	k.mu.Unlock()
	if last {
		k.target.removeController(k)
		k.target.log.Debug("controller ended", "cntlid", k.ID, "host", k.HostNQN, "subsystem", k.sub.NQN)
	}
}

// setKATO starts the keep alive timer anew; 0 stops it. With traffic based keep alive the controller ends after one
// to two periods without any command (Base, Keep Alive).
func (k *Controller) setKATO(d time.Duration) {
	if d == 0 && k.sub.discovery {
		d = discoveryKATO
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.kato = d
	if k.timer != nil {
		k.timer.Stop()
		k.timer = nil
	}
	if d == 0 || k.ended {
		return
	}
	var t *time.Timer
	t = time.AfterFunc(d, func() {
		if !k.traffic.Swap(false) {
			k.target.log.Warn("keep alive timer expired", "cntlid", k.ID, "host", k.HostNQN, "kato", d)
			k.end("the keep alive timer expired")
			return
		}
		k.mu.Lock()
		if k.timer == t && !k.ended {
			t.Reset(d)
		}
		k.mu.Unlock()
	})
	k.timer = t
}

// setCC carries out a write to Controller Configuration.
func (k *Controller) setCC(cc uint32) {
	k.mu.Lock()
	old := k.cc
	k.cc = cc
	var closing []*Queue
	var aers []*Request
	switch {
	case nvmeof.CCEN(cc) && !nvmeof.CCEN(old):
		css := nvmeof.CCCSS(cc)
		if css != 0 && css != 6 || cc>>7&0xF != 0 || cc>>11&7 != 0 { // CSS, MPS, AMS
			k.csts = nvmeof.CSTSFatal
		} else {
			k.csts = nvmeof.CSTSReady
		}
	case !nvmeof.CCEN(cc) && nvmeof.CCEN(old):
		// A controller reset deletes the I/O queues, ends all commands and forgets what was set.
		k.csts = 0
		for _, q := range k.queues {
			closing = append(closing, q)
		}
		aers, k.aers = k.aers, nil
		k.aec, k.changed, k.events, k.masked, k.granted, k.behavior = 0, nil, nil, nil, 0, [512]byte{}
		clear(k.features)
	}
	if nvmeof.CCSHN(cc) != 0 && nvmeof.CCSHN(old) == 0 {
		k.csts = k.csts&^nvmeof.CSTSSHSTMask | nvmeof.CSTSSHSTDone
	}
	k.enabled.Store(k.csts)
	k.mu.Unlock()
	for _, q := range closing {
		q.conn.Close("controller reset")
	}
	for _, r := range aers {
		r.complete(nvmeof.AbortSQDeleted, 0)
	}
}

// holdAER keeps an Asynchronous Event Request until there is an event.
func (k *Controller) holdAER(r *Request) {
	k.mu.Lock()
	switch {
	case len(k.aers) >= maxAERs:
		k.mu.Unlock()
		r.complete(nvmeof.AsyncEventLimitExceeded, 0)
	case len(k.events) > 0:
		e := k.events[0]
		k.events = k.events[1:]
		k.mu.Unlock()
		r.complete(nvmeof.Success, e)
	case k.ended:
		k.mu.Unlock()
		r.complete(nvmeof.AbortRequested, 0)
	default:
		r.Async = true
		k.aers = append(k.aers, r)
		k.mu.Unlock()
	}
}

// event sends an event that the host has asked for, once until it reads the event's log page.
func (k *Controller) event(e uint32) {
	want := map[uint32]uint32{nvmeof.EventNamespaceChanged: nvmeof.AENNamespace, nvmeof.EventDiscoveryChanged: nvmeof.AENDiscovery}[e]
	k.mu.Lock()
	if k.aec&want == 0 || k.masked[e] {
		k.mu.Unlock()
		return
	}
	if k.masked == nil {
		k.masked = map[uint32]bool{}
	}
	k.masked[e] = true
	if len(k.aers) == 0 {
		k.events = append(k.events, e)
		k.mu.Unlock()
		return
	}
	r := k.aers[0]
	k.aers = k.aers[1:]
	k.mu.Unlock()
	r.complete(nvmeof.Success, e)
}

// unmask allows an event again: the host has read its log page.
func (k *Controller) unmask(e uint32) {
	k.mu.Lock()
	delete(k.masked, e)
	k.mu.Unlock()
}

// namespacesChanged adds to the Changed Namespace List and tells the host.
func (k *Controller) namespacesChanged(ids []uint32) {
	if len(ids) == 0 {
		return
	}
	k.mu.Lock()
	k.changed = append(k.changed, ids...)
	slices.Sort(k.changed)
	k.changed = slices.Compact(k.changed)
	k.mu.Unlock()
	k.event(nvmeof.EventNamespaceChanged)
}

// logError remembers an error for log page 01h. A key that is absent or present is an answer, not an error.
func (k *Controller) logError(e nvmeof.ErrorEntry) {
	if c := e.Status.Code(); c == nvmeof.KeyDoesNotExist || c == nvmeof.KeyExists {
		return
	}
	k.mu.Lock()
	k.errCount++
	e.Count = k.errCount
	k.errors = append(k.errors, e)
	if len(k.errors) > errorEntries {
		k.errors = k.errors[1:]
	}
	k.mu.Unlock()
}

// ioCommand starts a command that came on an I/O queue.
func (k *Controller) ioCommand(r *Request) {
	if k.sub.discovery {
		r.fail(nvmeof.InvalidOpcode)
		return
	}
	id := r.Cmd.NSID()
	if id == nvmeof.BroadcastNSID && r.Cmd.Opcode() == nvmeof.OpFlush {
		r.spawn(k.flushAll)
		return
	}
	n := k.sub.acquire(id)
	if n == nil {
		r.fail(nvmeof.InvalidNamespace)
		return
	}
	r.ns = n
	n.execute(r)
}

func (k *Controller) flushAll(r *Request) {
	st := nvmeof.Success
	for _, n := range k.sub.list() {
		if n = k.sub.acquire(n.NSID); n == nil {
			continue
		}
		if s := statusOf(n.flush()); s != nvmeof.Success {
			st = s
		}
		n.users.Done()
	}
	r.complete(st, 0)
}
