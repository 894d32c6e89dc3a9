"""The greenlet hub: the contract of ``_hub`` and its Python twin."""

from __future__ import annotations

import _socket
import contextlib
import contextvars
import gc
import os
import random
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

greenlet = pytest.importorskip("greenlet")

from fastserve import _backend, _waiting  # noqa: E402
from support import LIMIT, open_descriptors, wait_until  # noqa: E402


@contextlib.contextmanager
def running(module: ModuleType | None = None) -> Iterator[Any]:
    """Run a hub in the calling thread; end its tasks at the end of the block."""
    hub = (module or _backend.hub()).Hub()
    hub.enter()
    try:
        yield hub
    finally:
        hub.kill()
        assert hub.drain(LIMIT)
        hub.leave()
        hub.end()


@pytest.fixture
def hub(impl: str) -> Iterator[Any]:
    with running() as hub:
        yield hub


@pytest.fixture
def pair(impl: str) -> Iterator[tuple[Any, Any]]:
    """A connection that waits in the hub, and its peer, which does not."""
    peer, other = socket.socketpair()
    connection = _backend.green().Connection(other.family, other.type, other.proto, other.detach())
    peer.settimeout(LIMIT)
    with peer, connection:
        yield connection, peer


def finish(hub: Any) -> None:
    assert hub.drain(LIMIT), "the tasks have not ended"


# Turns


def test_a_task_begins_at_once_and_its_starter_goes_on_when_it_waits(hub: Any) -> None:
    seen: list[Any] = []

    def task(name: str) -> None:
        seen.append((name, "begins"))
        hub.park(0)
        seen.append((name, "ends"))

    for name in "ab":
        hub.start(task, name)
        seen.append((name, "waits"))
    assert hub.active == 2
    finish(hub)
    begun = [("a", "begins"), ("a", "waits"), ("b", "begins"), ("b", "waits")]
    assert seen == [*begun, ("a", "ends"), ("b", "ends")]
    assert hub.active == 0


def test_spawned_tasks_begin_in_their_order_after_the_spawner(hub: Any) -> None:
    seen: list[int] = []
    for i in range(200):
        hub.spawn(seen.append, i)
    assert seen == []
    finish(hub)
    assert seen == list(range(200))


def test_a_task_starts_others(hub: Any) -> None:
    seen: list[str] = []

    def outer() -> None:
        hub.start(inner, "inner")
        hub.start(inner, "another")
        seen.append("outer")

    def inner(name: str) -> None:
        seen.append(name)

    hub.start(outer)
    finish(hub)
    assert sorted(seen) == ["another", "inner", "outer"]


def test_those_that_are_always_ready_leave_their_turn_to_others(hub: Any, pair: tuple[Any, Any]) -> None:
    connection, peer = pair
    seen: list[str] = []

    def busy() -> None:
        while len(seen) < 3:
            hub.wake(hub.this())
            hub.park()

    def timed() -> None:
        hub.park(0.01)
        seen.append("timer")

    def reading() -> None:
        seen.append(connection.recv(10).decode())

    a, b = socket.socketpair()
    with a, b:
        b.sendall(b"x")
        hub.spawn(busy)
        hub.spawn(busy)
        hub.start(timed)
        hub.start(reading)
        hub.register(a.fileno())
        assert hub.wait(LIMIT) == [a.fileno()]
        seen.append("root")
        peer.sendall(b"data")
        finish(hub)
        hub.unregister(a.fileno())
    assert sorted(seen) == ["data", "root", "timer"]


def test_a_connection_that_never_has_to_wait_leaves_others_their_turn(hub: Any, pair: tuple[Any, Any]) -> None:
    connection, peer = pair
    peer.sendall(bytes(10000))
    turns = []
    received = 0

    def greedy() -> None:
        nonlocal received
        while received < 10000:
            received += len(connection.recv(1))

    def other() -> None:
        while received < 10000:
            turns.append(received)
            hub.park(0)

    hub.start(other)
    hub.start(greedy)
    finish(hub)
    assert len(turns) > 20


