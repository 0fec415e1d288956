//go:build cgo

// The functions of kvof.h: what needs no Go, and the way to what does.

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"
#include "_cgo_export.h"

static _Thread_local char last_error[KVOF_ERROR_SIZE];

// Go's threads do not exist in a child of fork: calling into it there would never return.
static atomic_int forked;

static void in_child(void) { atomic_store(&forked, 1); }

__attribute__((constructor)) static void loaded(void) { pthread_atfork(NULL, NULL, in_child); }

static int fail(int status, const char *why) {
	snprintf(last_error, sizeof last_error, "%s", why);
	return status;
}

static int no_eventfd(void) {
	snprintf(last_error, sizeof last_error, "eventfd: %s", strerror(errno));
	return KVOF_NO_MEMORY;
}

static int fork_error(void) { return fail(KVOF_FORKED, "the process was forked after libkvof.so was loaded"); }

#define CHECK_FORK() \
	do { \
		if (atomic_load_explicit(&forked, memory_order_relaxed)) \
			return fork_error(); \
	} while (0)

uint32_t kvof_abi(void) { return KVOF_ABI; }

const char *kvof_version(void) { return "1.0"; }

const char *kvof_last_error(void) { return last_error; }

const char *kvof_strerror(int status) {
	static const char *const text[] = {
		[KVOF_OK] = "success", [KVOF_EXISTS] = "key exists", [KVOF_MISS] = "no such key", [KVOF_TRUNCATED] = "value is larger than the memory",
		[KVOF_UNAVAILABLE] = "target cannot be reached", [KVOF_TIMEOUT] = "target did not answer in time", [KVOF_FULL] = "target is full",
		[KVOF_TOO_LARGE] = "value is too large", [KVOF_READ_ONLY] = "namespace is write protected", [KVOF_IO] = "target reported an error",
		[KVOF_CANCELLED] = "cancelled", [KVOF_INVALID] = "invalid argument", [KVOF_AGAIN] = "too much in flight", [KVOF_NO_MEMORY] = "out of memory",
		[KVOF_UNSUPPORTED] = "not supported", [KVOF_FORKED] = "process was forked after the library was loaded"};
	if (status >= 0 && (size_t)status < sizeof text / sizeof *text)
		return text[status];
	return status == KVOF_PENDING ? "pending" : "unknown status";
}

int kvof_key(const struct kvof_scope *scope, uint32_t flags, const void *key, uint32_t key_len, struct kvof_nvme_key *out) {
	static const struct kvof_scope none;
	CHECK_FORK();
	if (!key || !out || flags & ~KVOF_HASH_ALL)
		return fail(KVOF_INVALID, "key and out are not NULL, and KVOF_HASH_ALL is the only flag");
	memset(out, 0, sizeof *out);
	return kvofgo_key((struct kvof_scope *)(scope ? scope : &none), flags, (void *)key, key_len, out, last_error);
}

#define DEFAULT_OPS 65536 // max_ops

int kvof_open(const struct kvof_options *options, kvof_client **out) {
	CHECK_FORK();
	if (!options || !out)
		return fail(KVOF_INVALID, "options and out are not NULL");
	*out = NULL;
	struct kvof_options o = {0};
	if (options->size < offsetof(struct kvof_options, host_nqn))
		return fail(KVOF_INVALID, "size is not that of struct kvof_options");
	memcpy(&o, options, options->size < sizeof o ? options->size : sizeof o);
	if (!o.targets)
		return fail(KVOF_INVALID, "targets is NULL");
	kvof_client *c = calloc(1, sizeof *c);
	if (!c)
		return fail(KVOF_NO_MEMORY, "no memory");
	c->max_ops = o.max_ops ? o.max_ops : DEFAULT_OPS;
	c->wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	if (c->wake < 0) {
		free(c);
		return no_eventfd();
	}
	int status = kvofgo_open(&o, c, last_error);
	if (status != KVOF_OK) {
		close(c->wake);
		free(c);
		return status;
	}
	pthread_mutex_init(&c->lock, NULL);
	*out = c;
	return KVOF_OK;
}

static void free_queue(kvof_queue *q) {
	close(q->fd);
	free(q);
}

void kvof_close(kvof_client *c) {
	if (!c || atomic_load(&forked))
		return;
	kvofgo_close(c->handle);
	for (kvof_queue *q = c->queues, *next; q; q = next) {
		next = q->next;
		kvofgo_queue_close(q->handle);
		free_queue(q);
	}
	pthread_mutex_destroy(&c->lock);
	free(c);
}

int kvof_register(kvof_client *c, const struct kvof_region *region) {
	CHECK_FORK();
	struct kvof_region r = {0};
	if (!c || !region || region->size < offsetof(struct kvof_region, dmabuf_fd))
		return fail(KVOF_INVALID, "client and region are not NULL, and size is that of struct kvof_region");
	memcpy(&r, region, region->size < sizeof r ? region->size : sizeof r);
	if (!r.addr || (r.flags & ~(KVOF_READ | KVOF_WRITE)))
		return fail(KVOF_INVALID, "no address, or an unknown flag");
	return kvofgo_register(c->handle, r.addr, r.len, r.dmabuf, r.dmabuf_fd, r.dmabuf_offset, last_error);
}

