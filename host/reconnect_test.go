package host

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kvof/kvof/nvmeof"
)

// drop has the target end the connection instead of answering the n-th I/O command of an opcode, after it was carried
// out or before.
func drop(f *fake, op uint8, n int, carryOut bool) {
	var left atomic.Int64
	left.Store(int64(n))
	f.intercept = func(c *fakeConn, cmd *nvmeof.Command) bool {
		if c.qid == 0 || cmd.Opcode() != op || left.Add(-1) != 0 {
			return false
		}
		if carryOut {
			k := cmd.Key()
			key := string(k[:cmd.KeyLen()])
			v := c.write(cmd, nil)
			c.mu.Lock()
			switch op {
			case nvmeof.OpStore:
				c.kv[key] = v
			case nvmeof.OpDelete:
				delete(c.kv, key)
			}
			c.mu.Unlock()
		}
		c.dropAll()
		return true
	}
}

func TestReconnect(t *testing.T) {
	value := random(100000)
	for name, tc := range map[string]struct {
		op  uint8
		do  func(*KV) error
		err error
	}{
		"store":    {nvmeof.OpStore, func(kv *KV) error { return kv.Store(t.Context(), testKey, value, StoreAlways) }, nil},
		"retrieve": {nvmeof.OpRetrieve, func(kv *KV) error { _, err := kv.Retrieve(t.Context(), []byte("there"), make([]byte, 10)); return err }, nil},
		"exist":    {nvmeof.OpExist, func(kv *KV) error { _, err := kv.Exist(t.Context(), testKey); return err }, nil},
		"absent":   {nvmeof.OpStore, func(kv *KV) error { return kv.Store(t.Context(), testKey, value, StoreIfAbsent) }, ErrOutcomeUnknown},
		"delete":   {nvmeof.OpDelete, func(kv *KV) error { return kv.Delete(t.Context(), testKey) }, ErrOutcomeUnknown},
	} {
		for _, carryOut := range []bool{false, true} {
			f := newFake(t)
			f.kv["there"] = random(10)
			drop(f, tc.op, 1, carryOut && tc.op != nvmeof.OpRetrieve && tc.op != nvmeof.OpExist)
			kv := openKV(t, connect(t, f, Options{Reconnect: time.Minute}))
			err := tc.do(kv)
			if tc.err == nil && err != nil || !errors.Is(err, tc.err) {
				t.Errorf("%s: %v", name, err)
			}
			if err := kv.Store(t.Context(), testKey, value, StoreAlways); err != nil { // the connection is back
				t.Errorf("%s: %v", name, err)
			}
			buf := make([]byte, len(value))
			if n, err := kv.Retrieve(t.Context(), testKey, buf); n != len(buf) || err != nil || !bytes.Equal(buf, value) {
				t.Errorf("%s: %d %v", name, n, err)
			}
		}
	}
}

// TestReconnectMany loses the connection again and again under load; every command is answered in the end.
func TestReconnectMany(t *testing.T) {
	f := newFake(t)
	c := connect(t, f, Options{Reconnect: time.Minute, IOQueues: 3, QueueDepth: 4})
	kv := openKV(t, c)
	stop := make(chan bool)
	var drops sync.WaitGroup
	drops.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(100 * time.Millisecond):
				f.dropAll()
			}
		}
	})
	var wg sync.WaitGroup
	end := time.Now().Add(2 * time.Second)
	for g := range 8 {
		wg.Go(func() {
			key, buf := []byte{byte(g)}, make([]byte, 50000)
			for i := 0; time.Now().Before(end); i++ {
				v := random(1 + (g*7919+i*104729)%len(buf))
				if err := kv.Store(t.Context(), key, v, StoreAlways); err != nil {
					t.Error(err)
					return
				}
				if n, err := kv.Retrieve(t.Context(), key, buf); err != nil || !bytes.Equal(buf[:n], v) {
					t.Error("value differs", n, err)
					return
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	drops.Wait()
	if c.Err() != nil {
		t.Error(c.Err())
	}
}

func TestReconnectEnds(t *testing.T) {
	// The time is over.
	f := newFake(t)
	kv := openKV(t, connect(t, f, Options{Reconnect: 300 * time.Millisecond}))
	f.l.Close()
	f.dropAll()
	start := time.Now()
	if _, err := kv.Exist(t.Context(), testKey); !errors.Is(err, ErrConnectionLost) {
		t.Error(err)
	}
	c := kv.path.(*Controller)
	<-c.Done()
	if d := time.Since(start); !errors.Is(c.Err(), ErrConnectionLost) || d < 200*time.Millisecond || d > 30*time.Second {
		t.Error(c.Err(), d)
	}
	// The target refuses for good.
	f = newFake(t)
	var refuse atomic.Bool
	f.intercept = func(c *fakeConn, cmd *nvmeof.Command) bool {
		if refuse.Load() {
			c.reply(cmd.CID(), 0, 0, nvmeof.ConnectInvalidHost|nvmeof.DNR)
		}
		return refuse.Load()
	}
	c = connect(t, f, Options{Reconnect: time.Hour})
	refuse.Store(true)
	f.dropAll()
	<-c.Done()
	if !errors.Is(c.Err(), nvmeof.ConnectInvalidHost) {
		t.Error(c.Err())
	}
	// The caller does not wait, or closes.
	f = newFake(t)
	c = connect(t, f, Options{Reconnect: time.Hour})
	kv = openKV(t, c)
	f.l.Close()
	f.dropAll()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := kv.Exist(ctx, testKey); !errors.Is(err, ErrConnectionLost) {
		t.Error(err)
	}
	done := make(chan error)
	go func() {
		_, err := kv.Exist(t.Context(), testKey)
		done <- err
	}()
	time.Sleep(20 * time.Millisecond)
	c.Close()
	if err := <-done; !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	if err := kv.Flush(t.Context()); !errors.Is(err, ErrClosed) && !errors.Is(err, ErrConnectionLost) {
		t.Error(err)
	}
}

// TestReconnectEvents: events come after reconnecting, too.
func TestReconnectEvents(t *testing.T) {
	f := newFake(t)
	events := make(chan uint32, 16)
	connect(t, f, Options{Reconnect: time.Minute, OnEvent: func(dw0 uint32) { events <- dw0 }})
	for range 3 {
		for got := false; !got; {
			f.mu.Lock()
			aer := f.aer
			f.aer = nil
			f.mu.Unlock()
			if aer != nil { // it may be of the connection that was dropped
				aer(nvmeof.EventNamespaceChanged)
			}
			select {
			case e := <-events:
				if e != nvmeof.EventNamespaceChanged {
					t.Errorf("%x", e)
				}
				got = true
			case <-time.After(10 * time.Millisecond):
			}
		}
		f.dropAll()
	}
}
