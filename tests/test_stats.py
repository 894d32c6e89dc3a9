"""What a server counts, under every worker model and over all processes of a family."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import http.server
import importlib.util
import json
import os
import signal
import socket
import socketserver
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastserve
from fastserve._meter import ROWS
from proxy_support import V1
from support import LIMIT, open_descriptors, serving, talk, wait_until
from test_prefork import exchange, program
from tls_support import client_of, end, server_context

ADDRESS = ("127.0.0.1", 0)
WORKERS = ["", "Threading", "ThreadPool"]
if importlib.util.find_spec("greenlet") is not None:
    WORKERS.append("Greenlet")
FORKING = ["Forking"] if hasattr(os, "fork") else []
linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel counts bytes on Linux")
pytestmark = pytest.mark.usefixtures("deadlines_end_soon")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")


class Lines(fastserve.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            if line == b"raise\n":
                raise RuntimeError("it was asked for")
            self.wfile.write(line)


class Silent:
    """Say nothing of errors that are asked for."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        assert isinstance(sys.exc_info()[1], RuntimeError | OSError)


def class_of(worker: str, *mixins: type, base: str = "TCPServer", **attributes: Any) -> Any:
    bases = (fastserve.StatsMixIn, *mixins, Silent, getattr(fastserve, worker + base))
    return type("Server", bases, {"request_queue_size": 128, **attributes})


@contextlib.contextmanager
def served(worker: str, *mixins: type, handler: Any = Lines, address: Any = ADDRESS, **options: Any) -> Iterator[Any]:
    with class_of(worker, *mixins, **options)(address, handler) as server, serving(server):
        yield server


@pytest.fixture(params=[*WORKERS, *FORKING])
def worker(request: pytest.FixtureRequest, impl: str) -> str:
    return str(request.param)


@pytest.fixture(params=[*WORKERS[1:], *FORKING])
def concurrent(request: pytest.FixtureRequest, impl: str) -> str:
    return str(request.param)


@contextlib.contextmanager
def connect(server: Any) -> Iterator[socket.socket]:
    """Connect for the time of the block.

    A child that the server forks here has copies of the clients' descriptors, too: to close one ends no connection.
    """
    with socket.create_connection(server.server_address[:2], LIMIT) as client:
        try:
            yield client
        finally:
            with contextlib.suppress(OSError):  # it is ended already
                client.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def running(server: Any) -> Iterator[None]:
    """Serve in a thread for the time of the block, and leave the server open."""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join(LIMIT)


def settled(server: Any, accepted: int) -> Any:
    """Return the counts when so many requests were accepted, and all of them have ended."""
    wait_until(lambda: (stats := server.stats()).accepted >= accepted and not stats.active)
    stats = server.stats()
    assert stats.accepted == accepted
    return stats


def refused(stats: Any) -> dict[str, int]:
    return {reason: count for reason, count in stats.refused.items() if count}


def timed_out(stats: Any) -> dict[str, int]:
    return {reason: count for reason, count in stats.timed_out.items() if count}


def test_requests_errors_and_bytes_are_counted(worker: str) -> None:
    with served(worker) as server:
        begun = server.stats()
        assert (begun.accepted, begun.handled, begun.errors, begun.active, begun.queued) == (0, 0, 0, 0, 0)
        assert begun.pids == (os.getpid(),) and not begun.workers
        for _ in range(7):
            assert talk(server.server_address, b"a\nbcd\n") == b"a\nbcd\n"
        for _ in range(3):
            with contextlib.suppress(ConnectionError):
                assert talk(server.server_address, b"raise\n") == b""
        stats = settled(server, 10)
    assert (stats.handled, stats.errors) == (10, 3)
    assert refused(stats) == timed_out(stats) == {}
    if sys.platform == "linux":
        # A connection that its client has reset may have told of its end already.
        assert stats.bytes_sent == 7 * 6
        assert stats.bytes_received == 7 * 6 + 3 * 6


