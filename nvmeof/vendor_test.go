package nvmeof

import (
	"bytes"
	"slices"
	"testing"
)

func TestVendorLog(t *testing.T) {
	want := []VendorCommand{{Opcode: OpExistMany, CSI: CSIKV, Version: 1, Limit: MaxExistMany}, {Opcode: 0xC1, Version: 2}}
	b := bytes.Repeat([]byte{0xFF}, VendorLogSize)
	EncodeVendorLog(b, want...)
	if got, err := DecodeVendorLog(b); err != nil || !slices.Equal(got, want) {
		t.Fatalf("%+v, %v; want %+v", got, err, want)
	}
	for name, spoil := range map[string]func(b []byte) []byte{
		"short":         func(b []byte) []byte { return b[:VendorLogSize-1] },
		"other vendor":  func(b []byte) []byte { b[3]++; return b },
		"zeroes":        func(b []byte) []byte { return make([]byte, VendorLogSize) },
		"no version":    func(b []byte) []byte { b[16] = 0; return b },
		"many commands": func(b []byte) []byte { b[18] = maxVendorEntries + 1; return b },
	} {
		if got, err := DecodeVendorLog(spoil(bytes.Clone(b))); err == nil {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

func TestExistMany(t *testing.T) {
	c := MakeExistMany(7, 1284)
	if c.Opcode() != OpExistMany || c.Direction() != HostToController || c.NSID() != 7 || c.KVSize() != MaxExistManySize {
		t.Fatalf("% x", c)
	}
	for _, x := range []struct {
		found Found
		run   int
	}{{0, 0}, {1, 1}, {0b1011, 2}, {0xFFFFFFFF, 32}, {0x1FFFFFFFF, 33}, {^Found(0) &^ 1, 0}, {^Found(0), 64}} {
		cqe := MakeCompletion(uint32(x.found), uint32(x.found>>32), 0, 1, 2, Success)
		if got := cqe.Found(); got != x.found || got.Run() != x.run {
			t.Errorf("%x: %x, run %d, want %d", x.found, got, got.Run(), x.run)
		}
	}
}

func TestRetrieveRange(t *testing.T) {
	var c Command
	c.SetHeader(OpRetrieve, 3, 7)
	c.SetKey([]byte("0123456789abcdef"))
	c.SetKV(4096, 0)
	retrieve := c
	c.SetRange(0x89abcdec, 0x12345678)
	if offset, tag := c.Range(); offset != 0x89abcdec || tag != 0x12345678 || c.Direction() != ControllerToHost {
		t.Fatalf("%x, %x", offset, tag)
	}
	want := retrieve
	want[0] = 0xA2
	copy(want[48:], "\xec\xcd\xab\x89\x78\x56\x34\x12")
	if c != want {
		t.Fatalf("% x\nwant % x", c, want)
	}
}

func FuzzVendorLog(f *testing.F) {
	b := make([]byte, VendorLogSize)
	EncodeVendorLog(b)
	f.Add(b)
	EncodeVendorLog(b, VendorCommand{OpExistMany, CSIKV, 1, 64})
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		commands, err := DecodeVendorLog(b)
		if err != nil {
			return
		}
		again := make([]byte, VendorLogSize)
		EncodeVendorLog(again, commands...)
		if got, err := DecodeVendorLog(again); err != nil || !slices.Equal(got, commands) {
			t.Fatalf("%+v, %v; want %+v", got, err, commands)
		}
	})
}
