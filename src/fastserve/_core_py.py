"""The Python twin of the core: the same names as ``_core``, and the source of their types.

Nothing here is chosen by platform or environment; that is ``_backend`` and ``pollers``. Waits and sockets are
reached through their modules by name at call time, so that a library that replaces them (gevent, eventlet)
is obeyed.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from collections.abc import Callable

from fastserve._annotations import Any, Final

HAVE_EPOLL: Final = hasattr(select, "epoll")

# poll(2) and epoll_wait(2) count milliseconds in an int; a longer wait is cut to this many seconds.
MAX_WAIT: Final = 2_000_000.0

# select(2): one more than the highest descriptor that fits into its sets, on every system that we know.
FD_SETSIZE: Final = 1024


def _checked(fd: int) -> int:
    """Return ``fd``, or raise the ``ValueError`` that :mod:`selectors` raises for a closed descriptor."""
    if fd < 0:
        raise ValueError(f"Invalid file descriptor: {fd}")
    return fd


def _is_closed(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return True
    return False


def _seconds(timeout: float | None) -> float | None:
    """Bring a timeout into the range of the system calls: ``None`` endless, negative is zero."""
    return None if timeout is None else min(max(timeout, 0.0), MAX_WAIT)


class EpollPoller:
    """Wait for readable descriptors with epoll(7), level-triggered.

    A poller is used by one thread, the one that runs the loop. A descriptor that is closed while registered is
    forgotten by the kernel.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()

    def register(self, fd: int) -> None:
        """Watch ``fd`` for reading. Raises ``ValueError`` if it is negative, ``OSError`` if the kernel refuses."""
        self._epoll.register(_checked(fd), select.EPOLLIN)

    def unregister(self, fd: int) -> None:
        """Stop watching ``fd``. Does nothing if the kernel has forgotten it already."""
        try:
            self._epoll.unregister(fd)
        except (FileNotFoundError, ValueError):
            return
        except OSError:
            return  # EBADF: closed, and forgotten with it

    def wait(self, timeout: float | None = None) -> list[int]:
        """Return the readable descriptors, after at most ``timeout`` seconds (``None``: endless).

        A hang-up or an error counts as readable. Signal handlers run while it waits; what they raise is raised.
        """
        timeout = _seconds(timeout)
        return [fd for fd, _ in self._epoll.poll(-1 if timeout is None else timeout)]

    def close(self) -> None:
        """Release the epoll descriptor. Calling it again does nothing."""
        self._epoll.close()


class PollPoller:
    """Wait for readable descriptors with poll(2). The interface is that of :class:`EpollPoller`."""

    def __init__(self) -> None:
        self._poll = select.poll()

    def register(self, fd: int) -> None:
        """Watch ``fd`` for reading. Raises ``ValueError`` if it is negative."""
        self._poll.register(_checked(fd), select.POLLIN)

    def unregister(self, fd: int) -> None:
        """Stop watching ``fd``. Does nothing if it is not watched."""
        try:
            self._poll.unregister(fd)
        except (KeyError, ValueError):
            return

    def wait(self, timeout: float | None = None) -> list[int]:
        """Return the readable descriptors, after at most ``timeout`` seconds (``None``: endless)."""
        timeout = _seconds(timeout)
        return [fd for fd, _ in self._poll.poll(None if timeout is None else timeout * 1000)]

    def close(self) -> None:
        """Do nothing: poll(2) holds no descriptor."""


class SelectPoller:
    """Wait for readable descriptors with select(2). The interface is that of :class:`EpollPoller`."""

    def __init__(self) -> None:
        self._fds: set[int] = set()

    def register(self, fd: int) -> None:
        """Watch ``fd`` for reading. Raises ``ValueError`` if it is negative, or too high for select(2)."""
        if os.name == "posix" and _checked(fd) >= FD_SETSIZE:
            raise ValueError("filedescriptor out of range in select()")
        self._fds.add(_checked(fd))

    def unregister(self, fd: int) -> None:
        """Stop watching ``fd``. Does nothing if it is not watched."""
        self._fds.discard(fd)

    def wait(self, timeout: float | None = None) -> list[int]:
        """Return the readable descriptors, after at most ``timeout`` seconds (``None``: endless).

        A descriptor that was closed counts as readable, as it does for poll(2).
        """
        try:
            return select.select(self._fds, (), (), _seconds(timeout))[0]
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            return [fd for fd in self._fds if _is_closed(fd)]

    def close(self) -> None:
        """Do nothing: select(2) holds no descriptor."""


