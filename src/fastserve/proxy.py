"""Servers behind a proxy that speaks the PROXY protocol: HAProxy, and many load balancers.

Such a proxy sends a header before what the client sends, which tells the client's address. It is read by whoever
handles the request, before the handler: the thread, the greenlet, the forked child. The specification is HAProxy's
``proxy-protocol.txt``; ``_proxy_protocol`` knows what a header looks like.
"""

from __future__ import annotations

import errno
import functools
import ipaddress
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, Final
from weakref import WeakKeyDictionary

from fastserve import _backend, tls
from fastserve import server as _server
from fastserve._loop import State
from fastserve._order import BeforeServer
from fastserve._proxy_protocol import DEFAULT_LIMIT, LONGEST_V1, ProxyInfo, ProxyProtocolError, ProxySSL, parse
from fastserve._stdlib import socketserver
from fastserve.workers.greenlets import GreenletMixIn

__all__ = ["ProxyInfo", "ProxyProtocolError", "ProxyProtocolMixIn", "ProxySSL", "proxy_info"]

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_NETWORKS: Final = (
    str,
    ipaddress.IPv4Network,
    ipaddress.IPv6Network,
    ipaddress.IPv4Address,
    ipaddress.IPv6Address,
)

_Receive = Callable[[int, int], bytes]  # socket.recv

_TRUST: Final = "_fastserve_trust"  # the key in the server's __dict__
_PEERS: Final = 1024  # peers of which it is remembered whether they are trusted

# What the header of a connection said, while there is a reference to the connection.
_known: Final[WeakKeyDictionary[socket.socket, ProxyInfo]] = WeakKeyDictionary()

# The server whose handler runs in the current context, and what the header of its connection said.
_handled: Final[ContextVar[tuple[object, ProxyInfo] | None]] = ContextVar("fastserve.proxy", default=None)


def proxy_info(request: object) -> ProxyInfo | None:
    """Return what the header of a connection said, ``None`` if none was read. Any thread may call it.

    :param request: the connection that a handler has as ``self.request``.
    """
    return _known.get(request) if isinstance(request, socket.socket) else None


