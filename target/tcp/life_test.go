package tcp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/nvmeof"
)

// A host that takes nothing, or stops in the middle of what it sends, loses its connection, and everything comes back.
func TestStalls(t *testing.T) {
	defer func(d time.Duration) { stallLimit = d }(stallLimit)
	stallLimit = time.Second
	both := nvmeof.Digests{Header: true, Data: true}
	store := func(size int, key string) nvmeof.Command {
		c := kvCommand(nvmeof.OpStore, 1, key, size)
		c.SetSGL(nvmeof.MakeSGL(nvmeof.SGLTransport, 0, uint32(size)))
		return c
	}
	for _, device := range devices {
		t.Run(string(device), func(t *testing.T) {
			e := serve(t, 16<<20, kv(1, device, t.TempDir(), 1<<30))
			_, id := e.admin(noDigests, 0)
			setup := e.io(id, 64, noDigests, 0)
			setup.store(1, "large", pattern(1, 32<<20), false)
			qid := uint16(0)
			for _, stall := range map[string]func(h *host){
				"takes nothing": func(h *host) {
					for i := range 8 {
						c := kvCommand(nvmeof.OpRetrieve, 1, "large", 32<<20)
						c.SetCID(uint16(i))
						c.SetSGL(nvmeof.MakeSGL(nvmeof.SGLTransport, 0, 32<<20))
						h.write(h.capsule(&c, nil))
					}
				},
				"sends no data": func(h *host) {
					for i := range 40 {
						c := store(4<<20, fmt.Sprint(i))
						c.SetCID(uint16(i))
						h.write(h.capsule(&c, nil))
					}
				},
				"sends some of its data": func(h *host) {
					c := store(4<<20, "x")
					h.write(h.capsule(&c, nil))
					h.write(h.h2cData(0, h.next(nvmeof.PDUR2T).TTAG(), pattern(1, 4<<20), 0, 777777))
				},
				"stops inside a data PDU": func(h *host) {
					c := store(4<<20, "x")
					h.write(h.capsule(&c, nil))
					h.write(h.h2cData(0, h.next(nvmeof.PDUR2T).TTAG(), pattern(1, 4<<20), 0, 777777)[:400000])
				},
				"stops before a digest": func(h *host) {
					c := store(1<<20, "x")
					h.write(h.capsule(&c, nil))
					b := h.h2cData(0, h.next(nvmeof.PDUR2T).TTAG(), pattern(1, 1<<20), 0, 777777)
					h.write(b[:len(b)-4])
				},
				"stops inside a common header": func(h *host) { h.write([]byte{nvmeof.PDUCapsuleCmd, 0, 72}) },
				"stops inside a capsule":       func(h *host) { c := store(8, "x"); h.write(h.capsule(&c, make([]byte, 8))[:60]) },
				"stops inside capsule data": func(h *host) {
					c := store(8, "x")
					h.write(h.capsule(&c, make([]byte, 8))[:70+8])
				},
			} {
				qid++
				h := e.io(id, qid, both, 0)
				stall(h)
			}
			connections(e, 2)
			e.quiet(1)
			if r := setup.do(kvCommand(nvmeof.OpRetrieve, 1, "large", 0), nil, false, 0); r.DW0() != 32<<20 { // idle is no stall
				t.Error(r.Status())
			}
		})
	}
}

