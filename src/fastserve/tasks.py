"""What a handler may do beside reading and writing, in a way that lets the others of its server go on.

Each function does the same under every worker model. Under :class:`fastserve.GreenletMixIn` only the calling greenlet
waits; elsewhere the calling thread does.
"""

from __future__ import annotations

import functools
import socket
import threading
import time
from collections.abc import Callable

from fastserve import _backend, _uncaught, _waiting
from fastserve._annotations import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from concurrent.futures import Future
    from typing import ParamSpec, TypeVar

    _P = ParamSpec("_P")
    _R = TypeVar("_R")

# What stands for "not given" in socket.create_connection().
_DEFAULT: Any = getattr(socket, "_GLOBAL_DEFAULT_TIMEOUT", None)


class Spawned(Protocol):
    """What :func:`fastserve.spawn` returns: these methods of :class:`threading.Thread`."""

    def join(self, timeout: float | None = None) -> None:
        """Wait until the function has returned, for at most ``timeout`` seconds (``None``: endless)."""

    def is_alive(self) -> bool:
        """Return whether the function still runs, or is about to."""


def sleep(seconds: float) -> None:
    """Wait for that many seconds; 0 lets the others have their turn.

    :raises ValueError: if ``seconds`` is negative.
    """
    hub = _waiting.running()
    if hub is None:
        time.sleep(seconds)
        return
    if seconds < 0:
        raise ValueError("sleep length must be non-negative")
    deadline = time.monotonic() + seconds
    hub.park(seconds)
    while (left := deadline - time.monotonic()) > 0:
        hub.park(left)


def to_thread(function: Callable[_P, _R], /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """Call ``function`` with the arguments, and return, or raise, what it does.

    In a handler that runs in a greenlet a thread calls it, and the loop goes on; elsewhere the calling thread does.
    Each running server has as many threads for this as :class:`concurrent.futures.ThreadPoolExecutor` by default.
    It sees the context variables of the caller, in a copy, as in :func:`asyncio.to_thread`. A handler that is ended
    meanwhile does not end the thread: the function runs to its end, and its result is dropped.
    """
    import contextvars  # a shared library, which every fork of a forking server would have to map anew

    call = functools.partial(contextvars.copy_context().run, function, *args, **kwargs)
    hub = _waiting.running()
    if hub is None:
        return call()
    task = hub.this()
    if hub.executor is None:
        from concurrent.futures import ThreadPoolExecutor  # it imports logging

        hub.executor = ThreadPoolExecutor(thread_name_prefix="fastserve to_thread")
    future: Future[_R] = hub.executor.submit(call)
    future.add_done_callback(lambda future: hub.post(task))
    try:
        while not future.done():
            hub.park()
    finally:
        future.cancel()  # if it has not begun: its caller was ended
    return future.result()


def spawn(function: Callable[_P, object], /, *args: _P.args, **kwargs: _P.kwargs) -> Spawned:
    """Have ``function`` called beside the caller, with the arguments: in a greenlet of the same loop, or in a thread.

    What it raises goes to :func:`threading.excepthook`. The server waits for a greenlet as for a request; a thread
    is a daemon.
    """
    hub = _waiting.running()
    if hub is None:
        thread = threading.Thread(target=function, args=args, kwargs=kwargs, daemon=True)
        thread.start()
        return thread
    return _SpawnedGreenlet(hub, functools.partial(function, *args, **kwargs))


class _SpawnedGreenlet:
    """A function that runs in a greenlet, for those who wait for its end. They are in the same thread."""

    def __init__(self, hub: Any, call: Callable[[], object]) -> None:
        self._hub = hub
        self._call = call
        self._ended = False
        self._waiting: list[Any] = []
        hub.spawn(self._run)

    def _run(self) -> None:
        try:
            self._call()
        except Exception as error:
            _uncaught.report(error)
        finally:
            self._ended = True
            for task in self._waiting:
                self._hub.wake(task)

    def join(self, timeout: float | None = None) -> None:
        if _waiting.running() is not self._hub:
            raise RuntimeError("a greenlet can be joined by those of the same server alone")
        deadline = _waiting.until(timeout)
        task = self._hub.this()
        self._waiting.append(task)
        try:
            while not self._ended:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._hub.park(left)
        finally:
            self._waiting.remove(task)

    def is_alive(self) -> bool:
        return not self._ended


def create_connection(
    address: tuple[str | None, int],
    timeout: float | None = _DEFAULT,
    source_address: tuple[str, int] | None = None,
    *,
    all_errors: bool = False,
) -> socket.socket:
    """Connect to a TCP service, as :func:`socket.create_connection` does, whose parameters and errors it has.

    In a greenlet the connection lets others go on while it waits; so does the look-up of the name, in a thread.
    """
    if _waiting.running() is None:
        return socket.create_connection(address, timeout, source_address, all_errors=all_errors)
    host, port = address
    errors: list[OSError] = []
    connection: type[socket.socket] = _backend.green().Connection
    for family, kind, proto, _, found in _resolve(host, port):
        sock: socket.socket | None = None
        try:
            sock = connection(family, kind, proto)
            if timeout is not _DEFAULT:
                sock.settimeout(timeout)
            if source_address:
                sock.bind(source_address)
            sock.connect(found)
        except OSError as error:
            errors.append(error)
            if sock is not None:
                sock.close()
        except BaseException:
            if sock is not None:
                sock.close()
            raise
        else:
            return sock
    try:
        if all_errors and errors:
            raise ExceptionGroup("create_connection failed", errors)
        raise errors[0] if errors else OSError("getaddrinfo returns an empty list")
    finally:
        errors.clear()  # each holds a traceback, and that this frame


def _resolve(host: str | None, port: int) -> list[Any]:
    try:
        return socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST)
    except socket.gaierror:
        return to_thread(socket.getaddrinfo, host, port, 0, socket.SOCK_STREAM)
