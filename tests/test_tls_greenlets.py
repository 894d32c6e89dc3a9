"""Connections with TLS that wait in a hub."""

from __future__ import annotations

import io
import os
import shutil
import socket
import socketserver
import ssl
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastserve
from fastserve import _loop
from support import LIMIT, serving, wait_until

pytest.importorskip("greenlet", reason="greenlets need the package greenlet")
pytest.importorskip("trustme")

from tls_support import ask, authority, client_context, client_of, server_context, wrapped  # noqa: E402

pytestmark = pytest.mark.usefixtures("impl")

ADDRESS = ("127.0.0.1", 0)
BIG = 1 << 23  # bytes; more than the kernel keeps


def server_of(handle: Callable[[Any], Any], context: ssl.SSLContext | None = None, **options: Any) -> Any:
    """Return a server whose handler calls ``handle`` with the connection."""

    def handler(request: Any, client_address: Any, server: Any) -> None:
        handle(request)

    return wrapped(fastserve.GreenletTCPServer(ADDRESS, handler), context, **options)


def upper(connection: Any) -> None:
    with connection.makefile("rb") as lines:
        for line in lines:
            connection.sendall(line.upper())


class Seen(list[Any]):
    """What a handler has to tell, in a test that waits for it."""

    def wait(self, count: int = 1) -> Seen:
        wait_until(lambda: len(self) >= count)
        return self


def raised(function: Callable[..., Any], *arguments: Any) -> tuple[type, str] | None:
    """Return the class and the message of what a call raises."""
    try:
        function(*arguments)
    except Exception as error:
        return type(error), str(error)
    return None


def test_the_connection_is_an_ssl_socket() -> None:
    seen = Seen()
    with serving(server_of(seen.append)) as server, client_of(server) as client:
        assert client.recv(1) == b""
    (connection,) = seen
    assert isinstance(connection, ssl.SSLSocket)
    assert type(connection) is fastserve.tls.Connection
    assert f"{type(connection).__module__}.{type(connection).__name__}" == "fastserve.tls.Connection"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_much_goes_both_ways_at_once(version: ssl.TLSVersion) -> None:
    payload = os.urandom(BIG)
    received = bytearray()

    def echo(connection: Any) -> None:
        while data := connection.recv(65536):
            connection.sendall(data)

    context = client_context(minimum_version=version, maximum_version=version)
    with serving(server_of(echo)) as server, client_of(server, context) as client:
        client.setblocking(False)
        left = memoryview(payload)
        while len(received) < BIG:
            if left:
                try:
                    left = left[client.send(left[:65536]) :]
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    pass
            try:
                received += client.recv(65536)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                pass
    assert bytes(received) == payload


def test_a_client_that_does_not_read_holds_up_nobody() -> None:
    def flood(connection: Any) -> None:
        if connection.recv(1) == b"f":
            connection.sendall(bytes(BIG))
        connection.sendall(b"done\n")

    with serving(server_of(flood)) as server, client_of(server) as client:
        client.sendall(b"f")
        assert ask(server, b"a") == b"done\n"
        with client.makefile("rb") as answer:
            assert answer.readline() == bytes(BIG) + b"done\n"


def test_timeouts_are_those_of_the_user() -> None:
    seen = Seen()

    def handle(connection: Any) -> None:
        connection.settimeout(0.01)
        seen.append(raised(connection.recv, 10))
        seen.append(raised(connection.recv_into, bytearray(10)))
        seen.append(raised(connection.sendall, bytes(BIG)))

    with serving(server_of(handle)) as server, client_of(server):
        seen.wait(3)
    assert seen == [
        (TimeoutError, "The read operation timed out"),
        (TimeoutError, "The read operation timed out"),
        (TimeoutError, "The write operation timed out"),
    ]


def test_after_a_timeout_a_read_may_be_tried_again() -> None:
    timed_out = threading.Event()

    def handle(connection: Any) -> None:
        connection.settimeout(0.01)
        with pytest.raises(TimeoutError):
            connection.recv(10)
        timed_out.set()
        connection.settimeout(LIMIT)
        connection.sendall(connection.recv(10).upper())

    with serving(server_of(handle)) as server, client_of(server) as client:
        assert timed_out.wait(LIMIT)
        client.sendall(b"late")
        assert client.recv(10) == b"LATE"


def state(connection: Any) -> Any:
    return connection.gettimeout(), connection.timeout, connection.getblocking()


