"""A program that uses socketserver as people do, for type checkers: test_typing_users.py has them read it.

It is also checked with fastserve in the place of socketserver, which must bring no error.
"""

from __future__ import annotations

import functools
import http.server
import selectors
import socket
import socketserver
import ssl
import threading
import wsgiref.simple_server
import xmlrpc.server
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

    Request = socketserver._RequestType
    Address = socketserver._AfInetAddress

Server = TypeVar("Server", bound=socketserver.BaseServer)


# Handlers.


class Echo(socketserver.BaseRequestHandler):
    request: socket.socket
    client_address: tuple[str, int]
    server: Counting

    def setup(self) -> None:
        super().setup()
        self.lines: list[bytes] = []

    def handle(self) -> None:
        data: bytes = self.request.recv(1024)
        self.lines.append(data)
        self.request.sendall(data)
        self.server.count += 1
        host, port = self.client_address
        print(host.upper(), port + 1)

    def finish(self) -> None:
        super().finish()


class Plain(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.sendall(self.request.getpeercert())
        announce(self.server)
        server: socketserver.BaseServer = self.server
        server.shutdown()
        if isinstance(self.server, socketserver.TCPServer):
            print(self.server.fileno(), self.server.socket.family, self.server.server_address[0])
        if isinstance(self.server, Counting):
            self.server.count += 1
        cast(Counting, self.server).count += 1
        assert isinstance(self.server, socketserver.ThreadingMixIn)
        print(self.server.daemon_threads)

    def owner(self) -> socketserver.BaseServer:
        return self.server


class Datagram(socketserver.BaseRequestHandler):
    request: tuple[bytes, socket.socket]

    def handle(self) -> None:
        data, listener = self.request
        listener.sendto(data.upper(), self.client_address)


class Lines(socketserver.StreamRequestHandler):
    rbufsize = 0
    wbufsize = 4096
    timeout = 5
    disable_nagle_algorithm = True

    def setup(self) -> None:
        self.request.settimeout(3)
        super().setup()

    def handle(self) -> None:
        line: bytes = self.rfile.readline().strip()
        while chunk := self.rfile.read(10):
            print(len(chunk))
        for other in self.rfile:
            self.wfile.write(other + line)
        self.wfile.flush()
        self.connection.settimeout(1.5)
        print(self.connection.cipher(), self.client_address[0], self.server.server_address)

    def read(self) -> bytes:
        return self.rfile.readline()

    def write(self, data: bytes) -> int:
        return self.wfile.write(data)


class Explicit(socketserver.StreamRequestHandler):
    rbufsize: ClassVar[int] = 0
    wbufsize: ClassVar[int] = -1
    timeout: ClassVar[float | None] = 2.5
    disable_nagle_algorithm: ClassVar[bool] = True
    connection: ssl.SSLSocket

    def __init__(
        self, request: socket.socket, client_address: Any, server: socketserver.BaseServer, *, prefix: bytes = b""
    ) -> None:
        self.prefix = prefix
        super().__init__(request, client_address, server)

    def handle(self) -> None:
        print(self.connection.cipher())


class Packets(socketserver.DatagramRequestHandler):
    def handle(self) -> None:
        name: str = self.packet.decode()
        self.socket.sendto(self.packet, self.client_address)
        self.wfile.write(self.rfile.read() + name.encode())

    def data(self) -> bytes:
        return self.packet

    def listener(self) -> socket.socket:
        return self.socket


class Web(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.path.encode())


class Both(socketserver.StreamRequestHandler):
    server: http.server.HTTPServer

    def handle(self) -> None:
        print(self.server.server_name, self.server.server_port)


class MixInOfHandlers(socketserver.StreamRequestHandler):
    def greet(self) -> None:
        self.wfile.write(b"hello")


class Untold(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.server.count += 1  # type: ignore[attr-defined]
        self.server.RequestHandlerClass(self.request, None, self.server).lines()  # type: ignore[attr-defined]


class Mixed(MixInOfHandlers, Lines):
    def handle(self) -> None:
        self.greet()


# Servers.


class Counting(socketserver.TCPServer):
    allow_reuse_address = True
    allow_reuse_port = True
    request_queue_size = 128
    address_family = socket.AF_INET6
    socket_type = socket.SOCK_STREAM
    timeout = 1.5

    def __init__(self, address: tuple[str, int], activate: bool = True) -> None:
        self.count = 0
        super().__init__(address, Echo, bind_and_activate=activate)
        self.executor = ThreadPoolExecutor()

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        super().server_bind()
        self.server_address = self.socket.getsockname()
        host, port = self.server_address[:2]
        self.name = f"{host!r}:{port}"

    def server_activate(self) -> None:
        super().server_activate()
        self.socket = ssl.create_default_context().wrap_socket(self.socket, server_side=True)

    def get_request(self) -> tuple[socket.socket, Any]:
        request, address = super().get_request()
        request.settimeout(5.0)
        return request, address

    def verify_request(self, request: Request, client_address: Any) -> bool:
        return super().verify_request(request, client_address) and client_address[0] != "10.0.0.1"

    def process_request(self, request: Request, client_address: Any) -> None:
        self.executor.submit(self.process_request_in_executor, request, client_address)

    def process_request_in_executor(self, request: Request, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except Exception:
            self.handle_error(request, client_address)
        finally:
            self.shutdown_request(request)

    def finish_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: Any) -> None:
        self.RequestHandlerClass(request, client_address, self)  # type: ignore[arg-type]

    def handle_error(self, request: Any, client_address: Any) -> None:
        super().handle_error(request, client_address)

    def handle_timeout(self) -> None:
        super().handle_timeout()

    def service_actions(self) -> None:
        super().service_actions()

    def shutdown_request(self, request: Any) -> None:
        request.unwrap()
        super().shutdown_request(request)

    def close_request(self, request: Request) -> None:
        super().close_request(request)

    def serve_forever(self, poll_interval: float = 0.1) -> None:
        super().serve_forever(poll_interval=poll_interval)

    def shutdown(self) -> None:
        super().shutdown()

    def server_close(self) -> None:
        super().server_close()
        self.executor.shutdown()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)

    def fileno(self) -> int:
        return super().fileno()

    def port(self) -> int:
        return self.server_address[1]

    def listener(self) -> socket.socket:
        return self.socket

    def family(self) -> int:
        return self.address_family

    def make(self, request: socket.socket) -> socketserver.BaseRequestHandler:
        return self.RequestHandlerClass(request, None, self)  # type: ignore[arg-type]

    def accepted(self) -> socket.socket:
        return self.get_request()[0]


class Typed(socketserver.TCPServer):
    allow_reuse_address: bool = True
    request_queue_size: int = 5
    address_family: int = socket.AF_INET
    socket_type: int = socket.SOCK_STREAM
    timeout: float | None = None
    RequestHandlerClass: type[Echo]

    def configure(self, family: int, kind: int) -> None:
        self.address_family = family
        self.socket_type = kind
        self.RequestHandlerClass = Echo


class Numbered(socketserver.TCPServer):
    address_family = 2
    socket_type = 1
    timeout = None


class Datagrams(socketserver.UDPServer):
    max_packet_size = 512
    allow_reuse_address = True

    def get_request(self) -> tuple[tuple[bytes, socket.socket], Any]:  # type: ignore[override]
        (data, listener), address = super().get_request()
        return (data.upper(), listener), address

    def data(self) -> bytes:
        return self.get_request()[0][0]


class SizedDatagrams(socketserver.UDPServer):
    max_packet_size: ClassVar[int] = 1 << 16


class Unix(socketserver.UnixStreamServer):
    def path(self) -> str:
        assert isinstance(self.server_address, str)
        return self.server_address

    def get_request(self) -> tuple[socket.socket, Any]:
        request, _ = super().get_request()
        return request, ("local", 0)


class UnixDatagrams(socketserver.UnixDatagramServer):
    max_packet_size = 100


# Servers with mix-ins.


class Threaded(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    block_on_close = False

    def process_request(self, request: Request, client_address: Any) -> None:
        super().process_request(request, client_address)

    def process_request_thread(self, request: Request, client_address: Any) -> None:
        super().process_request_thread(request, client_address)

    def server_close(self) -> None:
        super().server_close()


class ThreadedDatagrams(socketserver.ThreadingMixIn, Datagrams):
    daemon_threads: bool = True


class ThreadedUnix(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    pass


class ThreadedUnixDatagrams(socketserver.ThreadingMixIn, socketserver.UnixDatagramServer):
    pass


class Forked(socketserver.ForkingMixIn, socketserver.TCPServer):
    max_children = 7
    timeout = 1.0
    active_children: set[int] | None = None

    def collect_children(self, *, blocking: bool = False) -> None:
        super().collect_children(blocking=blocking)
        print(len(self.active_children or ()))

    def service_actions(self) -> None:
        super().service_actions()

    def handle_timeout(self) -> None:
        super().handle_timeout()


class ForkedDatagrams(socketserver.ForkingMixIn, socketserver.UDPServer):
    pass


class ThreadedWeb(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        super().server_bind()
        print(self.server_name, self.server_port)


class ForkedWeb(socketserver.ForkingMixIn, http.server.HTTPServer):
    pass


class ThreadedRPC(socketserver.ThreadingMixIn, xmlrpc.server.SimpleXMLRPCServer):
    allow_reuse_address = True


class ForkedRPC(socketserver.ForkingMixIn, xmlrpc.server.SimpleXMLRPCServer):
    pass


class ThreadedWSGI(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    daemon_threads = True
    address_family = socket.AF_INET6


class UnixWeb(socketserver.UnixStreamServer):
    server_name = "localhost"
    server_port = 0


class HandlerOfRPC(xmlrpc.server.SimpleXMLRPCRequestHandler):
    rpc_paths = ("/rpc",)


class WithoutThreads(socketserver.ThreadingMixIn, socketserver.TCPServer):
    process_request = socketserver.TCPServer.process_request


class Secure(socketserver.ThreadingTCPServer):
    address_family = socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET
    request_queue_size = socket.SOMAXCONN

    def get_request(self) -> tuple[ssl.SSLSocket, Any]:
        request, address = super().get_request()
        return ssl.create_default_context().wrap_socket(request), address


class Adopting(socketserver.TCPServer):
    def __init__(self, descriptor: int, handler: type[socketserver.BaseRequestHandler]) -> None:
        socketserver.BaseServer.__init__(self, ("", 0), handler)
        self.socket = socket.socket(fileno=descriptor)
        self.address_family = self.socket.family
        self.server_address = ("", 0)


class OfKind(socketserver.TCPServer, Generic[Server]):
    peer: Server


class MixInOfServers(socketserver.BaseServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        raise


class Raising(MixInOfServers, socketserver.ThreadingMixIn, socketserver.TCPServer):
    pass


class Own(socketserver.BaseServer):
    def __init__(self, handler: type[socketserver.BaseRequestHandler]) -> None:
        super().__init__(("localhost", 1), handler)
        self.listener = socket.socket()

    def fileno(self) -> int:
        return self.listener.fileno()

    def get_request(self) -> tuple[Any, Any]:
        return self.listener.accept()


# Programs.


def accept(server: socketserver.TCPServer) -> socket.socket:
    return server.get_request()[0]


def receive(server: socketserver.UDPServer) -> bytes:
    (data, listener), _ = server.get_request()
    return data + bytes(listener.family)


def port(server: socketserver.TCPServer) -> int:
    return server.server_address[1]


def packet_size(server: socketserver.ThreadingUDPServer) -> int:
    return server.max_packet_size


def announce(server: socketserver.BaseServer) -> None:
    print(server.server_address, server.timeout, server.RequestHandlerClass)


def run(server: socketserver.BaseServer) -> threading.Thread:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    return thread


@contextmanager
def running(server: Server) -> Iterator[Server]:
    with server:
        thread = run(server)
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


serve = socketserver.TCPServer.serve_forever


def new(
    handler: type[socketserver.BaseRequestHandler], server_class: type[socketserver.TCPServer] = socketserver.TCPServer
) -> socketserver.TCPServer:
    return server_class(("", 0), handler)


def new_threading(
    handler: Callable[[Any, Any, socketserver.ThreadingTCPServer], socketserver.BaseRequestHandler],
) -> socketserver.ThreadingTCPServer:
    return socketserver.ThreadingTCPServer(("", 0), handler)


def new_handler(request: Any, client_address: Any, server: socketserver.BaseServer) -> socketserver.BaseRequestHandler:
    return Plain(request, client_address, server)


class Application:
    def __init__(self) -> None:
        self.server: socketserver.TCPServer | None = None

    def handle(self, request: Any, client_address: Any, server: Any) -> Plain:
        return Plain(request, client_address, server)

    def start(self) -> None:
        self.server = socketserver.TCPServer(("", 0), self.handle)
        run(self.server)


def main(application: WSGIApplication) -> None:
    socketserver.TCPServer.allow_reuse_address = True
    socketserver.TCPServer.address_family = socket.AF_INET6
    socketserver.ThreadingMixIn.daemon_threads = True
    with Counting(("::1", 0)) as counting:
        counting.count += 1
        run(counting)
        counting.shutdown()
    with socketserver.TCPServer(("127.0.0.1", 0), Plain) as server:
        server.timeout = 1.0
        server.socket.settimeout(1.0)
        server.handle_request()
        announce(server)
        port: int = server.server_address[1]
        print(port)
        with selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
    with socketserver.ThreadingTCPServer(
        (b"127.0.0.1", 0), functools.partial(Explicit, prefix=b"> ")
    ) as threading_server:
        print(threading_server.daemon_threads, threading_server.block_on_close)
    with socketserver.ThreadingUDPServer(("", 0), Packets) as datagram_server:
        print(datagram_server.max_packet_size)
    with socketserver.UnixStreamServer("/tmp/socket", Lines) as unix_server:
        print(unix_server.server_address)
    with socketserver.ThreadingUnixStreamServer(b"/tmp/socket", Lines), socketserver.UnixDatagramServer("/x", Packets):
        pass
    with socketserver.ThreadingUnixDatagramServer("/tmp/socket", Packets):
        pass
    with socketserver.ForkingTCPServer(("", 0), Lines) as forking, socketserver.ForkingUDPServer(("", 0), Datagram):
        print(forking.active_children, forking.max_children)
    with ThreadedWeb(("", 0), Web) as web:
        run(web)
        announce(web)
        print(web.server_port)
    with socketserver.TCPServer(("", 0), Web) as plain_web:
        plain_web.RequestHandlerClass = http.server.SimpleHTTPRequestHandler
    with socketserver.TCPServer(("", 0), lambda *arguments: Plain(*arguments)):
        pass
    with ThreadedRPC(("", 0), requestHandler=HandlerOfRPC, allow_none=True) as rpc:
        rpc.register_introspection_functions()
    wsgi = wsgiref.simple_server.make_server("", 0, application, server_class=ThreadedWSGI)
    wsgi.serve_forever()
    servers: list[socketserver.BaseServer] = [new(Plain), new(Web, Typed), Raising(("", 0), Plain), Own(Plain)]
    classes: dict[str, type[socketserver.BaseServer]] = {"tcp": socketserver.TCPServer, "udp": Datagrams}
    handlers: list[type[socketserver.BaseRequestHandler]] = [Lines, Packets, Echo]
    print(servers, classes, handlers, new_threading(Lines), new_threading(new_handler))
    with running(Counting(("", 0))) as counted, running(socketserver.ThreadingUDPServer(("", 0), Packets)) as datagrams:
        counted.count += datagrams.max_packet_size
    with ExitStack() as stack:
        entered = stack.enter_context(socketserver.TCPServer(("", 0), new_handler, False))
        entered.server_bind()
        entered.finish_request((b"", socket.socket()), ("", 1))
        serve(entered, 0.1)
    dynamic = type("Dynamic", (socketserver.ThreadingMixIn, socketserver.TCPServer), {})
    print(dynamic)
