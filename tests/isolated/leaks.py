"""Serve many requests, every tenth of which raises, and leave nothing behind: ``leaks VARIANT CLASS COUNT``."""

from __future__ import annotations

import socket
import tempfile
import threading
from pathlib import Path
from typing import Any

from isolated import harness
from support import open_descriptors, serving, talk, wait_until

module = harness.module_under_test()
class_name, count = harness.ARGUMENTS


class Handler(module.BaseRequestHandler):  # type: ignore[misc, name-defined]
    def handle(self) -> None:
        if isinstance(self.request, tuple):
            data, listener = self.request
            answer = listener.sendto
        else:
            data = self.request.recv(100)
        if data.endswith(b"0"):
            raise ArithmeticError(data)
        if isinstance(self.request, tuple):
            answer(data.upper(), self.client_address)
        else:
            self.request.sendall(data.upper())


class Server(getattr(module, class_name)):  # type: ignore[misc]
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: the errors are meant."""


def ask_datagram(number: int) -> None:
    with socket.socket(server.address_family, socket.SOCK_DGRAM) as client:
        client.settimeout(60)
        client.bind(f"{folder}/client" if unix else ("127.0.0.1", 0))
        client.sendto(b"x%d" % number, server.server_address)
        if number % 10:
            assert client.recv(100) == b"X%d" % number
    if unix:
        Path(folder, "client").unlink()


def ask_stream(number: int) -> None:
    answer = talk(server.server_address, b"x%d" % number, server.address_family)
    assert answer == (b"X%d" % number if number % 10 else b""), answer


unix = "Unix" in class_name
ask = ask_datagram if "UDP" in class_name or "Datagram" in class_name else ask_stream
poll_interval = 0.02 if harness.VARIANT == "stdlib" else 30.0
with tempfile.TemporaryDirectory() as folder:
    before = open_descriptors()
    with serving(Server(f"{folder}/server" if unix else ("127.0.0.1", 0), Handler), poll_interval) as server:
        for number in range(int(count)):
            ask(number)
        # Unlike the descriptors of a request, those of a pidfd and the child are collected while it serves.
        if "Forking" in class_name and harness.VARIANT != "stdlib":
            wait_until(lambda: not server.active_children)
            assert harness.no_child_is_left()
    assert open_descriptors() == before, (open_descriptors(), before)
assert threading.enumerate() == [threading.main_thread()]
if hasattr(server, "active_children"):
    assert not server.active_children
assert harness.no_child_is_left()
