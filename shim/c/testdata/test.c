// The test suite of the C interface. Its arguments are a target, the file of key vectors, the same target by way of a relay, and it
// with a second one, which takes three keys. It asks who started it to stop, start and freeze them with lines on its output that
// begin with an exclamation mark.

#include <kvof.h>

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(cond, ...) \
	do { \
		if (!(cond)) { \
			fprintf(stderr, "%s:%d: %s:", __func__, __LINE__, #cond); \
			fprintf(stderr, " " __VA_ARGS__); \
			fprintf(stderr, " (last error: %s)\n", kvof_last_error()); \
			exit(1); \
		} \
	} while (0)

#define LEN(a) (sizeof(a) / sizeof *(a))

enum { PATIENCE = 60000 }; // ms

static const char *targets, *relayed, *both; // the target; the same by way of a relay; it and another one

// The layout, as programs that are compiled already have it.
_Static_assert(KVOF_ABI == 1, "");
_Static_assert(sizeof(struct kvof_scope) == 40, "");
_Static_assert(sizeof(struct kvof_nvme_key) == 56 && offsetof(struct kvof_nvme_key, digest) == 24, "");
_Static_assert(sizeof(struct kvof_options) == 112, "");
_Static_assert(offsetof(struct kvof_options, scope) == 24 && offsetof(struct kvof_options, timeout_ms) == 64 && offsetof(struct kvof_options, max_ops) == 92, "");
_Static_assert(sizeof(struct kvof_region) == 40 && offsetof(struct kvof_region, dmabuf_offset) == 32, "");
_Static_assert(sizeof(struct kvof_iov) == 16, "");
_Static_assert(sizeof(struct kvof_op) == 64, "");
_Static_assert(offsetof(struct kvof_op, iov_count) == 2 && offsetof(struct kvof_op, key_len) == 4 && offsetof(struct kvof_op, key) == 8, "");
_Static_assert(offsetof(struct kvof_op, data) == 16 && offsetof(struct kvof_op, len) == 24 && offsetof(struct kvof_op, result) == 32, "");
_Static_assert(offsetof(struct kvof_op, status) == 40 && offsetof(struct kvof_op, detail) == 44 && offsetof(struct kvof_op, user) == 48, "");
_Static_assert(sizeof(struct kvof_batch) == 32 && offsetof(struct kvof_batch, ops) == 8 && offsetof(struct kvof_batch, user_data) == 24, "");
_Static_assert(sizeof(struct kvof_completion) == 40 && offsetof(struct kvof_completion, count) == 16 && offsetof(struct kvof_completion, status) == 28, "");
_Static_assert(sizeof(struct kvof_counters) == 184 && offsetof(struct kvof_counters, get_hits) == 24 && offsetof(struct kvof_counters, retries) == 176, "");

static kvof_client *open_at(const char *where, uint32_t timeout, uint32_t flags, const char *salt, uint32_t max_ops) {
	struct kvof_options o = {.size = sizeof o, .flags = flags, .targets = where, .scope.salt = salt, .max_ops = max_ops,
		.timeout_ms = timeout, .lookup_timeout_ms = timeout, .connect_timeout_ms = PATIENCE, .reconnect_ms = 20};
	kvof_client *c;
	int s = kvof_open(&o, &c);
	CHECK(s == KVOF_OK, "%s", kvof_strerror(s));
	return c;
}

static kvof_client *open_client(uint32_t flags, const char *salt, uint32_t max_ops) { return open_at(targets, PATIENCE, flags, salt, max_ops); }

static kvof_queue *open_queue(kvof_client *c, uint32_t depth) {
	kvof_queue *q;
	CHECK(kvof_queue_open(c, depth, &q) == KVOF_OK);
	return q;
}

static int submit(kvof_queue *q, struct kvof_op *ops, uint32_t n, uint64_t user) {
	struct kvof_batch b = {.size = sizeof b, .op_size = sizeof *ops, .ops = ops, .count = n, .user_data = user};
	return kvof_submit(q, &b);
}

// run carries out ops and waits for their completion.
static struct kvof_completion run(kvof_queue *q, struct kvof_op *ops, uint32_t n) {
	struct kvof_completion done;
	static uint64_t user;
	CHECK(submit(q, ops, n, ++user) == KVOF_OK);
	CHECK(kvof_wait(q, &done, 1, PATIENCE) == 1);
	CHECK(done.user_data == user && done.count == n);
	for (uint32_t i = 0; i < n; i++)
		CHECK(ops[i].status != KVOF_PENDING);
	return done;
}

static struct kvof_op op(int kind, const char *key, void *data, size_t len) {
	return (struct kvof_op){.kind = kind, .key = key, .key_len = strlen(key), .data = data, .len = len};
}

static int one(kvof_queue *q, struct kvof_op o, uint64_t result) {
	run(q, &o, 1);
	CHECK(o.result == result, "%lu, want %lu", o.result, result);
	return o.status;
}

static unsigned char *pattern(size_t n, unsigned seed) {
	unsigned char *b = malloc(n + 1);
	CHECK(b);
	for (size_t i = 0; i < n; i++)
		b[i] = seed = seed * 1103515245 + 12345 + (unsigned)(i >> 8);
	return b;
}

#define SHORT "0123456789abcdef"
#define LONG "meta-llama/Llama-3.1-8B@0@1@a3f5c2"

static void test_operations(void) {
	kvof_client *c = open_client(0, "operations", 0);
	kvof_queue *q = open_queue(c, 1);
	const char *names[] = {SHORT, LONG};
	enum { N = 5 << 20 };
	unsigned char *v = pattern(N, 1), *got = malloc(N + 100);
	for (int i = 0; i < 2; i++) {
		const char *key = names[i];
		CHECK(one(q, op(KVOF_EXIST, key, NULL, 0), 0) == KVOF_MISS);
		CHECK(one(q, op(KVOF_GET, key, got, N), 0) == KVOF_MISS);
		CHECK(one(q, op(KVOF_PUT, key, v, N), 0) == KVOF_OK);
		CHECK(one(q, op(KVOF_PUT, key, v, N), 0) == KVOF_EXISTS);
		CHECK(one(q, op(KVOF_EXIST, key, NULL, 0), 0) == KVOF_OK);
		CHECK(one(q, op(KVOF_GET, key, got, N), N) == KVOF_OK && memcmp(got, v, N) == 0);
		memset(got, 0, N);
		CHECK(one(q, op(KVOF_GET, key, got, N + 100), N) == KVOF_OK && memcmp(got, v, N) == 0);
		CHECK(one(q, op(KVOF_GET, key, got, 1000), N) == KVOF_TRUNCATED);
		CHECK(one(q, op(KVOF_GET, key, NULL, 0), N) == KVOF_TRUNCATED);
		memset(got, 0, N);
		struct kvof_iov iov[] = {{got, 1}, {NULL, 0}, {got + 1, 4096}, {got + 4097, N - 4097}};
		struct kvof_op o = op(KVOF_GET, key, iov, 0);
		o.iov_count = LEN(iov);
		CHECK(one(q, o, N) == KVOF_OK && memcmp(got, v, N) == 0);
		o = op(KVOF_PUT, key, iov, 0);
		o.iov_count = LEN(iov);
		o.flags = KVOF_REPLACE;
		CHECK(one(q, o, 0) == KVOF_OK);
		CHECK(one(q, op(KVOF_DELETE, key, NULL, 0), 0) == KVOF_OK);
		CHECK(one(q, op(KVOF_GET, key, got, N), 0) == KVOF_MISS);
	}
	struct kvof_counters n = {.size = sizeof n};
	CHECK(kvof_counters(c, &n) == KVOF_OK);
	CHECK(n.targets == 1 && n.targets_up == 1 && n.paths == 1 && n.paths_up == 1 && n.in_flight == 0 && n.connects == 1);
	CHECK(n.get_hits == 6 && n.get_misses == 4 && n.get_bytes == 6ull * N && n.puts == 4 && n.put_exists == 2 && n.put_bytes == 4ull * N);
	CHECK(n.exist_hits == 2 && n.exist_misses == 2 && n.deletes == 2 && n.truncated == 4 && n.errors == 0 && n.timeouts == 0);
	struct {
		struct kvof_counters n;
		uint64_t after;
	} part = {.n.size = offsetof(struct kvof_counters, get_misses), .n.get_misses = 77, .after = 88};
	CHECK(kvof_counters(c, &part.n) == KVOF_OK && part.n.get_hits == 6 && part.n.get_misses == 77 && part.after == 88);
	char text[4096], cut[10];
	size_t len = kvof_describe(c, text, sizeof text);
	CHECK(len > 20 && len == strlen(text) && strstr(text, "\"up\":true") && text[0] == '{', "%s", text);
	CHECK(kvof_describe(c, cut, sizeof cut) == len && strlen(cut) == 9 && memcmp(cut, text, 9) == 0 && kvof_describe(c, NULL, 0) == len);
	kvof_close(c);
	free(v);
	free(got);
}

static void test_batch(void) {
	kvof_client *c = open_client(KVOF_HASH_ALL, "batch", 0);
	kvof_queue *q = open_queue(c, 0);
	enum { N = 1000 };
	static struct kvof_op ops[N + 1];
	static char keys[N][40];
	for (int i = 0; i < N; i++) {
		snprintf(keys[i], sizeof keys[i], "block %d", i);
		ops[i] = op(KVOF_PUT, keys[i], keys[i], strlen(keys[i]));
	}
	struct kvof_completion d = run(q, ops, N);
	CHECK(d.ok == N && d.run == N && d.status == KVOF_OK && d.bytes > 7 * N);
	CHECK(one(q, op(KVOF_DELETE, keys[700], NULL, 0), 0) == KVOF_OK);
	for (int kind = KVOF_EXIST;; kind = KVOF_EXIST_PREFIX) {
		for (int i = 0; i < N; i++)
			ops[i] = op(kind, keys[i], NULL, 0);
		d = run(q, ops, N);
		CHECK(d.run == 700 && d.status == KVOF_MISS && d.count == N && ops[699].status == KVOF_OK && ops[700].status == KVOF_MISS);
		if (kind == KVOF_EXIST_PREFIX)
			break;
		CHECK(d.ok == N - 1 && ops[701].status == KVOF_OK);
	}
	// One that is malformed does no harm to the others.
	char buf[100];
	struct kvof_iov bad = {NULL, 5};
	ops[0] = op(KVOF_GET, keys[1], buf, sizeof buf);
	ops[1] = op(0, keys[1], buf, 1);
	ops[2] = op(6, keys[1], buf, 1);
	ops[3] = op(KVOF_GET, "", buf, 1);
	ops[4] = (struct kvof_op){.kind = KVOF_GET, .data = buf, .len = 1, .key_len = 3};
	ops[5] = op(KVOF_GET, keys[1], NULL, 1);
	ops[6] = op(KVOF_GET, keys[1], &bad, 0);
	ops[6].iov_count = 1;
	ops[7] = op(KVOF_GET, keys[1], NULL, 0);
	ops[7].iov_count = 1;
	ops[8] = op(KVOF_PUT, keys[1], buf, (size_t)1 << 40);
	ops[9] = op(KVOF_GET, keys[1], buf, 1);
	ops[9].flags = 2;
	ops[10] = op(KVOF_GET, keys[1], buf, 1);
	ops[10].flags = KVOF_REPLACE;
	ops[11] = op(KVOF_GET, keys[1], buf, 1);
	ops[11].key_len = 65536;
	ops[12] = op(KVOF_GET, keys[1], buf, 1);
	ops[12].iov_count = KVOF_MAX_IOV + 1;
	ops[13] = op(KVOF_EXIST, keys[2], NULL, 0);
	d = run(q, ops, 14);
	CHECK(d.ok == 2 && d.run == 1 && d.status == KVOF_INVALID && ops[0].status == KVOF_OK && ops[13].status == KVOF_OK);
	for (int i = 1; i < 13; i++)
		CHECK(ops[i].status == KVOF_INVALID, "op %d: %d", i, ops[i].status);
	// Batches that are malformed are not taken.
	struct kvof_batch b = {.size = sizeof b, .op_size = sizeof *ops, .ops = ops, .count = 1}, x;
	CHECK(kvof_submit(NULL, &b) == KVOF_INVALID && kvof_submit(q, NULL) == KVOF_INVALID);
	x = b, x.count = 0;
	CHECK(kvof_submit(q, &x) == KVOF_INVALID);
	x = b, x.count = 65537;
	CHECK(kvof_submit(q, &x) == KVOF_INVALID);
	x = b, x.ops = NULL;
	CHECK(kvof_submit(q, &x) == KVOF_INVALID);
	x = b, x.op_size = 56;
	CHECK(kvof_submit(q, &x) == KVOF_INVALID);
	x = b, x.flags = 1;
	CHECK(kvof_submit(q, &x) == KVOF_INVALID);
	x = b, x.size = 8;
	CHECK(kvof_submit(q, &x) == KVOF_INVALID);
	// Of an ABI to come: longer ops.
	struct {
		struct kvof_op op;
		char more[24];
	} wide[3];
	for (int i = 0; i < 3; i++)
		wide[i].op = op(KVOF_EXIST, keys[699 + i], NULL, 0);
	x = b, x.ops = &wide[0].op, x.op_size = sizeof *wide, x.count = 3;
	CHECK(kvof_submit(q, &x) == KVOF_OK && kvof_wait(q, &d, 1, PATIENCE) == 1);
	CHECK(d.ok == 2 && wide[0].op.status == KVOF_OK && wide[1].op.status == KVOF_MISS && wide[2].op.status == KVOF_OK);
	struct kvof_completion none;
	CHECK(kvof_poll(q, &none, 1) == 0 && kvof_wait(q, &none, 1, 20) == 0 && kvof_wait(q, &none, 0, PATIENCE) == 0);
	kvof_queue_close(q);
	kvof_close(c);
}

// Rings and limits are bounded, and say so.
static void test_bounds(void) {
	kvof_client *c = open_client(0, "bounds", 100);
	kvof_queue *q = open_queue(c, 4), *other = open_queue(c, 1);
	struct kvof_op ops[200], many[100];
	for (size_t i = 0; i < LEN(ops); i++)
		ops[i] = op(KVOF_EXIST, "k", NULL, 0);
	struct kvof_completion d[8];
	for (int round = 0; round < 3; round++) {
		for (int i = 0; i < 4; i++)
			CHECK(submit(q, &ops[i], 1, i) == KVOF_OK);
		CHECK(submit(q, &ops[4], 1, 4) == KVOF_AGAIN); // in flight or in the ring: as many as its depth
		struct pollfd p = {.fd = kvof_queue_fd(q), .events = POLLIN};
		uint64_t seen = 0;
		for (uint32_t n = 0; n < 4;) {
			CHECK(poll(&p, 1, PATIENCE) == 1);
			uint64_t v;
			CHECK(read(p.fd, &v, 8) == 8);
			for (uint32_t m; (m = kvof_poll(q, d, LEN(d))) > 0; n += m)
				for (uint32_t i = 0; i < m; i++)
					seen |= 1 << d[i].user_data;
		}
		CHECK(seen == 0xf);
	}
	for (size_t i = 0; i < LEN(many); i++)
		many[i] = op(KVOF_EXIST, "k", NULL, 0);
	CHECK(submit(other, ops, 101, 0) == KVOF_INVALID);
	CHECK(submit(other, many, 100, 0) == KVOF_OK);
	int s;
	while ((s = submit(q, ops, 100, 0)) == KVOF_AGAIN) // until the others have ended
		usleep(100);
	CHECK(s == KVOF_OK && kvof_wait(q, d, 1, PATIENCE) == 1 && kvof_wait(other, d, 1, PATIENCE) == 1);
	kvof_close(c); // with its queues
	c = open_client(0, "bounds", 0);
	q = open_queue(c, 2);
	CHECK(kvof_queue_open(c, 3, &other) == KVOF_INVALID && other == NULL && kvof_queue_open(c, 131072, &other) == KVOF_INVALID);
	CHECK(kvof_queue_open(NULL, 0, &other) == KVOF_INVALID && kvof_queue_open(c, 0, NULL) == KVOF_INVALID);
	CHECK(submit(q, ops, 1, 0) == KVOF_OK);
	kvof_queue_close(q); // waits for its batch
	CHECK(ops[0].status == KVOF_MISS);
	kvof_close(c);
	kvof_close(NULL);
	kvof_queue_close(NULL);
}

static void test_arguments(void) {
	kvof_client *c = (void *)1;
	struct kvof_options o = {.size = sizeof o, .targets = targets};
	CHECK(kvof_open(NULL, &c) == KVOF_INVALID && kvof_open(&o, NULL) == KVOF_INVALID);
	o.size = 8;
	CHECK(kvof_open(&o, &c) == KVOF_INVALID && c == NULL);
	o.size = sizeof o;
	o.flags = 1u << 31;
	CHECK(kvof_open(&o, &c) == KVOF_INVALID && strstr(kvof_last_error(), "flag"));
	o.flags = 0;
	const char *bad[] = {NULL, "", "nonsense", "tcp://127.0.0.1", "tcp://127.0.0.1/nqn.2026-11.dev.kvof:a,tcp://127.0.0.2/nqn.2026-11.dev.kvof:a"};
	for (size_t i = 0; i < LEN(bad); i++) {
		o.targets = bad[i];
		CHECK(kvof_open(&o, &c) == KVOF_INVALID && c == NULL && kvof_last_error()[0]);
	}
	o.targets = "tcp://127.0.0.1:1/nqn.2026-11.dev.kvof:a";
	o.connect_timeout_ms = 100;
	CHECK(kvof_open(&o, &c) == KVOF_UNAVAILABLE && c == NULL && strstr(kvof_last_error(), "127.0.0.1:1"));
	o.flags = KVOF_NOWAIT;
	CHECK(kvof_open(&o, &c) == KVOF_OK);
	kvof_queue *q = open_queue(c, 0);
	char b;
	CHECK(one(q, op(KVOF_GET, "k", &b, 1), 0) == KVOF_UNAVAILABLE);
	static char mem[8192];
	struct kvof_region r = {.size = sizeof r, .addr = mem, .len = sizeof mem};
	CHECK(kvof_register(c, &r) == KVOF_OK && kvof_register(c, &r) == KVOF_OK);
	r.addr = mem + 1;
	CHECK(kvof_register(c, &r) == KVOF_INVALID && kvof_unregister(c, mem + 1) == KVOF_INVALID && kvof_unregister(c, mem) == KVOF_OK);
	r.dmabuf = 1;
	CHECK(kvof_register(c, &r) == KVOF_UNSUPPORTED);
	r.dmabuf_fd = -1;
	CHECK(kvof_register(c, &r) == KVOF_UNSUPPORTED);
	r.dmabuf_fd = 1 << 20;
	CHECK(kvof_register(c, &r) == KVOF_INVALID);
	kvof_close(c);
	// An older program's options, which end before the time-outs.
	o.size = offsetof(struct kvof_options, timeout_ms);
	o.timeout_ms = 0xffffffff;
	CHECK(kvof_open(&o, &c) == KVOF_OK);
	kvof_close(c);
	CHECK(kvof_abi() == KVOF_ABI && kvof_version()[0]);
	for (int i = -1; i < 300; i++)
		CHECK(kvof_strerror(i)[0]);
	CHECK(strcmp(kvof_strerror(KVOF_MISS), "no such key") == 0 && strcmp(kvof_strerror(KVOF_PENDING), "pending") == 0);
}

static int unhex(const char *s, unsigned char *out) { // "-" is nothing
	int n = 0;
	for (unsigned v; *s != '-' && sscanf(s + 2 * n, "%2x", &v) == 1; n++)
		out[n] = v;
	out[n] = 0;
	return n;
}

// Lines of: tenant model rank group salt hash_all key nvme_key hashed digest, in hexadecimal.
static void test_keys(const char *path) {
	FILE *f = fopen(path, "r");
	CHECK(f);
	static char w[10][4096];
	static unsigned char field[5][2048], key[2048], nvme[20], digest[40];
	int lines = 0;
	while (fscanf(f, "%4095s %4095s %4095s %4095s %4095s %4095s %4095s %4095s %4095s %4095s", w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9]) == 10) {
		for (int i = 0; i < 5; i++)
			unhex(w[i], field[i]);
		struct kvof_scope s = {(char *)field[0], (char *)field[1], (char *)field[2], (char *)field[3], (char *)field[4]};
		int key_len = unhex(w[6], key), nvme_len = unhex(w[7], nvme), hashed = atoi(w[8]);
		memset(digest, 0, sizeof digest);
		unhex(w[9], digest);
		struct kvof_nvme_key k;
		CHECK(kvof_key(&s, atoi(w[5]) ? KVOF_HASH_ALL : 0, key, key_len, &k) == KVOF_OK);
		CHECK(k.len == nvme_len && memcmp(k.bytes, nvme, nvme_len) == 0 && k.hashed == hashed && memcmp(k.digest, digest, 32) == 0, "vector %d", lines);
		lines++;
	}
	fclose(f);
	CHECK(lines > 50);
	struct kvof_nvme_key k;
	CHECK(kvof_key(NULL, 0, "k", 1, &k) == KVOF_OK && k.len == 1 && k.bytes[0] == 'k');
	CHECK(kvof_key(NULL, 0, "k", 0, &k) == KVOF_INVALID && kvof_key(NULL, 0, NULL, 1, &k) == KVOF_INVALID && kvof_key(NULL, 1, "k", 1, &k) == KVOF_INVALID);
}

