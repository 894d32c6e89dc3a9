"""How a server stops, and how it sleeps until then."""

from __future__ import annotations

import contextlib
import os
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import fastserve
from fastserve import _backend
from isolated import run_isolated
from support import LIMIT, open_descriptors, serving, talk, wait_until

POLL = 100.0  # seconds; whatever ends long before does not depend on it
QUICK = LIMIT  # a bound for a busy machine, not a figure


def poll_interval(module: ModuleType) -> float:
    return 0.02 if module is socketserver else POLL


def echo(module: ModuleType) -> type:
    class Echo(module.StreamRequestHandler):  # type: ignore[misc, name-defined]
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline())

    return Echo


@contextlib.contextmanager
def quick() -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < QUICK


class Serving:
    """A thread in ``serve_forever``, which does not shut the server down by itself."""

    def __init__(self, server: Any, interval: float = POLL) -> None:
        self.failed: list[BaseException] = []
        self._arguments = server, interval
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        server, interval = self._arguments
        try:
            server.serve_forever(interval)
        except BaseException as error:
            self.failed.append(error)

    def ends(self) -> None:
        self.thread.join(60)
        assert not self.thread.is_alive(), "serve_forever() did not return"
        if self.failed:
            raise self.failed[0]


def answers(server: Any) -> bool:
    return talk(server.server_address, b"hello\n") == b"hello\n"


# shutdown()


@pytest.mark.parametrize("name", ["TCPServer", "ThreadingTCPServer"])
def test_shutdown_of_an_idle_server_does_not_wait_for_the_poll_interval(impl: str, name: str) -> None:
    with getattr(fastserve, name)(("127.0.0.1", 0), echo(fastserve)) as server:
        serving_thread = Serving(server)
        assert answers(server)
        with quick():
            server.shutdown()
            serving_thread.ends()


def test_shutdown_waits_for_the_request_that_the_loop_handles(module: ModuleType) -> None:
    began, go_on, log = threading.Event(), threading.Event(), []

    class Slow(module.BaseRequestHandler):  # type: ignore[misc, name-defined]
        def handle(self) -> None:
            began.set()
            go_on.wait(60)
            log.append("handled")

    with module.TCPServer(("127.0.0.1", 0), Slow) as server:
        thread = Serving(server, poll_interval(module))
        with socket.create_connection(server.server_address):
            assert began.wait(60)
            stopper = threading.Thread(target=lambda: (server.shutdown(), log.append("shut down")))
            stopper.start()
            wait_until(lambda: server._BaseServer__shutdown_request)
            assert log == []
            go_on.set()
            stopper.join(60)
        thread.ends()
        assert log == ["handled", "shut down"]


def test_shutdown_in_a_handler_of_the_loops_thread_stops_after_that_request(impl: str) -> None:
    class Last(fastserve.StreamRequestHandler):
        def handle(self) -> None:
            self.server.shutdown()
            self.wfile.write(b"bye")

    with fastserve.TCPServer(("127.0.0.1", 0), Last) as server:
        thread = Serving(server)
        assert talk(server.server_address, b"") == b"bye"
        thread.ends()


def test_shutdown_in_a_handler_of_a_threading_server(module: ModuleType) -> None:
    class Last(module.StreamRequestHandler):  # type: ignore[misc, name-defined]
        def handle(self) -> None:
            self.server.shutdown()
            self.wfile.write(b"bye")

    with module.ThreadingTCPServer(("127.0.0.1", 0), Last) as server:
        thread = Serving(server, poll_interval(module))
        assert talk(server.server_address, b"") == b"bye"
        thread.ends()


def test_shutdown_before_serve_forever_makes_it_return_at_once_and_only_it(impl: str) -> None:
    with fastserve.TCPServer(("127.0.0.1", 0), echo(fastserve)) as server:
        stoppers = [threading.Thread(target=server.shutdown) for _ in range(4)]
        for stopper in stoppers:
            stopper.start()
        for stopper in stoppers:
            stopper.join(60)
            assert not stopper.is_alive()
        server.shutdown()
        server.shutdown()
        Serving(server).ends()
        with serving(server, POLL):
            assert answers(server)


def test_shutdown_may_be_called_again_when_it_has_stopped(impl: str) -> None:
    with fastserve.TCPServer(("127.0.0.1", 0), echo(fastserve)) as server:
        thread = Serving(server)
        assert answers(server)
        server.shutdown()
        thread.ends()
        with quick():
            server.shutdown()


