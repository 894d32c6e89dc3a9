"""``fastserve serve --grace``: requests that run may end first."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli_support import WORKERS, address_of, connect, started
from support import settle_before_signal, wait_until, without_slow_handlers

HANDLERS = """
import http.server
import time

import fastserve


class Lines(fastserve.StreamRequestHandler):
    def handle(self):
        while True:
            with fastserve.idle(self):
                if not self.rfile.peek(1):
                    return
            line = self.rfile.readline()
            if line.startswith(b"sleep "):
                self.wfile.write(b"begun\\n")
                fastserve.sleep(float(line.split()[1]))
            if line.startswith(b"block "):
                self.wfile.write(b"begun\\n")
                time.sleep(float(line.split()[1]))
            self.wfile.write(line)


class Http(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        pass


class Slow(fastserve.BaseRequestHandler):
    def handle(self):
        data, listener = self.request
        listener.sendto(b"begun", self.client_address)
        fastserve.sleep(0.5)
        listener.sendto(data, self.client_address)
"""

pytestmark = pytest.mark.once
ENDLESS = "1000000"  # seconds that nobody waits


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "handlers.py").write_text(HANDLERS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def start() -> Any:
    @contextlib.contextmanager
    def start(target: str, worker: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
        arguments = [f"handlers:{target}", "--bind", "127.0.0.1:0", "--worker", worker, *options]
        with started("serve", *arguments) as server:
            yield server, address_of(server)

    return start


def lines(client: Any, sent: bytes = b"") -> Any:
    client.sendall(sent)
    return client.makefile("rb")


def signalled(server: subprocess.Popen[str], worker: str, signum: int = signal.SIGTERM) -> None:
    """Send a signal when a handler in the main thread sleeps, or waits for its client."""
    if worker in ("sync", "greenlet"):
        settle_before_signal(server.pid)
    server.send_signal(signum)


def ended(server: subprocess.Popen[str], said: str = "", probed: bool = False) -> None:
    assert server.wait(60) == 0
    assert server.stderr is not None
    text = without_slow_handlers(server.stderr.read())
    if probed:  # on a busy machine probes of refuses() that were accepted may not have ended
        text = re.sub(r"\d+ requests were", "1 request was", text)
    assert text == said


@pytest.mark.parametrize("worker", WORKERS)
def test_idle_clients_are_closed(start: Any, worker: str) -> None:
    with start("Lines", worker, "--grace", ENDLESS) as (server, address), connect(address) as client:
        with lines(client, b"hello\n") as file:
            assert file.readline() == b"hello\n"
            signalled(server, worker)
            assert file.read() == b""
        ended(server)


@pytest.mark.parametrize("worker", WORKERS)
def test_what_runs_is_finished(start: Any, worker: str) -> None:
    with start("Lines", worker, "--grace", ENDLESS) as (server, address), connect(address) as client:
        with lines(client, b"sleep 0.5\n") as file:
            assert file.readline() == b"begun\n"
            server.send_signal(signal.SIGTERM)
            assert file.read() == b"sleep 0.5\n"
        ended(server)


@pytest.mark.parametrize("asleep", [b"sleep 3600\n", b"block 3600\n"])
@pytest.mark.parametrize("worker", WORKERS)
def test_what_is_left_is_cut_off(start: Any, worker: str, asleep: bytes) -> None:
    with start("Lines", worker, "--grace", "1") as (server, address), connect(address) as client:
        with lines(client, asleep) as file:
            assert file.readline() == b"begun\n"
            signalled(server, worker)
            assert file.read() == b""
        ended(server, "fastserve: 1 request was cut off\n")


@pytest.mark.parametrize("asleep", [b"sleep 3600\n", b"block 3600\n"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("worker", WORKERS)
def test_a_second_signal_cuts_off_at_once(start: Any, worker: str, signum: int, asleep: bytes) -> None:
    with start("Lines", worker, "--grace", ENDLESS) as (server, address), connect(address) as client:
        with lines(client, asleep) as file:
            assert file.readline() == b"begun\n"
            signalled(server, worker)
            probed = worker in ("threads", "threadpool", "fork")
            if probed:
                # The listener is closed while the others are waited for: the first signal has come.
                wait_until(lambda: refuses(address))
            # In the main thread it sleeps again: two signals that came before it looks would be one.
            signalled(server, worker, signum)
            assert file.read() == b""
        ended(server, "fastserve: 1 request was cut off\n", probed)


def refuses(address: str) -> bool:
    try:
        connect(address).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        pass  # the listener was closed between the client's SYN and the end of the handshake: asked again, it refuses
    return False


@pytest.mark.parametrize("worker", WORKERS)
def test_ctrl_c_does_not_wait(start: Any, worker: str) -> None:
    with start("Lines", worker, "--grace", ENDLESS) as (server, address), connect(address) as client:
        with lines(client, b"sleep 3600\n") as file:
            assert file.readline() == b"begun\n"
            signalled(server, worker, signal.SIGINT)
            assert file.read() == b""
        ended(server, "fastserve: 1 request was cut off\n")


@pytest.mark.parametrize("options", [(), ("--workers", "1")])
@pytest.mark.parametrize("worker", WORKERS)
def test_http_needs_no_word_of_its_handler(start: Any, worker: str, options: tuple[str, ...]) -> None:
    with start("Http", worker, "--grace", ENDLESS, *options) as (server, address):
        client = http.client.HTTPConnection(*address.split(":"), timeout=60)  # type: ignore[arg-type]
        with contextlib.closing(client):
            for _ in range(2):
                client.request("GET", "/handlers.py")
                assert client.getresponse().read().decode() == HANDLERS
            sock = client.sock
            assert sock is not None
            if not options:
                signalled(server, worker)
            else:
                server.send_signal(signal.SIGTERM)
            assert sock.recv(1) == b""
        ended(server)


@pytest.mark.parametrize("worker", WORKERS)
def test_datagrams(start: Any, worker: str) -> None:
    with start("Slow", worker, "--grace", ENDLESS, "--udp") as (server, address):
        with connect(address, socket.SOCK_DGRAM) as client:
            client.send(b"datagram")
            assert client.recv(100) == b"begun"
            server.send_signal(signal.SIGTERM)
            assert client.recv(100) == b"datagram"
        ended(server)


@pytest.mark.skipif(sys.platform != "linux", reason="a process group of its own, as of a service")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_signal_to_all_processes_of_a_service_lets_children_finish(start: Any) -> None:
    with start("Lines", "fork", "--grace", ENDLESS) as (server, address), connect(address) as client:
        with lines(client, b"sleep 0.5\n") as file:
            assert file.readline() == b"begun\n"
            children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
            for pid in children:
                os.kill(int(pid), signal.SIGTERM)
            server.send_signal(signal.SIGTERM)
            assert file.read() == b"sleep 0.5\n"
        ended(server)
