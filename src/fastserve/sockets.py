"""Listeners: those that come from outside, and what a server class may say about those that it makes.

A server makes its listener in its constructor. :func:`from_socket` gives it one that is there already. The options of a
listener are attributes of :class:`fastserve.TCPServer`, off by default; they are read when the listener is bound, and
of classes derived from that class alone: a program that runs under ``patch()`` has never heard of them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import sys
import time
import weakref
from collections.abc import Callable, Iterator

from fastserve._annotations import TYPE_CHECKING, Any, Final
from fastserve._loop import STATE, State
from fastserve._stdlib import socketserver

# The class of the sockets that a server makes, if no library has replaced it before this module is imported.
_PLAIN: Final = socket.socket
_AF_UNIX: Final[int] = getattr(socket, "AF_UNIX", -1)
_IP: Final = (socket.AF_INET, socket.AF_INET6)

# Linux gives a connection the options of its listener, tcp(7): one call for the listener, none for a connection. What
# other systems pass on differs, so that each connection is told there.
INHERITED: Final = sys.platform == "linux"
# Linux gives the file of a Unix socket the permissions that fchmod(2) has given the socket, less the umask.
_FCHMOD_COUNTS: Final = sys.platform == "linux"

LOCK_SECONDS: Final = 10.0  # for which the lock of a directory is waited for
_LOCK_TICK: Final = 0.01  # seconds


def host_and_port(address: tuple[Any, ...]) -> str:
    """Return an address of IP as it is written, ``host:port``, or ``[host]:port`` for IPv6 (RFC 3986, 3.2.2)."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


if TYPE_CHECKING:
    from typing import TypeVar

    from fastserve.server import TCPServer

    _Server = TypeVar("_Server", bound=socketserver.TCPServer)
else:
    _Server = socketserver.TCPServer


class Options:
    """The options of a listener, by their names in :class:`fastserve.TCPServer`."""

    dual_stack: bool = False
    socket_mode: int | None = None
    socket_owner: tuple[int | str | None, int | str | None] | None = None
    remove_stale_socket: bool = False
    unlink_on_close: bool = False
    tcp_nodelay: bool = False
    keepalive: bool | tuple[int, int, int] | None = None

    def __init__(self, server: TCPServer) -> None:
        for name in OFF:
            setattr(self, name, getattr(server, name))


OFF: Final = {name: value for name, value in vars(Options).items() if not name.startswith("_")}


def options_of(server: Any) -> Options | None:
    """Return the options of the listener of ``server``; ``None`` if all are off, or the class is not one of ours.

    :raises ValueError: if one has a value that it cannot have.
    """
    from fastserve.server import TCPServer  # which imports this module

    if not isinstance(server, TCPServer):
        return None
    options = Options(server)
    if vars(options) == OFF:
        return None
    for name in ("dual_stack", "remove_stale_socket", "unlink_on_close", "tcp_nodelay"):
        if not isinstance(getattr(options, name), int):  # 1 is as good as True, and allow_reuse_address often is 1
            raise ValueError(f"{name} is True or False, not {getattr(options, name)!r}")
    mode, owner, keepalive = options.socket_mode, options.socket_owner, options.keepalive
    if mode is not None and not (isinstance(mode, int) and 0 <= mode <= 0o777):
        raise ValueError(f"socket_mode is a number from 0 to 0o777, not {mode!r}")
    if owner is not None and not (isinstance(owner, tuple) and len(owner) == 2):
        raise ValueError(f"socket_owner is a pair (user, group), not {owner!r}")
    if not (keepalive is None or isinstance(keepalive, bool) or _is_timing(keepalive)):
        raise ValueError(
            f"keepalive is True, False, None or (idle, interval, count), positive whole numbers, not {keepalive!r}"
        )
    return options


def _is_timing(keepalive: object) -> bool:
    return (
        isinstance(keepalive, tuple)
        and len(keepalive) == 3
        and all(type(number) is int and 0 < number < 2**31 for number in keepalive)
    )


# Listeners from outside


