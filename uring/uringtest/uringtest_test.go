package uringtest

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/kvof/kvof/uring"
)

func TestFaults(t *testing.T) {
	broken := errors.New("broken")
	held := make(chan struct{})
	flip := func(b []byte) { b[1] ^= 0xFF }
	for _, c := range []struct {
		name    string
		kind    uring.OpKind
		fault   Fault
		err     error
		device  string // what the device then has
		reading string // what a read got
	}{
		{"no fault, write", uring.OpWrite, Fault{}, nil, "NEW!", ""},
		{"no fault, read", uring.OpRead, Fault{}, nil, "old.", "old."},
		{"write fails", uring.OpWrite, Fault{Err: broken}, broken, "old.", ""},
		{"read fails", uring.OpRead, Fault{Err: broken}, broken, "old.", "NEW!"},
		{"flush fails", uring.OpFlush, Fault{Err: broken}, broken, "old.", ""},
		{"write torn", uring.OpWrite, Fault{Torn: true, Keep: 2, Err: broken}, broken, "NEd.", ""},
		{"write torn and reported well", uring.OpWrite, Fault{Torn: true, Keep: 2}, nil, "NEd.", ""},
		{"write lost", uring.OpWrite, Fault{Torn: true}, nil, "old.", ""},
		{"write corrupted", uring.OpWrite, Fault{Corrupt: flip}, nil, "N\xbaW!", ""},
		{"read corrupted", uring.OpRead, Fault{Corrupt: flip}, nil, "old.", "o\x93d."},
		{"held", uring.OpWrite, Fault{Hold: held}, nil, "NEW!", ""},
		{"late", uring.OpWrite, Fault{Delay: 20 * time.Millisecond}, nil, "NEW!", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			mem, err := uring.NewMemory(4096)
			if err != nil {
				t.Fatal(err)
			}
			copy(mem.View(0, 4), "old.")
			d := Wrap(mem, func(o *uring.Op) Fault {
				if o.Kind != c.kind {
					t.Errorf("hook saw a %v", o.Kind)
				}
				return c.fault
			})
			if d.View(0, 4) != nil {
				t.Error("a way around the hook")
			}
			data := []byte("NEW!")
			o := uring.Op{Kind: c.kind, Data: data}
			start := time.Now()
			o.Start(d)
			if c.fault.Hold != nil {
				if string(mem.View(0, 4)) != "old." {
					t.Error("a held write has started")
				}
				close(held)
			}
			if err := o.Wait(); !errors.Is(err, c.err) {
				t.Errorf("result %v", err)
			}
			if time.Since(start) < c.fault.Delay {
				t.Error("came early")
			}
			if got := mem.View(0, 4); string(got) != c.device {
				t.Errorf("device has %q, want %q", got, c.device)
			}
			if c.kind == uring.OpRead && string(data) != c.reading {
				t.Errorf("read %q, want %q", data, c.reading)
			}
			if c.kind == uring.OpWrite && !bytes.Equal(data, []byte("NEW!")) {
				t.Error("the writer's memory changed")
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}
