"""What systemd passes and wants to be told, and the command line with listeners of all kinds."""

from __future__ import annotations

import configparser
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import fastserve
from children import IMPLEMENTATIONS
from fastserve import systemd
from support import LIMIT, open_descriptors, talk, wait_until

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent
UNITS = ROOT / "deploy" / "systemd"
MODULE = [sys.executable, "-m", "fastserve"]
OF_SYSTEMD = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"]

WORKERS = [
    "sync",
    "threads",
    pytest.param(
        "greenlet",
        marks=pytest.mark.skipif(importlib.util.find_spec("greenlet") is None, reason="greenlet is not installed"),
    ),
]

HANDLERS = """
import fastserve

class Lines(fastserve.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(line.upper())

class Packets(fastserve.DatagramRequestHandler):
    def handle(self):
        self.wfile.write(self.packet.upper())

class Options(fastserve.BaseRequestHandler):
    def handle(self):
        import socket
        options = (socket.IPPROTO_TCP, socket.TCP_NODELAY), (socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        self.request.sendall(repr([self.request.getsockopt(*option) for option in options]).encode())

class Pid(fastserve.BaseRequestHandler):
    def handle(self):
        import os
        self.request.recv(1)
        self.request.sendall(b"%d" % os.getpid())

class Asleep(fastserve.BaseRequestHandler):
    def handle(self):
        import time
        self.request.sendall(b"asleep")
        time.sleep(3600)

class Descriptors(fastserve.BaseRequestHandler):
    def handle(self):
        import os, subprocess
        self.request.sendall(subprocess.run(["ls", "/proc/self/fd"], capture_output=True, close_fds=False).stdout)
"""

