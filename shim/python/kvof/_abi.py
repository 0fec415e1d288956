"""kvof.h in ctypes: structures, constants and the functions of libkvof.so. client.py is what people use."""

import ctypes
import os
import struct
from ctypes import POINTER, c_char_p, c_int, c_int32, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from enum import IntEnum
from functools import cache
from pathlib import Path

ABI = 1


class Status(IntEnum):
    """How an operation ended; enum kvof_status. OK and EXISTS are success."""

    OK = 0
    EXISTS = 1
    MISS = 2
    TRUNCATED = 3
    UNAVAILABLE = 4
    TIMEOUT = 5
    FULL = 6
    TOO_LARGE = 7
    READ_ONLY = 8
    IO = 9
    CANCELLED = 10
    INVALID = 11
    AGAIN = 12
    NO_MEMORY = 13
    UNSUPPORTED = 14
    FORKED = 15
    PENDING = 255


class Kind(IntEnum):
    """What an operation does; enum kvof_kind."""

    GET = 1
    PUT = 2
    EXIST = 3
    DELETE = 4
    EXIST_PREFIX = 5


NOWAIT, HASH_ALL, NO_CHECKSUM, HEADER_DIGEST, DATA_DIGEST = 0x01, 0x02, 0x04, 0x08, 0x10
READ, WRITE = 1, 2
REPLACE = 1
MAX_IOV = 1024

# struct kvof_op and struct kvof_iov as the struct module packs them: one call fills one, where ctypes needs one for each member.
# kind, flags, iov_count, key_len, key, data, len, result, status, detail, user, reserved
OP = struct.Struct("<BBHIQQQQiIQQ")
OP_RESULT, OP_STATUS = 32, 40
IOV = struct.Struct("<QQ")
assert OP.size == 64 and IOV.size == 16


class Scope(ctypes.Structure):
    _fields_ = [(name, c_char_p) for name in ("tenant", "model", "rank", "group", "salt")]


class NvmeKey(ctypes.Structure):
    _fields_ = [
        ("bytes", c_uint8 * 16),
        ("len", c_uint8),
        ("hashed", c_uint8),
        ("reserved", c_uint8 * 6),
        ("digest", c_uint8 * 32),
    ]


class Options(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32),
        ("flags", c_uint32),
        ("targets", c_char_p),
        ("host_nqn", c_char_p),
        ("scope", Scope),
        *((name, c_uint32) for name in (
            "timeout_ms", "lookup_timeout_ms", "connect_timeout_ms", "reconnect_ms", "keep_alive_ms", "io_queues",
            "queue_depth", "max_ops")),
        ("reserved", c_uint64 * 2),
    ]


class Region(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32),
        ("flags", c_uint32),
        ("addr", c_void_p),
        ("len", c_uint64),
        ("dmabuf_fd", c_int32),
        ("dmabuf", c_uint32),
        ("dmabuf_offset", c_uint64),
    ]


class Batch(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32),
        ("op_size", c_uint32),
        ("ops", c_void_p),
        ("count", c_uint32),
        ("flags", c_uint32),
        ("user_data", c_uint64),
    ]


class Completion(ctypes.Structure):
    _fields_ = [
        ("user_data", c_uint64),
        ("bytes", c_uint64),
        ("count", c_uint32),
        ("ok", c_uint32),
        ("run", c_uint32),
        ("status", c_int32),
        ("reserved", c_uint64),
    ]


class Counters(ctypes.Structure):
    _fields_ = [
        *((name, c_uint32) for name in ("size", "targets", "targets_up", "paths", "paths_up", "in_flight")),
        *((name, c_uint64) for name in (
            "get_hits", "get_misses", "get_bytes", "puts", "put_exists", "put_bytes", "exist_hits", "exist_misses", "deletes",
            "mismatches", "truncated", "unavailable", "timeouts", "full", "errors", "cancelled", "connects", "disconnects",
            "connect_failures", "retries")),
    ]


assert [ctypes.sizeof(t) for t in (Scope, NvmeKey, Options, Region, Batch, Completion, Counters)] == [40, 56, 112, 40, 32, 40, 184]


def _path() -> str:
    """KVOF_LIBRARY, else the library inside the package, else the system's."""
    if path := os.environ.get("KVOF_LIBRARY"):
        return path
    packaged = Path(__file__).with_name("libkvof.so")
    return str(packaged) if packaged.exists() else "libkvof.so"


class Library:
    """The functions. Those that never block keep the interpreter's lock: taking it back would cost more than they do."""

    def __init__(self, path: str):
        blocking, quick = ctypes.CDLL(path), ctypes.PyDLL(path)
        for lib, name, result, *arguments in (
            (quick, "kvof_abi", c_uint32),
            (quick, "kvof_version", c_char_p),
            (quick, "kvof_last_error", c_char_p),
            (quick, "kvof_key", c_int, POINTER(Scope), c_uint32, c_char_p, c_uint32, POINTER(NvmeKey)),
            (quick, "kvof_submit", c_int, c_void_p, POINTER(Batch)),
            (quick, "kvof_poll", c_uint32, c_void_p, POINTER(Completion), c_uint32),
            (quick, "kvof_queue_fd", c_int, c_void_p),
            (quick, "kvof_counters", c_int, c_void_p, POINTER(Counters)),
            (blocking, "kvof_describe", c_size_t, c_void_p, c_char_p, c_size_t),
            (blocking, "kvof_open", c_int, POINTER(Options), POINTER(c_void_p)),
            (blocking, "kvof_close", None, c_void_p),
            (blocking, "kvof_register", c_int, c_void_p, POINTER(Region)),
            (blocking, "kvof_unregister", c_int, c_void_p, c_void_p),
            (blocking, "kvof_queue_open", c_int, c_void_p, c_uint32, POINTER(c_void_p)),
            (blocking, "kvof_queue_close", None, c_void_p),
        ):
            function = lib[name]
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("kvof_"), function)
        if self.abi() != ABI:
            raise ImportError(f"{path} has version {self.abi()} of the interface, this package needs {ABI}")


@cache
def library() -> Library:
    """Loads the library at the first use and not before: it does not survive a fork of its process."""
    return Library(_path())
