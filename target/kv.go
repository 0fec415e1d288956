package target

import (
	"io"

	"github.com/kvof/kvof/kvlayer"
	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/uring"
)

// kvEffects are the Key Value commands for log page 05h.
var kvEffects = map[uint8]uint32{
	nvmeof.OpFlush:    nvmeof.EffectSupported,
	nvmeof.OpRetrieve: nvmeof.EffectSupported,
	nvmeof.OpList:     nvmeof.EffectSupported,
	nvmeof.OpExist:    nvmeof.EffectSupported,
	nvmeof.OpStore:    nvmeof.EffectSupported | nvmeof.EffectContent,
	nvmeof.OpDelete:   nvmeof.EffectSupported | nvmeof.EffectContent,

	nvmeof.OpExistMany:     nvmeof.EffectSupported,
	nvmeof.OpRetrieveRange: nvmeof.EffectSupported,
}

// kvCommand checks a Key Value command and starts it. CDW12 and CDW13 of the specification's own commands are never looked
// at: real hosts put things there.
func kvCommand(r *Request) {
	c, n := &r.Cmd, r.ns
	op := c.Opcode()
	if kvEffects[op] == 0 {
		r.fail(nvmeof.InvalidOpcode)
		return
	}
	if op == nvmeof.OpFlush {
		r.proceed(flush)
		return
	}
	if op == nvmeof.OpExistMany {
		existMany(r)
		return
	}
	if kl := c.KeyLen(); kl > nvmeof.MaxKeyLen || kl == 0 && op != nvmeof.OpList {
		r.fail(nvmeof.InvalidKeySize)
		return
	}
	if n.ReadOnly && (op == nvmeof.OpStore || op == nvmeof.OpDelete) {
		r.fail(nvmeof.WriteProtected)
		return
	}
	if op != nvmeof.OpExist && op != nvmeof.OpDelete && c.KVSize() > r.Length {
		r.fail(nvmeof.DataSGLLength)
		return
	}
	switch op {
	case nvmeof.OpStore:
		switch {
		case c.KVOption()&(nvmeof.StoreIfExists|nvmeof.StoreIfAbsent) == nvmeof.StoreIfExists|nvmeof.StoreIfAbsent:
			r.fail(nvmeof.InvalidField)
		case int64(c.KVSize()) > n.store.MaxValue():
			r.fail(nvmeof.InvalidValueSize)
		default:
			r.proceed(store)
		}
	case nvmeof.OpRetrieve:
		r.proceed(retrieve)
	case nvmeof.OpRetrieveRange:
		if offset, _ := c.Range(); offset%4 != 0 {
			r.fail(nvmeof.InvalidField)
			return
		}
		r.proceed(retrieve)
	case nvmeof.OpExist:
		st := nvmeof.Success
		if _, ok := n.store.Exist(key(c)); !ok {
			st = nvmeof.KeyDoesNotExist | nvmeof.DNR
		}
		r.complete(st, 0)
	case nvmeof.OpDelete:
		r.proceed(remove)
	case nvmeof.OpList:
		r.spawn(list) // it waits for arena memory, whatever the device
	}
}

// key is the key of a command whose key length is valid.
func key(c *nvmeof.Command) kvlayer.Key {
	b := c.Key()
	k, err := kvlayer.MakeKey(b[:c.KeyLen()])
	if err != nil {
		panic(err) // kvCommand has checked the length
	}
	return k
}

// store reserves the space, refusing before any payload moves, and brings the value.
func store(r *Request) {
	c, n := &r.Cmd, r.ns
	mode := kvlayer.StoreAlways
	switch {
	case c.KVOption()&nvmeof.StoreIfExists != 0:
		mode = kvlayer.StoreIfExists
	case c.KVOption()&nvmeof.StoreIfAbsent != 0:
		mode = kvlayer.StoreIfAbsent
	}
	size := c.KVSize()
	if !n.inline {
		r.queue.reserve(r, holdFor(n.store.Buffered(0, int64(size)), writeHold))
	}
	if r.writer == nil {
		r.writer = new(kvlayer.Writer)
	}
	if err := n.store.Create(r.writer, key(c), int64(size), mode); err != nil {
		r.complete(statusOf(err), 0)
		return
	}
	r.receive(size, r.writer, commit)
}

// commit makes the value that has arrived the key's.
func commit(r *Request) { r.complete(statusOf(r.writer.Commit()), 0) }

// retrieve sends the value, or a range of it, piece by piece as it is read and verified. The value stays pinned until the
// data is out.
func retrieve(r *Request) {
	c, n := &r.Cmd, r.ns
	var offset, tag uint32
	part := c.Opcode() == nvmeof.OpRetrieveRange
	if part {
		offset, tag = c.Range()
	}
	limit := int64(c.KVSize())
	if !n.inline {
		from := int64(offset)
		r.queue.reserve(r, holdFor(n.store.Buffered(from, readsTo(n.store.Size(key(c)), from, limit)), readHold))
	}
	if r.reader == nil {
		r.reader = new(kvlayer.Reader)
	}
	if err := n.store.OpenRange(r.reader, key(c), int64(offset), limit, tag); err != nil {
		r.complete(n.missing(err), 0)
		return
	}
	r.pinned = true
	size := r.reader.Size()
	for end := min(size-int64(offset), limit); ; {
		b, err := r.reader.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			r.complete(n.missing(err), 0)
			return
		}
		r.send(b, int64(r.Sent)+int64(len(b.Data)) == end)
	}
	tag = 0
	if part {
		tag = r.reader.Tag()
	}
	r.finish(nvmeof.Success, uint32(size), tag)
}

// readsTo is where reading ends, in whole pieces, that begins at offset, for limit bytes of a value of size bytes.
func readsTo(size, offset, limit int64) int64 {
	if offset >= size || limit == 0 {
		return offset
	}
	end := offset + min(limit, size-offset) + kvlayer.Granularity - 1
	return min(size, end-end%kvlayer.Granularity)
}

func remove(r *Request) {
	existed, err := r.ns.store.Delete(key(&r.Cmd))
	if err == nil && !existed && r.ns.ednek.Load() {
		err = kvlayer.ErrNotFound
	}
	r.complete(statusOf(err), 0)
}

// list answers with the keys from the start key on that fit the host's buffer, or one arena buffer.
func list(r *Request) {
	n := int(min(r.Cmd.KVSize(), uring.MediumBuf))
	if n < 4 { // not even the number of keys fits
		r.complete(nvmeof.Success, 0)
		return
	}
	r.queue.reserve(r, holdFor(int64(n), 1))
	b := r.ns.arena.Get(n)
	keys := nvmeof.NewKeyList(b.Data[:0:n])
	var from kvlayer.Key // the zero Key is before all others
	if r.Cmd.KeyLen() > 0 {
		from = key(&r.Cmd)
	}
	var k16 [kvlayer.MaxKey]byte
	r.ns.store.List(from, func(k kvlayer.Key, _ int64) bool { return keys.Add(k.Append(k16[:0])) })
	b.Data = keys.Bytes()
	r.send(b, true)
	r.complete(nvmeof.Success, 0)
}
