package target

import (
	"maps"
	"slices"
	"time"

	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/uring"
)

// What Identify Controller says of every controller.
const (
	model    = "kvof context memory store"
	revision = "1.0"
)

// InCapsule is the most data, in bytes, that a host may send in a command capsule over NVMe/TCP: IOCCSZ less the command,
// and what admin queues are granted.
const InCapsule = 8 << 10

// adminEffects are the admin commands for log page 05h.
var adminEffects = map[uint8]uint32{
	nvmeof.OpGetLogPage: nvmeof.EffectSupported, nvmeof.OpIdentify: nvmeof.EffectSupported, nvmeof.OpAbort: nvmeof.EffectSupported,
	nvmeof.OpSetFeatures: nvmeof.EffectSupported, nvmeof.OpGetFeatures: nvmeof.EffectSupported,
	nvmeof.OpAsyncEvent: nvmeof.EffectSupported, nvmeof.OpKeepAlive: nvmeof.EffectSupported,
}

// adminCommand runs an admin command. None of them waits for anything but the host's own data.
func (k *Controller) adminCommand(r *Request) {
	switch r.Cmd.Opcode() {
	case nvmeof.OpIdentify:
		k.identify(r)
	case nvmeof.OpGetLogPage:
		k.getLogPage(r)
	case nvmeof.OpSetFeatures:
		k.setFeatures(r)
	case nvmeof.OpGetFeatures:
		k.getFeatures(r)
	case nvmeof.OpAsyncEvent:
		k.holdAER(r)
	case nvmeof.OpKeepAlive:
		r.complete(nvmeof.Success, 0)
	case nvmeof.OpAbort:
		r.complete(nvmeof.Success, 1) // the command was not aborted: it will complete by itself
	default:
		r.fail(nvmeof.InvalidOpcode)
	}
}

// reply sends as much of an admin command's data as the host has room for, and completes the command.
func (r *Request) reply(b []byte, dw0 uint32) {
	if b = b[:min(len(b), int(r.Length))]; len(b) > 0 {
		r.send(uring.View(b), true)
	}
	r.complete(nvmeof.Success, dw0)
}

func (k *Controller) identify(r *Request) {
	c := &r.Cmd
	if r.Length < nvmeof.IdentifySize {
		r.fail(nvmeof.DataSGLLength)
		return
	}
	b := make([]byte, nvmeof.IdentifySize)
	st := k.identifyData(b, r.queue.port, c.CNS(), c.NSID(), c.IdentifyCSI(), c.IdentifyCNTID())
	if st != nvmeof.Success {
		r.fail(st)
		return
	}
	r.reply(b, 0)
}

