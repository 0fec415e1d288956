/*
 * A small program on libkvof: stores a few blocks, asks how many of a prefix are there, and loads them, all in batches.
 *
 *     make shim
 *     cc -o example shim/c/example/example.c -Ishim/c -Lbin -lkvof -Wl,-rpath,$PWD/bin
 *     ./example tcp://127.0.0.1:4420/nqn.2026-11.dev.kvof:embedded
 */
#include <kvof.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCKS = 8, SIZE = 2 << 20 };

int main(int argc, char **argv) {
	struct kvof_options o = {.size = sizeof o, .targets = argc > 1 ? argv[1] : "discover://127.0.0.1:8009", .scope = {.model = "example"}};
	kvof_client *client;
	kvof_queue *queue;
	if (kvof_open(&o, &client) != KVOF_OK || kvof_queue_open(client, 0, &queue) != KVOF_OK) {
		fprintf(stderr, "%s\n", kvof_last_error());
		return 1;
	}
	char *memory = malloc(BLOCKS * SIZE);
	memset(memory, 'x', BLOCKS * SIZE);
	struct kvof_region region = {.size = sizeof region, .addr = memory, .len = BLOCKS * SIZE};
	kvof_register(client, &region);

	static const struct {
		int kind;
		const char *name;
	} steps[] = {{KVOF_PUT, "put"}, {KVOF_EXIST_PREFIX, "exist"}, {KVOF_GET, "get"}};
	for (size_t s = 0; s < sizeof steps / sizeof *steps; s++) {
		char keys[BLOCKS][64];
		struct kvof_op ops[BLOCKS] = {0};
		for (int i = 0; i < BLOCKS; i++) {
			snprintf(keys[i], sizeof keys[i], "a context block of the example, number %d", i);
			ops[i].kind = steps[s].kind;
			ops[i].key = keys[i];
			ops[i].key_len = strlen(keys[i]);
			ops[i].data = memory + i * SIZE;
			ops[i].len = SIZE;
		}
		struct kvof_batch batch = {.size = sizeof batch, .op_size = sizeof *ops, .ops = ops, .count = BLOCKS, .user_data = s};
		struct kvof_completion done;
		if (kvof_submit(queue, &batch) != KVOF_OK) {
			fprintf(stderr, "%s\n", kvof_last_error());
			return 1;
		}
		while (kvof_wait(queue, &done, 1, -1) == 0)
			;
		printf("%s: %u of %u, %u of them in a row, %llu bytes: %s\n", steps[s].name, done.ok, done.count, done.run, (unsigned long long)done.bytes,
		       kvof_strerror(done.status));
	}
	kvof_close(client);
	free(memory);
	return 0;
}
