"""Connections of the load generator: each of its figures is true of servers whose behaviour is known."""

from __future__ import annotations

import itertools
import json
import os
import socket
import struct
import threading
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from load_support import (
    SHORT,
    Server,
    answers,
    echo,
    hello,
    load,
    receive,
    running,
)
from support import open_descriptors, wait_until

pytestmark = pytest.mark.alone


def test_requests_are_those_that_the_server_answered() -> None:
    before = open_descriptors()
    with running(echo) as server:
        result = hello(server, connections=4)
        assert server.connections == 4
    assert result["errors"] == 0
    # What was under way at the end is not counted: one request for each connection at most.
    assert 0 < result["requests"] <= server.requests <= result["requests"] + 4
    assert result["requests_per_second"] == pytest.approx(result["requests"] / result["seconds"])
    assert SHORT <= result["seconds"] < SHORT + 30
    assert open_descriptors() == before


def test_the_warm_up_is_not_counted_and_the_sample_is_taken_around_the_rest() -> None:
    taken: list[int] = []
    with running(echo) as server:

        def sample() -> int:
            taken.append(server.requests)
            return len(taken)

        result = hello(server, warmup=SHORT, sample=sample)
    assert taken[0] > 0, "the warm-up"
    assert result["samples"] == (1, 2)
    assert abs(result["requests"] - (taken[1] - taken[0])) <= 1


def test_connections_that_begin_together_await_the_first_answer_of_all() -> None:
    numbers = itertools.count()
    asked_by: list[int] = []

    def serve(server: Server, connection: socket.socket) -> None:
        number = next(numbers)
        if number == 2:
            time.sleep(0.3)  # the others have been answered, and could go on
        while receive(connection, 5):
            asked_by.append(number)
            connection.sendall(b"hello")

    with running(serve) as server:
        result = hello(server, connections=3, together=True)
    assert sorted(asked_by[:3]) == [0, 1, 2]
    assert set(asked_by[3:]) == {0, 1, 2}
    assert result["errors"] == 0


