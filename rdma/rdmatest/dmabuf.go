package rdmatest

import (
	"os"
	"testing"

	"github.com/kvof/kvof/rdma"
	"golang.org/x/sys/unix"
)

// DMABuf stands in for memory of a GPU, for the length of a test: size bytes, the first of them at offset in a memfd. mem is what names
// them: touching it is a fault. content is how the test sees what is there.
func DMABuf(t testing.TB, size int, offset uint64) (mem, content []byte, buf rdma.DMABuf) {
	t.Helper()
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	fd, err := unix.MemfdCreate("dma-buf", unix.MFD_CLOEXEC)
	must(err)
	t.Cleanup(func() { unix.Close(fd) })
	end := int(offset) + size
	must(unix.Ftruncate(fd, int64(end)))
	all, err := unix.Mmap(fd, 0, end, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	must(err)
	t.Cleanup(func() { _ = unix.Munmap(all) })
	skip := int(offset) % os.Getpagesize()
	none, err := unix.Mmap(-1, 0, skip+size, unix.PROT_NONE, unix.MAP_ANON|unix.MAP_PRIVATE|unix.MAP_NORESERVE)
	must(err)
	t.Cleanup(func() { _ = unix.Munmap(none) })
	return none[skip:], all[offset:], rdma.DMABuf{FD: fd, Offset: offset}
}