@pytest.mark.parametrize("base", ["TCPServer", "UnixStreamServer"])
def test_who_is_connected_is_active(concurrent: str, base: str, tmp_path: Path) -> None:
    if base == "UnixStreamServer" and not hasattr(socket, "AF_UNIX"):
        pytest.skip("no Unix sockets")
    family, address = (socket.AF_INET, ADDRESS) if base == "TCPServer" else (socket.AF_UNIX, str(tmp_path / "socket"))
    with served(concurrent, base=base, address=address) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.socket(family)) for _ in range(3)]
        for client in clients:
            client.settimeout(LIMIT)
            client.connect(server.server_address)
            stack.callback(end, client)  # also where the test fails, or the end of the server would wait for it
            client.sendall(b"x\n")
            assert client.recv(2) == b"x\n"
        wait_until(lambda: server.stats().active == 3)  # a child may answer before its parent goes on
        stats = server.stats()
        assert (stats.accepted, stats.handled) == (3, 0)
        clients[0].shutdown(socket.SHUT_RDWR)
        wait_until(lambda: server.stats().active == 2)
        for client in clients[1:]:
            client.shutdown(socket.SHUT_RDWR)
        assert settled(server, 3).handled == 3
        if base == "UnixStreamServer":
            assert (stats.bytes_received, stats.bytes_sent, stats.backlog, stats.backlog_limit) == (None,) * 4


class Packets(fastserve.BaseRequestHandler):
    def handle(self) -> None:
        data, listener = self.request
        if data == b"raise":
            raise RuntimeError("it was asked for")
        listener.sendto(data, self.client_address)


def test_datagrams_are_counted(worker: str) -> None:
    with served(worker, base="UDPServer", handler=Packets) as server, socket.socket(type=socket.SOCK_DGRAM) as client:
        client.settimeout(LIMIT)
        for size in range(1, 11):
            client.sendto(b"x" * size, server.server_address)
            assert len(client.recv(100)) == size
        client.sendto(b"raise", server.server_address)
        stats = settled(server, 11)
        assert (stats.handled, stats.errors, stats.bytes_received, stats.bytes_sent) == (11, 1, 60, None)
        assert stats.backlog is None


def test_datagrams_that_are_refused_are_not_handled(worker: str) -> None:
    class Picky:
        def verify_request(self, request: Any, client_address: Any) -> bool:
            return bool(request[0] != b"no")

    with (
        served(worker, Picky, base="UDPServer", handler=Packets) as server,
        socket.socket(type=socket.SOCK_DGRAM) as client,
    ):
        client.settimeout(LIMIT)
        for data in (b"no", b"yes"):
            client.sendto(data, server.server_address)
        assert client.recv(100) == b"yes"
        stats = settled(server, 2)
        assert (stats.handled, refused(stats)) == (1, {"verify_request": 1})


def test_connections_that_are_refused_have_a_reason(concurrent: str) -> None:
    class Picky:
        def verify_request(self, request: Any, client_address: Any) -> bool:
            return not getattr(self, "closed_for_today", False)

    # With ForkingMixIn a connection counts for the limit as long as its fork takes only.
    limit = 1 if concurrent != "Forking" else None
    with served(concurrent, fastserve.LimitsMixIn, Picky, max_connections_per_client=limit) as server:
        expected = {"verify_request": 2}
        with connect(server) as first:
            first.sendall(b"x\n")
            assert first.recv(2) == b"x\n"
            if limit:
                with connect(server) as second:
                    assert second.recv(1) == b""
                expected["max_connections_per_client"] = 1
            server.closed_for_today = True
            for _ in range(2):
                with connect(server) as other:
                    assert other.recv(1) == b""
        stats = settled(server, 1 + sum(expected.values()))
    assert (stats.handled, refused(stats), stats.errors) == (1, expected, 0)


