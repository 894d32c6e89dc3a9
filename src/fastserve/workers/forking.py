"""A child process for each request, where the platform can fork."""

from __future__ import annotations

import os
import socket
import socketserver
from typing import Any

from fastserve._loop import Loop, SelectorLoop, State, quiet_service_actions
from fastserve.server import TCPServer, UDPServer
from fastserve.workers._past import past

_std: Any = socketserver  # see server.py

if hasattr(os, "fork"):

    class ForkingMixIn(socketserver.ForkingMixIn):
        """Handle each request in a child process of its own: ``class Server(ForkingMixIn, TCPServer)``.

        What the handler changes in memory stays in the child. An ended child is collected at once, while the
        server is idle too.

        :cvar timeout: seconds after which ``handle_request()`` collects children although no request came; 300.
        :cvar max_children: children at a time; at this number the next request waits for one to end. 40.
        :cvar block_on_close: whether :meth:`server_close` waits for the children; ``True`` by default.
        :ivar active_children: the process ids of the children, a set; ``None`` before the first.
        """

        timeout: float | None = 300

        active_children: set[int] | None = None

        max_children = 40

        block_on_close = True

        def collect_children(self, *, blocking: bool = False) -> None:
            """Collect the children that have ended, and wait for one if there are :attr:`max_children`.

            :param blocking: whether to wait for all of them.
            """
            if self.active_children is None:
                return
            os = _std.os

            # waitpid(-1) may collect a child that is not ours, which is why it is used above the limit only.
            while len(self.active_children) >= self.max_children:
                try:
                    pid, _ = os.waitpid(-1, 0)
                    self.active_children.discard(pid)
                except ChildProcessError:
                    self.active_children.clear()  # there is no child at all
                except OSError:
                    break

            for pid in self.active_children.copy():
                try:
                    ended, _ = os.waitpid(pid, 0 if blocking else os.WNOHANG)
                    self.active_children.discard(ended)  # 0, and not among them, if it has not ended yet
                except ChildProcessError:
                    self.active_children.discard(pid)  # somebody else collected it
                except OSError:
                    pass  # it is asked for again at the next turn

        def handle_timeout(self) -> None:
            """Collect children, when ``handle_request()`` has waited in vain. May be extended."""
            self.collect_children()

        def service_actions(self) -> None:
            """Collect children: the loop calls it after every turn, and when a child has ended."""
            self.collect_children()

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
            """Close the server and collect the children; wait for them if :attr:`block_on_close` says so."""
            past(__class__, socketserver.ForkingMixIn, self).server_close()  # type: ignore[name-defined]
            self.collect_children(blocking=self.block_on_close)

    def _children_are_watched(server: Any, loop: Loop | SelectorLoop) -> bool:
        children = server.active_children
        return not children or loop.watches(len(children))

    quiet_service_actions[ForkingMixIn.service_actions] = _children_are_watched

    class ForkingTCPServer(ForkingMixIn, TCPServer, socketserver.ForkingTCPServer):
        """A :class:`~fastserve.TCPServer` with a child process for each connection."""

    class ForkingUDPServer(ForkingMixIn, UDPServer, socketserver.ForkingUDPServer):
        """A :class:`~fastserve.UDPServer` with a child process for each datagram."""

    if hasattr(socket, "AF_UNIX"):
        from fastserve.server import UnixDatagramServer, UnixStreamServer

        # Python 3.11 has no such classes; where they are, ours are derived from them.
        _StdlibStream: Any = getattr(_std, "ForkingUnixStreamServer", _std.UnixStreamServer)
        _StdlibDatagram: Any = getattr(_std, "ForkingUnixDatagramServer", _std.UnixDatagramServer)

        class ForkingUnixStreamServer(ForkingMixIn, UnixStreamServer, _StdlibStream):  # type: ignore[misc]
            """A :class:`~fastserve.UnixStreamServer` with a child process for each connection."""

        class ForkingUnixDatagramServer(ForkingMixIn, UnixDatagramServer, _StdlibDatagram):  # type: ignore[misc]
            """A :class:`~fastserve.UnixDatagramServer` with a child process for each datagram."""
