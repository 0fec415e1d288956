package host

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/kvof/kvof/nvmeof"
)

// Swept is what [Values.Sweep] found. A group is the parts of one generation.
type Swept struct {
	Live    int // groups that belong to a value
	Young   int // groups without a value, stored too recently to tell
	Unknown int // groups without a note, or whose value's root is not known, which are left alone
	Deleted int // groups that were deleted
	Parts   int // parts in those
}

// Sweep deletes parts that belong to no value: those of a writer that died, of one that lost against another which
// replaced the same value at the same time, or of a deletion that was not finished. A group whose storing began less
// than age ago is left alone, since its writer may be about to store the root: age must be more than any writer takes,
// and than the difference between the hosts' clocks. 24 hours is a good age.
func (v *Values) Sweep(ctx context.Context, age time.Duration) (Swept, error) {
	var s Swept
	groups := map[uint64][]int64{}
	for key, err := range v.kv.List(ctx, nil) {
		if err != nil {
			return s, err
		}
		if g, i, ok := parsePartKey(key); ok {
			groups[g] = append(groups[g], i)
		}
	}
	for g, parts := range groups {
		n, err := v.note(ctx, g)
		switch {
		case errors.Is(err, nvmeof.KeyDoesNotExist) || err == nil && n == nil:
			s.Unknown++
			continue
		case err != nil:
			return s, err
		}
		_, r, err := v.header(ctx, n.key)
		switch {
		case errors.Is(err, ErrDamaged): // or of a later format
			s.Unknown++
			continue
		case err != nil && !errors.Is(err, nvmeof.KeyDoesNotExist):
			return s, err
		case r != nil && r.generation == g:
			s.Live++
			continue
		case time.Since(n.time) < age:
			s.Young++
			continue
		}
		for _, i := range parts {
			if i == noteIndex {
				continue
			}
			if err := v.deletePart(ctx, partKey(g, i)); err != nil {
				return s, fmt.Errorf("delete part %d of generation %016x: %w", i, g, err)
			}
			s.Parts++
		}
		if err := v.deletePart(ctx, partKey(g, noteIndex)); err != nil { // last, so that an unfinished sweep can be repeated
			return s, err
		}
		s.Deleted++
	}
	return s, nil
}

// note reads a generation's note; nil when it is not one.
func (v *Values) note(ctx context.Context, generation uint64) (*note, error) {
	b := make([]byte, noteSize)
	n, err := v.kv.Retrieve(ctx, partKey(generation, noteIndex), b)
	if err != nil {
		return nil, err
	}
	found, err := decodeNote(b[:min(n, len(b))])
	if err != nil || n != len(b) {
		return nil, nil // somebody else's, under such a key
	}
	return found, nil
}
