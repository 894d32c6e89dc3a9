"""TLS for ``fastserve serve``: its options, its certificates, and SIGHUP, which has them loaded again."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import threading
from queue import SimpleQueue
from types import FrameType
from typing import Any

from fastserve.cli.arguments import UsageError
from fastserve.tls_mixin import new_context

# By option, as argparse names it.
OPTIONS = ("tls_cert", "tls_key", "tls_client_ca")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to those of the command."""
    help = "serve with TLS: a file with the certificate chain, in PEM. SIGHUP has the files loaded again"
    parser.add_argument("--tls-cert", metavar="FILE", help=help)
    help = (
        "with --tls-cert: a file with the private key, in PEM, not encrypted (default: it is in the file of --tls-cert)"
    )
    parser.add_argument("--tls-key", metavar="FILE", help=help)
    help = "with --tls-cert: a file with certificates, in PEM; only clients with a certificate that one of these has \
        signed are served"
    parser.add_argument("--tls-client-ca", metavar="FILE", help=help)


def check(args: argparse.Namespace) -> None:
    """Raise ``UsageError`` if the options cannot be followed, or the files be used."""
    given = [name for name in OPTIONS if getattr(args, name) is not None]
    if not given:
        return
    if args.udp:
        raise UsageError(f"{_option(given[0])} is for connections: not with --udp")
    if args.tls_cert is None:
        raise UsageError(f"{_option(given[0])} needs --tls-cert")
    try:
        new_context(args.tls_cert, args.tls_key, args.tls_client_ca)
    except OSError as error:
        raise UsageError(f"cannot serve with TLS: {_reason(error)}") from None


def attributes(args: argparse.Namespace) -> dict[str, Any]:
    """Return those of a server with TLS, its mix-in among the keys of the options."""
    return {name: getattr(args, name) for name in OPTIONS}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _reason(error: OSError) -> str:
    """Return in one line what is wrong with a file, and with which one."""
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
        reason = "the key is not that of the certificate"
    else:
        reason = str(error.strerror).partition(" (_ssl.c:")[0]
    return ", ".join([reason, *getattr(error, "__notes__", ())])


def reload_on_hangup(server: Any, in_thread: bool) -> None:
    """Have SIGHUP load the files again, where there is such a signal. The main thread calls it.

    :param in_thread: whether a thread is to load them, and not the signal handler. It has to where the main thread
        handles requests: what a signal handler does with OpenSSL takes the place of the error of a call that it
        interrupts. Where the server forks there is to be no other thread.
    """
    if not hasattr(signal, "SIGHUP"):
        return
    pid = os.getpid()
    asked: SimpleQueue[None] = SimpleQueue()  # whose put() may be called in a signal handler

    def reload(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != pid:
            return  # a forked child, whose connection keeps what it has
        if in_thread:
            asked.put(None)
        else:
            _reload(server)

    def run() -> None:
        while True:
            asked.get()
            _reload(server)

    if in_thread:
        threading.Thread(target=run, name="certificates", daemon=True).start()
    signal.signal(signal.SIGHUP, reload)


def _reload(server: Any) -> None:
    """Load the files again, and tell it."""
    try:
        server.reload_certificates()
        said = "the certificates were loaded again"
    except OSError as error:
        said = f"the certificates were not loaded again, and stay what they were: {_reason(error)}"
    # Not print(): a signal may have come in between what the main thread writes. Nobody has to read it.
    with contextlib.suppress(OSError):
        os.write(2, f"fastserve: {said}\n".encode(errors="replace"))
