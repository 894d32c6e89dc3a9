"""Worker processes: who answers, who watches over them, and how they end."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastserve
from conftest import TWINS
from support import LIMIT, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc for what the processes are and hold")

PROGRAM = Path(__file__).with_name("server_program.py")
MODELS = ["TCPServer", "ThreadingTCPServer", "ThreadPoolTCPServer", "ForkingTCPServer"]
needs_greenlet = pytest.mark.skipif(importlib.util.find_spec("greenlet") is None, reason="greenlet is not installed")
ALL = [*MODELS, pytest.param("GreenletTCPServer", marks=needs_greenlet)]


@pytest.fixture(params=sorted(TWINS))
def impl(request: pytest.FixtureRequest) -> str:
    """The implementation of the program."""
    return str(request.param)


def is_alive(pid: int) -> bool:
    """Return whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Program:
    """The program that runs, and a client of it."""

    def __init__(self, process: subprocess.Popen[str], errors: Path) -> None:
        self.process = process
        self.lines: list[str] = []
        self._errors = errors
        assert process.stdout is not None
        self._first = process.stdout.readline().split()
        assert len(self._first) == 2, self.errors()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.strip())

    @property
    def address(self) -> Any:
        return ("127.0.0.1", int(self._first[0])) if self._first[0].isdigit() else self._first[0]

    def errors(self) -> str:
        return self._errors.read_text()

    def started(self) -> list[int]:
        """Return the process ids of all workers that have started, in their order."""
        return [int(line.split()[2]) for line in list(self.lines) if line.startswith("worker")]

    def workers(self) -> list[int]:
        """Return those that are there."""
        return [pid for pid in self.started() if is_alive(pid)]

    def connect(self) -> socket.socket:
        family = socket.AF_INET if isinstance(self.address, tuple) else socket.AF_UNIX
        client = socket.socket(family)
        client.settimeout(LIMIT)
        client.connect(self.address)
        return client

    def ask(self, line: str = "pid") -> str:
        """Send a line on a connection of its own; return the answer."""
        with self.connect() as client:
            return exchange(client, line)

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def ended(self) -> int:
        """Wait for the end, and return the exit status."""
        status = self.process.wait(LIMIT)
        self._reader.join(LIMIT)
        return status


def exchange(client: socket.socket, line: str) -> str:
    client.sendall(line.encode() + b"\n")
    with client.makefile("rb") as file:
        return file.readline().decode().strip()


@contextlib.contextmanager
def program(tmp_path: Path, impl: str, name: str, **options: Any) -> Iterator[Program]:
    environment = {key: value for key, value in os.environ.items() if key != "FASTSERVE_NO_EXTENSIONS"}
    if impl == "py":
        environment["FASTSERVE_NO_EXTENSIONS"] = "1"
    options.setdefault("workers", 2)
    errors = tmp_path / "errors.txt"
    with errors.open("w") as file:
        waits = options.pop("waits", True)
        process = subprocess.Popen(
            [sys.executable, "-X", "dev", "-W", "ignore::DeprecationWarning", str(PROGRAM), name, json.dumps(options)],
            stdout=subprocess.PIPE, stderr=file, env=environment, text=True,
        )  # fmt: skip
    with process:
        found: Program | None = None
        try:
            found = Program(process, errors)
            if waits and not options.get("fails_while"):
                wait_until(lambda: len(found.started()) >= options["workers"])
            yield found
        finally:
            process.kill()
            process.wait()
            if found is not None:
                wait_until(lambda: not found.workers())


@pytest.mark.parametrize("name", ALL)
def test_workers_answer_and_sigterm_ends_all(impl: str, name: str, tmp_path: Path) -> None:
    with program(tmp_path, impl, name) as server:
        assert len(server.started()) == 2
        forks = name == "ForkingTCPServer"
        assert forks or int(server.ask()) in server.started()
        server.send(signal.SIGTERM)
        assert server.ended() == 0
        assert not server.workers() and "served" in server.lines
        assert server.errors() == ""
        assert server.lines[-1].startswith("left ")


@pytest.mark.parametrize("name", ALL)
def test_a_hundred_connections_are_spread(impl: str, name: str, tmp_path: Path) -> None:
    if name == "TCPServer":
        pytest.skip("a server without worker mix-in has one connection at a time")
    with program(tmp_path, impl, name, max_workers=100, max_children=100) as server:

        def answers() -> set[int]:
            with contextlib.ExitStack() as stack:
                clients = [stack.enter_context(server.connect()) for _ in range(100)]
                return {int(exchange(client, "pid")) for client in clients}

        if name == "ForkingTCPServer":
            assert len(answers()) == 100  # each from a child of a worker
        else:
            # On a busy machine one of them may not get a processor in the few milliseconds that a hundred take.
            wait_until(lambda: answers() == set(server.workers()))


