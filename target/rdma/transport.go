// Package rdma is the NVMe/RDMA transport of the target: listeners, and one queue pair for each queue.
//
// Every device has lanes. A lane is one goroutine with a completion channel: it takes capsules out of shared receive
// queues, executes them, and posts what they lead to, all in one call to the device per turn. Whoever else has something
// for a host posts it in place. Payload goes by RDMA READ and WRITE between the host's memory and that of the command's
// namespace, all of which was registered before.
package rdma

import (
	"errors"
	"log/slog"
	"net/netip"
	"sync"

	"github.com/kvof/kvof/rdma"
	"github.com/kvof/kvof/target"
)

// Transport serves a target over the RDMA devices of the machine.
type Transport struct {
	target *target.Target
	verbs  rdma.Verbs
	log    *slog.Logger

	mu      sync.Mutex
	memory  [][]byte
	devices map[rdma.Device]*device
}

// New makes a transport. The target tells it of all payload memory, which every device that comes into use registers.
func New(t *target.Target, v rdma.Verbs, log *slog.Logger) *Transport {
	tr := &Transport{target: t, verbs: v, log: log, devices: map[rdma.Device]*device{}}
	t.Attach(tr)
	return tr
}

// Add implements target.Fabric.
func (t *Transport) Add(b []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.memory = append(t.memory, b)
	for _, d := range t.devices {
		if err := d.register(b); err != nil {
			t.log.Error("namespace memory cannot be reached over RDMA", "error", err)
		}
	}
}

// Remove implements target.Fabric.
func (t *Transport) Remove(b []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, m := range t.memory {
		if &m[0] == &b[0] {
			t.memory = append(t.memory[:i], t.memory[i+1:]...)
			break
		}
	}
	for _, d := range t.devices {
		d.unregister(b)
	}
}

// device returns what serves on dev, making it ready at the first time.
func (t *Transport) device(dev rdma.Device) (*device, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if d := t.devices[dev]; d != nil {
		return d, nil
	}
	d, err := newDevice(t, dev)
	if err != nil {
		return nil, err
	}
	t.devices[dev] = d
	return d, nil
}

// drop gives up a device that is gone.
func (t *Transport) drop(d *device) {
	t.mu.Lock()
	delete(t.devices, d.dev)
	t.mu.Unlock()
	d.close()
}

// Listen serves a target at an address; see rdma.Verbs for what it can be. With discovery set it serves the discovery
// subsystem alone. The device, all devices when the address is unspecified, register the target's memory now.
func (t *Transport) Listen(addr netip.AddrPort, discovery bool) (*Listener, error) {
	l := newListener(t, addr, discovery)
	if err := l.open(); err != nil {
		return nil, err
	}
	t.target.AddPort(l.port)
	l.start()
	return l, nil
}

// ready makes a listener's device ready, or all of them, before its first host comes: registering the arena can take longer than
// hosts wait.
func (t *Transport) ready(dev rdma.Device) error {
	ds := []rdma.Device{dev}
	if dev == nil {
		var err error
		if ds, err = t.verbs.Devices(); err != nil {
			return err
		}
	}
	for _, dev := range ds {
		if _, err := t.device(dev); err != nil {
			return err
		}
	}
	return nil
}

// Close gives the devices up. All listeners are closed before.
func (t *Transport) Close() error {
	t.mu.Lock()
	ds := t.devices
	t.devices = map[rdma.Device]*device{}
	t.mu.Unlock()
	var errs []error
	for _, d := range ds {
		errs = append(errs, d.close())
	}
	return errors.Join(errs...)
}

// Status implements target.Fabric.
func (t *Transport) Status() (ss []target.FabricStatus) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, d := range t.devices {
		ss = append(ss, d.status())
	}
	return ss
}
