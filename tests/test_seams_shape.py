"""The shape of the classes and of what they hold: what real code assigns, mixes in, replaces and hands around."""

from __future__ import annotations

import functools
import io
import os
import select
import socket
import socketserver
import ssl
import threading
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest

import fastserve
from support import serving, talk, wait_until

ADDRESS = ("127.0.0.1", 0)


def connect(server: Any) -> socket.socket:
    """Connect to a server on this machine; the kernel accepts before the server does."""
    return socket.create_connection(server.server_address, timeout=60)


def upper_handler(module: ModuleType) -> Any:
    """Return a handler that answers a line in capitals."""

    class Upper(module.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline().upper())

    return Upper


def handle_one(server: Any, sent: bytes = b"line\n") -> bytes:
    """Let the server handle one connection of ours in this thread; return what it answers."""
    with connect(server) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        server.handle_request()
        answer = b""
        while data := client.recv(65536):
            answer += data
        return answer


# Plain classes


def test_class_attributes_assigned_at_run_time_take_effect(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.TCPServer, "allow_reuse_address", True)
    with module.ThreadingTCPServer(ADDRESS, upper_handler(module)) as server:
        assert server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)


def test_a_function_assigned_to_the_base_class_is_the_method_of_every_server(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: list[Any] = []

    def handle_error(self: Any, request: Any, client_address: Any) -> None:
        failed.append((type(self), client_address[0]))

    def handle(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(module.BaseServer, "handle_error", handle_error)
    with module.TCPServer(ADDRESS, handle) as server:
        assert handle_one(server, b"") == b""
    assert failed == [(module.TCPServer, "127.0.0.1")]


def test_the_bases_of_a_derived_class_may_be_edited(module: ModuleType) -> None:
    threads: list[str] = []

    class Handler(upper_handler(module)):
        def handle(self) -> None:
            threads.append(threading.current_thread().name)
            super().handle()

    class Server(module.TCPServer):
        pass

    with serving(Server(ADDRESS, Handler), 0.01) as server:
        assert talk(server.server_address, b"a\n") == b"A\n"
        Server.__bases__ = (module.ThreadingMixIn, module.TCPServer)
        assert talk(server.server_address, b"a\n") == b"A\n"
    assert threads[0] == "serving"
    assert threads[1] != "serving"


@pytest.mark.parametrize("name", ["TCPServer", "UDPServer", "ThreadingTCPServer", "StreamRequestHandler"])
def test_the_bases_of_a_class_of_the_module_may_be_edited(module: ModuleType, name: str) -> None:
    class Extra:
        added = 1

    cls = getattr(module, name)
    before = cls.__bases__
    try:
        cls.__bases__ = (Extra, *before)
        assert cls.added == 1
    finally:
        cls.__bases__ = before
    assert not hasattr(cls, "added")


def test_mock_patch_object_replaces_methods_of_classes_and_instances(module: ModuleType) -> None:
    with module.TCPServer(ADDRESS, upper_handler(module)) as server:
        with mock.patch.object(module.TCPServer, "verify_request", return_value=False) as verify:
            assert handle_one(server, b"") == b""
            assert verify.call_count == 1
        with mock.patch.object(server, "finish_request") as finish:
            assert handle_one(server, b"") == b""
            assert finish.call_count == 1
        assert handle_one(server) == b"LINE\n"


def test_autospec_of_a_server_knows_its_methods(module: ModuleType) -> None:
    server = mock.create_autospec(module.TCPServer, instance=True)
    server.shutdown()
    with pytest.raises(TypeError):
        server.shutdown(1)
    with pytest.raises(AttributeError):
        server.no_such_method()


@pytest.mark.parametrize(
    ("mixin", "server_class"),
    [
        (socketserver.ThreadingMixIn, fastserve.TCPServer),
        (fastserve.ThreadingMixIn, socketserver.TCPServer),
        (fastserve.ThreadingMixIn, fastserve.TCPServer),
        (fastserve.ThreadingMixIn, socketserver.ThreadingTCPServer),
    ],
)
@pytest.mark.parametrize("handlers", [socketserver, fastserve])
def test_mixins_servers_and_handlers_of_both_families_combine(
    impl: str, mixin: Any, server_class: Any, handlers: ModuleType
) -> None:
    class Server(mixin, server_class):
        pass

    with serving(Server(ADDRESS, upper_handler(handlers)), 0.01) as server:
        assert talk(server.server_address, b"mixed\n") == b"MIXED\n"
        assert isinstance(server, socketserver.ThreadingMixIn)


def test_attributes_may_be_set_before_init(module: ModuleType) -> None:
    class Server(module.ThreadingMixIn, module.TCPServer):
        def __init__(self, limit: int) -> None:
            self.limit = limit
            self.request_queue_size = 17
            self.allow_reuse_address = True
            self.daemon_threads = True
            self.timeout = 5
            super().__init__(ADDRESS, upper_handler(module))

    with serving(Server(3), 0.01) as server:
        assert talk(server.server_address, b"early\n") == b"EARLY\n"
        assert vars(server)["limit"] == 3
        assert server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        assert (server.request_queue_size, server.timeout) == (17, 5)


def test_a_socket_set_before_init_is_replaced_by_it(module: ModuleType) -> None:
    class Server(module.TCPServer):
        def __init__(self) -> None:
            self.socket = None
            self.RequestHandlerClass = None
            self.server_address = None
            super().__init__(ADDRESS, upper_handler(module))

    with Server() as server:
        assert handle_one(server) == b"LINE\n"


def test_servers_are_built_with_type(module: ModuleType) -> None:
    cls = type(
        "Built", (module.ThreadingMixIn, module.TCPServer), {"daemon_threads": True, "allow_reuse_address": True}
    )
    with serving(cls(ADDRESS, upper_handler(module)), 0.01) as server:
        assert talk(server.server_address, b"built\n") == b"BUILT\n"
    assert cls.__name__ == "Built"


def test_a_threading_server_is_an_instance_of_the_stdlibs_mixin(module: ModuleType) -> None:
    with module.ThreadingTCPServer(ADDRESS, None) as threading_server, module.TCPServer(ADDRESS, None) as plain_server:
        assert isinstance(threading_server, socketserver.ThreadingMixIn)
        assert issubclass(module.ThreadingTCPServer, socketserver.ThreadingMixIn)
        assert not isinstance(plain_server, socketserver.ThreadingMixIn)
        assert isinstance(plain_server, socketserver.BaseServer)


# The listener


def test_the_listener_may_be_replaced_after_construction(module: ModuleType) -> None:
    with module.TCPServer(ADDRESS, upper_handler(module), bind_and_activate=False) as server:
        server.socket.close()
        server.socket = socket.create_server(ADDRESS)
        server.server_address = server.socket.getsockname()
        assert handle_one(server) == b"LINE\n"
        with serving(server, 0.01):
            assert talk(server.server_address, b"again\n") == b"AGAIN\n"


def test_the_listener_may_be_wrapped_in_tls(module: ModuleType) -> None:
    def context(side: int) -> ssl.SSLContext:
        made = ssl.SSLContext(side)
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
        made.maximum_version = ssl.TLSVersion.TLSv1_2
        try:
            made.set_ciphers("AECDH-AES256-SHA:@SECLEVEL=0")  # anonymous: needs no certificate
        except ssl.SSLError:
            pytest.skip("this OpenSSL has no anonymous cipher suites")
        return made

    requests: list[Any] = []

    class Handler(upper_handler(module)):
        def handle(self) -> None:
            requests.append(self.request)
            super().handle()

    server = module.TCPServer(ADDRESS, Handler)
    server.socket = context(ssl.PROTOCOL_TLS_SERVER).wrap_socket(server.socket, server_side=True)
    with serving(server, 0.01), connect(server) as plain:
        with context(ssl.PROTOCOL_TLS_CLIENT).wrap_socket(plain) as client:
            client.sendall(b"listener\n")
            assert client.recv(100) == b"LISTENER\n"
    assert isinstance(requests[0], ssl.SSLSocket)


class Wrapper:
    """A listener that is no ``socket.socket``, with the methods that a server needs, as pyOpenSSL's is."""

    def __init__(self, wrapped: socket.socket) -> None:
        self._wrapped = wrapped
        self.accepted = 0

    def accept(self) -> Any:
        self.accepted += 1
        request, address = self._wrapped.accept()
        return Wrapper(request), ("wrapped", address[1])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


@pytest.mark.parametrize("base", ["TCPServer", "ThreadingTCPServer"])
def test_the_listener_may_be_an_object_that_is_no_socket(module: ModuleType, base: str) -> None:
    seen: list[Any] = []

    class Handler(upper_handler(module)):
        def handle(self) -> None:
            seen.append((type(self.request), self.client_address[0]))
            super().handle()

    server = getattr(module, base)(ADDRESS, Handler)
    server.socket = Wrapper(server.socket)
    with serving(server, 0.01):
        assert talk(server.server_address, b"wrapped\n") == b"WRAPPED\n"
    assert server.socket.accepted == 1
    assert seen == [(Wrapper, "wrapped")]


def test_the_accept_of_a_listener_derived_from_socket_is_used(module: ModuleType) -> None:
    class Listener(socket.socket):
        accepted = 0

        def accept(self) -> Any:
            self.accepted += 1
            return super().accept()

    with module.TCPServer(ADDRESS, upper_handler(module), bind_and_activate=False) as server:
        server.socket.close()
        server.socket = Listener(socket.AF_INET, socket.SOCK_STREAM)
        server.server_bind()
        server.server_activate()
        assert handle_one(server) == b"LINE\n"
        assert server.socket.accepted == 1


def test_the_listener_may_be_a_connection(module: ModuleType) -> None:
    """Serve the messages of one connection, each as a request, with a ``get_request`` that does not accept."""
    ours, theirs = socket.socketpair()
    messages: list[bytes] = []

    class Server(module.TCPServer):
        def get_request(self) -> Any:
            return self.socket.recv(100), "peer"

        def shutdown_request(self, request: Any) -> None:
            self._BaseServer__shutdown_request = len(messages) == 2

    def handle(request: Any, client_address: Any, server: Any) -> None:
        messages.append(request)
        if len(messages) == 1:
            theirs.sendall(b"two")

    with theirs, Server(ADDRESS, handle, bind_and_activate=False) as server:
        server.socket.close()
        server.socket = ours
        theirs.sendall(b"one")
        server.serve_forever(0.01)
    assert messages == [b"one", b"two"]


def test_bind_goes_through_the_socket_object(module: ModuleType) -> None:
    server = module.TCPServer(("192.0.2.1", 80), None, bind_and_activate=False)
    server.socket.close()
    server.socket = mock.MagicMock()
    server.socket.getsockname.return_value = ("192.0.2.1", 8080)
    server.allow_reuse_address = True
    server.server_bind()
    server.server_activate()
    server.server_close()
    assert server.socket.mock_calls == [
        mock.call.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1),
        mock.call.bind(("192.0.2.1", 80)),
        mock.call.getsockname(),
        mock.call.listen(5),
        mock.call.close(),
    ]
    assert server.server_address == ("192.0.2.1", 8080)


def test_bind_replaced_on_the_socket_class_is_used(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(self: socket.socket, address: Any) -> None:
        raise OSError(98, "mocked")

    monkeypatch.setattr(socket.socket, "bind", bind)
    with pytest.raises(OSError, match="mocked"):
        module.TCPServer(ADDRESS, None)


# RequestHandlerClass


def test_the_request_handler_class_may_be_a_bound_method(module: ModuleType) -> None:
    class Application:
        def make_handler(self, request: Any, client_address: Any, server: Any) -> None:
            request.sendall(b"bound")
            seen.append((client_address[0], server))

    seen: list[Any] = []
    with module.TCPServer(ADDRESS, Application().make_handler) as server:
        assert handle_one(server, b"") == b"bound"
    assert seen == [("127.0.0.1", server)]


def test_the_request_handler_class_may_be_a_partial(module: ModuleType) -> None:
    class Handler(module.StreamRequestHandler):
        def __init__(self, *args: Any, directory: str, **kwargs: Any) -> None:
            self.directory = directory
            super().__init__(*args, **kwargs)

        def handle(self) -> None:
            self.wfile.write(self.directory.encode())

    with module.TCPServer(ADDRESS, functools.partial(Handler, directory="/srv")) as server:
        assert handle_one(server, b"") == b"/srv"


@pytest.mark.parametrize("assigned", ["instance", "class"])
def test_the_request_handler_class_is_looked_up_at_each_request(module: ModuleType, assigned: str) -> None:
    """A handler class assigned on the server is used; a function on the class is its method, as in the stdlib."""

    def first(request: Any, *_: Any) -> None:
        request.sendall(b"first")

    def second(*arguments: Any) -> None:
        arguments[-3].sendall(b"second")
        lengths.append(len(arguments))

    lengths: list[int] = []

    class Server(module.TCPServer):
        pass

    with Server(ADDRESS, first) as server:
        assert handle_one(server, b"") == b"first"
        if assigned == "instance":
            server.RequestHandlerClass = second
        else:
            del server.RequestHandlerClass
            Server.RequestHandlerClass = second
        assert handle_one(server, b"") == b"second"
    assert lengths == [3 if assigned == "instance" else 4]


# Methods as functions


def test_methods_work_as_unbound_functions_on_a_class_of_another_name(module: ModuleType) -> None:
    class Server(module.TCPServer):
        serve = module.TCPServer.serve_forever
        stop = module.BaseServer.shutdown

    server = Server(ADDRESS, upper_handler(module))
    thread = threading.Thread(target=server.serve, args=(0.01,))
    thread.start()
    assert talk(server.server_address, b"serve\n") == b"SERVE\n"
    server.stop()
    thread.join(60)
    server.server_close()
    assert not thread.is_alive()


def test_methods_work_on_a_stand_in_that_is_no_server(module: ModuleType) -> None:
    """Run the loop over an object that merely has what the loop asks for."""
    ours, theirs = socket.socketpair()
    stand_in = SimpleNamespace(fileno=ours.fileno, _BaseServer__is_shut_down=threading.Event())
    stand_in._BaseServer__shutdown_request = False
    handled: list[bytes] = []

    def handle() -> None:
        handled.append(ours.recv(100))
        stand_in._BaseServer__shutdown_request = True

    stand_in._handle_request_noblock = handle
    stand_in.service_actions = lambda: handled.append(b"actions")
    with ours, theirs:
        theirs.sendall(b"stand-in")
        module.BaseServer.serve_forever(stand_in, 0.01)
    assert handled == [b"stand-in", b"actions"]
    assert stand_in._BaseServer__is_shut_down.is_set()


def test_hooks_work_as_functions_on_a_stand_in(module: ModuleType) -> None:
    request = mock.Mock()
    stand_in = mock.Mock(spec=["RequestHandlerClass", "shutdown_request", "finish_request", "close_request"])
    module.BaseServer.finish_request(stand_in, request, "client")
    stand_in.RequestHandlerClass.assert_called_once_with(request, "client", stand_in)
    module.TCPServer.process_request(stand_in, request, "client")
    stand_in.finish_request.assert_called_once_with(request, "client")
    stand_in.shutdown_request.assert_called_once_with(request)
    module.TCPServer.shutdown_request(stand_in, request)
    request.shutdown.assert_called_once_with(socket.SHUT_WR)
    stand_in.close_request.assert_called_once_with(request)
    module.TCPServer.close_request(stand_in, request)
    request.close.assert_called_once_with()


# The request


def run_in_handler(module: ModuleType, handle: Any, base: str = "StreamRequestHandler") -> Any:
    """Return the server of a handler whose ``handle`` is the given function."""
    return module.ThreadingTCPServer(ADDRESS, type("Handler", (getattr(module, base),), {"handle": handle}))


def test_the_request_is_a_real_socket_with_a_real_descriptor(module: ModuleType) -> None:
    def handle(self: Any) -> None:
        request = self.request
        assert isinstance(request, socket.socket)
        assert request.fileno() > 2
        assert os.fstat(request.fileno())
        assert not os.get_inheritable(request.fileno())
        assert (request.family, request.type) == (socket.AF_INET, socket.SOCK_STREAM)
        assert request.getsockname() == self.server.server_address
        assert request.getpeername() == self.client_address
        assert request is self.connection
        request.sendall(b"real")

    with serving(run_in_handler(module, handle), 0.01) as server:
        assert talk(server.server_address, b"") == b"real"


def test_a_handler_may_wrap_the_request_in_tls(module: ModuleType) -> None:
    server_context, client_context = (
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
    )
    for context in (client_context, server_context):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.set_ciphers("AECDH-AES256-SHA:@SECLEVEL=0")  # anonymous: needs no certificate
        except ssl.SSLError:
            pytest.skip("this OpenSSL has no anonymous cipher suites")

    def handle(self: Any) -> None:
        with server_context.wrap_socket(self.request, server_side=True) as encrypted:
            encrypted.sendall(encrypted.recv(100).upper())

    with serving(run_in_handler(module, handle, "BaseRequestHandler"), 0.01) as server, connect(server) as plain:
        with client_context.wrap_socket(plain) as client:
            client.sendall(b"wrapped")
            assert client.recv(100) == b"WRAPPED"


def test_select_works_on_the_request_and_on_rfile(module: ModuleType) -> None:
    def handle(self: Any) -> None:
        assert self.rfile.fileno() == self.request.fileno() == self.wfile.fileno()
        assert select.select([self.request], [], [], 60)[0] == [self.request]
        assert select.select([self.rfile], [self.wfile], [], 60) == ([self.rfile], [self.wfile], [])
        assert self.rfile.read(3) == b"abc"
        self.wfile.write(b"selected")

    with serving(run_in_handler(module, handle), 0.01) as server:
        assert talk(server.server_address, b"abc") == b"selected"


def test_a_detached_request_outlives_its_handler(module: ModuleType) -> None:
    detached: list[int] = []

    def handle(self: Any) -> None:
        if not detached:
            detached.append(self.request.detach())

    with serving(run_in_handler(module, handle, "BaseRequestHandler"), 0.01) as server, connect(server) as client:
        wait_until(lambda: detached)
        server._threads.join()
        assert talk(server.server_address, b"") == b""  # another one comes and goes meanwhile
        with socket.socket(fileno=detached[0]) as kept:
            kept.sendall(b"kept")
            assert client.recv(10) == b"kept"


def test_a_duplicate_of_the_request_is_shut_down_with_it_but_stays_open(module: ModuleType) -> None:
    duplicates: list[socket.socket] = []

    def handle(self: Any) -> None:
        duplicates.append(self.request.dup())

    with serving(run_in_handler(module, handle), 0.01) as server, connect(server) as client:
        assert client.recv(1) == b""  # shut down, although a descriptor is open
        client.sendall(b"still read")
        with duplicates[0] as duplicate:
            duplicate.settimeout(60)
            assert duplicate.recv(100) == b"still read"


def test_a_server_may_keep_the_request_past_its_handler(module: ModuleType) -> None:
    """Override ``shutdown_request`` so that the connection lives on, as pynetdicom does."""
    kept: list[socket.socket] = []

    class Server(module.TCPServer):
        def shutdown_request(self, request: Any) -> None:
            kept.append(request)

    handlers: list[Any] = []

    class Handler(module.BaseRequestHandler):
        def handle(self) -> None:
            handlers.append(self)

    with serving(Server(ADDRESS, Handler), 0.01) as server, connect(server) as one, connect(server) as two:
        wait_until(lambda: len(kept) == 2)
        assert kept[0].fileno() != kept[1].fileno()
        assert handlers[0] is not handlers[1]
        assert [handler.request for handler in handlers] == kept
        for client, request in zip((one, two), kept, strict=True):
            with request:
                request.sendall(b"later")
                assert client.recv(10) == b"later"


# shutdown before serving


def test_a_shutdown_that_runs_before_serve_forever_makes_it_return_at_once(module: ModuleType) -> None:
    with module.TCPServer(ADDRESS, upper_handler(module)) as server:
        # In the stdlib it waits for the loop that is yet to come.
        stopper = threading.Thread(target=server.shutdown)
        stopper.start()
        wait_until(lambda: server._BaseServer__shutdown_request)
        server.serve_forever(60)
        stopper.join(60)
        assert not stopper.is_alive()


# rfile, wfile


def test_wfile_writes_everything(module: ModuleType) -> None:
    size = 3_000_000  # more than the buffers of a connection hold

    def handle(self: Any) -> None:
        assert self.wfile.write(bytes(size)) == size

    with serving(run_in_handler(module, handle), 0.01) as server:
        assert len(talk(server.server_address, b"")) == size


def test_wfile_is_unbuffered_by_default(module: ModuleType) -> None:
    received = threading.Event()

    def handle(self: Any) -> None:
        self.wfile.write(b"at once")
        assert received.wait(60)

    with serving(run_in_handler(module, handle), 0.01) as server, connect(server) as client:
        assert client.recv(100) == b"at once"
        received.set()


def test_rfile_is_a_buffered_reader(module: ModuleType) -> None:
    seen: list[Any] = []

    def handle(self: Any) -> None:
        seen.append((type(self.rfile), self.rfile.readable(), self.rfile.writable(), self.rfile.mode))

    with serving(run_in_handler(module, handle), 0.01) as server:
        assert talk(server.server_address, b"") == b""
    assert seen == [(io.BufferedReader, True, False, "rb")]
