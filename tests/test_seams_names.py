"""The private names that real code reads, sets and overrides, and the names of the module."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import socketserver
import threading
import time
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

import fastserve
from support import serving, talk, wait_until

ADDRESS = ("127.0.0.1", 0)
FLAG = "_BaseServer__shutdown_request"
IS_SHUT_DOWN = "_BaseServer__is_shut_down"


def connect(server: Any) -> socket.socket:
    """Connect to a server on this machine; the kernel accepts before the server does."""
    return socket.create_connection(server.server_address, timeout=60)


def upper_handler(module: ModuleType) -> Any:
    """Return a handler that answers a line in capitals."""

    class Upper(module.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline().upper())

    return Upper


# _handle_request_noblock


def test_an_override_of_handle_request_noblock_is_used_by_the_loop_and_by_handle_request(module: ModuleType) -> None:
    calls: list[str] = []

    class Server(module.TCPServer):
        def _handle_request_noblock(self) -> None:
            calls.append("noblock")
            super()._handle_request_noblock()

    server = Server(ADDRESS, upper_handler(module))
    with connect(server) as client:
        client.sendall(b"a\n")
        server.handle_request()
        assert client.recv(10) == b"A\n"
    with serving(server, 0.01):
        assert talk(server.server_address, b"b\n") == b"B\n"
    assert calls == ["noblock"] * 2


def test_handle_request_noblock_may_be_replaced_by_one_that_takes_the_request_apart(module: ModuleType) -> None:
    """Do without ``verify_request`` and close the request in ``finally``, as clusterfuzz does."""

    class Server(module.ThreadingTCPServer):
        def _handle_request_noblock(self) -> None:
            try:
                request, client_address = self.get_request()
            except OSError:
                return
            self.process_request(request, client_address)

        def verify_request(self, request: Any, client_address: Any) -> bool:
            raise AssertionError("not asked for")

    with serving(Server(ADDRESS, upper_handler(module)), 0.01) as server:
        assert talk(server.server_address, b"a\n") == b"A\n"


def test_a_loop_written_by_hand_may_call_handle_request_noblock_for_many_servers(module: ModuleType) -> None:
    servers = [module.TCPServer(ADDRESS, upper_handler(module)) for _ in range(3)]
    clients = [connect(server) for server in servers]
    for client in clients:
        client.sendall(b"hand\n")
    with selectors.DefaultSelector() as selector:
        for server in servers:
            selector.register(server, selectors.EVENT_READ)
        left = 3
        while left:
            ready = selector.select(10)
            assert ready
            for key, _ in ready:
                key.fileobj._handle_request_noblock()
                left -= 1
    for client, server in zip(clients, servers, strict=True):
        with client, server:
            assert client.recv(10) == b"HAND\n"


def test_handle_request_noblock_works_on_a_server_whose_get_request_is_mocked(module: ModuleType) -> None:
    """Call it on a server without listener, as patroni's tests do."""
    handler, request = mock.Mock(), mock.Mock()
    with mock.patch.object(module.TCPServer, "__init__", return_value=None):
        server = module.TCPServer()
    server.RequestHandlerClass = handler
    with mock.patch.object(module.TCPServer, "get_request", return_value=(request, ("127.0.0.1", 55555))):
        server._handle_request_noblock()
    handler.assert_called_once_with(request, ("127.0.0.1", 55555), server)
    request.shutdown.assert_called_once_with(socket.SHUT_WR)
    request.close.assert_called_once_with()


# _BaseServer__shutdown_request


def test_the_flag_set_by_a_handler_stops_the_loop(module: ModuleType) -> None:
    class Handler(upper_handler(module)):
        def handle(self) -> None:
            super().handle()
            self.server._BaseServer__shutdown_request = True

    with module.TCPServer(ADDRESS, Handler) as server, connect(server) as client:
        client.sendall(b"a\n")
        server.serve_forever(0.01)
        assert client.recv(10) == b"A\n"
        assert server._BaseServer__shutdown_request is False
        assert server._BaseServer__is_shut_down.is_set()


def test_the_flag_set_by_a_handler_in_a_thread_stops_the_loop(module: ModuleType) -> None:
    class Handler(module.BaseRequestHandler):
        def handle(self) -> None:
            setattr(self.server, FLAG, True)

    with module.ThreadingTCPServer(ADDRESS, Handler) as server, connect(server):
        server.serve_forever(0.01)


