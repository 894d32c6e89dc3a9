"""Servers whose behaviour is known, for the tests of the load generator, and short runs of it."""

from __future__ import annotations

import contextlib
import importlib
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fastserve import _backend
from support import wait_until

if sys.platform != "linux" or _backend.refused():
    pytest.skip("the load generator is part of the builds with extensions for Linux", allow_module_level=True)

load: Any = importlib.import_module("fastserve._load")

SHORT = 0.15  # seconds
Serve = Callable[["Server", socket.socket], None]


class Server:
    """A server with one thread for each connection, which counts what it does."""

    def __init__(self, serve: Serve) -> None:
        self.requests = 0
        self.sources: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self._serve = serve
        self.open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.address = self._listener.getsockname()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def asked(self) -> int:
        """Count a request and return its number, from 1 on."""
        with self.lock:
            self.requests += 1
            return self.requests

    @property
    def connections(self) -> int:
        return sum(self.sources.values())

    def _accept(self) -> None:
        while not self.ended.is_set():
            connection, (host, _) = self._listener.accept()
            if self.ended.is_set():
                connection.close()  # it comes from close()
                break
            self.sources[host] += 1
            with self.lock:
                self.open.add(connection)
            thread = threading.Thread(target=self._run, args=(connection,))
            self._threads.append(thread)
            thread.start()
        self._listener.close()

    def _run(self, connection: socket.socket) -> None:
        # A client may go at any time.
        with connection, contextlib.suppress(ConnectionError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._serve(self, connection)
        with self.lock:
            self.open.discard(connection)

    def close(self) -> None:
        self.ended.set()
        with contextlib.suppress(ConnectionError), socket.create_connection(self.address):
            pass
        self._threads[0].join(60)
        with self.lock:
            for connection in self.open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()


@contextlib.contextmanager
def running(serve: Serve) -> Iterator[Server]:
    server = Server(serve)
    try:
        yield server
    finally:
        server.close()


def receive(connection: socket.socket, size: int) -> bytes:
    """Return so many bytes, or fewer at the end of the connection."""
    data = b""
    while len(data) < size and (more := connection.recv(size - len(data))):
        data += more
    return data


def answers(answer: Callable[[int], list[bytes]], size: int = 5) -> Serve:
    """Serve requests of ``size`` bytes: send each part of ``answer(number of the request)``."""

    def serve(server: Server, connection: socket.socket) -> None:
        while len(receive(connection, size)) == size:
            for part in answer(server.asked()):
                connection.sendall(part)

    return serve


echo = answers(lambda number: [b"hello"])


def hello(server: Any, **options: Any) -> dict[str, Any]:
    """Exchange "hello" for "hello" for a short time."""
    options = {"answer": 5, "expected": b"hello", "seconds": SHORT, **options}
    result: dict[str, Any] = load.streams(getattr(server, "address", server), b"hello", **options)
    return result


class DatagramServer:
    """A server that answers each datagram with those that ``answer(number, data)`` returns."""

    def __init__(self, answer: Callable[[int, bytes], list[bytes]]) -> None:
        self.requests = self.answered = 0
        self.sources: set[tuple[str, int]] = set()
        self._answer = answer
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.address = self._socket.getsockname()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while (received := self._socket.recvfrom(65536))[0] != b"end":
            data, source = received
            self.requests += 1
            self.sources.add(source)
            for answer in self._answer(self.requests, data):
                self._socket.sendto(answer, source)
                self.answered += 1

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:

            def is_ended() -> bool:
                last.sendto(b"end", self.address)  # again: where many datagrams wait, the kernel drops it
                self._thread.join(0.1)
                return not self._thread.is_alive()

            wait_until(is_ended)
        self._socket.close()


@contextlib.contextmanager
def answering(answer: Callable[[int, bytes], list[bytes]]) -> Iterator[DatagramServer]:
    server = DatagramServer(answer)
    try:
        yield server
    finally:
        server.close()


def ping(server: Any, **options: Any) -> dict[str, Any]:
    """Exchange datagrams for a short time."""
    options = {"expected": b"ping", "seconds": SHORT, **options}
    result: dict[str, Any] = load.datagrams(getattr(server, "address", server), b"ping", **options)
    return result
