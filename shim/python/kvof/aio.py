"""The client for asyncio: batches as awaitables, driven by the queue's eventfd in the event loop. No thread, no polling."""

import asyncio
from typing import Any, Iterable, Sequence

from .client import Batch, Client, Kind, Options


class AsyncClient:
    """Made by `await AsyncClient.open(options)`; it belongs to the running event loop. Misses are as in Client."""

    def __init__(self, client: Client):
        self.client = client
        self._queue = client.queue()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._queue.fileno(), self._ready)

    @classmethod
    async def open(cls, options: Options | str, *, wait: bool = True) -> "AsyncClient":
        return cls(await asyncio.to_thread(Client, options, wait=wait))

    def _ready(self) -> None:
        for batch in self._queue.poll():
            if not batch.user.done():
                batch.user.set_result(batch)

    async def call(self, kind: int, keys: Iterable[str | bytes], buffers: Sequence[Any] | None = None, *, replace: bool = False) -> Batch:
        """Runs a batch. When it is cancelled, the batch goes on: its buffers stay in use until it has ended."""
        ended = self._loop.create_future()
        self._queue.submit(kind, keys, buffers, replace=replace, user=ended)
        return await ended

    async def put(self, key: str | bytes, data: Any, *, replace: bool = False) -> bool:
        return (await self.call(Kind.PUT, [key], [data], replace=replace)).ok == 1

    async def get_into(self, key: str | bytes, buffer: Any) -> int | None:
        batch = await self.call(Kind.GET, [key], [buffer])
        return batch.sizes[0] if batch.ok else None

    async def exists(self, keys: Sequence[str | bytes]) -> list[bool]:
        return (await self.call(Kind.EXIST, keys)).hits() if keys else []

    async def prefix(self, keys: Sequence[str | bytes]) -> int:
        return (await self.call(Kind.EXIST_PREFIX, keys)).run if keys else 0

    async def delete(self, key: str | bytes) -> bool:
        return (await self.call(Kind.DELETE, [key])).ok == 1

    async def close(self) -> None:
        """Ends what is in flight, with misses."""
        self._loop.remove_reader(self._queue.fileno())
        await asyncio.to_thread(self.client.close)
        self._ready()
