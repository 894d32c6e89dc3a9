"""Press Ctrl-C while a handler runs in the main thread: ``interrupted_handler VARIANT``."""

from __future__ import annotations

import signal
import threading

from isolated import harness
from support import open_descriptors, talk

module = harness.module_under_test()


class Interrupted(module.BaseRequestHandler):  # type: ignore[misc, name-defined]
    def handle(self) -> None:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the handler went on")


def act() -> None:
    answers.append(talk(server.server_address, b""))  # returns when the request is closed


answers: list[bytes] = []
before = open_descriptors()
with module.TCPServer(("127.0.0.1", 0), Interrupted) as server:
    actor = threading.Thread(target=act)
    actor.start()
    interrupted = False
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        interrupted = True
    actor.join(60)
    assert interrupted
    assert answers == [b""], answers
    assert server._BaseServer__is_shut_down.is_set()
    assert signal.set_wakeup_fd(-1) == -1
assert open_descriptors() == before
