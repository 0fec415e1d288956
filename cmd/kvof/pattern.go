package main

import "encoding/binary"

// The data that bench writes and verifies: a function of seed, unit and generation. The first 8 bytes carry the
// generation, all others, in words of 8 bytes, an arithmetic sequence that differs for each of the three.

const patternHeader = 8 // bytes

// mix is the finalizer of splitmix64.
func mix(x uint64) uint64 {
	x ^= x >> 30
	x *= 0xBF58476D1CE4E5B9
	x ^= x >> 27
	x *= 0x94D049BB133111EB
	return x ^ x>>31
}

func patternStart(seed, unit uint64, gen uint32) (word, step uint64) {
	word = mix(mix(mix(seed+0x9E3779B97F4A7C15)+unit) + uint64(gen))
	return word, mix(word) | 1
}

// fillPattern writes the pattern into b.
func fillPattern(b []byte, seed, unit uint64, gen uint32) {
	word, step := patternStart(seed, unit, gen)
	if len(b) >= patternHeader {
		binary.LittleEndian.PutUint64(b, uint64(gen)^mix(seed^unit))
		b = b[patternHeader:]
	}
	for ; len(b) >= 8; b = b[8:] {
		binary.LittleEndian.PutUint64(b, word)
		word += step
	}
	for i := range b {
		b[i] = byte(word >> (8 * i))
	}
}

// patternGeneration reads the generation of what should be a pattern; not checked.
func patternGeneration(b []byte, seed, unit uint64) uint32 {
	return uint32(binary.LittleEndian.Uint64(b) ^ mix(seed^unit))
}

// isPattern tells whether b is exactly the pattern.
func isPattern(b []byte, seed, unit uint64, gen uint32) bool {
	word, step := patternStart(seed, unit, gen)
	if binary.LittleEndian.Uint64(b) != uint64(gen)^mix(seed^unit) {
		return false
	}
	for b = b[patternHeader:]; len(b) >= 8; b = b[8:] {
		if binary.LittleEndian.Uint64(b) != word {
			return false
		}
		word += step
	}
	for i := range b {
		if b[i] != byte(word>>(8*i)) {
			return false
		}
	}
	return true
}