def test_a_killed_worker_is_replaced_and_nothing_is_left_of_it(impl: str, tmp_path: Path) -> None:
    with program(tmp_path, impl, "ThreadingTCPServer") as server:
        before = os.listdir(f"/proc/{server.process.pid}/fd")
        for number in range(2, 8):
            os.kill(server.workers()[0], signal.SIGKILL)
            wait_until(lambda: len(server.started()) > number and len(server.workers()) == 2)  # noqa: B023
            assert int(server.ask()) in server.workers()
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        assert sorted(map(int, children.read_text().split())) == sorted(server.workers())  # no zombie
        # One more or less: the parent may not have been done with its last worker when they were counted first.
        wait_until(lambda: len(os.listdir(f"/proc/{server.process.pid}/fd")) <= len(before) + 1)
        # Killed between its line here and its word to the parent, a worker was not ready yet.
        assert server.errors().count("was killed by SIGKILL") == 6


def test_a_worker_that_ends_itself_is_replaced(impl: str, tmp_path: Path) -> None:
    with program(tmp_path, impl, "ThreadingTCPServer") as server:
        assert server.ask("exit") == ""
        wait_until(lambda: len(server.started()) == 3)
        assert "ended with status 7; another one takes its place" in server.errors()
        assert int(server.ask()) in server.workers()


