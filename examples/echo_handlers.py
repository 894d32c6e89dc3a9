"""Three handlers that send back what they get, and the command line that serves and measures them.

    python examples/echo_handlers.py --port 9999

serves the first of them, with a thread for each client. Without a program of one's own:

    fastserve serve examples/echo_handlers.py:Lines --bind 127.0.0.1:9999
    fastserve serve examples/echo_handlers.py:Datagrams --bind 127.0.0.1:9999 --udp

How much fastserve saves over the standard library, for each:

    fastserve bench examples/echo_handlers.py:Echo
    fastserve bench examples/echo_handlers.py:Lines --pipeline 16
    fastserve bench examples/echo_handlers.py:Datagrams --udp
"""

from __future__ import annotations

import argparse

import fastserve as socketserver


class Echo(socketserver.BaseRequestHandler):
    """Send back all bytes of a connection as they come, until the client ends it."""

    def handle(self) -> None:
        while data := self.request.recv(65536):
            self.request.sendall(data)


class Lines(socketserver.StreamRequestHandler):
    """Send back all lines of a connection."""

    disable_nagle_algorithm = True  # one answer must not wait until the client has acknowledged the one before

    def handle(self) -> None:
        # The size bounds the memory that one client may take: a line may come in several parts.
        while line := self.rfile.readline(65536):
            self.wfile.write(line)


class Datagrams(socketserver.BaseRequestHandler):
    """Send back one datagram."""

    def handle(self) -> None:
        data, listener = self.request
        listener.sendto(data, self.client_address)


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Send back what comes, over TCP.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0, the default, lets the system choose")
    arguments = parser.parse_args()

    with socketserver.ThreadingTCPServer((arguments.host, arguments.port), Echo) as server:
        server.daemon_threads = True  # the end does not wait for clients that are idle
        server.block_on_close = False
        try:
            host, port = server.server_address[:2]
            print(f"listening on {host}:{port}", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
