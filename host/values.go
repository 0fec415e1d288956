package host

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"sync"
	"time"

	"github.com/kvof/kvof/nvmeof"
	"github.com/zeebo/xxh3"
	"golang.org/x/sync/errgroup"
)

// Values is a Key Value namespace with values of any size. What one command carries is stored as it is, so that every
// client reads it. A larger value is split: its parts go under keys of their own, made from a generation that no other
// value has, and a root with their checksums goes under the value's key, last. So a reader finds a whole value, the one
// before it, or none. docs/split-values.md specifies what is stored.
//
// Every Values reads what any other has stored, if the path carries its parts: see [KV.Values].
//
// A writer that dies, or two that replace one value at the same time, can leave parts that belong to no value: they
// take room until [Values.Sweep].
type Values struct {
	kv   *KV
	part int64 // asked for
}

const (
	defaultPart = 4 << 20 // bytes
	partWindow  = 8       // parts of one value in flight
	// A reader begins again when the value it reads is replaced, this often at most.
	maxRestarts = 20
	// cleanUpLimit is for how long what was stored in vain is deleted after the caller has given up.
	cleanUpLimit = 10 * time.Second
)

// Values gives the namespace with values of any size. With part > 0 every value of more than part bytes is split, into
// parts of that size: for readers whose path carries less in one command than the writer's. Otherwise only what one
// command does not carry is split.
func (k *KV) Values(part int) *Values { return &Values{kv: k, part: int64(part)} }

// sizes are, in bytes: the largest value that is stored as it is, and the size of a larger one's parts. b is the value
// or nil.
func (v *Values) sizes(b []byte) (whole, part int64) {
	whole = bounded(v.kv.maxValue(b))
	if v.part > 0 {
		whole = min(whole, v.part)
		return whole, whole
	}
	return whole, min(whole, defaultPart)
}

// bounded is a limit in bytes, 0 for none, and no more than maxPart.
func bounded(m uint64) int64 {
	if m == 0 {
		return maxPart
	}
	return int64(min(m, maxPart))
}

// KV is the namespace with one command for each operation.
func (v *Values) KV() *KV { return v.kv }

// Exist reports whether a key is present. A split value is when all of it is stored.
func (v *Values) Exist(ctx context.Context, key []byte) (bool, error) { return v.kv.Exist(ctx, key) }

// List is [KV.List] without the keys of parts.
func (v *Values) List(ctx context.Context, from []byte) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		for key, err := range v.kv.List(ctx, from) {
			if _, _, part := parsePartKey(key); part && err == nil {
				continue
			}
			if !yield(key, err) {
				return
			}
		}
	}
}

// Store stores a value. Readers see the value before or the new one, whole. value must not change until Store returns.
func (v *Values) Store(ctx context.Context, key, value []byte, m StoreMode) error {
	whole, part := v.sizes(value)
	if int64(len(value)) <= whole && !isRoot(value) {
		return v.put(ctx, key, value, m, 0)
	}
	rest := value
	return v.split(ctx, key, m, part, func(w *splitter) error {
		for len(rest) > 0 {
			n := min(int64(len(rest)), part)
			if err := w.add(rest[:n], func() {}); err != nil {
				return err
			}
			rest = rest[n:]
		}
		return nil
	})
}

// StoreFrom stores what r holds, and returns its size in bytes. It keeps a few parts of it in memory, or all of it when one
// command carries it.
func (v *Values) StoreFrom(ctx context.Context, key []byte, r io.Reader, m StoreMode) (int64, error) {
	whole, part := v.sizes(nil)
	var head bytes.Buffer
	size, err := head.ReadFrom(io.LimitReader(r, whole+1))
	if err != nil {
		return 0, err
	}
	if size <= whole && !isRoot(head.Bytes()) {
		return size, v.Store(ctx, key, head.Bytes(), m)
	}
	size, r = 0, io.MultiReader(&head, r)
	err = v.split(ctx, key, m, part, func(w *splitter) error {
		free := make(chan []byte, partWindow)
		for range partWindow {
			free <- nil
		}
		for {
			var b []byte
			select {
			case b = <-free:
			case <-w.ctx.Done():
				return context.Cause(w.ctx)
			}
			if b == nil {
				b = make([]byte, part)
			}
			n, err := io.ReadFull(r, b)
			if n > 0 {
				size += int64(n)
				if err := w.add(b[:n], func() { free <- b }); err != nil {
					return err
				}
			}
			switch err {
			case nil:
			case io.EOF, io.ErrUnexpectedEOF:
				return nil
			default:
				return err
			}
		}
	})
	return size, err
}

