package host

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"testing"

	"github.com/kvof/kvof/nvmeof"
)

// echo is a target that only knows Retrieve and Store of one value of its own, and allocates nothing either, so that
// the benchmark's figure is the host's.
func echo(conn net.Conn, value []byte) {
	defer conn.Close()
	var b [nvmeof.CapsuleCmdSize]byte
	var dg nvmeof.Digests
	out := make([]byte, nvmeof.DataPDUSize, nvmeof.DataPDUSize+len(value)+nvmeof.CapsuleRspSize)
	sink := make([]byte, len(value)+nvmeof.DataPDUSize)
	for {
		if _, err := io.ReadFull(conn, b[:]); err != nil {
			return
		}
		cid := binary.LittleEndian.Uint16(b[10:])
		reply := out[:nvmeof.CapsuleRspSize]
		if b[8] == nvmeof.OpRetrieve {
			nvmeof.EncodeData(out, nvmeof.PDUC2HData, nvmeof.FlagLast, cid, 0, 0, len(value), 4, dg)
			out = append(out[:nvmeof.DataPDUSize], value...)
			reply = out[:len(out)+nvmeof.CapsuleRspSize]
		} else {
			nvmeof.EncodeR2T(out, cid, 0, 0, uint32(len(value)), dg)
			conn.Write(out[:nvmeof.DataPDUSize])
			if _, err := io.ReadFull(conn, sink); err != nil {
				return
			}
		}
		cqe := nvmeof.MakeCompletion(uint32(len(value)), 0, 0, 1, cid, 0)
		nvmeof.EncodeResponse(reply[len(reply)-nvmeof.CapsuleRspSize:], &cqe, dg)
		if _, err := conn.Write(reply); err != nil {
			return
		}
	}
}

func BenchmarkIO(b *testing.B) {
	for _, op := range []string{"retrieve", "store"} {
		for _, size := range []int{4 << 10, 2 << 20} {
			for _, depth := range []int{1, 16} {
				if op == "store" && depth > 1 {
					continue // echo takes one at a time
				}
				b.Run(fmt.Sprintf("%s/size=%d/depth=%d", op, size, depth), func(b *testing.B) {
					l, err := net.Listen("tcp", "127.0.0.1:0")
					if err != nil {
						b.Fatal(err)
					}
					defer l.Close()
					conn, err := net.Dial("tcp", l.Addr().String())
					if err != nil {
						b.Fatal(err)
					}
					peer, err := l.Accept()
					if err != nil {
						b.Fatal(err)
					}
					go echo(peer, make([]byte, size))
					q := &tcpQueue{id: 1, conn: conn.(*net.TCPConn), align: 4, maxData: 4 << 20}
					if err := q.start(depth); err != nil {
						b.Fatal(err)
					}
					c := &Controller{}
					c.now.Store(&association{transport: tcpTransport{}, io: []queue{q}})
					kv := &KV{path: c, ns: Namespace{NSID: 1}}
					b.SetBytes(int64(size))
					b.ReportAllocs()
					var left atomic.Int64
					left.Store(int64(b.N))
					done := make(chan error)
					b.ResetTimer()
					for range depth {
						go func() {
							buf, key := make([]byte, size), []byte("key")
							for left.Add(-1) >= 0 {
								var err error
								if op == "store" {
									err = kv.Store(b.Context(), key, buf, 0)
								} else {
									_, err = kv.Retrieve(b.Context(), key, buf)
								}
								if err != nil {
									b.Error(err)
									break
								}
							}
							done <- nil
						}()
					}
					for range depth {
						<-done
					}
					b.StopTimer()
					q.fail(ErrClosed)
					q.wg.Wait()
				})
			}
		}
	}
}
