package host

import (
	"bytes"
	"context"
	"maps"
	"slices"
	"sync"

	"github.com/kvof/kvof/nvmeof"
)

// memory is a Key Value namespace in a map, and a path to it.
type memory struct {
	limit uint64 // of one command, bytes
	edn   bool   // deleting an absent key is an error (EDNEK)
	// hook, when set, is called before each command, and may end it with an error.
	hook func(op uint8, key string) error

	mu   sync.Mutex
	kv   map[string][]byte
	most int // commands that were in flight together
	now  int
}

func newMemory(limit uint64) *memory { return &memory{limit: limit, kv: map[string][]byte{}} }

func (m *memory) open() *KV {
	return &KV{path: m, ns: Namespace{NSID: 1, CSI: nvmeof.CSIKV, MaxKey: 16, MaxValue: 64 << 20}}
}

func (m *memory) maxTransfer([]byte) uint64 { return m.limit }

func (m *memory) submit(ctx context.Context, cmd nvmeof.Command, d data, _ bool) (nvmeof.Completion, int, error) {
	if d.pieces != nil {
		buf := bytes.Join(d.pieces, nil)
		cqe, n, err := m.submit(ctx, cmd, data{buf: buf}, false)
		for _, p := range d.pieces {
			buf = buf[copy(p, buf):]
		}
		return cqe, n, err
	}
	buf := d.buf
	if ctx.Err() != nil {
		return nvmeof.Completion{}, 0, context.Cause(ctx)
	}
	if m.limit != 0 && uint64(len(buf)) > m.limit {
		return nvmeof.Completion{}, 0, tooLarge(len(buf), m.limit)
	}
	k := cmd.Key()
	key := string(k[:cmd.KeyLen()])
	m.mu.Lock()
	m.now++
	m.most = max(m.most, m.now)
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		m.now--
		m.mu.Unlock()
	}()
	if m.hook != nil {
		if err := m.hook(cmd.Opcode(), key); err != nil {
			return nvmeof.Completion{}, 0, err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	done := func(dw0, n int, st nvmeof.Status) (nvmeof.Completion, int, error) {
		return nvmeof.MakeCompletion(uint32(dw0), 0, 0, 1, 0, st), n, nil
	}
	v, ok := m.kv[key]
	switch cmd.Opcode() {
	case nvmeof.OpStore:
		switch o := cmd.KVOption(); {
		case ok && o == nvmeof.StoreIfAbsent:
			return done(0, 0, nvmeof.KeyExists|nvmeof.DNR)
		case !ok && o == nvmeof.StoreIfExists:
			return done(0, 0, nvmeof.KeyDoesNotExist|nvmeof.DNR)
		}
		m.kv[key] = bytes.Clone(buf)
		return done(0, 0, nvmeof.Success)
	case nvmeof.OpRetrieve, nvmeof.OpExist, nvmeof.OpDelete:
		if !ok && (m.edn || cmd.Opcode() != nvmeof.OpDelete) {
			return done(0, 0, nvmeof.KeyDoesNotExist|nvmeof.DNR)
		}
		if cmd.Opcode() == nvmeof.OpDelete {
			delete(m.kv, key)
		}
		return done(len(v), copy(buf, v), nvmeof.Success)
	case nvmeof.OpList:
		l := nvmeof.NewKeyList(buf[:0:min(len(buf), 500)])
		for _, k := range slices.Sorted(maps.Keys(m.kv)) {
			if k >= key && !l.Add([]byte(k)) {
				break
			}
		}
		return done(0, len(l.Bytes()), nvmeof.Success)
	}
	return done(0, 0, nvmeof.Success)
}

// keys are those stored, in order.
func (m *memory) keys() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Sorted(maps.Keys(m.kv))
}
