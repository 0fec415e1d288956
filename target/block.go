package target

import (
	"bytes"
	"cmp"
	"errors"
	"sync"
	"unsafe"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/uring"
)

// blockEffects are the NVM commands for log page 05h.
var blockEffects = map[uint8]uint32{
	nvmeof.OpFlush:       nvmeof.EffectSupported,
	nvmeof.OpRead:        nvmeof.EffectSupported,
	nvmeof.OpCompare:     nvmeof.EffectSupported,
	nvmeof.OpVerify:      nvmeof.EffectSupported,
	nvmeof.OpWrite:       nvmeof.EffectSupported | nvmeof.EffectContent,
	nvmeof.OpWriteZeroes: nvmeof.EffectSupported | nvmeof.EffectContent,
	nvmeof.OpDSM:         nvmeof.EffectSupported | nvmeof.EffectContent,
	nvmeof.OpCopy:        nvmeof.EffectSupported | nvmeof.EffectContent, // on drives that have it
}

// CDW12 and CDW11 bits.
const (
	fua     = 1 << 30            // Force Unit Access
	deac    = 1 << 25            // Write Zeroes: Deallocate
	handOn  = 1<<31 | fua | deac // what a drive is told too; bit 31 is Limited Retry
	dsmAD   = 1 << 2             // DSM: Attribute - Deallocate
	maxList = nvmeof.MaxCopyRanges * nvmeof.CopyRangeSize
)

var errMiscompare = errors.New("data differs")

// blockCommand checks an NVM command and starts it.
func blockCommand(r *Request) {
	c, n := &r.Cmd, r.ns
	op := c.Opcode()
	switch {
	case blockEffects[op] == 0, op == nvmeof.OpCopy && !n.forwards(nvmeof.ONCSCopy):
		r.fail(nvmeof.InvalidOpcode)
		return
	case n.ReadOnly && blockEffects[op]&nvmeof.EffectContent != 0:
		r.fail(nvmeof.WriteProtected)
		return
	case op == nvmeof.OpFlush:
		r.proceed(flush)
		return
	case op == nvmeof.OpDSM:
		if want := (c.DW(10)&0xFF + 1) * nvmeof.DSMRangeSize; want > r.Length {
			r.fail(nvmeof.DataSGLLength)
			return
		}
		r.proceed(dsm)
		return
	case op == nvmeof.OpCopy:
		copyCommand(r)
		return
	}
	slba, blocks := c.SLBA(), uint64(c.DW(12)&0xFFFF)+1
	if slba >= n.blocks || blocks > n.blocks-slba {
		r.fail(nvmeof.LBAOutOfRange)
		return
	}
	hasData := op == nvmeof.OpRead || op == nvmeof.OpWrite || op == nvmeof.OpCompare
	if hasData && blocks<<n.lbads > uint64(r.Length) {
		r.fail(nvmeof.DataSGLLength)
		return
	}
	if r.stream == nil {
		r.stream = new(stream)
	}
	r.stream.reset(n, op, int64(slba<<n.lbads), int64(blocks<<n.lbads), c.DW(12))
	switch {
	case op == nvmeof.OpWriteZeroes:
		r.proceed(writeZeroes)
	case op == nvmeof.OpVerify && n.forwards(nvmeof.ONCSVerify):
		r.proceed(verify)
	case op == nvmeof.OpRead && readPiece(r):
	case op == nvmeof.OpRead, op == nvmeof.OpVerify:
		r.proceed(read)
	case op == nvmeof.OpCompare:
		r.detach(write) // it needs buffers, whatever the device
	case !writePiece(r):
		r.proceed(write)
	}
}

