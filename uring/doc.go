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
// one system call, and under contention calls batch by themselves. A goroutine
// that waits while no other does, or lately did, takes completions itself and waits for them in
// the kernel. Where several wait, one goroutine per ring takes them; it sleeps
// in Go's netpoller on the eventfd registered with the ring, which nobody ever
// reads as the poller is edge-triggered, so an idle device costs no CPU.
// The ends of ops that nobody waits for (Op.Then) are taken by the owner of the Batch
// that they came in, who sleeps on the ring's own descriptor beside its others
// and holds all of the device's completions meanwhile. While it is awake it is
// relied on for its own ops alone: it may wait for what others hold, so these
// have the eventfd. Nobody spins first: for 4 KiB and 2 MiB transfers on a drive
// that answers in 50 µs, spinning 20 or 50 µs brought no lower latency and more
// CPU. IORING_SETUP_SINGLE_ISSUER and DEFER_TASKRUN are not used: they want all
// submissions from one thread, and handing ops to it costs more than the 30 ns
// that they save. A memory device has no goroutine: its ops complete inside
// Submit.
//
// # Kernel interface
//
// io_uring_setup(2), io_uring_enter(2) and io_uring_register(2) with 64-byte
// struct io_uring_sqe and 16-byte struct io_uring_cqe (linux/io_uring.h), in
// host byte order. Operations: IORING_OP_READ, WRITE, READ_FIXED, WRITE_FIXED,
// FSYNC (IORING_FSYNC_DATASYNC), FALLOCATE, and URING_CMD with
// BLOCK_URING_CMD_DISCARD (linux/blkdev.h). NVMe drives have rings of 128-byte
// entries and 32-byte completions (IORING_SETUP_SQE128, CQE32), a registered
// file, IORING_SETUP_IOPOLL where asked for, and URING_CMD with
// NVME_URING_CMD_IO and _IO_VEC (linux/nvme_ioctl.h): Linux 6.1. Alignment of direct I/O comes from
// statx(2), STATX_DIOALIGN. All of it runs on Linux 6.1 and later.
//
// The ring arithmetic is giouring's. Go 1.23 and later link it only with
// -ldflags=-checklinkname=0.
package uring
