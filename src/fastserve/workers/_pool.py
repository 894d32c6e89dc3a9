"""The threads of a pool, their queue, and whether there is a place for another request."""

from __future__ import annotations

import functools
import os
import queue
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeAlias

from fastserve import _backend, _uncaught, streams
from fastserve._loop import Loop
from fastserve._stdlib import socketserver

_std: Any = socketserver  # see server.py

_STDLIB_QUEUE: Any = queue.SimpleQueue

FEW: Final = 16  # ended threads that are kept at most, beside as many as run

# A request for a worker: the method that does the work, the request, the address of the client. It is a plain tuple,
# because one is made for every request.
Work: TypeAlias = tuple[Callable[[Any, Any], object], Any, Any]


class Limits(NamedTuple):
    """How large a pool may be: its threads, and the requests that wait for one."""

    workers: int
    queued: int


def default_workers() -> int:
    """Return the ``max_workers`` of ``concurrent.futures.ThreadPoolExecutor`` on this Python and machine."""
    count: Callable[[], int | None] = getattr(os, "process_cpu_count", os.cpu_count)  # from 3.13 on, and before
    return min(32, (count() or 1) + 4)


class Pool:
    """Threads that take their work from one queue. Any thread may call its methods.

    The way of a request takes no lock: a queue in C, and a count whose changes are atomic. A lock guards what is
    rare, the start and the end of a thread and the wait for a place.

    :param name: the beginning of the names of the threads.
    :param default_workers: how many there may be where nothing else is said; for others to ask.
    """

    _queue: queue.SimpleQueue[Work | None]

    def __init__(self, name: str, default_workers: int) -> None:
        self.default_workers = default_workers
        self.limits = Limits(0, 0)  # the last ones that were asked for, and what was asked
        self.asked: tuple[int | None, int] | None = None
        self._name = name
        self._ending = False
        self._begin()
        _register_hooks()
        with _lock:
            _pools.add(self)
            self._ending = _exiting

    def _begin(self) -> None:
        self._queue = _new_queue()
        # By the name of the module, at this time: gevent may have put its own there.
        self._lock = _std.threading.Lock()
        self._freed = _std.threading.Condition(self._lock)
        self._under_way: deque[None] = deque()  # an entry for each request that is queued or being handled
        self._count = 0  # workers
        self._started = 0  # workers that ever were, for their names
        self._threads: list[threading.Thread] = []
        # How many there may be until those that have ended are looked for: twice what was left the last time, so that
        # the cost of a new one does not grow with their number.
        self._reap_at = 0
        self._held: list[Loop] = []  # loops to be told of a free place
        self._waiting = 0  # threads to be told of a free place
        self._somebody_waits = False  # either of both

    def submit(self, work: Work, limits: Limits, daemon: bool) -> bool:
        """Queue ``work``, and start a worker for it if all are busy and there may be another. It never waits.

        Return whether the pool is full now.

        :param daemon: whether a worker that is started is a daemon.
        :raises RuntimeError: if there is no worker and none can be started. The work is not done then.
        """
        self._under_way.append(None)
        self._queue.put(work)
        if self._count < len(self._under_way) and self._count < limits.workers:
            self._grow(work, limits.workers, daemon)
        return self.is_full(limits)

    def _grow(self, work: Work, max_workers: int, daemon: bool) -> None:
        with self._lock:
            if self._count >= min(len(self._under_way), max_workers):
                return  # done in the meantime
            self._started += 1
            name = f"{self._name}-worker-{self._started}"
            thread = _std.threading.Thread(target=_work, args=(self,), name=name, daemon=daemon)
            if len(self._threads) >= self._reap_at:
                self._threads = [other for other in self._threads if other.is_alive()]
                self._reap_at = 2 * len(self._threads) + FEW
            self._threads.append(thread)
            self._count += 1
            try:
                thread.start()
            except Exception:
                self._count -= 1
                self._threads.remove(thread)
                # As long as there is a worker, the work waits for it. A worker that has ended may have done it.
                if not self._count and self._take_back(work):
                    raise

    def _take_back(self, work: Work) -> bool:
        """Remove ``work`` from the queue, and return whether it was there still."""
        others: list[Work | None] = []
        found = False
        try:
            while True:
                other = self._queue.get_nowait()
                if other is work:
                    found = True
                    self._under_way.pop()
                else:
                    others.append(other)
        except queue.Empty:
            for other in others:
                self._queue.put(other)
        return found

    def is_full(self, limits: Limits) -> bool:
        """Return whether all workers are busy, there may be no more of them, and the queue is full."""
        under_way = len(self._under_way)
        count = self._count
        if under_way < count:
            return False
        # More requests under way than workers, which are fewer than they may be: no thread could be started.
        return under_way >= count + limits.queued and (count >= limits.workers or under_way > count)

    def queued(self) -> int:
        """Return how many requests wait for a worker at this moment."""
        return max(len(self._under_way) - self._count, 0)

    def hold(self, loop: Loop) -> None:
        """Have ``loop``, that of the calling thread, take no request as long as the pool is full."""
        loop.hold()
        with self._lock:
            self._held.append(loop)
            self._somebody_waits = True
        self._tell()  # a place may have become free before anybody could know that it was waited for

    def wait_for_place(self, limits: Limits, timeout: float | None) -> bool:
        """Wait until the pool is not full, at most ``timeout`` seconds (``None``: endless); return whether it is so."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            self._waiting += 1
            self._somebody_waits = True
            try:
                while self.is_full(limits):
                    left = None if deadline is None else deadline - time.monotonic()
                    if left is not None and left <= 0:
                        return False
                    self._freed.wait(left)
                return True
            finally:
                self._waiting -= 1

    def done(self) -> None:
        """Note that a worker is done with a request."""
        self._under_way.pop()
        if self._somebody_waits:
            self._tell()

    def _tell(self) -> None:
        """Tell all who wait for a place, if there is one."""
        with self._lock:
            if self.is_full(self.limits):
                return
            for loop in self._held:
                loop.resume()
            self._held.clear()
            self._freed.notify_all()
            self._somebody_waits = self._waiting > 0

    def get(self, mine: queue.SimpleQueue[Work | None]) -> Work | None:
        """Wait for work; return ``None`` if the worker is to end. ``mine`` is the queue that it began with."""
        while mine is self._queue:  # else this is a forked child, whose pool knows nothing of this thread
            try:
                work = mine.get(not self._ending)
            except queue.Empty:
                work = None
            if work is not None:
                return work
            if self._may_end():
                return None
        return None

    def _may_end(self) -> bool:
        with self._lock:
            if not self._ending:
                return False
            # In this order: submit() fills the queue first, and counts the workers then.
            self._count -= 1
            if not self._queue.empty():
                self._count += 1
                return False
            if self._count:
                self._queue.put(None)  # for another one, which may be asleep
            return True

    def end(self) -> None:
        """Have the workers end when there is no work left. Work that comes later is done too."""
        self._ending = True
        self._queue.put(None)

    def threads(self) -> list[threading.Thread]:
        """Return the threads of the workers; some may have ended."""
        return self._threads.copy()

    def join(self) -> None:
        """Wait for the workers that are no daemons, after :meth:`end`. A worker that calls it does not wait."""
        threads = self.threads()
        if _std.threading.current_thread() in threads:
            return
        for thread in threads:
            if not thread.daemon:
                thread.join()

    def after_fork_in_child(self) -> None:
        """Start afresh: the workers are not in the child, and the queued requests are the parent's."""
        inherited = self._queue
        self._begin()
        while not inherited.empty():
            work = inherited.get_nowait()
            # The child's descriptor is another one for the same connection: closing it shuts nothing down, and keeping
            # it would keep the connection open after the parent has closed it.
            if work is not None and type(work[1]) in (socket.socket, streams.Connection):
                work[1].close()


