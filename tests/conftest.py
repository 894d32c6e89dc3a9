"""Fixtures: the implementations under test."""

from __future__ import annotations

import importlib
import os
import signal
import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from types import ModuleType

import pytest

import fastserve
from children import FORK_BESIDE_THREADS
from fastserve import _backend, _core_py, _datagrams_py, _streams_py, limits
from support import LIMIT

if sys.version_info >= (3, 15):

    def pytest_configure(config: pytest.Config) -> None:
        """Let tests have threads when their forking servers fork: before, Python did not raise that warning."""
        config.addinivalue_line("filterwarnings", FORK_BESIDE_THREADS)


pytest_plugins = ["cli_support", "hub_support", "sockets_support"]

NO_EXTENSIONS = _backend.refused()

# Without the extension the tests of the C core would be missing from the run unnoticed.
if not NO_EXTENSIONS and fastserve.implementation != "c":
    raise pytest.UsageError("the extension is not built; set FASTSERVE_NO_EXTENSIONS=1 to test without it")

# A shell's "&" starts programs with SIGINT ignored, and their children inherit that, but not a handler: the programs
# that tests start are to heed Ctrl-C. At import, before any test has started one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# ThreadSanitizer has a thread of its own from the first one on that is started, which no test is to be blamed for.
threading.Thread(target=int).start()

# What each implementation puts into _backend.
TWINS: dict[str, dict[str, ModuleType | None]] = {
    "py": {"core": _core_py, "streams": _streams_py, "datagrams": _datagrams_py, "threads": None, "turns": None}
}
if not NO_EXTENSIONS:
    TWINS["c"] = {
        name: None if name == "turns" and _backend.FREE_THREADED else importlib.import_module(f"fastserve._{name}")
        for name in TWINS["py"]
    }


TASKS = "/proc/self/task"  # the threads that the kernel knows, on Linux


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """Wait until the threads that a test has started are gone.

    A thread that was joined may take a moment to leave the kernel, and a daemon to end: until then a fork in the
    next test would warn of it, and what the thread holds would count as the next test's.
    """
    if not os.path.isdir(TASKS):
        yield
        return
    before = len(os.listdir(TASKS))
    yield
    deadline = time.monotonic() + LIMIT
    while (left := len(os.listdir(TASKS))) > before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert left <= before, f"threads are left: {threading.enumerate()}"


@pytest.fixture
def deadlines_end_soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let no test wait for the thread that looks after deadlines."""
    monkeypatch.setattr(limits, "REST", 0.01)
    yield
    with limits.deadlines._changed:
        limits.deadlines._heap.clear()
        limits.deadlines._changed.notify()


@pytest.fixture(params=sorted(TWINS))
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test on the C core and on its Python twin."""
    _use(request.param, monkeypatch)
    return str(request.param)


# Files whose tests take their time, and whose Python twin is that of every version of Python: .ci/run tests it once.
ONE_PYTHON_TWIN = ("test_prefork.py", "test_drain.py", "test_stats.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the Python twin."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec and "py" in (callspec.params.get("impl"), callspec.params.get("module")):
            if not NO_EXTENSIONS:
                item.add_marker(pytest.mark.python_twin)
            if item.path.name in ONE_PYTHON_TWIN:
                item.add_marker(pytest.mark.once)


@pytest.fixture
def core(impl: str) -> ModuleType | None:
    """The core of ``impl``, for tests of the twins' contract."""
    return TWINS[impl]["core"]


@pytest.fixture(params=["stdlib", *sorted(TWINS)])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``socketserver``, and ``fastserve`` on each core: one test body for all."""
    if request.param == "stdlib":
        return socketserver
    _use(request.param, monkeypatch)
    return fastserve


def _use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for attribute, twin in TWINS[name].items():
        monkeypatch.setattr(_backend, attribute, twin)
    monkeypatch.setattr(_backend, "implementation", name)
    monkeypatch.setattr(fastserve, "_SocketWriter", _backend.streams._SocketWriter)
