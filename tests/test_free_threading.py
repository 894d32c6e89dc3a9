"""What many threads do at the same time: a Python without the GIL would tell. It holds with the GIL too."""

from __future__ import annotations

import collections
import contextlib
import importlib
import os
import pkgutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import fastserve
from conftest import NO_EXTENSIONS, TWINS
from fastserve import _backend, _loop
from support import LIMIT, open_descriptors, serving, wait_until

NEEDS_C = pytest.mark.skipif(NO_EXTENSIONS, reason="the extensions are not built")
THREADS = 8


@contextlib.contextmanager
def in_threads(*functions: Callable[[], Any]) -> Iterator[None]:
    """Run functions in threads, all from the same moment on, beside the block; raise what one of them raises."""
    barrier = threading.Barrier(len(functions) + 1, timeout=LIMIT)
    failed: list[BaseException] = []

    def run(function: Callable[[], Any]) -> None:
        try:
            barrier.wait()
            function()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    barrier.wait()
    try:
        yield
    finally:
        for thread in threads:
            thread.join(LIMIT)
    assert not any(thread.is_alive() for thread in threads)
    if failed:
        raise failed[0]


@pytest.mark.skipif(not _backend.FREE_THREADED, reason="this Python always has the GIL")
def test_no_module_switches_the_gil_on() -> None:
    names = [name for _, name, _ in pkgutil.iter_modules(fastserve.__path__, "fastserve.")]
    modules = [name for name in names if "hub" not in name and "green" not in name and name != "fastserve.__main__"]
    assert "fastserve._core" in modules or NO_EXTENSIONS
    program = f"import sys, {', '.join(modules)}; print(sys._is_gil_enabled())"
    command = [sys.executable, "-W", "error", "-X", "gil=0", "-c", program]
    # gil=0 would hide it, but for the warning, which is an error here.
    for options in (command, [*command[:3], *command[5:]]):
        result = subprocess.run(options, capture_output=True, text=True, timeout=LIMIT)
        assert (result.returncode, result.stdout, result.stderr) == (0, "False\n", "")


@pytest.mark.skipif(not _backend.FREE_THREADED, reason="this Python always has the GIL")
@pytest.mark.skipif(importlib.util.find_spec("greenlet") is not None, reason="importing greenlet may switch it on")
def test_greenlets_are_refused_without_the_gil() -> None:
    with pytest.raises(RuntimeError, match="needs the GIL.*PYTHON_GIL=1"):
        _backend.hub()


@pytest.mark.parametrize("for_signals", [False, True], ids=["eventfd", "socket-pair"])
def test_nobody_writes_to_the_descriptor_of_a_wakeup_that_is_closed(core: Any, for_signals: bool) -> None:
    """Its number is used again at once, by files that nobody is to write to."""
    for _ in range(50):
        wakeup = core.Wakeup(for_signals)
        ended = threading.Event()

        def set_it(wakeup: Any = wakeup, ended: threading.Event = ended) -> None:
            while not ended.is_set():
                wakeup.set()

        with in_threads(set_it, set_it):
            wakeup.close()
            files = [os.memfd_create("watched") for _ in range(4)]
            os.sched_yield()
            ended.set()
        assert [os.fstat(file).st_size for file in files] == [0] * 4
        for file in files:
            os.close(file)


@pytest.fixture
def request_thread() -> Iterator[Any]:
    """The thread that is used again. None is left idle afterwards."""
    found = importlib.import_module("fastserve.workers._reuse").RequestThread
    if found is None or _backend.threads is None:
        pytest.skip("no thread is used again here")
    yield found
    _backend.threads.join_all()
    _backend.threads.end_idle()
    wait_until(lambda: _backend.threads is not None and _backend.threads.counts() == (0, 0))


