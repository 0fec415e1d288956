package rdma

import (
	"fmt"
	"syscall"
)

// Op is what a work request does (enum ibv_wr_opcode).
type Op uint8

// Operations. Payload of a Read comes into the SGEs, that of the others goes out of them.
const (
	OpWrite          Op = 0 // RDMA WRITE to WR.Remote
	OpSend           Op = 2
	OpRead           Op = 4 // RDMA READ from WR.Remote
	OpSendInvalidate Op = 9 // Send that invalidates WR.RKey at the peer
)

// Flags of a work request (enum ibv_send_flags).
const (
	FlagSignaled = 1 << 1 // makes a completion; that of a later one says that all before it are over, but for READs on soft-iWARP
	FlagInline   = 1 << 3 // its SGEs are copied at once
)

// SGE is a piece of registered memory (struct ibv_sge).
type SGE struct {
	Addr   uint64
	Length uint32 // bytes
	LKey   uint32
}

// WR is one work request. Requests of a chain begin in order.
type WR struct {
	ID     uint64 // comes back in WC.ID
	Remote uint64 // address at the peer, of Read and Write
	RKey   uint32 // its key; of SendInvalidate the key to invalidate
	Op     Op
	Flags  uint8
	NumSGE uint16
	sge    uint32 // index of the first in the batch
	_      uint32
}

// chain is a run of a batch's requests for one queue: struct kvof_chain in verbs.h.
type chain struct {
	queue  uintptr
	first  uint32
	num    uint32
	posted uint32
	errno  int32
	recv   uint8 // 0: sends, 1: receives of a queue pair, 2: of an SRQ
	_      [7]byte
}

// Kinds of chains.
const (
	chainSend = iota
	chainRecv
	chainSRQ
)

// Batch collects work requests for one call to the device. The zero value is ready; it is used again and again, and
// keeps its memory. It is not safe for use by several goroutines.
//
//	b.Send(qp)
//	b.Add(rdma.WR{...}, sge)
//	b.Add(rdma.WR{...})
//	b.Recv(srq)
//	b.Add(rdma.WR{ID: slot}, sge)
//	n := channel.Turn(&b, wc)
//	b.Reset()
type Batch struct {
	chains []chain
	wrs    []WR
	sges   []SGE
}

// Send begins a chain of sends, reads and writes for a queue pair.
func (b *Batch) Send(q QP) { b.begin(q, chainSend) }

// Recv begins a chain of receives for an SRQ or, when it has none, a queue pair. Of its requests only ID and SGEs count.
// Chains are posted in the order they began.
func (b *Batch) Recv(q Queue) {
	if _, ok := q.(QP); ok {
		b.begin(q, chainRecv)
	} else {
		b.begin(q, chainSRQ)
	}
}

func (b *Batch) begin(q Queue, kind uint8) {
	b.chains = append(b.chains, chain{queue: q.Handle(), first: uint32(len(b.wrs)), recv: kind})
}

// Add adds a request, with one SGE or none, to the chain that began last. A receive has exactly one.
func (b *Batch) Add(w WR, sge ...SGE) {
	w.sge, w.NumSGE = uint32(len(b.sges)), uint16(len(sge))
	b.sges = append(b.sges, sge...)
	b.wrs = append(b.wrs, w)
	b.chains[len(b.chains)-1].num++
}

// Empty tells whether nothing was added.
func (b *Batch) Empty() bool { return len(b.wrs) == 0 }

// Len is the number of chains.
func (b *Batch) Len() int { return len(b.chains) }

// Posted tells how many requests of chain i went to the device, valid after Turn or Post; an error says why the rest did
// not. Requests that were not posted never complete: the queue pair is to be given up.
func (b *Batch) Posted(i int) (int, error) {
	c := &b.chains[i]
	if c.errno != 0 {
		return int(c.posted), fmt.Errorf("posting a work request: %w", syscall.Errno(c.errno))
	}
	return int(c.posted), nil
}

// Reset empties the batch.
func (b *Batch) Reset() { b.chains, b.wrs, b.sges = b.chains[:0], b.wrs[:0], b.sges[:0] }

// Chains calls f for each chain: for implementations of Device. It returns how many of the requests it took, and an
// errno.
func (b *Batch) Chains(f func(queue uintptr, recv bool, wrs []WR) (int, syscall.Errno)) {
	for i := range b.chains {
		c := &b.chains[i]
		n, errno := f(c.queue, c.recv != chainSend, b.wrs[c.first:c.first+c.num])
		c.posted, c.errno = uint32(n), int32(errno)
	}
}

// SGEs returns a request's SGEs: for implementations of Device.
func (b *Batch) SGEs(w *WR) []SGE { return b.sges[w.sge : w.sge+uint32(w.NumSGE)] }

// WCStatus is how a work request ended (enum ibv_wc_status).
type WCStatus uint32

// The statuses that mean something to a user of queue pairs.
const (
	WCSuccess      WCStatus = 0
	WCLocalLength  WCStatus = 1
	WCLocalAccess  WCStatus = 4
	WCFlush        WCStatus = 5 // the queue pair had failed before
	WCRemoteInval  WCStatus = 9
	WCRemoteAccess WCStatus = 10 // a wrong key, address, or access
	WCRemoteOp     WCStatus = 11
	WCRetry        WCStatus = 12 // the peer does not answer
	WCRNRRetry     WCStatus = 13 // the peer has no receive
)

var wcStatusText = [...]string{"success", "local length error", "local QP operation error", "local EE context operation error",
	"local protection error", "work request flushed", "memory window bind error", "bad response", "local access error",
	"remote invalid request", "remote access error", "remote operation error", "transport retry counter exceeded",
	"receiver-not-ready retry counter exceeded"}

func (s WCStatus) Error() string {
	if int(s) < len(wcStatusText) {
		return wcStatusText[s]
	}
	return fmt.Sprintf("work completion status %d", uint32(s))
}

// WC is one completion, exactly struct ibv_wc. Unless Status is WCSuccess only ID, Status, VendorError and QP are valid.
type WC struct {
	ID          uint64
	Status      WCStatus
	opcode      uint32
	VendorError uint32
	Bytes       uint32 // received
	Invalidated uint32 // the key that a received SendInvalidate named, valid when WithInvalidate
	QP          uint32 // QP.Num
	_           uint32 // src_qp
	flags       uint32
	_           [6]byte
	_           [2]byte
}

const (
	wcRecv    = 1 << 7 // of opcode
	wcWithInv = 1 << 3 // of flags
)

// WithInvalidate tells whether a receive completed by SendInvalidate.
func (w *WC) WithInvalidate() bool { return w.flags&wcWithInv != 0 }

// MakeRecv makes the completion of a receive: for implementations of Channel. inv is the key invalidated, 0 for none.
func MakeRecv(id uint64, st WCStatus, qp, n, inv uint32) WC {
	w := WC{ID: id, Status: st, opcode: wcRecv, QP: qp, Bytes: n}
	if inv != 0 {
		w.Invalidated, w.flags = inv, wcWithInv
	}
	return w
}

// MakeSent makes the completion of any other request: for implementations of Channel.
func MakeSent(id uint64, st WCStatus, qp uint32) WC { return WC{ID: id, Status: st, QP: qp} }