// put stores what goes under the value's own key, and then deletes the parts of the value that it replaces.
// generation is that of the root stored, 0 when it is none.
func (v *Values) put(ctx context.Context, key, b []byte, m StoreMode, generation uint64) error {
	if m != StoreIfExists { // most values are new, and what is not there has no parts
		err := v.kv.Store(ctx, key, b, StoreIfAbsent)
		if m == StoreIfAbsent || !errors.Is(err, nvmeof.KeyExists) && !errors.Is(err, ErrOutcomeUnknown) {
			return err
		}
	}
	_, old, err := v.header(ctx, key)
	if err != nil && !errors.Is(err, nvmeof.KeyDoesNotExist) && !errors.Is(err, ErrDamaged) {
		return err
	}
	if err := v.kv.Store(ctx, key, b, m); err != nil {
		return err
	}
	if old != nil && old.generation != generation {
		v.deleteParts(ctx, old.generation, old.parts())
	}
	return nil
}

// splitter stores the parts of one value.
type splitter struct {
	v          *Values
	ctx        context.Context // ends with the first part that fails
	group      *errgroup.Group
	generation uint64
	size       int64

	mu      sync.Mutex
	digests []uint64
}

// split has add store the parts of a value, and then stores its root.
func (v *Values) split(ctx context.Context, key []byte, m StoreMode, part int64, add func(*splitter) error) error {
	if len(key) < 1 || len(key) > nvmeof.MaxKeyLen {
		return nvmeof.InvalidKeySize
	}
	if n := v.kv.ns.MaxKey; n < nvmeof.MaxKeyLen {
		return fmt.Errorf("the namespace's keys of at most %d bytes do not allow values to be split: %w", n, ErrTransferSize)
	}
	if m != StoreAlways { // before all of it is sent
		ok, err := v.kv.Exist(ctx, key)
		switch {
		case err != nil:
			return err
		case ok && m == StoreIfAbsent:
			return nvmeof.KeyExists
		case !ok && m == StoreIfExists:
			return nvmeof.KeyDoesNotExist
		}
	}
	w := &splitter{v: v}
	if err := w.begin(ctx, key); err != nil {
		return err
	}
	w.group, w.ctx = errgroup.WithContext(ctx)
	w.group.SetLimit(partWindow)
	err := add(w)
	if e := w.group.Wait(); e != nil {
		err = e
	}
	if err == nil {
		r := root{generation: w.generation, size: w.size, part: part, digests: w.digests}
		b := r.encode(key)
		if int64(len(b)) > bounded(v.kv.maxValue(nil)) {
			err = fmt.Errorf("%d bytes in parts of %d: %w", w.size, part, ErrTransferSize)
		} else {
			err = v.put(ctx, key, b, m, w.generation)
		}
	}
	if err != nil && !errors.Is(err, ErrOutcomeUnknown) { // else the root may be there
		v.deleteParts(ctx, w.generation, int64(len(w.digests)))
	}
	return err
}

// begin chooses a generation and stores its note.
func (w *splitter) begin(ctx context.Context, key []byte) error {
	n := note{key, time.Now()}
	for {
		var b [8]byte
		rand.Read(b[:])
		w.generation = binary.LittleEndian.Uint64(b[:])
		if w.generation == 0 {
			continue
		}
		err := w.v.kv.Store(ctx, partKey(w.generation, noteIndex), n.encode(), StoreIfAbsent)
		if !errors.Is(err, nvmeof.KeyExists) && !errors.Is(err, ErrOutcomeUnknown) {
			return err
		}
	}
}

// add stores the next part. b belongs to the splitter until it calls done.
func (w *splitter) add(b []byte, done func()) error {
	i := len(w.digests)
	if i == maxParts {
		return fmt.Errorf("%d parts of %d bytes: %w", i, len(b), ErrTransferSize)
	}
	w.mu.Lock()
	w.digests = append(w.digests, 0)
	w.mu.Unlock()
	w.size += int64(len(b))
	w.group.Go(func() error {
		defer done()
		if w.ctx.Err() != nil {
			return context.Cause(w.ctx)
		}
		d := xxh3.Hash(b)
		w.mu.Lock()
		w.digests[i] = d
		w.mu.Unlock()
		return w.v.kv.Store(w.ctx, partKey(w.generation, int64(i)), b, StoreAlways)
	})
	return nil
}

