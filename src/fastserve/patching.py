"""Put fastserve in the place of :mod:`socketserver`, for a program that is not to be changed.

The classes of ``socketserver`` stay the objects that they are, so that classes derived from them and references
held by value (``logging.config`` holds ``ThreadingTCPServer``) are reached too; it is their functions that are
exchanged for ours. Neither ``sys.modules`` nor ``__bases__`` would do: the first does not reach what was imported
before, the second fails with a ``TypeError`` as soon as one class mixes both families.
"""

from __future__ import annotations

import functools
import socketserver
import threading
from types import CellType, FunctionType, TracebackType
from typing import Any, Final

from fastserve import handlers, server
from fastserve._loop import make_all_tick
from fastserve.workers import forking, threads

_MODULES: Final = (server, handlers, threads, forking)
_ABSENT: Final = object()

_lock = threading.RLock()
# What was exchanged: the stdlib's class, the name, what stood there (or _ABSENT), what stands there now.
_exchanged: list[tuple[type, str, Any, Any]] = []


def _pairs() -> list[tuple[type, type]]:
    """Return our classes that stand for one of the stdlib's, each with the stdlib's."""
    pairs = []
    for module in _MODULES:
        for name, ours in vars(module).items():
            theirs = vars(socketserver).get(name)
            if isinstance(ours, type) and isinstance(theirs, type) and ours.__module__ == module.__name__:
                pairs.append((ours, theirs))
    return pairs


def _moved(function: FunctionType, cls: type) -> FunctionType:
    """Return ``function`` as a method of ``cls``: one whose ``super()`` starts there, if it has any."""
    freevars = function.__code__.co_freevars
    if "__class__" not in freevars:
        return function
    assert function.__closure__ is not None
    cells = tuple(
        CellType(cls) if name == "__class__" else cell
        for name, cell in zip(freevars, function.__closure__, strict=True)
    )
    moved = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    moved.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(moved, function)
    return moved


def patch() -> None:
    """Have every server and handler derived from :mod:`socketserver` run on fastserve, in the whole process.

    Classes that were derived before are reached as well as later ones, and so are existing servers, from their
    next ``serve_forever()`` on. A method that the program has replaced itself in a class of ``socketserver``
    is left alone. Calling it again does nothing. Any thread may call it.
    """
    with _lock:
        if _exchanged:
            return
        for ours, theirs in _pairs():
            for name, value in vars(ours).items():
                original = vars(theirs).get(name, _ABSENT)
                if isinstance(value, server._ShutdownRequest):
                    replacement: Any = value
                elif isinstance(value, FunctionType) and _is_stdlib(original):
                    replacement = _moved(value, theirs)
                else:
                    continue
                setattr(theirs, name, replacement)
                _exchanged.append((theirs, name, original, replacement))


def _is_stdlib(function: object) -> bool:
    return isinstance(function, FunctionType) and function.__globals__ is vars(socketserver)


def unpatch() -> None:
    """Take back :func:`patch`. Servers that run go on; without a patch it does nothing. Any thread may call it.

    A method that the program has replaced since is left alone.
    """
    with _lock:
        for cls, name, original, replacement in reversed(_exchanged):
            if vars(cls).get(name) is not replacement:
                continue
            if original is _ABSENT:
                delattr(cls, name)
            else:
                setattr(cls, name, original)
        _exchanged.clear()
        # The stdlib's shutdown() sets a flag that nothing watches any more.
        make_all_tick()


class Patched:
    """What :func:`patched` returns: true while the patch is applied, and a context in which it is."""

    def __bool__(self) -> bool:
        return bool(_exchanged)

    def __repr__(self) -> str:
        return f"<fastserve is {'' if self else 'not '}in the place of socketserver>"

    def __init__(self) -> None:
        self._before: list[bool] = []  # what each entered block found

    def __enter__(self) -> None:
        with _lock:
            self._before.append(bool(self))
            patch()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        exc_traceback: TracebackType | None,
        /,
    ) -> None:
        if not self._before.pop():
            unpatch()


def patched() -> Patched:
    """Tell whether the patch is applied (``if patched():``), or apply it for a while (``with patched():``).

    The ``with`` statement leaves it as it found it.
    """
    return Patched()
