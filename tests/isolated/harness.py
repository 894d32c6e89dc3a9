"""What the isolated scripts share: the module under test, servers in either thread, figures from /proc."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

VARIANT = sys.argv[1]
ARGUMENTS = sys.argv[2:]


def module_under_test() -> ModuleType:
    """Return ``socketserver`` or ``fastserve``, after a check that it runs on the core that was asked for."""
    if VARIANT == "stdlib":
        return importlib.import_module("socketserver")
    module = importlib.import_module("fastserve")
    assert module.implementation == VARIANT, module.implementation
    return module


def serve_here(server: Any, act: Callable[[], None], poll_interval: float = 0.5) -> None:
    """Serve in this thread while ``act()`` runs in another one; raise what either raises.

    ``act`` has to stop the server; where it raises, the server is stopped for it.
    """
    failed: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            failed.append(error)
            server.shutdown()

    actor = threading.Thread(target=run, name="acting")
    actor.start()
    try:
        server.serve_forever(poll_interval)
    finally:
        actor.join(20)
        assert not actor.is_alive(), "act() did not end"
        if failed:
            raise failed[0]


def context_switches(thread_id: int) -> int:
    """Return how often a thread of this process gave up its processor, or was made to."""
    lines = Path(f"/proc/self/task/{thread_id}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)


def settle(thread_id: int) -> None:
    """Wait until a thread has been asleep for 50 ms, at most for 1 s."""
    deadline = time.monotonic() + 1.0
    before = -1
    while (now := context_switches(thread_id)) != before and time.monotonic() < deadline:
        before = now
        time.sleep(0.05)


def no_child_is_left() -> bool:
    """Return whether this process has no child, not even an ended one."""
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return True
    return False
