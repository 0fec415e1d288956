"""SGLang: a storage backend (L3) for HiCache.

    --enable-hierarchical-cache --hicache-mem-layout page_first --hicache-storage-backend dynamic
    --hicache-storage-backend-extra-config '{"backend_name": "kvof", "module_path": "kvof.sglang", "class_name": "KvofStorage",
        "interface_v1": 1, "targets": "tcp://10.0.0.1/nqn.2026-11.dev.kvof:kv"}'

With interface_v1 pages move between the host pool and the network without a copy, many in one batch.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)

from .client import Client, Kind, Memory, Options
from .health import Health

_log = logging.getLogger("kvof.sglang")

_OPTIONS = {field.name for field in dataclasses.fields(Options)}


def _bytes_of(tensor: torch.Tensor) -> Memory:
    if not tensor.is_contiguous():
        raise ValueError("kvof: a page must be contiguous")
    return Memory(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def _rank(c: HiCacheStorageConfig, sharded: bool) -> str:
    """Whose part of a page the bytes are. Ranks that hold the same bytes have the same."""
    parts = [f"tp{c.tp_rank}of{c.tp_size}"] if sharded else []
    if c.pp_size > 1:
        parts.append(f"pp{c.pp_rank}of{c.pp_size}")
    if c.attn_cp_size > 1:
        parts.append(f"cp{c.attn_cp_rank}of{c.attn_cp_size}")
    return ",".join(parts)


class KvofStorage(HiCacheStorage):
    """The members of kvof.Options are given in the extra configuration, beside SGLang's own.

    The calls come from HiCache's own threads and wait for their answer, which comes within the time-outs of the options.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: Any = None):
        c = storage_config
        options = {name: value for name, value in (c.extra_config or {}).items() if name in _OPTIONS}
        options.setdefault("model", c.model_name or "")
        options.setdefault("rank", _rank(c, sharded=not c.is_mla_model))
        # Mamba's state is divided between the ranks even where their KV is the same.
        self._mamba_suffix = f".{_rank(c, sharded=True)}"
        self._client = Client.patient(Options(**options), _log)
        self._health = Health(_log)
        self.registered_pools: dict[str, Any] = {}

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        buffer = getattr(mem_pool_host, "kv_buffer", None)
        if isinstance(buffer, torch.Tensor) and buffer.is_contiguous():
            try:
                self._client.register(_bytes_of(buffer))
            except Exception as e:  # worth it over RDMA only
                _log.info("kvof: the host pool is not registered: %s", e)

    # ---- Many keys at once ----

    def _get(self, keys: Sequence[str], pages: Sequence[list[Memory]]) -> list[bool]:
        """A value of another size than its page is of another layout: a miss."""
        if not keys:
            return []
        batch = self._client.call(Kind.GET, keys, pages)
        self._health.note(batch)
        return [hit and size == sum(m.length for m in page) for hit, size, page in zip(batch.hits(), batch.sizes, pages)]

    def _put(self, keys: Sequence[str], pages: Sequence[list[Memory]]) -> list[bool]:
        if not keys:
            return []
        batch = self._client.call(Kind.PUT, keys, pages)
        self._health.note(batch)
        return batch.hits()

    def _exist(self, keys: Sequence[str]) -> list[bool]:
        if not keys:
            return []
        batch = self._client.call(Kind.EXIST, keys)
        self._health.note(batch)
        return batch.hits()

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        if not keys:
            return 0
        batch = self._client.call(Kind.EXIST_PREFIX, keys)
        self._health.note(batch)
        return batch.run

    def _pages(self, host_indices: torch.Tensor, count: int) -> list[list[Memory]]:
        """The pieces of each page in the host pool, in the order in which they are the page's flat bytes."""
        addresses, sizes = self.mem_pool_host.get_page_buffer_meta(host_indices)
        if isinstance(sizes, int):
            sizes = [sizes] * len(addresses)
        pieces = [Memory(int(address), int(size)) for address, size in zip(addresses, sizes)]
        each = len(pieces) // count
        return [pieces[i * each : (i + 1) * each] for i in range(count)]

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None) -> list[bool]:
        return self._get(keys, self._pages(host_indices, len(keys))) if keys else []

    def batch_set_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None) -> list[bool]:
        return self._put(keys, self._pages(host_indices, len(keys))) if keys else []

    # ---- The generic interface: flat tensors ----

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[torch.Tensor | None]:
        if target_locations is None:
            return [None] * len(keys)
        hits = self._get(keys, [[_bytes_of(tensor)] for tensor in target_locations])
        return [tensor if hit else None for tensor, hit in zip(target_locations, hits)]

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> torch.Tensor | None:
        return self.batch_get([key], None if target_location is None else [target_location])[0]

    def batch_set(self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None) -> bool:
        tensors = [tensor.contiguous() for tensor in (values if values is not None else target_locations)]
        return all(self._put(keys, [[_bytes_of(tensor)] for tensor in tensors]))

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        return self.batch_set([key], [value if value is not None else target_location])

    def exists(self, key: str) -> bool:
        return self._exist([key])[0]

    # ---- Models with several pools (Mamba, sliding windows, sparse attention) ----

    def _component(self, key: str, pool: str) -> str:
        name = str(getattr(pool, "value", pool))
        if name == PoolName.KV.value:
            return key
        return f"{key}.{name}{self._mamba_suffix if name == PoolName.MAMBA.value else ''}"

    def batch_exists_v2(self, keys: list[str], pool_transfers: list[PoolTransfer] | None = None,
                        extra_info: HiCacheStorageExtraInfo | None = None) -> PoolTransferResult:
        pages = self.batch_exists(keys)
        transfers = list(pool_transfers or []) if pages else []
        # One round trip for all pools.
        found = self._exist([self._component(key, t.name) for t in transfers for key in keys[:pages]])
        hits: dict[str, int] = {PoolName.KV: pages} if pages else {}
        restorable = set(range(1, pages + 1))
        for i, t in enumerate(transfers):
            present = found[i * pages : (i + 1) * pages]
            if t.hit_policy == PoolHitPolicy.ALL_PAGES:
                good = set(range(1, (present + [False]).index(False) + 1))
            elif t.hit_policy == PoolHitPolicy.TRAILING_PAGES:
                window = max(1, len(t.keys or []))
                good = {n for n in range(1, pages + 1) if all(present[max(0, n - window) : n])}
            else:
                good = set()  # not a policy this backend has: nothing of it is there
            if good:
                hits[t.name] = max(good)
            restorable &= good
        return PoolTransferResult(max(restorable, default=0), hits, sorted(restorable))

    def _offsets(self, t: PoolTransfer) -> tuple[Any, list[int]] | None:
        """The pool of a transfer and where in it each key's page begins; None if the transfer makes no sense."""
        pool = self.registered_pools.get(t.name)
        size = getattr(pool, "page_size", 1) or 1
        if pool is None or t.host_indices is None or t.host_indices.numel() != len(t.keys or []) * size:
            _log.error("kvof: pool %s is unknown, or its indices do not fit its keys", t.name)
            return None
        return pool, t.host_indices[::size].tolist()

    def batch_get_v2(self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None) -> dict[str, list[bool]]:
        results = {}
        for t in transfers:
            keys = t.keys or []
            results[t.name] = [False] * len(keys)
            if keys and (place := self._offsets(t)):
                pool, offsets = place
                pages = [pool.get_dummy_flat_data_page() for _ in keys]
                results[t.name] = self._get([self._component(key, t.name) for key in keys], [[_bytes_of(page)] for page in pages])
                for hit, offset, page in zip(results[t.name], offsets, pages):
                    if hit:
                        pool.set_from_flat_data_page(offset, page)
        return results

    def batch_set_v2(self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None) -> dict[str, list[bool]]:
        results = {}
        for t in transfers:
            keys = t.keys or []
            results[t.name] = [False] * len(keys)
            if keys and (place := self._offsets(t)):
                pool, offsets = place
                pages = [pool.get_data_page(offset, flat=True).contiguous() for offset in offsets]
                results[t.name] = self._put([self._component(key, t.name) for key in keys], [[_bytes_of(page)] for page in pages])
        return results

    def counters(self) -> dict[str, int]:
        return self._client.counters()

    def close(self) -> None:
        self._client.close()
