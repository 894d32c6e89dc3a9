"""A server on a Unix domain socket, and its client: a service for this machine alone, guarded by file modes.

    python examples/unix_server.py serve /tmp/upper.sock

In another terminal:

    python examples/unix_server.py ask /tmp/upper.sock hello world

Ctrl-C ends the server, which removes its socket file.
"""

from __future__ import annotations

import argparse
import os
import socket
import stat
from pathlib import Path

import fastserve as socketserver


class UpperHandler(socketserver.StreamRequestHandler):
    """Answer all lines of one client in capital letters."""

    def handle(self) -> None:
        while line := self.rfile.readline(65536):
            self.wfile.write(line.upper())


class UpperServer(socketserver.ThreadingUnixStreamServer):
    """A Unix server that clears up its socket file, before and after."""

    daemon_threads = True  # Ctrl-C does not wait for clients that stay connected

    def server_bind(self) -> None:
        """Bind to the path, readable and writable by this user alone; take the place of a server that was killed."""
        path = Path(self.server_address)
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode) and not self._is_served(path):
            path.unlink()
        before = os.umask(0o177)
        try:
            super().server_bind()
        finally:
            os.umask(before)

    def server_close(self) -> None:
        """Close, and remove the file if it was ours: closing the socket does not."""
        is_ours = self.socket.fileno() >= 0 and self.socket.getsockname() != ""
        super().server_close()
        if is_ours:
            Path(self.server_address).unlink(missing_ok=True)

    @staticmethod
    def _is_served(path: Path) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            return probe.connect_ex(str(path)) == 0


def serve(path: str) -> None:
    """Serve on ``path`` until Ctrl-C."""
    with UpperServer(path, UpperHandler) as server:
        try:
            print(f"listening on {server.server_address}", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


def ask(path: str, words: list[str]) -> None:
    """Send the words and print what comes back."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(10)
        connection.connect(path)
        connection.sendall(" ".join(words).encode() + b"\n")
        with connection.makefile("r", encoding="utf-8", errors="replace") as answers:
            print(f"received: {answers.readline().rstrip()}")


def main() -> None:
    """Serve, or ask."""
    parser = argparse.ArgumentParser(description="Answer lines in capital letters, on a Unix domain socket.")
    commands = parser.add_subparsers(dest="command", required=True)
    server = commands.add_parser("serve", help="serve until Ctrl-C")
    server.add_argument("path")
    client = commands.add_parser("ask", help="send a line and print the answer")
    client.add_argument("path")
    client.add_argument("words", nargs="+")
    arguments = parser.parse_args()

    if arguments.command == "serve":
        serve(arguments.path)
    else:
        ask(arguments.path, arguments.words)


if __name__ == "__main__":
    main()