// read streams the blocks to the host; Verify reads them and sends nothing.
func read(r *Request) {
	s := r.stream
	verify := r.Cmd.Opcode() == nvmeof.OpVerify
	if r.ns.inline {
		if !verify {
			r.send(uring.View(r.ns.dev.View(s.off, s.left)), true)
		}
		r.complete(nvmeof.Success, 0)
		return
	}
	r.queue.reserve(r, holdFor(s.left, readHold))
	for {
		b, err := s.next()
		if err != nil {
			s.Abort()
			r.complete(statusOf(err), 0)
			return
		}
		if b.Data == nil {
			break
		}
		if verify {
			b.Put()
		} else {
			r.send(b, s.left == 0 && s.busy() == 0)
		}
	}
	r.complete(nvmeof.Success, 0)
}

// readPiece begins a Read of one piece of memory without a goroutine that waits for it, where there is room at once: the
// connection gets the piece from whoever takes the device's completions, its own reader if that is awake.
func readPiece(r *Request) bool {
	s := r.stream
	if r.Batch == nil || r.ns.inline || s.left > uring.MediumBuf || !r.queue.tryReserve(r, holdFor(s.left, readHold)) {
		return false
	}
	r.byBatch()
	s.start(uring.OpRead, s.ns.arena.Get(int(s.left)))
	return true
}

// writePiece is readPiece for a Write, whose data comes first.
func writePiece(r *Request) bool {
	s, d := r.stream, r.inPlace()
	switch {
	case r.Batch == nil || r.ns.inline || s.left > uring.MediumBuf || r.flushes():
		return false
	case d != nil:
		r.byBatch()
		s.start(uring.OpWrite, uring.View(d))
	case len(r.Inline) > 0:
		return false
	case !r.queue.tryReserve(r, holdFor(s.left, writeHold)):
		return false
	default:
		r.byBatch()
		r.receive(uint32(s.left), s, nil)
	}
	return true
}

// inPlace returns the data of a Write that came in the capsule, if the device can take it from there.
func (r *Request) inPlace() []byte {
	s, d := r.stream, r.Inline
	if !r.Stays || len(d) < int(s.left) || len(d) == 0 || s.op != nvmeof.OpWrite || r.ns.inline ||
		uintptr(unsafe.Pointer(&d[0]))%uintptr(r.ns.dev.BlockSize()) != 0 {
		return nil
	}
	return d[:s.left]
}

// byBatch has the reader's batch do the command's one operation, and its end end the command.
func (r *Request) byBatch() {
	if r.ended == nil {
		r.ended = r.pieceEnded
	}
	r.stream.then, r.stream.by = r.ended, r.Batch
}

// pieceEnded ends readPiece and writePiece.
func (r *Request) pieceEnded(err error, by *uring.Batch) {
	r.Async = by != r.Batch
	b := r.stream.take()
	if r.Cmd.Opcode() == nvmeof.OpWrite {
		b.Put()
		r.complete(writeStatus(err), 0)
		return
	}
	if err != nil {
		b.Put()
	} else {
		r.send(b, true)
	}
	r.complete(statusOf(err), 0)
}

// write brings the data of Write and Compare.
func write(r *Request) {
	s := r.stream
	if d := r.inPlace(); d != nil {
		s.start(uring.OpWrite, uring.View(d))
		written(r)
		return
	}
	if compare := s.op == nvmeof.OpCompare; !r.ns.inline || compare {
		r.queue.reserve(r, holdFor(s.left, writeHold))
		if compare && !r.ns.inline && !r.ns.forwards(nvmeof.ONCSCompare) {
			r.ns.shadow.open(r.ns.arena)
		}
	}
	r.receive(uint32(s.left), s, written)
}

// shadow is the memory that a namespace's Compares read the device into, one at a time.
type shadow struct {
	mu  sync.Mutex
	buf uring.Buf // since the first Compare
	op  uring.Op
}

func (s *shadow) open(arena *uring.Arena) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.buf.Data == nil {
		s.buf = arena.Get(uring.MediumBuf)
	}
}

