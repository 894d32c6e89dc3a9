"""The counters of a server, in memory that its processes share: what is behind ``stats``.

There is a row of 64-bit cells for each process that serves. Its process alone writes to it, with a lock for its
threads; the children that it forks for requests have cells of their own in the row, and a lock between processes. Who
reads takes no lock. A counter is never set back: the row of a worker that has ended goes on with its successor.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from fastserve._loop import STATE, Loop, State
from fastserve._stdlib import FORKING
from fastserve.tls import FAILED_HANDSHAKE

if TYPE_CHECKING:
    from io import FileIO

    from fastserve.workers._supervisor import Supervisor

# Why a connection was closed without a handler, and why one was cut off whose handler ran.
REFUSED: Final = ("verify_request", "max_connections_per_client", "proxy_header", "tls_handshake")
TIMED_OUT: Final = ("request_timeout", "idle_timeout")

# The first one is that which begin() counts.
COUNTERS: Final = ("accepted", "handled", "errors", "bytes_received", "bytes_sent", *REFUSED, *TIMED_OUT)
_CELL: Final = {name: cell for cell, name in enumerate(COUNTERS)}

# The cells of a row: the counters of the process, those of its children, and then these.
_CHILDREN: Final = len(COUNTERS)
_PID: Final = 2 * len(COUNTERS)  # 0: nobody has the row
_PLACE: Final = _PID + 1  # of the worker, and 1 more; 0 in the first row, which is no worker's, and in unused ones
_ACTIVE: Final = _PID + 2
_QUEUED: Final = _PID + 3
_ASKED: Final = _PID + 4  # time.monotonic_ns() when the loop was asked to come round; 0: it is not awaited
_DELAY: Final = _PID + 5  # nanoseconds that it took the last time, and 1 more; 0: it has not come round yet

_CELLS: Final = 32  # of a row, 256 bytes
ROWS: Final = 4096  # pages that are not used take no memory


class Row(NamedTuple):
    """What a row says at a moment."""

    place: int | None  # of the worker, ``None`` in the first row
    pid: int  # of the process that has it, or 0
    counters: dict[str, int]
    active: int
    queued: int
    delay: float | None  # seconds


class _Connection(weakref.ref[Any]):
    """A request that has begun and was not closed: one that a handler has taken over is forgotten with its object."""

    __slots__ = ("key", "refused")
    key: int
    refused: bool


class _Datagram:
    """Likewise, one to which there can be no such reference. It is always closed."""

    __slots__ = ("key", "refused")
    key: int
    refused: bool


class Meter:
    """The counters of a server, and of the workers that it forks. Any thread may call its methods."""

    def __init__(self, server: Any) -> None:
        self._server = weakref.ref(server)
        self.forks = isinstance(server, FORKING)
        self.supervisor: Supervisor | None = None  # of the workers, in their parent while it serves
        # Between the children: a lock is released by the kernel when its process dies.
        self._file: FileIO | None = _new_file() if self.forks else None
        self.has_bytes = _has_bytes(server)
        self._asked: Loop | None = None
        self._requests: dict[int, _Connection | _Datagram] = {}  # those that are active, by their identity
        self._cells = _new_cells()
        self.use(0)

    def use(self, row: int) -> None:
        """Count in a row from now on: in this process, which nobody else of the family does."""
        self._row = row
        self._base = row * _CELLS
        self._pid = os.getpid()
        # A signal handler may ask for the counts while the thread that it interrupts has it.
        self._lock = threading.RLock()
        self._requests.clear()
        self._asked = None
        self.supervisor = None
        self._cells[self._base + _PID] = self._pid

    def close(self) -> None:
        """Release the descriptor, if there is one. What was counted can be read still."""
        if self._file is not None and os.getpid() == self._pid:
            self._file.close()

    # Counting.

    def add(self, *counts: tuple[str, int]) -> None:
        """Add to counters."""
        if os.getpid() == self._pid:
            with self._lock:
                for name, amount in counts:
                    self._cells[self._base + _CELL[name]] += amount
        elif self._file is not None and not self._file.closed:
            self._add_in_child(self._file.fileno(), counts)

    def _add_in_child(self, fd: int, counts: tuple[tuple[str, int], ...]) -> None:
        """Add to the counters of the children: one at a time, whichever process it is. Each row has its byte."""
        import fcntl

        fcntl.lockf(fd, fcntl.LOCK_EX, 1, self._row)
        try:
            for name, amount in counts:
                self._cells[self._base + _CHILDREN + _CELL[name]] += amount
        finally:
            fcntl.lockf(fd, fcntl.LOCK_UN, 1, self._row)

    def begin(self, request: Any, *counts: tuple[str, int]) -> None:
        """Count a request that was accepted."""
        if os.getpid() != self._pid:
            # A child that accepts for itself, such as a daemon that was forked after the server was made.
            self._cells = _new_cells()
            self.use(0)
        begun: _Connection | _Datagram
        try:
            begun = _Connection(request, self._forget)
        except TypeError:
            begun = _Datagram()
        begun.key = id(request)
        begun.refused = False
        self._requests[begun.key] = begun
        cells, base = self._cells, self._base
        with self._lock:
            cells[base] += 1
            for name, amount in counts:
                cells[base + _CELL[name]] += amount
            cells[base + _ACTIVE] = self._active()

    def _forget(self, begun: weakref.ref[Any]) -> None:
        if isinstance(begun, _Connection):
            self._requests.pop(begun.key, None)

    def refuse(self, request: Any, reason: str) -> None:
        """Count a request that gets no handler, with the first reason that is told."""
        begun = self._requests.get(id(request))
        if begun is not None and not begun.refused:
            begun.refused = True
            self.add((reason, 1))

    def is_refused(self, request: Any) -> bool:
        """Return whether a request gets no handler. That its handshake has failed is noted here."""
        if FAILED_HANDSHAKE in getattr(request, "__dict__", ()):
            self.refuse(request, "tls_handshake")
        begun = self._requests.get(id(request))
        return begun is not None and begun.refused

    def end(self, request: Any) -> None:
        """Count a request as active no longer."""
        self.is_refused(request)
        self._requests.pop(id(request), None)
        self._publish_active()

    def _publish_active(self) -> None:
        """Tell the family how many requests are active."""
        if os.getpid() == self._pid:
            with self._lock:
                self._cells[self._base + _ACTIVE] = self._active()

    def _active(self) -> int:
        if self.forks:
            return len(getattr(self._server(), "active_children", None) or ())
        return len(self._requests)

    def collected(self) -> None:
        """Note that children of this process have ended."""
        self._publish_active()

    # The loop.

    def ask(self) -> None:
        """Have the loops come round and tell how late they were, without waiting for it."""
        if self.supervisor is not None:
            self.supervisor.ask()
            return
        if os.getpid() != self._pid:
            return
        loops = tuple(State.of(self._server()).loops)
        loop = next((loop for loop in loops if isinstance(loop, Loop)), None)
        if loop is not self._asked:
            self._cells[self._base + _ASKED] = self._cells[self._base + _DELAY] = 0
            self._asked = loop
        if loop is not None and self.awaits(self._row):
            loop.call(self.came_round)

    def awaits(self, row: int) -> bool:
        """Note that the loop of a row was asked, and return ``True``; ``False`` if it is awaited already."""
        if self._cells[row * _CELLS + _ASKED]:
            return False
        self._cells[row * _CELLS + _ASKED] = time.monotonic_ns()
        return True

    def came_round(self) -> None:
        """Note that the loop has come round. Its thread calls it."""
        asked = self._cells[self._base + _ASKED]
        if asked:
            self._cells[self._base + _DELAY] = time.monotonic_ns() - asked + 1
            self._cells[self._base + _ASKED] = 0
        self._publish_queue()

    def _publish_queue(self) -> None:
        if os.getpid() == self._pid:
            self._cells[self._base + _QUEUED] = queued(self._server())

    # The workers. Their parent calls these methods.

    def take(self, place: int) -> int:
        """Return a row for a worker that is to be started: that of one which has ended, or an unused one.

        Raises ``OSError`` if there is none.
        """
        for row in range(1, ROWS):
            owner = self._cells[row * _CELLS + _PLACE]
            if owner == 0:
                self._cells[row * _CELLS + _PLACE] = place + 1
            elif owner != place + 1 or self._cells[row * _CELLS + _PID]:
                continue
            return row
        raise OSError(errno.ENOSPC, f"there are {ROWS} processes whose requests are counted")

    def started(self, row: int, pid: int) -> None:
        """Note which process has a row."""
        self._cells[row * _CELLS + _PID] = pid

    def ends(self, row: int) -> None:
        """Note that the loop of a worker goes round no more: it is to end."""
        self._cells[row * _CELLS + _ASKED] = 0

    def ended(self, row: int) -> None:
        """Note that a worker has ended. What it has counted stays."""
        for cell in (_PID, _ACTIVE, _QUEUED, _ASKED, _DELAY):
            self._cells[row * _CELLS + cell] = 0

    # Reading.

    def read(self) -> Iterator[Row]:
        """Yield what each row says, beginning with the first, which is no worker's."""
        self._publish_active()
        self._publish_queue()
        now = time.monotonic_ns()
        for row in range(len(self._cells) // _CELLS):
            cells = self._cells[row * _CELLS : (row + 1) * _CELLS]
            if row and not cells[_PLACE]:
                return
            delay = cells[_DELAY] - 1 if cells[_DELAY] else None
            if asked := cells[_ASKED]:
                delay = max(delay or 0, now - asked)
            yield Row(
                place=cells[_PLACE] - 1 if row else None,
                pid=cells[_PID],
                counters={name: cells[cell] + cells[_CHILDREN + cell] for name, cell in _CELL.items()},
                active=cells[_ACTIVE],
                queued=cells[_QUEUED],
                delay=None if delay is None else delay / 1e9,
            )


def _has_bytes(server: Any) -> bool:
    """Return whether the kernel counts the bytes of the connections of a server."""
    return (
        sys.platform == "linux"
        and getattr(server, "socket_type", None) == socket.SOCK_STREAM
        and getattr(server, "address_family", None) in (socket.AF_INET, socket.AF_INET6)
    )


def _new_cells() -> memoryview:
    return memoryview(mmap.mmap(-1, _CELLS * 8 * ROWS)).cast("Q")


def _new_file() -> FileIO:
    """Return a file without a name, for locks."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("fastserve"), "r+b", buffering=0)
    import tempfile

    return tempfile.TemporaryFile(buffering=0)


def meter_of(server: Any) -> Meter:
    """Return the counters of a server, made now if there are none."""
    state = State.of(server)
    meter: Meter | None = state.meter
    if meter is None:
        meter = state.meter = Meter(server)
    return meter


def queued(server: Any) -> int:
    """Return how many requests of a server wait in this process: see ``WorkerStats``."""
    attributes = getattr(server, "__dict__", {})
    count = 0
    pool = attributes.get("_fastserve_pool")
    if pool is not None:
        count += pool.queued()
    state: State | None = attributes.get(STATE)
    if state is not None:
        count += sum(hub.pending() for hub in list(state.hubs))
        if state.datagrams is not None:
            count += len(state.datagrams.kept)
    return count