@pytest.mark.parametrize("value", [None, 0, 0.0, 2, 1.5, -1, float("nan"), "1", 1e300])
def test_settimeout_is_that_of_a_socket(value: Any) -> None:
    seen = Seen()

    def handle(connection: Any) -> None:
        seen.append((raised(connection.settimeout, value), *state(connection)))

    with serving(server_of(handle)) as server, client_of(server):
        seen.wait()
    with socket.socket() as plain:
        assert seen == [(raised(plain.settimeout, value), *state(plain))]


def test_setblocking_is_that_of_a_socket() -> None:
    seen = Seen()

    def handle(connection: Any) -> None:
        for flag in (False, True):
            connection.setblocking(flag)
            seen.append(state(connection))
        connection.setblocking(False)
        seen.append(raised(connection.recv, 10))
        seen.append(raised(connection.send, bytes(BIG)))

    with serving(server_of(handle)) as server, client_of(server):
        seen.wait(4)
    assert seen[:2] == [(0.0, 0.0, False), (None, None, True)]
    assert [kind for kind, _ in seen[2:]] == [ssl.SSLWantReadError, ssl.SSLWantWriteError]


def test_what_openssl_holds_is_read_without_a_wait() -> None:
    seen = Seen()

    def handle(connection: Any) -> None:
        seen.append(connection.recv(1))
        seen.append(connection.pending())
        seen.append(connection.recv(4))
        buffer = bytearray(10)
        seen.append(bytes(buffer[: connection.recv_into(buffer)]))
        seen.append(connection.read(3))

    with serving(server_of(handle)) as server, client_of(server) as client:
        client.sendall(b"0123456789")
        client.sendall(b"abc")
        seen.wait(5)
    assert seen == [b"0", 9, b"1234", b"56789", b"abc"]


@pytest.mark.parametrize("how", ["close", "detach"])
def test_a_connection_that_another_greenlet_gives_up_ends_the_wait(how: str) -> None:
    seen = Seen()
    waiting: list[Any] = []

    def handle(connection: Any) -> None:
        if not waiting:
            waiting.append(connection)
            seen.append(raised(connection.recv, 10))
        else:
            result = getattr(waiting[0], how)()
            if how == "detach":
                seen.append(os.get_blocking(result))
                os.close(result)

    with serving(server_of(handle)) as server, client_of(server):
        wait_until(lambda: waiting)
        with client_of(server):
            seen.wait(1 + (how == "detach"))
    assert (OSError, "[Errno 9] Bad file descriptor") in seen
    assert seen[:-1] == ([True] if how == "detach" else [])


def test_a_connection_that_another_greenlet_shuts_down_is_at_its_end() -> None:
    seen = Seen()
    waiting: list[Any] = []

    def handle(connection: Any) -> None:
        if not waiting:
            waiting.append(connection)
            seen.append(connection.recv(10))
        else:
            waiting[0].shutdown(socket.SHUT_RDWR)

    with serving(server_of(handle)) as server, client_of(server):
        wait_until(lambda: waiting)
        with client_of(server):
            seen.wait()
    assert seen == [b""]


def test_greenlets_that_write_at_once_do_not_mix_their_bytes() -> None:
    size = BIG // 4
    failed = Seen()

    def handle(connection: Any) -> None:
        def write(letter: bytes) -> None:
            failed.append(raised(connection.sendall, letter * size))

        writers = [fastserve.spawn(write, letter) for letter in (b"a", b"b", b"c")]
        fastserve.sleep(0)
        write(b"d")
        for writer in writers:
            writer.join()

    with serving(server_of(handle)) as server, client_of(server) as client:
        received = b""
        with client.makefile("rb") as answer:
            received = answer.read(4 * size)
    assert failed == [None] * 4
    runs = [received[start : start + size] for start in range(0, 4 * size, size)]
    assert sorted(runs) == [letter * size for letter in (b"a", b"b", b"c", b"d")]


def test_a_writer_that_waits_for_another_may_time_out() -> None:
    seen = Seen()

    def handle(connection: Any) -> None:
        writer = fastserve.spawn(connection.sendall, bytes(BIG))
        fastserve.sleep(0.01)
        connection.settimeout(0.01)
        seen.append(raised(connection.sendall, b"x"))
        connection.setblocking(False)
        seen.append(raised(connection.send, b"x"))
        connection.settimeout(None)
        writer.join()

    with serving(server_of(handle)) as server, client_of(server) as client:
        seen.wait(2)
        with client.makefile("rb") as answer:
            assert answer.read(BIG) == bytes(BIG)
    assert seen[0] == (TimeoutError, "The write operation timed out")
    assert seen[1] is not None and seen[1][0] is ssl.SSLWantWriteError


