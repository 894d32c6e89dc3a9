"""Batches of datagrams: what is taken off the socket together, kept, and handled one by one.

What a datagram server keeps beside its loops is its :class:`Datagrams`, made when it is needed first.
"""

from __future__ import annotations

import _socket
import contextlib
import os
import socket
import sys
import threading
import weakref
from collections import deque

from fastserve import _backend
from fastserve._annotations import Any, Final
from fastserve._datagrams_py import Request
from fastserve._loop import STATE, Loop, SelectorLoop, State, watch_forks
from fastserve._stdlib import FORKING
from fastserve.gathering import GatheringSocket, gathering_socket
from fastserve.handlers import OWN_OF_HANDLERS

MAX_BATCH: Final = 64  # datagrams, unless the server says otherwise
MOST_BYTES: Final = 4 * 1024 * 1024  # of the buffers of one loop

_PLAIN: Final = socket.socket
_RECVFROM: Final = _PLAIN.recvfrom
_family_of: Final = vars(_socket.socket).get("family", property(lambda listener: -1)).__get__
_FAMILIES: Final = frozenset(
    int(getattr(socket, name)) for name in ("AF_INET", "AF_INET6", "AF_UNIX") if hasattr(socket, name)
)
_CAN_BATCH: Final = hasattr(socket, "MSG_DONTWAIT") and hasattr(_PLAIN, "recvmsg")


class Datagrams:
    """The datagrams that a server has taken off its socket and not handled yet. Any thread may use it."""

    __slots__ = ("__weakref__", "failed", "gathering", "kept", "reported")

    def __init__(self) -> None:
        self.kept: deque[Request] = deque()
        self.failed: OSError | None = None  # the error that the next get_request() raises when nothing is kept
        self.gathering: GatheringSocket | None = None
        self.reported = False  # whether a truncated datagram was reported
        _all.add(self)

    @classmethod
    def of(cls, server: Any) -> Datagrams:
        """Return the datagrams of ``server``, made now if there are none."""
        state = State.of(server)
        if state.datagrams is None:
            watch_forks(_after_fork_in_child)
            with _lock:
                if state.datagrams is None:
                    state.datagrams = cls()
        found: Datagrams = state.datagrams
        return found


_all: weakref.WeakSet[Datagrams] = weakref.WeakSet()
_lock = threading.Lock()
_imported_in = os.getpid()


def _after_fork_in_child() -> None:
    """Leave to the parent what it has taken, and what it is about to send."""
    global _lock
    _lock = threading.Lock()
    for datagrams in list(_all):
        datagrams.kept.clear()
        datagrams.failed = None
        if datagrams.gathering is not None:
            datagrams.gathering._gatherer.forget()


def _found(server: Any) -> Datagrams | None:
    """Return the datagrams of ``server`` if there are any; make none."""
    state = getattr(server, "__dict__", {}).get(STATE)
    return None if state is None else state.datagrams


def are_kept(server: Any) -> bool:
    """Return whether ``get_request()`` of ``server`` has something to give without waiting."""
    datagrams = _found(server)
    return datagrams is not None and (bool(datagrams.kept) or datagrams.failed is not None)


def drop(server: Any) -> None:
    """Drop what is kept, because the server is closed, and count it in ``dropped_datagrams``."""
    datagrams = _found(server)
    if datagrams is None:
        return
    dropped = 0
    while datagrams.kept:
        try:
            datagrams.kept.popleft()
        except IndexError:
            break  # another thread was faster
        dropped += 1
    datagrams.failed = None
    if dropped:
        server.dropped_datagrams = getattr(server, "dropped_datagrams", 0) + dropped


def get_request(server: Any) -> Request:
    """Return a datagram that was kept, or receive one from the socket of ``server``."""
    datagrams = _found(server)
    if datagrams is not None:
        with contextlib.suppress(IndexError):  # nothing is kept
            return datagrams.kept.popleft()
        failed, datagrams.failed = datagrams.failed, None
        if failed is not None:
            raise failed
    listener, size = server.socket, server.max_packet_size
    if not _is_plain(listener) or not _is_size(size):
        data, client_address = listener.recvfrom(size)
    else:
        # Of several loops one may have been faster; the others must not wait here, where shutdown() cannot wake them.
        dont_wait = datagrams is not None and _is_one_of_several(server)
        data, _, flags, client_address = listener.recvmsg(size, 0, socket.MSG_DONTWAIT if dont_wait else 0)
        if flags & socket.MSG_TRUNC:
            count_truncated(server, 1)
    return (data, listener), client_address


def _is_one_of_several(server: Any) -> bool:
    """Return whether the calling thread runs a loop of ``server`` and others receive from the same socket."""
    state = State.of(server)
    return (len(state.loops) > 1 or _is_shared(server)) and state.own_loop() is not None


