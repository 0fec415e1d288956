package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/kvof/kvof/nvmeof"
)

// withExistMany makes a fake serve Exist Many, and counts its commands and the single Exists.
func withExistMany(f *fake, log ...nvmeof.VendorCommand) (many, single *atomic.Int32) {
	many, single = new(atomic.Int32), new(atomic.Int32)
	f.intercept = func(c *fakeConn, cmd *nvmeof.Command) bool {
		switch {
		case c.qid == 0 && cmd.Opcode() == nvmeof.OpGetLogPage && cmd.LID() == nvmeof.LogVendor:
			if log == nil {
				c.reply(cmd.CID(), 0, 0, nvmeof.InvalidLogPage|nvmeof.DNR)
				return true
			}
			b := make([]byte, nvmeof.VendorLogSize)
			nvmeof.EncodeVendorLog(b, log...)
			c.read(cmd.CID(), b, 0, true)
			return true
		case c.qid != 0 && cmd.Opcode() == nvmeof.OpExist:
			single.Add(1)
		case c.qid != 0 && cmd.Opcode() == nvmeof.OpExistMany:
			many.Add(1)
		}
		return false
	}
	return many, single
}

func TestExistMany(t *testing.T) {
	there := nvmeof.VendorCommand{Opcode: nvmeof.OpExistMany, CSI: nvmeof.CSIKV, Version: 1, Limit: nvmeof.MaxExistMany}
	newer, few, other := there, there, there
	newer.Version, newer.Limit, few.Limit, other.CSI = 2, 4096, 8, nvmeof.CSINVM
	for _, x := range []struct {
		name   string
		log    []nvmeof.VendorCommand
		refuse bool // the command, in spite of the log
		many   bool
	}{
		{"no log", nil, false, false},
		{"advertised", []nvmeof.VendorCommand{{Opcode: 0xC1}, there}, false, true},
		{"newer", []nvmeof.VendorCommand{newer}, false, true},
		{"too few keys", []nvmeof.VendorCommand{few}, false, false},
		{"another command set", []nvmeof.VendorCommand{other}, false, false},
		{"gone", []nvmeof.VendorCommand{there}, true, false},
	} {
		t.Run(x.name, func(t *testing.T) {
			f := newFake(t)
			f.noExistMany = x.refuse
			many, single := withExistMany(f, x.log...)
			kv := openKV(t, connect(t, f, Options{IOQueues: 2}))
			var keys [][]byte
			holes := []int{700, 701, 999}
			f.mu.Lock()
			for i := range 1000 {
				keys = append(keys, fmt.Appendf(nil, "k%d", i))
				if !slices.Contains(holes, i) {
					f.kv[string(keys[i])] = nil
				}
			}
			f.mu.Unlock()
			for _, n := range []int{0, 1, 63, 64, 65, 128, 700, 701, 1000} {
				if run, err := kv.ExistPrefix(t.Context(), keys[:n]); err != nil || run != min(n, 700) {
					t.Fatalf("run of %d: %d, %v", n, run, err)
				}
			}
			if run, err := kv.ExistPrefix(t.Context(), keys[700:]); err != nil || run != 0 {
				t.Fatalf("run after a miss: %d, %v", run, err)
			}
			found := make([]bool, len(keys))
			if err := kv.ExistMany(t.Context(), keys, found); err != nil {
				t.Fatal(err)
			}
			for i, ok := range found {
				if ok == slices.Contains(holes, i) {
					t.Errorf("key %d: %v", i, ok)
				}
			}
			if x.many && (many.Load() == 0 || single.Load() != 0) || !x.many && single.Load() == 0 || !x.many && !x.refuse && many.Load() > 0 {
				t.Errorf("%d Exist Many, %d Exist", many.Load(), single.Load())
			}
			keys[3] = make([]byte, 17)
			if _, err := kv.ExistPrefix(t.Context(), keys); !errors.Is(err, nvmeof.InvalidKeySize) {
				t.Errorf("a key of 17 bytes: %v", err)
			}
			f.dropAll()
			if _, err := kv.ExistPrefix(t.Context(), keys[4:]); !errors.Is(err, ErrConnectionLost) {
				t.Errorf("without a connection: %v", err)
			}
		})
	}
}

// TestStorePieces moves values in pieces, and as one, in all ways that data can travel.
func TestStorePieces(t *testing.T) {
	eachWay(t, func(t *testing.T, f *fake, o Options) {
		kv := openKV(t, connect(t, f, o))
		for _, sizes := range [][]int{{}, {0, 1, 0}, {3, 5}, {64 << 10, 64}, {1, 100_001, 7, 64}, {100_000, 3}, slices.Repeat([]int{33}, 300), slices.Repeat([]int{5, 4097}, 200)} {
			var in, out [][]byte
			for i, n := range sizes {
				in, out = append(in, random(n + i)[i:]), append(out, make([]byte, n))
			}
			want := bytes.Join(in, nil)
			if err := kv.StorePieces(t.Context(), []byte("k"), in, 0); err != nil {
				t.Fatal(err)
			}
			whole := make([]byte, len(want)+1)
			if n, err := kv.Retrieve(t.Context(), []byte("k"), whole); err != nil || n != len(want) || !bytes.Equal(whole[:n], want) {
				t.Fatalf("%v: stored in pieces, retrieved as one: %d, %v", sizes, n, err)
			}
			if n, err := kv.RetrievePieces(t.Context(), []byte("k"), out); err != nil || n != len(want) || !bytes.Equal(bytes.Join(out, nil), want) {
				t.Fatalf("%v: retrieved in pieces: %d, %v", sizes, n, err)
			}
			tail := make([]byte, 64) // a value that ends before the pieces do
			if n, err := kv.RetrievePieces(t.Context(), []byte("k"), append(out[:len(out):len(out)], tail)); err != nil || n != len(want) {
				t.Fatalf("%v: retrieved into more: %d, %v", sizes, n, err)
			}
			if len(out) > 0 {
				clear(out[0])
				if n, err := kv.RetrievePieces(t.Context(), []byte("k"), out[:1]); err != nil || n != len(want) || !bytes.Equal(out[0], in[0]) {
					t.Fatalf("%v: retrieved into less: %d, %v", sizes, n, err)
				}
			}
		}
		if _, err := kv.RetrievePieces(t.Context(), []byte("absent"), [][]byte{make([]byte, 8)}); !errors.Is(err, nvmeof.KeyDoesNotExist) {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := kv.RetrievePieces(ctx, []byte("k"), [][]byte{make([]byte, 8)}); !errors.Is(err, context.Canceled) && err != nil {
			t.Fatal(err)
		}
	})
}

// onePiece is a path that cannot gather.
type onePiece struct{ path }

func TestPiecesCopied(t *testing.T) {
	f := newFake(t)
	kv := openKV(t, connect(t, f, Options{}))
	kv.path = onePiece{kv.path}
	in, out := [][]byte{random(5000), random(3)}, [][]byte{make([]byte, 2), make([]byte, 5001)}
	if err := kv.StorePieces(t.Context(), []byte("k"), in, StoreIfAbsent); err != nil {
		t.Fatal(err)
	}
	if n, err := kv.RetrievePieces(t.Context(), []byte("k"), out); err != nil || n != 5003 || !bytes.Equal(bytes.Join(in, nil), bytes.Join(out, nil)) {
		t.Fatal(n, err)
	}
}
