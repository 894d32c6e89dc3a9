"""``patch(threading="greenlet")``: the stdlib's threading mix-in runs requests in greenlets of one thread."""

from __future__ import annotations

import http.server
import logging.config
import socket
import socketserver
import threading
import wsgiref.simple_server
import xmlrpc.server
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fastserve
from fastserve import _backend
from support import serving, talk, wait_until
from test_patching import is_ours, snapshot

pytest.importorskip("greenlet", reason="greenlets need the package greenlet")

ADDRESS = ("127.0.0.1", 0)


@pytest.fixture(autouse=True)
def unpatched(impl: str) -> Iterator[None]:
    """Begin and end every test with the plain stdlib."""
    assert not fastserve.patched()
    before = snapshot()
    yield
    fastserve.unpatch()
    assert snapshot() == before


class Idents(socketserver.StreamRequestHandler):
    """Answer every line with the thread that handles it."""

    def handle(self) -> None:
        for _ in self.rfile:
            self.wfile.write(b"%d\n" % threading.get_ident())


class DerivedBefore(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True


class Xmlrpc(socketserver.ThreadingMixIn, xmlrpc.server.SimpleXMLRPCServer):
    daemon_threads = True


class Wsgi(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    daemon_threads = True


def derived_after() -> Any:
    class DerivedAfter(socketserver.ThreadingMixIn, socketserver.TCPServer):
        daemon_threads = True

    return DerivedAfter


def over_our_server() -> Any:
    class OverOurs(socketserver.ThreadingMixIn, fastserve.TCPServer):
        daemon_threads = True

    return OverOurs


def over_both_servers() -> Any:
    class OverBoth(socketserver.ThreadingMixIn, http.server.HTTPServer, fastserve.TCPServer):
        daemon_threads = True

    return OverBoth


def our_threads_over_http() -> Any:
    class OurThreads(fastserve.ThreadingMixIn, http.server.HTTPServer):
        daemon_threads = True

    return OurThreads


def our_threads_over_theirs() -> Any:
    class OurThreadsOverTheirs(fastserve.ThreadingMixIn, socketserver.ThreadingTCPServer):
        daemon_threads = True

    return OurThreadsOverTheirs


def pool_over_theirs() -> Any:
    class PoolOverTheirs(fastserve.ThreadPoolMixIn, socketserver.ThreadingTCPServer):
        pass

    return PoolOverTheirs


def our_greenlets_over_theirs() -> Any:
    class GreenletsOverTheirs(fastserve.GreenletMixIn, socketserver.ThreadingTCPServer):
        daemon_threads = True

    return GreenletsOverTheirs


def threads_of_two_clients(server: Any) -> set[int]:
    """Return the threads that handle two clients which are connected at the same time; the first is served again."""
    with (
        socket.create_connection(server.server_address, timeout=60) as first,
        socket.create_connection(server.server_address, timeout=60) as second,
    ):
        found = set()
        for client in first, second, first:
            client.sendall(b"?\n")
            found.add(int(client.recv(100)))
        return found


def serving_thread() -> threading.Thread:
    return next(thread for thread in threading.enumerate() if thread.name == "serving")


def is_served_in_greenlets(server: Any) -> bool:
    """Return whether one thread, that of ``serve_forever``, serves two clients at a time."""
    with serving(server, 3600):
        return threads_of_two_clients(server) == {serving_thread().ident}


def is_served_in_threads(server: Any) -> bool:
    with serving(server, 3600):
        found = threads_of_two_clients(server)
        return len(found) == 2 and serving_thread().ident not in found


# What is reached


@pytest.mark.parametrize(
    "make",
    [
        lambda: DerivedBefore,
        derived_after,
        over_our_server,
        over_both_servers,
        our_greenlets_over_theirs,
        lambda: fastserve.GreenletTCPServer,
    ],
)
def test_requests_of_the_stdlibs_mix_in_share_one_thread(make: Callable[[], Any]) -> None:
    with fastserve.patched(threading="greenlet"):
        server = make()(ADDRESS, Idents)
        server.daemon_threads = True
        assert is_served_in_greenlets(server)


@pytest.mark.parametrize("make", [lambda: http.server.ThreadingHTTPServer, lambda: Wsgi])
def test_requests_of_programs_that_were_imported_before_share_one_thread(make: Callable[[], Any]) -> None:
    with fastserve.patched(threading="greenlet"):
        assert is_served_in_greenlets(make()(ADDRESS, Idents))


def test_requests_of_an_xmlrpc_server_share_one_thread() -> None:
    with fastserve.patched(threading="greenlet"):
        assert is_served_in_greenlets(Xmlrpc(ADDRESS, Idents))  # type: ignore[arg-type]


def test_a_class_held_by_value_is_served_in_greenlets() -> None:
    held = logging.config.ThreadingTCPServer
    assert held is socketserver.ThreadingTCPServer
    with fastserve.patched(threading="greenlet"):
        server = held(ADDRESS, Idents)
        server.daemon_threads = True
        assert is_served_in_greenlets(server)


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets")
def test_a_server_of_a_unix_socket_is_served_in_greenlets(tmp_path: Path) -> None:
    class Server(socketserver.ThreadingUnixStreamServer):
        daemon_threads = True

    path = str(tmp_path / "s")
    with fastserve.patched(threading="greenlet"), serving(Server(path, Idents), 3600):
        assert int(talk(path, b"?\n", socket.AF_UNIX)) == serving_thread().ident


def test_datagrams_are_handled_in_the_thread_of_the_loop() -> None:
    class Handler(socketserver.DatagramRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"%d" % threading.get_ident())

    with (
        fastserve.patched(threading="greenlet"),
        serving(socketserver.ThreadingUDPServer(ADDRESS, Handler), 3600) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        client.settimeout(60)
        client.connect(server.server_address)
        client.send(b"?")
        assert int(client.recv(100)) == serving_thread().ident


def test_a_server_that_exists_is_served_in_greenlets_from_its_next_serve_forever_on() -> None:
    server = DerivedBefore(ADDRESS, Idents)
    with serving(server, 0.01):
        assert len(threads_of_two_clients(server)) == 2
        with fastserve.patched(threading="greenlet"):
            # Its loop is the stdlib's, and so are its threads.
            assert len(threads_of_two_clients(server)) == 2
    again = DerivedBefore(ADDRESS, Idents)
    with fastserve.patched(threading="greenlet"):
        assert is_served_in_greenlets(again)


def test_a_server_that_runs_when_the_patch_is_taken_back_goes_on_and_stops() -> None:
    with fastserve.patched(threading="greenlet"):
        server = DerivedBefore(ADDRESS, Idents)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        assert int(talk(server.server_address, b"?\n")) == thread.ident
    assert int(talk(server.server_address, b"?\n")) != thread.ident
    server.shutdown()
    thread.join(60)
    server.server_close()
    assert not thread.is_alive()


def test_handle_request_has_a_thread_handle_it() -> None:
    with fastserve.patched(threading="greenlet"), DerivedBefore(ADDRESS, Idents) as server:
        with socket.create_connection(server.server_address, timeout=60) as client:
            server.handle_request()  # it returns although the client has sent nothing
            client.sendall(b"?\n")
            assert int(client.recv(100)) != threading.get_ident()


def test_server_close_waits_for_the_threads_of_handle_request() -> None:
    in_handler, may_end = threading.Event(), threading.Event()

    def handle(*_: Any) -> None:
        in_handler.set()
        assert may_end.wait(60)

    class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
        pass

    with fastserve.patched(threading="greenlet"):
        server = Server(ADDRESS, handle)
        with socket.create_connection(server.server_address, timeout=60):
            server.handle_request()
            assert in_handler.wait(60)
            closer = threading.Thread(target=server.server_close)
            closer.start()
            wait_until(lambda: server.socket.fileno() < 0)
            closer.join(0.05)
            waits = closer.is_alive()
            may_end.set()
            closer.join(60)
    assert waits and not closer.is_alive()


# What is called, and what is left alone


def test_overrides_of_the_program_are_called() -> None:
    calls: list[str] = []

    class Listener(socketserver.TCPServer):
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            calls.append("serve_forever")
            super().serve_forever(poll_interval)

        def get_request(self) -> Any:
            calls.append("get_request")
            return super().get_request()

        def shutdown(self) -> None:
            calls.append("shutdown")
            super().shutdown()

    class Server(socketserver.ThreadingMixIn, Listener):
        daemon_threads = True

        def process_request(self, request: Any, client_address: Any) -> None:
            calls.append("process_request")
            super().process_request(request, client_address)

        def process_request_thread(self, request: Any, client_address: Any) -> None:
            calls.append("process_request_thread")
            super().process_request_thread(request, client_address)

    with fastserve.patched(threading="greenlet"), serving(Server(ADDRESS, Idents), 3600) as server:
        assert int(talk(server.server_address, b"?\n")) == serving_thread().ident
    assert calls == ["serve_forever", "get_request", "process_request", "process_request_thread", "shutdown"]


@pytest.mark.parametrize(
    "make",
    [our_threads_over_http, our_threads_over_theirs, pool_over_theirs, lambda: fastserve.ThreadingTCPServer],
)
def test_a_mix_in_of_fastserve_is_what_its_name_says(make: Callable[[], Any]) -> None:
    with fastserve.patched(threading="greenlet"):
        server = make()(ADDRESS, Idents)
        server.daemon_threads = True
        assert is_served_in_threads(server)


def test_a_method_that_the_program_has_replaced_in_the_mix_in_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def process_request(self: Any, request: Any, client_address: Any) -> None:
        self.shutdown_request(request)

    with monkeypatch.context() as replaced:
        replaced.setattr(socketserver.ThreadingMixIn, "process_request", process_request)
        with fastserve.patched(threading="greenlet"), serving(DerivedBefore(ADDRESS, Idents), 3600) as server:
            assert socketserver.ThreadingMixIn.process_request is process_request
            assert talk(server.server_address, b"") == b""


def test_the_mix_in_gets_no_attribute_that_a_class_of_the_program_may_have_under_the_same_name() -> None:
    known = {name for cls in socketserver.TCPServer.__mro__ for name in vars(cls)}
    before = set(vars(socketserver.ThreadingMixIn))
    with fastserve.patched(threading="greenlet"):
        assert set(vars(socketserver.ThreadingMixIn)) - before <= known


def test_attributes_of_greenlets_are_left_to_who_names_greenlets() -> None:
    class Server(DerivedBefore):
        max_connections = 0  # the program's own, for which it means "unlimited"

    with fastserve.patched(threading="greenlet"):
        assert is_served_in_greenlets(Server(ADDRESS, Idents))


# The choice


def test_a_wrong_choice_raises_and_changes_nothing() -> None:
    before = snapshot()
    for wrong in ("greenlets", "", 1, True):
        with pytest.raises(ValueError, match="threading is"):
            fastserve.patch(threading=wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="threading is"):
            fastserve.patched(threading=wrong)  # type: ignore[arg-type]
    assert snapshot() == before


def test_without_greenlet_the_patch_raises_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def hub() -> Any:
        raise ImportError("no greenlet")

    before = snapshot()
    monkeypatch.setattr(_backend, "hub", hub)
    with pytest.raises(ImportError, match="no greenlet"):
        fastserve.patch(threading="greenlet")
    with pytest.raises(ImportError, match="no greenlet"), fastserve.patched(threading="greenlet"):
        raise AssertionError("not reached")
    assert snapshot() == before
    fastserve.patch()
    with pytest.raises(ImportError, match="no greenlet"):
        fastserve.patch(threading="greenlet")
    assert fastserve.patched("thread")


def test_another_choice_takes_the_place_of_the_first() -> None:
    untouched = snapshot()
    fastserve.patch()
    for _ in range(2):
        fastserve.patch(threading="greenlet")
        assert is_ours(socketserver.ThreadingMixIn.serve_forever)  # type: ignore[attr-defined]
        assert is_served_in_greenlets(DerivedBefore(ADDRESS, Idents))
        fastserve.patch(threading="thread")
        assert not hasattr(socketserver.ThreadingMixIn, "serve_forever")
        assert is_ours(socketserver.ThreadingMixIn.process_request)
        assert is_served_in_threads(DerivedBefore(ADDRESS, Idents))
    fastserve.unpatch()
    assert snapshot() == untouched


def test_no_choice_leaves_the_one_that_is() -> None:
    fastserve.patch(threading="greenlet")
    before = snapshot()
    fastserve.patch()
    with fastserve.patched():
        assert snapshot() == before
    assert snapshot() == before


def test_patched_asks_for_a_choice() -> None:
    answers = {}
    for choice in None, "thread", "greenlet":
        with fastserve.patched(choice):  # type: ignore[arg-type]
            answers[choice] = [
                bool(fastserve.patched()),
                bool(fastserve.patched(threading="thread")),
                bool(fastserve.patched(threading="greenlet")),
            ]
        assert not fastserve.patched()
    assert answers == {
        None: [True, True, False],
        "thread": [True, True, False],
        "greenlet": [True, False, True],
    }
    assert "not in the place" in repr(fastserve.patched())
    with fastserve.patched("greenlet"):
        assert "a greenlet for each" in repr(fastserve.patched())


def test_contexts_of_different_choices_leave_what_they_found() -> None:
    fastserve.patch()
    with fastserve.patched(threading="greenlet"):
        assert fastserve.patched("greenlet")
        with fastserve.patched(threading="thread"):
            assert fastserve.patched("thread")
        assert fastserve.patched("greenlet")
    assert fastserve.patched("thread")
