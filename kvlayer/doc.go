// Package kvlayer is the store under a Key Value namespace: values of 0 B to
// 64 MiB under keys of 1 to 16 bytes, in a log of segments on one device, with
// the index in memory.
//
// # What survives
//
// Nothing here depends on a clean shutdown. After the process is killed, every
// Store, replacement and Delete that had completed is there; one that was under
// way is there whole or not at all.
//
// After a power cut, the same holds for what a later Flush covered, and for
// everything on a drive without a volatile write cache. What had not been
// flushed may be lost, and a key may show its earlier value. In no case does a
// Retrieve return wrong bytes: every byte is verified against the checksums of
// its value on the way out, and the answer is ErrCorrupt instead.
//
// The layout, its invariants and what is deliberately simple are in
// docs/kvlayer.md.
//
// # Concurrency
//
// All Store methods may be called from any goroutine. Storing replaces
// atomically: a Reader sees the whole old or the whole new value. Of several
// writes of one absent key with StoreIfAbsent exactly one wins. Writers and
// Readers themselves serve one goroutine at a time.
package kvlayer