@pytest.mark.parametrize("core_thread", ["main", "another"])
def test_the_flag_set_by_another_thread_stops_an_idle_loop(module: ModuleType, core_thread: str) -> None:
    with module.TCPServer(ADDRESS, upper_handler(module)) as server:
        stop = threading.Timer(0.05, setattr, (server, FLAG, True))
        stop.start()
        if core_thread == "main":
            server.serve_forever(0.01)
        else:
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            thread.join(60)
            assert not thread.is_alive()
        stop.join()


def test_the_flag_set_by_a_signal_handler_stops_an_idle_loop(module: ModuleType) -> None:
    def stop(*_: Any) -> None:
        server._BaseServer__shutdown_request = True

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        with module.TCPServer(ADDRESS, upper_handler(module)) as server:
            sender = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
            sender.start()
            server.serve_forever(0.01)
            sender.join()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_the_flag_set_before_serve_forever_makes_it_return_at_once(module: ModuleType) -> None:
    with module.TCPServer(ADDRESS, upper_handler(module)) as server:
        server._BaseServer__shutdown_request = True
        server.serve_forever(60)
        assert server._BaseServer__shutdown_request is False
        assert server._BaseServer__is_shut_down.is_set()


def test_the_private_names_are_read_through_dict(module: ModuleType) -> None:
    with module.TCPServer(ADDRESS, upper_handler(module)) as server:
        assert server.__dict__[FLAG] is False
        assert vars(server)[IS_SHUT_DOWN] is server._BaseServer__is_shut_down
        server._BaseServer__shutdown_request = True
        assert server.__dict__[FLAG] is True


def test_the_flag_may_be_deleted_and_then_is_missing(module: ModuleType) -> None:
    with module.TCPServer(ADDRESS, upper_handler(module)) as server:
        del server._BaseServer__shutdown_request
        assert not hasattr(server, FLAG)
        assert FLAG not in server.__dict__
        with pytest.raises(AttributeError):
            del server._BaseServer__shutdown_request
    assert not hasattr(module.TCPServer, FLAG)


def test_the_private_names_set_on_the_class_serve_where_init_is_mocked_away(module: ModuleType) -> None:
    class Server(module.TCPServer):
        pass

    with mock.patch.object(module.TCPServer, "__init__", return_value=None):
        server = Server(ADDRESS, upper_handler(module))
    Server._BaseServer__is_shut_down = threading.Event()
    Server._BaseServer__shutdown_request = True
    with socket.create_server(ADDRESS) as server.socket:
        server.serve_forever(60)
    assert Server._BaseServer__is_shut_down.is_set()
    assert Server._BaseServer__shutdown_request is True


def test_the_flag_set_on_the_class_stops_a_running_loop_where_init_is_mocked_away(module: ModuleType) -> None:
    class Server(module.TCPServer):
        RequestHandlerClass = upper_handler(module)
        _BaseServer__is_shut_down = threading.Event()
        _BaseServer__shutdown_request = False

    with mock.patch.object(module.TCPServer, "__init__", return_value=None):
        server = Server()
    with socket.create_server(ADDRESS) as server.socket:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            assert talk(server.socket.getsockname(), b"mock\n") == b"MOCK\n"
            assert FLAG not in vars(server)
        finally:
            Server._BaseServer__shutdown_request = True
            thread.join(60)
        assert not thread.is_alive()


def test_the_private_names_may_be_patched_with_mock_and_are_put_back(module: ModuleType) -> None:
    class Server(module.TCPServer):
        pass

    before = dict(vars(module.BaseServer))
    with (
        mock.patch.object(module.BaseServer, "__init__", return_value=None),
        mock.patch.object(module.BaseServer, FLAG, create=True, new=True),
        mock.patch.object(module.BaseServer, IS_SHUT_DOWN, create=True),
        Server(ADDRESS, None, bind_and_activate=False) as server,
    ):
        server.socket.bind(ADDRESS)
        server.serve_forever(60)
        module.BaseServer._BaseServer__is_shut_down.set.assert_called_once_with()
    assert dict(vars(module.BaseServer)) == before


# _BaseServer__is_shut_down


