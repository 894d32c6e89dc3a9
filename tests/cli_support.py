"""What the tests of the command line share: a module of handlers, and the command in a process."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import without_slow_handlers

MODULE = [sys.executable, "-m", "fastserve"]
QUICK = 20.0  # seconds; a bound for a busy machine, below the time for which a client waits
SCRIPT = [str(Path(sys.executable).with_name("fastserve"))]

NEEDS_GREENLET = pytest.mark.skipif(importlib.util.find_spec("greenlet") is None, reason="greenlet is not installed")
WORKERS = [
    pytest.param("greenlet", marks=NEEDS_GREENLET),
    "sync",
    "threads",
    "threadpool",
    pytest.param("fork", marks=pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")),
]

needs_unix = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets")

HANDLERS = """
import os, sys, fastserve

class Lines(fastserve.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            if line == b"raise\\n":
                raise RuntimeError("from the handler")
            self.wfile.write(line.upper())

class Packets(fastserve.DatagramRequestHandler):
    def handle(self):
        self.wfile.write(self.packet.upper())

class Outer:
    class Lines(Lines):
        pass

def function(request, client_address, server):
    request.sendall(b"from a function")

class Pid(fastserve.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"%d\\n" % os.getpid())
        self.request.recv(1)

class Sleeping(fastserve.BaseRequestHandler):
    def handle(self):
        import time
        self.request.sendall(b"asleep")
        time.sleep(3600)

class Computing(fastserve.BaseRequestHandler):
    def handle(self):
        import itertools, signal
        signal.alarm(60)  # if nothing else ends it
        self.request.sendall(b"%d\\n" % os.getpid())
        sum(itertools.repeat(0))  # for ever, and no instruction of Python's between which a signal handler is called

class Options(fastserve.BaseRequestHandler):
    def handle(self):
        names = "request_queue_size", "allow_reuse_address"
        self.request.sendall(repr([getattr(self.server, name) for name in names]).encode())

class Workers(fastserve.BaseRequestHandler):
    def handle(self):
        self.request.sendall(repr(self.server.max_workers).encode())

class Connections(fastserve.BaseRequestHandler):
    def handle(self):
        self.request.sendall(repr(self.server.max_connections).encode())
        self.request.recv(1)

not_callable = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the module ``handlers`` in it."""
    (tmp_path / "handlers.py").write_text(HANDLERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTSERVE_POLLER", raising=False)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # it would hide that a line is not flushed
    return tmp_path


def fastserve_script() -> list[str]:
    if not os.path.exists(SCRIPT[0]):
        pytest.skip("the script fastserve is not installed beside this Python")
    return SCRIPT


def run(command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    # A name that does not exist is looked up: without a network that is to be given up soon.
    environment = os.environ | {"RES_OPTIONS": "timeout:1 attempts:1"} | env
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def cli(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run([*MODULE, *args], **env)


@contextlib.contextmanager
def started(*args: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*MODULE, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | env
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def address_of(server: subprocess.Popen[str]) -> str:
    """Read the line that tells the address, from the pipe that is the server's standard output."""
    line = server.stdout.readline()
    models = "sync|threads|threadpool|fork|greenlet"
    found = re.fullmatch(
        rf"Serving \S+ on (\S+) \([a-z ]+, ({models})(, 1 process|, \d+ processes)?\); Ctrl-C stops\n", line
    )
    assert found, (line, server.stderr.read() if not line else "")
    return found[1]


def connect(address: str, kind: int = socket.SOCK_STREAM) -> socket.socket:
    if address.startswith("unix:"):
        client = socket.socket(socket.AF_UNIX, kind)
        target: object = address[5:]
    else:
        host, _, port = address.rpartition(":")
        client = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind)
        target = (host.strip("[]"), int(port))
    client.settimeout(60)
    try:
        client.connect(target)
    except OSError:
        client.close()
        raise
    return client


def exchange(client: socket.socket, sent: bytes = b"hello\n") -> bytes:
    client.sendall(sent)
    return client.recv(65536)


def stop(server: subprocess.Popen[str], signum: int = signal.SIGTERM) -> float:
    """Stop the server, assert that it ends cleanly, and return how many seconds it took."""
    began = time.monotonic()
    server.send_signal(signum)
    assert server.wait(60) == 0
    took = time.monotonic() - began
    assert (server.stdout.read(), without_slow_handlers(server.stderr.read())) == ("", "")
    return took


def assert_refused(failed: subprocess.CompletedProcess[str], prog: str, said: str) -> None:
    assert failed.stderr.startswith(f"{prog}: ") and said in failed.stderr
    assert failed.stderr.count("\n") == 1 and failed.stderr.endswith("\n")
    assert (failed.returncode, failed.stdout) == (2, "")
