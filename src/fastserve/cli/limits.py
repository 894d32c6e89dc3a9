"""The limits of ``fastserve serve``: on, with values that suit most services, unless they are switched off."""

from __future__ import annotations

import argparse
import importlib
import socket
from typing import Any, Final

from fastserve.cli.arguments import limit, positive

# Requests at a time, by worker model: so many threads or greenlets take less than 100 MB, without what handlers keep.
MAX_CONNECTIONS: Final = {"threads": 1000, "threadpool": 1000, "greenlet": 10000}
MAX_CHILDREN: Final = 40  # with --worker fork; as in the stdlib
OF_DESCRIPTORS: Final = 0.75  # the part of those that the process may have which is for connections, by default

IDLE_TIMEOUT: Final = 300  # seconds; what a server of SMTP is to wait at least (RFC 5321, 4.5.3.2.7)
MAX_LINE: Final = 65536  # bytes; as for asyncio and http.server

NO_LIMIT: Final = 2**31 - 1  # children, where the stdlib has no word for it

_OF_CONNECTIONS: Final = ("max_connections_per_client", "request_timeout", "idle_timeout", "max_line")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options. Those that take ``limit`` have ``0`` or ``off`` for no limit."""
    help = f"requests that are handled at a time, by each process; others wait in the kernel (default: \
        {MAX_CONNECTIONS['threads']}, with --worker greenlet {MAX_CONNECTIONS['greenlet']}, but no more than three \
        quarters of the descriptors that the process may have; with --worker fork {MAX_CHILDREN})"
    parser.add_argument("--max-connections", metavar="N", type=limit, help=help)
    help = "connections at a time from one address; further ones are closed (default: off)"
    parser.add_argument("--max-connections-per-client", metavar="N", type=limit, help=help)
    help = "seconds that a handler has; its connection is shut down then (default: off)"
    parser.add_argument("--request-timeout", metavar="SECONDS", type=limit, help=help)
    help = f"seconds that a client may take for each read and write (default: {IDLE_TIMEOUT})"
    parser.add_argument("--idle-timeout", metavar="SECONDS", type=limit, help=help)
    help = f"bytes of a line that the handler reads from rfile (default: {MAX_LINE})"
    parser.add_argument("--max-line", metavar="BYTES", type=limit, help=help)
    help = f"connections that the kernel keeps until they are accepted (default: {socket.SOMAXCONN}; the system may \
        have a lower limit)"
    names = ("--backlog", "--request-queue-size")
    parser.add_argument(*names, metavar="N", type=positive, dest="request_queue_size", help=help)


def wrong(args: argparse.Namespace) -> list[tuple[object, str]]:
    """Return what may be wrong with the options, each with the message for it."""
    for_connections = [
        (args.udp and getattr(args, name) is not None, f"--{name.replace('_', '-')} is not for --udp")
        for name in _OF_CONNECTIONS
    ]
    return [
        (args.udp and args.request_queue_size, "--backlog is for connections: not with --udp"),
        (
            args.udp and args.max_connections is not None and args.worker != "greenlet",
            "--max-connections is not for --udp, but with --worker greenlet",
        ),
        *for_connections,
    ]


def attributes(args: argparse.Namespace) -> dict[str, Any]:
    """Return the attributes of the server class that the options mean; those of ``LimitsMixIn`` for connections."""
    found: dict[str, Any] = {"request_queue_size": args.request_queue_size or socket.SOMAXCONN}
    if args.udp:
        return found | {"max_connections": args.max_connections or None}
    if args.worker == "fork":  # a connection counts as long as it takes to fork the child
        children = MAX_CHILDREN if args.max_connections is None else args.max_connections or NO_LIMIT
        found |= {"max_children": children, "max_connections": None}
    else:
        found["max_connections"] = _max_connections(args)
    defaults = {"idle_timeout": IDLE_TIMEOUT, "max_line": MAX_LINE}
    for name in _OF_CONNECTIONS:
        given = getattr(args, name)
        found[name] = (defaults.get(name) if given is None else given) or None
    return found


def _max_connections(args: argparse.Namespace) -> int | None:
    """Return how many requests a process handles at a time, beside children."""
    if args.worker not in MAX_CONNECTIONS:
        return None  # the loop itself handles one after the other
    if args.max_connections is not None:
        return args.max_connections or None
    most = MAX_CONNECTIONS[args.worker]
    try:
        resource = importlib.import_module("resource")
    except ModuleNotFoundError:
        return most  # a system without such limits
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most if descriptors == resource.RLIM_INFINITY else max(min(most, int(descriptors * OF_DESCRIPTORS)), 1)
