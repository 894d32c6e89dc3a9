"""The Python twin of the connections that wait in a hub: the same names as ``_green``, and the source of their types.

The C twin derives from the class that is here, and does the calls that make up a request itself.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from typing import Any, Final

from fastserve import _streams_py, _waiting

# The descriptor itself blocks if the connection does, so that whoever else gets it (a program that the handler starts,
# another process, a library) finds it as it expects it: only the calls here do not wait.
_DONTWAIT: Final = socket.MSG_DONTWAIT if hasattr(socket, "MSG_DONTWAIT") else 0
_GiveUp: Final[type[Exception]] = vars(socket)["_GiveupOnSendfile"]
_SENDFILE_AT_ONCE: Final = 2**30  # bytes

_plain: Any = socket.socket


class Connection(_streams_py.Connection):
    """A connection whose calls let other greenlets go on while they wait.

    It is a ``socket.socket``, and blocks, or times out, as one for who calls it. In a thread without a hub it waits as
    any socket. Closing it ends the waits for it, which raise the ``OSError`` of a closed socket.
    """

    __slots__ = ()

    def __init__(self, family: int = -1, type: int = -1, proto: int = -1, fileno: int | None = None) -> None:
        super().__init__(family, type, proto, fileno)
        _forget(_descriptor_of(self))

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        data: bytes = _receive(self, _plain.recv, flags, bufsize)
        if _waits_for_all(self, flags) and 0 < len(data) < bufsize:
            data += self._rest(bufsize - len(data), flags)
        return data

    def _rest(self, bufsize: int, flags: int) -> bytes:
        """Receive what MSG_WAITALL is still to wait for: all of it, until the end of the stream or an error."""
        parts = []
        with contextlib.suppress(OSError):  # what came before it is returned: recv(2)
            while bufsize > 0 and (part := self.recv(bufsize, flags & ~socket.MSG_WAITALL)):
                parts.append(part)
                bufsize -= len(part)
        return b"".join(parts)

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        size: int = _receive(self, _plain.recv_into, flags, buffer, nbytes)
        if _waits_for_all(self, flags):
            with memoryview(buffer) as given, given.cast("B") as view:
                wanted = nbytes or len(view)
                with contextlib.suppress(OSError):
                    while 0 < size < wanted and (
                        part := self.recv_into(view[size:wanted], 0, flags & ~socket.MSG_WAITALL)
                    ):
                        size += part
        return size

    def recvfrom(self, bufsize: int, flags: int = 0, /) -> tuple[bytes, Any]:
        data, address = _receive(self, _plain.recvfrom, flags, bufsize)
        if _waits_for_all(self, flags) and 0 < len(data) < bufsize:
            data += self._rest(bufsize - len(data), flags)
        return data, address

    def recvfrom_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> tuple[int, Any]:
        found: tuple[int, Any] = _receive(self, _plain.recvfrom_into, flags, buffer, nbytes)
        return found

    def recvmsg(self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /) -> Any:
        return _receive(self, _plain.recvmsg, flags, bufsize, ancbufsize)

    def recvmsg_into(self, buffers: Any, ancbufsize: int = 0, flags: int = 0, /) -> Any:
        return _receive(self, _plain.recvmsg_into, flags, list(buffers), ancbufsize)

    def send(self, data: Any, flags: int = 0, /) -> int:
        _flush()
        sent: int = _call(self, True, _plain.send, flags, data)
        if self.gettimeout() is None and not flags & _DONTWAIT:
            # The kernel takes all of it from a socket that blocks, unless it is interrupted: send(2).
            with _bytes_of(data) as view:
                return sent + self._send_rest(view, sent, flags)
        return sent

    def _send_rest(self, view: memoryview, start: int, flags: int) -> int:
        """Send what is left of a message, up to an error: the next call meets that again."""
        sent = start
        with contextlib.suppress(OSError):
            while sent < len(view):
                sent += _call(self, True, _plain.send, flags, view[sent:])
        return sent - start

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        _flush()
        deadline = _waiting.until(self.gettimeout())
        sent = 0
        with _bytes_of(data) as view:
            while True:
                sent += _call(self, True, _plain.send, flags, view[sent:], deadline=deadline)
                if sent == len(view):
                    return

    def sendto(self, data: Any, *arguments: Any) -> int:
        _flush()
        if len(arguments) not in (1, 2):
            return _plain.sendto(self, data, *arguments)  # type: ignore[no-any-return]  # which says what is wrong
        flags, address = arguments if len(arguments) == 2 else (0, *arguments)
        sent: int = _waiting.retry(
            self, True, lambda sock: _plain.sendto(sock, data, flags | _DONTWAIT, address), bool(flags & _DONTWAIT)
        )
        return sent

    def sendmsg(self, buffers: Any, ancdata: Any = (), flags: int = 0, address: Any = None, /) -> int:
        _flush()
        parts = [_bytes_of(part).tobytes() for part in buffers]
        ancdata = list(ancdata)
        sent: int = _waiting.retry(
            self,
            True,
            lambda sock: _plain.sendmsg(sock, parts, ancdata, flags | _DONTWAIT, address),
            bool(flags & _DONTWAIT),
        )
        if sent and self.gettimeout() is None and not flags & _DONTWAIT:
            with memoryview(b"".join(parts)) as view:
                return sent + self._send_rest(view, sent, flags)
        return sent

    def _sendfile_use_sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        """Send a file from the kernel: what ``sendfile()`` tries first."""
        if not hasattr(os, "sendfile"):
            raise _GiveUp("os.sendfile() not available on this platform")
        _plain._check_sendfile_params(self, file, offset, count)
        try:
            descriptor = file.fileno()
            size = os.fstat(descriptor).st_size
        except (AttributeError, OSError) as error:
            raise _GiveUp(error) from None  # not a regular file
        if not size:
            return 0
        timeout = self.gettimeout()
        if timeout == 0:
            raise ValueError("non-blocking sockets are not supported")
        _flush()
        sent = 0
        try:
            while not count or sent < count:
                at_once = min(count - sent, _SENDFILE_AT_ONCE) if count else _SENDFILE_AT_ONCE
                try:
                    _waiting.pace()
                    with _not_blocking(self):
                        done = os.sendfile(_descriptor_of(self), descriptor, offset + sent, at_once)
                except BlockingIOError:
                    _waiting.wait(self, True, _waiting.until(timeout))
                    continue
                except OSError as error:
                    if sent == 0:
                        raise _GiveUp(error) from None
                    raise
                if done == 0:
                    break
                sent += done
            return sent
        finally:
            if sent and hasattr(file, "seek"):
                file.seek(offset + sent)

    def connect(self, address: Any, /) -> None:
        error = self._connect(address)
        if error:
            raise OSError(error, os.strerror(error))

    def connect_ex(self, address: Any, /) -> int:
        try:
            return self._connect(address)
        except TimeoutError:
            return errno.EWOULDBLOCK  # as that of a plain socket

    def _connect(self, address: Any) -> int:
        timeout = self.gettimeout()
        deadline = _waiting.until(timeout)
        while True:
            with _not_blocking(self):
                error: int = _plain.connect_ex(self, address)
            if timeout == 0 or error not in (errno.EINPROGRESS, errno.EAGAIN):
                return error
            if error == errno.EINPROGRESS:
                break
            # The backlog of a Unix socket is full, and nothing tells when it is no longer: unix(7).
            _waiting.sleep(_RETRY_CONNECT, deadline)
        while not _waiting.is_ready(_descriptor_of(self), True):
            _waiting.wait(self, True, deadline)
        return self.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def accept(self) -> tuple[socket.socket, Any]:
        def take(listener: socket.socket) -> Any:
            with _not_blocking(listener):
                return _plain._accept(listener)

        fd, address = _waiting.retry(self, False, take)
        return _accepted(self, fd), address

    def settimeout(self, value: float | None, /) -> None:
        _flush()
        _plain.settimeout(self, value)

    def setblocking(self, flag: bool, /) -> None:
        _flush()
        _plain.setblocking(self, flag)

    def fileno(self) -> int:
        """Return the descriptor. What was written before has been sent then, and what is written later is at once."""
        fd = _descriptor_of(self)
        hub = _waiting.running()
        if hub is not None and fd >= 0:
            hub.expose(self, fd)
        return fd

    def shutdown(self, how: int, /) -> None:
        _flush()
        _plain.shutdown(self, how)

    def detach(self) -> int:
        """Give up the descriptor, which blocks if the connection did. Waits for it end as if it were closed."""
        _flush()
        fd: int = _plain.detach(self)
        _forget(fd)
        return fd

    def _real_close(self, _ss: Any = _socket.socket) -> None:
        try:
            _flush()
        finally:
            # In this order: who waits looks again, finds it closed, and does not wait for another of this number.
            fd = _ss.detach(self)
            if fd >= 0:
                _forget(fd)
                socket.close(fd)


_RETRY_CONNECT: Final = 0.01  # seconds

_descriptor_of: Final = _socket.socket.fileno


def _call(
    connection: Connection, writing: bool, method: Any, flags: int, data: Any, *more: Any, deadline: Any = _waiting.OWN
) -> Any:
    """Call a method that takes flags last, until it need not wait."""
    return _waiting.retry(
        connection,
        writing,
        lambda sock: method(sock, data, *more, flags | _DONTWAIT),
        bool(flags & _DONTWAIT),
        deadline,
    )


def _receive(connection: Connection, method: Any, flags: int, *arguments: Any) -> Any:
    _flush()
    return _call(connection, False, method, flags & ~getattr(socket, "MSG_WAITALL", 0), *arguments)


def _waits_for_all(connection: Connection, flags: int) -> bool:
    """Return whether a call waits for all that it asks for. With a timeout no socket does; recv(2)."""
    return bool(
        flags & getattr(socket, "MSG_WAITALL", 0)
        and not flags & (_DONTWAIT | socket.MSG_PEEK)
        and connection.gettimeout() is None
        and connection.type == socket.SOCK_STREAM
    )


@contextlib.contextmanager
def _not_blocking(connection: socket.socket) -> Iterator[None]:
    """Have the descriptor not block, for the calls that have no flags."""
    timeout = connection.gettimeout()
    if timeout == 0:
        yield
        return
    _plain.settimeout(connection, 0)
    try:
        yield
    finally:
        if _descriptor_of(connection) >= 0:
            _plain.settimeout(connection, timeout)


def _bytes_of(data: Any) -> memoryview:
    """Return the bytes of a buffer of whatever format."""
    with memoryview(data) as view:
        if not view.c_contiguous:
            raise BufferError("memoryview: underlying buffer is not C-contiguous")
        try:
            return view.cast("B")
        except (TypeError, ValueError):  # of a format, or a shape, that cannot be cast
            return memoryview(view.tobytes())


def _flush() -> None:
    """Send what the hub has gathered of earlier replies."""
    hub = _waiting.running()
    if hub is not None:
        hub.send_gathered()


def _forget(fd: int) -> None:
    """Let every hub forget a descriptor: it changes hands."""
    if fd >= 0:
        for hub in list(_waiting.hubs):
            hub.forget(fd)


def adopt(connection: socket.socket) -> None:
    """Make a plain socket, accepted by whomever, a :class:`Connection`."""
    connection.__class__ = Connection
    _forget(_descriptor_of(connection))


def end(connection: socket.socket) -> None:
    """Shut a connection down and close it."""
    with contextlib.suppress(OSError):  # the client has gone
        connection.shutdown(socket.SHUT_WR)
    connection.close()


def accept(listener: socket.socket) -> tuple[socket.socket, Any]:
    """Accept a connection that waits in the hub; return it and the address of the client."""
    fd, address = listener._accept()  # type: ignore[attr-defined]
    return _accepted(listener, fd), address


def _accepted(listener: socket.socket, fd: int) -> Connection:
    try:
        return Connection(listener.family, listener.type, listener.proto, fileno=fd)
    except BaseException:
        os.close(fd)
        raise


Connection.__module__ = "fastserve.streams"
