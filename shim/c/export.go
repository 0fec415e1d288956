package main

// #include <stdlib.h>
// #include "internal.h"
import "C"

import (
	"errors"
	"os"
	"runtime/cgo"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/kvof/kvof/rdma"
	"github.com/kvof/kvof/shim/client"
	"github.com/kvof/kvof/shim/keys"
	"golang.org/x/sys/unix"
)

// fail writes the calling thread's last error.
func fail(buf *C.char, status C.int, err error) C.int {
	b := unsafe.Slice((*byte)(unsafe.Pointer(buf)), C.KVOF_ERROR_SIZE)
	b[copy(b[:len(b)-1], err.Error())] = 0
	return status
}

func scope(s *C.struct_kvof_scope) keys.Scope {
	return keys.Scope{Tenant: C.GoString(s.tenant), Model: C.GoString(s.model), Rank: C.GoString(s.rank), Group: C.GoString(s.group), Salt: C.GoString(s.salt)}
}

func memory(p unsafe.Pointer, n uint64) []byte { return unsafe.Slice((*byte)(p), n) }

//export kvofgo_key
func kvofgo_key(s *C.struct_kvof_scope, flags C.uint32_t, key unsafe.Pointer, keyLen C.uint32_t, out *C.struct_kvof_nvme_key, errbuf *C.char) C.int {
	k, err := keys.NewScheme(scope(s), flags&C.KVOF_HASH_ALL != 0).Key(memory(key, uint64(keyLen)))
	if err != nil {
		return fail(errbuf, C.KVOF_INVALID, err)
	}
	copy(memory(unsafe.Pointer(&out.bytes), 16), k.Bytes())
	out.len = C.uint8_t(len(k.Bytes()))
	if k.Hashed() {
		out.hashed = 1
		d := k.Digest()
		copy(memory(unsafe.Pointer(&out.digest), 32), d[:])
	}
	return C.KVOF_OK
}

// session is the Go side of a struct kvof_client.
type session struct {
	*client.Client
	shared *C.struct_kvof_client
	wake   *os.File // its eventfd
	done   chan struct{}
}

//export kvofgo_open
func kvofgo_open(o *C.struct_kvof_options, shared *C.struct_kvof_client, errbuf *C.char) C.int {
	const known = C.KVOF_NOWAIT | C.KVOF_HASH_ALL | C.KVOF_NO_CHECKSUM | C.KVOF_HEADER_DIGEST | C.KVOF_DATA_DIGEST
	if o.flags&^known != 0 {
		return fail(errbuf, C.KVOF_INVALID, errors.New("unknown flag"))
	}
	ms := func(n C.uint32_t) time.Duration { return time.Duration(n) * time.Millisecond }
	c, err := client.Open(client.Options{
		Targets: C.GoString(o.targets), HostNQN: C.GoString(o.host_nqn), Scope: scope(&o.scope),
		NoWait: o.flags&C.KVOF_NOWAIT != 0, HashAll: o.flags&C.KVOF_HASH_ALL != 0, NoChecksum: o.flags&C.KVOF_NO_CHECKSUM != 0,
		HeaderDigest: o.flags&C.KVOF_HEADER_DIGEST != 0, DataDigest: o.flags&C.KVOF_DATA_DIGEST != 0,
		Timeout: ms(o.timeout_ms), LookupTimeout: ms(o.lookup_timeout_ms), ConnectTimeout: ms(o.connect_timeout_ms), Reconnect: ms(o.reconnect_ms), KeepAlive: ms(o.keep_alive_ms),
		IOQueues: int(o.io_queues), QueueDepth: int(o.queue_depth), MaxOps: int(shared.max_ops),
	})
	switch {
	case errors.Is(err, client.ErrUnavailable):
		return fail(errbuf, C.KVOF_UNAVAILABLE, err)
	case err != nil:
		return fail(errbuf, C.KVOF_INVALID, err)
	}
	s := &session{c, shared, os.NewFile(uintptr(shared.wake), "kvof submissions"), make(chan struct{})}
	shared.handle = C.uintptr_t(cgo.NewHandle(s))
	go s.run()
	return C.KVOF_OK
}

func clientOf(handle C.uintptr_t) *session { return cgo.Handle(handle).Value().(*session) }

// run starts what kvof_submit leaves in the client: C never waits for Go's scheduler.
func (s *session) run() {
	defer close(s.done)
	var b [8]byte
	for {
		s.take()
		if _, err := s.wake.Read(b[:]); err != nil {
			return // closed
		}
	}
}

