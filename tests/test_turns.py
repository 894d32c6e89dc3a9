"""The turns over connections: a program sees nothing of who does them, whatever it overrides, and whenever."""

from __future__ import annotations

import http.server
import os
import socket
import socketserver
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

import fastserve
from fastserve import _backend
from support import open_descriptors, serving, talk, wait_until

ADDRESS = ("127.0.0.1", 0)
TICK = 0.01
SERVERS = ["TCPServer", "ThreadingTCPServer", "ThreadPoolTCPServer"]
HOOKS = [
    "_handle_request_noblock", "get_request", "verify_request", "process_request", "process_request_thread",
    "finish_request", "shutdown_request", "close_request", "service_actions",
]  # fmt: skip
IN_THE_WORKER = ["process_request_thread", "finish_request", "shutdown_request", "close_request"]


@pytest.fixture(params=SERVERS)
def server_class(module: ModuleType, request: pytest.FixtureRequest) -> Any:
    """The servers that do their turns in C: one test body for all."""
    if not hasattr(module, request.param):
        pytest.skip("the stdlib has no pool")
    return getattr(module, request.param)


class Upper:
    """A handler that answers in capitals, and remembers the connection."""

    def __init__(self, request: Any, client_address: Any, server: Any) -> None:
        server.requests.append(request)
        request.sendall(request.recv(100).upper())


def new_server(server_class: Any, handler: Any = Upper, **attributes: Any) -> Any:
    """Return a server of a class of its own, which remembers the connections that it has handled."""
    server = type("Server", (server_class,), attributes)(ADDRESS, handler)
    server.requests = []
    return server


def ask(server: Any) -> None:
    """Have a request handled, until its connection is closed: no method is called for it any more."""
    count = len(server.requests)
    assert talk(server.server_address, b"line") == b"LINE"
    wait_until(lambda: len(server.requests) > count and server.requests[-1].fileno() < 0)


def overridden(method: Callable[..., Any], log: list[Any]) -> Callable[..., Any]:
    """Return what logs the name of a method, and whether the loop's thread calls it, and calls it."""

    def hook(*args: Any) -> Any:
        log.append((method.__name__, threading.current_thread().name == "serving"))
        return method(*args)

    return hook


def calls(server: Any, hook: str, count: int) -> list[Any]:
    """Return what is logged for so many requests."""
    return [(hook, not (hook in IN_THE_WORKER and isinstance(server, socketserver.ThreadingMixIn)))] * count


# Overriding


