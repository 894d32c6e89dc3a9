"""Real programs on fastserve, through ``patch()``, imported before it and after it.

Each runs in a process of its own, which checks that none of the stdlib's own server functions is called, and that
``unpatch()`` gives them back.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging.handlers
import os
import re
import shutil
import socket
import struct
import subprocess
import xmlrpc.client
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from children import IMPLEMENTATIONS, THE_END, TIME_LIMIT, Child, child, program

Run = Callable[..., AbstractContextManager[Child]]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["before", "after"])
def run(request: pytest.FixtureRequest, implementation: str, tmp_path: Path) -> Run:
    """Run a program whose imports come before or after the patch: ``with run(imports, body, *arguments) as child``."""

    def start(imports: str, body: str, *arguments: str, allowed: tuple[str, ...] = ()) -> AbstractContextManager[Child]:
        return child(implementation, tmp_path, [*program(request.param, imports, body), *arguments], allowed)

    return start


def test_a_program_that_runs_on_the_stdlib_is_noticed(implementation: str, tmp_path: Path) -> None:
    """Guard the tests below: what they rely on must fail where a function of the stdlib's is called."""
    body = """
server = socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler)
with server, socketserver.socket.create_connection(server.server_address):
    server.handle_request()
    stdlib[socketserver.BaseServer, "handle_timeout"](server)
"""
    with child(implementation, tmp_path, program("after", "", body)) as started:
        assert started.process.wait(TIME_LIMIT) == 1
        assert "'socketserver': {'BaseServer.handle_timeout'}" in started.errors()


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A directory with a page, and a file that is larger than any buffer."""
    directory = tmp_path / "site"
    directory.mkdir()
    (directory / "page.txt").write_text("a page\n")
    (directory / "large.bin").write_bytes(os.urandom(1 << 20))
    return directory


def curl(*arguments: str) -> str:
    """Run curl and return what it prints."""
    program = shutil.which("curl")
    if program is None:
        pytest.skip("curl is not installed")
    result = subprocess.run(
        [program, "--silent", "--show-error", "--noproxy", "*", "--max-time", "60", *arguments],
        capture_output=True,
        timeout=TIME_LIMIT,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.decode()


def check_site(url: str, site: Path, copy: Path) -> None:
    """Fetch from a server of ``site`` what a browser would."""
    listing = curl(f"{url}/")
    assert re.findall(r'href="(.+?)"', listing) == ["large.bin", "page.txt"]
    assert curl(f"{url}/page.txt") == "a page\n"
    head = curl("--head", f"{url}/page.txt")
    assert " 200 OK\r\n" in head and "Content-Length: 7\r\n" in head and head.endswith("\r\n\r\n")
    assert curl("--output", os.devnull, "--write-out", "%{http_code}", f"{url}/absent") == "404"
    curl("--output", str(copy), f"{url}/large.bin")
    assert copy.read_bytes() == (site / "large.bin").read_bytes()


def test_http_server_serves_a_directory_to_curl(run: Run, site: Path, tmp_path: Path) -> None:
    imports = """
import functools
import http.server

class Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
"""
    body = """
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=sys.argv[1]))
assert type(server).serve_forever is fastserve.BaseServer.serve_forever
assert type(server).process_request is fastserve.ThreadingMixIn.process_request
serve(server)
"""
    with run(imports, body, str(site)) as server:
        url = f"http://127.0.0.1:{server.port()}"
        check_site(url, site, tmp_path / "copy")
        connects = curl(
            *["--write-out", "%{stderr}%{stdout}connects: %{num_connects}\n"],
            *[f"{url}/page.txt", f"{url}/page.txt"],
        )
        assert connects == "a page\nconnects: 1\na page\nconnects: 0\n", "the second request finds the connection open"
        assert server.interrupt() == f"interrupted\n{THE_END}"
        assert '"GET /page.txt HTTP/1.1" 200' in server.errors()


def test_http_server_without_threads_serves_one_client_after_the_other(run: Run, site: Path, tmp_path: Path) -> None:
    body = """
