"""``fastserve serve``: a handler of the user's, without a program."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import socket
import sys
import threading
from types import FrameType
from typing import Any, Final

import fastserve
from fastserve import sockets
from fastserve.cli import limits, listening, metrics, tls, watchdog
from fastserve.cli.arguments import UsageError, positive
from fastserve.cli.targets import find_handler, require_greenlets
from fastserve.workers._names import WORKERS, predefined
from fastserve.workers._pool import default_workers

DEFAULT_GRACE: Final = 30  # seconds

STOPS: Final = (signal.SIGINT, signal.SIGTERM)

LOG_FORMAT: Final = "%(asctime)s %(process)d %(levelname)s %(message)s"

EPILOG: Final = """\
The first line on standard output tells the address, in the form that --bind takes.

Ctrl-C (SIGINT) and SIGTERM stop the server at once, with exit status 0. Requests that
still run are cut off, also those of idle clients: threads end with the process, children
get SIGTERM, a handler in the loop gets KeyboardInterrupt, one in a greenlet GreenletExit.
The file of a Unix socket is removed, unless it came from outside.

If NOTIFY_SOCKET is set, systemd is told READY=1 when the server serves, and STOPPING=1.
If WATCHDOG_USEC is set too, WATCHDOG=1 twice in that time, while the loop goes round.

With --grace or --workers SIGTERM lets requests that run end first, within --grace
seconds; a second one cuts them off. Idle clients are closed where the handler says so, as
those of http.server do here. With --workers SIGHUP replaces the processes one by one, and
no client notices.

examples:
  fastserve serve echo.py:Handler --bind [::1]:0 --worker fork
  fastserve serve clock.py:Handler --bind 127.0.0.1:3700 --udp --worker sync
  fastserve serve echo.py:Handler --bind unix:/tmp/echo.sock --socket-mode 660
  fastserve serve echo.py:Handler --bind systemd:echo
  fastserve serve http.server:SimpleHTTPRequestHandler --tls-cert chain.pem --tls-key key.pem
  fastserve serve echo.py:Handler --worker greenlet --workers 4
