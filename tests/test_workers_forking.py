"""Forking servers: what fastserve does beyond the stdlib."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from isolated import run_isolated

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
needs_pidfd = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="this platform has no pidfds")

NAMES = ["ForkingTCPServer", "ForkingUDPServer", "ForkingUnixStreamServer", "ForkingUnixDatagramServer"]


@pytest.mark.parametrize("name", NAMES)
def test_no_descriptor_thread_or_child_is_left(impl: str, name: str) -> None:
    run_isolated("leaks", impl, name, "100" if name == "ForkingTCPServer" else "50")


@needs_pidfd
def test_an_ended_child_is_collected_at_once_while_the_server_is_idle(impl: str) -> None:
    run_isolated("children", impl, "collected_at_once")


@needs_pidfd
def test_without_pidfds_the_loop_ticks_while_there_are_children(impl: str) -> None:
    run_isolated("children", impl, "collected_by_ticks")


def test_at_max_children_the_next_request_waits(impl: str) -> None:
    run_isolated("children", impl, "max_children")


def test_a_child_does_not_wake_its_parent(impl: str) -> None:
    run_isolated("children", impl, "children_do_not_wake_the_parent")


def test_shutdown_in_a_childs_handler_does_not_deadlock(impl: str) -> None:
    run_isolated("children", impl, "shutdown_in_a_child")


@pytest.mark.parametrize("first", ["child", "parent"])
def test_a_child_that_goes_back_into_the_loop_serves_beside_its_parent(impl: str, first: str) -> None:
    run_isolated("both_serve", impl, first)


@pytest.mark.parametrize("first", ["child", "parent"])
def test_in_the_stdlib_such_a_child_serves_too(first: str) -> None:
    run_isolated("both_serve", "stdlib", first)


def test_at_max_children_no_other_child_of_the_program_is_collected(impl: str) -> None:
    run_isolated("children", impl, "another_child")


@needs_pidfd
def test_at_max_children_without_pidfds_one_of_the_children_is_waited_for(impl: str) -> None:
    run_isolated("children", impl, "max_children_without_pidfds")


@needs_pidfd
def test_a_loop_asks_only_for_children_that_have_ended(impl: str) -> None:
    run_isolated("children", impl, "asked_for_the_ended")


def test_children_that_somebody_else_collects_hang_nothing(impl: str) -> None:
    run_isolated("children", impl, "collected_elsewhere")


def test_ignored_sigchld_hangs_nothing(impl: str) -> None:
    run_isolated("children", impl, "sigchld_ignored")


def test_an_overridden_collect_children_is_called_after_each_turn(impl: str) -> None:
    run_isolated("children", impl, "overridden")


WATCHING = """
import os, threading

watching = []
register = os.register_at_fork

def note(**hooks):
    watching.extend(hook.__module__ for hook in hooks.values() if hook.__module__.startswith("fastserve"))
    register(**hooks)

os.register_at_fork = note
import fastserve

def serve(name):
    goes_round = threading.Event()

    class Server(getattr(fastserve, name)):
        def service_actions(self):
            goes_round.set()

    with Server(("127.0.0.1", 0), fastserve.BaseRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        goes_round.wait()
        server.shutdown()
        thread.join()

print(watching)
with fastserve.UDPServer(("127.0.0.1", 0), fastserve.BaseRequestHandler), fastserve.TCPServer(("127.0.0.1", 0), None):
    print(watching)
serve("ForkingTCPServer")
serve("TCPServer")
print(watching)
serve("UDPServer")
serve("UDPServer")
print(watching)
"""


@pytest.mark.parametrize("no_extensions", ["0", "1"])
def test_a_fork_runs_nothing_of_what_is_not_in_use(no_extensions: str) -> None:
    """What a forked child runs costs it page faults, also in programs that import fastserve and do not serve."""
    environment = {**os.environ, "FASTSERVE_NO_EXTENSIONS": no_extensions}
    command = [sys.executable, "-c", WATCHING]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    loop, datagrams = "'fastserve._loop'", "'fastserve.datagrams'"
    assert result.stdout.splitlines() == ["[]", "[]", f"[{loop}]", f"[{loop}, {datagrams}]"]