Handler = http.server.SimpleHTTPRequestHandler
server = http.server.HTTPServer(("127.0.0.1", 0), lambda *arguments: Handler(*arguments, directory=sys.argv[1]))
assert type(server).process_request is fastserve.BaseServer.process_request
serve(server)
"""
    with run("import http.server", body, str(site)) as server:
        check_site(f"http://127.0.0.1:{server.port()}", site, tmp_path / "copy")
        assert server.interrupt() == f"interrupted\n{THE_END}"


def test_python_m_http_server_serves_a_directory_to_curl(run: Run, site: Path, tmp_path: Path) -> None:
    body = """
import runpy
sys.argv[:] = ["http.server", "--bind", "127.0.0.1", "--directory", sys.argv[1], "0"]
with contextlib.suppress(SystemExit):
    runpy.run_module("http.server", run_name="__main__", alter_sys=True)
"""
    # It is what runpy says of any module that was imported before it is run.
    allowed = ("ignore:'http.server' found in sys.modules:RuntimeWarning",)
    with run("import http.server", body, str(site), allowed=allowed) as server:
        match = re.search(r"port (\d+) \(http://127\.0\.0\.1:\1/\)", server.line())
        assert match
        check_site(f"http://127.0.0.1:{match[1]}", site, tmp_path / "copy")
        assert server.interrupt() == f"\nKeyboard interrupt received, exiting.\n{THE_END}"


def test_xmlrpc_server_with_threads_answers_calls_faults_and_introspection(run: Run) -> None:
    imports = """
import xmlrpc.client
from xmlrpc.server import SimpleXMLRPCServer

class Server(socketserver.ThreadingMixIn, SimpleXMLRPCServer):
    pass
"""
    body = """
def add(a, b):
    "Return the sum."
    return a + b

def refuse():
    raise xmlrpc.client.Fault(42, "never")

# Two calls meet here: one thread for each request, or neither returns.
meeting = threading.Barrier(2)

def meet():
    meeting.wait(60)
    return threading.current_thread() is not threading.main_thread()

server = Server(("127.0.0.1", 0), logRequests=False, allow_none=True)
assert type(server).serve_forever is fastserve.BaseServer.serve_forever
assert type(server).process_request is fastserve.ThreadingMixIn.process_request
server.register_introspection_functions()
server.register_multicall_functions()
for function in (add, refuse, meet):
    server.register_function(function)
serve(server)
"""
    with run(imports, body) as server:
        url = f"http://127.0.0.1:{server.port()}"
        with xmlrpc.client.ServerProxy(url) as first, xmlrpc.client.ServerProxy(url) as second:
            assert first.add(2, 3) == 5
            assert first.add("a" * 100_000, "b") == "a" * 100_000 + "b"
            methods = first.system.listMethods()
            assert isinstance(methods, list) and {"add", "refuse", "system.methodHelp"} <= set(methods)
            assert first.system.methodHelp("add") == "Return the sum."
            with pytest.raises(xmlrpc.client.Fault) as refused:
                first.refuse()
            assert (refused.value.faultCode, refused.value.faultString) == (42, "never")
            with pytest.raises(xmlrpc.client.Fault, match="unsupported operand"):
                first.add(1, "one")
            calls = xmlrpc.client.MultiCall(first)
            calls.add(1, 2)
            calls.add(3, 4)
            assert list(calls()) == [3, 7]
            assert _together(first.meet, second.meet) == [True, True]
        assert server.interrupt() == f"interrupted\n{THE_END}"


def _together(*functions: Callable[[], object]) -> list[object]:
    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result(TIME_LIMIT) for future in [pool.submit(function) for function in functions]]


def test_wsgiref_serves_an_application_and_keeps_to_the_protocol(run: Run) -> None:
    imports = "from wsgiref import simple_server, validate"
    body = """
def application(environ, start_response):
    size = int(environ.get("CONTENT_LENGTH") or 0)
    received = environ["wsgi.input"].read(size)
    start_response("200 OK", [("Content-Type", "text/plain"), ("X-Method", environ["REQUEST_METHOD"])])
    return [environ["PATH_INFO"].encode(), b"?", environ["QUERY_STRING"].encode(), b" ", received]

