"""A worker process: the child's side of what ``_supervisor`` starts."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, Final, NoReturn

from fastserve._loop import IS_SHUT_DOWN, Loop, SelectorLoop, State
from fastserve.draining import REQUESTS, requests_of
from fastserve.workers.threadpool import POOL

# What the parent asks, and what a worker tells: one byte each.
ASK: Final = b"?"
ANSWER: Final = b"!"
READY: Final = b"r"  # its loop waits for requests
RETIRES: Final = b"m"  # it has handled max_requests
SHUT_DOWN: Final = b"s"  # a handler has called shutdown()

SIGNALS: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})  # that a worker handles in its own way

SUPERVISOR: Final = "_fastserve_supervisor"  # the key in the __dict__ of the server of a parent


def count_of(server: Any) -> int:
    """Return how many workers a server is to have. Raises ``ValueError``."""
    if server.workers is None:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return max(usable or 1, 1)
    if server.workers < 1:
        raise ValueError("workers must be greater than 0")
    return int(server.workers)


def listeners(server: Any, count: int) -> list[Any]:
    """Return a listener for each worker if they do not share one: the first is the server's, the others are made.

    Raises ``ValueError`` where they must share one, ``OSError`` if the address cannot be had once more.
    """
    if not server.reuse_port:
        return []
    if server.address_family not in (socket.AF_INET, socket.AF_INET6):
        raise ValueError("reuse_port is for IPv4 and IPv6 addresses")
    made = [server.socket]
    try:
        for _ in range(1, count):
            server.socket = socket.socket(server.address_family, server.socket_type)
            made.append(server.socket)
            server.server_bind()
            server.server_activate()
    except BaseException:
        server.socket = made[0]
        close_listeners(server, made)
        raise
    server.socket = made[0]
    return made


def close_listeners(server: Any, made: list[Any]) -> None:
    """Close the listeners but for the server's own."""
    for listener in made:
        if listener is not server.socket:
            listener.close()


class _Child:
    """The worker, as its loop and its signal handlers see it."""

    def __init__(self, server: Any, control: socket.socket) -> None:
        self._server = server
        self._control = control
        self.told = False  # whether the parent has told it to end, or is gone
        self._left = 0  # requests until it retires; 0: without limit

    def opened(self, loop: Loop | SelectorLoop) -> None:
        """Tell the parent that requests are waited for, and answer it from now on."""
        loop.watch(self._control.fileno(), lambda: self._hear(loop))
        self.tell(READY)

    def tell(self, what: bytes) -> None:
        with contextlib.suppress(OSError):  # the parent is gone, which is heard, or has not read for very long
            self._control.send(what)

    def _hear(self, loop: Loop | SelectorLoop) -> None:
        try:
            heard = self._control.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            heard = b""
        if heard:
            meter = State.of(self._server).meter
            if meter is not None:
                meter.came_round()
            self.tell(ANSWER)
        else:
            loop.unwatch(self._control.fileno())
            self.stop()

    def stop(self) -> None:
        """End the loop; requests that run are handled first. Whose clients are idle end now, if they may."""
        self.told = True
        requests = requests_of(self._server)
        requests.begin(self._server, None)
        requests.drive(self._server)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop()

    def count(self) -> None:
        """Count requests from now on, and tell the parent when there were ``max_requests``."""
        server = self._server
        if server.max_requests is None:
            return
        self._left = int(server.max_requests) + random.randint(0, int(server.max_requests_jitter))
        process_request = server.process_request

        def counted(request: Any, client_address: Any) -> None:
            self._left -= 1
            if self._left == 0:
                self.tell(RETIRES)
            process_request(request, client_address)

        server.process_request = counted


def run(
    server: Any,
    serve: Callable[[float], None],
    poll_interval: float,
    control: socket.socket,
    place: int,
    made: list[Any],
    parents_loop: Loop,
    parents: list[socket.socket],
    mask: set[int],
) -> NoReturn:
    """Serve in a forked child, and end the process: with status 0 when it was to end, 1 after an error.

    :param serve: the ``serve_forever`` that follows that of the mix-in.
    :param control: the worker's end of the pair of sockets.
    :param place: which of the workers it is, from 0.
    :param made: a listener for each place, or none where they share one.
    :param parents: ends of such pairs that are the parent's.
    :param mask: the signals that the parent blocks; :data:`SIGNALS` are blocked too, until the worker handles them.
    """
    status = 1
    try:
        for end in parents:
            end.close()
        parents_loop.abandon()
        control.setblocking(False)
        child = _Child(server, control)
        signal.signal(signal.SIGTERM, child.on_signal)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        state = State.of(server)
        state.loops.clear()
        state.opened = child.opened
        vars(server).pop(REQUESTS, None)  # those of the parent
        vars(server).pop(SUPERVISOR, None)
        # A worker that is to end is given the time to handle what runs, also where the end of a program is not.
        server.daemon_threads = False
        server.block_on_close = True
        _take_listener(server, place, made)
        child.count()
        server.worker_started(place)
        serve(poll_interval)
        if not child.told:
            child.tell(SHUT_DOWN)
        finish_requests(server)
        status = 0
    except KeyboardInterrupt:
        status = 0  # it was to end at once
        for pid in getattr(server, "active_children", None) or ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback  # which on Python 3.14 takes a quarter as long as all of the package

        traceback.print_exc()
    finally:
        flush()
        os._exit(status)


def flush() -> None:
    """Write what is buffered: a process that ends at once would lose it, and one that is forked write it again."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it
                stream.flush()


def _take_listener(server: Any, place: int, made: list[Any]) -> None:
    """Have the server use the listener of its place."""
    if made:
        server.socket = made[place]
        close_listeners(server, made)
        made_here: Any = getattr(server, IS_SHUT_DOWN, None)
        if hasattr(made_here, "made_in"):
            made_here.made_in = os.getpid()  # no other process receives from it
    elif server.socket.type == socket.SOCK_STREAM and server.socket.fileno() >= 0:
        # Of several workers one may have been faster: the others must not wait in accept().
        os.set_blocking(server.socket.fileno(), False)


def finish_requests(server: Any) -> None:
    """Wait for the requests that run, as ``server_close()`` does, which is for the parent to call."""
    requests = requests_of(server)
    requests.begin(server, None)
    requests.wait(server)
    pool = vars(server).get(POOL)
    if pool is not None:
        pool.end()
        if server.block_on_close:
            pool.join()
    threads = getattr(server, "_threads", None)
    if threads is not None:
        threads.join()
    collect_children = getattr(server, "collect_children", None)
    if collect_children is not None:
        collect_children(blocking=server.block_on_close)
