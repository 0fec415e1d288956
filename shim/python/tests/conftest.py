import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
BIN = ROOT / "bin"
PACKAGE = str(ROOT / "shim/python")
NQN = "nqn.2026-11.dev.kvof:kv"

# Also for the processes that tests start.
os.environ["KVOF_LIBRARY"] = str(BIN / "libkvof.so")
os.environ["PYTHONPATH"] = PACKAGE
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
sys.path.insert(0, PACKAGE)


class Server:
    """A kvof target with one Key Value namespace. It can be killed, stopped and started again, with the values it had."""

    def __init__(self, folder: Path, size: str = "1GiB", device: str = "file", eviction: str = "clock"):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"tcp://127.0.0.1:{self.port}/{NQN}"
        self._folder = folder
        self._config = folder / "kvof.toml"
        where = f'path = "{folder}/kv.img"\n' if device == "file" else ""
        self._config.write_text(f"""
log_level = "warn"
[memory]
arena = "64MiB"
[management]
socket = "{folder}/kvof.sock"
[[listener]]
transport = "tcp"
address = "127.0.0.1:{self.port}"
[[subsystem]]
nqn = "{NQN}"
allow_any_host = true
[[subsystem.namespace]]
nsid = 1
type = "kv"
device = "{device}"
size = "{size}"
eviction = "{eviction}"
{where}""")
        self.start()

    def start(self) -> None:
        log = open(self._folder / "kvof.log", "ab")
        self._process = subprocess.Popen([BIN / "kvof", "serve", "--config", self._config], stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self._process.poll() is None and time.monotonic() < deadline, (self._folder / "kvof.log").read_text()
                time.sleep(0.05)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def hang(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        self.resume()
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()


@pytest.fixture(scope="session")
def target(tmp_path_factory):
    """A target in memory for all tests that do not harm it: they use keys of their own."""
    server = Server(tmp_path_factory.mktemp("target"), size="2GiB", device="memory")
    yield server
    server.stop()


@pytest.fixture
def victim(tmp_path):
    """A target that a test may kill."""
    server = Server(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def unique(request) -> str:
    """What begins the keys of a test."""
    return f"{request.node.nodeid}@{time.time_ns()}@"


def eventually(check, seconds: float = 60):
    """Waits until check is true; what it returned."""
    deadline = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)
    return value
