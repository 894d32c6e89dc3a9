"""The mix-in that gives TLS to a stream server: ``class Server(TLSMixIn, ThreadingTCPServer)``.

The listener stays a plain socket. Each connection that was accepted is made one with TLS, by the context of that
moment, so that another context serves the next connection while those that are open keep theirs. Who does the
handshake, and when, is in ``tls``. The module ``ssl`` is imported with the first such server.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

from fastserve import _waiting, tls
from fastserve._loop import watch_forks
from fastserve._order import BeforeServer
from fastserve.server import own_get_requests
from fastserve.workers._following import following

if TYPE_CHECKING:
    import ssl

    Path = str | os.PathLike[str]

# Keys in the server's __dict__: the context that was made of its files, and how often that was begun.
CONTEXT: Final = "_fastserve_tls_context"
LOADS: Final = "_fastserve_tls_loads"

# Held while files are loaded. It can be taken again by a signal handler, which may interrupt that.
_loading = threading.RLock()


def _after_fork_in_child() -> None:
    global _loading
    _loading = threading.RLock()  # the old one may be held by a thread that is not there


class TLSMixIn(BeforeServer):
    """Serve connections with TLS: ``class Server(TLSMixIn, ThreadingTCPServer)``, under any worker model.

    ``request`` is an ``ssl.SSLSocket``. The handshake is done by who handles the request, in its thread, greenlet or
    child process, before :meth:`finish_request` goes on: a client that stays silent there holds up nobody else.
    Without a worker mix-in that is the loop. One that fails or takes too long is not reported.

    Name it first. Its attributes are those of the class or the instance, and are needed when the listener is bound:
    either ``ssl_context``, or ``tls_cert`` and what belongs to it, of which a context is made: that of
    ``ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)``, for TLS 1.2 and later.

    :cvar ssl_context: the context, made with ``ssl.PROTOCOL_TLS_SERVER``. Another one may be assigned at any time, by
        any thread: it is that of the connections which are accepted from then on. ``None`` by default.
    :cvar tls_cert: the path of a file with the certificate chain, in PEM.
    :cvar tls_key: the path of a file with the private key, in PEM and not encrypted; ``None``, the default, if it is in
        the same file as the certificate.
    :cvar tls_client_ca: the path of a file with certificates, in PEM. Where it is given, a client needs a certificate
        that one of these has signed; ``request.getpeercert()`` tells what is in it. ``None`` by default.
    :cvar alpn_protocols: protocols that the server speaks, the one that it prefers first (RFC 7301), as
        ``("h2", "http/1.1")``; ``request.selected_alpn_protocol()`` tells what was agreed upon. None by default.
    :cvar handshake_timeout: seconds that a client may take for the handshake, 10 by default; ``None`` is endless.
    """

    ssl_context: ssl.SSLContext | None = None

    tls_cert: Path | None = None

    tls_key: Path | None = None

    tls_client_ca: Path | None = None

    alpn_protocols: Sequence[str] = ()

    handshake_timeout: float | None  # without a value, which would come before that of the class that follows

    def server_bind(self) -> None:
        """Bind the listener, if there is a certificate to serve with.

        :raises TypeError: if this is a server for datagrams.
        :raises ValueError: if there is neither ``ssl_context`` nor ``tls_cert``, or more than one of the two.
        :raises OSError: if a file cannot be read or, ``ssl.SSLError``, be used.
        """
        _prepare(self)
        super().server_bind()  # type: ignore[misc]

    def server_activate(self) -> None:
        """Listen. Where :meth:`server_bind` was overridden it raises what that does."""
        _prepare(self)
        super().server_activate()  # type: ignore[misc]

    def reload_certificates(self) -> None:
        """Load the files again, for the connections that are accepted from now on.

        Those that are open keep what they have. If it fails, what was in use stays in use. Any thread may call it. So
        may a signal handler, unless the main thread handles requests, as it does without a worker mix-in and with
        :class:`GreenletMixIn`: what a signal handler does with OpenSSL takes the place of the error of a call that it
        interrupts, so that the end of a connection, say, becomes an ``ssl.SSLError``.

        :raises OSError: if a file cannot be read or, ``ssl.SSLError``, be used, as when the key is not that of the
            certificate because only one of the two files was exchanged yet.
        :raises ValueError: if there are no files, because there is an ``ssl_context``: assign a new one instead.
        """
        if self.ssl_context is not None:
            raise ValueError("the server has an ssl_context, and no files to load again: assign a new context")
        _load(self)

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection; return it, with TLS and before its handshake, and its address.

        One that has TLS already, because the listener was wrapped or by an override that follows, stays as it is.
        """
        import ssl

        plain, client_address = super().get_request()  # type: ignore[misc]
        if isinstance(plain, ssl.SSLSocket):
            return plain, client_address
        try:
            context = _context_of(self)
        except Exception as error:
            # A wrong context was assigned. Serving goes on: the right one may follow.
            self.handle_error(plain, client_address)  # type: ignore[attr-defined]
            self.shutdown_request(plain)  # type: ignore[attr-defined]
            raise tls.aborted() from error
        return tls.wrap(self, plain, client_address, context, _waiting.running() is not None), client_address

    def _handle_request_noblock(self) -> None:
        # That of the stdlib would let a handshake that fails in verify_request end the loop.
        following(TLSMixIn, self, "_handle_request_noblock")()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Do the handshake, unless that was done, and have the request handled. The worker's thread calls it."""
        if tls.is_ready(request):
            super().finish_request(request, client_address)  # type: ignore[misc]


