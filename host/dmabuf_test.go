package host

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/rdma"
	"github.com/kvof/kvof/rdma/rdmatest"
)

// TestDMABuf moves data from and to the memory of a device, of every size that other memory would be copied for: only keyed
// descriptors of that memory may be used, as touching it is a fault.
func TestDMABuf(t *testing.T) {
	f, far := newFakeRDMA(t, rdmatest.DefaultCaps())
	f.intercept = func(c *fakeConn, cmd *nvmeof.Command) bool {
		sgl := cmd.SGL()
		if id := sgl.ID(); c.qid > 0 && (cmd.Opcode() == nvmeof.OpStore || cmd.Opcode() == nvmeof.OpRetrieve) && id != nvmeof.SGLKeyed && id != nvmeof.SGLLastSegment {
			t.Errorf("SGL %02Xh", id)
		}
		return false
	}
	c := connect(t, f, Options{})
	kv := openKV(t, c)
	mem, content, buf := rdmatest.DMABuf(t, 300000, 4096+12)
	if err := c.RegisterDMABuf(mem, buf); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{1, 100, 4096, bounceSize, 100000} {
		v := random(size)
		copy(content[1000:], v)
		if err := kv.Store(t.Context(), testKey, mem[1000:][:size], StoreAlways); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(value(f), v) {
			t.Fatalf("%d bytes: others were stored", size)
		}
		clear(content)
		if n, err := kv.Retrieve(t.Context(), testKey, mem[150000:][:size]); n != size || err != nil {
			t.Fatal(n, err)
		}
		if !bytes.Equal(content[150000:][:size], v) {
			t.Fatalf("%d bytes: others were read", size)
		}
		// With other memory before and behind it.
		head, tail := make([]byte, size/3), make([]byte, 5)
		clear(content)
		if n, err := kv.RetrievePieces(t.Context(), testKey, [][]byte{head, mem[7:][:size-size/3], tail}); n != size || err != nil {
			t.Fatal(n, err)
		}
		if !bytes.Equal(append(bytes.Clone(head), content[7:][:size-size/3]...), v) {
			t.Fatalf("%d bytes in pieces: others were read", size)
		}
		if err := kv.StorePieces(t.Context(), testKey, [][]byte{tail, mem[7:][:size-size/3]}, StoreAlways); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(value(f), append(bytes.Clone(tail), v[size/3:]...)) {
			t.Fatalf("%d bytes in pieces: others were stored", size)
		}
	}
	if err := c.RegisterDMABuf(mem[:4096], rdma.DMABuf{FD: -1, Offset: buf.Offset}); err == nil || errors.Is(err, ErrDeviceMemory) {
		t.Error(err)
	}
	c.Unregister(mem)
	far.NoDMABuf = true
	if err := c.RegisterDMABuf(mem, buf); !errors.Is(err, ErrDeviceMemory) || !errors.Is(err, rdma.ErrNoDMABuf) {
		t.Error(err)
	}
	far.NoDMABuf = false
	if err := c.RegisterDMABuf(mem[:8192], buf); err != nil {
		t.Fatal(err)
	}
	if err := kv.Store(t.Context(), testKey, mem[8000:9000], StoreAlways); !errors.Is(err, ErrDeviceMemory) {
		t.Error("half of the memory is not registered:", err)
	}
}

// TestDMABufReconnect finds the memory registered when the connection has come back; TCP never takes it.
func TestDMABufReconnect(t *testing.T) {
	f, far := newFakeRDMA(t, rdmatest.DefaultCaps())
	c := connect(t, f, Options{Reconnect: time.Minute})
	kv := openKV(t, c)
	mem, content, buf := rdmatest.DMABuf(t, 8192, 0)
	if err := c.RegisterDMABuf(mem, buf); err != nil {
		t.Fatal(err)
	}
	before := far.Registrations
	f.dropAll()
	copy(content, "device")
	if err := kv.Store(t.Context(), testKey, mem[:6], StoreAlways); err != nil || string(value(f)) != "device" {
		t.Error(err)
	}
	if far.Registrations == before {
		t.Error("the connection did not come back")
	}
	tcp := connect(t, newFake(t), Options{})
	if err := tcp.RegisterDMABuf(mem, buf); !errors.Is(err, ErrDeviceMemory) {
		t.Error(err)
	}
}

// value is what the fake has under testKey.
func value(f *fake) []byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.kv[string(testKey)]
}
