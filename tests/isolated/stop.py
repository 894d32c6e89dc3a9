"""Stop an idle server that is served by the main thread: ``stop VARIANT HOW free|owned POLL_INTERVAL``.

Prints the seconds between the cause and the end of ``serve_forever``. With ``owned`` the wake-up descriptor of
Python's signals belongs to somebody else.
"""

from __future__ import annotations

import _thread
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

from isolated import harness
from support import settle, talk

module = harness.module_under_test()
how, ownership, poll_interval = harness.ARGUMENTS
started_at = 0.0


class Echo(module.StreamRequestHandler):  # type: ignore[misc, name-defined]
    def handle(self) -> None:
        self.wfile.write(self.rfile.readline())


def set_flag(signum: int = 0, frame: FrameType | None = None) -> None:
    server._BaseServer__shutdown_request = True


def call_shutdown(signum: int, frame: FrameType | None) -> None:
    server.shutdown()


def signal_another_thread() -> None:
    end = threading.Event()
    other = threading.Thread(target=end.wait)
    other.start()
    assert other.ident is not None
    signal.pthread_kill(other.ident, signal.SIGINT)
    ended.wait(60)
    end.set()
    other.join()


def kill(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


causes: dict[str, Callable[[], None]] = {
    "interrupt_main": _thread.interrupt_main,
    "signal_to_another_thread": signal_another_thread,
    "sigint": kill(signal.SIGINT),
    "flag": set_flag,
    "flag_in_signal_handler": kill(signal.SIGUSR1),
    "shutdown": lambda: server.shutdown(),
    "shutdown_in_signal_handler": kill(signal.SIGTERM),
}


def act() -> None:
    global started_at
    assert talk(server.server_address, b"hello\n") == b"hello\n"
    settle(threading.main_thread().native_id or 0)
    started_at = time.monotonic()
    causes[how]()


ended = threading.Event()
signal.signal(signal.SIGUSR1, set_flag)
signal.signal(signal.SIGTERM, call_shutdown)
ours, theirs = socket.socketpair()
ours.setblocking(False)
owner = ours.fileno() if ownership == "owned" else -1
signal.set_wakeup_fd(owner)
interrupted = False
with ours, theirs, module.TCPServer(("127.0.0.1", 0), Echo) as server:
    actor = threading.Thread(target=act)
    actor.start()
    try:
        server.serve_forever(float(poll_interval))
    except KeyboardInterrupt:
        interrupted = True
    seconds = time.monotonic() - started_at
    ended.set()
    actor.join(60)
    assert started_at, "it ended by itself"
    assert interrupted == (how in ("interrupt_main", "signal_to_another_thread", "sigint")), interrupted
    left = signal.set_wakeup_fd(-1)
    assert left == owner, f"the wake-up descriptor is {left} afterwards, not {owner}"
print(seconds)
