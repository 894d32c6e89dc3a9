"""Asking a server as an ordinary client does, before it is measured: does it answer, how, and always the same?"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

from fastserve.bench.measure import Load
from fastserve.bench.process import ServerProcess

LIMIT = 2.0  # seconds for an answer
QUIET = 0.1  # seconds without more bytes, after which an answer is taken for whole
LOOK = 0.05  # seconds between two looks at the server's standard error
SHOWN = 60  # bytes of an answer that a message shows
TRACEBACK = "Traceback (most recent call last):"


class ProbeFailed(Exception):
    """The server does not answer as it must to be measured. The text is one or two lines for the user."""


@dataclass(frozen=True)
class Answers:
    """What a server answered.

    :param texts: all answers to the same request.
    :param keeps: whether it went on with the connection after an answer.
    """

    texts: tuple[bytes, ...]
    keeps: bool


def probe(server: ServerProcess, load: Load) -> Answers:
    """Send the request of ``load`` a few times, and ``load.pipeline`` of them at once.

    Raises ``ProbeFailed``, and ``ServerFailed`` if the server ends.
    """
    try:
        answers = _probe_datagrams(server, load) if load.datagrams else _probe_connection(server, load)
    except OSError as error:
        server.check()
        raise ProbeFailed(f"{server.name}: {error.strerror or error}") from None
    _look_for_traceback(server)
    return answers


def last_line(errors: str) -> str:
    """Return the last line of the last traceback in what a server wrote to standard error; empty if there is none."""
    _, found, rest = errors.rpartition(TRACEBACK)
    lines = [line.strip() for line in rest.splitlines() if line.strip(" -")]
    return lines[-1] if found and lines else ""


def show(data: bytes, start: int = 0) -> str:
    """Return bytes as a message shows them, from ``start`` on."""
    if not data:
        return "nothing"
    part = data[start : start + SHOWN]
    return f"{part!r}{f' from byte {start} on,' if start else ''}" + (
        f" ({len(data):,} bytes in all)" if len(part) < len(data) else ""
    )


def _look_for_traceback(server: ServerProcess, received: bytes | None = None) -> None:
    line = last_line(server.errors())
    if line:
        so_far = "" if received is None else f"\nreceived of it before: {show(received)}"
        raise ProbeFailed(f"{server.name}: the handler raised {line}{so_far}")


class _Talk:
    """A connection to a server, and what the load says about requests and answers."""

    def __init__(self, server: ServerProcess, load: Load) -> None:
        self.server, self.load = server, load
        self.ended = False
        self.socket = socket.create_connection(server.address, LIMIT)
        self.socket.setblocking(False)

    def ask(self, requests: int = 1) -> bytes:
        """Send requests at once and return what is received until all answers are there, or the connection ends.

        Raises ``ProbeFailed`` if neither happens in time.
        """
        received = bytearray()
        for data in self._receive(self.load.payload * requests, LIMIT):
            received += data
            if self.is_whole(received, requests):
                return bytes(received)
            if not data:
                _look_for_traceback(self.server, bytes(received))
        if not self.ended:
            self._fail_late(bytes(received), requests)
        return bytes(received)

    def rest(self, seconds: float) -> bytes:
        """Return what else comes within a time or until the connection ends."""
        return b"".join(self._receive(b"", seconds))

    def _receive(self, sent: bytes, seconds: float) -> Iterator[bytes]:
        """Send and receive at the same time; yield what comes, and nothing now and then, until the end or the limit."""
        deadline = time.monotonic() + seconds
        poll = select.poll()
        while not self.ended and (left := deadline - time.monotonic()) > 0:
            poll.register(self.socket, select.POLLIN | (select.POLLOUT if sent else 0))
            events = poll.poll(min(left, LOOK) * 1000)
            data = b""
            try:
                if sent and events and events[0][1] & select.POLLOUT:
                    sent = sent[self.socket.send(sent) :]
                if events and events[0][1] & ~select.POLLOUT:
                    data = self.socket.recv(1 << 18)
                    self.ended = not data
            except BlockingIOError:
                continue
            except ConnectionError:
                self.ended = True
            yield data

    def is_whole(self, received: bytes | bytearray, requests: int) -> bool:
        """Return whether that many answers are there."""
        answer = self.load.answer
        if isinstance(answer, bytes):
            return received.count(answer) >= requests
        return answer is not None and len(received) >= answer * requests

    def size_of_first(self, received: bytes) -> int:
        """Return how long the first answer is."""
        answer = self.load.answer
        if isinstance(answer, bytes):
            return received.index(answer) + len(answer)
        return len(received) if answer is None else answer

    def _fail_late(self, received: bytes, requests: int) -> None:
        name, so_far = self.server.name, f"received so far: {show(received)}"
        if self.load.answer is None:
            raise ProbeFailed(f"{name}: the handler did not end the connection within {LIMIT:.0f} s; {so_far}")
        if requests > 1:
            raise ProbeFailed(
                f"{name}: {requests} requests sent at once were not all answered within {LIMIT:.0f} s\n{so_far}"
            )
        until = f"an answer that ends with {describe(self.load.answer)}"
        raise ProbeFailed(f"{name}: the handler hangs: no whole answer within {LIMIT:.0f} s ({until})\n{so_far}")


def describe(answer: int | bytes | None) -> str:
    """Return how the end of an answer is known, for a message."""
    if answer is None:
        return "the end of the connection"
    return f"byte {answer:,}" if isinstance(answer, int) else repr(answer)[1:]


def _probe_connection(server: ServerProcess, load: Load) -> Answers:
    talk = _Talk(server, load)
    with contextlib.closing(talk.socket):
        first = talk.ask()
        _fail_unless_whole(talk, first)
        texts = [first]
        extra = first[talk.size_of_first(first) :] + talk.rest(QUIET)
        if extra:
            raise ProbeFailed(
                f"{server.name}: more came after what --until says is the end of an answer, {describe(load.answer)}\n"
                f"the answer: {show(first[: talk.size_of_first(first)])}; after it: {show(extra)}"
            )
        if not talk.ended:
            second = talk.ask()
            if second or not talk.ended:
                _fail_unless_whole(talk, second)
                texts.append(second)
        keeps = len(texts) > 1
        if load.pipeline > 1:
            _probe_pipeline(talk, texts)
        if not talk.ended:
            talk.socket.shutdown(socket.SHUT_WR)
            talk.rest(LIMIT)
            if not talk.ended:
                _look_for_traceback(server)
                raise ProbeFailed(
                    f"{server.name}: the handler hangs: its client ended the connection, and {LIMIT:.0f} s later it "
                    "had not done so"
                )
    return Answers(tuple(texts), keeps)


def _fail_unless_whole(talk: _Talk, received: bytes) -> None:
    """Raise ``ProbeFailed`` if the connection ended before a whole answer came."""
    if talk.load.answer is None and received or talk.is_whole(received, 1):
        return
    _look_for_traceback(talk.server, received)
    raise ProbeFailed(
        f"{talk.server.name}: the connection ended before a whole answer had come (it ends with "
        f"{describe(talk.load.answer)})\nreceived: {show(received)}"
    )


def _probe_pipeline(talk: _Talk, texts: list[bytes]) -> None:
    """Raise ``ProbeFailed`` if the server does not answer requests that are sent together."""
    name, requests = talk.server.name, talk.load.pipeline
    if len(texts) < 2:
        raise ProbeFailed(f"{name}: --pipeline {requests}: the handler ends its connection after one answer")
    received = talk.ask(requests)
    if not talk.is_whole(received, requests):
        raise ProbeFailed(
            f"{name}: --pipeline {requests}: the connection ended before {requests} answers had come\n"
            f"received: {show(received)}"
        )
    if texts[0] == texts[1] and received != texts[0] * requests:
        where = difference(received, texts[0] * requests)
        raise ProbeFailed(
            f"{name}: --pipeline {requests}: the answers to requests sent at once differ from those to single ones\n"
            f"received: {show(received, where)}"
        )


def difference(one: bytes, other: bytes) -> int:
    """Return where two answers differ, or a little before, so that a message shows what leads to it."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return max(same - SHOWN // 3, 0) if same > SHOWN // 2 else 0


def _probe_datagrams(server: ServerProcess, load: Load) -> Answers:
    texts = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect(server.address)
        for _ in range(2):
            client.send(load.payload)
            deadline = time.monotonic() + LIMIT
            while not (readable := select.select([client], [], [], LOOK)[0]) and time.monotonic() < deadline:
                _look_for_traceback(server)
            if not readable:
                raise ProbeFailed(f"{server.name}: the handler hangs: no datagram came back within {LIMIT:.0f} s")
            texts.append(client.recv(65536))
            if select.select([client], [], [], QUIET)[0]:
                raise ProbeFailed(
                    f"{server.name}: more than one datagram came back for one\n"
                    f"the first: {show(texts[-1])}; the second: {show(client.recv(65536))}"
                )
    return Answers(tuple(texts), True)
