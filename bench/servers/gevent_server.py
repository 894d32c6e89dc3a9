"""The server of gevent: ``gevent_server.py MODE``, a ``StreamServer``; MODE is echo, lines or oneshot.

The first line printed is the port on 127.0.0.1.
"""

from __future__ import annotations

import socket
import sys
from typing import Any

from gevent.server import StreamServer

AT_ONCE = 65536
BACKLOG = 4096


def echo(client: Any, address: Any) -> None:
    """Send back what comes."""
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
    while data := client.recv(AT_ONCE):
        client.sendall(data)


def lines(client: Any, address: Any) -> None:
    """Send back line after line."""
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
    with client.makefile("rb") as file:
        while line := file.readline():
            client.sendall(line)


def oneshot(client: Any, address: Any) -> None:
    """Send back what comes first; the server closes the connection."""
    client.sendall(client.recv(AT_ONCE))


def main() -> None:
    """Serve until the process is ended."""
    server = StreamServer(
        ("127.0.0.1", 0), {"echo": echo, "lines": lines, "oneshot": oneshot}[sys.argv[1]], backlog=BACKLOG
    )
    server.start()
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