struct worker {
	kvof_queue *q;
	int id;
	_Atomic int *left;
};

// work stores and loads values of its own, and takes whoever's completions come.
static void *work(void *arg) {
	struct worker *w = arg;
	enum { ROUNDS = 40, N = 8, SIZE = 70000 };
	unsigned char *v = pattern(SIZE, w->id), *got = calloc(N, SIZE);
	char keys[N][64];
	for (int round = 0; round < ROUNDS; round++) {
		struct kvof_op ops[N];
		for (int get = 0; get < 2; get++) {
			for (int i = 0; i < N; i++) {
				snprintf(keys[i], sizeof keys[i], "thread %d, round %d, value %d of a long name", w->id, round % 3, i);
				ops[i] = op(get ? KVOF_GET : KVOF_PUT, keys[i], get ? got + i * SIZE : v, SIZE - i);
				ops[i].flags = get ? 0 : KVOF_REPLACE;
			}
			int s;
			while ((s = submit(w->q, ops, N, 0)) == KVOF_AGAIN)
				usleep(100);
			CHECK(s == KVOF_OK);
			for (int i = 0; i < N; i++) { // one's own ops, whoever takes the completion
				while (__atomic_load_n(&ops[i].status, __ATOMIC_ACQUIRE) == KVOF_PENDING) {
					struct kvof_completion d;
					kvof_wait(w->q, &d, 1, 1);
				}
				CHECK(ops[i].status == KVOF_OK);
				CHECK(!get || (ops[i].result == (uint64_t)SIZE - i && memcmp(got + i * SIZE, v, SIZE - i) == 0));
			}
		}
	}
	free(v);
	free(got);
	return NULL;
}