def test_workers_that_do_not_start_are_tried_again_with_pauses(impl: str, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    flag.touch()
    with program(tmp_path, impl, "ThreadingTCPServer", fails_while=str(flag)) as server:
        wait_until(lambda: server.errors().count("before it was ready") >= 3)
        pauses = [
            float(line.rpartition("started in ")[2].split()[0])
            for line in server.errors().splitlines()
            if "before it was ready" in line
        ]
        assert pauses[:3] == [0.1, 0.2, 0.4]
        assert "RuntimeError: not now" in server.errors()
        flag.unlink()
        wait_until(lambda: len(server.workers()) == 2)
        assert int(server.ask()) in server.workers()


@pytest.mark.parametrize("name", ALL)
def test_a_worker_is_replaced_after_its_requests(impl: str, name: str, tmp_path: Path) -> None:
    with program(tmp_path, impl, name, workers=1, max_requests=5) as server:
        for number in range(1, 4):
            for _ in range(5):
                assert server.ask().isdigit()
            wait_until(lambda: len(server.started()) > number and len(server.workers()) == 1)  # noqa: B023
        assert server.errors() == ""


def test_a_worker_whose_loop_does_not_go_round_is_killed(impl: str, tmp_path: Path) -> None:
    with program(tmp_path, impl, "TCPServer", worker_timeout=0.5) as server:

        def replaces_the_one_that_blocks() -> bool:
            first = set(server.workers())
            # It may be killed before it has read the line.
            with contextlib.suppress(ConnectionError), server.connect() as client:
                assert exchange(client, "block 60") == ""  # the end of the connection
            wait_until(lambda: len(server.workers()) == 2 and set(server.workers()) != first)
            return len(first & set(server.workers())) == 1

        wait_until(replaces_the_one_that_blocks)  # on a busy machine the other one may be late too
        assert "has not answered for 0.5 s, and is killed" in server.errors()


@pytest.mark.parametrize("name", ALL)
def test_a_worker_that_answers_is_left_alone(impl: str, name: str, tmp_path: Path) -> None:
    if name == "TCPServer":
        pytest.skip("its loop does not go round while it handles a request")
    with program(tmp_path, impl, name, worker_timeout=0.6) as server:

        def leaves_them_alone() -> bool:
            before = server.started(), server.errors()
            with contextlib.suppress(ConnectionError), server.connect() as client:
                return exchange(client, "sleep 2") == "done" and (server.started(), server.errors()) == before
            return False

        wait_until(leaves_them_alone)  # on a busy machine a worker may be late although it goes round


@pytest.mark.parametrize("name", ALL)
def test_sigterm_lets_what_runs_end(impl: str, name: str, tmp_path: Path) -> None:
    with program(tmp_path, impl, name, daemon_threads=False) as server, server.connect() as client:
        assert exchange(client, "pid")
        client.sendall(b"sleep 1\n")
        wait_until(lambda: "sleeps" in server.lines)  # it has begun
        server.send(signal.SIGTERM)
        with client.makefile("rb") as file:
            assert file.readline() == b"done\n"
        client.close()
        assert server.ended() == 0 and not server.workers()


@pytest.mark.parametrize("name", ALL)
def test_what_does_not_end_in_time_is_cut_off(impl: str, name: str, tmp_path: Path) -> None:
    options = {"graceful_timeout": 0.3, "daemon_threads": False}
    with program(tmp_path, impl, name, **options) as server, server.connect() as client:
        assert exchange(client, "pid")
        server.send(signal.SIGTERM)
        assert server.ended() == 0 and not server.workers()
        assert client.recv(1) == b""  # no process is left that serves it
        assert "has not ended in time, and is killed" in server.errors()


ENDLESS = 10.0**6  # seconds that nobody waits


@pytest.mark.parametrize("name", ALL)
def test_a_worker_does_not_wait_for_idle_clients(impl: str, name: str, tmp_path: Path) -> None:
    options = {"kept": True, "graceful_timeout": ENDLESS, "workers": 1}
    with program(tmp_path, impl, name, **options) as server, server.connect() as client:
        first = server.workers()
        assert exchange(client, "pid")
        server.send(signal.SIGHUP)
        assert client.recv(1) == b""
        wait_until(lambda: len(server.workers()) == 1 and server.workers() != first)
        with server.connect() as other:
            assert exchange(other, "pid")
            server.send(signal.SIGTERM)
            assert other.recv(1) == b""
        assert server.ended() == 0 and not server.workers() and server.errors() == ""


@pytest.mark.parametrize("name", ["TCPServer", "ThreadingTCPServer"])
def test_a_worker_that_has_not_seen_the_signal_is_told_again(impl: str, name: str, tmp_path: Path) -> None:
    # One that comes just before recv(2) does not interrupt it.
    options = {"kept": True, "graceful_timeout": ENDLESS, "workers": 1, "deaf": True}
    with program(tmp_path, impl, name, **options) as server, server.connect() as client:
        assert exchange(client, "pid")
        server.send(signal.SIGTERM)
        assert client.recv(1) == b""
        assert server.ended() == 0 and server.errors() == ""


@pytest.mark.parametrize("name", ALL)
def test_a_worker_ends_what_runs_and_then_its_connection(impl: str, name: str, tmp_path: Path) -> None:
    options = {"kept": True, "graceful_timeout": ENDLESS, "workers": 1}
    with program(tmp_path, impl, name, **options) as server, server.connect() as client:
        assert exchange(client, "pid")
        client.sendall(b"sleep 1\n")
        wait_until(lambda: "sleeps" in server.lines)  # it has begun
        server.send(signal.SIGTERM)
        with client.makefile("rb") as file:
            assert file.read() == b"done\n"
        assert server.ended() == 0 and server.errors() == ""


def test_drain_in_the_parent_ends_the_workers(impl: str, tmp_path: Path) -> None:
    options = {"kept": True, "graceful_timeout": ENDLESS, "workers": 1}
    with program(tmp_path, impl, "ThreadingTCPServer", **options) as server, server.connect() as client:
        assert exchange(client, "pid")
        server.send(signal.SIGUSR1)
        assert client.recv(1) == b""
        assert server.ended() == 0 and not server.workers() and server.errors() == ""
        assert "drained 0" in " ".join(server.lines)


def test_drain_in_the_parent_returns_how_many_workers_were_killed(impl: str, tmp_path: Path) -> None:
    options = {"graceful_timeout": ENDLESS, "drain_timeout": 0.3, "workers": 2}
    with program(tmp_path, impl, "ThreadingTCPServer", **options) as server, server.connect() as client:
        assert exchange(client, "pid")
        server.send(signal.SIGUSR1)
        assert server.ended() == 0 and not server.workers()
        killed = server.errors().count("has not ended in time, and is killed")
        assert killed in (1, 2)  # on a busy machine the one without a client may be late too
        assert f"drained {killed}" in " ".join(server.lines)


@pytest.mark.parametrize("name", ALL)
def test_sigint_ends_all_at_once(impl: str, name: str, tmp_path: Path) -> None:
    with program(tmp_path, impl, name, daemon_threads=False) as server, server.connect() as client:
        assert exchange(client, "pid")
        server.send(signal.SIGINT)
        assert server.ended() == -signal.SIGINT
        assert not server.workers() and "served" in server.lines
        assert server.errors().rstrip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize("name", ALL)
def test_sighup_replaces_the_workers_and_no_request_fails(impl: str, name: str, tmp_path: Path) -> None:
    with program(tmp_path, impl, name) as server:
        ended = threading.Event()
        answers: list[str] = []

        def ask() -> None:
            while not ended.is_set():
                answers.append(server.ask())

        clients = [threading.Thread(target=ask) for _ in range(3)]
        for client in clients:
            client.start()
        try:
            for number in range(1, 4):
                server.send(signal.SIGHUP)
                wait_until(lambda: len(server.started()) == 2 + 2 * number and len(server.workers()) == 2)  # noqa: B023
        finally:
            ended.set()
            for client in clients:
                client.join()
        assert answers and all(answer.isdigit() for answer in answers)
        assert server.errors() == ""


def test_workers_that_cannot_be_replaced_go_on(impl: str, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    with program(tmp_path, impl, "ThreadingTCPServer", fails_while=str(flag / "never")) as server:
        first = server.workers()
        wait_until(lambda: len(server.workers()) == 2)
        first = server.workers()
        flag.mkdir()
        (flag / "never").touch()
        server.send(signal.SIGHUP)
        wait_until(lambda: "before it was ready" in server.errors())
        assert server.workers() == first and int(server.ask()) in first


@pytest.mark.parametrize("name", ALL)
def test_workers_end_when_their_parent_is_gone(impl: str, name: str, tmp_path: Path) -> None:
    with program(tmp_path, impl, name) as server:
        assert server.ask().isdigit()
        server.process.kill()
        server.process.wait()
        wait_until(lambda: not server.workers())


@pytest.mark.parametrize("name", ALL)
def test_shutdown_ends_the_workers_and_the_server_can_serve_again(impl: str, name: str, tmp_path: Path) -> None:
    with program(tmp_path, impl, name, again=True) as server:
        assert server.ask().isdigit()
        server.send(signal.SIGUSR2)
        wait_until(lambda: "served" in server.lines and len(server.started()) == 4)
        assert server.ask().isdigit()
        server.send(signal.SIGUSR2)
        assert server.ended() == 0 and "served again" in server.lines
        assert server.errors() == ""


@pytest.mark.parametrize("name", [name for name in ALL if name != "ForkingTCPServer"])
def test_a_handler_that_calls_shutdown_ends_the_server(impl: str, name: str, tmp_path: Path) -> None:
    with program(tmp_path, impl, name) as server:
        assert server.ask("shutdown") == "done"
        assert server.ended() == 0 and not server.workers() and server.errors() == ""


def test_service_actions_are_called_in_all_processes(impl: str, tmp_path: Path) -> None:
    with program(tmp_path, impl, "ThreadingTCPServer", counts_actions=True, workers=1) as server:
        wait_until(lambda: int(server.ask("count actions")) >= 3)


def test_handlers_of_the_program_stay(impl: str, tmp_path: Path) -> None:
    with program(tmp_path, impl, "ThreadingTCPServer", own_handlers=True) as server:
        server.send(signal.SIGTERM)
        wait_until(lambda: "own handler" in server.lines)
        assert len(server.workers()) == 2 and server.ask().isdigit()


@pytest.mark.parametrize("reuse_port", [False, True])
def test_datagrams_are_spread(impl: str, reuse_port: bool, tmp_path: Path) -> None:
    with program(tmp_path, impl, "UDPServer", reuse_port=reuse_port) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.socket(type=socket.SOCK_DGRAM)) for _ in range(64)]
        for client in clients:
            client.settimeout(LIMIT)
            client.sendto(b"pid", server.address)
        answers = {int(client.recv(100)) for client in clients}
        assert answers == set(server.workers()) if reuse_port else answers <= set(server.workers())
        server.send(signal.SIGTERM)
        assert server.ended() == 0


