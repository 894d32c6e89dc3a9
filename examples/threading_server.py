"""A server that runs in a thread beside the program and handles each request in a thread of its own.

    python examples/threading_server.py --clients 3

It talks to itself: it starts the server, connects its clients, all at the same time, prints the answers and ends.
"""

from __future__ import annotations

import argparse
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fastserve as socketserver


class NamingHandler(socketserver.StreamRequestHandler):
    """Answer with the name of the thread that does the work, once all clients are here."""

    server: MeetingServer

    def handle(self) -> None:
        line = self.rfile.readline(1024)
        # One thread for each request, or the handlers could not meet here.
        self.server.meeting.wait(timeout=10)
        self.wfile.write(f"{threading.current_thread().name}: ".encode() + line)


class MeetingServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A threading server; the mix-in comes first, because it overrides methods of the server."""

    request_queue_size = 128

    def __init__(self, server_address: Any, handler: Any, parties: int) -> None:
        self.meeting = threading.Barrier(parties)
        super().__init__(server_address, handler)


def client(address: tuple[str, int], message: str) -> str:
    """Send ``message`` and return the answer."""
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(message.encode() + b"\n")
        with connection.makefile("r", encoding="utf-8") as answers:
            return answers.readline().rstrip()


def main() -> None:
    """Serve some clients and end."""
    parser = argparse.ArgumentParser(description="Serve several clients at the same time, in threads.")
    parser.add_argument("--clients", type=int, default=3)
    arguments = parser.parse_args()

    with MeetingServer(("127.0.0.1", 0), NamingHandler, arguments.clients) as server:
        host, port = server.server_address[:2]
        print(f"listening on {host}:{port}", flush=True)
        # The loop has a thread of its own, which starts another one for each request.
        loop = threading.Thread(target=server.serve_forever, name="loop")
        loop.start()
        try:
            with ThreadPoolExecutor(arguments.clients) as clients:
                messages = [f"hello {number}" for number in range(1, arguments.clients + 1)]
                for answer in clients.map(lambda message: client((host, port), message), messages):
                    print(f"received: {answer}")
        except KeyboardInterrupt:
            print("stopped")
        finally:
            server.shutdown()
            loop.join()


if __name__ == "__main__":
    main()