// identifyData fills b, 4096 zero bytes, with the structure asked for.
func (k *Controller) identifyData(b []byte, p *Port, cns uint8, nsid uint32, csi nvmeof.CSI, cntid uint16) nvmeof.Status {
	switch cns {
	case nvmeof.CNSController:
		k.identifyController(p).Encode(b)
		return nvmeof.Success
	case nvmeof.CNSControllerCSI:
		switch csi {
		case nvmeof.CSINVM: // no limits beyond MDTS: all zeroes
		case nvmeof.CSIKV:
			nvmeof.EncodeKVController(b)
		default:
			return nvmeof.InvalidField
		}
		return nvmeof.Success
	case nvmeof.CNSControllerList, nvmeof.CNSNamespaceCtrlList:
		if cns == nvmeof.CNSNamespaceCtrlList && k.namespace(nsid) == nil {
			return nvmeof.InvalidNamespace
		}
		var ids []uint16
		for _, o := range k.target.controllers() {
			if o.sub == k.sub {
				ids = append(ids, o.ID)
			}
		}
		nvmeof.EncodeControllerList(b, ids, cntid)
		return nvmeof.Success
	case nvmeof.CNSCommandSets:
		b[0] = 1<<nvmeof.CSINVM | 1<<nvmeof.CSIKV
		return nvmeof.Success
	case nvmeof.CNSActiveList, nvmeof.CNSActiveListCSI, nvmeof.CNSAllocatedList:
		if nsid >= nvmeof.BroadcastNSID-1 {
			return nvmeof.InvalidNamespace
		}
		var ids []uint32
		for _, n := range k.namespaces() {
			if cns != nvmeof.CNSActiveListCSI || n.csi == csi {
				ids = append(ids, n.NSID)
			}
		}
		nvmeof.EncodeNSIDList(b, ids, nsid)
		return nvmeof.Success
	}

	switch cns { // the rest is about one namespace
	case nvmeof.CNSNamespace, nvmeof.CNSAllocatedNamespace, nvmeof.CNSDescriptors, nvmeof.CNSNamespaceCSI, nvmeof.CNSNamespaceCommon:
	default:
		return nvmeof.InvalidField
	}
	n := k.namespace(nsid)
	if n == nil {
		if nsid == 0 || nsid >= nvmeof.BroadcastNSID || k.sub.discovery || cns == nvmeof.CNSDescriptors {
			return nvmeof.InvalidNamespace
		}
		return nvmeof.Success // an inactive namespace: all zeroes
	}
	switch cns {
	case nvmeof.CNSDescriptors:
		d := nvmeof.NamespaceIDs{NGUID: n.NGUID, UUID: n.UUID, CSI: n.csi}
		d.Encode(b)
	case nvmeof.CNSNamespaceCommon:
		d := nvmeof.IdentifyCommon{NMIC: 1, NSATTR: n.nsattr(), NSTAT: 1}
		d.Encode(b)
	case nvmeof.CNSNamespaceCSI:
		switch {
		case csi != n.csi:
			return nvmeof.InvalidField
		case csi == nvmeof.CSIKV:
			st := n.store.Stats()
			d := nvmeof.IdentifyKV{NSZE: uint64(st.Capacity), NUSE: uint64(st.Used), NMIC: 1, NOVG: 4096, NSATTR: n.nsattr(), NGUID: n.NGUID,
				MaxKey: nvmeof.MaxKeyLen, MaxValue: uint32(n.store.MaxValue()), MaxKeys: n.MaxKeys}
			d.Encode(b)
		}
	default:
		d := nvmeof.IdentifyNamespace{NSZE: n.blocks, NCAP: n.blocks, NUSE: n.usage() >> n.lbads, NMIC: 1, NSATTR: n.nsattr(), NGUID: n.NGUID, LBADS: n.lbads}
		if n.drive != nil {
			d.NSFEAT, d.DLFEAT, d.Limits = n.drive.Namespace.NSFEAT&driveFeatures, n.drive.Namespace.DLFEAT&0xF, n.driveLimits()
		} else if n.zeroAfterDiscard() {
			d.DLFEAT = 1 | 1<<3 // and Write Zeroes takes the DEAC bit
		}
		d.Encode(b)
	}
	return nvmeof.Success
}

// driveFeatures are the NSFEAT bits that stay true of a namespace on a drive.
const driveFeatures = nvmeof.NSFEATAtomic | nvmeof.NSFEATOptimal | nvmeof.NSFEATOptimal<<1

// driveLimits is what the drive asks of I/O. Writes are atomic only as far as they reach it in one piece.
func (n *namespace) driveLimits() nvmeof.NamespaceLimits {
	l := n.drive.Namespace.Limits
	piece := uint16(min(uring.LargeBuf, n.drive.Scattered)>>n.lbads - 1)
	l.NAWUN, l.NAWUPF, l.NACWU = min(l.NAWUN, piece), min(l.NAWUPF, piece), 0
	if !n.forwards(nvmeof.ONCSCopy) {
		l.MSSRL, l.MCL, l.MSRC = 0, 0, 0
	}
	return l
}

// copies tells whether a namespace of the subsystem takes Copy.
func (s *subsystem) copies() bool {
	return slices.ContainsFunc(s.list(), func(n *namespace) bool { return n.forwards(nvmeof.ONCSCopy) })
}

// namespaces returns the namespaces the host sees: only NVM ones when it enabled the NVM command set alone.
func (k *Controller) namespaces() (ns []*namespace) {
	k.mu.Lock()
	nvmOnly := nvmeof.CCCSS(k.cc) == 0
	k.mu.Unlock()
	for _, n := range k.sub.list() {
		if !nvmOnly || n.csi == nvmeof.CSINVM {
			ns = append(ns, n)
		}
	}
	return ns
}

