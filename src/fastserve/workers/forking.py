"""A child process for each request, where the platform can fork."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Set

from fastserve import pollers, tls
from fastserve._annotations import TYPE_CHECKING, Any, Final
from fastserve._loop import Loop, SelectorLoop, State, quiet_service_actions
from fastserve._stdlib import socketserver
from fastserve.server import TCPServer, UDPServer
from fastserve.workers._past import past

_std: Any = socketserver  # see server.py

NAP: Final = 0.02  # seconds between two looks at children, where the kernel does not tell of their end


def _collect(children: set[int], pids: Set[int], options: int) -> bool:
    """Collect those of ``pids`` that have ended, and remove them from ``children``.

    :param options: of waitpid(2): 0 to wait for them, or ``WNOHANG``.
    :return: whether all of them could be asked for.
    """
    answered = True
    for pid in pids:
        try:
            ended, _ = _std.os.waitpid(pid, options)
            children.discard(ended)  # 0, and not among them, if it has not ended yet
        except ChildProcessError:
            children.discard(pid)  # somebody else collected it, or nobody has to: SIGCHLD is ignored
        except OSError:
            answered = False  # it is asked for again at the next turn
    return answered


def _wait_for_one(children: set[int]) -> None:
    """Wait until one of the child processes has ended; where the kernel cannot tell, for a moment."""
    pidfds: list[int] = []
    try:
        for pid in children:
            pidfds.append(os.pidfd_open(pid))
        poller = pollers.new_poller()
        try:
            for pidfd in pidfds:
                poller.register(pidfd)
            poller.wait()
        finally:
            poller.close()
    except ProcessLookupError:
        pass  # there is one no more
    except (AttributeError, OSError):
        time.sleep(NAP)  # no pidfds here, or no descriptor left for them
    finally:
        for pidfd in pidfds:
            os.close(pidfd)


if hasattr(os, "fork"):

    class ForkingMixIn(socketserver.ForkingMixIn):
        """Handle each request in a child process of its own: ``class Server(ForkingMixIn, TCPServer)``.

        What the handler changes in memory stays in the child. An ended child is collected at once, while the
        server is idle too.

        :cvar timeout: seconds after which ``handle_request()`` collects children although no request came; 300.
        :cvar max_children: children at a time; at this number the next request waits for one to end. 40.
        :cvar block_on_close: whether :meth:`server_close` waits for the children; ``True`` by default.
        :cvar handshake_timeout: seconds that a client may take for the handshake, where the listener was wrapped by
            ``ssl.SSLContext.wrap_socket``; 10 by default, ``None`` is endless. The child does the handshake.
        :ivar active_children: the process ids of the children, a set; ``None`` before the first.
        """

        timeout: float | None = 300

        active_children: set[int] | None = None

        max_children = 40

        block_on_close = True

        handshake_timeout: float | None = tls.HANDSHAKE_TIMEOUT

        def collect_children(self, *, blocking: bool = False) -> None:
            """Collect the children that have ended, and wait for one if there are ``max_children``.

            Only the server's own children are collected. In the thread of a loop that watches them it asks for
            those alone that have ended.

            :param blocking: whether to wait for all of them.
            """
            children = self.active_children
            if not children:
                return
            os = _std.os
            told = False  # whether the end of one was waited for, and yet none could be collected
            while (count := len(children)) and count >= self.max_children:
                if not _collect(children, children.copy(), os.WNOHANG):
                    break
                if len(children) < count:
                    told = False
                elif told:
                    time.sleep(NAP)  # a tracer, say, comes first
                else:
                    _wait_for_one(children)
                    told = True
            if blocking:
                _collect(children, children.copy(), 0)
            elif children:
                loop = State.of(self).own_loop()
                asked = children.copy()
                _collect(children, asked if loop is None else loop.ended_children(asked), os.WNOHANG)
            meter = State.of(self).meter
            if meter is not None:
                meter.collected()

        def handle_timeout(self) -> None:
            """Collect children, when ``handle_request()`` has waited in vain. May be extended."""
            self.collect_children()

        def service_actions(self) -> None:
            """Collect children: the loop calls it after every turn, and when a child has ended."""
            self.collect_children()

        @tls.finishes_handshakes
        def process_request(self, request: Any, client_address: Any) -> None:
            """Fork a child that handles the request, and close the parent's side of it.

            The child never returns from it: it ends with ``os._exit``, 0 if the handler raised nothing, else 1.
            """
            os = _std.os
            pid = os.fork()
            if pid:
                if self.active_children is None:
                    self.active_children = set()
                self.active_children.add(pid)
                loop = State.of(self).own_loop()
                if loop is not None:
                    loop.watch_child(pid)
                self.close_request(request)  # type: ignore[attr-defined]
                return
            status = 1
            try:
                if type(request) not in tls.unfinished or tls.finish_handshake(request):
                    self.finish_request(request, client_address)  # type: ignore[attr-defined]
                status = 0
            except Exception:
                self.handle_error(request, client_address)  # type: ignore[attr-defined]
            finally:
                try:
                    self.shutdown_request(request)  # type: ignore[attr-defined]
                finally:
                    os._exit(status)

        def server_close(self) -> None:
            """Close the server and collect the children; wait for them if ``block_on_close`` says so."""
            past(__class__, socketserver.ForkingMixIn, self).server_close()  # type: ignore[name-defined]
            self.collect_children(blocking=self.block_on_close)

    def _children_are_watched(server: Any, loop: Loop | SelectorLoop) -> bool:
        children = server.active_children
        return not children or loop.watches(children)

    quiet_service_actions[ForkingMixIn.service_actions] = _children_are_watched

    class ForkingTCPServer(ForkingMixIn, TCPServer, socketserver.ForkingTCPServer):
        """A :class:`~fastserve.TCPServer` with a child process for each connection."""

    class ForkingUDPServer(ForkingMixIn, UDPServer, socketserver.ForkingUDPServer):
        """A :class:`~fastserve.UDPServer` with a child process for each datagram."""

    if hasattr(socket, "AF_UNIX"):
        from fastserve.server import UnixDatagramServer, UnixStreamServer

        # Python 3.11 has no such classes; where they are, ours are derived from them.
        if not TYPE_CHECKING:
            _StdlibStream = getattr(_std, "ForkingUnixStreamServer", _std.UnixStreamServer)
            _StdlibDatagram = getattr(_std, "ForkingUnixDatagramServer", _std.UnixDatagramServer)
        elif sys.version_info >= (3, 12):
            _StdlibStream = socketserver.ForkingUnixStreamServer
            _StdlibDatagram = socketserver.ForkingUnixDatagramServer
        else:
            _StdlibStream = socketserver.UnixStreamServer
            _StdlibDatagram = socketserver.UnixDatagramServer

        class ForkingUnixStreamServer(ForkingMixIn, UnixStreamServer, _StdlibStream):
            """A :class:`~fastserve.UnixStreamServer` with a child process for each connection."""

        class ForkingUnixDatagramServer(ForkingMixIn, UnixDatagramServer, _StdlibDatagram):
            """A :class:`~fastserve.UnixDatagramServer` with a child process for each datagram."""
