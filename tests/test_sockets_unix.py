"""The files and the addresses of Unix sockets."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fastserve
from fastserve import sockets
from sockets_support import Upper, UpperDatagram, linux, listener, unix_server
from support import LIMIT, serving, talk

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("no_descriptor_is_left")]


KINDS = ["Stream", "Datagram"]


@pytest.fixture
def umask() -> Iterator[Any]:
    before = os.umask(0)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [0, 0o022, 0o777])
@pytest.mark.parametrize("fchmod_counts", [pytest.param(True, marks=linux), False])
def test_the_file_of_a_unix_socket_never_has_more_permissions_than_it_is_to_have(
    impl: str, in_tmp_path: Path, kind: str, mask: int, fchmod_counts: bool, umask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    chown, chmod = os.chown, os.chmod
    monkeypatch.setattr(sockets, "_FCHMOD_COUNTS", fchmod_counts)
    monkeypatch.setattr(os, "chown", lambda *a, **k: (seen.append(os.lstat("s").st_mode & 0o777), chown(*a, **k)))
    monkeypatch.setattr(os, "chmod", lambda *a, **k: (seen.append(os.lstat("s").st_mode & 0o777), chmod(*a, **k)))
    umask(mask)
    with unix_server(kind, socket_mode=0o640, socket_owner=(os.getuid(), os.getgid())) as server:
        assert umask(mask) == mask
        assert stat.S_IMODE(os.lstat("s").st_mode) == 0o640
        assert server.server_address == "s"
    assert len(seen) == 2
    # A stream socket cannot be connected to before it listens, which is after this.
    if fchmod_counts or kind == "Datagram":
        assert all(mode & ~0o600 == 0 for mode in seen), seen


def test_a_stream_socket_does_not_listen_before_it_has_its_permissions(
    impl: str, in_tmp_path: Path, umask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []
    chmod = os.chmod

    def try_to_connect(*args: Any, **options: Any) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            refused.append(client.connect_ex("s"))
        chmod(*args, **options)

    monkeypatch.setattr(os, "chmod", try_to_connect)
    with serving(unix_server("Stream", socket_mode=0o777, remove_stale_socket=True)):
        assert talk("s", b"a\n", socket.AF_UNIX) == b"A\n"
    assert refused == [errno.ECONNREFUSED]


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_of_a_unix_socket_belongs_to_whom_it_is_given(impl: str, in_tmp_path: Path, kind: str) -> None:
    import grp
    import pwd

    user, group = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(os.getgid()).gr_name
    with unix_server(kind, socket_owner=(user, group)):
        found = os.stat("s")
        assert (found.st_uid, found.st_gid) == (os.getuid(), os.getgid())
    os.unlink("s")
    if os.geteuid() == 0:
        for owner in (12, 34), (None, 34), (12, None):
            with unix_server(kind, socket_owner=owner, socket_mode=0o660):
                found = os.stat("s")
                assert (found.st_uid, found.st_gid) == (owner[0] or 0, owner[1] or os.getgid())
                assert stat.S_IMODE(found.st_mode) == 0o660
            os.unlink("s")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may give away what it likes")
def test_a_file_that_cannot_be_given_away_is_not_left_behind(impl: str, in_tmp_path: Path) -> None:
    with pytest.raises(PermissionError):
        unix_server("Stream", socket_owner=(0, 0))
    assert not os.path.lexists("s")


def test_a_server_that_fails_after_bind_leaves_no_file_behind(
    impl: str, in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chown", refuse)
    with pytest.raises(PermissionError):
        unix_server("Stream", socket_owner=(1, 1), unlink_on_close=True)
    assert not os.path.lexists("s")


@pytest.mark.parametrize("kind", KINDS)
def test_a_socket_that_is_left_over_is_removed(impl: str, in_tmp_path: Path, kind: str) -> None:
    unix_server(kind).server_close()
    assert stat.S_ISSOCK(os.lstat("s").st_mode)
    with pytest.raises(OSError) as caught:
        unix_server(kind)
    assert caught.value.errno == errno.EADDRINUSE
    for _ in range(2):  # with nothing there, too
        with unix_server(kind, os.path.abspath("s").encode(), remove_stale_socket=True) as server:
            with socket.socket(socket.AF_UNIX, server.socket_type) as client:
                client.connect("s")
        os.unlink("s")


@pytest.mark.parametrize("kind", KINDS)
def test_a_socket_that_is_served_is_not_removed(impl: str, in_tmp_path: Path, kind: str) -> None:
    with unix_server(kind):
        inode = os.lstat("s").st_ino
        for other in KINDS:
            with pytest.raises(OSError) as caught:
                unix_server(other, remove_stale_socket=True, unlink_on_close=True)
            assert caught.value.errno == errno.EADDRINUSE
        assert os.lstat("s").st_ino == inode


def test_a_socket_whose_backlog_is_full_is_not_removed(impl: str, in_tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as client:
        busy.bind("s")
        busy.listen(0)
        client.connect("s")
        with pytest.raises(OSError) as caught:
            unix_server("Stream", remove_stale_socket=True)
        assert caught.value.errno == errno.EADDRINUSE
        assert os.path.lexists("s")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["file", "directory", "symlink", "pipe"])
def test_what_is_no_socket_is_not_removed(impl: str, in_tmp_path: Path, kind: str, what: str) -> None:
    if what == "file":
        (in_tmp_path / "s").write_text("mine")
    elif what == "directory":
        (in_tmp_path / "s").mkdir()
    elif what == "symlink":
        unix_server(kind, "left-over").server_close()
        os.symlink("left-over", "s")
    else:
        os.mkfifo("s")
    before = os.lstat("s")
    with pytest.raises(OSError) as caught:
        unix_server(kind, remove_stale_socket=True)
    assert caught.value.errno == errno.EADDRINUSE
    assert os.path.samestat(os.lstat("s"), before)
    assert what != "symlink" or os.path.lexists("left-over")


@pytest.mark.parametrize("kind", KINDS)
def test_of_servers_that_start_together_one_gets_the_address(
    impl: str, in_tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each may wait for the seven others, and each of these for a processor.
    monkeypatch.setattr(sockets, "LOCK_SECONDS", LIMIT)
    for _ in range(5):
        unix_server(kind).server_close()  # left over
        started: list[Any] = []
        refused: list[int | None] = []
        barrier = threading.Barrier(8)

        def start(started: list[Any] = started, refused: list[Any] = refused, barrier: Any = barrier) -> None:
            barrier.wait(LIMIT)
            try:
                started.append(unix_server(kind, remove_stale_socket=True, request_queue_size=64))
            except OSError as error:
                refused.append(error.errno)

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
        assert (len(started), refused) == (1, [errno.EADDRINUSE] * 7)
        with socket.socket(socket.AF_UNIX, started[0].socket_type) as client:
            client.connect("s")
        started[0].server_close()
        os.unlink("s")


def test_a_lock_that_somebody_holds_is_not_waited_for_without_end(
    impl: str, in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "LOCK_SECONDS", 0.03)
    held = os.open(".", os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="locked it for 0.03 seconds"):
            unix_server("Stream", remove_stale_socket=True)
    finally:
        os.close(held)
    assert os.listdir(".") == []
    with unix_server("Stream", remove_stale_socket=True):
        assert os.listdir(".") == ["s"]


@pytest.mark.parametrize("kind", KINDS)
def test_server_close_removes_the_file_if_it_is_told_to(
    impl: str, in_tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with unix_server(kind):
        pass
    assert os.path.lexists("s")
    os.unlink("s")
    (in_tmp_path / "elsewhere").mkdir()
    with unix_server(kind, unlink_on_close=True):
        assert os.path.lexists("s")
        monkeypatch.chdir(in_tmp_path / "elsewhere")
    assert os.listdir(in_tmp_path) == ["elsewhere"]


def test_server_close_leaves_alone_what_is_not_the_servers_own(impl: str, in_tmp_path: Path) -> None:
    with unix_server("Stream", unlink_on_close=True):
        os.unlink("s")
    with unix_server("Stream", unlink_on_close=True):
        os.rename("s", "old")
        (in_tmp_path / "s").write_text("somebody else's")
    assert (in_tmp_path / "s").read_text() == "somebody else's"
    os.unlink("s")
    with unix_server("Stream", unlink_on_close=True) as server:
        with unix_server("Stream", "other", unlink_on_close=False):
            os.replace("other", "s")
            server.server_close()
            assert os.path.lexists("s")


def test_a_file_that_cannot_be_removed_does_not_keep_the_listener_open(
    impl: str, in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = unix_server("Stream", unlink_on_close=True)

    def refuse(path: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(PermissionError):
        server.server_close()
    assert server.fileno() == -1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_does_not_remove_the_file(impl: str, in_tmp_path: Path) -> None:
    with unix_server("Stream", unlink_on_close=True) as server:
        child = os.fork()
        if child == 0:
            try:
                server.server_close()
            finally:
                os._exit(0 if os.path.lexists("s") else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert os.path.lexists("s")
    assert not os.path.lexists("s")


def test_a_listener_from_outside_keeps_its_file(impl: str, in_tmp_path: Path) -> None:
    class Server(fastserve.UnixStreamServer):
        unlink_on_close = True
        remove_stale_socket = True
        socket_mode = 0o600

    sock = listener("s", socket.AF_UNIX)
    os.chmod("s", 0o666)
    with Server.from_socket(sock, Upper):
        assert stat.S_IMODE(os.stat("s").st_mode) == 0o666
    assert os.path.lexists("s")


@linux
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [str, os.fsencode])
def test_an_abstract_address_is_served(module: ModuleType, kind: str, form: Any) -> None:
    name = f"\0fastserve-test-{os.getpid()}"
    server_class = getattr(module, f"Unix{kind}Server")
    with serving(server_class(form(name), Upper if kind == "Stream" else UpperDatagram), 0.01) as server:
        assert server.server_address == name.encode()
        if kind == "Stream":
            assert talk(name, b"a\n", socket.AF_UNIX) == b"A\n"
        else:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
                client.settimeout(LIMIT)
                client.bind(f"{name}-client")
                client.sendto(b"a", name)
                assert client.recv(10) == b"A"


@linux
def test_an_abstract_address_has_nothing_to_remove(impl: str) -> None:
    name = f"\0fastserve-test-{os.getpid()}"
    with unix_server("Stream", name, remove_stale_socket=True, unlink_on_close=True) as server:
        assert server.server_address == name.encode()
