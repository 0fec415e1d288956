// Package rdma is verbs and connection management: rdma-core's libibverbs and librdmacm behind a few Go interfaces, the
// same for both ends of a connection.
//
// [System] is the machine's own RDMA. Its libraries are opened when it is first asked for, not when the program starts;
// without the build tag rdma (and cgo) it only says that it is not there. Package rdmatest has verbs in memory, which need
// no hardware.
//
// What happens per I/O goes through a [Batch] and [Channel.Turn]: one call posts receives and chains of work requests to
// any number of queues and polls for completions. Nothing there allocates. Everything else happens once per connection
// and may block for a moment.
package rdma

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
)

// Errors to test for with errors.Is.
var (
	ErrUnavailable = errors.New("RDMA is not available") // the error found says what is missing
	ErrClosed      = errors.New("closed")
	ErrRemoved     = errors.New("the RDMA device was removed")
	ErrUnreachable = errors.New("the peer cannot be reached over RDMA")
	ErrNoDMABuf    = errors.New("the RDMA device, its driver or rdma-core takes no dma-buf of this kind")
)

// Verbs is a way to RDMA: System, or a soft one in tests. Its methods may be called from any goroutine.
type Verbs interface {
	// Devices returns the devices there are now.
	Devices() ([]Device, error)
	// Listen accepts connections at an address; an unspecified IP is every device's, port 0 any free port. backlog is how
	// many requests wait for Accept before the system refuses more. Before the first can come, ready is called with the
	// device that has the address, nil when that is unspecified; its error is returned.
	Listen(addr netip.AddrPort, backlog int, ready func(Device) error) (Listener, error)
	// Resolve finds the device and the route to a peer: the first step of connecting. The caller owns the ID, creates its
	// queue pair, and calls Connect. local may be the zero Addr.
	Resolve(ctx context.Context, local netip.Addr, peer netip.AddrPort) (ID, error)
}

// Listener is a port that peers connect to.
type Listener interface {
	// Accept waits for the next connection request. The caller owns the ID: it creates its queue pair and calls ID.Accept, or
	// calls ID.Reject, and Close in the end. It fails with ErrClosed after Close, and with ErrRemoved when the device
	// that has the listener's address is gone.
	Accept() (ID, error)
	// Addr is the address the listener is bound to.
	Addr() netip.AddrPort
	Close() error
}

// ConnParam is what one end of a connection tells the other when it connects or accepts (struct rdma_conn_param).
type ConnParam struct {
	Private []byte // private data. Received, it may be longer than what the peer sent, zero padded
	// Reads are the RDMA READs under way at one time. In what is received they are the receiver's: already exchanged by
	// the system, at most what the peer offered.
	InitiatorDepth     uint8 // that this end may start
	ResponderResources uint8 // that this end answers
}

// ID is one connection, or an attempt at one, with its queue pair (struct rdma_cm_id).
type ID interface {
	Device() Device
	Local() netip.AddrPort
	Remote() netip.AddrPort
	// CreateQP gives the connection its queue pair, once, before Accept or Connect.
	CreateQP(attr QPAttr) (QP, error)
	// Request is what the peer asked for. Only IDs from a Listener have one.
	Request() ConnParam
	// Accept answers the request. It does not wait: Ended tells if the connection did not come about.
	Accept(p ConnParam) error
	// Reject refuses the request; private tells the peer why.
	Reject(private []byte) error
	// Connect asks the peer for the connection and returns what it answered. It fails with a *RejectedError when the peer
	// refused, with ErrUnreachable when it does not answer.
	Connect(ctx context.Context, p ConnParam) (ConnParam, error)
	// Disconnect ends the connection: what is posted completes with a flush error. It does not wait.
	Disconnect()
	// Ended is closed when the connection has ended or will not come about; Err then says why.
	Ended() <-chan struct{}
	Err() error
	// Close destroys the queue pair, which must have nothing under way that is still needed, and the ID.
	Close() error
}

// RejectedError is the peer's refusal of a connection.
type RejectedError struct {
	Reason  int    // the transport's: 28 (consumer defined) on InfiniBand and RoCE when the peer's program refused
	Private []byte // what the peer's program says of it, zero padded
}

func (e *RejectedError) Error() string {
	return fmt.Sprintf("the peer refused the RDMA connection (reason %d)", e.Reason)
}

// Caps are a device's capabilities (struct ibv_device_attr and ibv_port_attr): nothing else may be assumed.
type Caps struct {
	IWARP             bool   // iWARP: RDMA READ writes through a key with remote write access, into one SGE
	SendInvalidate    bool   // OpSendInvalidate
	MaxQP             int    // queue pairs
	MaxQPWR           int    // work requests of one send or receive queue
	MaxSGE            int    // SGEs of one work request
	MaxSGERead        int    // SGEs of one RDMA READ
	MaxCQE            int    // completions of one completion queue
	MaxMRSize         uint64 // bytes of one registration; Register splits what is larger
	MaxMessage        uint64 // bytes of one work request
	MaxInitiator      int    // RDMA READs that one queue pair may have under way
	MaxResponder      int    // RDMA READs that one queue pair answers at a time
	MaxSRQ            int    // shared receive queues; 0: there are none
	MaxSRQWR          int    // receives of one
	MaxSRQSGE         int    // SGEs of one of those
	FirmwareVersion   string // for people
	ActiveMTU         int    // bytes; of port 1
	LinkLayer         string // "Ethernet" or "InfiniBand"
	ProviderTransport string // "RoCE", "iWARP" or "InfiniBand"
}