class _Inherited(socket.socket):
    """A socket from outside while the constructor of its server runs: what it has behind it is not done again.

    It has the descriptor of another object, to which it gives way, and leaves it open.
    """

    def __init__(self, listener: socket.socket, server: Any) -> None:
        blocks = os.get_blocking(listener.fileno())
        super().__init__(listener.family, listener.type, listener.proto, fileno=listener.fileno())
        self.settimeout(listener.gettimeout())
        os.set_blocking(listener.fileno(), blocks)  # a descriptor may have O_NONBLOCK and its object no timeout
        self._server = server
        self._listens = _listens(listener)
        self._is_lent = True
        self.poses_as_ip = self.family == _AF_UNIX and _is_http(type(server))

    def bind(self, address: Any, /) -> None:
        """Do nothing but what may be done after bind(2)."""
        options = options_of(self._server)
        if options is not None:
            _set_tcp_options(self, options)

    def listen(self, backlog: int = socket.SOMAXCONN, /) -> None:
        if not self._listens:
            super().listen(backlog)

    def setsockopt(self, *arguments: Any) -> None:
        """Set an option, unless it is one that says how to bind."""
        if arguments[:2] not in _BEFORE_BIND:
            super().setsockopt(*arguments)

    def getsockname(self) -> Any:
        # HTTPServer.server_bind() takes a host and a port out of it.
        return ("localhost", 0) if self.poses_as_ip else super().getsockname()

    def close(self) -> None:
        if self._is_lent:
            self.detach()
        else:
            super().close()

    def keep(self) -> None:
        """Own the descriptor from now on."""
        self._is_lent = False
        self.poses_as_ip = False


_BEFORE_BIND: Final = frozenset(
    (getattr(socket, level), getattr(socket, option))
    for level, option in (
        ("SOL_SOCKET", "SO_REUSEADDR"),
        ("SOL_SOCKET", "SO_REUSEPORT"),
        ("IPPROTO_IPV6", "IPV6_V6ONLY"),
    )
    if hasattr(socket, option)
)


def from_socket(
    server_class: type[_Server], sock: socket.socket | int, RequestHandlerClass: Callable[..., Any], **options: Any
) -> _Server:
    """Return a server on a listener that is there already: bound by whoever started the program, say.

    The class may be any that is derived from :class:`socketserver.TCPServer`, such as ``http.server.HTTPServer``.
    Its constructor runs, and its ``server_bind()`` and ``server_activate()``, on an object whose ``bind()`` does
    nothing, nor ``listen()`` if the socket listens already; so ``server_name`` and ``server_port`` of an ``HTTPServer``
    are set (``"localhost"`` and 0 for a Unix socket). ``address_family`` and ``server_address`` are those of the
    socket.

    The socket is the server's then, whose ``server_close()`` closes it; a descriptor must not be used elsewhere. If
    this function raises, it is left open and as it was. ``O_NONBLOCK``, which belongs to everybody who has the socket,
    is left as it is on Linux: a connection that another process has taken is no error. A datagram server on such a
    socket has ``BlockingIOError`` raised by a ``sendto`` for which there is no room.

    :param server_class: a class of stream or of datagram servers, as ``sock`` is.
    :param sock: a ``socket.socket``, or the number of a descriptor.
    :param RequestHandlerClass: as for the constructor; it is its second argument.
    :param options: further arguments of the constructor, by name.
    :raises TypeError: if the class is no class of such servers.
    :raises ValueError: if the socket is closed or not bound, is a connection, or is not of the type of the class.
    """
    if not (isinstance(server_class, type) and issubclass(server_class, socketserver.TCPServer)):
        raise TypeError(f"{server_class!r} is not derived from socketserver.TCPServer")
    listener = _opened(sock)
    try:
        address = _bound_address(listener, server_class)
        server = server_class.__new__(server_class)
        inherited = _Inherited(listener, server)
        try:
            _construct(server, inherited, address, RequestHandlerClass, options)
        except BaseException:
            inherited.detach()
            raise
    except BaseException:
        if listener is not sock:
            listener.detach()
        raise
    if server.socket is inherited:
        server.socket = listener
        if inherited.gettimeout() != listener.gettimeout():
            listener.settimeout(inherited.gettimeout())
        inherited.detach()
    else:  # the constructor has wrapped it, or handed it on
        inherited.keep()
        listener.detach()
    if not INHERITED and listener.fileno() >= 0:
        # There a connection has the O_NONBLOCK of its listener, which the objects of Python would not know of.
        if listener.gettimeout() is None:
            os.set_blocking(listener.fileno(), True)
        tell_connections(server)
    return server


