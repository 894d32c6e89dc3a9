"""The greenlet hub: the contract of ``_hub`` and its Python twin."""

from __future__ import annotations

import contextvars
import random
import socket
import threading
import time
from typing import Any

import pytest

greenlet = pytest.importorskip("greenlet")

from fastserve import _backend, _waiting  # noqa: E402
from hub_support import finish, running  # noqa: E402
from support import LIMIT, wait_until  # noqa: E402

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


@pytest.mark.parametrize("by", ["wake", "post"])
def test_who_wakes_a_task_that_has_ended_disturbs_nobody(hub: Any, by: str) -> None:
    ended: list[Any] = []
    for _ in range(3):
        hub.start(lambda: ended.append(hub.this()))  # its greenlet is kept for the next one
    for task in ended:
        getattr(hub, by)(task)
    hub.wait(0)
    seen: list[int] = []
    for i in range(5):
        hub.start(seen.append, i)
    finish(hub)
    assert seen == [0, 1, 2, 3, 4]
    for task in ended:
        getattr(hub, by)(task)
    hub.start(seen.append, 5)  # before it is the turn of those
    finish(hub)
    assert seen == [0, 1, 2, 3, 4, 5]


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
