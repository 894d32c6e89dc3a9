"""Threads that are used again: a handler sees what it would see in a fresh one, which is what the stdlib gives it."""

from __future__ import annotations

import contextvars
import decimal
import os
import re
import signal
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest

import fastserve
from children import FORK_BESIDE_THREADS, child
from conftest import TWINS
from support import serving, talk, wait_until

needs_reuse = pytest.mark.skipif("c" not in TWINS, reason="no thread is used again without the C extensions")

if "c" in TWINS:
    from fastserve import _threads
    from fastserve.workers import _reuse

local = threading.local()
variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


def server_of(module: ModuleType, handle: Callable[[Any], Any], **attributes: Any) -> Any:
    """Return a threading server whose handler answers with the ``repr`` of what ``handle(handler)`` returns."""

    def answer(self: Any) -> None:
        found = handle(self)
        self.wfile.write(repr(found).encode())

    handler = type("Handler", (module.StreamRequestHandler,), {"handle": answer})
    return type("Server", (module.ThreadingTCPServer,), attributes)(("127.0.0.1", 0), handler)


def answers(server: Any, number: int) -> list[str]:
    """Return the answers to so many requests, one after the other."""
    return [talk(server.server_address, b"").decode() for _ in range(number)]


def counts() -> tuple[int, int]:
    found: tuple[int, int] = _threads.counts()
    return found


@pytest.fixture
def no_threads() -> Iterator[None]:
    """Begin and end without a thread that waits for a request."""
    _threads.end_idle()
    wait_until(lambda: counts() == (0, 0))
    yield
    _threads.end_idle()
    wait_until(lambda: counts() == (0, 0))


# What a request leaves behind is not seen by the next one


def test_no_request_sees_a_value_that_another_left_in_a_thread_local(module: ModuleType) -> None:
    def handle(handler: Any) -> Any:
        seen = getattr(local, "value", None), dict(vars(local))
        local.value = handler.client_address
        return seen

    with serving(server_of(module, handle)) as server:
        assert answers(server, 50) == ["(None, {})"] * 50


def test_no_request_sees_a_context_that_another_left(module: ModuleType) -> None:
    def handle(handler: Any) -> Any:
        seen = variable.get(), decimal.getcontext().prec
        variable.set("left behind")
        decimal.setcontext(decimal.Context(prec=3))  # an inherited one belongs to the threads that share it, as well
        return seen

    with serving(server_of(module, handle)) as server:
        assert answers(server, 20) == [repr(("unset", decimal.DefaultContext.prec))] * 20


def test_a_request_begins_with_the_context_that_a_new_thread_has(module: ModuleType) -> None:
    expected = "of the serving thread" if getattr(sys.flags, "thread_inherit_context", False) else "unset"

    def serve_forever(server: Any, poll_interval: float = 0.5) -> None:
        variable.set("of the serving thread")
        module.ThreadingTCPServer.serve_forever(server, poll_interval)

    with serving(server_of(module, lambda handler: variable.get(), serve_forever=serve_forever)) as server:
        assert answers(server, 5) == [repr(expected)] * 5


def test_no_request_sees_a_trace_function_that_another_left(module: ModuleType) -> None:
    def trace(frame: FrameType, event: str, argument: Any) -> None:
        return None

    def handle(handler: Any) -> Any:
        seen = sys.gettrace() is trace, sys.getprofile() is trace
        sys.settrace(trace)
        sys.setprofile(trace)
        return seen

    with serving(server_of(module, handle)) as server:
        assert answers(server, 20) == ["(False, False)"] * 20


def test_what_a_thread_local_holds_is_released_before_server_close_returns(module: ModuleType) -> None:
    released: list[str] = []

    class Held:
        def __del__(self) -> None:
            released.append("released")

    def handle(handler: Any) -> None:
        local.held = Held()

    with serving(server_of(module, handle)) as server:
        answers(server, 3)
    assert len(released) == 3


# Every request has a threading.Thread of its own


def test_every_request_has_a_thread_object_a_number_and_a_name_of_its_own(module: ModuleType) -> None:
    kept: list[threading.Thread] = []

    def handle(handler: Any) -> str:
        kept.append(threading.current_thread())
        return threading.current_thread().name

    with serving(server_of(module, handle)) as server:
        names = [text.strip("'") for text in answers(server, 10)]
    assert len({id(thread) for thread in kept}) == 10
    numbers = []
    for name in names:
        found = re.fullmatch(r"Thread-(\d+) \(process_request_thread\)", name)
        assert found, name
        numbers.append(int(found[1]))
    assert numbers == list(range(numbers[0], numbers[0] + 10))
    assert [thread.name for thread in kept] == names