def test_a_wrong_header_of_a_proxy_is_a_reason(worker: str) -> None:
    with served(worker, fastserve.ProxyProtocolMixIn) as server:
        assert talk(server.server_address, V1 + b"x\n") == b"x\n"
        with connect(server) as client:
            client.sendall(b"no header\r\n")
            with contextlib.suppress(ConnectionError):
                assert client.recv(1) == b""
        stats = settled(server, 2)
    assert (stats.handled, refused(stats), stats.errors) == (1, {"proxy_header": 1}, 0)


@pytest.mark.parametrize("recipe", ["TLSMixIn", "wrapped"])
def test_a_failed_handshake_is_a_reason(worker: str, recipe: str) -> None:
    if recipe == "wrapped" and not worker:
        pytest.skip("the loop does the handshake before the connection is accepted")
    mixins = (fastserve.TLSMixIn,) if recipe == "TLSMixIn" else ()
    context = server_context()
    with class_of(worker, *mixins, ssl_context=context)(ADDRESS, Lines) as server:
        if recipe == "wrapped":
            server.socket = context.wrap_socket(server.socket, server_side=True)
        with serving(server):
            with client_of(server) as client:
                client.sendall(b"x\n")
                assert client.recv(2) == b"x\n"
            with connect(server) as plain:
                plain.sendall(b"this is no TLS\r\n" * 10)
                with contextlib.suppress(ConnectionError):
                    while plain.recv(100):
                        pass
            stats = settled(server, 2)
    assert (stats.handled, refused(stats)) == (1, {"tls_handshake": 1})


def test_a_wrong_header_before_a_handshake_is_counted_once(worker: str) -> None:
    context = server_context()
    mixins = (fastserve.ProxyProtocolMixIn, fastserve.TLSMixIn)
    with served(worker, *mixins, ssl_context=context) as server:
        with connect(server) as client:
            client.sendall(b"no header\r\n")
            with contextlib.suppress(ConnectionError):
                assert client.recv(1) == b""
        stats = settled(server, 1)
    assert (stats.handled, refused(stats)) == (0, {"proxy_header": 1})


def test_those_that_are_cut_off_are_counted(worker: str) -> None:
    class Limited(fastserve.LimitsMixIn):
        request_timeout = 0.05

    with served(worker, Limited) as server, connect(server) as client:
        assert client.recv(1) == b""
        stats = settled(server, 1)
    assert (stats.handled, stats.errors, timed_out(stats)) == (1, 0, {"request_timeout": 1})


def test_idle_clients_are_no_errors(worker: str) -> None:
    with served(worker, fastserve.LimitsMixIn, idle_timeout=0.05) as server, connect(server) as client:
        assert client.recv(1) == b""
        stats = settled(server, 1)
    assert (stats.handled, stats.errors, timed_out(stats)) == (1, 0, {"idle_timeout": 1})


def test_errors_are_counted_that_logging_is_told(impl: str, caplog: pytest.LogCaptureFixture) -> None:
    bases = (fastserve.StatsMixIn, fastserve.LoggingMixIn, fastserve.ThreadingTCPServer)
    with type("Server", bases, {})(ADDRESS, Lines) as server, serving(server):
        with contextlib.suppress(ConnectionError):
            talk(server.server_address, b"raise\n")
        assert settled(server, 1).errors == 1
    assert "it was asked for" in caplog.text


@pytest.mark.parametrize(
    "base",
    [
        pytest.param((http.server.HTTPServer,), id="sync"),
        pytest.param((http.server.ThreadingHTTPServer,), id="threads"),
        pytest.param((fastserve.ThreadPoolMixIn, http.server.HTTPServer), id="pool"),
        pytest.param(
            (getattr(socketserver, "ForkingMixIn", object), http.server.HTTPServer), marks=forks, id="children"
        ),
    ],
)
def test_servers_of_the_stdlib_count(impl: str, base: tuple[type, ...], tmp_path: Path) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None: ...

    with type("Server", (fastserve.StatsMixIn, *base), {})(ADDRESS, Handler) as server, serving(server, 0.01):
        for _ in range(5):
            assert b" 204 " in talk(server.server_address, b"GET / HTTP/1.0\r\n\r\n")
        stats = settled(server, 5)
    assert (stats.handled, stats.errors) == (5, 0)