int kvof_unregister(kvof_client *c, void *addr) {
	CHECK_FORK();
	if (!c)
		return fail(KVOF_INVALID, "client is NULL");
	return kvofgo_unregister(c->handle, addr, last_error);
}

int kvof_queue_open(kvof_client *c, uint32_t depth, kvof_queue **out) {
	CHECK_FORK();
	if (!c || !out)
		return fail(KVOF_INVALID, "client and out are not NULL");
	*out = NULL;
	if (depth == 0)
		depth = 1024;
	if (depth > 65536 || (depth & (depth - 1)) != 0)
		return fail(KVOF_INVALID, "depth is a power of two up to 65536");
	size_t size = sizeof(struct kvof_queue) + depth * sizeof(struct kvof_completion);
	size = (size + 63) & ~(size_t)63;
	kvof_queue *q = aligned_alloc(64, size);
	if (!q)
		return fail(KVOF_NO_MEMORY, "no memory");
	memset(q, 0, size);
	q->depth = depth;
	q->client = c;
	q->fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	if (q->fd < 0) {
		free(q);
		return no_eventfd();
	}
	q->handle = kvofgo_queue_open(c->handle, q);
	pthread_mutex_lock(&c->lock);
	q->next = c->queues;
	c->queues = q;
	pthread_mutex_unlock(&c->lock);
	*out = q;
	return KVOF_OK;
}

void kvof_queue_close(kvof_queue *q) {
	if (!q || atomic_load(&forked))
		return;
	kvofgo_queue_close(q->handle);
	kvof_client *c = q->client;
	pthread_mutex_lock(&c->lock);
	for (kvof_queue **p = &c->queues; *p; p = &(*p)->next) {
		if (*p == q) {
			*p = q->next;
			break;
		}
	}
	pthread_mutex_unlock(&c->lock);
	free_queue(q);
}

int kvof_queue_fd(const kvof_queue *q) { return q->fd; }

// MAX_PIECE is the most that one piece of memory may have, bytes: far more than a value.
#define MAX_PIECE (1ull << 32)

// well_formed checks an op; its pieces are *iov.
static int well_formed(const struct kvof_op *op, struct kvof_iov *one, const struct kvof_iov **iov, uint32_t *pieces) {
	*pieces = 0;
	if (op->kind < KVOF_GET || op->kind > KVOF_EXIST_PREFIX || op->flags & ~KVOF_REPLACE || (op->flags && op->kind != KVOF_PUT) || !op->key ||
	    op->key_len == 0 || op->key_len > KVOF_MAX_KEY)
		return 0;
	if (op->kind != KVOF_GET && op->kind != KVOF_PUT)
		return 1;
	*one = (struct kvof_iov){op->data, op->len};
	*iov = one;
	uint32_t n = 1;
	if (op->iov_count > 0) {
		*iov = op->data;
		n = op->iov_count;
		if (!*iov || n > KVOF_MAX_IOV)
			return 0;
	}
	for (uint32_t i = 0; i < n; i++)
		if ((*iov)[i].len > MAX_PIECE || ((*iov)[i].len > 0 && !(*iov)[i].base))
			return 0;
	*pieces = n;
	return 1;
}

static struct kvof_op *op_at(const struct kvof_batch *b, uint32_t i) { return (struct kvof_op *)((char *)b->ops + (size_t)i * b->op_size); }

// pack copies what the caller may reuse. NULL if there is no memory.
static struct kvof_submission *pack(const struct kvof_batch *b, uintptr_t queue) {
	struct kvof_iov one;
	const struct kvof_iov *iov;
	uint32_t pieces;
	size_t keys = 0, iovs = 0, head = sizeof(struct kvof_submission) + b->count * sizeof(struct kvof_desc);
	for (uint32_t i = 0; i < b->count; i++)
		if (well_formed(op_at(b, i), &one, &iov, &pieces)) {
			keys += op_at(b, i)->key_len;
			iovs += pieces;
		}
	struct kvof_submission *s = malloc(head + iovs * sizeof *iov + keys);
	if (!s)
		return NULL;
	*s = (struct kvof_submission){.queue = queue, .ops = b->ops, .user_data = b->user_data, .count = b->count, .op_size = b->op_size};
	struct kvof_iov *to = (struct kvof_iov *)((char *)s + head);
	char *key = (char *)(to + iovs);
	for (uint32_t i = 0; i < b->count; i++) {
		struct kvof_op *op = op_at(b, i);
		s->desc[i] = (struct kvof_desc){0};
		if (well_formed(op, &one, &iov, &pieces)) {
			s->desc[i] = (struct kvof_desc){.key = memcpy(key, op->key, op->key_len), .iov = to, .pieces = pieces};
			if (pieces > 0)
				memcpy(to, iov, pieces * sizeof *to);
			key += op->key_len;
			to += pieces;
		}
		op->result = 0;
		op->detail = 0;
		op->status = KVOF_PENDING;
	}
	return s;
}

