"""Servers for tests: they serve in the background for the time of a block, and end with it at once.

``with fastserve.testing.serve(Handler) as served:`` is all that a test of :mod:`unittest` needs; for pytest
there is the fixture ``fastserve_server``. The page "Testing" of the documentation shows both.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any, Final, TypeAlias

import fastserve
from fastserve._stdlib import socketserver
from fastserve.logs import is_to_blame
from fastserve.workers._names import WORKERS, predefined
from fastserve.workers.threadpool import end_pool

ServerFactory: TypeAlias = "Callable[..., Served]"  # the type of the fixture fastserve_server

_POLL_INTERVAL: Final = 0.01  # seconds in which a loop that shutdown() does not wake notices it
# Seconds after which a handler is assumed to wait for a client that does not read, or one of another process for a
# client that has not gone: its connection, or its process, is ended.
_PATIENCE: Final = 0.5
_LONGEST_STEP: Final = 0.05  # seconds between two looks at what still runs
_AF_UNIX: Final[int] = getattr(socket, "AF_UNIX", -1)
_ANY_ADDRESS: Final = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


@contextlib.contextmanager
def serve(
    handler: Callable[[Any, Any, Any], Any] | None = None,
    *,
    worker: str | None = None,
    server_class: Callable[..., Any] | None = None,
    server: Any = None,
    address: Any = None,
    unix: bool | str | os.PathLike[str] = False,
    udp: bool = False,
    check_errors: bool = True,
    stop_timeout: float = 10.0,
    **attributes: Any,
) -> Iterator[Served]:
    """Serve in a thread for the time of the block: ``with serve(Handler) as served: ...``.

    Clients may connect as soon as the block begins. At its end, however it ends, the loop is stopped, connections that
    are still open are ended, and handlers, threads and child processes are waited for. A handler whose client is
    still there reads the end of the stream.

    :param handler: what the server calls for each request. It is left out with ``server`` alone.
    :param worker: as ``fastserve serve --worker``: ``"sync"``, ``"threads"``, ``"threadpool"``, ``"fork"`` or
        ``"greenlet"``. ``"threads"`` by default; with ``server_class`` none, and given, its mix-in comes first.
    :param server_class: any server class of ``socketserver``'s kind, of the stdlib, of fastserve, or of one's own,
        called with the address and the handler.
    :param server: a server that is there already, in the place of all that says how to make one.
    :param address: where to listen; ``("127.0.0.1", 0)`` by default, where the kernel chooses the port.
    :param unix: ``True`` for a Unix socket in a directory that is removed at the end, or the path of one.
    :param udp: whether to serve datagrams.
    :param check_errors: whether what is left in ``served.errors`` is raised at the end; ``True`` by default.
    :param stop_timeout: seconds that everything has to end, 10 by default.
    :param attributes: of the server class, such as ``request_queue_size=128``.
    :raises ExceptionGroup: of what handlers have raised and nobody has taken, if the block raised nothing. If it did,
        a note on that exception tells it.
    :raises RuntimeError: if handlers still run after ``stop_timeout``; with their stacks.
    :raises OSError: if the address cannot be had.
    :raises ValueError: for arguments that do not go together. What ``serve_forever()`` raises comes out too.
    """
    with contextlib.ExitStack() as stack:
        if server is None:
            directory = stack.enter_context(_directory()) if unix is True else None
            server = _new_server(handler, worker, server_class, address, unix, udp, directory, attributes)
            if unix and unix is not True:
                stack.callback(_remove_file, os.fspath(unix))
        elif attributes or unix or udp or any(value is not None for value in (handler, worker, server_class, address)):
            raise ValueError("server is there already: nothing else can be said about it")
        if _forks(server):
            # Of a fork beside the thread of the test, which is what this is about.
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings(
                "ignore", r"This process \(pid=\d+\) is multi-threaded, use of fork", DeprecationWarning
            )
        served = Served(server, stack)
        served._start()
        failure: BaseException | None = None
        try:
            yield served
        except BaseException as error:
            failure = error
            raise
        finally:
            served._stop(stop_timeout, failure)
        if check_errors and served.errors:
            raise ExceptionGroup("handlers have raised", [*served.errors])


class Served:
    """A server that serves, and its clients. Any thread may use it.

    :ivar server: the server.
    :ivar address: where it listens: ``(host, port)``, or the path of a Unix socket.
    """

    def __init__(self, server: Any, stack: contextlib.ExitStack) -> None:
        self.server = server
        self.address: Any = server.server_address
        self._stack = stack  # closed at the end of the block
        self._clients: list[socket.socket] = []
        self._forks = _forks(server)
        self._errors = _Errors(stack, self._forks)
        self._requests: weakref.WeakSet[Any] = weakref.WeakSet()  # connections; those that are open are to be ended
        self._failure: BaseException | None = None  # what serve_forever() has raised
        self._thread = threading.Thread(target=self._run, name="fastserve.testing", daemon=True)
        self._threads: list[threading.Thread] = []  # of a pool
        self._is_closed = False
        self._names = itertools.count()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {type(self.server).__name__} on {self.address!r}>"

    @property
    def errors(self) -> list[Exception]:
        """What handlers have raised, in this order; what a test expects it takes out: :meth:`take_error`.

        It is reported as the server does it too, mostly on standard error. That a client has gone, which breaks its
        connection, is reported only, and so is what comes of the end of the block. From another process an exception
        comes as a copy, with a note of its traceback.
        """
        return self._errors.all()

    def take_error(self, timeout: float = 5.0) -> Exception:
        """Remove the first of ``errors``, and return it. It is waited for.

        :param timeout: seconds to wait, 5 by default.
        :raises AssertionError: if no handler raises in this time.
        """
        error = self._errors.take(timeout)
        if error is None:
            raise AssertionError(f"no handler has raised anything within {timeout:g} s")
        return error

    @property
    def url(self) -> str:
        """The beginning of the URLs of a server of HTTP: ``http://127.0.0.1:40123``, or ``https://`` with TLS.

        :raises AttributeError: if it listens to no TCP port.
        """
        if not isinstance(self.address, tuple) or self._is_datagram():
            raise AttributeError(f"a server on {self.address!r} has no URL")
        listener = self.server.socket
        secure = isinstance(self.server, fastserve.TLSMixIn) or type(listener).__module__ == "ssl"
        host, port = _reachable(self.address)[:2]
        return f"http{'s' if secure else ''}://{f'[{host}]' if ':' in host else host}:{port}"

    def connect(self, timeout: float | None = 5.0) -> socket.socket:
        """Return a socket that is connected to the server. The end of the block closes it.

        A client of datagrams has an address of its own, to be answered.

        :param timeout: of connecting, and of the socket: seconds, 5 by default; ``None`` is endless.
        """
        kind = socket.SOCK_DGRAM if self._is_datagram() else socket.SOCK_STREAM
        client = socket.socket(self.server.socket.family, kind)
        self._clients.append(client)  # before it is connected: what is forked for it has to close its copy
        try:
            client.settimeout(timeout)
            if client.family == _AF_UNIX and kind == socket.SOCK_DGRAM:
                directory = self._stack.enter_context(_directory())
                client.bind(os.path.join(directory, f"client-{next(self._names)}"))
            client.connect(_reachable(self.address))
        except BaseException:
            client.close()
            raise
        return client

    def _is_datagram(self) -> bool:
        return bool(self.server.socket_type == socket.SOCK_DGRAM)

    # Serving. Everything is put on the instance, so that the class of the server is what its author has made it.

    def _start(self) -> None:
        server = self.server
        usual = server.handle_error

        def handle_error(request: Any, client_address: Any) -> None:
            error = sys.exc_info()[1]
            if isinstance(error, Exception) and not _has_gone(request, client_address, error):
                self._errors.add(error, request)
            usual(request, client_address)

        server.handle_error = handle_error
        if not self._is_datagram():
            process_request = server.process_request

            def note_and_process_request(request: Any, client_address: Any) -> None:
                with contextlib.suppress(TypeError):  # one that cannot be referred to weakly, of a server's own making
                    self._requests.add(request)
                process_request(request, client_address)

            server.process_request = note_and_process_request
        if isinstance(server, fastserve.GreenletMixIn):
            server.daemon_threads, server.block_on_close = False, True  # the loop waits for its handlers
        elif isinstance(server, socketserver.ThreadingMixIn):
            # This waits for them, and not for ever: a thread that hangs must not keep the interpreter from ending.
            server.daemon_threads, server.block_on_close = True, False
            vars(server)["_threads"] = _Threads()
        elif self._forks:
            server.block_on_close = False
            server.finish_request = self._in_child(server.finish_request)
        if hasattr(server, "graceful_timeout"):
            server.graceful_timeout = min(server.graceful_timeout, _PATIENCE)
        try:
            self._thread.start()
        except RuntimeError:  # there are too many
            server.server_close()
            raise

    def _in_child(self, finish_request: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def close_copies_and_finish_request(request: Any, client_address: Any) -> None:
            for client in self._clients:
                if client.fileno() >= 0:
                    # Or a client that closes its end would leave the connection open here. close() would, too, if the
                    # test has made a file of it.
                    os.close(client.detach())
            finish_request(request, client_address)

        return close_copies_and_finish_request

    def _run(self) -> None:
        serve_forever = self.server.serve_forever
        options: dict[str, float] = {}
        if not isinstance(self.server, fastserve.BaseServer) and "poll_interval" in signature(serve_forever).parameters:
            options["poll_interval"] = _POLL_INTERVAL
        try:
            serve_forever(**options)
        except BaseException as error:
            self._failure = error
            self._is_closed = True
            self.server.server_close()  # clients are to notice, who would wait for an answer

    # Ending.

    def _stop(self, timeout: float, failure: BaseException | None) -> None:
        """End everything, and raise what is to be told of it. ``failure`` is what the block has raised."""
        try:
            stacks = self._end(timeout)
            self._errors.all()  # what came out of processes has to be read before the file is closed
        finally:
            for client in self._clients:
                client.close()
            if not self._is_closed:
                self.server.server_close()
        told: list[str] = []
        if self._failure is not None:
            if failure is None or isinstance(failure, Exception):
                raise self._failure
            told.append(f"serve_forever() has raised {self._failure!r}")
        if stacks:
            said = f"handlers still ran {timeout:g} s after the end of the block:\n{stacks}"
            if failure is None:
                raise RuntimeError(said)
            told.append(said)
        told += [f"a handler has raised {error!r}" for error in self.errors]
        if failure is not None:
            for note in told:
                failure.add_note(note)

    def _end(self, timeout: float) -> str:
        """Stop the loop, end what runs, and wait for it; return the stacks of what runs nevertheless."""
        begun = time.monotonic()
        stopper = threading.Thread(target=self.server.shutdown, name="fastserve.testing shutdown", daemon=True)
        if self._thread.is_alive():
            stopper.start()
        if self._forks:
            self._close_clients()  # there is no other way to end a connection that another process has
        stopped = False
        step = 0.0005
        while True:
            passed = time.monotonic() - begun
            running = [thread for thread in (self._thread, stopper) if thread.is_alive()]
            if not running:
                if not stopped:
                    stopped = True
                    self._close_clients()
                    self._threads = end_pool(self.server)
                started = vars(self.server).get("_threads", ())
                running = [thread for thread in (*started, *self._threads) if thread.is_alive()]
            children = self._children(passed, timeout)
            if not running and not children:
                return ""
            if passed >= timeout:
                return "".join(map(_stack, running)) or f"child processes: {children}\n"
            self._end_connections(passed >= _PATIENCE)
            if running:
                running[0].join(step)
            else:
                time.sleep(step)
            step = min(step * 2, _LONGEST_STEP)

    def _end_connections(self, entirely: bool) -> None:
        """End connections that are open, as far as their handlers have read all that came.

        :param entirely: end the others too, and the sending side.
        """
        for request in list(self._requests):
            try:
                if entirely or not _is_readable(request):
                    self._errors.ignored.add(request)
                    # Not its own method: that of ssl.SSLSocket takes away what the handler uses at this moment.
                    shutdown = socket.socket.shutdown if isinstance(request, socket.socket) else type(request).shutdown
                    shutdown(request, socket.SHUT_RDWR if entirely else socket.SHUT_RD)
            except (OSError, ValueError):
                self._requests.discard(request)  # it is closed

    def _close_clients(self) -> None:
        if self._forks and any(client.fileno() >= 0 for client in self._clients):
            self._errors.ignore_what_comes()
        else:
            self._end_connections(False)  # before the clients do, so that it is known who has ended them
        for client in self._clients:
            if self._forks:
                # Processes that were forked since have inherited it: close() alone would not tell anybody.
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)
            client.close()

    def _children(self, passed: float, timeout: float) -> list[int]:
        """Return the child processes that handle requests. After a while they are told to end, and then made to."""
        children: list[int] = []
        if hasattr(self.server, "collect_children") and not self._thread.is_alive():
            self.server.collect_children()
            children = sorted(self.server.active_children or ())
            number = signal.SIGKILL if passed >= timeout else signal.SIGTERM if passed >= _PATIENCE else 0
            for child in children:
                os.kill(child, number)  # it is ours still: it has not been collected
            if number == signal.SIGKILL:
                self.server.collect_children(blocking=True)
        return children


class _Threads(list[threading.Thread]):
    """The threads of a server, daemons too, whose ``server_close()`` does not wait for them: its test does."""

    def append(self, thread: threading.Thread) -> None:
        self[:] = [other for other in self if other.ident is None or other.is_alive()]
        super().append(thread)

    def join(self) -> None:
        """Do nothing."""


class _Errors:
    """What handlers have raised, also in forked children, which write it to a file that has no name."""

    def __init__(self, stack: contextlib.ExitStack, forks: bool) -> None:
        self.ignored: weakref.WeakSet[Any] = weakref.WeakSet()  # requests that the end of the block has ended
        self._found: list[Exception] = []
        self._changed = threading.Condition()
        self._pid = os.getpid()
        self._file = -1
        self._read = 0  # bytes
        if forks:
            import fcntl

            file = stack.enter_context(tempfile.TemporaryFile(buffering=0))
            self._file = file.fileno()
            fcntl.fcntl(self._file, fcntl.F_SETFL, os.O_APPEND)  # each write is a whole then, open(2)
            stack.callback(self.ignore_what_comes)

    def add(self, error: Exception, request: Any) -> None:
        if os.getpid() != self._pid:
            data = _pickled(error)
            os.write(self._file, len(data).to_bytes(4, "big") + data)
        elif not (_can_be_ignored(request) and request in self.ignored):
            with self._changed:
                self._found.append(error)
                self._changed.notify_all()

    def all(self) -> list[Exception]:
        """Return the list of them, which stays the same."""
        with self._changed:
            while self._file >= 0:
                size = int.from_bytes(os.pread(self._file, 4, self._read), "big")
                data = os.pread(self._file, size, self._read + 4)
                if not size or len(data) < size:
                    break
                self._read += 4 + size
                self._found.append(pickle.loads(data))
        return self._found

    def take(self, timeout: float) -> Exception | None:
        """Remove and return the first, if there comes to be one in that many seconds."""
        deadline = time.monotonic() + timeout
        while True:
            found = self.all()
            with self._changed:
                if found:
                    return found.pop(0)
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                self._changed.wait(left if self._file < 0 else min(left, _POLL_INTERVAL))

    def ignore_what_comes(self) -> None:
        """Read what children have written up to now, and no more."""
        self.all()
        self._file = -1


def _can_be_ignored(request: Any) -> bool:
    return not isinstance(request, tuple)  # a datagram, which cannot be referred to weakly


def _pickled(error: Exception) -> bytes:
    """Return an exception for another process, which cannot have its traceback; or one that tells of it."""
    said = "in a child process:\n" + "".join(traceback.format_exception(error))
    try:
        # With its attributes an exception takes its notes along. Those that cannot be built again say so here.
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = RuntimeError(f"{type(error).__qualname__}: {error}")
    copy.add_note(said)
    return pickle.dumps(copy)


def _has_gone(request: Any, client_address: Any, error: Exception) -> bool:
    """Return whether a handler has raised because its client has gone."""
    if not isinstance(error, ConnectionError) and type(error).__module__ != "ssl":
        # The reply to a datagram whose sender has removed the file that was its address.
        if not (isinstance(error, FileNotFoundError) and isinstance(request, tuple)):
            return False
    if not isinstance(request, tuple):
        return is_to_blame(request, error)
    if not client_address or not isinstance(client_address, str | bytes):
        return False  # no answer is known of a datagram that was sent to an IP address
    with socket.socket(_AF_UNIX, socket.SOCK_DGRAM) as probe:
        return probe.connect_ex(client_address) != 0


def _is_readable(request: Any) -> bool:
    """Return whether there is something left to read, or the end. Raises ``OSError`` or ``ValueError`` if closed."""
    if not hasattr(select, "poll"):
        return bool(select.select([request], [], [], 0)[0])
    descriptor = request.fileno()
    if descriptor < 0:
        raise ValueError("closed")
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def _stack(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    lines = traceback.format_stack(frame) if frame is not None else ["  without a stack\n"]
    return f"{thread.name}:\n{''.join(lines)}"


# Making.


def _new_server(
    handler: Any,
    worker: str | None,
    server_class: Any,
    address: Any,
    unix: bool | str | os.PathLike[str],
    udp: bool,
    directory: str | None,
    attributes: dict[str, Any],
) -> Any:
    """Return a listening server."""
    if handler is None:
        raise ValueError("there is no handler")
    if worker is not None and worker not in WORKERS:
        raise ValueError(f"worker is one of {', '.join(WORKERS)}, not {worker!r}")
    if unix:
        if address is not None:
            raise ValueError("unix and address are both addresses")
        address = os.path.join(directory, "socket") if directory is not None else os.fspath(unix)  # type: ignore[arg-type]
    elif address is None:
        address = ("127.0.0.1", 0)
    if server_class is None:
        is_path = isinstance(address, str | bytes)
        server_class = predefined(fastserve, worker or "threads", is_path, udp)
        if not is_path and ":" in address[0]:
            attributes = {"address_family": socket.AF_INET6, **attributes}
    else:
        if udp:
            raise ValueError("udp goes without server_class, which says what is served")
        if worker not in (None, "sync"):
            mixin = getattr(fastserve, f"{WORKERS[worker]}MixIn")
            server_class = type(server_class.__name__, (mixin, server_class), {})
    if attributes:
        server_class = type(server_class.__name__, (server_class,), attributes)
    return server_class(address, handler)


@contextlib.contextmanager
def _directory() -> Iterator[str]:
    """Make a directory with a short name: that of a socket has about 100 bytes at most, unix(7)."""
    with tempfile.TemporaryDirectory(prefix="fs-") as name:
        yield name


def _remove_file(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _reachable(address: Any) -> Any:
    """Return what to connect to for a server that may listen on all addresses."""
    if isinstance(address, tuple) and address[0] in _ANY_ADDRESS:
        return (_ANY_ADDRESS[address[0]], *address[1:])
    return address


def _forks(server: Any) -> bool:
    mixins = [cls for name in ("ForkingMixIn", "PreforkMixIn") if (cls := getattr(fastserve, name, None)) is not None]
    mixins += [socketserver.ForkingMixIn] if hasattr(socketserver, "ForkingMixIn") else []
    return isinstance(server, tuple(mixins))
