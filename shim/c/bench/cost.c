/*
 * What libkvof.so costs the process that loads it: cost LIBRARY TARGETS. Figures of /proc/self/status and the time of calls.
 */
#include <dlfcn.h>
#include <kvof.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

static void status(const char *when) {
	FILE *f = fopen("/proc/self/status", "r");
	char line[256];
	printf("%-28s", when);
	while (fgets(line, sizeof line, f)) {
		char *v = strchr(line, ':');
		if (!v)
			continue; // the rest of a long line
		v[strcspn(v, "\n")] = 0;
		v += strspn(v, ": \t");
		if (!strncmp(line, "VmSize", 6) || !strncmp(line, "VmRSS", 5) || !strncmp(line, "RssAnon", 7) || !strncmp(line, "Threads", 7) || !strncmp(line, "SigCgt", 6))
			printf(" %.*s=%s", (int)(strchr(line, ':') - line), line, v);
	}
	printf("\n");
	fclose(f);
}

static int by_value(const void *a, const void *b) { return (*(double *)a > *(double *)b) - (*(double *)a < *(double *)b); }

#define TIMED(n, name, call) \
	do { \
		double start = now(); \
		for (int i = 0; i < (n); i++) \
			call; \
		printf("%-28s %.0f ns\n", name, (now() - start) / (n)); \
	} while (0)

#define SYMBOL(f) __typeof__(f) *f##_ = (__typeof__(f) *)dlsym(lib, #f)

int main(int argc, char **argv) {
	if (argc != 3)
		return 2;
	status("before");
	double start = now();
	void *lib = dlopen(argv[1], RTLD_NOW);
	printf("%-28s %.2f ms\n", "dlopen", (now() - start) / 1e6);
	if (!lib)
		return fprintf(stderr, "%s\n", dlerror()), 1;
	status("loaded");
	SYMBOL(kvof_open);
	SYMBOL(kvof_close);
	SYMBOL(kvof_queue_open);
	SYMBOL(kvof_submit);
	SYMBOL(kvof_poll);
	SYMBOL(kvof_wait);
	SYMBOL(kvof_key);
	SYMBOL(kvof_abi);
	SYMBOL(kvof_counters);
	struct kvof_options o = {.size = sizeof o, .targets = argv[2]};
	kvof_client *c;
	kvof_queue *q;
	if (kvof_open_(&o, &c) || kvof_queue_open_(c, 0, &q))
		return 1;
	status("connected, one path");
	struct kvof_nvme_key key;
	struct kvof_counters n = {.size = sizeof n};
	struct kvof_completion done;
	enum { COUNT = 1000 };
	static struct kvof_op ops[COUNT];
	static char names[COUNT][32];
	for (int i = 0; i < COUNT; i++) {
		int len = snprintf(names[i], sizeof *names, "a key that is hashed %d", i);
		ops[i] = (struct kvof_op){.kind = KVOF_EXIST, .key = names[i], .key_len = len};
	}
	struct kvof_op bad = {0};
	struct kvof_batch b = {.size = sizeof b, .op_size = sizeof bad, .ops = &bad, .count = 1};
	TIMED(1000000, "kvof_abi (no Go)", kvof_abi_());
	TIMED(1000000, "kvof_poll, empty (no Go)", kvof_poll_(q, &done, 1));
	TIMED(300000, "kvof_counters", kvof_counters_(c, &n));
	TIMED(300000, "kvof_key, hashed", kvof_key_(NULL, 0, names[0], 24, &key));
	TIMED(20000, "an op that is malformed", (kvof_submit_(q, &b), kvof_wait_(q, &done, 1, -1)));
	b.ops = ops;
	for (b.count = 1; b.count <= COUNT; b.count = b.count == 1 ? 100 : b.count * 10) {
		enum { ROUNDS = 3000 };
		static double call[ROUNDS], whole[ROUNDS];
		for (int i = 0; i < ROUNDS; i++) {
			start = now();
			kvof_submit_(q, &b);
			call[i] = now() - start;
			kvof_wait_(q, &done, 1, -1);
			whole[i] = now() - start;
		}
		qsort(call, ROUNDS, sizeof *call, by_value);
		qsort(whole, ROUNDS, sizeof *whole, by_value);
		printf("kvof_submit, %4u exist        p50 %.1f p99 %.1f us; until its end p50 %.1f p99 %.1f us\n", b.count, call[ROUNDS / 2] / 1e3, call[ROUNDS * 99 / 100] / 1e3,
		       whole[ROUNDS / 2] / 1e3, whole[ROUNDS * 99 / 100] / 1e3);
	}
	status("after much work");
	sleep(2);
	clock_t cpu = clock();
	sleep(5);
	printf("%-28s %.2f ms of CPU a second\n", "idle", (clock() - cpu) * 1000.0 / CLOCKS_PER_SEC / 5);
	kvof_close_(c);
	status("closed");
	return 0;
}