int kvof_submit(kvof_queue *q, const struct kvof_batch *batch) {
	CHECK_FORK();
	struct kvof_batch b = {0};
	if (!q || !batch || batch->size < offsetof(struct kvof_batch, user_data))
		return fail(KVOF_INVALID, "queue and batch are not NULL, and size is that of struct kvof_batch");
	memcpy(&b, batch, batch->size < sizeof b ? batch->size : sizeof b);
	if (!b.ops || b.count == 0 || b.op_size < sizeof(struct kvof_op) || b.op_size % 8 != 0 || b.flags != 0)
		return fail(KVOF_INVALID, "a batch has ops of op_size = sizeof(struct kvof_op), and no flags");
	kvof_client *c = q->client;
	if (b.count > c->max_ops)
		return fail(KVOF_INVALID, "a batch has at most max_ops ops");
	if (atomic_fetch_add(&q->taken, 1) >= q->depth) {
		atomic_fetch_sub(&q->taken, 1);
		return KVOF_AGAIN;
	}
	int status = KVOF_AGAIN;
	if (atomic_fetch_add(&c->ops, b.count) + b.count <= c->max_ops) {
		struct kvof_submission *s = pack(&b, q->handle);
		if (s) {
			atomic_fetch_add(&q->inflight, 1);
			s->next = atomic_load(&c->submitted);
			int first;
			do
				first = s->next == NULL; // s is Go's once it is in
			while (!atomic_compare_exchange_weak(&c->submitted, &s->next, s));
			if (first)
				eventfd_write(c->wake, 1);
			return KVOF_OK;
		}
		status = fail(KVOF_NO_MEMORY, "no memory");
	}
	atomic_fetch_sub(&c->ops, b.count);
	atomic_fetch_sub(&q->taken, 1);
	return status;
}

// The words of a completion are read one by one: another poller may take the entry, and Go then write a new one, meanwhile; what was read
// is then thrown away.
_Static_assert(sizeof(struct kvof_completion) % 8 == 0, "struct kvof_completion is read in words");

uint32_t kvof_poll(kvof_queue *q, struct kvof_completion *out, uint32_t max) {
	uint32_t n = 0;
	uint64_t head = atomic_load(&q->head);
	while (n < max && head != atomic_load(&q->tail)) {
		uint64_t *from = (uint64_t *)&q->ring[head & (q->depth - 1)], *to = (uint64_t *)&out[n];
		for (size_t i = 0; i < sizeof *out / 8; i++)
			to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
		atomic_thread_fence(memory_order_acquire);
		if (atomic_compare_exchange_strong(&q->head, &head, head + 1)) {
			atomic_fetch_sub(&q->taken, 1);
			head++;
			n++;
		}
	}
	return n;
}

static int64_t now_ms(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

uint32_t kvof_wait(kvof_queue *q, struct kvof_completion *out, uint32_t max, int timeout_ms) {
	int64_t end = timeout_ms < 0 ? 0 : now_ms() + timeout_ms;
	int signalled = 0;
	for (;;) {
		uint32_t n = kvof_poll(q, out, max);
		if (n > 0) {
			// Others may wait for what is left, and the signal has been read.
			if (signalled && atomic_load(&q->head) != atomic_load(&q->tail))
				eventfd_write(q->fd, 1);
			return n;
		}
		int64_t left = timeout_ms < 0 ? -1 : end - now_ms();
		if ((timeout_ms >= 0 && left < 0) || max == 0 || atomic_load(&forked))
			return 0;
		struct pollfd p = {.fd = q->fd, .events = POLLIN};
		if (poll(&p, 1, (int)left) > 0) {
			eventfd_t v;
			signalled |= eventfd_read(q->fd, &v) == 0;
		} else if (timeout_ms >= 0 && end <= now_ms()) {
			return kvof_poll(q, out, max);
		}
	}
}

int kvof_counters(kvof_client *c, struct kvof_counters *out) {
	CHECK_FORK();
	if (!c || !out || out->size < 8)
		return fail(KVOF_INVALID, "client and out are not NULL, and size is that of struct kvof_counters");
	struct kvof_counters n = {0};
	kvofgo_counters(c->handle, &n);
	n.size = out->size;
	memcpy(out, &n, out->size < sizeof n ? out->size : sizeof n);
	return KVOF_OK;
}

size_t kvof_describe(kvof_client *c, char *buf, size_t len) {
	if (len > 0)
		buf[0] = 0;
	if (!c || atomic_load(&forked))
		return 0;
	return kvofgo_describe(c->handle, buf, len);
}