class Wakeup:
    """A descriptor that any thread makes readable, to end the wait of the thread that runs a loop.

    It is an eventfd(2) where there is one. With ``for_signals`` it is a socket pair, because
    :func:`signal.set_wakeup_fd` writes one byte where an eventfd takes eight.
    """

    def __init__(self, for_signals: bool = False) -> None:
        # Reentrant: a signal handler may call set() while its thread is inside set() or close().
        self._lock = threading.RLock()
        self._event = -1
        self._pair: tuple[socket.socket, socket.socket] | None = None
        if not for_signals and hasattr(os, "eventfd"):
            self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        else:
            self._pair = socket.socketpair()
            for end in self._pair:
                end.setblocking(False)

    def fileno(self) -> int:
        """Return the descriptor to wait on, or -1 once closed."""
        return self._event if self._pair is None else self._pair[0].fileno()

    def signal_fileno(self) -> int:
        """Return the descriptor for :func:`signal.set_wakeup_fd`, or -1 without ``for_signals``."""
        return -1 if self._pair is None else self._pair[1].fileno()

    def set(self) -> None:
        """Make the descriptor readable. Any thread may call it, and a signal handler; closed, it does nothing."""
        with self._lock:  # or a closed descriptor's number, reused, would be written to
            try:
                if self._pair is not None:
                    if self._pair[1].fileno() >= 0:
                        self._pair[1].send(b"\0")
                elif self._event >= 0:
                    os.eventfd_write(self._event, 1)
            except BlockingIOError:
                return  # full: it is readable already

    def clear(self) -> None:
        """Make the descriptor unreadable again. Called by the thread that waits on it; closed, it does nothing."""
        if self.fileno() < 0:
            return
        try:
            if self._pair is None:
                os.eventfd_read(self._event)
            else:
                while self._pair[0].recv(4096):
                    pass
        except BlockingIOError:
            return  # nothing left

    def close(self) -> None:
        """Release the descriptors. Calling it again does nothing."""
        with self._lock:
            if self._pair is not None:
                for end in self._pair:
                    end.close()
            elif self._event >= 0:
                os.close(self._event)
                self._event = -1


def wait_readable(fd: int, timeout: float | None) -> bool:
    """Wait until ``fd`` is readable, at most ``timeout`` seconds (``None``: endless); return whether it is."""
    poller = PollPoller() if hasattr(select, "poll") else SelectPoller()
    poller.register(fd)
    return bool(poller.wait(timeout))


# The class whose accept() may be bypassed, if no library has replaced it before this module is imported.
_plain_socket: Final = socket.socket
_plain_accept: Final = socket.socket.accept


def accept(
    listener: socket.socket, make: Callable[[int, int, int, int], socket.socket] = _plain_socket
) -> tuple[socket.socket, Any]:
    """Accept one connection: what ``listener.accept()`` returns and raises.

    If ``listener`` is a plain ``socket.socket`` the connection is what ``make(family, type, proto, fd)``
    makes. Anything else, such as a subclass, or a ``socket.socket`` that a library has replaced, makes its own.
    """
    if (
        type(listener) is not _plain_socket
        or socket.socket is not _plain_socket
        or _plain_socket.accept is not _plain_accept
        or _plain_socket.__module__ != "socket"
    ):
        return listener.accept()
    descriptor, address = listener._accept()  # type: ignore[attr-defined]
    try:
        request = make(listener.family, listener.type, listener.proto, descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    # CPython issue 7995: some systems let the new descriptor inherit O_NONBLOCK from a listener with a timeout.
    if socket.getdefaulttimeout() is None and listener.gettimeout():
        request.setblocking(True)
    return request, address
