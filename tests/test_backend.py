"""The choice between the C core and its Python twin."""

from __future__ import annotations

import importlib.machinery
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastserve
from conftest import TWINS
from fastserve import _backend

ROOT = Path(__file__).parent.parent
PACKAGE = Path(fastserve.__file__).parent
needs_c = pytest.mark.skipif("c" not in TWINS, reason="the extension is not under test: FASTSERVE_NO_EXTENSIONS is set")
PRINT = "import fastserve; print(fastserve.implementation, fastserve._backend.core.__name__)"


def run(code: str, no_extensions: str | None = None, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "FASTSERVE_NO_EXTENSIONS"}
    if no_extensions is not None:
        environment["FASTSERVE_NO_EXTENSIONS"] = no_extensions
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with the package, without its extensions."""
    shutil.copytree(PACKAGE, tmp_path / "fastserve", ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.c"))
    return tmp_path


def finder(raised: str) -> str:
    """Return code after which the import of the extension raises."""
    return (
        "import sys\n"
        "class Finder:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        f"        if name == 'fastserve._core': raise {raised}\n"
        "sys.meta_path.insert(0, Finder)\n"
    )


@needs_c
@pytest.mark.parametrize("value", [None, "", "0"])
def test_the_extension_is_used_where_it_was_built(value: str | None) -> None:
    result = run(PRINT, value)
    assert result.stdout == "c fastserve._core\n", result.stderr


def test_the_environment_selects_the_python_twin() -> None:
    result = run(PRINT, "1")
    assert result.stdout == "py fastserve._core_py\n", result.stderr


def test_without_the_extension_the_python_twin_is_used(copy: Path) -> None:
    result = run(PRINT, path=copy)
    assert result.stdout == "py fastserve._core_py\n", result.stderr
    result = run(finder("ModuleNotFoundError('absent', name='fastserve._core')") + PRINT)
    assert result.stdout == "py fastserve._core_py\n", result.stderr


def test_an_extension_file_that_does_not_load_raises(copy: Path) -> None:
    (copy / "fastserve" / f"_core{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"not a shared object")
    result = run(PRINT, path=copy)
    assert result.returncode == 1 and result.stdout == ""
    assert "ImportError: " in result.stderr.splitlines()[-1]
    assert run(PRINT, "1", copy).stdout == "py fastserve._core_py\n"


@pytest.mark.parametrize(
    "raised", ["ImportError('undefined symbol')", "ModuleNotFoundError('x', name='another')", "OSError('broken')"]
)
def test_an_extension_that_fails_raises(raised: str) -> None:
    result = run(finder(raised) + PRINT)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith(raised.split("(")[0])


def test_nothing_is_monkey_patched_normally() -> None:
    assert _backend.monkey_patched() is False


@pytest.mark.alone
def test_a_build_that_refuses_extensions_has_none_and_fits_every_platform(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77")
    if not (ROOT / "setup.py").exists():
        pytest.skip("the sources of the package are not here")
    for name in ("pyproject.toml", "setup.py", "build_backend.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__"))
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", "wheels"],
        cwd=tmp_path,
        env=os.environ | {"FASTSERVE_NO_EXTENSIONS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "fastserve/_core_py.py" in names and "fastserve/py.typed" in names
    assert not [name for name in names if name.endswith((".so", ".c", ".h", ".pyx", ".pxd", ".pxi"))]


SUBINTERPRETER = """
try:
    import _interpreters as interpreters
    interpreter = interpreters.create("legacy")
except ModuleNotFoundError:
    import _xxsubinterpreters as interpreters
    interpreter = interpreters.create(isolated=False)
import fastserve
failure = interpreters.run_string(interpreter, '''
import socket, threading
import fastserve
class Echo(fastserve.StreamRequestHandler):
    def handle(self):
        self.wfile.write(self.rfile.readline())
with fastserve.TCPServer(("127.0.0.1", 0), Echo) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with socket.create_connection(server.server_address) as client:
        client.sendall(b"x\\\\n")
        assert client.recv(10) == b"x\\\\n"
    server.shutdown()
    thread.join()
print(fastserve.implementation, flush=True)
''')
assert failure is None, failure
"""


def test_a_subinterpreter_uses_the_twin_and_serves() -> None:
    result = run(SUBINTERPRETER)
    assert result.stdout == "py\n", result.stderr


HOOKS = """
import os, socket
registered = set()
os.register_at_fork = lambda **hooks: registered.update(hook.__module__ for hook in hooks.values())
import fastserve
print(sorted(registered & {"fastserve._loop", "fastserve._threads", "fastserve.workers._pool"}))
with fastserve.ThreadingTCPServer(("127.0.0.1", 0), lambda request, address, server: server.shutdown()) as server:
    with socket.create_connection(server.server_address):
        server.serve_forever()
print(sorted(registered & {"fastserve._loop", "fastserve._threads", "fastserve.workers._pool"}))
"""


@pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="this platform has no fork")
@pytest.mark.parametrize("no_extensions", [pytest.param("0", marks=needs_c), "1"])
def test_a_fork_calls_no_hook_of_a_loop_or_a_thread_before_there_is_one(no_extensions: str) -> None:
    result = run(HOOKS, no_extensions)
    there_then = ["fastserve._loop", "fastserve._threads"] if no_extensions == "0" else ["fastserve._loop"]
    assert result.stdout.splitlines() == ["[]", str(there_then)], result.stderr
