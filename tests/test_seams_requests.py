"""The overridable methods of a request: called through ``self``, on the thread on which the stdlib calls them."""

from __future__ import annotations

import concurrent.futures
import socket
import ssl
import sys
import threading
from types import ModuleType
from typing import Any

import pytest

from support import serving, talk, wait_until

ADDRESS = ("127.0.0.1", 0)


def upper_handler(module: ModuleType) -> Any:
    """Return a handler that answers a line in capitals."""

    class Upper(module.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline().upper())

    return Upper


def connect(server: Any) -> socket.socket:
    """Connect to a server on this machine; the kernel accepts before the server does."""
    return socket.create_connection(server.server_address[:2], timeout=60)


def anonymous_tls(side: int) -> ssl.SSLContext:
    """Return a context that needs no certificate, which a test would have to keep a private key for."""
    context = ssl.SSLContext(side)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.set_ciphers("AECDH-AES256-SHA:@SECLEVEL=0")
    except ssl.SSLError:
        pytest.skip("this OpenSSL has no anonymous cipher suites")
    return context


def talk_tls(server: Any, sent: bytes) -> bytes:
    """Send a line over TLS and return the line that is answered."""
    with connect(server) as plain:
        with anonymous_tls(ssl.PROTOCOL_TLS_CLIENT).wrap_socket(plain) as client:
            client.sendall(sent)
            return client.recv(1000)


# get_request


def test_get_request_may_return_a_tls_connection(module: ModuleType) -> None:
    context = anonymous_tls(ssl.PROTOCOL_TLS_SERVER)

    class Server(module.ThreadingTCPServer):
        def get_request(self) -> Any:
            request, client_address = super().get_request()
            return context.wrap_socket(request, server_side=True, do_handshake_on_connect=False), client_address

    with serving(Server(ADDRESS, upper_handler(module)), 0.01) as server:
        assert talk_tls(server, b"secret\n") == b"SECRET\n"


def test_get_request_may_hold_back_connections_until_a_worker_is_free(module: ModuleType) -> None:
    free = threading.Semaphore(1)
    running: list[int] = [0]
    most: list[int] = [0]

    class Server(module.ThreadingTCPServer):
        def get_request(self) -> Any:
            assert free.acquire(timeout=60)
            return super().get_request()

        def shutdown_request(self, request: Any) -> None:
            running[0] -= 1
            super().shutdown_request(request)
            free.release()

    class Handler(upper_handler(module)):
        def handle(self) -> None:
            running[0] += 1
            most[0] = max(most[0], running[0])
            super().handle()

    with serving(Server(ADDRESS, Handler), 0.01) as server:
        clients = [connect(server) for _ in range(4)]
        for client in clients:
            client.sendall(b"x\n")
        for client in clients:
            with client:
                assert client.recv(10) == b"X\n"
    assert most == [1]


def test_get_request_may_return_the_listeners_own_socket(module: ModuleType) -> None:
    """Let the server connect instead of listen, as idlelib's RPC server does."""
    answers: list[bytes] = []

    class Server(module.TCPServer):
        def server_bind(self) -> None:
            self.socket.settimeout(60)

        def server_activate(self) -> None:
            self.socket.connect(self.server_address)

        def get_request(self) -> Any:
            return self.socket, self.server_address

    class Handler(module.BaseRequestHandler):
        def handle(self) -> None:
            answers.append(self.request.recv(100))
            self.request.sendall(b"pong")

    with socket.create_server(ADDRESS) as peer:
        with Server(peer.getsockname(), Handler) as server:
            connection, _ = peer.accept()
            with connection:
                connection.settimeout(60)
                connection.sendall(b"ping")
                server.handle_request()
                assert connection.recv(100) == b"pong"
                assert connection.recv(100) == b""
    assert answers == [b"ping"]


