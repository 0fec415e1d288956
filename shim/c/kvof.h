/*
 * kvof.h: context blocks in NVMe Key Value namespaces, over fabrics, from C.
 *
 * Link with libkvof.so. In short:
 *
 *     kvof_client *c;
 *     kvof_queue *q;
 *     struct kvof_options o = { .size = sizeof o, .targets = "discover://10.0.0.1:8009" };
 *     if (kvof_open(&o, &c) != KVOF_OK || kvof_queue_open(c, 0, &q) != KVOF_OK) ...
 *
 *     struct kvof_op op = { .kind = KVOF_GET, .key = "block", .key_len = 5, .data = buffer, .len = size };
 *     struct kvof_batch b = { .size = sizeof b, .op_size = sizeof op, .ops = &op, .count = 1 };
 *     if (kvof_submit(q, &b) == KVOF_OK) ... poll(kvof_queue_fd(q)) ... kvof_poll(q, &done, 1) ... op.status
 *
 * Batches. A batch is an array of ops. They run side by side, in no order; the caller must not put two ops on one key into
 * flight when their order matters. Each op ends with a status of its own, whatever becomes of the others; when the last has
 * ended, one completion with the batch's user_data arrives in the queue's ring and the queue's eventfd becomes readable.
 *
 * Nothing here is an error of the caller's hot path: a target that is dead, slow, full or unknown makes ops end with
 * statuses, within the time-outs of struct kvof_options; connections come back by themselves.
 *
 * Memory. Data moves between the caller's memory and the network without a copy. From kvof_submit on an op and its data
 * belong to the library, until its status is no longer KVOF_PENDING, as it is for all ops when the batch's completion arrives or
 * kvof_close returns. The batch itself, keys and struct kvof_iov arrays may be reused as soon as kvof_submit returns. What a failed
 * KVOF_GET leaves in its memory is undefined, as is what lies behind a value that is smaller than its memory.
 *
 * Threads. All functions may be called by any thread at any time, but for kvof_close and kvof_queue_close, after whose start
 * the handle must not be used. kvof_submit, kvof_poll, kvof_counters and kvof_key never block; the first two do not even enter the Go runtime.
 * kvof_open, kvof_wait, kvof_close and kvof_queue_close may, for the times that they name.
 *
 * Processes. The library contains the Go runtime, which does not survive fork(): in a child of a process that has loaded the
 * library every function returns KVOF_FORKED (those that return a number, 0). Load it after the fork, or start children with exec. It is never unloaded.
 * docs/shim.md says what the runtime costs.
 *
 * Layout. 64-bit Linux, little-endian. Structures whose first member is size are extended at their end only: the caller sets
 * size, the library takes missing members as 0 and ignores none it knows. Reserved members are 0. Structures without it do not change
 * while KVOF_ABI stays the same.
 */
#ifndef KVOF_H
#define KVOF_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The version of this interface, as kvof_abi() of the library returns it. It grows when something breaks. */
#define KVOF_ABI 1

/* Statuses: of functions (returned), ops and batches. KVOF_OK and KVOF_EXISTS are success. */
enum kvof_status {
	KVOF_OK = 0,
	KVOF_EXISTS = 1,      /* put: the key was there already; nothing was sent or changed */
	KVOF_MISS = 2,        /* get, exist, delete: no such key; get: also a value that is not the key's or is damaged */
	KVOF_TRUNCATED = 3,   /* get: the value is larger than the memory. result says how large; the memory is undefined */
	KVOF_UNAVAILABLE = 4, /* no path to the key's target is up, or the last broke under the op */
	KVOF_TIMEOUT = 5,     /* the target did not answer in time */
	KVOF_FULL = 6,        /* put: the target has no room */
	KVOF_TOO_LARGE = 7,   /* put: larger than the target's values may be */
	KVOF_READ_ONLY = 8,   /* put, delete: the namespace is write protected */
	KVOF_IO = 9,          /* the target failed in another way: detail is its NVMe status */
	KVOF_CANCELLED = 10,  /* kvof_close came first */
	KVOF_INVALID = 11,    /* an argument that is not allowed; kvof_last_error says which, ops have detail 0 */
	KVOF_AGAIN = 12,      /* submit: too many batches or ops in flight. Nothing was taken: poll, then submit again */
	KVOF_NO_MEMORY = 13,  /* memory or file descriptors ran out */
	KVOF_UNSUPPORTED = 14, /* not offered by any transport in use; get, put: the memory is a dma-buf's, and no path that is up takes it */
	KVOF_FORKED = 15,     /* called in a child of the process that loaded the library */
	KVOF_PENDING = 255    /* an op that has not ended */
};

