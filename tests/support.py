"""What the tests share: serving in a thread, a client, waiting for a condition, counting descriptors."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
LIMIT = 60.0  # seconds for what must happen: far more than it takes on any machine, however busy


def wait_until(condition: Callable[[], Any], seconds: float = LIMIT) -> None:
    """Wait until ``condition()`` is true; fail the test if it does not come to be."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


def in_time(attempt: Callable[[], T], seconds: float) -> T:
    """Return what ``attempt()`` returns, in which a client has to be as quick as the server asks for.

    On a busy machine it may not be, and is rightly ended then. What fails is tried again, but only if it has taken
    ``seconds``: those that the server gives its clients.
    """
    deadline = time.monotonic() + LIMIT
    while True:
        begun = time.monotonic()
        try:
            return attempt()
        except (AssertionError, OSError):
            if time.monotonic() - begun < seconds or time.monotonic() > deadline:
                raise


def without_slow_handlers(errors: str) -> str:
    """Leave out what the loop of greenlets tells of handlers that hold it up: on a busy machine any handler may."""
    return re.sub(r"^.* has let no other client go on for .*\n(?:  .*\n?)*", "", errors, flags=re.MULTILINE)


def open_descriptors() -> int:
    """Return how many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"))


def _status(thread_id: int) -> tuple[str, int]:
    """Return the state of a thread, "S" if it sleeps, and its context switches."""
    text = Path(f"/proc/{thread_id}/status").read_text()
    state = next(line.split()[1] for line in text.splitlines() if line.startswith("State:"))
    return state, sum(int(line.split()[1]) for line in text.splitlines() if "ctxt_switches" in line)


def context_switches(thread_id: int) -> int:
    """Return how often a thread gave up its processor, or was made to."""
    return _status(thread_id)[1]


def settle(thread_id: int, seconds: float = 10.0) -> None:
    """Wait until a thread of any process has slept for 50 ms, or a time has passed, as it does if the thread ticks.

    On a busy machine a thread that has work may have to wait for a processor, and is not switched meanwhile: only
    the state tells that it sleeps.
    """
    deadline = time.monotonic() + seconds
    before = ("", 0)
    while ((now := _status(thread_id)) != before or now[0] != "S") and time.monotonic() < deadline:
        before = now
        time.sleep(0.05)


def settle_before_signal(process_id: int) -> None:
    """Wait until a process sleeps in a system call that a signal ends.

    One that comes just before the call does not end it: Python has looked for signals then, and looks after it.
    """
    if os.path.isdir("/proc/self/task"):
        settle(process_id, LIMIT)
    else:
        time.sleep(0.2)


@contextlib.contextmanager
def serving(server: Any, poll_interval: float = 0.5) -> Iterator[Any]:
    """Serve in a thread for the time of the block; then shut down, join the thread and close the server."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            server.serve_forever(poll_interval)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="serving")
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join(LIMIT)
        alive = thread.is_alive()
        server.server_close()
    assert not alive, "serve_forever() did not return"
    if failed:
        raise failed[0]


def noting_reports(server: Any) -> Any:
    """Have a server note in ``reports`` the clients whose handlers' errors it reports; return it."""
    server.reports = []
    handle_error = server.handle_error

    def report(request: Any, client_address: Any) -> None:
        server.reports.append(client_address)
        handle_error(request, client_address)

    server.handle_error = report
    return server


def talk(address: Any, sent: bytes, family: int = socket.AF_INET, timeout: float = LIMIT) -> bytes:
    """Connect, send, end the sending side, and return all that the server answers."""
    with socket.socket(family, socket.SOCK_STREAM) as client:
        client.settimeout(timeout)
        client.connect(address)
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        answer = b""
        while data := client.recv(65536):
            answer += data
        return answer
