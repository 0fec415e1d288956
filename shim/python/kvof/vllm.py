"""vLLM: a secondary tier for its KV offloading: blocks go from the CPU tier to kvof and come back from it.

    --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": {
        "spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 10737418240, "secondary_tiers": [{"type": "KvofTier",
        "module_path": "kvof.vllm", "targets": "tcp://10.0.0.1/nqn.2026-11.dev.kvof:kv"}]}}'
"""

import ctypes
import logging
import time
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.file_mapper import FileMapper
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from .client import Batch, Client, Kind, Memory, Options
from .health import Health

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadingSpec

_log = logging.getLogger("kvof.vllm")


class _Lookup:
    """What is known of one key: found is None until the target has answered. requests: who asks for it."""

    __slots__ = ("found", "requests")

    def __init__(self) -> None:
        self.found: bool | None = None
        self.requests: set[str] = set()


class KvofTier(SecondaryTierManager):
    """Everything but the keys of the configuration that vLLM knows goes to kvof.Options.

    All calls come from the scheduler and only exchange messages with the library: lookups of a step travel as one batch, a job is
    one batch, and their ends are taken from the ring. There is no thread.
    """

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(self, offloading_spec: "OffloadingSpec", primary_kv_view: memoryview, tier_type: str, enable_kv_events: bool = False,
                 locality: str | None = None, backpressure_detector: Any = None, **options: Any):
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.locality = Locality(locality) if locality is not None else None
        self._events: list[OffloadingEvent] | None = None
        if enable_kv_events and offloading_spec.kv_events_config.enable_kv_cache_events:
            self._events = []

        # The same path that vLLM's own tiers give their blocks: it differs for whatever makes a block's bytes differ.
        layout = FileMapper.from_offloading_spec(
            root_dir="", offloading_spec=offloading_spec, blocks_per_file=offloading_spec.blocks_per_chunk, parallel_agnostic=True)
        options.setdefault("model", offloading_spec.config.model.name)
        options.setdefault("rank", str(layout.rank))
        options.setdefault("group", layout.base_path)
        self._client = Client.patient(Options(**options), _log)
        self._queue = self._client.queue(4096)
        self._health = Health(_log)

        self._base = ctypes.addressof(ctypes.c_char.from_buffer(primary_kv_view))
        try:
            self._client.register(Memory(self._base, primary_kv_view.nbytes))
        except Exception as e:  # worth it over RDMA only
            _log.info("kvof: the CPU tier's memory is not registered: %s", e)

        self._lookups: dict[OffloadKey, _Lookup] = {}
        self._asked: list[OffloadKey] = []  # in this step
        self._keys_of: dict[str, set[OffloadKey]] = {}  # by request
        self._jobs = 0  # in flight
        self._finished: list[JobResult] = []

    # ---- Lookups ----

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        self._poll()
        entry = self._lookups.get(key)
        if entry is None:
            entry = self._lookups[key] = _Lookup()
            self._asked.append(key)
        entry.requests.add(req_context.req_id)
        self._keys_of.setdefault(req_context.req_id, set()).add(key)
        if entry.found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if entry.found else LookupResult.MISS

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        asked, self._asked = [key for key in self._asked if key in self._lookups], []
        if asked:
            self._queue.submit(Kind.EXIST, asked, user=(None, asked, 0.0))

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        for key in self._keys_of.pop(req_context.req_id, ()):
            entry = self._lookups[key]
            entry.requests.discard(req_context.req_id)
            if not entry.requests:
                del self._lookups[key]

    # ---- Jobs ----

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._submit(Kind.PUT, job_metadata)

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._submit(Kind.GET, job_metadata)

    def _submit(self, kind: Kind, job: TransferJob) -> None:
        keys, size = list(job.keys), self.block_size_bytes
        memory = [Memory(self._base + int(chunk) * size, size) for chunk in job.chunk_ids]
        self._jobs += 1
        self._queue.submit(kind, keys, memory, user=(job, keys, time.monotonic()))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        self._poll()
        finished, self._finished = self._finished, []
        return finished

    def drain_jobs(self) -> None:
        """Ends within the time-out of a command: so does every operation."""
        while self._jobs:
            self._end(self._queue.wait())

    def _poll(self) -> None:
        if self._queue.in_flight:
            self._end(self._queue.poll())

    def _end(self, batches: list[Batch]) -> None:
        for batch in batches:
            self._health.note(batch)
            job, keys, start = batch.user
            if job is None:
                self._found(keys, batch.hits())
            else:
                self._jobs -= 1
                self._finished.append(self._result(job, keys, batch, time.monotonic() - start))

    def _found(self, keys: Collection[OffloadKey], hits: Iterable[bool]) -> None:
        for key, hit in zip(keys, hits):
            if (entry := self._lookups.get(key)) is not None:
                entry.found = hit

    def _result(self, job: TransferJob, keys: list[OffloadKey], batch: Batch, seconds: float) -> JobResult:
        hits = batch.hits()
        if batch.kind == Kind.GET:
            hits = [hit and size == self.block_size_bytes for hit, size in zip(hits, batch.sizes)]
            # What did not come is not asked for again by the requests that believe it to be there.
            failed = [key for key, hit in zip(keys, hits) if not hit]
            self._found(failed, [False] * len(failed))
        good = [key for key, hit in zip(keys, hits) if hit]
        if batch.kind == Kind.PUT and good and self._events is not None:
            self._events.append(OffloadingEvent(keys=good, medium=self.medium, removed=False, locality=self.locality))
        return JobResult(
            job_id=job.job_id, success=len(good) == len(keys), transfer_time=seconds, transfer_bytes=len(good) * self.block_size_bytes,
            successful_keys=tuple(good) if batch.kind == Kind.GET and 0 < len(good) < len(keys) else None)

    def take_events(self) -> Iterable[OffloadingEvent]:
        if self._events:
            events, self._events = self._events, []
            yield from events

    def counters(self) -> dict[str, int]:
        return self._client.counters()

    def shutdown(self) -> None:
        self._client.close()
