"""Several servers in one process and one thread: a selector tells which of them has a request.

    python examples/several_servers.py --upper-port 9001 --reverse-port 9002 --time-port 9003

In another terminal:

    echo hello | nc 127.0.0.1 9001          # in capital letters
    echo hello | nc 127.0.0.1 9002          # backwards
    echo | nc -u -w 1 127.0.0.1 9003        # the time, over UDP

Ctrl-C ends all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import selectors
from datetime import UTC, datetime

import fastserve as socketserver


class UpperHandler(socketserver.StreamRequestHandler):
    """Answer one line in capital letters."""

    timeout = 5  # seconds: one thread serves everybody, and a silent client must not stop it

    def handle(self) -> None:
        try:
            self.wfile.write(self.rfile.readline(65536).upper())
        except TimeoutError:
            print(f"gave up on {self.client_address[0]}", flush=True)


class ReverseHandler(socketserver.StreamRequestHandler):
    """Answer one line backwards."""

    timeout = 5

    def handle(self) -> None:
        try:
            self.wfile.write(self.rfile.readline(65536).strip()[::-1] + b"\n")
        except TimeoutError:
            print(f"gave up on {self.client_address[0]}", flush=True)


class TimeHandler(socketserver.DatagramRequestHandler):
    """Answer any datagram with the time: what is written to ``wfile`` is sent when ``handle`` ends."""

    def handle(self) -> None:
        self.wfile.write(datetime.now(UTC).isoformat(timespec="seconds").encode() + b"\n")


def main() -> None:
    """Serve all of them until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Serve three services in one thread.")
    parser.add_argument("--host", default="127.0.0.1")
    for name in ("upper", "reverse", "time"):
        parser.add_argument(f"--{name}-port", type=int, default=0, metavar="PORT")
    arguments = parser.parse_args()
    host = arguments.host

    with contextlib.ExitStack() as stack:
        servers = {
            "upper": stack.enter_context(socketserver.TCPServer((host, arguments.upper_port), UpperHandler)),
            "reverse": stack.enter_context(socketserver.TCPServer((host, arguments.reverse_port), ReverseHandler)),
            "time": stack.enter_context(socketserver.UDPServer((host, arguments.time_port), TimeHandler)),
        }
        selector = stack.enter_context(selectors.DefaultSelector())
        try:
            for name, server in servers.items():
                # A client may be gone again by the time that it is accepted: do not wait for the next one then.
                server.timeout = 0
                selector.register(server, selectors.EVENT_READ)
                print(f"{name} listening on {server.server_address[0]}:{server.server_address[1]}", flush=True)
            while True:
                for key, _ in selector.select():
                    key.fileobj.handle_request()  # type: ignore[union-attr]
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
