package uringtest

import (
	"testing"

	"github.com/kvof/kvof/uring"
)

// NewArena makes an arena of size bytes that is closed with the test, which fails if a buffer was not put back.
func NewArena(t testing.TB, size int) *uring.Arena {
	t.Helper()
	a, err := uring.NewArena(size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	return a
}
