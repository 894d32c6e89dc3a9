"""How a descriptor is waited for: in the hub of the calling thread, or, where none runs, by its thread alone."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable

from fastserve._annotations import Any, Final


class _Local(threading.local):
    hub: Any = None


local: Final = _Local()
hubs: Final[list[Any]] = []  # of this process, until they end

OWN: Final[Any] = object()  # in the place of a deadline: that of an operation which begins now


def running() -> Any:
    """Return the hub that runs in the calling thread, or ``None``."""
    return local.hub


def pace() -> None:
    """Let the others of the hub have their turn from time to time, before a call that may not wait at all."""
    if local.hub is not None:
        local.hub.pace()


def sleep(seconds: float, deadline: float | None) -> None:
    """Wait for some time, at most until the deadline; raise ``TimeoutError`` if that has passed."""
    left = seconds if deadline is None else deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    if local.hub is not None:
        local.hub.park(min(seconds, left))
    else:
        time.sleep(min(seconds, left))


def _bad_descriptor() -> OSError:
    return OSError(errno.EBADF, os.strerror(errno.EBADF))


def is_ready(fd: int, writing: bool, seconds: float | None = 0.0) -> bool:
    """Return whether a descriptor is ready, waiting in the calling thread for at most so many seconds.

    :raises OSError: if it is negative, that of a closed socket.
    """
    if fd < 0:
        raise _bad_descriptor()
    poller = select.poll()
    poller.register(fd, select.POLLOUT if writing else select.POLLIN)
    return bool(poller.poll(None if seconds is None else seconds * 1000))


def wait(sock: socket.socket, writing: bool, deadline: float | None) -> None:
    """Wait until ``sock`` may be written to, or read. It may return early.

    :param deadline: of :func:`time.monotonic`; ``None`` is endless.
    :raises TimeoutError: at the deadline.
    :raises OSError: if the socket is closed, also while it is waited for.
    """
    fd = socket.socket.fileno(sock)
    if fd < 0:
        raise _bad_descriptor()
    hub = running()
    if hub is not None:
        hub.wait_io(sock, fd, writing, deadline)
    elif not is_ready(fd, writing, None if deadline is None else max(deadline - time.monotonic(), 0.0)):
        raise TimeoutError("timed out")


def until(timeout: float | None) -> float | None:
    """Return the deadline of an operation that begins now."""
    return None if timeout is None else time.monotonic() + timeout


def retry(
    sock: socket.socket,
    writing: bool,
    call: Callable[[socket.socket], Any],
    at_once: bool = False,
    deadline: float | None = OWN,
) -> Any:
    """Call a function of ``sock`` that does not wait until it need not, waiting as the timeout of ``sock`` says.

    Where the socket has a timeout the methods of ``socket.socket`` themselves wait for it before anything else, and
    with them the whole thread: the function is called only when the descriptor is ready.

    :param at_once: whether it is called once, ready or not. The flag MSG_DONTWAIT asks for it.
    :param deadline: of :func:`time.monotonic`; by default that of the timeout of ``sock``.
    """
    timeout = sock.gettimeout()
    if timeout == 0:
        return call(sock)
    pace()
    if deadline is OWN:
        deadline = until(timeout)
    while True:
        if timeout is None or is_ready(socket.socket.fileno(sock), writing):
            try:
                return call(sock)
            except BlockingIOError:
                if at_once:
                    raise
        wait(sock, writing, deadline)