@pytest.mark.parametrize("options", [{"reconnect": True}, {"answer": None}])
def test_connections_that_end_with_each_exchange_cannot_begin_together(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot begin together"):
        hello(("127.0.0.1", 1), together=True, **options)


def test_the_result_is_fit_for_json() -> None:
    with running(echo) as server:
        result = hello(server)
    assert json.loads(json.dumps(result)) == result
    assert type(result["generator_saturated"]) is bool
    assert 0 < result["generator_cpu"] < 1.1
    assert result["samples"] is None


def test_wrong_bytes_are_counted() -> None:
    with running(answers(lambda number: [b"hellO" if number % 10 == 0 else b"hello"])) as server:
        result = hello(server)
    assert result["wrong"] == result["errors"]
    assert abs(result["wrong"] - result["requests"] / 10) <= 1
    assert result["requests"] > 10


def test_nothing_is_compared_without_an_expectation() -> None:
    with running(answers(lambda number: [b"%5d" % (number % 9999)])) as server:
        result = hello(server, expected=None)
    assert result["errors"] == 0 and result["requests"] > 0


@pytest.mark.parametrize("expected", [b"hello", None])
def test_more_than_the_answer_is_wrong(expected: bytes | None) -> None:
    with running(answers(lambda number: [b"hello!"])) as server:
        result = hello(server, expected=expected)
    assert result["wrong"] == result["requests"] > 0


def test_more_than_the_answer_is_wrong_after_a_delimiter_too() -> None:
    with running(answers(lambda number: [b"a\nb"])) as server:
        result = hello(server, answer=b"\n", expected=None)
    assert result["wrong"] == result["requests"] > 0


def test_more_that_comes_later_is_wrong() -> None:
    def serve(server: Server, connection: socket.socket) -> None:
        connection.sendall(receive(connection, 5))
        receive(connection, 1)  # the client has the answer, and has ended its side
        connection.sendall(b"more")
        server.asked()

    with running(serve) as server:
        result = hello(server, reconnect=True)
    assert result["requests"] > 0
    assert abs(result["wrong"] - result["requests"]) <= 1


def test_an_answer_in_pieces_is_one() -> None:
    with running(answers(lambda number: [b"h", b"el", b"lo"])) as server:
        result = hello(server, connections=2)
    assert result["errors"] == 0
    assert 0 < result["requests"] <= server.requests <= result["requests"] + 2


def test_a_large_payload_is_sent_while_the_answer_is_received() -> None:
    def serve(server: Server, connection: socket.socket) -> None:
        while data := connection.recv(65536):
            connection.sendall(data)
        server.asked()

    payload = os.urandom(5_000_000)  # more than the buffers of the kernel hold
    with running(serve) as server:
        result = load.streams(server.address, payload, answer=len(payload), expected=payload, seconds=0.5)
    assert result["errors"] == 0
    assert result["requests"] > 0


def test_an_answer_before_the_end_of_the_request_is_wrong() -> None:
    def serve(server: Server, connection: socket.socket) -> None:
        if connection.recv(1):
            connection.sendall(b"hello")
            server.ended.wait(60)

    with running(serve) as server:
        result = load.streams(server.address, bytes(20_000_000), answer=5, expected=b"hello", seconds=SHORT)
    assert result["wrong"] == result["requests"] > 0


def test_a_server_that_floods_does_not_keep_the_run_from_its_end() -> None:
    def serve(server: Server, connection: socket.socket) -> None:
        while not server.ended.is_set():
            connection.sendall(bytes(1 << 20))

    with running(serve) as server:
        begun = time.monotonic()
        result = load.streams(server.address, b"hello", answer=b"\n", seconds=SHORT)
        assert time.monotonic() - begun < 30
    assert result["requests"] == 0
    assert result["stalled"] == result["errors"] == 1


def test_a_server_that_closes_early_breaks_the_exchange() -> None:
    def serve(server: Server, connection: socket.socket) -> None:
        receive(connection, 5)
        server.asked()
        connection.sendall(b"hel")

    with running(serve) as server:
        result = hello(server)
    assert result["requests"] == 0
    # The last one may still be awaited.
    assert 0 < result["broken"] <= server.requests <= result["broken"] + 1
    assert result["errors"] == result["broken"]


def test_a_server_that_resets_breaks_the_exchange() -> None:
    def serve(server: Server, connection: socket.socket) -> None:
        receive(connection, 5)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with running(serve) as server:
        result = hello(server, connections=3)
        assert server.connections >= 3
    assert result["requests"] == 0
    assert result["broken"] == result["errors"] >= 3


def test_a_server_that_refuses_is_not_hammered() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = closed.getsockname()
    result = hello(address, connections=10, seconds=0.4)
    assert result["requests"] == 0
    assert result["refused"] == result["errors"]
    assert 10 <= result["refused"] <= 10 * 0.4 / 0.05 + 10, "each connection is tried every 50 ms"
    assert result["generator_cpu"] < 0.3


def test_a_server_that_never_answers_stalls_every_connection_however_short_the_run() -> None:
    with running(lambda server, connection: server.ended.wait(60) and None) as server:
        result = hello(server, connections=3)
    assert result["requests"] == 0
    assert result["stalled"] == result["errors"] == 3
    assert result["p50_us"] == result["max_us"] == 0
    assert result["generator_cpu"] < 0.3


@pytest.mark.parametrize("together", [False, True])
def test_a_connection_that_is_not_served_is_seen_beside_others(together: bool) -> None:
    taken = threading.Lock()

    def serve(server: Server, connection: socket.socket) -> None:
        if taken.acquire(blocking=False):
            server.ended.wait(60)
        else:
            echo(server, connection)

    with running(serve) as server:
        result = hello(server, connections=3, together=together)
    assert result["requests"] > 0
    assert result["stalled"] == result["errors"] == 1


def test_each_exchange_has_a_connection_of_its_own_from_many_addresses() -> None:
    with running(echo) as server:
        result = hello(server, connections=2, reconnect=True, seconds=0.3)
        # A handler that serves its client until the client ends is told of that.
        wait_until(lambda: server.connections >= server.requests)
    assert result["errors"] == 0
    assert 0 < result["requests"] <= server.requests <= result["requests"] + 2
    assert all(host.startswith("127.0.0.") and host != "127.0.0.1" for host in server.sources)
    count = server.connections
    assert len(server.sources) == min(count, 200)
    # In turn: none has more than one connection beyond any other, but for what came last.
    assert max(server.sources.values()) - min(server.sources.values()) <= 1


def test_an_answer_may_last_until_the_end_of_the_connection() -> None:
    def serve(server: Server, connection: socket.socket) -> None:
        receive(connection, 5)
        if server.asked() % 4:
            connection.sendall(b"hel")
            connection.sendall(b"lo")
        else:
            connection.sendall(b"hell")

    with running(serve) as server:
        result = hello(server, answer=None)
    assert 4 < result["requests"] <= server.requests <= result["requests"] + 1
    assert abs(result["wrong"] - result["requests"] / 4) <= 1
    assert result["errors"] == result["wrong"]


def test_the_end_of_a_connection_alone_is_an_answer_where_nothing_is_expected() -> None:
    with running(lambda server, connection: receive(connection, 5) and None) as server:
        result = hello(server, answer=None, expected=b"")
        assert result["errors"] == 0 and result["requests"] > 0
        result = hello(server, answer=None, expected=None)
        assert result["broken"] > 0 and result["requests"] == 0


def test_pipelined_requests_are_counted_one_by_one() -> None:
    with running(answers(lambda number: [b"o", b"k\n"])) as server:
        result = hello(server, answer=b"\n", expected=b"ok\n", pipeline=8, connections=2)
    assert result["errors"] == 0
    assert result["requests"] % 8 == 0
    assert 0 < result["requests"] <= server.requests <= result["requests"] + 16


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_delimiter_is_found_however_the_answer_is_cut(data: st.DataObject) -> None:
    letters = st.sampled_from(b"ab")
    delimiter = bytes(data.draw(st.lists(letters, min_size=1, max_size=5), label="delimiter"))
    pipeline = data.draw(st.integers(1, 3), label="pipeline")
    text = bytes(data.draw(st.lists(st.sampled_from(b"aabbc"), max_size=30), label="text"))
    # The answer as a model has it: all up to the end of so many delimiters, which do not overlap.
    text += delimiter * pipeline
    end = 0
    for _ in range(pipeline):
        end = text.index(delimiter, end) + len(delimiter)
    answer = text[:end]
    assert answer.count(delimiter) == pipeline
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(answer) - 1)), max_size=4), label="cuts"))
    parts = [answer[i:j] for i, j in zip([0, *cuts], [*cuts, len(answer)], strict=True) if i < j]
    expected = data.draw(st.booleans(), label="compared") and pipeline == 1
    served: list[int] = []
    done = threading.Event()

    def serve(server: Server, connection: socket.socket) -> None:
        while len(receive(connection, 5 * pipeline)) == 5 * pipeline:
            served.append(1)
            for part in parts:
                connection.sendall(part)
        done.set()

    with running(serve) as server:
        result = load.streams(
            server.address,
            b"hello",
            answer=delimiter,
            expected=answer if expected else None,
            pipeline=pipeline,
            seconds=0.01,
        )
        assert done.wait(60)
    # Found too early, the rest of the answer would be more than the answer; found late, there would be no second.
    assert result["wrong"] == result["broken"] == 0
    assert result["requests"] in (len(served) * pipeline, (len(served) - 1) * pipeline)