// deleteParts deletes parts that no value has any more, and their note. What it cannot delete is left to Sweep.
func (v *Values) deleteParts(ctx context.Context, generation uint64, n int64) {
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), cleanUpLimit)
	defer stop()
	g, each := errgroup.WithContext(ctx)
	g.SetLimit(partWindow)
	for i := int64(0); i < n && each.Err() == nil; i++ {
		g.Go(func() error { return v.deletePart(each, partKey(generation, i)) })
	}
	if g.Wait() == nil {
		_ = v.deletePart(ctx, partKey(generation, noteIndex))
	}
}

func (v *Values) deletePart(ctx context.Context, key []byte) error {
	if err := v.kv.Delete(ctx, key); err != nil && !errors.Is(err, nvmeof.KeyDoesNotExist) {
		return err
	}
	return nil
}

// Delete deletes a value, its parts too. For an absent key see [KV.Delete].
func (v *Values) Delete(ctx context.Context, key []byte) error {
	_, old, err := v.header(ctx, key)
	if err != nil && !errors.Is(err, nvmeof.KeyDoesNotExist) && !errors.Is(err, ErrDamaged) {
		return err
	}
	if err := v.kv.Delete(ctx, key); err != nil {
		return err
	}
	if old != nil {
		v.deleteParts(ctx, old.generation, old.parts())
	}
	return nil
}

// Size is the size of a value in bytes.
func (v *Values) Size(ctx context.Context, key []byte) (int64, error) {
	size, r, err := v.header(ctx, key)
	if r != nil {
		size = r.size
	}
	return size, err
}

// header returns the size of what a key itself holds, and its root, without digests, if it is one.
func (v *Values) header(ctx context.Context, key []byte) (size int64, r *root, err error) {
	b := make([]byte, rootHeader)
	n, err := v.kv.Retrieve(ctx, key, b)
	if err == nil && isRoot(b[:min(n, len(b))]) {
		r, err = decodeRootHeader(b[:min(n, len(b))], n)
	}
	return int64(n), r, err
}

// Retrieve reads a value into buf and returns its full size, which may be more than len(buf): then buf holds its first
// bytes. All of them are from one value, and the parts of a split one are checked.
func (v *Values) Retrieve(ctx context.Context, key, buf []byte) (size int, err error) {
	err = again(func() error {
		n, r, err := v.first(ctx, key, buf)
		if size = n; err != nil || r == nil {
			return err
		}
		size = int(r.size)
		return v.why(ctx, key, r, v.parts(ctx, r, buf))
	})
	if err != nil {
		return 0, err
	}
	return size, nil
}

// RetrieveTo writes a value to w and returns how many bytes it wrote. It keeps a few parts in memory, or all of a value that
// is not split. When the value is replaced after its first bytes were written the error wraps [ErrReplaced].
func (v *Values) RetrieveTo(ctx context.Context, key []byte, w io.Writer) (n int64, err error) {
	err = again(func() error {
		size, r, err := v.header(ctx, key)
		switch {
		case err != nil:
			return err
		case r != nil:
			if r, err = v.root(ctx, key, int(size)); err != nil {
				return err
			}
			n, err = v.stream(ctx, r, w)
			if err = v.why(ctx, key, r, err); err == errAgain && n > 0 {
				err = ErrReplaced
			}
			return err
		case size > maxPart:
			return tooLarge(int(size), maxPart)
		}
		b := make([]byte, size)
		got, r, err := v.first(ctx, key, b)
		switch {
		case err != nil:
			return err
		case r != nil || got > len(b):
			return errAgain
		}
		m, err := w.Write(b[:got])
		n = int64(m)
		return err
	})
	return n, err
}

// errAgain says that a value was replaced while it was read.
var errAgain = errors.New("again")

func again(read func() error) error {
	for range maxRestarts {
		if err := read(); err != errAgain {
			return err
		}
	}
	return ErrReplaced
}

