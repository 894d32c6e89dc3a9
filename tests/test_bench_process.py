"""A server process under measurement: it starts or says why not, is measured as a whole, and is gone at the end."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastserve.bench import process
from fastserve.bench.process import ServerFailed, ServerProcess
from support import LIMIT, open_descriptors, wait_until

pytestmark = pytest.mark.alone

if sys.platform != "linux":
    pytest.skip("the processes are measured through /proc", allow_module_level=True)

PORT = "print(12345, flush=True)\n"
WAIT = "import signal\nsignal.pause()\n"
# A child or a thread that burns this much, and tells when it has by a file.
BURN = (
    "import os, sys, threading, time\n"
    "def burn():\n"
    "    begun = time.thread_time()\n"
    "    while time.thread_time() < begun + 0.2: pass\n"
)
BURNT = 0.2  # seconds


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What ends the servers when the test ends."""
    before = open_descriptors()
    with ExitStack() as stack:
        yield stack
    assert open_descriptors() == before


def start(stack: ExitStack, code: str, name: str = "server", **options: str) -> ServerProcess:
    """Start a server that runs ``code``; ``options`` go into its environment."""
    return stack.enter_context(ServerProcess(name, [sys.executable, "-c", code], None, options))


def is_alive(pid: int) -> bool:
    """Return whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_it_is_ready_when_it_has_printed_its_port(stack: ExitStack) -> None:
    server = start(stack, PORT + WAIT)
    assert server.address == ("127.0.0.1", 12345)
    assert is_alive(server.pid)
    server.check()


def test_it_has_the_environment_that_it_is_given_on_top_of_ours(stack: ExitStack) -> None:
    code = "import os\nprint(int(os.environ['THE_PORT']), flush=True)\nassert 'PATH' in os.environ\n" + WAIT
    assert start(stack, code, THE_PORT="77").address[1] == 77


def test_it_is_pinned_with_all_its_threads(stack: ExitStack) -> None:
    core = max(os.sched_getaffinity(0))
    server = stack.enter_context(ServerProcess("server", [sys.executable, "-c", PORT + WAIT], core))
    assert os.sched_getaffinity(server.pid) == {core}
    assert len(os.sched_getaffinity(start(stack, PORT + WAIT).pid)) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("raise SystemExit('the reason why')", 1, "the reason why"),
        ("raise SystemExit(3)", 3, "b''"),
        ("print('rubbish', flush=True)", 0, "b'rubbish\\\\n'"),
        ("import sys\nprint('rubbish', flush=True)\nsys.exit('the reason why')", 1, "the reason why"),
        ("print('1.5')", 0, "b'1.5\\\\n'"),
    ],
    ids=["dies", "dies silently", "rubbish", "rubbish and dies", "no port"],
)
def test_a_server_that_does_not_start_says_why(
    code: str, status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "STOP_LIMIT", LIMIT)  # however long it takes to end
    before = open_descriptors()
    with pytest.raises(ServerFailed, match=f"^the name did not start: .*{message}") as failed:
        ServerProcess("the name", [sys.executable, "-c", code], None)
    assert failed.value.status == status
    assert open_descriptors() == before


def test_a_server_that_prints_rubbish_and_goes_on_is_a_failure_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "STOP_LIMIT", 0.5)
    code = f"import os, sys\nprint('rubbish', os.getpid(), flush=True)\n{WAIT}"
    with pytest.raises(ServerFailed, match=r"did not start: b'rubbish \d+\\n'") as failed:
        ServerProcess("server", [sys.executable, "-c", code], None)
    assert not is_alive(int(str(failed.value).split()[-1].removesuffix("\\n'")))


@pytest.mark.parametrize("printed", ["", "12"], ids=["nothing", "half a line"])
def test_a_server_that_does_not_print_its_port_is_given_up(
    printed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pid = tmp_path / "pid"

    def select_later(*arguments: Any) -> Any:
        wait_until(lambda: pid.exists() and pid.read_text())  # however long it takes to start
        return select.select(*arguments)

    monkeypatch.setattr(process, "START_LIMIT", 0.5)
    monkeypatch.setattr(process, "select", SimpleNamespace(select=select_later))
    code = (
        "import os, sys\nsys.stderr.write('still thinking')\nsys.stderr.flush()\n"
        f"print({printed!r}, end='', flush=True)\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\n{WAIT}"
    )
    with pytest.raises(ServerFailed, match="did not start in .* seconds: still thinking"):
        ServerProcess("server", [sys.executable, "-c", code], None)
    assert not is_alive(int(pid.read_text()))


def test_a_command_that_is_not_there_leaves_no_descriptor() -> None:
    before = open_descriptors()
    with pytest.raises(ServerFailed, match="^server did not start: .*No such file or directory: '/no/such/command'$"):
        ServerProcess("server", ["/no/such/command"], None)
    assert open_descriptors() == before


def test_check_tells_of_a_server_that_has_ended(stack: ExitStack) -> None:
    code = PORT + "import sys\nsys.stderr.write('out of '); sys.stderr.flush()\nsys.stdin.read()\nsys.exit('luck')"
    server = start(stack, code)
    wait_until(lambda: not is_alive(server.pid))
    with pytest.raises(ServerFailed, match="^server ended with status 1: out of luck$") as failed:
        server.check()
    assert (failed.value.status, failed.value.errors) == (1, "out of luck")


def test_reading_its_errors_does_not_disturb_what_it_writes(stack: ExitStack) -> None:
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('second', file=sys.stderr, flush=True))\n"
        # Not pause(): a signal that comes just before it would be heeded at the next one.
        f"print('first', file=sys.stderr, flush=True)\n{PORT}while True: time.sleep(0.1)"
    )
    server = start(stack, code)
    assert server.errors() == "first"
    os.kill(server.pid, signal.SIGUSR1)
    wait_until(lambda: server.errors() == "first\nsecond")


def test_cpu_counts_what_the_process_burns_and_nothing_while_it_waits(stack: ExitStack) -> None:
    server = start(stack, BURN + "burn()\n" + PORT + WAIT)
    # It may be between the port and the wait.
    wait_until(lambda: state(server.pid) == "S")
    used = server.cpu()
    assert BURNT <= used < 5
    assert server.cpu() - used < 0.01


def test_cpu_counts_threads_that_have_ended(stack: ExitStack) -> None:
    code = (
        BURN + "for _ in range(2):\n    thread = threading.Thread(target=burn)\n    thread.start()\n    thread.join()\n"
    )
    assert start(stack, code + PORT + WAIT).cpu() >= 2 * BURNT


def test_cpu_counts_children_that_live_and_those_that_have_ended(stack: ExitStack) -> None:
    code = BURN + (
        "import signal\n"
        "r, w = os.pipe()\n"
        "for last in (False, True):\n"
        "    if os.fork() == 0:\n"
        "        burn()\n"
        "        os.write(w, b'x')\n"
        "        if last: signal.pause()\n"
        "        os._exit(0)\n"
        "    os.read(r, 1)\n"
        "    if not last: os.wait()\n"
    )
    server = start(stack, code + PORT + WAIT)
    assert len(children(server.pid)) == 1
    # The kernel counts that of ended ones in ticks.
    assert 2 * BURNT - 2 * process.TICK <= server.cpu() < 5


def test_cpu_counts_grandchildren_and_children_of_other_threads(stack: ExitStack) -> None:
    code = BURN + (
        "import signal, subprocess\n"
        "grandchild = 'import time\\nwhile time.thread_time() < 0.2: pass\\nprint(flush=True)\\ntime.sleep(60)'\n"
        "def run():\n"
        "    child = subprocess.Popen([sys.executable, '-c', grandchild], stdout=subprocess.PIPE)\n"
        "    child.stdout.readline()\n"
        "    done.set()\n"
        "    time.sleep(60)\n"
        "done = threading.Event()\n"
        "threading.Thread(target=run, daemon=True).start()\n"
        "done.wait()\n"
    )
    assert start(stack, code + PORT + WAIT).cpu() >= BURNT


def test_rss_is_what_the_process_has_resident(stack: ExitStack) -> None:
    small = start(stack, PORT + WAIT).rss()
    large = start(stack, "data = b'x' * 50_000_000\n" + PORT + WAIT).rss()
    assert small > 1_000_000
    assert 45_000_000 < large - small < 60_000_000


def test_pause_and_resume_hold_for_the_children_too(stack: ExitStack) -> None:
    server = start(stack, f"import os, time\nif os.fork() == 0: time.sleep(60)\n{PORT}{WAIT}")
    everybody = [server.pid, *children(server.pid)]
    assert len(everybody) == 2
    server.pause()
    wait_until(lambda: [state(pid) for pid in everybody] == ["T", "T"])
    server.resume()
    wait_until(lambda: [state(pid) for pid in everybody] == ["S", "S"])


def test_the_end_leaves_no_child_behind(monkeypatch: pytest.MonkeyPatch, stack: ExitStack) -> None:
    server = start(stack, f"import os, time\nif os.fork() == 0: time.sleep(60)\n{PORT}{WAIT}")
    everybody = [server.pid, *children(server.pid)]
    server.end()
    wait_until(lambda: not any(map(is_alive, everybody)))


def test_the_end_comes_by_force_if_need_be(monkeypatch: pytest.MonkeyPatch, stack: ExitStack) -> None:
    monkeypatch.setattr(process, "STOP_LIMIT", 0.2)
    code = (
        "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"if os.fork() == 0: time.sleep(60)\n{PORT}while True: signal.pause()\n"
    )
    server = start(stack, code)
    everybody = [server.pid, *children(server.pid)]
    begun = time.monotonic()
    server.end()
    assert time.monotonic() - begun >= 0.2
    wait_until(lambda: not any(map(is_alive, everybody)))


def test_the_end_finds_the_children_of_a_server_that_is_gone(stack: ExitStack) -> None:
    server = start(stack, f"import os, time\nprint(12345, flush=True)\nif os.fork() == 0: time.sleep(60)\n{WAIT}")
    wait_until(lambda: len(children(server.pid)) == 1)
    (orphan,) = children(server.pid)
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(server.pid))
    assert is_alive(orphan)
    server.end()
    wait_until(lambda: not is_alive(orphan))


def test_a_paused_server_ends_like_any_other(stack: ExitStack) -> None:
    code = (
        "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        + PORT
        + "while True: signal.pause()"
    )
    server = start(stack, code)
    server.pause()
    server.end()
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


def test_it_may_be_ended_twice(stack: ExitStack) -> None:
    server = start(stack, PORT + WAIT)
    server.end()
    server.end()
    assert not is_alive(server.pid)


def test_an_exception_in_its_block_ends_it() -> None:
    before = open_descriptors()
    with (
        pytest.raises(ZeroDivisionError),
        ServerProcess("server", [sys.executable, "-c", PORT + WAIT], None) as server,
    ):
        raise ZeroDivisionError
    assert not is_alive(server.pid)
    assert open_descriptors() == before


def test_two_processors_are_needed_for_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 1, 2})
    assert process.cores() == (1, 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1})
    with pytest.raises(ServerFailed, match="two processors"):
        process.cores()
