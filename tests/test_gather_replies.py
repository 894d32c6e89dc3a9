"""``gather_replies``: the replies to a batch of datagrams are sent together."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastserve
from support import LIMIT, open_descriptors, serving, wait_until
from test_datagrams import ADDRESS, client_of, send_numbers, stop_after


class Server(fastserve.UDPServer):
    gather_replies = True
    max_packet_size = 65535


class UnixServer(fastserve.UnixDatagramServer):
    gather_replies = True


def echo_handler(log: list[Any], then: Callable[[Any], object] = lambda handler: None) -> Any:
    """Return a handler that answers, logs, and calls ``then(handler)``."""

    class Handler(fastserve.BaseRequestHandler):
        def handle(self) -> None:
            data, listener = self.request
            listener.sendto(data, self.client_address)
            log.append(data)
            then(self)

    return Handler


def has_answer(client: socket.socket) -> bool:
    return bool(select.select([client], [], [], 0)[0])


@contextlib.contextmanager
def served(handler: Any, count: int, cls: type = Server, address: Any = ADDRESS, name: Any = None) -> Iterator[Any]:
    """Send ``count`` datagrams in one batch, serve them, and give the server and the client."""
    with cls(address, handler) as server, client_of(server, name) as client:
        send_numbers(client, count)
        server.serve_forever(30)
        yield server, client


def answers(client: socket.socket, count: int) -> list[bytes]:
    return [client.recv(70_000) for _ in range(count)]


def test_replies_go_out_together_at_the_end_of_the_batch(impl: str) -> None:
    log: list[bytes] = []
    early: list[bool] = []

    def then(handler: Any) -> None:
        early.append(has_answer(client))
        stop_after(5, log)(handler)

    with Server(ADDRESS, echo_handler(log, then)) as server, client_of(server) as client:
        sent = send_numbers(client, 5)
        server.serve_forever(30)
        assert early == [False] * 5
        assert answers(client, 5) == sent


def test_without_it_replies_go_out_at_once(module: Any) -> None:
    log: list[bytes] = []
    early: list[bool] = []

    class Handler(module.BaseRequestHandler):
        def handle(self) -> None:
            self.request[1].sendto(self.request[0], self.client_address)
            log.append(self.request[0])
            early.append(has_answer(client))
            stop_after(3, log)(self)

    with module.UDPServer(ADDRESS, Handler) as server, client_of(server) as client:
        send_numbers(client, 3)
        server.serve_forever(30)
    assert early == [True] * 3


def test_a_datagram_request_handler_is_gathered_too(impl: str) -> None:
    seen: list[bool] = []

    class Handler(fastserve.DatagramRequestHandler):
        def handle(self) -> None:
            seen.append(has_answer(client))
            self.wfile.write(self.rfile.read() * 2)
            stop_after(3, seen)(self)

    with Server(ADDRESS, Handler) as server, client_of(server) as client:
        send_numbers(client, 3)
        server.serve_forever(30)
        assert answers(client, 3) == [b"00", b"11", b"22"]
    assert seen == [False] * 3


@pytest.mark.parametrize("is_new", [False, True])
def test_many_clients_get_their_own_replies(impl: str, is_new: bool) -> None:
    """More addresses than a gatherer remembers, the same objects again or always new ones."""
    log: list[bytes] = []

    class Handler(fastserve.DatagramRequestHandler):
        def setup(self) -> None:
            super().setup()
            if is_new:
                self.client_address = (*self.client_address,)[:1] + self.client_address[1:]

        def handle(self) -> None:
            self.wfile.write(b"to %d" % self.client_address[1])
            log.append(self.packet)
            stop_after(200, log)(self)

    with Server(ADDRESS, Handler) as server, contextlib.ExitStack() as opened:
        clients = [opened.enter_context(client_of(server)) for _ in range(100)]
        for _ in range(2):
            for client in clients:
                client.send(b"x")
        server.serve_forever(30)
        for client in clients:
            assert answers(client, 2) == [b"to %d" % client.getsockname()[1]] * 2


def test_more_replies_than_fit_go_out_in_their_order(impl: str) -> None:
    log: list[bytes] = []

    class Handler(fastserve.BaseRequestHandler):
        def handle(self) -> None:
            for number in range(20):
                assert self.request[1].sendto(b"%s %d" % (self.request[0], number), self.client_address) > 0
            log.append(self.request[0])
            stop_after(7, log)(self)

    with served(Handler, 7) as (_, client):
        assert answers(client, 140) == [b"%d %d" % (n, m) for n in range(7) for m in range(20)]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(payloads=st.lists(st.tuples(st.binary(max_size=2000), st.booleans(), st.sampled_from([0, 1, 2])), max_size=80))
def test_any_replies_arrive_whole_and_in_their_order(impl: str, payloads: list[tuple[bytes, bool, int]]) -> None:
    class Handler(fastserve.BaseRequestHandler):
        def handle(self) -> None:
            listener = self.request[1]
            for data, is_bytes, how in payloads:
                sent: Any = data if is_bytes else bytearray(data)
                if how == 0:
                    assert listener.sendto(sent, self.client_address) == len(data)
                elif how == 1:
                    assert listener.sendto(sent, 0, self.client_address) == len(data)
                else:
                    assert listener.sendto(memoryview(sent), ("localhost", self.client_address[1])) == len(data)
                if not is_bytes:
                    sent[:] = b"changed"  # after sendto it is the handler's own again
            self.server._BaseServer__shutdown_request = True

    with Server(ADDRESS, Handler) as server, client_of(server) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1_000_000)
        client.send(b"x")
        server.serve_forever(30)
        assert answers(client, len(payloads)) == [data for data, _, _ in payloads]
        assert not has_answer(client)


@pytest.mark.parametrize("name", ["client", b"\0fastserve " + os.urandom(4)], ids=["path", "abstract"])
def test_unix_datagrams_are_gathered(impl: str, name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log: list[bytes] = []
    with served(echo_handler(log, stop_after(5, log)), 5, UnixServer, "server", name) as (_, client):
        assert answers(client, 5) == log


def test_ipv6_datagrams_are_gathered(impl: str) -> None:
    class Server6(Server):
        address_family = socket.AF_INET6

    log: list[bytes] = []
    try:
        with served(echo_handler(log, stop_after(5, log)), 5, Server6, ("::1", 0)) as (_, client):
            assert answers(client, 5) == log
    except OSError as error:
        pytest.skip(f"no IPv6: {error}")


def test_an_unbound_unix_client_cannot_be_answered(impl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    errors: list[Any] = []

    class Unanswered(UnixServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            errors.append((request[0], client_address, sys.exc_info()[0]))
            self._BaseServer__shutdown_request = True

    with served(echo_handler([]), 1, Unanswered, "server"):
        assert errors == [(b"0", None, TypeError)]


# The socket


def test_the_socket_in_the_request_is_one_and_stands_for_the_listener(impl: str) -> None:
    found: list[Any] = []
    with served(
        echo_handler([], lambda handler: found.append(handler.request[1]) or stop_after(1, found)(handler)), 1
    ) as (
        server,
        _,
    ):
        (gathering,) = found
        listener = server.socket
        assert isinstance(gathering, socket.socket)
        assert gathering.fileno() == listener.fileno() >= 0
        assert gathering.getsockname() == listener.getsockname()
        for name in ("family", "type", "proto", "timeout"):
            assert getattr(gathering, name) == getattr(listener, name)
        assert select.select([gathering], [], [], 0) == ([], [], [])
        own = {name for name in dir(socket.socket) if not name.startswith("_")}
        inherited = {name for name in own if name not in vars(type(gathering))}
        assert inherited <= {"sendto"}
        before = open_descriptors()
        del gathering, found[:]
        assert listener.fileno() >= 0
        assert open_descriptors() == before
        server.server_close()
    assert listener.fileno() == -1


def test_the_socket_sends_at_once_after_the_batch_and_is_closed_with_the_server(impl: str) -> None:
    found: list[Any] = []

    def then(handler: Any) -> None:
        found.append((handler.request[1], handler.client_address))
        stop_after(1, found)(handler)

    with served(echo_handler([], then), 1) as (server, client):
        gathering, address = found[0]
        assert client.recv(10) == b"0"
        gathering.sendto(b"later", address)
        assert has_answer(client)
        server.server_close()
        assert gathering.fileno() == -1
        with pytest.raises(OSError):
            gathering.sendto(b"too late", address)


@pytest.mark.parametrize("method", ["getsockname", "send", "sendto", "sendmsg", "setsockopt"])
def test_whatever_else_is_called_sends_what_was_gathered_first(impl: str, method: str) -> None:
    seen: list[bool] = []

    class Handler(fastserve.BaseRequestHandler):
        def handle(self) -> None:
            data, gathering = self.request
            gathering.sendto(data, self.client_address)
            with contextlib.suppress(OSError):  # not connected
                if method == "send":
                    gathering.send(b"x")
            if method == "sendto":
                gathering.sendto(b"second", 0, self.client_address)
            elif method == "sendmsg":
                gathering.sendmsg([b"second"], [], 0, self.client_address)
            elif method == "setsockopt":
                gathering.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            elif method == "getsockname":
                gathering.getsockname()
            seen.append(client.recv(10, socket.MSG_DONTWAIT) == data)
            stop_after(1, seen)(self)

    with Server(ADDRESS, Handler) as server, client_of(server) as client:
        send_numbers(client, 1)
        server.serve_forever(30)
        if method.startswith("send") and method != "send":
            assert client.recv(10) == b"second"
    assert seen == [True]


def test_a_handler_in_another_thread_sends_at_once(impl: str) -> None:
    sent: list[int] = []

    class Threads(fastserve.ThreadingMixIn, Server):
        pass

    class Handler(fastserve.BaseRequestHandler):
        def handle(self) -> None:
            self.request[1].sendto(self.request[0], self.client_address)
            wait_until(lambda: has_answer(client))
            sent.append(threading.get_ident())

    with Threads(ADDRESS, Handler) as server, client_of(server) as client:
        with serving(server, 0.01):
            assert client.send(b"x") == 1
            wait_until(lambda: sent)
        assert client.recv(10) == b"x"


def test_several_loops_answer_every_datagram_once(impl: str) -> None:
    log: list[bytes] = []
    with Server(ADDRESS, echo_handler(log)) as server, client_of(server) as client:
        threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        received: list[bytes] = []
        for first in range(0, 1000, 50):
            sent = send_numbers(client, 50, first)
            received = answers(client, 50)
            assert sorted(received) == sorted(sent)
        while any(thread.is_alive() for thread in threads):
            server._BaseServer__shutdown_request = True
            threads[0].join(0.02)
        assert not has_answer(client)


def test_a_connected_listener_is_not_gathered(impl: str) -> None:
    log: list[bytes] = []
    plain: list[bool] = []

    def then(handler: Any) -> None:
        plain.append(handler.request[1] is handler.server.socket)
        stop_after(2, log)(handler)

    with Server(ADDRESS, echo_handler(log, then)) as server, client_of(server) as client:
        server.socket.connect(client.getsockname())
        sent = send_numbers(client, 2)
        server.serve_forever(30)
        assert answers(client, 2) == sent
    assert plain == [True, True]


def test_it_may_be_switched_at_run_time(impl: str) -> None:
    log: list[bytes] = []
    gathered: list[bool] = []

    def then(handler: Any) -> None:
        gathered.append(not has_answer(client))
        client.setblocking(True)
        handler.server.gather_replies = len(log) == 1
        handler.server._BaseServer__shutdown_request = True

    with fastserve.UDPServer(ADDRESS, echo_handler(log, then)) as server, client_of(server) as client:
        for number in range(3):
            send_numbers(client, 1, number)
            server.serve_forever(30)
            assert client.recv(10) == b"%d" % number
    assert gathered == [False, True, False]


# Errors


def test_the_error_of_a_gathered_reply_goes_to_handle_error_and_the_others_go_out(
    impl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    errors: list[Any] = []
    log: list[bytes] = []

    class Reporting(UnixServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            errors.append((request, client_address, sys.exc_info()[0]))

    with Reporting("server", echo_handler(log, stop_after(6, log))) as server:
        with client_of(server, "stays") as stays, client_of(server, "goes") as goes:
            for number in range(3):
                stays.send(b"stays %d" % number)
                goes.send(b"goes %d" % number)
            goes.close()
            os.unlink("goes")
            server.serve_forever(30)
            assert answers(stays, 3) == [b"stays 0", b"stays 1", b"stays 2"]
        assert errors == [((b"goes %d" % n, server.socket), "goes", FileNotFoundError) for n in range(3)]


def test_an_error_that_handle_error_raises_ends_the_loop_and_the_others_go_out(
    impl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    class Raising(UnixServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            raise

    with Raising("server", echo_handler([])) as server:
        with client_of(server, "stays") as stays, client_of(server, "goes") as goes:
            goes.send(b"first")
            send_numbers(stays, 3)
            goes.close()
            os.unlink("goes")
            with pytest.raises(FileNotFoundError):
                server.serve_forever(30)
            assert answers(stays, 3) == [b"0", b"1", b"2"]


def test_a_reply_that_is_too_long_raises_in_the_handler(impl: str, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []

    class Handler(fastserve.BaseRequestHandler):
        def handle(self) -> None:
            stop_after(0, seen)(self)
            try:
                self.request[1].sendto(bytes(70_000), self.client_address)
            except OSError as error:
                seen.append(type(error))
            self.request[1].sendto(bytes(65507), self.client_address)

    with served(Handler, 1) as (_, client):
        assert len(client.recv(70_000)) == 65507
    assert seen == [OSError]


@pytest.mark.parametrize(
    "arguments", [(), (b"x",), ("text", ("127.0.0.1", 9)), (b"x", ("127.0.0.1",)), (b"x", ("127.0.0.1", -1))]
)
def test_arguments_that_make_no_sense_raise_what_sendto_raises(impl: str, arguments: tuple[Any, ...]) -> None:
    raised: list[Any] = []

    class Handler(fastserve.BaseRequestHandler):
        def handle(self) -> None:
            stop_after(0, raised)(self)
            for sender in (self.request[1], self.server.socket):
                try:
                    sender.sendto(*arguments)
                except Exception as error:
                    raised.append(type(error))

    with served(Handler, 1):
        assert len(raised) == 2 and raised[0] is raised[1]


def test_what_ends_the_loop_still_sends_what_was_gathered(impl: str) -> None:
    def then(handler: Any) -> None:
        raise KeyboardInterrupt

    with Server(ADDRESS, echo_handler([], then)) as server, client_of(server) as client:
        send_numbers(client, 3)
        for number in range(3):
            with pytest.raises(KeyboardInterrupt):
                server.serve_forever(30)
            assert client.recv(10) == b"%d" % number


@pytest.mark.parametrize("timeout", [None, 0.0, LIMIT])
def test_a_full_send_buffer_is_waited_for(
    impl: str, timeout: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Unix client that does not read fills its queue, of 10 datagrams or so, and the server waits for it."""
    monkeypatch.chdir(tmp_path)
    log: list[bytes] = []

    class Handler(fastserve.BaseRequestHandler):
        def handle(self) -> None:
            for number in range(40):
                self.request[1].sendto(b"%d" % number, self.client_address)
            log.append(self.request[0])

    with UnixServer("server", Handler) as server, client_of(server, "client") as client:
        server.socket.settimeout(timeout)
        with serving(server, 0.01):
            client.send(b"x")
            wait_until(lambda: log)
            before = time.process_time()
            time.sleep(0.2)
            if timeout != LIMIT:  # with a timeout CPython's own sendto spins on such a socket
                assert time.process_time() - before < 0.1
            assert answers(client, 40) == [b"%d" % number for number in range(40)]


def test_a_signal_while_replies_wait_runs_its_handler_and_loses_none(
    impl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = threading.Event()
    received: list[bytes] = []

    class Handler(fastserve.BaseRequestHandler):
        def handle(self) -> None:
            for number in range(40):
                self.request[1].sendto(b"%d" % number, self.client_address)
            self.server._BaseServer__shutdown_request = True

    def read() -> None:
        wait_until(lambda: has_answer(client))
        wait_until(lambda: ran.is_set() or os.kill(os.getpid(), signal.SIGUSR1))
        received.extend(answers(client, 40))

    before = signal.signal(signal.SIGUSR1, lambda signum, frame: ran.set())
    try:
        with UnixServer("server", Handler) as server, client_of(server, "client") as client:
            reader = threading.Thread(target=read)
            reader.start()
            client.send(b"x")
            server.serve_forever(30)
            reader.join(LIMIT)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert received == [b"%d" % number for number in range(40)]
