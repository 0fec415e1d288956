package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/kvof/kvof/nvmeof"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testNQN = "nqn.2024-01.io.kvof:test"

func connect(t testing.TB, f *fake, o Options) *Controller {
	t.Helper()
	o.Addr, o.SubNQN = f.addr(), testNQN
	if f.net != nil {
		o.Transport, o.Verbs = "rdma", f.net
	}
	c, err := Connect(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func openKV(t testing.TB, c *Controller) *KV {
	t.Helper()
	kv, err := c.KV(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	return kv
}

func random(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(n)})
	r.Read(b)
	return b
}

// eachWay runs a test with the ways that data can travel.
func eachWay(t *testing.T, test func(t *testing.T, f *fake, o Options)) {
	for _, dg := range []nvmeof.Digests{{}, {Header: true}, {Data: true}, {Header: true, Data: true}} {
		for _, chunk := range []int{1 << 20, 5000} {
			for _, success := range []bool{false, true} {
				t.Run(fmt.Sprintf("hdgst=%v,ddgst=%v,chunk=%d,success=%v", dg.Header, dg.Data, chunk, success), func(t *testing.T) {
					f := newFake(t)
					f.chunk, f.success = chunk, success
					test(t, f, Options{HeaderDigest: dg.Header, DataDigest: dg.Data})
				})
			}
		}
	}
}

func TestKV(t *testing.T) { eachWay(t, testKV) }

func testKV(t *testing.T, f *fake, o Options) {
	ctx := t.Context()
	kv := openKV(t, connect(t, f, o))
	for _, n := range []int{0, 1, 3, 4096, 4097, 65536, 300001, 3 << 20} {
		key, v := fmt.Appendf(nil, "key%d", n), random(n)
		if ok, err := kv.Exist(ctx, key); ok || err != nil {
			t.Fatal(ok, err)
		}
		if err := kv.Store(ctx, key, v, StoreIfAbsent); err != nil {
			t.Fatal(err)
		}
		if err := kv.Store(ctx, key, v, StoreIfAbsent); !errors.Is(err, nvmeof.KeyExists) {
			t.Fatal(err)
		}
		buf := make([]byte, n+10)
		if got, err := kv.Retrieve(ctx, key, buf); got != n || err != nil || !bytes.Equal(buf[:n], v) {
			t.Fatal(n, got, err)
		}
		half := make([]byte, n/2)
		if got, err := kv.Retrieve(ctx, key, half); got != n || err != nil || !bytes.Equal(half, v[:n/2]) {
			t.Fatal(n, got, err)
		}
		if ok, err := kv.Exist(ctx, key); !ok || err != nil {
			t.Fatal(ok, err)
		}
	}
	if err := kv.Delete(ctx, []byte("key0")); err != nil {
		t.Fatal(err)
	}
	if _, err := kv.Retrieve(ctx, []byte("key0"), nil); !errors.Is(err, nvmeof.KeyDoesNotExist) {
		t.Fatal(err)
	}
	if err := kv.Store(ctx, make([]byte, 17), nil, 0); !errors.Is(err, nvmeof.InvalidKeySize) {
		t.Fatal(err)
	}
}

func TestList(t *testing.T) {
	f := newFake(t)
	var want []string
	for i := range 100 {
		k := fmt.Sprintf("k%03d", i)
		f.kv[k] = nil
		want = append(want, k)
	}
	kv := openKV(t, connect(t, f, Options{}))
	list := func(from []byte, limit int) (got []string) {
		for k, err := range kv.List(t.Context(), from) {
			if err != nil {
				t.Fatal(err)
			}
			if got = append(got, string(k)); len(got) == limit {
				break
			}
		}
		return got
	}
	if d := cmp.Diff(want, list(nil, -1)); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(want[50:], list([]byte("k050"), -1)); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(want[:7], list(nil, 7)); d != "" {
		t.Error(d)
	}
	if got := list([]byte("z"), -1); got != nil {
		t.Error(got)
	}
}

func TestBlock(t *testing.T) { eachWay(t, testBlock) }

func testBlock(t *testing.T, f *fake, o Options) {
	ctx := t.Context()
	b, err := connect(t, f, o).Block(ctx, 2)
	if err != nil {
		t.Fatal(err)
	}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range []int{1, 8, 9, 200, 1000} {
		v, got := random(n*512), make([]byte, n*512)
		check(b.Write(ctx, 3, v))
		check(b.Read(ctx, 3, got))
		if !bytes.Equal(v, got) {
			t.Fatal("read differs")
		}
		check(b.Compare(ctx, 3, v))
		v[n*512-1]++
		if err := b.Compare(ctx, 3, v); !errors.Is(err, nvmeof.CompareFailure) {
			t.Fatal(err)
		}
		check(b.Verify(ctx, 3, n))
	}
	check(b.WriteZeroes(ctx, 3, 4))
	check(b.Deallocate(ctx, Range{7, 2}, Range{20, 1}))
	check(b.Flush(ctx))
	got := make([]byte, 6*512)
	check(b.Read(ctx, 3, got))
	if !bytes.Equal(got, make([]byte, 6*512)) {
		t.Fatal("not zero")
	}
	if err := b.Read(ctx, b.Blocks(), got); !errors.Is(err, nvmeof.LBAOutOfRange) {
		t.Fatal(err)
	}
	if b.Read(ctx, 0, got[:100]) == nil || b.Verify(ctx, 0, 0) == nil || b.Deallocate(ctx) == nil {
		t.Fatal("nonsense is accepted")
	}
}

func TestNamespaces(t *testing.T) {
	f := newFake(t)
	c := connect(t, f, Options{})
	want := []Namespace{
		{NSID: 1, CSI: nvmeof.CSIKV, NGUID: [16]byte{1}, Size: 1 << 30, MaxKey: 16, MaxValue: 64 << 20},
		{NSID: 2, NGUID: [16]byte{2}, Size: 1 << 20, BlockSize: 512},
	}
	got, err := c.Namespaces(t.Context())
	if d := cmp.Diff(want, got); d != "" || err != nil {
		t.Error(d, err)
	}
	if ns, err := c.Find(t.Context(), [16]byte{2}); ns.NSID != 2 || err != nil {
		t.Error(ns, err)
	}
	if _, err := c.Find(t.Context(), [16]byte{3}); !errors.Is(err, ErrNoNamespace) {
		t.Error(err)
	}
	if _, err := c.KV(t.Context(), 2); !errors.Is(err, ErrNoNamespace) {
		t.Error(err)
	}
	f = newFake(t)
	f.noCSI = true
	c = connect(t, f, Options{})
	if ns, err := c.Namespace(t.Context(), 2); ns.BlockSize != 512 || err != nil {
		t.Error(ns, err)
	}
}

// TestParallel has more goroutines than slots, on several queues, each checking its own values.
func TestParallel(t *testing.T) {
	f := newFake(t)
	f.chunk = 100 << 10
	kv := openKV(t, connect(t, f, Options{IOQueues: 8, QueueDepth: 4, DataDigest: true}))
	if n := kv.path.(*Controller).IOQueues(); n != 3 {
		t.Fatalf("%d queues", n)
	}
	var wg sync.WaitGroup
	for g := range 32 {
		wg.Go(func() {
			key, buf := []byte{byte(g)}, make([]byte, 256<<10)
			for i := range 20 {
				v := random(1 + (g*7919+i*104729)%len(buf))
				if err := kv.Store(t.Context(), key, v, 0); err != nil {
					t.Error(err)
					return
				}
				n, err := kv.Retrieve(t.Context(), key, buf)
				if err != nil || !bytes.Equal(buf[:n], v) {
					t.Error("value differs", n, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestMDTS(t *testing.T) {
	f := newFake(t)
	f.mdts = 5
	c := connect(t, f, Options{})
	kv := openKV(t, c)
	if m := kv.MaxValue(); m != 128<<10 {
		t.Error(m)
	}
	if err := kv.Store(t.Context(), []byte("k"), make([]byte, 128<<10+1), 0); !errors.Is(err, ErrTransferSize) {
		t.Error(err)
	}
}

func TestConnectErrors(t *testing.T) {
	f := newFake(t)
	_, err := Connect(t.Context(), Options{Addr: f.addr(), SubNQN: "nqn.2014-08.org.example:absent"})
	if !errors.Is(err, nvmeof.ConnectInvalidParam) || !bytes.Contains([]byte(err.Error()), []byte("SUBNQN")) {
		t.Error(err)
	}
	f = newFake(t)
	f.refuseDG = true
	if _, err := Connect(t.Context(), Options{Addr: f.addr(), DataDigest: true}); err == nil {
		t.Error("digests were not granted")
	}
	if _, err := Connect(t.Context(), Options{Addr: f.addr(), SubNQN: "x"}); err == nil {
		t.Error("NQN is wrong")
	}
	f = newFake(t)
	f.intercept = func(*fakeConn, *nvmeof.Command) bool { return true } // never answers
	ctx, stop := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer stop()
	if _, err := Connect(ctx, Options{Addr: f.addr()}); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

func TestConnectionLost(t *testing.T) {
	f := newFake(t)
	held := make(chan bool, 16)
	f.intercept = func(c *fakeConn, cmd *nvmeof.Command) bool {
		hold := c.qid > 0 && cmd.Opcode() == nvmeof.OpRetrieve
		if hold {
			held <- true
		}
		return hold
	}
	c := connect(t, f, Options{})
	kv := openKV(t, c)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := kv.Retrieve(t.Context(), []byte("k"), make([]byte, 100)); !errors.Is(err, ErrConnectionLost) {
				t.Error(err)
			}
		})
	}
	for range 8 {
		<-held
	}
	f.dropAll()
	wg.Wait()
	if err := kv.Delete(t.Context(), []byte("k")); !errors.Is(err, ErrConnectionLost) {
		t.Error(err)
	}
	<-c.Done()
	if !errors.Is(c.Err(), ErrConnectionLost) {
		t.Error(c.Err())
	}
}

func TestClose(t *testing.T) {
	f := newFake(t)
	held := make(chan bool, 1)
	f.intercept = func(c *fakeConn, cmd *nvmeof.Command) bool {
		hold := c.qid > 0 && cmd.Opcode() == nvmeof.OpFlush
		if hold {
			held <- true
		}
		return hold
	}
	c := connect(t, f, Options{})
	kv := openKV(t, c)
	done := make(chan error)
	go func() { done <- kv.Flush(context.Background()) }()
	<-held
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := <-done; !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func TestKeepAlive(t *testing.T) {
	f := newFake(t)
	f.intercept = func(_ *fakeConn, cmd *nvmeof.Command) bool {
		return cmd.Opcode() == nvmeof.OpKeepAlive || cmd.Opcode() == nvmeof.OpRetrieve
	}
	kv := openKV(t, connect(t, f, Options{KATO: 100 * time.Millisecond}))
	start := time.Now()
	_, err := kv.Retrieve(t.Context(), []byte("k"), nil)
	if !errors.Is(err, ErrConnectionLost) || !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 5*time.Second {
		t.Error(err)
	}
}

func TestEvents(t *testing.T) {
	f := newFake(t)
	events := make(chan uint32, 1)
	connect(t, f, Options{OnEvent: func(dw0 uint32) { events <- dw0 }})
	for range 3 {
		var aer func(uint32)
		for aer == nil {
			time.Sleep(time.Millisecond)
			f.mu.Lock()
			aer, f.aer = f.aer, nil
			f.mu.Unlock()
		}
		aer(nvmeof.EventNamespaceChanged)
		if e := <-events; e != nvmeof.EventNamespaceChanged {
			t.Errorf("%x", e)
		}
	}
}

// TestCancelRetrieve ends a Retrieve in the middle of its data: the buffer is not touched afterwards, and the queue
// goes on.
func TestCancelRetrieve(t *testing.T) {
	for _, dg := range []bool{false, true} {
		f := newFake(t)
		v := random(1 << 20)
		half, rest := make(chan bool), make(chan bool)
		f.kv["k"] = []byte("still fine")
		f.intercept = func(c *fakeConn, cmd *nvmeof.Command) bool {
			if c.qid == 0 || cmd.Opcode() != nvmeof.OpRetrieve || cmd.KVSize() < 1<<20 {
				return false
			}
			h := make([]byte, 200)
			h = h[:nvmeof.EncodeData(h, nvmeof.PDUC2HData, nvmeof.FlagLast, cmd.CID(), 0, 0, len(v), 4, c.dg)]
			c.send(h, v[:len(v)/2])
			half <- true
			<-rest
			tail := []byte{0, 0, 0, 0}
			if !dg {
				tail = nil
			}
			c.send(v[len(v)/2:], tail)
			c.reply(cmd.CID(), uint32(len(v)), 0, 0)
			return true
		}
		kv := openKV(t, connect(t, f, Options{DataDigest: dg}))
		for range 5 {
			ctx, cancel := context.WithCancelCause(t.Context())
			cause := errors.New("enough")
			done := make(chan error)
			buf := make([]byte, len(v))
			go func() {
				_, err := kv.Retrieve(ctx, []byte("k"), buf)
				clear(buf)
				done <- err
			}()
			<-half
			cancel(cause)
			if err := <-done; err != cause {
				t.Error(err)
			}
			rest <- true
			small := make([]byte, 10)
			if _, err := kv.Retrieve(t.Context(), []byte("k"), small); err != nil || string(small) != "still fine" {
				t.Error(err)
			}
			if !bytes.Equal(buf, make([]byte, len(v))) {
				t.Error("buffer was written after the call returned")
			}
		}
	}
}

// TestCancelMany cancels at random moments.
func TestCancelMany(t *testing.T) {
	f := newFake(t)
	f.chunk = 10000
	f.kv["k"] = random(100000)
	kv := openKV(t, connect(t, f, Options{QueueDepth: 8}))
	var wg sync.WaitGroup
	for g := range 16 {
		wg.Go(func() {
			buf := make([]byte, 100000)
			for i := range 50 {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rand.IntN(1000))*time.Microsecond)
				_, err := kv.Retrieve(ctx, []byte("k"), buf[:1+(g*i*997)%len(buf)])
				if err != nil && !errors.Is(err, context.DeadlineExceeded) {
					t.Error(err)
				}
				clear(buf)
				cancel()
				if !bytes.Equal(buf, make([]byte, len(buf))) {
					t.Error("buffer was written after the call returned")
				}
			}
		})
	}
	wg.Wait()
	for range 20 { // all slots are back
		if _, err := kv.Retrieve(t.Context(), []byte("k"), nil); err != nil {
			t.Fatal(err)
		}
	}
}

// TestCancelStore gives up a store before its data is asked for, and one while it is being sent.
func TestCancelStore(t *testing.T) {
	f := newFake(t)
	got := make(chan *nvmeof.Command, 1)
	asked := make(chan bool, 1)
	f.intercept = func(c *fakeConn, cmd *nvmeof.Command) bool {
		if c.qid == 0 || cmd.Opcode() != nvmeof.OpStore {
			return false
		}
		k := cmd.Key()
		switch k[0] {
		case 'a': // refused later
			got <- cmd
			time.AfterFunc(50*time.Millisecond, func() { c.reply(cmd.CID(), 0, 0, nvmeof.CapacityExceeded) })
		case 'b': // asked for, then not read
			h := make([]byte, nvmeof.DataPDUSize)
			c.send(h[:nvmeof.EncodeR2T(h, cmd.CID(), 1, 0, 32<<20, c.dg)])
			asked <- true
			<-t.Context().Done()
			c.Close()
		}
		return true
	}
	kv := openKV(t, connect(t, f, Options{}))
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-got; cancel() }()
	if err := kv.Store(ctx, []byte("a"), make([]byte, 1<<20), 0); err != context.Canceled {
		t.Error(err)
	}
	time.Sleep(100 * time.Millisecond)
	if _, err := kv.Exist(t.Context(), []byte("k")); err != nil {
		t.Error(err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	go func() { <-asked; time.Sleep(50 * time.Millisecond); cancel() }()
	if err := kv.Store(ctx, []byte("b"), make([]byte, 32<<20), 0); !errors.Is(err, ErrConnectionLost) {
		t.Error(err)
	}
}

func TestBadDigest(t *testing.T) {
	f := newFake(t)
	f.intercept = func(c *fakeConn, cmd *nvmeof.Command) bool {
		if c.qid == 0 || cmd.Opcode() != nvmeof.OpRetrieve {
			return false
		}
		h := make([]byte, 200)
		c.send(h[:nvmeof.EncodeData(h, nvmeof.PDUC2HData, nvmeof.FlagLast, cmd.CID(), 0, 0, 10, 4, c.dg)], make([]byte, 10), []byte{1, 2, 3, 4})
		c.reply(cmd.CID(), 10, 0, 0)
		return true
	}
	kv := openKV(t, connect(t, f, Options{DataDigest: true}))
	if _, err := kv.Retrieve(t.Context(), []byte("k"), make([]byte, 10)); !errors.Is(err, ErrDigest) {
		t.Error(err)
	}
	if err := kv.Flush(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestHostile has the target break the protocol in the middle of a command; the connection must end, cleanly.
func TestHostile(t *testing.T) {
	data := func(cid uint16, off uint32, n int, flags uint8) []byte {
		h := make([]byte, nvmeof.DataPDUSize, nvmeof.DataPDUSize+n)
		nvmeof.EncodeData(h, nvmeof.PDUC2HData, flags, cid, 0, off, n, 4, nvmeof.Digests{})
		return append(h, make([]byte, n)...)
	}
	r2t := func(cid uint16, off, n uint32) []byte {
		h := make([]byte, nvmeof.DataPDUSize)
		nvmeof.EncodeR2T(h, cid, 1, off, n, nvmeof.Digests{})
		return h
	}
	reply := func(cid uint16) []byte {
		b := make([]byte, nvmeof.CapsuleRspSize)
		cqe := nvmeof.MakeCompletion(0, 0, 0, 1, cid, 0)
		nvmeof.EncodeResponse(b, &cqe, nvmeof.Digests{})
		return b
	}
	term := nvmeof.AppendTerm(nil, nvmeof.PDUC2HTermReq, &nvmeof.TermError{FES: 1, FEI: 2}, make([]byte, 72))
	for name, tc := range map[string]struct {
		store bool
		bytes func(cid uint16) []byte
	}{
		"type":          {false, func(uint16) []byte { return []byte{99, 0, 24, 0, 24, 0, 0, 0} }},
		"from the host": {false, func(uint16) []byte { return []byte{nvmeof.PDUCapsuleCmd, 0, 72, 0, 72, 0, 0, 0} }},
		"ICResp again": {false, func(uint16) []byte {
			b := make([]byte, 128)
			nvmeof.EncodeIC(b, nvmeof.PDUICResp, nvmeof.IC{Max: 4096})
			return b
		}},
		"unknown command": {false, func(cid uint16) []byte { return reply(cid + 1) }},
		"old generation":  {false, func(cid uint16) []byte { return reply(cid - maxDepth) }},
		"no such slot":    {false, func(cid uint16) []byte { return reply(cid + 1000) }},
		"twice": {false, func(cid uint16) []byte {
			return append(data(cid, 0, 100, nvmeof.FlagLast|nvmeof.FlagSuccess), reply(cid)...)
		}},
		"data too long":     {false, func(cid uint16) []byte { return data(cid, 0, 101, 0) }},
		"data at an offset": {false, func(cid uint16) []byte { return data(cid, 1, 10, 0) }},
		"data far out":      {false, func(cid uint16) []byte { return data(cid, 0xFFFFFFFC, 10, 0) }},
		"success not last":  {false, func(cid uint16) []byte { return data(cid, 0, 100, nvmeof.FlagSuccess) }},
		"data for a store":  {true, func(cid uint16) []byte { return data(cid, 0, 100, 0) }},
		"R2T for retrieve":  {false, func(cid uint16) []byte { return r2t(cid, 0, 100) }},
		"R2T too long":      {true, func(cid uint16) []byte { return r2t(cid, 0, 100001) }},
		"R2T at an offset":  {true, func(cid uint16) []byte { return r2t(cid, 4, 10) }},
		"R2T of nothing":    {true, func(cid uint16) []byte { return r2t(cid, 0, 0) }},
		"R2T backwards":     {true, func(cid uint16) []byte { return append(r2t(cid, 0, 8), r2t(cid, 4, 8)...) }},
		"termination":       {true, func(uint16) []byte { return term }},
		"short":             {false, func(cid uint16) []byte { return append(data(cid, 0, 50, 0), reply(cid)...) }},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			f.intercept = func(c *fakeConn, cmd *nvmeof.Command) bool {
				if c.qid == 0 || cmd.Opcode() == nvmeof.OpFabrics {
					return false
				}
				c.send(tc.bytes(cmd.CID()))
				io.Copy(io.Discard, c) // until the host goes
				return true
			}
			kv := openKV(t, connect(t, f, Options{QueueDepth: 4}))
			var err error
			if tc.store {
				err = kv.Store(t.Context(), []byte("k"), make([]byte, 100000), 0)
			} else {
				_, err = kv.Retrieve(t.Context(), []byte("k"), make([]byte, 100))
			}
			switch name {
			case "twice":
				if err == nil {
					t.Error("size 0 with 100 bytes of data was accepted")
				}
				<-kv.path.(*Controller).Done()
				err = kv.path.(*Controller).Err()
			case "short":
				if !errors.Is(err, ErrProtocol) {
					t.Error(err)
				}
				return
			}
			if !errors.Is(err, ErrConnectionLost) {
				t.Error(err)
			}
		})
	}
}

// TestTermReq: a target that breaks the protocol is told so, but never in answer to a termination request.
func TestTermReq(t *testing.T) {
	whole := func(typ uint8) []byte {
		return nvmeof.AppendTerm(nil, typ, &nvmeof.TermError{FES: 1, FEI: 2}, make([]byte, 72))
	}
	short := whole(nvmeof.PDUC2HTermReq)
	short[2] = 23 // HLEN
	long := whole(nvmeof.PDUC2HTermReq)
	long[4] = 200 // PLEN
	for name, tc := range map[string]struct {
		pdu  []byte
		want int // bytes from the host
	}{
		"type":        {[]byte{99, 0, 24, 0, 24, 0, 0, 0}, 2 * nvmeof.DataPDUSize},
		"termination": {whole(nvmeof.PDUC2HTermReq), 0},
		"HLEN":        {short, 0},
		"PLEN":        {long, 0},
		"of a host":   {whole(nvmeof.PDUH2CTermReq), 0},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			got := make(chan []byte, 1)
			f.intercept = func(c *fakeConn, cmd *nvmeof.Command) bool {
				if c.qid == 0 || cmd.Opcode() != nvmeof.OpRetrieve {
					return false
				}
				c.send(tc.pdu)
				b, _ := io.ReadAll(c)
				got <- b
				return true
			}
			var b []byte
			for try := 0; try == 0 || try < 100 && len(b) < tc.want; try++ { // nothing is said while somebody else sends
				kv := openKV(t, connect(t, f, Options{}))
				if _, err := kv.Retrieve(t.Context(), []byte("k"), nil); !errors.Is(err, ErrConnectionLost) {
					t.Error(err)
				}
				b = <-got
			}
			if len(b) != tc.want {
				t.Errorf("% x", b)
			}
		})
	}
}

func TestDiscover(t *testing.T) {
	f, g := newFake(t), newFake(t)
	for i := range 150 {
		f.entries = append(f.entries, nvmeof.DiscoveryEntry{TRType: nvmeof.TRTypeTCP, SubType: nvmeof.SubtypeNVM, TRAddr: "127.0.0.1", TRSVCID: fmt.Sprint(i), SubNQN: testNQN})
	}
	var once sync.Once
	f.intercept = func(c *fakeConn, cmd *nvmeof.Command) bool {
		if cmd.Opcode() == nvmeof.OpGetLogPage && cmd.LogOffset() > 1024 { // changes while it is read
			once.Do(func() {
				f.mu.Lock()
				f.genctr++
				f.entries[3].TRSVCID = "new"
				f.mu.Unlock()
			})
		}
		return false
	}
	got, err := Discover(t.Context(), f.addr(), DiscoverOptions{})
	f.mu.Lock()
	defer f.mu.Unlock()
	if d := cmp.Diff(f.entries, got); d != "" || err != nil || got[3].TRSVCID != "new" {
		t.Error(d, err)
	}

	f2 := newFake(t)
	refer := func(x *fake) nvmeof.DiscoveryEntry {
		_, port, _ := bytes.Cut([]byte(x.addr()), []byte(":"))
		return nvmeof.DiscoveryEntry{TRType: nvmeof.TRTypeTCP, SubType: nvmeof.SubtypeReferral, TRAddr: "127.0.0.1", TRSVCID: string(port), SubNQN: nvmeof.DiscoveryNQN}
	}
	one := nvmeof.DiscoveryEntry{TRType: nvmeof.TRTypeTCP, SubType: nvmeof.SubtypeNVM, SubNQN: testNQN}
	dead := nvmeof.DiscoveryEntry{TRType: nvmeof.TRTypeTCP, SubType: nvmeof.SubtypeReferral, TRAddr: "127.0.0.1", TRSVCID: "1", SubNQN: nvmeof.DiscoveryNQN}
	f2.entries = []nvmeof.DiscoveryEntry{refer(g), dead}
	g.entries = []nvmeof.DiscoveryEntry{refer(f2), refer(g), one}
	got, err = Discover(t.Context(), f2.addr(), DiscoverOptions{Referrals: true})
	want := append(slices.Clone(f2.entries), g.entries[0], one)
	if d := cmp.Diff(want, got); d != "" || err != nil {
		t.Error(d, err)
	}
}

func TestDefaultHost(t *testing.T) {
	nqn, id := DefaultHost()
	if err := nvmeof.CheckNQN(nqn); err != nil || id == [16]byte{} {
		t.Error(nqn, id, err)
	}
	again, id2 := DefaultHost()
	if nqn != again || id != id2 {
		t.Error("not stable")
	}
	want := [16]byte{0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff, 0}
	if got := hostID("nqn.2014-08.org.nvmexpress:uuid:11223344-5566-7788-99aa-bbccddeeff00"); got != want {
		t.Errorf("%x", got)
	}
}
