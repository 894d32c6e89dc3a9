"""The page Migration, followed literally: each step is done, started with its command, and asked over HTTP."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import LIMIT, wait_until

PAGE = Path(__file__).resolve().parent.parent / "docs" / "migration.md"

# What the page tells to do, in its order: write a file, replace a line of it, start a server.
STEP = re.compile(
    r"^<!-- (?P<what>file|replace|start)(?:: (?P<which>[^\n]*))? -->\n```\w+\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as probe:
        # On Linux nobody else is given the port while it is held here; who asks for it by its number may have it too.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
        if sys.platform != "linux":
            probe.close()
        yield port


def answer_of(url: str) -> dict[str, object]:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url, timeout=LIMIT) as answer:
        found: dict[str, object] = json.load(answer)
        return found


def check_that_it_serves(command: str, port: int, directory: Path, processes: int) -> None:
    """Start a server, ask it until that many processes have answered, and stop it."""
    words = command.replace("8000", str(port)).split()
    program = {"python": [sys.executable], "fastserve": [sys.executable, "-m", "fastserve"]}[words[0]]
    errors = directory / "errors.txt"
    with errors.open("w") as file:
        server = subprocess.Popen([*program, *words[1:]], cwd=directory, stdout=subprocess.DEVNULL, stderr=file)
    try:
        answers: set[object] = set()

        def all_have_answered() -> bool:
            assert server.poll() is None, errors.read_text()
            try:
                found = answer_of(f"http://127.0.0.1:{port}/a")
            except OSError:
                return False  # not yet
            assert found["path"] == "/a"
            answers.add(found["process"])
            return len(answers) == processes

        wait_until(all_have_answered)
        assert (server.pid in answers) is (processes == 1)
        server.send_signal(signal.SIGTERM)
        server.wait(LIMIT)
        assert "Traceback" not in errors.read_text()
    finally:
        server.kill()
        server.wait()


@pytest.mark.once
@pytest.mark.skipif(importlib.util.find_spec("greenlet") is None, reason="greenlet is not installed")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes to fork here")
def test_the_steps_of_the_page_work_one_after_the_other(tmp_path: Path, port: int) -> None:
    app = tmp_path / "app.py"
    started = []
    for step in STEP.finditer(PAGE.read_text("utf-8")):
        text = step["text"].replace("8000", str(port))
        if step["what"] == "file":
            (tmp_path / step["which"]).write_text(text)
        elif step["what"] == "replace":
            source = app.read_text()
            assert source.count(step["which"] + "\n") == 1, step["which"]
            app.write_text(source.replace(step["which"] + "\n", text))
        else:
            two = "workers = 2" in app.read_text()
            check_that_it_serves(step["text"], port, tmp_path, processes=2 if two else 1)
            started.append(step["text"].split()[0])
    assert started == ["python", "fastserve", "python", "python", "python", "fastserve"]
