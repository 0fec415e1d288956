package target

import (
	"slices"
	"sync"

	"github.com/kvof/kvof/uring"
)

// Memory is a transport's that registers the memory which payload is in with its devices: the arena and what memory
// devices are made of. The target calls it outside any command; registering takes its time.
type Memory interface {
	// Add registers b. Commands may use b before, and must not when it fails: the transport logs that.
	Add(b []byte)
	// Remove ends what Add began: no command uses b any more.
	Remove(b []byte)
}

// memories is all payload memory, and who wants to know of it.
type memories struct {
	mu    sync.Mutex
	all   []payload
	users []Memory
}

// payload is memory that payload is in.
type payload struct {
	b   []byte
	dev uring.Device // that is made of it, or nil
}

// tell tells u of the memory.
func (p payload) tell(u Memory) {
	if d, ok := p.dev.(uring.Pinner); ok {
		d.Pin()
	}
	u.Add(p.b)
}

func (m *memories) add(p payload) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.all = append(m.all, p)
	for _, u := range m.users {
		p.tell(u)
	}
}

func (m *memories) remove(b []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.all = slices.DeleteFunc(m.all, func(p payload) bool { return &p.b[0] == &b[0] })
	for _, u := range m.users {
		u.Remove(b)
	}
}

// Attach tells m of all payload memory there is and will be.
func (t *Target) Attach(m Memory) {
	ms := &t.pool.memories
	ms.mu.Lock()
	defer ms.mu.Unlock()
	ms.users = append(ms.users, m)
	for _, p := range ms.all {
		p.tell(m)
	}
}
