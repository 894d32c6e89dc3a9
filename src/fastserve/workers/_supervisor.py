"""The parent of worker processes: it starts them, watches over them, and ends them.

Between it and each worker is a pair of sockets. The worker writes one byte for what it has to tell; the parent asks
with one byte whether the worker's loop still goes round. When one side is gone the other finds the end of the stream.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Final

from fastserve._loop import IS_SHUT_DOWN, SHUTDOWN_REQUEST, Loop, State, idle_timeout
from fastserve._stdlib import FORKING
from fastserve.tls_mixin import TLSMixIn
from fastserve.workers import _worker

FIRST_DELAY: Final = 0.1  # seconds until a worker is started again that ended before it was ready; doubled each time
LONGEST_DELAY: Final = 5.0  # seconds
CUT: Final = 1.0  # seconds that a worker has to end when it is to do so at once
AGAIN: Final = 0.5  # seconds until a worker is told again to end; doubled each time
KILLED: Final = float("inf")  # the deadline of a worker that was killed
NAP: Final = 0.02  # seconds between two looks at the workers, where the kernel does not tell of their end


class Worker:
    """What the parent knows of a worker."""

    def __init__(self, pid: int, place: int, control: socket.socket, replaces: Worker | None) -> None:
        self.pid = pid
        self.place = place  # from 0: which of the workers it is, or replaces
        self.control = control
        self.replaces = replaces
        self.ready = False
        self.retires = False  # it has handled max_requests
        self.heard = time.monotonic()  # when it was started, or told something last
        self.asked = False  # whether an answer is awaited
        self.row = 0  # in which it counts, if the server has a meter
        self.deadline: float | None = None  # time.monotonic() at which it is killed; it was told to end
        self.pause = AGAIN  # seconds until it is told again
        self.again: float | None = None  # time.monotonic() at which that is
        self.late = False  # it has not ended in time


class Supervisor:
    """The workers of one ``serve_forever``. The thread that calls it runs all methods.

    :param serve: what a worker runs: the ``serve_forever`` that follows that of the mix-in.
    """

    def __init__(self, server: Any, serve: Callable[[float], None], poll_interval: float) -> None:
        self.server = server
        self.workers: dict[int, Worker] = {}  # by process id
        self._serve = serve
        self._poll_interval = poll_interval
        self._loop = Loop(server)
        self._count = _worker.count_of(server)
        self.listeners: list[Any] = []  # one for each place, where they do not share one
        self._to_replace: deque[Worker] = deque()
        self._delay = 0.0  # seconds; above zero after a worker has ended before it was ready
        self._start_at = 0.0  # time.monotonic(): none is started before
        self._ends = False  # the whole server is to end
        self._replaces_all = False  # set by a signal handler
        self._grace: float | None = None  # seconds: set by drain()
        self.killed = 0  # workers that have not ended in time after drain()
        self._meter = State.of(server).meter
        self._workers_fork = isinstance(server, FORKING)
        self._asks = False  # set by any thread: the loops of the workers are to come round

    def run(self) -> None:
        """Serve until the server is shut down, or a signal comes."""
        server, loop = self.server, self._loop
        state = State.of(server)
        getattr(server, IS_SHUT_DOWN).clear()
        vars(server)[_worker.SUPERVISOR] = self
        # From here on shutdown() waits for this call.
        state.loops.append(loop)
        if self._meter is not None:
            self._meter.supervisor = self
        try:
            if not getattr(server, SHUTDOWN_REQUEST):
                loop.open()
                loop.hold()  # the workers take the requests
                if state.opened is not None:
                    state.opened(loop)
                self.listeners = _worker.listeners(server, self._count)
                with self._signals():
                    self._supervise()
        finally:
            setattr(server, SHUTDOWN_REQUEST, False)
            try:
                loop.close()
                _worker.close_listeners(server, self.listeners)
            finally:
                if self._meter is not None:
                    self._meter.supervisor = None
                vars(server).pop(_worker.SUPERVISOR, None)
                getattr(server, IS_SHUT_DOWN).set()
                state.loops.remove(loop)

    def _supervise(self) -> None:
        at_once = True
        try:
            while not (self._ends or self._loop.stopping or getattr(self.server, SHUTDOWN_REQUEST)):
                self._start_missing()
                self._loop.wait(self._timeout())
                self._look_after()
                self.server.service_actions()
            at_once = False
        finally:
            self._end_all(at_once)

    # Starting.

    def _start_missing(self) -> None:
        if self._replaces_all:
            self._replaces_all = False
            self._reload_certificates()
            self._to_replace.extend(worker for worker in self.workers.values() if worker not in self._to_replace)
        now = time.monotonic()
        taken = {worker.place for worker in self.workers.values() if worker.deadline is None}
        for place in range(self._count):
            if place not in taken and now >= self._start_at:
                self._start(place, None)
        starting = any(worker.replaces is not None and not worker.ready for worker in self.workers.values())
        while self._to_replace and not starting and now >= self._start_at:
            old = self._to_replace.popleft()
            if self.workers.get(old.pid) is old and old.deadline is None:
                self._start(old.place, old)
                starting = True

    def _reload_certificates(self) -> None:
        """Have those that are started from now on serve with the files of this moment: see ``TLSMixIn``."""
        if isinstance(self.server, TLSMixIn) and self.server.ssl_context is None:
            try:
                self.server.reload_certificates()
            except OSError as error:
                _say(f"the certificates were not loaded again, and stay what they were: {error}")

    def _start(self, place: int, replaces: Worker | None) -> None:
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            self._failed(f"cannot start a worker: {error}")
            return
        ours.setblocking(False)
        _worker.flush()
        # A signal must not come to the worker before it has its own handlers, nor here before the worker is known.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _worker.SIGNALS)
        try:
            row = 0 if self._meter is None else self._meter.take(place)
            pid = os.fork()
            if pid == 0:
                if self._meter is not None:
                    self._meter.use(row)
                # An end of the parent that is open anywhere would keep a worker from seeing that its parent is gone.
                parents = [ours, *(worker.control for worker in self.workers.values())]
                _worker.run(
                    self.server, self._serve, self._poll_interval, theirs, place, self.listeners, self._loop, parents,
                    mask,
                )  # fmt: skip
            theirs.close()
            worker = Worker(pid, place, ours, replaces)
            self.workers[pid] = worker
            if self._meter is not None:
                worker.row = row
                self._meter.started(row, pid)
            self._loop.watch_child(pid)
            self._loop.watch(ours.fileno(), lambda: self._hear(worker))
        except OSError as error:
            ours.close()
            theirs.close()
            self._failed(f"cannot start a worker: {error}")
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _failed(self, message: str) -> None:
        """Note that a worker could not serve, and wait longer each time until the next is started."""
        self._delay = min(self._delay * 2, LONGEST_DELAY) if self._delay else FIRST_DELAY
        self._start_at = time.monotonic() + self._delay
        _say(f"{message}; the next is started in {self._delay:.1f} s")

    # Watching.

    def _timeout(self) -> float | None:
        """Return how many seconds the loop may wait."""
        times = [at for worker in self.workers.values() for at in (worker.deadline, worker.again) if at is not None]
        if self._start_at > time.monotonic():
            times.append(self._start_at)
        patience: float | None = self.server.worker_timeout
        if patience is not None:
            times += [
                worker.heard + (patience if worker.asked or not worker.ready else patience / 2)
                for worker in self.workers.values()
                if worker.deadline is None
            ]
        found = idle_timeout(self.server, self._loop, self._poll_interval)
        if not self._loop.watches(set(self.workers)):
            found = NAP if found is None else min(found, NAP)
        left = min(times) - time.monotonic() if times else None
        if left is None:
            return found
        return max(left, 0.0) if found is None else max(min(left, found), 0.0)

    def _hear(self, worker: Worker) -> None:
        """Take what a worker has written."""
        try:
            told = worker.control.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            told = b""
        if not told:
            self._loop.unwatch(worker.control.fileno())  # it has ended, or is about to
            return
        worker.heard = time.monotonic()
        worker.asked = False
        if _worker.READY in told:
            worker.ready = True
            self._delay = 0.0
            if worker.replaces is not None:
                self._end(worker.replaces)
                worker.replaces = None
        if _worker.RETIRES in told and worker.deadline is None:
            worker.retires = True
            self._to_replace.append(worker)
        if _worker.SHUT_DOWN in told:
            self._ends = True  # a handler has called shutdown()

    def _look_after(self) -> None:
        """Collect the workers that have ended, ask the others, and kill those that do not answer."""
        for pid in list(self._loop.ended_children(set(self.workers))):
            self._collect(self.workers[pid])
        if self._asks:
            self._asks = False
            for worker in self.workers.values():
                if worker.ready and worker.deadline is None and self._meter.awaits(worker.row):
                    with contextlib.suppress(OSError):  # as below
                        worker.control.send(_worker.ASK)
        now = time.monotonic()
        patience: float | None = self.server.worker_timeout
        for worker in list(self.workers.values()):
            if worker.deadline is not None:
                if now >= worker.deadline:
                    self._cut_off(worker)
                elif worker.again is not None and now >= worker.again:
                    self._tell_to_end(worker)
            elif patience is not None:
                if (worker.asked or not worker.ready) and now >= worker.heard + patience:
                    _say(f"worker {worker.pid} has not answered for {patience:g} s, and is killed")
                    self._kill(worker)
                elif worker.ready and not worker.asked and now >= worker.heard + patience / 2:
                    worker.asked = True
                    worker.heard = now
                    with contextlib.suppress(OSError):  # full, so that it has not read for long; or it has ended
                        worker.control.send(_worker.ASK)

    def _collect(self, worker: Worker) -> None:
        """Take note of the end of a worker, if it has ended."""
        try:
            pid, status = os.waitpid(worker.pid, os.WNOHANG)
        except ChildProcessError:
            pid, status = worker.pid, 0  # somebody else has collected it, or nobody has to: SIGCHLD is ignored
        if not pid:
            return
        self._hear(worker)  # what it has told last
        del self.workers[worker.pid]
        self._note_end(worker)
        self._loop.unwatch(worker.control.fileno())
        worker.control.close()
        code = os.waitstatus_to_exitcode(status)
        if worker.deadline is not None or self._ends:
            return  # as it was told
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with status {code}"
        if worker.ready:
            _say(f"worker {worker.pid} {how}; another one takes its place")
        else:
            self._failed(f"worker {worker.pid} {how} before it was ready")
            if worker.replaces is not None:
                # What was to be replaced goes on; to replace what has handled its max_requests is tried again.
                self._to_replace = deque(old for old in (worker.replaces, *self._to_replace) if old.retires)

    def ask(self) -> None:
        """Have the loops of the workers come round, for the meter. Any thread may call it."""
        self._asks = True
        self._loop.wake()

    def _note_end(self, worker: Worker) -> None:
        if self._meter is not None:
            self._meter.ended(worker.row)

    # Ending.

    def _end(self, worker: Worker) -> None:
        """Have a worker end when it has handled its requests."""
        if worker.deadline is None and self.workers.get(worker.pid) is worker:
            worker.deadline = time.monotonic() + (self.server.graceful_timeout if self._grace is None else self._grace)
            if self._meter is not None:
                self._meter.ends(worker.row)
            self._tell_to_end(worker)

    def _tell_to_end(self, worker: Worker) -> None:
        """Send the signal, and again after a while, which grows.

        One that comes just before a call of the kernel does not interrupt it, and Python would see to it afterwards: a
        worker whose loop handles the requests would wait for its client.
        """
        _send(worker, signal.SIGTERM)
        worker.again = time.monotonic() + worker.pause
        worker.pause *= 2

    def drain(self, seconds: float) -> None:
        """Have workers that are to end do so in that time. Any thread may call it, and a signal handler."""
        self._grace = seconds if self._grace is None else min(self._grace, seconds)
        deadline = time.monotonic() + seconds
        for worker in list(self.workers.values()):
            if worker.deadline not in (None, KILLED):
                worker.deadline = min(worker.deadline, deadline)
        self._loop.wake()

    def _cut_off(self, worker: Worker) -> None:
        """Kill a worker that has not ended in time; one that forks is to do so itself, with its children."""
        if not worker.late:
            worker.late = True
            _say(f"worker {worker.pid} has not ended in time, and is killed")
            self.killed += self._ends
            if self._workers_fork:
                self._interrupt(worker)
                return
        self._kill(worker)

    def _interrupt(self, worker: Worker) -> None:
        worker.deadline = time.monotonic() + CUT
        worker.again = None
        _send(worker, signal.SIGINT)

    def _kill(self, worker: Worker) -> None:
        worker.deadline = KILLED
        worker.again = None
        _send(worker, signal.SIGKILL)

    def _end_all(self, at_once: bool) -> None:
        """End all workers, and wait for their end. Interrupted, it kills them."""
        self._ends = True
        try:
            for worker in self.workers.values():
                if at_once:
                    self._interrupt(worker)
                else:
                    self._end(worker)
            while self.workers:
                self._loop.wait(self._timeout())
                self._look_after()
                self.server.service_actions()
        finally:
            for worker in list(self.workers.values()):
                self._kill(worker)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(worker.pid, 0)
                worker.control.close()
                self._note_end(worker)
            self.workers.clear()

    # Signals.

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Handle SIGTERM and SIGHUP, unless the program does so, or this is not the main thread."""
        taken: dict[signal.Signals, Any] = {}
        try:
            if self.server.handle_signals:
                for number, handler in ((signal.SIGTERM, self._on_term), (signal.SIGHUP, self._on_hup)):
                    with contextlib.suppress(ValueError):  # not in the main thread
                        if signal.getsignal(number) is signal.SIG_DFL:
                            taken[number] = signal.signal(number, handler)
            yield
        finally:
            for number, before in taken.items():
                signal.signal(number, before)

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        if self._ends:
            raise SystemExit(128 + number)  # the second one: all is cut off
        self._ends = True

    def _on_hup(self, number: int, frame: FrameType | None) -> None:
        self._replaces_all = True


def _send(worker: Worker, number: int) -> None:
    # It has not been collected yet, so that its process id is nobody else's.
    with contextlib.suppress(ProcessLookupError):  # somebody else has
        os.kill(worker.pid, number)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _say(message: str) -> None:
    if sys.stderr is not None:
        print(f"fastserve: {message}", file=sys.stderr, flush=True)