def test_the_thread_object_tells_of_the_thread_as_it_runs_and_after(module: ModuleType) -> None:
    release, threads = threading.Event(), []

    def handle(handler: Any) -> bool:
        thread = threading.current_thread()
        threads.append(thread)
        assert isinstance(thread, threading.Thread)
        assert thread.ident == threading.get_ident()
        assert thread.native_id == threading.get_native_id()
        assert thread in threading.enumerate()
        assert thread.is_alive()
        assert f"({thread.name}, started" in repr(thread)
        with pytest.raises(RuntimeError, match="cannot join current thread"):
            thread.join()
        with pytest.raises(RuntimeError, match="cannot set daemon status of active thread"):
            thread.daemon = not thread.daemon
        with pytest.raises(RuntimeError, match="threads can only be started once"):
            thread.start()
        thread.name = "renamed"
        assert threading.current_thread().name == thread.name == "renamed"
        return release.wait(30)

    with serving(server_of(module, handle)) as server:
        before = threading.active_count()
        ended = threading.Thread(target=answers, args=(server, 1))
        ended.start()
        wait_until(lambda: threads and threads[0].name == "renamed")
        assert threading.active_count() == before + 2
        assert len(server._threads) == 1
        threads[0].join(0.01)
        threads[0].join(-1)
        assert threads[0].is_alive()
        release.set()
        threads[0].join()
        assert not threads[0].is_alive()
        assert threads[0] not in threading.enumerate()
        assert "stopped" in repr(threads[0])
        threads[0].join()
        assert threads[0].ident is not None
        ended.join()
        wait_until(lambda: threading.active_count() == before)
        answers(server, 1)
        wait_until(lambda: len(server._threads) <= 1)


@pytest.mark.parametrize("daemon", [True, False])
def test_daemon_threads_says_what_the_threads_are(module: ModuleType, daemon: bool) -> None:
    def handle(handler: Any) -> tuple[bool, int]:
        return threading.current_thread().daemon, len(handler.server._threads)

    with serving(server_of(module, handle, daemon_threads=daemon)) as server:
        assert answers(server, 1) == [repr((daemon, 0 if daemon else 1))]


