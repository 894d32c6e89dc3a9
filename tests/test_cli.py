"""The command line, in processes of its own: ``python -m fastserve`` and the script ``fastserve``."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import py_compile
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastserve
from fastserve import pollers
from fastserve.cli import _resolve
from support import wait_until

MODULE = [sys.executable, "-m", "fastserve"]
QUICK = 20.0  # seconds; a bound for a busy machine, below the time for which a client waits
SCRIPT = [str(Path(sys.executable).with_name("fastserve"))]

NEEDS_GREENLET = pytest.mark.skipif(importlib.util.find_spec("greenlet") is None, reason="greenlet is not installed")
WORKERS = [
    pytest.param("greenlet", marks=NEEDS_GREENLET),
    "sync",
    "threads",
    "threadpool",
    pytest.param("fork", marks=pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")),
]

needs_unix = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets")

HANDLERS = """
import os, sys, fastserve

class Lines(fastserve.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            if line == b"raise\\n":
                raise RuntimeError("from the handler")
            self.wfile.write(line.upper())

class Packets(fastserve.DatagramRequestHandler):
    def handle(self):
        self.wfile.write(self.packet.upper())

class Outer:
    class Lines(Lines):
        pass

def function(request, client_address, server):
    request.sendall(b"from a function")

class Pid(fastserve.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"%d\\n" % os.getpid())
        self.request.recv(1)

class Sleeping(fastserve.BaseRequestHandler):
    def handle(self):
        import time
        self.request.sendall(b"asleep")
        time.sleep(3600)

class Options(fastserve.BaseRequestHandler):
    def handle(self):
        names = "request_queue_size", "allow_reuse_address"
        self.request.sendall(repr([getattr(self.server, name) for name in names]).encode())

class Workers(fastserve.BaseRequestHandler):
    def handle(self):
        self.request.sendall(repr(self.server.max_workers).encode())

class Connections(fastserve.BaseRequestHandler):
    def handle(self):
        self.request.sendall(repr(self.server.max_connections).encode())
        self.request.recv(1)

not_callable = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the module ``handlers`` in it."""
    (tmp_path / "handlers.py").write_text(HANDLERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTSERVE_POLLER", raising=False)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # it would hide that a line is not flushed
    return tmp_path


def fastserve_script() -> list[str]:
    if not os.path.exists(SCRIPT[0]):
        pytest.skip("the script fastserve is not installed beside this Python")
    return SCRIPT


def run(command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    # A name that does not exist is looked up: without a network that is to be given up soon.
    environment = os.environ | {"RES_OPTIONS": "timeout:1 attempts:1"} | env
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def cli(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run([*MODULE, *args], **env)


@contextlib.contextmanager
def started(*args: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*MODULE, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | env
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def address_of(server: subprocess.Popen[str]) -> str:
    """Read the line that tells the address, from the pipe that is the server's standard output."""
    line = server.stdout.readline()
    models = "sync|threads|threadpool|fork|greenlet"
    found = re.fullmatch(
        rf"Serving \S+ on (\S+) \([a-z ]+, ({models})(, 1 process|, \d+ processes)?\); Ctrl-C stops\n", line
    )
    assert found, (line, server.stderr.read() if not line else "")
    return found[1]


def connect(address: str, kind: int = socket.SOCK_STREAM) -> socket.socket:
    if address.startswith("unix:"):
        client = socket.socket(socket.AF_UNIX, kind)
        target: object = address[5:]
    else:
        host, _, port = address.rpartition(":")
        client = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind)
        target = (host.strip("[]"), int(port))
    client.settimeout(60)
    try:
        client.connect(target)
    except OSError:
        client.close()
        raise
    return client


def exchange(client: socket.socket, sent: bytes = b"hello\n") -> bytes:
    client.sendall(sent)
    return client.recv(65536)


