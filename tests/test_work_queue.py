"""The queue of a pool: our own in C, and the stdlib's, which takes its place without the extensions."""

from __future__ import annotations

import gc
import importlib
import queue
import threading
import weakref
from typing import Any

import pytest

from conftest import NO_EXTENSIONS
from support import wait_until

CLASSES = [queue.SimpleQueue]
if not NO_EXTENSIONS:
    CLASSES.append(importlib.import_module("fastserve._threads").WorkQueue)


@pytest.fixture(params=CLASSES, ids=lambda cls: cls.__name__)
def work(request: pytest.FixtureRequest) -> Any:
    return request.param()


def in_threads(count: int, target: Any, *args: Any) -> list[threading.Thread]:
    threads = [threading.Thread(target=target, args=args) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def test_items_come_in_their_order(work: Any) -> None:
    for item in (1, None, "three"):
        work.put(item)
    assert (work.empty(), work.qsize()) == (False, 3)
    assert [work.get(), work.get(False), work.get_nowait()] == [1, None, "three"]
    assert (work.empty(), work.qsize()) == (True, 0)


def test_an_empty_queue_raises_to_those_who_must_not_wait(work: Any) -> None:
    for get in (work.get_nowait, lambda: work.get(False)):
        with pytest.raises(queue.Empty):
            get()


def test_every_item_of_a_burst_finds_a_thread_while_others_are_busy(work: Any) -> None:
    """Each thread waits for all others to have taken an item: none may be left asleep beside an item."""
    count = 8
    for _ in range(20):
        barrier = threading.Barrier(count, timeout=60)
        threads = in_threads(count, lambda barrier=barrier: (work.get(), barrier.wait()))
        for item in range(count):
            work.put(item)
        for thread in threads:
            thread.join(60)
        assert not barrier.broken and work.empty()


def test_an_item_that_comes_while_a_woken_thread_is_busy_wakes_another_one(work: Any) -> None:
    taken: list[int] = []
    gates = [threading.Event() for _ in range(4)]

    def take() -> None:
        item = work.get()
        taken.append(item)
        gates[item].wait(60)

    threads = in_threads(len(gates), take)
    for item in range(len(gates)):
        work.put(item)
        wait_until(lambda item=item: item in taken)  # although all before are still busy
    for gate in gates:
        gate.set()
    for thread in threads:
        thread.join(60)
    assert taken == [0, 1, 2, 3]


def test_no_item_is_lost_or_given_twice(work: Any) -> None:
    taken: list[int] = []

    def put(numbers: range) -> None:
        for number in numbers:
            work.put(number)

    def take() -> None:
        while (number := work.get()) is not None:
            taken.append(number)

    takers = in_threads(6, take)
    for thread in [*in_threads(1, put, range(2000)), *in_threads(1, put, range(2000, 4000))]:
        thread.join(60)
    for _ in takers:
        work.put(None)
    for thread in takers:
        thread.join(60)
    assert sorted(taken) == list(range(4000)) and work.empty()


def test_items_that_nobody_has_taken_go_with_the_queue() -> None:
    class Item:
        pass

    for cls in CLASSES:
        work, item = cls(), Item()
        item.work = work  # type: ignore[attr-defined]
        seen = weakref.ref(item)
        work.put(item)
        del work, item
        gc.collect()
        assert seen() is None
