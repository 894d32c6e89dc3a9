"""What is asked of the servers: one work is one row of the overview and one panel of the chart."""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.bench.measure import Load

SMALL, MIDDLE, LARGE = 64, 1024, 16384  # bytes of a request
SOCKETS, WINDOW = 4, 64  # of the datagrams


@dataclass(frozen=True)
class Work:
    """A load, and which handler answers it.

    :param kind: echo, lines, oneshot or udp; what the servers are told to do.
    :param handler: the class of ``bench/handlers.py`` that does it.
    :param quick: whether ``make bench-quick`` has it too.
    :param curve: whether it is a point of the chart of throughput against connections.
    :param table: whether it is a row of the table; without, it is for that chart alone.
    """

    name: str
    title: str
    kind: str
    handler: str
    load: Load
    quick: bool = False
    curve: bool = False
    table: bool = True


def payload(size: int) -> bytes:
    """Return a line of ``size`` bytes that are not all alike."""
    return bytes(97 + number % 26 for number in range(size - 1)) + b"\n"


def echo(size: int, connections: int, quick: bool = False, curve: bool = False, table: bool = True) -> Work:
    """Return the work of connections that are kept and send the next request when they have the answer."""
    text = payload(size)
    label = f"{size} B" if size < 1024 else f"{size // 1024} KiB"
    plural = "s" if connections > 1 else ""
    load = Load(text, answer=size, expected=text, connections=connections)
    title = f"echo {label}, {connections} connection{plural}"
    return Work(f"echo-{size}-{connections}", title, "echo", "Echo", load, quick, curve, table)


def lines(pipeline: int, quick: bool = False) -> Work:
    """Return the work of lines over 50 connections."""
    text = payload(SMALL)
    load = Load(text, answer=SMALL, expected=text, connections=50, pipeline=pipeline)
    title = "readline and write, 50 connections" + (f", {pipeline} lines pipelined" if pipeline > 1 else "")
    return Work(f"lines-{pipeline}", title, "lines", "Lines", load, quick)


def oneshot(clients: int, quick: bool = False) -> Work:
    """Return the work of connections for one exchange each, closed by the server."""
    title = f"connect, exchange, close, {clients} clients"
    return Work(f"oneshot-{clients}", title, "oneshot", "OneShot", short_connections(clients), quick)


def oneline(clients: int) -> Work:
    """Return the work of connections for one line each, read and written as files, closed by the server."""
    title = f"connect, readline and write, close, {clients} clients"
    return Work(f"oneline-{clients}", title, "oneshot", "OneLine", short_connections(clients))


def short_connections(clients: int) -> Load:
    """Return the load of clients that connect for every request anew."""
    text = payload(SMALL)
    return Load(text, answer=SMALL, expected=text, connections=clients, reconnect=True)


def datagrams(name: str, handler: str, how: str, quick: bool = False) -> Work:
    """Return the work of datagrams."""
    text = payload(SMALL)
    load = Load(text, expected=text, connections=SOCKETS, pipeline=WINDOW, datagrams=True)
    return Work(name, f"UDP echo, {SOCKETS} × {WINDOW} under way, {how}", "udp", handler, load, quick)


WORKS = [
    echo(SMALL, 1, curve=True),
    echo(SMALL, 10, curve=True, table=False),
    echo(SMALL, 50, quick=True, curve=True),
    echo(SMALL, 200, curve=True, table=False),
    echo(SMALL, 500, curve=True),
    echo(SMALL, 1000, curve=True, table=False),
    echo(MIDDLE, 50),
    echo(LARGE, 50),
    lines(1, quick=True),
    lines(16),
    oneshot(32, quick=True),
    oneline(32),
    datagrams("udp-sendto", "Datagram", "sendto", quick=True),
    datagrams("udp-wfile", "DatagramFile", "rfile and wfile"),
]