// take starts all submissions there are, in their order.
func (s *session) take() {
	newest := (*C.struct_kvof_submission)(atomic.SwapPointer((*unsafe.Pointer)(unsafe.Pointer(&s.shared.submitted)), nil))
	var oldest *C.struct_kvof_submission
	for newest != nil {
		newest, newest.next, oldest = newest.next, oldest, newest
	}
	for oldest != nil {
		in := oldest
		oldest = in.next
		cgo.Handle(in.queue).Value().(*queue).start(in)
		C.free(unsafe.Pointer(in))
	}
}

//export kvofgo_close
func kvofgo_close(handle C.uintptr_t) {
	s := clientOf(handle)
	_ = s.wake.Close()
	<-s.done
	s.take()
	s.Close()
	cgo.Handle(handle).Delete()
}

//export kvofgo_register
func kvofgo_register(handle C.uintptr_t, addr unsafe.Pointer, size C.uint64_t, dmabuf C.uint32_t, fd C.int, offset C.uint64_t, errbuf *C.char) C.int {
	if uintptr(addr)+uintptr(size) < uintptr(addr) || int64(size) < 0 {
		return fail(errbuf, C.KVOF_INVALID, errors.New("the region does not fit into memory"))
	}
	var buf *rdma.DMABuf
	if dmabuf != 0 {
		buf = &rdma.DMABuf{FD: int(fd), Offset: uint64(offset)}
	}
	err := clientOf(handle).Register(memory(addr, uint64(size)), buf)
	switch {
	case errors.Is(err, client.ErrUnsupported):
		return fail(errbuf, C.KVOF_UNSUPPORTED, err)
	case err != nil:
		return fail(errbuf, C.KVOF_INVALID, err)
	}
	return C.KVOF_OK
}

//export kvofgo_unregister
func kvofgo_unregister(handle C.uintptr_t, addr unsafe.Pointer, errbuf *C.char) C.int {
	if err := clientOf(handle).Unregister((*byte)(addr)); err != nil {
		return fail(errbuf, C.KVOF_INVALID, err)
	}
	return C.KVOF_OK
}

// queue is the Go side of a struct kvof_queue.
type queue struct {
	s      *session
	shared *C.struct_kvof_queue
	free   sync.Pool // of *batch

	mu   sync.Mutex // one completion at a time
	idle *sync.Cond // shared.inflight went down
}

// batch is a client.Batch on behalf of an array of struct kvof_op.
type batch struct {
	client.Batch
	q      *queue
	ops    unsafe.Pointer
	stride uintptr
	user   C.uint64_t
}

//export kvofgo_queue_open
func kvofgo_queue_open(handle C.uintptr_t, shared *C.struct_kvof_queue) C.uintptr_t {
	q := &queue{s: clientOf(handle), shared: shared}
	q.idle = sync.NewCond(&q.mu)
	q.free.New = func() any {
		b := &batch{q: q}
		b.OnOp, b.OnDone = b.opEnded, b.ended
		return b
	}
	return C.uintptr_t(cgo.NewHandle(q))
}

//export kvofgo_queue_close
func kvofgo_queue_close(handle C.uintptr_t) {
	q := cgo.Handle(handle).Value().(*queue)
	q.mu.Lock()
	for atomic.LoadUint64((*uint64)(unsafe.Pointer(&q.shared.inflight))) > 0 {
		q.idle.Wait()
	}
	q.mu.Unlock()
	cgo.Handle(handle).Delete()
}

// op is the C structure behind operation i.
func (b *batch) op(i uint64) *C.struct_kvof_op {
	return (*C.struct_kvof_op)(unsafe.Add(b.ops, uintptr(i)*b.stride))
}

// start starts a submission, which it does not keep.
func (q *queue) start(in *C.struct_kvof_submission) {
	b := q.free.Get().(*batch)
	b.ops, b.stride, b.user = unsafe.Pointer(in.ops), uintptr(in.op_size), in.user_data
	n := int(in.count)
	if cap(b.Ops) < n {
		b.Ops = make([]client.Op, n)
	}
	b.Ops = b.Ops[:n]
	desc := unsafe.Slice((*C.struct_kvof_desc)(unsafe.Add(unsafe.Pointer(in), unsafe.Sizeof(*in))), n)
	for i := range desc {
		b.fill(uint64(i), &desc[i])
	}
	if q.s.Submit(&b.Batch) != nil {
		panic("kvof_submit counts what is in flight, and kvof_close comes last")
	}
}

// fill makes operation i of what the caller wrote; one that is malformed ends as Invalid.
func (b *batch) fill(i uint64, d *C.struct_kvof_desc) {
	in, o := b.op(i), &b.Ops[i]
	o.Kind, o.Replace, o.Tag, o.Status = client.Kind(in.kind), in.flags&C.KVOF_REPLACE != 0, i, client.Invalid
	o.Result, o.Detail, o.Data = 0, 0, o.Data[:0]
	if d.key == nil {
		return
	}
	for _, p := range unsafe.Slice(d.iov, d.pieces) {
		if p.len > 0 {
			o.Data = append(o.Data, memory(p.base, uint64(p.len)))
		}
	}
	if key, err := b.q.s.Key(memory(d.key, uint64(in.key_len))); err == nil {
		o.Key, o.Status = key, client.Pending
	}
}

