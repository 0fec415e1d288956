"""vLLM's own tiering manager, with its CPU tier in shared memory, over the kvof tier. What is missing is a GPU above it."""

import time
import uuid

import pytest
from conftest import eventually

pytest.importorskip("vllm")

from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

BLOCK = 2 << 20  # bytes


class Engine:
    """The scheduler's side of one vLLM engine."""

    def __init__(self, url, model="llama", tp=1, blocks=32, **options):
        config = OffloadingConfig(
            groups=(OffloadingGroupConfig(tokens_per_block=16, layer_names=("layer.0",), group_id=0),),
            worker_kv_bytes_per_block=BLOCK // tp, enable_kv_cache_events=True, engine_id=str(uuid.uuid4()),
            extra_config={
                "cpu_bytes_to_use": blocks * BLOCK,
                "secondary_tiers": [{"type": "KvofTier", "module_path": "kvof.vllm", "targets": url, "enable_kv_events": True, **options}]},
            model=OffloadingModelConfig(name=model, dtype="bfloat16"), cache=OffloadingCacheConfig(tokens_per_hash=16, blocks_per_chunk=1),
            parallel=OffloadingParallelConfig(
                rank=0, world_size=tp, tp_size=tp, pp_size=1, pcp_size=1, dcp_size=1, data_parallel_index=0, data_parallel_size=1,
                data_parallel_rank_local=None, is_parallelism_agnostic=False))
        self.manager = TieringOffloadingSpec(config).get_manager()
        (self.tier,) = self.manager.secondary_tiers
        self.memory = self.manager.primary_tier.get_kv_memoryview().cast("B")
        self.requests = 0

    def chunk(self, number):
        size = self.tier.block_size_bytes
        return self.memory[int(number) * size : (int(number) + 1) * size]

    def request(self):
        self.requests += 1
        context = ReqContext(req_id=f"request{self.requests}")
        self.manager.on_new_request(context)
        return context

    def step(self, *contexts):
        self.manager.on_schedule_end(ScheduleEndContext(new_req_ids=[c.req_id for c in contexts], preempted_req_ids=[]))

    def store(self, blocks):
        """Offloads blocks, key to bytes, as a worker would, until they have reached the tier."""
        context = self.request()
        with self.manager.lock:
            out = self.manager.prepare_store(list(blocks), context)
            for key, chunk in zip(out.keys_to_store, out.store_spec.chunk_ids):
                self.chunk(chunk)[:] = blocks[key]
            self.manager.complete_store(list(blocks), context)
        self.settle(context)

    def settle(self, *contexts):
        def idle():
            with self.manager.lock:
                self.step(*contexts)
                return not self.manager.has_pending_work()

        eventually(idle)
        with self.manager.lock:
            for c in contexts:
                self.manager.on_request_finished(c)

    def lookup(self, keys, context):
        """Steps until every lookup has its answer."""
        def ask():
            with self.manager.lock:
                results = [self.manager.lookup(key, context) for key in keys]
                self.step(context)
            return None if {LookupResult.RETRY, LookupResult.HIT_PENDING} & set(results) else results

        return eventually(ask)

    def load(self, keys, context):
        with self.manager.lock:
            spec = self.manager.prepare_load(keys, context)
            data = [bytes(self.chunk(chunk)) for chunk in spec.chunk_ids]
            self.manager.complete_load(keys, context)
        return data

    def close(self):
        self.memory.release()
        self.manager.shutdown()


def blocks_of(prefix, n, size):
    return {make_offload_key(f"{prefix}{i}".encode()[-32:].rjust(32, b"."), 0): bytes([i + 1]) * size for i in range(n)}


@pytest.fixture
def engine():
    engines = []

    def make(*args, **kwargs):
        engines.append(Engine(*args, **kwargs))
        return engines[-1]

    yield make
    for e in engines:
        e.close()


def test_blocks_travel_from_engine_to_engine(target, unique, engine):
    first = engine(target.url, salt=unique)
    blocks = blocks_of(unique, 6, first.tier.block_size_bytes)
    first.store(blocks)
    assert first.tier.counters()["puts"] == 6
    assert sum(len(event.keys) for event in first.manager.take_events() if event.medium == first.tier.medium) == 6

    second = engine(target.url, salt=unique)
    missing = make_offload_key(b"m" * 32, 0)
    context = second.request()
    keys = list(blocks)
    assert second.lookup([*keys, missing], context) == [LookupResult.HIT] * 6 + [LookupResult.MISS]
    assert second.load(keys, context) == list(blocks.values())
    second.settle(context)
    assert not second.tier._lookups and not second.tier._keys_of  # nothing is left of a request
    third = engine(target.url, salt=unique)
    third.store(blocks)  # there already
    assert third.tier.counters()["put_exists"] == 6


def test_other_layouts_and_models_do_not_mix(target, unique, engine):
    first = engine(target.url, salt=unique)
    blocks = blocks_of(unique, 2, first.tier.block_size_bytes)
    first.store(blocks)
    for other in (engine(target.url, salt=unique, model="qwen"), engine(target.url, salt=unique, tp=2), engine(target.url, salt="other")):
        assert other.lookup(list(blocks), other.request()) == [LookupResult.MISS] * 2


def test_dead_target(victim, unique, engine):
    options = dict(salt=unique, timeout=1.0, lookup_timeout=0.3, reconnect=0.1)
    first = engine(victim.url, **options)
    blocks = blocks_of(unique, 3, first.tier.block_size_bytes)
    keys = list(blocks)
    first.store(blocks)

    # It dies between the lookup and the load: the load fails, the request recomputes, nothing hangs.
    second = engine(victim.url, **options)
    tier = second.tier
    context = second.request()
    with second.manager.lock:
        for key in keys:
            tier.lookup(key, context)
        tier.on_schedule_end(None)
    eventually(lambda: all(tier.lookup(key, context) == LookupResult.HIT for key in keys))
    victim.kill()
    start = time.monotonic()
    assert second.lookup(keys, context) == [LookupResult.MISS] * 3
    second.settle(context)
    # Stores fail without harm.
    second.store(blocks_of(unique + "x", 3, tier.block_size_bytes))
    assert time.monotonic() - start < 20
    assert tier.counters()["unavailable"] > 0

    victim.start()

    def recovered():
        context = second.request()
        results = second.lookup(keys, context)
        found = results == [LookupResult.HIT] * 3 and second.load(keys, context) == list(blocks.values())
        second.settle(context)
        return found

    eventually(recovered)


def test_drain(target, unique, engine):
    e = engine(target.url, salt=unique)
    context = e.request()
    blocks = blocks_of(unique, 4, e.tier.block_size_bytes)
    with e.manager.lock:
        e.manager.prepare_store(list(blocks), context)
        e.manager.complete_store(list(blocks), context)
        e.tier.drain_jobs()
        (result,) = e.tier.get_finished_jobs()
    assert result.success and result.transfer_bytes == 4 * e.tier.block_size_bytes
