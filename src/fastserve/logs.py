"""What a server does, told to :mod:`logging` instead of standard error: opt-in, by a mix-in."""

from __future__ import annotations

import select
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from fastserve._order import BeforeServer
from fastserve.sockets import host_and_port

if TYPE_CHECKING:
    import logging

LOGGER: Final = "fastserve"

# What a call of a connection raises whose client has gone, or does not go on.
_OF_CLIENTS: Final = (ConnectionError, TimeoutError)


class LoggingMixIn(BeforeServer):
    """Tell the logger ``fastserve`` what happens: ``class Server(LoggingMixIn, ThreadingTCPServer)``.

    It is named first, goes with every worker model, with :class:`PreforkMixIn`, with datagrams, and over the servers of
    the stdlib. The worker's thread calls its methods.

    - ``ERROR``, with the traceback: what a handler has raised, instead of the lines that
      :meth:`BaseServer.handle_error` prints.
    - ``INFO``: a line for each request when it has been handled: the client, the seconds that it took, and what came
      out of it, ``ok`` or the name of an exception.
    - ``DEBUG``, without traceback: a handler that was ended by its client, which has closed or reset the connection, or
      has let a timeout of it pass.

    :cvar logger: another logger to be told; ``None``, the default, is ``logging.getLogger("fastserve")``.
    """

    logger: logging.Logger | None = None

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Handle the request, and tell how it went."""
        logger = _logger_of(self)
        if not logger.isEnabledFor(20):  # logging.INFO
            super().finish_request(request, client_address)  # type: ignore[misc]
            return
        begun = time.monotonic()
        outcome = "ok"
        try:
            super().finish_request(request, client_address)  # type: ignore[misc]
        except BaseException as error:
            outcome = type(error).__name__
            raise
        finally:
            logger.info("%s %s %.6f s", _name(client_address), outcome, time.monotonic() - begun)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tell what a handler has raised. It is called while the exception is handled; may be overridden."""
        logger = _logger_of(self)
        error = sys.exc_info()[1]
        if isinstance(error, _OF_CLIENTS) and is_to_blame(request, error):
            logger.debug("%s has ended its request: %r", _name(client_address), error)
        else:
            logger.error("request of %s", _name(client_address), exc_info=True)


def _logger_of(server: Any) -> logging.Logger:
    if server.logger is not None:
        return server.logger  # type: ignore[no-any-return]
    import logging  # a fifth of the import of this package, and mostly not needed

    return logging.getLogger(LOGGER)


def _name(client_address: Any) -> str:
    """Return an address as it is written."""
    if isinstance(client_address, tuple) and len(client_address) >= 2:
        return host_and_port(client_address)
    return repr(client_address) if client_address else "a client without a name"


def is_to_blame(request: Any, error: BaseException) -> bool:
    """Return whether it is the client that has gone: a handler may have other connections that break."""
    if isinstance(error, TimeoutError):
        gettimeout = getattr(request, "gettimeout", None)
        return gettimeout is not None and gettimeout() is not None
    if not hasattr(select, "poll"):
        return True
    try:
        descriptor = request.fileno()
        if descriptor < 0:
            return True  # closed already
        poll = select.poll()
        poll.register(descriptor, 0)
        return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))
    except (AttributeError, OSError):
        return False  # a datagram has no connection that could break
