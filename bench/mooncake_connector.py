"""Mooncake's store as an LMCache native_plugin connector, for lmcache_l2.py: LMCache's wheel has no adapter for it.

As LMCache's own does, it hands whole batches to a few threads, which call Mooncake's functions for registered memory: nothing is copied.
"""

import ctypes
import os
import queue
import threading

from mooncake.store import MooncakeDistributedStore

THREADS = 4


class Connector:
    def __init__(self, master: str, host: str):
        self._store = MooncakeDistributedStore()
        if status := self._store.setup(host, "P2PHANDSHAKE", 0, 64 << 20, "tcp", "", master):
            raise RuntimeError(f"mooncake: setup returned {status}")
        self._fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._work, self._done, self._next = queue.SimpleQueue(), queue.SimpleQueue(), 0
        self._registered, self._lock = set(), threading.Lock()
        for _ in range(THREADS):
            threading.Thread(target=self._serve, daemon=True).start()

    def event_fd(self):
        return self._fd

    def submit_batch_set(self, keys, views):
        return self._submit("put", keys, views)

    def submit_batch_get(self, keys, views):
        return self._submit("get", keys, views)

    def submit_batch_exists(self, keys):
        return self._submit("exist", keys, [])

    def _submit(self, kind, keys, views):
        """A batch is divided between the threads; its last part to end completes it."""
        number, self._next = self._next, self._next + 1
        memory = [(ctypes.addressof(ctypes.c_char.from_buffer(view)), view.nbytes) for view in views]
        for address, size in memory:
            if address not in self._registered:
                self._registered.add(address)
                self._store.register_buffer(address, size)
        parts = THREADS if views else 1
        batch = {"number": number, "kind": kind, "left": parts, "hits": [False] * len(keys)}
        for i in range(parts):
            self._work.put((batch, range(i, len(keys), parts), [keys[j] for j in range(i, len(keys), parts)], memory[i::parts]))
        return number

    def _serve(self):
        while True:
            batch, places, keys, memory = self._work.get()
            addresses, sizes = [m[0] for m in memory], [m[1] for m in memory]
            if batch["kind"] == "put":
                hits = [status == 0 for status in self._store.batch_put_from(keys, addresses, sizes)]
            elif batch["kind"] == "get":
                hits = [n == size for n, size in zip(self._store.batch_get_into(keys, addresses, sizes), sizes)]
            else:
                hits = [found == 1 for found in self._store.batch_is_exist(keys)]
            for place, hit in zip(places, hits):
                batch["hits"][place] = hit
            with self._lock:
                batch["left"] -= 1
                if batch["left"]:
                    continue
            self._done.put((batch["number"], all(batch["hits"]) or batch["kind"] == "exist", "", batch["hits"]))
            os.eventfd_write(self._fd, 1)

    def drain_completions(self):
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            pass
        done = []
        while not self._done.empty():
            done.append(self._done.get())
        return done

    def close(self):
        self._store.close()
