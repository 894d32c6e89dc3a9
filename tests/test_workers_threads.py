"""Threading servers: what fastserve does beyond the stdlib."""

from __future__ import annotations

import os
import socket
import sys
import threading
from types import ModuleType
from typing import Any

import pytest

import fastserve
from isolated import run_isolated
from support import LIMIT, open_descriptors, serving, talk, wait_until

NAMES = [
    *("TCPServer", "UDPServer", "UnixStreamServer", "UnixDatagramServer"),
    *("ThreadingTCPServer", "ThreadingUDPServer", "ThreadingUnixStreamServer", "ThreadingUnixDatagramServer"),
]


@pytest.mark.parametrize("name", NAMES)
def test_no_descriptor_or_thread_is_left(impl: str, name: str) -> None:
    run_isolated("leaks", impl, name, "100")


@pytest.mark.parametrize("block_on_close", [True, False])
def test_a_thread_that_cannot_be_started_is_reported_and_its_request_closed(
    impl: str, monkeypatch: pytest.MonkeyPatch, block_on_close: bool
) -> None:
    reported: list[BaseException | None] = []

    class Server(fastserve.ThreadingTCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            reported.append(sys.exc_info()[1])

    class Echo(fastserve.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline())

    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if threading.current_thread().name == "serving":
            raise RuntimeError("can't start new thread")
        start(thread)

    before = open_descriptors()
    server = Server(("127.0.0.1", 0), Echo)
    server.block_on_close = block_on_close
    with serving(server, 30.0):
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            for _ in range(3):
                assert talk(server.server_address, b"") == b""
        assert [str(error) for error in reported] == ["can't start new thread"] * 3
        assert talk(server.server_address, b"hello\n") == b"hello\n"
    # serving() has called server_close(), which joins the threads with block_on_close
    wait_until(lambda: open_descriptors() == before)  # the handler's thread ends on its own without block_on_close
    if block_on_close:
        assert len(server._threads) == 0


def test_len_counts_no_thread_that_only_waits_for_its_first_turn(module: ModuleType) -> None:
    class Server(module.ThreadingMixIn, module.TCPServer):  # type: ignore[name-defined]
        pass

    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    server = Server(("127.0.0.1", 0), module.BaseRequestHandler)
    if cores is not None:
        os.sched_setaffinity(0, {min(cores)})  # one processor: nothing but a wait lets the new threads begin
    try:
        for _ in range(10):
            with socket.create_connection(server.server_address, LIMIT):
                server.handle_request()
        assert len(server._threads) < 10
    finally:
        if cores is not None:
            os.sched_setaffinity(0, cores)
        server.server_close()
