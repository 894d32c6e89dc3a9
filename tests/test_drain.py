"""The graceful stop of a server."""

from __future__ import annotations

import contextlib
import errno
import functools
import http.client
import http.server
import importlib.util
import os
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fastserve
from fastserve import draining
from support import LIMIT, noting_reports, open_descriptors, settle_before_signal, wait_until

needs_greenlet = pytest.mark.skipif(importlib.util.find_spec("greenlet") is None, reason="greenlet is not installed")

IN_THREADS = ["Threading", "ThreadPool"]
IN_PROCESS = ["", *IN_THREADS, pytest.param("Greenlet", marks=needs_greenlet)]
ALL = [*IN_PROCESS, "Forking"]
MANY = [*IN_THREADS, pytest.param("Greenlet", marks=needs_greenlet), "Forking"]  # that serve several clients at a time


class Kept(fastserve.StreamRequestHandler):
    """Answer lines, until the end. A client that has sent nothing of a line yet may be closed."""

    def handle(self) -> None:
        while True:
            with fastserve.idle(self):
                if not self.rfile.peek(1):
                    return
            line = self.rfile.readline()
            if line.startswith(b"sleep "):
                self.wfile.write(b"begun\n")
                fastserve.sleep(float(line.split()[1]))
            if line == b"wait\n":
                self.wfile.write(b"begun\n")
                self.rfile.read(1)
            self.wfile.write(line)


class Silent(fastserve.BaseRequestHandler):
    """Say nothing of the end: a client is waited for."""

    def handle(self) -> None:
        while data := self.request.recv(1000):
            self.request.sendall(data)


class Ending(Silent):
    """Say that the end may come at any time."""

    drain_ends_input = True


def make(
    model: str, handler: Any = Kept, kind: str = "TCPServer", address: Any = ("127.0.0.1", 0), **attributes: Any
) -> Any:
    base = getattr(fastserve, model + kind)
    attributes = {"request_queue_size": 64, **attributes}
    return noting_reports(type("Server", (fastserve.DrainMixIn, base), attributes)(address, handler))


