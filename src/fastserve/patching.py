"""Put fastserve in the place of :mod:`socketserver`, for a program that is not to be changed.

The classes of ``socketserver`` stay the objects that they are, so that classes derived from them and references
held by value (``logging.config`` holds ``ThreadingTCPServer``) are reached too; it is their functions that are
exchanged for ours. Neither ``sys.modules`` nor ``__bases__`` would do: the first does not reach what was imported
before, the second fails with a ``TypeError`` as soon as one class mixes both families.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from threading import RLock
from types import CellType, FunctionType, TracebackType
from typing import Any, Final, Literal

from fastserve import _backend, _waiting, handlers, server
from fastserve._loop import SHUTDOWN_REQUEST, make_all_tick
from fastserve._stdlib import socketserver
from fastserve.workers import _reuse, forking, greenlets, threadpool, threads

Threading = Literal["thread", "greenlet"]

_MODULES: Final = (server, handlers, threads, forking)
_ABSENT: Final = object()
_MIXIN: Final = socketserver.ThreadingMixIn
# Who names one of these has asked for it. The mix-in of the stdlib may be among what follows it, and leaves it alone.
_ASKED_FOR: Final = (
    threads.ThreadingMixIn,
    threadpool.ThreadPoolMixIn,
    *([socketserver.ForkingMixIn] if hasattr(socketserver, "ForkingMixIn") else []),
)

_lock = RLock()
# What was exchanged: the stdlib's class, the name, what stood there (or _ABSENT), what stands there now.
_exchanged: list[tuple[type, str, Any, Any]] = []
_exchanged_in_mixin: list[tuple[type, str, Any, Any]] = []
_threading: Threading | None = None  # what runs the requests of ThreadingMixIn; None without the patch


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


def patch(threading: Threading | None = None) -> None:
    """Have every server and handler derived from :mod:`socketserver` run on fastserve, in the whole process.

    Classes that were derived before are reached as well as later ones, and so are existing servers, from their
    next ``serve_forever()`` on. A method that the program has replaced itself in a class of ``socketserver``
    is left alone. Any thread may call it, and again: it then changes what ``threading`` asks for, if anything.

    :param threading: what ``socketserver.ThreadingMixIn`` runs each request in. ``"thread"``; or ``"greenlet"``, as
        :class:`GreenletMixIn` does: only for programs that keep no state for each thread, and wait for nothing but
        their connections, because all requests of a server share one thread. ``None``, the default, leaves it as it
        is, which is ``"thread"`` at first. The mix-ins of this package are what their names say in any case.
    :raises ValueError: if ``threading`` is something else.
    :raises ImportError: if greenlets are asked for, and greenlet is not installed. Nothing is changed then.
    :raises RuntimeError: if no greenlets can serve in this process, which gevent has patched, say. Likewise.
    """
    global _threading
    _check(threading)
    if threading == "greenlet":
        _backend.hub()
        _backend.green()
    with _lock:
        if not _exchanged:
            for ours, theirs in _pairs():
                if theirs is not _MIXIN:
                    _exchange(theirs, _replacements(ours, theirs), _exchanged)
        if _threading != (chosen := threading or _threading or "thread"):
            _take_back(_exchanged_in_mixin)
            of_threads = _replacements(threads.ThreadingMixIn, _MIXIN)
            _exchange(_MIXIN, of_threads if chosen == "thread" else _greenlet_functions(), _exchanged_in_mixin)
            _threading = chosen


def _check(threading: object) -> None:
    if threading not in (None, "thread", "greenlet"):
        raise ValueError(f'threading is "thread" or "greenlet", not {threading!r}')


def _replacements(ours: type, theirs: type) -> dict[str, Any]:
    """Return what a class of ours has for one of the stdlib's, by name."""
    return {
        name: _moved(value, theirs) if isinstance(value, FunctionType) else value
        for name, value in vars(ours).items()
        if isinstance(value, FunctionType | server._ShutdownRequest)
    }


def _exchange(theirs: type, replacements: dict[str, Any], exchanged: list[tuple[type, str, Any, Any]]) -> None:
    """Put functions into a class of the stdlib, unless the program has done so. Note it in ``exchanged``."""
    for name, replacement in replacements.items():
        original = vars(theirs).get(name, _ABSENT)
        # Only what brings the loop with it, and the flag that wakes the loop, have a name that is new to the class.
        is_new = original is _ABSENT and (theirs is _MIXIN or isinstance(replacement, server._ShutdownRequest))
        if is_new or _is_stdlib(original):
            setattr(theirs, name, replacement)
            exchanged.append((theirs, name, original, replacement))