def test_is_shut_down_is_an_event_that_tells_whether_the_loop_runs(module: ModuleType) -> None:
    with serving(module.TCPServer(ADDRESS, upper_handler(module)), 0.01) as server:
        event = server._BaseServer__is_shut_down
        assert isinstance(event, threading.Event)
        assert talk(server.server_address, b"a\n") == b"A\n"
        assert not event.is_set()
        assert not event.wait(0.001)
    assert event is server._BaseServer__is_shut_down
    assert event.is_set()
    assert event.wait(0)


def test_is_shut_down_may_be_waited_for_after_the_flag_was_set(module: ModuleType) -> None:
    server = module.TCPServer(ADDRESS, upper_handler(module))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    assert talk(server.server_address, b"a\n") == b"A\n"
    server._BaseServer__shutdown_request = True
    assert server._BaseServer__is_shut_down.wait(60)
    thread.join(60)
    server.server_close()


def test_is_shut_down_is_not_set_before_the_first_loop(module: ModuleType) -> None:
    with module.TCPServer(ADDRESS, upper_handler(module)) as server:
        assert not server._BaseServer__is_shut_down.is_set()


# _ServerSelector, _SocketWriter


@pytest.mark.parametrize("use", ["serve_forever", "handle_request"])
def test_a_replaced_server_selector_does_the_waiting(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, use: str
) -> None:
    calls: list[Any] = []

    class Selector(selectors.SelectSelector):
        def register(self, fileobj: Any, events: int, data: Any = None) -> Any:
            calls.append((fileobj, events))
            return super().register(fileobj, events, data)

        def select(self, timeout: float | None = None) -> Any:
            calls.append(timeout)
            return super().select(timeout)

        def close(self) -> None:
            calls.append("close")
            super().close()

    monkeypatch.setattr(module, "_ServerSelector", Selector)
    with module.TCPServer(ADDRESS, upper_handler(module)) as server, connect(server) as client:
        client.sendall(b"a\n")
        if use == "serve_forever":
            server.service_actions = lambda: setattr(server, FLAG, True)
            server.serve_forever(7)
        else:
            server.timeout = 7
            server.handle_request()
        assert client.recv(10) == b"A\n"
    assert calls == [(server, selectors.EVENT_READ), 7, "close"]


