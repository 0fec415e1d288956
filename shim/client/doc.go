// Package client is what the C interface is made of: batches of operations on context blocks, over any number of targets and
// paths to each, with bounded time-outs and connections that come back by themselves.
//
// A [Client] has targets, found by discovery or named. A key's target is chosen by rendezvous hashing of the targets' names; a
// target has paths, each of them one controller of package host, which are used side by side. Keys are those of package keys:
// values of hashed ones carry a trailer, which is verified.
//
// [Client.Submit] never blocks. What becomes of an operation is a [Status], never an error; a target that dies, hangs or is full
// costs its operations their time-out at most.
//
// Payloads are neither copied nor kept: they move between the caller's memory and the network, and the memory is the caller's again
// once [Batch.OnDone] has been called.
package client