def test_shutdown_that_races_with_the_start_neither_hangs_nor_raises(impl: str) -> None:
    before = open_descriptors()
    for _ in range(200):
        server = fastserve.TCPServer(("127.0.0.1", 0), fastserve.BaseRequestHandler)
        thread = Serving(server)
        server.shutdown()
        server.server_close()
        thread.ends()
    assert open_descriptors() == before


def test_shutdown_from_several_threads_at_once(impl: str) -> None:
    with fastserve.TCPServer(("127.0.0.1", 0), echo(fastserve)) as server:
        thread = Serving(server)
        assert answers(server)
        stoppers = [threading.Thread(target=server.shutdown) for _ in range(8)]
        for stopper in stoppers:
            stopper.start()
        thread.ends()
        for stopper in stoppers:
            stopper.join(60)
            assert not stopper.is_alive()


def test_serve_forever_serves_again_after_shutdown(module: ModuleType) -> None:
    with module.TCPServer(("127.0.0.1", 0), echo(module)) as server:
        for _ in range(3):
            thread = Serving(server, poll_interval(module))
            assert answers(server)
            server.shutdown()
            thread.ends()


def test_serve_forever_returns_cleanly_after_shutdown_and_close(impl: str) -> None:
    server = fastserve.TCPServer(("127.0.0.1", 0), fastserve.BaseRequestHandler)
    server.shutdown()
    server.server_close()
    for _ in range(3):
        Serving(server).ends()


def test_serve_forever_of_a_closed_server_raises(module: ModuleType) -> None:
    server = module.TCPServer(("127.0.0.1", 0), module.BaseRequestHandler)
    server.server_close()
    with pytest.raises(ValueError, match="Invalid file descriptor: -1"):
        server.serve_forever(poll_interval(module))
    assert server._BaseServer__is_shut_down.is_set()
    with pytest.raises(ValueError, match="Invalid file descriptor: -1"):
        server.handle_request()


@pytest.mark.parametrize("poller", ["epoll", "poll", "select"])
@pytest.mark.parametrize("ticks", [False, True])
def test_a_server_closed_while_it_serves_does_not_spin_and_can_be_shut_down(
    impl: str, monkeypatch: pytest.MonkeyPatch, poller: str, ticks: bool
) -> None:
    class Ticking(fastserve.TCPServer):
        turns = 0

        def service_actions(self) -> None:
            self.turns += 1

    monkeypatch.setenv("FASTSERVE_POLLER", poller)
    server = (Ticking if ticks else fastserve.TCPServer)(("127.0.0.1", 0), echo(fastserve))
    thread = Serving(server, 0.01 if ticks else POLL)
    assert answers(server)
    server.server_close()
    began, before = time.monotonic(), time.process_time()
    time.sleep(0.3)  # or longer: it ticks as long as this takes
    assert time.process_time() - before < (time.monotonic() - began) / 2
    with quick():
        server.shutdown()
        thread.ends()


def test_all_threads_that_serve_one_server_end(impl: str) -> None:
    for _ in range(20):
        with fastserve.TCPServer(("127.0.0.1", 0), echo(fastserve)) as server:
            server.socket.setblocking(False)  # one connection wakes them all, and only one of them gets it
            threads = [Serving(server) for _ in range(4)]
            assert answers(server)
            wait_until(lambda server=server: len(vars(server)["_fastserve_state"].loops) == 4)
            server.shutdown()
            deadline = time.monotonic() + QUICK  # less than POLL
            for thread in threads:
                thread.thread.join(max(0.0, deadline - time.monotonic()))
            left = sum(thread.thread.is_alive() for thread in threads)
            for _ in range(left):  # leave no thread to the next test
                server.shutdown()
            assert left == 0, f"{left} of 4 threads go on serving"
            for thread in threads:
                thread.ends()


def test_two_servers_in_two_threads_stop_apart(impl: str) -> None:
    with (
        fastserve.TCPServer(("127.0.0.1", 0), echo(fastserve)) as first,
        fastserve.TCPServer(("127.0.0.1", 0), echo(fastserve)) as second,
    ):
        threads = [Serving(first), Serving(second)]
        assert answers(first) and answers(second)
        first.shutdown()
        threads[0].ends()
        assert answers(second)
        second.shutdown()
        threads[1].ends()


def test_the_event_is_shut_down_is_kept_as_the_stdlib_keeps_it(module: ModuleType) -> None:
    with module.TCPServer(("127.0.0.1", 0), echo(module)) as server:
        event = server._BaseServer__is_shut_down
        assert isinstance(event, threading.Event) and vars(server)["_BaseServer__is_shut_down"] is event
        assert not event.is_set()
        thread = Serving(server, poll_interval(module))
        assert answers(server)
        assert not event.is_set()
        server.shutdown()
        assert event.is_set()
        thread.ends()
        assert vars(server)["_BaseServer__shutdown_request"] is False


