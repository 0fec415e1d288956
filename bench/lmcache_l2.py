#!/usr/bin/env python3
"""LMCache's own `bench l2` with the kvof connector and with a peer, in turn: A B A B.

    make build shim
    $(shim/python/tests/venv.sh) bench/lmcache_l2.py redis            # LMCache's Redis adapter
    MOONCAKE=folder $(shim/python/tests/venv.sh) bench/lmcache_l2.py mooncake

The folder is one that pip install --no-deps --target=folder mooncake-transfer-engine-non-cuda has made. A second argument is how many pairs, 3 if there is none.

16 MiB values, 80 of them in a batch, the server on core 0 and LMCache on core 1, over loopback TCP; every run with a fresh server in memory,
all of which is written once before: the first touch of memory is dear in virtual machines.
Prints Markdown for RESULTS.md.
"""

import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NQN = "nqn.2026-11.dev.kvof:kv"
os.environ |= {"KVOF_LIBRARY": str(ROOT / "bin/libkvof.so"), "PYTHONPATH": str(ROOT / "shim/python")}
sys.path.insert(0, str(ROOT / "shim/python"))

WARMUP, ROUNDS, KEYS, KIB = 1, 2, 80, 16384
VALUE = bytes(16 << 20)
NEEDED = (WARMUP + ROUNDS) * KEYS * KIB * 1024


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def kvof(folder: str, port: int):
    config = Path(folder, "kvof.toml")
    config.write_text(f"""
log_level = "error"
[memory]
arena = "128MiB"
[management]
socket = "{folder}/kvof.sock"
[[listener]]
transport = "tcp"
address = "127.0.0.1:{port}"
[[subsystem]]
nqn = "{NQN}"
allow_any_host = true
[[subsystem.namespace]]
nsid = 1
type = "kv"
device = "memory"
size = "{NEEDED * 5 // 4 >> 20}MiB"
""")
    spec = {
        "type": "native_plugin", "module_path": "kvof.lmcache", "class_name": "Connector",
        "adapter_params": {"targets": f"tcp://127.0.0.1:{port}/{NQN}", "timeout": 60}}

    def warm():
        import kvof

        with kvof.Client(kvof.Options(targets=spec["adapter_params"]["targets"], timeout=60)) as client:
            keys = [f"warm{i}" for i in range(NEEDED * 5 // 4 // len(VALUE))]
            for key in keys:
                client.put(key, VALUE)
            for key in keys:
                client.delete(key)

    return [ROOT / "bin/kvof", "serve", "--config", config], spec, warm


def redis(folder: str, port: int):
    server = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", folder]

    def warm():
        from redis import Redis

        client = Redis(port=port)
        for i in range(NEEDED * 5 // 4 // len(VALUE)):
            client.set(f"warm{i}", VALUE)
        client.flushall(asynchronous=False)

    return server, {"type": "resp", "host": "127.0.0.1", "port": port}, warm


def mooncake(folder: str, port: int):
    """Its master, and a client that lends its memory, touched when it is registered."""
    at, client = os.environ["MOONCAKE"], free_port()
    os.environ["PYTHONPATH"] += f":{at}:{ROOT / 'bench'}"
    server = (
        f"{at}/mooncake/mooncake_master --rpc_port={port} --enable_http_metadata_server=false & sleep 1; exec {at}/mooncake/mooncake_client --host=127.0.0.1 --port={client} "
        f"--protocol=tcp --metadata_server=P2PHANDSHAKE --master_server_address=127.0.0.1:{port} --global_segment_size='{(NEEDED * 5 // 4 >> 30) + 1} GB'")
    spec = {
        "type": "native_plugin", "module_path": "mooncake_connector", "class_name": "Connector",
        "adapter_params": {"master": f"127.0.0.1:{port}", "host": f"127.0.0.1:{free_port()}"}}

    def warm():
        subprocess.run(["taskset", "-c", "1", sys.executable, "-c", WARM_MOONCAKE, spec["adapter_params"]["master"], str(NEEDED * 9 // 8 // len(VALUE))], check=True)

    return ["sh", "-c", server], spec, warm


WARM_MOONCAKE = """
import ctypes, sys, time
from mooncake.store import MooncakeDistributedStore
time.sleep(5)
store, value = MooncakeDistributedStore(), bytearray(16 << 20)
assert store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 64 << 20, "tcp", "", sys.argv[1]) == 0
at = ctypes.addressof(ctypes.c_char.from_buffer(value))
store.register_buffer(at, len(value))
for i in range(int(sys.argv[2])):
    assert store.put_from(f"warm{i}", at, len(value)) == 0
time.sleep(12)  # leases
assert store.remove_all() >= 0
store.close()
"""


def run(peer) -> dict[str, float]:
    """MB/s of Store and Load, and ms of a Lookup of 80 keys."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        command, spec, warm = peer(folder, port)
        server = subprocess.Popen(
            ["taskset", "-c", "0", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, env=os.environ | {"MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1"})  # redis keeps what it has freed
        try:
            for _ in range(200):
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    time.sleep(0.05)
            warm()
            out = subprocess.run(
                ["taskset", "-c", "1", sys.executable, "-m", "lmcache.cli.main", "bench", "l2", "--l2-adapter", json.dumps(spec), "--num-keys", str(KEYS),
                 "--data-size-kb", str(KIB), "--rounds", str(ROUNDS), "--warmup-rounds", str(WARMUP), "--lookup-max-hit-rate", "1"],
                capture_output=True, text=True, check=True).stdout
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    result = {}
    for name, unit in (("Store", "Throughput avg (MB/s)"), ("Load", "Throughput avg (MB/s)"), ("Lookup", "Duration p50 (ms)")):
        section = out[re.search(rf"^-+ {name} -+$", out, re.M).end() :]
        if int(re.search(r"Total success: +(\d+)", section)[1]) != ROUNDS * KEYS:
            sys.exit(f"{peer.__name__}: {name} failed\n{out}")
        result[name] = float(re.search(re.escape(unit) + r": +([\d.]+)", section)[1])
    return result


def main() -> None:
    peers = {"kvof": kvof} | {"redis": {"LMCache's Redis adapter, redis 7.0": redis}, "mooncake": {"Mooncake's store over TCP": mooncake}}[sys.argv[1]]
    results = {name: [] for name in peers}
    for i in range(int(sys.argv[2]) if len(sys.argv) > 2 else 3):
        for name, peer in peers.items():
            results[name].append(run(peer))
            print(i, name, results[name][-1], file=sys.stderr, flush=True)
    print("| | Store MB/s (min-max) | Load MB/s (min-max) | Lookup of 80 keys, ms |\n|---|---|---|---|")
    for name, runs in results.items():
        cells = [f"{statistics.median(r[op] for r in runs):.0f} ({min(r[op] for r in runs):.0f}-{max(r[op] for r in runs):.0f})" for op in ("Store", "Load")]
        print(f"| {name} | {' | '.join(cells)} | {statistics.median(r['Lookup'] for r in runs):.2f} |")
    print("\n| MB/s, by pair | median | min | max | wanted |\n|---|---|---|---|---|")
    a, b = results.values()
    for op in ("Store", "Load"):
        ratios = [x[op] / y[op] for x, y in zip(a, b)]
        print(f"| {op}, kvof / {sys.argv[1]} | **{statistics.median(ratios):.2f}** | {min(ratios):.2f} | {max(ratios):.2f} | more than 1.0 |")


main()
