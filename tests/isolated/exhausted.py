"""Take all descriptors of the process from a server: ``exhausted VARIANT SCENARIO``."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from isolated import harness
from support import open_descriptors, serving, wait_until

module = harness.module_under_test()
LIMIT = 64


class Holder(module.BaseRequestHandler):  # type: ignore[misc, name-defined]
    """Hold the connection until the test releases it."""

    def handle(self) -> None:
        self.request.sendall(b"!")
        if self.request.recv(1) == b"h":
            release.wait(60)


class Server(module.ThreadingTCPServer):  # type: ignore[misc, name-defined]
    request_queue_size = 32


release = threading.Event()


@contextlib.contextmanager
def all_descriptors_taken(but: int = 0) -> Iterator[list[int]]:
    """Leave only so many descriptors to the process; the list holds the others."""
    taken = [os.dup(0)]
    try:
        while True:
            try:
                taken.append(os.dup(0))
            except OSError as error:
                assert error.errno == errno.EMFILE
                break
        for _ in range(but):
            os.close(taken.pop())
        yield taken
    finally:
        for fd in taken:
            os.close(fd)


def connect(server: Any) -> socket.socket:
    client = socket.socket()
    client.settimeout(60)
    client.connect(server.server_address)
    return client


def ask(server: Any) -> None:
    """Have one request served, so that the loop is open and waits."""
    with connect(server) as client:
        assert client.recv(1) == b"!"
        client.sendall(b"e")
        assert client.recv(1) == b""
    for thread in list(server._threads):
        thread.join()  # its descriptor is free then, and not later, when all seem to be taken


def processor_seconds(seconds: float) -> float:
    before = time.process_time()
    time.sleep(seconds)
    return time.process_time() - before


def pause_for_an_hour() -> None:
    """Return when the server pauses for so long that the end of the pause is not mistaken for what ends it early."""
    backoff: Any = importlib.import_module("fastserve._loop")
    backoff.LONGEST_PAUSE = 3600.0

    def is_long() -> bool:
        for loop in list(backoff.paused):
            loop._backoff.pause = 3600.0
            return bool((loop._resume_at or 0.0) > time.monotonic() + 1800.0)
        return False  # it tries again just now

    wait_until(is_long)


def backs_off() -> None:
    """It does not spin, reports once, and goes on as soon as one of its requests closes."""
    reported = io.StringIO()
    with (
        contextlib.redirect_stderr(reported),
        serving(Server(("127.0.0.1", 0), Holder), 30.0) as server,
        connect(server) as first,
    ):
        assert first.recv(1) == b"!"
        first.sendall(b"h")
        with all_descriptors_taken(but=1), connect(server) as second:
            used = processor_seconds(1.2)
            assert used < 0.2, f"it used {used:.3f} s of processor time"
            second.settimeout(0.01)
            try:
                answer = second.recv(1)
            except TimeoutError:
                second.settimeout(60)
            else:
                raise AssertionError(f"it was accepted although there was no descriptor: {answer!r}")
            pause_for_an_hour()
            release.set()  # a request that closes ends the pause
            assert second.recv(1) == b"!"
            second.sendall(b"e")
            assert second.recv(1) == b""
    lines = reported.getvalue().splitlines()
    assert len(lines) == 1, lines
    assert "cannot accept on ('127.0.0.1', " in lines[0] and os.strerror(errno.EMFILE) in lines[0], lines


def backs_off_and_shuts_down() -> None:
    """shutdown() ends a pause."""
    with contextlib.redirect_stderr(io.StringIO()), serving(Server(("127.0.0.1", 0), Holder), 30.0) as server:
        ask(server)
        with all_descriptors_taken(but=1), connect(server):
            pause_for_an_hour()
            began = time.monotonic()
            server.shutdown()
            assert time.monotonic() - began < 10.0


def picks_up_by_itself() -> None:
    """A descriptor that becomes free elsewhere in the process is found at the end of a pause."""
    with contextlib.redirect_stderr(io.StringIO()), serving(Server(("127.0.0.1", 0), Holder), 30.0) as server:
        ask(server)
        with all_descriptors_taken(but=1) as taken, connect(server) as client:
            time.sleep(0.3)
            os.close(taken.pop())
            assert client.recv(1) == b"!"


def serve(server: Any, failures: list[BaseException]) -> None:
    try:
        server.serve_forever(30.0)
    except BaseException as failure:
        failures.append(failure)


def cannot_start() -> None:
    """serve_forever() raises EMFILE and leaks nothing where it gets no poller or no wake-up; then it works."""
    needed = 1 if os.environ.get("FASTSERVE_POLLER") in ("poll", "select") else 2
    with Server(("127.0.0.1", 0), Holder) as server:
        before = open_descriptors()
        for left in range(needed):
            failures: list[BaseException] = []

            with all_descriptors_taken(but=left):
                thread = threading.Thread(target=serve, args=(server, failures))
                thread.start()
                thread.join(60)
                assert not thread.is_alive(), f"it served with {left} descriptors"
            assert [getattr(failure, "errno", failure) for failure in failures] == [errno.EMFILE]
            assert server._BaseServer__is_shut_down.is_set()
            assert open_descriptors() == before
        with serving(server):
            ask(server)


def cannot_start_in_main_thread() -> None:
    """The same where the wake-up takes two descriptors, because it is for signals."""
    with Server(("127.0.0.1", 0), Holder) as server:
        before = open_descriptors()
        for left in range(2 if os.environ.get("FASTSERVE_POLLER") in ("poll", "select") else 3):
            with all_descriptors_taken(but=left):
                try:
                    server.serve_forever(0.02)
                except OSError as failure:
                    assert failure.errno == errno.EMFILE, failure
                else:
                    raise AssertionError("it served")
                assert server._BaseServer__is_shut_down.is_set()
            assert open_descriptors() == before


resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
before_all = open_descriptors()
globals()[harness.ARGUMENTS[0]]()
assert open_descriptors() == before_all
