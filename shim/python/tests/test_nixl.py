"""The NIXL plugin, loaded by the real agent of the wheel."""

import ctypes
import os
import random
import re
import subprocess
import threading
import time
from pathlib import Path

import pytest
from conftest import BIN, eventually

nixl = pytest.importorskip("nixl._api")

os.environ["NIXL_PLUGIN_DIR"] = str(BIN / "nixl")
MIB = 1 << 20


class Agent:
    """An agent with one backend of ours, and memory to move."""

    def __init__(self, backend="KVOF", memory=64 * MIB, **params):
        self.backend = backend
        self.name = f"agent{time.time_ns()}"
        self.agent = nixl.nixl_agent(self.name, nixl.nixl_agent_config(backends=[], capture_telemetry=True))
        self.agent.create_backend(backend, {k: str(v) for k, v in params.items()})
        self.memory = bytearray(memory)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.registered = self.agent.register_memory([(self.base, memory, 0, "")], "DRAM", backends=[backend])

    def objects(self, objects):
        """objects: (device ID, name, length)."""
        return self.agent.register_memory([(0, length, dev, name) for dev, name, length in objects], "OBJ", backends=[self.backend])

    def query(self, names):
        found = self.agent.query_memory([(0, 1, 0, name) for name in names], self.backend, "OBJ")
        return [f is not None for f in found]

    def start(self, op, local, remote):
        """local: (offset in memory, length); remote: (offset in object, length, device ID)."""
        a = self.agent
        handle = a.initialize_xfer(
            op, a.get_xfer_descs([(self.base + offset, length, 0) for offset, length in local], "DRAM"), a.get_xfer_descs(remote, "OBJ"),
            self.name, backends=[self.backend])
        return handle, a.transfer(handle)

    def finish(self, handle, state):
        deadline = time.monotonic() + 120
        try:
            while state == "PROC":
                assert time.monotonic() < deadline
                state = self.agent.check_xfer_state(handle)
                time.sleep(0)
        except Exception as e:  # NIXL turns statuses into exceptions
            state = type(e).__name__
        self.agent.release_xfer_handle(handle)
        return state

    def run(self, op, local, remote):
        try:
            handle, state = self.start(op, local, remote)
        except Exception as e:
            return type(e).__name__
        return self.finish(handle, state)


def test_the_virtual_table_is_the_agent_s():
    """The order of the virtual functions in abi.hpp is that of a plugin of the wheel, as its relocations show it."""
    site = Path(nixl.__file__).resolve().parents[1]
    plugin = next(p for p in site.glob("**/libplugin_POSIX.so"))
    symbols = subprocess.run(["nm", "-DC", "--defined-only", plugin], capture_output=True, text=True, check=True).stdout
    table = int(re.search(r"^([0-9a-f]+) V vtable for nixlPosixEngine$", symbols, re.M)[1], 16)
    relocations = subprocess.run(["readelf", "-rW", plugin], capture_output=True, text=True, check=True).stdout
    relocations = subprocess.run(["c++filt"], input=relocations, capture_output=True, text=True, check=True).stdout
    slots = {}
    for line in relocations.splitlines():
        if m := re.match(r"([0-9a-f]{16}) .*R_\S+\s+[0-9a-f]{16} (?:\w+::)*~?(\w+)(?:\[.*?\])?\(", line):
            slots[int(m[1], 16)] = m[2]
    theirs = [slots.get(table + 16 + 8 * i) for i in range(27)]
    source = (BIN.parent / "shim/nixl/abi.hpp").read_text()
    engine = source[source.index("class Engine {") : source.index("struct Plugin")]
    ours = re.findall(r"^\s*virtual [\w ]*?(?:\w+ )?~?(\w+)\(", engine, re.M)
    assert ours[0] == "Engine"
    assert theirs[2:] == ours[1:]  # the destructor has two places


def test_plugin_says_what_it_can():
    agent = nixl.nixl_agent("says", nixl.nixl_agent_config(backends=[]))
    assert {"KVOF", "OBJ"} <= set(agent.get_plugin_list())
    assert {"DRAM_SEG", "OBJ_SEG"} <= set(agent.get_plugin_mem_types("KVOF"))
    assert "targets" in agent.get_plugin_params("KVOF")
    with pytest.raises(Exception):
        agent.create_backend("KVOF", {"targets": "nonsense://"})
    with pytest.raises(Exception):
        agent.create_backend("KVOF", {})


