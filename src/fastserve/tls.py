"""Connections with TLS, and who does their handshake: behind ``tls_mixin``, and for the stdlib's recipe.

The recipe is ``server.socket = context.wrap_socket(server.socket, server_side=True)``. ``accept()`` of such a listener
does the handshake too, so that in the stdlib one silent client stalls all others. Here the loop accepts only, and
whoever handles the request does the handshake first: the thread, the greenlet, the forked child. This module is
imported by every server; the module ``ssl`` is imported with the first such listener.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
from collections.abc import Callable

from fastserve import _backend
from fastserve._annotations import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from typing import TypeVar

    _Method = TypeVar("_Method", bound=Callable[..., Any])

_MARK: Final = "_fastserve_failed_handshake"

HANDSHAKE_TIMEOUT: Final = 10.0  # seconds, where a server says nothing else

# The key in the __dict__ of a connection whose handshake is to be done: how many seconds it may take.
HANDSHAKE_LIMIT: Final = "_fastserve_handshake_timeout"

# Likewise, of one whose handshake has failed.
FAILED_HANDSHAKE: Final = "_fastserve_handshake_has_failed"

# The classes of connections whose handshake is to be done.
unfinished: Final[set[type]] = set()

# The methods that do it before they handle a request, by the names under which a server has them.
_finishers: Final[list[tuple[str, Callable[..., Any]]]] = []


def __getattr__(name: str) -> Any:
    if name == "Connection":
        from fastserve import _tls

        return _tls.Connection
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def finishes_handshakes(method: _Method) -> _Method:
    """Decorate the method of a worker model that calls :func:`finish_handshake`."""
    _finishers.append((method.__name__, method))
    return method


def is_listener(listener: object) -> bool:
    """Return whether ``listener`` is an ``ssl.SSLSocket`` whose ``accept()`` does what the stdlib's does.

    It is not where the class of the socket or of its connections (``SSLContext.sslsocket_class``) is derived, or a
    method that takes part was overridden or replaced: what they do then is not known.
    """
    if type(listener).__module__ != "ssl" or _backend.monkey_patched():
        return False
    from fastserve import _tls

    return _tls.is_plain_listener(listener)


def accept(server: Any, cooperative: bool) -> tuple[Any, Any]:
    """Accept a connection, without its handshake if somebody else will do that.

    A method ``_before_handshake`` of the server is called with the connection and its address when the handshake is
    next, by whoever does it. An ``OSError`` that it raises is a failed handshake.

    :param server: one for whose ``socket`` :func:`is_listener` is true.
    :param cooperative: whether the connection is to wait in the hub of the calling thread.
    :raises OSError: if there is none, or it has been given up already.
    """
    listener = server.socket
    if not cooperative and not (listener.do_handshake_on_connect and _has_finisher(server)):
        return listener.accept()  # type: ignore[no-any-return]
    from fastserve import _tls

    plain, address = socket.socket.accept(listener)
    request = _without_handshake(plain, listener.context, listener.suppress_ragged_eofs)
    request.do_handshake_on_connect = listener.do_handshake_on_connect
    if cooperative:
        _tls.make_cooperative(request)
    if listener.do_handshake_on_connect:
        _tls.postpone_handshake(request, _handshake_timeout(server), _before_handshake(server, address))
    return request, address


def wrap(server: Any, plain: Any, client_address: Any, context: Any, cooperative: bool) -> Any:
    """Make an accepted connection one with TLS, whose handshake is to be done, by who calls :func:`is_ready` first.

    A method ``_before_handshake`` of the server is called as by :func:`accept`.

    :param plain: the connection, which is closed.
    :param context: an ``ssl.SSLContext``, maybe of a derived class.
    :param cooperative: whether the connection is to wait in the hub of the calling thread.
    :raises ConnectionAbortedError: if it has been given up already.
    """
    from fastserve import _tls

    request = _without_handshake(plain, context, True)
    request.do_handshake_on_connect = True
    if cooperative:
        make_cooperative(request)
    _tls.postpone_handshake(request, _handshake_timeout(server), _before_handshake(server, client_address))
    return request


def _without_handshake(plain: Any, context: Any, suppress_ragged_eofs: bool) -> Any:
    """Return a connection with TLS in the place of ``plain``, before the handshake."""
    try:
        return context.wrap_socket(
            plain, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=suppress_ragged_eofs
        )
    except OSError as error:
        # Whatever it is, it is this connection that has failed, and not the listener.
        raise aborted() from error
    finally:
        plain.close()  # it has given up its descriptor, unless that failed


def aborted() -> ConnectionAbortedError:
    """Return what tells the loop that a connection has failed."""
    return ConnectionAbortedError(errno.ECONNABORTED, os.strerror(errno.ECONNABORTED))


def _handshake_timeout(server: Any) -> float | None:
    timeout: float | None = getattr(server, "handshake_timeout", HANDSHAKE_TIMEOUT)
    return timeout


def _before_handshake(server: Any, client_address: Any) -> Callable[[Any], object] | None:
    before = getattr(server, "_before_handshake", None)
    return before and functools.partial(before, client_address=client_address)


def _has_finisher(server: object) -> bool:
    return any(vars(cls).get(name) is method for cls in type(server).__mro__ for name, method in _finishers)


def finish_handshake(request: Any) -> bool:
    """Do the handshake of a connection that is one of :data:`unfinished`; return whether it succeeded.

    A client that fails, or takes too long, is nobody's error: nothing is raised or reported.
    """
    return _succeeds(request.finish_handshake)


def is_ready(request: Any) -> bool:
    """Return whether a request may be handled. A handshake that :func:`wrap` has left to do is done first."""
    if type(request) in unfinished:
        return finish_handshake(request)
    if HANDSHAKE_LIMIT not in getattr(request, "__dict__", ()):
        return True
    from fastserve import _tls

    return _succeeds(_tls.handshake_in_time, request)


def _succeeds(handshake: Callable[..., object], *arguments: Any) -> bool:
    try:
        handshake(*arguments)
    except OSError:
        return False
    return True


def mark(error: OSError) -> None:
    """Note that ``error`` is a failed handshake, raised by the first call that needed it."""
    vars(error)[_MARK] = True


def is_failed_handshake(error: OSError) -> bool:
    """Return whether ``error`` was marked: raised in ``verify_request`` it must not end the loop, nor be reported."""
    return _MARK in vars(error)


def make_cooperative(request: Any) -> None:
    """Let a connection that an override of ``get_request`` has wrapped itself wait in the hub from now on."""
    from fastserve import _tls

    if not _backend.monkey_patched():
        _tls.make_cooperative(request)


if _backend.turns is not None:
    _backend.turns.know_handshakes(unfinished, finish_handshake, is_failed_handshake)
