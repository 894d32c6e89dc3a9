"""The connection that a stream handler gets, and the files that it reads and writes."""

from __future__ import annotations

import socketserver
from collections.abc import Callable
from io import BufferedIOBase
from typing import Any, Final

from fastserve import _backend

_std: Any = socketserver  # its type stub does not list the private names

_STDLIB_WRITER: Final[type[BufferedIOBase]] = _std._SocketWriter

Connection = _backend.streams.Connection
_SocketWriter = _backend.streams._SocketWriter


def writer_class() -> Callable[[Any], BufferedIOBase]:
    """Return the class of an unbuffered ``wfile``: ours, unless ``socketserver._SocketWriter`` was replaced."""
    found: Callable[[Any], BufferedIOBase] = _std._SocketWriter
    return _backend.streams._SocketWriter if found is _STDLIB_WRITER else found