def _opened(sock: socket.socket | int) -> socket.socket:
    """Return ``sock``, or a new object for a descriptor. Raises ``ValueError`` if there is no such socket."""
    if isinstance(sock, int):
        try:
            return socket.socket(fileno=sock)
        except (OSError, OverflowError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"descriptor {sock} is not an open socket: {reason}") from None
    if not isinstance(sock, (_PLAIN, socket.socket)):
        raise TypeError(f"{sock!r} is neither a socket nor a descriptor")
    if sock.fileno() < 0:
        raise ValueError("the socket is closed")
    return sock


def _bound_address(listener: socket.socket, server_class: type[socketserver.TCPServer]) -> Any:
    """Return the address of a socket that a server of the class can serve. Raises ``ValueError`` if it cannot."""
    if listener.type != server_class.socket_type:
        wanted = getattr(server_class.socket_type, "name", server_class.socket_type)
        found = getattr(listener.type, "name", listener.type)
        raise ValueError(f"{server_class.__name__} serves sockets of the type {wanted}, not {found}")
    try:
        address = listener.getsockname()
    except OSError as error:
        raise ValueError(f"the socket cannot be served: {error.strerror}") from None
    if not address or (listener.family in _IP and address[1] == 0):
        raise ValueError("the socket is not bound")
    if listener.type != socket.SOCK_DGRAM and _is_connected(listener):
        raise ValueError("the socket is a connection, and no listener")
    return address


def _is_connected(listener: socket.socket) -> bool:
    try:
        listener.getpeername()
    except OSError:
        return False
    return True


