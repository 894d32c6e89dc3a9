"""What a program sees of the making of a connection's socket, which is made without ``socket.socket.__init__`` in C."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from typing import Any

import pytest

import fastserve
from conftest import TWINS
from fastserve import _backend
from support import serving, talk

MODELS = ["TCPServer", "ThreadingTCPServer"]
if importlib.util.find_spec("greenlet") is not None:
    MODELS.append("GreenletTCPServer")
OURS = {"py": {"FASTSERVE_NO_EXTENSIONS": "1"}, "c": {}}

PROGRAM = """
import errno, json, socket, sys, threading
module = __import__(sys.argv[1])
base = getattr(module, sys.argv[2], None) or module.ThreadingTCPServer
mode = sys.argv[3]
served, events, errors = threading.Event(), [], []

class Handler(module.BaseRequestHandler):
    def handle(self):
        request = self.request
        request.recv(100)
        if mode == "fields":
            events.append([int(request.family), int(request.type), request.proto, request.gettimeout()])
            events.append([request.getsockname() == self.server.server_address, request.getpeername()[0]])
            try:
                request.getsockopt(-1, -1)
            except OSError as error:
                events.append([type(error).__name__, error.errno == errno.EINVAL])
        request.sendall(b"answer")

class Server(base):
    def handle_error(self, request, client_address):
        errors.append(type(sys.exception() if hasattr(sys, "exception") else sys.exc_info()[1]).__name__)

    def shutdown_request(self, request):
        super().shutdown_request(request)
        served.set()

if mode == "timeout":
    socket.setdefaulttimeout(7.5)
elif mode == "replaced":
    init = socket.socket.__init__
    def seen(self, *args, **kwargs):
        events.append(len(args) + len(kwargs))
        init(self, *args, **kwargs)
with Server(("127.0.0.1", 0), Handler) as server:
    serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    serving.start()
    if mode == "audit":
        sys.addaudithook(lambda name, given: name == "socket.__new__" and events.append([int(x) for x in given[1:]]))
    elif mode == "replaced":
        socket.socket.__init__ = seen
    client = socket.create_connection(server.server_address)
    client.sendall(b"question")
    assert client.recv(100) == b"answer", errors
    served.wait(60)
    client.close()
    client = socket.create_connection(server.server_address)
    client.sendall(b"question")
    assert client.recv(100) == b"answer", errors
    client.close()
    server.shutdown()
    serving.join()
print(json.dumps([events, errors]))
"""


def report(implementation: str, model: str, mode: str) -> Any:
    environment = {name: value for name, value in os.environ.items() if name != "FASTSERVE_NO_EXTENSIONS"}
    environment |= OURS.get(implementation, {})
    module = "socketserver" if implementation == "stdlib" else "fastserve"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, module, model, mode],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("mode", ["fields", "timeout", "audit"])
@pytest.mark.parametrize("model", MODELS)
def test_a_program_sees_what_it_sees_with_the_stdlib(impl: str, model: str, mode: str) -> None:
    found = report(impl, model, mode)
    assert found == report("stdlib", model, mode)
    assert found[1] == [] and (found[0] or mode == "timeout")


@pytest.mark.parametrize("model", MODELS[:2])
def test_a_replaced_initializer_is_called(impl: str, model: str) -> None:
    events, errors = report(impl, model, "replaced")
    assert events and errors == []


@pytest.mark.skipif("c" not in TWINS, reason="the extension is not under test: FASTSERVE_NO_EXTENSIONS is set")
def test_the_initializer_of_the_connection_that_somebody_has_replaced_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Any] = []
    original = _backend.streams.Connection.__init__

    def replacement(self: Any, *arguments: Any) -> None:
        made.append(arguments)
        original(self, *arguments)

    class Handler(fastserve.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(self.request.recv(100))

    with fastserve.TCPServer(("127.0.0.1", 0), Handler) as server, serving(server):
        monkeypatch.setattr(_backend.streams.Connection, "__init__", replacement)
        assert talk(server.server_address, b"hello") == b"hello"
        monkeypatch.undo()
        assert talk(server.server_address, b"hello") == b"hello"
    assert len(made) == 1 and made[0][:2] == (socket.AF_INET, socket.SOCK_STREAM)


@pytest.mark.parametrize("model", MODELS)
def test_no_descriptor_is_lost_where_an_audit_hook_refuses_a_connection(impl: str, model: str) -> None:
    program = """
import os, socket, sys, threading
import fastserve
base = getattr(fastserve, sys.argv[1])
refusing = []
def hook(name, given):
    if refusing and name == "socket.__new__" and threading.current_thread() is not threading.main_thread():
        raise OSError("refused")
class Handler(fastserve.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"answer")
with base(("127.0.0.1", 0), Handler) as server:
    serving = threading.Thread(target=server.serve_forever, daemon=True)
    serving.start()
    def ask():
        with socket.create_connection(server.server_address) as client:
            try:
                return client.recv(100)
            except ConnectionResetError:
                return b""
    sys.addaudithook(hook)
    assert ask() == b"answer"
    before = len(os.listdir("/dev/fd"))
    refusing.append(True)
    assert [ask() for _ in range(20)] == [b""] * 20
    refusing.clear()
    assert ask() == b"answer"
    # That of the last answer may be about to be closed.
    assert len(os.listdir("/dev/fd")) <= before + 2, (before, os.listdir("/dev/fd"))
    server.shutdown()
    serving.join()
"""
    environment = {name: value for name, value in os.environ.items() if name != "FASTSERVE_NO_EXTENSIONS"}
    done = subprocess.run(
        [sys.executable, "-c", program, model],
        env=environment | OURS[impl], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