def test_a_wrong_answer_is_still_searched_for_its_delimiter() -> None:
    with running(answers(lambda number: [b"aa", b"Xab"])) as server:
        result = hello(server, answer=b"ab", expected=b"aacab")
    assert result["wrong"] == result["requests"] == result["errors"]
    assert 0 < result["requests"] <= server.requests <= result["requests"] + 1


# Latency


def test_latencies_are_those_of_the_server() -> None:
    def serve(server: Server, connection: socket.socket) -> None:
        while receive(connection, 5):
            time.sleep(0.1 if server.asked() == 5 else 0.02)
            connection.sendall(b"hello")

    with running(serve) as server:
        result = hello(server, seconds=0.8)
    assert result["requests"] >= 6
    assert 20_000 <= result["p50_us"] <= result["p90_us"] <= result["p99_us"] <= result["max_us"]
    assert 100_000 <= result["max_us"] < 30_000_000
    assert result["p99_us"] == result["max_us"], "of few, the slowest is the one that 99% do not exceed"


def test_quantiles_part_the_fast_from_the_slow() -> None:
    def serve(server: Server, connection: socket.socket) -> None:
        while receive(connection, 5):
            if server.asked() % 4 == 0:
                time.sleep(0.1)
            connection.sendall(b"hello")

    with running(serve) as server:
        result = hello(server, seconds=0.6)
    assert result["requests"] > 8
    assert result["p50_us"] < 100_000 <= result["p90_us"]
