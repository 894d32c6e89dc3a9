"""``fastserve bench``, in processes of its own, for handlers that work and for handlers that do not."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastserve
from fastserve.bench import command
from fastserve.bench.measure import Load, Series
from fastserve.bench.report import Report, Row
from fastserve.cli import make_parser
from support import wait_until

pytestmark = pytest.mark.once

EXAMPLE = str(Path(__file__).parent.parent / "examples" / "echo_handlers.py")
ROUNDS = 3
QUICK = ("--duration", "0.3", "--connections", "3")
# The same program with fewer rounds, which waits less: for the time of day to change, and before each round.
HASTY = f"""
import sys
from fastserve.bench import command, measure, probe
from fastserve.cli import main
command.BETWEEN_PROBES = measure.WARM_UP = 0.02
command.ROUNDS = {ROUNDS}
sys.exit(main())
"""
NO_MODULE = "import sys; sys.modules[{!r}] = None; from fastserve.cli import main; sys.exit(main())"

HAVE_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
can_measure = importlib.util.find_spec("fastserve._load") and len(getattr(os, "sched_getaffinity", set)(0)) > 1
needs_load = pytest.mark.skipif(not can_measure, reason="no load generator, or not two processors")

HANDLERS = """
import os, socketserver, threading, fastserve

class Lines(fastserve.StreamRequestHandler):
    def answer(self, line):
        return line
    def handle(self):
        for line in self.rfile:
            self.wfile.write(self.answer(line))

class Raises(Lines):
    def answer(self, line):
        raise ValueError("about " + line.decode())

class RaisesAtTheEnd(Lines):
    def finish(self):
        super().finish()
        raise LookupError("when the client had gone")

class RaisesHalfway(Lines):
    def answer(self, line):
        self.wfile.write(b"hal")
        raise ValueError("halfway")

class Hangs(Lines):
    def answer(self, line):
        return b"hal"

class Leaves(Lines):
    def handle(self):
        self.rfile.readline()
        self.wfile.write(b"hal")

class NeverEnds(Lines):
    def handle(self):
        super().handle()
        threading.Event().wait()

class SaysMore(Lines):
    def answer(self, line):
        return line + b"and more"

class Differs(Lines):
    def answer(self, line):
        return type(self.server).__mro__[1].__module__.encode() + b"\\\\n"

class Varies(Lines):
    def answer(self, line):
        return os.urandom(4).hex().encode() + b"\\\\n"