def _is_plain(listener: Any) -> bool:
    """Return whether a listener may be received from by another call than its ``recvfrom``."""
    return (
        _CAN_BATCH
        and type(listener) is _PLAIN
        and socket.socket is _PLAIN
        and _PLAIN.recvfrom is _RECVFROM
        and _family_of(listener) in _FAMILIES
        and not _backend.monkey_patched()
    )


def _is_size(size: Any) -> bool:
    """Return whether a ``max_packet_size`` is one to make buffers of; others are left to ``recvfrom`` to judge."""
    return type(size) is int and 0 <= size <= MOST_BYTES


def count_truncated(server: Any, count: int) -> None:
    """Count datagrams that were cut off, and report the first on standard error."""
    server.truncated_datagrams = getattr(server, "truncated_datagrams", 0) + count
    datagrams = Datagrams.of(server)
    if not datagrams.reported and sys.stderr is not None:
        datagrams.reported = True
        print(
            f"fastserve: a datagram on {getattr(server, 'server_address', server)!r} was longer than max_packet_size, "
            f"{server.max_packet_size} bytes, and has lost its end; truncated_datagrams counts them",
            file=sys.stderr,
        )


def _is_shared(server: Any) -> bool:
    """Return whether other processes receive from the socket as well, as far as is known.

    In a forked child it is so for every server that was not made in the child.
    """
    if isinstance(server, FORKING):
        return True
    here = os.getpid()
    return here != _imported_in and getattr(server._BaseServer__is_shut_down, "made_in", None) != here


class Batches:
    """The batches of one ``serve_forever``. The loop's thread uses it.

    :param flag: the descriptor that stands for ``_BaseServer__shutdown_request``.
    :param own: our own methods of the class that the server is derived from, by name.
    """

    def __init__(self, server: Any, loop: Loop | SelectorLoop, flag: object, own: dict[str, Any]) -> None:
        self._server = server
        self._loop = loop
        self._own_get_request = own["get_request"]
        self._datagrams = Datagrams.of(server)
        self.kept = self._datagrams.kept
        self._receiver = _backend.datagrams.Receiver()
        self._turns = _backend.datagrams.Turns(flag, own, OWN_OF_HANDLERS)

    def are_pending(self) -> bool:
        """Return whether something is to be handled before the loop may wait."""
        return bool(self.kept) or self._datagrams.failed is not None

    def handle(self) -> None:
        """Handle what is kept, or the datagrams that have arrived: the turns of the loop but for the end of the last.

        What cannot be taken in batches is left to ``_handle_request_noblock()``.
        """
        server = self._server
        if not self.are_pending():
            listener, size = server.socket, server.max_packet_size
            if (
                getattr(server.get_request, "__func__", None) is self._own_get_request
                and _is_plain(listener)
                and _is_size(size)
                and not self._take(listener, size)
            ):
                return
        gathering = self._datagrams.gathering
        if not self.kept:  # get_request() receives one, or raises the error that was met
            server._handle_request_noblock()
        elif gathering is None or not getattr(server, "gather_replies", False):
            self._turns.run(server, self._loop, self.kept)
        else:
            gathering._gatherer.begin()
            try:
                self._turns.run(server, self._loop, self.kept)
            finally:
                gathering._gatherer.end()

    def _take(self, listener: socket.socket, size: int) -> bool:
        """Keep the datagrams that have arrived; return whether there were any, or an error in their place."""
        server, receiver, datagrams = self._server, self._receiver, self._datagrams
        count = getattr(server, "max_batch", MAX_BATCH)
        # Another loop of this server would not know of what this one keeps while it sleeps.
        if count > 1 and (len(State.of(server).loops) > 1 or _is_shared(server)):
            count = 1
        count = max(min(count, MOST_BYTES // max(size, 1)), 1)
        target: socket.socket = listener
        if getattr(server, "gather_replies", False):
            target = self._gathering_socket(listener)
        try:
            received = receiver.receive(listener, target, count, size)
        except OSError as error:
            datagrams.failed = error
            return True
        datagrams.failed = receiver.failed
        receiver.failed = None
        self.kept.extend(received)
        if receiver.truncated:
            truncated, receiver.truncated = receiver.truncated, 0
            count_truncated(server, truncated)
        return bool(received)

    def _gathering_socket(self, listener: socket.socket) -> socket.socket:
        """Return the socket that gathers the replies to ``listener``; itself where that cannot be."""
        gathering = self._datagrams.gathering
        if gathering is None or gathering._listener is not listener:
            gathering = self._datagrams.gathering = gathering_socket(self._server, listener)
        return gathering or listener

    def close(self) -> None:
        """Release the buffers. What is kept stays so, for the next call."""
        self._receiver.close()
