package rdma

import (
	"errors"
	"net/netip"
	"testing"
)

// TestSystem shows that a machine without RDMA gets an error that says what is missing, and one with it its devices.
func TestSystem(t *testing.T) {
	v, err := System()
	if err != nil {
		if !errors.Is(err, ErrUnavailable) || len(err.Error()) <= len(ErrUnavailable.Error()) {
			t.Fatalf("System() = %v, want ErrUnavailable and a reason", err)
		}
		t.Skip(err)
	}
	ds, err := v.Devices()
	if err != nil && !errors.Is(err, ErrUnavailable) {
		t.Fatal(err)
	}
	for _, d := range ds {
		t.Logf("%s: %+v", d.Name(), *d.Caps())
		if _, err := d.RegisterDMABuf(make([]byte, 4096), DMABuf{FD: -1}, Local); err == nil {
			t.Error("a dma-buf that is none was registered")
		} else {
			t.Logf("%s: dma-buf: %v", d.Name(), err)
		}
	}
	if _, err := v.Listen(netip.MustParseAddrPort("192.0.2.1:4420"), 1, func(Device) error { return nil }); err == nil {
		t.Error("listening on somebody else's address succeeded")
	}
}
