"""What ``fastserve serve`` listens on: options of the listener, and sockets that come from outside."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from typing import Any, Final

from fastserve import systemd
from fastserve.cli.arguments import UsageError

# Idle seconds, seconds between probes, probes: a client that has gone without a word is noticed after two minutes. The
# system's own two hours are longer than the firewalls and balancers in between remember a connection.
KEEPALIVE: Final = (60, 15, 4)


def add_address(parser: argparse.ArgumentParser) -> None:
    """Add the options of which one says where the server listens."""
    group = parser.add_mutually_exclusive_group()
    help = (
        "HOST:PORT, [IPV6]:PORT, unix:PATH, or unix:@NAME for an abstract address (default: %(default)s). Port 0 lets \
        the kernel choose; an empty HOST means all IPv4 interfaces. systemd or systemd:NAME is the socket that systemd \
        has passed, the only one or that of the name"
    )
    group.add_argument("--bind", metavar="ADDRESS", default="127.0.0.1:8000", help=help)
    help = "serve the socket that this process has inherited as descriptor N"
    group.add_argument("--fd", metavar="N", type=_descriptor, help=help)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how the listener is made."""
    help = "take IPv4 too, with --bind [IPV6]:PORT; with an empty HOST, all interfaces of both"
    parser.add_argument("--dual-stack", action="store_true", help=help)
    help = "permissions of the file of a Unix socket, in octal, such as 660 (default: what the umask leaves)"
    parser.add_argument("--socket-mode", metavar="MODE", type=_mode, help=help)
    help = "who owns the file of a Unix socket: names or numbers"
    parser.add_argument("--socket-owner", metavar="USER[:GROUP]", type=_owner, help=help)
    help = f"TCP connections with SO_KEEPALIVE, and a probe after {KEEPALIVE[0]} idle seconds (default: yes)"
    parser.add_argument("--keepalive", action=argparse.BooleanOptionalAction, help=help)
    help = "TCP connections with TCP_NODELAY (default: yes)"
    parser.add_argument("--nodelay", action=argparse.BooleanOptionalAction, help=help)


def _descriptor(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text[:11]) < 2**31):
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of a descriptor")
    return int(text)


def _mode(text: str) -> int:
    if not (0 < len(text) <= 4 and set(text) <= set("01234567") and int(text, 8) <= 0o777):
        raise argparse.ArgumentTypeError(f"{text!r} is not an octal number from 0 to 777")
    return int(text, 8)


def _owner(text: str) -> tuple[int | str | None, int | str | None]:
    user, _, group = text.partition(":")
    if not (user or group):
        raise argparse.ArgumentTypeError(f"{text!r} is not USER, USER:GROUP or :GROUP")
    return _name(user), _name(group)


def _name(text: str) -> int | str | None:
    return int(text) if text.isascii() and text.isdigit() else text or None


def is_from_outside(args: argparse.Namespace) -> bool:
    """Return whether the server is to serve a socket that it does not make."""
    return args.fd is not None or args.bind == "systemd" or args.bind.startswith("systemd:")


def wrong(args: argparse.Namespace) -> list[tuple[object, str]]:
    """Return what may be wrong with the options, each with the message for it."""
    has_file = args.bind.startswith("unix:") and not args.bind.startswith("unix:@")
    is_tcp = not args.udp and not args.bind.startswith("unix:")
    for_file = args.socket_mode is not None or args.socket_owner is not None
    for_bind = args.dual_stack or for_file or args.reuse_address is not None
    return [
        (args.bind == "unix:", "--bind unix:PATH lacks the path"),
        (args.bind == "unix:@", "--bind unix:@NAME lacks the name"),
        (args.bind == "systemd:", "--bind systemd:NAME lacks the name"),
        (
            is_from_outside(args) and for_bind,
            "--dual-stack, --socket-mode, --socket-owner and --reuse-address are for a socket that is made here",
        ),
        (args.dual_stack and args.bind[:1] not in "[:", "--dual-stack is for --bind [IPV6]:PORT and --bind :PORT"),
        (for_file and not has_file, "--socket-mode and --socket-owner are for --bind unix:PATH"),
        ((args.keepalive, args.nodelay) != (None, None) and not is_tcp, "--keepalive and --nodelay are for TCP"),
    ]


def where(args: argparse.Namespace) -> str:
    """Return the name of the place to listen on, for a message."""
    return args.bind if args.fd is None else f"descriptor {args.fd}"


def inherited(args: argparse.Namespace) -> socket.socket | None:
    """Return the socket from outside that the options name, ``None`` for none. Raises ``UsageError`` without it."""
    if not is_from_outside(args):
        return None
    if args.fd is not None:
        try:
            os.set_inheritable(args.fd, False)  # by what a handler starts
            return socket.socket(fileno=args.fd)
        except OSError as error:
            raise UsageError(f"--fd {args.fd}: {error.strerror}") from None
    try:
        passed = systemd.listen_fds()
    except ValueError as error:
        raise UsageError(f"--bind {args.bind}: {error}") from None
    if not passed:
        raise UsageError(f"--bind {args.bind}: systemd has passed no socket to this process")
    _, _, name = args.bind.partition(":")
    chosen = [listener for given, listener in passed if name in ("", given)]
    if len(chosen) != 1:
        names = ", ".join(given for given, _ in passed)
        raise UsageError(f"--bind {args.bind} means {len(chosen)} of the sockets that systemd has passed: {names}")
    for _, listener in passed:
        if listener is not chosen[0]:
            listener.close()
    return chosen[0]


def for_both_kinds_of_ip(args: argparse.Namespace) -> str:
    """Return ``--bind``, where no host means all interfaces of IPv6 if ``--dual-stack`` asks for both kinds."""
    bind: str = args.bind
    return f"[::]{bind}" if args.dual_stack and bind.startswith(":") else bind


def attributes(args: argparse.Namespace, is_tcp: bool) -> dict[str, Any]:
    """Return the attributes of the server class that the options mean."""
    return {
        "dual_stack": args.dual_stack,
        "socket_mode": args.socket_mode,
        "socket_owner": args.socket_owner,
        "keepalive": KEEPALIVE if (is_tcp if args.keepalive is None else args.keepalive) else None,
        "tcp_nodelay": is_tcp if args.nodelay is None else args.nodelay,
        "unlink_on_close": True,
    }


def unix_address(bind: str) -> str:
    """Return the path, or the abstract address, that ``unix:PATH`` or ``unix:@NAME`` means."""
    path = bind.removeprefix("unix:")
    return f"\0{path[1:]}" if path.startswith("@") else path


def unix_name(address: str | bytes) -> str:
    """Return the address of a Unix socket in the form that ``--bind`` takes."""
    text = os.fsdecode(address)
    return f"unix:@{text[1:]}" if text.startswith("\0") else f"unix:{text}"


def tell_systemd(assignment: str) -> None:
    """Tell systemd, if it wants to be told. That it cannot be reached is reported, and ends nothing."""
    try:
        systemd.notify(assignment)
    except (OSError, ValueError) as error:
        print(f"fastserve serve: cannot tell systemd {assignment}: {error}", file=sys.stderr, flush=True)
