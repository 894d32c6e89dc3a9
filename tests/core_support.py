"""What the tests of the core share."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator
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
