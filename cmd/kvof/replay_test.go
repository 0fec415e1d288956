package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvof/kvof/uring"
)

func TestReadTrace(t *testing.T) {
	for _, c := range []struct {
		name, in string
		limit    int
		want     trace
		err      string
	}{
		{"two requests", `{"timestamp": 0, "input_length": 1030, "output_length": 5, "hash_ids": [0, 1, 2]}` + "\n\n" + `{"hash_ids":[0,3]}`, 0, trace{[][]uint64{{0, 1, 2}, {0, 3}}, 5, 4}, ""},
		{"limit", `{"hash_ids":[7]}` + "\n" + `{"hash_ids":[8]}`, 1, trace{[][]uint64{{7}}, 1, 1}, ""},
		{"a request for nothing", `{"hash_ids":[]}` + "\n" + `{"hash_ids":[8]}`, 0, trace{[][]uint64{{}, {8}}, 1, 1}, ""},
		{"empty", "\n", 0, trace{}, "it asks for no blocks"},
		{"another format", `{"hash_ids":[7]}` + "\n" + `{"blocks":[7]}`, 0, trace{}, "line 2 has no hash_ids"},
		{"not JSON", "hash_ids\n", 0, trace{}, "line 1: "},
		{"a negative id", `{"hash_ids":[-1]}`, 0, trace{}, "line 1: "},
		{"a line too long", `{"hash_ids":[` + strings.Repeat(" ", maxTraceLine), 0, trace{}, "too long"},
	} {
		got, err := readTrace(strings.NewReader(c.in), c.limit)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%s: %v, want %s", c.name, err, c.err)
			}
		} else if err != nil {
			t.Errorf("%s: %v", c.name, err)
		} else if d := cmp.Diff(&c.want, got, cmp.AllowUnexported(trace{})); d != "" {
			t.Errorf("%s: %s", c.name, d)
		}
	}
}