// A connection may be cut at any byte.
func TestCutAnywhere(t *testing.T) {
	for _, device := range devices {
		t.Run(string(device), func(t *testing.T) {
			e := serve(t, 16<<20, kv(1, device, t.TempDir(), 64<<20))
			dg := nvmeof.Digests{Header: true, Data: true}
			admin, id := e.admin(dg, 0)
			// A session is what the host sends, and how many PDUs it waits for in between.
			inline := kvCommand(nvmeof.OpStore, 1, "inline", 100)
			inline.SetSGL(nvmeof.MakeSGL(nvmeof.SGLOffset, 0, 100))
			pulled := kvCommand(nvmeof.OpStore, 1, "pulled", 300)
			pulled.SetSGL(nvmeof.MakeSGL(nvmeof.SGLTransport, 0, 300))
			retrieve := kvCommand(nvmeof.OpRetrieve, 1, "pulled", 300)
			retrieve.SetSGL(nvmeof.MakeSGL(nvmeof.SGLTransport, 0, 300))
			session := func(qid uint16, cut int, rst bool) (whole bool) {
				h := e.open()
				defer h.nc.Close()
				if rst {
					_ = h.nc.(*net.TCPConn).SetLinger(0)
				}
				send := func(b []byte) bool {
					n := min(cut, len(b))
					cut -= n
					_, err := h.nc.Write(b[:n])
					return err == nil && n == len(b)
				}
				if !send(icreq(dg, 0)) {
					return false
				}
				h.read(nvmeof.ICSize)
				h.dg, h.c2h = dg, 4
				cntlid := id
				if qid == 0 {
					cntlid = nvmeof.CNTLIDDynamic
				}
				c := nvmeof.MakeConnect(0, qid, 31, 0, 0)
				c.SetSGL(nvmeof.MakeSGL(nvmeof.SGLOffset, 0, nvmeof.ConnectDataSize))
				if !send(h.capsule(&c, connectData(cntlid))) {
					return false
				}
				if st := h.next(nvmeof.PDUCapsuleResp).cqe.Status(); st != nvmeof.Success {
					t.Fatal(st)
				}
				if qid == 0 {
					get := nvmeof.MakePropertyGet(nvmeof.PropCAP, 8)
					return send(h.capsule(&get, nil))
				}
				if !send(h.capsule(&inline, pattern(1, 100))) || !send(h.capsule(&pulled, nil)) {
					return false
				}
				var tag uint16
				for range 2 {
					if p, err := h.recv(); err != nil {
						t.Fatal(err)
					} else if p.Type == nvmeof.PDUR2T {
						tag = p.TTAG()
					}
				}
				return send(h.h2cData(0, tag, pattern(1, 300), 0, 77)) && send(h.h2cData(0, tag, pattern(1, 300), 77, 223)) && send(h.capsule(&retrieve, nil))
			}
			step := 1
			if testing.Short() {
				step = 37
			}
			for _, qid := range []uint16{0, 1} {
				cut := 0
				for ; !session(qid*uint16(1+cut%60), cut, cut%2 == 0); cut += step {
					if cut%60 == 59 { // all queues but the admin queue are used once
						e.quiet(1)
						connections(e, 1)
					}
				}
				e.quiet(1)
				connections(e, 1)
				t.Logf("queue %d: a session of %d bytes", qid, cut)
			}
			if st := admin.do(nvmeof.MakePropertyGet(nvmeof.PropCSTS, 4), nil, false, 0); st.DW0() != nvmeof.CSTSReady {
				t.Error(st.Status())
			}
		})
	}
}

// connections waits until the listener has n.
func connections(e *env, n int) {
	e.Helper()
	eventually(e, func() error {
		e.l.mu.Lock()
		defer e.l.mu.Unlock()
		if len(e.l.conns) != n {
			return fmt.Errorf("%d connections, not %d", len(e.l.conns), n)
		}
		return nil
	})
}

// A controller whose host went silent is ended by its keep alive timer; the host connects anew meanwhile. Any command keeps
// a controller.
func TestKeepAlive(t *testing.T) {
	e := serve(t, 16<<20, kv(1, configs.DeviceMemory, "", 64<<20))
	silent, id := e.admin(noDigests, 1000)
	silentIO := e.io(id, 1, noDigests, 0)
	again, id2 := e.admin(noDigests, 1000)
	if id == id2 {
		t.Errorf("the half-open controller's CNTLID %d was given again", id)
	}
	io := e.io(id2, 1, noDigests, 0)
	stop := time.Now().Add(3 * time.Second)
	for i := 0; time.Now().Before(stop); i++ { // on the I/O queue alone (TBKAS)
		io.store(1, "key", pattern(uint64(i), 100), true)
		time.Sleep(20 * time.Millisecond)
	}
	silent.ended()
	silentIO.ended()
	e.quiet(1)
	var ka nvmeof.Command
	ka.SetHeader(nvmeof.OpKeepAlive, 0, 0)
	for range 30 {
		if st := again.do(ka, nil, false, 0).Status(); st != nvmeof.Success {
			t.Fatal(st)
		}
		time.Sleep(50 * time.Millisecond)
	}
	io.store(1, "key", nil, true)
	again.ended()
	io.ended()
	e.quiet(0)
}

// 200 connects and disconnects, orderly and not, leave nothing behind.
func TestConnects(t *testing.T) {
	e := serve(t, 16<<20, kv(1, configs.DeviceFile, t.TempDir(), 64<<20))
	files := func() int {
		d, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(d)
	}
	before, goroutines := files(), runtime.NumGoroutine()
	for i := range 200 {
		admin, id := e.admin(noDigests, 0)
		q1, q2 := e.io(id, 1, noDigests, 0), e.io(id, 2, noDigests, 0)
		q1.store(1, "key", pattern(1, 1000), true)
		q2.retrieve(1, "key", pattern(1, 1000))
		if i%2 == 0 {
			admin.do(nvmeof.MakePropertySet(nvmeof.PropCC, 0x464061), nil, false, 0)
			q1.nc.Close()
			q2.nc.Close()
		}
		admin.nc.Close()
		if i%2 == 1 {
			q1.ended()
			q2.ended()
		}
		q1.nc.Close()
		q2.nc.Close()
	}
	e.quiet(0)
	connections(e, 0)
	eventually(t, func() error {
		if n := files(); n > before {
			return fmt.Errorf("%d files, %d before", n, before)
		}
		if n := runtime.NumGoroutine(); n > goroutines {
			return fmt.Errorf("%d goroutines, %d before", n, goroutines)
		}
		return nil
	})
}

