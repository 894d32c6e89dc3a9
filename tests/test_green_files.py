"""The file that is read from a connection that waits in a hub."""

from __future__ import annotations

import contextlib
import io
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

greenlet = pytest.importorskip("greenlet")

from fastserve import _backend  # noqa: E402
from green_support import PAIRS, attempt, exchange  # noqa: E402
from hub_support import running  # noqa: E402


@contextlib.contextmanager
def two_files(pair: str, blocking: bool) -> Iterator[tuple[Any, Any, Any]]:
    """A file of a connection in a hub, one of a plain socket, and the peers of both."""
    with contextlib.ExitStack() as opened:
        hub = opened.enter_context(running())
        sockets = [PAIRS[pair]() for _ in range(2)]
        for ours, theirs in sockets:
            opened.enter_context(ours)
            opened.enter_context(theirs)
        _backend.green().adopt(sockets[0][0])
        for ours, _ in sockets:
            ours.setblocking(blocking)
        files = [opened.enter_context(ours.makefile("rb")) for ours, _ in sockets]
        yield files, [theirs for _, theirs in sockets], hub


def view_of(name: str, size: int) -> Callable[[Any], Any]:
    def call(file: Any) -> Any:
        buffer = bytearray(size)
        return getattr(file, name)(buffer), bytes(buffer)

    return call


SIZES = st.one_of(st.none(), st.integers(-1, 12), st.just(5000))
CALLS = st.one_of(
    st.tuples(st.sampled_from(["read", "readline", "readlines"]), SIZES),
    st.tuples(st.sampled_from(["read1", "peek", "readinto", "readinto1"]), st.integers(0, 12)),
    st.tuples(st.sampled_from(["next", "flags"]), st.none()),
)
CHUNKS = st.lists(st.sampled_from([b"\n", b"a", b"bc", b"def\n", b"\n\n", b"longer than that\nand"]), max_size=4)
STEPS = st.lists(st.one_of(CALLS, st.tuples(st.just("send"), CHUNKS)), max_size=12)


def called(file: Any, step: tuple[str, Any]) -> Any:
    name, argument = step
    if name in ("readinto", "readinto1"):
        return attempt(view_of(name, argument), file)
    if name == "next":
        return attempt(next, file, None)
    if name == "flags":
        return [attempt(getattr(file, flag)) for flag in ("readable", "writable", "seekable", "isatty", "flush")]
    found = attempt(getattr(file, name), argument)
    return bytes(found) if isinstance(found, memoryview) else found


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("kind", ["c", "py"])
def test_the_file_is_as_a_buffered_reader(pair: str, kind: str, request: pytest.FixtureRequest) -> None:
    from conftest import TWINS, _use

    if kind not in TWINS:
        pytest.skip("the extension is not under test")
    with pytest.MonkeyPatch.context() as monkeypatch:
        _use(kind, monkeypatch)

        @settings(max_examples=150, deadline=None)
        @given(STEPS, st.booleans(), st.booleans())
        def compare(steps: list[Any], ends: bool, closes: bool) -> None:
            with two_files(pair, False) as (files, peers, _):
                for step in steps:
                    if step[0] == "send":
                        for peer in peers:
                            peer.sendall(b"".join(step[1]))
                    else:
                        assert called(files[0], step) == called(files[1], step), step
                if ends:
                    for peer in peers:
                        peer.shutdown(socket.SHUT_WR)
                for step in (("readline", -1), ("read", -1), ("read", 5), ("readline", 3), ("next", None)):
                    assert called(files[0], step) == called(files[1], step), step
                if closes:
                    for file in files:
                        file.close()
                        file.close()
                    for name in ("read", "readline", "readlines", "read1", "peek", "readinto", "next", "flags"):
                        argument = 3 if name not in ("next", "flags") else None
                        assert called(files[0], (name, argument)) == called(files[1], (name, argument)), name
                assert files[0].closed == files[1].closed

        compare()


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("kind", ["c", "py"])
def test_the_file_reads_a_stream_however_it_comes(pair: str, kind: str) -> None:
    from conftest import TWINS, _use

    if kind not in TWINS:
        pytest.skip("the extension is not under test")
    calls = st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["read", "readline"]), st.sampled_from([-1, 0, 1, 5, 70_000, 300_000])),
            st.tuples(st.just("readinto"), st.sampled_from([0, 1, 7, 70_000])),
            st.tuples(st.just("next"), st.none()),
        ),
        max_size=8,
    )
    chunks = st.lists(
        st.one_of(st.sampled_from([b"line\n", b"\n", b"x" * 70_000, b"y" * 300_000 + b"\n"]), st.binary(max_size=9)),
        max_size=8,
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        _use(kind, monkeypatch)

        @settings(max_examples=40, deadline=None)
        @given(calls, chunks, st.booleans())
        def compare(steps: list[Any], parts: list[bytes], pauses: bool) -> None:
            expected_of = io.BufferedReader(io.BytesIO(b"".join(parts)))  # type: ignore[arg-type]
            steps = [*steps, ("read", -1)]
            expected = [called(expected_of, step) for step in steps]

            def handle(c: Any) -> Any:
                with c.makefile("rb") as file:
                    return [called(file, step) for step in steps]

            def client(c: Any) -> None:
                for part in parts:
                    c.sendall(part)
                    if pauses:
                        time.sleep(0.0005)
                c.shutdown(socket.SHUT_WR)

            found, _ = exchange(pair, handle, client, green=True)
            assert found == expected

        compare()
