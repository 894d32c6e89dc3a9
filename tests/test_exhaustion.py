"""More clients than there are descriptors, for each worker model and with worker processes."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import resource
import selectors
import signal
import socket
import sys
import time
from pathlib import Path
from typing import cast

import pytest

from support import LIMIT, wait_until
from test_prefork import program

CLIENTS = 500
DESCRIPTORS = 64  # of the process that serves
MODELS = ["ThreadingTCPServer", "ThreadPoolTCPServer"]
if importlib.util.find_spec("greenlet") is not None:
    MODELS.append("GreenletTCPServer")

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, and limits another process"),
]


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", MODELS)
def test_a_server_rests_while_it_has_no_descriptors_and_serves_all_in_the_end(
    impl: str, name: str, workers: int, tmp_path: Path
) -> None:
    with (
        program(tmp_path, impl, name, workers=workers, max_workers=100) as server,
        contextlib.ExitStack() as stack,
        selectors.DefaultSelector() as selector,
    ):
        pid = server.workers()[0] if workers else server.process.pid
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
        for _ in range(CLIENTS):
            client = stack.enter_context(server.connect())
            client.sendall(b"pid\n")
            selector.register(client, selectors.EVENT_READ)
        wait_until(lambda: "cannot accept" in server.errors())
        time.sleep(0.3)  # what could be accepted has been
        before = processor_seconds(pid)
        time.sleep(1.0)
        used = processor_seconds(pid) - before
        assert used < 0.2, f"it used {used:.2f} s of processor time in a second"
        served = 0
        deadline = time.monotonic() + LIMIT
        while served < CLIENTS:
            assert time.monotonic() < deadline, f"{served} were served"
            for key, _ in selector.select(1.0):
                client = cast(socket.socket, key.fileobj)
                assert client.recv(100) == b"%d\n" % pid
                selector.unregister(client)
                client.close()
                served += 1
        assert server.errors().count("cannot accept") == 1
        server.send(signal.SIGTERM)
        server.ended()
