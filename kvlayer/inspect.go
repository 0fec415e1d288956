package kvlayer

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/kvof/kvof/uring"
	"github.com/zeebo/xxh3"
)

// Inspection is what the superblock of a device says of its pool.
type Inspection struct {
	Version     int         `json:"version"` // of the format
	Pool        uuid.UUID   `json:"pool"`
	Generation  uint64      `json:"generation"` // of the superblock
	Copies      int         `json:"copies"`     // of the superblock that are whole, of 2
	Member      int         `json:"member"`     // which of the pool's devices this is
	Members     int         `json:"members"`
	Tenants     []uuid.UUID `json:"tenants"`
	SegmentSize int64       `json:"segment_size"` // bytes
	Segments    int64       `json:"segments"`
	Extent      int64       `json:"extent"` // bytes of a value in one record at most
}

// InspectedSegment is one segment of a device.
type InspectedSegment struct {
	Index      int64             `json:"index"`
	Offset     int64             `json:"offset"` // bytes, on the device
	State      string            `json:"state"`  // unused, free, open, sealed or damaged
	Generation uint64            `json:"generation"`
	Tenant     int               `json:"tenant"`
	Class      int               `json:"class"`
	Tail       int64             `json:"tail"` // bytes in use, dead ones among them
	Records    int               `json:"records"`
	Live       int               `json:"live"`       // records
	LiveBytes  int64             `json:"live_bytes"` // of them, with headers and padding
	Damaged    int               `json:"damaged"`    // live records that are not what their checksums say
	List       []InspectedRecord `json:"list,omitempty"`
}

// InspectedRecord is one live record.
type InspectedRecord struct {
	Key    string    `json:"key"` // hexadecimal
	Part   int       `json:"part,omitempty"`
	Pinned bool      `json:"pinned,omitempty"`
	Size   int64     `json:"size"`   // bytes of the whole value
	Offset int64     `json:"offset"` // bytes, on the device
	Seq    uint64    `json:"seq"`
	Stored time.Time `json:"stored"`
	From   uint64    `json:"from,omitempty"` // the generation of the segment it was copied from
	Damage string    `json:"damage,omitempty"`
}

// Inspect reads a device of a pool that nobody has open, and changes nothing. It
// calls f with each segment in turn until f fails. With verify it reads all live values and compares
// every checksum; without, the metadata alone.
func Inspect(dev uring.Device, verify bool, f func(InspectedSegment) error) (Inspection, error) {
	p := &Pool{log: slog.New(slog.DiscardHandler), mem: dev.View(0, block) != nil}
	d := &device{Device: dev, p: p}
	p.devs = []*device{d}
	var op uring.Op
	if dev.Size() < superArea {
		return Inspection{}, fmt.Errorf("%w: it has %d bytes", ErrForeign, dev.Size())
	}
	supers, err := d.loadSuper(&op)
	if err != nil {
		return Inspection{}, err
	}
	if len(supers) == 0 {
		return Inspection{}, fmt.Errorf("%w: it is empty", ErrForeign)
	}
	p.super = slices.MaxFunc(supers, func(a, b super) int { return cmp.Compare(a.gen, b.gen) })
	s := p.super
	d.member = s.member
	in := Inspection{Version: formatVersion, Pool: s.id, Generation: s.gen, Copies: len(supers), Member: s.member, Members: len(s.epochs),
		Tenants: s.tenants, SegmentSize: s.segSize, Segments: s.segments, Extent: s.extent}
	buf := aligned(uring.MediumBuf)
	for i := range min(s.segments, segmentsOf(dev.Size(), s.segSize)) {
		g := &segment{dev: d, off: dataStart + i*s.segSize}
		seg, err := g.inspect(&op, buf, verify)
		if err == nil {
			err = f(seg)
		}
		if err != nil {
			return in, err
		}
	}
	return in, nil
}

func (g *segment) inspect(op *uring.Op, buf []byte, verify bool) (InspectedSegment, error) {
	d, p := g.dev, g.dev.p
	s := InspectedSegment{Index: g.index(), Offset: g.off, State: "damaged"}
	b, err := d.read(op, buf, g.off, block)
	if errors.Is(err, uring.ErrMedia) {
		return s, nil
	} else if err != nil {
		return s, err
	}
	h, ok := parseSegment(b, p.super.seed)
	switch {
	case !ok && le.Uint64(b[8:]) != le.Uint64(segmentMagic[:]), ok && (h.id != p.super.id || h.member != d.member || h.epoch != p.super.epochs[d.member]):
		s.State = "unused"
		return s, nil
	case !ok || h.index != s.Index:
		return s, nil
	}
	g.gen = h.gen
	s.State, s.Generation, s.Tenant, s.Class = "open", h.gen, h.tenant, int(h.class)
	if h.free {
		s.State = "free"
		return s, nil
	}
	rs, tail, sealed, err := g.readSummary(op, buf)
	if err != nil && !errors.Is(err, uring.ErrMedia) {
		return s, err
	}
	if s.State = "sealed"; !sealed {
		s.State, rs = "open", nil
		if tail, _, err = g.scan(op, buf, func(r record) { rs = append(rs, r) }); err != nil {
			return s, err
		}
	}
	s.Tail, s.Records = tail, len(rs)
	for _, r := range rs {
		if r.kind != recordLive {
			continue
		}
		n := partSize(r.size, r.part, p.super.extent)
		s.Live++
		s.LiveBytes += span(n)
		l := InspectedRecord{Key: r.key.String(), Part: r.part, Pinned: r.pinned, Size: r.size, Offset: r.off, Seq: r.seq,
			Stored: time.Unix(seqEpoch+int64(r.seq>>20), 0).UTC(), From: r.from}
		if verify {
			if l.Damage, err = d.check(op, buf, r, n); err != nil {
				return s, err
			}
			if l.Damage != "" {
				s.Damaged++
			}
		}
		s.List = append(s.List, l)
	}
	return s, nil
}

// check compares a record on the device with what is known of it, and its n bytes of data with
// their checksums. It says what does not match.
func (d *device) check(op *uring.Op, buf []byte, want record, n int64) (damage string, err error) {
	p := d.p
	b, err := d.read(op, buf, want.off, block)
	if errors.Is(err, uring.ErrMedia) {
		return "the header cannot be read", nil
	} else if err != nil {
		return "", err
	}
	r, ok := parseRecord(b, p.super.seed, p.super.extent)
	r.from, r.pinned = want.from, want.pinned // an adopted copy no longer says that it is one; a crash may have ended a Pin half-way
	if !ok || r != want {
		return "header", nil
	}
	for i, sum := range appendSums(nil, b, r, p.super.extent) {
		at := int64(i) * pieceSize
		m := min(pieceSize, n-at)
		b, err := d.read(op, buf, want.off+block+at, roundUp(m))
		switch {
		case errors.Is(err, uring.ErrMedia):
			return fmt.Sprintf("piece %d cannot be read", i), nil
		case err != nil:
			return "", err
		case xxh3.Hash(b[:m]) != sum:
			return fmt.Sprintf("piece %d", i), nil
		}
	}
	return "", nil
}