// opEnded tells the caller how one operation ended: its status last, as the caller may watch it.
func (b *batch) opEnded(o *client.Op) {
	out := b.op(o.Tag)
	out.result, out.detail = C.uint64_t(o.Result), C.uint32_t(o.Detail)
	atomic.StoreInt32((*int32)(&out.status), int32(o.Status))
}

var one = [8]byte{1}

// ended puts the batch's completion into the ring.
func (b *batch) ended(*client.Batch) {
	done := C.struct_kvof_completion{user_data: b.user, count: C.uint32_t(len(b.Ops)), run: C.uint32_t(len(b.Ops))}
	for i := range b.Ops {
		o := &b.Ops[i]
		switch {
		case o.Status.Success():
			done.ok++
			switch {
			case o.Kind == client.Get:
				done.bytes += C.uint64_t(o.Result)
			case o.Kind == client.Put && o.Status == client.OK:
				for _, d := range o.Data {
					done.bytes += C.uint64_t(len(d))
				}
			}
		case int(done.run) == len(b.Ops):
			done.run, done.status = C.uint32_t(i), C.int32_t(o.Status)
		}
	}
	q := b.q
	atomic.AddUint64((*uint64)(unsafe.Pointer(&q.s.shared.ops)), ^uint64(len(b.Ops)-1))
	b.recycle()
	ring := unsafe.Slice((*C.struct_kvof_completion)(unsafe.Add(unsafe.Pointer(q.shared), unsafe.Sizeof(*q.shared))), q.shared.depth)
	head, tail := (*uint64)(unsafe.Pointer(&q.shared.head)), (*uint64)(unsafe.Pointer(&q.shared.tail))
	q.mu.Lock()
	at := *tail // only we change it
	ring[at&uint64(q.shared.depth-1)] = done
	atomic.StoreUint64(tail, at+1)
	if atomic.LoadUint64(head) == at {
		// It was empty: a poller may have gone to sleep. One that is still taking earlier ones sees this one too.
		_, _ = unix.Write(int(q.shared.fd), one[:])
	}
	atomic.AddUint64((*uint64)(unsafe.Pointer(&q.shared.inflight)), ^uint64(0))
	q.idle.Broadcast()
	q.mu.Unlock()
}

// recycle gives the batch back, without the caller's memory.
func (b *batch) recycle() {
	b.ops = nil
	for i := range b.Ops {
		clear(b.Ops[i].Data)
	}
	b.q.free.Put(b)
}

//export kvofgo_counters
func kvofgo_counters(handle C.uintptr_t, out *C.struct_kvof_counters) {
	n := clientOf(handle).Counters()
	*out = C.struct_kvof_counters{
		targets: C.uint32_t(n.Targets), targets_up: C.uint32_t(n.TargetsUp), paths: C.uint32_t(n.Paths), paths_up: C.uint32_t(n.PathsUp), in_flight: C.uint32_t(n.InFlight),
		get_hits: C.uint64_t(n.GetHits), get_misses: C.uint64_t(n.GetMisses), get_bytes: C.uint64_t(n.GetBytes),
		puts: C.uint64_t(n.Puts), put_exists: C.uint64_t(n.PutExists), put_bytes: C.uint64_t(n.PutBytes),
		exist_hits: C.uint64_t(n.ExistHits), exist_misses: C.uint64_t(n.ExistMisses), deletes: C.uint64_t(n.Deletes),
		mismatches: C.uint64_t(n.Mismatches), truncated: C.uint64_t(n.Truncated), unavailable: C.uint64_t(n.Unavailable), timeouts: C.uint64_t(n.Timeouts),
		full: C.uint64_t(n.Full), errors: C.uint64_t(n.Errors), cancelled: C.uint64_t(n.Cancelled),
		connects: C.uint64_t(n.Connects), disconnects: C.uint64_t(n.Disconnects), connect_failures: C.uint64_t(n.ConnectFailures), retries: C.uint64_t(n.Retries),
	}
}

//export kvofgo_describe
func kvofgo_describe(handle C.uintptr_t, buf *C.char, size C.size_t) C.size_t {
	s := clientOf(handle).Describe().String()
	if size > 0 {
		b := memory(unsafe.Pointer(buf), uint64(size))
		b[copy(b[:size-1], s)] = 0
	}
	return C.size_t(len(s))
}
