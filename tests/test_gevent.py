"""fastserve in a process that gevent has patched."""

from __future__ import annotations

import importlib.util

import pytest

from isolated import run_isolated

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gevent") is None, reason="gevent is not installed")


@pytest.mark.parametrize("when", ["before", "after"])
def test_servers_work_and_let_other_greenlets_run(impl: str, when: str) -> None:
    run_isolated("under_gevent", impl, when)


@pytest.mark.parametrize("when", ["before", "after"])
def test_servers_with_tls_work(impl: str, when: str) -> None:
    pytest.importorskip("trustme")
    run_isolated("tls_under_gevent", impl, when)
