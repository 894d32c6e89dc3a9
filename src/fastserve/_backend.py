"""The choice between the C core and its Python twin. No other module makes it.

``core`` is the module in use and ``implementation`` its name, ``"c"`` or ``"py"``. The C core is used on CPython
wherever it was built; ``FASTSERVE_NO_EXTENSIONS=1`` in the environment selects the Python twin. An extension
that is there but does not load raises: it is never replaced silently. A subinterpreter uses the Python twin.
"""

from __future__ import annotations

import importlib
import os
import select
import socket
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Final, Literal

from fastserve import _core_py

EXTENSION: Final = "fastserve._core"


def refused() -> bool:
    """Return whether the environment asks for the Python twin."""
    return os.environ.get("FASTSERVE_NO_EXTENSIONS", "") not in ("", "0")


def _load() -> ModuleType:
    """Return the core to use. Raises ``ImportError`` if the extension is there but does not load."""
    if refused() or sys.implementation.name != "cpython":
        return _core_py
    try:
        return importlib.import_module(EXTENSION)
    except ModuleNotFoundError as error:
        if error.name != EXTENSION:
            raise
        return _core_py
    except ImportError:
        if _in_subinterpreter():
            return _core_py
        raise


def _in_subinterpreter() -> bool:
    """Return whether this is not the main interpreter: no other one can load an extension made by Cython."""
    for name in ("_interpreters", "_xxsubinterpreters"):  # from 3.13 on, and before
        try:
            interpreters = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        return bool(interpreters.get_current() != interpreters.get_main())
    return False


if TYPE_CHECKING:
    # The twin is the source of the types, so that no stub file can drift.
    core = _core_py
else:
    core = _load()

implementation: Final[Literal["c", "py"]] = "py" if core is _core_py else "c"


def monkey_patched() -> bool:
    """Return whether a library such as gevent or eventlet has replaced the blocking calls of this process.

    It may do so after this package was imported, so that the question is asked whenever a wait begins. While
    it is so, waits belong to the Python twin, which reaches them through their modules by name.
    """
    return (
        getattr(select.select, "__module__", None) != "select" or getattr(socket.socket, "__module__", None) != "socket"
    )
