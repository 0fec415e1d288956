package target

import (
	"math/bits"
	"sync/atomic"
	"time"

	"github.com/kvof/kvof/nvmeof"
)

// Histogram counts latencies in buckets that double: bucket i holds those under 2^i microseconds, the last the rest.
type Histogram struct {
	buckets [histogramBuckets]atomic.Uint64
	sum     atomic.Uint64 // nanoseconds
}

const histogramBuckets = 26 // the last bound is 2^24 us, about 17 s

func (h *Histogram) observe(d time.Duration) {
	h.buckets[min(bits.Len64(uint64(d/time.Microsecond)), histogramBuckets-1)].Add(1)
	h.sum.Add(uint64(d))
}

// HistogramSnapshot is a histogram at one moment.
type HistogramSnapshot struct {
	Count  uint64          `json:"count"`
	Sum    time.Duration   `json:"sum_ns"`
	Bounds []time.Duration `json:"bounds_ns"` // upper bounds, exclusive
	Counts []uint64        `json:"counts"`    // one for each bound, and one more for what is above
}

func (h *Histogram) snapshot() (s HistogramSnapshot) {
	for i := range h.buckets {
		n := h.buckets[i].Load()
		s.Counts = append(s.Counts, n)
		s.Count += n
		if i < histogramBuckets-1 {
			s.Bounds = append(s.Bounds, time.Microsecond<<i)
		}
	}
	s.Sum = time.Duration(h.sum.Load())
	return s
}

// commandStats counts the commands of one namespace by opcode.
type commandStats struct {
	byOpcode          [nvmeof.OpExist + 1]opStats
	existMany         opStats
	retrieveRange     opStats
	bytesIn, bytesOut counter
	mediaErrors       counter
}

// of returns an opcode's statistics, nil for one that no namespace has.
func (s *commandStats) of(op uint8) *opStats {
	switch {
	case op == nvmeof.OpExistMany:
		return &s.existMany
	case op == nvmeof.OpRetrieveRange:
		return &s.retrieveRange
	case int(op) < len(s.byOpcode):
		return &s.byOpcode[op]
	}
	return nil
}

// count returns how many commands with an opcode have ended.
func (s *commandStats) count(op uint8) (n uint64) {
	o := s.of(op)
	for i := range o.latency.buckets {
		n += o.latency.buckets[i].Load()
	}
	return n
}

type opStats struct {
	latency Histogram
	errors  counter // other than a key that is absent, present or replaced
}

// observe counts one command; in and out are its data bytes.
func (s *commandStats) observe(op uint8, st nvmeof.Status, d time.Duration, in, out uint32) {
	o := s.of(op)
	if o == nil {
		return
	}
	o.latency.observe(d)
	switch st.Code() {
	case nvmeof.Success, nvmeof.KeyDoesNotExist, nvmeof.KeyExists, nvmeof.ValueReplaced:
	case nvmeof.UnrecoveredError, nvmeof.UnrecoveredReadError, nvmeof.WriteFault:
		s.mediaErrors.Add(1)
		o.errors.Add(1)
	default:
		o.errors.Add(1)
	}
	if in > 0 {
		s.bytesIn.Add(uint64(in))
	}
	if out > 0 {
		s.bytesOut.Add(uint64(out))
	}
}
