"""The choice between the C extensions and their Python twins. No other module makes it.

``core``, ``streams`` and ``datagrams`` are the modules in use, and ``implementation`` is their name, ``"c"`` or
``"py"``. ``threads`` and ``turns`` are ``None`` without the extensions: they have no twin, and a free-threaded Python
has no ``turns`` with them either. The extensions are used on CPython wherever they were built;
``FASTSERVE_NO_EXTENSIONS=1`` in the environment selects the Python twins. An extension that is there but does not load
raises: it is never replaced silently. A subinterpreter uses the Python twins.
"""

from __future__ import annotations

import importlib
import os
import select
import socket
import sys
from types import ModuleType

from fastserve import _core_py, _datagrams_py, _streams_py
from fastserve._annotations import TYPE_CHECKING, Final

EXTENSION: Final = "fastserve._core"

FREE_THREADED: Final = "t" in getattr(sys, "abiflags", "")  # whether this is a build that can do without the GIL


def refused() -> bool:
    """Return whether the environment asks for the Python twin."""
    return os.environ.get("FASTSERVE_NO_EXTENSIONS", "") not in ("", "0")


def _is_built() -> bool:
    """Return whether the C extensions are to be used. Raises ``ImportError`` if they are there but do not load."""
    if refused() or sys.implementation.name != "cpython":
        return False
    try:
        importlib.import_module(EXTENSION)
    except ModuleNotFoundError as error:
        if error.name != EXTENSION:
            raise
        return False
    except ImportError:
        if _in_subinterpreter():
            return False
        raise
    return True


def _in_subinterpreter() -> bool:
    """Return whether this is not the main interpreter: no other one can load an extension made by Cython."""
    for name in ("_interpreters", "_xxsubinterpreters"):  # from 3.13 on, and before
        try:
            interpreters = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        return bool(interpreters.get_current() != interpreters.get_main())
    return False


threads: ModuleType | None = None
turns: ModuleType | None = None

if TYPE_CHECKING:
    from typing import Literal

    # The twins are the source of the types, so that no stub file can drift.
    core = _core_py
    streams = _streams_py
    datagrams = _datagrams_py
elif _is_built():
    core, streams, datagrams, threads = (
        importlib.import_module(f"fastserve._{name}") for name in ("core", "streams", "datagrams", "threads")
    )
    if not FREE_THREADED:
        turns = importlib.import_module("fastserve._turns")
else:
    core, streams, datagrams = _core_py, _streams_py, _datagrams_py

implementation: Final[Literal["c", "py"]] = "py" if core is _core_py else "c"


def has_gil() -> bool:
    """Return whether there is a GIL at this moment: a module that needs it may switch it on."""
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())


def hub() -> ModuleType:
    """Return the module of the greenlet hub: ``_hub`` beside the C core, if it was built, else ``_hub_py``.

    Raises ``ImportError`` if greenlet is not installed, or if an extension is there but does not load, and
    ``RuntimeError`` in a process where no hub can run.
    """
    if monkey_patched():
        raise RuntimeError(
            "GreenletMixIn cannot serve in a process that gevent or eventlet has patched, where each thread is a "
            "greenlet of theirs: use ThreadingMixIn there"
        )
    if not has_gil():
        raise RuntimeError("GreenletMixIn needs the GIL: run this Python with PYTHON_GIL=1, or use ThreadingMixIn")
    return _greenlet_twin("_hub")


def green() -> ModuleType:
    """Return the module of the connections that wait in a hub; raises what :func:`hub` raises for an import."""
    return _greenlet_twin("_green")


def _greenlet_twin(name: str) -> ModuleType:
    """Return one of the extensions that need greenlet, or its Python twin where it was not built."""
    names = [f"fastserve.{name}_py"] if implementation == "py" else [f"fastserve.{name}", f"fastserve.{name}_py"]
    for full_name in names:
        try:
            return sys.modules.get(full_name) or importlib.import_module(full_name)
        except ModuleNotFoundError as error:
            if error.name == "greenlet":
                raise ImportError(
                    'GreenletMixIn needs the package greenlet: pip install "fastserve[greenlet]"', name="greenlet"
                ) from error
            if error.name not in names[:-1]:
                raise
    raise AssertionError("the Python twins are always there")


def monkey_patched() -> bool:
    """Return whether a library such as gevent or eventlet has replaced the blocking calls of this process.

    It may do so after this package was imported, so that the question is asked whenever a wait begins. While
    it is so, waits belong to the Python twin, which reaches them through their modules by name.
    """
    return (
        getattr(select.select, "__module__", None) != "select" or getattr(socket.socket, "__module__", None) != "socket"
    )