@pytest.mark.parametrize("error", [OSError("no reason"), ConnectionAbortedError(103, "aborted"), TimeoutError()])
def test_an_oserror_of_get_request_is_swallowed(
    module: ModuleType, error: OSError, capfd: pytest.CaptureFixture[str]
) -> None:
    refused: list[int] = []

    class Server(module.TCPServer):
        def get_request(self) -> Any:
            request, client_address = super().get_request()
            if not refused:
                refused.append(1)
                request.close()
                raise error
            return request, client_address

    with serving(Server(ADDRESS, upper_handler(module)), 0.01) as server:
        assert talk(server.server_address, b"") == b""
        assert talk(server.server_address, b"again\n") == b"AGAIN\n"
    assert refused == [1]
    assert capfd.readouterr().err == ""


def test_another_exception_of_get_request_ends_serve_forever(module: ModuleType) -> None:
    class Server(module.TCPServer):
        def get_request(self) -> Any:
            super().get_request()[0].close()
            raise ZeroDivisionError

    with Server(ADDRESS, upper_handler(module)) as server, connect(server):
        with pytest.raises(ZeroDivisionError):
            server.serve_forever(0.01)
        assert server._BaseServer__is_shut_down.is_set()


def test_get_request_on_the_instance_is_used(module: ModuleType) -> None:
    with module.TCPServer(ADDRESS, upper_handler(module)) as server, connect(server) as client:
        ours, theirs = socket.socketpair()
        with ours:
            ours.sendall(b"other\n")
            server.get_request = lambda: (theirs, "the other one")
            server.handle_request()
            assert ours.recv(100) == b"OTHER\n"
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(1)


# verify_request


@pytest.mark.parametrize("where", ["class", "instance"])
def test_verify_request_refuses_a_client_before_any_handler(module: ModuleType, where: str) -> None:
    handled: list[Any] = []

    class Server(module.ThreadingTCPServer):
        def verify_request(self, request: socket.socket, client_address: Any) -> bool:
            return self.is_allowed(request, client_address)

        def is_allowed(self, request: socket.socket, client_address: Any) -> bool:
            assert request.getpeername() == client_address
            return client_address[0] != "127.0.0.1"

    server_class = Server if where == "class" else module.ThreadingTCPServer
    server = server_class(ADDRESS, lambda *arguments: handled.append(arguments))
    if where == "instance":
        server.verify_request = lambda request, client_address: client_address[0] != "127.0.0.1"
    with serving(server, 0.01):
        assert talk(server.server_address, b"") == b""
    assert handled == []


# process_request


def test_process_request_may_hand_the_request_to_an_executor(module: ModuleType) -> None:
    threads: list[str] = []

    class Server(module.TCPServer):
        def process_request(self, request: Any, client_address: Any) -> None:
            pool.submit(self.process_request_thread, request, client_address)

        def process_request_thread(self, request: Any, client_address: Any) -> None:
            threads.append(threading.current_thread().name)
            try:
                self.finish_request(request, client_address)
            finally:
                self.shutdown_request(request)

    with concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="pool") as pool:
        with serving(Server(ADDRESS, upper_handler(module)), 0.01) as server:
            for word in (b"one\n", b"two\n", b"three\n"):
                assert talk(server.server_address, word) == word.upper()
    assert len(threads) == 3
    assert all(name.startswith("pool") for name in threads)


def test_process_request_may_be_an_unbound_alias_that_undoes_the_mixin(module: ModuleType) -> None:
    threads: list[str] = []

    class Handler(upper_handler(module)):
        def handle(self) -> None:
            threads.append(threading.current_thread().name)
            super().handle()

    class Server(module.ThreadingMixIn, module.TCPServer):
        process_request = module.TCPServer.process_request

    with serving(Server(ADDRESS, Handler), 0.01) as server:
        assert talk(server.server_address, b"alias\n") == b"ALIAS\n"
    assert threads == ["serving"]


# process_request_thread


