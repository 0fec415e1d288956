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
	// vendor specific commands that the log page names; without any there is no page.
	vendor []nvmeof.VendorCommand

	mu   sync.Mutex
	kv   map[string][]byte
	tags map[string]uint32
	tag  uint32 // the last one given
	most int    // commands that were in flight together
	now  int
}

func newMemory(limit uint64) *memory {
	return &memory{limit: limit, kv: map[string][]byte{}, tags: map[string]uint32{}}
}

// withVendor has it know both vendor specific commands.
func (m *memory) withVendor() *memory {
	m.vendor = []nvmeof.VendorCommand{
		{Opcode: nvmeof.OpExistMany, CSI: nvmeof.CSIKV, Version: 1, Limit: nvmeof.MaxExistMany},
		{Opcode: nvmeof.OpRetrieveRange, CSI: nvmeof.CSIKV, Version: 1, Limit: 1024}}
	return m
}

func (m *memory) has(op uint8) bool {
	return slices.ContainsFunc(m.vendor, func(c nvmeof.VendorCommand) bool { return c.Opcode == op })
}

// LogPage knows the one log page.
func (m *memory) LogPage(_ context.Context, lid uint8, off uint64, b []byte) error {
	if lid != nvmeof.LogVendor || m.vendor == nil {
		return nvmeof.InvalidLogPage | nvmeof.DNR
	}
	page := make([]byte, nvmeof.VendorLogSize)
	nvmeof.EncodeVendorLog(page, m.vendor...)
	copy(b, page[off:])
	return nil
}

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
		m.tag++
		m.tags[key] = m.tag
		return done(0, 0, nvmeof.Success)
	case nvmeof.OpRetrieveRange:
		offset, tag := cmd.Range()
		switch {
		case !m.has(nvmeof.OpRetrieveRange):
			return done(0, 0, nvmeof.InvalidOpcode|nvmeof.DNR)
		case offset%4 != 0:
			return done(0, 0, nvmeof.InvalidField|nvmeof.DNR)
		case !ok:
			return done(0, 0, nvmeof.KeyDoesNotExist|nvmeof.DNR)
		case tag != 0 && tag != m.tags[key]:
			return done(0, 0, nvmeof.ValueReplaced|nvmeof.DNR)
		}
		n := copy(buf, v[min(len(v), int(offset)):])
		return nvmeof.MakeCompletion(uint32(len(v)), m.tags[key], 0, 1, 0, nvmeof.Success), n, nil
	case nvmeof.OpExistMany:
		if !m.has(nvmeof.OpExistMany) {
			return done(0, 0, nvmeof.InvalidOpcode|nvmeof.DNR)
		}
		var found uint64
		i := 0
		if nvmeof.DecodeKeyList(buf, func(k []byte) bool {
			if _, ok := m.kv[string(k)]; ok {
				found |= 1 << i
			}
			i++
			return true
		}) != nil {
			return done(0, 0, nvmeof.InvalidField|nvmeof.DNR)
		}
		return nvmeof.MakeCompletion(uint32(found), uint32(found>>32), 0, 1, 0, nvmeof.Success), 0, nil
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