static void test_threads(void) {
	kvof_client *c = open_client(0, "threads", 0);
	kvof_queue *q = open_queue(c, 8);
	pthread_t t[8];
	struct worker w[8];
	for (int i = 0; i < 8; i++) {
		w[i] = (struct worker){.q = q, .id = i};
		CHECK(pthread_create(&t[i], NULL, work, &w[i]) == 0);
	}
	for (int i = 0; i < 8; i++)
		pthread_join(t[i], NULL);
	struct kvof_counters n = {.size = sizeof n};
	CHECK(kvof_counters(c, &n) == KVOF_OK && n.puts == 8 * 40 * 8 && n.get_hits == 8 * 40 * 8 && n.mismatches == 0 && n.in_flight == 0);
	kvof_close(c);
}

static void ask(const char *what) {
	printf("!%s\n", what);
	fflush(stdout);
	char line[16];
	CHECK(fgets(line, sizeof line, stdin), "no answer");
}

// A target that stops makes misses, and works again when it is back.
static void test_restart(void) {
	kvof_client *c = open_client(0, "restart", 0);
	kvof_queue *q = open_queue(c, 0);
	char v[1000] = "value", got[1000];
	CHECK(one(q, op(KVOF_PUT, LONG, v, sizeof v), 0) == KVOF_OK);
	ask("stop");
	CHECK(one(q, op(KVOF_GET, LONG, got, sizeof got), 0) == KVOF_UNAVAILABLE);
	CHECK(one(q, op(KVOF_EXIST, LONG, NULL, 0), 0) == KVOF_UNAVAILABLE);
	CHECK(one(q, op(KVOF_PUT, LONG, v, sizeof v), 0) == KVOF_UNAVAILABLE);
	struct kvof_counters n = {.size = sizeof n};
	for (int i = 0; n.connect_failures == 0 && i < PATIENCE / 10; i++) {
		usleep(10000);
		CHECK(kvof_counters(c, &n) == KVOF_OK);
	}
	char text[4096];
	CHECK(kvof_describe(c, text, sizeof text) < sizeof text && strstr(text, "\"error\":") && strstr(text, "\"up\":false"), "%s", text);
	ask("start");
	struct kvof_op o;
	for (int i = 0; i < PATIENCE / 10; i++) {
		o = op(KVOF_PUT, LONG, v, sizeof v);
		if (run(q, &o, 1).ok == 1)
			break;
		usleep(10000);
	}
	CHECK(o.status == KVOF_OK);
	CHECK(one(q, op(KVOF_GET, LONG, got, sizeof got), sizeof got) == KVOF_OK && memcmp(got, v, sizeof v) == 0);
	CHECK(kvof_counters(c, &n) == KVOF_OK && n.connects == 2 && n.disconnects == 1 && n.unavailable >= 3 && n.connect_failures > 0);
	kvof_close(c);
}

