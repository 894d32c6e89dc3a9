"""``patch()``, ``unpatch()`` and ``patched()``: fastserve in the place of ``socketserver``, and back."""

from __future__ import annotations

import http.server
import logging.config
import selectors
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import pytest

import fastserve
from support import serving, talk, wait_until

ADDRESS = ("127.0.0.1", 0)
CLASSES = [value for value in vars(socketserver).values() if isinstance(value, type)]


def snapshot() -> dict[str, dict[str, Any]]:
    """Return what is in the stdlib's classes and in the module."""
    found = {cls.__qualname__: dict(vars(cls)) for cls in CLASSES}
    return {**found, "module": dict(vars(socketserver))}


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    """Begin and end every test with the plain stdlib."""
    assert not fastserve.patched()
    before = snapshot()
    yield
    fastserve.unpatch()
    assert snapshot() == before


class Upper(socketserver.StreamRequestHandler):
    """A handler that was derived before any patch."""

    def handle(self) -> None:
        self.wfile.write(self.rfile.readline().upper())


class DerivedBefore(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A server class that was derived before any patch."""


def connect(server: Any) -> socket.socket:
    """Connect to a server on this machine; the kernel accepts before the server does."""
    return socket.create_connection(server.server_address, timeout=60)


def is_ours(function: Any) -> bool:
    """Return whether a function was written in fastserve."""
    return isinstance(function, FunctionType) and function.__globals__["__name__"].startswith("fastserve.")


# What is exchanged


def test_patch_exchanges_every_function_of_every_class(impl: str) -> None:
    functions = {(cls, name) for cls in CLASSES for name, value in vars(cls).items() if isinstance(value, FunctionType)}
    assert len(functions) > 40
    fastserve.patch()
    theirs = {f"{cls.__name__}.{name}" for cls, name in functions if not is_ours(vars(cls)[name])}
    # These are reached where they are made: our classes make their own.
    assert theirs <= {name for name in theirs if name.startswith(("_SocketWriter.", "_NoThreads."))}


def test_patch_keeps_the_classes_and_the_modules_names(impl: str) -> None:
    before = dict(vars(socketserver))
    fastserve.patch()
    assert dict(vars(socketserver)) == before
    assert socketserver.TCPServer.__bases__ == (socketserver.BaseServer,)


def test_unpatch_leaves_every_class_exactly_as_it_was(impl: str) -> None:
    before = snapshot()
    fastserve.patch()
    assert snapshot() != before
    fastserve.unpatch()
    assert snapshot() == before


def test_patch_and_unpatch_may_be_repeated(impl: str) -> None:
    before = snapshot()
    fastserve.unpatch()
    for _ in range(3):
        fastserve.patch()
        fastserve.patch()
        assert fastserve.patched()
        fastserve.unpatch()
        assert not fastserve.patched()
        fastserve.unpatch()
        assert snapshot() == before


def test_patched_is_a_question_and_a_context(impl: str) -> None:
    assert bool(fastserve.patched()) is False
    with fastserve.patched():
        assert bool(fastserve.patched()) is True
        assert is_ours(socketserver.TCPServer.get_request)
    assert not fastserve.patched()
    fastserve.patch()
    with fastserve.patched():
        assert fastserve.patched()
    assert fastserve.patched()  # the block leaves it as it found it


def test_nested_contexts_end_with_the_outermost(impl: str) -> None:
    with fastserve.patched():
        with fastserve.patched():
            assert fastserve.patched()
        assert fastserve.patched()
    assert not fastserve.patched()


def test_one_context_object_may_be_entered_again_while_it_is_entered(impl: str) -> None:
    context = fastserve.patched()
    with context:
        with context:
            assert fastserve.patched()
        assert fastserve.patched()
    assert not fastserve.patched()


def test_the_context_ends_with_an_exception_too(impl: str) -> None:
    with pytest.raises(ZeroDivisionError), fastserve.patched():
        raise ZeroDivisionError
    assert not fastserve.patched()


# What is reached


def test_classes_derived_before_and_after_are_reached(impl: str) -> None:
    with fastserve.patched():

        class DerivedAfter(socketserver.ThreadingMixIn, socketserver.TCPServer):
            pass

        for cls in (DerivedBefore, DerivedAfter, http.server.HTTPServer, http.server.ThreadingHTTPServer):
            assert is_ours(cls.serve_forever)
            assert is_ours(cls.get_request)
        assert is_ours(Upper.setup)
        for cls in (DerivedBefore, DerivedAfter):
            with serving(cls(ADDRESS, Upper), 0.01) as server:
                assert talk(server.server_address, b"derived\n") == b"DERIVED\n"


def test_a_class_held_by_value_is_reached(impl: str) -> None:
    held = logging.config.ThreadingTCPServer
    assert held is socketserver.ThreadingTCPServer
    with fastserve.patched():
        assert logging.config.ThreadingTCPServer is held
        assert is_ours(held.process_request)
        with serving(held(ADDRESS, Upper), 0.01) as server:
            assert talk(server.server_address, b"held\n") == b"HELD\n"


def test_a_class_of_both_families_is_reached(impl: str) -> None:
    class Both(fastserve.ThreadingMixIn, http.server.HTTPServer):
        pass

    class Other(socketserver.ThreadingMixIn, fastserve.TCPServer):
        pass

    for patch in (False, True, False):
        if patch:
            fastserve.patch()
        else:
            fastserve.unpatch()
        for cls in (Both, Other):
            with serving(cls(ADDRESS, Upper), 0.01) as server:
                assert talk(server.server_address, b"both\n") == b"BOTH\n"


def test_an_idle_patched_server_stops_at_once(impl: str) -> None:
    with fastserve.patched():
        server = DerivedBefore(ADDRESS, Upper)
        thread = threading.Thread(target=server.serve_forever, args=(3600,))
        thread.start()
        assert talk(server.server_address, b"a\n") == b"A\n"
        server.shutdown()
        thread.join(60)
        server.server_close()
        assert not thread.is_alive()


def test_a_server_made_before_the_patch_is_served_after_it(impl: str) -> None:
    server = DerivedBefore(ADDRESS, Upper)
    with fastserve.patched(), serving(server, 3600):
        assert talk(server.server_address, b"made before\n") == b"MADE BEFORE\n"


def test_a_server_made_under_the_patch_is_served_after_it(impl: str) -> None:
    with fastserve.patched():
        server = DerivedBefore(ADDRESS, Upper)
    with serving(server, 0.01):
        assert talk(server.server_address, b"made under\n") == b"MADE UNDER\n"


@pytest.mark.parametrize("family", [socketserver, fastserve])
def test_a_server_that_runs_when_the_patch_is_taken_back_still_stops(impl: str, family: ModuleType) -> None:
    fastserve.patch()
    server = family.TCPServer(ADDRESS, Upper)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    assert talk(server.server_address, b"a\n") == b"A\n"
    fastserve.unpatch()
    server.shutdown()
    thread.join(60)
    server.server_close()
    assert not thread.is_alive()


def test_the_flag_stops_a_server_that_runs_when_the_patch_is_taken_back(impl: str) -> None:
    fastserve.patch()
    server = socketserver.TCPServer(ADDRESS, Upper)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    assert talk(server.server_address, b"a\n") == b"A\n"
    fastserve.unpatch()
    server._BaseServer__shutdown_request = True  # type: ignore[attr-defined]
    thread.join(60)
    server.server_close()
    assert not thread.is_alive()


def test_shutdown_of_a_server_that_ran_before_the_patch_waits_for_its_loop(impl: str) -> None:
    may_end, ended = threading.Event(), threading.Event()

    class Slow(Upper):
        def finish(self) -> None:
            super().finish()
            in_handler.set()
            assert may_end.wait(60)

    in_handler = threading.Event()
    server = socketserver.TCPServer(ADDRESS, Slow)

    def serve() -> None:
        server.serve_forever(0.01)
        ended.set()

    thread = threading.Thread(target=serve)
    thread.start()
    with connect(server) as client:
        client.sendall(b"a\n")
        assert in_handler.wait(60)
        fastserve.patch()
        stopper = threading.Thread(target=server.shutdown)
        stopper.start()
        stopper.join(0.1)
        returned_early = not stopper.is_alive()
        may_end.set()
        stopper.join(60)
        thread.join(60)
    server.server_close()
    assert ended.is_set()
    assert not returned_early, "shutdown() returned while the loop still ran"


# What the program replaces itself


def test_a_method_that_was_replaced_before_the_patch_is_left_alone(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def handle_error(self: Any, request: Any, client_address: Any) -> None:
        calls.append(sys.exc_info()[0])

    def handle(*_: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as replaced:
        replaced.setattr(socketserver.BaseServer, "handle_error", handle_error)
        with fastserve.patched():
            assert socketserver.BaseServer.handle_error is handle_error
            with serving(socketserver.TCPServer(ADDRESS, handle), 0.01) as server:
                assert talk(server.server_address, b"") == b""
        assert socketserver.BaseServer.handle_error is handle_error
    assert calls == [ZeroDivisionError]


def test_a_method_that_is_replaced_after_the_patch_is_left_alone_by_unpatch(impl: str) -> None:
    original = socketserver.BaseServer.verify_request

    def verify_request(self: Any, request: Any, client_address: Any) -> bool:
        return False

    fastserve.patch()
    socketserver.BaseServer.verify_request = verify_request  # type: ignore[method-assign]
    try:
        fastserve.unpatch()
        assert socketserver.BaseServer.verify_request is verify_request
    finally:
        socketserver.BaseServer.verify_request = original  # type: ignore[method-assign]


def test_class_attributes_are_the_programs_own(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socketserver.TCPServer, "request_queue_size", 99)
    with fastserve.patched():
        assert socketserver.TCPServer.request_queue_size == 99
        with monkeypatch.context() as inner:
            inner.setattr(socketserver.ThreadingMixIn, "daemon_threads", True)
            assert DerivedBefore.daemon_threads


# super() in server_close


def mixtures() -> list[Any]:
    """Return the ways to mix a worker model of one family with a server of the other."""
    return [
        pytest.param(mixin, server, id=f"{mixin.__module__.partition('.')[0]}-{server.__module__.partition('.')[0]}")
        for mixin in (socketserver, fastserve)
        for mixin in (mixin.ThreadingMixIn,)
        for server in (socketserver.TCPServer, fastserve.TCPServer, http.server.HTTPServer)
    ]


@pytest.mark.parametrize("patch", [False, True], ids=["unpatched", "patched"])
@pytest.mark.parametrize(("mixin", "server_class"), mixtures())
def test_server_close_of_a_threading_mixture_closes_and_joins_once(
    impl: str, mixin: Any, server_class: Any, patch: bool
) -> None:
    calls: list[str] = []

    class Listener(server_class):
        def server_close(self) -> None:
            calls.append("close")
            super().server_close()

    class Server(mixin, Listener):
        pass

    if patch:
        fastserve.patch()
    server = Server(ADDRESS, Upper)
    server._threads = SimpleNamespace(join=lambda: calls.append("join"))
    server.server_close()
    assert calls == ["close", "join"]


@pytest.mark.skipif(not hasattr(socketserver, "ForkingMixIn"), reason="no fork here")
@pytest.mark.parametrize("patch", [False, True], ids=["unpatched", "patched"])
@pytest.mark.parametrize("mixin", [socketserver, fastserve])
@pytest.mark.parametrize("server_class", [socketserver.TCPServer, fastserve.TCPServer, http.server.HTTPServer])
def test_server_close_of_a_forking_mixture_closes_and_collects_once(
    impl: str, mixin: ModuleType, server_class: Any, patch: bool
) -> None:
    calls: list[Any] = []

    class Listener(server_class):
        def server_close(self) -> None:
            calls.append("close")
            super().server_close()

    class Server(mixin.ForkingMixIn, Listener):
        def collect_children(self, *, blocking: bool = False) -> None:
            calls.append(blocking)
            super().collect_children(blocking=blocking)

    if patch:
        fastserve.patch()
    Server(ADDRESS, Upper).server_close()
    assert calls == ["close", True]


@pytest.mark.parametrize("name", ["ThreadingTCPServer", "ForkingTCPServer"])
@pytest.mark.parametrize("patch", [False, True], ids=["unpatched", "patched"])
def test_server_close_of_a_predefined_server_closes_the_listener_once(impl: str, name: str, patch: bool) -> None:
    if patch:
        fastserve.patch()
    for module in (socketserver, fastserve):
        server = getattr(module, name)(ADDRESS, Upper)
        listener = server.socket
        closed: list[int] = []
        server.socket = SimpleNamespace(close=lambda closed=closed: closed.append(1))
        server.server_close()
        listener.close()
        assert closed == [1]


# Names replaced in the module


def test_a_selector_put_into_socketserver_takes_effect(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Selector(selectors.SelectSelector):
        def __init__(self) -> None:
            made.append(1)
            super().__init__()

    fastserve.patch()
    with monkeypatch.context() as replaced:
        replaced.setattr(socketserver, "_ServerSelector", Selector)
        with serving(DerivedBefore(ADDRESS, Upper), 0.01) as server:
            assert talk(server.server_address, b"a\n") == b"A\n"
    assert made == [1]


def test_a_writer_put_into_socketserver_takes_effect(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Writer(socketserver._SocketWriter):  # type: ignore[name-defined, misc]
        def write(self, data: bytes) -> int:
            return int(super().write(b"<" + data + b">"))

    fastserve.patch()
    with monkeypatch.context() as replaced:
        replaced.setattr(socketserver, "_SocketWriter", Writer)
        with serving(DerivedBefore(ADDRESS, Upper), 0.01) as server:
            assert talk(server.server_address, b"a\n") == b"<A\n>"


class Recorder:
    """Stand for a module: note which names are taken from it."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.names: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.names.add(name)
        return getattr(self.module, name)


@pytest.mark.parametrize(
    ("name", "used"),
    [
        ("threading", {"Event", "Thread"}),
        ("socket", {"socket", "SHUT_WR"}),
        ("os", {"fork", "waitpid"}),
        ("sys", {"stderr"}),
    ],
)
def test_a_module_put_into_socketserver_takes_effect(
    impl: str, monkeypatch: pytest.MonkeyPatch, name: str, used: set[str], capfd: pytest.CaptureFixture[str]
) -> None:
    def handle(request: socket.socket, *_: Any) -> None:
        raise ZeroDivisionError

    base: Any = socketserver.ForkingTCPServer if name == "os" else socketserver.ThreadingTCPServer
    fastserve.patch()
    recorder = Recorder(getattr(socketserver, name))
    with monkeypatch.context() as replaced:
        replaced.setattr(socketserver, name, recorder)
        with base(ADDRESS, handle) as server, connect(server) as client:
            server.handle_request()
            assert client.recv(1) == b""
    assert used <= recorder.names
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_clock_put_into_socketserver_takes_effect(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def time() -> float:
        asked.append(1)
        return float(len(asked) * 1000)

    fastserve.patch()
    with monkeypatch.context() as replaced:
        replaced.setattr(socketserver, "time", time)
        with socketserver.TCPServer(ADDRESS, Upper) as server:
            server.timeout = 0.01
            server.handle_request()
    assert asked


# Modules that are imported before and after


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("http.server", "ThreadingHTTPServer"),
        ("xmlrpc.server", "SimpleXMLRPCServer"),
        ("wsgiref.simple_server", "WSGIServer"),
        ("logging.config", "ThreadingTCPServer"),
    ],
)
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_module_of_the_stdlib_is_reached_whenever_it_is_imported(module: str, name: str, order: str) -> None:
    program = f"""
import importlib, sys
if {order!r} == "before":
    server = getattr(importlib.import_module({module!r}), {name!r})
import fastserve
assert {order!r} == "before" or {module!r} not in sys.modules
fastserve.patch()
server = getattr(importlib.import_module({module!r}), {name!r})
for method in ("serve_forever", "handle_request", "get_request", "shutdown", "_handle_request_noblock"):
    assert getattr(server, method) is getattr(fastserve.TCPServer, method), method
with server(("127.0.0.1", 0), None) as made:
    made.shutdown()
    made.serve_forever()
fastserve.unpatch()
assert server.get_request is not fastserve.TCPServer.get_request
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_patching_from_many_threads_at_once_leaves_nothing_behind(impl: str) -> None:
    before = snapshot()
    go = threading.Event()

    def turn() -> None:
        assert go.wait(60)
        for _ in range(10):
            fastserve.patch()
            fastserve.unpatch()

    threads = [threading.Thread(target=turn) for _ in range(4)]
    for thread in threads:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(60)
    wait_until(lambda: not fastserve.patched())
    assert snapshot() == before