func (k *Controller) namespace(nsid uint32) *namespace {
	for _, n := range k.namespaces() {
		if n.NSID == nsid {
			return n
		}
	}
	return nil
}

func (k *Controller) identifyController(p *Port) *nvmeof.IdentifyController {
	d := &nvmeof.IdentifyController{
		Serial: k.sub.serial(), Model: model, Firmware: revision, CNTLID: k.ID, VER: nvmeof.VersionNVMe20,
		CTRATT: nvmeof.CTRATT128BitHostID | nvmeof.CTRATTTBKAS, CNTRLTYPE: nvmeof.ControllerIO, AERL: maxAERs - 1, ACL: 3,
		ELPE: errorEntries - 1, KAS: 10, MAXCMD: uint16(min(k.target.limits.QueueEntries, 0xFFFF)), SUBNQN: k.sub.NQN,
		SGLS: 1 | 1<<20, IORCSZ: nvmeof.CompletionSize / 16, IOCCSZ: uint32(nvmeof.CommandSize+p.InCapsule) / 16, MSDBD: p.MSDBD,
		LPA: 1<<1 | 1<<2, CMIC: 1 | 1<<1,
	}
	if p.TRType == nvmeof.TRTypeRDMA {
		d.SGLS |= 1 << 2 // keyed descriptors
	} else {
		d.SGLS |= 1 << 21 // transport data blocks
	}
	if k.sub.discovery {
		d.CNTRLTYPE, d.OAES, d.LPA = nvmeof.ControllerDiscovery, nvmeof.AENDiscovery, 1<<2
		d.IOCCSZ, d.IORCSZ, d.CMIC = 0, 0, 0
		return d
	}
	d.OAES = nvmeof.AENNamespace
	d.ONCS = nvmeof.ONCSCompare | nvmeof.ONCSDSM | nvmeof.ONCSWriteZeroes | nvmeof.ONCSVerify
	if k.sub.copies() {
		d.ONCS |= nvmeof.ONCSCopy
		d.OCFS = 1 // descriptor format 0
	}
	d.VWC = 1 | 3<<1
	for _, n := range k.sub.list() {
		d.NN = max(d.NN, n.NSID)
	}
	d.NN = max(d.NN, 1)
	d.MNAN = d.NN
	return d
}

// maxLog bounds one Get Log Page reply, in bytes; the longest log is the discovery log.
const maxLog = 1 << 20

func (k *Controller) getLogPage(r *Request) {
	c := &r.Cmd
	want, off := c.LogLength(), c.LogOffset()
	if want > uint64(r.Length) {
		r.fail(nvmeof.DataSGLLength)
		return
	}
	page := k.logPage(r)
	if page == nil {
		r.fail(nvmeof.InvalidLogPage)
		return
	}
	if off%4 != 0 || off > uint64(len(page)) {
		r.fail(nvmeof.InvalidField)
		return
	}
	page = page[off:]
	if short := min(want, maxLog); uint64(len(page)) < short { // past the end of a log are zeroes
		page = append(page, make([]byte, short-uint64(len(page)))...)
	}
	r.reply(page[:min(uint64(len(page)), want)], 0)
}