// A target that hangs costs what is in flight its time-out, and what follows nothing, until it answers again.
static void test_hang(void) {
	kvof_client *c = open_at(relayed, 500, 0, "hang", 0);
	kvof_queue *q = open_queue(c, 0);
	char v[1000] = "value", got[1000];
	struct kvof_op o;
	for (int i = 0; i < PATIENCE / 500; i++) { // half a second may be short for a busy machine
		o = op(KVOF_PUT, LONG, v, sizeof v);
		if (run(q, &o, 1).ok == 1)
			break;
	}
	CHECK(o.status == KVOF_OK || o.status == KVOF_EXISTS);
	ask("freeze");
	struct kvof_op many[] = {op(KVOF_GET, LONG, got, sizeof got), op(KVOF_EXIST, LONG, NULL, 0), op(KVOF_PUT, LONG "2", v, sizeof v), op(KVOF_DELETE, LONG, NULL, 0)};
	CHECK(run(q, many, LEN(many)).ok == 0);
	for (size_t i = 0; i < LEN(many); i++)
		CHECK(many[i].status == KVOF_TIMEOUT || many[i].status == KVOF_UNAVAILABLE, "%zu: %d", i, many[i].status);
	struct kvof_counters n = {.size = sizeof n};
	for (int i = 0; i < PATIENCE / 10; i++) {
		CHECK(kvof_counters(c, &n) == KVOF_OK);
		if (n.paths_up == 0)
			break;
		usleep(10000);
	}
	CHECK(n.paths_up == 0 && n.timeouts > 0 && n.timeouts + n.unavailable >= LEN(many) && n.disconnects > 0);
	CHECK(one(q, op(KVOF_GET, LONG, got, sizeof got), 0) == KVOF_UNAVAILABLE);
	ask("thaw");
	for (int i = 0; i < PATIENCE / 10; i++) {
		o = op(KVOF_PUT, LONG "3", v, sizeof v);
		if (run(q, &o, 1).ok == 1)
			break;
		usleep(10000);
	}
	CHECK(o.status == KVOF_OK || o.status == KVOF_EXISTS);
	kvof_close(c);
}