def test_process_request_thread_may_clean_up_in_the_thread_of_the_request(module: ModuleType) -> None:
    local = threading.local()
    cleaned: list[str] = []

    class Handler(upper_handler(module)):
        def handle(self) -> None:
            local.connection = "open"
            super().handle()

    class Server(module.ThreadingTCPServer):
        def process_request_thread(self, request: Any, client_address: Any) -> None:
            try:
                super().process_request_thread(request, client_address)
            finally:
                cleaned.append(local.connection)

    with serving(Server(ADDRESS, Handler), 0.01) as server:
        assert talk(server.server_address, b"a\n") == b"A\n"
    assert cleaned == ["open"]


def test_process_request_thread_may_do_the_tls_handshake_in_the_worker(module: ModuleType) -> None:
    context = anonymous_tls(ssl.PROTOCOL_TLS_SERVER)
    threads: list[str] = []
    failed: list[int] = []

    class Server(module.ThreadingTCPServer):
        def process_request_thread(self, request: Any, client_address: Any) -> None:
            threads.append(threading.current_thread().name)
            try:
                encrypted = context.wrap_socket(request, server_side=True)
            except OSError:
                failed.append(1)
            else:
                super().process_request_thread(encrypted, client_address)

    with serving(Server(ADDRESS, upper_handler(module)), 0.01) as server:
        with connect(server):  # a client that never begins its handshake holds up nobody else
            assert talk_tls(server, b"worker\n") == b"WORKER\n"
            wait_until(lambda: len(threads) == 2)
            assert failed == []
    assert failed == [1]
    assert "serving" not in threads


def test_process_request_thread_assigned_on_the_instance_is_used(module: ModuleType) -> None:
    seen: list[Any] = []
    server = module.ThreadingTCPServer(ADDRESS, upper_handler(module))
    original = server.process_request_thread

    def process_request_thread(request: Any, client_address: Any) -> None:
        seen.append(threading.current_thread().name)
        original(request, client_address)

    server.process_request_thread = process_request_thread
    with serving(server, 0.01):
        assert talk(server.server_address, b"a\n") == b"A\n"
    assert len(seen) == 1
    assert seen != ["serving"]


# finish_request


def test_finish_request_may_return_a_replacement_for_the_request(module: ModuleType) -> None:
    closed: list[Any] = []

    class Server(module.ThreadingTCPServer):
        def process_request_thread(self, request: Any, client_address: Any) -> None:
            self.shutdown_request(self.finish_request(request, client_address))

        def finish_request(self, request: Any, client_address: Any) -> Any:
            return self.RequestHandlerClass(request, client_address, self).request

        def shutdown_request(self, request: Any) -> None:
            closed.append(request)
            super().shutdown_request(request)

    class Handler(upper_handler(module)):
        def finish(self) -> None:
            super().finish()
            self.request = socket.socket(fileno=self.request.detach())

    with serving(Server(ADDRESS, Handler), 0.01) as server:
        assert talk(server.server_address, b"a\n") == b"A\n"
    assert len(closed) == 1
    assert closed[0].fileno() == -1


def test_finish_request_may_wrap_the_request_in_tls(module: ModuleType) -> None:
    context = anonymous_tls(ssl.PROTOCOL_TLS_SERVER)

    class Server(module.ThreadingTCPServer):
        def finish_request(self, request: Any, client_address: Any) -> None:
            with context.wrap_socket(request, server_side=True) as encrypted:
                super().finish_request(encrypted, client_address)

    with serving(Server(ADDRESS, upper_handler(module)), 0.01) as server:
        assert talk_tls(server, b"finish\n") == b"FINISH\n"


# shutdown_request, close_request


def test_shutdown_request_may_unwrap_tls(module: ModuleType) -> None:
    context = anonymous_tls(ssl.PROTOCOL_TLS_SERVER)
    plain_text: list[bytes] = []

    class Server(module.TCPServer):
        def get_request(self) -> Any:
            request, client_address = super().get_request()
            return context.wrap_socket(request, server_side=True), client_address

        def shutdown_request(self, request: Any) -> None:
            plain = request.unwrap()
            plain.sendall(b"plain again")
            super().shutdown_request(plain)

    with serving(Server(ADDRESS, upper_handler(module)), 0.01) as server, connect(server) as connection:
        client = anonymous_tls(ssl.PROTOCOL_TLS_CLIENT).wrap_socket(connection)
        client.sendall(b"a\n")
        assert client.recv(100) == b"A\n"
        with client.unwrap() as plain:
            while data := plain.recv(100):
                plain_text.append(data)
    assert b"".join(plain_text) == b"plain again"