func FuzzReadTrace(f *testing.F) {
	f.Add([]byte(`{"timestamp": 0, "hash_ids": [0, 1, 2]}` + "\n" + `{"hash_ids":[0,3]}`))
	f.Add([]byte(`{"hash_ids":[18446744073709551615]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		tr, err := readTrace(bytes.NewReader(b), 0)
		if err != nil {
			return
		}
		n := 0
		for _, r := range tr.requests {
			n += len(r)
		}
		if n != tr.blocks || tr.unique < 1 || tr.unique > n {
			t.Fatalf("%d blocks of %d, %d unique", tr.blocks, n, tr.unique)
		}
	})
}

func TestTally(t *testing.T) {
	var s tally
	s.count([]bool{true, true, false, true})
	s.count(nil)
	s.count([]bool{false, true})
	s.count([]bool{true})
	if want := (tally{blocks: 7, hits: 5, prefix: 3}); s != want {
		t.Errorf("%+v, want %+v", s, want)
	}
}

func TestCapacityFlag(t *testing.T) {
	for in, want := range map[string]string{"5%": "5%", "0.5%": "0.5%", "20GiB": "20GiB", "0%": "", "-1%": "", "NaN%": "", "x%": "", "0": "", "much": ""} {
		var c capacityFlag
		if err := c.Set(in); (err == nil) != (want != "") || err == nil && c.String() != want {
			t.Errorf("%s: %v, %v", in, &c, err)
		}
	}
}

// replayed runs kvof replay.
func replayed(t *testing.T, args ...string) (out replayJSON) {
	t.Helper()
	status, stdout, stderr := runForTest(t, append([]string{"replay", "--json"}, args...)...)
	if status != exitOK {
		t.Fatalf("exit status %d: %s", status, stderr)
	}
	if err := json.Unmarshal([]byte(stdout), &out); err != nil {
		t.Fatal(err)
	}
	return out
}

// conversations writes a trace of turns: each repeats the blocks of the turn before, and adds some.
func conversations(t *testing.T) (path string) {
	rnd := rand.New(rand.NewPCG(1, 2))
	var b bytes.Buffer
	var turns [400][]uint64
	next := uint64(0)
	for range 1500 {
		c := &turns[min(rnd.IntN(len(turns)), rnd.IntN(len(turns)))]
		for range 1 + rnd.IntN(4) {
			*c = append(*c, next)
			next++
		}
		fmt.Fprintf(&b, "{\"timestamp\": 0, \"hash_ids\": %s}\n", strings.ReplaceAll(fmt.Sprint(*c), " ", ","))
	}
	path = filepath.Join(t.TempDir(), "trace.jsonl")
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestReplay(t *testing.T) {
	path := conversations(t)
	all := replayed(t, path, "--capacity", "200%", "--value-size", "16KiB")
	if all.HitRatio != all.Ceiling || all.PrefixHitRatio != all.Ceiling || all.Stored != all.Unique || all.Refused != 0 || all.Ceiling < 0.5 {
		t.Errorf("with room for all: %+v", all)
	}
	if all.WriteAmplification < 1 || all.WriteAmplification > 1.6 { // 4 KiB of header, and summaries
		t.Errorf("write amplification %v", all.WriteAmplification)
	}
	if all.Retrieve.Count != int64(all.Hits) || all.Store.Count != int64(all.Stored) {
		t.Errorf("%d hits and %d stores were timed of %d and %d", all.Retrieve.Count, all.Store.Count, all.Hits, all.Stored)
	}
	for _, mode := range evictions() {
		small := replayed(t, path, "--capacity", "10%", "--value-size", "16KiB", "--eviction", mode)
		part := small.Kept / float64(small.Unique)
		if small.HitRatio >= all.HitRatio || small.HitRatio == 0 || small.PrefixHitRatio > small.HitRatio || part > 0.3 || part < 0.05 {
			t.Errorf("%s, with room for a tenth: %+v", mode, small)
		}
		if (small.Refused > 0) != (mode == "never") || (small.NotAdmitted > 0) != (mode == "second-touch") {
			t.Errorf("%s: %d refused, %d not admitted", mode, small.Refused, small.NotAdmitted)
		}
		if small.Stored+small.Hits+small.Refused != small.Blocks {
			t.Errorf("%s: %d stored, %d hits and %d refused are not %d", mode, small.Stored, small.Hits, small.Refused, small.Blocks)
		}
	}
}

func TestReplayUsage(t *testing.T) {
	for _, args := range [][]string{{}, {"a", "b"}, {"--eviction", "lru", "x"}, {"--value-size", "1", "x"}, {"--depth", "0", "x"}} {
		if status, _, stderr := runForTest(t, append([]string{"replay"}, args...)...); status != exitUsage {
			t.Errorf("%v: exit status %d: %s", args, status, stderr)
		}
	}
}

func TestShare(t *testing.T) {
	for _, workers := range []int{1, 3, 9} {
		done := make([]int, 7)
		if err := share(workers, len(done), func(_, i int) error { done[i]++; return nil }); err != nil {
			t.Error(err)
		}
		if fmt.Sprint(done) != "[1 1 1 1 1 1 1]" {
			t.Error(done)
		}
		broken := errors.New("broken")
		if err := share(workers, 1000, func(_, i int) error {
			if i == 3 {
				return broken
			}
			return nil
		}); !errors.Is(err, broken) {
			t.Error(err)
		}
	}
}

func TestSimulated(t *testing.T) {
	d := newSimulated(1 << 40)
	do := func(kind uring.OpKind, off int64, b []byte) error {
		return (&uring.Op{Kind: kind, Off: off, Data: b, Len: int64(len(b))}).Do(d)
	}
	b := make([]byte, 3*simulatedBlock)
	b[0], b[2*simulatedBlock+5] = 1, 2
	if err := do(uring.OpWrite, 1<<39, b); err != nil || len(d.blocks) != 2 {
		t.Fatal(err, len(d.blocks))
	}
	got := bytes.Repeat([]byte{9}, len(b))
	if err := do(uring.OpRead, 1<<39, got); err != nil || !bytes.Equal(got, b) {
		t.Fatal(err)
	}
	if err := do(uring.OpWrite, 1<<39, make([]byte, simulatedBlock)); err != nil || len(d.blocks) != 1 {
		t.Fatal(err, len(d.blocks))
	}
	if err := do(uring.OpDiscard, 1<<39, b); err != nil || len(d.blocks) != 0 {
		t.Fatal(err, len(d.blocks))
	}
	for _, off := range []int64{-simulatedBlock, 512, 1 << 40} {
		if err := do(uring.OpWrite, off, b); !errors.Is(err, uring.ErrInvalid) {
			t.Errorf("at %d: %v", off, err)
		}
	}
	if n := d.written.Load(); n != 4*simulatedBlock {
		t.Errorf("%d bytes written", n)
	}
	d.Close()
	if err := do(uring.OpFlush, 0, nil); !errors.Is(err, uring.ErrClosed) {
		t.Error(err)
	}
}
