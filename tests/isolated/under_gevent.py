"""Serve under gevent's monkey-patching: ``under_gevent VARIANT before|after`` the import of fastserve."""

from __future__ import annotations

import socket
import sys

import gevent.monkey

if sys.argv[2] == "before":
    gevent.monkey.patch_all()


from isolated import harness  # noqa: E402

module = harness.module_under_test()

if sys.argv[2] == "after":
    gevent.monkey.patch_all()

import gevent  # noqa: E402

from fastserve import _backend  # noqa: E402
from support import talk  # noqa: E402


class Echo(module.StreamRequestHandler):  # type: ignore[misc, name-defined]
    def handle(self) -> None:
        self.wfile.write(self.rfile.readline())


turns = 0
POLL_INTERVAL = 0.5  # seconds


def turn() -> None:
    global turns
    while True:
        turns += 1
        gevent.sleep(0.001)


assert _backend.monkey_patched()
turning = gevent.spawn(turn)
for name in ("TCPServer", "ThreadingTCPServer", "ThreadPoolTCPServer"):
    with getattr(module, name)(("127.0.0.1", 0), Echo) as server, gevent.Timeout(60):
        serving = gevent.spawn(server.serve_forever, POLL_INTERVAL)
        for _ in range(5):
            assert talk(server.server_address, b"hello\n") == b"hello\n"
        before = turns
        with gevent.Timeout(20 * POLL_INTERVAL, AssertionError("serve_forever() holds the other greenlets up")):
            while turns - before < 50:
                gevent.sleep(0.001)
        server.shutdown()
        serving.get()
    with getattr(module, name)(("127.0.0.1", 0), Echo) as server, gevent.Timeout(60):
        client = gevent.spawn(talk, server.server_address, b"hello\n")
        server.handle_request()
        assert client.get() == b"hello\n"


# A handler that waits for its client does so in a greenlet too, and not in a thread of the operating system.
with module.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server, gevent.Timeout(60):
    serving = gevent.spawn(server.serve_forever, POLL_INTERVAL)
    with socket.create_connection(server.server_address) as late:
        gevent.sleep(0.05)
        late.sendall(b"late\n")
        assert late.recv(10) == b"late\n"
    server.shutdown()
    serving.get()


class Slow(module.StreamRequestHandler):  # type: ignore[misc, name-defined]
    def handle(self) -> None:
        gevent.sleep(0.05)
        self.wfile.write(self.rfile.readline())


class Limited(module.ThreadPoolTCPServer):  # type: ignore[misc, name-defined]
    request_queue_size = 32
    max_workers = 2
    max_queued = 1


with Limited(("127.0.0.1", 0), Slow) as server, gevent.Timeout(20):
    serving = gevent.spawn(server.serve_forever, 0.05)
    clients = [gevent.spawn(talk, server.server_address, b"hello\n") for _ in range(12)]
    assert [client.get() for client in clients] == [b"hello\n"] * 12
    server.shutdown()
    serving.get()
turning.kill()
