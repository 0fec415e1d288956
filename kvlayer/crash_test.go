package kvlayer

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/kvof/kvof/uring"
)

// position returns where k's record lies.
func position(s *Store, k Key) (*segment, int64) {
	e, _ := s.lookup(k, 0)
	return s.p.segmentOf(e.block())
}

// TestLostKills brings back headers whose death a power cut lost: the newest
// value wins.
func TestLostKills(t *testing.T) {
	d, a := newDisk(2*mib), newArena(t)
	s := open(t, d, a, never)
	defer func() { s.Close() }()
	reopen := func() {
		s.Close()
		s = open(t, d, a, never)
	}
	var off [3]int64
	var live [3][]byte
	for i := range off {
		mustPut(t, s, key(1), value(uint64(i), 1000))
		_, off[i] = position(s, key(1))
		live[i] = d.clone(off[i], off[i]+block)
		reopen() // the sequence goes on
		for j := range i {
			copy(d.mem[off[j]:], live[j])
		}
		reopen()
		mustGet(t, s, key(1), value(uint64(i), 1000))
	}
	if _, err := s.Delete(key(1)); err != nil {
		t.Fatal(err)
	}
	reopen()
	if _, ok := s.Exist(key(1)); ok {
		t.Fatal("recovery left an older value to come back")
	}
}

// TestInterruptedReclaim stops after the copies were made, before their source was
// free: the copies that are whole count, what was deleted stays deleted, and what is evicted later stays away.
func TestInterruptedReclaim(t *testing.T) {
	for _, sealed := range []bool{false, true} { // the segment with the copies, as earlier versions did
		t.Run(fmt.Sprintf("sealed %v", sealed), func(t *testing.T) { testInterruptedReclaim(t, sealed) })
	}
}