def test_a_handler_that_need_not_wait_lets_others_have_their_turn() -> None:
    ticks = Seen()
    records = 200
    seen = Seen()
    sent = threading.Event()

    def handle(connection: Any) -> None:
        while not sent.is_set():
            fastserve.sleep(0.001)
        fastserve.spawn(ticks.append, None)
        for _ in range(records):
            assert connection.recv(1) == b"x"
            seen.append(len(ticks))

    with serving(server_of(handle)) as server, client_of(server) as client:
        for _ in range(records):
            client.sendall(b"x")
        sent.set()
        seen.wait(records)
    assert seen[0] == 0  # it had no turn while the handler did not wait
    assert seen[100] == 1


def test_a_connection_works_in_a_thread_without_a_hub() -> None:
    def handle(connection: Any) -> None:
        connection.settimeout(LIMIT)
        line = fastserve.to_thread(connection.recv, 10)
        fastserve.to_thread(connection.sendall, line.upper() + bytes(BIG))
        connection.settimeout(0.01)
        outcome = fastserve.to_thread(raised, connection.recv, 10)
        connection.sendall(b"in time" if outcome is None else outcome[1].encode())

    with serving(server_of(handle)) as server, client_of(server) as client:
        client.sendall(b"hello")
        with client.makefile("rb") as answer:
            assert answer.read(5 + BIG) == b"HELLO" + bytes(BIG)
            assert answer.read(28) == b"The read operation timed out"


def test_unwrap_ends_tls_and_leaves_a_connection_that_waits_in_the_hub() -> None:
    seen = Seen()

    def handle(connection: Any) -> None:
        assert connection.recv(10) == b"unwrap"
        plain = connection.unwrap()
        seen.append(plain is connection)
        with plain.makefile("rb") as lines:
            for line in lines:
                plain.sendall(line.upper())

    with serving(server_of(handle)) as server:
        with client_of(server) as client:
            client.sendall(b"unwrap")
            with client.unwrap() as plain, plain.makefile("rb") as answers:
                for line in (b"one\n", b"two\n"):
                    plain.sendall(line)
                    assert answers.readline() == line.upper()
                with client_of(server) as other:  # the first is waited for meanwhile
                    other.sendall(b"unwrap")
                    other.unwrap().close()
    assert seen == [True, True]


def test_after_unwrap_a_timeout_counts_too() -> None:
    seen = Seen()

    def handle(connection: Any) -> None:
        connection.recv(10)
        plain = connection.unwrap()
        plain.settimeout(0.01)
        seen.append(raised(plain.recv, 10))
        seen.append(raised(plain.recv_into, bytearray(10)))
        seen.append(raised(plain.sendmsg, [b"x"]))

    with serving(server_of(handle)) as server, client_of(server) as client:
        client.sendall(b"unwrap")
        with client.unwrap():
            seen.wait(3)
    assert [kind for kind, _ in seen] == [TimeoutError, TimeoutError, NotImplementedError]


def test_a_client_is_asked_for_its_certificate_after_the_handshake() -> None:
    # RFC 8446, 4.6.2. The server sends the question with its next write, and reads the answer with its next read.
    seen = Seen()

    def handle(connection: Any) -> None:
        assert connection.recv(10) == b"before"
        seen.append(connection.getpeercert())
        connection.verify_client_post_handshake()
        connection.sendall(b"asked")
        assert connection.recv(10) == b"after"
        seen.append(connection.getpeercert()["subjectAltName"])

    context = server_context(post_handshake_auth=True, verify_mode=ssl.CERT_REQUIRED)
    asking = client_context(certificate=True, post_handshake_auth=True)
    context.verify_mode = ssl.CERT_OPTIONAL
    with serving(server_of(handle, context)) as server, client_of(server, asking) as client:
        client.sendall(b"before")
        assert client.recv(10) == b"asked"
        client.sendall(b"after")
        seen.wait(2)
    assert seen[-1] == (("email", "client@client.test"),)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")