@functools.cache
def _greenlet_functions() -> dict[str, Any]:
    """Return what is to stand in the stdlib's mix-in for requests to run in greenlets."""
    of_threads = _replacements(threads.ThreadingMixIn, _MIXIN)
    of_greenlets = _replacements(greenlets.GreenletMixIn, _MIXIN)
    of_greenlets.pop(SHUTDOWN_REQUEST)  # that of BaseServer, which was exchanged, is found
    in_thread, close = of_threads["process_request"], of_greenlets["server_close"]

    @functools.wraps(of_greenlets["process_request"])
    def process_request(self: Any, request: Any, client_address: Any) -> None:
        hub = _waiting.running()
        if hub is not None and hub.server is self:
            greenlets.start(hub, self, request, client_address)
        else:  # handle_request(), a loop of the program's own, or one that began before the patch
            in_thread(self, request, client_address)

    @functools.wraps(close)
    def server_close(self: Any) -> None:
        close(self)
        self._threads.join()
        _reuse.end_idle_threads()

    server.own_get_requests.add(of_greenlets["get_request"])
    for name in of_greenlets.keys() - of_threads.keys() - {"get_request"}:
        of_greenlets[name] = _unless_asked_otherwise(of_greenlets[name])
    if _backend.turns is not None:
        _backend.turns.know({}, {of_greenlets["_handle_request_noblock"], of_greenlets["get_request"]})
    return of_threads | of_greenlets | {"process_request": process_request, "server_close": server_close}


def _unless_asked_otherwise(function: FunctionType) -> Callable[..., Any]:
    """Return a method of the stdlib's mix-in that passes over ``function`` where another worker model was named."""

    @functools.wraps(function)
    def method(self: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(self, _ASKED_FOR):
            return getattr(super(_MIXIN, self), function.__name__)(*arguments, **options)
        return function(self, *arguments, **options)

    return method


def _is_stdlib(function: object) -> bool:
    return isinstance(function, FunctionType) and function.__globals__ is vars(socketserver)


def unpatch() -> None:
    """Take back :func:`patch`. Servers that run go on; without a patch it does nothing. Any thread may call it.

    A method that the program has replaced since is left alone.
    """
    global _threading
    with _lock:
        _take_back(_exchanged_in_mixin)
        _take_back(_exchanged)
        _threading = None
        # The stdlib's shutdown() sets a flag that nothing watches any more.
        make_all_tick()


def _take_back(exchanged: list[tuple[type, str, Any, Any]]) -> None:
    for cls, name, original, replacement in reversed(exchanged):
        if vars(cls).get(name) is not replacement:
            continue
        if original is _ABSENT:
            delattr(cls, name)
        else:
            setattr(cls, name, original)
    exchanged.clear()


class Patched:
    """What :func:`fastserve.patched` returns: true while the patch is applied, and a context in which it is."""

    def __init__(self, threading: Threading | None = None) -> None:
        _check(threading)
        self._threading = threading
        self._before: list[Threading | None] = []  # what each entered block found

    def __bool__(self) -> bool:
        return _threading is not None and self._threading in (None, _threading)

    def __repr__(self) -> str:
        if _threading is None:
            return "<fastserve is not in the place of socketserver>"
        return f"<fastserve is in the place of socketserver, with a {_threading} for each request of ThreadingMixIn>"

    def __enter__(self) -> None:
        with _lock:
            before = _threading
            patch(self._threading)
            self._before.append(before)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        exc_traceback: TracebackType | None,
        /,
    ) -> None:
        with _lock:
            before = self._before.pop()
            if before is None:
                unpatch()
            else:
                patch(before)


def patched(threading: Threading | None = None) -> Patched:
    """Tell whether the patch is applied (``if patched():``), or apply it for a while (``with patched():``).

    The ``with`` statement leaves it as it found it.

    :param threading: as for :func:`patch`; the question is then whether it is applied with that choice.
    :raises ValueError: if ``threading`` is something else.
    """
    return Patched(threading)