func testInterruptedReclaim(t *testing.T, sealed bool) {
	d, a := newDisk(4*mib), newArena(t)
	s := open(t, d, a, never)
	size := func(n int) int {
		if n == 1 {
			return 150_000 // two parts
		}
		return 20_000
	}
	n := 0
	for ; put(s, key(n), value(uint64(n), size(n)), StoreAlways) == nil; n++ {
	}
	source, pinned := position(s, key(3))
	for _, e := range s.index.all(nil, key(1)) {
		if g, _ := s.p.segmentOf(e.block()); g != source {
			t.Fatal("the parts lie apart")
		}
	}
	if _, err := s.Delete(key(0)); err != nil {
		t.Fatal(err)
	}
	header := d.clone(source.off, source.off+block)
	mustPut(t, s, key(0), value(0, 20_000)) // cleans the segment
	moved := s.index.all(nil, key(1))
	_, torn := position(s, key(2))
	s.p.mu.Lock()
	if source.state == segmentSealed {
		t.Error("the segment was not cleaned")
	}
	s.p.mu.Unlock()
	if sealed {
		g, _ := s.p.segmentOf(moved[0].block())
		if err := g.seal(new(uring.Op)); err != nil {
			t.Fatal(err)
		}
	}
	mem := d.clone(0, d.Size())
	s.Close()
	d.mem = mem
	copy(d.mem[source.off:], header)
	d.mem[torn+block+5]++
	// Pinned after it was copied.
	at := uint32((pinned - source.off) / block)
	if end := source.off + s.p.super.segSize; !amendIn(d.mem[end-block:end], s.p.super.seed, source.gen, at, func(e []byte) { e[43] = 1 }) {
		t.Fatal("no summary")
	}
	d.mem[pinned+19] = 1
	sealStruct(d.mem[pinned:pinned+recordLen], s.p.super.seed)
	originals := d.clone(source.off, source.off+s.p.super.segSize)
	for i := range 3 {
		if i == 2 {
			copy(d.mem[source.off:], originals) // the power went before they were dead for good
		}
		s = open(t, d, a, never)
		if !slices.Equal(s.index.all(nil, key(1)), moved) {
			t.Fatal("an original counts, not the copy")
		}
		if _, off := position(s, key(2)); off == torn {
			t.Fatal("a copy that is not whole counts")
		}
		if e, _ := s.lookup(key(3), 0); !e.pinned() {
			t.Fatal("a pin is lost")
		}
		for i := range n {
			mustGet(t, s, key(i), value(uint64(i), size(i)))
		}
		s.Close()
		lives := map[string]bool{}
		if _, err := Inspect(d, false, func(g InspectedSegment) error {
			for _, r := range g.List {
				part := fmt.Sprint(r.Key, " ", r.Part)
				if lives[part] || r.From == source.gen {
					t.Errorf("%s has two records, or a copy that may come to count", part)
				}
				lives[part] = true
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	s = open(t, d, a, Options{Eviction: EvictFIFO})
	for i := n; s.Size(key(1)) > 0; i++ {
		mustPut(t, s, key(i), value(1, 20_000))
	}
	s.Close()
	s = open(t, d, a, never)
	if _, ok := s.Exist(key(1)); ok {
		t.Fatal("an evicted value is back")
	}
}

// TestUnreadable opens a store while a block cannot be read: what that hides stays away when it can be, be it a value that
// was replaced and deleted meanwhile.
func TestUnreadable(t *testing.T) {
	for _, what := range []string{"record", "segment"} {
		d, a := newDisk(4*mib), newArena(t)
		s := open(t, d, a, never)
		mustPut(t, s, key(0), value(0, 50_000))
		first, _ := position(s, key(0))
		n := 1
		for g := first; g == first; n++ {
			mustPut(t, s, key(n), value(1, 50_000))
			g, _ = position(s, key(n))
		}
		mustPut(t, s, key(n), value(1, 50_000)) // the second that is not in the first segment
		hides, bad := func(i int) bool { return i < n-1 }, first.off
		if what == "record" {
			hides = func(i int) bool { return i == n-1 }
			_, bad = position(s, key(n-1))
		}
		look := func(when string) {
			for i := range n + 1 {
				if _, ok := s.Exist(key(i)); ok == hides(i) {
					t.Errorf("%s, %s: key %d of %d is there: %v", what, when, i, n, ok)
				}
			}
		}
		s.Close()
		d.failing(func(o *uring.Op) error {
			if o.Kind == uring.OpRead && o.Off <= bad && bad < o.Off+int64(len(o.Data)) {
				return uring.ErrMedia
			}
			return nil
		})
		s = open(t, d, a, never)
		d.failing(nil)
		look("unreadable")
		for i := range n {
			if !hides(i) {
				continue
			}
			mustPut(t, s, key(i), value(2, 3000))
			if _, err := s.Delete(key(i)); err != nil {
				t.Fatal(err)
			}
		}
		s.Close()
		s = open(t, d, a, never)
		look("readable again")
		s.Close()
	}
}

// TestForged commits nothing behind a value that holds record headers of its
// own making, so that a recovery looks at all its blocks.
func TestForged(t *testing.T) {
	for _, knows := range []bool{false, true} {
		d, a := newDisk(2*mib), newArena(t)
		s := open(t, d, a, never)
		var w, after Writer
		if err := s.Create(&w, key(1), 100<<10, StoreAlways); err != nil {
			t.Fatal(err)
		}
		v := make([]byte, 100<<10)
		_, at := w.at(0)
		for off := 0; off < len(v); off += block {
			seed := s.p.super.seed
			if !knows {
				seed = uint64(off) // 0 is one of them
			}
			r := record{kind: recordLive, key: key(2), off: at + int64(off), gen: w.parts[0].gen, seq: 1 << 45}
			putRecord(v[off:off+block], seed, r, nil)
		}
		send(&w, v)
		if err := s.Create(&after, key(3), 3, StoreAlways); err != nil {
			t.Fatal(err)
		}
		send(&after, []byte("abc"))
		if err := after.Commit(); err != nil { // behind the hole
			t.Fatal(err)
		}
		if err := w.drain(); err != nil {
			t.Fatal(err)
		}
		mem := d.clone(0, d.Size())
		w.Abort()
		s.Close()
		d.mem = mem
		s = open(t, d, a, never)
		// With the seed the forgery succeeds, which shows that the test is one.
		if _, ok := s.Exist(key(2)); ok != knows {
			t.Errorf("seed known: %v; forged value found: %v", knows, ok)
		}
		mustGet(t, s, key(3), []byte("abc"))
		s.Close()
	}
}

func TestBitFlips(t *testing.T) {
	devices(t, 64*mib, func(t *testing.T, dev uring.Device, a *uring.Arena) {
		flip := func(off int64) {
			var op uring.Op
			buf := a.Get(block)
			defer buf.Put()
			op.Kind, op.Off, op.Data = uring.OpRead, off&^(block-1), buf.Data
			if err := op.Do(dev); err != nil {
				t.Fatal(err)
			}
			buf.Data[off%block] ^= 0x10
			op.Kind = uring.OpWrite
			if err := op.Do(dev); err != nil {
				t.Fatal(err)
			}
		}
		s := open(t, dev, a, never)
		v := value(1, 3*pieceSize+100)
		for i := range 3 {
			mustPut(t, s, key(i), v)
		}
		_, head := position(s, key(1))
		data := head + block
		flip(data + 2*pieceSize + 5)
		if _, err := get(s, key(1), MaxValue); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("a flipped bit of data: %v", err)
		}
		if _, err := get(s, key(1), 2*pieceSize+1); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("a flipped bit behind what was asked, in its piece: %v", err)
		}
		if got, err := get(s, key(1), 2*pieceSize); err != nil || !bytes.Equal(got, v[:2*pieceSize]) {
			t.Fatalf("the pieces before it: %v", err)
		}
		for _, x := range []struct {
			from, limit int64
			damaged     bool
		}{{pieceSize, pieceSize, false}, {3 * pieceSize, 1000, false}, {2*pieceSize + 4, 1, true}, {3*pieceSize - 4, 4, true}, {pieceSize + 4, pieceSize, true}} {
			got, size, _, err := getRange(s, key(1), x.from, x.limit, 0)
			if x.damaged != errors.Is(err, ErrCorrupt) || !x.damaged && (err != nil || size != int64(len(v)) || !bytes.Equal(got, v[x.from:min(size, x.from+x.limit)])) {
				t.Fatalf("%d bytes from %d: %v", x.limit, x.from, err)
			}
		}
		if n := s.Stats().Corrupt; n != 5 {
			t.Fatalf("%d corruptions counted, want 5", n)
		}
		flip(data + 2*pieceSize + 5)
		mustGet(t, s, key(1), v)
		for _, at := range []int64{0, 9, 16, 17, 18, 20, 24, 40, 48, 56, 64, 72, recordLen, recordLen + 31} {
			flip(head + at)
			if _, err := get(s, key(1), MaxValue); !errors.Is(err, ErrCorrupt) {
				t.Fatalf("a flipped bit of byte %d of the header: %v", at, err)
			}
			s.Close()
			s = open(t, dev, a, never)
			if _, err := get(s, key(1), MaxValue); !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNotFound) {
				t.Fatalf("a header whose byte %d is damaged: %v", at, err)
			}
			mustGet(t, s, key(0), v)
			mustGet(t, s, key(2), v) // behind it
			flip(head + at)
			s.Close()
			s = open(t, dev, a, never)
			mustGet(t, s, key(1), v)
		}
		s.Close()
	})
}

// TestRangeHeaders damages the header of each part of a value in turn: only ranges in that part meet it.
func TestRangeHeaders(t *testing.T) {
	d := newDisk(64 * mib)
	s := open(t, d, newArena(t), never)
	defer s.Close()
	extent := s.p.super.extent
	v := value(1, int(2*extent+100))
	mustPut(t, s, key(1), v)
	for damaged := range 3 {
		e, _ := s.index.get(key(1), damaged, 0)
		_, head := s.p.segmentOf(e.block())
		flip := func() {
			d.mu.Lock()
			d.mem[head+recordLen] ^= 1
			d.mu.Unlock()
		}
		flip()
		for part := range int64(3) {
			got, _, _, err := getRange(s, key(1), part*extent+4, 8, 0)
			if int(part) == damaged && !errors.Is(err, ErrCorrupt) || int(part) != damaged && (err != nil || !bytes.Equal(got, v[part*extent+4:][:8])) {
				t.Errorf("part %d, and part %d is damaged: %v", part, damaged, err)
			}
		}
		flip()
	}
	mustGet(t, s, key(1), v)
}

// TestCleanDamaged cleans a segment in which a header is gone: that value is
// lost, and neither blocks the cleaning nor comes back.
func TestCleanDamaged(t *testing.T) {
	d, a := newDisk(2*mib), newArena(t)
	s := open(t, d, a, never)
	n := 0
	for put(s, key(n), value(uint64(n), 20_000), StoreAlways) == nil {
		n++
	}
	_, off := position(s, key(1))
	d.mu.Lock()
	clear(d.mem[off : off+block])
	d.mu.Unlock()
	for i := range 5 { // all in the first segment, as 1 is
		if _, err := s.Delete(key(2 + i)); err != nil {
			t.Fatal(err)
		}
		mustPut(t, s, key(1000+i), value(1, 20_000))
	}
	if st := s.Stats(); st.Reclaimed == 0 || st.Corrupt == 0 || st.Evictions[2] != 1 {
		t.Fatalf("%+v", st)
	}
	if _, err := get(s, key(1), 1); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	before := s.Stats()
	s.Close()
	s = open(t, d, a, never)
	defer s.Close()
	if after := s.Stats(); before.Keys != after.Keys || before.Used != after.Used {
		t.Fatalf("before %+v, after %+v", before, after)
	}
}

func TestDeviceErrors(t *testing.T) {
	d, a := newDisk(64*mib), newArena(t)
	s := open(t, d, a, never)
	old := value(1, 1_200_000)
	mustPut(t, s, key(1), old)
	fail := func(kind uring.OpKind, skip int) {
		d.failing(func(o *uring.Op) error {
			if o.Kind == kind {
				if skip--; skip < 0 {
					return uring.ErrMedia
				}
			}
			return nil
		})
	}
	for skip := range 3 { // data, data, header
		fail(uring.OpWrite, skip)
		before := s.p.devs[0].open[0][0].tail
		if err := put(s, key(1), value(2, 1_200_000), StoreAlways); !errors.Is(err, uring.ErrMedia) {
			t.Fatal(err)
		}
		if header := skip == 2; (s.p.devs[0].open[0][0].tail > before) != header {
			t.Fatal("space in which a header may lie was given back, or other space was not")
		}
		d.failing(nil)
		mustGet(t, s, key(1), old)
	}
	fail(uring.OpWrite, 0)
	if _, err := s.Delete(key(1)); !errors.Is(err, uring.ErrMedia) {
		t.Fatal(err)
	}
	for skip := range 3 {
		fail(uring.OpRead, skip)
		if _, err := get(s, key(1), MaxValue); !errors.Is(err, uring.ErrMedia) {
			t.Fatal(err)
		}
	}
	d.failing(nil)
	mustGet(t, s, key(1), old)
	for s.p.devs[0].open[0][0].fits(span(200 << 10)) {
		mustPut(t, s, key(1), value(3, 200<<10))
	}
	fail(uring.OpWrite, 0) // the header of the next segment
	if err := put(s, key(2), value(3, 200<<10), StoreAlways); !errors.Is(err, uring.ErrMedia) {
		t.Fatal(err)
	}
	d.failing(nil)
	mustPut(t, s, key(1), old)
	used := s.Stats().Used
	s.Close()
	s = open(t, d, a, never)
	defer s.Close()
	mustGet(t, s, key(1), old)
	if st := s.Stats(); st.Used != used || st.Keys != 1 {
		t.Fatalf("%+v", st)
	}
}

func TestForeign(t *testing.T) {
	a := newArena(t)
	store := func() *disk {
		d := newDisk(4 * mib)
		s := open(t, d, a, never)
		mustPut(t, s, key(1), []byte("v"))
		s.Close()
		return d
	}
	for name, c := range map[string]struct {
		damage func(d *disk)
		line   string
	}{
		"other data":    {func(d *disk) { clear(d.mem[:superArea]); d.mem[70_000] = 1 }, "other data"},
		"other version": {func(d *disk) { d.mem[16]++; d.mem[superSecond+16]++ }, "version 3"},
		"both damaged":  {func(d *disk) { d.mem[50]++; d.mem[superSecond+50]++ }, "damaged"},
		"one erased":    {func(d *disk) { clear(d.mem[:block]); d.mem[superSecond+50]++ }, "damaged"},
		"shrunk":        {func(d *disk) { d.mem = d.mem[:3*mib] }, "give it back"},
	} {
		d := store()
		c.damage(d)
		before := bytes.Clone(d.mem)
		if _, err := Open(d, a, never); !errors.Is(err, ErrForeign) || !strings.Contains(err.Error(), c.line) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", name, err)
		}
		if !bytes.Equal(before, d.mem) {
			t.Errorf("%s: the device was written to", name)
		}
	}
	for name, change := range map[string]func(d *disk){
		"first copy lost":  func(d *disk) { clear(d.mem[:block]) },
		"second copy torn": func(d *disk) { d.mem[superSecond+60]++ },
		"grown":            func(d *disk) { d.mem = append(d.mem, make([]byte, 2*mib)...) },
	} {
		d := store()
		change(d)
		for range 2 {
			s, err := Open(d, a, never)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			mustGet(t, s, key(1), []byte("v"))
			if want := segmentsOf(d.Size(), s.p.super.segSize); s.Stats().Segments != int(want) {
				t.Errorf("%s: %+v", name, s.Stats())
			}
			s.Close()
			if one, err := parseSuper(d.mem); err != nil || one.gen < 2 {
				t.Errorf("%s: not repaired: %+v, %v", name, one, err)
			}
			clear(d.mem[superSecond : superSecond+block]) // the first serves alone, then
		}
	}
	for _, size := range []int64{block, superArea, mib, mib + 256<<10} {
		if _, err := Open(newDisk(size), a, never); err == nil || !strings.Contains(err.Error(), "too small") {
			t.Errorf("a device of %d bytes: %v", size, err)
		}
	}
}