// Many controllers work at once.
func TestManyControllers(t *testing.T) {
	for _, device := range devices {
		t.Run(string(device), func(t *testing.T) {
			e := serve(t, 64<<20, kv(1, device, t.TempDir(), 512<<20))
			var wg sync.WaitGroup
			for k := range 24 {
				wg.Go(func() {
					admin, id := e.admin(allDigests[k%4], 5000)
					defer admin.nc.Close()
					var queues sync.WaitGroup
					for q := range 4 {
						queues.Go(func() {
							h := e.io(id, uint16(q+1), allDigests[k%4], 0)
							defer h.nc.Close()
							key := fmt.Sprint(k, " ", q)
							for i, n := range []int{1, 5000, 8192, 100000, 0, 300000} {
								v := pattern(uint64(k*100+q*10+i), n)
								h.store(1, key, v, n <= 8192)
								h.retrieve(1, key, v)
							}
						})
					}
					queues.Wait()
				})
			}
			wg.Wait()
			e.quiet(0)
		})
	}
}

// A drain lets the commands in flight end, begins no new one, and then ends all controllers.
func TestDrain(t *testing.T) {
	for _, device := range devices {
		t.Run(string(device), func(t *testing.T) {
			e := serve(t, 16<<20, kv(1, device, t.TempDir(), 128<<20))
			admin, id := e.admin(noDigests, 0)
			slow, busy := e.io(id, 1, noDigests, 0), e.io(id, 2, noDigests, 0)
			v := pattern(1, 1<<20)
			cmd := kvCommand(nvmeof.OpStore, 1, "slow", len(v))
			cmd.SetSGL(nvmeof.MakeSGL(nvmeof.SGLTransport, 0, uint32(len(v))))
			slow.write(slow.capsule(&cmd, nil))
			tag := slow.next(nvmeof.PDUR2T).TTAG()
			var stored atomic.Int64
			ended := make(chan struct{})
			go func() { // a host that never pauses
				defer close(ended)
				c := kvCommand(nvmeof.OpStore, 1, "busy", 8)
				c.SetSGL(nvmeof.MakeSGL(nvmeof.SGLOffset, 0, 8))
				for {
					if _, err := busy.nc.Write(busy.capsule(&c, make([]byte, 8))); err != nil {
						return
					}
					if _, err := busy.recv(); err != nil {
						return
					}
					stored.Add(1)
				}
			}()
			eventually(t, func() error {
				if stored.Load() == 0 {
					return errors.New("nothing stored")
				}
				return nil
			})
			drained := make(chan struct{})
			start := time.Now()
			go func() { e.target.Drain(patience); close(drained) }()
			time.Sleep(50 * time.Millisecond)
			select {
			case <-drained:
				t.Fatal("drained with a command in flight")
			default:
			}
			h := e.dial(noDigests, 0)
			if st := h.tryConnect(nvmeof.CNTLIDDynamic, 0, 31, 0).Status(); st != nvmeof.ConnectBusy {
				t.Error(st)
			}
			h.nc.Close()
			slow.sendAll(0, tag, v)
			if st := slow.next(nvmeof.PDUCapsuleResp).cqe.Status(); st != nvmeof.Success {
				t.Error(st)
			}
			<-drained
			if d := time.Since(start); d > patience/2 {
				t.Errorf("took %v", d)
			}
			<-ended
			slow.ended()
			admin.ended()
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			if err := e.l.Close(ctx); err != nil {
				t.Error(err)
			}
		})
	}
}

// 100 idle controllers of 5 queues each cost the whole process, the hosts' ends among it, far less than 64 MiB.
func TestIdleMemory(t *testing.T) {
	e := serve(t, 16<<20, kv(1, configs.DeviceFile, t.TempDir(), 64<<20))
	before := resident(t)
	for range 100 {
		_, id := e.admin(noDigests, 0)
		for q := range uint16(4) {
			e.io(id, q+1, noDigests, 0)
		}
	}
	after := resident(t)
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	t.Logf("resident: %d KiB more; heap in use %d KiB, stacks %d KiB", (after-before)>>10, m.HeapInuse>>10, m.StackInuse>>10)
	if !raceEnabled && after-before > 48<<20 {
		t.Errorf("%d MiB", (after-before)>>20)
	}
}

// resident is VmRSS in bytes.
func resident(t *testing.T) int64 {
	runtime.GC()
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.ParseInt(strings.Fields(string(b))[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return pages * int64(os.Getpagesize())
}
