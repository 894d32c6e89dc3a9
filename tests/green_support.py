"""What the tests of connections that wait in a hub share."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

from fastserve import _backend
from hub_support import running
from support import LIMIT

BIG = 6_000_000  # bytes: more than the kernel keeps between two sockets


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        return listener.accept()[0], client


PAIRS: dict[str, Callable[[], tuple[socket.socket, socket.socket]]] = {"tcp": tcp_pair, "unix": socket.socketpair}


def told(error: BaseException) -> Any:
    return type(error), getattr(error, "errno", None)


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a call returns, or the class and the errno of what it raises."""
    try:
        return function(*arguments)
    except Exception as error:
        return told(error)


def exchange(pair: str, handle: Callable[[Any], Any], client: Callable[[Any], Any], green: bool) -> Any:
    """Run a handler on one end of a connection, and a client in a thread on the other; return what both return."""
    ours, theirs = PAIRS[pair]()
    theirs.settimeout(LIMIT)
    results: dict[str, Any] = {}

    def run(name: str, function: Callable[[Any], Any], sock: socket.socket) -> None:
        try:
            results[name] = function(sock)
        except BaseException as error:
            results[name] = told(error)
        finally:
            sock.close()

    thread = threading.Thread(target=run, args=("client", client, theirs))
    if not green:
        server = threading.Thread(target=run, args=("handler", handle, ours))
        thread.start()
        server.start()
        server.join(LIMIT)
        assert not server.is_alive()
    else:
        with running() as hub:
            _backend.green().adopt(ours)
            thread.start()
            hub.start(run, "handler", handle, ours)
            assert hub.drain(LIMIT)
    thread.join(LIMIT)
    assert not thread.is_alive()
    return results["handler"], results["client"]


def read_all(sock: Any) -> bytes:
    received = []
    while data := sock.recv(65536):
        received.append(data)
    return b"".join(received)