def test_keys_may_be_updated_in_between(tmp_path: Path) -> None:
    authority().cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    with serving(server_of(upper)) as server:
        host, port = server.server_address
        command = ["openssl", "s_client", "-connect", f"{host}:{port}", "-tls1_3"]
        command += ["-CAfile", str(tmp_path / "authority.pem")]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as client:
            assert client.stdin is not None and client.stdout is not None
            for line in (b"one\n", b"two\n"):
                client.stdin.write(line)
                client.stdin.flush()
                for answer in client.stdout:
                    if answer == line.upper():
                        break
                client.stdin.write(b"K\n")  # a command of s_client, at the beginning of what it reads at a time
                client.stdin.flush()
                for answer in client.stdout:
                    if answer == b"KEYUPDATE\n":
                        break
            client.stdin.write(b"three\n")
            client.stdin.flush()
            for answer in client.stdout:
                if answer == b"THREE\n":
                    break
            else:
                pytest.fail("the connection has ended")
            client.stdin.close()
            client.terminate()


def test_files_are_sent_and_text_is_read() -> None:
    content = os.urandom(1 << 20)

    def handle(connection: Any) -> None:
        with connection.makefile("r", encoding="utf-8") as text:
            assert text.readline() == "grüße\n"
        assert connection.sendfile(io.BytesIO(content), offset=1, count=1000) == 1000
        with open(os.devnull, "rb") as empty:
            assert connection.sendfile(empty) == 0

    with serving(server_of(handle)) as server, client_of(server) as client:
        client.sendall("grüße\n".encode())
        with client.makefile("rb") as answer:
            assert answer.read() == content[1:1001]


def test_what_an_ssl_socket_refuses_is_refused() -> None:
    seen = Seen()

    def handle(connection: Any) -> None:
        for name, arguments in CALLS:
            seen.append(raised(getattr(connection, name), *arguments))

    with serving(server_of(handle)) as server, client_of(server) as client:
        seen.wait(len(CALLS))
        expected = [raised(getattr(client, name), *arguments) for name, arguments in CALLS]
    assert [outcome and outcome[0] for outcome in seen] == [outcome and outcome[0] for outcome in expected]


CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("recv", (10, socket.MSG_PEEK)),
    ("recv_into", (bytearray(10), 10, socket.MSG_PEEK)),
    ("send", (b"x", socket.MSG_DONTWAIT)),
    ("sendall", (b"x", socket.MSG_DONTWAIT)),
    ("recvfrom", (10,)),
    ("recvfrom_into", (bytearray(10),)),
    ("sendto", (b"x", ADDRESS)),
    ("sendmsg", ([b"x"],)),
    ("recvmsg", (10,)),
    ("dup", ()),
    ("send", ("text",)),
    ("recv", (-1,)),
]


def test_a_handshake_that_is_left_to_the_handler_waits_in_the_hub() -> None:
    def handle(connection: Any) -> None:
        connection.do_handshake()
        upper(connection)

    with serving(server_of(handle, do_handshake_on_connect=False)) as server:
        with socket.create_connection(server.server_address, LIMIT):
            assert ask(server) == b"HELLO\n"


def test_a_handler_may_wrap_its_connection_itself() -> None:
    # It works, and holds up the others: what it makes is not fastserve's.
    context = server_context()
    seen = Seen()

    def handler(request: Any, client_address: Any, server: Any) -> None:
        with context.wrap_socket(request, server_side=True) as connection:
            seen.append((type(connection), connection.gettimeout()))
            upper(connection)

    with serving(fastserve.GreenletTCPServer(ADDRESS, handler)) as server:
        assert ask(server) == b"HELLO\n"
        assert ask(server) == b"HELLO\n"
    assert seen == [(ssl.SSLSocket, None)] * 2


def test_a_server_that_does_not_wait_ends_handshakes() -> None:
    server = server_of(upper)
    server.block_on_close = False
    with socket.create_connection(server.server_address, LIMIT) as client:
        with serving(server):
            (hub,) = wait_until(lambda: _loop.State.of(server).hubs) or _loop.State.of(server).hubs
            wait_until(lambda: hub.active == 1)
        assert client.recv(1) == b""


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")
def test_unix_sockets_may_be_wrapped_too(tmp_path: Path) -> None:
    class Upper(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            upper(self.request)

    path = str(tmp_path / "socket")
    with serving(wrapped(fastserve.GreenletUnixStreamServer(path, Upper))):
        with socket.socket(socket.AF_UNIX) as plain:
            plain.connect(path)
            with client_context().wrap_socket(plain, server_hostname="server.test") as client:
                client.sendall(b"a\n")
                assert client.recv(10) == b"A\n"