// Two targets share the keys. One that is full, or gone, fails for its own keys alone, and each op says so.
static void test_two_targets(void) {
	enum { N = 64 };
	kvof_client *c = open_at(both, PATIENCE, 0, "two", 0);
	kvof_queue *q = open_queue(c, 0);
	static char keys[N][40];
	char v[] = "value";
	struct kvof_op ops[N];
	for (int i = 0; i < N; i++) {
		snprintf(keys[i], sizeof keys[i], "a key for two targets, %d", i);
		ops[i] = op(KVOF_PUT, keys[i], v, sizeof v);
	}
	struct kvof_completion done = run(q, ops, N); // the second one takes three keys, and is full
	uint32_t full = 0;
	for (int i = 0; i < N; i++) {
		CHECK(ops[i].status == KVOF_OK || ops[i].status == KVOF_FULL, "%d: %d", i, ops[i].status);
		full += ops[i].status == KVOF_FULL;
	}
	CHECK(full > 0 && done.ok == N - full && done.status == KVOF_FULL);
	struct kvof_counters n = {.size = sizeof n};
	CHECK(kvof_counters(c, &n) == KVOF_OK && n.targets == 2 && n.targets_up == 2 && n.full == full && n.puts == N - full && n.errors == 0);
	ask("stop the second");
	uint32_t away = 0;
	for (int i = 0; i < N; i++)
		ops[i] = op(KVOF_EXIST, keys[i], NULL, 0);
	done = run(q, ops, N);
	for (int i = 0; i < N; i++) {
		CHECK(ops[i].status == KVOF_OK || ops[i].status == KVOF_UNAVAILABLE, "%d: %d", i, ops[i].status);
		away += ops[i].status == KVOF_UNAVAILABLE;
	}
	CHECK(away == full + 3 && done.ok == N - away);
	kvof_close(c);
}

