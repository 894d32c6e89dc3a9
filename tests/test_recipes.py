"""The page Recipes: what is not Python that runs by itself, which ``test_docs`` sees to."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastserve.cli import make_parser
from support import LIMIT
from test_testing import run_pytest

pytestmark = pytest.mark.once

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"


def blocks(heading: str, language: str) -> list[str]:
    """Return the blocks of a recipe in a language."""
    section = re.split(r"^## ", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    (recipe,) = (part for part in section if part.startswith(f"{heading}\n"))
    found = re.findall(rf"^```{language}\n(.*?)^```$", recipe, flags=re.DOTALL | re.MULTILINE)
    assert found, heading
    return found


@pytest.mark.skipif(not (shutil.which("openssl") and shutil.which("curl")), reason="openssl or curl is not here")
def test_a_web_server_with_tls(tmp_path: Path) -> None:
    make, serve, ask = blocks("A web server with TLS", "sh")[0].splitlines()
    subprocess.run(shlex.split(make), cwd=tmp_path, check=True, capture_output=True, timeout=LIMIT)
    (tmp_path / "page.txt").write_text("hello\n")
    name, *words = shlex.split(serve.replace(":8443", ":0"))
    assert name == "fastserve"
    errors = tmp_path / "errors.txt"
    with errors.open("w") as file:
        command = [sys.executable, "-m", "fastserve", *words]
        server = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=file, text=True)
    try:
        assert server.stdout is not None
        port = re.search(r"127\.0\.0\.1:(\d+)", server.stdout.readline())
        assert port, errors.read_text()
        url = shlex.split(ask.replace(":8443", f":{port[1]}"))
        # What this machine calls localhost, and whether it has a proxy, is not the question.
        own = ["--silent", "--show-error", "--noproxy", "*", "--resolve", f"localhost:{port[1]}:127.0.0.1"]
        answer = subprocess.run([*url, *own], cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT)
        assert answer.returncode == 0, answer.stderr
        assert "page.txt" in answer.stdout
        server.send_signal(signal.SIGTERM)
        assert server.wait(LIMIT) == 0
    finally:
        server.kill()
        server.communicate()


def test_a_service_of_systemd() -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(blocks("A service of systemd", "ini")[0])
    program, *words = unit["Service"]["ExecStart"].split()
    assert program.endswith("/bin/fastserve")
    args = make_parser().parse_args(words)
    assert args.workers and args.grace < int(unit["Service"]["TimeoutStopSec"])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_systemd_finds_nothing_wrong_with_the_service(tmp_path: Path) -> None:
    unit = tmp_path / "fastserve-recipe.service"
    # The program that it starts is not installed here.
    text = blocks("A service of systemd", "ini")[0]
    unit.write_text(re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", text, flags=re.MULTILINE))
    shown = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, timeout=120)
    assert (shown.returncode, [line for line in shown.stderr.splitlines() if "recipe" in line]) == (0, [])


def test_the_command_of_the_container_has_arguments_that_there_are() -> None:
    lines = dict(line.split(" ", 1) for line in blocks("A container", "dockerfile")[0].splitlines() if line)
    program, *words = json.loads(lines["ENTRYPOINT"])
    assert program == "fastserve"
    args = make_parser().parse_args([*words, *json.loads(lines["CMD"])])
    assert args.target == f"{lines['COPY'].split()[-1]}:Handler"
    assert args.bind.endswith(f":{lines['EXPOSE']}")


def test_the_tests_with_pytest_pass(tmp_path: Path) -> None:
    status, said = run_pytest(tmp_path, blocks("A test with pytest", "python")[0])
    assert status == 0, said
    assert "3 passed" in said


def test_prometheus_is_told_where_the_metrics_are() -> None:
    heading = "Metrics for Prometheus"
    args = make_parser().parse_args(shlex.split(blocks(heading, "sh")[0])[1:])
    assert re.findall(r'targets: \["(.*)"\]', blocks(heading, "yaml")[0]) == [args.metrics]
