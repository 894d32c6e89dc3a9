"""What the tests of the core share."""

from __future__ import annotations

import contextlib
import itertools
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from conftest import TWINS

PY = TWINS["py"]["core"]
POLLERS = ["EpollPoller", "PollPoller", "SelectPoller"] if PY.HAVE_EPOLL else ["PollPoller", "SelectPoller"]
needs_c = pytest.mark.skipif("c" not in TWINS, reason="no C core to compare with: FASTSERVE_NO_EXTENSIONS is set")


def outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a call returns, or the class, errno and message of what it raises."""
    try:
        return function(*arguments)
    except Exception as error:
        return type(error), getattr(error, "errno", None), str(error)


@contextlib.contextmanager
def descriptor_limit(soft: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] != resource.RLIM_INFINITY and before[1] < soft:
        pytest.skip(f"this process may not have {soft} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


class Handled(Exception):
    """Raised by a signal handler, to come out of what it interrupts."""


@contextlib.contextmanager
def interrupted(handler: Callable[[int, FrameType | None], Any], count: int | None = None) -> Iterator[None]:
    """Send this thread so many signals, 20 ms apart, the first after 20 ms; without a number until the block ends."""
    main = threading.get_ident()
    began, ended = threading.Event(), threading.Event()

    def send() -> None:
        began.wait(60)
        for _ in itertools.count() if count is None else range(count):
            if ended.wait(0.02):
                return
            signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handler)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        began.set()
        yield
    finally:
        ended.set()
        sender.join()
        signal.signal(signal.SIGUSR1, before)