def test_requests_that_wait_for_a_thread_are_queued(impl: str) -> None:
    with served("ThreadPool", max_workers=1) as server, contextlib.ExitStack() as stack:
        first, *_ = (stack.enter_context(connect(server)) for _ in range(4))
        wait_until(lambda: server.stats().queued == 3)
        assert server.stats().active == 4
        first.shutdown(socket.SHUT_RDWR)
        wait_until(lambda: server.stats().queued == 2)


def test_datagrams_that_wait_in_their_batch_are_queued(impl: str) -> None:
    arrived, go_on = threading.Event(), threading.Event()

    def handle(request: Any, client_address: Any, server: Any) -> None:
        arrived.set()
        assert go_on.wait(LIMIT)

    with class_of("", base="UDPServer")(ADDRESS, handle) as server, socket.socket(type=socket.SOCK_DGRAM) as client:
        for _ in range(5):
            client.sendto(b"x", server.server_address)
        with serving(server):
            assert arrived.wait(LIMIT)
            stats = server.stats()
            go_on.set()
            assert settled(server, 5).handled == 5
    assert stats.queued in (0, 4)  # 0 where the platform takes no batches
    assert stats.accepted == stats.active == 1


@pytest.mark.skipif("Greenlet" not in WORKERS, reason="greenlet is not installed")
def test_greenlets_that_wait_for_their_turn_are_queued(impl: str) -> None:
    seen: list[int] = []
    held, go_on = threading.Event(), threading.Event()

    def handle(request: Any, client_address: Any, server: Any) -> None:
        if request.recv(1) == b"h":  # hold up all others
            held.set()
            assert go_on.wait(LIMIT)
            fastserve.sleep(0)
        else:
            fastserve.sleep(0)
            for _ in range(100):
                seen.append(server.stats().queued)
                fastserve.sleep(0)

    with served("Greenlet", handler=handle, slow_handler_seconds=0) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server)) for _ in range(4)]
        clients[0].sendall(b"h")
        assert held.wait(LIMIT)
        for client in clients[1:]:
            client.sendall(b"x")
        go_on.set()
        assert settled(server, 4).handled == 4
    assert max(seen) in (1, 2, 3)  # there are two others that go on with it, at most


def test_a_loop_that_does_not_come_round_is_late(impl: str) -> None:
    held, go_on = threading.Event(), threading.Event()

    def handle(request: Any, client_address: Any, server: Any) -> None:
        held.set()
        assert go_on.wait(LIMIT)

    with class_of("")(ADDRESS, handle) as server:
        assert server.stats().loop_delay is None  # there is no loop
        with running(server):
            wait_until(lambda: server.stats().loop_delay is not None)
            with connect(server):
                assert held.wait(LIMIT)
                wait_until(lambda: server.stats().loop_delay > 0.2)
                go_on.set()
                # It says what it was as long as it was not asked again.
                wait_until(lambda: server.stats().active == 0)
            wait_until(lambda: server.stats().loop_delay < 0.2)
        server.stats()
        assert server.stats().loop_delay is None
        with running(server):  # another loop, which nobody has waited for while there was none
            wait_until(lambda: server.stats().loop_delay is not None)
            assert server.stats().loop_delay < LIMIT


def test_a_loop_is_asked_before_it_is_open(impl: str) -> None:
    from fastserve._loop import Loop

    with fastserve.TCPServer(ADDRESS, Lines) as server:
        loop = Loop(server)
        called = []
        loop.call(lambda: called.append(True))
        loop.open()
        try:
            assert not loop.wait(LIMIT) and called == [True]
        finally:
            loop.close()


