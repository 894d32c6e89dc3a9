"""The shape of the classes: what real code assigns, mixes in and calls as functions."""

from __future__ import annotations

import functools
import socket
import socketserver
import threading
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest

import fastserve
from seams_support import handle_one, upper_handler
from support import serving, talk

ADDRESS = ("127.0.0.1", 0)

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
