"""The connection that a stream handler gets, and the files that it reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from io import BufferedIOBase

from fastserve import _backend
from fastserve._annotations import Any, Final
from fastserve._stdlib import socketserver

_std: Any = socketserver  # its type stub does not list the private names

_STDLIB_WRITER: Final[type[BufferedIOBase]] = _std._SocketWriter
_STDLIB_WRITE: Final = _STDLIB_WRITER.write

Connection = _backend.streams.Connection
_SocketWriter = _backend.streams._SocketWriter


def writer_class() -> Callable[[Any], BufferedIOBase]:
    """Return the class of an unbuffered ``wfile``: ours, unless the stdlib's or its ``write`` was replaced."""
    found: type[BufferedIOBase] = _std._SocketWriter
    if found is _STDLIB_WRITER and found.write is _STDLIB_WRITE:
        return _backend.streams._SocketWriter
    return found
