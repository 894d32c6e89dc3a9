"""The socket that datagram handlers get where replies are gathered: ``gather_replies``."""

from __future__ import annotations

import socket
import weakref
from collections.abc import Callable

from fastserve import _backend, _datagrams_py
from fastserve._annotations import Any


class GatheringSocket(socket.socket):
    """Stands for the listener of a datagram server: its ``sendto`` gathers, everything else is the listener's.

    It has no descriptor of its own, and is closed when the listener is. Whatever else is called first sends what
    was gathered, so that nothing overtakes it. Any thread may use it.
    """

    _gatherer: _datagrams_py.Gatherer

    def __init__(self, server: Any, listener: socket.socket) -> None:
        # Not super().__init__(): it would make a descriptor.
        self._listener = listener
        reference = weakref.ref(server)

        def report(error: OSError, data: bytes, address: Any) -> None:
            found = reference()
            try:
                raise error
            except OSError:
                if found is None:
                    raise  # nobody is left to tell
                found.handle_error((data, listener), address)

        self._gatherer = _backend.datagrams.Gatherer(listener, report)
        # On the instance, where it is found without a call of Python.
        self.sendto = self._gatherer.sendto  # type: ignore[method-assign]

    def __repr__(self) -> str:
        return f"<GatheringSocket of {self._listener!r}>"

    def __enter__(self) -> GatheringSocket:
        self._gatherer.flush()
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


def _passing_on(name: str) -> Callable[..., Any]:
    def method(self: GatheringSocket, *args: Any, **kwargs: Any) -> Any:
        self._gatherer.flush()
        return getattr(self._listener, name)(*args, **kwargs)

    method.__name__ = name
    method.__qualname__ = f"GatheringSocket.{name}"
    method.__doc__ = f"Send what was gathered, and call ``{name}`` of the listener."
    return method


def _passing_on_value(name: str) -> property:
    return property(lambda self: getattr(self._listener, name), doc=f"``{name}`` of the listener.")


def _pass_on_everything() -> None:
    """Define all public names of a socket that are not defined above."""
    for name in dir(socket.socket):
        if name.startswith("_") or name == "sendto":
            continue
        passing_on = _passing_on if callable(getattr(socket.socket, name)) else _passing_on_value
        setattr(GatheringSocket, name, passing_on(name))


_pass_on_everything()


def gathering_socket(server: Any, listener: socket.socket) -> GatheringSocket | None:
    """Return a new socket that gathers the replies to ``listener``, or ``None`` if it is connected.

    On a connected socket an error belongs to an earlier datagram, and sendmmsg(2) would lose it.
    """
    try:
        listener.getpeername()
    except OSError:
        return GatheringSocket(server, listener)
    return None
