"""Handlers of datagrams: whatever a class or a handler overrides is called, however the others are made."""

from __future__ import annotations

import abc
import functools
import io
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from test_datagrams import ADDRESS, client_of, send_numbers, stop_after


def serve_three(module: ModuleType, handler: Any, log: list[Any], **attributes: Any) -> tuple[list[Any], list[bytes]]:
    """Serve three datagrams with a handler, which stops the server at the third; return the log and the replies."""
    with module.UDPServer(ADDRESS, handler) as server, client_of(server) as client:
        vars(server).update(attributes)
        send_numbers(client, 3)
        server.serve_forever(30)
        server.socket.sendto(b"end", client.getsockname())  # comes after all replies
        replies = []
        while (reply := client.recv(100)) != b"end":
            replies.append(reply)
        return log, replies


def logging(log: list[Any], name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *arguments: Any) -> Any:
        log.append(name)
        return original(self, *arguments)

    return method


def answering(module: ModuleType, log: list[Any], then: Callable[[Any], object] = lambda handler: None) -> Any:
    """Return a handler class that sends back what it reads from ``rfile``, and calls ``then(handler)``."""

    class Handler(module.DatagramRequestHandler):
        def handle(self) -> None:
            log.append("handle")
            data = self.rfile.read()
            self.wfile.write(b"<" + data + b">")
            if data == b"2":
                self.server._BaseServer__shutdown_request = True
            then(self)

    return Handler


ANSWERS = [b"<0>", b"<1>", b"<2>"]


@pytest.mark.parametrize("gather", [False, True])
def test_a_handler_has_the_attributes_of_the_stdlib_in_their_order(module: ModuleType, gather: bool) -> None:
    seen: list[Any] = []

    def look(handler: Any) -> None:
        attributes = vars(handler)
        seen.append(list(attributes))
        assert handler.request == (handler.packet, handler.socket)
        assert type(handler.rfile) is type(handler.wfile) is io.BytesIO
        assert handler.rfile is not handler.wfile
        assert handler.rfile.tell() == len(handler.packet)
        assert not vars(handler.rfile)
        assert not vars(handler.wfile)
        handler.rfile.seek(0)
        handler.rfile.write(b"something else")
        assert handler.packet == handler.request[0] != b"something else"

    log, replies = serve_three(module, answering(module, [], look), seen, gather_replies=gather)
    assert log == [["request", "client_address", "server", "packet", "socket", "rfile", "wfile"]] * 3
    assert replies == ANSWERS


@pytest.mark.parametrize("name", ["__init__", "setup", "handle", "finish"])
@pytest.mark.parametrize("where", ["class", "base", "mixin"])
def test_what_a_handler_class_overrides_is_called(module: ModuleType, name: str, where: str) -> None:
    log: list[Any] = []
    Base = answering(module, [])
    Handler = type("Handler", (Base,), {})
    if where == "mixin":
        Handler = type("Handler", (type("Mixin", (), {name: logging(log, name, getattr(Base, name))}), Base), {})
    else:
        owner = Base if where == "base" else Handler
        setattr(owner, name, logging(log, name, getattr(owner, name)))
    assert serve_three(module, Handler, log) == ([name] * 3, ANSWERS)