/* A short English text for a status; never NULL. */
const char *kvof_strerror(int status);

/* Why the last call of the calling thread that returned another status than KVOF_OK or KVOF_AGAIN did so. Valid until the
 * thread's next call; never NULL. */
const char *kvof_last_error(void);

/* KVOF_ABI of the library, and its release, such as "1.0". */
uint32_t kvof_abi(void);
const char *kvof_version(void);

/* ---- Keys ---- */

/*
 * struct kvof_scope separates the keys of those who share a namespace. All are text, NULL is "". They count only for keys
 * that are hashed: see kvof_key and docs/keys.md.
 */
struct kvof_scope {
	const char *tenant;
	const char *model;
	const char *rank;
	const char *group;
	const char *salt;
};

/* The NVMe key that stands for a caller's key. 56 bytes. */
struct kvof_nvme_key {
	uint8_t bytes[16];
	uint8_t len;     /* 1 to 16; the rest of bytes is 0 */
	uint8_t hashed;  /* 1: bytes are the first 16 of digest, and values carry a trailer that get verifies */
	uint8_t reserved[6];
	uint8_t digest[32]; /* SHA-256; 0 unless hashed */
};

/*
 * The key scheme, for those who want to know where a value lies. A key of 1 to 16 bytes is used as it is; one of exactly
 * 32 hexadecimal digits stands for its 16 bytes; all others are hashed, together with the scope. KVOF_HASH_ALL in flags
 * hashes every key. KVOF_INVALID for key_len 0 or above KVOF_MAX_KEY.
 */
int kvof_key(const struct kvof_scope *scope, uint32_t flags, const void *key, uint32_t key_len, struct kvof_nvme_key *out);

#define KVOF_MAX_KEY 65535u /* bytes */
#define KVOF_TRAILER 64u    /* bytes that the value of a hashed key takes on the target beyond its payload */

/* ---- Clients ---- */

typedef struct kvof_client kvof_client;
typedef struct kvof_queue kvof_queue;

/* Flags of struct kvof_options (and of kvof_key: KVOF_HASH_ALL). */
#define KVOF_NOWAIT 0x01u        /* kvof_open returns at once; connections come up in the background */
#define KVOF_HASH_ALL 0x02u      /* hash all keys, so that tenant, model, rank, group and salt separate short ones too */
#define KVOF_NO_CHECKSUM 0x04u   /* hashed keys: do not sum payloads when storing, and do not verify sums when loading */
#define KVOF_HEADER_DIGEST 0x08u /* TCP: CRC32C of headers */
#define KVOF_DATA_DIGEST 0x10u   /* TCP: CRC32C of data */

/*
 * Where and how to connect. Zero in a member other than size and targets means its default.
 *
 * targets is a list of targets, separated by commas. Keys are distributed over all of them by rendezvous hashing of their
 * names, so that every client with the same names finds the same keys, and a target more or less moves only its share.
 * A target is [name=]path{|path}: its paths, separated by |, are ways to one and the same subsystem; ops use all that are up.
 * Its name is its subsystem NQN unless one is given; two targets of one name are KVOF_INVALID. A path is one of
 *
 *     tcp://host[:port]/subsystem-nqn[?ns=NSID]         port 4420 when left out; the first Key Value namespace unless ns is given
 *     rdma://host[:port]/subsystem-nqn[?ns=NSID]        where the library is built with RDMA
 *     discover://host[:port][/subsystem-nqn][?ns=NSID]  port 8009: every subsystem (or that one) which the discovery controller
 *                                                       lists, each a target with all its paths; the list is followed as it
 *                                                       changes. Alternatives (|) are other discovery controllers to ask
 *
 * An IPv6 host is in brackets. Spaces around names and paths are ignored.
 */
struct kvof_options {
	uint32_t size;               /* sizeof(struct kvof_options) */
	uint32_t flags;
	const char *targets;
	const char *host_nqn;        /* this machine's by default: /etc/nvme/hostnqn or made from /etc/machine-id */
	struct kvof_scope scope;
	uint32_t timeout_ms;         /* get, put, delete: from the command's start to its end; 3000 */
	uint32_t lookup_timeout_ms;  /* exist: 500 */
	uint32_t connect_timeout_ms; /* to bring up one path, and how long kvof_open waits at most; 5000 */
	uint32_t reconnect_ms;       /* pause before a broken path is tried again: half to one and a half of it; 1000 */
	uint32_t keep_alive_ms;      /* KATO: within this time an idle path's death is noticed; 5000 */
	uint32_t io_queues;          /* connections per path, each with its queue; 1 */
	uint32_t queue_depth;        /* commands in flight per connection; 128, at most 1023 */
	uint32_t max_ops;            /* ops in flight in all queues; more are KVOF_AGAIN; 65536 */
	uint64_t reserved[2];
};

