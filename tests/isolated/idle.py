"""Print the context switches of an idle server's thread: ``idle VARIANT CLASS main|thread SECONDS TIMES``.

It is served with a poll_interval of 100 ms: one that ticks has many in so many seconds.
"""

from __future__ import annotations

import threading

from isolated import harness
from support import serving, talk, wait_until

module = harness.module_under_test()
class_name, where, seconds, times = harness.ARGUMENTS
POLL_INTERVAL = 0.1  # seconds


class Echo(module.StreamRequestHandler):  # type: ignore[misc, name-defined]
    serving_thread = 0

    def handle(self) -> None:
        self.wfile.write(self.rfile.readline())


class Server(getattr(module, class_name)):  # type: ignore[misc]
    serving_thread = 0

    def verify_request(self, request: object, client_address: object) -> bool:
        self.serving_thread = threading.get_native_id()
        return True


def observe() -> None:
    for _ in range(5):
        assert talk(server.server_address, b"hello\n") == b"hello\n"
    wait_until(lambda: not getattr(server, "active_children", None))
    print(harness.fewest_switches(server.serving_thread, float(seconds), int(times)))


def observe_and_stop() -> None:
    observe()
    server.shutdown()


with Server(("127.0.0.1", 0), Echo) as server:
    if where == "main":
        harness.serve_here(server, observe_and_stop, POLL_INTERVAL)
    else:
        with serving(server, POLL_INTERVAL):
            observe()