def test_the_hub_counts_and_names_what_it_does(hub: Any) -> None:
    seen: list[Any] = []

    def task(*arguments: Any) -> None:
        seen.append((hub.active, hub.arguments(), hub.idle))
        hub.park(0.01)

    before = hub.progress
    assert hub.arguments() is None
    hub.start(task, "a", 1)
    assert seen == [(1, ("a", 1), False)]
    assert hub.arguments() is None and hub.progress > before
    finish(hub)
    assert hub.owner == threading.get_ident()


def test_a_watcher_is_told_once_that_the_hub_goes_on(hub: Any) -> None:
    told = []

    class Watcher:
        def set(self) -> None:
            told.append(hub.idle)

    hub.watch(Watcher())
    hub.park(0.01)
    hub.park(0.01)
    assert told == [False]


def test_each_task_has_an_empty_context_of_its_own(hub: Any) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    seen = []

    def task(value: str) -> None:
        seen.append(variable.get())
        variable.set(value)
        hub.park(0)
        seen.append(variable.get())

    variable.set("root's")
    hub.start(task, "a")
    hub.start(task, "b")
    finish(hub)
    hub.start(task, "c")  # in a greenlet that is used again
    finish(hub)
    assert seen == ["unset", "unset", "a", "b", "unset", "c"]
    assert variable.get() == "root's"


def test_tasks_that_begin_one_after_the_other_nest_in_no_other(hub: Any) -> None:
    depths: list[int] = []

    def depth_left() -> int:
        try:
            return 1 + depth_left()
        except RecursionError:
            return 0

    def task(left: int) -> None:
        if left:
            hub.spawn(task, left - 1)
        if left % 100 == 0:
            depths.append(depth_left())
        hub.park()

    hub.start(task, 1000)
    while hub.active < 1001:
        hub.park(0.001)
    hub.kill()
    finish(hub)
    assert len(depths) == 11 and max(depths) - min(depths) < 50


# Timers


def test_a_wait_ends_at_its_deadline_and_not_before(hub: Any) -> None:
    for seconds in (0, 0.001, 0.02):
        before = time.monotonic()
        assert hub.park(seconds) is False
        assert time.monotonic() - before >= seconds
    assert hub.park(-1) is False


def test_ten_thousand_timers_fire_in_their_order(hub: Any) -> None:
    choose = random.Random(1)
    fired: list[float] = []

    def task(deadline: float) -> None:
        left = deadline - time.monotonic()
        if left > 0:
            assert hub.park(left) is False
        assert time.monotonic() >= deadline - 1e-6
        fired.append(deadline)

    for head_start in (0.5, 2.0, 8.0):  # seconds in which all of them come to wait, on a slow machine
        fired.clear()
        base = time.monotonic() + head_start
        deadlines = [base + choose.choice([0.0, 0.05, choose.random() / 5]) for _ in range(10_000)]
        for deadline in deadlines:
            hub.start(task, deadline)
        in_time = time.monotonic() < base
        finish(hub)
        assert len(fired) == len(deadlines)
        if in_time:
            break
    # One that is held up between two looks at the clock, as by the collection of garbage, waits a little longer.
    assert sum(a > b + 0.01 for a, b in zip(fired, fired[1:], strict=False)) < len(fired) / 100


def test_timers_of_one_instant_fire_together(hub: Any) -> None:
    fired: list[int] = []

    def task(number: int) -> None:
        hub.park(0.02)
        fired.append(number)

    for number in range(100):
        hub.start(task, number)
    finish(hub)
    assert sorted(fired) == list(range(100))


def test_a_task_may_wait_shorter_and_longer_than_before(hub: Any) -> None:
    seen: list[Any] = []

    def task() -> None:
        for seconds in (LIMIT, 0.01, LIMIT, 0.005, None, 0.02):
            before = time.monotonic()
            woken = hub.park(seconds)
            if not woken:
                assert time.monotonic() - before >= seconds
            seen.append((seconds, woken))

    tasks = []
    hub.start(lambda: (tasks.append(hub.this()), task()))
    for expected in (1, 3, 5):
        hub.wake(tasks[0])
        deadline = time.monotonic() + LIMIT
        while len(seen) < (expected + 1 if expected != 5 else 6) and time.monotonic() < deadline:
            hub.park(0.001)
    finish(hub)
    assert seen == [(LIMIT, True), (0.01, False), (LIMIT, True), (0.005, False), (None, True), (0.02, False)]


