package tcp

import (
	"fmt"
	"io"
	"testing"

	"github.com/kvof/kvof/nvmeof"
)

// BenchmarkLoopback measures commands one after the other over a loopback connection, with a host that allocates
// nothing: what is counted is the target's.
func BenchmarkLoopback(b *testing.B) {
	for _, device := range devices {
		for _, bc := range []struct {
			name string
			cmd  nvmeof.Command
			in   int
			out  int
		}{
			{"Read4K", blockCommand(nvmeof.OpRead, 2, 0, 1), 0, 4 << 10},
			{"Write4K", blockCommand(nvmeof.OpWrite, 2, 0, 1), 4 << 10, 0},
			{"Retrieve2M", kvCommand(nvmeof.OpRetrieve, 1, "key", 2<<20), 0, 2 << 20},
			{"Store2M", kvCommand(nvmeof.OpStore, 1, "key", 2<<20), 2 << 20, 0},
		} {
			b.Run(fmt.Sprintf("%s/%s", bc.name, device), func(b *testing.B) {
				dir := b.TempDir()
				e := serve(b, 32<<20, kv(1, device, dir, 256<<20), block(2, device, dir, 64<<20))
				_, id := e.admin(noDigests, 0)
				h := e.io(id, 1, noDigests, 0)
				h.store(1, "key", pattern(1, 2<<20), false)
				data, sink := pattern(1, bc.in), make([]byte, 2<<20)
				capsule := []byte(nil)
				if n := len(data); n > 0 && n <= 8192 {
					bc.cmd.SetSGL(nvmeof.MakeSGL(nvmeof.SGLOffset, 0, uint32(n)))
					capsule = append(capsule, h.capsule(&bc.cmd, data)...)
				} else {
					bc.cmd.SetSGL(nvmeof.MakeSGL(nvmeof.SGLTransport, 0, uint32(bc.in+bc.out)))
					capsule = append(capsule, h.capsule(&bc.cmd, nil)...)
				}
				head := h.head[:24]
				do := func() {
					if _, err := h.nc.Write(capsule); err != nil {
						b.Fatal(err)
					}
					for {
						if _, err := io.ReadFull(h.nc, head); err != nil {
							b.Fatal(err)
						}
						switch head[0] {
						case nvmeof.PDUR2T:
							tag := le.Uint16(head[10:])
							for off, n := 0, 1<<20; off < len(data); off += n {
								flags := uint8(0)
								if off+n == len(data) {
									flags = nvmeof.FlagLast
								}
								k := nvmeof.EncodeData(h.head[:], nvmeof.PDUH2CData, flags, 0, tag, uint32(off), n, 4, noDigests)
								if _, err := h.nc.Write(h.head[:k]); err != nil {
									b.Fatal(err)
								}
								if _, err := h.nc.Write(data[off : off+n]); err != nil {
									b.Fatal(err)
								}
							}
						case nvmeof.PDUC2HData:
							if _, err := io.ReadFull(h.nc, sink[:le.Uint32(head[4:])-24]); err != nil {
								b.Fatal(err)
							}
						default:
							if st := nvmeof.Status(le.Uint16(head[22:]) >> 1); st != nvmeof.Success {
								b.Fatal(st)
							}
							return
						}
					}
				}
				for range 50 {
					do()
				}
				b.SetBytes(int64(bc.in + bc.out))
				b.ReportAllocs()
				for b.Loop() {
					do()
				}
				b.StopTimer()
				h.nc.Close()
			})
		}
	}
}
