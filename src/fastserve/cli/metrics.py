"""``fastserve serve --metrics``: what the server counts, for Prometheus, by the library prometheus-client.

Whoever asks for metrics is answered by the process that was started. Where it forks, for each worker or request, its
loop does so between two turns: a fork beside a thread is a risk. In any other process it is a thread, which the
handlers do not hold up.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import fastserve
from fastserve._loop import EXHAUSTED, Loop, SelectorLoop, State
from fastserve.cli.arguments import UsageError

if TYPE_CHECKING:
    from prometheus_client import Metric

    from fastserve.stats import WorkerStats

LIMIT: Final = 1.0  # seconds that a client may take to ask, and again to take the answer
NAP: Final = 0.1  # seconds until accept is tried again that has found no descriptor left
LONGEST_HEAD: Final = 65536  # bytes


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that says where the metrics are."""
    help = "serve metrics there, for Prometheus, by HTTP: HOST:PORT or [IPV6]:PORT, port 0 lets the kernel choose \
        (default: no metrics)"
    parser.add_argument("--metrics", metavar="ADDRESS", help=help)


def check(args: argparse.Namespace) -> None:
    """Raise ``UsageError`` if metrics are asked for, and what they need is not installed."""
    if args.metrics is not None and importlib.util.find_spec("prometheus_client") is None:
        raise UsageError('--metrics needs prometheus-client: pip install "fastserve[metrics]"')


class _Listener(fastserve.TCPServer):
    """The server that is asked for metrics."""

    allow_reuse_address = True

    request_queue_size = 16

    def get_request(self) -> tuple[Any, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in EXHAUSTED:
                time.sleep(NAP)  # the listener stays readable: else its loop would spin
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report what went wrong, unless the client has gone or was too slow."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Scrapes:
    """What answers those who ask for metrics, in a ``with`` block, in which the server is to be served.

    :param server: the one that counts, a :class:`fastserve.StatsMixIn`.
    :param forks: whether its process forks.
    :raises OSError: if the address cannot be had.
    """

    def __init__(self, server: Any, family: int, address: Any, forks: bool) -> None:
        listener = type("Listener", (_Listener,), {"address_family": family})
        self._server = server
        self._forks = forks
        self._listener: fastserve.TCPServer = listener(address, _handler_of(server))
        self._thread: threading.Thread | None = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._listener.socket.close)

    def __enter__(self) -> str:
        """Begin to answer; return the URL."""
        state = State.of(self._server)
        if self._forks:
            os.set_blocking(self._listener.fileno(), False)
            state.opened = self._watch
        else:
            self._thread = threading.Thread(target=self._listener.serve_forever, name="metrics", daemon=True)
            self._thread.start()
        address: Any = self._listener.server_address
        host, port = address[:2]
        host = f"[{host}]" if self._listener.address_family == socket.AF_INET6 else host
        return f"http://{host}:{port}/metrics"

    def _watch(self, loop: Loop | SelectorLoop) -> None:
        loop.watch(self._listener.fileno(), self._listener._handle_request_noblock)

    def __exit__(self, *args: object) -> None:
        """Answer no more."""
        State.of(self._server).opened = None
        if self._thread is not None:
            self._listener.shutdown()
            self._thread.join()
        self._listener.server_close()


def _handler_of(server: Any) -> Callable[..., Any]:
    """Return the handler of prometheus-client that answers with the counts of ``server``."""
    from prometheus_client import CollectorRegistry, MetricsHandler

    registry = CollectorRegistry()
    collector: Any = _Collector(server)
    registry.register(collector)

    class Handler(MetricsHandler):
        def setup(self) -> None:
            super().setup()
            head: Any = io.BytesIO(_head_of(self.connection))
            self.rfile = head

    Handler.registry = registry
    return Handler


def _head_of(connection: socket.socket) -> bytes:
    """Receive the head of a request, which has to come in time: whoever receives it has other things to do."""
    deadline = time.monotonic() + LIMIT
    head = b""
    while b"\r\n\r\n" not in head and len(head) < LONGEST_HEAD:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        connection.settimeout(left)
        data = connection.recv(LONGEST_HEAD)
        if not data:
            break
        head += data
    connection.settimeout(LIMIT)
    return head


class _Collector:
    """What prometheus-client asks, each time that it is asked."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def describe(self) -> list[Metric]:
        """Return nothing, so that the server is not asked before somebody wants to know."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the server at this moment."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        stats = self._server.stats()
        workers: dict[str, WorkerStats] = {str(place): worker for place, worker in stats.workers.items()}
        if not workers:
            workers = {"0": stats}
        for name, help, kind, label, value in _METRICS:
            family_class = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
            family = family_class(f"fastserve_{name}", help, labels=["worker", *filter(None, [label])])
            for place, worker in workers.items():
                found = value(worker)
                samples = found.items() if label else [(None, found)]
                for of, number in samples:
                    if number is not None:
                        family.add_metric([place, str(of)] if label else [place], number)
            yield family
        for name, help, number in (
            ("processes", "Processes that serve", len(stats.pids)),
            ("backlog_connections", "Connections that wait in the kernel to be accepted", stats.backlog),
            ("backlog_limit_connections", "Connections that may wait there", stats.backlog_limit),
        ):
            if number is not None:
                yield GaugeMetricFamily(f"fastserve_{name}", help, value=number)


# Name, help, kind, label beside that of the worker, and what it is of a WorkerStats: see there.
_METRICS: Final[tuple[tuple[str, str, str, str, Callable[[WorkerStats], Any]], ...]] = (
    ("connections_accepted", "Connections, or datagrams, accepted", "counter", "", lambda stats: stats.accepted),
    (
        "connections_refused",
        "Connections closed without a handler",
        "counter",
        "reason",
        lambda stats: stats.refused,
    ),
    ("requests_handled", "Requests whose handler has ended", "counter", "", lambda stats: stats.handled),
    ("requests_timed_out", "Requests cut off by a limit", "counter", "reason", lambda stats: stats.timed_out),
    ("errors", "Exceptions of handlers", "counter", "", lambda stats: stats.errors),
    ("bytes_received", "Bytes of connections that have ended", "counter", "", lambda stats: stats.bytes_received),
    ("bytes_sent", "Bytes of connections that have ended", "counter", "", lambda stats: stats.bytes_sent),
    ("connections_active", "Requests that have begun and not ended", "gauge", "", lambda stats: stats.active),
    ("requests_queued", "Requests that wait in the process", "gauge", "", lambda stats: stats.queued),
    ("loop_delay_seconds", "How late the loop came round", "gauge", "", lambda stats: stats.loop_delay),
)