@linux
def test_those_that_the_kernel_keeps_are_the_backlog(impl: str) -> None:
    held, go_on = threading.Event(), threading.Event()

    def handle(request: Any, client_address: Any, server: Any) -> None:
        held.set()
        assert go_on.wait(LIMIT)

    with class_of("", request_queue_size=9)(ADDRESS, handle) as server:
        stats = server.stats()
        assert (stats.backlog, stats.backlog_limit) == (0, 9)
        with serving(server), contextlib.ExitStack() as stack:
            stack.enter_context(connect(server))
            assert held.wait(LIMIT)
            for _ in range(3):
                stack.enter_context(connect(server))
            wait_until(lambda: server.stats().backlog == 3)
            go_on.set()
            wait_until(lambda: server.stats().backlog == 0)
    assert server.stats().backlog is None


@linux
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_bytes_are_those_that_were_given_to_the_kernel(impl: str, host: str) -> None:
    """Also those that have still to be sent, and the end of a stream is no byte, whoever has ended it first."""
    if host == "::1" and not socket.has_ipv6:
        pytest.skip("no IPv6")
    size = 3_000_000

    class Much(fastserve.BaseRequestHandler):
        def handle(self) -> None:
            if self.request.recv(3) == b"abc":
                self.request.sendall(b"x" * size)

    family = socket.AF_INET6 if host == "::1" else socket.AF_INET
    with served("Threading", handler=Much, address=(host, 0), address_family=family) as server:
        with connect(server) as client:
            client.sendall(b"abc")
            while client.recv(100_000):
                pass
        assert (settled(server, 1).bytes_received, server.stats().bytes_sent) == (3, size)
        with connect(server) as client:
            client.sendall(b"xyz")
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
        assert (settled(server, 2).bytes_received, server.stats().bytes_sent) == (6, size)


def test_a_connection_that_a_handler_has_taken_over_is_active_no_longer(impl: str) -> None:
    class Server(fastserve.StatsMixIn, fastserve.ThreadingTCPServer):
        def shutdown_request(self, request: Any) -> None: ...

    def handle(request: Any, client_address: Any, server: Any) -> None:
        socket.socket(fileno=request.detach()).close()

    with Server(ADDRESS, handle) as server, serving(server):
        with connect(server) as client:
            assert client.recv(1) == b""
        wait_until(lambda: server.stats().handled == 1)
        wait_until(lambda: gc.collect() >= 0 and server.stats().active == 0)


def test_a_connection_that_its_handler_has_closed_is_counted(worker: str) -> None:
    def handle(request: Any, client_address: Any, server: Any) -> None:
        request.close()

    with served(worker, handler=handle) as server:
        with connect(server) as client:
            with contextlib.suppress(ConnectionError):
                assert client.recv(1) == b""
        assert settled(server, 1).handled == 1


def test_what_is_told_cannot_be_changed() -> None:
    with class_of("")(ADDRESS, Lines) as server:
        stats = server.stats()
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.accepted = 3
    with pytest.raises(TypeError):
        stats.refused["verify_request"] = 3
    with pytest.raises(TypeError):
        stats.workers[0] = stats


def test_no_descriptor_is_left(worker: str) -> None:
    before = open_descriptors()
    with served(worker) as server:
        assert talk(server.server_address, b"x\n") == b"x\n"
        settled(server, 1)
    assert server.stats().accepted == 1  # it can be asked still
    assert open_descriptors() == before
    with socket.create_server(ADDRESS) as taken, pytest.raises(OSError):
        class_of(worker)(taken.getsockname(), Lines)
    assert open_descriptors() == before


def test_servers_on_a_socket_from_outside_count(impl: str) -> None:
    with socket.create_server(ADDRESS) as listener, class_of("").from_socket(listener, Lines) as server:
        with serving(server):
            assert talk(server.server_address, b"x\n") == b"x\n"
            assert settled(server, 1).handled == 1


