package keys

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"flag"
	"os"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

var update = flag.Bool("update", false, "write testdata/vectors.json anew")

// vectors is testdata/vectors.json: the scheme in examples, for the tests of every language.
type vectors struct {
	About    string          `json:"about"`
	Keys     []keyVector     `json:"keys"`
	Trailers []trailerVector `json:"trailers"`
}

type keyVector struct {
	Scope   Scope  `json:"scope"`
	HashAll bool   `json:"hash_all"`
	Key     string `json:"key_hex"`
	NVMe    string `json:"nvme_key_hex"`
	Hashed  bool   `json:"hashed"`
	Digest  string `json:"digest_hex"`
}

type trailerVector struct {
	Scope   Scope  `json:"scope"`
	Key     string `json:"key_hex"`
	Length  int    `json:"payload_length"` // byte i is (i*7+3) mod 256
	Summed  bool   `json:"summed"`
	Trailer string `json:"trailer_hex"`
}

func payload(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + 3)
	}
	return b
}

var lmcache = Scope{Tenant: "team-a", Model: "meta-llama/Llama-3.1-8B", Rank: "0", Group: "1", Salt: "pepper"}

func makeVectors(t *testing.T) *vectors {
	v := &vectors{About: "kvof's key scheme, docs/keys.md: written by go test ./shim/keys -update"}
	for _, scope := range []Scope{{}, lmcache, {Tenant: "team-am", Model: "eta-llama/Llama-3.1-8B", Rank: "0", Group: "1", Salt: "pepper"}, {Salt: "Straße"}} {
		for _, key := range []string{"k", "0", "0123456789abcdef", "0123456789abcdefg", "\x00", "\x00\x00", "\xff\xfe",
			"00112233445566778899aabbccddeeff", "00112233445566778899AABBCCDDEEFF", "00112233445566778899aabbccddeefg", "00112233445566778899aabbccddeef",
			"meta-llama/Llama-3.1-8B@0@1@a3f5c2", strings.Repeat("long", 200)} {
			for _, all := range []bool{false, true} {
				k, err := NewScheme(scope, all).Key([]byte(key))
				if err != nil {
					t.Fatal(err)
				}
				x := keyVector{Scope: scope, HashAll: all, Key: hex.EncodeToString([]byte(key)), NVMe: hex.EncodeToString(k.Bytes()), Hashed: k.Hashed()}
				if d := k.Digest(); k.Hashed() {
					x.Digest = hex.EncodeToString(d[:])
				}
				v.Keys = append(v.Keys, x)
			}
		}
	}
	for _, n := range []int{0, 1, 64, 1000, 300_000} {
		for _, summed := range []bool{true, false} {
			const key = "meta-llama/Llama-3.1-8B@0@1@a3f5c2"
			k, err := NewScheme(lmcache, false).Key([]byte(key))
			if err != nil {
				t.Fatal(err)
			}
			var b [TrailerSize]byte
			sum := SumOf(payload(n))
			if summed {
				k.PutTrailer(b[:], uint64(n), &sum)
			} else {
				k.PutTrailer(b[:], uint64(n), nil)
			}
			v.Trailers = append(v.Trailers, trailerVector{lmcache, hex.EncodeToString([]byte(key)), n, summed, hex.EncodeToString(b[:])})
		}
	}
	return v
}

