"""TLS on the command line: ``fastserve serve --tls-cert``, in processes of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from children import IMPLEMENTATIONS, TIME_LIMIT, Child, child
from support import settle_before_signal, wait_until

pytest.importorskip("trustme")

from tls_support import (  # noqa: E402
    ask,
    client_context,
    client_of,
    serial_at,
    serial_of,
    serials_under_load,
    write_authority,
    write_certificate,
)

pytestmark = pytest.mark.once

HANDLERS = """
import fastserve

class Lines(fastserve.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(line.upper())
"""

WORKERS = ["sync", "threads", "threadpool"]
if importlib.util.find_spec("greenlet") is not None:
    WORKERS.append("greenlet")
if hasattr(os, "fork"):
    WORKERS.append("fork")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A directory with handlers, a certificate with its key, and the authority of clients."""
    (tmp_path / "handlers.py").write_text(HANDLERS)
    write_certificate(tmp_path)
    write_authority(tmp_path)
    return tmp_path


@pytest.fixture(params=IMPLEMENTATIONS)
def start(request: pytest.FixtureRequest, here: Path) -> Callable[..., Any]:
    """Start ``fastserve serve`` with these options on either implementation."""

    def run(*options: str) -> Any:
        arguments = ["-m", "fastserve", "serve", "handlers.py:Lines", "--bind", "127.0.0.1:0", *options]
        return child(request.param, here, arguments)

    return run


FILES = ["--tls-cert", "server.pem", "--tls-key", "server.key"]


def served(server: Child, worker: str = "threads") -> Any:
    """Read the first line; return what knows the address, as a server does."""
    line = server.line()
    found = re.fullmatch(rf"Serving handlers\.py:Lines on 127\.0\.0\.1:(\d+) \(tcp with tls, {worker}\); .*", line)
    assert found, line
    return SimpleNamespace(server_address=("127.0.0.1", int(found[1])))


def reported(server: Child) -> Iterator[str]:
    """Yield the lines on standard error, and wait for each of them."""
    seen = 0
    while True:
        wait_until(lambda seen=seen: server.errors().count("\n") > seen)
        yield server.errors().splitlines()[seen]
        seen += 1


def certificate_of(server: Any) -> str:
    """Return the serial number of the certificate that a server shows; it answers too."""
    with client_of(server) as client:
        client.sendall(b"hello\n")
        assert client.recv(10) == b"HELLO\n"
        return serial_at(client)


@pytest.mark.parametrize("worker", WORKERS)
def test_serve_with_tls_and_load_the_certificates_again(start: Any, here: Path, worker: str) -> None:
    with start(*FILES, "--worker", worker) as process:
        server = served(process, worker)
        errors = reported(process)
        first = serial_of(here / "server.pem")
        assert certificate_of(server) == first

        write_certificate(here)
        second = serial_of(here / "server.pem")
        assert certificate_of(server) == first
        process.process.send_signal(signal.SIGHUP)
        assert next(errors) == "fastserve: the certificates were loaded again"
        assert certificate_of(server) == second

        (here / "server.key").write_bytes(b"")
        process.process.send_signal(signal.SIGHUP)
        said = next(errors)
        assert said.startswith("fastserve: the certificates were not loaded again, and stay what they were: "), (
            process.errors()
        )
        assert certificate_of(server) == second
        process.process.terminate()
        assert process.end() == ""
        assert process.errors().count("fastserve: ") == 2 and "Traceback" not in process.errors()


@pytest.mark.parametrize("worker", WORKERS)
def test_loading_certificates_does_not_wait_for_a_client_nor_disturb_it(start: Any, here: Path, worker: str) -> None:
    with start(*FILES, "--worker", worker) as process:
        server = served(process, worker)
        errors = reported(process)
        with client_of(server) as client:
            for _ in range(5):
                client.sendall(b"hello\n")
                assert client.recv(10) == b"HELLO\n"
                if worker == "sync":
                    settle_before_signal(process.process.pid)  # it waits for its client in the main thread
                process.process.send_signal(signal.SIGHUP)
                assert next(errors) == "fastserve: the certificates were loaded again"
            process.process.send_signal(signal.SIGHUP)  # and is interrupted where it waits for the client
        assert next(errors) == "fastserve: the certificates were loaded again"
        assert certificate_of(server) == serial_of(here / "server.pem")
        process.process.terminate()
        assert process.end() == ""
        assert process.errors().count("fastserve: ") == 6 and "Traceback" not in process.errors()


@pytest.mark.skipif("fork" not in WORKERS, reason="no fork here")
def test_certificates_are_exchanged_under_load(start: Any, here: Path) -> None:
    # The other worker models are in test_tls_mixin, in one process with their clients.
    known = {serial_of(here / "server.pem")}
    with start(*FILES, "--worker", "fork") as process:
        server = served(process, "fork")
        errors = reported(process)

        def exchange() -> None:
            write_certificate(here)
            known.add(serial_of(here / "server.pem"))
            process.process.send_signal(signal.SIGHUP)
            assert next(errors) == "fastserve: the certificates were loaded again"

        serials_under_load(server, exchange, known)
        process.process.terminate()
        assert process.end() == ""


def test_only_clients_with_a_certificate_are_served(start: Any) -> None:
    with start(*FILES, "--tls-client-ca", "authority.pem") as process:
        server = served(process)
        assert ask(server, context=client_context(certificate=True)) == b"HELLO\n"
        with pytest.raises(OSError):
            if ask(server) == b"":
                raise ConnectionAbortedError
        process.process.terminate()
        assert process.end() == ""


def test_the_key_may_be_in_the_file_of_the_certificate(start: Any, here: Path) -> None:
    both = here / "both.pem"
    both.write_bytes((here / "server.key").read_bytes() + (here / "server.pem").read_bytes())
    with start("--tls-cert", "both.pem") as process:
        assert ask(served(process)) == b"HELLO\n"
        process.process.terminate()
        assert process.end() == ""


@pytest.mark.skipif("fork" not in WORKERS, reason="no fork here")
def test_a_forked_child_does_not_end_when_the_terminal_hangs_up(start: Any, here: Path) -> None:
    with start(*FILES, "--worker", "fork") as process:
        server = served(process, "fork")
        with client_of(server) as client:
            client.sendall(b"one\n")
            assert client.recv(10) == b"ONE\n"
            (pid,) = Path(f"/proc/{process.process.pid}/task/{process.process.pid}/children").read_text().split()
            os.kill(int(pid), signal.SIGHUP)
            client.sendall(b"two\n")
            assert client.recv(10) == b"TWO\n"
        process.process.terminate()
        assert process.end() == ""
        assert process.errors() == ""


def encrypt(path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    key: Any = serialization.load_pem_private_key(path.read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"secret")
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--tls-cert nope.pem --tls-key server.key", "cannot serve with TLS: nope.pem: No such file"),
        ("--tls-cert server.pem --tls-key nope.key", "cannot serve with TLS: nope.key: No such file"),
        ("--tls-cert server.pem --tls-key server.key --tls-client-ca nope.pem", "TLS: nope.pem: No such file"),
        ("--tls-cert . --tls-key server.key", "TLS: .: Is a directory"),
        ("--tls-cert server.pem --tls-key other.key", "the key is not that of the certificate, in tls_cert server.pem"),
        ("--tls-cert server.pem --tls-key encrypted.key", "the key in 'encrypted.key' is encrypted"),
        ("--tls-cert server.pem", "in tls_cert server.pem"),
        ("--tls-cert handlers.py --tls-key server.key", "in tls_cert handlers.py and tls_key server.key"),
        ("--tls-cert server.pem --tls-key server.key --tls-client-ca server.key", "in tls_client_ca server.key"),
        ("--tls-key server.key", "--tls-key needs --tls-cert"),
        ("--tls-client-ca authority.pem", "--tls-client-ca needs --tls-cert"),
        ("--tls-cert server.pem --tls-key server.key --udp", "--tls-cert is for connections: not with --udp"),
        ("--tls-key server.key --udp", "--tls-key is for connections: not with --udp"),
        ("--tls-cert", "--tls-cert"),
    ],
)
def test_wrong_options_give_one_line_and_status_2(here: Path, options: str, said: str) -> None:
    write_certificate(here, stem="other")
    write_certificate(here, stem="encrypted")
    encrypt(here / "encrypted.key")
    command = [sys.executable, "-m", "fastserve", "serve", "handlers.py:Lines", "--bind", "127.0.0.1:0"]
    failed = subprocess.run(
        [*command, *options.split()],
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
        cwd=here,
        stdin=subprocess.DEVNULL,
    )
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("fastserve serve: ") and said in failed.stderr
    assert failed.stderr.count("\n") == 1 and "_ssl.c" not in failed.stderr


@pytest.mark.skipif("fork" not in WORKERS, reason="no fork here")
@pytest.mark.parametrize("worker", [worker for worker in WORKERS if worker != "fork"])
def test_processes_that_are_replaced_have_the_new_certificate(start: Any, here: Path, worker: str) -> None:
    with start(*FILES, "--worker", worker, "--workers", "2") as process:
        server = served(process, f"{worker}, 2 processes")
        first = serial_of(here / "server.pem")
        assert certificate_of(server) == first
        write_certificate(here)
        second = serial_of(here / "server.pem")
        process.process.send_signal(signal.SIGHUP)
        wait_until(lambda: [certificate_of(server) for _ in range(8)] == [second] * 8)
        (here / "server.key").write_bytes(b"")
        process.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "the certificates were not loaded again, and stay what they were: " in process.errors())
        # On a busy machine a process that was replaced may have been about to accept once more.
        wait_until(lambda: [certificate_of(server) for _ in range(8)] == [second] * 8)
        process.process.terminate()
        assert process.end() == ""
