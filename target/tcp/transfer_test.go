package tcp

import (
	"bytes"
	"fmt"
	"sync"
	"testing"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/nvmeof"
)

var (
	noDigests  = nvmeof.Digests{}
	allDigests = []nvmeof.Digests{{}, {Header: true}, {Data: true}, {Header: true, Data: true}}
	devices    = []configs.DeviceKind{configs.DeviceMemory, configs.DeviceFile}
)

// Values and blocks go both ways, in the capsule and by R2T, with digests, padding and PDUs of odd sizes.
func TestTransfers(t *testing.T) {
	for _, device := range devices {
		for _, dg := range allDigests {
			for _, hpda := range []uint8{0, 3, 31} {
				t.Run(fmt.Sprintf("%s/%+v/%d", device, dg, hpda), func(t *testing.T) {
					dir := t.TempDir()
					e := serve(t, 16<<20, kv(1, device, dir, 128<<20), block(2, device, dir, 64<<20))
					_, id := e.admin(dg, 0)
					h := e.io(id, 1, dg, hpda)
					h.h2c = 4 << (hpda % 4) // padding of our own
					for i, n := range []int{1, 3, 511, 4096, 8192, 8193, 16384, 100003, 262144, 3<<20 + 5} {
						v := pattern(uint64(i), n)
						key := fmt.Sprint(n)
						if n <= 8192 {
							h.store(1, key, v, true)
							h.retrieve(1, key, v)
						}
						h.store(1, key, v, false)
						h.retrieve(1, key, v)
					}
					if r := h.do(kvCommand(nvmeof.OpList, 1, "", 100), nil, false, 100); r.Status() != nvmeof.Success || len(r.data) == 0 {
						t.Error(r.Status())
					}
					for i, n := range []int{1, 2, 3, 63, 64, 65, 1025} {
						v := pattern(uint64(i), n*4096)
						if n <= 2 {
							if st := h.do(blockCommand(nvmeof.OpWrite, 2, 7, n), v, true, 0).Status(); st != nvmeof.Success {
								t.Fatal(st)
							}
						}
						if st := h.do(blockCommand(nvmeof.OpWrite, 2, 100, n), v, false, 0).Status(); st != nvmeof.Success {
							t.Fatal(st)
						}
						for _, slba := range []uint64{7, 100}[max(0, min(n-2, 1)):] {
							if r := h.do(blockCommand(nvmeof.OpRead, 2, slba, n), nil, false, len(v)); r.Status() != nvmeof.Success || !bytes.Equal(r.data, v) {
								t.Fatalf("read of %d blocks: %v, %d bytes", n, r.Status(), len(r.data))
							}
						}
						if st := h.do(blockCommand(nvmeof.OpCompare, 2, 100, n), v, false, 0).Status(); st != nvmeof.Success {
							t.Fatal(st)
						}
					}
				})
			}
		}
	}
}

// A value of 64 MiB moves in one command, on several connections at once, through an arena that is smaller.
func TestLargeValues(t *testing.T) {
	for _, device := range devices {
		t.Run(string(device), func(t *testing.T) {
			e := serve(t, 32<<20, kv(1, device, t.TempDir(), 2<<30))
			_, id := e.admin(noDigests, 0)
			var wg sync.WaitGroup
			for i := range 4 {
				h := e.io(id, uint16(i+1), allDigests[2*(i%2)], 0)
				wg.Go(func() {
					v := pattern(uint64(i), 64<<20)
					key := fmt.Sprint("key ", i)
					h.store(1, key, v, false)
					h.retrieve(1, key, v)
				})
			}
			wg.Wait()
		})
	}
}
