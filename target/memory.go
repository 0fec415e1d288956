package target

import (
	"slices"
	"sync"

	"github.com/kvof/kvof/uring"
)

// Fabric is a transport whose devices must know beforehand which memory payload is in: the arena and what memory devices
// are made of. The target calls it outside any command; registering takes its time.
type Fabric interface {
	// Add registers b. Commands may use b before, and must not when it fails: the transport logs that.
	Add(b []byte)
	// Remove ends what Add began: no command uses b any more.
	Remove(b []byte)
	// Status describes the devices in use.
	Status() []FabricStatus
}

// memories is all payload memory, and who wants to know of it.
type memories struct {
	mu    sync.Mutex
	all   []payload
	users []Fabric
}

// payload is memory that payload is in.
type payload struct {
	b   []byte
	dev uring.Device // that is made of it, or nil
}

// tell tells u of the memory.
func (p payload) tell(u Fabric) {
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

// Attach tells f of all payload memory there is and will be.
func (t *Target) Attach(f Fabric) {
	ms := &t.pool.memories
	ms.mu.Lock()
	defer ms.mu.Unlock()
	ms.users = append(ms.users, f)
	for _, p := range ms.all {
		p.tell(f)
	}
}

// fabrics returns the transports that were attached.
func (m *memories) fabrics() []Fabric {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.users)
}