// compare compares b with the device's bytes at off.
func (n *namespace) compare(off int64, b []byte) error {
	if have := n.dev.View(off, int64(len(b))); have != nil {
		return same(b, have)
	}
	s := &n.shadow
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(b) > 0 {
		have := s.buf.Data[:min(len(b), len(s.buf.Data))]
		s.op.Kind, s.op.Off, s.op.Data = uring.OpRead, off, have
		if err := cmp.Or(s.op.Do(n.dev), same(b[:len(have)], have)); err != nil {
			return err
		}
		b, off = b[len(have):], off+int64(len(have))
	}
	return nil
}

func same(a, b []byte) error {
	if !bytes.Equal(a, b) {
		return errMiscompare
	}
	return nil
}

// written ends a Write or Compare whose data is there.
func written(r *Request) {
	err := r.stream.finish()
	if r.Cmd.Opcode() != nvmeof.OpWrite {
		r.complete(statusOf(err), 0)
		return
	}
	if err == nil && r.flushes() {
		err = r.ns.flush()
	}
	r.complete(writeStatus(err), 0)
}

// flushes tells whether a Write ends with a flush of the device.
func (r *Request) flushes() bool { return r.Cmd.DW(12)&fua != 0 && r.ns.drive == nil }

// writeStatus is statusOf of what a Write met.
func writeStatus(err error) nvmeof.Status {
	st := statusOf(err)
	if st.Code() == nvmeof.UnrecoveredReadError {
		st = nvmeof.WriteFault
	}
	return st
}

func writeZeroes(r *Request) {
	s := r.stream
	kind := uring.OpZero
	if r.ns.drive == nil && r.Cmd.DW(12)&deac != 0 && r.ns.zeroAfterDiscard() {
		kind = uring.OpDiscard
	}
	r.complete(statusOf(s.whole(kind)), 0)
}

// verify has the drive read and check the blocks.
func verify(r *Request) { r.complete(statusOf(r.stream.whole(uring.OpVerify)), 0) }

// zeroAfterDiscard tells whether deallocated blocks read as zeroes, as they do in files and memory.
func (n *namespace) zeroAfterDiscard() bool {
	if n.drive != nil {
		return n.drive.Namespace.DLFEAT&7 == 1
	}
	return n.Device != configs.DeviceBlock
}

// ranges takes the data of a Dataset Management or Copy command.
type ranges struct {
	b   [maxList]byte
	n   int
	ops []uring.Op // made as they are needed, and kept
}

func (s *ranges) Ahead(off, limit int) []byte { return s.b[s.n+off : min(len(s.b), s.n+off+limit)] }
func (s *ranges) Filled(n int)                { s.n += n }
func (s *ranges) Abort()                      {}

// list makes the request's ranges empty.
func (r *Request) list() *ranges {
	if r.ranges == nil {
		r.ranges = new(ranges)
	}
	r.ranges.n = 0
	return r.ranges
}

func dsm(r *Request) {
	r.receive((r.Cmd.DW(10)&0xFF+1)*nvmeof.DSMRangeSize, r.list(), deallocate)
}

// deallocate checks all ranges before it touches the first. Ranges for other attributes are advice, not acted on.
func deallocate(r *Request) {
	n, l := r.ns, r.ranges
	data := l.b[:l.n]
	var g nvmeof.DSMRange
	for b := data; len(b) > 0; b = b[nvmeof.DSMRangeSize:] {
		g.Decode(b)
		if !n.holds(g.SLBA, uint64(g.Blocks)) {
			r.fail(nvmeof.LBAOutOfRange)
			return
		}
	}
	var err error
	if r.Cmd.DW(11)&dsmAD != 0 {
		if most := len(data) / nvmeof.DSMRangeSize; len(l.ops) < most {
			l.ops = make([]uring.Op, most)
		}
		batch := make([]*uring.Op, 0, len(l.ops))
		for b := data; len(b) > 0; b = b[nvmeof.DSMRangeSize:] {
			g.Decode(b)
			op := &l.ops[len(batch)]
			op.Kind, op.Off, op.Len = uring.OpDiscard, int64(g.SLBA<<n.lbads), int64(g.Blocks)<<n.lbads
			batch = append(batch, op)
		}
		n.dev.Submit(batch...) // together: a drive gets them in one command
		for _, op := range batch {
			err = cmp.Or(err, op.Wait())
		}
	}
	r.complete(statusOf(err), 0)
}

