// What kvof.c and the Go side share.
#ifndef KVOF_INTERNAL_H
#define KVOF_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "kvof.h"

#define KVOF_ERROR_SIZE 512 // bytes of a thread's last error

// kvof_queue is a ring of completions in memory of its own. Go puts them in at tail, one at a time; pollers take them off at head.
struct kvof_queue {
	int fd;            // eventfd
	uint32_t depth;    // a power of two
	uintptr_t handle;  // of the Go side
	struct kvof_client *client;
	struct kvof_queue *next;
	_Alignas(64) _Atomic uint64_t taken;    // batches in flight and in the ring: at most depth
	_Alignas(64) _Atomic uint64_t inflight; // batches in flight; Go counts down, and wakes who waits
	_Alignas(64) _Atomic uint64_t head;
	_Alignas(64) _Atomic uint64_t tail;
	_Alignas(64) struct kvof_completion ring[];
};

// kvof_submission is a batch on its way to Go, with all of it that the caller may reuse: made by kvof_submit, freed by Go.
struct kvof_submission {
	struct kvof_submission *next;
	uintptr_t queue; // handle
	struct kvof_op *ops;
	uint64_t user_data;
	uint32_t count;
	uint32_t op_size;
	struct kvof_desc {
		const void *key; // op's key_len bytes; NULL: the op is malformed
		struct kvof_iov *iov;
		uint32_t pieces;
		uint32_t reserved;
	} desc[];
};

struct kvof_client {
	uintptr_t handle; // of the Go side
	int wake;         // eventfd: submitted is no longer empty
	uint32_t max_ops;
	_Atomic uint64_t ops;                             // in flight
	struct kvof_submission *_Atomic submitted; // the newest, linked to those before; Go takes them all at once
	pthread_mutex_t lock;
	struct kvof_queue *queues;
};

// The layout is part of the interface: who changes it breaks programs that are compiled already.
_Static_assert(sizeof(void *) == 8, "64-bit only");
_Static_assert(sizeof(struct kvof_scope) == 40, "struct kvof_scope");
_Static_assert(sizeof(struct kvof_nvme_key) == 56, "struct kvof_nvme_key");
_Static_assert(sizeof(struct kvof_options) == 112, "struct kvof_options");
_Static_assert(sizeof(struct kvof_region) == 40, "struct kvof_region");
_Static_assert(sizeof(struct kvof_iov) == 16, "struct kvof_iov");
_Static_assert(sizeof(struct kvof_op) == 64, "struct kvof_op");
_Static_assert(sizeof(struct kvof_batch) == 32, "struct kvof_batch");
_Static_assert(sizeof(struct kvof_completion) == 40, "struct kvof_completion");
_Static_assert(sizeof(struct kvof_counters) == 184, "struct kvof_counters");
_Static_assert(offsetof(struct kvof_op, status) == 40, "struct kvof_op: status");

#endif
