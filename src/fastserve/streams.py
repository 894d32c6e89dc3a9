"""The files that a stream handler reads and writes."""

from __future__ import annotations

import socket
import socketserver
from collections.abc import Callable
from io import BufferedIOBase
from typing import Any, Final

_std: Any = socketserver  # its type stub does not list the private names

_STDLIB_WRITER: Final[type[BufferedIOBase]] = _std._SocketWriter


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


def writer_class() -> Callable[[Any], BufferedIOBase]:
    """Return the class of an unbuffered ``wfile``: ours, unless ``socketserver._SocketWriter`` was replaced."""
    found: Callable[[Any], BufferedIOBase] = _std._SocketWriter
    return _SocketWriter if found is _STDLIB_WRITER else found