def test_jobs_that_are_started_at_once_all_run_and_are_joined(request_thread: Any) -> None:
    ran: collections.deque[tuple[int, str]] = collections.deque()

    def start(number: int) -> None:
        for round_ in range(100):
            job = request_thread(ran.append, ((number, f"job {round_}"),), False)
            job.start()
            names = {job.name for _ in range(3)}
            assert job.ident is not None and len(names) == 1
            if round_ % 3 == 0:
                job.join(LIMIT)
                assert not job.is_alive()

    with in_threads(*(lambda number=number: start(number) for number in range(THREADS))):  # type: ignore[misc]
        pass
    assert _backend.threads is not None
    _backend.threads.join_all()
    assert sorted(ran) == sorted((number, f"job {round_}") for number in range(THREADS) for round_ in range(100))


def test_a_job_is_started_once_whoever_is_first(request_thread: Any) -> None:
    for _ in range(100):
        ran: list[int] = []
        refused: list[RuntimeError] = []
        job = request_thread(ran.append, (1,), False)

        def start(job: Any = job, refused: list[RuntimeError] = refused) -> None:
            try:
                job.start()
            except RuntimeError as error:
                refused.append(error)

        with in_threads(*[start] * 4):
            pass
        wait_until(lambda: not job.is_alive())  # noqa: B023
        assert ran == [1] and len(refused) == 3


@NEEDS_C
def test_every_item_of_many_threads_is_taken_once() -> None:
    work = TWINS["c"]["threads"].WorkQueue()  # type: ignore[union-attr]
    taken: collections.deque[Any] = collections.deque()

    def put(number: int) -> None:
        for item in range(1000):
            work.put((number, item))

    def take() -> None:
        while (item := work.get()) is not None:
            taken.append(item)

    with in_threads(*[take] * THREADS):
        with in_threads(*(lambda number=number: put(number) for number in range(4))):  # type: ignore[misc]
            pass
        for _ in range(THREADS):
            work.put(None)
    assert sorted(taken) == [(number, item) for number in range(4) for item in range(1000)]
    assert work.empty()


def served_by_two_threads(server: Any, client: Callable[[int], None]) -> None:
    """Serve in two threads while clients run, each with its number in a thread of its own."""
    other = threading.Thread(target=server.serve_forever)
    other.start()
    try:
        with serving(server), in_threads(*(lambda n=n: client(n) for n in range(THREADS))):  # type: ignore[misc]
            # A thread that comes to serve when all is over finds the listener closed.
            wait_until(lambda: len(_loop.State.of(server).loops) == 2)
    finally:
        server.shutdown()
        other.join(LIMIT)
    assert not other.is_alive()


class Lines(fastserve.StreamRequestHandler):
    """Answer each line with it, and count on the server what a lock guards."""

    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line)
            with self.server.lock:  # type: ignore[attr-defined]
                self.server.handled += 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["ThreadingTCPServer", "ThreadPoolTCPServer"])
def test_many_clients_of_a_server_that_two_threads_serve(impl: str, name: str) -> None:
    before = open_descriptors()
    connections, lines = 40, 5
    with getattr(fastserve, name)(("127.0.0.1", 0), Lines) as server:
        server.request_queue_size = 128
        server.server_activate()
        server.socket.setblocking(False)  # two loops: who comes too late must not wait in accept
        server.lock, server.handled = threading.Lock(), 0

        def client(number: int) -> None:
            for round_ in range(connections):
                with socket.create_connection(server.server_address, LIMIT) as connection:
                    with connection.makefile("rwb", buffering=0) as file:
                        for line in range(lines):
                            text = b"%d %d %d\n" % (number, round_, line)
                            file.write(text)
                            assert file.readline() == text

        served_by_two_threads(server, client)
    assert server.handled == THREADS * connections * lines
    wait_until(lambda: open_descriptors() == before)


def test_replies_of_a_server_that_two_threads_serve_are_gathered_by_one_at_a_time(impl: str) -> None:
    class Echo(fastserve.BaseRequestHandler):
        def handle(self) -> None:
            data, sock = self.request
            sock.sendto(data, self.client_address)

    with fastserve.UDPServer(("127.0.0.1", 0), Echo) as server:
        server.gather_replies = True

        def client(number: int) -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.settimeout(LIMIT)
                sock.connect(server.server_address)
                for round_ in range(200):
                    sock.send(b"%d %d" % (number, round_))
                    assert sock.recv(100) == b"%d %d" % (number, round_)

        served_by_two_threads(server, client)
