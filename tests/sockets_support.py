"""What the tests of listeners share."""

from __future__ import annotations

import importlib.util
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastserve
from children import FORK_BESIDE_THREADS
from support import LIMIT, open_descriptors, wait_until

ADDRESS = ("127.0.0.1", 0)
linux = pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
needs_greenlet = pytest.mark.skipif(importlib.util.find_spec("greenlet") is None, reason="greenlet is not installed")
WORKERS = ["", "Threading", "ThreadPool", pytest.param("Greenlet", marks=needs_greenlet)]
FORKING = pytest.param("Forking", marks=pytest.mark.filterwarnings(FORK_BESIDE_THREADS))


class Upper(fastserve.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(self.rfile.readline().upper())


class UpperDatagram(fastserve.DatagramRequestHandler):
    def handle(self) -> None:
        self.wfile.write(self.packet.upper())


def listener(address: Any = ADDRESS, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """Return a bound socket, which listens if it is one for connections."""
    made = socket.socket(family, kind)
    made.bind(address)
    if kind == socket.SOCK_STREAM:
        made.listen()
    return made


def unix_server(kind: str, path: Any = "s", **options: Any) -> Any:
    server_class = type("Server", (getattr(fastserve, f"Unix{kind}Server"),), options)
    return server_class(path, Upper if kind == "Stream" else UpperDatagram)


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory, where the path of a Unix socket is short."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_descriptor_is_left() -> Iterator[None]:
    before = open_descriptors()
    yield
    wait_until(lambda: open_descriptors() <= before, LIMIT)
