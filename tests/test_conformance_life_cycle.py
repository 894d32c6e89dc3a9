"""The life of a request: which hooks are called, in which order, on which thread, and what follows if they raise."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from support import serving, talk

ADDRESS = ("127.0.0.1", 0)
SERVER_HOOKS = [
    "_handle_request_noblock",
    "get_request",
    "verify_request",
    "process_request",
    "process_request_thread",
    "finish_request",
    "handle_error",
    "shutdown_request",
    "close_request",
    "handle_timeout",
    "server_bind",
    "server_activate",
    "server_close",
]
ACCEPTED = ["_handle_request_noblock", "get_request", "verify_request"]
CLOSED = ["shutdown_request", "close_request"]


class Hooks:
    """What was called, with the name of the thread that called it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.raising: dict[str, BaseException] = {}

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def recording(self, base: Any, names: list[str]) -> Any:
        """Return a class derived from ``base`` whose methods note that they are called."""

        def method(name: str) -> Callable[..., Any]:
            def call(instance: Any, *arguments: Any) -> Any:
                self.calls.append((name, threading.current_thread().name))
                if name in self.raising and name != "finish":
                    raise self.raising[name]
                result = getattr(super(cls, instance), name)(*arguments)
                if name in self.raising:  # finish() closes the files of the handler first
                    raise self.raising[name]
                return result

            return call

        cls: Any = type("Recording", (base,), {name: method(name) for name in names if hasattr(base, name)})
        return cls

    def server(self, module: ModuleType, base: str = "TCPServer", handler: str = "StreamRequestHandler") -> Any:
        """Return a server with a handler, both recording; what its construction calls is not kept."""
        handler_class = self.recording(getattr(module, handler), ["setup", "handle", "finish"])
        server = self.recording(getattr(module, base), SERVER_HOOKS)(ADDRESS, handler_class)
        self.calls.clear()
        return server


@pytest.fixture
def hooks() -> Hooks:
    return Hooks()


