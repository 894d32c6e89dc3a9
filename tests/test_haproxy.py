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

from support import LIMIT, wait_until
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


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def haproxy(tmp_path: Path, ports: list[int]) -> Iterator[int]:
    """Run HAProxy with the configuration that is recommended, before servers at these ports; yield its own."""
    port = free_port()
    text = CONFIGURATION.read_text().replace("bind :8080", f"bind 127.0.0.1:{port}")
    for number, server in enumerate(ports, 1):
        assert f":800{number}\n" in text
        text = text.replace(f":800{number}\n", f":{server}\n")
    file = tmp_path / "haproxy.cfg"
    file.write_text(text)
    with subprocess.Popen(["haproxy", "-db", "-f", str(file)], stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: answers(port))
            yield port
        finally:
            process.kill()


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
    ports = [free_port() for _ in folders]

    def start(stack: contextlib.ExitStack, number: int) -> Program:
        options = {"address": ["127.0.0.1", ports[number]], "allow_reuse_address": True}
        return stack.enter_context(program(folders[number], impl, "http", **options))

    with contextlib.ExitStack() as stack:
        servers = [start(stack, number) for number in range(2)]
        port = stack.enter_context(haproxy(tmp_path, ports))
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
                time.sleep(1.0)  # so long that HAProxy knows it too
                server.send(signal.SIGTERM)
                assert server.ended() == 0
                servers[number] = start(stack, number)
            time.sleep(max(SECONDS - (time.monotonic() - begun), 0.0))
        finally:
            ended.set()
            for client in clients:
                client.join()
        assert not failed
        assert set(statuses) == {200} and len(statuses) > 100
        print(f"{len(statuses)} requests")
