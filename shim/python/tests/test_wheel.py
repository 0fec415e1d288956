"""The wheel, as a user installs it: nothing of the source tree, the library from the package."""

import subprocess
import sys
import venv

from conftest import BIN

PROGRAM = """
import sys, kvof
with kvof.Client(sys.argv[1]) as client:
    buffer = bytearray(5)
    assert client.put(sys.argv[2], b"value") and client.get_into(sys.argv[2], buffer) == 5 and buffer == b"value"
print(kvof.__file__)
"""


def test_wheel(target, unique, tmp_path):
    (wheel,) = BIN.glob("kvof-*.whl")
    venv.create(tmp_path, with_pip=False, symlinks=True)
    python = tmp_path / "bin/python"
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", wheel], check=True)
    out = subprocess.run([python, "-c", PROGRAM, target.url, unique], env={}, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert str(tmp_path) in out.stdout
