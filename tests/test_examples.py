"""Every example, run as its reader runs it, and ended with Ctrl-C."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from children import FORK_BESIDE_THREADS, IMPLEMENTATIONS, TIME_LIMIT, Child, child
from support import talk, wait_until

EXAMPLES = Path(__file__).parent.parent / "examples"

Start = Callable[..., AbstractContextManager[Child]]


@pytest.fixture(params=IMPLEMENTATIONS)
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Start:
    """Start an example on either implementation: ``with start("name.py", "--option", "value") as example``."""

    def run(name: str, *arguments: str, allowed: tuple[str, ...] = ()) -> AbstractContextManager[Child]:
        return child(request.param, tmp_path, [str(EXAMPLES / name), *arguments], allowed)

    return run


def client(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run an example that is a client, and return how it ended."""
    return subprocess.run(
        [sys.executable, "-Werror", str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_child_runs_on_the_implementation_that_the_test_asks_for(implementation: str, tmp_path: Path) -> None:
    code = "import fastserve; print(fastserve.implementation)"
    with child(implementation, tmp_path, ["-c", code]) as example:
        assert example.end() == f"{implementation}\n"


def test_every_example_has_a_test_and_a_line_in_the_readme() -> None:
    names = sorted(path.name for path in EXAMPLES.glob("*.py"))
    tests = [name for name in globals() if name.startswith("test_")]
    assert names
    untested = [name for name in names if not any(test.startswith(f"test_{Path(name).stem}_") for test in tests)]
    assert untested == []
    lines = re.findall(r"^- `(.+?)`: \S", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(lines) == names


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
@pytest.mark.once
def test_every_example_explains_itself(path: Path) -> None:
    text = path.read_text()
    assert f"    python examples/{path.name}" in text.split('"""')[1], "the docstring says how to run it"
    if "argparse" in text:
        result = client(path.name, "--help")
        assert result.returncode == 0 and result.stdout.startswith("usage: ")


def test_upper_tcp_server_answers_each_client_in_capital_letters(start: Start) -> None:
    with start("upper_tcp_server.py") as server:
        port = server.port()
        assert talk(("127.0.0.1", port), b"hello\n") == b"HELLO\n"
        assert talk(("127.0.0.1", port), b"without an end") == b"WITHOUT AN END"
        assert server.interrupt() == (
            "received from 127.0.0.1: hello\nreceived from 127.0.0.1: without an end\nstopped\n"
        )


def test_upper_tcp_server_reads_on_when_a_line_comes_in_pieces(start: Start) -> None:
    with start("upper_tcp_server.py") as server:
        with socket.create_connection(("127.0.0.1", server.port()), timeout=60) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for piece in (b"in ", b"pieces", b"\n"):
                connection.sendall(piece)
            assert connection.makefile("rb").read() == b"IN PIECES\n"
        server.interrupt()


@pytest.mark.parametrize("name", ["upper_tcp_server.py", "upper_stream_server.py"])
def test_upper_tcp_client_prints_the_answer(start: Start, name: str) -> None:
    with start(name) as server:
        result = client("upper_tcp_client.py", "--port", str(server.port()), "hello", "wörld")
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == "sent:     hello wörld\nreceived: HELLO WöRLD\n"
        server.interrupt()


def test_upper_stream_server_answers_line_by_line(start: Start) -> None:
    with start("upper_stream_server.py") as server:
        port = server.port()
        with (
            socket.create_connection(("127.0.0.1", port), timeout=60) as connection,
            connection.makefile("rb") as lines,
        ):
            for word in (b"one", b"two"):
                connection.sendall(word + b"\n")
                assert lines.readline() == word.upper() + b"\n"
        assert talk(("127.0.0.1", port), b"a\nb\nc") == b"A\nB\nC"
        assert server.interrupt() == "stopped\n"


def test_echo_handlers_serve_their_clients_together(start: Start) -> None:
    with start("echo_handlers.py") as server:
        address = ("127.0.0.1", server.port())
        with socket.create_connection(address, timeout=60), socket.create_connection(address, timeout=60) as second:
            second.sendall(b"hello")
            assert second.recv(100) == b"hello"
            assert talk(address, b"a third") == b"a third"
            assert server.interrupt() == "stopped\n"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("handler", ["Echo", "Lines", "Datagrams"])
def test_echo_handlers_are_served_by_the_command_line(implementation: str, tmp_path: Path, handler: str) -> None:
    arguments = ["-m", "fastserve", "serve", f"{EXAMPLES / 'echo_handlers.py'}:{handler}", "--bind", "127.0.0.1:0"]
    kind = socket.SOCK_DGRAM if handler == "Datagrams" else socket.SOCK_STREAM
    arguments += ["--udp"] * (kind == socket.SOCK_DGRAM)
    with child(implementation, tmp_path, arguments) as server:
        found = re.search(r"127\.0\.0\.1:(\d+)", server.line())
        assert found
        with socket.socket(socket.AF_INET, kind) as connection:
            connection.settimeout(60)
            connection.connect(("127.0.0.1", int(found[1])))
            for line in (b"one\n", b"two\n"):
                connection.sendall(line)
                assert connection.recv(100) == line
        server.process.terminate()
        assert server.end() == ""


def test_upper_udp_server_answers_each_datagram(start: Start) -> None:
    with start("upper_udp_server.py") as server, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
        connection.settimeout(60)
        connection.connect(("127.0.0.1", server.port()))
        for word in (b"one", b"two"):
            connection.send(word)
            assert connection.recv(100) == word.upper()
        assert server.interrupt().endswith("stopped\n")


def test_upper_udp_client_prints_the_answer(start: Start) -> None:
    with start("upper_udp_server.py") as server:
        result = client("upper_udp_client.py", "--timeout", "60", "--port", str(server.port()), "hello", "world")
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == "sent:     hello world\nreceived: HELLO WORLD\n"
        server.interrupt()


def test_upper_udp_client_gives_up_without_an_answer() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        port = str(silent.getsockname()[1])
        result = client("upper_udp_client.py", "--timeout", "0.1", "--port", port, "hello")
        assert silent.recv(100) == b"hello\n"
    assert result.returncode == 1
    assert result.stderr == f"no answer from 127.0.0.1:{port} within 0.1 s\n"


def test_threading_server_serves_its_clients_together(start: Start) -> None:
    with start("threading_server.py", "--clients", "5") as example:
        example.port()
        answers = example.end().splitlines()
    # The handlers wait for each other: without threads there would be no answer at all.
    assert [answer.rpartition(": ")[2] for answer in answers] == [f"hello {number}" for number in range(1, 6)]
    assert len({answer.split(": ")[1] for answer in answers}) == 5, "a thread for each"


@pytest.mark.parametrize("threads", [1, 3])
def test_threadpool_server_answers_all_clients_in_a_few_threads(start: Start, threads: int) -> None:
    with start("threadpool_server.py", "--clients", "20", "--threads", str(threads)) as server:
        server.port()
        counts = dict(line.rsplit(": ", 1) for line in server.end().splitlines())
        assert set(counts) <= {f"WebServer-worker-{number}" for number in range(1, threads + 1)}
        assert sum(map(int, counts.values())) == 20


def test_greenlet_server_tells_all_clients_in_one_thread(start: Start) -> None:
    pytest.importorskip("greenlet", reason="greenlets need the package greenlet")
    with start("greenlet_server.py", "--clients", "50") as server:
        server.port()
        assert server.end() == "50 clients heard it, served by 1 thread\n"


def test_forking_server_answers_each_client_from_another_process(start: Start) -> None:
    with start("forking_server.py", allowed=(FORK_BESIDE_THREADS,)) as example:
        first_line = example.line()
        match = re.fullmatch(r"process (\d+) listening on 127\.0\.0\.1:\d+", first_line)
        assert match and int(match[1]) == example.process.pid
        answers = re.findall(r"^received: (\d+): (.+)$", example.end(), re.MULTILINE)
    assert [message for _, message in answers] == ["hello", "hello again"]
    assert len({match[1], *(pid for pid, _ in answers)}) == 3


def test_unix_server_serves_on_a_path_and_removes_it(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with start("unix_server.py", "serve", str(path)) as server:
        assert server.line() == f"listening on {path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert talk(str(path), b"a\nb\n", socket.AF_UNIX) == b"A\nB\n"
        asked = client("unix_server.py", "ask", str(path), "hello", "world")
        assert (asked.returncode, asked.stdout, asked.stderr) == (0, "received: HELLO WORLD\n", "")
        second = client("unix_server.py", "serve", str(path))
        assert second.returncode == 1 and "Address already in use" in second.stderr
        assert talk(str(path), b"still here\n", socket.AF_UNIX) == b"STILL HERE\n"
        assert server.interrupt() == "stopped\n"
    assert not path.exists()


def test_unix_server_takes_the_place_of_one_that_was_killed(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as killed:
        killed.bind(str(path))
    with start("unix_server.py", "serve", str(path)) as server:
        assert server.line() == f"listening on {path}"
        assert talk(str(path), b"a\n", socket.AF_UNIX) == b"A\n"
        server.interrupt()


def test_tls_server_gets_another_certificate_while_it_serves(start: Start, tmp_path: Path) -> None:
    pytest.importorskip("trustme", reason="certificates are made by the package trustme")
    from tls_support import client_context, client_of, serial_at, serial_of, write_authority, write_certificate

    cert, key = write_certificate(tmp_path)
    options = ["--cert", str(cert), "--key", str(key), "--port", "0", "--client-ca", str(write_authority(tmp_path))]
    with start("tls_server.py", *options) as server:
        address = SimpleNamespace(server_address=("127.0.0.1", server.port()))
        for said in ("the certificate was loaded again", "the certificate stays what it was: "):
            with client_of(address, client_context(certificate=True)) as connection, connection.makefile("rb") as lines:
                assert serial_at(connection) == serial_of(cert)
                assert lines.readline() == b"hello client@client.test, over TLSv1.3\n"
                connection.sendall(b"hello\n")
                assert lines.readline() == b"HELLO\n"
                write_certificate(tmp_path)
                if said.endswith(" "):
                    key.write_bytes(b"")
                server.process.send_signal(signal.SIGHUP)
                assert server.line().startswith(said)
                connection.sendall(b"hello\n")
                assert lines.readline() == b"HELLO\n"
        assert server.interrupt() == "stopped\n"


def test_access_control_lets_only_the_allowed_networks_in(start: Start) -> None:
    with start("access_control.py", "--allow", "192.0.2.0/24", "--allow", "127.0.0.0/8") as server:
        with socket.create_connection(("127.0.0.1", server.port()), timeout=60) as connection:
            assert connection.makefile("rb").read() == b"welcome, 127.0.0.1\n"
        assert server.interrupt() == "stopped\n"


def test_access_control_closes_the_connection_of_others(start: Start) -> None:
    with start("access_control.py", "--allow", "192.0.2.0/24") as server:
        with socket.create_connection(("127.0.0.1", server.port()), timeout=60) as connection:
            assert connection.makefile("rb").read() == b""
            # Ctrl-C between the two steps of closing, which are SHUT_WR and close(), would leave the socket open.
            wait_until(lambda: is_reset(connection))
        assert server.interrupt() == "refused 127.0.0.1\nstopped\n"


def is_reset(connection: socket.socket) -> bool:
    """Return whether the server has closed its socket altogether: it then refuses what is sent."""
    try:
        connection.send(b"?")
    except ConnectionError:
        return True
    return False


def test_several_servers_are_served_by_one_process(start: Start) -> None:
    with start("several_servers.py") as servers:
        ports = {}
        for _ in range(3):
            line = servers.line()
            ports[line.split()[0]] = int(line.rpartition(":")[2])
        assert len(set(ports.values())) == 3
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as clock:
            clock.settimeout(60)
            for _ in range(2):
                assert talk(("127.0.0.1", ports["upper"]), b"hello\n") == b"HELLO\n"
                assert talk(("127.0.0.1", ports["reverse"]), b"hello\n") == b"olleh\n"
                begun = datetime.now(UTC)
                clock.sendto(b"?", ("127.0.0.1", ports["time"]))
                told = datetime.fromisoformat(clock.recv(100).decode().strip())
                assert begun - timedelta(seconds=1) < told <= datetime.now(UTC)  # it tells whole seconds
        assert servers.interrupt() == "stopped\n"


def test_resp_server_keeps_what_its_clients_store(start: Start) -> None:
    with start("resp_server.py") as server:
        port = server.port()
        assert (
            talk(("127.0.0.1", port), b"SET greeting hello\r\nINCR visits\r\nINCR visits\r\n") == b"+OK\r\n:1\r\n:2\r\n"
        )
        assert talk(("127.0.0.1", port), b"*2\r\n$3\r\nGET\r\n$8\r\ngreeting\r\n") == b"$5\r\nhello\r\n"
        assert talk(("127.0.0.1", port), b"*2\r\nGET\r\n").startswith(b"-ERR Protocol error")
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(b"PING\r\n")
            assert connection.recv(100) == b"+PONG\r\n"
            # A client that stays does not keep the server from its end.
            assert server.interrupt() == "stopped\n"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    """A Redis of its own, on a Unix socket; its URL."""
    pytest.importorskip("redis", reason="redis-py is not installed")
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    path = tmp_path / "redis.sock"
    options = ["--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(tmp_path)]

    def listens() -> bool:  # not yet when there is the path
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(path)) == 0

    with subprocess.Popen([program, *options], stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(listens)
            yield f"unix://{path}"
        finally:
            process.terminate()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_redis_counter_is_shared_by_all_processes_and_outlives_them(start: Start, redis: str) -> None:
    counted = 0
    for _ in range(2):
        with start("redis_counter.py", "--workers", "2", "--redis", redis) as server:
            port = server.port()
            processes: set[str] = set()

            def count(port: int = port, processes: set[str] = processes) -> bool:
                nonlocal counted
                counted += 2
                first, second = talk(("127.0.0.1", port), b"a\nb\n").decode().splitlines()
                name, _, number = second.partition(": ")
                assert (first, int(number)) == (f"{name}: {counted - 1}", counted)
                processes.add(name)
                return len(processes) == 2

            wait_until(count)
            assert server.interrupt() == "stopped\n"


class Talker:
    """A client of the chat who reads."""

    def __init__(self, port: int, nick: str) -> None:
        self.nick = nick
        self.connection = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._lines = self.connection.makefile("r", encoding="utf-8", newline="\n")
        assert self.line() == "* what is your nick name?"
        self.say(nick)

    def say(self, line: str) -> None:
        self.connection.sendall(f"{line}\n".encode())

    def line(self) -> str:
        return self._lines.readline().rstrip("\n")

    def wait_for(self, wanted: str) -> list[str]:
        """Return the lines up to ``wanted``, with it."""
        lines = []
        while not lines or lines[-1] != wanted:
            line = self.line()
            assert line, f"{self.nick} was put out before {wanted!r}"
            lines.append(line)
        return lines

    def close(self) -> None:
        self._lines.close()
        self.connection.close()


@pytest.fixture
def guests() -> Iterator[ExitStack]:
    """What closes the clients when the test ends."""
    with ExitStack() as stack:
        yield stack


def enter(guests: ExitStack, port: int, nick: str) -> Talker:
    """Bring a client into the chat."""
    talker = Talker(port, nick)
    guests.callback(talker.close)
    talker.wait_for(f"* {nick} is here")
    return talker


def test_chat_server_asks_for_a_free_nick_name_and_lists_those_present(start: Start, guests: ExitStack) -> None:
    with start("chat_server.py") as server:
        port = server.port()
        ada = enter(guests, port, "ada")
        second = Talker(port, "ada")
        guests.callback(second.close)
        assert second.line() == "* ada is here already: what is your nick name?"
        second.say("two words")
        assert second.line().startswith("* a nick name has 1 to 20")
        second.say("ben")
        second.wait_for("* ben is here")
        second.say("/who")
        assert second.line() == "* here: ada, ben"
        second.say("hello")
        assert ada.wait_for("ben: hello") == ["* ben is here", "ben: hello"]
        second.say("/quit")
        assert [second.line(), second.line(), second.line()] == ["ben: hello", "* goodbye", ""]
        assert ada.line() == "* ben has left"
        again = enter(guests, port, "ben")
        again.say("x" * 5000)
        assert ada.wait_for("* ben has left") == ["* ben is here", "* ben has left"], "a line has a limit"
        assert server.interrupt() == "stopped\n"


def test_chat_server_is_not_stopped_by_clients_that_vanish_or_do_not_read(start: Start, guests: ExitStack) -> None:
    with start("chat_server.py", "--outbox-limit", "32768") as server:
        port = server.port()
        talkers = [enter(guests, port, f"guest{number}") for number in range(50)]
        host = talkers[0]

        # One vanishes with a reset.
        ghost = enter(guests, port, "ghost")
        ghost.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        ghost.close()
        host.wait_for("* ghost has left")

        # One does not read, and keeps its window small, so that it counts soon.
        sloth = guests.enter_context(socket.socket())
        sloth.settimeout(60)
        sloth.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sloth.connect(("127.0.0.1", port))
        sloth.sendall(b"sloth\n")
        for talker in talkers:
            talker.wait_for("* sloth is here")

        heard: list[list[str]] = [[] for _ in talkers]
        gone = threading.Event()
        for number in range(200):
            for talker in talkers[:4]:
                talker.say(f"{number} " + "x" * 1000)
            host.say(f"end of round {number}")
            for talker, lines in zip(talkers, heard, strict=True):
                lines += talker.wait_for(f"guest0: end of round {number}")
            if "* sloth has left" in heard[0]:
                gone.set()
                break
        assert gone.is_set(), "the client that does not read was never put out"
        host.say("/who")
        present = host.line()
        while not present.startswith("* here: "):
            present = host.line()
        assert sorted(present.removeprefix("* here: ").split(", ")) == sorted(talker.nick for talker in talkers)
        said = [[line for line in lines if line.startswith("guest")] for lines in heard]
        assert len(said[0]) >= 5
        for talker, lines in zip(talkers, said, strict=True):
            assert len(lines) >= 1 and lines[-1] == said[0][-1]
            assert lines == said[0], f"{talker.nick} heard something else"

        assert "stopped\n" in server.interrupt()
        for talker in talkers:
            while talker.line():  # up to the end of the connection; a reset would raise, and no end at all too
                continue
