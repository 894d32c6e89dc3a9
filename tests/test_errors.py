"""What a server does when it cannot accept."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from types import ModuleType
from typing import Any

import pytest

import fastserve
from fastserve import _loop
from isolated import run_isolated
from support import open_descriptors, serving, talk, wait_until


def echo(module: ModuleType) -> type:
    class Echo(module.StreamRequestHandler):  # type: ignore[misc, name-defined]
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline())

    return Echo


# All descriptors taken


def test_a_server_without_descriptors_rests_reports_once_and_goes_on_as_soon_as_it_can(impl: str) -> None:
    run_isolated("exhausted", impl, "backs_off")


def test_a_server_without_descriptors_can_be_shut_down_at_once(impl: str) -> None:
    run_isolated("exhausted", impl, "backs_off_and_shuts_down")


def test_a_server_finds_a_descriptor_that_something_else_released(impl: str) -> None:
    run_isolated("exhausted", impl, "picks_up_by_itself")


@pytest.mark.parametrize("poller", ["epoll", "poll", "select"])
@pytest.mark.parametrize("scenario", ["cannot_start", "cannot_start_in_main_thread"])
def test_serve_forever_without_descriptors_raises_and_leaks_nothing(impl: str, scenario: str, poller: str) -> None:
    run_isolated("exhausted", impl, scenario, environment={"FASTSERVE_POLLER": poller})


# Other errors


@pytest.mark.parametrize(
    "error",
    [
        ConnectionAbortedError(errno.ECONNABORTED, "aborted"),
        PermissionError(errno.EPERM, "firewall"),
        OSError("without a number"),
        OSError(errno.EINVAL, "of an override, not of the listener"),
    ],
    ids=lambda error: error.__class__.__name__,
)
def test_an_error_of_one_connection_is_dropped_without_a_pause(
    module: ModuleType, error: OSError, capsys: pytest.CaptureFixture[str]
) -> None:
    failures = 0

    class Server(module.TCPServer):  # type: ignore[misc, name-defined]
        def get_request(self) -> Any:
            nonlocal failures
            if failures < 50:
                failures += 1
                raise error
            return super().get_request()

    with serving(Server(("127.0.0.1", 0), echo(module)), 0.02) as server:
        began = time.monotonic()
        assert talk(server.server_address, b"hello\n") == b"hello\n"
        assert time.monotonic() - began < 15  # with pauses of up to half a second it would take over 20
    assert failures == 50
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_an_episode_of_exhaustion_is_reported_once(impl: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    times: list[float] = []

    class Server(fastserve.TCPServer):
        def get_request(self) -> Any:
            times.append(time.monotonic())
            if len(times) <= 4:
                raise OSError(code, os.strerror(code))
            return super().get_request()

    with serving(Server(("127.0.0.1", 0), echo(fastserve)), 30.0) as server:
        assert talk(server.server_address, b"hello\n") == b"hello\n"
        address = server.server_address
    pauses = [after - before for before, after in zip(times, times[1:], strict=False)]
    # 10 ms, doubled each time; a wait of whole milliseconds may end a little early
    assert all(pause >= wanted - 0.002 for pause, wanted in zip(pauses, [0.01, 0.02, 0.04, 0.08], strict=True))
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 1 + sum(pause > 4 for pause in pauses)  # after 5 s without a failure it is told again
    assert lines[0].startswith(f"fastserve: cannot accept on {address!r}: [Errno {code}] {os.strerror(code)}; ")


@pytest.mark.parametrize("poller", ["epoll", "poll", "select"])
def test_a_listener_that_was_shut_down_does_not_spin(
    impl: str, poller: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTSERVE_POLLER", poller)
    with serving(fastserve.TCPServer(("127.0.0.1", 0), echo(fastserve)), 30.0) as server:
        assert talk(server.server_address, b"hello\n") == b"hello\n"
        server.socket.shutdown(socket.SHUT_RDWR)
        before = time.process_time()
        time.sleep(0.4)
        assert time.process_time() - before < 0.2
    assert capsys.readouterr().err.count("cannot accept on") <= 1


def test_an_icmp_error_of_a_datagram_socket_is_dropped(module: ModuleType) -> None:
    errors: list[OSError] = []

    class Server(module.UDPServer):  # type: ignore[misc, name-defined]
        def get_request(self) -> Any:
            try:
                return super().get_request()
            except OSError as error:
                errors.append(error)
                raise

    class Answer(module.BaseRequestHandler):  # type: ignore[misc, name-defined]
        def handle(self) -> None:
            data, listener = self.request
            listener.send(data.upper())

    with socket.socket(type=socket.SOCK_DGRAM) as client:
        client.bind(("127.0.0.1", 0))
        name = client.getsockname()
        with serving(Server(("127.0.0.1", 0), Answer), 0.02) as server:
            server.socket.connect(name)
            client.settimeout(60)
            client.sendto(b"one", server.server_address)
            assert client.recv(10) == b"ONE"
            client.close()
            server.socket.send(b"to a port that is closed")
            wait_until(lambda: errors)
            with socket.socket(type=socket.SOCK_DGRAM) as second:
                second.bind(name)
                second.settimeout(60)
                second.sendto(b"two", server.server_address)
                assert second.recv(10) == b"TWO"
    assert {type(error) for error in errors} == {ConnectionRefusedError}


def test_errors_leave_no_descriptor(impl: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = open_descriptors()
    server = fastserve.TCPServer(("127.0.0.1", 0), echo(fastserve))
    with serving(server, 30.0):
        assert talk(server.server_address, b"hello\n") == b"hello\n"
        server.socket.shutdown(socket.SHUT_RDWR)
        wait_until(lambda: _loop.paused)
        assert "cannot accept" in capsys.readouterr().err
    assert open_descriptors() == before


def test_a_server_closed_while_it_pauses_can_still_be_shut_down(impl: str, capsys: pytest.CaptureFixture[str]) -> None:
    failed = threading.Event()

    class Exhausted(fastserve.TCPServer):
        def get_request(self) -> tuple[socket.socket, Any]:
            failed.set()
            raise OSError(errno.EMFILE, "none left")

    with serving(Exhausted(("127.0.0.1", 0), fastserve.BaseRequestHandler), poll_interval=30) as server:
        with socket.create_connection(server.server_address):
            assert failed.wait(60)
            server.server_close()
            wait_until(lambda: not _loop.paused)
    assert "none left" in capsys.readouterr().err
