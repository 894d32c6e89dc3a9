"""The types: a program that uses the public interface as people do passes ``mypy --strict``."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

GOOD = """\
from __future__ import annotations

import functools
import http.server
import pathlib
import socket
import ssl
import threading
from typing import Any

import fastserve
import fastserve.testing
from fastserve import (
    BaseRequestHandler,
    DatagramRequestHandler,
    ForkingMixIn,
    StreamRequestHandler,
    TCPServer,
    TLSMixIn,
    ThreadPoolMixIn,
    ThreadPoolUDPServer,
    ThreadingMixIn,
    ThreadingTCPServer,
    UDPServer,
    UnixStreamServer,
)


class Echo(StreamRequestHandler):
    rbufsize = 0
    wbufsize = -1
    timeout = 5.0
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.lines = 0

    def handle(self) -> None:
        for line in self.rfile:
            self.lines += 1
            written: int = self.wfile.write(line.upper())
            assert written
        self.connection.shutdown(socket.SHUT_WR)
        host: str = self.client_address[0]
        print(host, self.server)


class Raw(BaseRequestHandler):
    def handle(self) -> None:
        self.request.sendall(self.request.recv(1024))


class Datagram(DatagramRequestHandler):
    def handle(self) -> None:
        self.wfile.write(self.packet + self.rfile.read())


class Server(ThreadingMixIn, TCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 128
    address_family = socket.AF_INET6
    timeout = 3.0

    def __init__(self, port: int) -> None:
        self.served = 0
        super().__init__(("::1", port), Echo, bind_and_activate=False)
        self.server_bind()
        self.server_activate()

    def get_request(self) -> tuple[Any, Any]:
        request, client_address = super().get_request()
        return request, client_address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return super().verify_request(request, client_address)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.served += 1
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        super().service_actions()

    def handle_error(self, request: Any, client_address: Any) -> None:
        super().handle_error(request, client_address)


class Forking(ForkingMixIn, TCPServer):
    max_children = 10

    def server_close(self) -> None:
        super().server_close()
        children: set[int] | None = self.active_children
        print(children)


class Unix(ThreadingMixIn, UnixStreamServer):
    pass


class Pooled(ThreadPoolMixIn, UnixStreamServer):
    max_workers = 4
    max_queued = 0

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        self.max_workers = 8
        super().serve_forever(poll_interval)


class PooledWeb(ThreadPoolMixIn, http.server.HTTPServer):
    pass


class Secure(TLSMixIn, ThreadingTCPServer):
    tls_cert = "chain.pem"
    tls_key = pathlib.Path("key.pem")
    alpn_protocols = ("h2", "http/1.1")
    handshake_timeout = 5.0

    def renew(self) -> None:
        self.reload_certificates()


class SecureWeb(TLSMixIn, fastserve.GreenletMixIn, http.server.HTTPServer):
    ssl_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)


class SecureForking(TLSMixIn, ForkingMixIn, TCPServer):
    handshake_timeout = None


class Limited(UDPServer):
    max_packet_size = 512


def main() -> None:
    fastserve.TCPServer.allow_reuse_address = True
    with ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1})
        thread.start()
        descriptor: int = server.fileno()
        listener: socket.socket = server.socket
        print(descriptor, listener, server.server_address, server.RequestHandlerClass)
        server.shutdown()
    with TCPServer(("127.0.0.1", 0), functools.partial(Echo)) as partial_server:
        partial_server.timeout = 1.0
        partial_server.handle_request()
    with Limited(("127.0.0.1", 0), Datagram) as datagrams:
        datagrams.handle_request()
    with ThreadPoolUDPServer(("127.0.0.1", 0), Datagram) as pool:
        pool.max_workers = None
        pool.handle_request()
        pool.shutdown()
    fastserve.patch()
    if fastserve.patched():
        fastserve.unpatch()
    with fastserve.patched():
        print(fastserve.implementation, fastserve.__version__)


def test_echo() -> None:
    with fastserve.testing.serve(Echo, worker="sync", request_queue_size=7) as served, served.connect() as client:
        client.sendall(served.url.encode())
        expected: Exception = served.take_error(timeout=1.0)
        print(expected, served.errors, served.address, served.server)
    with fastserve.testing.serve(functools.partial(Echo), server_class=http.server.HTTPServer):
        pass


def test_with_the_fixture(fastserve_server: fastserve.testing.ServerFactory) -> None:
    served: fastserve.testing.Served = fastserve_server(Datagram, udp=True)
    client: socket.socket = served.connect(timeout=None)
    client.send(b"")
"""

# Each with the line that mypy must refuse.
BAD = {
    "arg-type": "import fastserve\nfastserve.TCPServer(('', 0), 5)\n",
    "call-arg": "import fastserve\nfastserve.TCPServer(('', 0))\n",
    "attr-defined": "import fastserve\nfastserve.patched().no_such_attribute\n",
}


def check(path: Path, program: str) -> tuple[int, str]:
    """Run mypy on a program; return its exit status and what it says."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    path.write_text(program)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "", "--no-error-summary"]
    command += ["--cache-dir", str(path.parent.parent / "mypy_cache"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=160, cwd=path.parent)
    return done.returncode, done.stdout + done.stderr


def test_a_program_that_uses_the_public_interface_is_accepted(tmp_path: Path) -> None:
    assert check(tmp_path / "program.py", GOOD) == (0, "")


@pytest.mark.parametrize("code", sorted(BAD))
def test_a_wrong_program_is_refused(tmp_path: Path, code: str) -> None:
    status, said = check(tmp_path / "program.py", BAD[code])
    assert status == 1
    assert f"[{code}]" in said


def test_py_typed_is_shipped() -> None:
    assert files("fastserve").joinpath("py.typed").is_file()