server = simple_server.make_server("127.0.0.1", 0, validate.validator(application))
assert type(server).serve_forever is fastserve.BaseServer.serve_forever
serve(server)
"""
    with run(imports, body) as server:
        port = server.port()
        for method, sent in (("GET", b""), ("POST", b"x" * 200_000), ("POST", b"a=1")):
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
                connection.request(method, "/a%20path?a=b", body=sent, headers={"Content-Type": "text/plain"})
                answer = connection.getresponse()
                assert (answer.status, answer.headers["X-Method"]) == (200, method)
                assert answer.read() == b"/a path?a=b " + sent
        assert server.interrupt() == f"interrupted\n{THE_END}"


def test_logging_config_listen_takes_a_configuration(run: Run, tmp_path: Path) -> None:
    body = """
listener = logging.config.listen(0)
listener.start()
assert listener.ready.wait(60)
listener.ready.clear()
print("listening on", f"127.0.0.1:{listener.port}")
assert listener.ready.wait(60)  # it is set again after each configuration
logging.getLogger("test").debug("configured from outside")
logging.config.stopListening()
# It looks whether it is to stop after each connection, or once in a second, which may have passed by now.
with contextlib.suppress(ConnectionError):
    socketserver.socket.create_connection(("127.0.0.1", listener.port)).close()
listener.join(60)
assert not listener.is_alive()
"""
    log = tmp_path / "log.txt"
    configuration = {
        "version": 1,
        "formatters": {"short": {"format": "%(levelname)s %(name)s %(message)s"}},
        "handlers": {"file": {"class": "logging.FileHandler", "filename": str(log), "formatter": "short"}},
        "loggers": {"test": {"level": "DEBUG", "handlers": ["file"]}},
    }
    with run("import contextlib\nimport logging.config", body) as server:
        data = json.dumps(configuration).encode()
        with socket.create_connection(("127.0.0.1", server.port()), timeout=60) as connection:
            connection.sendall(struct.pack(">L", len(data)) + data)
            assert connection.recv(1) == b""
        assert server.end() == THE_END
    assert log.read_text() == "DEBUG test configured from outside\n"


def test_a_log_server_receives_the_records_of_a_socket_handler(run: Run) -> None:
    imports = """
import logging
import pickle
import struct

class RecordHandler(socketserver.StreamRequestHandler):
    def handle(self):
        while len(size := self.rfile.read(4)) == 4:
            record = logging.makeLogRecord(pickle.loads(self.rfile.read(struct.unpack(">L", size)[0])))
            print(record.levelname, record.name, record.getMessage())

class RecordServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
"""
    body = """
server = RecordServer(("127.0.0.1", 0), RecordHandler)
assert type(server).serve_forever is fastserve.BaseServer.serve_forever
assert RecordHandler.setup is fastserve.StreamRequestHandler.setup
serve(server)
"""
    with run(imports, body) as server:
        logger = logging.Logger("sender")
        handler = logging.handlers.SocketHandler("127.0.0.1", server.port())
        logger.addHandler(handler)
        try:
            for number in range(50):
                logger.info("record %d of %s", number, "x" * number * 100)
            for number in range(50):
                assert server.line() == f"INFO sender record {number} of {'x' * number * 100}"
        finally:
            handler.close()
        assert server.interrupt() == f"interrupted\n{THE_END}"


# A response that comes in two parts: the second is sent when the client has the first and asks for it.
WERKZEUG_APPLICATION = """
go, gone = os.pipe()

@Request.application
def application(request):
    if request.path == "/go":
        os.write(gone, b"!")
        return Response("going")
    if request.path == "/stream":
        def parts():
            yield f"{os.getpid()} {threading.get_ident()}\\n"
            yield os.read(go, 1)
        return Response(parts())
    return Response(request.get_data()[::-1])
"""


def check_werkzeug(port: int) -> tuple[int, int]:
    """Talk to the application; return the process and the thread that streamed."""
    with (
        contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as streaming,
        contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as other,
    ):
        streaming.request("GET", "/stream")
        stream = streaming.getresponse()
        assert (stream.status, stream.headers["Transfer-Encoding"]) == (200, "chunked")
        process, thread = stream.readline().split()
        other.request("GET", "/go")
        assert other.getresponse().read() == b"going"
        assert stream.read() == b"!"
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        sent = os.urandom(300_000)
        connection.request("POST", "/", body=sent)
        assert connection.getresponse().read() == sent[::-1]
    return int(process), int(thread)


def test_werkzeug_streams_from_a_threaded_server(run: Run) -> None:
    pytest.importorskip("werkzeug")
    body = """