@pytest.mark.parametrize("outcome", ["handled", "raised", "refused"])
def test_shutdown_request_is_called_once_for_every_request_so_that_it_can_release_a_semaphore(
    module: ModuleType, outcome: str
) -> None:
    semaphore = threading.BoundedSemaphore(1)
    released: list[str] = []

    class Server(module.ThreadingTCPServer):
        def verify_request(self, request: Any, client_address: Any) -> bool:
            assert semaphore.acquire(timeout=60)
            return outcome != "refused"

        def shutdown_request(self, request: Any) -> None:
            super().shutdown_request(request)
            released.append(threading.current_thread().name)
            semaphore.release()  # raises if it is called once too often

        def handle_error(self, request: Any, client_address: Any) -> None:
            assert outcome == "raised"

    class Handler(upper_handler(module)):
        def handle(self) -> None:
            if outcome == "raised":
                raise ZeroDivisionError
            super().handle()

    with serving(Server(ADDRESS, Handler), 0.01) as server:
        for _ in range(3):
            # Unread data would make the end of a refused connection a reset.
            talk(server.server_address, b"a\n" if outcome == "handled" else b"")
    assert len(released) == 3
    assert ("serving" in released) == (outcome == "refused")


def test_close_request_is_called_in_the_thread_of_the_worker(module: ModuleType) -> None:
    local = threading.local()
    closed: list[Any] = []

    class Server(module.ThreadingTCPServer):
        def close_request(self, request: Any) -> None:
            closed.append(local.database)
            super().close_request(request)

    class Handler(upper_handler(module)):
        def handle(self) -> None:
            local.database = "connected"
            super().handle()

    with serving(Server(ADDRESS, Handler), 0.01) as server:
        assert talk(server.server_address, b"a\n") == b"A\n"
    assert closed == ["connected"]


# handle_error


def test_a_bare_raise_in_handle_error_comes_out_of_serve_forever(module: ModuleType) -> None:
    class Server(module.TCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            closed.append(request)
            raise

    def handle(*_: Any) -> None:
        raise ZeroDivisionError("from the handler")

    closed: list[Any] = []
    with Server(ADDRESS, handle) as server, connect(server):
        with pytest.raises(ZeroDivisionError, match="from the handler"):
            server.serve_forever(0.01)
        with connect(server), pytest.raises(ZeroDivisionError, match="from the handler"):
            server.handle_request()
        # The stdlib does not close the request then, so that the caller may.
        assert [request.fileno() >= 0 for request in closed] == [True, True]
        for request in closed:
            request.close()


@pytest.mark.parametrize("base", ["TCPServer", "ThreadingTCPServer"])
@pytest.mark.parametrize("where", ["class", "instance"])
def test_the_exception_is_current_in_handle_error(module: ModuleType, base: str, where: str) -> None:
    seen: list[Any] = []

    def handle_error(request: Any, client_address: Any) -> None:
        seen.append((sys.exc_info()[0], str(sys.exc_info()[1]), request.fileno() >= 0, client_address[0]))

    def handle(*_: Any) -> None:
        raise ZeroDivisionError("current")

    server_class = getattr(module, base)
    if where == "class":
        server_class = type("Server", (server_class,), {"handle_error": lambda self, *args: handle_error(*args)})
    server = server_class(ADDRESS, handle)
    if where == "instance":
        server.handle_error = handle_error
    with serving(server, 0.01):
        assert talk(server.server_address, b"") == b""
    assert seen == [(ZeroDivisionError, "current", True, "127.0.0.1")]
