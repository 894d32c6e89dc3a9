"""The contract of the core, c against py: accepting a connection, and what a signal does to a wait."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any
from unittest import mock

import pytest

from conftest import TWINS
from core_support import POLLERS, Handled, descriptor_limit, interrupted, needs_c, outcome
from support import open_descriptors

# accept


def listening(family: int, address: Any) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.bind(address)
        listener.listen(8)
    except OSError:
        listener.close()
        raise
    return listener


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with listening(socket.AF_INET, ("127.0.0.1", 0)) as made:
        yield made


def described(request: socket.socket) -> tuple[Any, ...]:
    return (
        type(request), request.family, request.type, request.proto, request.gettimeout(), request.getblocking(),
        os.get_blocking(request.fileno()), os.get_inheritable(request.fileno()), request.getsockname(),
    )  # fmt: skip


@pytest.mark.parametrize("client_name", ["IPv4", "IPv6", "unnamed", "named", "abstract", "not UTF-8"])
def test_accept_does_what_the_method_does(core: ModuleType, client_name: str, tmp_path: Path) -> None:
    if client_name == "abstract" and sys.platform != "linux":
        pytest.skip("only Linux has abstract names")
    if client_name == "IPv4":
        made = listening(socket.AF_INET, ("127.0.0.1", 0))
    elif client_name == "IPv6":
        try:
            made = listening(socket.AF_INET6, ("::1", 0))
        except OSError as error:
            pytest.skip(f"there is no IPv6 here: {error}")
    else:
        made = listening(socket.AF_UNIX, str(tmp_path / "listener"))
    names: dict[str, Any] = {
        "named": str(tmp_path / "client"),
        "abstract": b"\0fastserve-%d" % os.getpid(),
        "not UTF-8": os.fsencode(tmp_path) + b"/\xff\xfe",
    }
    with made:
        results = []
        for accept in (core.accept, socket.socket.accept):
            with socket.socket(made.family, socket.SOCK_STREAM) as client:
                if client_name in names:
                    client.bind(names[client_name])
                client.connect(made.getsockname())
                request, address = accept(made)
                with request:
                    assert address == client.getsockname()
                    results.append((described(request), type(address), address if client_name in names else None))
                    client.sendall(b"hello")
                    assert request.recv(10) == b"hello"
                if client_name in ("named", "not UTF-8"):
                    os.unlink(names[client_name])
        assert results[0] == results[1]


@pytest.mark.parametrize("default", [None, 0.0, 5.0])
@pytest.mark.parametrize("timeout", [None, 60.0])
def test_accepted_sockets_get_the_timeouts_that_the_method_gives(
    core: ModuleType, listener: socket.socket, default: float | None, timeout: float | None
) -> None:
    listener.settimeout(timeout)
    results = []
    for accept in (core.accept, socket.socket.accept):
        with socket.create_connection(listener.getsockname()):
            socket.setdefaulttimeout(default)
            try:
                with accept(listener)[0] as request:
                    results.append(described(request))
            finally:
                socket.setdefaulttimeout(None)
    assert results[0] == results[1]
    assert results[0][4] == default


def test_accept_raises_what_the_method_raises(core: ModuleType, tmp_path: Path) -> None:
    cases: dict[str, tuple[Any, int | None, float | None]] = {
        "closed": (socket.socket(), errno.EBADF, None),
        "not listening": (socket.socket(), errno.EINVAL, None),
        "datagrams": (socket.socket(type=socket.SOCK_DGRAM), errno.EOPNOTSUPP, None),
        "nothing there": (listening(socket.AF_INET, ("127.0.0.1", 0)), errno.EAGAIN, 0.0),
        "timeout": (listening(socket.AF_INET, ("127.0.0.1", 0)), None, 0.02),
    }
    cases["closed"][0].close()
    before = open_descriptors()
    for name, (listener, code, timeout) in cases.items():
        with listener:
            if name != "closed":
                listener.settimeout(timeout)
            raised = outcome(core.accept, listener)
            assert raised == outcome(socket.socket.accept, listener), name
            assert issubclass(raised[0], OSError) and raised[1] == code, name
            assert name != "timeout" or raised[0] is TimeoutError
            assert name != "nothing there" or raised[0] is BlockingIOError
    assert open_descriptors() == before - 4  # the listeners themselves


def test_accept_waits_for_the_timeout_of_the_listener(core: ModuleType, listener: socket.socket) -> None:
    listener.settimeout(60)
    client = socket.socket()
    later = threading.Timer(0.03, client.connect, [listener.getsockname()])
    later.start()
    with client:
        core.accept(listener)[0].close()
        later.join()


def test_accept_obeys_a_subclass(core: ModuleType, listener: socket.socket) -> None:
    class Own(socket.socket):
        def accept(self) -> tuple[Any, Any]:
            return "request", "address"

    with Own(fileno=os.dup(listener.fileno())) as own:
        assert core.accept(own) == ("request", "address")


def test_accept_obeys_a_replaced_method(core: ModuleType, listener: socket.socket) -> None:
    with mock.patch.object(socket.socket, "accept", lambda self: ("request", self)):
        assert core.accept(listener) == ("request", listener)


def test_accept_obeys_any_object_with_the_method(core: ModuleType) -> None:
    listener = mock.Mock()
    assert core.accept(listener) is listener.accept.return_value


def test_accept_leaks_nothing_when_there_is_no_descriptor_left(core: ModuleType, listener: socket.socket) -> None:
    with socket.create_connection(listener.getsockname()):
        before = open_descriptors()
        lowest_free = os.dup(0)
        os.close(lowest_free)
        with descriptor_limit(lowest_free):
            with pytest.raises(OSError, match="Too many open files") as caught:
                core.accept(listener)
        assert caught.value.errno == errno.EMFILE
        assert open_descriptors() == before
        core.accept(listener)[0].close()
        assert open_descriptors() == before


@needs_c
def test_accept_in_c_closes_the_connection_when_no_object_can_be_made(listener: socket.socket) -> None:
    with socket.create_connection(listener.getsockname()):
        before = open_descriptors()
        with mock.patch.object(socket.socket, "__init__", side_effect=MemoryError), pytest.raises(MemoryError):
            TWINS["c"]["core"].accept(listener)
        assert open_descriptors() == before


# Signals: PEP 475


WAITS = [*POLLERS, "wait_readable", "accept"]


def wait_for(core: ModuleType, what: str, listener: socket.socket, timeout: float | None) -> Any:
    """Wait for a connection in one of the ways there are; return something false, or raise, if none comes."""
    if what == "accept":
        listener.settimeout(timeout)
        request, _ = core.accept(listener)
        request.close()
        return True
    if what == "wait_readable":
        return core.wait_readable(listener.fileno(), timeout)
    with contextlib.closing(getattr(core, what)()) as poller:
        poller.register(listener.fileno())
        return poller.wait(timeout)


@pytest.mark.parametrize("what", WAITS)
def test_a_wait_goes_on_after_a_signal_with_the_time_that_is_left(
    core: ModuleType, listener: socket.socket, what: str
) -> None:
    calls: list[int] = []
    # A longer one if the machine is too busy to send the signals in time; those that come at once are one.
    for timeout in (0.15, 1.5, 15.0):
        calls.clear()
        began = time.monotonic()
        with interrupted(lambda signum, frame: calls.append(signum)):
            with pytest.raises(TimeoutError) if what == "accept" else contextlib.nullcontext():
                assert not wait_for(core, what, listener, timeout)
            seconds = time.monotonic() - began
            came = len(calls)
        assert timeout - 0.001 <= seconds < timeout + 30
        if came >= 3:
            break
    assert came >= 3


@pytest.mark.parametrize("what", WAITS)
def test_an_endless_wait_goes_on_after_a_signal(core: ModuleType, listener: socket.socket, what: str) -> None:
    client = socket.socket()

    def connect_at_the_second(signum: int, frame: FrameType | None) -> None:
        if next(calls) == 2:  # each has a number of its own, though one may come while another is handled
            client.connect(listener.getsockname())

    calls = itertools.count(1)
    with client, interrupted(connect_at_the_second):  # more than two: those that come at once are one
        assert wait_for(core, what, listener, None)
        assert next(calls) > 2


@pytest.mark.parametrize("timeout", [None, 60.0])
@pytest.mark.parametrize("what", WAITS)
def test_what_a_signal_handler_raises_comes_out_of_a_wait(
    core: ModuleType, listener: socket.socket, what: str, timeout: float | None
) -> None:
    def raise_it(signum: int, frame: FrameType | None) -> None:
        if next(calls) == 1:
            raise Handled

    calls = itertools.count(1)
    before = open_descriptors()
    began = time.monotonic()
    # Again and again: Python looks for signals before a system call, and one that comes just then does not end it.
    with pytest.raises(Handled), interrupted(raise_it):
        wait_for(core, what, listener, timeout)
    assert time.monotonic() - began < 30
    assert open_descriptors() == before


def test_accept_does_not_use_the_number_of_a_listener_that_a_signal_handler_closed(core: ModuleType) -> None:
    listener = listening(socket.AF_INET, ("127.0.0.1", 0))
    with listener, listening(socket.AF_INET, ("127.0.0.1", 0)) as other, socket.create_connection(other.getsockname()):

        def close_and_reuse(signum: int, frame: FrameType | None) -> None:
            if reused:
                return
            reused.append(listener.fileno())
            listener.close()
            os.dup2(other.fileno(), reused[0], inheritable=False)

        reused: list[int] = []
        with interrupted(close_and_reuse), pytest.raises(OSError) as caught:
            core.accept(listener)[0].close()
        os.close(reused[0])
        assert caught.value.errno == errno.EBADF
