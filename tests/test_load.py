"""The load generator against servers whose behaviour is known: each of its figures is true."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastserve import _backend
from support import open_descriptors, wait_until

if sys.platform != "linux" or _backend.refused():
    pytest.skip("the load generator is part of the builds with extensions for Linux", allow_module_level=True)

load: Any = importlib.import_module("fastserve._load")

SHORT = 0.15  # seconds
Serve = Callable[["Server", socket.socket], None]


class Server:
    """A server with one thread for each connection, which counts what it does."""

    def __init__(self, serve: Serve) -> None:
        self.requests = 0
        self.sources: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self._serve = serve
        self.open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.address = self._listener.getsockname()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def asked(self) -> int:
        """Count a request and return its number, from 1 on."""
        with self.lock:
            self.requests += 1
            return self.requests

    @property
    def connections(self) -> int:
        return sum(self.sources.values())

    def _accept(self) -> None:
        while not self.ended.is_set():
            connection, (host, _) = self._listener.accept()
            if self.ended.is_set():
                connection.close()  # it comes from close()
                break
            self.sources[host] += 1
            with self.lock:
                self.open.add(connection)
            thread = threading.Thread(target=self._run, args=(connection,))
            self._threads.append(thread)
            thread.start()
        self._listener.close()

    def _run(self, connection: socket.socket) -> None:
        # A client may go at any time.
        with connection, contextlib.suppress(ConnectionError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._serve(self, connection)
        with self.lock:
            self.open.discard(connection)

    def close(self) -> None:
        self.ended.set()
        with contextlib.suppress(ConnectionError), socket.create_connection(self.address):
            pass
        self._threads[0].join(60)
        with self.lock:
            for connection in self.open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()


@contextlib.contextmanager
def running(serve: Serve) -> Iterator[Server]:
    server = Server(serve)
    try:
        yield server
    finally:
        server.close()


def receive(connection: socket.socket, size: int) -> bytes:
    """Return so many bytes, or fewer at the end of the connection."""
    data = b""
    while len(data) < size and (more := connection.recv(size - len(data))):
        data += more
    return data


def answers(answer: Callable[[int], list[bytes]], size: int = 5) -> Serve:
    """Serve requests of ``size`` bytes: send each part of ``answer(number of the request)``."""

    def serve(server: Server, connection: socket.socket) -> None:
        while len(receive(connection, size)) == size:
            for part in answer(server.asked()):
                connection.sendall(part)

    return serve


echo = answers(lambda number: [b"hello"])


def hello(server: Any, **options: Any) -> dict[str, Any]:
    """Exchange "hello" for "hello" for a short time."""
    options = {"answer": 5, "expected": b"hello", "seconds": SHORT, **options}
    result: dict[str, Any] = load.streams(getattr(server, "address", server), b"hello", **options)
    return result


# --- streams ------------------------------------------------------------------------------------------------


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


def test_a_connection_that_is_not_served_is_seen_beside_others() -> None:
    taken = threading.Lock()

    def serve(server: Server, connection: socket.socket) -> None:
        if taken.acquire(blocking=False):
            server.ended.wait(60)
        else:
            echo(server, connection)

    with running(serve) as server:
        result = hello(server, connections=3)
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


# --- latency ------------------------------------------------------------------------------------------------


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


# --- datagrams ----------------------------------------------------------------------------------------------


class DatagramServer:
    """A server that answers each datagram with those that ``answer(number, data)`` returns."""

    def __init__(self, answer: Callable[[int, bytes], list[bytes]]) -> None:
        self.requests = self.answered = 0
        self.sources: set[tuple[str, int]] = set()
        self._answer = answer
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.address = self._socket.getsockname()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while (received := self._socket.recvfrom(65536))[0] != b"end":
            data, source = received
            self.requests += 1
            self.sources.add(source)
            for answer in self._answer(self.requests, data):
                self._socket.sendto(answer, source)
                self.answered += 1

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"end", self.address)
        self._thread.join(60)
        assert not self._thread.is_alive()
        self._socket.close()


@contextlib.contextmanager
def answering(answer: Callable[[int, bytes], list[bytes]]) -> Iterator[DatagramServer]:
    server = DatagramServer(answer)
    try:
        yield server
    finally:
        server.close()


def ping(server: Any, **options: Any) -> dict[str, Any]:
    """Exchange datagrams for a short time."""
    options = {"expected": b"ping", "seconds": SHORT, **options}
    result: dict[str, Any] = load.datagrams(getattr(server, "address", server), b"ping", **options)
    return result


def test_datagrams_are_those_that_the_server_answered() -> None:
    before = open_descriptors()
    with answering(lambda number, data: [data]) as server:
        result = ping(server, sockets=3, window=8)
    assert result["errors"] == 0
    assert 0 < result["requests"] <= server.requests <= result["requests"] + 3 * 8
    assert len({host for host, _ in server.sources}) == 3
    assert result["p50_us"] <= result["p90_us"] <= result["p99_us"] <= result["max_us"]
    assert json.loads(json.dumps(result)) == result
    assert open_descriptors() == before


@pytest.mark.parametrize("answer", [b"pong", b"pin", b"pings"])
def test_wrong_datagrams_are_counted(answer: bytes) -> None:
    with answering(lambda number, data: [answer if number % 5 == 0 else data]) as server:
        result = ping(server)
    assert result["errors"] == result["wrong"]
    assert abs(result["wrong"] - result["requests"] / 5) <= 1 and result["requests"] > 5


def test_datagrams_that_the_server_drops_are_lost() -> None:
    with answering(lambda number, data: [] if number % 10 == 0 else [data]) as server:
        result = ping(server, window=4, seconds=1.0)
    assert result["errors"] == result["lost"]
    assert result["lost"] == server.requests // 10 > 0


def test_no_datagram_is_lost_that_a_slow_server_answers() -> None:
    # It takes longer than it takes the generator to wonder.
    with answering(lambda number, data: [data] if time.sleep(0.4) is None else []) as server:
        result = ping(server, seconds=1.0)
    assert 1 <= result["requests"] <= 3
    assert result["errors"] == 0
    assert result["max_us"] >= 400_000


def test_a_server_that_stops_for_a_while_loses_nothing() -> None:
    def answer(number: int, data: bytes) -> list[bytes]:
        if number == 50:
            time.sleep(0.5)
        return [data]

    with answering(answer) as server:
        result = ping(server, sockets=2, window=8, seconds=1.0)
    assert server.requests > 50
    assert result["errors"] == 0
    assert server.requests - result["requests"] <= 2 * 8 + 2
    assert result["max_us"] >= 500_000


def test_a_server_that_never_answers_stalls_every_socket_and_loses_nothing() -> None:
    with answering(lambda number, data: []) as server:
        result = ping(server, sockets=2, window=4)
    assert result["requests"] == 0
    assert result["stalled"] == result["errors"] == 2
    assert server.requests <= 2 * 4 + 2, "the window, and a probe for each socket"
    assert result["generator_cpu"] < 0.3


def test_datagrams_to_nobody_are_refused_and_not_hammered() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as closed:
        closed.bind(("127.0.0.1", 0))
        address = closed.getsockname()
    result = ping(address, sockets=2, window=4, seconds=0.4)
    assert result["requests"] == 0
    assert result["refused"] == result["errors"]
    assert 2 * 4 <= result["refused"] <= 2 * 5 * (0.4 / 0.05 + 1)
    assert result["generator_cpu"] < 0.3


def test_answers_to_nothing_are_wrong() -> None:
    with answering(lambda number, data: [data, data]) as server:
        result = ping(server)
    assert result["wrong"] == result["errors"] > 0


def test_a_stopped_process_that_goes_on_between_two_runs_is_no_loss() -> None:
    code = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('127.0.0.1', 0))\n"
        "print(s.getsockname()[1], flush=True)\n"
        "while True: s.sendto(*s.recvfrom(2048))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            address = ("127.0.0.1", int(process.stdout.readline()))
            for _ in range(3):
                result = ping(address, sockets=2, window=16)
                assert result["requests"] > 0 and result["errors"] == 0
                process.send_signal(signal.SIGSTOP)
                os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
                process.send_signal(signal.SIGCONT)
        finally:
            process.kill()


def dropped(receiver: socket.socket) -> int:
    """Return how many datagrams the kernel has dropped because the buffer of a socket was full."""
    so_meminfo, drops = 55, 8  # of Linux's asm-generic/socket.h and sock_diag.h
    figures = receiver.getsockopt(socket.SOL_SOCKET, so_meminfo, 36)
    return int(struct.unpack("9I", figures)[drops])


def test_what_the_kernel_drops_is_what_is_lost() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        server.bind(("127.0.0.1", 0))
        seen = 0

        def serve() -> None:
            nonlocal seen
            wait_until(lambda: dropped(server))  # the window has overflown the buffer
            while (received := server.recvfrom(100))[0] != b"end":
                seen += 1
                server.sendto(*received)

        thread = threading.Thread(target=serve)
        thread.start()
        result = ping(server.getsockname(), window=64, seconds=1.2)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"end", server.getsockname())
        thread.join(60)
        assert not thread.is_alive()
    assert result["lost"] == result["errors"] > 0
    assert result["requests"] > 0 and seen >= result["requests"]


# --- arguments, ends and interruptions ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"connections": 0},
        {"pipeline": 0},
        {"answer": 0},
        {"answer": -1},
        {"answer": b""},
        {"answer": bytes(65)},
        {"answer": 4},
        {"seconds": 0},
        {"seconds": -1},
        {"seconds": 3601},
        {"seconds": float("nan")},
        {"warmup": -0.1},
    ],
    ids=str,
)
def test_streams_refuse_arguments_that_make_no_sense(options: dict[str, Any]) -> None:
    before = open_descriptors()
    with pytest.raises(ValueError):
        hello(("127.0.0.1", 1), **options)
    assert open_descriptors() == before


@pytest.mark.parametrize("options", [{"sockets": 0}, {"window": 0}, {"window": 1025}, {"seconds": 0}], ids=str)
def test_datagrams_refuse_arguments_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        ping(("127.0.0.1", 1), **options)


def test_there_must_be_something_to_send_and_it_must_fit() -> None:
    with pytest.raises(ValueError, match="nothing to send"):
        load.streams(("127.0.0.1", 1), b"", answer=1)
    with pytest.raises(ValueError, match="at most 65507 bytes"):
        load.datagrams(("127.0.0.1", 1), bytes(65508))
    with pytest.raises(TypeError):
        load.streams(("127.0.0.1", 1), 5, answer=1)


@pytest.mark.parametrize("host", ["192.0.2.1", "8.8.8.8", "0.0.0.0", "localhost", "::1", "127.1", "", "128.0.0.1"])
def test_only_servers_on_this_machine_are_loaded(host: str) -> None:
    with pytest.raises(ValueError):
        hello((host, 1))
    with pytest.raises(ValueError):
        ping((host, 1))
    with pytest.raises(ValueError):
        load.Idle((host, 1), 1)


@pytest.mark.parametrize("port", [-1, 0, 65536])
def test_a_port_must_be_one(port: int) -> None:
    with pytest.raises(ValueError):
        hello(("127.0.0.1", port))


class Interrupted(Exception):
    """What the handler of a signal raises here."""


@pytest.mark.parametrize("run", [hello, ping])
def test_a_signal_ends_a_run_at_once_and_nothing_stays_open(run: Any) -> None:
    def interrupt(signum: int, frame: object) -> None:
        raise Interrupted

    def signal_soon() -> None:
        """Send the signal a little after the beginning of the run, which calls this."""
        later.start()

    later = threading.Timer(0.1, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1))
    previous = signal.signal(signal.SIGUSR1, interrupt)
    with running(echo) as streams, answering(lambda number, data: [data]) as datagrams:
        before = open_descriptors()
        begun = time.monotonic()
        with pytest.raises(Interrupted):
            run(streams if run is hello else datagrams, seconds=100, sample=signal_soon)
        assert time.monotonic() - begun < 50
        later.join()
        signal.signal(signal.SIGUSR1, previous)
        wait_until(lambda: open_descriptors() <= before)  # also those of the server's side


def test_a_sample_that_fails_ends_the_run_and_nothing_stays_open() -> None:
    def sample() -> float:
        raise Interrupted

    with running(echo) as server:
        before = open_descriptors()
        with pytest.raises(Interrupted):
            hello(server, connections=5, sample=sample)
        wait_until(lambda: open_descriptors() <= before)


def test_ctrl_c_ends_a_run_promptly() -> None:
    code = (
        "import socket, sys, fastserve._load as load\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "print('ready', flush=True)\n"
        "load.streams(server.getsockname(), b'x', answer=1, seconds=60, sample=lambda: print('on', flush=True))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"ready\n"
        assert process.stdout.readline() == b"on\n"
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
        assert process.wait(60) == -signal.SIGINT
        assert time.monotonic() - begun < 30
        assert b"KeyboardInterrupt" in errors


def test_want_of_descriptors_is_a_failure_of_the_generator_and_not_of_the_server() -> None:
    code = (
        "import resource, socket, errno, fastserve._load as load\n"
        "server = socket.create_server(('127.0.0.1', 0), backlog=100)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))\n"
        "for run in (lambda: load.streams(server.getsockname(), b'x', answer=1, connections=50, seconds=.1),\n"
        "            lambda: load.datagrams(server.getsockname(), b'x', sockets=50, seconds=.1)):\n"
        "    try:\n"
        "        run()\n"
        "    except OSError as error:\n"
        "        print(errno.errorcode[error.errno])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "EMFILE\nEMFILE\n", "")


# --- idle connections ---------------------------------------------------------------------------------------


def test_idle_connections_are_held_and_then_closed() -> None:
    before = open_descriptors()
    with running(echo) as server:
        with load.Idle(server.address, 20, b"hello"):
            assert server.requests == 20
            assert len(server.sources) == server.connections == 20
            assert open_descriptors() >= before + 40
        wait_until(lambda: open_descriptors() <= before + 1)
        with load.Idle(server.address, 3) as idle:
            wait_until(lambda: server.connections == 23)
            assert server.requests == 20, "they send nothing"
            idle.close()
            wait_until(lambda: open_descriptors() <= before + 1)


def test_an_idle_connection_that_the_server_ends_is_an_error_and_nothing_stays_open() -> None:
    with running(lambda server, connection: receive(connection, 5) and None) as server:
        before = open_descriptors()
        with pytest.raises(ConnectionResetError):
            load.Idle(server.address, 5, b"hello")
        wait_until(lambda: open_descriptors() <= before)


def test_no_connection_of_a_run_is_reset_at_its_end() -> None:
    resets: list[OSError] = []

    def serve(server: Server, connection: socket.socket) -> None:
        try:
            while data := connection.recv(100):
                connection.sendall(data)
        except OSError as error:
            resets.append(error)

    with running(serve) as server:
        result = hello(server, connections=10)
        wait_until(lambda: not server.open)  # before the server ends what it may still be about to answer
    assert result["requests"] > 0
    assert resets == []
