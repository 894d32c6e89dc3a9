"""The three request handlers: what is done with a request."""

from __future__ import annotations

from io import BytesIO

from fastserve._annotations import TYPE_CHECKING, Any, Final
from fastserve._stdlib import socketserver
from fastserve.streams import writer_class

if TYPE_CHECKING:
    from typing import ClassVar

_std: Any = socketserver  # see server.py


class BaseRequestHandler(socketserver.BaseRequestHandler):
    """Handle one request: the constructor calls :meth:`setup`, :meth:`handle` and :meth:`finish`.

    Derive a class with a ``handle()`` of its own. An instance is made for each request, in the thread of the
    worker that handles it.

    :ivar request: the connection, a ``socket.socket``; of a datagram server the pair ``(data, socket)``.
    :ivar client_address: the address of the client.
    :ivar server: the server.
    """

    def __init__(self, request: Any, client_address: Any, server: Any) -> None:
        """Handle the request. What the methods raise comes out of it; :meth:`finish` is called all the same."""
        self.request = request
        self.client_address = client_address
        self.server = server
        self.setup()
        try:
            self.handle()
        finally:
            self.finish()

    def setup(self) -> None:
        """Do nothing. Called before :meth:`handle`; may be overridden."""

    def handle(self) -> None:
        """Do nothing. Overridden, it does the work of the service."""

    def finish(self) -> None:
        """Do nothing. Called after :meth:`handle`, also if that raised, but not if :meth:`setup` did."""


class StreamRequestHandler(BaseRequestHandler, socketserver.StreamRequestHandler):
    """Handle a connection through two files, ``rfile`` to read the request and ``wfile`` to write the answer.

    :cvar rbufsize: buffer of ``rfile`` in bytes: -1 the default size, 0 none, as for ``socket.makefile``.
    :cvar wbufsize: buffer of ``wfile`` in bytes; 0, the default, sends all that a ``write`` gives at once.
    :cvar timeout: seconds that a read or a write may take before it raises ``TimeoutError``; ``None``, the
        default, is endless.
    :cvar disable_nagle_algorithm: whether to set ``TCP_NODELAY``; ``False`` by default. RFC 896, tcp(7).
    :ivar connection: the request, under its other name.
    """

    rbufsize = -1

    wbufsize = 0

    if TYPE_CHECKING:  # typing.get_type_hints() would ask for ClassVar
        timeout: ClassVar[float | None] = None
    else:
        timeout = None

    disable_nagle_algorithm = False

    def setup(self) -> None:
        """Set the options of the connection and make ``rfile`` and ``wfile``."""
        self.connection = self.request
        if self.timeout is not None:
            self.connection.settimeout(self.timeout)
        if self.disable_nagle_algorithm:
            self.connection.setsockopt(_std.socket.IPPROTO_TCP, _std.socket.TCP_NODELAY, True)
        self.rfile = self.connection.makefile("rb", self.rbufsize)
        if self.wbufsize == 0:
            self.wfile = writer_class()(self.connection)
        else:
            self.wfile = self.connection.makefile("wb", self.wbufsize)

    def finish(self) -> None:
        """Flush ``wfile``, and close both files. That the client has gone meanwhile is no error."""
        if not self.wfile.closed:
            try:
                self.wfile.flush()
            except OSError:
                pass  # what was not sent has nobody left to read it
        self.wfile.close()
        self.rfile.close()


class DatagramRequestHandler(BaseRequestHandler, socketserver.DatagramRequestHandler):
    """Handle a datagram through two files; what ``handle()`` writes is sent as one datagram at the end.

    :ivar packet: the bytes of the datagram, which ``rfile`` reads.
    :ivar socket: the listener, which sends the answer.
    """

    def setup(self) -> None:
        """Take the request apart and make ``rfile`` and ``wfile``."""
        self.packet, self.socket = self.request
        self.rfile = BytesIO(self.packet)
        self.wfile = BytesIO()

    def finish(self) -> None:
        """Send what was written to ``wfile`` to the client, as one datagram, even an empty one."""
        self.socket.sendto(self.wfile.getvalue(), self.client_address)  # type: ignore[attr-defined]


def _handle(self: Any, request: Any, client_address: Any, server: Any) -> None:
    """Do what the constructor does where ``setup()`` does nothing."""
    self.request = request
    self.client_address = client_address
    self.server = server
    try:
        self.handle()
    finally:
        self.finish()


def _handle_with_files(
    self: Any,
    request: Any,
    client_address: Any,
    server: Any,
    packet: bytes,
    socket: Any,
    rfile: BytesIO,
    wfile: BytesIO,
) -> None:
    """Do what the constructor does where ``setup()`` is that of :class:`DatagramRequestHandler`, with its files."""
    self.request = request
    self.client_address = client_address
    self.server = server
    self.packet = packet
    self.socket = socket
    self.rfile = rfile
    self.wfile = wfile
    try:
        self.handle()
    finally:
        self.finish()


# The constructor of a handler, a setup() and another one, and what may be called in the place of the constructor while
# it and the one or the other setup() are not overridden.
OWN_OF_HANDLERS: Final = (
    BaseRequestHandler.__init__,
    BaseRequestHandler.setup,
    DatagramRequestHandler.setup,
    _handle,
    _handle_with_files,
)
