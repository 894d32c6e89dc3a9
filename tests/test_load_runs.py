"""Runs of the load generator: what they refuse, how they end, and connections that are idle."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from load_support import (
    Server,
    answering,
    echo,
    hello,
    load,
    ping,
    receive,
    running,
)
from support import open_descriptors, wait_until

# Arguments


@pytest.mark.parametrize(
    "options",
    [
        {"connections": 0},
        {"pipeline": 0},
        {"answer": 0},
        {"answer": -1},
        {"answer": b""},
        {"answer": bytes(65)},
        {"answer": 4},
        {"seconds": 0},
        {"seconds": -1},
        {"seconds": 3601},
        {"seconds": float("nan")},
        {"warmup": -0.1},
    ],
    ids=str,
)
def test_streams_refuse_arguments_that_make_no_sense(options: dict[str, Any]) -> None:
    before = open_descriptors()
    with pytest.raises(ValueError):
        hello(("127.0.0.1", 1), **options)
    assert open_descriptors() == before


@pytest.mark.parametrize("options", [{"sockets": 0}, {"window": 0}, {"window": 1025}, {"seconds": 0}], ids=str)
def test_datagrams_refuse_arguments_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        ping(("127.0.0.1", 1), **options)


def test_there_must_be_something_to_send_and_it_must_fit() -> None:
    with pytest.raises(ValueError, match="nothing to send"):
        load.streams(("127.0.0.1", 1), b"", answer=1)
    with pytest.raises(ValueError, match="at most 65507 bytes"):
        load.datagrams(("127.0.0.1", 1), bytes(65508))
    with pytest.raises(TypeError):
        load.streams(("127.0.0.1", 1), 5, answer=1)


@pytest.mark.parametrize("host", ["192.0.2.1", "8.8.8.8", "0.0.0.0", "localhost", "::1", "127.1", "", "128.0.0.1"])
def test_only_servers_on_this_machine_are_loaded(host: str) -> None:
    with pytest.raises(ValueError):
        hello((host, 1))
    with pytest.raises(ValueError):
        ping((host, 1))
    with pytest.raises(ValueError):
        load.Idle((host, 1), 1)


@pytest.mark.parametrize("port", [-1, 0, 65536])
def test_a_port_must_be_one(port: int) -> None:
    with pytest.raises(ValueError):
        hello(("127.0.0.1", port))


# Ends and interruptions


class Interrupted(Exception):
    """What the handler of a signal raises here."""


@pytest.mark.parametrize("run", [hello, ping])
def test_a_signal_ends_a_run_at_once_and_nothing_stays_open(run: Any) -> None:
    def interrupt(signum: int, frame: object) -> None:
        raise Interrupted

    def signal_soon() -> None:
        """Send the signal a little after the beginning of the run, which calls this."""
        later.start()

    later = threading.Timer(0.1, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1))
    previous = signal.signal(signal.SIGUSR1, interrupt)
    with running(echo) as streams, answering(lambda number, data: [data]) as datagrams:
        before = open_descriptors()
        begun = time.monotonic()
        with pytest.raises(Interrupted):
            run(streams if run is hello else datagrams, seconds=100, sample=signal_soon)
        assert time.monotonic() - begun < 50
        later.join()
        signal.signal(signal.SIGUSR1, previous)
        wait_until(lambda: open_descriptors() <= before)  # also those of the server's side


def test_a_sample_that_fails_ends_the_run_and_nothing_stays_open() -> None:
    def sample() -> float:
        raise Interrupted

    with running(echo) as server:
        before = open_descriptors()
        with pytest.raises(Interrupted):
            hello(server, connections=5, sample=sample)
        wait_until(lambda: open_descriptors() <= before)


def test_ctrl_c_ends_a_run_promptly() -> None:
    code = (
        "import socket, sys, fastserve._load as load\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "print('ready', flush=True)\n"
        "load.streams(server.getsockname(), b'x', answer=1, seconds=60, sample=lambda: print('on', flush=True))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"ready\n"
        assert process.stdout.readline() == b"on\n"
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
        assert process.wait(60) == -signal.SIGINT
        assert time.monotonic() - begun < 30
        assert b"KeyboardInterrupt" in errors


def test_want_of_descriptors_is_a_failure_of_the_generator_and_not_of_the_server() -> None:
    code = (
        "import resource, socket, errno, fastserve._load as load\n"
        "server = socket.create_server(('127.0.0.1', 0), backlog=100)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))\n"
        "for run in (lambda: load.streams(server.getsockname(), b'x', answer=1, connections=50, seconds=.1),\n"
        "            lambda: load.datagrams(server.getsockname(), b'x', sockets=50, seconds=.1)):\n"
        "    try:\n"
        "        run()\n"
        "    except OSError as error:\n"
        "        print(errno.errorcode[error.errno])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "EMFILE\nEMFILE\n", "")


# Idle connections


def test_idle_connections_are_held_and_then_closed() -> None:
    before = open_descriptors()
    with running(echo) as server:
        with load.Idle(server.address, 20, b"hello"):
            assert server.requests == 20
            assert len(server.sources) == server.connections == 20
            assert open_descriptors() >= before + 40
        wait_until(lambda: open_descriptors() <= before + 1)
        with load.Idle(server.address, 3) as idle:
            wait_until(lambda: server.connections == 23)
            assert server.requests == 20, "they send nothing"
            idle.close()
            wait_until(lambda: open_descriptors() <= before + 1)


def test_an_idle_connection_that_the_server_ends_is_an_error_and_nothing_stays_open() -> None:
    with running(lambda server, connection: receive(connection, 5) and None) as server:
        before = open_descriptors()
        with pytest.raises(ConnectionResetError):
            load.Idle(server.address, 5, b"hello")
        wait_until(lambda: open_descriptors() <= before)


def test_no_connection_of_a_run_is_reset_at_its_end() -> None:
    resets: list[OSError] = []

    def serve(server: Server, connection: socket.socket) -> None:
        try:
            while data := connection.recv(100):
                connection.sendall(data)
        except OSError as error:
            resets.append(error)

    with running(serve) as server:

        def ends_well() -> bool:
            resets.clear()
            result = hello(server, connections=10)
            wait_until(lambda: not server.open)  # before the server ends what it may still be about to answer
            return result["requests"] > 0 and not resets

        # Whoever is not answered a quarter of a second after the end is reset: on a busy machine it may be that.
        wait_until(ends_well)