# What systemd does between fork and exec: the sockets from descriptor 3 on, and the process id of what is executed.
LAUNCHER = """
import fcntl, os, sys
descriptors = [fcntl.fcntl(int(text), fcntl.F_DUPFD, 64) for text in sys.argv[1].split(",") if text]
os.closerange(3, 64)
for number, descriptor in enumerate(descriptors, 3):
    os.dup2(descriptor, number)
    os.close(descriptor)
os.environ["LISTEN_FDS"] = str(len(descriptors))
os.execvp("sh", ["sh", "-c", 'LISTEN_PID=$$ exec "$@"', "sh", *sys.argv[2:]])
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the module ``handlers`` in it."""
    (tmp_path / "handlers.py").write_text(HANDLERS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _no_variable_of_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start without what the tests themselves may have been started with."""
    for name in OF_SYSTEMD:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = open_descriptors()
    yield
    wait_until(lambda: open_descriptors() <= before)


def listener(address: Any = ("127.0.0.1", 0), family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> Any:
    made = socket.socket(family, kind)
    made.bind(address)
    if kind == socket.SOCK_STREAM:
        made.listen()
    return made


@contextlib.contextmanager
def started(
    command: Sequence[str], passed: Sequence[socket.socket] = (), activate: bool = True, **variables: str
) -> Iterator[subprocess.Popen[str]]:
    """Run a command for the time of the block, activated as by systemd; close the sockets that are passed."""
    descriptors = [sock.fileno() for sock in passed]
    if activate:
        command = [sys.executable, "-c", LAUNCHER, ",".join(map(str, descriptors)), *command]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=descriptors,
        env=os.environ | {"PYTHONPATH": str(Path(fastserve.__file__).parent.parent)} | variables,
    ) as process:
        for sock in passed:
            sock.close()
        try:
            yield process
        finally:
            process.kill()


def run(command: Sequence[str], passed: Sequence[socket.socket] = (), **options: Any) -> tuple[int, str, str]:
    """Run a command to its end; return its status, and what it has printed."""
    with started(command, passed, **options) as process:
        output, errors = process.communicate(timeout=LIMIT)
    return process.returncode, output, errors


def address_of(server: subprocess.Popen[str]) -> str:
    """Return the address that ``fastserve serve`` prints."""
    assert server.stdout is not None and server.stderr is not None
    line = server.stdout.readline()
    found = re.fullmatch(
        r"Serving \S+ on (\S+) \([a-z ]+, [a-z]+(?:, 1 process|, 2 processes)?\); Ctrl-C stops\n", line
    )
    assert found, (line, "" if line else server.stderr.read())
    return found[1]


def port_of(server: subprocess.Popen[str]) -> tuple[str, int]:
    host, _, port = address_of(server).rpartition(":")
    return host.strip("[]"), int(port)


def stop(server: subprocess.Popen[str], errors: str = "") -> None:
    """Stop a server, and assert that it ends cleanly."""
    server.send_signal(signal.SIGTERM)
    output, shown = server.communicate(timeout=LIMIT)
    assert (server.returncode, output, shown) == (0, "", errors)


class Manager:
    """A service manager: the socket that ``NOTIFY_SOCKET`` names."""

    def __init__(self, address: str = "notify") -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(LIMIT)
        self.socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        self.address = address if address.startswith("@") else os.path.abspath(address)

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *args: object) -> None:
        self.socket.close()

    def told(self) -> str:
        """Return the next thing that it is told."""
        return self.socket.recv(4096).decode()


# listen_fds

SHOW = """
import os, sys
from fastserve import systemd
unset = sys.argv[1] == "unset"
found = systemd.listen_fds(unset_environment=unset)
for name, listener in found:
    print(name, listener.fileno(), listener.family.name, listener.type.name, os.get_inheritable(listener.fileno()))
print([name for name in os.environ if name.startswith("LISTEN_")])
print(len(systemd.listen_fds()))
for name, listener in found:
    listener.detach()
"""


@pytest.mark.parametrize("names", ["http:dns:", None])
def test_the_sockets_that_were_passed_are_found_with_their_names(here: Path, names: str | None) -> None:
    passed = [listener(), listener(kind=socket.SOCK_DGRAM), listener("s", socket.AF_UNIX)]
    variables = {} if names is None else {"LISTEN_FDNAMES": names}
    status, output, errors = run([sys.executable, "-c", SHOW, "unset"], passed, **variables)
    first, second, third = ("unknown",) * 3 if names is None else ("http", "dns", "")
    assert (status, errors) == (0, "")
    assert output.splitlines() == [
        f"{first} 3 AF_INET SOCK_STREAM False",
        f"{second} 4 AF_INET SOCK_DGRAM False",
        f"{third} 5 AF_UNIX SOCK_STREAM False",
        "[]",
        "0",
    ]


def test_the_variables_stay_where_they_are_asked_to(here: Path) -> None:
    status, output, errors = run([sys.executable, "-c", SHOW, "keep"], [listener()], LISTEN_FDNAMES="a")
    assert (status, errors) == (0, "")
    assert sorted(re.findall(r"LISTEN_\w+", output)) == ["LISTEN_FDNAMES", "LISTEN_FDS", "LISTEN_PID"]
    assert output.splitlines()[-1] == "1"


def test_sockets_of_another_process_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    assert systemd.listen_fds() == []
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    assert systemd.listen_fds() == []  # without LISTEN_FDS
    for keep in True, False:
        monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))
        monkeypatch.setenv("LISTEN_FDS", "1")
        monkeypatch.setenv("LISTEN_FDNAMES", "a:b:c")
        monkeypatch.setenv("LISTEN_PIDFDID", "1")
        assert systemd.listen_fds(unset_environment=not keep) == []
        assert ("LISTEN_PID" in os.environ) is ("LISTEN_PIDFDID" in os.environ) is keep


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        *[(name, text) for name in ("LISTEN_PID", "LISTEN_FDS") for text in ("", "x", "-1", "0", "1.5", "9" * 30, "²")],
        ("LISTEN_FDS", "1000000000000"),
        ("LISTEN_FDNAMES", "a:b"),
        ("LISTEN_FDNAMES", ""),
    ],
)
def test_malformed_variables_are_refused(monkeypatch: pytest.MonkeyPatch, variable: str, text: str) -> None:
    for name, good in ("LISTEN_PID", str(os.getpid())), ("LISTEN_FDS", "1"):
        monkeypatch.setenv(name, good)
    monkeypatch.setenv(variable, text)
    if variable == "LISTEN_FDNAMES" and text == "":
        monkeypatch.setenv("LISTEN_FDS", "2")
    monkeypatch.setattr(systemd, "FIRST_DESCRIPTOR", 1_000_000)  # whatever pytest has open there is not ours
    with pytest.raises(ValueError, match=variable):
        systemd.listen_fds()
    assert not any(name.startswith("LISTEN_") for name in os.environ)


@pytest.mark.parametrize("wrong", ["closed", "file"])
def test_a_descriptor_that_is_no_socket_is_refused_and_the_others_stay_open(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: str
) -> None:
    high = 700
    with listener() as sock, (tmp_path / "file").open("w") as file:
        os.dup2(sock.fileno(), high)
        if wrong == "file":
            os.dup2(file.fileno(), high + 1)
        monkeypatch.setattr(systemd, "FIRST_DESCRIPTOR", high)
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        monkeypatch.setenv("LISTEN_FDS", "2")
        monkeypatch.setenv("LISTEN_FDNAMES", "good:bad")
        with pytest.raises(ValueError, match="descriptor 701, 'bad'"):
            systemd.listen_fds()
        os.fstat(high)
        os.close(high)
        if wrong == "file":
            os.close(high + 1)


# notify and watchdog_interval


@pytest.mark.parametrize("address", ["notify", f"@fastserve-test-notify-{os.getpid()}"])
def test_the_manager_is_told(here: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    with Manager(address) as manager:
        monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
        assert systemd.notify("READY=1", "STATUS=serving: \u00e4=1")
        assert manager.told() == "READY=1\nSTATUS=serving: \u00e4=1"
        assert systemd.notify("WATCHDOG=1")
        assert manager.told() == "WATCHDOG=1"
        assert os.environ["NOTIFY_SOCKET"] == manager.address


def test_without_a_manager_nobody_is_told(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not systemd.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "")
    assert not systemd.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(here / "nobody"))
    with pytest.raises(FileNotFoundError):
        systemd.notify("READY=1")
    Manager("nobody").socket.close()
    with pytest.raises(ConnectionRefusedError):
        systemd.notify("READY=1")


@pytest.mark.parametrize("address", ["relative", "vsock:2:3", "/", "@"])
def test_an_address_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with pytest.raises(ValueError, match="NOTIFY_SOCKET"):
        systemd.notify("READY=1")


@pytest.mark.parametrize("lines", [(), ("READY",), ("=1",), ("READY=1", "STATUS=a\nSTOPPING=1"), ("",)])
def test_what_is_no_assignment_is_refused_whether_there_is_a_manager_or_not(lines: tuple[str, ...]) -> None:
    with pytest.raises(ValueError):
        systemd.notify(*lines)


def test_the_interval_of_the_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    assert systemd.watchdog_interval() is None
    monkeypatch.setenv("WATCHDOG_USEC", "1500000")
    assert systemd.watchdog_interval() == 1.5
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert systemd.watchdog_interval() == 1.5
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid() + 1))
    assert systemd.watchdog_interval() is None
    for name in "WATCHDOG_PID", "WATCHDOG_USEC":
        monkeypatch.setenv(name, "0")
        with pytest.raises(ValueError, match=name):
            systemd.watchdog_interval()
        monkeypatch.setenv(name, "1")


# fastserve serve


def serve(*arguments: str) -> list[str]:
    return [*MODULE, "serve", *arguments]


def no_extensions(implementation: str) -> dict[str, str]:
    return {"FASTSERVE_NO_EXTENSIONS": "1" if implementation == "py" else "0"}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("blocking", [True, False])
def test_a_socket_from_systemd_is_served_and_systemd_is_told(
    here: Path, implementation: str, worker: str, blocking: bool
) -> None:
    sock = listener()
    os.set_blocking(sock.fileno(), blocking)
    address = sock.getsockname()
    with Manager() as manager:
        command = serve("handlers:Lines", "--bind", "systemd", "--worker", worker)
        variables = no_extensions(implementation)
        with started(command, [sock], NOTIFY_SOCKET=manager.address, **variables) as server:
            assert manager.told() == "READY=1"
            assert port_of(server) == address
            for _ in range(2):
                assert talk(address, b"a\n") == b"A\n"
            stop(server)
            assert manager.told() == "STOPPING=1"


def test_the_socket_of_a_name_is_served_and_the_others_are_closed(here: Path) -> None:
    passed = [listener(), listener(), listener("s", socket.AF_UNIX)]
    addresses = [sock.getsockname() for sock in passed]
    names = "one:two:three"
    with started(serve("handlers:Lines", "--bind", "systemd:two"), passed, LISTEN_FDNAMES=names) as server:
        assert port_of(server) == addresses[1]
        assert talk(addresses[1], b"a\n") == b"A\n"
        with pytest.raises(ConnectionRefusedError):
            talk(addresses[0], b"a\n")
        stop(server)


def test_several_processes_serve_a_socket_from_systemd(here: Path) -> None:
    sock = listener()
    address = sock.getsockname()
    with Manager() as manager:
        command = serve("handlers:Lines", "--bind", "systemd", "--workers", "2")
        with started(command, [sock], NOTIFY_SOCKET=manager.address) as server:
            assert manager.told() == "READY=1"
            assert port_of(server) == address
            for _ in range(4):
                assert talk(address, b"a\n") == b"A\n"
            stop(server)
            assert manager.told() == "STOPPING=1"


def test_the_file_of_a_unix_socket_outlives_one_of_several_processes(here: Path) -> None:
    command = serve("handlers:Pid", "--bind", "unix:s", "--workers", "2", "--grace", "5")
    with started(command, activate=False) as server:
        assert address_of(server) == "unix:s"
        first = int(talk("s", b"", socket.AF_UNIX))
        assert first != server.pid
        os.kill(first, signal.SIGTERM)
        wait_until(lambda: not os.path.exists(f"/proc/{first}"))
        assert int(talk("s", b"", socket.AF_UNIX)) != first
        server.send_signal(signal.SIGTERM)
        assert server.wait(LIMIT) == 0
    assert not os.path.lexists("s")


def test_a_unix_socket_from_systemd_stays(here: Path) -> None:
    with started(serve("handlers:Lines", "--bind", "systemd"), [listener("s", socket.AF_UNIX)]) as server:
        assert address_of(server) == "unix:s"
        assert talk("s", b"a\n", socket.AF_UNIX) == b"A\n"
        stop(server)
    assert stat.S_ISSOCK(os.lstat("s").st_mode)


def test_datagrams_of_a_socket_from_systemd_are_served(here: Path) -> None:
    sock = listener(kind=socket.SOCK_DGRAM)
    with started(serve("handlers:Packets", "--udp", "--bind", "systemd"), [sock]) as server:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(LIMIT)
            client.connect(port_of(server))
            client.send(b"a")
            assert client.recv(10) == b"A"
        stop(server)


@pytest.mark.parametrize(
    ("names", "bind", "said"),
    [
        ("", "systemd", "has passed no socket"),
        ("one:two", "systemd", "means 2 of the sockets that systemd has passed: one, two"),
        ("one:two", "systemd:three", "means 0 of the sockets that systemd has passed: one, two"),
        ("one:one", "systemd:one", "means 2 of"),
        ("one:two:three", "systemd", "LISTEN_FDNAMES"),
        ("one", "systemd:", "lacks the name"),
    ],
)
def test_sockets_that_were_not_passed_give_one_line_and_status_2(here: Path, names: str, bind: str, said: str) -> None:
    passed = [listener() for _ in (names.split(":")[:2] if names else ())]
    variables = {"LISTEN_FDNAMES": names} if names else {}
    status, output, errors = run(serve("handlers:Lines", "--bind", bind), passed, activate=bool(names), **variables)
    assert (status, output) == (2, "")
    assert errors.startswith("fastserve serve: ") and errors.count("\n") == 1 and said in errors


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_inherited_descriptor_is_served_and_not_inherited_further(here: Path, implementation: str) -> None:
    sock = listener()
    command = serve("handlers:Descriptors", "--fd", str(sock.fileno()))
    with started(command, [sock], activate=False, **no_extensions(implementation)) as server:
        assert "3" == talk(port_of(server), b"").decode().split()[-1]  # of ls itself
        stop(server)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--fd 700", "--fd 700: Bad file descriptor"),
        ("--fd 0", "--fd 0: Socket operation on non-socket"),
        ("--fd -1", "--fd"),
        ("--fd x", "'x' is not the number of a descriptor"),
        ("--fd 3 --bind 127.0.0.1:0", "not allowed with"),
        ("--fd 3 --dual-stack", "for a socket that is made here"),
        ("--fd 3 --no-reuse-address", "for a socket that is made here"),
        ("--bind systemd --socket-mode 660", "for a socket that is made here"),
        ("--bind systemd:x --socket-owner root", "for a socket that is made here"),
        ("--bind unix:@", "lacks the name"),
        ("--bind 127.0.0.1:0 --dual-stack", "[IPV6]:PORT"),
        ("--bind unix:s --dual-stack", "[IPV6]:PORT"),
        ("--bind 127.0.0.1:0 --socket-mode 660", "--bind unix:PATH"),
        ("--bind unix:@name --socket-mode 660", "--bind unix:PATH"),
        ("--bind unix:s --socket-mode 888", "'888' is not an octal number"),
        ("--bind unix:s --socket-mode 1777", "'1777' is not an octal number"),
        ("--bind unix:s --socket-owner no-such-user", "no-such-user"),
        ("--bind unix:s --socket-owner :", "USER:GROUP"),
        ("--bind unix:s --keepalive", "for TCP"),
        ("--bind 127.0.0.1:0 --udp --nodelay", "for TCP"),
    ],
)
def test_a_wrong_listener_gives_one_line_and_status_2(here: Path, arguments: str, said: str) -> None:
    status, output, errors = run(serve("handlers:Lines", *arguments.split()), activate=False)
    assert (status, output) == (2, "")
    assert errors.startswith("fastserve serve: ") and errors.count("\n") == 1 and said in errors
    assert not os.path.lexists("s")


def test_a_socket_of_another_type_gives_one_line_and_status_2(here: Path) -> None:
    for kind, udp in (socket.SOCK_DGRAM, []), (socket.SOCK_STREAM, ["--udp"]):
        sock = listener(kind=kind)
        command = serve("handlers:Lines", "--fd", str(sock.fileno()), *udp)
        status, output, errors = run(command, [sock], activate=False)
        assert (status, output, errors.count("\n")) == (2, "", 1)
        assert errors.startswith("fastserve serve: cannot serve on descriptor ") and "of the type" in errors


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_an_abstract_address_is_printed_as_it_is_given(here: Path) -> None:
    name = f"unix:@fastserve-test-{os.getpid()}"
    with started(serve("handlers:Lines", "--bind", name), activate=False) as server:
        assert address_of(server) == name
        assert talk(f"\0{name[6:]}", b"a\n", socket.AF_UNIX) == b"A\n"
        stop(server)


@pytest.mark.parametrize("bind", ["[::]:0", ":0"])
def test_both_kinds_of_ip_are_served(here: Path, bind: str) -> None:
    with started(serve("handlers:Lines", "--bind", bind, "--dual-stack"), activate=False) as server:
        host, port = port_of(server)
        assert host == "::"
        assert talk(("127.0.0.1", port), b"a\n") == b"A\n"
        assert talk(("::1", port, 0, 0), b"a\n", socket.AF_INET6) == b"A\n"
        stop(server)


def test_the_file_of_a_unix_socket_has_the_permissions_and_the_owner(here: Path) -> None:
    owner = f"{os.getuid()}:{os.getgid()}"
    options = ["--socket-mode", "0620", "--socket-owner", owner]
    with started(serve("handlers:Lines", "--bind", "unix:s", *options), activate=False) as server:
        address_of(server)
        found = os.lstat("s")
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o620, os.getuid(), os.getgid())
        stop(server)
    assert not os.path.lexists("s")


@pytest.mark.parametrize(
    ("options", "expected"), [([], [1, 1]), (["--no-keepalive"], [1, 0]), (["--no-keepalive", "--no-nodelay"], [0, 0])]
)
def test_connections_have_the_options_for_tcp(here: Path, options: list[str], expected: list[int]) -> None:
    with started(serve("handlers:Options", "--bind", "127.0.0.1:0", *options), activate=False) as server:
        assert talk(port_of(server), b"").decode() == repr(expected)
        stop(server)


def test_a_manager_that_is_gone_stops_nobody(here: Path) -> None:
    missing = str(here / "nobody")
    command = serve("handlers:Lines", "--bind", "127.0.0.1:0")
    with started(command, activate=False, NOTIFY_SOCKET=missing) as server:
        assert talk(port_of(server), b"a\n") == b"A\n"
        line = "fastserve serve: cannot tell systemd {}: [Errno 2] No such file or directory\n"
        stop(server, line.format("READY=1") + line.format("STOPPING=1"))


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="systemd-socket-activate is not here")
def test_systemds_own_tool_activates_a_server(here: Path) -> None:
    with listener() as free:
        address = free.getsockname()
    command = ["systemd-socket-activate", f"--listen={address[0]}:{address[1]}", "--fdname=lines"]
    path = f"--setenv=PYTHONPATH={Path(fastserve.__file__).parent.parent}"
    with started([*command, path, *serve("handlers:Lines", "--bind", "systemd:lines")], activate=False) as server:

        def answers() -> bool:
            with contextlib.suppress(ConnectionRefusedError):
                return talk(address, b"a\n") == b"A\n"
            return False

        wait_until(answers)
        assert port_of(server) == address
        server.send_signal(signal.SIGTERM)
        assert server.wait(LIMIT) == 0


# The watchdog

PINGED = 0.4  # seconds


def watched(*arguments: str, **variables: str) -> Any:
    """Run ``fastserve serve`` as a service with ``WatchdogSec=``."""
    bound = arguments if "--bind" in arguments else (*arguments, "--bind", "127.0.0.1:0")
    usec = {"WATCHDOG_USEC": str(int(PINGED * 1e6))}
    return started(serve(*bound), activate=False, NOTIFY_SOCKET=os.path.abspath("notify-of-test"), **usec | variables)


def pings(manager: Manager, seconds: float) -> int:
    """Count what comes until nothing has come for so many seconds, which is to be ``WATCHDOG=1``."""
    count = 0
    manager.socket.settimeout(seconds)
    with contextlib.suppress(TimeoutError):
        while True:
            assert manager.told() == "WATCHDOG=1"
            count += 1
    manager.socket.settimeout(LIMIT)
    return count


@pytest.mark.parametrize("worker", [*WORKERS, "threadpool", "fork"])
@pytest.mark.parametrize("options", [[], ["--workers", "2"], ["--udp"]], ids=["one", "workers", "udp"])
def test_the_watchdog_is_told_while_the_loop_goes_round(here: Path, worker: str, options: list[str]) -> None:
    handler = "handlers:Packets" if "--udp" in options else "handlers:Lines"
    with Manager("notify-of-test") as manager, watched(handler, "--worker", worker, *options) as server:
        assert manager.told() == "READY=1"
        begun = time.monotonic()
        pings(manager, 0.001)  # those that were told while this process waited for a processor
        assert [manager.told() for _ in range(9)] == ["WATCHDOG=1"] * 9
        assert time.monotonic() - begun >= 7 * PINGED / 4  # and no more often
        server.send_signal(signal.SIGTERM)
        told = ["WATCHDOG=1"]
        while told[-1] == "WATCHDOG=1":
            told.append(manager.told())
        assert told[-1] == "STOPPING=1"
        output, errors = server.communicate(timeout=LIMIT)
        assert (server.returncode, errors) == (0, "")


@pytest.mark.parametrize("worker", [worker for worker in WORKERS if worker != "threads"])
def test_a_loop_that_stands_still_tells_nothing(here: Path, worker: str) -> None:
    with Manager("notify-of-test") as manager, watched("handlers:Asleep", "--worker", worker) as server:
        assert manager.told() == "READY=1"
        assert manager.told() == "WATCHDOG=1"
        with socket.create_connection(port_of(server), LIMIT) as client:
            assert client.recv(10) == b"asleep"
            pings(manager, 5 * PINGED)  # ends: no more comes


def test_a_parent_that_stands_still_tells_nothing(here: Path) -> None:
    with Manager("notify-of-test") as manager, watched("handlers:Lines", "--workers", "2") as server:
        assert manager.told() == "READY=1"
        assert manager.told() == "WATCHDOG=1"
        server.send_signal(signal.SIGSTOP)
        try:
            pings(manager, 5 * PINGED)
        finally:
            server.send_signal(signal.SIGCONT)
        assert manager.told() == "WATCHDOG=1"
        stop_watched(server, manager)


@pytest.mark.parametrize("options", [["--worker", "threads"], ["--workers", "1"]], ids=["threads", "workers"])
def test_a_handler_that_sleeps_is_no_hung_loop(here: Path, options: list[str]) -> None:
    with Manager("notify-of-test") as manager, watched("handlers:Asleep", *options) as server:
        assert manager.told() == "READY=1"
        with socket.create_connection(port_of(server), LIMIT) as client:
            assert client.recv(10) == b"asleep"
            assert [manager.told() for _ in range(6)] == ["WATCHDOG=1"] * 6
            cut_off(server, manager, signal.SIGINT)


def test_the_watchdog_is_told_while_the_workers_end(here: Path) -> None:
    with Manager("notify-of-test") as manager, watched("handlers:Asleep", "--workers", "1", "--grace", "60") as server:
        assert manager.told() == "READY=1"
        with socket.create_connection(port_of(server), LIMIT) as client:
            assert client.recv(10) == b"asleep"
            server.send_signal(signal.SIGTERM)
            # What was told before is not counted: a second signal must not come before the first one was seen.
            pings(manager, 0.001)
            assert [manager.told() for _ in range(12)] == ["WATCHDOG=1"] * 12
            cut_off(server, manager, signal.SIGTERM)


def test_a_watchdog_of_another_process_is_not_told(here: Path) -> None:
    with Manager("notify-of-test") as manager, watched("handlers:Lines", WATCHDOG_PID="1") as server:
        assert manager.told() == "READY=1"
        assert pings(manager, 3 * PINGED) == 0
        stop_watched(server, manager)


def test_a_malformed_watchdog_gives_one_line_and_status_2(here: Path) -> None:
    with Manager("notify-of-test"), watched("handlers:Lines", WATCHDOG_USEC="soon") as server:
        output, errors = server.communicate(timeout=LIMIT)
        assert (server.returncode, output) == (2, "")
        expected = "fastserve serve: the watchdog of systemd: WATCHDOG_USEC='soon' is not a positive number\n"
        assert errors == expected


def test_a_handler_still_collects_its_children_under_the_watchdog(here: Path) -> None:
    with Manager("notify-of-test") as manager, watched("handlers:Pid", "--worker", "fork") as server:
        assert manager.told() == "READY=1"
        address = port_of(server)
        children = {int(talk(address, b"x")) for _ in range(3)}
        wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in children))
        stop_watched(server, manager)


def cut_off(server: subprocess.Popen[str], manager: Manager, signum: int) -> None:
    """End a server and its processes at once. Who tells waits while there is no room for it."""
    server.send_signal(signum)
    manager.socket.settimeout(0.05)
    deadline = time.monotonic() + LIMIT
    while server.poll() is None:
        assert time.monotonic() < deadline
        with contextlib.suppress(TimeoutError):
            manager.told()


def stop_watched(server: subprocess.Popen[str], manager: Manager) -> None:
    """Stop a server, which may have told more than fits, were nobody to listen."""
    server.send_signal(signal.SIGTERM)
    while manager.told() != "STOPPING=1":
        pass
    _, errors = server.communicate(timeout=LIMIT)
    assert (server.returncode, errors) == (0, "")


# The units in deploy/


class Unit(configparser.ConfigParser):
    """A unit file: its directives may be given more than once, and distinguish capitals."""

    def __init__(self, path: Path) -> None:
        super().__init__(strict=False, interpolation=None, comment_prefixes=("#", ";"), delimiters=("=",))
        self.optionxform = str  # type: ignore[assignment, method-assign]
        self.read(path, "utf-8")


# systemd.unit(5), systemd.service(5), systemd.exec(5), systemd.socket(5), systemd.resource-control(5)
DIRECTIVES = {
    "Unit": {"Description", "Documentation", "Requires", "After"},
    "Install": {"WantedBy", "Also"},
    "Socket": {"ListenStream", "FileDescriptorName", "Backlog", "NoDelay", "KeepAlive"},
    "Service": """
        Type ExecStart Restart RestartSec Environment TimeoutStopSec WatchdogSec DynamicUser NoNewPrivileges
        ProtectSystem
        ProtectHome ProtectProc ProcSubset ProtectClock ProtectHostname ProtectKernelLogs ProtectKernelModules
        ProtectKernelTunables
        ProtectControlGroups PrivateTmp PrivateDevices PrivateUsers PrivateNetwork RestrictAddressFamilies
        RestrictNamespaces RestrictRealtime RestrictSUIDSGID LockPersonality MemoryDenyWriteExecute RemoveIPC
        CapabilityBoundingSet AmbientCapabilities SystemCallArchitectures SystemCallFilter SystemCallErrorNumber UMask
        LimitNOFILE TasksMax
    """.split(),
}


@pytest.mark.once
def test_the_units_have_directives_that_systemd_knows() -> None:
    units = {path.suffix: Unit(path) for path in UNITS.iterdir()}
    assert set(units) == {".service", ".socket"}
    for unit in units.values():
        for section in unit.sections():
            assert set(unit[section]) <= set(DIRECTIVES[section]), section
    service, sock = units[".service"], units[".socket"]
    assert service["Service"]["Type"] == "notify"
    assert service["Unit"]["Requires"] == "fastserve-echo.socket"
    name = sock["Socket"]["FileDescriptorName"]
    assert f"--bind systemd:{name} " in service["Service"]["ExecStart"]


@pytest.mark.once
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    for path in UNITS.iterdir():
        # The program that it starts is not installed here.
        text = re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", path.read_text(), flags=re.MULTILINE)
        (tmp_path / path.name).write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", *map(str, sorted(tmp_path.iterdir()))]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (shown.returncode, [line for line in shown.stderr.splitlines() if "fastserve" in line]) == (0, [])


def test_the_command_of_the_unit_serves(here: Path) -> None:
    command = Unit(UNITS / "fastserve-echo.service")["Service"]["ExecStart"].split()
    program, _, handler = command[-1].rpartition(":")
    shutil.copy(ROOT / "examples" / Path(program).name, here)
    name = Unit(UNITS / "fastserve-echo.socket")["Socket"]["FileDescriptorName"]
    sock = listener()
    address = sock.getsockname()
    arguments = [*command[1:-1], f"{Path(program).name}:{handler}"]
    with started([*MODULE, *arguments], [sock], LISTEN_FDNAMES=name) as server:
        assert port_of(server) == address
        assert talk(address, b"a\n") == b"a\n"
        stop(server)
