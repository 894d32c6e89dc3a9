"""What a server counts: opt-in, by a mix-in. ``_meter`` keeps it, in memory that all processes of a server share."""

from __future__ import annotations

import dataclasses
import socket
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from fastserve import limits
from fastserve._meter import REFUSED, TIMED_OUT, Meter, Row, meter_of
from fastserve._order import BeforeServer

# struct tcp_info of linux/tcp.h, see tcp(7). It grows at its end: since Linux 4.19 it has all that is read here.
_IPPROTO_TCP: Final = 6
_TCP_INFO: Final = 11
_ROOM: Final = 256
_BACKLOG: Final = struct.Struct("=24xII")  # of a listener: tcpi_unacked, tcpi_sacked
# tcpi_state, tcpi_bytes_received, tcpi_notsent_bytes, tcpi_bytes_sent, tcpi_bytes_retrans
_BYTES: Final = struct.Struct("=B127xQ8xI52xQQ")
# The states in which the end of the client's stream has come, which the kernel counts as a byte: CLOSE_WAIT, LAST_ACK,
# CLOSING.
_ENDED: Final = frozenset({8, 9, 11})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStats:
    """What a process of a server has counted, and those before it in its place; or all processes together.

    Counters, which never become less:

    :ivar accepted: connections, or datagrams, that were accepted.
    :ivar handled: those whose handler has ended, with an exception or without.
    :ivar refused: those that were closed without a handler, by the reason: ``verify_request``, which has returned
        ``False``; ``max_connections_per_client`` of :class:`LimitsMixIn`; ``proxy_header`` of
        :class:`ProxyProtocolMixIn`; ``tls_handshake``.
    :ivar timed_out: those that were cut off in their handler, by the limit of :class:`LimitsMixIn`:
        ``request_timeout`` and ``idle_timeout``.
    :ivar errors: calls of ``handle_error``, but those for ``idle_timeout``.
    :ivar bytes_received: bytes that the kernel has received for connections that have ended, TLS and headers of
        proxies included, whether they were read or not; of datagrams, the bytes that were taken. ``None`` for
        connections where the kernel does not count: Unix sockets, and other systems than Linux (from 4.19 on).
    :ivar bytes_sent: bytes that were given to the kernel for connections that have ended, those included that it has
        still to send; ``None`` likewise, and for datagrams.

    Gauges, which tell of the moment:

    :ivar active: requests that have begun and are not closed. With :class:`ForkingMixIn`, children that were not
        collected.
    :ivar queued: requests that this process has taken and that wait in it: for a thread of :class:`ThreadPoolMixIn`,
        or in a batch of datagrams; greenlets of :class:`GreenletMixIn` that could go on, and wait for their turn. What
        waits in the kernel is not among them. Of another process it is what that told last, when its loop came round.
    :ivar loop_delay: seconds. Each call of :meth:`StatsMixIn.stats` asks the loops to come round, and does not wait;
        this is how long it took when they were asked before. If one has not come round yet it is the time since then,
        if that is more. Of several processes it is the longest. ``None`` without a loop of fastserve's own, and in the
        first call.
    :ivar pids: the processes that serve, by their ids.
    """

    accepted: int
    handled: int
    refused: Mapping[str, int]
    timed_out: Mapping[str, int]
    errors: int
    bytes_received: int | None
    bytes_sent: int | None
    active: int
    queued: int
    loop_delay: float | None
    pids: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServerStats(WorkerStats):
    """What a server has counted: the sums of its processes.

    :ivar backlog: connections that wait in the kernel to be accepted, at the listeners that the calling process knows;
        ``None`` where the kernel does not tell: Unix sockets, datagrams, other systems than Linux.
    :ivar backlog_limit: how many may, together: ``request_queue_size``, or what the system allows; ``None`` likewise.
    :ivar workers: with :class:`PreforkMixIn`, the counts of each worker, by its place from 0; else empty. A worker that
        replaces another one goes on with its counters; its gauges begin at 0.
    """

    backlog: int | None
    backlog_limit: int | None
    workers: Mapping[int, WorkerStats]


