"""Fixtures: the implementations under test."""

from __future__ import annotations

import importlib
import socketserver
from types import ModuleType

import pytest

import fastserve
from fastserve import _backend, _core_py

NO_EXTENSIONS = _backend.refused()

# Without the extension the tests of the C core would be missing from the run unnoticed.
if not NO_EXTENSIONS and fastserve.implementation != "c":
    raise pytest.UsageError("the extension is not built; set FASTSERVE_NO_EXTENSIONS=1 to test without it")

CORES: dict[str, ModuleType] = {"py": _core_py}
if not NO_EXTENSIONS:
    CORES["c"] = importlib.import_module("fastserve._core")


@pytest.fixture(params=sorted(CORES))
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test on the C core and on its Python twin."""
    _use(request.param, monkeypatch)
    return str(request.param)


@pytest.fixture
def core(impl: str) -> ModuleType:
    """The core of ``impl``, for tests of the twins' contract."""
    return CORES[impl]


@pytest.fixture(params=["stdlib", *sorted(CORES)])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``socketserver``, and ``fastserve`` on each core: one test body for all."""
    if request.param == "stdlib":
        return socketserver
    _use(request.param, monkeypatch)
    return fastserve


def _use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "core", CORES[name])
    monkeypatch.setattr(_backend, "implementation", name)
