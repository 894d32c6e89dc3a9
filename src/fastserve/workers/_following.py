"""What a mix-in of ours that brings the loop with it shares with the others: the way to what follows it."""

from __future__ import annotations

import threading
from types import MethodType
from typing import Any

from fastserve._loop import IS_SHUT_DOWN, new_event, quiet_service_actions
from fastserve._stdlib import socketserver
from fastserve.server import BaseServer


def is_stdlib(function: Any) -> bool:
    """Return whether ``socketserver`` itself defines a function."""
    return getattr(function, "__globals__", None) is vars(socketserver)


def following(mixin: type, server: Any, name: str) -> Any:
    """Return the bound method of the loop that comes after the mix-in's, with ours in the place of the stdlib's."""
    method = getattr(super(mixin, server), name)
    return MethodType(getattr(BaseServer, name), server) if is_stdlib(getattr(method, "__func__", None)) else method


class IsShutDown:
    """``_BaseServer__is_shut_down``: the event that a server of the stdlib makes for it becomes one of ours.

    Ours knows whether it is going to be set, so that ``shutdown()`` does not wait for what never comes.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._mixin = owner

    def __get__(self, server: Any, owner: type | None = None) -> Any:
        if server is not None and IS_SHUT_DOWN in server.__dict__:
            return server.__dict__[IS_SHUT_DOWN]
        return getattr(super(self._mixin, server or owner), IS_SHUT_DOWN)

    def __set__(self, server: Any, value: Any) -> None:
        is_first = IS_SHUT_DOWN not in server.__dict__ and type(value) is threading.Event and not value.is_set()
        server.__dict__[IS_SHUT_DOWN] = new_event() if is_first else value

    def __delete__(self, server: Any) -> None:
        if IS_SHUT_DOWN not in server.__dict__:
            raise AttributeError(IS_SHUT_DOWN)
        del server.__dict__[IS_SHUT_DOWN]


if is_stdlib(socketserver.BaseServer.service_actions):
    # Nor does that of the stdlib, over which such a mix-in may stand, do anything that the loop would have to tick for.
    quiet_service_actions.setdefault(socketserver.BaseServer.service_actions, None)
