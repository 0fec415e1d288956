// Package kvlayer is the store under Key Value namespaces: values of 0 B to
// 64 MiB under keys of 1 to 16 bytes, in logs of segments on a pool of devices,
// with the index in memory. A Store is one tenant of a Pool, with a policy of its
// own for what is evicted when the pool is full; Open makes a pool of one device
// with one Store.
//
// # What survives
//
// Nothing here depends on a clean shutdown. After the process is killed, every
// Store, replacement and Delete that had completed is there, unless it was
// evicted; one that was under way is there whole or not at all.
//
// After a power cut, the same holds for what a later Flush covered, and for
// everything on a drive without a volatile write cache. What had not been
// flushed may be lost, and a key may show its earlier value. In no case does a
// Retrieve return wrong bytes: every byte is verified against the checksums of
// its value on the way out, and the answer is ErrCorrupt instead.
//
// The layout, its invariants, how room is made and what is deliberately simple are
// in docs/kvlayer.md.
//
// # Concurrency
//
// All Store methods may be called from any goroutine. Storing replaces
// atomically: a Reader sees the whole old or the whole new value. Of several
// writes of one absent key with StoreIfAbsent exactly one wins. Writers and
// Readers themselves serve one goroutine at a time.
package kvlayer
