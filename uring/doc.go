// Package uring is the store's way to memory and drives: a buffer arena off
// the Go heap and block-addressed devices (files, block devices, plain memory)
// served through Linux io_uring.
//
// # Threads
//
// Everything here is ordinary Go; no goroutine is locked to a thread. Any
// goroutine may submit to any device. A device has one ring. Submitters append
// their ops under a mutex and the first of them becomes the submitter, who
// fills submission queue entries and enters the kernel for all: a lone op costs
// one system call, and under contention calls batch by themselves. One
// goroutine per ring takes completions; it sleeps in Go's netpoller on the
// eventfd registered with the ring, so an idle device costs no CPU. It does not
// spin first: for 4 KiB and 2 MiB transfers on a drive that answers in 50 µs,
// spinning 20 or 50 µs brought no lower latency and more CPU. A memory device
// has no goroutine: its ops complete inside Submit.
//
// # Kernel interface
//
// io_uring_setup(2), io_uring_enter(2) and io_uring_register(2) with 64-byte
// struct io_uring_sqe and 16-byte struct io_uring_cqe (linux/io_uring.h), in
// host byte order. Operations: IORING_OP_READ, WRITE, READ_FIXED, WRITE_FIXED,
// FSYNC (IORING_FSYNC_DATASYNC), FALLOCATE, and URING_CMD with
// BLOCK_URING_CMD_DISCARD (linux/blkdev.h). Alignment of direct I/O comes from
// statx(2), STATX_DIOALIGN. Linux 5.15 or later; buffers are registered from
// Linux 5.19 on.
//
// The ring arithmetic is giouring's. Go 1.23 and later link it only with
// -ldflags=-checklinkname=0.
package uring
