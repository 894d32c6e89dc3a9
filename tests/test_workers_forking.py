"""Forking servers: what fastserve does beyond the stdlib."""

from __future__ import annotations

import os

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