def _listens(listener: socket.socket) -> bool:
    """Return whether a socket listens. Where the system does not tell it does not: to listen again is no harm there."""
    try:
        return bool(listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except (AttributeError, OSError):
        return False


def _is_http(server_class: type) -> bool:
    module = sys.modules.get("http.server")
    return module is not None and issubclass(server_class, module.HTTPServer)


def _construct(server: Any, inherited: _Inherited, address: Any, handler: Any, options: dict[str, Any]) -> None:
    """Call the constructor of a server, with another socket in the place of the one that it makes."""

    def server_bind() -> None:
        del server.server_bind
        server.socket.close()
        server.socket = inherited
        server.server_bind()

    server.address_family = inherited.family
    server.server_bind = server_bind  # on the instance: it is called in the place of the method of the class
    server.__init__(address, handler, **options)
    if "server_bind" in vars(server):  # it was told not to bind
        server.server_bind()
        server.server_activate()
    server.address_family = inherited.family
    if inherited.poses_as_ip:
        server.server_address = address


# Listeners that a server makes


class _Listener(socket.socket):
    """The listener of a server with options, until it is bound; then it is a plain socket.

    It is there for overrides of ``server_bind`` that pass over ours, as that of ``http.server.HTTPServer`` does.
    """

    __slots__ = ()

    def bind(self, address: Any, /) -> None:
        server = _servers.pop(self)()
        self.__class__ = _PLAIN  # type: ignore[assignment]
        options = None if server is None else options_of(server)
        if options is None:
            self.bind(address)
        else:
            _bind(server, self, address, options)


_servers: Final[weakref.WeakKeyDictionary[socket.socket, weakref.ref[Any]]] = weakref.WeakKeyDictionary()


def prepare(server: Any) -> None:
    """See to it that the new listener of ``server`` is bound with its options, whoever binds it."""
    listener = server.socket
    if type(listener) is _PLAIN and options_of(server) is not None:
        _servers[listener] = weakref.ref(server)
        listener.__class__ = _Listener


def bind(server: Any) -> None:
    """Bind the listener of ``server`` to its address, with its options.

    :raises ValueError: if an option does not fit the kind of the listener, or a user or group is not known.
    :raises TimeoutError: if somebody holds the lock of the directory of a Unix socket.
    :raises OSError: if the address cannot be had, or a file not be given away.
    """
    listener, address = server.socket, server.server_address
    options = None if isinstance(listener, _Listener | _Inherited) else options_of(server)
    if options is None:
        listener.bind(address)
    else:
        _bind(server, listener, address, options)


def _bind(server: Any, listener: Any, address: Any, options: Options) -> None:
    if options.dual_stack:
        if listener.family != socket.AF_INET6:
            raise ValueError("dual_stack is for IPv6: set address_family = socket.AF_INET6")
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    _set_tcp_options(listener, options)
    path = _path(listener, address)
    if path is not None:
        _bind_to_file(server, listener, path, options)
    elif options.socket_mode is not None or options.socket_owner is not None:
        raise ValueError("socket_mode and socket_owner are for Unix sockets that have a file")
    else:
        listener.bind(address)
    if not INHERITED:
        tell_connections(server)


def _path(listener: Any, address: Any) -> bytes | None:
    """Return the file of a Unix socket that is to be bound, ``None`` for an abstract address and other families."""
    if listener.family != _AF_UNIX:
        return None
    path = os.fsencode(address) if isinstance(address, str) else address
    if not isinstance(path, bytes | bytearray) or path[:1] in (b"", b"\0"):
        return None  # abstract; or none at all, which bind() will tell
    return bytes(path)


def _set_tcp_options(listener: Any, options: Options) -> None:
    """Set what connections are to inherit from their listener."""
    if options.keepalive is None and not options.tcp_nodelay:
        return
    if listener.family not in _IP or listener.type != socket.SOCK_STREAM:
        name = "keepalive" if options.keepalive is not None else "tcp_nodelay"
        raise ValueError(f"{name} is for TCP connections")
    if options.tcp_nodelay:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if options.keepalive is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, int(bool(options.keepalive)))
    if isinstance(options.keepalive, tuple):
        for option, number in zip(_KEEPALIVE, options.keepalive, strict=True):
            listener.setsockopt(socket.IPPROTO_TCP, option, number)


# Idle time, interval, count; macOS has another name for the first.
_KEEPALIVE: Final[tuple[int, ...]] = tuple(
    next(getattr(socket, name) for name in names if hasattr(socket, name))
    for names in (("TCP_KEEPIDLE", "TCP_KEEPALIVE"), ("TCP_KEEPINTVL",), ("TCP_KEEPCNT",))
    if any(hasattr(socket, name) for name in names)
)


class _Telling(socket.socket):
    """A listener that gives its connections its options, where the system does not."""

    __slots__ = ()

    def accept(self) -> tuple[socket.socket, Any]:
        connection, address = super().accept()
        try:
            for level, option in _OF_CONNECTIONS:
                connection.setsockopt(level, option, self.getsockopt(level, option))
        except OSError as error:
            connection.close()
            # It is this connection that has failed, perhaps because its client has gone, and not the listener.
            raise ConnectionAbortedError(errno.ECONNABORTED, os.strerror(errno.ECONNABORTED)) from error
        return connection, address


_OF_CONNECTIONS: Final = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    *((socket.IPPROTO_TCP, option) for option in _KEEPALIVE),
)


def tell_connections(server: Any) -> None:
    """Have each connection be given the options for TCP that the listener of ``server`` has, if it has any."""
    options = options_of(server)
    if options is not None and (options.keepalive is not None or options.tcp_nodelay) and type(server.socket) is _PLAIN:
        server.socket.__class__ = _Telling


# Files of Unix sockets


class SocketFile:
    """A file that a server has made."""

    def __init__(self, path: bytes) -> None:
        made = os.lstat(path)
        self.path = os.path.abspath(path)
        self.device = made.st_dev
        self.inode = made.st_ino
        self.process = os.getpid()  # that made it


