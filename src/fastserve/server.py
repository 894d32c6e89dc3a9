"""The five servers: what they listen on, their loop, and the hooks that a program may override.

They are the classes of :mod:`socketserver`, each derived from the stdlib's class of the same name, with the same
methods, called in the same order on the same thread. They are plain Python: what makes them fast is in objects
that they hold while they serve (``_loop``). A method is always called through ``self``, so that an override on
the class or on the instance takes effect.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from fastserve import _backend, datagrams, pollers, sockets, tls
from fastserve._annotations import TYPE_CHECKING, Any, Final, Self
from fastserve._loop import (
    SHUTDOWN_REQUEST,
    STATE,
    Loop,
    State,
    idle_timeout,
    new_event,
    new_loop,
    paused,
    quiet_service_actions,
    retry_paused,
)
from fastserve._stdlib import socketserver

# The modules that socketserver imports are reached through it, so that a name that is replaced there
# (socketserver.threading, say) is replaced here. Its type stub does not list them.
_std: Any = socketserver


class _ShutdownRequest:
    """``_BaseServer__shutdown_request``: kept in the instance's ``__dict__``; setting it true wakes the loop.

    Programs set this private flag from handlers, other threads and signal handlers instead of calling
    ``shutdown()``, and expect the loop to stop. Where a class shadows it, the loop ticks instead.
    """

    def __get__(self, server: Any, owner: type | None = None) -> Any:
        if server is None or SHUTDOWN_REQUEST not in server.__dict__:
            raise AttributeError(f"{owner.__name__ if owner else server!r} has no {SHUTDOWN_REQUEST}")
        return server.__dict__[SHUTDOWN_REQUEST]

    def __set__(self, server: Any, value: Any) -> None:
        server.__dict__[SHUTDOWN_REQUEST] = value
        state = server.__dict__.get(STATE)
        if value and state is not None:
            state.stop_loops()

    def __delete__(self, server: Any) -> None:
        if SHUTDOWN_REQUEST not in server.__dict__:
            raise AttributeError(SHUTDOWN_REQUEST)
        del server.__dict__[SHUTDOWN_REQUEST]


def _flag_wakes(server: object) -> bool:
    """Return whether setting ``_BaseServer__shutdown_request`` on ``server`` wakes its loop."""
    for cls in type(server).__mro__:
        if SHUTDOWN_REQUEST in vars(cls):
            return isinstance(vars(cls)[SHUTDOWN_REQUEST], _ShutdownRequest)
    return False


def _is_closed(server: object) -> bool:
    try:
        pollers.descriptor_of(server)
    except ValueError:
        return True
    return False


def request_timeout(server: Any) -> float | None:
    """Return how many seconds ``handle_request()`` waits: the shorter of the timeouts of listener and server."""
    timeout: float | None = server.socket.gettimeout()
    if timeout is None:
        timeout = server.timeout
    elif server.timeout is not None:
        timeout = min(timeout, server.timeout)
    return timeout


class BaseServer(socketserver.BaseServer):
    """The loop and the hooks of a server, without a listener: see :class:`TCPServer`.

    A program calls :meth:`serve_forever` or :meth:`handle_request`, :meth:`shutdown` and :meth:`server_close`.
    A derived class provides ``fileno()`` and ``get_request()``, and may override every other method.

    The class has the stdlib's name on purpose: ``_BaseServer__shutdown_request`` and
    ``_BaseServer__is_shut_down``, which programs read and set, are mangled from it.

    :cvar timeout: seconds that :meth:`handle_request` waits before it calls :meth:`handle_timeout`; ``None``
        (the default) waits without end. :meth:`serve_forever` does not use it.
    :ivar server_address: the address that the server was given, or is bound to.
    :ivar RequestHandlerClass: what is called with ``(request, client_address, server)`` for each request.
    """

    timeout: float | None = None

    __is_shut_down: Any
    __shutdown_request: Any = _ShutdownRequest()

    def __init__(self, server_address: Any, RequestHandlerClass: Callable[[Any, Any, Self], Any]) -> None:
        """Remember the arguments. May be extended; attributes may be set before it is called.

        :param server_address: the address to serve, in the form that its address family takes.
        :param RequestHandlerClass: any callable that takes ``(request, client_address, server)``.
        """
        self.server_address = server_address
        self.RequestHandlerClass = RequestHandlerClass
        self.__is_shut_down = new_event()
        self.__shutdown_request = False

    def server_activate(self) -> None:
        """Do nothing. The constructor calls it to activate the server; may be overridden."""

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Handle requests, one at a time, until :meth:`shutdown`.

        The calling thread runs the loop and all hooks. It sleeps until something happens: there is no polling
        while :meth:`service_actions` is not overridden. Where ``shutdown()`` came first the call returns at
        once, and so it does on a server that was shut down and closed.

        :param poll_interval: seconds between two calls of an overridden :meth:`service_actions` while idle.
        :raises ValueError: if the server is closed.
        :raises OSError: if there is no descriptor left for the loop.
        """
        state = State.of(self)
        loop = new_loop(self)
        batches = _new_batches(self, loop)
        turns = _backend.turns if batches is None and isinstance(loop, Loop) else None
        self.__is_shut_down.clear()
        # From here on shutdown() waits for this call, even though it may not have begun to wait.
        state.loops.append(loop)
        try:
            if not self.__shutdown_request and not (state.shut_down and _is_closed(self)):
                loop.open()
                loop.ticks = loop.ticks or not _flag_wakes(self)
                if state.opened is not None:
                    state.opened(loop)
                while not (self.__shutdown_request or loop.stopping):
                    if turns is not None and turns.run(self, loop) and (self.__shutdown_request or loop.stopping):
                        break
                    if batches is not None and not loop.held and batches.are_pending():
                        ready = True
                    else:
                        ready = loop.wait(idle_timeout(self, loop, poll_interval))
                    if self.__shutdown_request or loop.stopping:  # bpo-35017: no request is begun after shutdown()
                        break
                    if ready and batches is not None:
                        batches.handle()
                    elif ready:
                        self._handle_request_noblock()
                    self.service_actions()
        finally:
            self.__shutdown_request = False
            try:
                if batches is not None:
                    batches.close()
                loop.close()
            finally:
                self.__is_shut_down.set()
                state.loops.remove(loop)

    def shutdown(self) -> None:
        """Stop :meth:`serve_forever`, and wait until it has ended. Any thread may call it.

        A request that is being handled by the loop's thread is finished first. In the loop's own thread, which
        is that of a handler of a server without a worker mix-in and often that of a signal handler, it asks
        the loop to stop and returns. While nothing is served it makes the next ``serve_forever()`` return at
        once.
        """
        state = State.of(self)
        state.shut_down = True
        self.__shutdown_request = True
        if state.own_loop() is None and getattr(self.__is_shut_down, "must_be_awaited", True):
            self.__is_shut_down.wait()

    def service_actions(self) -> None:
        """Do nothing. The loop calls it after every turn; overridden, also every ``poll_interval`` while idle."""

    def handle_request(self) -> None:
        """Handle one request, waiting for it at most ``timeout`` seconds.

        Where the listener itself has a timeout (``settimeout``), the shorter of the two counts. When it passes,
        :meth:`handle_timeout` is called.

        :raises ValueError: if the server is closed.
        """
        if datagrams.are_kept(self) or pollers.wait_for_request(self, request_timeout(self)):
            self._handle_request_noblock()
        else:
            self.handle_timeout()

    def _handle_request_noblock(self) -> None:
        """Handle the request that has arrived. Programs with a ``select`` loop of their own call it."""
        try:
            request, client_address = self.get_request()
        except OSError as error:
            _accept_failed(self, error)
            return
        try:
            verified = self.verify_request(request, client_address)
        except OSError as error:
            if not tls.is_failed_handshake(error):
                raise
            verified = False
        if verified:
            try:
                self.process_request(request, client_address)
            except Exception:
                self.handle_error(request, client_address)
                self.shutdown_request(request)
            except:
                self.shutdown_request(request)
                raise
        else:
            self.shutdown_request(request)

    def handle_timeout(self) -> None:
        """Do nothing. :meth:`handle_request` calls it when ``timeout`` has passed; may be overridden."""

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Return whether the request is to be handled: ``True`` unless overridden. The loop's thread calls it."""
        return True

    def process_request(self, request: Any, client_address: Any) -> None:
        """Handle the request in the calling thread, the loop's. The worker mix-ins override it.

        What a handler raises comes out of it: the loop gives an ``Exception`` to :meth:`handle_error` and lets
        anything else, such as ``KeyboardInterrupt``, end ``serve_forever``.
        """
        self.finish_request(request, client_address)
        self.shutdown_request(request)

    def server_close(self) -> None:
        """Do nothing. Called to release what the server holds; may be extended."""

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Call ``RequestHandlerClass``, whose constructor handles the request. The worker's thread calls it."""
        self.RequestHandlerClass(request, client_address, self)  # type: ignore[arg-type]

    def shutdown_request(self, request: Any) -> None:
        """End a request: call :meth:`close_request`. The worker's thread calls it."""
        self.close_request(request)

    def close_request(self, request: Any) -> None:
        """Do nothing. Called to release what a request holds; may be overridden."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the current exception, that of a handler, to standard error, and go on. May be overridden.

        It is called while the exception is handled: ``raise`` and ``sys.exc_info()`` work in it.
        """
        import traceback  # a tenth of the import of this package, and mostly never needed

        stderr = _std.sys.stderr
        print("-" * 40, file=stderr)
        print("Exception occurred during processing of request from", client_address, file=stderr)
        traceback.print_exc(file=stderr)
        print("-" * 40, file=stderr)

    def __enter__(self) -> Self:
        return self

    if not TYPE_CHECKING:  # what overrides it has three parameters, those of the stub of socketserver

        def __exit__(self, *args: object) -> None:
            """Close the server: ``with`` calls :meth:`server_close`."""
            self.server_close()


