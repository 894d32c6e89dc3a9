"""The connections of a server with TLS. It imports ``ssl``, which ``tls`` puts off as long as it can."""

from __future__ import annotations

import errno
import os
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from fastserve import _backend, _green_py, _waiting, tls

_plain: Any = socket.socket
_cooperative_plain: Any = _green_py.Connection

_ACCEPT: Final = ssl.SSLSocket.accept
_WRAP_SOCKET: Final = ssl.SSLContext.wrap_socket


def is_plain_listener(listener: Any) -> bool:
    """Return whether nothing that takes part in ``listener.accept()`` was derived or replaced."""
    context = getattr(listener, "context", None)
    return (
        type(listener) is ssl.SSLSocket
        and getattr(listener.accept, "__func__", None) is _ACCEPT
        and isinstance(context, ssl.SSLContext)
        and getattr(context.wrap_socket, "__func__", None) is _WRAP_SOCKET
        and context.sslsocket_class is ssl.SSLSocket
    )


class Connection(ssl.SSLSocket):
    """A connection with TLS whose calls let other greenlets go on while they wait.

    It is an ``ssl.SSLSocket``, and blocks, or times out, as one for who calls it. Its descriptor is non-blocking, and
    so is the socket to the module ``_ssl``; the timeout that the user has set is kept beside. In a thread without a
    hub it waits as any socket.
    """

    suppress_ragged_eofs: bool
    _sslobj: Any  # of SSLSocket: None without TLS
    _timeout: float | None  # as the user has set it
    _write_lock: threading.Lock  # held while a write is under way: OpenSSL must get the same bytes again
    _write_queue: deque[Callable[[], object]]  # wake those that wait for the lock

    def gettimeout(self) -> float | None:
        return self._timeout

    @property
    def timeout(self) -> float | None:
        return self._timeout

    def settimeout(self, value: float | None, /) -> None:
        if value is not None:
            _plain.settimeout(self, value)  # which knows what is allowed
            value = _plain.gettimeout(self)
        _plain.settimeout(self, 0.0)
        self._timeout = value

    def getblocking(self) -> bool:
        return self._timeout != 0.0

    def setblocking(self, flag: bool, /) -> None:
        self.settimeout(None if flag else 0.0)

    # With TLS

    def read(self, len: int = 1024, buffer: Any = None) -> Any:
        sslobj = self._sslobj
        if sslobj is None:
            raise ValueError("Read on closed or unwrapped SSL socket.")
        try:
            if buffer is None:
                return self._complete("read", self._timeout, sslobj.read, len)
            return self._complete("read", self._timeout, sslobj.read, len, buffer)
        except ssl.SSLError as error:
            if error.args[0] != ssl.SSL_ERROR_EOF or not self.suppress_ragged_eofs:
                raise
            return b"" if buffer is None else 0

    def write(self, data: Any) -> int:
        sslobj = self._sslobj
        if sslobj is None:
            raise ValueError("Write on closed or unwrapped SSL socket.")
        return int(self._complete_alone("write", sslobj.write, data))

    def do_handshake(self, block: bool = False) -> None:
        self._check_connected()  # type: ignore[attr-defined]
        timeout = None if block and self._timeout == 0 else self._timeout
        self._complete("handshake", timeout, self._sslobj.do_handshake)

    def unwrap(self) -> socket.socket:
        sslobj = self._sslobj
        if not sslobj:
            raise ValueError(f"No SSL wrapper around {self}")
        unwrapped: socket.socket = self._complete_alone("read", sslobj.shutdown)
        self._sslobj = None
        return unwrapped

    def _complete(self, operation: str, timeout: float | None, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call a method of OpenSSL until it need not wait, waiting for what it asks for."""
        _waiting.pace()
        deadline = _waiting.until(timeout)
        while True:
            # OpenSSL knows the number of the descriptor, which by now may be that of another connection.
            if _plain.fileno(self) < 0:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            try:
                return call(*arguments)
            except ssl.SSLWantReadError:  # a write may ask for this too, and a read for the other
                if timeout == 0:
                    raise
                writing = False
            except ssl.SSLWantWriteError:
                if timeout == 0:
                    raise
                writing = True
            try:
                _waiting.wait(self, writing, deadline)
            except TimeoutError:
                raise TimeoutError(f"The {operation} operation timed out") from None

    def _complete_alone(self, operation: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """Do the same when no other greenlet is in a call of this kind: OpenSSL would mix up what they send."""
        if not self._write_lock.acquire(blocking=False):
            self._wait_for_lock(operation)
        try:
            return self._complete(operation, self._timeout, call, *arguments)
        finally:
            self._write_lock.release()
            self._wake_next()

    def _wait_for_lock(self, operation: str) -> None:
        if self._timeout == 0:
            raise ssl.SSLWantWriteError(ssl.SSL_ERROR_WANT_WRITE, "another greenlet is writing")
        deadline = _waiting.until(self._timeout)
        wake, wait = _new_sleeper()
        while True:
            self._write_queue.append(wake)
            acquired = self._write_lock.acquire(blocking=False)  # it may have been released in the meantime
            try:
                if not acquired:
                    wait(deadline)
            except BaseException:
                self._leave_queue(wake)
                raise
            if wake in self._write_queue:
                self._write_queue.remove(wake)
            if acquired or self._write_lock.acquire(blocking=False):
                return
            if deadline is not None and time.monotonic() >= deadline:
                self._leave_queue(wake)
                raise TimeoutError(f"The {operation} operation timed out")

    def _leave_queue(self, wake: Callable[[], object]) -> None:
        if wake in self._write_queue:
            self._write_queue.remove(wake)
        elif not self._write_lock.locked():
            self._wake_next()  # it was this one's turn

    def _wake_next(self) -> None:
        try:
            wake = self._write_queue.popleft()
        except IndexError:
            return  # as nearly always
        wake()

    # With TLS, by way of the above; without it, after unwrap() or shutdown(), those of a plain connection.

    _sendfile_use_sendfile = _cooperative_plain._sendfile_use_sendfile
    _rest = _cooperative_plain._rest

    def send(self, data: Any, flags: int = 0) -> int:
        if self._sslobj is None:
            return int(_cooperative_plain.send(self, data, flags))
        if flags != 0:
            raise ValueError(f"non-zero flags not allowed in calls to send() on {self.__class__}")
        return self.write(data)

    def sendall(self, data: Any, flags: int = 0) -> None:
        if self._sslobj is None:
            _cooperative_plain.sendall(self, data, flags)
        else:
            super().sendall(data, flags)

    def sendto(self, data: Any, *arguments: Any) -> int:
        if self._sslobj is None:
            return int(_cooperative_plain.sendto(self, data, *arguments))
        return super().sendto(data, *arguments)

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        if self._sslobj is None:
            return bytes(_cooperative_plain.recv(self, buflen, flags))
        return super().recv(buflen, flags)

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        if self._sslobj is None:
            return int(_cooperative_plain.recv_into(self, buffer, nbytes or 0, flags))
        return super().recv_into(buffer, nbytes, flags)

    def recvfrom(self, buflen: int = 1024, flags: int = 0) -> tuple[bytes, Any]:
        if self._sslobj is None:
            return _cooperative_plain.recvfrom(self, buflen, flags)  # type: ignore[no-any-return]
        return super().recvfrom(buflen, flags)

    def recvfrom_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> tuple[int, Any]:
        if self._sslobj is None:
            return _cooperative_plain.recvfrom_into(self, buffer, nbytes or 0, flags)  # type: ignore[no-any-return]
        return super().recvfrom_into(buffer, nbytes, flags)

    def detach(self) -> int:
        """Give up the descriptor, which blocks from then on if the connection did."""
        _green_py._forget(_plain.fileno(self))
        fd = super().detach()
        if self._timeout is None and fd >= 0:
            os.set_blocking(fd, True)
        return fd

    def _real_close(self) -> None:
        _green_py._forget(_plain.fileno(self))
        super()._real_close()  # type: ignore[misc]


def _new_sleeper() -> tuple[Callable[[], object], Callable[[float | None], object]]:
    """Return how any thread wakes the calling greenlet, or thread, and how this one waits for it until a deadline."""
    hub = _waiting.running()
    if hub is None:
        event = threading.Event()

        def wait(deadline: float | None) -> None:
            event.wait(None if deadline is None else deadline - time.monotonic())
            event.clear()

        return event.set, wait
    task = hub.this()
    return lambda: hub.post(task), lambda deadline: hub.park(
        None if deadline is None else max(deadline - time.monotonic(), 0.0)
    )


class _Unfinished(ssl.SSLSocket):
    """A connection whose handshake is to be done, by its worker, or else by the first call that needs it.

    Such a call may be one of an override of ``verify_request`` that asks for the certificate of the client.
    """

    _finished: type = ssl.SSLSocket

    @property
    def _sslobj(self) -> Any:
        # Whatever SSLSocket does with TLS, it does with this; None where there is none, as after shutdown().
        if vars(self)["_sslobj"] is not None:
            try:
                self.finish_handshake()
            except OSError as error:
                tls.mark(error)
                raise
        return vars(self)["_sslobj"]

    @_sslobj.setter
    def _sslobj(self, value: Any) -> None:
        vars(self)["_sslobj"] = value

    def do_handshake(self, block: bool = False) -> None:
        self.__class__ = self._finished
        vars(self).pop(tls.HANDSHAKE_LIMIT, None)
        _call_before(self)
        self.do_handshake(block)  # that of the other class, which it has from now on

    def finish_handshake(self) -> None:
        """Do the handshake, in the time that the server allows."""
        self.__class__ = self._finished
        handshake_in_time(self)


class _UnfinishedCooperative(_Unfinished, Connection):
    _finished = Connection


tls.unfinished.update((_Unfinished, _UnfinishedCooperative))

_BEFORE: Final = "_fastserve_before_handshake"  # the key in the __dict__ of a connection: what to call first

_UNFINISHED_OF: Final[dict[type, type]] = {ssl.SSLSocket: _Unfinished, Connection: _UnfinishedCooperative}


def postpone_handshake(request: Any, limit: float | None, before: Callable[[Any], object] | None = None) -> None:
    """Let the handshake of a connection be done later, within ``limit`` seconds (``None``: endless).

    One of a class that is not known, of a derived context or of gevent, does not do it by itself when it is first used.

    :param before: called with the connection when the handshake is next.
    """
    vars(request)[tls.HANDSHAKE_LIMIT] = limit
    if before is not None:
        vars(request)[_BEFORE] = before
    unfinished = _UNFINISHED_OF.get(type(request))
    if unfinished is not None and not _backend.monkey_patched():
        request.__class__ = unfinished


def _call_before(request: Any) -> None:
    """Do what is to be done before the handshake of a connection, which is next."""
    before = vars(request).pop(_BEFORE, None)
    if before is not None:
        before(request)


def handshake_in_time(request: Any) -> None:
    """Do the handshake that was postponed, in the time that it may take."""
    limit: float | None = vars(request).pop(tls.HANDSHAKE_LIMIT, None)
    _call_before(request)
    timeout = request.gettimeout()
    request.settimeout(min(limit, timeout) if limit and timeout else limit or timeout or None)
    try:
        request.do_handshake()
    except OSError:
        vars(request)[tls.FAILED_HANDSHAKE] = True
        raise
    finally:
        if request.fileno() >= 0:
            request.settimeout(timeout)


def receive_plain(request: Any, size: int, flags: int = 0) -> bytes:
    """Do what ``recv`` of a socket does, with bytes that come before the handshake, and are not for TLS."""
    receive: Callable[[Any, int, int], bytes] = (
        _cooperative_plain.recv if isinstance(request, Connection) else socket.socket.recv
    )
    return receive(request, size, flags)


def make_cooperative(request: Any) -> None:
    """Let an ``ssl.SSLSocket`` wait in the hub from now on; leave one of a user's class as it is."""
    cooperative = {ssl.SSLSocket: Connection, _Unfinished: _UnfinishedCooperative}.get(type(request))
    if cooperative is None:
        return
    timeout = request.gettimeout()
    request.__class__ = cooperative
    vars(request).update(_write_lock=threading.Lock(), _write_queue=deque())
    request.settimeout(timeout)
    _green_py._forget(_plain.fileno(request))


Connection.__module__ = "fastserve.tls"
