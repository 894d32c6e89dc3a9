"""A chat in one thread: handlers that block, each in a greenlet, for clients that stay connected.

    python examples/greenlet_server.py --clients 200

It talks to itself: it starts the server, lets all clients say something, counts what each of them hears, and ends.
Needs the package greenlet: pip install "fastserve[greenlet]".
"""

from __future__ import annotations

import argparse
import socket
import threading
from typing import cast

import fastserve


class Chat(fastserve.GreenletTCPServer):
    """Knows who is there. It needs no lock: nobody comes between two waits of a handler."""

    request_queue_size = 128
    block_on_close = False  # who is still connected at the end is sent away

    def __init__(self, address: tuple[str, int]) -> None:
        self.members: set[Member] = set()
        self.threads: set[int] = set()  # that have run a handler
        super().__init__(address, Member)


class Member(fastserve.StreamRequestHandler):
    """Tell everybody what a client says, line by line."""

    timeout = 60.0

    def setup(self) -> None:
        super().setup()
        cast(Chat, self.server).members.add(self)
        cast(Chat, self.server).threads.add(threading.get_ident())

    def handle(self) -> None:
        self.wfile.write(b"welcome\n")
        for line in self.rfile:
            for member in list(cast(Chat, self.server).members):
                try:
                    member.wfile.write(line)
                except OSError:
                    continue  # it has gone, and its own handler will find out

    def finish(self) -> None:
        cast(Chat, self.server).members.discard(self)
        super().finish()


def main() -> None:
    """Serve some clients and end."""
    parser = argparse.ArgumentParser(description="Serve a chat in one thread.")
    parser.add_argument("--clients", type=int, default=200)
    arguments = parser.parse_args()

    with Chat(("127.0.0.1", 0)) as server:
        print(f"listening on 127.0.0.1:{server.server_address[1]}", flush=True)
        loop = threading.Thread(target=server.serve_forever, name="loop")
        loop.start()
        try:
            address = ("127.0.0.1", server.server_address[1])
            clients = [socket.create_connection(address, timeout=10) for _ in range(arguments.clients)]
            files = [client.makefile("rb") for client in clients]
            for file in files:
                assert file.readline() == b"welcome\n"
            clients[0].sendall(b"hello, everybody\n")
            heard = sum(file.readline() == b"hello, everybody\n" for file in files)
            print(f"{heard} clients heard it, served by {len(server.threads)} thread")
            for file, client in zip(files, clients, strict=True):
                file.close()
                client.close()
        except KeyboardInterrupt:
            print("stopped")
        finally:
            server.shutdown()
            loop.join()


if __name__ == "__main__":
    main()