def test_the_hooks_of_threading_are_set_in_every_thread(module: ModuleType) -> None:
    traced: list[str] = []

    def hook(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_name == "answer":
            traced.append(event)

    def handle(handler: Any) -> tuple[bool, bool]:
        return sys.gettrace() is hook, sys.getprofile() is hook

    with serving(server_of(module, handle)) as server:
        before = sys.gettrace(), sys.getprofile()
        threading.settrace(hook)
        threading.setprofile(hook)
        try:
            assert answers(server, 3) == ["(True, True)"] * 3
        finally:
            threading.settrace(before[0])  # type: ignore[arg-type]
            threading.setprofile(before[1])  # type: ignore[arg-type]
    assert traced == ["call"] * 6  # each is told of by both


@pytest.mark.parametrize("exception", [SystemExit, KeyboardInterrupt, BaseException])
def test_what_is_no_exception_goes_to_the_excepthook_and_the_server_goes_on(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, exception: type[BaseException]
) -> None:
    caught: list[tuple[type[BaseException], str]] = []

    def hook(args: threading.ExceptHookArgs) -> None:
        assert args.thread is threading.current_thread()
        caught.append((args.exc_type, str(args.exc_value)))

    def handle(handler: Any) -> str:
        if handler.rfile.readline():
            raise exception("thrown")
        return "fine"

    monkeypatch.setattr(threading, "excepthook", hook)
    with serving(server_of(module, handle)) as server:
        for _ in range(3):
            assert talk(server.server_address, b"x\n") == b""
            assert answers(server, 1) == ["'fine'"]
    assert caught == [(exception, "thrown")] * 3


def test_an_excepthook_that_raises_is_reported_and_the_server_goes_on(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hook(args: threading.ExceptHookArgs) -> None:
        raise ValueError("of the hook")

    def handle(handler: Any) -> str:
        if handler.rfile.readline():
            raise SystemExit
        return "fine"

    monkeypatch.setattr(threading, "excepthook", hook)
    with serving(server_of(module, handle)) as server:
        assert talk(server.server_address, b"x\n") == b""
        assert answers(server, 1) == ["'fine'"]
    assert "ValueError: of the hook" in capsys.readouterr().err


def test_process_request_thread_is_called_where_it_is_overridden(module: ModuleType) -> None:
    called: list[str] = []

    class Server(module.ThreadingTCPServer):  # type: ignore[name-defined,misc]
        def process_request_thread(self, request: Any, client_address: Any) -> None:
            called.append("class")
            super().process_request_thread(request, client_address)

    with serving(Server(("127.0.0.1", 0), module.BaseRequestHandler)) as server:
        talk(server.server_address, b"")

        def own(request: Any, client_address: Any) -> None:
            called.append("instance")
            Server.process_request_thread(server, request, client_address)

        server.process_request_thread = own
        talk(server.server_address, b"")
    assert called == ["class", "instance", "class"]


# The threads of the operating system


@needs_reuse
@pytest.mark.parametrize("reuse", [True, False])
def test_a_thread_takes_one_request_after_the_other_unless_that_is_refused(no_threads: None, reuse: bool) -> None:
    def handle(handler: Any) -> int:
        return threading.get_native_id()

    with serving(server_of(fastserve, handle, reuse_threads=reuse)) as server:
        seen = set()
        for _ in range(10):
            seen |= set(answers(server, 1))
            wait_until(lambda: counts()[0] == counts()[1])
        assert len(seen) == (1 if reuse else 10)
        assert counts() == ((1, 1) if reuse else (0, 0))
    wait_until(lambda: counts() == (0, 0))  # server_close() ends it


@needs_reuse
def test_their_number_is_not_limited(no_threads: None) -> None:
    release, together = threading.Event(), 60
    # A client that finds the backlog full tries again after seconds.
    with serving(server_of(fastserve, lambda handler: release.wait(60), request_queue_size=together)) as server:
        clients = [threading.Thread(target=answers, args=(server, 1)) for _ in range(together)]
        for client in clients:
            client.start()
        wait_until(lambda: counts() == (together, 0), 60)
        assert len(server._threads) == together
        release.set()
        for client in clients:
            client.join()
        wait_until(lambda: counts() == (together, together))
        assert len(server._threads) == 0
    wait_until(lambda: counts() == (0, 0))


@needs_reuse
def test_an_idle_thread_ends_after_a_while(no_threads: None) -> None:
    before = _threads.set_idle_seconds(0.05)
    try:
        with serving(server_of(fastserve, lambda handler: None)) as server:
            answers(server, 3)
            wait_until(lambda: counts() == (0, 0))
            assert answers(server, 1) == ["None"]
    finally:
        assert _threads.set_idle_seconds(before) == 0.05


@needs_reuse
@pytest.mark.parametrize("reuse", [True, False])
def test_what_a_handler_sets_for_its_thread_in_the_system_stays_where_it_is_used_again(
    no_threads: None, reuse: bool
) -> None:
    def handle(handler: Any) -> bool:
        return signal.SIGUSR2 in signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])

    with serving(server_of(fastserve, handle, reuse_threads=reuse)) as server:
        assert answers(server, 1) == ["False"]
        wait_until(lambda: counts()[0] == counts()[1])
        assert answers(server, 1) == [repr(reuse)]


@needs_reuse
def test_the_list_of_threads_does_not_grow_with_the_requests(no_threads: None) -> None:
    with serving(server_of(fastserve, lambda handler: None)) as server:
        answers(server, 200)
        assert list.__len__(server._threads) < 40


@needs_reuse
def test_a_thread_has_the_stack_size_that_was_asked_for_last(no_threads: None) -> None:
    def stack(handler: Any) -> int:
        return threading.get_native_id()

    with serving(server_of(fastserve, stack)) as server:
        first = answers(server, 1)
        wait_until(lambda: counts() == (1, 1))
        before = threading.stack_size(4 * 1024 * 1024)
        try:
            assert answers(server, 1) != first
            wait_until(lambda: counts() == (1, 1))
        finally:
            threading.stack_size(before)


