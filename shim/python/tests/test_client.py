import asyncio
import json
import multiprocessing
import os
import random
import threading
import time

import pytest
from conftest import ROOT, Server, eventually

import kvof
from kvof import Client, Kind, Memory, Options, Status
from kvof.aio import AsyncClient


@pytest.fixture(scope="module")
def client(target):
    with Client(target.url) as c:
        yield c


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 100_000, 2 << 20, (16 << 20) + 1, (64 << 20) - 64])
def test_values_of_all_sizes(client, unique, size):
    data = random.Random(size).randbytes(size)
    key = f"{unique}{size}"
    assert client.get_into(key, bytearray(size)) is None
    assert client.put(key, data)
    buffer = bytearray(size + 3)
    assert client.get_into(key, buffer) == size
    assert buffer[:size] == data
    assert client.get_into(key, memoryview(buffer)[:size]) == size
    assert client.exists([key, key + "other"]) == [True, False]
    assert client.delete(key)
    assert client.get_into(key, buffer) is None


def test_put_is_only_if_absent_unless_told(client, unique):
    assert client.put(unique, b"first")
    assert client.call(Kind.PUT, [unique], [b"second"]).statuses == [Status.EXISTS]
    buffer = bytearray(6)
    assert client.get_into(unique, buffer) == 5 and buffer[:5] == b"first"
    assert client.put(unique, b"second", replace=True)
    assert client.get_into(unique, buffer) == 6 and buffer == b"second"


def test_each_key_has_its_own_result(client, unique):
    keys = [f"{unique}{i}" for i in range(6)]
    for i in (0, 1, 3):
        assert client.put(keys[i], bytes([i]) * 100)
    assert client.exists(keys) == [True, True, False, True, False, False]
    assert client.prefix(keys) == 2
    buffers = [bytearray(100 if i != 1 else 10) for i in range(6)]
    batch = client.call(Kind.GET, keys, buffers)
    assert batch.statuses == [Status.OK, Status.TRUNCATED, Status.MISS, Status.OK, Status.MISS, Status.MISS]
    assert batch.sizes[:2] == [100, 100] and batch.ok == 2 and batch.run == 1
    assert buffers[3] == bytes([3]) * 100


def test_pieces(client, unique):
    data = os.urandom(1 << 20)
    view = memoryview(data)
    cuts = [0, 1, 4097, 500_000, 500_000, 1 << 20]
    batch = client.call(Kind.PUT, [unique], [[view[a:b] for a, b in zip(cuts, cuts[1:])]])
    assert batch.statuses == [Status.OK] and batch.bytes == len(data)
    buffer = bytearray(len(data))
    target = memoryview(buffer)
    assert client.call(Kind.GET, [unique], [[target[:700_001], target[700_001:]]]).sizes == [len(data)]
    assert buffer == data


def test_no_copy_and_no_leak(client, unique):
    """Data lands in the very memory that was named, and buffers are free again when a batch has ended."""
    import ctypes

    raw = ctypes.create_string_buffer(1 << 20)
    memory = Memory(ctypes.addressof(raw), 1 << 20)
    data = os.urandom(1 << 20)
    client.put(unique, data)
    client.register(memory)
    assert client.get_into(unique, memory) == len(data) and raw.raw == data
    client.unregister(memory.address)
    buffer = bytearray(data)
    client.get_into(unique, buffer)
    buffer.extend(b"more")  # raises BufferError while anyone holds it


def test_wrong_arguments(client, unique):
    with pytest.raises((BufferError, TypeError)):
        client.get_into(unique, b"read only")
    with pytest.raises(TypeError):
        client.put(unique, "not bytes")
    with pytest.raises(ValueError):
        client.call(Kind.PUT, [unique], [b"a", b"b"])
    with pytest.raises(BufferError):
        client.put(unique, memoryview(b"abcdef")[::2])
    assert client.call(Kind.EXIST, ["", unique]).statuses == [Status.INVALID, Status.MISS]
    with pytest.raises(kvof.KvofError) as e:
        Client("nonsense://")
    assert e.value.status == Status.INVALID
    with pytest.raises(TypeError):
        Options(target="tcp://x/y")


def test_scopes_separate(target, unique):
    with Client(Options(targets=target.url, tenant="a")) as a, Client(Options(targets=target.url, tenant="b")) as b:
        assert a.put(unique, b"secret")
        assert b.exists([unique]) == [False] and a.exists([unique]) == [True]


def test_shared_key_vectors():
    vectors = json.loads((ROOT / "shim/keys/testdata/vectors.json").read_text())["keys"]
    assert len(vectors) > 10
    for v in vectors:
        key, options = bytes.fromhex(v["key_hex"]), Options(targets="", hash_all=v["hash_all"], **v["scope"])
        got = kvof.nvme_key(key, options)
        assert (got.key.hex(), got.digest.hex()) == (v["nvme_key_hex"], v["digest_hex"])


def test_many_threads(client, unique):
    def work(i):
        rng = random.Random(i)
        for j in range(20):
            key, data = f"{unique}{i}/{j}", rng.randbytes(rng.randrange(200_000))
            assert client.put(key, data)
            buffer = bytearray(len(data))
            assert client.get_into(key, buffer) == len(data) and buffer == data
        done.append(i)

    done: list[int] = []
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(done) == 8


def test_queue_with_many_batches(client, unique):
    q = client.queue()
    data = os.urandom(10_000)
    waiting = {q.submit(Kind.PUT, [f"{unique}{i}/{j}" for j in range(10)], [data] * 10, user=i).user for i in range(100)}
    while waiting:
        for batch in q.wait(60):
            assert batch.ok == 10
            waiting.remove(batch.user)
    assert q.poll() == [] and q.in_flight == 0