@pytest.mark.parametrize("name", ["__init__", "setup", "finish"])
@pytest.mark.parametrize("base", ["BaseRequestHandler", "DatagramRequestHandler"])
def test_what_a_handler_overrides_in_a_base_is_called_for_the_next_datagram(
    module: ModuleType, base: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[Any] = []
    cls = getattr(module, base)

    def then(handler: Any) -> None:
        if len(log) == 1:
            original = vars(cls).get(name, getattr(cls, name))
            monkeypatch.setattr(cls, name, logging(log, name, original), raising=False)

    Handler = answering(module, log, then)
    if base == "BaseRequestHandler" and name != "__init__":
        Handler.setup = lambda self: (module.BaseRequestHandler.setup(self), module.DatagramRequestHandler.setup(self))
        Handler.finish = lambda self: (
            module.BaseRequestHandler.finish(self), module.DatagramRequestHandler.finish(self),
        )  # fmt: skip
    order = ["finish", "handle", "finish", "handle", "finish"] if name == "finish" else [name, "handle"] * 2
    assert serve_three(module, Handler, log) == (["handle", *order], ANSWERS)


def test_a_finish_that_a_handler_gives_itself_is_called(module: ModuleType) -> None:
    log: list[Any] = []

    def then(handler: Any) -> None:
        original = handler.finish
        handler.finish = lambda: (log.append("finish"), original())

    assert serve_three(module, answering(module, log, then), log) == (["handle", "finish"] * 3, ANSWERS)


def test_a_class_that_a_handler_gives_itself_finishes_it(module: ModuleType) -> None:
    log: list[Any] = []

    def then(handler: Any) -> None:
        handler.__class__ = Other

    Handler = answering(module, log, then)
    Other = type("Other", (Handler,), {"finish": logging(log, "finish", Handler.finish)})
    assert serve_three(module, Handler, log) == (["handle", "finish"] * 3, ANSWERS)


def test_files_that_a_handler_puts_in_the_place_of_its_own_are_used(module: ModuleType) -> None:
    def then(handler: Any) -> None:
        handler.wfile = io.BytesIO(b"another")

    assert serve_three(module, answering(module, [], then), [])[1] == [b"another"] * 3


@pytest.mark.parametrize("name", ["request", "client_address", "server", "packet", "socket", "rfile", "wfile"])
def test_an_attribute_that_is_a_property_is_set(module: ModuleType, name: str) -> None:
    log: list[Any] = []

    def put(handler: Any, value: Any) -> None:
        vars(handler)["_" + name] = value
        if name in ("request", "client_address", "server"):  # what comes before setup()
            vars(handler)["setup"] = lambda: (log.append("setup"), type(handler).setup(handler))
        vars(handler)["finish"] = lambda: (log.append("finish"), type(handler).finish(handler))

    Handler = answering(module, log)
    setattr(Handler, name, property(lambda handler: vars(handler)["_" + name], put))
    before = ["setup"] if name in ("request", "client_address", "server") else []
    assert serve_three(module, Handler, log) == ([*before, "handle", "finish"] * 3, ANSWERS)


def test_setattr_and_getattribute_of_a_handler_are_called(module: ModuleType) -> None:
    log: list[Any] = []
    Handler = answering(module, [])

    class Watched(Handler):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            log.append("=" + name)
            super().__setattr__(name, value)

        def __getattribute__(self, name: str) -> Any:
            log.append(name)
            return super().__getattribute__(name)

    serve_three(module, Watched, log)
    assert [name for name in log if name in ("setup", "handle", "finish")] == ["setup", "handle", "finish"] * 3
    assert [name for name in log if name.startswith("=")] == [
        "=request", "=client_address", "=server", "=packet", "=socket", "=rfile", "=wfile",
    ] * 3  # fmt: skip


def test_a_handler_with_slots_is_made(module: ModuleType) -> None:
    log: list[Any] = []

    class Handler:
        __slots__ = ("client_address", "request", "server")
        __init__ = module.BaseRequestHandler.__init__

        def setup(self) -> None:
            log.append("setup")

        def handle(self) -> None:
            log.append(self.request[0])
            stop_after(6, log)(self)

        def finish(self) -> None:
            log.append("finish")

    expected = ["setup", b"0", "finish", "setup", b"1", "finish", "setup", b"2", "finish"]
    assert serve_three(module, Handler, log)[0] == expected


@pytest.mark.parametrize("base", ["BaseRequestHandler", "DatagramRequestHandler"])
def test_finish_comes_after_an_error_of_the_handler(
    module: ModuleType, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log: list[Any] = []

    class Handler(getattr(module, base)):  # type: ignore[misc]
        def handle(self) -> None:
            self.finish = lambda: (log.append(self.request[0]), stop_after(3, log)(self))
            raise ZeroDivisionError

    assert serve_three(module, Handler, log)[0] == [b"0", b"1", b"2"]
    assert capsys.readouterr().err.count("\nZeroDivisionError") == 3


def test_an_error_of_setup_leaves_out_the_rest(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    log: list[Any] = []

    class Handler(module.DatagramRequestHandler):
        def setup(self) -> None:
            log.append("setup")
            stop_after(3, log)(self)
            raise ZeroDivisionError

        def handle(self) -> None:
            log.append("handle")

        finish = handle

    assert serve_three(module, Handler, log) == (["setup"] * 3, [])
    assert capsys.readouterr().err.count("\nZeroDivisionError") == 3


def test_an_abstract_handler_class_cannot_be_made(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    log: list[Any] = []

    class Server(module.UDPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            log.append(request[0])
            super().handle_error(request, client_address)
            self._BaseServer__shutdown_request = len(log) == 2

    class Handler(module.DatagramRequestHandler, metaclass=abc.ABCMeta):
        @abc.abstractmethod
        def answer(self) -> None: ...

    with Server(ADDRESS, Handler) as server, client_of(server) as client:
        send_numbers(client, 2)
        server.serve_forever(30)
    assert log == [b"0", b"1"]
    assert "abstract" in capsys.readouterr().err


def test_classes_of_several_kinds_take_turns(module: ModuleType) -> None:
    log: list[Any] = []
    Answering = answering(module, log)

    class Plain(module.BaseRequestHandler):
        def handle(self) -> None:
            log.append("plain")
            self.server.RequestHandlerClass = Answering

    class Other(Answering):  # type: ignore[misc]
        def setup(self) -> None:
            log.append("setup")
            super().setup()
            self.server.RequestHandlerClass = Plain

    assert serve_three(module, Other, log) == (["setup", "handle", "plain", "handle"], [b"<0>", b"<2>"])
