"""Servers of several processes behind a real HAProxy, restarted while they serve."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import LIMIT, talk, wait_until
from test_prefork import Program, program

CONFIGURATION = Path(__file__).parent.parent / "deploy" / "haproxy" / "haproxy.cfg"
SECONDS = 8.0  # of load
CLIENTS = 4

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc for what the processes are"),
    pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("greenlet") is None, reason="greenlet is not installed"),
]


@contextlib.contextmanager
def free_ports(count: int) -> Iterator[list[int]]:
    """Yield ports that nobody else is given: who asks for one by its number may have it beside who holds it here."""
    with contextlib.ExitStack() as stack:
        holders = [stack.enter_context(socket.socket()) for _ in range(count)]
        for holder in holders:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("127.0.0.1", 0))
        yield [int(holder.getsockname()[1]) for holder in holders]


@contextlib.contextmanager
def haproxy(tmp_path: Path, port: int, control: int, ports: list[int]) -> Iterator[None]:
    """Run HAProxy at a port, with the configuration that is recommended, before servers at ``ports``.

    :param control: the port at which it tells what it knows of them.
    """
    text = CONFIGURATION.read_text().replace("bind :8080", f"bind 127.0.0.1:{port}")
    text = text.replace("\nglobal\n", f"\nglobal\n    stats socket ipv4@127.0.0.1:{control}\n")
    # A server on a busy machine may take long to answer a check, and is up nevertheless.
    text = text.replace("\ndefaults\n", "\ndefaults\n    timeout check 30s\n")
    for number, server in enumerate(ports, 1):
        assert f":800{number}\n" in text
        text = text.replace(f":800{number}\n", f":{server}\n")
    file = tmp_path / "haproxy.cfg"
    file.write_text(text)
    with subprocess.Popen(["haproxy", "-db", "-f", str(file)], stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: answers(port))
            yield
        finally:
            process.kill()


def sends_to_both(control: int) -> bool:
    """Return whether HAProxy takes both servers to be up."""
    names, *rows = [line.split(",") for line in talk(("127.0.0.1", control), b"show stat\n").decode().splitlines()]
    place = names.index("status")
    return [row[place] for row in rows if row[:1] == ["app"] and row[1] != "BACKEND"] == ["UP", "UP"]


def answers(port: int) -> bool:
    try:
        return get(port) == 200
    except OSError:
        return False


def get(port: int) -> int:
    """Return the status of a request; -1 if its body is not what it should be."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
    try:
        connection.request("GET", "/")
        response = connection.getresponse()
        return response.status if response.read().isdigit() else -1
    finally:
        connection.close()


def test_no_request_fails_while_the_servers_are_restarted(impl: str, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()

    def start(stack: contextlib.ExitStack, number: int) -> Program:
        options = {"address": ["127.0.0.1", ports[number]], "allow_reuse_address": True}
        return stack.enter_context(program(folders[number], impl, "http", **options))

    with contextlib.ExitStack() as stack:
        port, control, *ports = stack.enter_context(free_ports(4))
        servers = [start(stack, number) for number in range(2)]
        stack.enter_context(haproxy(tmp_path, port, control, ports))
        ended = threading.Event()
        statuses: list[int] = []
        failed: list[str] = []

        def ask() -> None:
            while not ended.is_set():
                try:
                    status = get(port)
                except (OSError, http.client.HTTPException) as error:
                    failed.append(repr(error))
                else:
                    statuses.append(status)

        clients = [threading.Thread(target=ask) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        try:
            begun = time.monotonic()
            for number in range(1, 4):
                for server in servers:
                    server.send(signal.SIGHUP)
                    wait_until(lambda: len(server.started()) == 2 + 2 * number and len(server.workers()) == 2)  # noqa: B023
                    time.sleep(0.2)
            for number, server in enumerate(servers):
                wait_until(lambda: answers(ports[1 - number]))  # noqa: B023
                wait_until(lambda: sends_to_both(control))
                server.send(signal.SIGTERM)
                assert server.ended() == 0
                servers[number] = start(stack, number)
            time.sleep(max(SECONDS - (time.monotonic() - begun), 0.0))
            wait_until(lambda: len(statuses) > 100)
        finally:
            ended.set()
            for client in clients:
                client.join()
        assert not failed
        assert set(statuses) == {200}
        print(f"{len(statuses)} requests")
