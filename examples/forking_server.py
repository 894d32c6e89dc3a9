"""A server on a free port, in a thread of the program, that handles each request in a process of its own.

    python examples/forking_server.py

It talks to itself: two clients, one after the other, each answered by another process.

The server forks while the program has more than one thread. That is safe here, because no other thread holds a
lock that the handler needs; Python 3.12 and later warn about it where warnings are shown. A program that serves in
its main thread and starts no other has nothing to think about.
"""

from __future__ import annotations

import os
import socket
import threading

import fastserve as socketserver


class ProcessHandler(socketserver.BaseRequestHandler):
    """Answer with the process id and the message. It runs in a child: what it changes is lost with it."""

    def handle(self) -> None:
        data = self.request.recv(1024)
        self.request.sendall(f"{os.getpid()}: ".encode() + data)


def client(address: tuple[str, int], message: str) -> str:
    """Send ``message`` and return the answer, which ends where the server closes."""
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(message.encode())
        with connection.makefile("r", encoding="utf-8") as answer:
            return answer.read()


def main() -> None:
    """Serve two clients and end."""
    # Port 0: the system chooses a free one, and server_address tells which.
    with socketserver.ForkingTCPServer(("127.0.0.1", 0), ProcessHandler) as server:
        host, port = server.server_address[:2]
        print(f"process {os.getpid()} listening on {host}:{port}", flush=True)
        loop = threading.Thread(target=server.serve_forever, name="loop")
        loop.start()
        try:
            for message in ("hello", "hello again"):
                print(f"received: {client((host, port), message)}", flush=True)
        except KeyboardInterrupt:
            print("stopped")
        finally:
            server.shutdown()
            loop.join()


if __name__ == "__main__":
    main()
