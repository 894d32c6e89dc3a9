"""Access control: ``verify_request`` decides, before any handler runs, whether a client is served.

    python examples/access_control.py --port 9999 --allow 127.0.0.1 --allow 192.0.2.0/24

In another terminal:

    nc 127.0.0.1 9999

Ctrl-C ends the server. Start it with ``--allow 192.0.2.0/24`` alone to see it refuse.
"""

from __future__ import annotations

import argparse
from ipaddress import IPv4Network, ip_address, ip_network
from typing import Any

import fastserve as socketserver


class WelcomeHandler(socketserver.BaseRequestHandler):
    """Welcome a client that was let in."""

    def handle(self) -> None:
        self.request.sendall(f"welcome, {self.client_address[0]}\n".encode())


class GuardedServer(socketserver.ThreadingTCPServer):
    """A server for the clients of some networks only."""

    def __init__(self, server_address: Any, handler: Any, allowed: list[IPv4Network]) -> None:
        self.allowed = allowed
        super().__init__(server_address, handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Return whether the client is in an allowed network; a connection that is not is closed."""
        if any(ip_address(client_address[0]) in network for network in self.allowed):
            return True
        print(f"refused {client_address[0]}", flush=True)
        return False


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Serve the clients of some networks only.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0, the default, lets the system choose")
    parser.add_argument(
        "--allow",
        action="append",
        type=ip_network,
        required=True,
        metavar="NETWORK",
        help="an address or a network such as 192.0.2.0/24; may be given several times",
    )
    arguments = parser.parse_args()

    with GuardedServer((arguments.host, arguments.port), WelcomeHandler, arguments.allow) as server:
        try:
            host, port = server.server_address[:2]
            print(f"listening on {host}:{port}", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
