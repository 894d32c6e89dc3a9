"""How long a line may be that a handler reads: the files of a connection whose server has ``max_line``.

The connection is told before the handler has it, and gives the first file that is made to read from it the limit:
``rfile``. From then on it is what it would be without: the reads, the writes and the end of it cost what they did.
"""

from __future__ import annotations

import functools
import io
import socket
import weakref
from collections.abc import Callable

from fastserve._annotations import Any, Final

_MAKEFILE: Final = "makefile"  # also a key in the connection's __dict__, if it has one


class LineTooLong(ValueError):
    """A client has sent a line that is longer than ``max_line`` of :class:`LimitsMixIn`.

    ``readline()``, ``readlines()`` and the iteration over ``rfile`` raise it. As many bytes of the line have been read
    then, and one more; whoever catches it ends the connection, since what is read next is the rest of that line.
    """

    def __init__(self, max_line: int) -> None:
        """:param max_line: bytes that a line may have."""
        super().__init__(f"a line is longer than {max_line} bytes")


def _limiting_readline(plain: Callable[[Any, int], bytes]) -> Any:
    """Return the method that the iteration and ``readlines()`` of a file call for each line."""

    def readline(self: Any, size: int | None = -1, /) -> bytes:
        if size is not None and size >= 0:
            return plain(self, size)
        max_line: int = self.max_line
        line = plain(self, max_line + 1)
        if len(line) > max_line:
            raise LineTooLong(max_line)
        return line

    return readline


class _LimitedReader(io.BufferedReader):
    """An ``rfile`` with a buffer."""

    max_line: int

    readline = _limiting_readline(io.BufferedReader.readline)


class _LimitedSocketIO(socket.SocketIO):
    """An ``rfile`` without one: ``rbufsize`` is 0."""

    max_line: int

    readline = _limiting_readline(socket.SocketIO.readline)


def limit(connection: Any, max_line: int) -> None:
    """Have the first file that ``connection.makefile("rb")`` makes raise :exc:`LineTooLong`.

    :param connection: a socket, or what takes its place. Where it has attributes of its own it keeps its class, which
        tells whether a handshake is to be done.
    """
    attributes = getattr(connection, "__dict__", None)
    if attributes is None:
        cls: Any = type(connection)
        connection.__class__ = _limiting(cls, max_line)
        return
    reference = weakref.ref(connection)  # the connection itself would be freed by the garbage collector alone

    def makefile(mode: str = "r", buffering: int | None = None, **options: Any) -> Any:
        this: Any = reference()
        if mode != "rb":
            return type(this).makefile(this, mode, buffering, **options)
        del vars(this)[_MAKEFILE]
        return _limited(this.makefile(mode, buffering, **options), buffering, max_line)

    attributes[_MAKEFILE] = makefile


@functools.lru_cache(maxsize=64)
def _limiting(cls: Any, max_line: int) -> Any:
    """Return the class of a connection of class ``cls`` until it has made the file."""

    def makefile(self: Any, mode: str = "r", buffering: int | None = None, **options: Any) -> Any:
        if mode != "rb":
            return cls.makefile(self, mode, buffering, **options)
        self.__class__ = cls
        return _limited(self.makefile(mode, buffering, **options), buffering, max_line)

    return type(cls.__name__, (cls,), {"__slots__": (), "__module__": cls.__module__, _MAKEFILE: makefile})


def _limited(file: Any, buffering: int | None, max_line: int) -> Any:
    """Return a file that reads what ``file`` would, which nobody has used yet. One of another kind stays as it is."""
    if type(file) is io.BufferedReader:
        size = io.DEFAULT_BUFFER_SIZE if buffering is None or buffering < 0 else buffering
        file = _LimitedReader(file.detach(), size)
    elif type(file) is socket.SocketIO:
        file.__class__ = _LimitedSocketIO
    elif not hasattr(type(file), "max_line"):  # the hub's own, which knows the limit
        return file
    file.max_line = max_line
    return file


LineTooLong.__module__ = "fastserve"
