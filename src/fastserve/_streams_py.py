"""The Python twin of the streams: the same names as ``_streams``, and the source of their types."""

from __future__ import annotations

import socket
import sys
from io import BufferedIOBase

from fastserve._annotations import Any, Final
from fastserve._stdlib import socketserver

_std: Any = socketserver  # its type stub does not list the private names

_STDLIB_WRITER: Final[type[BufferedIOBase]] = _std._SocketWriter


def reduce_connection(connection: socket.socket, protocol: Any, caller: dict[str, Any]) -> Any:
    """Return what :mod:`pickle` is to write for ``connection``; ``caller`` is the namespace of who asks.

    A socket can be pickled by :mod:`multiprocessing` alone, which knows how to hand on a descriptor, but only for
    objects whose class is ``socket.socket`` itself. For anybody else it raises the ``TypeError`` of a socket.
    """
    if caller.get("__name__") == "multiprocessing.reduction":
        return caller["_reduce_socket"](connection)
    return socket.socket.__reduce_ex__(connection, protocol)


class Connection(socket.socket):
    """A connection that a stream server has accepted: a ``socket.socket`` in every respect.

    The C twin's ``makefile("rb")`` reads without Python code between the buffer and the kernel. Its ``raw`` is a
    ``socket.SocketIO`` all the same. For any other mode it is the stdlib's.
    """

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduce_connection(self, protocol, sys._getframe(1).f_globals)


def accepted(family: int, type: int, proto: int, descriptor: int) -> Connection:
    """Return the connection of a descriptor that accept(2) has returned."""
    return Connection(family, type, proto, descriptor)


class _SocketWriter(_STDLIB_WRITER):  # type: ignore[misc, valid-type]
    """A writable file over a connection that keeps nothing back, so that there is no need to flush it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def writable(self) -> bool:
        """Return ``True``."""
        return True

    def write(self, b: Any) -> int:
        """Send all of ``b``, any buffer of bytes, and return its size in bytes.

        Raises ``TimeoutError`` after the timeout of the connection, ``OSError`` if the client has gone.
        """
        self._sock.sendall(b)
        with memoryview(b) as view:
            return view.nbytes

    def fileno(self) -> int:
        """Return the descriptor of the connection."""
        return self._sock.fileno()


Connection.__module__ = _SocketWriter.__module__ = "fastserve.streams"