/*
 * Opens a client and starts to connect. Waits until every target that is known has a path, for at most connect_timeout_ms, and
 * succeeds if one has; KVOF_UNAVAILABLE if none has. With KVOF_NOWAIT it does not wait. KVOF_INVALID for options that cannot be.
 */
int kvof_open(const struct kvof_options *o, kvof_client **out);

/* Ends all ops in flight with KVOF_CANCELLED, disconnects, and frees the client and its queues with what is in their rings.
 * The library uses none of the caller's memory any more when it returns: after at most 6 seconds. NULL is allowed. */
void kvof_close(kvof_client *c);

/* Flags of kvof_register. */
#define KVOF_READ 1u  /* data will be put from the memory */
#define KVOF_WRITE 2u /* data will be got into the memory */

/* Memory to register. */
struct kvof_region {
	uint32_t size;      /* sizeof(struct kvof_region) */
	uint32_t flags;     /* KVOF_READ, KVOF_WRITE; 0 is both */
	void *addr;         /* its first byte, as ops name it */
	uint64_t len;       /* bytes */
	int32_t dmabuf_fd;  /* with dmabuf = 1: the memory is this dma-buf's, from dmabuf_offset on; the library duplicates it */
	uint32_t dmabuf;
	uint64_t dmabuf_offset;
};

/*
 * Tells the library about memory that many ops will use. Over TCP data is not copied whether or not its memory is registered, so
 * this does little; over RDMA it registers the memory with the devices in use, now and after every reconnect. May block while the
 * kernel pins the memory. KVOF_INVALID when it overlaps registered memory in part, KVOF_UNSUPPORTED for a dma-buf that no transport
 * in use can take.
 *
 * A dma-buf is memory of another device, such as a GPU, that ops can then name: any address in [addr, addr + len), which no processor
 * touches. Each piece of an op lies in one such region, or in none. addr and dmabuf_offset have the same offset into a page. Only RDMA
 * carries it, where device, driver and rdma-core (34 or later) take dma-bufs; at least one path that is up must. Get and put of such
 * memory use the paths that do, and end with KVOF_UNSUPPORTED when none of those is up but another path of the target is. Payloads under
 * hashed keys are then neither summed nor verified, as with KVOF_NO_CHECKSUM; that the value is the key's is verified. A value under a
 * hashed key that is smaller than the memory is read twice. With dmabuf_fd -1 nothing is registered, and the status tells whether a
 * dma-buf would be taken: KVOF_INVALID, or KVOF_UNSUPPORTED if not.
 */
int kvof_register(kvof_client *c, const struct kvof_region *r);

/* Ends a registration, by the region's address. No op in flight may use it. */
int kvof_unregister(kvof_client *c, void *addr);

/* ---- Queues ---- */

/* Makes a completion queue for at most depth batches in flight: 1 to 65536, a power of two, or 0 for 1024. */
int kvof_queue_open(kvof_client *c, uint32_t depth, kvof_queue **out);

/* Waits until the queue's batches have ended, then frees it; completions that were not polled are lost. NULL is allowed. */
void kvof_queue_close(kvof_queue *q);

/*
 * The queue's eventfd: readable when completions may have arrived since kvof_poll last emptied the ring. Wait for it with poll,
 * epoll or an event loop; then read its 8 bytes, if at all, before kvof_poll, and poll until nothing is left. It is non-blocking
 * and belongs to the queue.
 */
int kvof_queue_fd(const kvof_queue *q);

enum kvof_kind {
	KVOF_GET = 1,    /* loads the value into data; result is its size in bytes */
	KVOF_PUT = 2,    /* stores data, by default only if the key is absent */
	KVOF_EXIST = 3,  /* KVOF_OK or KVOF_MISS, from the target's index alone. Those of a batch travel together, many in one command */
	KVOF_DELETE = 4, /* KVOF_OK, or KVOF_MISS where the target tells */
	/* As KVOF_EXIST, for who wants only the length of the leading run (struct kvof_completion.run): what follows the first miss
	 * may end with KVOF_MISS without having been looked up. */
	KVOF_EXIST_PREFIX = 5
};