// Access is what a registration lets peers do with memory (enum ibv_access_flags). The device itself may always read and write it.
type Access uint8

// Registrations for the two ends.
const (
	// Local is memory that only this end's work requests name. On iWARP it can be the sink of an RDMA READ too.
	Local Access = 0
	// RemoteRead and RemoteWrite let the peer of any queue pair of the device read or write what it has the key of.
	RemoteRead  Access = 1 << 0
	RemoteWrite Access = 1 << 1
)

// DMABuf is memory of another device, such as a GPU, that its driver shares: the bytes of a dma-buf from an offset on.
type DMABuf struct {
	FD     int
	Offset uint64 // bytes
}

// Device is an RDMA device with one protection domain. All queues of one connection, and the memory they name, belong
// to the same device.
type Device interface {
	Name() string
	Caps() *Caps
	// Port is the state of the device's port now, such as "active" or "down"; "gone" when the device is.
	Port() string
	// Register makes memory, off the Go heap, known to the device and pins it, until the Region is closed. It takes
	// seconds per GiB the first time the memory is touched.
	Register(mem []byte, access Access) (*Region, error)
	// RegisterDMABuf is Register for memory of a dma-buf (ibv_reg_dmabuf_mr). Of mem only the address and the length count: it is how
	// work requests name the memory, and need not be mapped. The address and buf.Offset have the same offset into a page. It fails with
	// ErrNoDMABuf where that is not to be had. The caller owns buf.FD, and may close it afterwards.
	RegisterDMABuf(mem []byte, buf DMABuf, access Access) (*Region, error)
	// NewChannel makes a completion channel.
	NewChannel() (Channel, error)
	// NewSRQ makes a shared receive queue for depth receives of one SGE.
	NewSRQ(depth int) (SRQ, error)
	// Post gives a batch to the device without polling. See Channel.Turn.
	Post(b *Batch)
	// Close gives the device up, after everything on it is closed: a user does so when it was removed, or has failed. It is
	// opened anew when it comes back.
	Close() error
	// Events tells of ports and the device itself. The channel is never closed; slow readers miss events.
	Events() <-chan Event
}

// Event is something that happened to a device (struct ibv_async_event) that its user should know.
type Event struct {
	Fatal bool   // the device is unusable: all its connections end
	Text  string // as rdma-core names it, such as "port error"
}

// Channel is a completion channel with its completion queues: what one goroutine polls, or sleeps on (struct
// ibv_comp_channel). Turn and Wait are called by one goroutine at a time; the rest by any.
type Channel interface {
	// NewCQ adds a completion queue for at least depth completions. Its owner must see to it that no more can come.
	NewCQ(depth int) (CQ, error)
	// Turn posts b, which may be nil, then polls the channel's completion queues for up to len(wc) completions, in turns
	// between queues, and returns how many it put there. What could not be posted is told by b.
	Turn(b *Batch, wc []WC) int
	// Wait arms queues and, unless completions were there before, sleeps until one comes to a queue that is armed, or one of the
	// files (at most MaxFiles) can be read, or Wake is called. It returns how many completions it put into wc, as Turn does: none
	// may also mean that there was no reason.
	Wait(arm []CQ, files []int32, wc []WC) (int, error)
	// Wake makes Wait return.
	Wake()
	// Close frees the channel. All completion queues are closed before, and nobody is in Wait.
	Close() error
}

// MaxFiles is how many files a Wait takes.
const MaxFiles = 16

// CQ is a completion queue (struct ibv_cq), polled through its Channel.
type CQ interface {
	// Arm asks for a Wait that goes on to return at the queue's next completion. It may be called by any goroutine.
	Arm() error
	// Close destroys the queue, after all queue pairs that use it, and while its channel is not in Turn.
	Close() error
}

// Queue is what a chain of work requests is posted to: a queue pair (sends, or receives when it has no SRQ) or an SRQ.
type Queue interface {
	// Handle identifies the queue to its own device.
	Handle() uintptr
}

// SRQ is a shared receive queue (struct ibv_srq).
type SRQ interface {
	Queue
	Close() error // after all queue pairs that use it
}

// QPAttr describes a queue pair to create.
type QPAttr struct {
	SendCQ, RecvCQ CQ
	SRQ            SRQ // or nil, and then:
	RecvDepth      int // receives
	SendDepth      int // work requests
	SendSGE        int // of each; at most Caps.MaxSGE
	Inline         int // bytes of a send that are copied when it is posted; less may be granted
}

// QP is a reliable connected queue pair (struct ibv_qp). Its ID destroys it.
type QP interface {
	Queue
	// Num is the number in the completions of its receives.
	Num() uint32
	// Inline is how many bytes FlagInline takes.
	Inline() int
	// Fail moves the queue pair to the error state: everything posted completes with a flush error.
	Fail()
	// LastReceive is closed when a queue pair that has failed takes no more receives of its SRQ, where the device tells.
	LastReceive() <-chan struct{}
}
