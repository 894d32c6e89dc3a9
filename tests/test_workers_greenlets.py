"""GreenletMixIn: unchanged handlers, all in one thread."""

from __future__ import annotations

import contextlib
import contextvars
import http.client
import http.server
import logging
import os
import signal
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from types import ModuleType
from typing import Any

import pytest

import fastserve
from fastserve import _backend, _waiting
from fastserve._loop import Loop, State
from support import LIMIT, open_descriptors, serving, talk, wait_until

pytest.importorskip("greenlet", reason="greenlets need the package greenlet")

pytestmark = pytest.mark.usefixtures("impl")


class Echo(socketserver.BaseRequestHandler):
    """Send back what comes, until the client ends the connection."""

    def handle(self) -> None:
        while data := self.request.recv(65536):
            self.request.sendall(data)


class Lines(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while line := self.rfile.readline():
            self.wfile.write(line.upper())


def server_of(handler: Any, **attributes: Any) -> fastserve.GreenletTCPServer:
    """Return a server of a class with these attributes."""
    # More clients than the stdlib's 5 connect at a time here; who finds the backlog full tries again after a second.
    cls = type("Server", (fastserve.GreenletTCPServer,), {"request_queue_size": 128, **attributes})
    server: fastserve.GreenletTCPServer = cls(("127.0.0.1", 0), handler)
    return server


def handling(function: Callable[[Any], None], base: type = socketserver.BaseRequestHandler) -> Any:
    """Return a handler class whose ``handle()`` is ``function``."""
    return type("Handler", (base,), {"handle": function})


def noting(ended: list[bytes]) -> Any:
    """Return a handler class that says when it has begun, and notes what its client says then."""

    def handle(self: Any) -> None:
        self.request.sendall(b"begun")
        ended.append(self.request.recv(100))

    return handling(handle)


@pytest.mark.parametrize("kind", ["mix-in", "patched"])
def test_a_listener_that_cannot_be_accepted_from_is_left_alone(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    with contextlib.ExitStack() as stack:
        if kind == "patched":
            stack.enter_context(fastserve.patched("greenlet"))
            server: Any = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Lines)
        else:
            server = server_of(Lines)
        stack.enter_context(serving(server))
        assert talk(server.server_address, b"a\n") == b"A\n"
        server.socket.shutdown(socket.SHUT_RDWR)
        (loop,) = State.of(server).loops
        wait_until(lambda: isinstance(loop, Loop) and loop._backoff.pause > 0)
    assert "cannot accept on" in capfd.readouterr().err


def test_clients_that_stay_are_served_in_turn_by_one_thread() -> None:
    threads = set()

    class Handler(Echo):
        def setup(self) -> None:
            threads.add(threading.get_ident())

    with serving(server_of(Handler)) as server:
        clients = [socket.create_connection(server.server_address, LIMIT) for _ in range(20)]
        for turn in range(3):
            for number, client in enumerate(clients):
                client.sendall(b"%d %d" % (turn, number))
            for number, client in enumerate(clients):
                assert client.recv(100) == b"%d %d" % (turn, number)
        for client in clients:
            client.close()
    assert len(threads) == 1


def test_lines_are_read_and_written_as_files() -> None:
    with serving(server_of(Lines)) as server:
        assert talk(server.server_address, b"one\ntwo\nthree") == b"ONE\nTWO\nTHREE"


def test_more_than_the_kernel_keeps_goes_both_ways() -> None:
    payload = os.urandom(1 << 20) * 8
    with serving(server_of(Echo)) as server, socket.create_connection(server.server_address, LIMIT) as client:
        received = bytearray()

        def read() -> None:
            while data := client.recv(65536):
                received.extend(data)

        reader = threading.Thread(target=read)
        reader.start()
        client.sendall(payload)
        client.shutdown(socket.SHUT_WR)
        reader.join(LIMIT)
    assert received == payload


def test_the_request_is_a_socket() -> None:
    seen = []

    def handle(self: Any) -> None:
        seen.append((isinstance(self.request, socket.socket), self.request.gettimeout(), self.request.getblocking()))

    with serving(server_of(handling(handle))) as server:
        assert talk(server.server_address, b"") == b""
    assert seen == [(True, None, True)]


def test_a_server_of_the_standard_library_gets_the_loop_with_the_mix_in() -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    class Server(fastserve.GreenletMixIn, http.server.HTTPServer):
        block_on_close = False

    with serving(Server(("127.0.0.1", 0), Handler)) as server:
        connections = [http.client.HTTPConnection(*server.server_address, timeout=LIMIT) for _ in range(5)]
        for _ in range(2):
            for connection in connections:
                connection.request("GET", "/")
                assert connection.getresponse().read() == b"ok"
        for connection in connections:
            connection.close()


def test_handlers_sleep_side_by_side() -> None:
    begun: list[int] = []

    def handle(self: Any) -> None:
        begun.append(1)
        while len(begun) < 20:
            fastserve.sleep(0.01)
        self.request.sendall(b"awake")

    with serving(server_of(handling(handle))) as server:
        clients = [socket.create_connection(server.server_address, LIMIT) for _ in range(20)]
        for client in clients:
            assert client.recv(100) == b"awake"
            client.close()


def test_a_negative_sleep_is_refused() -> None:
    errors: list[Exception] = []

    def handle(self: Any) -> None:
        try:
            fastserve.sleep(-1)
        except ValueError as error:
            errors.append(error)

    with serving(server_of(handling(handle))) as server:
        talk(server.server_address, b"")
    assert str(errors[0]) == "sleep length must be non-negative"


VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE")


def test_a_thread_is_called_while_others_go_on() -> None:
    release = threading.Event()
    threads = []

    def wait() -> str:
        threads.append(threading.get_ident())
        assert release.wait(LIMIT)
        return VARIABLE.get()

    def handle(self: Any) -> None:
        threads.append(threading.get_ident())
        word = self.request.recv(100)
        if word == b"wait":
            VARIABLE.set("of the handler")
            self.request.sendall(fastserve.to_thread(wait).encode())
        else:
            self.request.sendall(word)

    with serving(server_of(handling(handle))) as server:
        with socket.create_connection(server.server_address, LIMIT) as waiting:
            waiting.sendall(b"wait")
            wait_until(lambda: len(threads) == 2)
            assert talk(server.server_address, b"meanwhile") == b"meanwhile"
            release.set()
            assert waiting.recv(100) == b"of the handler"
    assert threads[0] != threads[1] and threads[0] == threads[2]


class AtOnce(Executor):
    """What it is to call has been called before anybody can wait for it."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
        return future


def test_no_request_is_lost_after_one_whose_thread_was_faster() -> None:
    def handle(self: Any) -> None:
        _waiting.running().executor = AtOnce()
        received = self.request.recv(100)
        self.request.sendall(fastserve.to_thread(bytes, received))

    with serving(server_of(handling(handle))) as server:
        for _ in range(5):
            assert talk(server.server_address, b"hello") == b"hello"


def test_what_a_thread_raises_is_raised_in_the_handler() -> None:
    seen = []

    def fail(number: int, *, word: str) -> None:
        raise LookupError(number, word)

    def handle(self: Any) -> None:
        try:
            fastserve.to_thread(fail, 1, word="two")
        except LookupError as error:
            seen.append(error.args)

    with serving(server_of(handling(handle))) as server:
        talk(server.server_address, b"")
    assert seen == [(1, "two")]


def test_what_is_spawned_runs_beside_its_handler() -> None:
    order: list[object] = []

    def beside(name: str) -> None:
        fastserve.sleep(0.01)
        order.append(name)

    def handle(self: Any) -> None:
        spawned = fastserve.spawn(beside, "spawned")
        order.append("begun")
        order.append(spawned.is_alive())
        spawned.join(0.0)
        order.append(spawned.is_alive())
        spawned.join()
        order.append(spawned.is_alive())

    with serving(server_of(handling(handle))) as server:
        talk(server.server_address, b"")
    assert order == ["begun", True, True, "spawned", False]


def test_what_a_spawned_function_raises_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    reported = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: reported.append(arguments.exc_value))
    error = LookupError("spawned")

    def fail() -> None:
        raise error

    def handle(self: Any) -> None:
        fastserve.spawn(fail).join()

    with serving(server_of(handling(handle))) as server:
        talk(server.server_address, b"")
    assert reported == [error]


def test_context_variables_are_those_of_one_request() -> None:
    seen = []

    def handle(self: Any) -> None:
        seen.append(VARIABLE.get("nothing"))
        VARIABLE.set("left behind")
        self.request.recv(1)
        seen.append(VARIABLE.get())

    with serving(server_of(handling(handle))) as server:
        for _ in range(3):
            talk(server.server_address, b"x")
    assert seen == ["nothing", "left behind"] * 3


def test_a_handler_connects_to_another_server() -> None:
    with serving(server_of(Echo)) as upstream:

        def handle(self: Any) -> None:
            with fastserve.create_connection(("localhost", upstream.server_address[1]), timeout=LIMIT) as connection:
                connection.sendall(self.request.recv(100))
                self.request.sendall(connection.recv(100))

        with serving(server_of(handling(handle))) as server:
            assert talk(server.server_address, b"over two servers") == b"over two servers"


def test_a_refused_connection_raises_what_the_socket_module_raises() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = closed.getsockname()
    errors = []

    def connect(create: Callable[..., Any]) -> None:
        try:
            create(address, timeout=LIMIT)
        except OSError as error:
            errors.append((type(error), error.errno, error.strerror))

    connect(socket.create_connection)
    with serving(server_of(handling(lambda self: connect(fastserve.create_connection)))) as server:
        talk(server.server_address, b"")
    assert len(errors) == 2 and errors[0] == errors[1]


def test_the_timeout_of_a_handler_class_holds() -> None:
    seen: list[Exception] = []

    class Handler(socketserver.StreamRequestHandler):
        timeout = 0.05

        def handle(self) -> None:
            assert self.rfile.readline() == b"first\n"
            try:
                self.rfile.readline()
            except TimeoutError as error:
                seen.append(error)
                self.wfile.write(b"too late")

    server = server_of(Handler)
    with socket.create_connection(("127.0.0.1", server.server_address[1]), LIMIT) as client:
        client.sendall(b"first\n")  # before the handler begins to wait
        with serving(server):
            assert client.recv(100) == b"too late"
    assert str(seen[0]) == "timed out"


def test_errors_of_handlers_are_handled_and_the_others_go_on() -> None:
    errors: list[Any] = []

    class Server(fastserve.GreenletTCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            errors.append(client_address)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while data := self.request.recv(100):
                if data == b"fail":
                    raise LookupError
                self.request.sendall(data)

    with serving(Server(("127.0.0.1", 0), Handler)) as server:
        with socket.create_connection(server.server_address, LIMIT) as kept:
            kept.sendall(b"one")
            assert kept.recv(100) == b"one"
            assert talk(server.server_address, b"fail") == b""
            kept.sendall(b"two")
            assert kept.recv(100) == b"two"
    assert len(errors) == 1


def test_what_handle_error_raises_is_reported_as_of_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    reported = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: reported.append(type(arguments.exc_value)))

    class Server(fastserve.GreenletTCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            raise

    def fail(self: Any) -> None:
        raise LookupError

    with serving(Server(("127.0.0.1", 0), handling(fail))) as server:
        assert talk(server.server_address, b"") == b""
        assert talk(server.server_address, b"") == b""
    assert reported == [LookupError, LookupError]


def test_no_more_connections_than_allowed_are_handled_at_a_time() -> None:
    running: list[int] = []
    most = []

    def handle(self: Any) -> None:
        running.append(1)
        most.append(len(running))
        data = self.request.recv(100)
        self.request.sendall(data)
        running.pop()

    with serving(server_of(handling(handle), max_connections=2, request_queue_size=20)) as server:
        clients = [socket.create_connection(server.server_address, LIMIT) for _ in range(6)]
        wait_until(lambda: len(running) == 2)
        for client in clients:
            client.sendall(b"x")
        for client in clients:
            assert client.recv(100) == b"x"
            client.close()
    assert max(most) == 2 and len(most) == 6


def test_shutdown_does_not_wait_for_requests_and_the_end_of_serving_does() -> None:
    ended: list[bytes] = []
    server = server_of(noting(ended))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with socket.create_connection(server.server_address, LIMIT) as client:
        assert client.recv(100) == b"begun"
        server.shutdown()
        assert thread.is_alive() and not ended
        client.sendall(b"done")
        thread.join(LIMIT)
    assert not thread.is_alive() and ended == [b"done"]
    server.server_close()


@pytest.mark.parametrize("attribute", [{"block_on_close": False}, {"daemon_threads": True}])
def test_requests_are_ended_where_nobody_waits_for_them(attribute: dict[str, bool]) -> None:
    log = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"begun")
            try:
                self.rfile.readline()
            except BaseException as error:
                log.append(type(error).__name__)
                raise

        def finish(self) -> None:
            super().finish()
            log.append("finished")

    before = open_descriptors()
    server = server_of(Handler, **attribute)
    with socket.create_connection(("127.0.0.1", server.server_address[1]), LIMIT) as client:
        with serving(server):
            assert client.recv(100) == b"begun"
        assert client.recv(100) == b""
    assert log == ["GreenletExit", "finished"]
    assert open_descriptors() == before


def test_server_close_from_another_thread_waits_for_requests() -> None:
    ended: list[bytes] = []
    server = server_of(noting(ended))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with socket.create_connection(server.server_address, LIMIT) as client:
        assert client.recv(100) == b"begun"
        server.shutdown()
        timer = threading.Timer(0.1, client.sendall, [b"done"])
        timer.start()
        server.server_close()
        assert ended == [b"done"]
        timer.join()
    thread.join(LIMIT)


def test_a_handler_can_shut_its_server_down() -> None:
    def handle(self: Any) -> None:
        self.server.shutdown()
        self.request.sendall(b"stopped")

    server = server_of(handling(handle))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    assert talk(server.server_address, b"") == b"stopped"
    thread.join(LIMIT)
    assert not thread.is_alive()
    server.server_close()


def test_a_handler_can_close_its_server() -> None:
    def handle(self: Any) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.request.sendall(b"closed")

    server = server_of(handling(handle))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    assert talk(server.server_address, b"") == b"closed"
    thread.join(LIMIT)
    assert not thread.is_alive()


def test_requests_left_by_an_interrupt_go_on_in_server_close() -> None:
    log: list[bytes] = []
    server = server_of(noting(log))
    client = socket.create_connection(("127.0.0.1", server.server_address[1]), LIMIT)

    def interrupt() -> None:
        assert client.recv(100) == b"begun"
        wait_until(lambda: State.of(server).hubs[0].idle)  # before, it would meet the handler
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        server.serve_forever()
    thread.join()
    assert log == []
    client.sendall(b"done")
    server.server_close()
    assert log == [b"done"]
    client.close()


def test_an_interrupt_in_a_handler_ends_the_loop() -> None:
    def handle(self: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    server = server_of(handling(handle))
    client = socket.create_connection(("127.0.0.1", server.server_address[1]), LIMIT)
    with pytest.raises(KeyboardInterrupt):
        server.serve_forever()
    server.server_close()
    assert client.recv(1) == b""
    client.close()


def test_an_interrupt_before_the_files_of_a_handler_are_closed_closes_the_connection(impl: str) -> None:
    handlers: list[Any] = []

    class Handler(fastserve.StreamRequestHandler):
        def handle(self) -> None:
            handlers.append(self)

        def finish(self) -> None:
            raise KeyboardInterrupt

    with server_of(Handler) as server:
        client = socket.create_connection(("127.0.0.1", server.server_address[1]), LIMIT)
        with client, pytest.raises(KeyboardInterrupt):
            server.serve_forever()
        assert handlers[0].request.fileno() == -1 and not handlers[0].rfile.closed
        handlers[0].rfile.close()


def test_serving_goes_on_after_a_shutdown() -> None:
    server = server_of(Echo)
    for _ in range(2):
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        assert talk(server.server_address, b"again") == b"again"
        server.shutdown()
        thread.join(LIMIT)
    server.server_close()


def test_one_request_is_handled_to_its_end_without_a_loop() -> None:
    with server_of(Echo) as server, socket.create_connection(server.server_address, LIMIT) as client:
        client.sendall(b"alone")
        client.shutdown(socket.SHUT_WR)
        server.handle_request()
        assert client.recv(100) == b"alone"


def test_two_servers_run_in_two_threads() -> None:
    with serving(server_of(Echo)) as one, serving(server_of(Lines)) as two:
        assert talk(one.server_address, b"one\n") == b"one\n"
        assert talk(two.server_address, b"two\n") == b"TWO\n"


def test_datagrams_each_have_a_greenlet() -> None:
    answered: list[bytes] = []

    def handle(self: Any) -> None:
        data, server_socket = self.request
        while data == b"slow" and not answered:
            fastserve.sleep(0.01)
        server_socket.sendto(data, self.client_address)
        answered.append(data)

    server = fastserve.GreenletUDPServer(("127.0.0.1", 0), handling(handle))
    with serving(server), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(LIMIT)
        client.sendto(b"slow", server.server_address)
        client.sendto(b"fast", server.server_address)
        assert [client.recv(100), client.recv(100)] == [b"fast", b"slow"]


def test_unix_sockets_are_served(tmp_path: Any) -> None:
    with serving(fastserve.GreenletUnixStreamServer(str(tmp_path / "socket"), Echo)) as server:
        assert talk(server.server_address, b"local", socket.AF_UNIX) == b"local"


def test_who_holds_the_loop_is_told(caplog: pytest.LogCaptureFixture) -> None:
    held: list[int] = []

    def told() -> list[str]:
        """Return the reports of the handler: a busy machine may hold up the loop elsewhere, and who looks at it too."""
        texts = [record.getMessage() for record in caplog.records]
        return [text for text in texts if "Slow" in text and "time.sleep(0.5)" in text]

    class Slow(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while not told() and len(held) < 60:
                held.append(1)
                time.sleep(0.5)
                fastserve.sleep(0)

    with caplog.at_level(logging.WARNING, "fastserve"), serving(server_of(Slow)) as server:
        talk(server.server_address, b"")
    assert 1 <= len(told()) <= len(held)  # once each time, at most
    assert "'127.0.0.1'" in told()[0]


def test_nobody_is_told_of_who_waits_properly(caplog: pytest.LogCaptureFixture) -> None:
    def handle(self: Any) -> None:
        fastserve.sleep(0.4)

    def is_not_told() -> bool:
        caplog.clear()
        with serving(server_of(handling(handle))) as server:
            talk(server.server_address, b"")
        return not caplog.records

    with caplog.at_level(logging.WARNING, "fastserve"):
        wait_until(is_not_told)  # on a busy machine the loop may be held up although the handler waits


def test_a_flooding_client_leaves_the_others_their_turn() -> None:
    stop = threading.Event()

    def flood(address: Any) -> None:
        with socket.create_connection(address, LIMIT) as client:
            client.setblocking(False)
            while not stop.is_set():
                for call in (lambda: client.send(b"x" * 65536), lambda: client.recv(65536)):
                    try:
                        call()
                    except BlockingIOError:
                        continue

    with serving(server_of(Echo)) as server:
        thread = threading.Thread(target=flood, args=[server.server_address])
        thread.start()
        try:
            with socket.create_connection(server.server_address, LIMIT) as client:
                for _ in range(100):
                    client.sendall(b"ping")
                    assert client.recv(100) == b"ping"
        finally:
            stop.set()
            thread.join(LIMIT)


def test_a_forked_child_of_a_handler_ends_with_it_and_leaves_the_server_alone() -> None:
    statuses = []

    def handle(self: Any) -> None:
        pid = os.fork()
        if pid == 0:
            self.request.sendall(b"of the child, which also shuts the connection down")
            return
        statuses.append(os.waitpid(pid, 0)[1])

    with serving(server_of(handling(handle))) as server, serving(server_of(Echo)) as other:
        with socket.create_connection(other.server_address, LIMIT) as client:
            for _ in range(3):
                assert talk(server.server_address, b"").startswith(b"of the child")
                client.sendall(b"x")
                assert client.recv(100) == b"x"
    assert statuses == [0, 0, 0]


def test_nothing_is_left_open() -> None:
    before = open_descriptors()
    for _ in range(3):
        with serving(server_of(Echo)) as server:
            for _ in range(20):
                assert talk(server.server_address, b"x") == b"x"
    assert open_descriptors() == before


@pytest.mark.parametrize("base", ["TCPServer", "ThreadingTCPServer", "ThreadPoolTCPServer"])
def test_the_same_handler_runs_under_the_other_worker_models(base: str, module: ModuleType) -> None:
    order = []

    def call() -> str:
        return VARIABLE.get()

    def handle(self: Any) -> None:
        VARIABLE.set("carried")
        fastserve.sleep(0.001)
        spawned = fastserve.spawn(order.append, "spawned")
        spawned.join()
        assert not spawned.is_alive()
        with fastserve.create_connection(self.server.upstream, timeout=LIMIT) as connection:
            connection.sendall(fastserve.to_thread(call).encode())
            self.request.sendall(connection.recv(100))

    if not hasattr(module, base):
        pytest.skip("the standard library has no pool")
    with serving(server_of(Echo)) as upstream:
        server = getattr(module, base)(("127.0.0.1", 0), handling(handle))
        server.upstream = upstream.server_address
        with serving(server):
            assert talk(server.server_address, b"") == b"carried"
    assert order == ["spawned"]


def test_handlers_wait_in_deep_calls_and_go_on() -> None:
    """The frames of a greenlet are in blocks of several sizes: every depth crosses the end of one somewhere."""

    def handle(self: Any) -> None:
        def descend(depth: int, *more: int) -> int:
            if depth:
                return descend(depth - 1, *more) + 1
            self.request.sendall(b"down")
            return len(self.request.recv(100)) + sum(more)

        for width in range(3):
            depth = int(self.request.recv(100))
            self.request.sendall(b"%d" % descend(depth, *range(width)))

    with serving(server_of(handling(handle))) as server:
        clients = [socket.create_connection(server.server_address, LIMIT) for _ in range(60)]
        for width in range(3):
            for depth, client in enumerate(clients):
                client.sendall(b"%d" % (depth * (width + 1)))
            for client in clients:
                assert client.recv(4, socket.MSG_WAITALL) == b"down"
            for depth, client in enumerate(clients):
                client.sendall(b"x")
                assert int(client.recv(100)) == depth * (width + 1) + 1 + sum(range(width))
        for client in clients:
            client.close()


def test_a_traceback_outlives_the_frames_of_its_greenlet() -> None:
    kept: list[Exception] = []

    class Server(fastserve.GreenletTCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            error = sys.exception()
            assert isinstance(error, ValueError)
            kept.append(error)

    def handle(self: Any) -> None:
        local = self.request.recv(100)
        raise ValueError(local)

    with serving(Server(("127.0.0.1", 0), handling(handle))) as server:
        for number in range(50):
            assert talk(server.server_address, b"%d" % number) == b""
    found = []
    for error in kept:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        assert trace is not None
        found.append(trace.tb_frame.f_locals["local"])
    assert found == [b"%d" % number for number in range(50)]


def test_clients_that_come_together_need_not_wait_for_a_turn_of_the_others_each() -> None:
    rounds = [0]
    begun: list[int] = []
    busy = [True]

    def handle(self: Any) -> None:
        if self.request.recv(1) == b"b":
            while busy:
                rounds[0] += 1
                fastserve.sleep(0)
        else:
            begun.append(rounds[0])

    with contextlib.ExitStack() as clients:
        server = server_of(handling(handle))
        come: list[socket.socket] = []
        # They wait in the backlog before the loop begins.
        for word in (b"b", *(b"n",) * 10):
            come.append(clients.enter_context(socket.create_connection(server.server_address, LIMIT)))
            come[-1].sendall(word)
        with serving(server):
            wait_until(lambda: len(begun) == 10)
            busy.clear()
    if _backend.implementation == "c":
        assert max(begun) - min(begun) < 5, "10 of them, and hardly a round of the busy one between"