func TestGeometry(t *testing.T) {
	for size := int64(2 * mib); size < 1<<45; size += size/7&^(block-1) + block {
		segSize, extent, err := geometry(size)
		n := segmentsOf(size, segSize)
		if err != nil || n < minSegments || segSize%block != 0 || dataStart+n*segSize > size || extent%pieceSize != 0 || segSize < 2*block+2*span(extent) {
			t.Fatalf("%d bytes: %d segments of %d, extents of %d, %v", size, n, segSize, extent, err)
		}
		if size >= 1<<30 && 16*extent != MaxValue {
			t.Fatalf("%d bytes: extents of %d", size, extent)
		}
		if waste := size - dataStart - n*segSize; size >= 1<<30 && waste > size/7 {
			t.Fatalf("%d bytes: %d wasted", size, waste)
		}
	}
}

func FuzzSuper(f *testing.F) {
	b := make([]byte, block)
	putSuper(b, &super{gen: 3, member: 1, seed: 5, segSize: 129 * mib, extent: maxExtent, segments: 7, epochs: []uint32{1, 2}, tenants: []uuid.UUID{{}, {1}}})
	f.Add(b)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		b = bytes.Clone(b) // the fuzzer keeps its own
		if len(b) >= block {
			copy(b[8:], superMagic[:])
			sealStruct(b[:block], 0)
		}
		s, err := parseSuper(b)
		if err != nil {
			return
		}
		if s.segments < minSegments || dataStart+s.segments*s.segSize < s.segSize || s.member >= len(s.epochs) {
			t.Fatalf("accepted %+v", s)
		}
		out := make([]byte, block)
		putSuper(out, &s)
		if back, err := parseSuper(out); err != nil || !reflect.DeepEqual(back, s) {
			t.Fatalf("%+v became %+v, %v", s, back, err)
		}
	})
}