class TCPServer(BaseServer, socketserver.TCPServer):
    """A server that listens for TCP connections and handles one after the other.

    :cvar address_family: the family of the listener, ``socket.AF_INET`` by default.
    :cvar socket_type: the type of the listener, ``socket.SOCK_STREAM``.
    :cvar request_queue_size: connections that the kernel keeps until they are accepted, by default as many as in the
        stdlib: 5, and ``socket.SOMAXCONN`` from Python 3.15 on; listen(2).
    :cvar allow_reuse_address: whether the listener is bound with ``SO_REUSEADDR``, ``False`` by default.
    :cvar allow_reuse_port: whether an IP listener is bound with ``SO_REUSEPORT``, ``False`` by default.
    :cvar dual_stack: whether a listener for IPv6 takes IPv4 too (``IPV6_V6ONLY`` is 0, ipv6(7)), ``False`` by default.
        It is for ``address_family = socket.AF_INET6``. The address of an IPv4 client is ``::ffff:`` and its own.
    :cvar tcp_nodelay: whether connections have ``TCP_NODELAY``, ``False`` by default. On Linux it is set for the
        listener, from which they inherit it, tcp(7); elsewhere for each connection.
    :cvar keepalive: ``True`` or ``False``, whether connections have ``SO_KEEPALIVE``, socket(7); ``(idle, interval,
        count)``, with these times in whole seconds and this many probes; ``None``, the default, leaves it as it is.
        It is inherited likewise.
    :cvar socket_mode: the permissions of the file of a Unix socket, such as ``0o660``; ``None``, the default, leaves
        it to the umask. The socket cannot be connected to while the file has more of them.
    :cvar socket_owner: the owner of that file, a pair ``(user, group)``, each a number, a name, or ``None`` for what it
        is; ``None`` by default.
    :cvar remove_stale_socket: whether a Unix socket that is left over at the address is removed before the listener is
        bound, ``False`` by default. It is left over if it refuses a connection, which is tried. Servers with this
        option that start together are kept apart by a lock on the directory, flock(2).
    :cvar unlink_on_close: whether :meth:`server_close` removes the file of a Unix socket, ``False`` by default; only
        the one that this server has made, and in the process that has made it.
    :ivar socket: the listener. It may be replaced, also by an object that is not a ``socket.socket``.
    """

    address_family: int = socket.AF_INET

    socket_type: int = socket.SOCK_STREAM

    request_queue_size = socketserver.TCPServer.request_queue_size

    allow_reuse_address = False

    allow_reuse_port = False

    dual_stack = False

    tcp_nodelay = False

    keepalive: bool | tuple[int, int, int] | None = None

    socket_mode: int | None = None

    socket_owner: tuple[int | str | None, int | str | None] | None = None

    remove_stale_socket = False

    unlink_on_close = False

    def __init__(
        self,
        server_address: Any,
        RequestHandlerClass: Callable[[Any, Any, Self], Any],
        bind_and_activate: bool = True,
    ) -> None:
        """Make the listener, and bind and activate it. May be extended.

        :param server_address: ``(host, port)`` for TCP and UDP over IPv4; port 0 lets the kernel choose.
        :param RequestHandlerClass: any callable that takes ``(request, client_address, server)``.
        :param bind_and_activate: whether to call :meth:`server_bind` and :meth:`server_activate`.
        :raises OSError: if the address cannot be had. The listener is closed then.
        :raises ValueError: if an option of the listener has a value that does not fit. Likewise.
        """
        BaseServer.__init__(self, server_address, RequestHandlerClass)
        self.socket = _std.socket.socket(self.address_family, self.socket_type)
        if bind_and_activate:
            try:
                sockets.prepare(self)
                self.server_bind()
                self.server_activate()
            except:
                self.server_close()
                raise

    @classmethod
    def from_socket(
        cls, sock: socket.socket | int, RequestHandlerClass: Callable[[Any, Any, Self], Any], **options: Any
    ) -> Self:
        """Return a server on a listener that is there already: see :func:`fastserve.from_socket`."""
        return sockets.from_socket(cls, sock, RequestHandlerClass, **options)

    def server_bind(self) -> None:
        """Bind the listener, and set ``server_address`` to the address that it got. May be overridden."""
        names = _std.socket
        if self.allow_reuse_address and hasattr(names, "SO_REUSEADDR"):
            self.socket.setsockopt(names.SOL_SOCKET, names.SO_REUSEADDR, 1)
        # Since Linux 6.12.9 other families than IP refuse SO_REUSEPORT (CPython gh-128916).
        if (
            self.allow_reuse_port
            and hasattr(names, "SO_REUSEPORT")
            and self.address_family in (names.AF_INET, names.AF_INET6)
        ):
            self.socket.setsockopt(names.SOL_SOCKET, names.SO_REUSEPORT, 1)
        sockets.bind(self)
        self.server_address = self.socket.getsockname()

    def server_activate(self) -> None:
        """Listen, with a backlog of ``request_queue_size``. May be overridden."""
        self.socket.listen(self.request_queue_size)

    def server_close(self) -> None:
        """Close the listener. May be extended."""
        try:
            sockets.unlink(self)
        finally:
            self.socket.close()
            datagrams.drop(self)

    def fileno(self) -> int:
        """Return the descriptor of the listener, for ``select`` and the like; -1 once it is closed."""
        return self.socket.fileno()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; return ``(request, client_address)``, the first a ``socket.socket``.

        It is a :class:`fastserve.streams.Connection` if the listener is a plain ``socket.socket``; any other listener
        makes what its own ``accept()`` makes.

        The loop's thread calls it when the listener is readable; called at another time it waits. It may be
        overridden; the loop drops an ``OSError`` that it raises.
        """
        listener = self.socket
        if type(listener) is not socket.socket and tls.is_listener(listener):
            return tls.accept(self, False)
        return _backend.core.accept(listener, _backend.streams.accepted)

    def shutdown_request(self, request: Any) -> None:
        """Shut down the sending side of a connection, so that the client sees its end, and close it."""
        try:
            # close() alone would only drop this reference to the descriptor.
            request.shutdown(_std.socket.SHUT_WR)
        except OSError:
            pass  # the client is gone already: ENOTCONN
        self.close_request(request)

    def close_request(self, request: Any) -> None:
        """Close a connection."""
        request.close()
        if paused:
            retry_paused()


class UDPServer(TCPServer, socketserver.UDPServer):
    """A server that receives datagrams and handles one after the other.

    A request is the pair ``(data, socket)``: the bytes of the datagram and the listener, to answer with.

    ``serve_forever()`` takes datagrams off the socket in batches, and handles them one by one. Those that it has
    taken when it ends are kept, and served by the next ``serve_forever()`` or ``handle_request()``.

    :cvar max_packet_size: bytes that are taken of a datagram, 8192 by default; the kernel drops the rest.
    :cvar max_batch: datagrams that are taken at a time, 64 by default. It is 1 where other processes receive from
        the same socket: with ``ForkingMixIn``, and in a forked child that did not make the server itself.
    :cvar gather_replies: whether the replies to one batch are sent together, ``False`` by default. It costs less,
        but a reply waits for the handlers of the batch, and what fails goes to ``handle_error()``, with the
        reply in the place of the request, instead of being raised by ``sendto``.
    :ivar truncated_datagrams: how many datagrams were longer than ``max_packet_size``. The first is reported
        on standard error.
    :ivar dropped_datagrams: how many datagrams ``server_close()`` found that were taken and not handled.
    """

    allow_reuse_address = False

    allow_reuse_port = False

    socket_type: int = socket.SOCK_DGRAM

    max_packet_size = 8192

    max_batch = datagrams.MAX_BATCH

    gather_replies = False

    truncated_datagrams = 0

    dropped_datagrams = 0

    def get_request(self) -> tuple[tuple[bytes, socket.socket], Any]:  # type: ignore[override]
        """Return a datagram, ``((data, socket), client_address)``: one that was kept, or the next to be received.

        Called when nothing has arrived it waits. It may be overridden; there are no batches then.
        """
        return datagrams.get_request(self)

    def server_activate(self) -> None:
        """Do nothing: a datagram socket does not listen."""

    def shutdown_request(self, request: Any) -> None:
        """Call :meth:`close_request`: a datagram has no connection to shut down."""
        self.close_request(request)

    def close_request(self, request: Any) -> None:
        """Do nothing: a datagram holds nothing to release."""


# They call the accept() of the listener, and nothing else.
ACCEPTING_GET_REQUESTS: Final = (TCPServer.get_request, socketserver.TCPServer.get_request)

# What a failed get_request is known to mean: that accept(2) has failed.
own_get_requests: Final[set[Any]] = {TCPServer.get_request, UDPServer.get_request}

# Those of mix-ins that call the next one wherever its errors are those of accept(2).
passing_get_requests: Final[set[Callable[..., Any]]] = set()

# What a loop need not call for each datagram, as long as it is not overridden: it knows what they do.
_OWN_OF_DATAGRAMS: Final = {
    name: getattr(UDPServer, name)
    for name in (
        "_handle_request_noblock",
        "get_request",
        "verify_request",
        "process_request",
        "finish_request",
        "shutdown_request",
        "close_request",
        "service_actions",
    )
}


def _new_batches(server: Any, loop: Any) -> datagrams.Batches | None:
    """Return the batches of one ``serve_forever`` of a datagram server, ``None`` for another server."""
    if not isinstance(server, socketserver.UDPServer):
        return None
    return datagrams.Batches(server, loop, vars(BaseServer)[SHUTDOWN_REQUEST], _OWN_OF_DATAGRAMS)


def _accept_failed(server: Any, error: OSError) -> None:
    """Tell the loop of the calling thread, if it runs one, what ``get_request`` of ``server`` has raised."""
    loop = State.of(server).own_loop()
    if loop is not None:
        loop.accept_failed(error, _get_request_of(server) in own_get_requests)


def _get_request_of(server: Any) -> Any:
    """Return the function that accepts the connections of ``server``, past those that only call the next one."""
    function = getattr(server.get_request, "__func__", None)
    if function in passing_get_requests:
        found = (vars(cls).get("get_request") for cls in type(server).__mro__)
        return next((method for method in found if method is not None and method not in passing_get_requests), None)
    return function


# What a loop need not call for each connection, as long as it is not overridden.
_OWN_OF_CONNECTIONS: Final = {name: getattr(TCPServer, name) for name in _OWN_OF_DATAGRAMS}

if _backend.turns is not None:
    _backend.turns.know(_OWN_OF_CONNECTIONS)
    _backend.turns.prepare(vars(BaseServer)[SHUTDOWN_REQUEST], _accept_failed, paused, retry_paused)

quiet_service_actions[BaseServer.service_actions] = None

if hasattr(socket, "AF_UNIX"):

    class UnixStreamServer(TCPServer, socketserver.UnixStreamServer):
        """A :class:`TCPServer` on a Unix domain socket; ``server_address`` is its path (unix(7))."""

        address_family: int = socket.AF_UNIX

    class UnixDatagramServer(UDPServer, socketserver.UnixDatagramServer):
        """A :class:`UDPServer` on a Unix domain socket; ``server_address`` is its path (unix(7))."""

        address_family: int = socket.AF_UNIX