func TestVectors(t *testing.T) {
	got, err := json.MarshalIndent(makeVectors(t), "", "\t")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	if *update {
		if err := os.WriteFile("testdata/vectors.json", got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile("testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("the scheme is no longer that of testdata/vectors.json")
	}
}

// TestSpecification computes digests by hand, as docs/keys.md says.
func TestSpecification(t *testing.T) {
	field := func(s string) string {
		n := len(s)
		return string([]byte{byte(n), byte(n >> 8), byte(n >> 16), byte(n >> 24)}) + s
	}
	const key = "a key of more than 16 bytes"
	want := sha256.Sum256([]byte(field("kvof-key-1") + field("team-a") + field("meta-llama/Llama-3.1-8B") + field("0") + field("1") + field("pepper") + field(key)))
	k, err := NewScheme(lmcache, false).Key([]byte(key))
	if err != nil || k.Digest() != want || !bytes.Equal(k.Bytes(), want[:16]) || !k.Hashed() {
		t.Fatalf("%x, %v; want %x", k.Digest(), err, want)
	}
	for _, n := range []int{0, MaxLen + 1} {
		if _, err := NewScheme(lmcache, false).Key(make([]byte, n)); err != ErrLength {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

func TestKeys(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		field := rapid.StringN(0, 8, 20)
		scope := func(name string) Scope {
			return Scope{field.Draw(t, name), field.Draw(t, name), field.Draw(t, name), field.Draw(t, name), field.Draw(t, name)}
		}
		a, b := scope("a"), scope("b")
		key := rapid.SliceOfN(rapid.Byte(), 1, 600).Draw(t, "key")
		all := rapid.Bool().Draw(t, "all")
		ka, err := NewScheme(a, all).Key(key)
		kb, _ := NewScheme(b, all).Key(key)
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case ka.Hashed():
			if (ka == kb) != (a == b) {
				t.Fatalf("%v and %v of %+v and %+v", ka, kb, a, b)
			}
		case all || ka != kb || len(key) > 16 && len(key) != 32:
			t.Fatalf("%x is not hashed", key)
		case len(key) <= 16 && !bytes.Equal(ka.Bytes(), key):
			t.Fatalf("%x became %x", key, ka.Bytes())
		}
	})
}

func TestTrailer(t *testing.T) {
	long := []byte("a key of more than 16 bytes")
	k, _ := NewScheme(Scope{}, false).Key(long)
	other, _ := NewScheme(Scope{Tenant: "b"}, false).Key(long)
	raw, _ := NewScheme(Scope{}, false).Key(long[:16])
	sum := uint64(12345)
	var b [TrailerSize]byte
	k.PutTrailer(b[:], 1000, &sum)
	if s, summed, ok := k.CheckTrailer(b[:], 1000); !ok || !summed || s != sum {
		t.Fatal("its own trailer is refused")
	}
	for i := range b {
		c := b
		c[i] ^= 0x10
		if _, _, ok := k.CheckTrailer(c[:], 1000); ok {
			t.Errorf("byte %d may change", i)
		}
	}
	if _, _, ok := k.CheckTrailer(b[:], 1001); ok {
		t.Error("another length")
	}
	if _, _, ok := other.CheckTrailer(b[:], 1000); ok {
		t.Error("another tenant's key")
	}
	if _, _, ok := raw.CheckTrailer(b[:], 1000); ok {
		t.Error("a key that is not hashed")
	}
	if _, _, ok := k.CheckTrailer(b[:63], 1000); ok {
		t.Error("63 bytes")
	}
	k.PutTrailer(b[:], 0, nil)
	if _, summed, ok := k.CheckTrailer(b[:], 0); !ok || summed {
		t.Error("without a sum")
	}
	p := payload(100_001)
	var s Sum
	for part := range bytes.Lines(p) { // pieces of any length
		s.Add(part)
	}
	if s.Sum() != SumOf(p) {
		t.Error("the sum of pieces is not that of the whole")
	}
}

func FuzzTrailer(f *testing.F) {
	k, _ := NewScheme(Scope{}, true).Key([]byte("k"))
	b := make([]byte, TrailerSize)
	k.PutTrailer(b, 7, nil)
	f.Add(b, uint64(7))
	f.Add([]byte{}, uint64(0))
	f.Fuzz(func(t *testing.T, b []byte, n uint64) {
		if sum, summed, ok := k.CheckTrailer(b, n); ok {
			again := make([]byte, TrailerSize)
			if summed {
				k.PutTrailer(again, n, &sum)
			} else {
				k.PutTrailer(again, n, nil)
			}
			if !bytes.Equal(again[:offFlags], b[:offFlags]) || !bytes.Equal(again[offDigest:offCheck], b[offDigest:offCheck]) {
				t.Fatalf("% x is taken for % x", b, again)
			}
		}
	})
}

func BenchmarkKey(b *testing.B) {
	s := NewScheme(lmcache, false)
	key := []byte("meta-llama/Llama-3.1-8B@0@1@a3f5c2d1e0b9f8a7")
	b.ReportAllocs()
	for b.Loop() {
		_, _ = s.Key(key)
	}
}

func BenchmarkSum(b *testing.B) {
	p := payload(16 << 20)
	b.SetBytes(int64(len(p)))
	for b.Loop() {
		SumOf(p)
	}
}
