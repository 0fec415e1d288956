package client

import (
	"context"
	"sync"
	"sync/atomic"

	"github.com/kvof/kvof/host"
	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/shim/keys"
)

// Kind is what an operation does. The values are those of enum kvof_kind in kvof.h.
type Kind uint8

// Kinds.
const (
	Get         Kind = 1 // into Data
	Put         Kind = 2 // from Data, only if the key is absent unless Replace is set
	Exist       Kind = 3
	Delete      Kind = 4
	ExistPrefix Kind = 5 // Exist, of which only the leading run matters
)

// Op is one operation of a batch.
type Op struct {
	Kind    Kind
	Replace bool     // put: also if the key is there
	Key     keys.Key // of the client's scheme
	Data    [][]byte // the caller's memory, in order
	Tag     uint64   // the caller's

	// Results.
	Status Status // Invalid before Submit: the operation is not carried out
	Detail uint32 // the NVMe status behind Status, 0 if there is none
	Result uint64 // get: the value's size in bytes

	client  *Client
	batch   *Batch
	size    uint64   // of Data, bytes
	device  bool     // some of Data is a dma-buf's: no processor may touch it
	bufs    [][]byte // Data and trailer
	trailer [keys.TrailerSize]byte
}

// Batch is a set of operations. It belongs to the client from Submit until OnDone, and may be used again then. OnOp and OnDone
// are called from the client's goroutines, or from within Submit, and must not block.
type Batch struct {
	Ops    []Op
	OnOp   func(*Op)    // an operation has ended
	OnDone func(*Batch) // all have

	left atomic.Int64
}

// end ends an operation. Neither it nor its batch may be used afterwards.
func (o *Op) end(s Status, detail uint32) {
	c, b := o.client, o.batch
	o.Status, o.Detail = s, detail
	clear(o.bufs)
	c.count(o)
	c.inflight.Add(-1)
	if b.OnOp != nil {
		b.OnOp(o)
	}
	c.step(b)
}

func (o *Op) cost() uint64 { return o.size }

func (o *Op) inDevice() bool { return o.device }

func (o *Op) clock() *clock { return &o.client.data }

func (o *Op) do(ctx context.Context, kv *host.KV) error {
	switch o.Kind {
	case Get:
		return o.get(ctx, kv)
	case Put:
		return o.put(ctx, kv)
	default:
		return kv.Delete(ctx, o.Key.Bytes())
	}
}

// verdict is how a value that did arrive is not what was wanted.
type verdict Status

func (v verdict) Error() string { return "the value is not usable" }

const (
	errTruncated = verdict(Truncated)
	errMismatch  = verdict(Miss)
)

// withTrailer is the operation's memory, of which n bytes, with the trailer's behind it.
func (o *Op) withTrailer(n uint64) [][]byte {
	o.bufs = o.bufs[:0]
	for _, b := range o.Data {
		b = b[:min(n, uint64(len(b)))]
		o.bufs = append(o.bufs, b)
		n -= uint64(len(b))
	}
	o.bufs = append(o.bufs, o.trailer[:])
	return o.bufs
}

// rereads is how often a value smaller than its memory in a device is read again, as others replace it by one of another size.
const rereads = 4