@pytest.mark.parametrize("name", ["ThreadingTCPServer", pytest.param("GreenletTCPServer", marks=needs_greenlet)])
def test_each_worker_may_have_its_own_listener(impl: str, name: str, tmp_path: Path) -> None:
    with program(tmp_path, impl, name, reuse_port=True, workers=3) as server:
        answers = {int(server.ask()) for _ in range(100)}
        assert answers == set(server.workers())
        os.kill(server.workers()[0], signal.SIGKILL)
        wait_until(lambda: len(server.started()) == 4)
        assert {int(server.ask()) for _ in range(100)} == set(server.workers())
        server.send(signal.SIGTERM)
        assert server.ended() == 0


@pytest.mark.parametrize("name", ["UnixStreamServer", "ThreadingUnixStreamServer"])
def test_unix_sockets(impl: str, name: str, tmp_path: Path) -> None:
    with program(tmp_path, impl, name, address=str(tmp_path / "socket")) as server:
        assert int(server.ask()) in server.workers()


@needs_greenlet
def test_http_with_greenlets(impl: str, tmp_path: Path) -> None:
    with program(tmp_path, impl, "http") as server:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.address[1]}/", timeout=LIMIT) as response:
            assert int(response.read()) in server.workers()
        server.send(signal.SIGTERM)
        assert server.ended() == 0 and server.errors() == ""


