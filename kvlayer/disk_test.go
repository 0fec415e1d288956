package kvlayer

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/kvof/kvof/uring"
	"github.com/kvof/kvof/uring/uringtest"
)

// disk is a device over memory that tests can look at, damage, and let fail. Its ops are carried out as uringtest does.
type disk struct {
	*uringtest.Device
	mu     sync.Mutex
	mem    []byte
	fail   func(*uring.Op) error
	jitter bool // complete out of order
}

// platter is what lies below uringtest's device.
type platter disk

func newDisk(size int64) *disk {
	d := &disk{mem: make([]byte, size)}
	d.Device = uringtest.Wrap((*platter)(d), d.fault)
	return d
}

func (d *disk) fault(o *uring.Op) (f uringtest.Fault) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fail != nil {
		f.Err = d.fail(o)
	}
	if d.jitter {
		f.Late = rand.IntN(3)
	}
	return f
}

func (p *platter) Submit(ops ...*uring.Op) {
	for _, o := range ops {
		o.Begin()
		o.Complete(p.do(o))
	}
}

func (p *platter) do(o *uring.Op) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case o.Kind == uring.OpFlush:
	case o.Off+int64(len(o.Data)) > int64(len(p.mem)):
		return uring.ErrInvalid
	case o.Kind == uring.OpRead:
		copy(o.Data, p.mem[o.Off:])
	case o.Kind == uring.OpWrite:
		copy(p.mem[o.Off:], o.Data)
	}
	return nil
}

func (p *platter) View(off, n int64) []byte { return nil }
func (p *platter) Size() int64              { return int64(len(p.mem)) }
func (p *platter) BlockSize() int           { return block }
func (p *platter) Info() uring.DeviceInfo   { return uring.DeviceInfo{Kind: "test"} }
func (p *platter) Close() error             { return nil }

func (d *disk) clone(from, to int64) []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return bytes.Clone(d.mem[from:to])
}

// failing has ops fail as f says.
func (d *disk) failing(f func(*uring.Op) error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fail = f
}

func TestMain(m *testing.M) {
	waitForSpace = 20 * time.Millisecond // tests hold space of their own doing
	maxWait = 200 * time.Millisecond     // and end devices on which nothing will ever be reclaimed
	os.Exit(m.Run())
}

// never is the policy of a store that loses nothing.
var never = Options{Eviction: EvictNever, Strict: true}

func newArena(t testing.TB) *uring.Arena {
	t.Helper()
	return uringtest.NewArena(t, 16<<20)
}

// devices runs f on each kind of device.
func devices(t *testing.T, size int64, f func(t *testing.T, dev uring.Device, a *uring.Arena)) {
	t.Run("memory", func(t *testing.T) {
		dev, err := uring.NewMemory(size)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { dev.Close() })
		f(t, dev, newArena(t))
	})
	t.Run("disk", func(t *testing.T) {
		d := newDisk(size)
		d.jitter = true
		f(t, d, newArena(t))
	})
	t.Run("file", func(t *testing.T) {
		a := newArena(t)
		f(t, newFile(t, size, a), a)
	})
}

func newFile(t testing.TB, size int64, a *uring.Arena) uring.Device {
	t.Helper()
	dev, err := uring.OpenFile(filepath.Join(t.TempDir(), "dev"), uring.FileOptions{Size: size, Arena: a})
	if errors.Is(err, uring.ErrUnavailable) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close() })
	return dev
}

func open(t testing.TB, dev uring.Device, a *uring.Arena, o Options) *Store {
	t.Helper()
	s, err := Open(dev, a, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func key(n int) Key {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], uint64(n))
	k, err := MakeKey(b[:])
	if err != nil {
		panic(err)
	}
	return k
}

// fill makes b the bytes of value number n.
func fill(b []byte, n uint64) {
	r := rand.New(rand.NewPCG(n, 1))
	for i := 0; i+8 <= len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], r.Uint64())
	}
	for i := len(b) &^ 7; i < len(b); i++ {
		b[i] = byte(n) + byte(i)
	}
}

func value(n uint64, size int) []byte {
	b := make([]byte, size)
	fill(b, n)
	return b
}

// send moves v through w in chunks of odd sizes.
func send(w *Writer, v []byte) {
	for step := 70001; len(v) > 0; {
		b := w.Buffer(step)
		n := copy(b, v)
		w.Filled(n)
		v = v[n:]
	}
}

func put(s *Store, k Key, v []byte, m Mode) error {
	var w Writer
	if err := s.Create(&w, k, int64(len(v)), m); err != nil {
		return err
	}
	send(&w, v)
	return w.Commit()
}

func get(s *Store, k Key, limit int64) ([]byte, error) {
	var r Reader
	if err := s.Open(&r, k, limit); err != nil {
		return nil, err
	}
	defer r.Close()
	return readAll(&r)
}

func readAll(r *Reader) ([]byte, error) {
	out := []byte{}
	for {
		b, err := r.Next()
		if err == io.EOF {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		out = append(out, b.Data...)
		b.Put()
	}
}

func mustPut(t testing.TB, s *Store, k Key, v []byte) {
	t.Helper()
	if err := put(s, k, v, StoreAlways); err != nil {
		t.Fatal(err)
	}
}

func mustGet(t testing.TB, s *Store, k Key, want []byte) {
	t.Helper()
	got, err := get(s, k, MaxValue)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("key %v: %d bytes that differ from the %d stored", k, len(got), len(want))
	}
}