class ProxyProtocolMixIn(BeforeServer):
    """Read the header of the PROXY protocol: ``class Server(ProxyProtocolMixIn, ThreadingMixIn, TCPServer)``.

    It is named before other mix-ins and the server, any of fastserve's or the stdlib's. The ``client_address`` of a
    handler is that of the client, as the header tells it. ``verify_request``, ``process_request`` and whatever else
    comes before the handler has the address of the proxy. A header that names no addresses, such as that of a health
    check, leaves the address of the proxy.

    A connection that does not come from a trusted peer, or whose header is wrong, too long or late, is closed
    without a handler and without a report: :meth:`proxy_header_failed`.

    :cvar trusted_proxies: networks and addresses from which connections are taken, as strings or objects of
        :mod:`ipaddress`; ``("127.0.0.0/8", "::1/128")`` by default, this machine alone. Whoever connects to a Unix
        socket is trusted: the permissions of its path say who may.
    :cvar proxy_header_timeout: seconds in which the whole header has to come, from when the worker has the connection;
        5 by default, ``None`` is endless.
    :cvar proxy_header_limit: bytes that a header of version 2 may have, its 16 fixed ones included, 4096 by default.
        Version 1 has its own limit, 107.
    """

    trusted_proxies: Sequence[str | Network | ipaddress.IPv4Address | ipaddress.IPv6Address] = (
        "127.0.0.0/8",
        "::1/128",
    )

    proxy_header_timeout: float | None = 5.0

    proxy_header_limit = DEFAULT_LIMIT

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Pass the arguments on.

        :raises TypeError: if the server is one of datagrams, which have no header here, or ``trusted_proxies`` is a
            string.
        :raises ValueError: if ``trusted_proxies`` has what is no network.
        """
        if isinstance(self, socketserver.UDPServer):
            raise TypeError("ProxyProtocolMixIn reads the header of connections: a server of datagrams has none")
        _trust_of(self)
        super().__init__(*args, **kwargs)

    @property
    def proxy_info(self) -> ProxyInfo | None:
        """What the header said of the connection that the calling thread or greenlet handles, ``None`` elsewhere.

        In a thread that a handler has started there is none; :func:`fastserve.proxy_info` tells it of a connection.
        """
        handled = _handled.get()
        return handled[1] if handled is not None and handled[0] is self else None

    def proxy_header_failed(self, request: Any, client_address: Any, error: ProxyProtocolError | OSError) -> None:
        """Do nothing: the connection is closed next, and no handler runs. May be overridden to count, or to log.

        The worker calls it: see :meth:`finish_request`.

        :param request: the connection. Something of the header has been received, nobody knows how much.
        :param client_address: the address of the peer.
        :param error: ``TimeoutError`` if the header came too late, another ``OSError`` if the connection failed, or
            else :exc:`fastserve.ProxyProtocolError`.
        """

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection: that of the server. With TLS it leaves the handshake for after the header.

        :raises RuntimeError: if the listener does the handshake itself, and it is not known how to put it off.
        """
        get_request: Callable[[], tuple[Any, Any]] = super().get_request  # type: ignore[misc]
        listener = self.socket  # type: ignore[attr-defined]
        if type(listener) is socket.socket:
            return get_request()
        if tls.is_listener(listener):
            if _function_of(get_request) in _server.ACCEPTING_GET_REQUESTS:
                return tls.accept(self, False)
        elif _is_tls(listener) and listener.do_handshake_on_connect:
            if _function_of(get_request) is GreenletMixIn.get_request:
                accept = super(GreenletMixIn, self).get_request  # type: ignore[misc]
            else:
                accept = get_request
            if _function_of(accept) in _server.ACCEPTING_GET_REQUESTS:
                raise RuntimeError(
                    "the header of the PROXY protocol comes before the handshake of TLS: wrap the listener with "
                    "do_handshake_on_connect=False"
                )
        return get_request()

    @tls.finishes_handshakes
    def finish_request(self, request: Any, client_address: Any) -> Any:
        """Read the header, and have the request handled for the address that it tells. The worker calls it."""
        if type(request) in tls.unfinished and not tls.finish_handshake(request):
            return None
        info = proxy_info(request) or _receive_header(self, request, client_address)
        if info is None:
            return None
        token = _handled.set((self, info))
        try:
            return super().finish_request(request, _client_of(info, client_address))  # type: ignore[misc]
        finally:
            _handled.reset(token)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report the error of a handler, with the address of its client: see :meth:`BaseServer.handle_error`."""
        super().handle_error(request, _client_of(proxy_info(request), client_address))  # type: ignore[misc]

    def _before_handshake(self, request: Any, client_address: Any) -> None:
        """Read the header of a connection with TLS, whose handshake is next: see :func:`fastserve.tls.accept`."""
        if proxy_info(request) is None and _receive_header(self, request, client_address) is None:
            raise ConnectionAbortedError(errno.ECONNABORTED, os.strerror(errno.ECONNABORTED))


def _function_of(method: Any) -> Any:
    return getattr(method, "__func__", None)


def _client_of(info: ProxyInfo | None, peer: Any) -> Any:
    return peer if info is None or info.source is None else info.source


def _receive_header(server: Any, request: Any, client_address: Any) -> ProxyInfo | None:
    """Receive the header of a connection, and remember what it says. Return ``None`` if it is to be refused."""
    receive = _receiver_of(request)
    try:
        if not _trust_of(server)(request, client_address):
            raise ProxyProtocolError(f"{client_address!r} is none of trusted_proxies")
        info = _receive(request, receive, server.proxy_header_limit, server.proxy_header_timeout)
    except (ProxyProtocolError, OSError) as error:
        meter = State.of(server).meter
        if meter is not None:
            meter.refuse(request, "proxy_header")
        server.proxy_header_failed(request, client_address, error)
        return None
    _known[request] = info
    return info


def _receive(request: socket.socket, receive: _Receive, limit: int, seconds: float | None) -> ProxyInfo:
    """Receive a header, and not a byte that comes after it."""
    deadline = None if seconds is None else time.monotonic() + seconds
    timeout = request.gettimeout()

    def take(number: int, flags: int = 0) -> bytes:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError("timed out")
        request.settimeout(left)
        received = receive(number, flags)
        if not received:
            raise ProxyProtocolError("the connection has ended before its header")
        return received

    try:
        # Mostly all of it has come. To look again would not wait for the rest: that is taken piece by piece.
        info, size = parse(take(max(limit, LONGEST_V1), socket.MSG_PEEK), limit)
        data = b"" if info is None else take(size)
        if info is not None and len(data) == size:
            return info
        while True:
            info, missing = parse(data, limit)
            if info is not None:
                return info
            data += take(missing)
    finally:
        # Not request.fileno(): in a greenlet that is for those who write to the descriptor themselves.
        if socket.socket.fileno(request) >= 0:
            request.settimeout(timeout)


def _receiver_of(request: Any) -> _Receive:
    """Return what receives bytes of a connection, past TLS if there is any."""
    if not isinstance(request, socket.socket):
        raise TypeError(f"the header of the PROXY protocol is read from a socket.socket, not from {request!r}")
    if not _is_tls(request):
        return request.recv
    if request.version() is not None:  # type: ignore[attr-defined]
        raise RuntimeError(
            "the header of the PROXY protocol comes before the handshake of TLS, which get_request() has done already"
        )
    from fastserve import _tls

    return functools.partial(_tls.receive_plain, request)


def _is_tls(connection: Any) -> bool:
    ssl = sys.modules.get("ssl")
    return ssl is not None and isinstance(connection, ssl.SSLSocket)


class _Trust:
    """Tells whether connections of a peer are taken."""

    def __init__(self, asked: tuple[Any, ...]) -> None:
        self.asked = asked
        networks = []
        for network in asked:
            if not isinstance(network, _NETWORKS):
                raise TypeError(f"trusted_proxies has {network!r}, which is no network")
            networks.append(ipaddress.ip_network(network))
        self._networks = networks
        self._is_in = functools.lru_cache(_PEERS)(self._look_up)

    def __call__(self, request: socket.socket, client_address: Any) -> bool:
        if isinstance(client_address, tuple) and client_address and isinstance(client_address[0], str):
            return self._is_in(client_address[0])
        return request.family == getattr(socket, "AF_UNIX", None)

    def _look_up(self, host: str) -> bool:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        # What an IPv6 listener says of a peer with IPv4.
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return any(known in network for network in self._networks for known in (address, mapped) if known is not None)


def _trust_of(server: Any) -> _Trust:
    """Return who is trusted by a server, as it says at this moment."""
    asked = server.trusted_proxies
    if isinstance(asked, str):
        raise TypeError("trusted_proxies is a sequence of networks, not a string")
    trust: _Trust | None = vars(server).get(_TRUST)
    if trust is None or trust.asked != tuple(asked):
        trust = vars(server)[_TRUST] = _Trust(tuple(asked))
    return trust


_server.passing_get_requests.add(ProxyProtocolMixIn.get_request)
if _backend.turns is not None:
    _backend.turns.know({}, {ProxyProtocolMixIn.get_request})
