"""``fastserve serve``, in processes of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from cli_support import (
    HANDLERS,
    NEEDS_GREENLET,
    QUICK,
    WORKERS,
    address_of,
    assert_refused,
    cli,
    connect,
    exchange,
    needs_unix,
    run,
    started,
    stop,
)
from fastserve import _backend
from fastserve.cli import _resolve
from support import settle_before_signal, wait_until


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
            if worker == "sync" and clients:
                settle_before_signal(server.pid)  # it waits for its client in the main thread
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
            child = int(client.recv(100))
            os.kill(child, signum)
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""
        with connect(address) as client:
            assert int(client.recv(100)) != server.pid
        stop(server)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_a_forked_child_that_does_not_come_to_call_a_signal_handler(here: Path, signum: int) -> None:
    with started("serve", "handlers:Computing", "--bind", "127.0.0.1:0", "--worker", "fork") as server:
        address = address_of(server)
        with connect(address) as client, connect(address) as other:
            child = int(client.recv(100))
            assert int(other.recv(100)) != child
            os.kill(child, signum)
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""
            assert stop(server, signum) < QUICK  # it ends the other one
            with contextlib.suppress(ConnectionResetError):
                assert other.recv(1) == b""


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
            settle_before_signal(server.pid)
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
    missing = "greenlet" if _backend.has_gil() else "GIL"
    assert re.search(rf"^greenlets: +not available \(.*{missing}.*\)$", shown.stdout, re.MULTILINE)


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


@pytest.mark.skipif(not _backend.has_gil(), reason="every loop ticks without the GIL")
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
