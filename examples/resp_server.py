"""A small key-value store that speaks RESP, the protocol of Redis, so that the tools of Redis can talk to it.

    python examples/resp_server.py --port 6380

In another terminal:

    redis-cli -p 6380 set greeting hello
    redis-benchmark -p 6380 -t ping,set,get -P 16

or, without these tools, type inline commands such as ``INCR visits`` into ``nc 127.0.0.1 6380``. It knows PING, ECHO,
SET, GET, DEL, EXISTS, INCR and QUIT, and keeps everything in memory. Ctrl-C ends it.

A thread serves each client. Requests that a client pipelines, that is, sends without waiting for the answers, are
read from the buffer of ``rfile`` one by one and answered in order; nothing has to be done for it.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable
from typing import BinaryIO

import fastserve as socketserver

LINE_LIMIT = 64 * 1024  # bytes of an inline command, or of a header
PARTS_LIMIT = 1024  # words of a command
REQUEST_LIMIT = 8 * 1024 * 1024  # bytes of all of them
INTEGER_LIMIT = 1 << 63  # integers are signed, of 64 bits
SHOWN = 64  # characters of an unknown command that its error repeats

# The headers that nearly every request has. To look one up takes a third of the time that it takes to read it.
COUNTS = {b"*%d\r\n" % count: count for count in range(10)}
SIZES = {b"$%d\r\n" % size: size for size in range(1000)}

Reply = None | int | str | bytes | list[bytes]


class ProtocolError(Exception):
    """What came is not RESP. There is no telling where the next request would begin."""


class CommandError(Exception):
    """A command that cannot be done. The client may go on."""


# --- the protocol -------------------------------------------------------------------------------------------


def whole_line(line: bytes) -> bytes:
    """Return a line that was read without its end. Raises ``EOFError``, ``ProtocolError``."""
    if line.endswith(b"\n"):
        return line.rstrip(b"\r\n")
    if len(line) == LINE_LIMIT:
        raise ProtocolError("too big inline request")
    raise EOFError


def read_number(text: bytes, limit: int, what: str) -> int:
    """Return the number in a header. Raises ``ProtocolError`` if it is none, or beyond the limit."""
    if text.isdigit() and len(text) <= 10 and (number := int(text)) <= limit:
        return number
    raise ProtocolError(f"invalid {what} length")


def read_size(header: bytes, limit: int) -> int:
    """Return the size of a bulk string. Raises ``EOFError`` and ``ProtocolError``."""
    line = whole_line(header)
    if not line.startswith(b"$"):
        raise ProtocolError("expected '$'")
    return read_number(line[1:], limit, "bulk")


def read_request(rfile: BinaryIO) -> list[bytes]:
    """Return the words of the next request, inline or array; none if it is empty.

    Raises ``EOFError`` and ``ProtocolError``.
    """
    first = rfile.readline(LINE_LIMIT)
    count = COUNTS.get(first)
    if count is None:
        line = whole_line(first)
        if not line.startswith(b"*"):
            return line.split()
        # "*-1" is an empty request too, from clients of old.
        count = 0 if line == b"*-1" else read_number(line[1:], PARTS_LIMIT, "multibulk")
    words = []
    left = REQUEST_LIMIT
    for _ in range(count):
        header = rfile.readline(LINE_LIMIT)
        size = SIZES.get(header)
        if size is None or size > left:
            size = read_size(header, left)
        left -= size
        word = rfile.read(size + 2)
        if word[size:] != b"\r\n":
            if len(word) < size + 2:
                raise EOFError
            raise ProtocolError("a bulk string does not end where it says")
        words.append(word[:size])
    return words


def encode(reply: Reply) -> bytes:
    """Return a reply as it is sent: text is a status, bytes are data."""
    if isinstance(reply, bytes):
        return b"$%d\r\n%s\r\n" % (len(reply), reply)
    if isinstance(reply, str):
        return b"+%s\r\n" % reply.encode()
    if reply is None:
        return b"$-1\r\n"
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    return b"*%d\r\n%s" % (len(reply), b"".join(map(encode, reply)))


def encode_error(message: str) -> bytes:
    """Return an error as it is sent, on one line whatever the message quotes."""
    return b"-ERR %s\r\n" % " ".join(message.split()).encode(errors="replace")


# --- the commands -------------------------------------------------------------------------------------------


class Store:
    """Keys and values, shared by the threads of all clients.

    One operation on a dict is atomic, so looking up needs no lock. A change takes it: INCR reads and then writes, and
    what another thread wrote in between would be lost.
    """

    def __init__(self) -> None:
        self._values: dict[bytes, bytes] = {}
        self._changing = threading.Lock()

    def set(self, key: bytes, value: bytes) -> str:
        """Give a key a value."""
        with self._changing:
            self._values[key] = value
        return "OK"

    def get(self, key: bytes) -> bytes | None:
        """Return the value of a key, ``None`` if it has none."""
        return self._values.get(key)

    def delete(self, *keys: bytes) -> int:
        """Remove keys and return how many there were."""
        with self._changing:
            return sum(self._values.pop(key, None) is not None for key in keys)

    def exists(self, *keys: bytes) -> int:
        """Return how many of the keys have a value; one that is asked for twice counts twice."""
        return sum(key in self._values for key in keys)

    def increment(self, key: bytes) -> int:
        """Add one to the number that a key has, 0 if it has none, and return it. Raises ``CommandError``."""
        with self._changing:
            text = self._values.get(key, b"0")
            digits = text.removeprefix(b"-")
            # int() alone would take " 1_0" too.
            if not digits.isdigit() or len(digits) > 19 or not -INTEGER_LIMIT <= int(text) < INTEGER_LIMIT - 1:
                raise CommandError("value is not an integer or out of range")
            number = int(text) + 1
            self._values[key] = b"%d" % number
            return number


def config(action: bytes, *names: bytes) -> list[bytes]:
    """Tell clients that ask for the configuration that all of it is empty. Raises ``CommandError``."""
    if action.upper() != b"GET" or not names:
        raise CommandError("only CONFIG GET is known")
    return [part for name in names for part in (name, b"")]


def commands(store: Store) -> dict[bytes, tuple[int, float, Callable[..., Reply]]]:
    """Return for the name of each command how many arguments it has at least and at most, and what it does."""
    many = float("inf")
    return {
        b"PING": (0, 1, lambda text=None: "PONG" if text is None else text),
        b"ECHO": (1, 1, lambda text: text),
        b"SET": (2, 2, store.set),
        b"GET": (1, 1, store.get),
        b"DEL": (1, many, store.delete),
        b"EXISTS": (1, many, store.exists),
        b"INCR": (1, 1, store.increment),
        # What redis-cli and redis-benchmark ask for when they begin.
        b"COMMAND": (0, many, lambda *words: []),
        b"CONFIG": (1, many, config),
    }


# --- the server ---------------------------------------------------------------------------------------------


class RespHandler(socketserver.StreamRequestHandler):
    """Answer the requests of one client until it leaves."""

    # Each answer is a packet of its own, sent at once: the next one must not wait until the client confirms it.
    disable_nagle_algorithm = True
    commands = commands(Store())  # one store for all clients

    def handle(self) -> None:
        try:
            going_on = True
            while going_on:
                going_on = self.answer(read_request(self.rfile))
        except ProtocolError as error:
            self.wfile.write(encode_error(f"Protocol error: {error}"))
        except (EOFError, ConnectionError):
            return  # the client has left, perhaps amid a request

    def answer(self, words: list[bytes]) -> bool:
        """Do what one request says, and return whether to go on."""
        if not words:
            return True
        name = words[0].upper()
        if name == b"QUIT":
            self.wfile.write(encode("OK"))
            return False
        try:
            self.wfile.write(encode(self.do(name, words[1:])))
        except CommandError as error:
            self.wfile.write(encode_error(str(error)))
        return True

    def do(self, name: bytes, arguments: list[bytes]) -> Reply:
        """Run a command and return what it answers. Raises ``CommandError``."""
        found = self.commands.get(name)
        if found is None:
            raise CommandError(f"unknown command '{name[:SHOWN].decode(errors='replace')}'")
        least, most, run = found
        if least <= len(arguments) <= most:
            return run(*arguments)
        raise CommandError(f"wrong number of arguments for '{name.decode().lower()}' command")


class RespServer(socketserver.ThreadingTCPServer):
    """A thread for each client; those that are connected do not keep the server from its end."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Keep keys and values for clients that speak RESP.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0, the default, lets the system choose")
    arguments = parser.parse_args()

    with RespServer((arguments.host, arguments.port), RespHandler) as server:
        try:
            host, port = server.server_address[:2]
            print(f"listening on {host}:{port}", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
