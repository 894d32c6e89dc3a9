"""The ways of waiting: which one is taken, and that each of them serves."""

from __future__ import annotations

import selectors
import socket
import socketserver
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

import fastserve
from fastserve import pollers
from support import serving, talk

FORCEABLE = ["epoll", "poll", "select"]
SELECTORS = [
    getattr(selectors, name)
    for name in ("EpollSelector", "KqueueSelector", "DevpollSelector", "PollSelector", "SelectSelector")
    if hasattr(selectors, name)
]


@pytest.mark.parametrize("name", FORCEABLE)
def test_the_environment_forces_a_poller(core: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("FASTSERVE_POLLER", name)
    poller = pollers.new_poller()
    assert type(poller) is getattr(core, f"{name.title()}Poller")
    assert pollers.poller_name() == name
    poller.close()


@pytest.mark.parametrize("name", ["io_uring", "EPOLL", " "])
def test_an_unknown_poller_is_refused(impl: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("FASTSERVE_POLLER", name)
    with fastserve.TCPServer(("127.0.0.1", 0), fastserve.BaseRequestHandler) as server:
        with pytest.raises(ValueError, match=f"^FASTSERVE_POLLER='{name}' is not available here; there are: "):
            server.serve_forever()


def test_an_empty_name_leaves_the_choice_to_the_platform(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTSERVE_POLLER", raising=False)
    best = pollers.poller_name()
    monkeypatch.setenv("FASTSERVE_POLLER", "")
    assert pollers.poller_name() == best


@pytest.fixture(params=SELECTORS)
def selector_poller(request: pytest.FixtureRequest) -> Iterator[pollers.SelectorPoller]:
    poller = pollers.SelectorPoller(request.param())
    yield poller
    poller.close()


def test_a_selector_waits_as_a_poller_does(selector_poller: pollers.SelectorPoller) -> None:
    left, right = socket.socketpair()
    with left, right:
        with pytest.raises(ValueError, match="^Invalid file descriptor: -1$"):
            selector_poller.register(-1)
        selector_poller.unregister(left.fileno())
        selector_poller.register(left.fileno())
        assert selector_poller.wait(0) == selector_poller.wait(-1) == selector_poller.wait(0.01) == []
        right.send(b"x")
        assert selector_poller.wait(None) == [left.fileno()]
        left.recv(1)
        right.close()
        assert selector_poller.wait(60) == [left.fileno()]  # a hang-up counts as readable
        selector_poller.unregister(left.fileno())
        selector_poller.unregister(left.fileno())
        assert selector_poller.wait(0) == []


def echo(module: ModuleType) -> type:
    class Echo(module.StreamRequestHandler):  # type: ignore[misc, name-defined]
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline())

    return Echo


class UpperDatagram(fastserve.DatagramRequestHandler):
    def handle(self) -> None:
        self.wfile.write(self.rfile.read().upper())


@pytest.mark.parametrize("name", FORCEABLE)
def test_streams_and_datagrams_are_served_with_each_poller(
    impl: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("FASTSERVE_POLLER", name)
    with serving(fastserve.TCPServer(("127.0.0.1", 0), echo(fastserve)), 30.0) as server:
        for _ in range(3):
            assert talk(server.server_address, b"hello\n") == b"hello\n"
    with serving(fastserve.UDPServer(("127.0.0.1", 0), UpperDatagram), 30.0) as server:
        with socket.socket(type=socket.SOCK_DGRAM) as client:
            client.settimeout(60)
            for _ in range(3):
                client.sendto(b"hello", server.server_address)
                assert client.recv(10) == b"HELLO"


@pytest.mark.parametrize("where", ["socketserver", "fastserve"])
def test_a_replaced_selector_class_is_used_as_the_stdlib_uses_it(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    if module is socketserver and where == "fastserve":
        pytest.skip("the stdlib does not look into fastserve")
    log: list[tuple[Any, ...]] = []

    class Recording(selectors.SelectSelector):
        def __init__(self) -> None:
            super().__init__()
            log.append(("made",))

        def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
            log.append(("register", fileobj, events))
            return super().register(fileobj, events, data)

        def select(self, timeout: float | None = None) -> Any:
            log.append(("select", timeout))
            return super().select(timeout)

        def close(self) -> None:
            log.append(("close",))
            super().close()

    monkeypatch.setattr(socketserver if where == "socketserver" else fastserve, "_ServerSelector", Recording)
    server = module.TCPServer(("127.0.0.1", 0), echo(module))
    with serving(server, 0.02):
        assert talk(server.server_address, b"hello\n") == b"hello\n"
    assert log[:2] == [("made",), ("register", server, selectors.EVENT_READ)]
    assert set(log[2:-1]) == {("select", 0.02)}
    assert log[-1] == ("close",)


def test_the_replaced_selector_class_may_be_a_mock(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    made = mock.MagicMock()
    made.return_value.__enter__.return_value.select.return_value = []
    monkeypatch.setattr(socketserver, "_ServerSelector", made)
    with module.TCPServer(("127.0.0.1", 0), echo(module)) as server:
        server.timeout = 0
        server.handle_timeout = handle_timeout = mock.Mock()
        server.handle_request()
        handle_timeout.assert_called_once_with()
    entered = made.return_value.__enter__.return_value
    entered.register.assert_called_once_with(server, selectors.EVENT_READ)
    made.return_value.__exit__.assert_called_once()