def test_handle_request_counts(worker: str) -> None:
    with class_of(worker)(ADDRESS, Lines) as server, connect(server) as client:
        client.sendall(b"x\n")
        client.shutdown(socket.SHUT_WR)
        server.handle_request()
        assert client.recv(2) == b"x\n"
        if worker == "Forking":
            server.collect_children(blocking=True)
        stats = settled(server, 1)
        assert (stats.handled, stats.loop_delay) == (1, None)


def test_a_signal_handler_may_ask_while_its_thread_counts(impl: str) -> None:
    with class_of("Threading")(ADDRESS, Lines) as server:
        meter = fastserve.stats.meter_of(server)  # type: ignore[attr-defined]
        told: list[Any] = []

        def ask() -> None:
            with meter._lock:
                told.append(server.stats())

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(LIMIT)
        assert told


def test_threads_and_children_that_end_together_are_all_counted(concurrent: str) -> None:
    each = 5 if concurrent == "Forking" else 25
    attributes = {"max_children": 100} if concurrent == "Forking" else {}
    with served(concurrent, **attributes) as server:

        def clients() -> None:
            for _ in range(each):
                assert talk(server.server_address, b"x\n") == b"x\n"

        threads = [threading.Thread(target=clients) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = settled(server, 8 * each)
        assert stats.handled == 8 * each
        if sys.platform == "linux":
            assert (stats.bytes_received, stats.bytes_sent) == (16 * each, 16 * each)


@forks
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_that_serves_by_itself_counts_for_itself(impl: str) -> None:
    with class_of("")(ADDRESS, Lines) as server:
        with running(server):
            assert talk(server.server_address, b"x\n") == b"x\n"
            settled(server, 1)
        with connect(server) as client:
            pid = os.fork()
            if not pid:
                status = 1
                try:
                    server.handle_request()
                    server.handle_request()
                    stats = server.stats()
                    status = 0 if (stats.accepted, stats.handled, stats.active) == (2, 2, 0) else 2
                finally:
                    os._exit(status)
            client.shutdown(socket.SHUT_RDWR)
            assert talk(server.server_address, b"x\n") == b"x\n"
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert server.stats().accepted == 1


def test_there_are_not_more_rows_than_memory(impl: str) -> None:
    with class_of("")(ADDRESS, Lines) as server:
        meter = fastserve.stats.meter_of(server)  # type: ignore[attr-defined]
        rows = [meter.take(place) for place in range(ROWS - 1)]
        assert rows == list(range(1, ROWS))
        for row in rows:
            meter.started(row, 1)
        with pytest.raises(OSError):
            meter.take(0)
        meter.ended(7)
        assert meter.take(6) == 7  # of the same place, whose counts go on
        with pytest.raises(OSError):
            meter.take(0)


# Worker processes

MODELS = [f"{name}TCPServer" for name in [*WORKERS, *FORKING]]
prefork = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc for what the processes are")


def stats_of(server: Any) -> dict[str, Any]:
    """Return what the parent of the workers tells, when a signal asks it."""
    count = sum(line.startswith("stats ") for line in list(server.lines))
    server.send(signal.SIGUSR1)
    wait_until(lambda: sum(line.startswith("stats ") for line in list(server.lines)) > count)
    last = [line for line in list(server.lines) if line.startswith("stats ")][-1]
    return dict(json.loads(last.removeprefix("stats ")))


@prefork
@pytest.mark.parametrize("name", MODELS)
def test_workers_are_summed_and_one_that_is_killed_takes_nothing_away(impl: str, name: str, tmp_path: Path) -> None:
    with program(tmp_path, impl, name, counts=True) as server:
        for _ in range(20):
            assert server.ask("pid")
        with server.connect() as client:
            client.sendall(b"raise\n")
            with contextlib.suppress(ConnectionError):
                assert client.recv(1) == b""
        wait_until(lambda: (stats := stats_of(server))["accepted"] == 21 and not stats["active"])
        stats = stats_of(server)
        assert (stats["handled"], stats["errors"], stats["received"]) == (21, 1, 20 * 4 + 6)
        assert sum(stats["workers"].values()) == 21 and set(stats["workers"]) <= {"0", "1"}
        assert set(stats["pids"]) == set(server.workers())
        with server.connect() as client:
            first = exchange(client, "pid")
            wait_until(lambda: stats_of(server)["active"] == 1)
            killed = int(first) if name != "ForkingTCPServer" else server.workers()[0]
            os.kill(killed, signal.SIGKILL)
            wait_until(lambda: len(server.started()) == 3)
            wait_until(lambda: killed not in stats_of(server)["pids"])
            if name == "ForkingTCPServer":  # whose children go on, and count
                client.close()
                wait_until(lambda: stats_of(server)["handled"] == 22)
        wait_until(lambda: stats_of(server)["active"] == 0)
        after = stats_of(server)
        assert after["accepted"] == 22 and after["errors"] == 1 and 21 <= after["handled"] <= 22
        for _ in range(10):
            assert server.ask("pid")
        wait_until(lambda: (stats := stats_of(server))["accepted"] == 32 and not stats["active"])
        last = stats_of(server)
        assert sum(last["workers"].values()) == 32 and len(last["pids"]) == 2
        assert last["handled"] == after["handled"] + 10


@prefork
def test_each_worker_tells_the_sums_of_all(impl: str, tmp_path: Path) -> None:
    with program(tmp_path, impl, "ThreadingTCPServer", counts=True) as server:
        for _ in range(10):
            assert server.ask("pid")
        stats = json.loads(server.ask("stats"))
        assert stats["accepted"] == 11 and set(stats["pids"]) == set(server.workers())


@prefork
def test_a_worker_that_is_replaced_counts_until_it_has_ended(impl: str, tmp_path: Path) -> None:
    with program(tmp_path, impl, "ThreadingTCPServer", counts=True, workers=1) as server:
        with server.connect() as client:
            old = int(exchange(client, "pid"))
            server.send(signal.SIGHUP)
            wait_until(lambda: len(server.started()) == 2)
            wait_until(lambda: int(server.ask("pid")) != old)
            stats = stats_of(server)
            assert len(stats["pids"]) == 2 and stats["active"] >= 1
            assert exchange(client, "pid") == str(old)
        wait_until(lambda: len(stats_of(server)["pids"]) == 1 and not stats_of(server)["active"])
        after = stats_of(server)
        assert after["accepted"] == after["handled"] >= stats["accepted"]
        assert list(after["workers"]) == ["0"]


@prefork
def test_the_delay_is_that_of_the_worker_which_is_late(impl: str, tmp_path: Path) -> None:
    with program(tmp_path, impl, "TCPServer", counts=True) as server:
        wait_until(lambda: stats_of(server)["delay"] is not None)
        with server.connect() as client:
            client.sendall(b"block 1\n")
            wait_until(lambda: stats_of(server)["delay"] > 0.5)
            with client.makefile("rb") as file:
                assert file.readline() == b"done\n"
        wait_until(lambda: stats_of(server)["delay"] < 0.5)


@prefork
def test_the_parent_knows_the_backlog_of_all_listeners(impl: str) -> None:
    class Server(fastserve.StatsMixIn, fastserve.PreforkMixIn, fastserve.TCPServer):
        workers = 3
        reuse_port = True
        request_queue_size = 7

    with Server(ADDRESS, Lines) as server, serving(server):
        wait_until(lambda: len(server.stats().pids) == 3)
        assert (server.stats().backlog, server.stats().backlog_limit) == (0, 21)
        assert talk(server.server_address, b"x\n") == b"x\n"
        assert settled(server, 1).handled == 1
    assert server.stats().accepted == 1 and server.stats().pids == ()
