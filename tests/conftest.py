"""Fixtures: the implementations under test."""

from __future__ import annotations

import importlib
import socketserver
from types import ModuleType

import pytest

import fastserve
from fastserve import _backend, _core_py, _datagrams_py, _streams_py

NO_EXTENSIONS = _backend.refused()

# Without the extension the tests of the C core would be missing from the run unnoticed.
if not NO_EXTENSIONS and fastserve.implementation != "c":
    raise pytest.UsageError("the extension is not built; set FASTSERVE_NO_EXTENSIONS=1 to test without it")

# What each implementation puts into _backend.
TWINS: dict[str, dict[str, ModuleType | None]] = {
    "py": {"core": _core_py, "streams": _streams_py, "datagrams": _datagrams_py, "threads": None}
}
if not NO_EXTENSIONS:
    TWINS["c"] = {name: importlib.import_module(f"fastserve._{name}") for name in TWINS["py"]}


@pytest.fixture(params=sorted(TWINS))
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test on the C core and on its Python twin."""
    _use(request.param, monkeypatch)
    return str(request.param)


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