class StatsMixIn(BeforeServer):
    """Count what a server does: ``class Server(StatsMixIn, ThreadingTCPServer)``.

    It goes with each worker mix-in, with datagrams, and over the servers of the stdlib. It is named before the worker
    mix-in, and before :class:`LimitsMixIn`, :class:`LoggingMixIn`, :class:`TLSMixIn` and :class:`ProxyProtocolMixIn`.
    An override of ``verify_request``, ``finish_request``, ``handle_error``, ``shutdown_request`` or
    ``close_request`` in a class derived from it has to call ``super()``, or that is not counted.

    With :class:`PreforkMixIn` and :class:`ForkingMixIn` the counts are in memory that the processes share, so that each
    of them tells the sums of all. What a process counts that a handler has forked itself is lost.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Pass the arguments on. Raises ``OSError`` if there is no memory to share."""
        super().__init__(*args, **kwargs)
        try:
            meter_of(self)
        except BaseException:
            self.server_close()
            raise

    def stats(self) -> ServerStats:
        """Return what was counted. Any thread may call it, in any process of the server, and a signal handler.

        It waits for nothing: the counters are those of the moment at which each is read, so that they need not agree
        with each other to the last request.
        """
        meter = meter_of(self)
        rows = list(meter.read())
        meter.ask()
        backlog, backlog_limit = _backlog(self, meter)
        is_stream = getattr(self, "socket_type", None) == socket.SOCK_STREAM
        places = sorted({row.place for row in rows if row.place is not None})
        workers = {
            place: WorkerStats(**_counted(meter, is_stream, [row for row in rows if row.place == place]))
            for place in places
        }
        return ServerStats(
            **_counted(meter, is_stream, rows, in_parent=bool(workers)),
            backlog=backlog,
            backlog_limit=backlog_limit,
            workers=MappingProxyType(workers),
        )

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Count what was accepted, and whether it is refused. The loop's thread calls it."""
        meter = meter_of(self)
        if type(request) is tuple and request and isinstance(request[0], bytes):
            meter.begin(request, ("bytes_received", len(request[0])))
        else:
            meter.begin(request)
        verified: bool = super().verify_request(request, client_address)  # type: ignore[misc]
        if not verified:
            meter.refuse(request, "verify_request")
        return verified

    def finish_request(self, request: Any, client_address: Any) -> Any:
        """Handle the request, and count it. The worker's thread calls it."""
        try:
            return super().finish_request(request, client_address)  # type: ignore[misc]
        finally:
            meter = meter_of(self)
            if not meter.is_refused(request):
                meter.add(("handled", 1))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Count what a handler has raised."""
        meter_of(self).add(("idle_timeout" if limits.is_idle(self, request) else "errors", 1))
        super().handle_error(request, client_address)  # type: ignore[misc]

    def shutdown_request(self, request: Any) -> None:
        """Count the bytes of a connection, and end it."""
        meter = meter_of(self)
        if meter.has_bytes:
            _count_bytes(meter, request)
        super().shutdown_request(request)  # type: ignore[misc]

    def close_request(self, request: Any) -> None:
        """Close a request, and count it as active no longer."""
        try:
            super().close_request(request)  # type: ignore[misc]
        finally:
            meter_of(self).end(request)

    def server_close(self) -> None:
        """Close the server. What was counted can be asked for still."""
        try:
            super().server_close()  # type: ignore[misc]
        finally:
            meter_of(self).close()


def _count_bytes(meter: Meter, request: Any) -> None:
    try:
        info = request.getsockopt(_IPPROTO_TCP, _TCP_INFO, _ROOM)
        state, received, not_sent, sent, sent_again = _BYTES.unpack_from(info)
    except (AttributeError, OSError, struct.error):
        return  # no socket, one that the handler has closed or handed on, or an old kernel
    meter.add(("bytes_received", received - (state in _ENDED)), ("bytes_sent", sent - sent_again + not_sent))


def _backlog(server: Any, meter: Meter) -> tuple[int | None, int | None]:
    """Return how many connections wait for the listeners of a server, and how many may."""
    if not meter.has_bytes:
        return None, None
    listeners = meter.supervisor.listeners if meter.supervisor is not None else []
    waiting = limit = 0
    for listener in listeners or [server.socket]:
        try:
            found = _BACKLOG.unpack_from(listener.getsockopt(_IPPROTO_TCP, _TCP_INFO, _ROOM))
        except (AttributeError, OSError, struct.error):
            return None, None  # closed, or no socket
        waiting += found[0]
        limit += found[1]
    return waiting, limit


def _counted(meter: Meter, is_stream: bool, rows: list[Row], in_parent: bool = False) -> dict[str, Any]:
    """Return the attributes of a :class:`WorkerStats`.

    :param in_parent: whether the first row is that of the parent of workers, which does not serve.
    """
    counters = {name: sum(row.counters[name] for row in rows) for name in rows[0].counters}
    serving = rows[1:] if in_parent else rows
    delays = [row.delay for row in serving if row.delay is not None]
    return {
        "accepted": counters["accepted"],
        "handled": counters["handled"],
        "refused": MappingProxyType({reason: counters[reason] for reason in REFUSED}),
        "timed_out": MappingProxyType({reason: counters[reason] for reason in TIMED_OUT}),
        "errors": counters["errors"],
        "bytes_received": counters["bytes_received"] if not is_stream or meter.has_bytes else None,
        "bytes_sent": counters["bytes_sent"] if meter.has_bytes else None,
        "active": sum(row.active for row in rows),
        "queued": sum(row.queued for row in rows),
        "loop_delay": max(delays, default=None),
        "pids": tuple(row.pid for row in serving if row.pid),
    }
