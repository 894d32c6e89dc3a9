"""What the tests of TLS share: certificates, contexts and clients."""

from __future__ import annotations

import contextlib
import functools
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support import LIMIT

NAME = "server.test"


@functools.cache
def authority() -> Any:
    """Return the authority that all sides trust."""
    return pytest.importorskip("trustme", reason="certificates are made by the package trustme").CA()


def server_context(*names: str, **attributes: Any) -> ssl.SSLContext:
    """Return the context of a server with these names, and these attributes set."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().issue_cert(*(names or (NAME, "127.0.0.1", "localhost"))).configure_cert(context)
    authority().configure_trust(context)
    for name, value in attributes.items():
        setattr(context, name, value)
    return context


def write_certificate(directory: Path, *names: str, stem: str = "server") -> tuple[Path, Path]:
    """Write a new certificate with these names, and its key, into files; return their paths.

    Files of that name are replaced at once, as who renews certificates does it.
    """
    issued = authority().issue_cert(*(names or (NAME, "127.0.0.1", "localhost")))
    paths = directory / f"{stem}.pem", directory / f"{stem}.key"
    for path, pems in zip(paths, (issued.cert_chain_pems, [issued.private_key_pem]), strict=True):
        new = path.with_suffix(f"{path.suffix}.new")
        new.write_bytes(b"".join(pem.bytes() for pem in pems))
        new.replace(path)
    return paths


def write_authority(directory: Path) -> Path:
    """Write the certificate of the authority into a file; return its path."""
    path = directory / "authority.pem"
    authority().cert_pem.write_to_path(str(path))
    return path


def serial_of(path: Path) -> str:
    """Return the serial number of the certificate in a file, as ``getpeercert()`` tells it."""
    x509 = pytest.importorskip("cryptography.x509")
    return f"{x509.load_pem_x509_certificate(path.read_bytes()).serial_number:X}"


def serial_at(client: ssl.SSLSocket) -> str:
    """Return the serial number of the certificate that the server has shown to a client."""
    certificate = client.getpeercert()
    assert certificate is not None
    return str(certificate["serialNumber"]).lstrip("0")


# A forked child has whatever locks of OpenSSL another thread holds at the fork, for good, and waits for them for ever.
# Servers in this process that fork do so between the calls of its clients.
_in_openssl = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_in_openssl.acquire, after_in_parent=_in_openssl.release, after_in_child=_in_openssl.release
    )


class Client(ssl.SSLSocket):
    """A client that never waits within OpenSSL."""

    def _wait_outside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        timeout = self.gettimeout()
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with _in_openssl:
                self.settimeout(0.0)
                try:
                    return function(*arguments)
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                    if timeout == 0.0:
                        raise
                    reads = isinstance(error, ssl.SSLWantReadError)
                finally:
                    self.settimeout(timeout)
            ready = select.poll()  # descriptors may have large numbers
            ready.register(self, select.POLLIN if reads else select.POLLOUT)
            if not ready.poll(None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError("timed out")

    def do_handshake(self, block: bool = False) -> None:
        self._wait_outside(super().do_handshake)

    def read(self, *arguments: Any) -> Any:
        return self._wait_outside(super().read, *arguments)

    def send(self, data: Any, flags: int = 0) -> int:
        return int(self._wait_outside(super().send, data, flags))

    def unwrap(self) -> socket.socket:
        plain: socket.socket = self._wait_outside(super().unwrap)
        return plain


def client_context(certificate: bool = False, **attributes: Any) -> ssl.SSLContext:
    """Return the context of a client, with a certificate of its own or without, and these attributes set."""
    with _in_openssl:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.sslsocket_class = Client
        authority().configure_trust(context)
        if certificate:
            authority().issue_cert("client@client.test").configure_cert(context)
        for name, value in attributes.items():
            setattr(context, name, value)
    return context


def wrapped(server: Any, context: ssl.SSLContext | None = None, **options: Any) -> Any:
    """Wrap the listener of a server, by everybody's recipe."""
    server.socket = (context or server_context()).wrap_socket(server.socket, server_side=True, **options)
    return server


def end(client: socket.socket) -> None:
    """End a connection, though a child that was forked meanwhile may hold it too."""
    with contextlib.suppress(OSError):  # the server has gone already
        socket.socket.shutdown(client, socket.SHUT_RDWR)


@contextlib.contextmanager
def silent_client(server: Any) -> Iterator[socket.socket]:
    """A client that connects and says nothing."""
    with socket.create_connection(server.server_address[:2], LIMIT) as client:
        try:
            yield client
        finally:
            end(client)


def is_ended(client: socket.socket) -> bool:
    """Wait until the server has ended a connection. Return ``True``."""
    with contextlib.suppress(ConnectionError):
        while client.recv(65536):
            pass
    return True


@contextlib.contextmanager
def client_of(server: Any, context: ssl.SSLContext | None = None, name: str = NAME) -> Iterator[ssl.SSLSocket]:
    """Connect to a server."""
    context = context or client_context()  # before the server begins to wait
    plain = socket.create_connection(server.server_address[:2], LIMIT)
    with plain, context.wrap_socket(plain, server_hostname=name) as client:
        try:
            yield client
        finally:
            end(client)


def ask(server: Any, sent: bytes = b"hello\n", context: ssl.SSLContext | None = None, name: str = NAME) -> bytes:
    """Send a line, and return the line that a server answers."""
    with client_of(server, context, name) as client, client.makefile("rb") as answer:
        client.sendall(sent)
        return answer.readline()


def serials_under_load(server: Any, exchange: Callable[[], object], known: set[str]) -> None:
    """Have 8 clients look at certificates while they are exchanged; assert that they see known ones, and several.

    :param exchange: called again and again, in a thread.
    :param known: the serial numbers of the certificates that there were, which ``exchange`` adds to.
    """
    # Whoever is late, one client has begun before the first exchange, and all look once more after it.
    begun, exchanged, done = threading.Event(), threading.Event(), threading.Event()

    def exchange_all() -> None:
        begun.wait(LIMIT)
        while not done.wait(0.01):
            exchange()
            exchanged.set()

    def client() -> list[str]:
        context, serials = client_context(), []
        for number in range(25):
            assert number < 24 or exchanged.wait(LIMIT)
            with client_of(server, context) as connection:
                connection.sendall(b"a\n")
                assert connection.recv(10) == b"A\n"
                serials.append(serial_at(connection))
            begun.set()
        return serials

    with ThreadPoolExecutor(9) as threads:
        exchanging = threads.submit(exchange_all)
        try:
            clients = [threads.submit(client) for _ in range(8)]
            serials = [serial for result in clients for serial in result.result(LIMIT)]
        finally:
            begun.set()
            done.set()
        exchanging.result(LIMIT)
    assert len(serials) == 200
    assert set(serials) <= known
    assert len(set(serials)) > 1
