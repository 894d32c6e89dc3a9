"""What the isolated scripts share: the module under test, servers in either thread, figures from /proc."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from support import context_switches, settle

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
        actor.join(60)
        assert not actor.is_alive(), "act() did not end"
        if failed:
            raise failed[0]


def fewest_switches(thread_id: int, seconds: float, times: int = 3) -> int:
    """Return the fewest context switches that a thread had in one of some times; one without any is enough.

    A thread that ticks has some in each; a single one may have to do with the machine and not with the thread.
    """
    fewest = sys.maxsize
    for _ in range(times):
        settle(thread_id, 1.0 if fewest != sys.maxsize else 10.0)
        before = context_switches(thread_id)
        time.sleep(seconds)
        fewest = min(fewest, context_switches(thread_id) - before)
        if fewest == 0:
            break
    return fewest


def no_child_is_left() -> bool:
    """Return whether this process has no child, not even an ended one."""
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return True
    return False