def test_what_comes_in_time_is_no_timeout_even_if_its_turn_comes_late(hub: Any) -> None:
    seen = []
    tasks = []

    def task() -> None:
        tasks.append(hub.this())
        seen.append(hub.park(0.01))

    hub.start(task)
    hub.wake(tasks[0])
    time.sleep(0.03)  # the deadline passes while the loop is held up
    finish(hub)
    assert seen == [True]


# Other threads


def test_any_thread_wakes_tasks(hub: Any) -> None:
    rounds, count = 200, 8
    turns = [0] * count

    def task(number: int) -> None:
        me = hub.this()
        for _ in range(rounds):
            answered = threading.Event()
            requests[number].append((me, answered))
            posted[number].release()
            while not answered.is_set():
                hub.park()
            turns[number] += 1

    requests: list[list[Any]] = [[] for _ in range(count)]
    posted = [threading.Semaphore(0) for _ in range(count)]

    def answer(number: int) -> None:
        for _ in range(rounds):
            posted[number].acquire()
            me, answered = requests[number].pop()
            answered.set()
            hub.post(me)

    threads = [threading.Thread(target=answer, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for number in range(count):
        hub.start(task, number)
    finish(hub)
    for thread in threads:
        thread.join()
    assert turns == [rounds] * count


def test_a_post_ends_a_wait_in_the_kernel(hub: Any) -> None:
    def post() -> None:
        wait_until(lambda: hub.idle)
        hub.post(hub.root)

    thread = threading.Thread(target=post)
    thread.start()
    assert hub.park(LIMIT) is True
    thread.join()


def test_a_hub_runs_in_its_own_thread_alone_and_one_at_a_time(impl: str) -> None:
    module = _backend.hub()
    hub = module.Hub()
    other = module.Hub()
    errors = []

    def enter() -> None:
        try:
            hub.enter()
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert len(errors) == 1
    hub.enter()
    assert _waiting.running() is hub
    with pytest.raises(RuntimeError):
        other.enter()
    other.leave()
    assert _waiting.running() is hub
    hub.leave()
    assert _waiting.running() is None
    hub.end()
    other.end()
    other.end()


def test_two_hubs_run_in_two_threads(impl: str) -> None:
    left, right = socket.socketpair()
    rounds = 300
    failed: list[BaseException] = []
    ended = []

    def run(plain: socket.socket, first: bool) -> None:
        connection = _backend.green().Connection(plain.family, plain.type, plain.proto, plain.detach())

        def play() -> None:
            for i in range(rounds):
                if first:
                    connection.sendall(b"%d\n" % i)
                assert reader.readline() == b"%d\n" % i
                if not first:
                    connection.sendall(b"%d\n" % i)
            ended.append(first)

        try:
            with running() as hub, connection, connection.makefile("rb") as reader:
                hub.start(play)
                finish(hub)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(plain, plain is left)) for plain in (left, right)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert not failed and sorted(ended) == [False, True]


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


# The root's descriptors


def test_the_root_polls(hub: Any) -> None:
    a, b = socket.socketpair()
    with a, b:
        with pytest.raises(ValueError):
            hub.register(-1)
        hub.unregister(a.fileno())
        hub.register(a.fileno())
        with pytest.raises(OSError):
            hub.register(a.fileno())
        assert hub.wait(0) == []
        assert hub.wait(0.01) == []
        b.sendall(b"x")
        assert hub.wait(LIMIT) == [a.fileno()]
        assert hub.wait() == [a.fileno()]  # until it is read
        a.recv(1)
        assert hub.wait(0) == []
        b.close()
        assert hub.wait(LIMIT) == [a.fileno()]
        hub.unregister(a.fileno())
        assert hub.wait(0) == []
        hub.register(a.fileno())
        hub.close()
        assert hub.wait(0) == []


def test_what_became_ready_while_the_root_did_something_else_is_told_then_and_costs_nothing_until_then(
    hub: Any,
) -> None:
    a, b = socket.socketpair()
    with a, b:
        hub.register(a.fileno())
        b.sendall(b"x")
        hub.start(hub.park, 0.1)
        before = hub.progress
        finish(hub)
        assert hub.progress - before < 30, "the hub has spun"
        assert hub.wait(LIMIT) == [a.fileno()]
        hub.unregister(a.fileno())


def test_a_descriptor_that_was_ready_is_not_told_after_it_is_watched_no_more(hub: Any) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    fds = [a.fileno() for a, _ in pairs]

    def unregister() -> None:
        hub.unregister(fds[1])
        hub.unregister(fds[1])

    for (_, b), fd in zip(pairs, fds, strict=True):
        hub.register(fd)
        b.sendall(b"x")
    found = hub.wait(LIMIT)
    assert set(found) <= set(fds)
    hub.spawn(unregister)
    for _ in range(3):
        assert fds[0] in hub.wait(LIMIT) or hub.active
    assert hub.wait(LIMIT) == [fds[0]]
    hub.unregister(fds[0])
    for a, b in pairs:
        a.close()
        b.close()


# Descriptors of connections


def test_all_who_wait_for_one_connection_go_on(hub: Any, pair: tuple[Any, Any]) -> None:
    connection, peer = pair
    received: list[bytes] = []

    def read() -> None:
        while data := connection.recv(1):
            received.append(data)
            if len(received) == 30:
                break

    for _ in range(5):
        hub.start(read)
    for _ in range(30):
        peer.sendall(b"x")
        hub.park(0.0001)
    peer.shutdown(socket.SHUT_WR)
    finish(hub)
    assert len(received) == 30


def test_who_does_not_wait_for_a_connection_any_more_is_not_woken_by_it(hub: Any, pair: tuple[Any, Any]) -> None:
    connection, peer = pair
    tasks: list[Any] = []
    parked: list[Any] = []

    def reads() -> None:
        with contextlib.suppress(TimeoutError):
            hub.wait_io(connection, connection.fileno(), False, None)

    def other(deadline: float | None) -> None:
        tasks.append(hub.this())
        with contextlib.suppress(TimeoutError):
            hub.wait_io(connection, connection.fileno(), False, deadline)
        parked.append("parks")
        parked.append(hub.park(0.05))

    hub.start(reads)
    hub.start(other, None)
    hub.start(other, time.monotonic() + 0.001)
    hub.wake(tasks[0])
    while len(parked) < 2:
        hub.park(0.001)
    peer.sendall(b"x")
    finish(hub)
    assert parked == ["parks", "parks", False, False]


@pytest.mark.parametrize("by", ["a task", "a thread"])
@pytest.mark.parametrize("waiters", [1, 3])
def test_closing_ends_the_waits(hub: Any, pair: tuple[Any, Any], by: str, waiters: int) -> None:
    connection, _ = pair
    errors: list[Any] = []

    def read() -> None:
        try:
            connection.recv(10)
        except OSError as error:
            errors.append(error.errno)

    for _ in range(waiters):
        hub.start(read)
    if by == "a task":
        hub.start(connection.close)
        finish(hub)
    else:
        thread = threading.Thread(target=lambda: (wait_until(lambda: hub.idle), connection.close()))
        thread.start()
        finish(hub)
        thread.join()
    assert errors == [9] * waiters


def test_a_descriptor_that_is_used_again_is_another_one(hub: Any, impl: str) -> None:
    connections = _backend.green().Connection
    seen: list[Any] = []

    def new() -> tuple[Any, socket.socket]:
        other, peer = socket.socketpair()  # the first has the lowest free number
        return connections(other.family, other.type, other.proto, other.detach()), peer

    def read(connection: Any, name: str) -> None:
        try:
            seen.append((name, connection.recv(10)))
        except OSError as error:
            seen.append((name, error.errno))

    first, first_peer = new()
    number = socket.socket.fileno(first)
    kept = first.dup()  # the kernel goes on to report the first, under its number
    hub.start(read, first, "first")
    first.close()
    spare = []
    second, second_peer = new()
    while socket.socket.fileno(second) != number:
        spare.append((second, second_peer))
        second, second_peer = new()
        assert len(spare) < 100
    hub.start(read, second, "second")
    first_peer.sendall(b"for the first")
    hub.park(0.01)
    assert seen == [("first", 9)]
    second_peer.sendall(b"data")
    finish(hub)
    assert seen == [("first", 9), ("second", b"data")]
    for sock in (kept, first_peer, second, second_peer, *(s for two in spare for s in two)):
        sock.close()


def test_a_connection_that_was_never_closed_leaves_nothing_to_the_next_of_its_number(hub: Any, impl: str) -> None:
    for i in range(20):
        peer, other = socket.socketpair()
        plain = socket.socket(other.family, other.type, other.proto, other.detach())
        _backend.green().adopt(plain)
        received: list[bytes] = []
        hub.start(lambda found, into: into.append(found.recv(10)), plain, received)
        peer.sendall(b"%d" % i)
        finish(hub)
        assert received == [b"%d" % i]
        peer.close()
        os.close(_socket.socket.detach(plain))  # as a socket that is collected does


def test_the_number_of_a_closed_descriptor_of_the_root_may_be_a_connections(hub: Any) -> None:
    a, b = socket.socketpair()
    number = a.fileno()
    hub.register(number)
    a.close()
    other, peer = socket.socketpair()
    fd = other.detach()
    if fd != number:
        os.dup2(fd, number)
        os.close(fd)
    connection = _backend.green().Connection(socket.AF_UNIX, socket.SOCK_STREAM, 0, number)
    seen: list[bytes] = []

    def read() -> None:
        while data := connection.recv(10):
            seen.append(data)

    hub.start(read)
    hub.unregister(number)
    peer.sendall(b"data")
    wait_for = time.monotonic() + LIMIT
    while not seen and time.monotonic() < wait_for:
        hub.wait(0.01)
    assert seen == [b"data"]
    peer.close()
    finish(hub)
    connection.close()
    b.close()


# Greenlets that handlers make themselves


def test_greenlets_of_a_handler_wait_too(hub: Any, pair: tuple[Any, Any]) -> None:
    connection, peer = pair
    seen: list[Any] = []

    def inner() -> str:
        seen.append("inner")
        hub.park(0.01)
        seen.append(connection.recv(10))
        return "result"

    def task() -> None:
        seen.append(greenlet.greenlet(inner).switch())
        hub.park(0.001)
        seen.append("end")

    hub.start(task)
    peer.sendall(b"data")
    finish(hub)
    assert seen == ["inner", b"data", "result", "end"]


def test_a_handler_that_waits_in_a_greenlet_of_its_own_is_not_woken_there(hub: Any) -> None:
    seen: list[Any] = []
    tasks: list[Any] = []

    def inner() -> str:
        hub.park(0.02)
        return "result"

    def task() -> None:
        tasks.append(hub.this())
        seen.append(greenlet.greenlet(inner).switch())
        try:
            hub.park()
        except greenlet.GreenletExit:
            seen.append("killed")

    hub.start(task)
    hub.wake(tasks[0])
    hub.park(0.001)
    assert seen == []
    hub.kill()
    finish(hub)
    assert seen == ["result", "killed"]


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

    def stays() -> None:
        hub.park(0.3)

    hub.start(stays)
    hub.start(task)
    peer.sendall(b"data")
    assert peer.recv(10) == b"DATA"
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0]
    assert not hub.stale
    other_end.sendall(b"x")
    assert hub.wait(LIMIT) == [other.fileno()]
    assert hub.active == 1
    finish(hub)
    hub.unregister(other.fileno())
    other.close()
    other_end.close()


# Which hub


def test_greenlet_is_named_where_it_is_missing(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in ("greenlet", "fastserve._hub", "fastserve._hub_py"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "fastserve._hub_py")
    monkeypatch.setitem(sys.modules, "fastserve._hub", None)
    with pytest.raises(ImportError, match=r'pip install "fastserve\[greenlet\]"'):
        _backend.hub()


def test_a_process_that_gevent_has_patched_has_no_hub(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "monkey_patched", lambda: True)
    with pytest.raises(RuntimeError, match="ThreadingMixIn"):
        _backend.hub()


def test_a_python_without_the_gil_has_no_hub(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    with pytest.raises(RuntimeError, match="PYTHON_GIL=1"):
        _backend.hub()


def test_the_hub_is_that_of_the_implementation(impl: str) -> None:
    names = {"c": ("fastserve._hub", "fastserve._green"), "py": ("fastserve._hub_py", "fastserve._green_py")}
    assert (_backend.hub().__name__, _backend.green().__name__) == names[impl]