// holds tells whether a range of blocks lies in the namespace.
func (n *namespace) holds(slba, blocks uint64) bool {
	return slba <= n.blocks && blocks <= n.blocks-slba
}

// copyCommand takes a Copy, which only drives do.
func copyCommand(r *Request) {
	switch n := r.Cmd.DW(12)&0xFF + 1; {
	case r.Cmd.DW(12)>>8&0xF != 0: // the descriptor format
		r.fail(nvmeof.InvalidField)
	case n*nvmeof.CopyRangeSize > r.Length:
		r.fail(nvmeof.DataSGLLength)
	default:
		r.proceed(func(r *Request) { r.receive(n*nvmeof.CopyRangeSize, r.list(), copyRanges) })
	}
}

func copyRanges(r *Request) {
	n, data := r.ns, r.ranges.b[:r.ranges.n]
	var g nvmeof.CopyRange
	var all uint64
	for b := data; len(b) > 0; b = b[nvmeof.CopyRangeSize:] {
		g.Decode(b)
		all += uint64(g.Blocks)
		if !n.holds(g.SLBA, uint64(g.Blocks)) {
			r.fail(nvmeof.LBAOutOfRange)
			return
		}
	}
	if !n.holds(r.Cmd.SLBA(), all) {
		r.fail(nvmeof.LBAOutOfRange)
		return
	}
	op := uring.Op{Kind: uring.OpCopy, Off: int64(r.Cmd.SLBA() << n.lbads), Data: data, Control: control(r.Cmd.DW(12))}
	r.complete(statusOf(op.Do(n.dev)), 0)
}

// control is what of a command's CDW12 a drive is told too.
func control(dw12 uint32) uint16 { return uint16(dw12 & handOn >> 16) }

const (
	// window is how many device operations of one command are in flight together.
	window = 4
	// lookahead is how many pieces of a command's data come at a time.
	lookahead = 4
)

// stream moves a range of a device through a window of arena pieces: out of it by next, into it (or against it, for
// Compare) as a sink. On a memory device the sink hands out the device's own memory.
type stream struct {
	ns        *namespace
	op        uint8
	off, left int64 // the part not yet started
	control   uint16
	err       error                     // the first
	then      func(error, *uring.Batch) // ends the one operation; nil: they are waited for
	by        *uring.Batch              // submits it then

	ops        [window]uring.Op
	bufs       [window]uring.Buf
	head, tail int // ops[head%window] is the oldest in flight
	batch      uring.Batch
	pieces     [lookahead]uring.Buf // for what comes, in order
	coming     int                  // of these
	filled     int                  // bytes of the first
}

func (s *stream) reset(n *namespace, op uint8, off, length int64, dw12 uint32) {
	s.ns, s.op, s.off, s.left, s.control, s.err, s.then = n, op, off, length, control(dw12), nil, nil
}

func (s *stream) busy() int { return s.tail - s.head }

// start submits a device operation on the next piece, or leaves that to by.
func (s *stream) start(kind uring.OpKind, b uring.Buf) {
	if s.then != nil {
		s.by.Add(s.ns.dev, s.prepare(kind, b))
		return
	}
	s.add(kind, b)
	s.batch.Submit()
}

// add is start, but that Submit is left to the caller.
func (s *stream) add(kind uring.OpKind, b uring.Buf) { s.batch.Add(s.ns.dev, s.prepare(kind, b)) }

