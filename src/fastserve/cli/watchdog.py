"""systemd's watchdog, for ``fastserve serve``: it is told ``WATCHDOG=1`` while the loop goes round."""

from __future__ import annotations

import os
import time
from typing import Any, Final

from fastserve import systemd
from fastserve.cli import listening
from fastserve.cli.arguments import UsageError

DEFAULT_POLL_INTERVAL: Final = 0.5  # seconds; that of serve_forever()


def interval() -> float | None:
    """Return the seconds within which systemd is to be told, ``None`` if nobody watches. Raises ``UsageError``."""
    if not os.environ.get("NOTIFY_SOCKET"):
        return None
    try:
        return systemd.watchdog_interval()
    except ValueError as error:
        raise UsageError(f"the watchdog of systemd: {error}") from None


def watch(server: Any, seconds: float | None) -> float:
    """Have the loop of ``server`` tell systemd, if it is watched, at most half of the seconds apart.

    It is done by ``service_actions()``, which the loop calls after each turn, in the thread of the loop: a loop that
    stands still tells nothing. A server of several processes is watched by its parent's loop, which watches over the
    others.

    :return: the ``poll_interval`` for ``serve_forever()``.
    """
    if seconds is None:
        return DEFAULT_POLL_INTERVAL
    pid = os.getpid()
    quarter = seconds / 4  # what is not due yet at one turn is so at the next
    last = time.monotonic() - quarter

    def service_actions() -> None:
        nonlocal last
        type(server).service_actions(server)
        if os.getpid() != pid:
            del server.service_actions  # a worker process, whose loop need not tick
        elif time.monotonic() - last >= quarter:
            last = time.monotonic()
            listening.tell_systemd("WATCHDOG=1")

    server.service_actions = service_actions
    return quarter