server = make_server("127.0.0.1", 0, application, threaded=True)
assert type(server).process_request is fastserve.ThreadingMixIn.process_request
assert type(server).get_request is fastserve.TCPServer.get_request
print("main thread:", threading.get_ident())
serve(server)
"""
    imports = "from werkzeug import Request, Response\nfrom werkzeug.serving import make_server"
    with run(imports, WERKZEUG_APPLICATION + body) as server:
        main_thread = int(server.line().partition(":")[2])
        process, thread = check_werkzeug(server.port())
        assert process == server.process.pid and thread != main_thread
        assert server.interrupt() == THE_END
        assert '"GET /stream HTTP/1.1" 200' in server.errors()


def test_werkzeug_streams_from_a_server_of_two_processes(run: Run) -> None:
    pytest.importorskip("werkzeug")
    body = """
server = make_server("127.0.0.1", 0, application, processes=2)
assert server.max_children == 2
assert type(server).collect_children is fastserve.ForkingMixIn.collect_children
assert type(server).get_request is fastserve.TCPServer.get_request
serve(server)
assert not server.active_children
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    print("no child is left")
"""
    imports = "from werkzeug import Request, Response\nfrom werkzeug.serving import make_server"
    with run(imports, WERKZEUG_APPLICATION + body) as server:
        process, _ = check_werkzeug(server.port())
        assert process != server.process.pid
        assert server.interrupt() == f"no child is left\n{THE_END}"


DNS_SERVERS = """
class Resolver:
    def resolve(self, request, handler):
        reply = request.reply()
        if request.q.qname.matchSuffix("example."):
            reply.add_answer(*RR.fromZone(f"{request.q.qname} 60 A 192.0.2.7"))
        else:
            reply.header.rcode = RCODE.NXDOMAIN
        return reply

servers = [
    DNSServer(Resolver(), address="127.0.0.1", port=0, tcp=tcp, logger=DNSLogger("error", prefix=False))
    for tcp in (False, True)
]
for server in servers:
    assert type(server.server).serve_forever is fastserve.BaseServer.serve_forever
    assert type(server.server).process_request is fastserve.ThreadingMixIn.process_request
    server.start_thread()
    print("listening on", f"127.0.0.1:{server.server.server_address[1]}")
assert servers[0].server.get_request.__func__ is fastserve.UDPServer.get_request
with until_interrupted():
    threading.Event().wait()
for server in servers:
    server.stop()
    server.server.server_close()
    server.thread.join(60)
    assert not server.isAlive()
"""
DNS_IMPORTS = "from dnslib import RCODE, RR\nfrom dnslib.server import DNSLogger, DNSServer"


def test_dnslib_answers_its_own_client_over_udp_and_tcp(run: Run) -> None:
    dnslib = pytest.importorskip("dnslib")
    with run(DNS_IMPORTS, DNS_SERVERS) as server:
        for port, tcp in ((server.port(), False), (server.port(), True)):
            for number in range(20):
                question = dnslib.DNSRecord.question(f"host{number}.example")
                answer = dnslib.DNSRecord.parse(question.send("127.0.0.1", port, tcp=tcp, timeout=60))
                assert answer.header.id == question.header.id
                assert [str(record.rdata) for record in answer.rr] == ["192.0.2.7"]
            question = dnslib.DNSRecord.question("elsewhere.test")
            answer = dnslib.DNSRecord.parse(question.send("127.0.0.1", port, tcp=tcp, timeout=60))
            assert answer.header.rcode == dnslib.RCODE.NXDOMAIN
        assert server.interrupt() == f"interrupted\n{THE_END}"


def test_dnslib_answers_dig_over_udp_and_tcp(run: Run) -> None:
    pytest.importorskip("dnslib")
    dig = shutil.which("dig")
    if dig is None:
        pytest.skip("dig is not installed")
    with run(DNS_IMPORTS, DNS_SERVERS) as server:
        for option in ("+notcp", "+tcp"):
            command = [dig, "@127.0.0.1", "-p", str(server.port()), option, "+short", "+tries=1", "+time=60"]
            answer = subprocess.run([*command, "host.example", "A"], capture_output=True, text=True, timeout=TIME_LIMIT)
            assert (answer.returncode, answer.stdout) == (0, "192.0.2.7\n"), answer
        assert server.interrupt() == f"interrupted\n{THE_END}"
