"""SGLang's factory and host pools with the kvof backend. What is missing is a GPU below the host pool."""

import threading
import time

import pytest
from conftest import eventually

pytest.importorskip("sglang")

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, PoolHitPolicy, PoolName, PoolTransfer
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

PAGE, LAYERS, HEADS, DIM, PAGES = 16, 4, 8, 64, 32


def backend(url, rank=0, mla=False, model="llama", **options):
    config = HiCacheStorageConfig(
        tp_rank=rank, tp_size=2, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1, is_mla_model=mla, enable_storage_metrics=False,
        is_page_first_layout=True, model_name=model,
        extra_config={
            "backend_name": "kvof", "module_path": "kvof.sglang", "class_name": "KvofStorage", "interface_v1": 1, "targets": url, **options})
    return StorageBackendFactory.create_backend("dynamic", config, None)


def host_pool(layout="page_first"):
    """SGLang's own pool, with the members that its storage functions use, and memory that is not pinned."""
    pool = MHATokenToKVPoolHost.__new__(MHATokenToKVPoolHost)
    pool.layout, pool.page_size, pool.layer_num, pool.head_num, pool.head_dim = layout, PAGE, LAYERS, HEADS, DIM
    pool.size, pool.dtype, pool.device, pool.pin_memory = PAGE * PAGES, torch.bfloat16, "cpu", False
    shape = {
        "page_first": (2, pool.size, LAYERS, HEADS, DIM), "layer_first": (2, LAYERS, pool.size, HEADS, DIM),
        "page_first_direct": (2, PAGES, LAYERS, PAGE, HEADS, DIM)}[layout]
    pool.kv_buffer = torch.zeros(shape, dtype=pool.dtype)
    return pool


def fill(pool, pages):
    torch.manual_seed(pages[0])
    for page in pages:
        flat = torch.randn(2 * LAYERS * PAGE * HEADS * DIM).to(pool.dtype)
        pool.set_from_flat_data_page(page * PAGE, flat)


def indices(pages):
    return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages])


def page(pool, n):
    return pool.get_data_page(n * PAGE, flat=True)


@pytest.mark.parametrize("layout", ["page_first", "layer_first", "page_first_direct"])
def test_zero_copy_pages(target, unique, layout):
    b, pool = backend(target.url, salt=unique), host_pool(layout)
    b.register_mem_pool_host(pool)
    keys = [f"{i:064x}" for i in range(6)]
    fill(pool, range(6))
    assert b.batch_exists(keys) == 0
    assert b.batch_set_v1(keys[:4], indices(range(4))) == [True] * 4
    assert b.batch_set_v1(keys[:4], indices(range(4))) == [True] * 4  # again
    assert b.batch_exists(keys) == 4 and b.exists(keys[3]) and not b.exists(keys[4])
    assert b.batch_get_v1(keys, indices(range(10, 16))) == [True] * 4 + [False] * 2
    for i in range(4):
        assert torch.equal(page(pool, i), page(pool, 10 + i))
    if layout == "page_first":  # the generic interface reads what the other wrote, and the other way round
        got = b.batch_get(keys[:5], [pool.get_dummy_flat_data_page() for _ in range(5)])
        assert got[4] is None and all(torch.equal(got[i], page(pool, i)) for i in range(4))
        assert b.batch_set(keys[4:], [page(pool, 4), page(pool, 5)])
        assert b.batch_get_v1(keys[4:], indices([20, 21])) == [True, True] and torch.equal(page(pool, 21), page(pool, 5))
        assert b.set("single", page(pool, 0)) and torch.equal(b.get("single", pool.get_dummy_flat_data_page()), page(pool, 0))
        assert b.get("nothing", pool.get_dummy_flat_data_page()) is None
    b.close()