"""


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command to those of the command line."""
    description = "Serve a handler class: for each connection, or each datagram, it is called once."
    parser = commands.add_parser("serve", help="serve a handler class", description=description, epilog=EPILOG)
    help = "any callable that takes (request, client_address, server), such as a handler class; HANDLER may be dotted, \
        as Outer.Handler. MODULE is looked for in the current directory first"
    parser.add_argument("target", metavar="MODULE:HANDLER | FILE.py:HANDLER", help=help)
    listening.add_address(parser)
    help = "serve datagrams, UDP or of a Unix socket (default: connections)"
    parser.add_argument("--udp", action="store_true", help=help)
    help = "what runs the handler: sync, the loop itself, one request after the other; threads, a thread for each \
        request; threadpool, a limited number of threads; fork, a child process for each; greenlet, a greenlet for \
        each, all in one thread (default: %(default)s)"
    parser.add_argument("--worker", choices=WORKERS, default="threads", help=help)
    help = f"threads, with --worker threadpool (default here: {default_workers()})"
    parser.add_argument("--max-workers", metavar="N", type=positive, help=help)
    help = "processes that serve together, each as --worker says; one that ends is replaced (default: this one alone)"
    parser.add_argument("--workers", metavar="N", type=positive, help=help)
    help = f"seconds that requests have to end after SIGTERM (default: none; with --workers {DEFAULT_GRACE})"
    parser.add_argument("--grace", metavar="SECONDS", type=positive, help=help)
    limits.add_options(parser)
    help = "tell logging, on standard error, what happens from this level on: error, what handlers raise; info, a line \
        for each request; debug, also clients that have gone (default: only what handlers raise, as tracebacks)"
    parser.add_argument("--log-level", choices=("error", "info", "debug"), help=help)
    metrics.add_option(parser)
    help = f"bytes taken of a datagram, with --udp (default: {fastserve.UDPServer.max_packet_size}; the kernel drops \
        the rest)"
    parser.add_argument("--max-packet-size", metavar="N", type=positive, help=help)
    help = "bind with SO_REUSEADDR: for TCP, at once after an earlier server has stopped; for UDP, beside others that \
        do the same (default: yes for TCP, no for UDP)"
    parser.add_argument("--reuse-address", action=argparse.BooleanOptionalAction, help=help)
    listening.add_options(parser)
    tls.add_options(parser)
    parser.set_defaults(command=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM. Raises ``UsageError``."""
    is_unix = args.bind.startswith("unix:")
    for wrong, message in (
        (not args.udp and args.max_packet_size, "--max-packet-size is for datagrams: only with --udp"),
        (is_unix and args.reuse_address is not None, "--reuse-address is not for a Unix socket"),
        (is_unix and not hasattr(socket, "AF_UNIX"), "this system has no Unix sockets"),
        *listening.wrong(args),
        *limits.wrong(args),
        (args.max_workers and args.worker != "threadpool", "--max-workers is for --worker threadpool"),
        (args.worker == "fork" and not hasattr(os, "fork"), "--worker fork: this system has no fork"),
        (args.workers and not hasattr(os, "fork"), "--workers: this system has no fork"),
    ):
        if wrong:
            raise UsageError(message)
    if args.worker == "greenlet":
        require_greenlets()
    tls.check(args)
    watched = watchdog.interval()
    metrics.check(args)
    handler = find_handler(args.target)
    if args.grace or args.workers:
        handler = _closes_idle_clients(handler)
    try:
        server = _make_server(args, handler)
    except (OSError, ValueError) as error:
        where = listening.where(args)
        raise UsageError(f"cannot serve on {where}: {getattr(error, 'strerror', None) or error}") from None
    with server:
        with _metrics(server, args) as where_metrics_are:
            _serve_until_stopped(server, args, watchdog.watch(server, watched), where_metrics_are)
    return 0


def _closes_idle_clients(handler: Any) -> Any:
    """Return a handler which says when its clients are idle, where that is known: that of HTTP."""
    http = sys.modules.get("http.server")  # whose handler is derived from one of there has imported it
    if http is None or not (isinstance(handler, type) and issubclass(handler, http.BaseHTTPRequestHandler)):
        return handler
    if issubclass(handler, fastserve.DrainHTTPMixIn):
        return handler
    names = {name: getattr(handler, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(handler.__name__, (fastserve.DrainHTTPMixIn, handler), names)


def _metrics(server: fastserve.TCPServer, args: argparse.Namespace) -> contextlib.AbstractContextManager[str]:
    """Return what serves the metrics of a server, if they are asked for. Raises ``UsageError``."""
    if args.metrics is None:
        return contextlib.nullcontext("")
    try:
        family, address = _resolve(args.metrics, socket.SOCK_STREAM, "--metrics")
        return metrics.Scrapes(server, family, address, forks=bool(args.workers or args.worker == "fork"))
    except OSError as error:
        raise UsageError(f"cannot serve metrics on {args.metrics}: {error.strerror or error}") from None


def _resolve(bind: str, kind: socket.SocketKind, option: str = "--bind") -> tuple[int, Any]:
    """Return the address family and the address that ``--bind`` means. Raises ``OSError`` and ``UnicodeError`` too."""
    if bind.startswith("unix:") and option == "--bind":
        return socket.AF_UNIX, listening.unix_address(bind)
    host, colon, port = bind.rpartition(":")
    if not (colon and port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        nor = ", nor unix:PATH" if option == "--bind" else ""
        raise UsageError(f"{option} {bind!r} is not HOST:PORT, with a port from 0 to 65535{nor}")
    in_brackets = host.startswith("[") and host.endswith("]")
    if ":" in host and not in_brackets:
        raise UsageError(f"{option} {bind!r}: an IPv6 address goes in brackets, [IPV6]:PORT")
    family, host = (socket.AF_INET6, host[1:-1]) if in_brackets else (socket.AF_UNSPEC, host)
    found = socket.getaddrinfo(host or None, int(port), family, kind, flags=socket.AI_PASSIVE)
    # A name that has both kinds of address, such as localhost, means the same on every machine: IPv4.
    found_family, *_, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return found_family, address


def _make_server(args: argparse.Namespace, handler: Any) -> fastserve.TCPServer:
    """Return a listening server of the predefined class that the options name."""
    inherited = listening.inherited(args)
    if inherited is None:
        bind = listening.for_both_kinds_of_ip(args)
        family, address = _resolve(bind, socket.SOCK_DGRAM if args.udp else socket.SOCK_STREAM)
    else:
        family, address = inherited.family, None
    is_tcp = not args.udp and not _is_unix(family) and (inherited is None or inherited.type == socket.SOCK_STREAM)
    base = predefined(fastserve, args.worker, _is_unix(family), args.udp)
    attributes: dict[str, Any] = {
        "address_family": family,
        "max_packet_size": args.max_packet_size or fastserve.UDPServer.max_packet_size,
        "allow_reuse_address": not args.udp if args.reuse_address is None else args.reuse_address,
        # The end of the server waits for no thread whose client is idle, but for the children, which were told to end.
        "daemon_threads": True,
        "block_on_close": args.worker == "fork",
        "max_workers": args.max_workers,
        **listening.attributes(args, is_tcp),
        **limits.attributes(args),
    }
    bases: tuple[type, ...] = (base,)
    if args.tls_cert is not None:
        bases = (fastserve.TLSMixIn, *bases)
        attributes |= tls.attributes(args)
    if not args.udp:
        bases = (fastserve.LimitsMixIn, *bases)
    if args.log_level:
        logging = importlib.import_module("logging")
        logging.basicConfig(level=args.log_level.upper(), format=LOG_FORMAT)
        bases = (fastserve.LoggingMixIn, *bases)
    if args.metrics is not None:
        bases = (fastserve.StatsMixIn, *bases)
    if args.workers:
        bases = (fastserve.PreforkMixIn, *bases)
        attributes |= {"workers": args.workers, "graceful_timeout": float(args.grace or DEFAULT_GRACE)}
    elif args.grace:
        bases = (fastserve.DrainMixIn, *bases)
    server_class: type[fastserve.TCPServer] = type(base.__name__, bases, attributes)
    return server_class(address, handler) if inherited is None else server_class.from_socket(inherited, handler)


def _is_unix(family: int) -> bool:
    return family == getattr(socket, "AF_UNIX", None)


def _serve_until_stopped(server: Any, args: argparse.Namespace, poll_interval: float, where_metrics_are: str) -> None:
    """Print the address, and serve until SIGINT or SIGTERM."""
    drains = False  # whether requests that run may end first
    runs_handlers = args.worker in ("sync", "greenlet")  # in the main thread

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal drains
        if args.grace and signum == signal.SIGTERM and not drains:
            drains = True
            server.drain(args.grace)
            if runs_handlers and hasattr(signal, "setitimer"):
                # One that waits for something else than its client does not notice that it is cut off.
                signal.signal(signal.SIGALRM, stop)
                signal.setitimer(signal.ITIMER_REAL, args.grace)
            return
        if args.grace:
            server.drain(0)
        server.shutdown()
        if args.worker == "sync" or (args.worker == "greenlet" and _is_in_greenlet()):
            raise KeyboardInterrupt  # the loop may be in a handler that waits for its client, or for anything else

    if args.workers:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    else:
        for signum in STOPS:
            signal.signal(signum, stop)
        _leave_to_parent(stop, args.worker == "fork")
        if args.tls_cert is not None:
            tls.reload_on_hangup(server, in_thread=args.worker in ("sync", "greenlet"))
    with contextlib.suppress(KeyboardInterrupt):
        kinds = ("unix stream", "unix datagram") if _is_unix(server.address_family) else ("tcp", "udp")
        processes = f", {args.workers} process{'es' if args.workers > 1 else ''}" if args.workers else ""
        how = f"{kinds[args.udp]}{' with tls' if args.tls_cert is not None else ''}, {args.worker}{processes}"
        print(f"Serving {args.target} on {_address(server)} ({how}); Ctrl-C stops", flush=True)
        if where_metrics_are:
            print(f"Metrics on {where_metrics_are}", flush=True)
        listening.tell_systemd("READY=1")
        server.serve_forever(poll_interval)
    if drains and runs_handlers and hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)
    listening.tell_systemd("STOPPING=1")
    if drains:
        with contextlib.suppress(KeyboardInterrupt):
            server.drain()
    for signum in STOPS:
        signal.signal(signum, signal.SIG_DFL)  # a second one ends the process at once, whatever it waits for
    if args.grace and not args.workers and (cut := server.drain(0)):
        print(f"fastserve: {cut} request{'s were' if cut > 1 else ' was'} cut off", file=sys.stderr)
    for child in getattr(server, "active_children", None) or ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)  # it holds the listener open: left alone it would keep the address


def _leave_to_parent(stop: Any, forks: bool) -> None:
    """Have the signals that call ``stop`` end forked children at once: these have nothing to stop but themselves.

    A handler is called between two instructions of Python's. A child that is about to wait for its client would not
    come to the next one; nor are signals noted that come before the fork has made a process of its own of the child
    (``PyOS_AfterFork_Child``), unless they are blocked until then.

    :param forks: whether the children are the server's, which tells them to end. What ``stop`` raises when the signals
        are blocked no more would not come to the handler that forks: there it must raise nothing.
    """
    if not hasattr(os, "register_at_fork"):
        return  # nor is there a fork
    blocked = threading.local()

    def block() -> None:
        blocked.before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked.before)

    def forget() -> None:
        for signum in STOPS:
            if signal.getsignal(signum) is stop:
                signal.signal(signum, signal.SIG_DFL)

    os.register_at_fork(after_in_child=forget)
    if forks:
        os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=unblock)


def _is_in_greenlet() -> bool:
    """Return whether the calling code runs in a greenlet that is not the thread's own."""
    return importlib.import_module("greenlet").getcurrent().parent is not None


def _address(server: fastserve.TCPServer) -> str:
    """Return where ``server`` listens, in the form that ``--bind`` takes."""
    if isinstance(server.server_address, str | bytes):
        return listening.unix_name(server.server_address)
    return sockets.host_and_port(server.server_address)