// logPage builds the whole page, nil if there is none with that identifier.
func (k *Controller) logPage(r *Request) []byte {
	c := &r.Cmd
	switch lid := c.LID(); {
	case lid == nvmeof.LogError:
		k.mu.Lock()
		defer k.mu.Unlock()
		b := make([]byte, errorEntries*nvmeof.ErrorEntrySize)
		for i := range k.errors { // newest first
			k.errors[len(k.errors)-1-i].Encode(b[i*nvmeof.ErrorEntrySize:])
		}
		return b
	case lid == nvmeof.LogDiscovery && k.sub.discovery:
		if !c.RAE() {
			k.unmask(nvmeof.EventDiscoveryChanged)
		}
		q := r.queue
		return k.target.discoveryLog(k.HostNQN, q.local.Addr(), q.port)
	case k.sub.discovery:
		return nil
	case lid == nvmeof.LogSMART:
		b := make([]byte, nvmeof.SMARTSize)
		k.smart().Encode(b)
		return b
	case lid == nvmeof.LogFirmware:
		b := make([]byte, nvmeof.FirmwareSize)
		nvmeof.EncodeFirmware(b, revision)
		return b
	case lid == nvmeof.LogVendor:
		return vendorLog()
	case lid == nvmeof.LogChangedNamespaces:
		b := make([]byte, nvmeof.ChangedNamespacesSize)
		k.mu.Lock()
		if len(k.changed) > nvmeof.ChangedNamespacesSize/4 {
			nvmeof.EncodeNSIDList(b, []uint32{nvmeof.BroadcastNSID}, 0)
		} else {
			nvmeof.EncodeNSIDList(b, k.changed, 0)
		}
		if !c.RAE() { // together, or a change in between would make no event
			k.changed = nil
			delete(k.masked, nvmeof.EventNamespaceChanged)
		}
		k.mu.Unlock()
		return b
	case lid == nvmeof.LogEffects:
		e := nvmeof.Effects{Admin: adminEffects, IO: blockEffects}
		if c.LogCSI() == nvmeof.CSIKV {
			e.IO = kvEffects
		} else if c.LogCSI() != nvmeof.CSINVM {
			return nil
		} else if !k.sub.copies() {
			e.IO = maps.Clone(e.IO)
			delete(e.IO, nvmeof.OpCopy)
		}
		b := make([]byte, nvmeof.EffectsSize)
		e.Encode(b)
		return b
	}
	return nil
}

// smart sums the subsystem's commands and bytes since the target started.
func (k *Controller) smart() *nvmeof.SMART {
	s := &nvmeof.SMART{TemperatureK: 273 + 30, Spare: 100, SpareThreshold: 10, PowerOnHours: uint64(time.Since(k.target.started).Hours())}
	for _, n := range k.sub.list() {
		in, out := n.stats.bytesIn.Load(), n.stats.bytesOut.Load()
		s.UnitsWritten += (in + 511999) / 512000
		s.UnitsRead += (out + 511999) / 512000
		s.Writes += n.stats.count(nvmeof.OpWrite)
		s.Reads += n.stats.count(nvmeof.OpRead) + n.stats.count(nvmeof.OpRetrieveRange)
		s.MediaErrors += n.stats.mediaErrors.Load()
	}
	k.mu.Lock()
	s.ErrorLogEntries = k.errCount
	k.mu.Unlock()
	return s
}

// simpleFeatures are those whose value is only kept, with the bits that a host may set.
var simpleFeatures = map[uint8]uint32{
	nvmeof.FeatArbitration: 0xFFFFFF07, nvmeof.FeatTemperature: 0x003FFFFF, nvmeof.FeatErrorRecovery: 0x0001FFFF, nvmeof.FeatSoftwareMarker: 0xFF,
}

func (k *Controller) setFeatures(r *Request) {
	c := &r.Cmd
	v, fid := c.DW(11), c.FID()
	if c.FeatureSave() {
		r.fail(nvmeof.FeatureNotSaveable)
		return
	}
	mask, simple := simpleFeatures[fid]
	switch {
	case simple:
		k.mu.Lock()
		k.features[fid] = v & mask
		k.mu.Unlock()
	case fid == nvmeof.FeatPower && v&0x1F == 0, fid == nvmeof.FeatCommandSet && v&0x1FF == 0, fid == nvmeof.FeatWriteCache && v&1 == 1:
	case fid == nvmeof.FeatPower, fid == nvmeof.FeatWriteCache:
		r.fail(nvmeof.InvalidField)
		return
	case fid == nvmeof.FeatCommandSet:
		r.fail(nvmeof.CommandSetRejected)
		return
	case fid == nvmeof.FeatQueues && !k.sub.discovery:
		k.setQueues(r, v)
		return
	case fid == nvmeof.FeatAsyncEvent:
		k.mu.Lock()
		k.aec = v
		k.mu.Unlock()
	case fid == nvmeof.FeatKATO:
		k.setKATO(time.Duration(v) * time.Millisecond)
	case fid == nvmeof.FeatHostBehavior:
		if r.Length < uint32(len(k.behavior)) {
			r.fail(nvmeof.DataSGLLength)
			return
		}
		s := new(ranges)
		r.receive(uint32(len(k.behavior)), s, func(r *Request) {
			k.mu.Lock()
			copy(k.behavior[:], s.b[:])
			k.mu.Unlock()
			r.complete(nvmeof.Success, 0)
		})
		return
	case fid == nvmeof.FeatHostID: // on fabrics Connect has set it
		r.fail(nvmeof.CommandSequenceError)
		return
	case fid == nvmeof.FeatKV:
		n := k.namespace(c.NSID())
		if n == nil || n.csi != nvmeof.CSIKV {
			r.fail(nvmeof.InvalidNamespace)
			return
		}
		n.ednek.Store(v&1 != 0)
	default:
		r.fail(nvmeof.InvalidField)
		return
	}
	r.complete(nvmeof.Success, 0)
}

