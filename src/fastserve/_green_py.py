"""The Python twin of the connections that wait in a hub: the same names as ``_green``, and the source of their types.

The C twin derives from the class that is here, and does the calls that make up a request itself.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from typing import Any, Final

from fastserve import _streams_py, _waiting

_DONTWAIT: Final = getattr(socket, "MSG_DONTWAIT", 0)
_GiveUp: Final[type[Exception]] = vars(socket)["_GiveupOnSendfile"]
_SENDFILE_AT_ONCE: Final = 0x7FFF0000  # bytes; the most that one call takes: sendfile(2)

_plain: Any = socket.socket


class Connection(_streams_py.Connection):
    """A connection whose calls let other greenlets go on while they wait.

    It is a ``socket.socket``, and blocks, or times out, as one for who calls it; its descriptor is non-blocking. In a
    thread without a hub it waits as any socket.
    """

    __slots__ = ()

    def __init__(self, family: int = -1, type: int = -1, proto: int = -1, fileno: int | None = None) -> None:
        super().__init__(family, type, proto, fileno)
        _forget(self)
        os.set_blocking(_plain.fileno(self), False)

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        if flags & _DONTWAIT:
            return _plain.recv(self, bufsize, flags)
        if flags & socket.MSG_WAITALL:
            return self._receive_all(bufsize, flags)
        return _waiting.retry(self, False, _plain.recv, bufsize, flags)

    def _receive_all(self, bufsize: int, flags: int) -> bytes:
        flags &= ~socket.MSG_WAITALL
        parts = []
        while bufsize > 0 and (part := self.recv(bufsize, flags)):
            parts.append(part)
            bufsize -= len(part)
            if flags & socket.MSG_PEEK:
                break  # it would be the same again
        return b"".join(parts)

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        if flags & _DONTWAIT:
            return _plain.recv_into(self, buffer, nbytes, flags)
        return _waiting.retry(self, False, _plain.recv_into, buffer, nbytes, flags & ~socket.MSG_WAITALL)

    def recvfrom(self, bufsize: int, flags: int = 0, /) -> tuple[bytes, Any]:
        if flags & _DONTWAIT:
            return _plain.recvfrom(self, bufsize, flags)
        return _waiting.retry(self, False, _plain.recvfrom, bufsize, flags)

    def recvfrom_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> tuple[int, Any]:
        if flags & _DONTWAIT:
            return _plain.recvfrom_into(self, buffer, nbytes, flags)
        return _waiting.retry(self, False, _plain.recvfrom_into, buffer, nbytes, flags)

    def recvmsg(self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /) -> Any:
        if flags & _DONTWAIT:
            return _plain.recvmsg(self, bufsize, ancbufsize, flags)
        return _waiting.retry(self, False, _plain.recvmsg, bufsize, ancbufsize, flags)

    def recvmsg_into(self, buffers: Any, ancbufsize: int = 0, flags: int = 0, /) -> Any:
        if flags & _DONTWAIT:
            return _plain.recvmsg_into(self, buffers, ancbufsize, flags)
        return _waiting.retry(self, False, _plain.recvmsg_into, buffers, ancbufsize, flags)

    def send(self, data: Any, flags: int = 0, /) -> int:
        _flush(self)
        if flags & _DONTWAIT:
            return _plain.send(self, data, flags)
        sent: int = _waiting.retry(self, True, _plain.send, data, flags)
        if self.gettimeout() is not None:
            return sent
        # The kernel takes all of it from a socket that blocks, unless it is interrupted: send(2).
        with memoryview(data) as given, given.cast("B") as view:
            while sent < len(view):
                try:
                    sent += _waiting.retry(self, True, _plain.send, view[sent:], flags)
                except OSError:
                    break  # the next call meets it again; this one has sent something
        return sent

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        _flush(self)
        timeout = self.gettimeout()
        deadline = _waiting.until(timeout)
        sent = 0
        with memoryview(data) as given, given.cast("B") as view:
            while True:
                if timeout is None or timeout == 0 or _waiting.is_ready(_plain.fileno(self), True):
                    try:
                        sent += _plain.send(self, view[sent:], flags)
                    except BlockingIOError:
                        if timeout == 0:
                            raise
                    else:
                        if sent == len(view):
                            return
                        if timeout is not None:
                            continue
                _waiting.wait(self, True, deadline)

    def sendto(self, data: Any, *arguments: Any) -> int:
        _flush(self)
        return _waiting.retry(self, True, _plain.sendto, data, *arguments)

    def sendmsg(self, buffers: Any, ancdata: Any = (), flags: int = 0, address: Any = None, /) -> int:
        _flush(self)
        if flags & _DONTWAIT:
            return _plain.sendmsg(self, buffers, ancdata, flags, address)
        parts = [bytes(part) for part in buffers]
        sent: int = _waiting.retry(self, True, _plain.sendmsg, parts, ancdata, flags, address)
        if self.gettimeout() is None and self.type == socket.SOCK_STREAM and sent < sum(map(len, parts)):
            return sent + self.send(b"".join(parts)[sent:], flags)
        return sent

    def _sendfile_use_sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        """Send a file from the kernel: what ``sendfile()`` tries first."""
        self._check_sendfile_params(file, offset, count)
        try:
            descriptor = file.fileno()
            status = os.fstat(descriptor)
        except (AttributeError, OSError) as error:
            raise _GiveUp(error) from None
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            raise _GiveUp("not a regular file, or an empty one")
        if self.gettimeout() == 0:
            raise ValueError("non-blocking sockets are not supported")
        _flush(self)
        deadline = _waiting.until(self.gettimeout())
        sent = 0
        try:
            while count is None or sent < count:
                size = _SENDFILE_AT_ONCE if count is None else min(count - sent, _SENDFILE_AT_ONCE)
                try:
                    done = os.sendfile(_plain.fileno(self), descriptor, offset + sent, size)
                except BlockingIOError:
                    _waiting.wait(self, True, deadline)
                    continue
                except OSError as error:
                    if sent == 0 and error.errno != errno.ENOTCONN:
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
        error = self.connect_ex(address)
        if error == errno.ETIMEDOUT and self.gettimeout() is not None:
            raise TimeoutError("timed out")
        if error:
            raise OSError(error, os.strerror(error))

    def connect_ex(self, address: Any, /) -> int:
        timeout = self.gettimeout()
        if timeout:
            _plain.settimeout(self, 0)  # else the call itself would wait
        try:
            error: int = _plain.connect_ex(self, address)
        finally:
            if timeout:
                _plain.settimeout(self, timeout)
        if error != errno.EINPROGRESS or timeout == 0:
            return error
        try:
            _waiting.wait(self, True, _waiting.until(timeout))
        except TimeoutError:
            return errno.ETIMEDOUT
        return self.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def accept(self) -> tuple[socket.socket, Any]:
        fd, address = _waiting.retry(self, False, _plain._accept)
        return Connection(self.family, self.type, self.proto, fileno=fd), address

    def settimeout(self, value: float | None, /) -> None:
        _plain.settimeout(self, value)
        if value is None:
            os.set_blocking(_plain.fileno(self), False)

    def setblocking(self, flag: bool, /) -> None:
        self.settimeout(None if flag else 0.0)

    def shutdown(self, how: int, /) -> None:
        _flush(self)
        _plain.shutdown(self, how)

    def detach(self) -> int:
        """Give up the descriptor, which blocks from then on if the connection did."""
        _flush(self)
        _forget(self)
        timeout = self.gettimeout()
        fd: int = _plain.detach(self)
        if timeout is None and fd >= 0:
            os.set_blocking(fd, True)
        return fd

    def _real_close(self, _ss: Any = socket.socket) -> None:
        try:
            _flush(self)
        finally:
            _forget(self)
            _ss.close(self)


def _flush(connection: socket.socket) -> None:
    """Send what the hub has gathered of earlier replies."""
    hub = _waiting.running()
    if hub is not None:
        hub.send_gathered()


def _forget(connection: socket.socket) -> None:
    """Let every hub forget the descriptor: it changes hands."""
    fd = _plain.fileno(connection)
    if fd >= 0:
        for hub in list(_waiting.hubs):
            hub.forget(fd)


def accept(listener: socket.socket) -> tuple[socket.socket, Any]:
    """Accept a connection that waits in the hub; return it and the address of the client."""
    fd, address = listener._accept()  # type: ignore[attr-defined]
    return Connection(listener.family, listener.type, listener.proto, fileno=fd), address


Connection.__module__ = "fastserve.streams"
