//go:build race

package tcp

const raceEnabled = true // memory and allocations say nothing