def test_who_shares_what(target, unique):
    pool = host_pool()
    fill(pool, [0])

    def store(b):
        b.register_mem_pool_host(pool)
        assert b.batch_set_v1(["k" * 64], indices([0])) == [True]

    store(backend(target.url, salt=unique, rank=0))
    assert backend(target.url, salt=unique, rank=0).exists("k" * 64)
    assert not backend(target.url, salt=unique, rank=1).exists("k" * 64)  # another part of the heads
    assert not backend(target.url, salt=unique, model="qwen").exists("k" * 64)
    assert not backend(target.url, salt=unique, tenant="other").exists("k" * 64)
    store(backend(target.url, salt=unique, rank=0, mla=True))
    assert backend(target.url, salt=unique, rank=1, mla=True).exists("k" * 64)  # all ranks hold the same


def test_several_pools(target, unique):
    b, kv, mamba = backend(target.url, salt=unique), host_pool(), host_pool()
    b.register_mem_pool_host(kv)
    b.register_mem_host_pool_v2(kv, PoolName.KV)
    b.register_mem_host_pool_v2(mamba, PoolName.MAMBA)
    fill(kv, range(4))
    fill(mamba, range(4, 8))
    keys = [f"{i:064x}" for i in range(4)]
    assert b.batch_set_v1(keys, indices(range(4))) == [True] * 4
    assert b.batch_set_v2([PoolTransfer(PoolName.MAMBA, keys=[keys[1]], host_indices=indices([4]))]) == {PoolName.MAMBA: [True]}

    def exist(policy, n=1):
        return b.batch_exists_v2(keys, [PoolTransfer(PoolName.MAMBA, keys=["x"] * n, hit_policy=policy)])

    result = exist(PoolHitPolicy.TRAILING_PAGES)  # the state after the second page is all there is
    assert (result.kv_hit_pages, result.restorable_prefix_pages, result.extra_pool_hit_pages) == (2, [2], {PoolName.KV: 4, PoolName.MAMBA: 2})
    assert exist(PoolHitPolicy.ALL_PAGES).kv_hit_pages == 0
    assert b.batch_exists_v2(keys).kv_hit_pages == 4
    got = b.batch_get_v2([
        PoolTransfer(PoolName.MAMBA, keys=[keys[1], keys[2]], host_indices=indices([10, 11])),
        PoolTransfer(PoolName.SWA, keys=[keys[1]], host_indices=indices([10]))])
    assert got == {PoolName.MAMBA: [True, False], PoolName.SWA: [False]}
    assert torch.equal(page(mamba, 10), page(mamba, 4))
    assert b.batch_get_v2([PoolTransfer(PoolName.MAMBA, keys=keys[:1], host_indices=indices([1, 2]))]) == {PoolName.MAMBA: [False]}
    b.close()


def test_threads(target, unique):
    """HiCache loads and stores on threads of its own."""
    b, pool = backend(target.url, salt=unique), host_pool()
    b.register_mem_pool_host(pool)
    fill(pool, range(8))
    results = []

    def work(i):
        key = [f"{unique}{i}/{j}" for j in range(20)]
        for k in key:
            results.extend(b.batch_set_v1([k], indices([i])))
        results.extend(b.batch_get_v1(key[:1], indices([8 + i])))
        results.append(b.batch_exists(key) == 20)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == [True] * (8 * 22)
    assert all(torch.equal(page(pool, i), page(pool, 8 + i)) for i in range(8))


def test_dead_target(victim, unique):
    b, pool = backend(victim.url, salt=unique, timeout=1.0, lookup_timeout=0.3, reconnect=0.1), host_pool()
    b.register_mem_pool_host(pool)
    fill(pool, range(2))
    keys = [f"{i:064x}" for i in range(2)]
    assert b.batch_set_v1(keys, indices(range(2))) == [True] * 2
    victim.kill()
    start = time.monotonic()
    assert b.batch_exists(keys) == 0
    assert b.batch_get_v1(keys, indices([4, 5])) == [False] * 2
    assert b.batch_set_v1(["new1", "new2"], indices(range(2))) == [False] * 2
    assert b.batch_exists_v2(keys, [PoolTransfer(PoolName.MAMBA)]).kv_hit_pages == 0
    assert time.monotonic() - start < 10
    victim.start()
    eventually(lambda: b.batch_exists(keys) == 2)
    assert b.batch_get_v1(keys, indices([4, 5])) == [True] * 2 and torch.equal(page(pool, 4), page(pool, 0))
    assert b.counters()["unavailable"] > 0
    b.close()