class OneAnswer(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(self.rfile.readline())

class OneAtATime(fastserve.BaseRequestHandler):
    def handle(self):
        while self.request.recv(65536):
            self.request.sendall(b"one\\\\n")

class Prints(Lines):
    def answer(self, line):
        print("x" * 1000)
        return line

class Counts(Lines):
    count = 0
    def answer(self, line):
        Counts.count += 1
        return self.early(line) if Counts.count < 5 else self.late(line)
    def early(self, line):
        return line

class Changes(Counts):
    def late(self, line):
        return b"other\\\\n"

class FallsSilent(Counts):
    def late(self, line):
        return b""

class RaisesAtTimes(Counts):
    def late(self, line):
        if Counts.count % 50 == 0:
            raise ValueError("now and then")
        return line

class Datagrams(fastserve.DatagramRequestHandler):
    def handle(self):
        self.wfile.write(self.packet)

class NoDatagrams(fastserve.BaseRequestHandler):
    def handle(self):
        pass

class RaisesOnDatagrams(fastserve.BaseRequestHandler):
    def handle(self):
        raise ValueError("a datagram")

class TwoDatagrams(fastserve.BaseRequestHandler):
    def handle(self):
        data, listener = self.request
        for _ in range(2):
            listener.sendto(data, self.client_address)
""".replace("\\\\", "\\")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with ``handlers.py`` in it; nothing that was started in it may be left behind."""
    (tmp_path / "handlers.py").write_text(HANDLERS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    wait_until(lambda: processes(tmp_path) == [])  # the children of a server are killed, and gone a moment later


@pytest.fixture(scope="module")
def of_lines(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A measurement of a handler that works, drawn, in an encoding without the micro sign; and its directory."""
    directory = tmp_path_factory.mktemp("lines")
    (directory / "handlers.py").write_text(HANDLERS)
    options = ["--plot", "figures.png"] if HAVE_MATPLOTLIB else []
    command = [sys.executable, "-c", HASTY, "bench", "handlers.py:Lines", *QUICK, *options]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=directory, env=environment)
    return done, directory


def processes(directory: Path) -> list[str]:
    """Return the command lines of the processes that run in ``directory``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.name != str(os.getpid()) and os.readlink(process / "cwd") == str(directory):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def bench(*arguments: str, program: tuple[str, ...] = ("-c", HASTY)) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *program, "bench", *arguments], capture_output=True, text=True, timeout=120, encoding="utf-8"
    )


def figures(*arguments: str, servers: int = 2) -> tuple[str, dict[str, Any]]:
    """Measure; return what is printed and what the JSON says of a measurement without errors."""
    done = bench(*arguments, *QUICK, "--json", "figures.json")
    assert done.returncode == 0, done.stderr
    assert f"each of {servers} servers is probed" in done.stderr
    with open("figures.json", encoding="utf-8") as file:
        found: dict[str, Any] = json.load(file, parse_constant=pytest.fail)  # NaN is not JSON
    assert len(found["servers"]) == servers
    for server in found["servers"].values():
        assert server["errors"] == 0 and server["problem"] is None
        assert 0 < server["p50_us"] <= server["p99_us"]
        assert server["requests_per_second"] > 0
        assert len(server["rounds"]) == ROUNDS
    return done.stdout, found


# Handlers that work


@needs_load
@pytest.mark.alone
@pytest.mark.parametrize(
    "arguments",
    [("Echo",), ("Lines", "--pipeline", "4"), ("Datagrams", "--udp", "--pipeline", "4")],
    ids=["echo", "lines", "datagrams"],
)
def test_the_example_handlers_are_measured(here: Path, arguments: tuple[str, ...]) -> None:
    shown, found = figures(f"{EXAMPLE}:{arguments[0]}", *arguments[1:])
    assert set(found["servers"]) == {"stdlib threads", "fastserve threads"}
    assert found["answers_compared"]
    assert found["connections_kept"] is (None if "--udp" in arguments else True)
    assert found["machine"]["implementation"] == fastserve.implementation
    assert {"cpu", "kernel", "python", "fastserve", "date"} <= set(found["machine"])
    assert found["arguments"]["send"] == "hello\\n" and found["arguments"]["connections"] == 3
    stdlib, ours = found["servers"]["stdlib threads"], found["servers"]["fastserve threads"]
    assert stdlib["ratio"] is None
    assert ours["reference"] == "stdlib threads"
    assert 0 < ours["ratio_low"] <= ours["ratio"] <= ours["ratio_high"]
    header = next(line for line in shown.splitlines() if "requests/s" in line)
    assert [name in header for name in ("CPU µs/request", "p50 µs", "p99 µs", "errors", "ratio")] == [True] * 5
    assert re.search(r"^stdlib threads +[\d,]+\*? +\d+\.\d\d +[\d,]+ +[\d,]+ +0$", shown, re.MULTILINE)
    last = rf"{ours['ratio']:.2f} \({ours['ratio_low']:.2f}-{ours['ratio_high']:.2f}\)  stdlib threads"
    assert re.search(rf"^fastserve threads .* 0 +{last}$", shown, re.MULTILINE)


@needs_load
@pytest.mark.alone
def test_each_worker_model_is_compared_with_its_counterpart(here: Path) -> None:
    # The module is named, not its file; a name that is given twice is measured once.
    workers = ("--worker", "sync", "--worker", "fork", "--worker", "sync")
    shown, found = figures("handlers:OneAnswer", *workers, servers=4)
    references = {name: server["reference"] for name, server in found["servers"].items() if "fastserve" in name}
    assert references == {"fastserve sync": "stdlib sync", "fastserve fork": "stdlib fork"}
    assert found["connections_kept"] is False
    assert "ticks of 10 ms" in shown


@needs_load
@pytest.mark.alone
def test_a_pool_is_compared_with_the_stdlibs_threads_and_has_as_many_threads_as_asked_for(here: Path) -> None:
    _, found = figures("handlers:OneAnswer", "--worker", "threadpool", "--max-workers", "2", servers=2)
    assert found["servers"]["fastserve threadpool"]["reference"] == "stdlib threads"
    assert found["arguments"]["max_workers"] == 2


@needs_load
@pytest.mark.alone
def test_a_pool_of_kept_connections_is_said_to_serve_as_many_as_it_has_threads(here: Path) -> None:
    done = bench("handlers.py:Lines", "--worker", "threadpool", "--max-workers", "2", *QUICK)
    assert done.returncode == 0, done.stderr
    assert "threadpool serves 2 connections at a time: the other 1 waited to the end" in done.stdout


@needs_load
@pytest.mark.alone
def test_a_sync_server_of_kept_connections_is_said_to_serve_one(here: Path) -> None:
    done = bench("handlers.py:Lines", "--worker", "sync", *QUICK, "--json", "figures.json")
    assert done.returncode == 0, done.stderr
    assert "sync serves 1 connection at a time: the other 2 waited to the end, and count as errors" in done.stdout
    for server in json.loads(Path("figures.json").read_text("utf-8"))["servers"].values():
        assert server["errors"] == 2 * ROUNDS
        assert server["requests_per_second"] > 0


@needs_load
@pytest.mark.alone
def test_answers_may_be_told_by_their_size(here: Path) -> None:
    (here / "request.bin").write_bytes(b"\0\xff\nsome\n")
    _, found = figures(f"{EXAMPLE}:Echo", "--send", "@request.bin", "--until", "8")
    assert found["arguments"]["until"] == 8
    assert found["arguments"]["send_bytes"] == 8
    assert found["arguments"]["send"] == "\\x00\\xff\\nsome\\n"


@needs_load
@pytest.mark.alone
def test_answers_may_end_with_the_connection_and_have_the_time_in_them(here: Path) -> None:
    request = r"GET /handlers.py HTTP/1.0\r\n\r\n"
    # Not in haste: the two probes of this program are a second apart.
    command = ["http.server:SimpleHTTPRequestHandler", "--send", request, "--until", "close", "--json", "figures.json"]
    done = bench(*command, "--duration", "0.5", "--connections", "3", program=("-m", "fastserve"))
    assert done.returncode == 0, done.stderr
    found = json.loads((here / "figures.json").read_text("utf-8"))
    assert [len(server["rounds"]) for server in found["servers"].values()] == [5, 5]
    assert found["connections_kept"] is False
    assert not found["answers_compared"], "the field Date changes each second"
    assert "not compared under load" in done.stdout


@needs_load
@pytest.mark.alone
def test_answers_that_differ_each_time_are_not_compared(here: Path) -> None:
    shown, found = figures("handlers.py:Varies")
    assert not found["answers_compared"]
    assert "not compared under load" in shown


@needs_load
@pytest.mark.alone
def test_a_handler_that_prints_does_not_stand_still(here: Path) -> None:
    _, found = figures("handlers.py:Prints")
    assert all(one["requests"] for server in found["servers"].values() for one in server["rounds"])


@needs_load
@pytest.mark.alone
def test_it_is_announced_what_is_done_and_plain_lines_tell_how_far_it_is(
    of_lines: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    done, _ = of_lines
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert "threads" in lines[0] and "sync" in lines[0]
    assert re.match(r"This takes about \d+ s: each of 2 servers is probed .* 3 rounds of 0.1 s each", lines[1])
    assert lines[2:] == [f"round {number} of 3" for number in range(1, 4)]


@needs_load
@pytest.mark.alone
@pytest.mark.parametrize("rich", [True, False])
def test_a_terminal_with_rich_has_a_bar(here: Path, rich: bool) -> None:
    if rich and importlib.util.find_spec("rich") is None:
        pytest.skip("rich is not installed")
    without = "" if rich else "import sys; sys.modules['rich'] = None\n"
    master, terminal = os.openpty()
    with contextlib.closing(os.fdopen(master, "rb", buffering=0)) as screen:
        process = subprocess.Popen(
            [sys.executable, "-c", without + HASTY, "bench", "handlers.py:Lines", *QUICK],
            stdout=subprocess.DEVNULL,
            stderr=terminal,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
        )
        with process:
            os.close(terminal)
            shown = b""
            with contextlib.suppress(OSError):  # EIO: the last process that had the terminal has ended
                while data := screen.read(65536):
                    shown += data
    assert process.returncode == 0, shown
    assert (b"100%" in shown) == rich
    assert (b"round 3 of 3" in shown) == (not rich)


needs_matplotlib = pytest.mark.skipif(not HAVE_MATPLOTLIB, reason="matplotlib is not installed")


@needs_load
@needs_matplotlib
@pytest.mark.alone
def test_a_plot_is_drawn_as_png(of_lines: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    assert (of_lines[1] / "figures.png").read_bytes().startswith(b"\x89PNG")


@needs_load
@needs_matplotlib
@pytest.mark.alone
def test_a_plot_is_drawn_as_svg(here: Path) -> None:
    done = bench("handlers.py:Lines", *QUICK, "--plot", "figures.svg")
    assert done.returncode == 0, done.stderr
    assert (here / "figures.svg").read_bytes().startswith(b"<?xml")


@needs_load
@pytest.mark.alone
def test_an_encoding_without_the_micro_sign_is_no_obstacle(
    of_lines: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    done, _ = of_lines
    assert "CPU us/request" in done.stdout


# Handlers that do not


@needs_load
@pytest.mark.alone
@pytest.mark.parametrize(
    "arguments, said",
    [
        (["Raises"], "stdlib threads: the handler raised ValueError: about hello"),
        (["RaisesAtTheEnd"], "stdlib threads: the handler raised LookupError: when the client had gone"),
        (["RaisesHalfway"], "the handler raised ValueError: halfway\nreceived of it before: b'hal'"),
        (["Hangs"], "no whole answer within 1 s (an answer that ends with '\\n')\nreceived so far: b'hal'"),
        (
            ["Lines", "--send", "no end"],
            "no whole answer within 1 s (an answer that ends with '\\n')\nreceived so far: ",
        ),
        (["Lines", "--until", "close"], "did not end the connection within 1 s; received so far: b'hello\\n'"),
        (["Leaves"], "ended before a whole answer had come (it ends with '\\n')\nreceived: b'hal'"),
        (["NeverEnds"], "its client ended the connection, and 1 s later it had not done so"),
        (["SaysMore"], "the answer: b'hello\\n'; after it: b'and more'"),
        (["Lines", "--until", "3"], "the end of an answer, byte 3\nthe answer: b'hel'; after it: b'lo\\n'"),
        (["Differs"], "fastserve threads answers wrongly: it differs from stdlib threads\nb'fastserve."),
        (["OneAnswer", "--pipeline", "2"], "--pipeline 2: the handler ends its connection after one answer"),
        (
            ["OneAtATime", "--pipeline", "2"],
            "2 requests sent at once were not all answered within 1 s\nreceived so far",
        ),
        (["NoDatagrams", "--udp"], "no datagram came back within 1 s"),
        (["RaisesOnDatagrams", "--udp"], "the handler raised ValueError: a datagram"),
        (["TwoDatagrams", "--udp"], "more than one datagram came back for one\nthe first: b'hello\\n'; the second"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_handler_that_does_not_work_is_told_of_and_not_timed(here: Path, arguments: list[str], said: str) -> None:
    # Where an answer is waited for that never comes, it need not be for long.
    program = HASTY.replace("sys.exit", "probe.LIMIT = 1.0\nsys.exit") if "1 s" in said else HASTY
    done = bench(f"handlers.py:{arguments[0]}", *arguments[1:], "--json", "figures.json", program=("-c", program))
    assert (done.returncode, done.stdout) == (1, "")
    message = done.stderr[done.stderr.index("fastserve bench: ") :]
    assert said in message
    assert message.count("\n") <= 2
    assert "round" not in done.stderr.split("warm-up")[1]
    assert not os.path.exists("figures.json")


@needs_load
@pytest.mark.alone
@pytest.mark.parametrize(
    "handler, problem", [("Changes", r"wrong answers: [\d,]+ of [\d,]+"), ("FallsSilent", "no answers")]
)
def test_a_server_that_answers_wrongly_under_load_has_no_figures(here: Path, handler: str, problem: str) -> None:
    done = bench(f"handlers.py:{handler}", *QUICK, "--json", "figures.json")
    assert done.returncode == 1
    for name in "stdlib threads", "fastserve threads":
        assert re.search(rf"^{name} +{problem}$", done.stdout, re.MULTILINE)
        assert re.search(rf"^fastserve bench: {name}: {problem}$", done.stderr, re.MULTILINE)
    ours = json.loads((here / "figures.json").read_text())["servers"]["fastserve threads"]
    assert re.fullmatch(problem, ours["problem"])
    assert ours["requests_per_second"] is ours["cpu_us"] is ours["ratio"] is None


@needs_load
@pytest.mark.alone
def test_a_handler_that_raises_at_times_has_errors_and_a_note(here: Path) -> None:
    done = bench("handlers.py:RaisesAtTimes", *QUICK, "--json", "figures.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((here / "figures.json").read_text())["servers"]["fastserve threads"]["errors"] > 0
    assert "fastserve threads: under load the handler raised ValueError: now and then" in done.stdout


@needs_load
def test_an_error_in_the_module_of_the_handler_is_shown_as_python_shows_it(here: Path) -> None:
    (here / "broken.py").write_text("x = 1\nnonsense\n")
    done = bench("broken.py:Handler")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Traceback (most recent call last):\n  File ")
    assert f'{here}/broken.py", line 2, in <module>' in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "fastserve bench: stdlib threads did not start: NameError: name 'nonsense' is not defined"
    )


# The end by a signal


@needs_load
@pytest.mark.alone
@pytest.mark.parametrize("moment", ["This takes", "round 1"])
@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_everything(here: Path, moment: str, signum: signal.Signals, status: int) -> None:
    with started(moment, "--worker", "threads", "--worker", "fork") as process:
        assert len(processes(here)) > 4, "the servers run"
        process.send_signal(signum)
        assert process.wait(60) == status
        rest = process.stderr.read().splitlines()
        assert rest[-1] == "fastserve bench: stopped"
        assert all(line.startswith("round") for line in rest[:-1])
        wait_until(lambda: processes(here) == [])


@needs_load
def test_the_servers_do_not_outlive_a_command_that_is_killed(here: Path) -> None:
    with started("This takes") as process:
        assert len(processes(here)) == 3
        process.kill()
        process.wait(60)
        wait_until(lambda: processes(here) == [])


@contextlib.contextmanager
def started(moment: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start a measurement, and wait until it prints a line that begins with ``moment``."""
    with subprocess.Popen(
        [sys.executable, "-c", HASTY, "bench", "handlers.py:Lines", "--duration", "1", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith(moment):
                    break
            yield process
        finally:
            process.kill()


# Arguments


@needs_load
@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "MODULE:HANDLER"),
        (["handlers"], "'handlers' is not MODULE:HANDLER or FILE.py:HANDLER"),
        (["handlers.py:Nope"], "'handlers' has no attribute 'Nope'"),
        (["nope.py:Lines"], "cannot import 'nope.py'"),
        (["nope:Lines"], "No module named 'nope'"),
        (["handlers:Lines", "--worker", "nope"], "invalid choice: 'nope'"),
        (["handlers:Lines", "--max-workers", "2"], "--worker threadpool"),
        (["handlers:Lines", "--send", ""], "nothing to send"),
        (["handlers:Lines", "--send", "@nope"], "cannot read 'nope': No such file"),
        (["handlers:Lines", "--send", r"\q"], r"'\\q' is none of \n \r \t \0 \xHH \\"),
        (["handlers:Lines", "--until", r"\x4"], r"'\\x4' is none of"),
        (["handlers:Lines", "--until", "\\"], "is none of"),
        (["handlers:Lines", "--until", ""], "1 to 64 bytes"),
        (["handlers:Lines", "--until", "x" * 65], "1 to 64 bytes"),
        (["handlers:Lines", "--until", "0"], "'0' is not a whole number"),
        (["handlers:Lines", "--until", "close", "--pipeline", "2"], "one answer"),
        (["handlers:Lines", "--connections", "0"], "'0' is not a whole number"),
        (["handlers:Lines", "--connections", "2147483647"], "ulimit -Hn"),
        (["handlers:Lines", "--pipeline", "100000000"], "67108864 bytes"),
        (["handlers:Lines", "--duration", "0"], "'0' is not a number of seconds"),
        (["handlers:Lines", "--duration", "nan"], "'nan' is not a number of seconds"),
        (["handlers:Lines", "--json", "nope/figures.json"], "cannot write 'nope/figures.json'"),
        (["handlers:Lines", "--plot", "figures.pdf"], "draws .png and .svg"),
        (["handlers:Datagrams", "--udp", "--until", "5"], "--until is for connections"),
        (["handlers:Datagrams", "--udp", "--send", "x" * 8193], "at most 8192 bytes"),
        (["handlers:Datagrams", "--udp", "--pipeline", "1025"], "at most 1024"),
    ],
)
def test_wrong_arguments_give_one_line_and_status_2(here: Path, arguments: list[str], said: str) -> None:
    assert_refused(bench(*arguments), said)


def assert_refused(done: subprocess.CompletedProcess[str], said: str) -> None:
    assert done.stderr.startswith("fastserve bench: ") and said in done.stderr
    assert done.stderr.count("\n") == 1
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize(
    "code, arguments, said",
    [
        (NO_MODULE.format("fastserve._load"), [], "load generator"),
        (NO_MODULE.format("matplotlib"), ["--plot", "figures.svg"], 'pip install "fastserve[bench]"'),
        ("import sys; from fastserve.cli import main; sys.platform = 'darwin'; sys.exit(main())", [], "Linux"),
        (
            "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
            "from fastserve.cli import main; sys.exit(main())",
            [],
            "two processors",
        ),
    ],
    ids=["no load generator", "no matplotlib", "not Linux", "one processor"],
)
def test_what_the_machine_lacks_is_told_in_one_line(here: Path, code: str, arguments: list[str], said: str) -> None:
    if "sched" in code or "matplotlib" in code:
        if not can_measure:
            pytest.skip("no load generator, or not two processors")
    assert_refused(bench("handlers.py:Lines", *arguments, program=("-c", code)), said)


@pytest.mark.parametrize(
    "text, meant",
    [
        (r"a\n\r\t\0\x7F\\n", b"a\n\r\t\0\x7f\\n"),
        ("grüße", "grüße".encode()),
        (r"\x40file", b"@file"),
        (r"\01", b"\x001"),
    ],
)
def test_escapes_of_c_are_understood(text: str, meant: bytes) -> None:
    arguments = make_parser().parse_args(["bench", "a:B", "--send", text, "--until", text])
    assert (arguments.send, arguments.until) == (meant, meant)


@pytest.mark.parametrize(
    "text, meant", [("close", "close"), (r"\x63lose", b"close"), ("10", 10), (r"\x310", b"10"), (r"\r\n", b"\r\n")]
)
def test_the_end_of_an_answer_is_a_delimiter_a_size_or_the_end_of_the_connection(text: str, meant: object) -> None:
    assert make_parser().parse_args(["bench", "a:B", "--until", text]).until == meant


def test_the_help_shows_options_their_defaults_and_examples() -> None:
    shown = bench("--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("usage: fastserve bench ")
    words = " ".join(shown.stdout.split())
    for said in (r"'hello\n'", r"\x31\x30", "default: 10)", "default: 5)", "not with --udp", "default: threads"):
        assert said in words
    assert max(map(len, shown.stdout.splitlines())) <= 100


# Parts


def test_a_worker_model_that_the_stdlib_lacks_is_compared_with_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(command.WORKERS, "new", "New")
    assert [(entry.name, entry.reference) for entry in command.entries(["new", "sync"])] == [
        ("stdlib threads", "stdlib threads"),
        ("stdlib sync", "stdlib sync"),
        ("fastserve new", "stdlib threads"),
        ("fastserve sync", "stdlib sync"),
    ]
    assert [entry.name for entry in command.entries(["threads", "new"])] == [
        "stdlib threads",
        "fastserve threads",
        "fastserve new",
    ]


def series(name: str, *cpu: float, saturated: bool = False) -> Series:
    common = {"requests": 10, "requests_per_second": 10.0, "p50_us": 1.0, "p99_us": 2.0, "errors": 0, "wrong": 0}
    return Series(name, [common | {"cpu_us": one, "generator_saturated": saturated} for one in cpu])


@pytest.mark.parametrize(
    "requests, wrong, problem",
    [
        ((5, 5, 5), 0, ""),
        ((0, 0, 0), 0, "no answers"),
        ((5, 0, 5), 0, "no answers in 1 of 3 rounds; a longer --duration may help"),
        ((5, 0, 5), 2, "wrong answers: 6 of 10"),
    ],
)
def test_rounds_without_answers_or_with_wrong_ones_are_a_problem(
    requests: tuple[int, ...], wrong: int, problem: str
) -> None:
    mine = series("stdlib threads", 4.0, 8.0, 10.0)
    for one, number in zip(mine.rounds, requests, strict=True):
        one.update(requests=number, wrong=wrong)
    entry = command.Entry("stdlib", "threads", "stdlib threads")
    assert command.row(entry, {mine.name: mine}, "").problem == problem


def report(ours: Series, problem: str = "", cpu: tuple[float, ...] = (4.0, 8.0, 10.0)) -> Report:
    theirs = series("stdlib threads", *cpu)
    rows = [
        Row(theirs.name, "stdlib", "threads", theirs, theirs, problem, ""),
        Row(ours.name, "fastserve", "threads", ours, theirs, "", ""),
    ]
    return Report(rows, Load(b"x", answer=1, expected=b"x"), 3, 1.0)


def test_the_ratio_is_that_of_paired_rounds() -> None:
    found = report(series("fastserve threads", 2.0, 2.0, 4.0))
    assert "0.37 (0.25-0.50)  stdlib threads" in found.table()
    server = found.as_json({})["servers"]["fastserve threads"]
    assert (server["ratio_low"], server["ratio_high"]) == (0.25, 0.5)
    assert server["ratio"] == pytest.approx((0.5 * 0.25 * 0.4) ** (1 / 3))


def test_there_is_no_ratio_to_a_server_that_answers_wrongly() -> None:
    found = report(series("fastserve threads", 2.0, 2.0, 4.0), problem="no answers")
    assert "stdlib threads     no answers\n" in found.table()
    assert found.as_json({})["servers"]["fastserve threads"]["ratio"] is None
    assert found.problems() == ["stdlib threads: no answers"]


def test_a_rate_that_is_the_load_generators_own_is_marked_and_explained() -> None:
    found = report(series("fastserve threads", 2.0, 2.0, 4.0, saturated=True))
    assert "  10*  " in found.table()
    assert [note for note in found.notes() if note.startswith("* ") and "CPU per request still holds" in note]
    unmarked = report(series("fastserve threads", 2.0, 2.0, 4.0))
    assert "*" not in unmarked.table() + "".join(unmarked.notes())


def test_there_is_no_ratio_to_a_server_whose_time_was_too_short_to_be_counted() -> None:
    found = report(series("fastserve threads", 2.0, 2.0, 4.0), cpu=(0.0, 0.0, 0.0))
    assert found.as_json({})["servers"]["fastserve threads"]["ratio"] is None
    assert "nan" not in found.table()