func (o *Op) get(ctx context.Context, kv *host.KV) error {
	if !o.Key.Hashed() {
		size, err := kv.RetrievePieces(ctx, o.Key.Bytes(), o.Data)
		if err != nil {
			return err
		}
		if o.Result = uint64(size); o.Result > o.size {
			return errTruncated
		}
		return nil
	}
	bufs, room := o.withTrailer(o.size), o.size
	var size uint64
	for try := 0; ; try++ {
		n, err := kv.RetrievePieces(ctx, o.Key.Bytes(), bufs)
		if err != nil {
			return err
		}
		if n < keys.TrailerSize {
			return errMismatch
		}
		size = uint64(n - keys.TrailerSize)
		if size > o.size { // its trailer did not arrive
			o.Result = size
			return errTruncated
		}
		if !o.device || size == room {
			break
		}
		// The trailer is where it cannot be read: again, with the trailer's own memory behind a value of this size.
		if try == rereads {
			return errMismatch
		}
		bufs, room = o.withTrailer(size), size
	}
	// A value smaller than the memory has its trailer in the midst of it.
	var trailer [keys.TrailerSize]byte
	got, skip := trailer[:0], size
	for _, b := range bufs {
		if skip >= uint64(len(b)) {
			skip -= uint64(len(b))
			continue
		}
		b = b[skip:]
		got, skip = append(got, b[:min(len(b), cap(got)-len(got))]...), 0
	}
	sum, summed, ok := o.Key.CheckTrailer(got, size)
	if !ok || summed && !o.unsummed() && o.sum(size) != sum {
		return errMismatch
	}
	o.Result = size
	return nil
}

func (o *Op) put(ctx context.Context, kv *host.KV) error {
	mode := host.StoreIfAbsent
	if o.Replace {
		mode = host.StoreAlways
	}
	if m := kv.Info().MaxValue; m != 0 && o.stored() > m {
		return nvmeof.InvalidValueSize
	}
	data := o.Data
	if o.Key.Hashed() {
		o.sign()
		data = o.withTrailer(o.size)
	}
	return kv.StorePieces(ctx, o.Key.Bytes(), data, mode)
}

// stored is the size of the value on the target.
func (o *Op) stored() uint64 {
	if o.Key.Hashed() {
		return o.size + keys.TrailerSize
	}
	return o.size
}

// sums are the running sums of payloads in pieces.
var sums = sync.Pool{New: func() any { return new(keys.Sum) }}

// sum is that of the first n bytes of the operation's memory.
func (o *Op) sum(n uint64) uint64 {
	if len(o.Data) == 1 {
		return keys.SumOf(o.Data[0][:n])
	}
	s := sums.Get().(*keys.Sum)
	defer sums.Put(s)
	s.Reset()
	for _, b := range o.Data {
		b = b[:min(n, uint64(len(b)))]
		s.Add(b)
		n -= uint64(len(b))
	}
	return s.Sum()
}

// unsummed tells whether the payload is neither summed nor verified.
func (o *Op) unsummed() bool { return o.client.opts.NoChecksum || o.device }

// sign makes the trailer of a put.
func (o *Op) sign() {
	if o.unsummed() {
		o.Key.PutTrailer(o.trailer[:], o.size, nil)
		return
	}
	sum := o.sum(o.size)
	o.Key.PutTrailer(o.trailer[:], o.size, &sum)
}

// lookup is the Exists of a batch that go to one target.
type lookup struct {
	client *Client
	ops    []*Op
	keys   [][]byte
	found  []bool
	prefix bool // only the leading run matters
}

var lookups = sync.Pool{New: func() any { return new(lookup) }}

func (l *lookup) cost() uint64 { return 0 }

func (l *lookup) inDevice() bool { return false }

func (l *lookup) clock() *clock { return &l.client.lookups }

func (l *lookup) do(ctx context.Context, kv *host.KV) error {
	l.keys, l.found = l.keys[:0], l.found[:0]
	for _, o := range l.ops {
		l.keys, l.found = append(l.keys, o.Key.Bytes()), append(l.found, false)
	}
	if !l.prefix {
		return kv.ExistMany(ctx, l.keys, l.found)
	}
	run, err := kv.ExistPrefix(ctx, l.keys)
	for i := range run {
		l.found[i] = true
	}
	return err
}

func (l *lookup) end(s Status, detail uint32) {
	for i, o := range l.ops {
		switch {
		case s != OK:
			o.end(s, detail)
		case l.found[i]:
			o.end(OK, 0)
		default:
			o.end(Miss, 0)
		}
	}
	clear(l.ops)
	clear(l.keys)
	l.client, l.ops = nil, l.ops[:0]
	lookups.Put(l)
}
