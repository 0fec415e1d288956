"""LMCache's own adapter, bench and check against the connector, with the real package."""

import json
import os
import select
import subprocess
import sys
import time

import pytest
from conftest import eventually

pytest.importorskip("lmcache")

from kvof.lmcache import Connector


def spec(url: str, **more) -> str:
    return json.dumps({
        "type": "native_plugin", "module_path": "kvof.lmcache", "class_name": "Connector", "adapter_params": {"targets": url, **more}})


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_bench_l2(target):
    out = run(
        "-m", "lmcache.cli.main", "bench", "l2", "--l2-adapter", spec(target.url), "--num-keys", "8", "--data-size-kb", "2048", "--rounds", "2",
        "--in-flight", "3", "--no-skip-verify", "--lookup-max-hit-rate", "0.5")
    assert "All 24 keys data verified OK" in out and "success_keys=24/24" in out and "loaded=24/24" in out, out
    assert "Rounds timed out:                                              0" in out


def test_basic_check(target):
    out = run(
        "-m", "lmcache.v1.basic_check", "--mode", "test_l2_adapter", "--l2-adapter", spec(target.url, tenant=f"check{time.time_ns()}"),
        "--obj-size", "4194304", "--num-keys", "8")  # elements of 4 bytes: 16 MiB a key
    assert "8/8 correctly absent" in out and "8/8 found" in out, out
    assert "Validation (loaded): 8/8" in out and "Validation (content): 8/8" in out, out


class Driver:
    """Drives a connector as LMCache does: submits, waits on the eventfd, drains."""

    def __init__(self, **params):
        self.connector = Connector(**params)
        self.poller = select.poll()
        self.poller.register(self.connector.event_fd(), select.POLLIN)
        self.results = {}

    def result(self, number):
        while number not in self.results:
            assert self.poller.poll(60_000), "no completion"
            for n, *rest in self.connector.drain_completions():
                self.results[n] = tuple(rest)
        return self.results.pop(number)

    def set(self, keys, data):
        return self.result(self.connector.submit_batch_set(keys, [memoryview(d) for d in data]))

    def get(self, keys, buffers):
        return self.result(self.connector.submit_batch_get(keys, [memoryview(b) for b in buffers]))

    def exists(self, keys):
        return self.result(self.connector.submit_batch_exists(keys))

    def delete(self, keys):
        return self.result(self.connector.submit_batch_delete(keys))


def keys(prefix, n):
    return [f"meta-llama/Llama-3.1-8B@00000000@0@{prefix}{i:032x}" for i in range(n)]


def test_contract(target, unique):
    d = Driver(targets=target.url)
    ks = keys(unique, 5)
    data = [bytes([i]) * 1000 for i in range(5)]
    assert d.set(ks[:3], data[:3]) == (True, "", [True] * 3)
    assert d.set(ks[:3], data[:3]) == (True, "", [True] * 3)  # again
    assert d.exists(ks) == (True, "", [True] * 3 + [False] * 2)
    buffers = [bytearray(1000) for _ in ks]
    ok, error, hits = d.get(ks, buffers)
    assert (ok, error, hits) == (False, "miss", [True] * 3 + [False] * 2)
    assert buffers[:3] == data[:3]
    # Of another size: another layout.
    assert d.get(ks[:2], [bytearray(999), bytearray(1001)])[2] == [False, False]
    assert d.delete(ks[:4])[2] == [True] * 4
    assert d.exists(ks)[2] == [False] * 5
    d.connector.close()


def test_the_real_adapter_counts_what_is_stored_and_deleted(target, unique):
    import argparse

    import torch
    from lmcache.v1.distributed.api import ObjectKey
    from lmcache.v1.distributed.l2_adapters import create_l2_adapter
    from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
    from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

    config = parse_args_to_l2_adapters_config(argparse.Namespace(l2_adapter=[spec(target.url, salt=unique)])).adapters[0]
    adapter = create_l2_adapter(config, l1_memory_desc=None)

    def obj(fill):
        raw = torch.full((4096,), fill, dtype=torch.uint8)
        return TensorMemoryObj(
            raw, MemoryObjMetadata(torch.Size([4096]), torch.uint8, raw.data_ptr(), 4096, ref_count=1, fmt=MemoryFormat.KV_2LTD), None)

    def wait(fd):
        p = select.poll()
        p.register(fd, select.POLLIN)
        assert p.poll(60_000)
        os.eventfd_read(fd)

    try:
        ks = [ObjectKey(chunk_hash=i.to_bytes(16, "big"), model_name="m", kv_rank=0) for i in range(4)]
        stored = [obj(i + 1) for i in range(3)]  # the caller's until the task is done
        task = adapter.submit_store_task(ks[:3], stored)
        wait(adapter.get_store_event_fd())
        assert adapter.pop_completed_store_tasks()[task].is_successful()
        task = adapter.submit_lookup_and_lock_task(ks, {})
        wait(adapter.get_lookup_and_lock_event_fd())
        found = adapter.query_lookup_and_lock_result(task)
        assert [found.test(i) for i in range(4)] == [True, True, True, False]
        loaded = [obj(0) for _ in ks]
        task = adapter.submit_load_task(ks, loaded)
        wait(adapter.get_load_event_fd())
        got = adapter.query_load_result(task)
        assert [got.test(i) for i in range(4)] == [True, True, True, False]
        assert all(torch.equal(a.tensor.view(torch.uint8), b.tensor.view(torch.uint8)) for a, b in zip(loaded, stored))
        adapter.submit_unlock(ks)
        adapter.delete(ks[:2])
        task = adapter.submit_lookup_and_lock_task(ks, {})
        wait(adapter.get_lookup_and_lock_event_fd())
        found = adapter.query_lookup_and_lock_result(task)
        assert [found.test(i) for i in range(4)] == [False, False, True, False]
        assert adapter.report_status()["is_healthy"]
    finally:
        adapter.close()


def test_dead_target_misses_and_recovers(victim, unique, caplog):
    d = Driver(targets=victim.url, timeout=1.0, lookup_timeout=0.3, reconnect=0.1)
    ks = keys(unique, 3)
    data = [os.urandom(100_000) for _ in ks]
    assert d.set(ks, data)[0]
    victim.kill()
    start = time.monotonic()
    assert d.exists(ks) == (True, "", [False] * 3)
    assert d.get(ks, [bytearray(100_000) for _ in ks])[2] == [False] * 3
    assert d.set(keys(unique + "x", 3), data)[0] is False
    assert time.monotonic() - start < 10
    assert "misses" in caplog.text
    victim.start()
    eventually(lambda: all(d.exists(ks)[2]))
    buffers = [bytearray(100_000) for _ in ks]
    assert d.get(ks, buffers) == (True, "", [True] * 3) and buffers == data
    assert "works again" in caplog.text
    assert d.connector.counters()["unavailable"] > 0
    d.connector.close()
