"""The worker models by the names that people type, and the predefined class of each."""

from __future__ import annotations

from typing import Any, Final

# What ``--worker`` and ``fastserve.testing`` take, and the beginning of the names of the predefined classes.
WORKERS: Final = {
    "sync": "",
    "threads": "Threading",
    "threadpool": "ThreadPool",
    "fork": "Forking",
    "greenlet": "Greenlet",
}


def predefined(module: Any, worker: str, unix: bool = False, udp: bool = False) -> Any:
    """Return the class of ``module``, which is ``fastserve`` or ``socketserver``, that serves in this way.

    :raises KeyError: if there is no such worker model.
    :raises AttributeError: if ``module`` has no such class.
    """
    kinds = ("UnixStreamServer", "UnixDatagramServer") if unix else ("TCPServer", "UDPServer")
    return getattr(module, WORKERS[worker] + kinds[udp])
