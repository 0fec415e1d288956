"""LMCache (MP mode): the connector that its native_plugin L2 adapter loads.

    lmcache server --l2-adapter '{"type": "native_plugin", "module_path": "kvof.lmcache", "class_name": "Connector",
        "adapter_params": {"targets": "tcp://10.0.0.1/nqn.2026-11.dev.kvof:kv"}}' ...

LMCache hands over keys of the form model@rank@group@hash[@salt] and memory of its own L1 cache, and waits on event_fd.
"""

import logging
import threading
from typing import Any, Sequence

from .client import Batch, Client, Kind, Options, Status
from .health import Health

_log = logging.getLogger("kvof.lmcache")


class Connector:
    """adapter_params are the members of kvof.Options. Every submit returns an ID at once; nothing raises because of a target."""

    def __init__(self, **params: Any):
        self._client = Client.patient(Options(**params), _log)
        self._queue = self._client.queue(4096)
        self._lock = threading.Lock()
        self._next = 0
        self._lengths: dict[int, list[int]] = {}  # of the memory of loads in flight
        self._health = Health(_log)

    def event_fd(self) -> int:
        return self._queue.fileno()

    def submit_batch_get(self, keys: Sequence[str], memoryviews: Sequence[memoryview]) -> int:
        return self._submit(Kind.GET, keys, memoryviews)

    def submit_batch_set(self, keys: Sequence[str], memoryviews: Sequence[memoryview]) -> int:
        return self._submit(Kind.PUT, keys, memoryviews)

    def submit_batch_exists(self, keys: Sequence[str]) -> int:
        return self._submit(Kind.EXIST, keys)

    def submit_batch_delete(self, keys: Sequence[str]) -> int:
        return self._submit(Kind.DELETE, keys)

    def _submit(self, kind: Kind, keys: Sequence[str], views: Sequence[memoryview] | None = None) -> int:
        with self._lock:
            self._next += 1
            number = self._next
            if kind == Kind.GET:
                self._lengths[number] = [view.nbytes for view in views]
        self._queue.submit(kind, keys, views, user=number)
        return number

    def drain_completions(self) -> list[tuple[int, bool, str, list[bool]]]:
        """(ID, all went well, why not, for each key whether it did) of what has ended."""
        return [self._completion(batch) for batch in self._queue.poll()]

    def _completion(self, batch: Batch) -> tuple[int, bool, str, list[bool]]:
        self._health.note(batch)
        number = batch.user
        hits = batch.hits()
        if batch.kind == Kind.GET:
            # A value of another size is of another layout: a miss.
            lengths = self._lengths.pop(number)
            hits = [hit and size == length for hit, size, length in zip(hits, batch.sizes, lengths)]
        elif batch.kind == Kind.EXIST:
            return number, True, "", hits
        elif batch.kind == Kind.DELETE:
            hits = [status in (Status.OK, Status.MISS) for status in batch.statuses]
        if all(hits):
            return number, True, "", hits
        worst = next((status for status in batch.statuses if status > Status.EXISTS), Status.TRUNCATED)
        return number, False, Status(worst).name.lower(), hits

    def counters(self) -> dict[str, int]:
        return self._client.counters()

    def close(self) -> None:
        self._client.close()