@needs_reuse
def test_a_thread_that_the_system_refuses_is_reported_and_its_request_closed(
    no_threads: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def handle(handler: Any) -> str:
        return "fine"

    with serving(server_of(fastserve, handle)) as server:
        before = threading.stack_size(2**60)  # more than there are addresses
        try:
            assert answers(server, 2) == ["", ""]
        finally:
            threading.stack_size(before)
        assert answers(server, 1) == ["'fine'"]
    assert capsys.readouterr().err.count("\nRuntimeError: can't start new thread\n") == 2


@needs_reuse
def test_no_thread_is_used_again_where_somebody_has_replaced_how_threads_are_started(
    no_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "_start_joinable_thread" if hasattr(threading, "_start_joinable_thread") else "_start_new_thread"
    original, started = getattr(threading, name), []

    def start(*args: Any, **kwargs: Any) -> Any:
        started.append(args)
        return original(*args, **kwargs)

    with serving(server_of(fastserve, lambda handler: None)) as server:
        monkeypatch.setattr(threading, name, start)
        answers(server, 3)
    assert len(started) == 3
    assert counts() == (0, 0)


@needs_reuse
def test_a_server_of_the_stdlib_has_it_too_under_patch(no_threads: None) -> None:
    with fastserve.patched():
        with serving(server_of(socketserver, lambda handler: None)) as server:
            answers(server, 3)
            wait_until(lambda: 1 <= counts()[1] == counts()[0])  # more than one if a client is faster than its thread
        wait_until(lambda: counts() == (0, 0))


# Processes

SERVER = """
import multiprocessing, os, sys, threading, time
import fastserve as socketserver

def serve(handle, **attributes):
    handler = type("Handler", (socketserver.StreamRequestHandler,), {"handle": handle})
    server = type("Server", (socketserver.ThreadingTCPServer,), attributes)(("127.0.0.1", 0), handler)
    print(server.server_address[1])
    return server
"""


def program(body: str) -> list[str]:
    return ["-c", SERVER + body]


def implementations() -> list[str]:
    return sorted(TWINS)


@pytest.mark.skipif(sys.version_info < (3, 14), reason="threads do not inherit a context before Python 3.14")
@pytest.mark.parametrize("implementation", implementations())
def test_a_request_inherits_the_context_where_that_is_asked_for(implementation: str, tmp_path: Path) -> None:
    body = """
import contextvars
variable = contextvars.ContextVar("variable", default="unset")
def handle(self):
    self.wfile.write(variable.get().encode())
    variable.set("left behind")
server = serve(handle, daemon_threads=True)
variable.set("of the main thread")
server.serve_forever()
"""
    for inherits, expected in ("0", b"unset"), ("1", b"of the main thread"):
        arguments = ["-X", f"thread_inherit_context={inherits}", *program(body)]
        with child(implementation, tmp_path, arguments) as process:
            address = ("127.0.0.1", process.port())
            assert [talk(address, b"") for _ in range(3)] == [expected] * 3


@pytest.mark.parametrize("implementation", implementations())
def test_the_interpreter_waits_for_running_requests_and_not_for_idle_threads(
    implementation: str, tmp_path: Path
) -> None:
    body = """
begun, served = threading.Event(), threading.Semaphore(0)
def handle(self):
    line = self.rfile.readline()
    if line == b"slow\\n":
        begun.set()
        time.sleep(0.5)
        print("the slow request has ended")
    self.wfile.write(line)
server = serve(handle)
threading.Thread(target=server.serve_forever, daemon=True).start()
begun.wait(60)
"""
    with child(implementation, tmp_path, program(body)) as process:
        address = ("127.0.0.1", process.port())
        assert talk(address, b"quick\n") == b"quick\n"
        assert talk(address, b"slow\n") == b"slow\n"
        assert process.line() == "the slow request has ended"
        assert process.end() == ""


@needs_reuse
def test_the_end_waits_for_what_a_request_has_begun_meanwhile() -> None:
    """Whichever threads they are in: each of these jobs begins the next one."""
    assert _reuse.is_possible()
    ended: list[int] = []

    def job(left: int) -> None:
        time.sleep(0.005)
        if left:
            _reuse.RequestThread(job, (left - 1,), False).start()
        ended.append(left)

    for _ in range(5):
        ended.clear()
        _reuse.RequestThread(job, (20,), False).start()
        _threads.join_all()
        assert sorted(ended) == list(range(21))
    _reuse.end_idle_threads()


@needs_reuse
@pytest.mark.skipif(sys.platform != "linux", reason="reads the size of the process from /proc")
def test_where_no_thread_can_be_started_one_that_another_server_has_is_used(tmp_path: Path) -> None:
    body = """
import resource
from fastserve import _threads
together = threading.Barrier(9)
threads = set()
def handle(self):
    line = self.rfile.readline()
    if line == b"together\\n":
        together.wait(60)
        threads.add(threading.get_native_id())
    elif line == b"no more\\n":
        threads.add(threading.get_native_id())
        while _threads.counts()[0] - _threads.counts()[1] > 1:  # this one
            time.sleep(0.001)
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (4 << 20),) * 2)
    self.wfile.write(b"%d" % (threading.get_native_id() in threads))
servers = [serve(handle, daemon_threads=True, request_queue_size=64) for _ in range(8)]
for server in servers[1:]:
    threading.Thread(target=server.serve_forever, daemon=True).start()
servers[0].serve_forever()
"""
    with child("c", tmp_path, program(body)) as process:
        addresses = [("127.0.0.1", process.port()) for _ in range(8)]
        # Nine, so that one is idle for each of the last requests although none of those before has come to rest yet.
        clients = [threading.Thread(target=talk, args=(addresses[0], b"together\n")) for _ in range(9)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        assert talk(addresses[0], b"no more\n") == b"1"
        assert [talk(address, b"and you\n") for address in addresses] == [b"1"] * 8


@pytest.mark.parametrize("implementation", implementations())
def test_the_interpreter_does_not_wait_for_daemons(implementation: str, tmp_path: Path) -> None:
    body = """
begun = threading.Event()
def handle(self):
    self.rfile.readline()
    begun.set()
    threading.Event().wait()
server = serve(handle, daemon_threads=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
begun.wait(60)
print("ends")
sys.stdout.flush()
os.environ["X"] = "the sockets are left to the end of the process"
server.socket.detach()
"""
    with child(implementation, tmp_path, program(body)) as process:
        address = ("127.0.0.1", process.port())
        assert talk(address, b"x\n") == b""
        assert process.line() == "ends"
        assert process.process.wait(60) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("implementation", implementations())
def test_a_handler_may_fork_and_the_child_begins_afresh(implementation: str, tmp_path: Path) -> None:
    body = """
def child(before):
    me = threading.current_thread()
    assert me is threading.main_thread() and me.is_alive() and threading.enumerate() == [me], threading.enumerate()
    assert all(not thread.is_alive() for thread in before if thread is not me), before
    for thread in before:
        if thread is not me:
            thread.join()
    with serve(echo) as server:
        threading.Thread(target=server.serve_forever).start()
        import socket
        for _ in range(3):
            with socket.create_connection(server.server_address) as client:
                client.sendall(b"in the child\\n")
                assert client.makefile("rb").readline() == b"in the child\\n"
        server.shutdown()

def echo(self):
    self.wfile.write(self.rfile.readline())

def handle(self):
    line = self.rfile.readline()
    if line == b"wait\\n":
        waiting.set()
        release.wait(60)
    elif line == b"fork\\n":
        waiting.wait(60)
        before = threading.enumerate()
        pid = os.fork()
        if not pid:
            status = 1
            try:
                child(before)
                status = 0
            finally:
                sys.stdout.flush()
                os._exit(status)
        self.wfile.write(b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    elif line == b"process\\n":
        process = multiprocessing.get_context("fork").Process(target=child, args=([],))
        process.start()
        process.join()
        self.wfile.write(b"%d" % process.exitcode)
        process.close()
    elif line == b"return\\n":
        pid = os.fork()  # the child returns, and ends the request for both
        if pid:
            print("returned", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    elif line == b"end\\n":
        release.set()

waiting, release = threading.Event(), threading.Event()
with serve(handle) as server:
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    release.wait(120)
    server.shutdown()
    serving.join()
"""
    with child(implementation, tmp_path, program(body), [FORK_BESIDE_THREADS]) as process:
        address = ("127.0.0.1", process.port())
        waiter = threading.Thread(target=talk, args=(address, b"wait\n"), kwargs={"timeout": 60.0})
        waiter.start()
        results = [talk(address, line, timeout=60.0) for line in (b"fork\n", b"process\n", b"return\n")]
        # Two of the children have told the ports of their servers.
        assert [process.line() for _ in range(3)][-1] == "returned 0"
        talk(address, b"end\n")
        waiter.join()
        process.end()
        assert results == [b"0", b"0", b""]
