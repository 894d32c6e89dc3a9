"""The classic first server: it answers a line with the same line in capital letters.

    python examples/upper_tcp_server.py --port 9999

In another terminal:

    python examples/upper_tcp_client.py --port 9999 hello world

Ctrl-C ends the server.
"""

from __future__ import annotations

import argparse

import fastserve as socketserver


class UpperHandler(socketserver.BaseRequestHandler):
    """Answer one request of one client; an instance is made for each connection."""

    def handle(self) -> None:
        # A stream has no messages: recv() gives what has arrived, which may be less than the client sent.
        data = b""
        while not data.endswith(b"\n"):
            received = self.request.recv(1024)
            if not received:
                break
            data += received
        print(f"received from {self.client_address[0]}: {data.strip().decode(errors='replace')}", flush=True)
        self.request.sendall(data.upper())


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