def test_write_query_read(target, unique):
    a = Agent(targets=target.url, tenant=unique)
    a.memory[: 16 * MIB] = random.Random(1).randbytes(16 * MIB)
    # Names of all kinds: an extended key, a raw key, 32 hexadecimal digits, and none: the device ID.
    names = [f"{unique}/a/long/name", "short", "00112233445566778899aabbccddeeff", ""]
    objs = a.objects([(100 + i, name, 4 * MIB) for i, name in enumerate(names)])
    assert a.query(names[:3]) == [False] * 3
    # Two descriptors an object, in mixed order.
    pieces = [(i, half) for half in (1, 0) for i in range(4)]
    local = [((i * 4 + half * 2) * MIB, 2 * MIB) for i, half in pieces]
    remote = [(half * 2 * MIB, 2 * MIB, 100 + i) for i, half in pieces]
    assert a.run("WRITE", local, remote) == "DONE"
    assert a.query([*names[:3], "nothing", "103"]) == [True, True, True, False, True]  # the one without a name is "103"
    back = [(16 * MIB + offset, length) for offset, length in local]
    assert a.run("READ", back, remote) == "DONE"
    assert a.memory[16 * MIB : 32 * MIB] == a.memory[: 16 * MIB]
    # WRITE replaces.
    a.memory[: 4 * MIB] = bytes(4 * MIB)
    assert a.run("WRITE", [(0, 4 * MIB)], [(0, 4 * MIB, 100)]) == "DONE"
    assert a.run("READ", [(16 * MIB, 4 * MIB)], [(0, 4 * MIB, 100)]) == "DONE"
    assert a.memory[16 * MIB : 20 * MIB] == bytes(4 * MIB)
    a.agent.deregister_memory(objs)
    a.agent.deregister_memory(a.registered)