func FuzzSegment(f *testing.F) {
	b := make([]byte, block)
	putSegment(b, 9, segmentHeader{index: 4, gen: 77, member: 3, tenant: 2, class: classHot, epoch: 8})
	f.Add(b[:segmentLen])
	f.Fuzz(func(t *testing.T, b []byte) {
		b = bytes.Clone(b) // the fuzzer keeps its own
		if len(b) >= segmentLen {
			copy(b[8:], segmentMagic[:])
			sealStruct(b[:segmentLen], 9)
		}
		if h, ok := parseSegment(b, 9); ok {
			out := make([]byte, block)
			putSegment(out, 9, h)
			if back, ok := parseSegment(out, 9); !ok || back != h {
				t.Fatalf("%+v became %+v", h, back)
			}
		}
	})
}

func FuzzRecord(f *testing.F) {
	b := make([]byte, block)
	putRecord(b, 9, record{kind: recordLive, key: key(1), off: 4096, gen: 7, seq: 8, from: 9, size: 300_000}, []uint64{1, 2, 3})
	f.Add(bytes.Clone(b[:recordLen+24]))
	putRecord(b, 9, record{kind: recordLive, key: key(1), part: 15, size: MaxValue}, make([]uint64, 32))
	f.Add(bytes.Clone(b))
	putRecord(b, 9, record{kind: recordDead, key: key(1), size: MaxValue}, nil)
	f.Add(bytes.Clone(b[:recordLen]))
	f.Fuzz(func(t *testing.T, b []byte) {
		b = bytes.Clone(b) // the fuzzer keeps its own
		if len(b) >= recordLen {
			copy(b[8:], recordMagic[:])
			sealStruct(b[:recordLen], 9)
		}
		r, ok := parseRecord(b, 9, maxExtent)
		if !ok {
			return
		}
		if r.size < 0 || r.size > MaxValue || r.key.n == 0 || r.key.n > MaxKey || r.part >= maxParts {
			t.Fatalf("accepted %+v", r)
		}
		var sums []uint64
		if r.kind == recordLive {
			sums = appendSums(nil, b, r, maxExtent)
		}
		out := make([]byte, block)
		putRecord(out, 9, r, sums)
		if back, ok := parseRecord(out, 9, maxExtent); !ok || back != r {
			t.Fatalf("%+v became %+v", r, back)
		}
	})
}

