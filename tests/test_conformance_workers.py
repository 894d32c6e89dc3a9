"""The worker models of the stdlib: a thread for each request, a child process for each request."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from support import serving, talk, wait_until

ADDRESS = ("127.0.0.1", 0)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def connect(server: Any) -> socket.socket:
    """Connect to a server on this machine; the kernel accepts before the server does."""
    return socket.create_connection(server.server_address, timeout=60)


def handler(module: ModuleType, handle: Callable[[Any], Any]) -> Any:
    """Return a handler with this ``handle``."""
    return type("Handler", (module.StreamRequestHandler,), {"handle": handle})


# Threads


@pytest.mark.parametrize("daemon", [False, True])
def test_daemon_threads_decides_what_the_threads_are(module: ModuleType, daemon: bool) -> None:
    seen: list[threading.Thread] = []

    class Server(module.ThreadingTCPServer):
        daemon_threads = daemon

    with serving(Server(ADDRESS, handler(module, lambda _: seen.append(threading.current_thread()))), 0.01) as server:
        assert talk(server.server_address, b"") == b""
    assert [thread.daemon for thread in seen] == [daemon]
    seen[0].join(60)


@pytest.mark.parametrize(("daemon", "block"), [(False, True), (False, False), (True, True), (True, False)])
def test_server_close_waits_only_for_threads_that_are_no_daemons_and_with_block_on_close(
    module: ModuleType, daemon: bool, block: bool
) -> None:
    started, go_on = threading.Event(), threading.Event()
    threads: list[threading.Thread] = []

    def handle(self: Any) -> None:
        threads.append(threading.current_thread())
        started.set()
        assert go_on.wait(60)

    class Server(module.ThreadingTCPServer):
        daemon_threads = daemon
        block_on_close = block

    with Server(ADDRESS, handler(module, handle)) as server, connect(server):
        server.handle_request()
        assert started.wait(60)
        closer = threading.Thread(target=server.server_close)
        closer.start()
        wait_until(lambda: server.fileno() == -1)  # the listener is closed before
        closer.join(0.05 if block and not daemon else 30)
        assert closer.is_alive() == (block and not daemon)
        go_on.set()
        closer.join(60)
        assert not closer.is_alive()
    threads[0].join(60)


def test_ended_threads_are_forgotten_when_the_next_one_comes(module: ModuleType) -> None:
    with module.ThreadingTCPServer(ADDRESS, handler(module, lambda _: None)) as server:
        for _ in range(5):
            with connect(server) as client:
                server.handle_request()
                assert client.recv(1) == b""
            for thread in list(server._threads):
                thread.join(60)
        assert len(server._threads) <= 1  # the stdlib counts one that has ended until the next one comes


def test_daemon_threads_are_not_kept(module: ModuleType) -> None:
    class Server(module.ThreadingTCPServer):
        daemon_threads = True

    with Server(ADDRESS, handler(module, lambda _: None)) as server:
        with connect(server) as client:
            server.handle_request()
            assert client.recv(1) == b""
        assert server._threads == []


def test_without_block_on_close_no_list_of_threads_is_made(module: ModuleType) -> None:
    class Server(module.ThreadingTCPServer):
        block_on_close = False

    with Server(ADDRESS, handler(module, lambda _: None)) as server:
        with connect(server) as client:
            server.handle_request()
            assert client.recv(1) == b""
        assert "_threads" not in vars(server)
        assert isinstance(server._threads, module._NoThreads)


def test_requests_run_at_the_same_time(module: ModuleType) -> None:
    barrier = threading.Barrier(4, timeout=60)
    with serving(module.ThreadingTCPServer(ADDRESS, handler(module, lambda _: barrier.wait())), 0.01) as server:
        clients = [connect(server) for _ in range(4)]
        for client in clients:
            with client:
                assert client.recv(1) == b""


def test_the_list_of_threads_has_the_stdlibs_methods(module: ModuleType) -> None:
    threads = module._Threads()
    ended = threading.Thread(target=lambda: None)
    ended.start()
    ended.join()
    go_on = threading.Event()
    running = threading.Thread(target=go_on.wait, args=(60,))
    running.start()
    daemon = threading.Thread(target=lambda: None, daemon=True)
    list.append(threads, ended)
    threads.append(running)
    threads.append(daemon)
    assert threads == [running]
    assert threads.pop_all() == [running]
    assert threads == []
    threads.append(running)
    go_on.set()
    threads.join()
    assert not running.is_alive()
    assert threads == []
    nothing = module._NoThreads()
    assert nothing.append(daemon) is None
    assert nothing.join() is None


# Children. They are forked from the main thread, and there is no other: fork() in a process with threads warns.


def fork_server(module: ModuleType, handle: Callable[[Any], Any], **attributes: Any) -> Any:
    """Return a forking server with these class attributes."""
    return type("Server", (module.ForkingTCPServer,), attributes)(ADDRESS, handler(module, handle))


def assert_no_children() -> None:
    """Fail if this process has a child, alive or a zombie."""
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@needs_fork
def test_a_child_handles_the_request_and_changes_nothing_in_the_parent(module: ModuleType) -> None:
    seen: list[int] = []

    def handle(self: Any) -> None:
        seen.append(os.getpid())
        self.wfile.write(b"%d" % os.getpid())

    with fork_server(module, handle) as server, connect(server) as client:
        server.handle_request()
        child = int(client.recv(100))
        assert server.active_children == {child}
        assert child != os.getpid()
    assert seen == []
    assert_no_children()


@needs_fork
@pytest.mark.parametrize("base", ["ForkingUDPServer", "ForkingUnixStreamServer", "ForkingUnixDatagramServer"])
def test_every_forking_server_answers(
    module: ModuleType, base: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(module, base):
        pytest.skip(f"the stdlib has {base} from 3.12 on")
    monkeypatch.chdir(tmp_path)
    unix, datagrams = "Unix" in base, "UDP" in base or "Datagram" in base

    class Handler(module.DatagramRequestHandler if datagrams else module.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline().upper())

    with getattr(module, base)("server" if unix else ADDRESS, Handler) as server:
        family = socket.AF_UNIX if unix else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM if datagrams else socket.SOCK_STREAM) as client:
            client.settimeout(60)
            if unix and datagrams:
                client.bind("client")
            client.connect(server.server_address)
            client.sendall(b"fork\n")
            server.handle_request()
            assert client.recv(100) == b"FORK\n"
    assert_no_children()


@needs_fork
@pytest.mark.parametrize(
    ("raised", "status"), [(None, 0), (ZeroDivisionError, 1), (SystemExit, 1), (KeyboardInterrupt, 1)]
)
def test_the_exit_status_of_a_child_tells_whether_its_handler_raised(
    module: ModuleType, raised: type[BaseException] | None, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    def handle(self: Any) -> None:
        if raised is not None:
            raise raised

    server = fork_server(module, handle)
    with connect(server) as client:
        server.handle_request()
        assert client.recv(1) == b""
    (child,) = server.active_children
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
    server.server_close()  # finds that somebody else has waited for it
    assert server.active_children == set()
    assert ("ZeroDivisionError" in capfd.readouterr().err) == (raised is ZeroDivisionError)


@needs_fork
def test_collect_children_collects_the_ended_without_waiting_for_the_others(module: ModuleType) -> None:
    def handle(self: Any) -> None:
        self.wfile.write(b"%d" % os.getpid())
        self.rfile.readline()

    with fork_server(module, handle) as server:
        clients = [connect(server) for _ in range(2)]
        children = []
        for client in clients:
            server.handle_request()
            children.append(int(client.recv(100)))
        server.collect_children()
        assert server.active_children == set(children)
        clients[0].sendall(b"end\n")
        wait_until(lambda: server.collect_children() or server.active_children == {children[1]})
        clients[1].sendall(b"end\n")
        server.collect_children(blocking=True)
        assert server.active_children == set()
        for client in clients:
            client.close()
    assert_no_children()


@needs_fork
def test_collect_children_takes_blocking_by_keyword_only(module: ModuleType) -> None:
    with fork_server(module, lambda _: None) as server:
        assert server.collect_children(blocking=True) is None
        with pytest.raises(TypeError):
            server.collect_children(True)


@needs_fork
@pytest.mark.parametrize("how", ["service_actions", "handle_timeout"])
def test_children_are_collected_by_the_loops_hooks(module: ModuleType, how: str) -> None:
    with fork_server(module, lambda _: None) as server:
        with connect(server) as client:
            server.handle_request()
            assert client.recv(1) == b""
        wait_until(lambda: getattr(server, how)() or not server.active_children)
        assert_no_children()


@needs_fork
def test_handle_request_collects_children_at_its_timeout(module: ModuleType) -> None:
    with fork_server(module, lambda _: None, timeout=0.02) as server:
        with connect(server) as client:
            # On a busy machine it can be accepted a moment later.
            assert select.select([server], [], [], 60)[0]
            server.handle_request()
            assert client.recv(1) == b""
        wait_until(lambda: server.handle_request() or not server.active_children)
        assert_no_children()
    assert module.ForkingMixIn.timeout == 300


@needs_fork
@pytest.mark.parametrize("block", [False, True])
def test_server_close_waits_for_children_with_block_on_close(module: ModuleType, block: bool) -> None:
    reader, writer = os.pipe()

    def handle(self: Any) -> None:
        self.wfile.write(b"started")
        os.close(writer)
        os.read(reader, 1)

    server = fork_server(module, handle, block_on_close=block)
    with connect(server) as client:
        server.handle_request()
        assert client.recv(7) == b"started"
        if block:
            # The children end only by this, which server_close() must have waited for.
            signal.signal(signal.SIGUSR1, lambda *_: os.close(writer))
            helper = os.fork()
            if not helper:
                os.close(writer)
                client.settimeout(0.05)
                try:
                    client.recv(1)
                except TimeoutError:
                    os.kill(os.getppid(), signal.SIGUSR1)
                finally:
                    os._exit(0)
        server.server_close()
        assert server.fileno() == -1
        assert bool(server.active_children) is not block
        if block:
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)
            os.waitpid(helper, 0)
        else:
            os.close(writer)
            server.collect_children(blocking=True)
    os.close(reader)
    assert_no_children()


@needs_fork
def test_max_children_makes_the_next_collection_wait_for_one_to_end(module: ModuleType) -> None:
    def handle(self: Any) -> None:
        self.wfile.write(b"x")

    with fork_server(module, handle, max_children=2) as server:
        for _ in range(6):
            with connect(server) as client:
                server.handle_request()
                assert client.recv(1) == b"x"
            server.collect_children()
            assert len(server.active_children) < 2
    assert module.ForkingMixIn.max_children == 40
    assert_no_children()


@needs_fork
def test_children_of_others_are_not_waited_for(module: ModuleType) -> None:
    reader, writer = os.pipe()
    other = os.fork()
    if not other:
        os.close(writer)
        os.read(reader, 1)
        os._exit(7)
    os.close(reader)
    with fork_server(module, lambda _: os.close(writer)) as server:
        with connect(server) as client:
            server.handle_request()
            assert client.recv(1) == b""
        server.collect_children(blocking=True)
    os.close(writer)
    assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 7


@needs_fork
def test_serve_forever_collects_children_while_it_serves(module: ModuleType) -> None:
    clients: list[socket.socket] = []
    collected: list[bool] = []

    class Server(module.ForkingTCPServer):
        def service_actions(self) -> None:
            super().service_actions()
            if self.active_children is not None and not self.active_children:
                collected.append(True)
                self._BaseServer__shutdown_request = True

    with Server(ADDRESS, handler(module, lambda _: None)) as server:
        clients.append(connect(server))
        server.serve_forever(0.01)
        clients[0].close()
    assert collected == [True]
    assert_no_children()


@needs_fork
def test_a_fork_that_fails_goes_to_handle_error(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    errors: list[Any] = []
    with fork_server(module, lambda _: None) as server, connect(server) as client:
        server.handle_error = lambda request, client_address: errors.append(client_address)
        monkeypatch.setattr(os, "fork", fork)
        server.handle_request()
        assert client.recv(1) == b""
        address = client.getsockname()
    assert errors == [address]
    assert not server.active_children
