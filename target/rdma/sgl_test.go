package rdma

import (
	"testing"

	"github.com/kvof/kvof/nvmeof"
)

// command is a command with an SGL descriptor.
func command(op uint8, s nvmeof.SGL) *nvmeof.Command {
	c := new(nvmeof.Command)
	c.SetHeader(op, 1, 1)
	c.SetSGL(s)
	return c
}

func list(ds ...nvmeof.SGL) (b []byte) {
	for i := range ds {
		b = append(b, ds[i][:]...)
	}
	return b
}

func TestSGL(t *testing.T) {
	keyed := func(addr uint64, n uint32) nvmeof.SGL { return nvmeof.MakeKeyedSGL(nvmeof.SGLKeyed, addr, n, 0xA0) }
	many := make([]nvmeof.SGL, maxDescriptors+1)
	for i := range many {
		many[i] = keyed(uint64(i)<<32, nvmeof.MaxKeyedLength)
	}
	dnr := nvmeof.DNR
	for _, c := range []struct {
		name        string
		op          uint8
		sgl         nvmeof.SGL
		data        []byte
		length      uint32
		inline      int
		st          nvmeof.Status
		descriptors int
	}{
		{name: "zero", op: nvmeof.OpFlush},
		{name: "keyed, no data", op: nvmeof.OpFlush, sgl: keyed(0, 0)},
		{name: "keyed", op: nvmeof.OpRead, sgl: keyed(4096, 8192), length: 8192, descriptors: 1},
		{name: "keyed, longest", op: nvmeof.OpRead, sgl: keyed(1<<63, nvmeof.MaxKeyedLength), length: nvmeof.MaxKeyedLength, descriptors: 1},
		{name: "keyed, up to the end", op: nvmeof.OpRead, sgl: keyed(1<<64-4096, 4095), length: 4095, descriptors: 1},
		{name: "keyed, past the end", op: nvmeof.OpRead, sgl: keyed(1<<64-4096, 4097), st: nvmeof.SGLOffsetInvalid | dnr},
		{name: "in the capsule", op: nvmeof.OpWrite, sgl: nvmeof.MakeSGL(nvmeof.SGLOffset, 0, 4096), data: make([]byte, 4096), length: 4096, inline: 4096},
		{name: "in the capsule, a part", op: nvmeof.OpWrite, sgl: nvmeof.MakeSGL(nvmeof.SGLOffset, 96, 4000), data: make([]byte, 4096), length: 4000, inline: 4000},
		{name: "in the capsule, none", op: nvmeof.OpWrite, sgl: nvmeof.MakeSGL(nvmeof.SGLOffset, 0, 0)},
		{name: "in the capsule, too long", op: nvmeof.OpWrite, sgl: nvmeof.MakeSGL(nvmeof.SGLOffset, 1, 4096), data: make([]byte, 4096), st: nvmeof.DataSGLLength | dnr},
		{name: "in the capsule, far off", op: nvmeof.OpWrite, sgl: nvmeof.MakeSGL(nvmeof.SGLOffset, 1<<64-1, 4096), data: make([]byte, 4096), st: nvmeof.SGLOffsetInvalid | dnr},
		{name: "in the capsule, the wrong way", op: nvmeof.OpRead, sgl: nvmeof.MakeSGL(nvmeof.SGLOffset, 0, 4096), data: make([]byte, 4096), st: nvmeof.InvalidField | dnr},
		{name: "list", op: nvmeof.OpRead, sgl: nvmeof.MakeSGL(nvmeof.SGLLastSegment, 0, 48), data: list(keyed(0, 5), keyed(99, 0), keyed(64, 7)), length: 12, descriptors: 2},
		{name: "list, behind other things", op: nvmeof.OpRead, sgl: nvmeof.MakeSGL(nvmeof.SGLLastSegment, 16, 16), data: list(nvmeof.SGL{}, keyed(64, 7)), length: 7, descriptors: 1},
		{name: "list, the longest", op: nvmeof.OpRead, sgl: nvmeof.MakeSGL(nvmeof.SGLLastSegment, 0, 16*maxDescriptors), data: list(many[1:]...),
			length: maxDescriptors * nvmeof.MaxKeyedLength, descriptors: maxDescriptors},
		{name: "list, too many", op: nvmeof.OpRead, sgl: nvmeof.MakeSGL(nvmeof.SGLLastSegment, 0, 16*(maxDescriptors+1)), data: list(many...), st: nvmeof.InvalidSGLCount | dnr},
		{name: "list, not there", op: nvmeof.OpRead, sgl: nvmeof.MakeSGL(nvmeof.SGLLastSegment, 0, 32), data: list(keyed(0, 5)), st: nvmeof.InvalidSegment | dnr},
		{name: "list, empty", op: nvmeof.OpRead, sgl: nvmeof.MakeSGL(nvmeof.SGLLastSegment, 0, 0), st: nvmeof.InvalidSegment | dnr},
		{name: "list, odd", op: nvmeof.OpRead, sgl: nvmeof.MakeSGL(nvmeof.SGLLastSegment, 0, 17), data: make([]byte, 64), st: nvmeof.InvalidSegment | dnr},
		{name: "list, far off", op: nvmeof.OpRead, sgl: nvmeof.MakeSGL(nvmeof.SGLLastSegment, 1<<40, 16), data: make([]byte, 64), st: nvmeof.SGLOffsetInvalid | dnr},
		{name: "list of others", op: nvmeof.OpRead, sgl: nvmeof.MakeSGL(nvmeof.SGLLastSegment, 0, 16), data: make([]byte, 64), st: nvmeof.SGLTypeInvalid | dnr},
		{name: "list with a bad one", op: nvmeof.OpRead, sgl: nvmeof.MakeSGL(nvmeof.SGLLastSegment, 0, 32), data: list(keyed(0, 5), keyed(1<<64-1, 5)), st: nvmeof.SGLOffsetInvalid | dnr},
		{name: "of another type", op: nvmeof.OpRead, sgl: nvmeof.MakeSGL(0x00, 0, 4096), st: nvmeof.SGLTypeInvalid | dnr},
		{name: "of TCP", op: nvmeof.OpRead, sgl: nvmeof.MakeSGL(nvmeof.SGLTransport, 0, 4096), st: nvmeof.SGLTypeInvalid | dnr},
	} {
		var s sgl
		length, inline, st := s.parse(command(c.op, c.sgl), c.data)
		if length != c.length || len(inline) != c.inline || st != c.st || st == nvmeof.Success && s.n != c.descriptors {
			t.Errorf("%s: %d bytes, %d in the capsule, %v, %d descriptors", c.name, length, len(inline), st, s.n)
		}
	}
}