@pytest.mark.parametrize("where", ["class", "instance"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_method_that_is_overridden_is_called_for_each_connection(server_class: Any, hook: str, where: str) -> None:
    if not hasattr(server_class, hook):
        pytest.skip("only servers with threads have it")
    log: list[Any] = []
    server = new_server(server_class)
    place = type(server) if where == "class" else server
    setattr(place, hook, overridden(getattr(place, hook), log))
    with serving(server, TICK):
        for _ in range(3):
            ask(server)
    assert (set(log) if hook == "service_actions" else log) in ({(hook, True)}, calls(server, hook, 3))


@pytest.mark.parametrize("where", ["class", "base", "instance"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_method_is_called_from_when_it_is_overridden_until_it_no_longer_is(
    server_class: Any, hook: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(server_class, hook):
        pytest.skip("only servers with threads have it")
    log: list[Any] = []
    server = new_server(server_class)
    place = {"class": type(server), "base": server_class, "instance": server}[where]
    with serving(server, TICK):
        ask(server)
        ask(server)
        with monkeypatch.context() as patch:
            patch.setattr(place, hook, overridden(getattr(place, hook), log))
            ask(server)
            ask(server)
            if hook == "service_actions":
                wait_until(lambda: log)  # it is called after the client has seen the end
        logged = len(log)
        ask(server)
        ask(server)
    if hook == "service_actions":
        assert set(log) == {(hook, True)}
        assert len(log) <= logged + 1  # it may have been about to be called
    else:
        assert log == calls(server, hook, 2)


@pytest.mark.parametrize("hook", ["shutdown_request", "close_request"])
def test_a_method_that_a_handler_overrides_is_called_at_the_end_of_its_request(server_class: Any, hook: str) -> None:
    log: list[Any] = []

    def handler(request: Any, client_address: Any, server: Any) -> None:
        Upper(request, client_address, server)
        if len(server.requests) == 2:
            setattr(server, hook, overridden(getattr(server, hook), log))
        elif len(server.requests) == 4:
            delattr(server, hook)

    server = new_server(server_class, handler)
    with serving(server, TICK):
        for _ in range(5):
            ask(server)
    assert log == calls(server, hook, 2)


@pytest.mark.parametrize("where", ["class", "instance"])
def test_a_method_that_is_overridden_with_nothing_is_called_all_the_same(module: ModuleType, where: str) -> None:
    server = new_server(module.TCPServer)
    place: Any = type(server) if where == "class" else server
    place.get_request = None
    with server, socket.create_connection(server.server_address):
        with pytest.raises(TypeError, match="'NoneType' object is not callable"):
            server.serve_forever(TICK)


def test_a_stand_in_for_a_server_needs_no_dict(module: ModuleType) -> None:
    base: Any = module.TCPServer
    names = ["serve_forever", *(name for name in HOOKS if hasattr(base, name)), "fileno", "handle_error"]

    class StandIn:
        __slots__ = ("RequestHandlerClass", "_BaseServer__is_shut_down", "_BaseServer__shutdown_request", "socket")

    for name in names:
        setattr(StandIn, name, getattr(base, name))
    log: list[bytes] = []

    def handler(request: Any, client_address: Any, server: Any) -> None:
        log.append(request.recv(100))
        server._BaseServer__shutdown_request = True

    server: Any = StandIn()
    server.socket = socket.create_server(ADDRESS)
    server.RequestHandlerClass = handler
    server._BaseServer__is_shut_down = threading.Event()
    server._BaseServer__shutdown_request = False
    with server.socket, socket.create_connection(server.socket.getsockname()) as client:
        client.sendall(b"line")
        server.serve_forever(TICK)
        assert client.recv(1) == b""
    assert log == [b"line"]


def test_a_class_that_finds_its_attributes_itself_is_asked_for_each_method(server_class: Any) -> None:
    log: list[str] = []

    def look_up(self: Any, name: str) -> Any:
        log.append(name)
        return super(server_class, self).__getattribute__(name)

    server = new_server(server_class, __getattribute__=look_up)
    with serving(server, TICK):
        ask(server)
        log.clear()
        ask(server)
    expected = ["_handle_request_noblock", "get_request", "verify_request", "process_request", "finish_request"]
    assert [name for name in log if name in expected] == expected
    assert {"shutdown_request", "close_request"} <= set(log)


def test_a_request_that_is_not_verified_is_shut_down_and_closed(server_class: Any) -> None:
    log: list[str] = []

    def refuse(self: Any, request: Any, client_address: Any) -> bool:
        self.requests.append(request)
        return False

    server = new_server(server_class, verify_request=refuse, process_request=lambda *args: log.append("processed"))
    with serving(server, TICK):
        assert talk(server.server_address, b"") == b""
        wait_until(lambda: server.requests[-1].fileno() < 0)
    assert log == []


# Errors


def failing(error: BaseException) -> Callable[..., None]:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        server.requests.append(request)
        request.recv(100)
        raise error

    return handler


def test_an_error_of_a_handler_is_current_in_handle_error_and_then_the_request_is_closed(server_class: Any) -> None:
    error = LookupError("of the handler")
    log: list[Any] = []

    def handle_error(self: Any, request: Any, client_address: Any) -> None:
        log.append((sys.exc_info()[1], request is self.requests[-1], request.fileno() >= 0))

    server = new_server(server_class, failing(error), handle_error=handle_error)
    with serving(server, TICK):
        for _ in range(2):
            assert talk(server.server_address, b"x") == b""
            wait_until(lambda: server.requests[-1].fileno() < 0)
        server.RequestHandlerClass = Upper
        ask(server)
    assert log == [(error, True, True)] * 2
    assert sys.exc_info() == (None, None, None)


def test_what_handle_error_raises_ends_the_loop_of_a_server_without_threads(module: ModuleType) -> None:
    def handle_error(self: Any, request: Any, client_address: Any) -> None:
        raise

    error = LookupError("of the handler")
    server = new_server(module.TCPServer, failing(error), handle_error=handle_error)
    with server, socket.create_connection(server.server_address) as client:
        client.send(b"x")
        with pytest.raises(LookupError) as raised:
            server.serve_forever(TICK)
        assert raised.value is error
        assert server.requests[0].fileno() >= 0  # as in the stdlib: nobody has ended it
        server.requests[0].close()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_what_is_no_exception_ends_the_loop_and_its_request(module: ModuleType, error: BaseException) -> None:
    server = new_server(module.TCPServer, failing(error))
    with server, socket.create_connection(server.server_address) as client:
        client.send(b"x")
        with pytest.raises(type(error)):
            server.serve_forever(TICK)
        assert server.requests[0].fileno() < 0
        assert client.recv(1) == b""


def test_an_error_of_verify_request_ends_the_loop(server_class: Any) -> None:
    def verify(self: Any, request: Any, client_address: Any) -> bool:
        self.requests.append(request)
        raise LookupError("of verify_request")

    server = new_server(server_class, verify_request=verify)
    with server, socket.create_connection(server.server_address):
        with pytest.raises(LookupError):
            server.serve_forever(TICK)
        server.requests[0].close()


def test_an_error_of_the_thread_start_goes_to_handle_error(module: ModuleType) -> None:
    log: list[Any] = []

    def process_request(self: Any, request: Any, client_address: Any) -> None:
        self.requests.append(request)
        raise RuntimeError("can't start new thread")

    def handle_error(self: Any, request: Any, client_address: Any) -> None:
        log.append(str(sys.exc_info()[1]))

    server = new_server(module.ThreadingTCPServer, process_request=process_request, handle_error=handle_error)
    with serving(server, TICK):
        assert talk(server.server_address, b"") == b""
        wait_until(lambda: server.requests[-1].fileno() < 0)
    assert log == ["can't start new thread"]


# The end of a connection


def test_a_handler_may_end_its_connection_itself(server_class: Any) -> None:
    ends: list[Callable[[Any], Any]] = [
        lambda request: request.close(),
        lambda request: os.close(request.detach()),
        lambda request: request.shutdown(socket.SHUT_RDWR),
    ]

    def handler(request: Any, client_address: Any, server: Any) -> None:
        Upper(request, client_address, server)
        ends[len(server.requests) - 1](request)

    server = new_server(server_class, handler)
    before = open_descriptors()
    with serving(server, TICK):
        for _ in ends:
            ask(server)
    wait_until(lambda: open_descriptors() < before)  # the listener is closed too


def test_a_file_that_a_handler_leaves_open_keeps_the_descriptor(server_class: Any) -> None:
    files: list[Any] = []

    def handler(request: Any, client_address: Any, server: Any) -> None:
        request.sendall(b"here")
        files.append(request.makefile("rb"))

    server = new_server(server_class, handler)
    with serving(server, TICK), socket.create_connection(server.server_address, timeout=60) as client:
        assert client.recv(10) == b"here"
        assert client.recv(10) == b""  # the sending side was shut down
        client.sendall(b"late\n")
        assert files[0].readline() == b"late\n"
        files[0].close()


def test_a_duplicate_of_a_connection_outlives_it_but_for_the_sending_side(server_class: Any) -> None:
    duplicates: list[Any] = []

    def handler(request: Any, client_address: Any, server: Any) -> None:
        duplicates.append(request.dup())
        request.sendall(b"here")

    server = new_server(server_class, handler)
    with serving(server, TICK), socket.create_connection(server.server_address, timeout=60) as client:
        assert client.recv(10) == b"here"
        assert client.recv(10) == b""
        client.sendall(b"late")
        with duplicates[0] as duplicate:
            assert duplicate.recv(10) == b"late"
            with pytest.raises(BrokenPipeError):
                duplicate.send(b"x")


@pytest.mark.parametrize("method", ["shutdown", "close"])
def test_a_method_of_sockets_that_somebody_has_replaced_is_called(
    server_class: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(socket.socket, method)
    seen: list[Any] = []

    def replacement(self: Any, *args: Any) -> Any:
        seen.append(self)
        return original(self, *args)

    server = new_server(server_class)
    with serving(server, TICK):
        ask(server)
        with monkeypatch.context() as patch:
            patch.setattr(socket.socket, method, replacement)
            ask(server)
        ask(server)
    assert [request in seen for request in server.requests] == [False, True, False]


def test_a_request_that_is_no_socket_is_ended_by_its_own_methods(server_class: Any) -> None:
    log: list[Any] = []

    class Request:
        def shutdown(self, how: int) -> None:
            log.append(how)
            raise OSError("gone already")

        def close(self) -> None:
            log.append("close")

    def get_request(self: Any) -> Any:
        request, client_address = server_class.get_request(self)
        request.close()
        return Request(), client_address

    server = new_server(server_class, lambda *args: None, get_request=get_request)
    with serving(server, TICK), socket.create_connection(server.server_address):
        wait_until(lambda: len(log) == 2)
    assert log == [socket.SHUT_WR, "close"]


def test_an_idle_server_keeps_no_connection(server_class: Any) -> None:
    seen: list[Any] = []

    def handler(request: Any, client_address: Any, server: Any) -> None:
        request.sendall(request.recv(100).upper())
        seen.append(weakref.ref(request))

    with serving(new_server(server_class, handler), TICK) as server:
        assert talk(server.server_address, b"line") == b"LINE"
        wait_until(lambda: seen and seen[0]() is None)


# Who does it


def methods_on_the_stack(module: ModuleType, server_class: Any) -> list[str]:
    """Return the names of the server's methods that a handler sees on its stack."""
    seen: list[list[str]] = []

    def handler(request: Any, client_address: Any, server: Any) -> None:
        seen.append([frame.name for frame in traceback.extract_stack()])

    with serving(new_server(server_class, handler), TICK) as server:
        assert talk(server.server_address, b"") == b""
    return [name for name in seen[0] if name in HOOKS]


def test_a_method_that_is_not_overridden_need_not_be_on_the_stack(module: ModuleType, server_class: Any) -> None:
    found = methods_on_the_stack(module, server_class)
    if module is fastserve and _backend.implementation == "c" and not _backend.FREE_THREADED:
        assert found == []
    elif issubclass(server_class, socketserver.ThreadingMixIn):
        assert found == ["process_request_thread", "finish_request"]
    else:
        assert found == ["_handle_request_noblock", "process_request", "finish_request"]


@pytest.mark.parametrize("kind", ["socketserver.TCPServer", "socketserver.ThreadingTCPServer", "http.server"])
def test_the_methods_that_a_patch_exchanges_count_as_not_overridden(impl: str, kind: str) -> None:
    server_class = {
        "socketserver.TCPServer": socketserver.TCPServer,
        "socketserver.ThreadingTCPServer": socketserver.ThreadingTCPServer,
        "http.server": http.server.ThreadingHTTPServer,
    }[kind]
    with fastserve.patched():
        found = methods_on_the_stack(fastserve, server_class)
    assert bool(found) == (impl == "py" or _backend.FREE_THREADED)


def test_a_handler_that_raises_is_in_the_traceback(server_class: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def the_handler(request: Any, client_address: Any, server: Any) -> None:
        server.requests.append(request)
        raise LookupError("in the handler")

    server = new_server(server_class, the_handler)
    with serving(server, TICK):
        assert talk(server.server_address, b"") == b""
        wait_until(lambda: server.requests[-1].fileno() < 0)
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last):" in printed
    assert "in the_handler" in printed
    assert "LookupError: in the handler" in printed


COLLECTED = """
import gc, socket, sys
import fastserve
from fastserve import _turns

kept = []

class Handler:
    def __init__(self, request, client_address, server):
        kept.append(self)

def replace(phase, info):
    if phase == "start":
        exec("def __init__(self, *given): kept.append(self)\\nHandler.__init__ = __init__", globals())

with fastserve.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
    gc.callbacks.append(replace)
    for before in range(12):
        for threshold in 1, 2, 3:
            request = socket.socket()
            gc.collect()
            gc.set_threshold(threshold)
            padding = [[] for _ in range(before)]
            _turns.process_request_thread(server, request, "somebody")
            gc.set_threshold(0)
    gc.callbacks.clear()
print(len(kept))
"""


@pytest.mark.skipif(_backend.turns is None, reason="the turns are done in C, with the GIL")
def test_the_garbage_collector_may_replace_the_constructor_of_a_handler_that_is_being_made() -> None:
    run = subprocess.run(
        [sys.executable, "-c", COLLECTED],
        env={**os.environ, "PYTHONMALLOC": "debug"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (run.returncode, run.stdout) == (0, "36\n"), run.stderr
