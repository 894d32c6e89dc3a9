"""The upper-casing server with a stream handler: the request is read and answered like a file, line by line.

    python examples/upper_stream_server.py --port 9999

In another terminal, type lines into

    nc 127.0.0.1 9999

Ctrl-C ends the server. It serves one client after the other: threading_server.py serves them together.
"""

from __future__ import annotations

import argparse

import fastserve as socketserver


class UpperHandler(socketserver.StreamRequestHandler):
    """Answer all lines of one client: ``rfile`` reads the connection, ``wfile`` writes to it."""

    timeout = 60  # seconds: a silent client must not keep the next one waiting for ever

    def handle(self) -> None:
        try:
            # The size bounds the memory that one client may take: a line may come in several parts.
            while line := self.rfile.readline(65536):
                self.wfile.write(line.upper())
        except TimeoutError:
            print(f"gave up on {self.client_address[0]}", flush=True)


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Answer lines in capital letters, over TCP.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0, the default, lets the system choose")
    arguments = parser.parse_args()

    with socketserver.TCPServer((arguments.host, arguments.port), UpperHandler) as server:
        try:
            host, port = server.server_address[:2]
            print(f"listening on {host}:{port}", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