// TestSGLNext walks over descriptors.
func TestSGLNext(t *testing.T) {
	var s sgl
	ds := list(nvmeof.MakeKeyedSGL(nvmeof.SGLKeyedInvalidate, 100, 10, 1), nvmeof.MakeKeyedSGL(nvmeof.SGLKeyed, 500, 5, 2))
	if n, _, st := s.parse(command(nvmeof.OpRead, nvmeof.MakeSGL(nvmeof.SGLLastSegment, 0, 32)), ds); n != 15 || st != nvmeof.Success {
		t.Fatal(n, st)
	}
	if !s.invalidate || s.key != 1 {
		t.Errorf("invalidate %v, key %d", s.invalidate, s.key)
	}
	for _, c := range []struct {
		most         uint64
		addr         uint64
		key, n, room uint32
	}{{4, 100, 1, 4, 6}, {1, 104, 1, 1, 5}, {100, 105, 1, 5, 0}, {100, 500, 2, 5, 0}, {100, 0, 0, 0, 0}} {
		addr, key, n := s.next(c.most)
		if room := s.room(); addr != c.addr || key != c.key || n != c.n || room != c.room {
			t.Errorf("next(%d) = %d, %d, %d, then room for %d", c.most, addr, key, n, room)
		}
	}
	if s.parse(command(nvmeof.OpFlush, nvmeof.SGL{}), nil); s.invalidate {
		t.Error("the next command's response invalidates too")
	}
}

func FuzzSGL(f *testing.F) {
	f.Add(uint8(nvmeof.OpRead), list(nvmeof.MakeSGL(nvmeof.SGLLastSegment, 0, 32)), list(nvmeof.MakeKeyedSGL(nvmeof.SGLKeyed, 1, 2, 3), nvmeof.MakeKeyedSGL(nvmeof.SGLKeyed, 4, 5, 6)))
	f.Add(uint8(nvmeof.OpWrite), list(nvmeof.MakeSGL(nvmeof.SGLOffset, 8, 8)), make([]byte, 16))
	f.Add(uint8(nvmeof.OpWrite), list(nvmeof.MakeKeyedSGL(nvmeof.SGLKeyedInvalidate, 1<<63, 1<<20, 3)), []byte(nil))
	f.Fuzz(func(t *testing.T, op uint8, d, data []byte) {
		if len(d) < nvmeof.SGLSize {
			return
		}
		var s sgl
		length, inline, st := s.parse(command(op, nvmeof.SGL(d)), data)
		if st != nvmeof.Success {
			return
		}
		if len(inline) > len(data) || len(inline) > 0 && uint32(len(inline)) != length {
			t.Fatalf("%d bytes in the capsule, length %d", len(inline), length)
		}
		var sum uint64
		for {
			addr, _, n := s.next(1 << 20)
			if n == 0 {
				break
			}
			if addr+uint64(n) < addr {
				t.Fatalf("%d bytes at %#x", n, addr)
			}
			sum += uint64(n)
		}
		if s.n > 0 && sum != uint64(length) {
			t.Fatalf("descriptors of %d bytes, length %d", sum, length)
		}
	})
}
