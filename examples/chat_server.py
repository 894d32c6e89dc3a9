"""A chat: many clients stay connected, and what one says goes to all of them.

    python examples/chat_server.py --port 9999

In two or more other terminals, give a nick name, then talk:

    nc 127.0.0.1 9999

``/who`` lists those present, ``/quit`` leaves. Ctrl-C ends the chat for everybody.

Nobody waits for anybody: what is said is put into a bounded outbox of each client, and a thread for each client
sends from it. A client that does not keep up is put out when its outbox is full.
"""

from __future__ import annotations

import argparse
import re
import socket
import threading
from typing import Any

import fastserve as socketserver

LINE_LIMIT = 4096  # bytes of one line
OUTBOX_LIMIT = 256 * 1024  # bytes that may wait for one client
SEND_BUFFER = 64 * 1024  # bytes that the kernel may keep for one client
GOODBYE_TIME = 5.0  # seconds that a client has to take its last lines when it leaves


class Outbox:
    """What is on its way to one client. Any thread may call its methods."""

    def __init__(self, limit: int) -> None:
        self._limit = limit  # bytes
        self._waiting = bytearray()
        self._closed = False
        self._changed = threading.Condition()

    def put(self, data: bytes) -> bool:
        """Add ``data`` and return ``True``, or ``False`` if it does not fit. Never wait."""
        with self._changed:
            if len(self._waiting) + len(data) > self._limit:
                return False
            self._waiting += data
            self._changed.notify()
            return True

    def take(self) -> bytes:
        """Wait for something, and remove and return all there is: ``b""`` when it is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            data = bytes(self._waiting)
            self._waiting.clear()
            return data

    def close(self) -> None:
        """Have ``take`` return ``b""`` once everything was taken."""
        with self._changed:
            self._closed = True
            self._changed.notify()


class Client:
    """One connected client. Any thread may call its methods."""

    def __init__(self, connection: socket.socket, outbox_limit: int) -> None:
        self.nick = ""  # until it has told
        self._connection = connection
        self._outbox = Outbox(outbox_limit)
        self._writer = threading.Thread(target=self._write, name="writer")
        self._writer.start()

    def send(self, line: str) -> None:
        """Have a line sent, and never wait for it; put the client out if it does not keep up."""
        if not self._outbox.put(line.encode() + b"\n"):
            self.disconnect()

    def disconnect(self) -> None:
        """End the connection: reading it gives its end and writing to it fails, for a thread that waits there too."""
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has ended already

    def goodbye(self) -> None:
        """Send what is left, for a while; then stop the writer."""
        self._outbox.close()
        self._writer.join(GOODBYE_TIME)
        if self._writer.is_alive():
            self.disconnect()
            self._writer.join()

    def _write(self) -> None:
        try:
            while data := self._outbox.take():
                self._connection.sendall(data)
        except OSError:
            self.disconnect()  # the handler, which reads, sees it and leaves the room


class Room:
    """All clients. Any thread may call its methods; none of them waits for a client."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clients: set[Client] = set()
        self._closed = False

    def enter(self, client: Client) -> bool:
        """Add a client that has no name yet; return whether the room is still open."""
        with self._lock:
            if not self._closed:
                self._clients.add(client)
            return not self._closed

    def name(self, client: Client, nick: str) -> bool:
        """Give a client its name and announce it; return whether the name was free."""
        with self._lock:
            if any(nick == other.nick for other in self._clients):
                return False
            client.nick = nick
            self._say(f"* {nick} is here")
            return True

    def say(self, line: str) -> None:
        """Send a line to all. The lock makes everybody see the lines in the same order."""
        with self._lock:
            self._say(line)

    def _say(self, line: str) -> None:
        for client in self._clients:
            if client.nick:
                client.send(line)

    def nicks(self) -> list[str]:
        """Return the names of those present."""
        with self._lock:
            return sorted(client.nick for client in self._clients if client.nick)

    def leave(self, client: Client) -> None:
        """Remove a client and tell the others."""
        with self._lock:
            self._clients.discard(client)
            if client.nick:
                self._say(f"* {client.nick} has left")

    def close(self) -> None:
        """Put everybody out, and let nobody in any more."""
        with self._lock:
            self._closed = True
            for client in self._clients:
                client.disconnect()


class ChatHandler(socketserver.StreamRequestHandler):
    """Read the lines of one client until it leaves or vanishes."""

    server: ChatServer

    def setup(self) -> None:
        # A machine that loses its power says nothing: after a while, keep-alive finds out.
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        super().setup()

    def handle(self) -> None:
        client = Client(self.request, self.server.outbox_limit)
        room = self.server.room
        try:
            if room.enter(client) and self.introduce(client):
                self.chat(client)
        except OSError as error:
            print(f"{client.nick or self.client_address[0]} vanished: {error}", flush=True)
        finally:
            room.leave(client)
            client.goodbye()

    def introduce(self, client: Client) -> bool:
        """Ask for a name until there is one; return whether the client is still there."""
        client.send("* what is your nick name?")
        while (nick := self.read_line()) is not None:
            if not re.fullmatch(r"[\w.-]{1,20}", nick):
                client.send("* a nick name has 1 to 20 letters, digits, dots, dashes or underscores")
            elif self.server.room.name(client, nick):
                return True
            else:
                client.send(f"* {nick} is here already: what is your nick name?")
        return False

    def chat(self, client: Client) -> None:
        """Pass on what the client says."""
        room = self.server.room
        while (line := self.read_line()) is not None:
            if line == "/quit":
                client.send("* goodbye")
                return
            if line == "/who":
                client.send("* here: " + ", ".join(room.nicks()))
            elif line:
                room.say(f"{client.nick}: {line}")

    def read_line(self) -> str | None:
        """Return the next line, ``None`` at the end of the connection or of a line that is too long."""
        line = self.rfile.readline(LINE_LIMIT)
        return line.decode(errors="replace").strip() if line.endswith(b"\n") else None


class ChatServer(socketserver.ThreadingTCPServer):
    """The room and its door."""

    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, server_address: Any, outbox_limit: int = OUTBOX_LIMIT) -> None:
        self.room = Room()
        self.outbox_limit = outbox_limit
        super().__init__(server_address, ChatHandler)

    def server_close(self) -> None:
        """Put everybody out, so that all handlers end, and wait for them."""
        self.room.close()
        super().server_close()


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Serve a chat.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0, the default, lets the system choose")
    parser.add_argument(
        "--outbox-limit",
        type=int,
        default=OUTBOX_LIMIT,
        metavar="BYTES",
        help="how much may wait for a client that does not keep up (default: %(default)s)",
    )
    arguments = parser.parse_args()

    with ChatServer((arguments.host, arguments.port), arguments.outbox_limit) as server:
        try:
            host, port = server.server_address[:2]
            print(f"listening on {host}:{port}", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
