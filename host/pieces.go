package host

// pduVecs is how many pieces of memory a PDU may at least count on in one write: header, digest, and six of data.
const pduVecs = 8

// pieces is a command's data: one buffer, or several that follow each other on the wire. Of a slot's, sender or receiver
// use it, never both, and it keeps where they are.
type pieces struct {
	list [][]byte // none is empty
	size int      // bytes, of all
	i    int      // the piece of the last at
	base int      // bytes before it
}

func (p *pieces) set(d data) {
	p.list, p.size, p.i, p.base = p.list[:0], 0, 0, 0
	p.add(d.buf)
	for _, b := range d.pieces {
		p.add(b)
	}
}

func (p *pieces) add(b []byte) {
	if len(b) > 0 {
		p.list = append(p.list, b)
		p.size += len(b)
	}
}

// drop forgets the caller's memory.
func (p *pieces) drop() {
	clear(p.list)
	p.list, p.size = p.list[:0], 0
}

// at returns what is left of the piece in which byte off lies, from that byte on; off is less than size.
func (p *pieces) at(off int) []byte {
	if off < p.base {
		p.i, p.base = 0, 0
	}
	for off-p.base >= len(p.list[p.i]) {
		p.base += len(p.list[p.i])
		p.i++
	}
	return p.list[p.i][off-p.base:]
}

// fit returns how many bytes from off on, at most n, lie in at most count pieces; a multiple of 4 if it is less than n.
func (p *pieces) fit(off, n, count int) int {
	got := 0
	for ; got < n && count > 0; count-- {
		got += len(p.at(off + got))
	}
	if got < n {
		return got &^ 3
	}
	return n
}