// setQueues grants I/O queues: as many as asked for, up to the limit, in both directions alike.
func (k *Controller) setQueues(r *Request, v uint32) {
	sq, cq := v&0xFFFF, v>>16
	if sq == 0xFFFF || cq == 0xFFFF {
		r.fail(nvmeof.InvalidField)
		return
	}
	k.mu.Lock()
	if len(k.queues) > 0 {
		k.mu.Unlock()
		r.fail(nvmeof.CommandSequenceError)
		return
	}
	k.granted = uint16(min(sq+1, cq+1, uint32(k.target.limits.IOQueues)))
	n := uint32(k.granted - 1)
	k.mu.Unlock()
	r.complete(nvmeof.Success, n|n<<16)
}

func (k *Controller) getFeatures(r *Request) {
	c := &r.Cmd
	fid, sel := c.FID(), c.FeatureSelect()
	_, simple := simpleFeatures[fid]
	var v uint32
	var data []byte
	k.mu.Lock()
	features, kato, granted, aec := k.features[fid], k.kato, k.granted, k.aec
	k.mu.Unlock()
	current := sel == 0
	switch {
	case simple:
		if current {
			v = features
		}
	case fid == nvmeof.FeatPower, fid == nvmeof.FeatCommandSet:
	case fid == nvmeof.FeatWriteCache:
		v = 1
	case fid == nvmeof.FeatQueues && !k.sub.discovery:
		n := uint32(max(granted, 1) - 1)
		if granted == 0 || !current {
			n = uint32(k.target.limits.IOQueues - 1)
		}
		v = n | n<<16
	case fid == nvmeof.FeatAsyncEvent:
		if current {
			v = aec
		}
	case fid == nvmeof.FeatKATO:
		if current {
			v = uint32(kato / time.Millisecond)
		}
	case fid == nvmeof.FeatHostBehavior:
		k.mu.Lock()
		data = append(data, k.behavior[:]...)
		k.mu.Unlock()
	case fid == nvmeof.FeatHostID:
		data = append(data, k.HostID[:]...)
		v = 1 // EXHID: 128 bits
	case fid == nvmeof.FeatKV:
		n := k.namespace(c.NSID())
		if n == nil || n.csi != nvmeof.CSIKV {
			r.fail(nvmeof.InvalidNamespace)
			return
		}
		if on := n.EDNEK; current && n.ednek.Load() || !current && on {
			v = 1
		}
	case fid == nvmeof.FeatNSWriteProtect:
		n := k.namespace(c.NSID())
		if n == nil {
			r.fail(nvmeof.InvalidNamespace)
			return
		}
		v = uint32(n.nsattr())
	default:
		r.fail(nvmeof.InvalidField)
		return
	}
	if sel == nvmeof.FeatSelectSupported { // bit 2: changeable, bit 1: per namespace
		v, data = 0, nil
		switch {
		case simple, fid == nvmeof.FeatQueues, fid == nvmeof.FeatAsyncEvent, fid == nvmeof.FeatKATO, fid == nvmeof.FeatHostBehavior:
			v = 1 << 2
		case fid == nvmeof.FeatKV:
			v = 1<<2 | 1<<1
		}
		r.complete(nvmeof.Success, v)
		return
	}
	if data != nil && r.Length < uint32(len(data)) {
		r.fail(nvmeof.DataSGLLength)
		return
	}
	r.reply(data, v)
}
