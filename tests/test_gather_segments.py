"""``gather_replies``: several replies to one client that the kernel gets as one message, and cuts up again."""

from __future__ import annotations

import socket
import sys
from typing import Any

import pytest

import fastserve
from test_datagrams import ADDRESS, client_of
from test_gather_replies import Server, answers, has_answer

SEGMENT, COALESCE = 103, 104  # UDP_SEGMENT and UDP_GRO, which are no names of Python's


def can_segment() -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            return probe.getsockopt(socket.IPPROTO_UDP, SEGMENT) == 0
        except OSError:
            return False


needs_segments = pytest.mark.skipif(not can_segment(), reason="the kernel has no UDP_SEGMENT")


def sending_handler(payloads: list[bytes]) -> Any:
    """Return a handler that sends all of them to its client, and stops the server."""

    class Handler(fastserve.BaseRequestHandler):
        def handle(self) -> None:
            for payload in payloads:
                assert self.request[1].sendto(payload, self.client_address) == len(payload)
            self.server._BaseServer__shutdown_request = True

    return Handler


SIZES = {
    "one size": [10] * 64,
    "more than fit": [10] * 65,
    "a shorter end": [10, 10, 3, 3, 1, 10],
    "a longer one": [10, 10, 11, 11, 11, 10],
    "empty ones": [0, 0, 10, 10, 0, 10],
    "as large as one piece": [1232] * 60,
    "larger than one piece": [1233] * 5 + [9000] * 4,
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("option", [None, 11])
def test_replies_of_any_sizes_arrive_one_by_one(impl: str, sizes: list[int], family: int, option: int | None) -> None:
    """Without checksums, SO_NO_CHECK, the kernel refuses to cut up a message."""

    class AnyServer(Server):
        address_family = family  # type: ignore[assignment]

    payloads = [bytes([number]) * size for number, size in enumerate(sizes)]
    address = ADDRESS if family == socket.AF_INET else ("::1", 0)
    with AnyServer(address, sending_handler(payloads)) as server, client_of(server) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        if option is not None and sys.platform == "linux":
            server.socket.setsockopt(socket.SOL_SOCKET, option, 1)
        client.send(b"x")
        server.serve_forever(30)
        assert answers(client, len(payloads)) == payloads
        assert not has_answer(client)


@needs_segments
def test_replies_of_one_size_to_one_client_are_one_message() -> None:
    """A client that asks for it gets what the kernel has not cut up yet."""
    payloads = [b"1234", b"5678", b"90", b"another", b"message"]
    with Server(ADDRESS, sending_handler(payloads)) as server, client_of(server) as client:
        client.setsockopt(socket.IPPROTO_UDP, COALESCE, 1)
        client.send(b"x")
        server.serve_forever(30)
        expected = payloads if fastserve.implementation == "py" else [b"1234567890", b"anothermessage"]
        assert answers(client, len(expected)) == expected


@needs_segments
def test_an_option_for_segments_that_somebody_has_set_is_respected(impl: str) -> None:
    with Server(ADDRESS, sending_handler([b"123456"] * 3)) as server, client_of(server) as client:
        server.socket.setsockopt(socket.IPPROTO_UDP, SEGMENT, 4)
        client.send(b"x")
        server.serve_forever(30)
        assert answers(client, 6) == [b"1234", b"56"] * 3


def test_each_of_several_replies_of_one_size_has_its_own_error(impl: str) -> None:
    errors: list[Any] = []
    nowhere = ("127.0.0.1", 0)

    class Handler(fastserve.BaseRequestHandler):
        def handle(self) -> None:
            for number in range(6):
                self.request[1].sendto(b"%d" % number, nowhere if 2 <= number <= 4 else self.client_address)
            self.server._BaseServer__shutdown_request = True

    class Reporting(Server):
        def handle_error(self, request: Any, client_address: Any) -> None:
            errors.append((request[0], client_address, sys.exc_info()[0]))

    with Reporting(ADDRESS, Handler) as server, client_of(server) as client:
        client.send(b"x")
        server.serve_forever(30)
        assert answers(client, 3) == [b"0", b"1", b"5"]
    assert errors == [(b"%d" % number, nowhere, OSError) for number in (2, 3, 4)]
