"""The Python twin of the greenlet hub, interrupted by what a signal handler raises, wherever that may be.

CPython calls signal handlers at the beginning of a function, after a call, and when a loop goes round: here a trace
function raises in their place, at each of these points of the hub, one after the other.
"""

from __future__ import annotations

import contextlib
import dis
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import pytest

pytest.importorskip("greenlet")

from fastserve import _hub_py  # noqa: E402
from support import LIMIT, open_descriptors  # noqa: E402

pytestmark = pytest.mark.once

BEFORE = ("RESUME", "CALL", "JUMP_BACKWARD")  # what the names of the instructions begin with after which it may happen


class Interrupt:
    """Raises ``KeyboardInterrupt`` at the n-th point at which a signal handler may be called in the hub."""

    def __init__(self, number: int) -> None:
        self.left = number
        self.where = ""
        self._last: dict[FrameType, int] = {}
        self._codes: dict[CodeType, bytes] = {}

    def __enter__(self) -> Interrupt:
        sys._getframe().f_trace_opcodes = True  # Python 3.12 looks whether any frame wants that, here alone
        sys.settrace(self._on_call)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.settrace(None)
        self._last.clear()

    def _on_call(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        if frame.f_code.co_filename != _hub_py.__file__:
            return None
        frame.f_trace_lines = False
        frame.f_trace_opcodes = True
        return self._on_event

    def _on_event(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        if event == "return":
            self._last.pop(frame, None)
        elif event == "opcode":
            last = self._last.get(frame)
            self._last[frame] = frame.f_lasti
            if last is not None and self._name(frame.f_code, last).startswith(BEFORE):
                self.left -= 1
                if self.left == 0:
                    self.where = f"{frame.f_code.co_name}:{frame.f_lineno}"
                    sys.settrace(None)
                    raise KeyboardInterrupt
        return self._on_event

    def _name(self, code: CodeType, at: int) -> str:
        if code not in self._codes:
            self._codes[code] = code.co_code
        return dis.opname[self._codes[code][at]]


class Scenario:
    """Tasks that wait for each other, for a time and for their turn, and end soon whatever happens to the others."""

    def __init__(self, hub: Any, ends: tuple[socket.socket, socket.socket]) -> None:
        self.hub = hub
        self.ends = ends
        self.turns = 0

    def run(self) -> None:
        for _ in range(2):  # the second time with greenlets of the pool
            self.hub.start(self.echo)
            self.hub.start(self.ask)
            self.hub.spawn(self.rest)
            while self.hub.active:
                self.hub.wait(0.01)

    def receive(self, sock: socket.socket) -> bytes:
        deadline = time.monotonic() + 0.05
        while True:
            try:
                return sock.recv(1)
            except BlockingIOError:
                self.hub.wait_io(sock, sock.fileno(), False, deadline)

    def echo(self) -> None:
        with contextlib.suppress(TimeoutError):  # the other one was interrupted
            for _ in range(2):
                self.ends[1].send(self.receive(self.ends[1]))

    def ask(self) -> None:
        with contextlib.suppress(TimeoutError):
            for _ in range(2):
                self.ends[0].send(b"x")
                self.receive(self.ends[0])

    def rest(self) -> None:
        self.hub.spawn(self.end)
        self.hub.park(0.001)
        self.hub.pace()

    def end(self) -> None:
        self.turns += 1


@pytest.mark.timeout(3 * LIMIT)
def test_nobody_is_lost_when_the_hub_is_interrupted_anywhere() -> None:
    before, threads = open_descriptors(), threading.active_count()
    number, interrupted = 0, True
    places = set()
    while interrupted:
        number += 1
        ends = socket.socketpair()
        hub = _hub_py.Hub()
        try:
            for end in ends:
                end.setblocking(False)
            scenario = Scenario(hub, ends)
            with Interrupt(number) as interrupt:
                try:
                    scenario.run()
                    interrupted = False
                except KeyboardInterrupt:
                    pass
            assert interrupted == bool(interrupt.where), f"{interrupt.where} ({number}): nobody was told"
            places.add(interrupt.where)
            patience = time.monotonic() + LIMIT
            while hub.active and time.monotonic() < patience:
                hub.wait(0.01)  # as a server does whose handle_error() was told of it
            assert not hub.active, f"{interrupt.where} ({number}): {hub.active} of the tasks were lost"
            turns = scenario.turns
            hub.start(scenario.rest)  # and it goes on
            assert hub.drain(LIMIT), f"{interrupt.where} ({number}): a later task was lost"
            assert scenario.turns == turns + 1, f"{interrupt.where} ({number})"
        finally:
            hub.end()
            for end in ends:
                end.close()
    assert len(places) > 30, places  # else nothing was traced
    assert (open_descriptors(), threading.active_count()) == (before, threads)
