"""Clients, queues and batches: kvof.h for Python. Nothing copies payload; nothing on the way of a batch blocks or raises."""

import ctypes
import os
import select
import threading
import time
from ctypes import byref, c_void_p
from dataclasses import dataclass
from typing import Any, Iterable, NamedTuple, Sequence

from . import _abi
from ._abi import Kind, Status


class KvofError(Exception):
    """What kvof_open and the other calls that are not on an engine's hot path fail with."""

    def __init__(self, status: int):
        self.status = Status(status)
        super().__init__(f"{self.status.name.lower()}: {_abi.library().last_error().decode(errors='replace')}")


class Memory(NamedTuple):
    """Memory by its address, for who has no Python object for it. It stays the caller's to keep alive."""

    address: int
    length: int


class _PyBuffer(ctypes.Structure):
    """Py_buffer of the stable ABI."""

    _fields_ = [
        ("buf", c_void_p),
        ("obj", c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", c_void_p),
        ("strides", c_void_p),
        ("suboffsets", c_void_p),
        ("internal", c_void_p),
    ]


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = [ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int]
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = [ctypes.POINTER(_PyBuffer)]
_WRITABLE = 1


class _Pin:
    """Holds an object's buffer, so that it neither moves nor goes away, until release."""

    __slots__ = ("_view",)

    def __init__(self, obj: Any, writable: bool):
        self._view = _PyBuffer()
        _get_buffer(obj, byref(self._view), _WRITABLE if writable else 0)  # raises BufferError, TypeError

    @property
    def memory(self) -> Memory:
        return Memory(self._view.buf or 0, self._view.len)

    def release(self) -> None:
        _release_buffer(byref(self._view))


class Batch:
    """Operations that were submitted together.

    done: all have ended; the rest is valid then. statuses: a Status for each operation, as int. sizes: for GET the size of each
    value in bytes. ok: how many succeeded; run: how many did before the first that did not. bytes: moved.
    """

    __slots__ = ("kind", "keys", "count", "done", "statuses", "sizes", "ok", "run", "bytes", "user", "_ops", "_iovs", "_pins")

    def __init__(self, kind: int, keys: Sequence[bytes], user: Any):
        self.kind = kind
        self.keys = keys
        self.count = len(keys)
        self.user = user
        self.done = False
        self.statuses: list[int] = []
        self.sizes: list[int] = []
        self.ok = self.run = self.bytes = 0
        self._pins: list[_Pin] = []

    def hits(self) -> list[bool]:
        """For each operation whether it succeeded."""
        return [status <= Status.EXISTS for status in self.statuses]

    def _end(self, c: _abi.Completion) -> None:
        ops = memoryview(self._ops)
        self.statuses = ops.cast("i")[_abi.OP_STATUS // 4 :: _abi.OP.size // 4].tolist()
        if self.kind == Kind.GET:
            self.sizes = ops.cast("Q")[_abi.OP_RESULT // 8 :: _abi.OP.size // 8].tolist()
        self.ok, self.run, self.bytes = c.ok, c.run, c.bytes
        self._finish()

    @classmethod
    def _failed(cls, kind: int, keys: Iterable[str | bytes], status: int) -> "Batch":
        batch = cls(kind, [_encode(key) for key in keys], None)
        batch._fail(status)
        return batch

    def _fail(self, status: int) -> None:
        self.statuses = [int(status)] * self.count
        self.sizes = [0] * self.count if self.kind == Kind.GET else []
        self._finish()

    def _finish(self) -> None:
        self._ops = self._iovs = None
        for pin in self._pins:
            pin.release()
        self._pins = []
        self.done = True


def _encode(key: str | bytes) -> bytes:
    return key.encode() if isinstance(key, str) else bytes(key)


class Queue:
    """A completion queue. Any thread may submit and poll."""

    def __init__(self, client: "Client", depth: int = 0):
        self._lib = _abi.library()
        self._lock = threading.Lock()
        self._batches: dict[int, Batch] = {}
        self._failed: list[Batch] = []
        self._next = 1
        self._client = client  # the queue is gone with its client
        handle = c_void_p()
        if status := self._lib.queue_open(client._handle, depth, byref(handle)):
            raise KvofError(status)
        self._handle = handle
        self._fd = self._lib.queue_fd(handle)
        self._poller = select.poll()
        self._poller.register(self._fd, select.POLLIN)
        self._done = (_abi.Completion * 64)()

    def fileno(self) -> int:
        """The eventfd: readable when poll may find something. For poll, epoll and event loops."""
        return self._fd

    def submit(self, kind: int, keys: Iterable[str | bytes], buffers: Sequence[Any] | None = None, *, replace: bool = False,
               user: Any = None) -> Batch:
        """Starts a batch: one operation of a kind for each key.

        buffers, for GET and PUT, has for each key the memory: an object with a contiguous buffer (writable for GET), a Memory,
        or a list of those whose concatenation is the value. It must not be touched until the batch has ended.
        Arguments that make no sense raise TypeError, ValueError or BufferError. All else ends the batch: poll returns it.
        """
        batch = Batch(kind, [_encode(key) for key in keys], user)
        n = batch.count
        if buffers is not None and len(buffers) != n:
            raise ValueError(f"{n} keys and {len(buffers)} buffers")
        if buffers is None and kind in (Kind.GET, Kind.PUT):
            raise TypeError("get and put need buffers")
        blob = b"".join(batch.keys)
        at = ctypes.cast(ctypes.c_char_p(blob), c_void_p).value or 0
        batch._ops = ops = bytearray(n * _abi.OP.size)
        flags = _abi.REPLACE if replace else 0
        iovs: list[Memory] = []
        rows = []
        try:
            for i, key in enumerate(batch.keys):
                pieces, address, length = 0, 0, 0
                if buffers is not None:
                    buffer = buffers[i]
                    if isinstance(buffer, list):
                        pieces, address = len(buffer), len(iovs)  # where in iovs, for now
                        if pieces > _abi.MAX_IOV:
                            raise ValueError(f"{pieces} pieces; at most {_abi.MAX_IOV} are possible")
                        iovs.extend(self._memory(batch, piece) for piece in buffer)
                    else:
                        address, length = self._memory(batch, buffer)
                rows.append((pieces, len(key), at, address, length))
                at += len(key)
            batch._iovs = table = bytearray(len(iovs) * _abi.IOV.size)
            for i, piece in enumerate(iovs):
                _abi.IOV.pack_into(table, i * _abi.IOV.size, piece.address, piece.length)
            base = ctypes.addressof(ctypes.c_char.from_buffer(table)) if iovs else 0
            for i, (pieces, key_len, key_at, address, length) in enumerate(rows):
                if pieces:
                    address = base + address * _abi.IOV.size
                _abi.OP.pack_into(ops, i * _abi.OP.size, kind, flags, pieces, key_len, key_at, address, length, 0, Status.PENDING, 0, 0, 0)
        except BaseException:
            batch._finish()
            raise
        self._start(batch)
        return batch

    @staticmethod
    def _memory(batch: Batch, buffer: Any) -> Memory:
        if isinstance(buffer, Memory):
            return buffer
        pin = _Pin(buffer, writable=batch.kind == Kind.GET)
        batch._pins.append(pin)
        return pin.memory

    def _start(self, batch: Batch) -> None:
        with self._lock:
            status = Status.OK if batch.count else Status.INVALID
            if self._handle is None:
                status = Status.CANCELLED
            elif batch.count:
                number, self._next = self._next, self._next + 1
                b = _abi.Batch(
                    size=ctypes.sizeof(_abi.Batch), op_size=_abi.OP.size, count=batch.count, user_data=number,
                    ops=ctypes.addressof(ctypes.c_char.from_buffer(batch._ops)))
                self._batches[number] = batch
                if status := self._lib.submit(self._handle, byref(b)):
                    del self._batches[number]
            if status:
                batch._fail(status)
                self._failed.append(batch)
                if self._handle is not None:
                    os.eventfd_write(self._fd, 1)

    def poll(self) -> list[Batch]:
        """The batches that have ended since the last call. Never blocks."""
        with self._lock:
            ended, self._failed = self._failed, []
            if self._handle is None:
                return ended
            try:
                os.eventfd_read(self._fd)
            except BlockingIOError:
                pass
            while n := self._lib.poll(self._handle, self._done, len(self._done)):
                for c in self._done[:n]:
                    batch = self._batches.pop(c.user_data)
                    batch._end(c)
                    ended.append(batch)
            return ended

    def wait(self, timeout: float | None = None) -> list[Batch]:
        """Like poll, but waits for the first, at most timeout seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not (ended := self.poll()) and self._handle is not None:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            self._poller.poll(None if left is None else left * 1000)
        return ended

    @property
    def in_flight(self) -> int:
        """Batches that poll has not returned yet."""
        return len(self._batches) + len(self._failed)

    def _detach(self) -> None:
        """From here on nothing is submitted or polled; who waits wakes up."""
        with self._lock:
            self._handle = None
            os.eventfd_write(self._fd, 1)

    def _cancel(self) -> None:
        """Ends what was in flight. The library has let go of its memory."""
        with self._lock:
            for batch in self._batches.values():
                batch._fail(Status.CANCELLED)
            self._failed.extend(self._batches.values())
            self._batches.clear()


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where and how to connect: struct kvof_options. Times are in seconds; 0 is the library's default.

    targets: see kvof.h: "tcp://10.0.0.1/nqn.2026-11.dev.kvof:kv", "discover://10.0.0.1", several separated by commas.
    The scope (tenant, model, rank, group, salt) separates the keys of those who share a namespace.
    """

    targets: str
    host_nqn: str = ""
    tenant: str = ""
    model: str = ""
    rank: str = ""
    group: str = ""
    salt: str = ""
    timeout: float = 0
    lookup_timeout: float = 0
    connect_timeout: float = 0
    reconnect: float = 0
    keep_alive: float = 0
    io_queues: int = 0
    queue_depth: int = 0
    max_ops: int = 0
    hash_all: bool = False
    checksum: bool = True
    header_digest: bool = False
    data_digest: bool = False

    def _scope(self) -> _abi.Scope:
        return _abi.Scope(*(getattr(self, name).encode() for name in ("tenant", "model", "rank", "group", "salt")))

    def _struct(self, wait: bool) -> _abi.Options:
        o = _abi.Options(
            size=ctypes.sizeof(_abi.Options), targets=self.targets.encode(), host_nqn=self.host_nqn.encode() or None, scope=self._scope(),
            io_queues=self.io_queues, queue_depth=self.queue_depth, max_ops=self.max_ops)
        for name in ("timeout", "lookup_timeout", "connect_timeout", "reconnect", "keep_alive"):
            setattr(o, name + "_ms", round(getattr(self, name) * 1000))
        for flag, on in (
            (_abi.NOWAIT, not wait), (_abi.HASH_ALL, self.hash_all), (_abi.NO_CHECKSUM, not self.checksum),
            (_abi.HEADER_DIGEST, self.header_digest), (_abi.DATA_DIGEST, self.data_digest)):
            o.flags |= flag if on else 0
        return o


class Client:
    """Connections to the targets, and what most callers need of them: calls that block until they have an answer.

    Client("tcp://10.0.0.1/nqn.2026-11.dev.kvof:kv") or Client(Options(...)). Raises KvofError when nothing can be connected;
    with wait=False it connects in the background instead. After that no call raises because of a target: what cannot be had is
    a miss, within the time-outs of the options.
    """

    def __init__(self, options: Options | str, *, wait: bool = True):
        self.options = Options(targets=options) if isinstance(options, str) else options
        self._lib = _abi.library()
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._queues: list[Queue] = []  # all
        self._free: list[Queue] = []  # of the blocking calls, not in use just now
        self._calls = 0
        handle = c_void_p()
        if status := self._lib.open(byref(self.options._struct(wait)), byref(handle)):
            raise KvofError(status)
        self._handle = handle

    @classmethod
    def patient(cls, options: Options | str, log: Any = None) -> "Client":
        """A client that is there even if no target is: it then connects in the background. log gets a warning."""
        try:
            return cls(options)
        except KvofError as e:
            if e.status != Status.UNAVAILABLE:
                raise
            if log is not None:
                log.warning("kvof: %s. Going on without it; connecting in the background", e)
            return cls(options, wait=False)

    def queue(self, depth: int = 0) -> Queue:
        """A queue of one's own, for at most depth batches in flight (a power of two; 0 is 1024). It is closed with the client."""
        q = Queue(self, depth)
        with self._lock:
            self._queues.append(q)
        return q

    def call(self, kind: int, keys: Iterable[str | bytes], buffers: Sequence[Any] | None = None, *, replace: bool = False) -> Batch:
        """Runs a batch and waits for its end."""
        with self._lock:
            if self._handle is None:
                return Batch._failed(kind, keys, Status.CANCELLED)
            self._calls += 1
            q = self._free.pop() if self._free else None
        try:
            try:
                q = q or self.queue(16)
            except KvofError as e:  # after a fork, or out of file descriptors
                return Batch._failed(kind, keys, e.status)
            batch = q.submit(kind, keys, buffers, replace=replace)
            while not batch.done:
                q.wait()
            if q.in_flight:  # it failed at once
                q.poll()
            return batch
        finally:
            with self._lock:
                if q is not None:
                    self._free.append(q)
                self._calls -= 1
                self._idle.notify_all()

    def put(self, key: str | bytes, data: Any, *, replace: bool = False) -> bool:
        """Stores data; without replace only if the key is absent. True: the key is there now."""
        return self.call(Kind.PUT, [key], [data], replace=replace).ok == 1

    def get_into(self, key: str | bytes, buffer: Any) -> int | None:
        """Loads a value into a writable buffer. Its size in bytes, None for a miss. A larger value than the buffer is a miss."""
        batch = self.call(Kind.GET, [key], [buffer])
        return batch.sizes[0] if batch.ok else None

    def exists(self, keys: Sequence[str | bytes]) -> list[bool]:
        """For each key whether it is there; one round trip."""
        return self.call(Kind.EXIST, keys).hits() if keys else []

    def prefix(self, keys: Sequence[str | bytes]) -> int:
        """How many keys are there before the first that is not; one round trip."""
        return self.call(Kind.EXIST_PREFIX, keys).run if keys else 0

    def delete(self, key: str | bytes) -> bool:
        """True: the key was there, or the target does not tell."""
        return self.call(Kind.DELETE, [key]).ok == 1

    def register(self, buffer: Any, *, read: bool = True, write: bool = True) -> None:
        """Tells about memory that many operations will use: worth it over RDMA. The caller keeps it until unregister or close."""
        if isinstance(buffer, Memory):
            memory = buffer
        else:
            pin = _Pin(buffer, writable=write)
            memory = pin.memory
            pin.release()
        region = _abi.Region(
            size=ctypes.sizeof(_abi.Region), flags=(_abi.READ if read else 0) | (_abi.WRITE if write else 0), addr=memory.address,
            len=memory.length, dmabuf_fd=-1)
        if status := self._lib.register(self._handle, byref(region)):
            raise KvofError(status)

    def unregister(self, address: int) -> None:
        if status := self._lib.unregister(self._handle, address):
            raise KvofError(status)

    def counters(self) -> dict[str, int]:
        """What happened since the client was made: struct kvof_counters."""
        c = _abi.Counters(size=ctypes.sizeof(_abi.Counters))
        with self._lock:
            if self._handle is not None:
                self._lib.counters(self._handle, byref(c))
        return {name: getattr(c, name) for name, _ in c._fields_ if name != "size"}

    def describe(self) -> str:
        """Targets and paths as JSON, with the last error of each."""
        with self._lock:
            if self._handle is None:
                return "{}"
            size = self._lib.describe(self._handle, None, 0) + 1024
            text = ctypes.create_string_buffer(size)
            self._lib.describe(self._handle, text, size)
            return text.value.decode(errors="replace")

    def close(self) -> None:
        """Ends what is in flight, and the queues. A second time does nothing."""
        with self._lock:
            handle, self._handle = self._handle, None
            if handle is None:
                return
            while self._calls:  # they end within their time-outs
                self._idle.wait()
        for q in self._queues:
            q._detach()
        self._lib.close(handle)
        for q in self._queues:
            q._cancel()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NvmeKey(NamedTuple):
    """The key that stands for a caller's key on the target. digest is empty unless the key was hashed."""

    key: bytes
    digest: bytes


def nvme_key(key: str | bytes, options: Options | None = None) -> NvmeKey:
    """Where a value lies: kvof_key. Raises KvofError for a key that is empty or too long."""
    options = options or Options(targets="")
    raw = _encode(key)
    out = _abi.NvmeKey()
    if status := _abi.library().key(byref(options._scope()), _abi.HASH_ALL if options.hash_all else 0, raw, len(raw), byref(out)):
        raise KvofError(status)
    return NvmeKey(bytes(out.bytes[: out.len]), bytes(out.digest) if out.hashed else b"")