def test_asyncio(target, unique):
    async def main():
        c = await AsyncClient.open(target.url)
        keys = [f"{unique}{i}" for i in range(32)]
        assert all(await asyncio.gather(*(c.put(key, key.encode() * 100) for key in keys)))
        buffers = [bytearray(100 * len(key)) for key in keys]
        sizes = await asyncio.gather(*(c.get_into(key, buffer) for key, buffer in zip(keys, buffers)))
        assert sizes == [len(b) for b in buffers] and all(b == k.encode() * 100 for b, k in zip(buffers, keys))
        assert await c.exists(keys[:2] + ["no" * 20]) == [True, True, False]
        assert await c.prefix(keys) == 32
        assert await c.delete(keys[0])
        await c.close()

    asyncio.run(main())


def test_counters(target, unique):
    with Client(target.url) as c:
        c.put(unique, b"x" * 1000)
        c.put(unique, b"x" * 1000)
        c.get_into(unique, bytearray(1000))
        c.get_into(unique + "no", bytearray(1000))
        c.exists([unique, unique + "no"])
        n = c.counters()
        assert (n["puts"], n["put_exists"], n["get_hits"], n["get_misses"], n["exist_hits"], n["exist_misses"]) == (1, 1, 1, 1, 1, 1)
        assert n["put_bytes"] >= 1000 and n["get_bytes"] == 1000 and n["targets_up"] == 1
        assert str(target.port) in c.describe()


def test_closed_client_misses(target, unique):
    c = Client(target.url)
    c.put(unique, b"x")
    q = c.queue()
    c.close()
    c.close()
    assert c.exists([unique]) == [False] and c.get_into(unique, bytearray(1)) is None
    batch = q.submit(Kind.EXIST, [unique])
    assert q.poll() == [batch] and batch.statuses == [Status.CANCELLED]


def test_close_with_batches_in_flight(victim, unique):
    c = Client(victim.url)
    q = c.queue()
    victim.hang()
    buffer = bytearray(1 << 20)
    batch = q.submit(Kind.GET, [unique], [buffer])
    c.close()
    assert q.poll() == [batch] and batch.statuses == [Status.CANCELLED]
    buffer.extend(b"free again")


def _in_child(c, results):
    results.put(c.exists(["a"]))


def test_fork_misses(target):
    with Client(target.url) as c:
        fork = multiprocessing.get_context("fork")
        results = fork.Queue()
        child = fork.Process(target=_in_child, args=(c, results))
        child.start()
        assert results.get(timeout=60) == [False]
        child.join(60)
        assert child.exitcode == 0


# ---- Failures: misses, in time, and back again by itself ----

SHORT = dict(timeout=1.0, lookup_timeout=0.3, reconnect=0.1, keep_alive=2.0)


def test_target_dies_and_comes_back(victim, unique):
    with Client(Options(targets=victim.url, **SHORT)) as c:
        data = os.urandom(1 << 20)
        assert c.put(unique, data)
        victim.kill()
        start = time.monotonic()
        assert c.get_into(unique, bytearray(1 << 20)) is None
        assert c.exists([unique] * 50) == [False] * 50
        assert not c.put(unique + "2", data)
        assert time.monotonic() - start < 10  # three calls of at most a second each, on a slow machine
        victim.start()
        buffer = bytearray(1 << 20)
        assert eventually(lambda: c.get_into(unique, buffer)) == 1 << 20
        assert buffer == data
        n = c.counters()
        assert n["unavailable"] + n["timeouts"] >= 52 and n["disconnects"] >= 1 and n["connects"] >= 2


def test_target_hangs(victim, unique):
    with Client(Options(targets=victim.url, **SHORT)) as c:
        assert c.put(unique, b"x")
        victim.hang()
        start = time.monotonic()
        assert c.exists([unique]) == [False]
        batch = c.call(Kind.GET, [unique], [bytearray(1)])
        assert batch.statuses[0] in (Status.TIMEOUT, Status.UNAVAILABLE)
        assert time.monotonic() - start < 10
        n = c.counters()
        assert n["timeouts"] >= 1 and n["timeouts"] + n["unavailable"] == 2 and n["errors"] == 0
        victim.resume()
        eventually(lambda: c.exists([unique]) == [True])


def test_target_is_not_there_at_the_start(victim, unique):
    victim.kill()
    with pytest.raises(kvof.KvofError) as e:
        Client(Options(targets=victim.url, connect_timeout=0.5))
    assert e.value.status == Status.UNAVAILABLE
    with Client.patient(Options(targets=victim.url, connect_timeout=0.5, **SHORT)) as c:
        assert not c.put(unique, b"x")
        victim.start()
        eventually(lambda: c.put(unique, b"x"))


def test_target_is_full(tmp_path, unique):
    server = Server(tmp_path, size="96MiB", device="memory", eviction="never")
    try:
        with Client(server.url) as c:
            data = os.urandom(4 << 20)
            batch = c.call(Kind.PUT, [f"{unique}{i}" for i in range(40)], [data] * 40)
            assert {Status(s) for s in batch.statuses} == {Status.OK, Status.FULL}
            assert c.counters()["full"] == batch.statuses.count(Status.FULL)
            # Whatever is there is whole.
            for i, ok in enumerate(batch.hits()):
                buffer = bytearray(4 << 20)
                assert c.get_into(f"{unique}{i}", buffer) == (len(data) if ok else None)
                assert not ok or buffer == data
    finally:
        server.stop()
