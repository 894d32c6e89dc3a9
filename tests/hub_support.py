"""What the tests of the greenlet hub share."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from fastserve import _backend
from support import LIMIT


@contextlib.contextmanager
def running(module: ModuleType | None = None) -> Iterator[Any]:
    """Run a hub in the calling thread; end its tasks at the end of the block."""
    hub = (module or _backend.hub()).Hub()
    hub.enter()
    try:
        yield hub
    finally:
        hub.kill()
        assert hub.drain(LIMIT)
        hub.leave()
        hub.end()


@pytest.fixture
def hub(impl: str) -> Iterator[Any]:
    with running() as hub:
        yield hub


@pytest.fixture
def pair(impl: str) -> Iterator[tuple[Any, Any]]:
    """A connection that waits in the hub, and its peer, which does not."""
    peer, other = socket.socketpair()
    connection = _backend.green().Connection(other.family, other.type, other.proto, other.detach())
    peer.settimeout(LIMIT)
    with peer, connection:
        yield connection, peer


def finish(hub: Any) -> None:
    assert hub.drain(LIMIT), "the tasks have not ended"