func FuzzSummary(f *testing.F) {
	b := make([]byte, block)
	putSummary(b, 9, 7, 0, 5*block, dataStart, []record{
		{kind: recordLive, key: key(1), off: dataStart + block, seq: 8, size: 4000},
		{kind: recordDead, key: key(2), off: dataStart + 3*block, seq: 9, from: 3, size: 100}})
	f.Add(bytes.Clone(b))
	f.Fuzz(func(t *testing.T, b []byte) {
		b = bytes.Clone(b) // the fuzzer keeps its own
		if len(b) >= block {
			copy(b[8:], summaryMagic[:])
			le.PutUint64(b[16:], 7)
			sealStruct(b[:block], 9)
		}
		const size = 40 << 20
		h, rs, ok := parseSummary(nil, b, 9, 7, dataStart, size, maxExtent)
		if !ok {
			return
		}
		for _, r := range rs {
			if r.off < dataStart+block || r.off+span(partSize(r.size, r.part, maxExtent)) > dataStart+h.tail || h.tail >= size {
				t.Fatalf("accepted %+v", r)
			}
		}
		for _, r := range rs {
			if !amendIn(b, 9, 7, uint32((r.off-dataStart)/block), func(e []byte) { e[42] = byte(recordDead) }) {
				t.Fatal("cannot bury what is there")
			}
		}
		if _, rs, ok = parseSummary(nil, b, 9, 7, dataStart, size, maxExtent); !ok {
			t.Fatal("damaged by burying")
		}
		dead := map[int64]bool{}
		for _, r := range rs {
			dead[r.off] = dead[r.off] || r.kind == recordDead
		}
		for off, d := range dead {
			if !d {
				t.Fatalf("the record at %d lives", off)
			}
		}
	})
}
