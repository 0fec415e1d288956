package client

import (
	"fmt"
	"testing"

	"github.com/kvof/kvof/target/targettest"
)

// BenchmarkExistPrefix asks a real target on loopback, in the same process, for 1,000 keys at a time.
func BenchmarkExistPrefix(b *testing.B) {
	s := targettest.Serve(b, targettest.Options{})
	for _, all := range []bool{false, true} {
		b.Run(fmt.Sprintf("hashed=%v", all), func(b *testing.B) {
			c := open(b, Options{Targets: urlOf(s), HashAll: all})
			var ops []Op
			for i := range 1000 {
				key := fmt.Sprintf("bench-%010d", i)
				do(b, c, op(b, c, Put, key, []byte("v")))
				ops = append(ops, op(b, c, ExistPrefix, key))
			}
			done := make(chan struct{}, 1)
			batch := &Batch{Ops: ops, OnDone: func(*Batch) { done <- struct{}{} }}
			b.ReportAllocs()
			for b.Loop() {
				if err := c.Submit(batch); err != nil {
					b.Fatal(err)
				}
				<-done
			}
			for _, o := range ops {
				want(b, o, OK, 0)
			}
		})
	}
}

// BenchmarkGet loads values with as many operations in one batch.
func BenchmarkGet(b *testing.B) {
	s := targettest.Serve(b, targettest.Options{Size: 512 << 20})
	for _, key := range []string{short, long} {
		for _, size := range []int{4 << 10, 2 << 20} {
			b.Run(fmt.Sprintf("%s/%d", key[:4], size), func(b *testing.B) {
				c := open(b, Options{Targets: urlOf(s)})
				p := op(b, c, Put, key, make([]byte, size))
				p.Replace = true
				want(b, do(b, c, p)[0], OK, 0)
				var ops []Op
				for range 4 {
					ops = append(ops, op(b, c, Get, key, make([]byte, size)))
				}
				done := make(chan struct{}, 1)
				batch := &Batch{Ops: ops, OnDone: func(*Batch) { done <- struct{}{} }}
				b.ReportAllocs()
				b.SetBytes(int64(len(ops) * size))
				for b.Loop() {
					if err := c.Submit(batch); err != nil {
						b.Fatal(err)
					}
					<-done
				}
			})
		}
	}
}