// In a child of fork every function says so, at once.
static void test_fork(void) {
	kvof_client *c = open_client(0, "fork", 0), *d;
	kvof_queue *q = open_queue(c, 0), *r;
	fflush(NULL);
	pid_t pid = fork();
	CHECK(pid >= 0);
	if (pid == 0) {
		struct kvof_op o = op(KVOF_EXIST, "k", NULL, 0);
		struct kvof_completion done;
		struct kvof_counters n = {.size = sizeof n};
		struct kvof_options opt = {.size = sizeof opt, .targets = targets};
		struct kvof_region reg = {.size = sizeof reg};
		struct kvof_nvme_key k;
		char text[10];
		alarm(PATIENCE / 1000);
		int ok = submit(q, &o, 1, 0) == KVOF_FORKED && kvof_poll(q, &done, 1) == 0 && kvof_wait(q, &done, 1, -1) == 0 && kvof_counters(c, &n) == KVOF_FORKED &&
			 kvof_open(&opt, &d) == KVOF_FORKED && kvof_queue_open(c, 0, &r) == KVOF_FORKED && kvof_register(c, &reg) == KVOF_FORKED &&
			 kvof_unregister(c, text) == KVOF_FORKED && kvof_key(NULL, 0, "k", 1, &k) == KVOF_FORKED && kvof_describe(c, text, 10) == 0;
		kvof_queue_close(q);
		kvof_close(c);
		_exit(ok ? 0 : 1);
	}
	int status;
	CHECK(waitpid(pid, &status, 0) == pid && status == 0, "the child ended with %x", status);
	CHECK(one(q, op(KVOF_EXIST, "k", NULL, 0), 0) == KVOF_MISS); // the parent works on
	kvof_close(c);
}

int main(int argc, char **argv) {
	CHECK(argc == 5);
	targets = argv[1], relayed = argv[3], both = argv[4];
	test_arguments();
	test_keys(argv[2]);
	test_operations();
	test_batch();
	test_bounds();
	test_threads();
	test_hang();
	test_two_targets();
	test_restart();
	test_fork();
	return 0;
}
