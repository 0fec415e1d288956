/*
 * Measures libkvof as kvof bench measures kvof's host, and prints the same JSON. Usage:
 *
 *     bench TARGETS store|retrieve|exist-prefix SIZE DEPTH SECONDS [hash]
 *
 * store and retrieve keep DEPTH batches of one op in flight, over 64 keys of 16 bytes, or as many as 256 MiB hold; with hash all keys are hashed. exist-prefix asks for
 * SIZE keys in a batch. One thread submits, and sleeps on the eventfd.
 */
#include <kvof.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>

enum { MAX_DEPTH = 256 };

static double now(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec * 1e-9;
}

static int fail(const char *what) {
	fprintf(stderr, "%s: %s\n", what, kvof_last_error());
	return 1;
}

static int by_value(const void *a, const void *b) { return (*(double *)a > *(double *)b) - (*(double *)a < *(double *)b); }

static uint64_t seed = 1;
static unsigned pick(unsigned n) {
	seed = seed * 6364136223846793005u + 1442695040888963407u;
	return (seed >> 33) % n;
}

int main(int argc, char **argv) {
	if (argc < 6)
		return fputs("usage: bench TARGETS store|retrieve|exist-prefix SIZE DEPTH SECONDS [hash]\n", stderr), 2;
	const char *what = argv[2];
	size_t size = strtoull(argv[3], NULL, 10);
	unsigned depth = atoi(argv[4]), batch = 1;
	double seconds = atof(argv[5]);
	int hash = argc > 6, kind = *what == 's' ? KVOF_PUT : *what == 'r' ? KVOF_GET : KVOF_EXIST_PREFIX;
	if (kind == KVOF_EXIST_PREFIX)
		batch = size, size = 8;
	unsigned keys = batch > 1 ? batch : size > 4 << 20 ? (256 << 20) / size : 64;
	if (depth < 1 || depth > MAX_DEPTH)
		return 2;
	struct kvof_options o = {.size = sizeof o, .targets = argv[1], .flags = hash ? KVOF_HASH_ALL : 0, .timeout_ms = 30000, .lookup_timeout_ms = 30000};
	kvof_client *c;
	kvof_queue *q;
	if (kvof_open(&o, &c) || kvof_queue_open(c, 0, &q))
		return fail("open");
	char *memory = mmap(NULL, depth * size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (size_t i = 0; i < depth * size; i++)
		memory[i] = pick(256);
	char(*names)[20] = calloc(keys, sizeof *names);
	struct kvof_op *ops = calloc((size_t)depth * batch, sizeof *ops), store = {.kind = KVOF_PUT, .flags = KVOF_REPLACE, .key_len = 16, .data = memory, .len = size};
	struct kvof_batch b = {.size = sizeof b, .op_size = sizeof *ops, .ops = &store, .count = 1};
	struct kvof_completion done[MAX_DEPTH];
	for (unsigned i = 0; i < keys; i++) {
		snprintf(names[i], sizeof names[i], "bench-%010u", i);
		store.key = names[i];
		if (kvof_submit(q, &b) || kvof_wait(q, done, 1, -1) != 1 || !done[0].ok)
			return fail("store the keys");
	}
	size_t room = 10000000, n = 0;
	double *took = malloc(room * sizeof *took), begun[MAX_DEPTH], start = now(), cpu, end = start;
	struct rusage before, after;
	getrusage(RUSAGE_SELF, &before);
	unsigned flying = 0, next = 0, idle[MAX_DEPTH], free_count = depth;
	for (unsigned i = 0; i < depth; i++)
		idle[i] = i;
	for (int stop = 0; !stop || flying > 0;) {
		while (!stop && free_count > 0) {
			unsigned slot = idle[--free_count];
			for (unsigned i = 0; i < batch; i++) {
				unsigned k = kind == KVOF_PUT ? next++ % keys : kind == KVOF_GET ? pick(keys) : i;
				ops[slot * batch + i] = (struct kvof_op){.kind = kind, .flags = kind == KVOF_PUT ? KVOF_REPLACE : 0, .key = names[k], .key_len = 16, .data = memory + slot * size, .len = size};
			}
			b = (struct kvof_batch){.size = sizeof b, .op_size = sizeof *ops, .ops = &ops[slot * batch], .count = batch, .user_data = slot};
			begun[slot] = now();
			if (kvof_submit(q, &b))
				return fail("submit");
			flying++;
		}
		unsigned got = kvof_wait(q, done, MAX_DEPTH, -1);
		end = now();
		for (unsigned i = 0; i < got; i++) {
			if (done[i].status != KVOF_OK || done[i].run != batch)
				return fail(kvof_strerror(done[i].status));
			if (n < room)
				took[n++] = (end - begun[done[i].user_data]) * 1e6;
			idle[free_count++] = done[i].user_data;
			flying--;
		}
		stop = end - start >= seconds;
	}
	getrusage(RUSAGE_SELF, &after);
	cpu = (after.ru_utime.tv_sec - before.ru_utime.tv_sec) + (after.ru_stime.tv_sec - before.ru_stime.tv_sec) +
	      (after.ru_utime.tv_usec - before.ru_utime.tv_usec + after.ru_stime.tv_usec - before.ru_stime.tv_usec) * 1e-6;
	double elapsed = end - start, sum = 0;
	qsort(took, n, sizeof *took, by_value);
	for (size_t i = 0; i < n; i++)
		sum += took[i];
	printf("{\"total\":{\"mb_per_s\":%.3f,\"iops\":%.1f,\"avg_us\":%.2f,\"p50_us\":%.2f,\"p99_us\":%.2f,\"p99_9_us\":%.2f},\"cpu_s\":%.3f}\n", n * (double)size * batch / elapsed / 1e6,
	       n / elapsed, sum / n, took[n / 2], took[n * 99 / 100], took[n * 999 / 1000], cpu);
	kvof_close(c);
	return 0;
}
