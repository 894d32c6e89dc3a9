"""The contract of the two cores: the same names, the same results, the same exceptions."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import inspect
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import TWINS
from core_support import POLLERS, PY, descriptor_limit, needs_c, outcome
from support import open_descriptors


@pytest.fixture(params=POLLERS)
def poller(request: pytest.FixtureRequest, core: ModuleType) -> Iterator[Any]:
    made = getattr(core, request.param)()
    yield made
    made.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


@pytest.fixture
def closed() -> int:
    """The number of a descriptor that is not open."""
    # A high one, so that nothing opened meanwhile takes the number.
    fd = fcntl.fcntl(0, fcntl.F_DUPFD, 900)
    os.close(fd)
    return fd


# The same names and signatures


def public(core: ModuleType) -> set[str]:
    return {
        name
        for name, value in vars(core).items()
        if not name.startswith("_")
        and (getattr(value, "__module__", None) == core.__name__ or name == "HAVE_EPOLL" or inspect.isroutine(value))
    }


@needs_c
def test_both_cores_have_the_same_names() -> None:
    assert public(TWINS["c"]["core"]) == public(PY) >= {"HAVE_EPOLL", "Wakeup", "accept", "wait_readable", *POLLERS}
    assert TWINS["c"]["core"].HAVE_EPOLL == PY.HAVE_EPOLL


@needs_c
@pytest.mark.parametrize("name", [*POLLERS, "Wakeup"])
def test_both_cores_have_the_same_methods(name: str) -> None:
    c, py = ({key for key in dir(getattr(core, name)) if not key.startswith("_")} for core in (TWINS["c"]["core"], PY))
    assert c == py


@needs_c
@pytest.mark.parametrize("name", ["accept", "wait_readable", *(f"{cls}.{m}" for cls in POLLERS for m in ("wait",))])
def test_parameters_have_the_same_names(name: str) -> None:
    c = functools.reduce(getattr, name.split("."), TWINS["c"]["core"])
    py = functools.reduce(getattr, name.split("."), PY)
    visible = c.__doc__.splitlines()[0]  # embedsignature writes it there
    # Cython adds the C types, and mypy needs none of the twin's annotations in it.
    names = [part.split("=")[0].split()[-1] for part in visible[visible.index("(") + 1 : visible.index(")")].split(",")]
    assert [part.removesuffix(":") for part in names] == list(inspect.signature(py).parameters)


# The same outcomes, side by side


def _steps(core: ModuleType, name: str, *steps: tuple[str, Any]) -> list[Any]:
    """Make a core object, call methods of it, and return the outcome of each."""
    made = getattr(core, name)()
    try:
        return [outcome(getattr(made, method), *arguments) for method, *arguments in steps]
    finally:
        made.close()


@needs_c
@pytest.mark.parametrize("name", POLLERS)
@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([("register", -1)], id="register negative"),
        pytest.param([("register", "closed"), ("wait", 0)], id="register closed, wait"),
        pytest.param([("register", "pipe"), ("register", "pipe"), ("wait", 0)], id="register twice"),
        pytest.param([("unregister", "pipe")], id="unregister unknown"),
        pytest.param([("unregister", -1)], id="unregister negative"),
        pytest.param([("unregister", "closed")], id="unregister closed"),
        pytest.param([("register", 2**31 - 1), ("wait", 0)], id="register far too high"),
        pytest.param([("wait", 0), ("wait", -1), ("wait", 0.0001)], id="wait for nothing"),
        pytest.param([("close",), ("close",)], id="close twice"),
        pytest.param([("close",), ("register", "pipe")], id="register after close"),
        pytest.param([("close",), ("unregister", "pipe")], id="unregister after close"),
        pytest.param([("close",), ("wait", 0)], id="wait after close"),
    ],
)
def test_pollers_do_the_same_on_both_cores(name: str, steps: list[Any], closed: int) -> None:
    reader, writer = os.pipe()
    try:
        names = {"closed": closed, "pipe": reader}
        concrete = [(method, *(names.get(value, value) for value in values)) for method, *values in steps]
        assert _steps(TWINS["c"]["core"], name, *concrete) == _steps(PY, name, *concrete)
    finally:
        os.close(reader)
        os.close(writer)


@needs_c
@pytest.mark.parametrize("for_signals", [False, True])
@pytest.mark.parametrize("method", ["set", "clear", "close", "fileno", "signal_fileno"])
def test_a_closed_wakeup_does_the_same_on_both_cores(for_signals: bool, method: str) -> None:
    outcomes = []
    for core in (TWINS["c"]["core"], PY):
        wakeup = core.Wakeup(for_signals)
        wakeup.close()
        outcomes.append(outcome(getattr(wakeup, method)))
    assert outcomes[0] == outcomes[1]


@needs_c
@pytest.mark.parametrize("fd", [-1, "closed", 2**31 - 1])
def test_wait_readable_does_the_same_on_both_cores(fd: int | str, closed: int) -> None:
    number = closed if fd == "closed" else fd
    assert outcome(TWINS["c"]["core"].wait_readable, number, 0) == outcome(PY.wait_readable, number, 0)


# Pollers


def test_register_refuses_a_negative_descriptor(poller: Any) -> None:
    with pytest.raises(ValueError, match="^Invalid file descriptor: -1$"):
        poller.register(-1)


def test_epoll_refuses_what_the_kernel_refuses(core: ModuleType, closed: int, tmp_path: Path) -> None:
    poller = core.EpollPoller()
    with contextlib.closing(poller), open(tmp_path / "regular", "wb") as regular:
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            poller.register(closed)
        assert caught.value.errno == errno.EBADF
        with pytest.raises(PermissionError):
            poller.register(regular.fileno())


def test_only_epoll_refuses_to_register_twice(poller: Any, pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    poller.register(left.fileno())
    if type(poller).__name__ == "EpollPoller":
        with pytest.raises(FileExistsError):
            poller.register(left.fileno())
    else:
        poller.register(left.fileno())
    right.send(b"x")
    assert poller.wait(60) == [left.fileno()]


def test_unregister_forgives_what_is_not_watched(poller: Any, closed: int) -> None:
    with socket.socket() as unwatched:
        poller.unregister(unwatched.fileno())
    poller.unregister(closed)
    poller.unregister(-1)


@pytest.mark.parametrize("timeout", [0, 0.0, -1, -0.5])
def test_wait_returns_at_once_for_zero_and_less(
    poller: Any, pair: tuple[socket.socket, socket.socket], timeout: float
) -> None:
    poller.register(pair[0].fileno())
    assert poller.wait(timeout) == []
    pair[1].send(b"x")
    assert poller.wait(timeout) == [pair[0].fileno()]


@pytest.mark.parametrize("timeout", [0.05, 0.0004])
def test_wait_lasts_as_long_as_it_is_told(
    poller: Any, pair: tuple[socket.socket, socket.socket], timeout: float
) -> None:
    poller.register(pair[0].fileno())
    began = time.monotonic()
    assert poller.wait(timeout) == []
    assert timeout <= time.monotonic() - began + 1e-4


@pytest.mark.parametrize("timeout", [None, 1e9, 1e300, float("inf"), 10**12])
def test_a_huge_or_endless_wait_ends_when_something_is_ready(
    poller: Any, pair: tuple[socket.socket, socket.socket], timeout: float | None
) -> None:
    poller.register(pair[0].fileno())
    sender = threading.Timer(0.02, pair[1].send, [b"x"])
    sender.start()
    assert poller.wait(timeout) == [pair[0].fileno()]
    sender.join()


def test_hang_up_and_error_count_as_readable(poller: Any, pair: tuple[socket.socket, socket.socket]) -> None:
    reader, writer = os.pipe()
    try:
        poller.register(reader)
        poller.register(pair[0].fileno())
        pair[1].close()
        os.close(writer)
        assert sorted(poller.wait(60)) == sorted([reader, pair[0].fileno()])
    finally:
        poller.unregister(reader)
        os.close(reader)


def test_a_refused_connection_counts_as_readable(poller: Any) -> None:
    with socket.socket() as unused, socket.socket() as client:
        unused.bind(("127.0.0.1", 0))
        client.setblocking(False)
        assert client.connect_ex(unused.getsockname()) in (errno.EINPROGRESS, errno.ECONNREFUSED)
        poller.register(client.fileno())
        assert poller.wait(60) == [client.fileno()]
        poller.unregister(client.fileno())


def test_all_of_many_ready_descriptors_are_found(poller: Any) -> None:
    pairs = [socket.socketpair() for _ in range(100)]
    try:
        for left, right in pairs:
            poller.register(left.fileno())
            right.send(b"x")
        wanted = {left.fileno() for left, _ in pairs}
        found: set[int] = set()
        while ready := poller.wait(0):  # a poller may return only some of them at a time
            assert not found & set(ready) and len(ready) == len(set(ready))
            found |= set(ready)
            for fd in ready:
                poller.unregister(fd)
        assert found == wanted
    finally:
        for left, right in pairs:
            left.close()
            right.close()


@pytest.fixture
def high() -> Iterator[int]:
    """A descriptor that is beyond the reach of select(2)."""
    with descriptor_limit(2048):
        fd = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 1024)
        yield fd
        os.close(fd)


def test_select_refuses_high_descriptors(core: ModuleType, high: int) -> None:
    poller = core.SelectPoller()
    with pytest.raises(ValueError, match=r"^filedescriptor out of range in select\(\)$"):
        poller.register(high)
        poller.wait(0)
    poller.unregister(high)
    assert poller.wait(0) == []


@needs_c
def test_select_refuses_high_descriptors_at_the_same_moment_on_both_cores(high: int) -> None:
    steps = [("register", high), ("wait", 0), ("unregister", high), ("wait", 0)]
    assert _steps(TWINS["c"]["core"], "SelectPoller", *steps) == _steps(PY, "SelectPoller", *steps)


@pytest.mark.parametrize("name", ["EpollPoller", "PollPoller"])
def test_epoll_and_poll_take_high_descriptors(core: ModuleType, name: str, high: int) -> None:
    if name not in POLLERS:
        pytest.skip("there is no epoll on this platform")
    reader, writer = socket.socketpair()
    with reader, writer, contextlib.closing(getattr(core, name)()) as poller:
        os.dup2(reader.fileno(), high)
        poller.register(high)
        assert poller.wait(0) == []
        writer.send(b"x")
        assert poller.wait(0) == [high]
        poller.unregister(high)


def test_pollers_release_their_descriptors(core: ModuleType) -> None:
    before = open_descriptors()
    for name in POLLERS:
        for _ in range(2):
            poller = getattr(core, name)()
            poller.close()
            poller.close()
        getattr(core, name)()  # forgotten without close()
    assert open_descriptors() == before


# The pollers against a model

PLACES = 5
STEPS = st.lists(
    st.tuples(st.sampled_from(["register", "unregister", "send", "receive", "hang up"]), st.integers(0, PLACES - 1)),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_every_poller_follows_the_model(steps: list[tuple[str, int]]) -> None:
    with contextlib.ExitStack() as opened:
        pairs = [socket.socketpair() for _ in range(PLACES)]
        for left, right in pairs:
            opened.enter_context(left)
            opened.enter_context(right)
            left.setblocking(False)
        pollers = [getattr(core, name)() for core in (twins["core"] for twins in TWINS.values()) for name in POLLERS]
        for poller in pollers:
            opened.callback(poller.close)
        watched: set[int] = set()
        readable: set[int] = set()
        hung_up: set[int] = set()
        for step, place in steps:
            left, right = pairs[place]
            if step == "register":
                for poller in pollers:
                    if place in watched and type(poller).__name__ == "EpollPoller":
                        with pytest.raises(FileExistsError):
                            poller.register(left.fileno())
                    else:
                        poller.register(left.fileno())
                watched.add(place)
            elif step == "unregister":
                for poller in pollers:
                    poller.unregister(left.fileno())
                watched.discard(place)
            elif step == "send" and place not in hung_up:
                right.send(b"x")
                readable.add(place)
            elif step == "receive" and place in readable and place not in hung_up:
                left.recv(1000)
                readable.discard(place)
            elif step == "hang up":
                right.close()
                hung_up.add(place)
                readable.add(place)
            expected = sorted(pairs[ready][0].fileno() for ready in watched & readable)
            for poller in pollers:
                assert sorted(poller.wait(0)) == expected, (type(poller), step, place)


# Wakeup


@pytest.fixture(params=[False, True], ids=["event", "for_signals"])
def wakeup(request: pytest.FixtureRequest, core: ModuleType) -> Iterator[Any]:
    made = core.Wakeup(request.param)
    yield made
    made.close()


def is_readable(fd: int) -> bool:
    return bool(select.select([fd], (), (), 0)[0])


def test_wakeup_is_readable_from_set_to_clear(wakeup: Any) -> None:
    assert not is_readable(wakeup.fileno())
    for count in (1, 3, 1000):
        for _ in range(count):
            wakeup.set()
        assert is_readable(wakeup.fileno())
        wakeup.clear()
        assert not is_readable(wakeup.fileno())
        wakeup.clear()
        assert not is_readable(wakeup.fileno())


def test_wakeup_closes_once_and_forgives_set_afterwards(core: ModuleType) -> None:
    for for_signals in (False, True):
        before = open_descriptors()
        wakeup = core.Wakeup(for_signals)
        assert open_descriptors() == before + 1 + for_signals
        wakeup.close()
        wakeup.close()
        assert open_descriptors() == before
        assert wakeup.fileno() == wakeup.signal_fileno() == -1
        reader, writer = os.pipe()  # they take the numbers that the wake-up had
        os.set_blocking(reader, False)
        wakeup.set()
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
        os.close(reader)
        os.close(writer)


def test_wakeup_is_set_by_many_threads(wakeup: Any) -> None:
    threads = [threading.Thread(target=lambda: [wakeup.set() for _ in range(200)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    cleared = 0
    while any(thread.is_alive() for thread in threads):
        if is_readable(wakeup.fileno()):
            wakeup.clear()
            cleared += 1
    for thread in threads:
        thread.join()
    assert cleared or is_readable(wakeup.fileno())


def test_a_full_wakeup_can_be_set_and_cleared(wakeup: Any) -> None:
    fd = wakeup.signal_fileno()
    if fd < 0:
        os.eventfd_write(wakeup.fileno(), 2**64 - 2)
    else:
        with pytest.raises(BlockingIOError):
            while True:
                os.write(fd, b"x" * 4096)
    wakeup.set()
    assert is_readable(wakeup.fileno())
    wakeup.clear()
    assert not is_readable(wakeup.fileno())


def test_wakeup_descriptors_are_close_on_exec_and_non_blocking(wakeup: Any) -> None:
    for fd in {wakeup.fileno(), wakeup.signal_fileno()} - {-1}:
        assert not os.get_inheritable(fd)
        assert not os.get_blocking(fd)


def test_only_a_wakeup_for_signals_has_a_descriptor_for_them(core: ModuleType) -> None:
    with contextlib.closing(core.Wakeup()) as wakeup:
        if hasattr(os, "eventfd"):
            assert wakeup.signal_fileno() == -1
    with contextlib.closing(core.Wakeup(True)) as wakeup:
        before = signal.set_wakeup_fd(wakeup.signal_fileno(), warn_on_full_buffer=False)
        previous = signal.signal(signal.SIGUSR1, lambda signum, frame: None)
        try:
            assert not is_readable(wakeup.fileno())
            signal.raise_signal(signal.SIGUSR1)
            assert is_readable(wakeup.fileno())
            wakeup.clear()
            assert not is_readable(wakeup.fileno())
        finally:
            signal.signal(signal.SIGUSR1, previous)
            signal.set_wakeup_fd(before)


# wait_readable


def test_wait_readable(core: ModuleType, pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    assert core.wait_readable(left.fileno(), 0) is False
    assert core.wait_readable(left.fileno(), -5) is False
    began = time.monotonic()
    assert core.wait_readable(left.fileno(), 0.03) is False
    assert time.monotonic() - began >= 0.029
    right.send(b"x")
    for timeout in (0, 5, 1e300, None):
        assert core.wait_readable(left.fileno(), timeout) is True
    with pytest.raises(ValueError, match="^Invalid file descriptor: -1$"):
        core.wait_readable(-1, 0)


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="there is no epoll here")
def test_epoll_refuses_a_file_and_forgives_its_unregistering(core: ModuleType, tmp_path: Path) -> None:
    poller = core.EpollPoller()
    with open(tmp_path / "file", "wb") as file:
        with pytest.raises(PermissionError):
            poller.register(file.fileno())
        poller.unregister(file.fileno())
    poller.close()
