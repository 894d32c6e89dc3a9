"""Batches of datagrams: what a program sees of them, which is nothing but their speed."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastserve
from support import LIMIT, serving, wait_until

ADDRESS = ("127.0.0.1", 0)
HOOKS = [
    "_handle_request_noblock", "get_request", "verify_request", "process_request", "finish_request",
    "shutdown_request", "close_request", "service_actions",
]  # fmt: skip


@contextlib.contextmanager
def client_of(server: Any, name: Any = None) -> Iterator[socket.socket]:
    """Give a socket that is connected to a server; bound, if it gets a name."""
    with socket.socket(server.address_family, socket.SOCK_DGRAM) as client:
        client.settimeout(LIMIT)
        if name is not None:
            client.bind(name)
        client.connect(server.server_address)
        yield client


def send_numbers(client: socket.socket, count: int, first: int = 0) -> list[bytes]:
    """Send datagrams, which wait at the server if it does not serve yet; return what was sent."""
    sent = [b"%d" % number for number in range(first, first + count)]
    for data in sent:
        client.send(data)
    return sent


def logging_handler(module: ModuleType, log: list[Any], then: Callable[[Any], object] = lambda handler: None) -> Any:
    """Return a handler that logs the data of each datagram and calls ``then(handler)``."""

    class Handler(module.BaseRequestHandler):
        def handle(self) -> None:
            log.append(self.request[0])
            then(self)

    return Handler


def is_waiting(server: Any) -> bool:
    """Return whether a datagram is in the kernel, not taken yet."""
    try:
        server.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    return True


def stop_after(count: int, log: list[Any]) -> Callable[[Any], None]:
    """Return what ends ``serve_forever`` once ``count`` datagrams were handled."""

    def then(handler: Any) -> None:
        if len(log) >= count:
            handler.server._BaseServer__shutdown_request = True

    return then


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# What a handler sees


@pytest.mark.parametrize("family", ["IPv4", "IPv6", "Unix"])
@pytest.mark.parametrize("peer", ["unbound", "bound", "abstract"])
def test_a_handler_of_a_batch_sees_what_recvfrom_returns(
    module: ModuleType, family: str, peer: str, directory: Path
) -> None:
    if family != "Unix" and peer != "unbound":
        pytest.skip("Unix sockets have such peers")
    seen: list[Any] = []

    class Handler(module.BaseRequestHandler):
        def handle(self) -> None:
            data, listener = self.request
            kinds = (type(self.request), type(data), type(self.client_address), listener is self.server.socket)
            seen.append((data, self.client_address, kinds))
            stop_after(4, seen)(self)

    name = {"unbound": None, "bound": "client", "abstract": b"\0fastserve " + os.urandom(4)}[peer]
    base = module.UnixDatagramServer if family == "Unix" else module.UDPServer
    address = {"IPv4": ADDRESS, "IPv6": ("::1", 0), "Unix": "server"}[family]

    class Server(base):
        if family == "IPv6":
            address_family = socket.AF_INET6

    try:
        server = Server(address, Handler)
    except OSError as error:
        pytest.skip(f"no {family}: {error}")
    with server, client_of(server, name) as client:
        expected_address = client.getsockname() if family != "Unix" or peer != "unbound" else None
        for data in (b"one", b"", b"x" * 8192, b"\0four"):
            client.send(data)
        server.serve_forever(0.01)
    kinds = (tuple, bytes, type(expected_address), True)
    assert seen == [(data, expected_address, kinds) for data in (b"one", b"", b"x" * 8192, b"\0four")]


def test_datagrams_of_many_clients_keep_their_addresses(module: ModuleType) -> None:
    log: list[Any] = []

    class Handler(module.BaseRequestHandler):
        def handle(self) -> None:
            log.append((self.request[0], self.client_address))
            stop_after(200, log)(self)

    with module.UDPServer(ADDRESS, Handler) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(client_of(server, (f"127.0.0.{1 + n % 3}", 0))) for n in range(100)]
        expected = []
        for _turn in range(2):
            for number, client in enumerate(clients):
                client.send(b"%d" % number)
                expected.append((b"%d" % number, client.getsockname()))
        server.serve_forever(0.01)
    assert log == expected


@pytest.mark.parametrize("handler", ["BaseRequestHandler", "DatagramRequestHandler"])
def test_the_largest_datagram_passes_both_ways(module: ModuleType, handler: str) -> None:
    class Echo(getattr(module, handler)):  # type: ignore[misc]
        def handle(self) -> None:
            if handler == "BaseRequestHandler":
                self.request[1].sendto(self.request[0], self.client_address)
            else:
                self.wfile.write(self.rfile.read())

    class Server(module.UDPServer):
        max_packet_size = 65535

    largest = os.urandom(65507)
    with serving(Server(ADDRESS, Echo), 0.01) as server, client_of(server) as client:
        for _ in range(3):
            client.send(largest)
            assert client.recv(70_000) == largest


def test_max_packet_size_is_read_for_each_batch(module: ModuleType) -> None:
    log: list[bytes] = []

    def grow(handler: Any) -> None:
        handler.server.max_packet_size *= 2
        stop_after(3, log)(handler)

    class Server(module.UDPServer):
        max_packet_size = 5
        max_batch = 1

    with Server(ADDRESS, logging_handler(module, log, grow)) as server, client_of(server) as client:
        for _ in range(3):
            client.send(b"0123456789abcdefghijklmnopqrstuvwxyz")
        server.serve_forever(0.01)
    assert list(map(len, log)) == [5, 10, 20]


@pytest.mark.parametrize("size", [-1, "many", 2.5])
def test_a_max_packet_size_that_makes_no_sense_raises(module: ModuleType, size: Any) -> None:
    with module.UDPServer(ADDRESS, None) as server, client_of(server) as client:
        server.max_packet_size = size
        client.send(b"x")
        with pytest.raises((ValueError, TypeError)) as raised:
            server.serve_forever(0.01)
        with pytest.raises(raised.type) as expected:
            server.socket.recvfrom(size)
    assert str(raised.value) == str(expected.value)


def test_a_max_packet_size_of_nothing_takes_empty_datagrams(module: ModuleType) -> None:
    log: list[bytes] = []
    with module.UDPServer(ADDRESS, logging_handler(module, log, stop_after(2, log))) as server:
        server.max_packet_size = 0
        with client_of(server) as client:
            send_numbers(client, 2)
            server.serve_forever(0.01)
    assert log == [b"", b""]


def make_function(module: ModuleType, log: list[Any]) -> Any:
    return lambda request, client_address, server: log.append(request[0])


def make_partial(module: ModuleType, log: list[Any]) -> Any:
    return functools.partial(lambda prefix, request, client_address, server: log.append(request[0]), "prefix")


def make_new(module: ModuleType, log: list[Any]) -> Any:
    class Handler(module.BaseRequestHandler):
        def __new__(cls, request: Any, client_address: Any, server: Any) -> Any:
            log.append(request[0])
            return None

    return Handler


def make_metaclass(module: ModuleType, log: list[Any]) -> Any:
    class Meta(type):
        def __call__(cls, request: Any, client_address: Any, server: Any) -> None:
            log.append(request[0])

    class Handler(module.BaseRequestHandler, metaclass=Meta):
        pass

    return Handler


def make_init(module: ModuleType, log: list[Any]) -> Any:
    class Handler:
        __slots__ = ()

        def __init__(self, request: Any, client_address: Any, server: Any) -> None:
            log.append(request[0])

    return Handler


def make_decorated_init(module: ModuleType, log: list[Any]) -> Any:
    class Handler(module.BaseRequestHandler):
        __init__ = functools.partialmethod(lambda self, tag, request, *rest: log.append(request[0]), "tag")

    return Handler


@pytest.mark.parametrize(
    "make", [make_function, make_partial, make_new, make_metaclass, make_init, make_decorated_init]
)
def test_the_handler_may_be_any_callable(module: ModuleType, make: Callable[..., Any]) -> None:
    log: list[Any] = []
    with module.UDPServer(ADDRESS, make(module, log)) as server, client_of(server) as client:
        sent = send_numbers(client, 3)
        with serving(server, 0.01):
            wait_until(lambda: len(log) == 3)
    assert log == sent


def test_an_init_that_returns_something_is_an_error(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    class Handler:
        def __init__(self, request: Any, client_address: Any, server: Any) -> None:
            server._BaseServer__shutdown_request = True
            return 5  # type: ignore[return-value]

    with module.UDPServer(ADDRESS, Handler) as server, client_of(server) as client:
        client.send(b"x")
        server.serve_forever(0.01)
    assert "TypeError: __init__() should return None, not 'int'" in capsys.readouterr().err


# The hooks


def logging_server(module: ModuleType, log: list[Any], names: list[str]) -> Any:
    """Return a server class that logs the calls of its methods."""

    def logging(name: str) -> Callable[..., Any]:
        def method(self: Any, *arguments: Any) -> Any:
            log.append(name)
            return getattr(super(Server, self), name)(*arguments)

        return method

    class Server(module.UDPServer):
        pass

    for name in names:
        setattr(Server, name, logging(name))
    return Server


@pytest.mark.parametrize("overridden", [HOOKS, *([name] for name in HOOKS)], ids=lambda names: "+".join(names)[:20])
def test_each_datagram_passes_the_hooks_in_their_order(module: ModuleType, overridden: list[str]) -> None:
    log: list[Any] = []
    handled: list[Any] = []

    def then(handler: Any) -> None:
        log.append("handle")
        stop_after(5, handled)(handler)

    Server = logging_server(module, log, overridden)
    with Server(ADDRESS, logging_handler(module, handled, then)) as server, client_of(server) as client:
        sent = send_numbers(client, 5)
        server.serve_forever(30)
    order = [*HOOKS[:5], "handle", *HOOKS[5:]]
    assert log == [name for name in order if name in overridden or name == "handle"] * 5
    assert handled == sent


@pytest.mark.parametrize("where", ["class", "base", "instance"])
@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_that_a_handler_assigns_is_called_for_the_next_datagram(
    module: ModuleType, name: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[bytes] = []
    calls: list[int] = []

    class Base(module.UDPServer):
        pass

    class Server(Base):
        pass

    def then(handler: Any) -> None:
        if len(log) == 2:
            original = getattr(Server, name)
            if where == "instance":
                server = handler.server
                setattr(server, name, lambda *rest: calls.append(len(log)) or original(server, *rest))
            else:
                owner = Server if where == "class" else Base
                setattr(owner, name, lambda *rest: calls.append(len(log)) or original(*rest))
        if len(log) == 4:
            delattr({"class": Server, "base": Base, "instance": handler.server}[where], name)
        stop_after(6, log)(handler)

    with Server(ADDRESS, logging_handler(module, log, then)) as server, client_of(server) as client:
        sent = send_numbers(client, 6)
        server.serve_forever(30)
    assert log == sent
    # From after the handler that assigns it to before the end of the handler that takes it away.
    assert calls == [2, 3]


def test_a_hook_that_getattribute_gives_is_called(module: ModuleType) -> None:
    log: list[bytes] = []
    refused: list[bytes] = []

    class Server(module.UDPServer):
        def __getattribute__(self, name: str) -> Any:
            if name == "verify_request":
                return lambda request, client_address: refused.append(request[0])
            return super().__getattribute__(name)

    with Server(ADDRESS, logging_handler(module, log)) as server, client_of(server) as client:
        sent = send_numbers(client, 3)
        with serving(server, 0.01):
            wait_until(lambda: len(refused) == 3)
    assert refused == sent
    assert log == []


def test_service_actions_is_called_after_every_datagram(module: ModuleType) -> None:
    log: list[Any] = []

    class Server(module.UDPServer):
        def service_actions(self) -> None:
            log.append("service")

    with Server(ADDRESS, logging_handler(module, log, stop_after(5, log))) as server, client_of(server) as client:
        send_numbers(client, 3)
        server.serve_forever(30)
    assert log == [b"0", "service", b"1", "service", b"2", "service"]


def test_the_error_of_a_handler_is_current_in_handle_error_and_the_batch_goes_on(module: ModuleType) -> None:
    log: list[bytes] = []
    errors: list[Any] = []
    ended: list[bytes] = []

    class Server(module.UDPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            errors.append((request[0], client_address, sys.exc_info()[0]))

        def shutdown_request(self, request: Any) -> None:
            ended.append(request[0])

    def then(handler: Any) -> None:
        stop_after(3, log)(handler)
        if handler.request[0] == b"1":
            raise ZeroDivisionError

    with Server(ADDRESS, logging_handler(module, log, then)) as server, client_of(server) as client:
        sent = send_numbers(client, 3)
        server.serve_forever(30)
        assert errors == [(b"1", client.getsockname(), ZeroDivisionError)]
    assert log == sent
    assert ended == sent


def test_a_traceback_of_a_handler_shows_the_handler(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(handler: Any) -> None:
        handler.server._BaseServer__shutdown_request = True
        raise LookupError("of a handler")

    with module.UDPServer(ADDRESS, logging_handler(module, [], fail)) as server, client_of(server) as client:
        client.send(b"x")
        server.serve_forever(30)
        name = client.getsockname()
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == f"Exception occurred during processing of request from {name}"
    assert any(line.endswith("in handle") for line in lines)
    assert any(line.endswith("in fail") for line in lines)
    assert lines[-2] == "LookupError: of a handler"


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_ends_serve_forever_leaves_the_rest_of_the_batch(module: ModuleType, raised: type[BaseException]) -> None:
    log: list[bytes] = []

    def then(handler: Any) -> None:
        stop_after(4, log)(handler)
        if handler.request[0] == b"1":
            raise raised

    with module.UDPServer(ADDRESS, logging_handler(module, log, then)) as server, client_of(server) as client:
        sent = send_numbers(client, 4)
        with pytest.raises(raised):
            server.serve_forever(30)
        assert log == sent[:2]
        server.serve_forever(30)
        assert log == sent


def test_an_error_that_handle_error_raises_comes_out_of_serve_forever(module: ModuleType) -> None:
    log: list[bytes] = []

    class Server(module.UDPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            raise

    def then(handler: Any) -> None:
        raise LookupError("of a handler")

    with Server(ADDRESS, logging_handler(module, log, then)) as server, client_of(server) as client:
        send_numbers(client, 2)
        with pytest.raises(LookupError, match="of a handler"):
            server.serve_forever(30)
    assert log == [b"0"]


# Stopping


@pytest.mark.parametrize("how", ["flag", "dict", "class"])
def test_the_flag_stops_the_loop_after_the_datagram(module: ModuleType, how: str) -> None:
    log: list[bytes] = []

    class Server(module.UDPServer):
        pass

    def then(handler: Any) -> None:
        if len(log) % 3 == 0:
            if how == "flag":
                handler.server._BaseServer__shutdown_request = True
            elif how == "dict":
                handler.server.__dict__["_BaseServer__shutdown_request"] = True
            else:
                del handler.server._BaseServer__shutdown_request
                Server._BaseServer__shutdown_request = True

    with Server(ADDRESS, logging_handler(module, log, then)) as server, client_of(server) as client:
        sent = send_numbers(client, 6)
        server.serve_forever(0.01)
        assert log == sent[:3]
        if how == "class":
            Server._BaseServer__shutdown_request = False
        server.serve_forever(0.01)
        assert log == sent


def test_datagrams_that_shutdown_leaves_are_served_by_handle_request(module: ModuleType) -> None:
    log: list[bytes] = []
    then: list[Callable[[Any], None]] = [stop_after(2, log)]
    handler = logging_handler(module, log, lambda handler: then[0](handler))
    with module.UDPServer(ADDRESS, handler) as server, client_of(server) as client:
        sent = send_numbers(client, 5)
        server.serve_forever(30)
        assert log == sent[:2]
        then[0] = lambda handler: None
        server.timeout = 0
        server.handle_timeout = lambda: log.append(b"nothing")
        for _ in range(4):
            server.handle_request()
        assert log == [*sent, b"nothing"]


def test_datagrams_that_shutdown_leaves_come_from_get_request_and_the_private_method(module: ModuleType) -> None:
    log: list[bytes] = []
    with module.UDPServer(ADDRESS, logging_handler(module, log, stop_after(1, log))) as server:
        with client_of(server) as client:
            sent = send_numbers(client, 3)
            server.serve_forever(30)
            request, client_address = server.get_request()
            assert (request, client_address) == ((sent[1], server.socket), client.getsockname())
            server._handle_request_noblock()
    assert log == [sent[0], sent[2]]


def test_shutdown_from_another_thread_stops_within_a_batch(module: ModuleType) -> None:
    log: list[bytes] = []
    first, go_on = threading.Event(), threading.Event()

    def then(handler: Any) -> None:
        first.set()
        assert go_on.wait(LIMIT)

    with module.UDPServer(ADDRESS, logging_handler(module, log, then)) as server, client_of(server) as client:
        send_numbers(client, 5)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        assert first.wait(LIMIT)
        stopping = threading.Thread(target=server.shutdown)
        stopping.start()
        wait_until(lambda: server.__dict__["_BaseServer__shutdown_request"])
        go_on.set()
        stopping.join(LIMIT)
        thread.join(LIMIT)
        assert not thread.is_alive() and not stopping.is_alive()
        assert log == [b"0"]


def test_datagrams_that_server_close_drops_are_counted(impl: str) -> None:
    log: list[bytes] = []
    with fastserve.UDPServer(ADDRESS, logging_handler(fastserve, log, stop_after(2, log))) as server:
        with client_of(server) as client:
            send_numbers(client, 7)
            server.serve_forever(30)
        assert server.dropped_datagrams == 0
        server.server_close()
        assert server.dropped_datagrams == 5
        assert fastserve.UDPServer.dropped_datagrams == 0
        server.server_close()
        assert server.dropped_datagrams == 5
        with pytest.raises(OSError):
            server.get_request()


def test_a_server_that_is_closed_by_a_handler_handles_no_more(module: ModuleType) -> None:
    log: list[bytes] = []

    def then(handler: Any) -> None:
        handler.server.server_close()
        handler.server._BaseServer__shutdown_request = True

    with module.UDPServer(ADDRESS, logging_handler(module, log, then)) as server, client_of(server) as client:
        send_numbers(client, 3)
        server.serve_forever(0.01)
    assert log == [b"0"]


# handle_request and loops of one's own


def test_handle_request_takes_one_datagram(module: ModuleType) -> None:
    log: list[bytes] = []
    with module.UDPServer(ADDRESS, logging_handler(module, log)) as server, client_of(server) as client:
        sent = send_numbers(client, 3)
        for count in range(1, 4):
            server.handle_request()
            assert log == sent[:count]
            assert is_waiting(server) == (count < 3)


@pytest.mark.parametrize("timeout", [0.0, 5.0])
def test_a_listener_with_a_timeout_is_served(module: ModuleType, timeout: float) -> None:
    log: list[bytes] = []
    with module.UDPServer(ADDRESS, logging_handler(module, log)) as server, client_of(server) as client:
        server.socket.settimeout(timeout)
        with serving(server, 0.01):
            sent = send_numbers(client, 5)
            wait_until(lambda: len(log) == 5)
            sent += send_numbers(client, 5, 5)
            wait_until(lambda: len(log) == 10)
    assert log == sent


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batches=st.lists(st.lists(st.binary(max_size=300), min_size=1, max_size=30), min_size=1, max_size=4),
    max_batch=st.sampled_from([1, 2, 7, 64, 1000]),
    size=st.integers(1, 310),
)
def test_any_datagrams_are_handled_once_in_their_order(
    module: ModuleType, batches: list[list[bytes]], max_batch: int, size: int
) -> None:
    log: list[bytes] = []
    target = [0]

    class Server(module.UDPServer):
        max_packet_size = size

    Server.max_batch = max_batch
    sent: list[bytes] = []
    handler = logging_handler(module, log, lambda handler: stop_after(target[0], log)(handler))
    with Server(ADDRESS, handler) as server, client_of(server) as client:
        for batch in batches:
            for data in batch:
                client.send(data)
            sent += batch
            target[0] = len(sent)
            server.serve_forever(30)
        assert log == [data[:size] for data in sent]
        if module is fastserve:
            assert server.truncated_datagrams == sum(len(data) > size for data in sent)


# Threads


@pytest.mark.parametrize("base", ["UDPServer", "ThreadingUDPServer"])
def test_several_loops_and_handle_request_share_a_server(module: ModuleType, base: str) -> None:
    log: list[bytes] = []
    with getattr(module, base)(ADDRESS, logging_handler(module, log)) as server, client_of(server) as client:
        server.socket.settimeout(0.05)  # the stdlib would block in recvfrom where another thread was faster
        sent = send_numbers(client, 100)
        threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for _ in range(3)]
        done = threading.Event()

        def handle_requests() -> None:
            while not done.is_set():
                server.handle_request()

        threads.append(threading.Thread(target=handle_requests))
        for thread in threads:
            thread.start()
        for first in range(100, 1000, 100):
            wait_until(lambda first=first: len(log) == first)  # type: ignore[misc]
            sent += send_numbers(client, 100, first)
        wait_until(lambda: len(log) == 1000)
        done.set()
        while any(thread.is_alive() for thread in threads[:3]):
            server._BaseServer__shutdown_request = True
            threads[0].join(0.02)
        for thread in threads:
            thread.join(LIMIT)
    assert sorted(log) == sorted(sent)


def test_a_loop_beside_a_slow_one_takes_the_datagrams(module: ModuleType) -> None:
    log: list[bytes] = []
    slow, go_on = threading.Event(), threading.Event()

    def then(handler: Any) -> None:
        if handler.request[0] == b"0":
            slow.set()
            assert go_on.wait(2 * LIMIT)  # longer than the test waits for the others

    with module.UDPServer(ADDRESS, logging_handler(module, log, then)) as server, client_of(server) as client:
        server.socket.settimeout(0.05)
        threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        sent = send_numbers(client, 20)
        assert slow.wait(LIMIT)
        wait_until(lambda: len(log) == 20)
        go_on.set()
        while any(thread.is_alive() for thread in threads):
            server._BaseServer__shutdown_request = True
            threads[0].join(0.02)
    assert sorted(log) == sorted(sent)


def test_a_thread_for_each_datagram(module: ModuleType) -> None:
    log: list[Any] = []
    barrier = threading.Barrier(5)

    def then(handler: Any) -> None:
        barrier.wait(LIMIT)  # they run at the same time
        log.append(threading.get_ident())

    with module.ThreadingUDPServer(ADDRESS, logging_handler(module, log, then)) as server, client_of(server) as client:
        sent = send_numbers(client, 5)
        with serving(server, 0.01):
            wait_until(lambda: len(log) == 10)
    assert len(set(log)) == 10
    assert set(sent) < set(log)
