"""The end of tasks in the greenlet hub: kill, errors, signals and fork."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

greenlet = pytest.importorskip("greenlet")

from fastserve import _backend, _waiting  # noqa: E402
from hub_support import finish, running  # noqa: E402
from support import LIMIT, open_descriptors  # noqa: E402

# The end of tasks


def waits(hub: Any, pair: tuple[Any, Any]) -> dict[str, Callable[[], object]]:
    connection, _ = pair
    return {
        "park": hub.park,
        "park for some time": lambda: hub.park(LIMIT),
        "recv": lambda: connection.recv(1),
        "recv_into": lambda: connection.recv_into(bytearray(1)),
        "recv with flags": lambda: connection.recv(1, socket.MSG_PEEK),
        "readline": lambda: connection.makefile("rb").readline(),
        "sendall": lambda: connection.sendall(bytes(10_000_000)),
        "send": lambda: connection.send(bytes(10_000_000)),
        "wait_io": lambda: hub.wait_io(connection, connection.fileno(), False, None),
    }


@pytest.mark.parametrize(
    "name",
    ["park", "park for some time", "recv", "recv_into", "recv with flags", "readline", "sendall", "send", "wait_io"],
)
def test_kill_ends_every_wait_and_each_that_follows(hub: Any, pair: tuple[Any, Any], name: str) -> None:
    seen: list[str] = []

    def task() -> None:
        try:
            waits(hub, pair)[name]()
        finally:
            seen.append("finally")
            try:
                waits(hub, pair)[name]()
            except greenlet.GreenletExit:
                seen.append("again")
                hub.park(LIMIT)

    hub.start(task)
    assert hub.active == 1
    hub.kill()
    finish(hub)
    assert seen == ["finally", "again"]
    hub.start(seen.append, "the next one is not killed")
    assert seen[-1].startswith("the next")


def test_kill_ends_all_that_wait_for_one_connection_and_none_is_left_waiting(hub: Any, pair: tuple[Any, Any]) -> None:
    connection, peer = pair
    ends: list[str] = []

    def task() -> None:
        try:
            connection.recv(1)
        except BaseException as error:
            ends.append(type(error).__name__)
            raise

    for _ in range(4):
        hub.start(task)
    hub.kill()
    finish(hub)
    assert ends == ["GreenletExit"] * 4
    received: list[bytes] = []
    hub.start(lambda: received.append(connection.recv(1)))
    peer.sendall(b"x")
    finish(hub)
    assert received == [b"x"]


def test_a_wait_that_an_exception_has_ended_has_no_deadline_left(hub: Any, pair: tuple[Any, Any]) -> None:
    connection, _ = pair
    connection.settimeout(0.1)
    tasks: list[Any] = []
    greenlets: dict[str, Any] = {}
    seen: list[object] = []

    def receive() -> None:
        tasks.append(hub.this())
        greenlets["receive"] = greenlet.getcurrent()
        try:
            connection.recv(1)
        except ValueError:
            seen.append(greenlets["throw"].switch())  # the hub does not know that this waits
            greenlets["go on"].switch()

    def throw() -> None:
        greenlets["throw"] = greenlet.getcurrent()
        greenlets["receive"].throw(ValueError)

    def go_on() -> None:
        greenlets["go on"] = greenlet.getcurrent()
        hub.park(0.3)  # beyond the deadline of what was to be received
        greenlets["receive"].switch("by its own program")
        hub.wake(tasks[0])

    for task in receive, throw, go_on:
        hub.start(task)
    finish(hub)
    assert seen == ["by its own program"]


def test_a_task_that_was_killed_before_it_began_releases_what_it_holds(hub: Any) -> None:
    seen = []

    def task() -> None:
        seen.append("begins")
        try:
            hub.park()
        finally:
            seen.append("ends")

    hub.spawn(task)
    hub.kill()
    finish(hub)
    assert seen == ["begins", "ends"]


def test_kill_spares_the_task_that_calls_it(hub: Any) -> None:
    seen = []

    def victim() -> None:
        try:
            hub.park()
        finally:
            seen.append("victim")

    def killer() -> None:
        hub.kill()
        hub.park(0)
        seen.append("killer")

    hub.start(victim)
    hub.start(killer)
    finish(hub)
    assert sorted(seen) == ["killer", "victim"]


def test_drain_returns_at_its_deadline(hub: Any) -> None:
    tasks = []

    def task() -> None:
        tasks.append(hub.this())
        hub.park()

    hub.start(task)
    assert hub.drain(0.02) is False
    assert hub.active == 1
    hub.wake(tasks[0])
    assert hub.drain(LIMIT) is True
    assert hub.drain() is True


def test_the_end_frees_greenlets_and_descriptors(impl: str) -> None:
    def count() -> int:
        gc.collect()
        return sum(isinstance(found, greenlet.greenlet) for found in gc.get_objects())

    _backend.hub()
    before, descriptors = count(), open_descriptors()
    for number in (20, 600):  # more than are kept
        with running() as hub:
            for _ in range(number):
                hub.start(hub.park, 0.01)
            finish(hub)
            assert open_descriptors() > descriptors
        assert count() <= before + 1
    assert open_descriptors() == descriptors


def test_a_deadline_that_has_not_come_keeps_nothing_alive_after_the_end(impl: str) -> None:
    class Request:
        """What a task holds."""

    def handle(request: Request, connection: socket.socket) -> None:
        assert connection.recv(1) == b"x"

    kept = []
    for _ in range(3):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.settimeout(LIMIT * 100)
            with running() as hub:
                _backend.green().adopt(ours)
                request = Request()
                hub.server = request  # as a server, which the hub knows
                hub.start(handle, request, ours)
                theirs.sendall(b"x")
                finish(hub)
            kept.append(weakref.ref(request))
        del hub, request
    gc.collect()
    assert [reference() for reference in kept] == [None, None, None]


# Errors and signals


@pytest.mark.parametrize("raised", [SystemExit, KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("at_once", [True, False])
def test_what_comes_out_of_a_task_is_raised_by_the_root(hub: Any, raised: type[BaseException], at_once: bool) -> None:
    def task() -> None:
        if not at_once:
            hub.park(0.01)
        raise raised

    if at_once:
        with pytest.raises(raised):
            hub.start(task)
    else:
        hub.start(task)
        with pytest.raises(raised):
            hub.wait(LIMIT)
    assert hub.active == 0
    finish(hub)


def test_an_error_of_a_signal_handler_is_raised_by_the_root_and_leaves_tasks_alone(
    hub: Any, pair: tuple[Any, Any]
) -> None:
    connection, peer = pair
    seen: list[Any] = []
    raised = threading.Event()

    def handle(*_: object) -> None:
        if not raised.is_set():
            raised.set()
            raise KeyboardInterrupt

    def task() -> None:
        try:
            seen.append(connection.recv(10))
        except BaseException as error:
            seen.append(error)

    def interrupt() -> None:
        main = threading.main_thread().ident
        assert main is not None
        while not raised.wait(0.01):
            if hub.idle:
                signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handle)
    thread = threading.Thread(target=interrupt)
    try:
        hub.start(task)
        with pytest.raises(KeyboardInterrupt):
            thread.start()
            while True:
                hub.wait(LIMIT)
    finally:
        raised.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)
    assert hub.active == 1 and seen == []
    peer.sendall(b"data")
    finish(hub)
    assert seen == [b"data"]


def test_signal_handlers_run_while_all_wait(hub: Any) -> None:
    handled = threading.Event()

    def interrupt() -> None:
        main = threading.main_thread().ident
        assert main is not None
        while not handled.wait(0.01):
            signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda *_: (handled.set(), hub.wake(hub.root)))
    thread = threading.Thread(target=interrupt)
    try:
        hub.start(hub.park, 0.2)
        thread.start()
        while not handled.is_set():
            hub.park(LIMIT)
    finally:
        handled.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)
    finish(hub)


def test_a_descriptor_that_the_kernel_does_not_watch_is_an_error_and_nothing_else(hub: Any, tmp_path: Any) -> None:
    if not hasattr(os, "eventfd"):
        pytest.skip("where files can be waited for")
    seen = []
    file = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    with _backend.green().Connection() as connection:
        fd = connection.fileno()
        os.dup2(file, fd)
        os.close(file)
        with pytest.raises(PermissionError):
            hub.register(fd)

        def task() -> None:
            for _ in range(2):
                try:
                    hub.wait_io(connection, fd, False, None)
                except OSError as error:
                    seen.append(type(error))
            seen.append(hub.park(0.001))

        hub.start(task)
        finish(hub)
    assert seen == [PermissionError, PermissionError, False]


# Fork


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_that_a_task_has_forked_ends_with_its_task(hub: Any, pair: tuple[Any, Any]) -> None:
    connection, peer = pair
    children: list[int] = []
    other, other_end = socket.socketpair()
    hub.register(other.fileno())

    def task() -> None:
        pid = os.fork()
        if pid:
            children.append(pid)
            return
        try:  # a waiting child waits as a program without a hub
            assert _waiting.running() is None and hub.stale
            connection.sendall(connection.recv(10).upper())
            hub.close()
            hub.end()
            with pytest.raises(RuntimeError):
                hub.park(0)
        except BaseException:
            os._exit(1)

    staying: list[Any] = []

    def stays() -> None:
        staying.append(hub.this())
        hub.park(LIMIT)

    hub.start(stays)
    hub.start(task)
    peer.sendall(b"data")
    assert peer.recv(10) == b"DATA"
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0]
    assert not hub.stale
    other_end.sendall(b"x")
    assert hub.wait(LIMIT) == [other.fileno()]
    assert hub.active == 1
    hub.wake(staying[0])
    finish(hub)
    hub.unregister(other.fileno())
    other.close()
    other_end.close()
