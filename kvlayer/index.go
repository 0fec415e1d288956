package kvlayer

import (
	"fmt"
	"iter"
	"math/bits"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// entry is one value, or one part of a striped one, in the index: 32 bytes.
type entry struct {
	hi, lo uint64 // the key, big-endian, zero padded: integers sort as keys do
	meta   uint64 // seq<<12 | part<<8 | (key length-1)<<4 | pinned<<3 | touches<<1 | 1
	place  uint64 // block of the pool<<27 | size of the whole value
}

const (
	entryUsed    = 1
	entryTouch   = 2 // one touch; there are 0 to 3
	entryTouches = 6
	entryPinned  = 8
	entryFlags   = entryPinned | entryTouches
	entryIdent   = 0xff0 | entryUsed
	entryBytes   = 32

	sizeBits  = 27
	seqBits   = 52
	maxBlocks = 1 << (64 - sizeBits) // of a pool: 512 TiB
)

func makeEntry(k Key, part int, seq uint64, size, block int64) entry {
	return entry{k.hi, k.lo, seq<<12 | uint64(part)<<8 | uint64(k.n-1)<<4 | entryUsed, uint64(block)<<sizeBits | uint64(size)}
}

func (e entry) key() Key      { return Key{e.hi, e.lo, uint8(e.meta>>4&15) + 1} }
func (e entry) seq() uint64   { return e.meta >> 12 }
func (e entry) part() int     { return int(e.meta >> 8 & 15) }
func (e entry) touches() int  { return int(e.meta & entryTouches / entryTouch) }
func (e entry) pinned() bool  { return e.meta&entryPinned != 0 }
func (e entry) size() int64   { return int64(e.place & (1<<sizeBits - 1)) }
func (e entry) block() int64  { return int64(e.place >> sizeBits) }
func (e entry) ident() uint64 { return e.meta >> 4 & 0xff } // part and key length: with hi and lo, what is looked up

// same tells that o is the same record in the same place; flags may differ.
func (e entry) same(o entry) bool {
	return e.meta&^entryFlags == o.meta&^entryFlags && e.place == o.place && e.hi == o.hi && e.lo == o.lo
}

// index maps keys to entries, in memory that the garbage collector does not
// see. It is a sorted directory of leaves, each a hash table of the keys of one
// range: lookups hash, and a list in key order sorts one leaf at a time. Leaves
// split and merge; a table grows by an eighth, so that a slot is seldom idle.
//
// Lookups take no lock: they read a leaf's version before and after. Writers
// lock the leaf. The caller sees to it that of one key there is one writer at a
// time, but for move and remove, which name the entry they mean.
type index struct {
	slab   *slab
	extent int64 // largest part of a value, bytes
	seeds  [2]uint64
	keys   atomic.Int64 // not counting parts
	dir    atomic.Pointer[directory]
	grow   sync.Mutex // dir is replaced; behind the leaves' locks
}

// directory is immutable. Leaf i has the keys from his[i], los[i] up to those
// of i+1; the first pair is zero.
type directory struct {
	his, los []uint64
	leaves   []*leaf

	// starts[j] is the last leaf that begins at j<<shift or below: where keys are
	// hashes, next to nothing is left to search. There are one or two for each leaf, and one more.
	starts []uint32
	shift  int
}

func newDirectory(his, los []uint64, leaves []*leaf) *directory {
	n := bits.Len(uint(len(his)))
	d := &directory{his: his, los: los, leaves: leaves, starts: make([]uint32, 1<<n+1), shift: 64 - n}
	i := 0
	for j := range 1 << n {
		for i+1 < len(his) && his[i+1] <= uint64(j)<<d.shift {
			i++
		}
		d.starts[j] = uint32(i)
	}
	d.starts[1<<n] = uint32(len(his) - 1)
	return d
}

// leaf is the entries of one range of keys: a hash table with linear probing. What a
// lookup reads of it is in two cache lines.
type leaf struct {
	version atomic.Uint64           // odd while it changes
	n       atomic.Uint32           // pages in use
	pages   [maxPages]atomic.Uint32 // of the slab
	mu      sync.Mutex
	used    int
}

func (l *leaf) len() int { return int(l.n.Load()) * pageSlots }

// entries yields those of l.
func (x *index) entries(l *leaf) iter.Seq[entry] {
	return func(yield func(entry) bool) {
		for i := range l.len() {
			if e := x.slot(l, i).load(); e.meta != 0 && !yield(e) {
				return
			}
		}
	}
}

func (x *index) slot(l *leaf, i int) *entry {
	return x.slab.slot(l.pages[i/pageSlots].Load(), i%pageSlots)
}

const maxLeaf = 4096 // entries

func newIndex(s *slab, extent int64) *index {
	x := &index{slab: s, extent: extent, seeds: [2]uint64{rand.Uint64(), rand.Uint64()}}
	l := new(leaf)
	x.resize(l, 1)
	x.dir.Store(newDirectory([]uint64{0}, []uint64{0}, []*leaf{l}))
	return x
}

// partsOf is how many entries a value of size bytes has.
func (x *index) partsOf(size int64) int { return max(1, int((size+x.extent-1)/x.extent)) }

// find returns the leaf of a key.
func (d *directory) find(hi, lo uint64) int {
	his := d.his
	j := hi >> d.shift
	i := int(d.starts[j])
	n := int(d.starts[j+1]) - i + 1
	for n > 1 { // his[i] <= hi: without a branch, which would be predicted wrong every second time
		half := n / 2
		_, above := bits.Sub64(hi, his[i+half], 0)
		i += half & (int(above) - 1)
		n -= half
	}
	if his[i] < hi || i == 0 {
		return i
	}
	for i, n = 0, len(his); n > 1; { // keys that begin alike
		half := n / 2
		if d.his[i+half] < hi || d.his[i+half] == hi && d.los[i+half] <= lo {
			i += half
		}
		n -= half
	}
	return i
}

func (x *index) hash(hi, lo, ident uint64) uint64 {
	a, b := bits.Mul64(hi^x.seeds[0], 0x9E3779B97F4A7C15)
	c, d := bits.Mul64(lo^x.seeds[1]^ident<<56, 0xD6E8FEB86659FD93)
	e, f := bits.Mul64(a^b^c+d, 0xA0761D6478BD642F)
	return e ^ f
}

// home is the slot at which the search for a hash begins, the first of a cache line.
func home(h uint64, slots int) int {
	i, _ := bits.Mul64(h, uint64(slots/lineSlots))
	return int(i) * lineSlots
}

// load reads a slot that a writer may change: the leaf's version tells.
func (e *entry) load() entry {
	return entry{atomic.LoadUint64(&e.hi), atomic.LoadUint64(&e.lo), atomic.LoadUint64(&e.meta), atomic.LoadUint64(&e.place)}
}

func (e *entry) store(v entry) {
	atomic.StoreUint64(&e.hi, v.hi)
	atomic.StoreUint64(&e.lo, v.lo)
	atomic.StoreUint64(&e.meta, v.meta)
	atomic.StoreUint64(&e.place, v.place)
}

// search finds a slot by key, part and length; at is where it would go otherwise.
// A leaf that changes meanwhile may make it miss, or give up.
//
// Most are in their first cache line. Whether they are its first or second entry is found out without
// a branch: one that is predicted wrong would wait for memory, and what comes after the search with it.
func (x *index) search(l *leaf, hi, lo, ident uint64) (at int, e entry, ok bool) {
	n := l.len()
	at = home(x.hash(hi, lo, ident), n)
	want := ident<<4 | entryUsed
	for range n / lineSlots {
		a := x.slot(l, at)
		b := (*entry)(unsafe.Add(unsafe.Pointer(a), entryBytes))
		ma, mb := atomic.LoadUint64(&a.meta), atomic.LoadUint64(&b.meta)
		da := (atomic.LoadUint64(&a.hi) ^ hi) | (atomic.LoadUint64(&a.lo) ^ lo) | (ma&entryIdent ^ want)
		db := (atomic.LoadUint64(&b.hi) ^ hi) | (atomic.LoadUint64(&b.lo) ^ lo) | (mb&entryIdent ^ want)
		notA, notB := (da|-da)>>63, (db|-db)>>63
		if notA&notB == 0 {
			s := (*entry)(unsafe.Add(unsafe.Pointer(a), notA*entryBytes))
			return at + int(notA), entry{hi, lo, ma ^ (ma^mb)&-notA, atomic.LoadUint64(&s.place)}, true
		}
		if ma == 0 {
			return at, entry{}, false
		}
		if mb == 0 {
			return at + 1, entry{}, false
		}
		if at += lineSlots; at == n {
			at = 0
		}
	}
	return at, entry{}, false
}

func ident(k Key, part int) uint64 { return uint64(part)<<4 | uint64(k.n-1) }

// get returns the entry of a part of k's value and counts up to touches touches.
func (x *index) get(k Key, part int, touches int) (entry, bool) {
	hi, lo := k.hi, k.lo
	for {
		d := x.dir.Load()
		l := d.leaves[d.find(hi, lo)]
		v := l.version.Load()
		at, e, ok := x.search(l, hi, lo, ident(k, part))
		if v&1 != 0 || l.version.Load() != v || x.dir.Load() != d {
			continue
		}
		if ok && e.touches() < touches {
			atomic.CompareAndSwapUint64(&x.slot(l, at).meta, e.meta, e.meta+entryTouch)
		}
		return e, ok
	}
}

// lock returns the leaf of a key, locked.
func (x *index) lock(hi, lo uint64) *leaf {
	for {
		d := x.dir.Load()
		l := d.leaves[d.find(hi, lo)]
		l.mu.Lock()
		if d == x.dir.Load() {
			return l
		}
		l.mu.Unlock()
	}
}

// all appends the entries of all parts of k's value, as they are together at one moment.
func (x *index) all(es []entry, k Key) []entry {
	hi, lo := k.hi, k.lo
	for {
		d := x.dir.Load()
		l := d.leaves[d.find(hi, lo)]
		v := l.version.Load()
		found := x.parts(es, l, hi, lo, k)
		if v&1 == 0 && l.version.Load() == v && x.dir.Load() == d {
			return found
		}
	}
}

func (x *index) parts(es []entry, l *leaf, hi, lo uint64, k Key) []entry {
	_, e, ok := x.search(l, hi, lo, ident(k, 0))
	if !ok {
		return es
	}
	es = append(es, e)
	for part := 1; part < x.partsOf(e.size()); part++ {
		if _, e, ok := x.search(l, hi, lo, ident(k, part)); ok {
			es = append(es, e)
		}
	}
	return es
}

// replace makes es, which begin with the part 0, all that k has; none removes k.
// It appends to old what k had.
func (x *index) replace(k Key, es []entry, old []entry) []entry {
	hi, lo := k.hi, k.lo
	l := x.lock(hi, lo)
	defer l.mu.Unlock()
	old = x.parts(old, l, hi, lo, k)
	x.swap(l, old, es)
	return old
}

// swap replaces a key's entries old by es. Under l.mu.
func (x *index) swap(l *leaf, old, es []entry) {
	l.version.Add(1)
	for _, e := range old {
		if len(es) == 0 || e.part() >= len(es) {
			x.erase(l, e)
		}
	}
	for _, e := range es {
		at, _, ok := x.search(l, e.hi, e.lo, e.ident())
		if !ok {
			at = x.room(l, at, e)
			l.used++
		}
		x.slot(l, at).store(e)
	}
	x.keys.Add(int64(min(1, len(es)) - min(1, len(old))))
	switch {
	case l.used > maxLeaf:
		x.split(l)
	case l.used < maxLeaf/8 && len(old) > len(es):
		x.merge(l, old[0])
	}
	l.version.Add(1)
}

// room grows l's table if need be; at is then e's slot.
func (x *index) room(l *leaf, at int, e entry) int {
	if !crowded(l.used, l.len()) {
		return at
	}
	x.rehash(l, l.used+1)
	at, _, _ = x.search(l, e.hi, e.lo, e.ident())
	return at
}

// crowded tells that one more than used slots of n would make searches long.
func crowded(used, n int) bool { return (used+1)*11 > n*9 }

// resize gives l an empty table with room for some more than n entries, and returns the pages it had.
func (x *index) resize(l *leaf, n int) (old []uint32) {
	for i := range l.n.Load() {
		old = append(old, l.pages[i].Load())
	}
	var pages [maxPages]uint32
	m := max(1, (n*4/3+pageSlots-1)/pageSlots)
	x.slab.get(pages[:m])
	for i, page := range pages[:m] {
		l.pages[i].Store(page)
	}
	l.n.Store(uint32(m))
	return old
}

// rehash moves l's entries to a table with room for some more than n.
func (x *index) rehash(l *leaf, n int) {
	old := x.resize(l, n)
	for _, page := range old {
		for i := range pageSlots {
			if e := x.slab.slot(page, i).load(); e.meta != 0 {
				x.put(l, e)
			}
		}
	}
	x.slab.put(old)
}

func (x *index) put(l *leaf, e entry) {
	at, _, _ := x.search(l, e.hi, e.lo, e.ident())
	x.slot(l, at).store(e)
}

// erase removes e, and closes the gap so that searches go on to find what is behind it.
func (x *index) erase(l *leaf, e entry) {
	n := l.len()
	gap, _, ok := x.search(l, e.hi, e.lo, e.ident())
	if !ok {
		return
	}
	l.used--
	for i := gap; ; {
		if i++; i == n {
			i = 0
		}
		o := x.slot(l, i).load()
		if o.meta == 0 {
			break
		}
		h := home(x.hash(o.hi, o.lo, o.ident()), n)
		if (i-h+n)%n >= (i-gap+n)%n { // its home is not behind the gap
			x.slot(l, gap).store(o)
			gap = i
		}
	}
	x.slot(l, gap).store(entry{})
	if n > pageSlots && l.used*2 < n {
		x.rehash(l, l.used)
	}
}

// split moves the upper half of l's keys to a new leaf. Under l.mu.
func (x *index) split(l *leaf) {
	x.grow.Lock()
	defer x.grow.Unlock()
	b := batches.Get().(*batch)
	defer batches.Put(b)
	es := b.es[:0]
	for e := range x.entries(l) {
		es = append(es, e)
	}
	slices.SortFunc(es, compareEntries)
	cut := len(es) / 2
	for cut < len(es) && es[cut].hi == es[cut-1].hi && es[cut].lo == es[cut-1].lo { // a key's parts stay together
		cut++
	}
	if b.es = es; cut == len(es) {
		return
	}
	r := new(leaf)
	r.version.Store(1) // until the caller has finished l, nobody reads either
	defer r.version.Add(1)
	fill := func(l *leaf, es []entry) (was []uint32) {
		was = x.resize(l, len(es))
		for _, e := range es {
			x.put(l, e)
		}
		l.used = len(es)
		return was
	}
	was := fill(l, es[:cut])
	fill(r, es[cut:])
	d := x.dir.Load()
	i := d.find(es[0].hi, es[0].lo) + 1
	x.dir.Store(newDirectory(
		slices.Insert(slices.Clone(d.his), i, es[cut].hi),
		slices.Insert(slices.Clone(d.los), i, es[cut].lo),
		slices.Insert(slices.Clone(d.leaves), i, r)))
	x.slab.put(was)
}

// merge joins l, which of belongs to, with its right, or else its left neighbour, if both are small. Under l.mu.
func (x *index) merge(l *leaf, of entry) {
	x.grow.Lock()
	defer x.grow.Unlock()
	d := x.dir.Load()
	i := d.find(of.hi, of.lo)
	for _, j := range [2]int{i, i - 1} { // leaf j swallows j+1
		if j < 0 || j+1 == len(d.leaves) {
			continue
		}
		o := d.leaves[2*j+1-i]
		if !o.mu.TryLock() {
			continue
		}
		if l.used+o.used > maxLeaf/2 {
			o.mu.Unlock()
			continue
		}
		o.version.Add(1)
		a, b := d.leaves[j], d.leaves[j+1]
		for e := range x.entries(b) {
			if crowded(a.used, a.len()) {
				x.rehash(a, a.used+b.used)
			}
			x.put(a, e)
			a.used++
		}
		x.dir.Store(newDirectory(
			slices.Delete(slices.Clone(d.his), j+1, j+2),
			slices.Delete(slices.Clone(d.los), j+1, j+2),
			slices.Delete(slices.Clone(d.leaves), j+1, j+2)))
		var gone [maxPages]uint32
		n := b.n.Load()
		for i := range n {
			gone[i] = b.pages[i].Load()
		}
		x.slab.put(gone[:n])
		o.version.Add(1)
		o.mu.Unlock()
		return
	}
}

// update changes the entry that is the same as e, if it is there, to what f makes
// of it: its place or its flags.
func (x *index) update(e entry, f func(*entry)) bool {
	l := x.lock(e.hi, e.lo)
	defer l.mu.Unlock()
	at, cur, ok := x.search(l, e.hi, e.lo, e.ident())
	if !ok || !cur.same(e) {
		return false
	}
	l.version.Add(1)
	f(&cur)
	x.slot(l, at).store(cur)
	l.version.Add(1)
	return true
}

// remove removes all parts of the value that e is one of, if it is there, and
// appends them to old.
func (x *index) remove(e entry, old []entry) []entry {
	l := x.lock(e.hi, e.lo)
	defer l.mu.Unlock()
	_, cur, ok := x.search(l, e.hi, e.lo, e.ident())
	if !ok || !cur.same(e) {
		return old
	}
	n := len(old)
	old = x.parts(old, l, e.hi, e.lo, e.key())
	x.swap(l, old[n:], nil)
	return old
}

// batch is scratch space for the entries of a leaf.
type batch struct{ es []entry }

var batches = sync.Pool{New: func() any { return &batch{make([]entry, 0, maxLeaf+16)} }}

func compareEntries(a, b entry) int {
	switch {
	case a.hi != b.hi:
		return cmpWord(a.hi, b.hi)
	case a.lo != b.lo:
		return cmpWord(a.lo, b.lo)
	}
	return cmpWord(a.ident()&15<<4|uint64(a.part()), b.ident()&15<<4|uint64(b.part()))
}

func cmpWord(a, b uint64) int {
	if a < b {
		return -1
	}
	return 1
}

// ascend calls yield with the entries of part 0 from the lower bound from on, in
// the order of Key.Compare, until it returns false. No lock is held meanwhile.
func (x *index) ascend(from Key, yield func(entry) bool) {
	hi, lo := from.hi, from.lo
	b := batches.Get().(*batch)
	defer batches.Put(b)
	for first := true; ; first = false {
		l := x.lock(hi, lo)
		d := x.dir.Load()
		next := d.find(hi, lo) + 1
		es := b.es[:0]
		for e := range x.entries(l) {
			if e.part() == 0 && (!first || e.key().Compare(from) >= 0) {
				es = append(es, e)
			}
		}
		l.mu.Unlock()
		b.es = es
		slices.SortFunc(es, compareEntries)
		for _, e := range es {
			if (e.hi > hi || e.hi == hi && e.lo >= lo) && !yield(e) { // a leaf may reach below after a merge
				return
			}
		}
		if next == len(d.leaves) {
			return
		}
		hi, lo = d.his[next], d.los[next]
	}
}

// each calls f with copies of the entries, a leaf at a time, until it returns
// false. It may show an entry twice, or miss one, that comes or goes meanwhile.
func (x *index) each(f func([]entry) bool) {
	b := batches.Get().(*batch)
	defer batches.Put(b)
	var hi, lo uint64
	for {
		l := x.lock(hi, lo)
		d := x.dir.Load()
		next := d.find(hi, lo) + 1
		es := b.es[:0]
		for e := range x.entries(l) {
			es = append(es, e)
		}
		l.mu.Unlock()
		if b.es = es; !f(es) || next == len(d.leaves) {
			return
		}
		hi, lo = d.his[next], d.los[next]
	}
}

// slab hands out pages of entries from a mapping off the Go heap. What is put
// back serves again, and is never unmapped while an index may be read.
type slab struct {
	mu   sync.Mutex
	mem  []byte
	base unsafe.Pointer
	free []uint32 // pages
	next uint32   // the first page that was never out
	open uint32   // pages that can be touched
}

const (
	lineSlots = 2 // entries of a cache line
	pageSlots = 256
	maxPages  = 24 // of a leaf: more than maxLeaf and a value's parts need
	pageBytes = pageSlots * entryBytes
	slabBytes = 128 << 30 // of addresses, not of memory: 4 billion entries
	slabStep  = 8 << 20
)

func newSlab() (*slab, error) {
	m, err := unix.Mmap(-1, 0, slabBytes, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("kvlayer: cannot reserve addresses for the index: %w", err)
	}
	_ = unix.Madvise(m, unix.MADV_HUGEPAGE)
	_ = unix.Madvise(m, unix.MADV_DONTDUMP)
	s := &slab{mem: m, base: unsafe.Pointer(&m[0])}
	runtime.AddCleanup(s, func(m []byte) { _ = unix.Munmap(m) }, m)
	return s, nil
}

func (s *slab) slot(page uint32, i int) *entry {
	return (*entry)(unsafe.Add(s.base, int(page)*pageBytes+i*entryBytes))
}

// get fills in pages with empty ones.
func (s *slab) get(pages []uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for at := range pages {
		if last := len(s.free) - 1; last >= 0 {
			page := s.free[last]
			s.free = s.free[:last]
			for i := range pageSlots { // a late reader may still look
				s.slot(page, i).store(entry{})
			}
			pages[at] = page
			continue
		}
		if s.next == s.open {
			end := int(s.open) * pageBytes
			if end == slabBytes || unix.Mprotect(s.mem[end:end+slabStep], unix.PROT_READ|unix.PROT_WRITE) != nil {
				panic("kvlayer: no memory for the index") // as the Go heap does
			}
			s.open += slabStep / pageBytes
		}
		pages[at] = s.next
		s.next++
	}
}

func (s *slab) put(pages []uint32) {
	s.mu.Lock()
	s.free = append(s.free, pages...)
	s.mu.Unlock()
}

// bytes is what is, or was, in use.
func (s *slab) bytes() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return int64(s.next) * pageBytes
}

// close gives the memory back, but the addresses only when nobody can look any more:
// whoever still does finds nothing.
func (s *slab) close() { _ = unix.Madvise(s.mem[:int(s.open)*pageBytes], unix.MADV_DONTNEED) }
