"""Which way of waiting: epoll, kqueue, poll or select.

The platform chooses, best first; ``FASTSERVE_POLLER`` in the environment forces one of the names.
"""

from __future__ import annotations

import os
import select
import selectors
import sys
import time
from collections.abc import Callable

from fastserve import _backend, _core_py
from fastserve._annotations import Final, Protocol
from fastserve._stdlib import socketserver

# The class with which socketserver waits, unless somebody has put another one in its place.
_STDLIB_SELECTOR: Final = socketserver._ServerSelector  # type: ignore[attr-defined]


class Poller(Protocol):
    """What a loop needs of a poller; used by one thread. The contract is that of ``_core_py.EpollPoller``."""

    def register(self, fd: int, /) -> None: ...
    def unregister(self, fd: int, /) -> None: ...
    def wait(self, timeout: float | None = None, /) -> list[int]: ...
    def close(self) -> None: ...


class SelectorPoller:
    """A selector of :mod:`selectors` with the interface of a poller: the way to kqueue(2)."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector

    def register(self, fd: int) -> None:
        """Watch ``fd`` for reading. Raises ``ValueError`` if it is negative."""
        self._selector.register(fd, selectors.EVENT_READ)

    def unregister(self, fd: int) -> None:
        """Stop watching ``fd``. Does nothing if it is not watched."""
        if fd in self._selector.get_map():
            self._selector.unregister(fd)

    def wait(self, timeout: float | None = None) -> list[int]:
        """Return the readable descriptors, after at most ``timeout`` seconds (``None``: endless)."""
        return [key.fd for key, _ in self._selector.select(timeout)]

    def close(self) -> None:
        """Release what the selector holds."""
        self._selector.close()


def _makers() -> dict[str, Callable[[], Poller]]:
    """Return the pollers that can be made at this moment, by name, best first."""
    patched = _backend.monkey_patched()
    core = _core_py if patched else _backend.core
    makers: dict[str, Callable[[], Poller]] = {}
    if core.HAVE_EPOLL and hasattr(select, "epoll"):  # gevent takes it out of the module
        makers["epoll"] = core.EpollPoller
    if hasattr(select, "poll") and core is not _core_py:
        makers["poll"] = core.PollPoller  # in C it costs less than kqueue through a Python selector
    kqueue = getattr(selectors, "KqueueSelector", None)
    if kqueue is not None and hasattr(select, "kqueue"):
        makers["kqueue"] = lambda: SelectorPoller(kqueue())
    if hasattr(select, "poll"):
        makers.setdefault("poll", core.PollPoller)
    makers["select"] = core.SelectPoller
    return makers


def poller_name() -> str:
    """Return the name of the poller that :func:`new_poller` makes.

    Raises ``ValueError`` if ``FASTSERVE_POLLER`` names one that is not to be had here.
    """
    makers = _makers()
    name = os.environ.get("FASTSERVE_POLLER") or next(iter(makers))
    if name not in makers:
        raise ValueError(f"FASTSERVE_POLLER={name!r} is not available here; there are: {', '.join(makers)}")
    return name


def new_poller() -> Poller:
    """Return a new poller: the one that ``FASTSERVE_POLLER`` names, or the best of this platform.

    Raises ``ValueError`` as :func:`poller_name` does, ``OSError`` if the kernel has no descriptor left for it.
    """
    return _makers()[poller_name()]()


def replaced_selector() -> Callable[[], selectors.BaseSelector] | None:
    """Return the class that somebody has put in the place of ``_ServerSelector``, or ``None``.

    It may be replaced in ``socketserver`` and in ``fastserve``, which stands in its place.
    """
    for module in (sys.modules.get("fastserve"), socketserver):
        found: Callable[[], selectors.BaseSelector] = getattr(module, "_ServerSelector", _STDLIB_SELECTOR)
        if found is not _STDLIB_SELECTOR:
            return found
    return None


def descriptor_of(server: object) -> int:
    """Return ``server.fileno()``. Raises the ``ValueError`` of :mod:`selectors` if it is not to be had."""
    try:
        fd = int(server.fileno())  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"Invalid file object: {server!r}") from None
    if fd < 0:
        raise ValueError(f"Invalid file descriptor: {fd}")
    return fd


def wait_for_request(server: object, timeout: float | None) -> bool:
    """Wait until ``server`` has a request to get, at most ``timeout`` seconds (``None``: endless).

    Return whether it has. Raises ``ValueError`` if the server is closed.
    """
    replaced = replaced_selector()
    monotonic = vars(socketserver)["time"]
    if replaced is None and monotonic is time.monotonic:
        core = _core_py if _backend.monkey_patched() else _backend.core
        readable: bool = core.wait_readable(descriptor_of(server), timeout)
        return readable
    deadline = None if timeout is None else monotonic() + timeout
    with (replaced or _STDLIB_SELECTOR)() as selector:
        selector.register(server, selectors.EVENT_READ)  # type: ignore[arg-type]
        while not selector.select(timeout):
            if deadline is not None:
                timeout = deadline - monotonic()
                if timeout < 0:
                    return False
        return True
