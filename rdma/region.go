package rdma

import (
	"errors"
	"unsafe"
)

// MR is one registration: the keys of a part of a Region.
type MR struct {
	LKey, RKey uint32
	Close      func() error
}

// Region is registered memory. Where it is larger than one registration of the device can be it has several; every part
// but the last has the same size.
type Region struct {
	mem  []byte
	part int // bytes of each MR
	mrs  []MR
}

// NewRegion registers mem in parts of at most max bytes, a power of two or at least len(mem): for implementations of Device.
func NewRegion(mem []byte, max uint64, register func(part []byte) (MR, error)) (*Region, error) {
	r := &Region{mem: mem, part: len(mem)}
	if uint64(len(mem)) > max {
		r.part = 1
		for uint64(r.part)*2 <= max {
			r.part *= 2
		}
	}
	for off := 0; off < len(mem); off += r.part {
		m, err := register(mem[off:min(off+r.part, len(mem))])
		if err != nil {
			return nil, errors.Join(err, r.Close())
		}
		r.mrs = append(r.mrs, m)
	}
	return r, nil
}

// Contains tells whether b lies in the region.
func (r *Region) Contains(b []byte) bool {
	_, ok := r.offset(b)
	return ok
}

// Overlap tells whether a and b have a byte in common. It looks at addresses only.
func Overlap(a, b []byte) bool {
	at, to := uintptr(unsafe.Pointer(unsafe.SliceData(a))), uintptr(unsafe.Pointer(unsafe.SliceData(b)))
	return len(a) > 0 && len(b) > 0 && at < to+uintptr(len(b)) && to < at+uintptr(len(a))
}

func (r *Region) offset(b []byte) (int, bool) {
	off := int(uintptr(unsafe.Pointer(unsafe.SliceData(b))) - uintptr(unsafe.Pointer(unsafe.SliceData(r.mem)))) // huge, or negative, outside
	return off, off >= 0 && off < len(r.mem) && len(b) <= len(r.mem)-off
}

// Split returns an SGE for as much of the beginning of b, which lies in the region, as one registration covers, and the
// key that a peer would use for it. Nearly always that is all of b.
func (r *Region) Split(b []byte) (s SGE, rkey uint32) {
	off, _ := r.offset(b)
	m := &r.mrs[off/r.part]
	n := min(len(b), r.part-off%r.part)
	return SGE{Addr: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))), Length: uint32(min(n, 1<<31)), LKey: m.LKey}, m.RKey
}

// Len is the region's size in bytes, Parts the number of registrations.
func (r *Region) Len() int { return len(r.mem) }

// Parts is the number of registrations.
func (r *Region) Parts() int { return len(r.mrs) }

// Close ends the registrations. No work request names the memory any more.
func (r *Region) Close() error {
	var errs []error
	for _, m := range r.mrs {
		errs = append(errs, m.Close())
	}
	r.mrs = nil
	return errors.Join(errs...)
}