@pytest.fixture
def thread_failures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect the exceptions that end threads."""
    failures: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: failures.append(arguments.exc_type))
    return failures


def connect(server: Any) -> socket.socket:
    """Connect to a server on this machine; the kernel accepts before the server does."""
    return socket.create_connection(server.server_address, timeout=60)


def test_a_server_is_bound_activated_and_closed(module: ModuleType, hooks: Hooks) -> None:
    with hooks.recording(module.TCPServer, SERVER_HOOKS)(ADDRESS, None):
        pass
    assert hooks.names() == ["server_bind", "server_activate", "server_close"]


def test_a_stream_request_passes_all_hooks_in_the_calling_thread(module: ModuleType, hooks: Hooks) -> None:
    with hooks.server(module) as server, connect(server) as client:
        server.handle_request()
        assert client.recv(1) == b""
    expected = [*ACCEPTED, "process_request", "finish_request", "setup", "handle", "finish", *CLOSED, "server_close"]
    assert hooks.calls == [(name, "MainThread") for name in expected]


def test_a_datagram_passes_the_same_hooks(module: ModuleType, hooks: Hooks) -> None:
    with hooks.server(module, "UDPServer", "DatagramRequestHandler") as server:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(60)
            client.sendto(b"x", server.server_address)
            server.handle_request()
            assert client.recv(10) == b""
    expected = [*ACCEPTED, "process_request", "finish_request", "setup", "handle", "finish", *CLOSED, "server_close"]
    assert hooks.names() == expected


def test_a_threads_request_is_accepted_by_the_loop_and_handled_in_the_thread(module: ModuleType, hooks: Hooks) -> None:
    with serving(hooks.server(module, "ThreadingTCPServer"), 0.01) as server:
        assert talk(server.server_address, b"") == b""
    by_loop = [name for name, thread in hooks.calls if thread == "serving"]
    by_worker = [name for name, thread in hooks.calls if thread not in ("serving", "MainThread")]
    assert by_loop == [*ACCEPTED, "process_request"]
    assert by_worker == ["process_request_thread", "finish_request", "setup", "handle", "finish", *CLOSED]
    # It joins the thread, which may have begun to close the request only: the client is gone by then.
    assert [name for name, thread in hooks.calls if thread == "MainThread"] == ["server_close"]


def test_a_forked_request_is_closed_by_the_parent_and_handled_by_the_child(module: ModuleType, hooks: Hooks) -> None:
    class Handler(hooks.recording(module.StreamRequestHandler, ["setup", "handle", "finish"])):
        def finish(self) -> None:
            self.wfile.write(f"{os.getpid()} {' '.join(hooks.names())}".encode())
            super().finish()

    with hooks.recording(module.ForkingTCPServer, SERVER_HOOKS)(ADDRESS, Handler) as server:
        hooks.calls.clear()
        with connect(server) as client:
            server.handle_request()
            answer = b""
            while data := client.recv(1000):
                answer += data
    child, *names = answer.decode().split()
    assert int(child) != os.getpid()
    assert names == [*ACCEPTED, "process_request", "finish_request", "setup", "handle"]
    assert hooks.names() == [*ACCEPTED, "process_request", "close_request", "server_close"]


def test_a_refused_request_is_shut_down_without_being_processed(module: ModuleType, hooks: Hooks) -> None:
    with hooks.server(module, "ThreadingTCPServer") as server, connect(server) as client:
        server.verify_request = lambda request, client_address: False
        server.handle_request()
        assert client.recv(1) == b""
    assert hooks.names() == ["_handle_request_noblock", "get_request", *CLOSED, "server_close"]


@pytest.mark.parametrize(
    ("where", "passed"),
    [
        ("setup", ["setup"]),
        ("handle", ["setup", "handle", "finish"]),
        ("finish", ["setup", "handle", "finish"]),
        ("finish_request", []),
    ],
)
@pytest.mark.parametrize("base", ["TCPServer", "ThreadingTCPServer"])
def test_an_exception_goes_to_handle_error_and_the_request_is_closed(
    module: ModuleType,
    hooks: Hooks,
    where: str,
    passed: list[str],
    base: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hooks.raising[where] = ZeroDivisionError(f"in {where}")
    with serving(hooks.server(module, base), 0.01) as server:
        assert talk(server.server_address, b"") == b""
    started = ["process_request"] if base == "TCPServer" else ["process_request", "process_request_thread"]
    expected = [*ACCEPTED, *started, "finish_request", *passed, "handle_error", *CLOSED]
    # The server may be closed while the thread of the request still runs.
    assert [name for name in hooks.names() if name != "server_close"] == expected
    assert f"ZeroDivisionError: in {where}" in capsys.readouterr().err


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("where", ["setup", "handle", "finish"])
def test_what_is_no_exception_ends_the_loop_without_handle_error(
    module: ModuleType, hooks: Hooks, where: str, error: type[BaseException]
) -> None:
    hooks.raising[where] = error()
    with hooks.server(module) as server, connect(server) as client:
        with pytest.raises(error):
            server.serve_forever(0.01)
        assert client.recv(1) == b""
        assert server._BaseServer__is_shut_down.is_set()
    assert "handle_error" not in hooks.names()
    assert hooks.names()[-3:] == [*CLOSED, "server_close"]


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_what_is_no_exception_ends_the_thread_of_the_request_only(
    module: ModuleType, hooks: Hooks, error: type[BaseException], thread_failures: list[Any]
) -> None:
    hooks.raising["handle"] = error()
    with serving(hooks.server(module, "ThreadingTCPServer"), 0.01) as server:
        assert talk(server.server_address, b"") == b""
        hooks.raising.clear()
        assert talk(server.server_address, b"") == b""
    assert "handle_error" not in hooks.names()
    assert hooks.names().count("close_request") == 2
    assert thread_failures == [error]


def test_an_exception_of_verify_request_ends_the_loop(module: ModuleType, hooks: Hooks) -> None:
    """The stdlib guards neither it nor the request, which is left to the garbage collector."""
    hooks.raising["verify_request"] = ZeroDivisionError()
    requests: list[Any] = []
    with hooks.server(module) as server, connect(server):
        get_request = server.get_request
        server.get_request = lambda: requests.append(get_request()) or requests[0]
        with pytest.raises(ZeroDivisionError):
            server.serve_forever(0.01)
    requests[0][0].close()
    assert hooks.names() == ["_handle_request_noblock", "get_request", "verify_request", "server_close"]


def test_an_exception_of_process_request_goes_to_handle_error(
    module: ModuleType, hooks: Hooks, capsys: pytest.CaptureFixture[str]
) -> None:
    hooks.raising["process_request"] = RuntimeError("can't start new thread")
    with hooks.server(module, "ThreadingTCPServer") as server, connect(server) as client:
        server.handle_request()
        assert client.recv(1) == b""
    assert hooks.names() == [*ACCEPTED, "process_request", "handle_error", *CLOSED, "server_close"]
    assert "can't start new thread" in capsys.readouterr().err


def test_handle_error_writes_the_stdlibs_lines_to_standard_error(
    module: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def handle(*_: Any) -> None:
        raise ZeroDivisionError("to be printed")

    with module.TCPServer(ADDRESS, handle) as server, connect(server) as client:
        address = client.getsockname()
        server.handle_request()
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert printed.out == ""
    assert lines[0] == "-" * 40
    assert lines[1] == f"Exception occurred during processing of request from {address}"
    assert lines[2] == "Traceback (most recent call last):"
    assert lines[-2] == "ZeroDivisionError: to be printed"
    assert lines[-1] == "-" * 40
    assert lines.count("-" * 40) == 2


def test_the_handler_of_a_request_whose_setup_raised_is_not_finished(module: ModuleType, hooks: Hooks) -> None:
    hooks.raising["setup"] = ZeroDivisionError()
    handler_class = hooks.recording(module.BaseRequestHandler, ["setup", "handle", "finish"])
    with pytest.raises(ZeroDivisionError):
        handler_class("request", "client", "server")
    assert hooks.names() == ["setup"]


def test_the_handler_gets_the_request_the_address_and_the_server(module: ModuleType) -> None:
    handler = module.BaseRequestHandler("request", "client", "server")
    assert vars(handler) == {"request": "request", "client_address": "client", "server": "server"}


def test_the_context_manager_returns_the_server_and_closes_it(module: ModuleType) -> None:
    server = module.TCPServer(ADDRESS, None)
    with server as entered:
        assert entered is server
        assert server.fileno() >= 0
    assert server.fileno() == -1
    with pytest.raises(ZeroDivisionError), module.TCPServer(ADDRESS, None) as server:
        raise ZeroDivisionError
    assert server.fileno() == -1
