"""The upper-casing server over UDP: a request is a datagram and the socket to answer with.

    python examples/upper_udp_server.py --port 9999

In another terminal:

    python examples/upper_udp_client.py --port 9999 hello world

Ctrl-C ends the server.
"""

from __future__ import annotations

import argparse

import fastserve as socketserver


class UpperHandler(socketserver.BaseRequestHandler):
    """Answer one datagram. There is no connection: the answer names the address that it goes to."""

    def handle(self) -> None:
        data, listener = self.request
        print(f"received from {self.client_address[0]}: {data.strip().decode(errors='replace')}", flush=True)
        listener.sendto(data.upper(), self.client_address)


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Answer datagrams in capital letters.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0, the default, lets the system choose")
    arguments = parser.parse_args()

    with socketserver.UDPServer((arguments.host, arguments.port), UpperHandler) as server:
        try:
            host, port = server.server_address[:2]
            print(f"listening on {host}:{port}", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