# The private flag


def test_the_flag_set_by_another_thread_stops_at_once(impl: str) -> None:
    with fastserve.TCPServer(("127.0.0.1", 0), echo(fastserve)) as server:
        thread = Serving(server)
        assert answers(server)
        with quick():
            server._BaseServer__shutdown_request = True
            thread.ends()


def test_the_flag_set_by_a_handler_stops(module: ModuleType) -> None:
    class Last(module.StreamRequestHandler):  # type: ignore[misc, name-defined]
        def handle(self) -> None:
            self.server._BaseServer__shutdown_request = True
            self.wfile.write(b"bye")

    for name in ("TCPServer", "ThreadingTCPServer"):
        with getattr(module, name)(("127.0.0.1", 0), Last) as server:
            thread = Serving(server, poll_interval(module))
            assert talk(server.server_address, b"") == b"bye"
            thread.ends()


def test_a_flag_that_a_class_shadows_is_looked_at_every_poll_interval(module: ModuleType) -> None:
    class Shadowing(module.TCPServer):  # type: ignore[misc, name-defined]
        _BaseServer__shutdown_request = False

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            vars(self).pop("_BaseServer__shutdown_request")

    with Shadowing(("127.0.0.1", 0), echo(module)) as server:
        thread = Serving(server, 0.02)
        assert answers(server)
        Shadowing._BaseServer__shutdown_request = True
        thread.ends()


# service_actions


def test_an_overridden_service_actions_is_called_every_poll_interval(module: ModuleType) -> None:
    calls: list[int] = []

    class Server(module.TCPServer):  # type: ignore[misc, name-defined]
        def service_actions(self) -> None:
            calls.append(threading.get_ident())

    with serving(Server(("127.0.0.1", 0), echo(module)), 0.01):
        wait_until(lambda: len(calls) >= 10)
    assert len(set(calls)) == 1


def test_service_actions_may_be_replaced_on_the_instance(module: ModuleType) -> None:
    calls: list[int] = []
    server = module.TCPServer(("127.0.0.1", 0), echo(module))
    server.service_actions = lambda: calls.append(1)
    with serving(server, 0.01):
        wait_until(lambda: len(calls) >= 10)


def test_the_stdlibs_forking_mix_in_collects_every_poll_interval(module: ModuleType) -> None:
    calls: list[int] = []

    class Server(socketserver.ForkingMixIn, module.TCPServer):  # type: ignore[misc, name-defined]
        def collect_children(self, *, blocking: bool = False) -> None:
            calls.append(1)

    with serving(Server(("127.0.0.1", 0), echo(module)), 0.01):
        wait_until(lambda: len(calls) >= 10)


# The idle server, and the main thread

needs_proc = pytest.mark.skipif(
    not os.path.exists("/proc/self/task"), reason="context switches of a thread are read from /proc"
)


@needs_proc
@pytest.mark.skipif(not _backend.has_gil(), reason="every loop ticks without the GIL")
@pytest.mark.parametrize("where", ["main", "thread"])
@pytest.mark.parametrize("name", ["TCPServer", "ThreadingTCPServer", "ForkingTCPServer"])
def test_an_idle_server_sleeps_until_something_happens(impl: str, name: str, where: str) -> None:
    assert int(run_isolated("idle", impl, name, where, "0.5", "3")) == 0


@needs_proc
def test_the_measure_of_sleep_sees_the_ticks_of_the_stdlib() -> None:
    assert int(run_isolated("idle", "stdlib", "TCPServer", "thread", "2", "1")) >= 1


@pytest.mark.parametrize(
    "how",
    [
        "interrupt_main",
        "signal_to_another_thread",
        "sigint",
        "flag",
        "flag_in_signal_handler",
        "shutdown",
        "shutdown_in_signal_handler",
    ],
)
def test_a_server_in_the_main_thread_stops_at_once(impl: str, how: str) -> None:
    assert float(run_isolated("stop", impl, how, "free", str(POLL))) < QUICK


@pytest.mark.parametrize("how", ["interrupt_main", "signal_to_another_thread", "sigint", "flag", "shutdown"])
def test_a_signal_wakeup_of_somebody_else_is_left_alone_and_the_loop_ticks(impl: str, how: str) -> None:
    assert float(run_isolated("stop", impl, how, "owned", "0.1")) < QUICK


@pytest.mark.parametrize("variant", ["stdlib", "impl"])
def test_an_interrupted_handler_ends_the_loop_and_its_request(impl: str, variant: str) -> None:
    run_isolated("interrupted_handler", variant.replace("impl", impl))