// prepare returns the operation on the next piece.
func (s *stream) prepare(kind uring.OpKind, b uring.Buf) *uring.Op {
	i := s.tail % window
	s.bufs[i] = b
	op := &s.ops[i]
	op.Kind, op.Off, op.Data, op.Control, op.Then = kind, s.off, b.Data, s.control, s.then
	s.off += int64(len(b.Data))
	s.left -= int64(len(b.Data))
	s.tail++
	return op
}

// whole does an operation without data on the range.
func (s *stream) whole(kind uring.OpKind) error {
	op := &s.ops[0]
	op.Kind, op.Off, op.Len, op.Data, op.Control, op.Then = kind, s.off, s.left, nil, s.control, nil
	return op.Do(s.ns.dev)
}

// retire waits for the oldest operation and returns its piece.
func (s *stream) retire() uring.Buf {
	err := s.ops[s.head%window].Wait()
	if s.err == nil {
		s.err = err
	}
	return s.take()
}

// take returns the piece of the oldest operation, which is over.
func (s *stream) take() uring.Buf {
	i := s.head % window
	s.head++
	b := s.bufs[i]
	s.bufs[i] = uring.Buf{}
	return b
}

// next returns the next piece read, reading ahead as far as the arena has memory to spare; the zero Buf at the end.
// The caller owns the piece.
func (s *stream) next() (uring.Buf, error) {
	for s.left > 0 && s.busy() < window {
		n := int(min(s.left, uring.LargeBuf))
		b, ok := s.ns.arena.TryGet(n)
		if !ok {
			if s.busy() > 0 {
				break
			}
			b = s.ns.arena.Get(n)
		}
		s.add(uring.OpRead, b)
	}
	s.batch.Submit()
	if s.busy() == 0 {
		return uring.Buf{}, nil
	}
	b := s.retire()
	if s.err != nil {
		b.Put()
		return uring.Buf{}, s.err
	}
	return b, nil
}

// Ahead implements sink.
func (s *stream) Ahead(off, limit int) []byte {
	if s.ns.inline && s.op == nvmeof.OpWrite {
		return s.ns.dev.View(s.off+int64(off), min(s.left-int64(off), int64(limit)))
	}
	off += s.filled
	i := off / uring.LargeBuf
	if i == lookahead {
		return nil
	}
	if i == s.coming {
		if s.busy()+s.coming == window {
			s.retire().Put()
		}
		s.pieces[i] = s.ns.arena.Get(int(min(s.left-int64(off), uring.LargeBuf)))
		s.coming++
	}
	b := s.pieces[i].Data[off%uring.LargeBuf:]
	return b[:min(len(b), limit)]
}

// Filled implements sink: a full piece starts its device operation.
func (s *stream) Filled(n int) {
	if s.ns.inline && s.op == nvmeof.OpWrite {
		s.off += int64(n)
		s.left -= int64(n)
		return
	}
	b := s.pieces[0]
	if s.filled += n; s.filled < len(b.Data) {
		return
	}
	s.coming--
	copy(s.pieces[:], s.pieces[1:])
	s.pieces[lookahead-1], s.filled = uring.Buf{}, 0
	if s.op == nvmeof.OpCompare && s.ns.forwards(nvmeof.ONCSCompare) {
		s.start(uring.OpCompare, b)
		return
	}
	if s.op == nvmeof.OpCompare {
		if s.err == nil {
			s.err = s.ns.compare(s.off, b.Data)
		}
		s.off += int64(len(b.Data))
		s.left -= int64(len(b.Data))
		b.Put()
		return
	}
	s.start(uring.OpWrite, b)
}

// finish waits for what is in flight and returns the first error.
func (s *stream) finish() error {
	for s.busy() > 0 {
		s.retire().Put()
	}
	return s.err
}

// Abort implements sink, and ends a read early.
func (s *stream) Abort() {
	s.left = 0
	_ = s.finish()
	for _, b := range s.pieces {
		b.Put()
	}
	s.pieces, s.coming, s.filled = [lookahead]uring.Buf{}, 0, 0
}