@contextlib.contextmanager
def served(server: Any) -> Iterator[threading.Thread]:
    """Serve in a thread, which the block has to end. Nothing is left then."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            server.serve_forever()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="serving")
    thread.start()
    try:
        yield thread
        thread.join(LIMIT)
        assert not thread.is_alive(), "serve_forever() did not return"
    finally:
        server.drain(0)
        thread.join(LIMIT)
        server.server_close()
    if failed:
        raise failed[0]


@contextlib.contextmanager
def connected(server: Any) -> Iterator[socket.socket]:
    with socket.socket(server.address_family) as client:
        client.settimeout(LIMIT)
        client.connect(server.server_address)
        yield client


def exchange(client: socket.socket, line: bytes = b"line\n") -> bytes:
    client.sendall(line)
    return line_of(client)


def line_of(client: socket.socket) -> bytes:
    """Return the next line, or what there is of one at the end of the stream."""
    line = b""
    while not line.endswith(b"\n") and (byte := client.recv(1)):
        line += byte
    return line


def send_part(server: Any, client: socket.socket, part: bytes) -> None:
    """Send a part of a request, and wait until its handler is not idle any more.

    One that has received it, and has not got a processor to take note of that, may be taken for an idle one.
    """

    def has_idle() -> bool:
        return any(entry.idle for entry in list(draining.requests_of(server)._entries.values()))

    if isinstance(server, socketserver.ForkingMixIn):
        wait_until(lambda: vars(server).get("active_children"))
        client.sendall(part)
        for child in list(server.active_children or ()):
            settle_before_signal(child)
    else:
        wait_until(has_idle)
        client.sendall(part)
        wait_until(lambda: not has_idle())


def is_ended(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def refuses(address: Any) -> bool:
    with socket.socket() as client:
        return client.connect_ex(address) == errno.ECONNREFUSED


class Draining:
    """A drain in a thread of its own."""

    def __init__(self, server: Any, timeout: float | None = None) -> None:
        self.results: list[int] = []
        self.thread = threading.Thread(target=lambda: self.results.append(server.drain(timeout)), name="draining")
        self.thread.start()
        wait_until(lambda: draining.requests_of(server).draining)

    def result(self) -> int:
        self.thread.join(LIMIT)
        assert not self.thread.is_alive(), "drain() did not return"
        return self.results[0]


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = open_descriptors()
    yield
    wait_until(lambda: open_descriptors() <= before)


@pytest.mark.parametrize("model", ALL)
def test_idle_clients_are_closed_and_drain_does_not_wait_for_them(impl: str, model: str) -> None:
    with make(model) as server, served(server), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(server)) for _ in range(1 if model == "" else 5)]
        for client in clients:
            assert exchange(client) == exchange(client) == b"line\n"
        assert server.drain() == 0
        assert all(map(is_ended, clients))
        assert not server.reports


@pytest.mark.parametrize("model", ALL)
def test_a_client_that_has_not_sent_anything_yet_is_idle(impl: str, model: str) -> None:
    with make(model) as server, served(server), connected(server) as client:
        wait_until(lambda: draining.requests_of(server)._entries or server.__dict__.get("active_children"))
        assert server.drain() == 0
        assert is_ended(client)


@pytest.mark.parametrize("model", ALL)
def test_what_runs_is_finished(impl: str, model: str) -> None:
    with make(model) as server, served(server), connected(server) as client:
        assert exchange(client, b"sleep 0.3\n") == b"begun\n"
        drain = Draining(server)
        assert line_of(client) == b"sleep 0.3\n"
        assert is_ended(client)
        assert drain.result() == 0 and not server.reports


@pytest.mark.parametrize("model", ALL)
def test_a_request_of_which_a_part_has_come_is_served(impl: str, model: str) -> None:
    with make(model) as server, served(server), connected(server) as client:
        assert exchange(client) == b"line\n"
        send_part(server, client, b"first ")
        drain = Draining(server)
        time.sleep(2 * draining.TICK)  # several looks at it
        client.sendall(b"half\n")
        assert line_of(client) == b"first half\n"
        assert is_ended(client)
        assert drain.result() == 0


@pytest.mark.parametrize("model", ALL)
def test_what_is_left_at_the_time_limit_is_cut_off_and_counted(impl: str, model: str) -> None:
    with make(model, Silent) as server, served(server), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(server)) for _ in range(1 if model == "" else 3)]
        assert [exchange(client) for client in clients] == [b"line\n"] * len(clients)
        assert server.drain(0.2) == len(clients)
        assert all(map(is_ended, clients))
        assert server.drain() == len(clients)


@pytest.mark.parametrize("model", IN_PROCESS)
def test_an_idle_client_is_no_request_that_is_cut_off(impl: str, model: str) -> None:
    with make(model) as server, served(server), connected(server) as client:
        assert exchange(client) == b"line\n"
        wait_until(lambda: any(entry.idle for entry in draining.requests_of(server)._entries.values()))
        assert server.drain(0) == 0
        assert is_ended(client)


@pytest.mark.parametrize("model", MANY)
def test_only_what_is_left_is_counted(impl: str, model: str) -> None:
    with make(model) as server, served(server), connected(server) as idle, connected(server) as busy:
        assert exchange(idle) == b"line\n"
        assert exchange(busy, b"wait\n") == b"begun\n"
        drain = Draining(server)
        assert is_ended(idle)
        wait_until(lambda: len(vars(server).get("active_children") or draining.requests_of(server)._entries) == 1)
        assert server.drain(0) == drain.result() == 1
        assert is_ended(busy)


@pytest.mark.parametrize("model", ALL)
def test_a_handler_may_say_that_its_input_may_end_at_any_time(impl: str, model: str) -> None:
    with make(model, functools.partial(Ending)) as server, served(server), connected(server) as client:
        assert exchange(client) == b"line\n"
        assert server.drain() == 0
        assert is_ended(client)


def test_what_has_been_received_is_served_before_the_end(impl: str) -> None:
    begun = threading.Event()
    go_on = threading.Event()

    class Slow(Ending):
        def handle(self) -> None:
            begun.set()
            assert go_on.wait(LIMIT)
            super().handle()

    with make("Threading", Slow) as server, served(server), connected(server) as client:
        client.sendall(b"line\n")
        assert begun.wait(LIMIT)
        drain = Draining(server)
        go_on.set()
        assert line_of(client) == (b"line\n" if draining._KEEPS_RECEIVED else b"")
        assert is_ended(client)
        assert drain.result() == 0


@pytest.mark.parametrize("model", IN_PROCESS)
def test_bare_recv_is_waited_for_in_idle(impl: str, model: str) -> None:
    class Echo(fastserve.BaseRequestHandler):
        def handle(self) -> None:
            while True:
                with fastserve.idle(self) as waiting:
                    data = self.request.recv(1000)
                if not data:
                    ended.append(waiting.ended)
                    return
                self.request.sendall(data)

    ended: list[bool] = []
    with make(model, Echo) as server, served(server):
        with connected(server) as client:
            assert exchange(client) == b"line\n"
        with connected(server) as client:
            assert exchange(client) == b"line\n"
            wait_until(lambda: ended == [False])
            assert server.drain() == 0
    assert ended == [False, True]


def test_queued_requests_are_served(impl: str) -> None:
    with make("ThreadPool", max_workers=1) as server, served(server), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(server)) for _ in range(3)]
        for client in clients:
            client.sendall(b"sleep 0.1\n")
        assert line_of(clients[0]) == b"begun\n"
        wait_until(lambda: len(draining.requests_of(server)._entries) == 3)
        drain = Draining(server)
        assert line_of(clients[0]) == line_of(clients[1])[:0] + b"sleep 0.1\n"
        assert line_of(clients[1]) == b"sleep 0.1\n"
        assert [line_of(clients[2]), line_of(clients[2])] == [b"begun\n", b"sleep 0.1\n"]
        assert drain.result() == 0


@pytest.mark.parametrize("kind", ["UDPServer", "UnixDatagramServer"])
@pytest.mark.parametrize("model", ALL)
def test_handlers_of_datagrams_are_waited_for(impl: str, model: str, kind: str, tmp_path: Path) -> None:
    class Slow(fastserve.BaseRequestHandler):
        def handle(self) -> None:
            data, listener = self.request
            listener.sendto(b"begun", self.client_address)
            fastserve.sleep(0.2)
            listener.sendto(data, self.client_address)

    unix = kind.startswith("Unix")
    address: Any = str(tmp_path / "server") if unix else ("127.0.0.1", 0)
    with make(model, Slow, kind, address) as server, served(server):
        with socket.socket(server.address_family, socket.SOCK_DGRAM) as client:
            client.settimeout(LIMIT)
            client.bind(str(tmp_path / "client") if unix else ("127.0.0.1", 0))
            client.sendto(b"datagram", server.server_address)
            assert client.recv(100) == b"begun"
            assert server.drain() == 0
            assert client.recv(100) == b"datagram"


@pytest.mark.parametrize("model", ALL)
def test_unix_sockets(impl: str, model: str, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with make(model, Kept, "UnixStreamServer", str(path), unlink_on_close=True) as server, served(server):
        with connected(server) as client:
            assert exchange(client) == b"line\n"
            assert server.drain() == 0
            assert is_ended(client)
            assert not path.exists()


@pytest.mark.parametrize("model", MANY)
def test_clients_are_refused_while_others_are_waited_for(impl: str, model: str) -> None:
    with make(model) as server, served(server), connected(server) as client:
        address = server.server_address
        assert exchange(client, b"sleep 0.5\n") == b"begun\n"
        drain = Draining(server)
        wait_until(lambda: server.fileno() < 0)
        wait_until(lambda: refuses(address))
        assert line_of(client) == b"sleep 0.5\n"
        assert drain.result() == 0


@pytest.mark.parametrize("model", ALL)
@pytest.mark.parametrize("close_first", [False, True])
def test_a_server_that_does_not_serve(impl: str, model: str, close_first: bool) -> None:
    with make(model) as server:
        if close_first:
            server.server_close()
        assert server.drain() == 0
        server.serve_forever()
        assert server.drain(1) == 0
        server.shutdown()
        server.server_close()
        assert server.drain(0) == 0


@pytest.mark.parametrize("model", MANY)
def test_after_shutdown(impl: str, model: str) -> None:
    with make(model) as server, served(server), connected(server) as client:
        assert exchange(client) == b"line\n"
        server.shutdown()
        assert exchange(client) == b"line\n"  # it is waited for
        assert server.drain() == 0
        assert is_ended(client)


@pytest.mark.parametrize("model", ALL)
def test_shutdown_and_server_close_while_it_drains(impl: str, model: str) -> None:
    with make(model, daemon_threads=True) as server, served(server), connected(server) as client:
        assert exchange(client, b"sleep 0.3\n") == b"begun\n"
        drain = Draining(server)
        server.shutdown()
        server.server_close()
        assert line_of(client) == b"sleep 0.3\n"
        assert is_ended(client)
        assert drain.result() == 0


@pytest.mark.parametrize("model", ALL)
def test_of_several_calls_the_earliest_time_limit_counts_and_all_return_the_same(impl: str, model: str) -> None:
    with make(model, Silent) as server, served(server), connected(server) as client:
        assert exchange(client) == b"line\n"
        drains = [Draining(server), Draining(server, 3600.0), Draining(server, 0.1), Draining(server, 3600.0)]
        assert [drain.result() for drain in drains] == [1, 1, 1, 1]
        assert is_ended(client)


@pytest.mark.parametrize("model", IN_PROCESS)
def test_a_handler_that_calls_it_does_not_wait_for_itself(impl: str, model: str) -> None:
    class Ender(Silent):
        def handle(self) -> None:
            self.request.sendall(b"%d\n" % self.server.drain())
            self.server.drain(0.3)  # on a busy machine this time may be over when it returns
            super().handle()

    with make(model, Ender) as server, served(server) as thread, connected(server) as client:
        assert line_of(client) == b"0\n"
        thread.join(LIMIT)  # the loop has ended, or the connection was cut off
        assert is_ended(client)
        assert server.drain() == 1


def test_a_handler_without_a_loop(impl: str) -> None:
    class Ender(fastserve.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"%d\n" % self.server.drain())

    with make("", Ender) as server, connected(server) as client:
        server.handle_request()
        assert line_of(client) == b"0\n"
        assert server.drain() == 0


@pytest.mark.parametrize("model", IN_THREADS)
def test_a_handler_that_cannot_be_ended_is_not_waited_for_endlessly(
    impl: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draining, "CUT", 0.1)
    go_on = threading.Event()

    class Deaf(fastserve.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"begun\n")
            assert go_on.wait(LIMIT)

    with make(model, Deaf) as server, served(server), connected(server) as client:
        assert line_of(client) == b"begun\n"
        assert server.drain(0) == 1
        assert is_ended(client)
        go_on.set()


@needs_greenlet
def test_greenlets_are_ended_at_the_time_limit(impl: str) -> None:
    left: list[str] = []

    class Asleep(fastserve.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"begun\n")
            fastserve.sleep(3600)

        def finish(self) -> None:
            left.append("finished")

    with make("Greenlet", Asleep) as server, served(server) as thread, connected(server) as client:
        assert line_of(client) == b"begun\n"
        assert server.drain(0.1) == 1
        thread.join(LIMIT)
        assert left == ["finished"] and is_ended(client) and not server.reports


@needs_greenlet
def test_greenlets_are_given_their_time_where_they_are_ended_otherwise(impl: str) -> None:
    with make("Greenlet", block_on_close=False) as server, served(server), connected(server) as client:
        assert exchange(client, b"sleep 0.3\n") == b"begun\n"
        drain = Draining(server)
        assert line_of(client) == b"sleep 0.3\n"
        assert drain.result() == 0


def test_a_request_that_its_child_has_already_is_counted_once(impl: str) -> None:
    class Server(fastserve.DrainMixIn, fastserve.ForkingTCPServer):
        def close_request(self, request: Any) -> None:
            if os.getpid() == pid:
                self.drain(0)  # as in a handler of a signal that comes just after the fork
            super().close_request(request)

    pid = os.getpid()
    with noting_reports(Server(("127.0.0.1", 0), Silent)) as server, served(server), connected(server) as client:
        assert is_ended(client)
        assert server.drain() == 1


def test_children_that_wait_for_their_number_to_fall_are_told(impl: str) -> None:
    with make("Forking", max_children=2) as server, served(server), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(server)) for _ in range(2)]
        assert [exchange(client) for client in clients] == [b"line\n"] * 2
        assert server.drain() == 0
        assert all(map(is_ended, clients))
        assert not server.active_children


STDLIB: list[Callable[..., Any]] = [
    http.server.HTTPServer,
    http.server.ThreadingHTTPServer,
    type("ForkingHTTPServer", (socketserver.ForkingMixIn, http.server.HTTPServer), {}),
    type("PoolHTTPServer", (fastserve.ThreadPoolMixIn, http.server.HTTPServer), {}),
    pytest.param(
        type("GreenletHTTPServer", (fastserve.GreenletMixIn, http.server.HTTPServer), {}), marks=needs_greenlet
    ),
]


class Http(fastserve.DrainHTTPMixIn, http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.mark.parametrize("base", STDLIB)
def test_http_servers_of_the_stdlib(impl: str, base: type) -> None:
    server: Any = type("Server", (fastserve.DrainMixIn, base), {})(("127.0.0.1", 0), Http)
    with server, served(server), contextlib.closing(http.client.HTTPConnection(*server.server_address)) as client:
        client.timeout = LIMIT
        for _ in range(2):
            client.request("POST", "/", b"body")
            response = client.getresponse()
            assert (response.read(), response.getheader("Connection")) == (b"body", None)
        sock = client.sock
        assert server.drain() == 0
        assert is_ended(sock)


@pytest.mark.parametrize("base", STDLIB)
def test_http_a_request_in_the_middle_is_served_and_told_that_it_is_the_last(impl: str, base: type) -> None:
    server: Any = type("Server", (fastserve.DrainMixIn, base), {})(("127.0.0.1", 0), Http)
    with server, served(server), connected(server) as client:
        send_part(server, client, b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 8\r\n\r\nfirst")
        drain = Draining(server)
        time.sleep(2 * draining.TICK)
        client.sendall(b"end")
        response = http.client.HTTPResponse(client)
        response.begin()
        assert (response.status, response.read(), response.getheader("Connection")) == (200, b"firstend", "close")
        assert is_ended(client)
        assert drain.result() == 0


def test_http_timeouts_are_told_as_those_of_http_server(impl: str) -> None:
    errors: list[str] = []

    class Timed(Http):
        timeout = 0.05

        def log_error(self, format: str, *args: Any) -> None:
            errors.append(format)

    class Plain(Timed):
        handle_one_request = http.server.BaseHTTPRequestHandler.handle_one_request

    for handler in (Timed, Plain):
        with make("Threading", handler) as server, served(server), connected(server) as client:
            assert is_ended(client)
            assert server.drain() == 0 and not server.reports
    assert errors == ["Request timed out: %r"] * 2


@pytest.mark.parametrize("model", IN_PROCESS)
def test_http_a_request_that_comes_when_the_connection_is_closed_is_not_handled(
    impl: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    handled: list[str] = []
    sent: list[str] = []

    class Counted(Http):
        def do_POST(self) -> None:
            handled.append(self.path)
            super().do_POST()

    def send(path: str) -> None:
        sent.append(path)
        client.sendall(b"POST %s HTTP/1.1\r\nHost: here\r\nContent-Length: 0\r\n\r\n" % path.encode())

    def is_readable(connection: socket.socket) -> bool:
        if "/2" not in sent:
            send("/2")  # just after this look
        return False

    with make(model, Counted) as server, served(server), connected(server) as client:
        send("/1")
        assert b"200 OK" in client.recv(1000)
        wait_until(lambda: any(entry.idle for entry in draining.requests_of(server)._entries.values()))
        monkeypatch.setattr(draining, "_is_readable", is_readable)
        assert server.drain() == 0
        assert is_ended(client)
    assert (sent, handled) == (["/1", "/2"], ["/1"])


@pytest.mark.parametrize("model", ["Threading", pytest.param("Greenlet", marks=needs_greenlet)])
def test_connections_with_tls(impl: str, model: str, tmp_path: Path) -> None:
    tls_support = pytest.importorskip("tls_support")
    context, client_context = tls_support.server_context(), tls_support.client_context()
    base = getattr(fastserve, model + "TCPServer")
    server_class = type("Server", (fastserve.TLSMixIn, fastserve.DrainMixIn, base), {"ssl_context": context})
    server: Any = server_class(("127.0.0.1", 0), Kept)
    with server, served(server), connected(server) as plain:
        with client_context.wrap_socket(plain, server_hostname=tls_support.NAME) as client:
            assert exchange(client) == b"line\n"
            assert exchange(client, b"sleep 0.2\n") == b"begun\n"
            drain = Draining(server)
            assert line_of(client) == b"sleep 0.2\n"
            assert is_ended(client)
            assert drain.result() == 0


def test_it_goes_with_limits_and_logging(impl: str) -> None:
    bases = (fastserve.LoggingMixIn, fastserve.LimitsMixIn, fastserve.DrainMixIn, fastserve.ThreadingTCPServer)
    server: Any = type("Server", bases, {"max_connections_per_client": 3})(("127.0.0.1", 0), Kept)
    with server, served(server), connected(server) as client:
        assert exchange(client) == b"line\n"
        assert server.drain() == 0
        assert is_ended(client)


@pytest.mark.parametrize("base", [fastserve.ThreadingTCPServer, socketserver.ThreadingTCPServer])
def test_idle_does_nothing_where_nothing_drains(impl: str, base: Any) -> None:
    with base(("127.0.0.1", 0), Kept) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        with connected(server) as client:
            assert exchange(client) == b"line\n"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("model", IN_PROCESS)
def test_a_later_call_may_shorten_the_time_that_another_waits(impl: str, model: str) -> None:
    with make(model, Silent) as server, served(server), connected(server) as client:
        assert exchange(client) == b"line\n"
        if model:
            server.shutdown()
        drain = Draining(server)
        assert server.drain(0) == 1
        assert drain.result() == 1
        assert is_ended(client)


def test_a_prefork_server_that_does_not_serve() -> None:
    server: Any = type("Server", (fastserve.PreforkMixIn, fastserve.TCPServer), {})(("127.0.0.1", 0), Kept)
    with server:
        assert server.drain() == 0
        server.serve_forever()
        assert server.fileno() == -1
        assert server.drain(1) == 0


def test_a_request_that_is_over_is_forgotten(impl: str) -> None:
    with make("Threading") as server, served(server):
        for _ in range(3):
            with connected(server) as client:
                assert exchange(client) == b"line\n"
        wait_until(lambda: not draining.requests_of(server)._entries)
        assert server.drain() == 0


def test_a_child_that_a_handler_forks_does_not_wait_for_a_lock_of_its_parent(impl: str) -> None:
    with make("Threading") as server:
        requests = draining.requests_of(server)
        held = threading.Event()
        release = threading.Event()

        def hold() -> None:
            with requests.lock:
                held.set()
                release.wait(LIMIT)

        holder = threading.Thread(target=hold)
        holder.start()
        assert held.wait(LIMIT)
        pid = os.fork()
        if pid == 0:
            requests.remove(None)
            os._exit(0)
        try:
            wait_until(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid)
        finally:
            release.set()
            holder.join()