def _new_queue() -> queue.SimpleQueue[Work | None]:
    """Return a queue: our own in C, unless gevent or eventlet have put theirs into :mod:`queue`."""
    if _backend.threads is not None and queue.SimpleQueue is _STDLIB_QUEUE and not _backend.monkey_patched():
        found: queue.SimpleQueue[Work | None] = _backend.threads.WorkQueue()
        return found
    return queue.SimpleQueue()


def _work(pool: Pool) -> None:
    """Do the work of ``pool`` until it ends: what a worker's thread runs."""
    mine = pool._queue
    while (work := pool.get(mine)) is not None:
        try:
            method, request, client_address = work
            method(request, client_address)
        except BaseException as error:
            _uncaught.report(error)
        del work, method, request, client_address  # an idle worker keeps neither a request nor the server
        if mine is not pool._queue:
            return  # a forked child
        pool.done()


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
_lock = threading.Lock()  # guards both
_exiting = False


def _before_exit() -> None:
    """Have idle workers end, which the interpreter would wait for, and others when their queue is empty."""
    global _exiting
    with _lock:
        _exiting = True
        pools = list(_pools)
    for pool in pools:
        pool.end()


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()
    for pool in list(_pools):
        pool.after_fork_in_child()


@functools.cache
def _register_hooks() -> None:
    """Be called at the end of the interpreter and after a fork: from the first pool on, as a hook costs each fork."""
    try:
        # It is called before the interpreter waits for the threads that are no daemons; atexit is too late.
        # concurrent.futures does the same.
        threading._register_atexit(_before_exit)  # type: ignore[attr-defined]
    except RuntimeError:
        _before_exit()  # the interpreter is ending already
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_after_fork_in_child)