def _bind_to_file(server: Any, listener: Any, path: bytes, options: Options) -> None:
    user, group = _ids(options.socket_owner)
    mode = options.socket_mode
    with contextlib.ExitStack() as stack:
        if options.remove_stale_socket:
            stack.enter_context(_locked(os.path.dirname(path) or b"."))
            _remove_if_stale(path, listener.type)
        with _created_with(listener, mode):
            listener.bind(path)
        try:
            if user != -1 or group != -1:
                os.chown(path, user, group, follow_symlinks=False)
            if mode is not None:
                os.chmod(path, mode)
            if options.unlink_on_close:
                State.of(server).socket_file = SocketFile(path)
            if options.remove_stale_socket and listener.type != socket.SOCK_DGRAM:
                # Until it listens it looks like one that is left over. server_activate() may listen again.
                listener.listen(server.request_queue_size)
        except BaseException:
            State.of(server).socket_file = None
            os.unlink(path)
            raise


@contextlib.contextmanager
def _created_with(listener: Any, mode: int | None) -> Iterator[None]:
    """Have the file that is made in the block be no more accessible than it is to be in the end.

    Group and others get their permissions when it has its owner. To a stream socket nobody can connect before it
    listens anyway. For one of datagrams, where the permissions of the socket do not count, it takes the umask, which is
    that of the whole process: files that other threads make meanwhile have fewer permissions, never more.
    """
    if mode is None:
        yield
    elif _FCHMOD_COUNTS:
        os.fchmod(listener.fileno(), mode & 0o700)
        yield
    elif listener.type != socket.SOCK_DGRAM:
        yield
    else:
        before = os.umask(0o777 & ~(mode & 0o700))
        try:
            yield
        finally:
            os.umask(before)


def _ids(owner: tuple[int | str | None, int | str | None] | None) -> tuple[int, int]:
    """Return the numbers of a user and a group, -1 for what is to stay. Raises ``ValueError`` for unknown names."""
    if owner is None:
        return -1, -1
    import grp  # not there where there are no Unix sockets
    import pwd

    user, group = owner
    try:
        return (
            pwd.getpwnam(user).pw_uid if isinstance(user, str) else -1 if user is None else user,
            grp.getgrnam(group).gr_gid if isinstance(group, str) else -1 if group is None else group,
        )
    except KeyError as error:
        raise ValueError(f"socket_owner: {error.args[0]}") from None


@contextlib.contextmanager
def _locked(directory: bytes) -> Iterator[None]:
    """Keep other servers that look for left-over sockets in a directory from doing so meanwhile.

    The directory itself is locked, flock(2): nothing is left behind, and a process that ends gives it up.
    """
    import fcntl  # not there where there are no Unix sockets

    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    message = f"somebody else has locked it for {LOCK_SECONDS:g} seconds"
                    raise TimeoutError(errno.ETIMEDOUT, message, os.fsdecode(directory)) from None
            time.sleep(_LOCK_TICK)
        try:
            yield
        finally:
            # Closing it would not do if another thread has forked meanwhile.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _remove_if_stale(path: bytes, kind: int) -> None:
    """Remove the file of a socket that nobody has bound, or nobody listens on. Whatever else is there is left alone."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with _PLAIN(_AF_UNIX, kind) as probe:
        probe.setblocking(False)  # the backlog of one that is alive may be full
        if probe.connect_ex(path) == errno.ECONNREFUSED:
            os.unlink(path)


def unlink(server: Any) -> None:
    """Remove the file that the listener of ``server`` has made, if it still is that, and not in a forked child.

    It is called while the listener is open: no other file can have got the inode.
    """
    state: State | None = getattr(server, "__dict__", {}).get(STATE)
    if state is None or state.socket_file is None or state.socket_file.process != os.getpid():
        return
    made = state.socket_file
    state.socket_file = None
    with contextlib.suppress(FileNotFoundError):  # somebody else has removed it
        found = os.lstat(made.path)
        if (found.st_dev, found.st_ino) == (made.device, made.inode):
            os.unlink(made.path)
