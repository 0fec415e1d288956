package host

import (
	"bytes"
	"testing"

	"pgregory.net/rapid"
)

// TestPieces sends data of many pieces in PDUs as gatherPDU does, and wants the same bytes in one row, whatever the pieces.
func TestPieces(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		bufs := rapid.SliceOfN(rapid.SliceOfN(rapid.Byte(), 0, 40), 0, 60).Draw(t, "pieces")
		maxData := rapid.IntRange(1, 30).Draw(t, "maxData") * 4
		var p pieces
		p.set(data{pieces: [][]byte{[]byte("what a slot had before"), []byte("in pieces")}})
		p.at(25)
		p.drop()
		p.set(data{pieces: bufs})
		want := bytes.Join(bufs, nil)
		if p.size != len(want) {
			t.Fatalf("size %d, want %d", p.size, len(want))
		}
		var got []byte
		for off := 0; off < p.size; {
			count := rapid.IntRange(pduVecs-2, 20).Draw(t, "vectors")
			n := p.fit(off, min(p.size-off, maxData), count)
			if n <= 0 || n%4 != 0 && off+n != p.size || n > maxData {
				t.Fatalf("%d bytes at %d of %d", n, off, p.size)
			}
			for used := 0; n > 0; used++ {
				if used == count {
					t.Fatalf("more than %d pieces at %d", count, off)
				}
				b := p.at(off)
				b = b[:min(len(b), n)]
				got = append(got, b...)
				off, n = off+len(b), n-len(b)
			}
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("got %x, want %x", got, want)
		}
		if len(want) > 0 && &p.at(0)[0] != &p.list[0][0] { // back to the beginning
			t.Fatal("at(0) is not the first byte")
		}
	})
}
