"""Fork in a handler of a server without a worker mix-in, and let the child go back into the loop.

``both_serve VARIANT child|parent``: which of the two is stopped first, while the other one goes on serving.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading

from isolated import harness
from support import wait_until

module = harness.module_under_test()
(first,) = harness.ARGUMENTS


class Handler(module.StreamRequestHandler):  # type: ignore[misc, name-defined]
    def handle(self) -> None:
        if self.rfile.readline() == b"fork\n" and os.fork() == 0:
            return  # the parent answers
        self.wfile.write(b"%d\n" % os.getpid())


def ask(what: bytes) -> set[int]:
    with socket.create_connection(server.server_address, timeout=60) as client:
        client.sendall(what)
        with contextlib.suppress(ConnectionResetError):
            return {int(line) for line in client.makefile("rb")}
    return set()


def act() -> None:
    seen = ask(b"fork\n")

    def both_were_seen() -> bool:
        seen.update(ask(b"pid\n"))
        return len(seen) == 2

    wait_until(both_were_seen)
    (child,) = seen - {parent}
    if first == "child":
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert ask(b"pid\n") == {parent}
        server.shutdown()
    else:
        server.shutdown()
        assert ask(b"pid\n") == {child}
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


parent = os.getpid()
with module.TCPServer(("127.0.0.1", 0), Handler) as server:
    server.socket.setblocking(False)  # both are woken for a connection that only one of them gets
    signal.signal(signal.SIGTERM, lambda signum, frame: setattr(server, "_BaseServer__shutdown_request", True))
    actor = threading.Thread(target=act)
    actor.start()
    server.serve_forever(0.05 if harness.VARIANT == "stdlib" else 30.0)
    if os.getpid() != parent:
        os._exit(7)
    actor.join(60)
    assert not actor.is_alive()
    assert harness.no_child_is_left(), "act() failed"
    sys.exit(0)