/* Flags of an op. */
#define KVOF_REPLACE 1u /* put: also if the key is there */

/* A piece of memory. 16 bytes. */
struct kvof_iov {
	void *base;
	uint64_t len; /* bytes */
};

/* One operation. 64 bytes. */
struct kvof_op {
	/* Set by the caller. */
	uint8_t kind;      /* enum kvof_kind */
	uint8_t flags;
	uint16_t iov_count; /* 0: data and len are one piece; else data points to that many struct kvof_iov, and len is ignored */
	uint32_t key_len;  /* bytes, 1 to KVOF_MAX_KEY */
	const void *key;
	void *data;        /* get, put; only read by put. May be NULL when len is 0 */
	uint64_t len;      /* bytes */
	/* Set by the library. */
	uint64_t result;   /* get: size of the value in bytes */
	int32_t status;    /* KVOF_PENDING from kvof_submit on; then, stored with release order, how the op ended */
	uint32_t detail;   /* the NVMe status (SCT and SC) behind it, 0 if there is none */
	uint64_t user;     /* the caller's: the library does not touch it */
	uint64_t reserved;
};

#define KVOF_MAX_IOV 1024u /* pieces of one op */

/* Ops to submit. */
struct kvof_batch {
	uint32_t size;      /* sizeof(struct kvof_batch) */
	uint32_t op_size;   /* sizeof(struct kvof_op): from one op to the next */
	struct kvof_op *ops;
	uint32_t count;     /* 1 to max_ops */
	uint32_t flags;     /* none yet: 0 */
	uint64_t user_data; /* comes back in the completion */
};

/* What became of a batch. 40 bytes. */
struct kvof_completion {
	uint64_t user_data;
	uint64_t bytes;  /* got and put */
	uint32_t count;  /* ops */
	uint32_t ok;     /* of them that succeeded: KVOF_OK or KVOF_EXISTS */
	uint32_t run;    /* the number of ops before the first that did not succeed */
	int32_t status;  /* of that op; KVOF_OK when all succeeded */
	uint64_t reserved;
};

/*
 * Starts a batch. Every status but KVOF_OK means that nothing was taken and no completion will come: KVOF_AGAIN when as many
 * batches as the queue's depth are in flight or in its ring, or max_ops is reached. An op that is malformed by itself ends with KVOF_INVALID
 * without harm to the rest.
 */
int kvof_submit(kvof_queue *q, const struct kvof_batch *b);

/* Takes up to max completions off the ring and returns how many, 0 if there is none. Reads memory only. */
uint32_t kvof_poll(kvof_queue *q, struct kvof_completion *out, uint32_t max);

/* Like kvof_poll, but waits up to timeout_ms for the first; -1 waits forever. It takes the eventfd's reading upon itself. */
uint32_t kvof_wait(kvof_queue *q, struct kvof_completion *out, uint32_t max, int timeout_ms);

/* ---- Watching ---- */

/* What happened since kvof_open. Ops are counted once, by how they ended. */
struct kvof_counters {
	uint32_t size;            /* sizeof(struct kvof_counters) */
	uint32_t targets;         /* now: known */
	uint32_t targets_up;      /* now: with a path that works */
	uint32_t paths;           /* now */
	uint32_t paths_up;        /* now */
	uint32_t in_flight;       /* now: ops */
	uint64_t get_hits;
	uint64_t get_misses;
	uint64_t get_bytes;
	uint64_t puts;            /* that stored */
	uint64_t put_exists;
	uint64_t put_bytes;
	uint64_t exist_hits;
	uint64_t exist_misses;
	uint64_t deletes;
	uint64_t mismatches;      /* misses because a value was not the key's, or damaged. Among get_misses */
	uint64_t truncated;
	uint64_t unavailable;
	uint64_t timeouts;
	uint64_t full;
	uint64_t errors;          /* all other endings but success and KVOF_CANCELLED */
	uint64_t cancelled;
	uint64_t connects;        /* paths that came up, again or for the first time */
	uint64_t disconnects;     /* paths that were up and went down */
	uint64_t connect_failures;
	uint64_t retries;         /* ops that another path took over */
};

int kvof_counters(kvof_client *c, struct kvof_counters *out);

/*
 * Targets and paths as JSON, for people and logs: names, addresses, state, the last error of each. Writes at most len bytes, always
 * with a final NUL if len > 0, and returns the length of the whole text without it.
 */
size_t kvof_describe(kvof_client *c, char *buf, size_t len);

#ifdef __cplusplus
}
#endif

#endif