def stop(server: subprocess.Popen[str], signum: int = signal.SIGTERM) -> float:
    """Stop the server, assert that it ends cleanly, and return how many seconds it took."""
    began = time.monotonic()
    server.send_signal(signum)
    assert server.wait(60) == 0
    took = time.monotonic() - began
    assert (server.stdout.read(), server.stderr.read()) == ("", "")
    return took


# help, version, wrong arguments


@pytest.mark.parametrize(
    "command, said",
    [
        ([], ["run", "serve", "info", "--version", "FASTSERVE_POLLER"]),
        (["run"], ["-m MODULE", "SCRIPT", "ARGS", "http.server"]),
        (
            ["serve"],
            ["127.0.0.1:8000", "--udp", "default: threads", f"default: {socket.SOMAXCONN}", "bytes", "8192", "SIGTERM"],
        ),
        (["info"], ["name: value"]),
    ],
    ids=["fastserve", "run", "serve", "info"],
)
def test_help_shows_usage_options_and_an_example(command: list[str], said: list[str]) -> None:
    shown = cli(*command, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith(" ".join(["usage: fastserve", *command]))
    assert re.search(r"^examples?:\n  .*fastserve ", shown.stdout, re.MULTILINE)
    words = " ".join(shown.stdout.split())
    assert [text for text in said if text not in words] == []
    assert max(map(len, shown.stdout.splitlines())) <= 100


@pytest.mark.once
def test_the_script_and_the_module_are_the_same_program() -> None:
    script = fastserve_script()
    for args in ["--help"], ["serve", "--help"], ["--version"], ["info"], ["serve"]:
        ours, theirs = run([*script, *args]), cli(*args)
        assert (ours.returncode, ours.stdout, ours.stderr) == (theirs.returncode, theirs.stdout, theirs.stderr)


def test_version() -> None:
    assert cli("--version").stdout == f"fastserve {fastserve.__version__}\n"


@pytest.mark.parametrize(
    "args, prog, said",
    [
        ("", "fastserve", "COMMAND"),
        ("--nope", "fastserve", "COMMAND"),
        ("nope", "fastserve", "'nope'"),
        ("info more", "fastserve info", "more"),
        ("run", "fastserve run", "SCRIPT is required"),
        ("run --nope", "fastserve run", "--nope"),
        ("run -m", "fastserve run", "-m"),
        ("run --worker", "fastserve run", "--worker"),
        ("run --worker greenlet", "fastserve run", "MODULE or a SCRIPT"),
        ("run --worker sync handlers.py", "fastserve run", "'sync'"),
        ("run --worker=nope -m handlers", "fastserve run", "'nope'"),
        ("run --worker greenlet -m", "fastserve run", "-m"),
        pytest.param("run --worker greenlet -m nope", "fastserve run", "No module named nope", marks=NEEDS_GREENLET),
        ("run nope.py", "fastserve run", "nope.py': No such file"),
        ("run -m nope", "fastserve run", "No module named nope"),
        ("run -m nope.more", "fastserve run", "'nope.more'"),
        ("run -m namespace", "fastserve run", "namespace"),
        ("run namespace", "fastserve run", "__main__"),
        ("serve", "fastserve serve", "MODULE:HANDLER"),
        ("serve handlers", "fastserve serve", "'handlers' is not MODULE:HANDLER"),
        ("serve handlers:", "fastserve serve", "'handlers:' is not MODULE:HANDLER"),
        ("serve :Lines", "fastserve serve", "':Lines' is not MODULE:HANDLER"),
        ("serve .handlers:Lines", "fastserve serve", "is not MODULE:HANDLER"),
        ("serve handlers:Outer..Lines", "fastserve serve", "is not MODULE:HANDLER"),
        ("serve nope:Handler", "fastserve serve", "No module named 'nope'"),
        ("serve handlers.more:Handler", "fastserve serve", "'handlers' is not a package"),
        ("serve nope.py:Handler", "fastserve serve", "'nope.py'"),
        ("serve socket.py:Handler", "fastserve serve", "'socket' is in use"),
        ("serve handlers:Nope", "fastserve serve", "'handlers' has no attribute 'Nope'"),
        ("serve handlers:Outer.Nope", "fastserve serve", "'Outer' has no attribute 'Nope'"),
        ("serve handlers.py:not_callable", "fastserve serve", "not callable"),
        ("serve handlers:Lines more", "fastserve serve", "more"),
        ("serve handlers:Lines --nope", "fastserve serve", "--nope"),
        ("serve handlers:Lines --worker nope", "fastserve serve", "'nope'"),
        ("serve handlers:Lines --max-workers 2", "fastserve serve", "--worker threadpool"),
        ("serve handlers:Lines --worker threadpool --max-workers 0", "fastserve serve", "'0' is not a whole number"),
        ("serve handlers:Lines --workers 0", "fastserve serve", "'0' is not a whole number"),
        ("serve handlers:Lines --grace 0", "fastserve serve", "--grace"),
        ("serve handlers:Packets --udp --request-timeout 5", "fastserve serve", "--udp"),
        ("serve handlers:Lines --bind 8000", "fastserve serve", "HOST:PORT"),
        ("serve handlers:Lines --bind localhost:http", "fastserve serve", "port"),
        ("serve handlers:Lines --bind 127.0.0.1:65536", "fastserve serve", "65535"),
        ("serve handlers:Lines --bind 127.0.0.1:-1", "fastserve serve", "65535"),
        ("serve handlers:Lines --bind ::1:0", "fastserve serve", "brackets"),
        ("serve handlers:Lines --bind [127.0.0.1]:0", "fastserve serve", "cannot serve on [127.0.0.1]:0: "),
        ("serve handlers:Lines --bind no-such-host.invalid:0", "fastserve serve", "no-such-host.invalid:0: "),
        (f"serve handlers:Lines --bind {'x' * 64}.invalid:0", "fastserve serve", ".invalid:0: "),
        ("serve handlers:Lines --request-queue-size 0", "fastserve serve", "'0' is not a whole number"),
        ("serve handlers:Lines --request-queue-size 99999999999", "fastserve serve", "2147483647"),
        ("serve handlers:Packets --udp --max-packet-size many", "fastserve serve", "'many'"),
        ("serve handlers:Packets --udp --request-queue-size 5", "fastserve serve", "--udp"),
        ("serve handlers:Lines --max-packet-size 5", "fastserve serve", "--udp"),
    ],
)
@pytest.mark.once
def test_wrong_arguments_give_one_line_and_status_2(here: Path, args: str, prog: str, said: str) -> None:
    (here / "namespace").mkdir()
    assert_refused(cli(*args.split()), prog, said)


def assert_refused(failed: subprocess.CompletedProcess[str], prog: str, said: str) -> None:
    assert failed.stderr.startswith(f"{prog}: ") and said in failed.stderr
    assert failed.stderr.count("\n") == 1 and failed.stderr.endswith("\n")
    assert (failed.returncode, failed.stdout) == (2, "")


@needs_unix
@pytest.mark.parametrize(
    "bind, said",
    [
        ("unix:", "path"),
        ("unix:nope/socket", "No such file"),
        (f"unix:/tmp/{'x' * 200}", "too long"),
        ("unix:handlers.py", "in use"),
    ],
)
def test_a_wrong_unix_path_gives_one_line_and_status_2(here: Path, bind: str, said: str) -> None:
    assert_refused(cli("serve", "handlers:Lines", "--bind", bind), "fastserve serve", said)
    assert (here / "handlers.py").read_text() == HANDLERS


@needs_unix
def test_reuse_address_contradicts_a_unix_socket(here: Path) -> None:
    for option in "--reuse-address", "--no-reuse-address":
        failed = cli("serve", "handlers:Lines", "--bind", "unix:socket", option)
        assert_refused(failed, "fastserve serve", "--reuse-address")


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
def test_an_address_in_use_gives_one_line_and_status_2(here: Path, kind: int) -> None:
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            taken.listen()
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        udp = ["--udp"] if kind == socket.SOCK_DGRAM else []
        assert_refused(cli("serve", "handlers:Lines", "--bind", bind, *udp), "fastserve serve", f"{bind}: Address")


def test_fork_where_the_system_has_none_gives_one_line_and_status_2(here: Path) -> None:
    code = "import os, sys; vars(os).pop('fork', None); from fastserve.cli import main; sys.exit(main())"
    failed = run([sys.executable, "-c", code, "serve", "handlers:Lines", "--worker", "fork"])
    assert_refused(failed, "fastserve serve", "no fork")


@pytest.mark.parametrize("args", ["info", "serve handlers:Lines", "run handlers.py"])
def test_an_unavailable_poller_gives_one_line_and_status_2(here: Path, args: str) -> None:
    failed = cli(*args.split(), FASTSERVE_POLLER="nope")
    assert_refused(failed, f"fastserve {args.split()[0]}", "FASTSERVE_POLLER='nope' is not available")


@pytest.mark.parametrize("source", ["nonsense", "import no_such_module", "def f(:", "raise SystemExit('no')"])
@pytest.mark.parametrize("form", ["broken", "broken.py"])
def test_an_error_inside_the_handlers_module_is_shown_as_python_shows_it(here: Path, source: str, form: str) -> None:
    path = here / "broken.py"
    path.write_text(f"x = 1\n{source}\n")
    failed, under_python = cli("serve", f"{form}:Handler"), run([sys.executable, str(path)])
    assert (failed.returncode, failed.stdout, failed.stderr) == (1, "", under_python.stderr)


# run

PROGRAM = """\
import json, os, sys, threading
main_module = sys.modules["__main__"]
spec = __spec__ and [__spec__.name, __spec__.origin]
print(json.dumps([
    __name__, sys.argv, sys.path, __file__, __cached__ and "cached", __package__, spec, __doc__,
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


# serve


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("bind", ["127.0.0.1:0", "localhost:0", "[::1]:0", pytest.param("unix:s", marks=needs_unix)])
def test_serve_connections(here: Path, bind: str, worker: str) -> None:
    needs_ipv6_for(bind)
    with started("serve", "handlers:Lines", "--bind", bind, "--worker", worker) as server:
        address = address_of(server)
        expected = {"localhost:0": "127.0.0.1:", "unix:s": "unix:s"}
        assert address.startswith(expected.get(bind, bind[:-1])) and not address.endswith(":0")
        for _ in range(2):
            with connect(address) as client:
                assert exchange(client) == b"HELLO\n"
        stop(server)
    assert not os.path.exists("s")


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("bind", ["127.0.0.1:0", "[::1]:0", pytest.param("unix:s", marks=needs_unix)])
def test_serve_datagrams(here: Path, bind: str, worker: str) -> None:
    needs_ipv6_for(bind)
    with started("serve", "handlers.py:Packets", "--udp", "--bind", bind, "--worker", worker) as server:
        address = address_of(server)
        with connect(address, socket.SOCK_DGRAM) as client:
            if bind == "unix:s":
                client.close()
                client = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                client.settimeout(60)
                client.bind("client")
                client.connect("s")
            with client:
                assert exchange(client, b"one") == b"ONE"
                assert exchange(client, b"two") == b"TWO"
        stop(server)
    assert not os.path.exists("s")


def needs_ipv6_for(bind: str) -> None:
    if bind.startswith("["):
        try:
            with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
                probe.bind(("::1", 0))
        except OSError as error:
            pytest.skip(f"no IPv6 on this machine: {error}")


def test_a_name_with_both_kinds_of_address_means_the_ipv4_one(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 8000, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 8000)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: both)
    assert _resolve("localhost:8000", socket.SOCK_STREAM) == (socket.AF_INET, ("127.0.0.1", 8000))


def test_an_empty_host_means_all_ipv4_interfaces() -> None:
    assert _resolve(":8000", socket.SOCK_STREAM) == (socket.AF_INET, ("0.0.0.0", 8000))


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("clients", [0, 1, 2])
@pytest.mark.once
def test_a_signal_stops_at_once_whatever_clients_are_connected(
    here: Path, worker: str, signum: int, clients: int
) -> None:
    with started("serve", "handlers:Lines", "--bind", "127.0.0.1:0", "--worker", worker) as server:
        address = address_of(server)
        with contextlib.ExitStack() as connected:
            for number in range(clients):
                client = connected.enter_context(connect(address))
                if number == 0 or worker != "sync":  # a sync server is busy with its first client
                    assert exchange(client) == b"HELLO\n"
            assert stop(server, signum) < QUICK
        with pytest.raises(ConnectionRefusedError):
            connect(address)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_stopping_ends_the_children_of_a_forking_server(here: Path) -> None:
    with started("serve", "handlers:Pid", "--bind", "127.0.0.1:0", "--worker", "fork") as server:
        with connect(address_of(server)) as client:
            child = int(client.recv(100))
            assert child != server.pid
            stop(server)
            assert client.recv(1) == b""
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_to_a_forked_child_ends_the_child_alone(here: Path, signum: int) -> None:
    with started("serve", "handlers:Pid", "--bind", "127.0.0.1:0", "--worker", "fork") as server:
        address = address_of(server)
        with connect(address) as client:
            os.kill(int(client.recv(100)), signum)
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""
        with connect(address) as client:
            assert int(client.recv(100)) != server.pid
        stop(server)


@needs_unix
def test_a_unix_socket_that_took_the_place_of_ours_stays(here: Path) -> None:
    with started("serve", "handlers:Lines", "--bind", "unix:s") as server:
        address_of(server)
        os.rename("s", "old")  # so that the new file cannot get the inode of the old one
        (here / "s").write_text("somebody else's")
        stop(server)
    assert (here / "s").read_text() == "somebody else's"


def test_the_printed_address_can_be_given_again_at_once(here: Path) -> None:
    bind = "127.0.0.1:0"
    for _ in range(2):
        with started("serve", "handlers:function", "--bind", bind) as server:
            bind = address_of(server)
            with connect(bind) as client:
                assert client.recv(100) == b"from a function"
                assert client.recv(100) == b""  # closed by the server, whose end stays in TIME-WAIT
            stop(server)


@pytest.mark.parametrize(("options", "expected"), [([], b"None"), (["--max-workers", "3"], b"3")])
def test_max_workers_is_that_of_the_pool(here: Path, options: list[str], expected: bytes) -> None:
    arguments = ["handlers:Workers", "--bind", "127.0.0.1:0", "--worker", "threadpool", *options]
    with started("serve", *arguments) as server, connect(address_of(server)) as client:
        assert client.recv(100) == expected


@NEEDS_GREENLET
@pytest.mark.parametrize(
    ("options", "expected"), [(["--max-connections", "off"], b"None"), (["--max-connections", "2"], b"2")]
)
def test_max_connections_is_that_of_the_greenlets(here: Path, options: list[str], expected: bytes) -> None:
    arguments = ["handlers:Connections", "--bind", "127.0.0.1:0", "--worker", "greenlet", *options]
    with started("serve", *arguments) as server:
        address = address_of(server)
        with connect(address) as first, connect(address) as second, connect(address) as third:
            assert first.recv(100) == second.recv(100) == expected
            if expected == b"2":
                third.settimeout(0.1)
                with pytest.raises(TimeoutError):
                    third.recv(100)
                third.settimeout(60)
                first.close()
            assert third.recv(100) == expected
        stop(server)


@NEEDS_GREENLET
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_stops_a_handler_that_holds_the_loop_of_its_greenlet(here: Path, signum: int) -> None:
    with started("serve", "handlers:Sleeping", "--bind", "127.0.0.1:0", "--worker", "greenlet") as server:
        with connect(address_of(server)) as client:
            assert client.recv(100) == b"asleep"
            time.sleep(0.2)  # until it is: Python's own sleep() is not ended by a signal that comes just before it
            server.send_signal(signum)
            assert server.wait(QUICK) == 0
            assert "Traceback" not in server.stderr.read()


@NEEDS_GREENLET
@pytest.mark.parametrize("option", ["--worker greenlet", "--worker=greenlet", "--worker threads --worker=greenlet"])
def test_run_with_greenlets_leaves_the_programs_arguments_alone(here: Path, option: str) -> None:
    source = "import sys, fastserve; print(sys.argv[1:], bool(fastserve.patched('greenlet')))"
    (here / "program.py").write_text(source)
    for program in ["program.py"], ["-m", "program"], ["--", "program.py"]:
        shown = cli("run", *option.split(), *program, "--worker", "sync", "--help")
        assert (shown.returncode, shown.stderr) == (0, "")
        assert shown.stdout == "['--worker', 'sync', '--help'] True\n"
    assert cli("run", "program.py", *option.split()).stdout == f"{option.split()} False\n"


NO_GREENLET = "import sys; sys.modules['greenlet'] = None; from fastserve.cli import main; sys.exit(main())"


@pytest.mark.parametrize(
    "arguments",
    [
        "serve handlers:Lines --worker greenlet",
        "run --worker greenlet -m http.server 0",
        "run --worker=greenlet handlers.py",
        "bench handlers:Lines --worker greenlet",
    ],
)
def test_without_greenlet_one_line_names_the_extra_and_the_status_is_2(here: Path, arguments: str) -> None:
    failed = run([sys.executable, "-c", NO_GREENLET, *arguments.split()])
    assert_refused(failed, f"fastserve {arguments.split()[0]}", 'pip install "fastserve[greenlet]"')


def test_info_says_why_there_are_no_greenlets(here: Path) -> None:
    shown = run([sys.executable, "-c", NO_GREENLET, "info"])
    assert (shown.returncode, shown.stderr) == (0, "")
    assert re.search(r"^greenlets: +not available \(.*greenlet.*\)$", shown.stdout, re.MULTILINE)


@pytest.mark.parametrize("worker", WORKERS)
def test_an_error_of_a_handler_is_shown_and_the_server_goes_on(here: Path, worker: str) -> None:
    with started("serve", "handlers:Lines", "--bind", "127.0.0.1:0", "--worker", worker) as server:
        address = address_of(server)
        with connect(address) as client:
            assert exchange(client, b"raise\n") == b""
        with connect(address) as client:
            assert exchange(client) == b"HELLO\n"
        server.terminate()
        assert server.wait(60) == 0
        shown = server.stderr.read()
        assert shown.count("Traceback") == 1 and "RuntimeError: from the handler" in shown


def test_serve_finds_handlers_by_dotted_name_and_imports_beside_a_file(here: Path) -> None:
    (here / "elsewhere").mkdir()
    (here / "elsewhere" / "with-dash.py").write_text("import beside\nclass Outer:\n    Handler = beside.Handler\n")
    (here / "elsewhere" / "beside.py").write_text(HANDLERS + "\nHandler = Outer.Lines\n")
    for target in "handlers:Outer.Lines", "elsewhere/with-dash.py:Outer.Handler":
        with started("serve", target, "--bind", "127.0.0.1:0") as server:
            with connect(address_of(server)) as client:
                assert exchange(client) == b"HELLO\n"
            stop(server)


@pytest.mark.once
def test_options_reach_the_server(here: Path) -> None:
    for options, expected in (
        ([], f"[{socket.SOMAXCONN}, True]"),
        (["--request-queue-size", "7", "--no-reuse-address"], "[7, False]"),
        (["--reuse-address"], f"[{socket.SOMAXCONN}, True]"),
    ):
        with started("serve", "handlers:Options", "--bind", "127.0.0.1:0", *options) as server:
            with connect(address_of(server)) as client:
                assert client.recv(100).decode() == expected
            stop(server)


def test_max_packet_size_cuts_datagrams(here: Path) -> None:
    options = ["--bind", "127.0.0.1:0", "--udp", "--max-packet-size", "3"]
    with started("serve", "handlers:Packets", *options) as server:
        with connect(address_of(server), socket.SOCK_DGRAM) as client:
            assert exchange(client, b"hello") == b"HEL"
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        assert "was longer than max_packet_size, 3 bytes, and has lost its end" in server.stderr.read()


def test_udp_shares_its_address_only_when_asked(here: Path) -> None:
    with started("serve", "handlers:Packets", "--udp", "--bind", "127.0.0.1:0", "--reuse-address") as server:
        bind = address_of(server)
        assert_refused(cli("serve", "handlers:Packets", "--udp", "--bind", bind), "fastserve serve", "in use")
        with started("serve", "handlers:Packets", "--udp", "--bind", bind, "--reuse-address") as second:
            assert address_of(second) == bind
            stop(second)
        stop(server)


def test_an_idle_server_notices_a_signal_without_ticking(here: Path) -> None:
    with started("serve", "handlers:Lines", "--bind", "127.0.0.1:0") as server:
        address_of(server)
        status = Path(f"/proc/{server.pid}/status")
        if not status.exists():
            pytest.skip("no /proc here to count context switches with")
        figures = re.compile(r"^State:.*|ctxt_switches:.*", re.MULTILINE)

        def sleeps() -> bool:
            before = figures.findall(status.read_text())
            time.sleep(0.6)  # longer than the poll_interval of 0.5 s, in which it would have ticked
            return before[0].split()[1] == "S" and figures.findall(status.read_text()) == before

        wait_until(sleeps)
        stop(server)


# info


def facts(**env: str) -> dict[str, str]:
    shown = cli("info", **env)
    assert (shown.returncode, shown.stderr) == (0, "")
    lines = shown.stdout.splitlines()
    assert len({re.match(r"\w+: +", line).end() for line in lines}) == 1, "the values are not aligned"
    return {name: value.strip() for name, value in (line.split(":", 1) for line in lines)}


def test_info_tells_what_is_here(here: Path) -> None:
    found = facts()
    assert found["fastserve"] == fastserve.__version__
    assert found["implementation"].split()[0] == fastserve.implementation
    assert re.fullmatch(r"c|py|not available \(.+\)", found["greenlets"])
    assert found["poller"] == pollers.poller_name()
    assert found["python"].split()[1] == sys.version.split()[0]
    assert "GIL" in found["python"]
    assert found["platform"] == " ".join(os.uname()[i] for i in (0, 2, 4))
    for package in "greenlet", "matplotlib", "rich":
        assert re.fullmatch(r"\d+\.\d+\S*|not installed", found[package])


def test_info_tells_what_the_environment_forced(here: Path) -> None:
    found = facts(FASTSERVE_NO_EXTENSIONS="1", FASTSERVE_POLLER="select")
    assert found["implementation"] == "py (FASTSERVE_NO_EXTENSIONS is set)"
    assert found["poller"] == "select (FASTSERVE_POLLER)"


def test_info_names_the_version_of_an_optional_part_or_its_absence(here: Path) -> None:
    (here / "greenlet-99.1.dist-info").mkdir()
    (here / "greenlet-99.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: greenlet\nVersion: 99.1\n")
    (here / "rich").mkdir()  # a directory of that name is not the package
    source = os.path.dirname(os.path.dirname(fastserve.__file__))
    code = f"import sys; sys.path.append({source!r}); from fastserve.cli import main; main(['info'])"
    shown = run([sys.executable, "-S", "-c", code])  # -S: no installed packages
    assert (shown.returncode, shown.stderr) == (0, "")
    assert re.search(r"^greenlet: +99\.1$", shown.stdout, re.MULTILINE)
    assert re.search(r"^rich: +not installed$", shown.stdout, re.MULTILINE)