own_get_requests.add(TLSMixIn.get_request)


def _prepare(server: Any) -> None:
    """Raise if ``server`` cannot serve with TLS."""
    if getattr(server, "socket_type", socket.SOCK_STREAM) != socket.SOCK_STREAM:
        raise TypeError(f"TLSMixIn is for connections, and {type(server).__name__} serves datagrams")
    if server.ssl_context is not None:
        for name in ("tls_cert", "tls_key", "tls_client_ca", "alpn_protocols"):
            if getattr(server, name):
                raise ValueError(f"there are both ssl_context and {name}: the context is to have all of it")
    _context_of(server)


def _context_of(server: Any) -> ssl.SSLContext:
    """Return the context for the next connection of ``server``."""
    given = server.ssl_context
    if given is None:
        return vars(server).get(CONTEXT) or _load(server)
    import ssl

    if not isinstance(given, ssl.SSLContext):
        raise TypeError(f"ssl_context is to be an ssl.SSLContext, not {type(given).__name__}")
    if given.protocol == ssl.PROTOCOL_TLS_CLIENT or given.check_hostname:
        raise ValueError("ssl_context is one for clients: make it with ssl.PROTOCOL_TLS_SERVER")
    return given


def _load(server: Any) -> ssl.SSLContext:
    """Make a context of the files of ``server``, for its next connections."""
    attributes = vars(server)
    watch_forks(_after_fork_in_child)
    with _loading:
        load = attributes[LOADS] = attributes.get(LOADS, 0) + 1
        context = new_context(server.tls_cert, server.tls_key, server.tls_client_ca, server.alpn_protocols)
        # A signal handler may have loaded newer files since. None comes in between here: nothing is called.
        if attributes[LOADS] == load:
            attributes[CONTEXT] = context
    made: ssl.SSLContext = attributes[CONTEXT]
    return made


def new_context(
    cert: Path | None, key: Path | None = None, client_ca: Path | None = None, alpn_protocols: Sequence[str] = ()
) -> ssl.SSLContext:
    """Return the context that is made of the attributes of a :class:`TLSMixIn`.

    :raises ValueError: if there is no certificate.
    :raises OSError: if a file cannot be read or, ``ssl.SSLError``, be used.
    """
    import ssl

    if cert is None:
        raise ValueError("TLSMixIn needs an ssl_context, or a certificate: tls_cert and tls_key")
    if isinstance(alpn_protocols, str):
        raise TypeError(f"alpn_protocols is to be a sequence of names, not {alpn_protocols!r}")
    for path in (cert, key, client_ca):
        if path is not None:
            with open(path, "rb"):
                pass  # ssl would not tell which of the files it cannot read

    def no_password() -> NoReturn:
        # Without it OpenSSL would ask for one on the terminal.
        raise ssl.SSLError(ssl.SSL_ERROR_SSL, f"the key in {os.fspath(key or cert)!r} is encrypted")

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = max(context.minimum_version, ssl.TLSVersion.TLSv1_2)
    with _told(f"in tls_cert {cert!s}" + ("" if key is None else f" and tls_key {key!s}")):
        context.load_cert_chain(cert, key, no_password)
    if client_ca is not None:
        with _told(f"in tls_client_ca {client_ca!s}"):
            context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    if alpn_protocols:
        context.set_alpn_protocols(list(alpn_protocols))
    return context


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
    """Have an error of OpenSSL say which files it is about."""
    try:
        yield
    except OSError as error:
        error.add_note(where)
        raise