def test_a_server_with_a_replaced_selector_can_be_shut_down(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ServerSelector", selectors.SelectSelector)
    with serving(module.TCPServer(ADDRESS, upper_handler(module)), 0.01) as server:
        assert talk(server.server_address, b"a\n") == b"A\n"


def test_handle_request_with_a_replaced_selector_times_out(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ServerSelector", selectors.SelectSelector)
    with module.TCPServer(ADDRESS, upper_handler(module)) as server:
        server.handle_timeout = lambda: timeouts.append(1)
        timeouts: list[int] = []
        server.timeout = 0.01
        server.handle_request()
    assert timeouts == [1]


def test_socket_writer_may_be_derived_from(module: ModuleType) -> None:
    class Writer(module._SocketWriter):
        sent = 0

        def write(self, data: Any) -> int:
            self.sent += super().write(data)
            return self.sent

    ours, theirs = socket.socketpair()
    with ours, theirs, Writer(ours) as writer:
        assert writer.write(b"ab") == 2
        assert writer.write(memoryview(b"cde")) == 5
        assert writer.writable()
        assert not writer.readable()
        assert writer.fileno() == ours.fileno()
        assert theirs.recv(10) == b"abcde"


def test_wfile_is_a_socket_writer(module: ModuleType) -> None:
    writers: list[Any] = []

    class Handler(module.StreamRequestHandler):
        def handle(self) -> None:
            writers.append(self.wfile)

    with module.TCPServer(ADDRESS, Handler) as server, connect(server):
        server.handle_request()
    assert isinstance(writers[0], module._SocketWriter)


# _threads, active_children, max_children


def test_threads_is_empty_without_requests_and_takes_len_with_them(module: ModuleType) -> None:
    go = threading.Event()

    class Handler(module.BaseRequestHandler):
        def handle(self) -> None:
            assert go.wait(60)

    server = module.ThreadingTCPServer(ADDRESS, Handler)
    assert isinstance(server._threads, module._NoThreads)
    with serving(server, 0.01):
        with connect(server), connect(server):
            wait_until(lambda: isinstance(server._threads, list) and len(server._threads) == 2)
            assert isinstance(server._threads, module._Threads)
            assert all(isinstance(thread, threading.Thread) for thread in server._threads)
            go.set()
    assert len(server._threads) == 0
    assert not isinstance(module.ThreadingTCPServer._threads, list)


def test_active_children_holds_the_child_and_is_falsy_after_the_close(module: ModuleType) -> None:
    server = module.ForkingTCPServer(ADDRESS, upper_handler(module))
    assert server.active_children is None
    with connect(server) as client:
        client.sendall(b"fork\n")
        server.handle_request()
        assert len(server.active_children) == 1
        assert client.recv(10) == b"FORK\n"
    server.server_close()
    assert not server.active_children
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize("when", ["before", "after"])
def test_max_children_may_be_set_by_the_constructor_and_bounds_the_children(module: ModuleType, when: str) -> None:
    class Server(module.ForkingMixIn, module.TCPServer):
        def __init__(self, processes: int) -> None:
            if when == "before":
                self.max_children = processes
            super().__init__(ADDRESS, upper_handler(module))
            if when == "after":
                self.max_children = processes

    most = 0
    with Server(2) as server:
        for _ in range(5):
            with connect(server) as client:
                client.sendall(b"a\n")
                server.handle_request()
                most = max(most, len(server.active_children))
                assert client.recv(10) == b"A\n"
            server.service_actions()
    assert most <= 2


# Names of the module


@pytest.mark.parametrize("name", ["os", "selectors", "socket", "sys", "threading", "BufferedIOBase"])
def test_the_modules_that_socketserver_imports_are_reached_through_it(module: ModuleType, name: str) -> None:
    expected = {"os": os, "selectors": selectors, "socket": socket, "threading": threading}
    assert hasattr(module, name)
    if name in expected:
        assert getattr(module, name) is expected[name]


def test_the_clock_is_reached_as_time(module: ModuleType) -> None:
    assert module.time is time.monotonic


@pytest.mark.parametrize("imported_as", ["socketserver", "fastserve"])
def test_mock_replaces_the_socket_through_the_module(impl: str, imported_as: str) -> None:
    listener = mock.MagicMock()
    listener.getsockname.return_value = ("192.0.2.1", 80)
    with mock.patch(f"{imported_as}.socket.socket", return_value=listener) as made:
        server = fastserve.TCPServer(("192.0.2.1", 80), None)
    made.assert_called_once_with(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind.assert_called_once_with(("192.0.2.1", 80))
    listener.listen.assert_called_once_with(socketserver.TCPServer.request_queue_size)
    assert server.server_address == ("192.0.2.1", 80)
    server.server_close()
    listener.close.assert_called_once_with()


def test_a_socket_class_put_in_the_place_of_the_listeners_is_that_of_later_requests(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replace ``socket.socket`` while a server exists, as libraries for proxies and tests do."""

    class Counted(socket.socket):
        pass

    seen: list[type] = []
    with module.TCPServer(ADDRESS, lambda request, *_: seen.append(type(request))) as server, connect(server):
        monkeypatch.setattr(socket, "socket", Counted)
        server.handle_request()
    assert seen == [Counted]


def test_accept_replaced_on_the_socket_class_is_used(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    accepted: list[Any] = []
    accept = socket.socket.accept

    def recorded(self: socket.socket) -> Any:
        accepted.append(self)
        return accept(self)

    with module.TCPServer(ADDRESS, upper_handler(module)) as server, connect(server) as client:
        client.sendall(b"a\n")
        monkeypatch.setattr(socket.socket, "accept", recorded)
        server.handle_request()
        assert client.recv(10) == b"A\n"
    assert accepted == [server.socket]


def test_thread_replaced_in_threading_is_what_runs_requests(module: ModuleType) -> None:
    with mock.patch.object(module.threading, "Thread") as made:
        with module.ThreadingTCPServer(ADDRESS, None) as server, connect(server):
            server.handle_request()
            (arguments,) = (call.kwargs for call in made.call_args_list)
            made.return_value.start.assert_called_once_with()
            for request in arguments["args"][:1]:
                request.close()
    assert arguments["target"] == server.process_request_thread
    assert len(arguments["args"]) == 2
