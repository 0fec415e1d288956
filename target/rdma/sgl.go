package rdma

import (
	"math"

	"github.com/kvof/kvof/nvmeof"
)

const (
	// inCapsule is the most data, in bytes, of a capsule: IOCCSZ less the command.
	inCapsule = 4096
	// maxDescriptors is MSDBD: 16 of nearly 16 MiB are far more than the largest value.
	maxDescriptors = 16
)

// descriptor is a piece of the host's memory.
type descriptor struct {
	addr uint64
	len  uint32
	key  uint32
}

// sgl is a command's data at the host, and how far it has been transferred.
type sgl struct {
	d          [maxDescriptors]descriptor
	n          int    // descriptors
	at         int    // the next one
	off        uint32 // in it
	key        uint32 // to invalidate by the response
	invalidate bool
}

// parse reads a command's SGL. data is what came in the capsule behind the command. It returns how much data the SGL
// describes and, when that is in the capsule, the data.
func (s *sgl) parse(c *nvmeof.Command, data []byte) (length uint32, inline []byte, st nvmeof.Status) {
	s.n, s.at, s.off, s.invalidate = 0, 0, 0, false
	g := c.SGL()
	switch g.ID() {
	case nvmeof.SGLKeyed, nvmeof.SGLKeyedInvalidate:
		if st := s.add(&g, 0); st != nvmeof.Success {
			return 0, nil, st
		}
		return g.KeyedLength(), nil, nvmeof.Success
	case nvmeof.SGLOffset:
		switch off, n := g.Address(), uint64(g.Length()); {
		case c.Direction() != nvmeof.HostToController && n > 0:
			return 0, nil, nvmeof.InvalidField | nvmeof.DNR
		case off > uint64(len(data)):
			return 0, nil, nvmeof.SGLOffsetInvalid | nvmeof.DNR
		case n > uint64(len(data))-off:
			return 0, nil, nvmeof.DataSGLLength | nvmeof.DNR
		default:
			return uint32(n), data[off : off+n], nvmeof.Success
		}
	case nvmeof.SGLLastSegment:
		return s.segment(&g, data)
	}
	if g.Length() != 0 { // hosts leave the descriptor of a command without data at zero
		return 0, nil, nvmeof.SGLTypeInvalid | nvmeof.DNR
	}
	return 0, nil, nvmeof.Success
}

// segment reads descriptors in the capsule.
func (s *sgl) segment(g *nvmeof.SGL, data []byte) (length uint32, _ []byte, st nvmeof.Status) {
	off, n := g.Address(), uint64(g.Length())
	switch {
	case off > uint64(len(data)):
		return 0, nil, nvmeof.SGLOffsetInvalid | nvmeof.DNR
	case n == 0 || n%nvmeof.SGLSize != 0 || n > uint64(len(data))-off:
		return 0, nil, nvmeof.InvalidSegment | nvmeof.DNR
	case n/nvmeof.SGLSize > maxDescriptors:
		return 0, nil, nvmeof.InvalidSGLCount | nvmeof.DNR
	}
	total := uint64(0)
	for i := range n / nvmeof.SGLSize {
		d := nvmeof.SGL(data[off+i*nvmeof.SGLSize:])
		if id := d.ID(); id != nvmeof.SGLKeyed && id != nvmeof.SGLKeyedInvalidate {
			return 0, nil, nvmeof.SGLTypeInvalid | nvmeof.DNR
		}
		if st := s.add(&d, int(i)); st != nvmeof.Success {
			return 0, nil, st
		}
		total += uint64(d.KeyedLength())
	}
	if total > math.MaxUint32 {
		return 0, nil, nvmeof.DataSGLLength | nvmeof.DNR
	}
	return uint32(total), nil, nvmeof.Success
}

// add takes over descriptor i. One response can invalidate one key: that of the first descriptor, if it asks for that.
func (s *sgl) add(g *nvmeof.SGL, i int) nvmeof.Status {
	n := g.KeyedLength()
	if g.Address() > math.MaxUint64-uint64(n) {
		return nvmeof.SGLOffsetInvalid | nvmeof.DNR
	}
	if i == 0 && g.ID() == nvmeof.SGLKeyedInvalidate {
		s.key, s.invalidate = g.Key(), true
	}
	if n > 0 {
		s.d[s.n] = descriptor{g.Address(), n, g.Key()}
		s.n++
	}
	return nvmeof.Success
}

// next returns where the next bytes of the data are at the host, at most n, and moves on behind them. It returns 0 bytes
// when all are done.
func (s *sgl) next(n uint64) (addr uint64, key uint32, got uint32) {
	if s.at == s.n {
		return 0, 0, 0
	}
	d := &s.d[s.at]
	addr, key, got = d.addr+uint64(s.off), d.key, uint32(min(n, uint64(d.len-s.off)))
	if s.off += got; s.off == d.len {
		s.at, s.off = s.at+1, 0
	}
	return addr, key, got
}

// room is how many bytes lie behind the last that next returned, in the same descriptor.
func (s *sgl) room() uint32 {
	if s.at == s.n || s.off == 0 {
		return 0
	}
	return s.d[s.at].len - s.off
}