@pytest.mark.parametrize("workers", [0, -1])
def test_a_wrong_number_of_workers_is_refused(workers: int) -> None:
    class Server(fastserve.PreforkMixIn, fastserve.TCPServer): ...

    with Server(("127.0.0.1", 0), fastserve.BaseRequestHandler) as server:
        server.workers = workers
        with pytest.raises(ValueError, match="workers must be greater than 0"):
            server.serve_forever()


def test_serve_forever_after_shutdown_returns_at_once_without_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Server(fastserve.PreforkMixIn, fastserve.TCPServer): ...

    def fork() -> int:
        raise AssertionError("it has forked")

    with Server(("127.0.0.1", 0), fastserve.BaseRequestHandler) as server:
        monkeypatch.setattr(os, "fork", fork)
        server.shutdown()
        server.serve_forever()


def test_only_what_a_killed_worker_handles_fails(impl: str, tmp_path: Path, seconds: float = 5.0) -> None:
    """Kill a worker every 0.2 seconds, while clients send request after request."""
    with program(tmp_path, impl, "ThreadingTCPServer", workers=3) as server:
        parent = server.process.pid
        before = len(os.listdir(f"/proc/{parent}/fd"))
        ended = threading.Event()
        answers: list[str] = []
        failed: list[str] = []

        def ask() -> None:
            while not ended.is_set():
                try:
                    with server.connect() as client:
                        pid = exchange(client, "pid")
                        answers.append(pid) if pid.isdigit() else failed.append("no answer")
                except ConnectionError as error:
                    failed.append(type(error).__name__)

        clients = [threading.Thread(target=ask) for _ in range(4)]
        for client in clients:
            client.start()
        kills = 0
        try:
            begun = time.monotonic()
            while time.monotonic() - begun < seconds:
                wait_until(lambda: len(server.started()) == 3 + kills and len(server.workers()) == 3)  # noqa: B023
                os.kill(server.workers()[kills % 3], signal.SIGKILL)
                kills += 1
                time.sleep(0.2)
                wait_until(lambda: len(answers) > 10 * kills)  # noqa: B023
            wait_until(lambda: len(server.started()) == 3 + kills and len(server.workers()) == 3)
        finally:
            ended.set()
            for client in clients:
                client.join()
        # A worker has at most one request of each client.
        assert len(failed) <= 4 * kills, (failed, kills)
        assert server.errors().count("was killed by SIGKILL") == kills
        # One more or less: the parent may not have been done with its last worker when they were counted first.
        wait_until(lambda: len(os.listdir(f"/proc/{parent}/fd")) <= before + 1)
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        assert sorted(map(int, children)) == sorted(server.workers())
        server.send(signal.SIGTERM)
        assert server.ended() == 0
        print(f"{len(answers)} answers, {len(failed)} failed, {kills} kills")


@pytest.mark.parametrize("name", ALL)
def test_a_worker_that_gets_sigterm_ends_what_runs_and_is_replaced(impl: str, name: str, tmp_path: Path) -> None:
    with program(tmp_path, impl, name, workers=1) as server, server.connect() as client:
        (pid,) = server.workers()
        client.sendall(b"sleep 1\n")
        wait_until(lambda: "sleeps" in server.lines)  # it has begun
        os.kill(pid, signal.SIGTERM)
        with client.makefile("rb") as file:
            assert file.readline() == b"done\n"
        client.close()
        wait_until(lambda: len(server.started()) == 2 and server.workers() == server.started()[1:])
        assert server.ask().isdigit()
        assert "ended with status 0; another one takes its place" in server.errors()


def test_sigterm_may_come_before_the_workers_are_ready(impl: str, tmp_path: Path) -> None:
    for number in range(10):
        with program(tmp_path, impl, "ThreadingTCPServer", waits=False, graceful_timeout=LIMIT) as server:
            time.sleep(0.002 * number)
            server.send(signal.SIGTERM)
            assert server.process.wait(LIMIT / 2) in (0, -signal.SIGTERM)  # before serve_forever() nobody handles it


def test_a_unix_socket_is_shared() -> None:
    class Server(fastserve.PreforkMixIn, fastserve.UnixStreamServer):
        reuse_port = True

    with Server("\0fastserve-test-%d" % os.getpid(), fastserve.BaseRequestHandler) as server:  # noqa: UP031
        with pytest.raises(ValueError, match="reuse_port is for IPv4 and IPv6 addresses"):
            server.serve_forever()