// first reads what a key itself holds: the value into buf, or its root.
func (v *Values) first(ctx context.Context, key, buf []byte) (size int, r *root, err error) {
	b := buf
	small := len(b) < rootHeader
	if small {
		b = make([]byte, rootHeader)
	}
	size, err = v.kv.fetch(ctx, key, b)
	have := b[:min(size, len(b))]
	switch {
	case errors.Is(err, ErrTransferSize):
		return 0, nil, fmt.Errorf("the value was not split: %w", err)
	case err != nil:
		return 0, nil, err
	case isRoot(have) && size == len(have):
		r, err = decodeRoot(key, have)
		return 0, r, err
	case isRoot(have):
		if _, err = decodeRootHeader(have, size); err == nil { // before so much memory is used
			r, err = v.root(ctx, key, size)
		}
		return 0, r, err
	case small:
		copy(buf, have)
	}
	return size, nil, nil
}

// root reads a root of size bytes.
func (v *Values) root(ctx context.Context, key []byte, size int) (*root, error) {
	b := make([]byte, size)
	n, err := v.kv.fetch(ctx, key, b)
	switch {
	case errors.Is(err, ErrTransferSize):
		return nil, fmt.Errorf("the value's root: %w", err)
	case err != nil:
		return nil, err
	case n != size || !isRoot(b):
		return nil, errAgain
	}
	return decodeRoot(key, b)
}

// partError says that a part is not what its root promises.
type partError struct {
	i   int64
	why string
}

func (e *partError) Error() string { return fmt.Sprintf("part %d %s", e.i, e.why) }

// why finds out what an error in reading parts means: errAgain when the value has been replaced meanwhile.
func (v *Values) why(ctx context.Context, key []byte, r *root, err error) error {
	var part *partError
	if !errors.As(err, &part) {
		return err
	}
	_, now, e := v.header(ctx, key)
	switch {
	case e != nil && !errors.Is(e, nvmeof.KeyDoesNotExist):
		return e
	case e == nil && now != nil && now.generation == r.generation:
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return errAgain
}

// parts reads the first bytes of a split value that fit into buf.
func (v *Values) parts(ctx context.Context, r *root, buf []byte) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(partWindow)
	for i := int64(0); i < r.parts() && i*r.part < int64(len(buf)) && ctx.Err() == nil; i++ {
		dst := buf[i*r.part:]
		dst = dst[:min(int64(len(dst)), r.length(i))]
		g.Go(func() error { return v.readPart(ctx, r, i, dst) })
	}
	return g.Wait()
}

// readPart reads the first bytes of part i that fit into dst.
func (v *Values) readPart(ctx context.Context, r *root, i int64, dst []byte) error {
	n := r.length(i)
	b := dst
	if limit := v.kv.limit(b); int64(len(b)) < n || limit < n && n <= v.kv.limit(nil) {
		b = make([]byte, n) // to be checked all of it is needed, best in one command
	}
	size, err := v.kv.fetch(ctx, partKey(r.generation, i), b)
	switch {
	case errors.Is(err, nvmeof.KeyDoesNotExist):
		return &partError{i, "is absent"}
	case errors.Is(err, ErrTransferSize):
		return fmt.Errorf("the value is in parts: %w", err)
	case err != nil:
		return err
	case int64(size) != n:
		return &partError{i, fmt.Sprintf("has %d bytes, not %d", size, n)}
	case xxh3.Hash(b) != r.digests[i]:
		return &partError{i, "does not match its checksum"}
	}
	copy(dst, b)
	return nil
}

// stream writes a split value to w, in order, with several parts in flight.
func (v *Values) stream(ctx context.Context, r *root, w io.Writer) (n int64, err error) {
	type part struct {
		b   []byte
		err error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	free := make(chan []byte, partWindow)
	for range partWindow {
		free <- nil
	}
	order := make(chan chan part, partWindow)
	go func() {
		defer close(order)
		for i := range r.parts() {
			var b []byte
			select {
			case b = <-free:
			case <-ctx.Done():
				return
			}
			if b == nil {
				b = make([]byte, min(r.part, r.size))
			}
			done := make(chan part, 1)
			order <- done
			go func() {
				b := b[:r.length(i)]
				done <- part{b, v.readPart(ctx, r, i, b)}
			}()
		}
	}()
	defer func() { // the buffers are in use until the last part has come
		cancel()
		for done := range order {
			<-done
		}
	}()
	for done := range order {
		p := <-done
		if p.err != nil {
			return n, p.err
		}
		m, err := w.Write(p.b)
		n += int64(m)
		if err != nil {
			return n, err
		}
		free <- p.b[:cap(p.b)]
	}
	return n, context.Cause(ctx)
}
