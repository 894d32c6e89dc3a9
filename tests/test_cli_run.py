"""``fastserve run``: programs as they are, with fastserve in the place of socketserver."""

from __future__ import annotations

import contextlib
import os
import py_compile
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import pytest

import fastserve
from cli_support import HANDLERS, MODULE, SCRIPT, cli, run, started
from support import settle_before_signal

PROGRAM = """\
import json, os, sys, threading
main_module = sys.modules["__main__"]
spec = __spec__ and [__spec__.name, __spec__.origin]
print(json.dumps([
    __name__, sys.argv, sys.path, __file__, globals().get("__cached__") and "cached", __package__, spec, __doc__,
    type(__loader__).__name__, __loader__.get_filename("__main__") if __spec__ is None else None,
    main_module.__dict__ is globals(), type(__builtins__).__name__, sorted(set(vars()) - {"__annotations__"}),
    sys.stdin.read(), os.getcwd(),
], indent=1))
def later():
    threading.main_thread().join()
    print(sys.modules["__main__"] is main_module, os.path.basename(sys.argv[0]))
threading.Thread(target=later).start()
sys.exit(7)
"""
HOOK = """\
import sys, traceback
sys.excepthook = lambda kind, value, tb: print("hooked", value, [entry.name for entry in traceback.extract_tb(tb)])
"""
ARGUMENTS = ["--help", "-m", "x", "--", "-", "", "--version", "run", "a b"]


def assert_as_python(*args: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Assert that ``fastserve run`` and ``python`` do the same with ``args``; return what they do."""

    commands = [[sys.executable, *flags, *args], [sys.executable, *flags, "-m", "fastserve", "run", *args]]
    if not flags and os.path.exists(SCRIPT[0]):
        commands.append([*SCRIPT, "run", *args])
    with contextlib.ExitStack() as stack:  # they run side by side
        pipe = subprocess.PIPE
        processes = [
            stack.enter_context(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True))
            for command in commands
        ]
        for process in processes:
            stack.callback(process.kill)
        outcomes = [(*process.communicate("typed", timeout=120), process.wait()) for process in processes]
    assert all(outcome == outcomes[0] for outcome in outcomes), outcomes
    return subprocess.CompletedProcess(commands[0], outcomes[0][2], outcomes[0][0], outcomes[0][1])


@pytest.fixture
def program(here: Path) -> Path:
    """``here``, with the same program as a file, package, zip, compiled file and symbolic link."""
    (here / "program.py").write_text(PROGRAM)
    package = here / "package"
    package.mkdir()
    (package / "__init__.py").write_text("import sys\nprint(sys.argv)\n")
    (package / "__main__.py").write_text(PROGRAM)
    with zipfile.ZipFile(here / "program.zip", "w") as archive:
        archive.writestr("__main__.py", PROGRAM)
    py_compile.compile(str(here / "program.py"), cfile=str(here / "compiled.pyc"))
    (here / "bin").mkdir()
    (here / "bin" / "link").symlink_to("../program.py")
    return here


@pytest.mark.parametrize(
    "target",
    [
        "program.py",
        "./program.py",
        "bin/../program.py",
        "bin/link",
        "compiled.pyc",
        "package",
        "package/",
        "program.zip",
    ],
)
def test_run_of_a_path_is_what_python_does(program: Path, target: str) -> None:
    assert assert_as_python(target, *ARGUMENTS).returncode == 7


def test_run_of_an_absolute_path_and_after_two_dashes_is_what_python_does(program: Path) -> None:
    assert assert_as_python(str(program / "program.py"), *ARGUMENTS).returncode == 7
    assert assert_as_python("--", "program.py", *ARGUMENTS).returncode == 7


@pytest.mark.parametrize("module", ["program", "package", "package.__main__"])
def test_run_of_a_module_is_what_python_does(program: Path, module: str) -> None:
    assert assert_as_python("-m", module, *ARGUMENTS).returncode == 7
    assert assert_as_python(f"-m{module}", *ARGUMENTS).returncode == 7


@pytest.mark.parametrize("target", ["program.py", "package", "program.zip"])
def test_run_leaves_the_safe_path_safe(program: Path, target: str) -> None:
    environment_of_fastserve = os.path.dirname(os.path.dirname(fastserve.__file__))
    assert environment_of_fastserve in sys.path
    assert assert_as_python(target, flags=("-P",)).returncode == 7


@pytest.mark.parametrize(
    "source, status",
    [
        ("pass", 0),
        ("import sys; sys.exit()", 0),
        ("raise SystemExit(True)", 1),
        ("import sys; sys.exit('a text')", 1),
        ("import os; os._exit(4)", 4),
        ("def f():\n    nonsense\nf()", 1),
        ("try:\n    1 / 0\nexcept ZeroDivisionError:\n    raise KeyError('second')", 1),
        ("raise ExceptionGroup('several', [ValueError(1)])", 1),
        ("def f(:", 1),
        ("import no_such_module", 1),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        (f"{HOOK}\nnonsense", 1),
        ("import atexit; atexit.register(print, 'at exit'); print(__name__)", 0),
    ],
)
@pytest.mark.parametrize("dash_m", [False, True], ids=["script", "module"])
def test_run_ends_as_under_python(here: Path, source: str, status: int, dash_m: bool) -> None:
    (here / "ends.py").write_text(f"{source}\n")
    assert assert_as_python(*["-m", "ends"] if dash_m else ["ends.py"]).returncode == status


def test_a_program_is_interrupted_as_under_python(here: Path) -> None:
    (here / "sleeps.py").write_text("import time; print('ready', flush=True); time.sleep(300)\n")
    outcomes = []
    for command in [sys.executable], [*MODULE, "run"]:
        with subprocess.Popen(
            [*command, "sleeps.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                assert process.stdout.readline() == "ready\n"
                settle_before_signal(process.pid)
                process.send_signal(signal.SIGINT)
                status = process.wait(60)
                # The signal may come before the last call: only the marks under the line tell them apart.
                outcomes.append((status, [line for line in process.stderr if line.strip(" ~^\n")]))
            finally:
                process.kill()
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] == -signal.SIGINT


def test_run_puts_fastserve_in_the_place_of_socketserver(here: Path) -> None:
    (here / "asks.py").write_text(
        "import socketserver, http.server\nprint(http.server.HTTPServer.serve_forever.__module__)\n"
    )
    assert run([sys.executable, "asks.py"]).stdout == "socketserver\n"
    assert cli("run", "asks.py").stdout == cli("run", "-m", "asks").stdout == "fastserve.server\n"


def test_run_serves_the_stdlibs_http_server(here: Path) -> None:
    with started("run", "-m", "http.server", "0", "--bind", "127.0.0.1", PYTHONUNBUFFERED="1") as server:
        line = server.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+/", line)[0]
        assert fetch(url + "handlers.py") == HANDLERS
        assert "handlers.py</a>" in fetch(url)
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
        assert "Keyboard interrupt received" in server.stdout.read()
        assert "Traceback" not in server.stderr.read()


def fetch(url: str) -> str:
    if curl := shutil.which("curl"):
        got = run([curl, "--silent", "--show-error", "--fail", "--noproxy", "*", "--max-time", "60", url])
        assert got.returncode == 0, got.stderr
        return got.stdout
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=60) as answer:
        return answer.read().decode()
