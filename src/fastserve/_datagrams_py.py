"""The Python twin of the datagrams: the same names as ``_datagrams``, and the source of their types."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

from fastserve._annotations import Any, Final

# A datagram as get_request() returns it: ((data, socket), client_address).
Request = tuple[tuple[bytes, socket.socket], Any]

MOST: Final = 64  # replies that are gathered
LONGEST: Final = 65507  # bytes of a datagram over IPv4
ROOM: Final = 104  # bytes of the name of a Unix socket, on the system that has the fewest

_DONT_WAIT: Final[int] = getattr(socket, "MSG_DONTWAIT", 0)


class Receiver:
    """Takes datagrams off a socket, several at a time. One thread uses it.

    :ivar truncated: how many datagrams were longer than asked for, and lost their end.
    :ivar failed: an error that came after datagrams, which were received all the same. The caller resets it.
    """

    def __init__(self) -> None:
        self.truncated = 0
        self.failed: OSError | None = None

    def receive(self, listener: socket.socket, target: socket.socket, count: int, size: int) -> list[Request]:
        """Return at most ``count`` datagrams that have arrived, without waiting, each cut at ``size`` bytes.

        :param listener: a plain socket of the family ``AF_INET``, ``AF_INET6`` or ``AF_UNIX``.
        :param target: the socket that stands in the requests, to answer with.
        :raises OSError: what recvfrom(2) says, if there was no datagram before it.
        """
        received: list[Request] = []
        if listener.gettimeout():
            count = 1  # with a timeout the second call would wait for its end, whatever the flag says
        while len(received) < count:
            try:
                data, _, flags, address = listener.recvmsg(size, 0, _DONT_WAIT)
            except BlockingIOError:
                break
            except OSError as error:
                if not received:
                    raise
                self.failed = error
                break
            if flags & socket.MSG_TRUNC:
                self.truncated += 1
            received.append(((data, target), address))
        return received

    def close(self) -> None:
        """Release the buffers. They are made again when needed."""


class Turns:
    """The turns of a loop over the datagrams that are kept.

    :param flag: the descriptor that stands for ``_BaseServer__shutdown_request`` in the class of a server.
    :param own: the methods by name that need not be called, because it is known what they do.
    :param own_of_handlers: the like of handler classes, as ``OWN_OF_HANDLERS`` in ``handlers`` has them.
    """

    def __init__(self, flag: object, own: Mapping[str, Callable[..., Any]], own_of_handlers: tuple[Any, ...]) -> None:
        pass

    def run(self, server: Any, loop: Any, kept: deque[Request]) -> None:
        """Handle what is kept, one after the other, until nothing is left or the loop is to stop or held.

        Between two of them ``service_actions()`` is called. The loop's thread calls it; what a handler raises
        beyond ``Exception`` comes out of it, and the rest is still kept.
        """
        while True:
            server._handle_request_noblock()
            if not kept:
                return
            server.service_actions()
            if loop.stopping or loop.held or server._BaseServer__shutdown_request:
                return


class Gatherer:
    """Gathers the replies of one batch, and sends them together.

    It gathers between :meth:`begin` and :meth:`end` what the thread that called :meth:`begin` sends to a numeric
    address. Everything else is sent at once, after what was gathered.

    :param listener: a plain socket of the family ``AF_INET``, ``AF_INET6`` or ``AF_UNIX``.
    :param report: called with the error, the data and the address of a reply that could not be sent.
    """

    def __init__(self, listener: socket.socket, report: Callable[[OSError, bytes, Any], None]) -> None:
        self._listener = listener
        self._report = report
        self._replies: deque[tuple[bytes, Any]] = deque()
        self._thread = 0  # that which gathers, or 0
        self._flushing = False

    def begin(self) -> None:
        """Gather from now on what the calling thread sends, unless another one gathers already."""
        if self._thread == 0:
            self._thread = threading.get_ident()

    def end(self) -> None:
        """Send what was gathered, and gather no more. In another thread it does nothing."""
        if self._thread != threading.get_ident():
            return
        try:
            self.flush()
        except BaseException:
            self.flush()  # a handler of signals or errors has raised; the other replies go out all the same
            raise
        finally:
            self._thread = 0

    def forget(self) -> None:
        """Drop what was gathered: in a forked child, whose parent sends it."""
        self._thread = 0
        self._flushing = False
        self._replies = deque()

    def sendto(self, data: Any, flags: Any, /, *address: Any) -> int:
        """Send a datagram as ``socket.sendto`` does, now or with the others; return its size in bytes.

        :raises OSError: only if it is sent at once; else ``report`` gets the error.
        """
        if self._flushing or self._thread != threading.get_ident():
            return self._listener.sendto(data, flags, *address)
        if address or not isinstance(data, (bytes, bytearray)) or len(data) > LONGEST or not self._is_known(flags):
            self.flush()
            return self._listener.sendto(data, flags, *address)
        if len(self._replies) == MOST:
            self.flush()
        self._replies.append((bytes(data), flags))
        return len(data)

    def _is_known(self, address: Any) -> bool:
        """Return whether it is an address of the form that a datagram comes from, which cannot be refused later on."""
        family = self._listener.family
        if family not in (socket.AF_INET, socket.AF_INET6):
            if type(address) is str:
                name = os.fsencode(address)
                return 0 < len(name) < ROOM and b"\0" not in name
            return type(address) is bytes and address.startswith(b"\0") and len(address) <= ROOM
        if type(address) is not tuple or not address or type(address[0]) is not str:
            return False
        limits = (0xFFFF,) if family == socket.AF_INET else (0xFFFF, 0xFFFFF, 0xFFFFFFFF)
        numbers = address[1:]
        if len(numbers) != len(limits) or not all(
            type(number) is int and 0 <= number <= limit for number, limit in zip(numbers, limits, strict=True)
        ):
            return False
        try:
            socket.inet_pton(family, address[0])
        except (OSError, ValueError):
            return False  # a name, which is to be looked up
        return True

    def flush(self) -> None:
        """Send what was gathered, waiting while the socket takes no more. In another thread it does nothing.

        Raises what a signal handler or ``report`` raises; the rest is still gathered then.
        """
        if not self._replies or self._flushing or self._thread != threading.get_ident():
            return
        self._flushing = True  # what a handler of signals or errors sends meanwhile goes out at once
        replies = self._replies
        try:
            while replies:
                data, address = replies[0]
                try:
                    self._listener.sendto(data, address)
                except (BlockingIOError, TimeoutError):
                    # select() says of a Unix socket that it is writable while the queue of the peer is full.
                    time.sleep(0.001)
                    continue
                except OSError as error:
                    replies.popleft()
                    self._report(error, data, address)
                else:
                    replies.popleft()
        finally:
            self._flushing = False
