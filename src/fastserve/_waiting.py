"""How a descriptor is waited for: in the hub of the calling thread, or, where none runs, by its thread alone."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Final


class _Local(threading.local):
    hub: Any = None


local: Final = _Local()
hubs: Final[list[Any]] = []  # of this process, until they end


def running() -> Any:
    """Return the hub that runs in the calling thread, or ``None``."""
    return local.hub


def is_ready(fd: int, writing: bool, seconds: float | None = 0.0) -> bool:
    """Return whether a descriptor is ready, waiting in the calling thread for at most so many seconds."""
    poller = select.poll()
    poller.register(fd, select.POLLOUT if writing else select.POLLIN | select.POLLPRI)
    return bool(poller.poll(None if seconds is None else seconds * 1000))


def wait(sock: socket.socket, writing: bool, deadline: float | None) -> None:
    """Wait until ``sock`` may be written to, or read.

    :param deadline: of :func:`time.monotonic`; ``None`` is endless.
    :raises TimeoutError: at the deadline.
    :raises OSError: if the socket is closed, also while it is waited for.
    """
    fd = socket.socket.fileno(sock)
    if fd < 0:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    hub = running()
    if hub is not None:
        hub.wait_io(sock, fd, writing, deadline)
    elif not is_ready(fd, writing, None if deadline is None else max(deadline - time.monotonic(), 0.0)):
        raise TimeoutError("timed out")


def until(timeout: float | None) -> float | None:
    """Return the deadline of an operation that begins now."""
    return None if timeout is None else time.monotonic() + timeout


def retry(sock: socket.socket, writing: bool, call: Callable[..., Any], *arguments: Any) -> Any:
    """Call a method of ``socket.socket`` until it need not wait, waiting as the timeout of ``sock`` says.

    The descriptor is non-blocking. Where the socket has a timeout the method itself would wait for it, and with it
    the whole thread: it is called only when the descriptor is ready.
    """
    timeout = sock.gettimeout()
    if timeout == 0:
        return call(sock, *arguments)
    deadline = until(timeout)
    while True:
        if timeout is None or is_ready(socket.socket.fileno(sock), writing):
            try:
                return call(sock, *arguments)
            except BlockingIOError:
                pass
        wait(sock, writing, deadline)