def test_errors(target, unique):
    a = Agent(targets=target.url, tenant=unique)
    a.objects([(1, f"{unique}1", MIB), (2, f"{unique}2", MIB), (3, f"{unique}3", 2 * MIB)])
    assert a.run("READ", [(0, MIB)], [(0, MIB, 1)]) not in ("DONE", "PROC")  # a miss
    assert a.run("WRITE", [(0, MIB)], [(0, MIB, 1)]) == "DONE"
    assert a.run("READ", [(0, MIB), (MIB, MIB)], [(0, MIB, 1), (0, MIB, 2)]) not in ("DONE", "PROC")  # one of two
    assert a.run("WRITE", [(0, MIB)], [(MIB, MIB, 3)]) not in ("DONE", "PROC")  # not from the beginning
    assert a.run("READ", [(0, MIB // 2)], [(0, MIB // 2, 1)]) not in ("DONE", "PROC")  # a part of a value
    assert a.run("WRITE", [(0, MIB)], [(0, MIB, 3)]) == "DONE"
    assert a.run("READ", [(0, 2 * MIB)], [(0, 2 * MIB, 3)]) not in ("DONE", "PROC")  # more than there is
    assert a.run("READ", [(0, MIB)], [(0, MIB, 1)]) == "DONE"  # and all is well


def test_a_handle_can_be_posted_again(target, unique):
    a = Agent(targets=target.url, tenant=unique)
    a.objects([(1, unique, MIB)])
    handle, state = a.start("WRITE", [(0, MIB)], [(0, MIB, 1)])
    for i in range(20):
        while state == "PROC":
            state = a.agent.check_xfer_state(handle)
        assert state == "DONE"
        a.memory[0] = i
        state = a.agent.transfer(handle)
    assert a.finish(handle, state) == "DONE"
    assert a.run("READ", [(MIB, MIB)], [(0, MIB, 1)]) == "DONE"
    assert a.memory[MIB] == 19


def test_large_batch(target, unique):
    """20,000 descriptors of 2,500 objects in one transfer."""
    a = Agent(targets=target.url, tenant=unique, memory=160 * MIB)
    n, piece = 2500, 4096
    size = 8 * piece
    a.memory[: n * size] = random.Random(2).randbytes(n * size)
    a.objects([(i, f"{unique}{i}", size) for i in range(n)])
    places = [(i, j) for j in range(8) for i in range(n)]
    local = [(i * size + j * piece, piece) for i, j in places]
    remote = [(j * piece, piece, i) for i, j in places]
    assert a.run("WRITE", local, remote) == "DONE"
    assert all(a.query([f"{unique}{i}" for i in range(n)]))
    assert a.run("READ", [(80 * MIB + offset, length) for offset, length in local], remote) == "DONE"
    assert a.memory[80 * MIB : 80 * MIB + n * size] == a.memory[: n * size]


def test_many_threads(target, unique):
    a = Agent(targets=target.url, tenant=unique)
    n, size = 8, MIB
    a.memory[: n * size] = os.urandom(n * size)
    a.objects([(i * 100 + j, f"{unique}{i}/{j}", size) for i in range(n) for j in range(10)])
    states = []

    def work(i):
        for j in range(10):
            dev = i * 100 + j
            states.append(a.run("WRITE", [(i * size, size)], [(0, size, dev)]))
            states.append(a.run("READ", [((n + i) * size, size)], [(0, size, dev)]))
            states.append("DONE" if a.query([f"{unique}{i}/{j}"]) == [True] else "lost")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert states == ["DONE"] * (n * 30)
    assert a.memory[n * size : 2 * n * size] == a.memory[: n * size]


def test_obj_alias(target, unique):
    """What callers that ask for OBJ by name give is understood: an endpoint and a bucket."""
    a = Agent(backend="OBJ", endpoint_override=target.url, bucket=unique, scheme="http", num_threads=4)
    a.objects([(1, f"{unique}/file.bin", MIB)])
    assert a.run("WRITE", [(0, MIB)], [(0, MIB, 1)]) == "DONE"
    assert a.query([f"{unique}/file.bin"]) == [True]


def test_memos_key_rule(target, unique):
    """DOCA Memos takes hexadecimal names for the key's bytes: who follows it shares values with who writes the bytes."""
    import kvof

    a = Agent(targets=target.url, key_rule="memos")
    raw = os.urandom(8)
    a.objects([(1, raw.hex(), MIB)])
    assert a.run("WRITE", [(0, MIB)], [(0, MIB, 1)]) == "DONE"
    with kvof.Client(target.url) as c:
        assert c.exists([raw, raw.hex()]) == [True, False]


def test_dead_target(victim, unique):
    a = Agent(targets=victim.url, tenant=unique, timeout_ms=1000, lookup_timeout_ms=300, reconnect_ms=100)
    a.objects([(1, unique, MIB)])
    assert a.run("WRITE", [(0, MIB)], [(0, MIB, 1)]) == "DONE"
    victim.kill()
    start = time.monotonic()
    assert a.query([unique]) == [False]
    assert a.run("READ", [(0, MIB)], [(0, MIB, 1)]) not in ("DONE", "PROC")
    assert time.monotonic() - start < 10
    victim.start()
    eventually(lambda: a.query([unique]) == [True])
    assert a.run("READ", [(0, MIB)], [(0, MIB, 1)]) == "DONE"


def test_counters(target, unique):
    """What happened is asked by a name of its own."""
    a = Agent(targets=target.url, tenant=unique)
    a.objects([(1, unique, MIB)])
    assert a.run("WRITE", [(0, MIB)], [(0, MIB, 1)]) == "DONE" and a.query([unique, unique + "no"]) == [True, False]
    (counters,) = a.agent.query_memory([(0, 0, 0, "kvof:counters")], "KVOF", "OBJ")
    assert (counters["puts"], counters["exist_hits"], counters["targets_up"], counters["unavailable"]) == ("1", "1", "1", "0")


def test_release_in_flight(victim, unique):
    """A handle may be given up while the target hangs; nobody uses the memory after it."""
    a = Agent(targets=victim.url, tenant=unique, timeout_ms=1000)
    a.objects([(1, unique, MIB)])
    victim.hang()
    handle, state = a.start("WRITE", [(0, MIB)], [(0, MIB, 1)])
    assert state == "PROC"
    start = time.monotonic()
    a.agent.release_xfer_handle(handle)
    assert time.monotonic() - start < 10
