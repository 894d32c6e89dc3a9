"""Who tells of a handler that holds up all others of its loop."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any, Final

SLOW_HANDLER_SECONDS: Final = 0.1  # what servers have by default
REPORT_GAP: Final = 1.0  # seconds between two reports, at least


class Watchdog:
    """A thread that looks at a hub now and then, and reports who has run since the look before.

    It sleeps as long as the hub does. The thread that serves calls the methods.
    """

    def __init__(self, server: Any, hub: Any) -> None:
        self._server = server
        self._hub = hub
        # On a class of the stdlib, under patch(), there is no attribute of that name.
        self._seconds: float = getattr(server, "slow_handler_seconds", SLOW_HANDLER_SECONDS)
        self._stopped = threading.Event()
        self._at_work = threading.Event()  # set by the hub when it has something to do again
        self._thread: threading.Thread | None = None
        self._reported = -REPORT_GAP  # time.monotonic()

    def start(self) -> None:
        """Begin to look, unless the server does not want it."""
        if self._seconds > 0:
            self._thread = threading.Thread(target=self._run, name="fastserve watchdog", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread, and wait for that."""
        self._stopped.set()
        self._at_work.set()
        if self._thread is not None and not self._hub.stale:  # a forked child has no such thread
            self._thread.join()

    def _run(self) -> None:
        hub = self._hub
        seen = -1  # the progress at the last look
        since = 0.0  # time.monotonic() when it was seen first
        reported = False
        # Between two looks it always sleeps, also when the hub is at work again: else it would wake for each request.
        while not self._stopped.wait(self._seconds / 2):
            now = time.monotonic()
            if hub.progress != seen:
                seen = hub.progress
                since = now
                reported = False
            elif hub.idle:
                self._at_work.clear()
                hub.watch(self._at_work)
                if hub.idle and not self._stopped.is_set():
                    self._at_work.wait()
            elif now - since >= self._seconds and not reported:
                reported = self._report(seen, now - since)

    def _report(self, progress: int, seconds: float) -> bool:
        """Tell who holds the loop, unless something was told a moment ago. Return whether it was told."""
        now = time.monotonic()
        if now - self._reported < REPORT_GAP:
            return False
        # A sixth of the import of this package, and mostly never needed. Before the look: the stack goes on meanwhile.
        import logging
        import traceback

        frame = sys._current_frames().get(self._hub.owner)
        arguments = self._hub.arguments()
        if frame is None or self._hub.progress != progress:
            return False  # it has let go this moment
        self._reported = now
        if arguments and len(arguments) == 3 and arguments[0] is self._server:
            handler = self._server.RequestHandlerClass
            who = f"the handler {getattr(handler, '__qualname__', handler)} of {arguments[2]!r}"
        else:
            who = f"something in the loop of {type(self._server).__name__}"
        logging.getLogger("fastserve").warning(
            "%s has let no other client go on for %.2f seconds:\n%s",
            who,
            seconds,
            "".join(traceback.format_stack(frame)).rstrip(),
        )
        return True
