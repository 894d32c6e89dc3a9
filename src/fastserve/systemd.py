"""systemd(1): the sockets that it passes, and what it wants to be told.

Plain environment variables and datagrams, without libsystemd. Each function may be called on any system, and finds
nothing where systemd has not started the process, or not to this purpose.
"""

from __future__ import annotations

import os
import socket
from typing import Final

FIRST_DESCRIPTOR: Final = 3  # SD_LISTEN_FDS_START

_OF_SOCKETS: Final = ("LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES")


def listen_fds(unset_environment: bool = True) -> list[tuple[str, socket.socket]]:
    """Return the sockets that were passed to this process, each with its name: sd_listen_fds(3).

    They are the caller's from then on, to close or to give to :func:`fastserve.from_socket`, and no program that this
    process starts inherits them. A socket that was passed without a name is called ``"unknown"``. The list is empty
    where no sockets were passed, or not to this process.

    :param unset_environment: whether to remove the variables, also where this fails. Called again it finds nothing
        then; otherwise it makes further objects for the same descriptors.
    :raises ValueError: if the variables are malformed, or name a descriptor that is no open socket. The descriptors are
        left open.
    """
    try:
        return _passed_sockets()
    finally:
        if unset_environment:
            for name in _OF_SOCKETS:
                os.environ.pop(name, None)


def _passed_sockets() -> list[tuple[str, socket.socket]]:
    process, count = _number("LISTEN_PID"), _number("LISTEN_FDS")
    if process is None or count is None or process != os.getpid():
        return []
    text = os.environ.get("LISTEN_FDNAMES")
    names = None if text is None else text.split(":")
    if names is not None and len(names) != count:
        raise ValueError(f"LISTEN_FDNAMES={text!r} has not as many names as LISTEN_FDS={count} says")
    found: list[tuple[str, socket.socket]] = []
    try:
        for number in range(count):
            descriptor, name = FIRST_DESCRIPTOR + number, "unknown" if names is None else names[number]
            try:
                os.set_inheritable(descriptor, False)
                found.append((name, socket.socket(fileno=descriptor)))
            except OSError as error:
                raise ValueError(f"LISTEN_FDS={count}: descriptor {descriptor}, {name!r}: {error.strerror}") from None
    except BaseException:
        for _, listener in found:
            listener.detach()
        raise
    return found


def notify(*assignments: str) -> bool:
    """Tell the service manager how things are: sd_notify(3). Return whether there is one that wants to be told.

    ``notify("READY=1", "STATUS=serving")`` says that a service of ``Type=notify`` has started. Others are
    ``"STOPPING=1"`` and ``"WATCHDOG=1"``. Any thread may call it; it may wait for room in the manager's queue.

    :param assignments: each a line ``NAME=VALUE``.
    :raises ValueError: if one is none, or if ``NOTIFY_SOCKET`` is no address of a Unix socket.
    :raises OSError: if the manager cannot be reached.
    """
    for assignment in assignments:
        name, equals, _ = assignment.partition("=")
        if not (name and equals) or "\n" in assignment:
            raise ValueError(f"{assignment!r} is not a line NAME=VALUE")
    if not assignments:
        raise ValueError("there is nothing to tell")
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    if address[0] not in "/@" or len(address) < 2:
        raise ValueError(f"NOTIFY_SOCKET={address!r} is neither an absolute path nor @ and an abstract name")
    if address[0] == "@":
        address = f"\0{address[1:]}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(None)  # whatever socket.setdefaulttimeout() says
        manager.sendto(os.fsencode("\n".join(assignments)), address)
    return True


def watchdog_interval() -> float | None:
    """Return the seconds within which ``notify("WATCHDOG=1")`` is to be called again: sd_watchdog_enabled(3).

    It is best called after half of them. ``None`` says that nobody watches this process.

    :raises ValueError: if ``WATCHDOG_USEC`` or ``WATCHDOG_PID`` is malformed.
    """
    microseconds, process = _number("WATCHDOG_USEC"), _number("WATCHDOG_PID")
    if microseconds is None or process not in (None, os.getpid()):
        return None
    return microseconds / 1_000_000


def _number(name: str) -> int | None:
    """Return the positive number in a variable of the environment, ``None`` if there is none."""
    text = os.environ.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) > 0):
        raise ValueError(f"{name}={text!r} is not a positive number")
    return int(text)
