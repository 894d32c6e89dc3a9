"""Programs in processes of their own: started on either implementation, talked to, and ended with Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import fastserve
from fastserve import _backend
from support import settle, without_slow_handlers

IMPLEMENTATIONS = ["py"] if _backend.refused() else ["c", "py"]
TIME_LIMIT = 60.0  # seconds for a child to end

# Python 3.12 and later warn of a fork beside other threads, and rightly so. A program that is there to show just
# this, and whose other threads hold nothing that the forked child needs, is let off.
FORK_BESIDE_THREADS = "ignore:This process:DeprecationWarning"


class Child:
    """A running program."""

    def __init__(self, process: subprocess.Popen[str], errors: Path) -> None:
        self.process = process
        self._errors = errors

    def line(self) -> str:
        """Return the next line that the program prints."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"it printed nothing more:\n{self.errors()}"
        return line.rstrip("\n")

    def port(self) -> int:
        """Return the port at the end of the next line."""
        return int(self.line().rpartition(":")[2])

    def errors(self) -> str:
        """Return what it has written to standard error."""
        return without_slow_handlers(self._errors.read_text())

    def interrupt(self) -> str:
        """Press Ctrl-C, and return what it still prints; it must end with status 0 and without a traceback.

        It has come to rest before. What an interrupt may break in two, such as ``socket.close()`` and the callback of a
        weak reference, is not for a server to mend.
        """
        if os.path.isdir("/proc/self/task"):
            settle(self.process.pid)
        else:
            time.sleep(0.1)
        self.process.send_signal(signal.SIGINT)
        return self.end()

    def end(self) -> str:
        """Wait for its end, and return what it still prints; status and standard error must be clean."""
        assert self.process.stdout is not None
        try:
            status = self.process.wait(TIME_LIMIT)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # faulthandler tells where its threads are
            self.process.wait(TIME_LIMIT)
            raise AssertionError(f"it has not ended:\n{self.errors()}") from None
        assert status == 0, self.errors()
        assert "Traceback" not in self.errors() and "Warning" not in self.errors(), self.errors()
        return self.process.stdout.read()


@contextlib.contextmanager
def child(
    implementation: str, directory: Path, arguments: Sequence[str], allowed: Sequence[str] = ()
) -> Iterator[Child]:
    """Run Python with ``arguments`` on ``implementation`` for the time of the block.

    Every warning is an error there, also that of a socket which is not closed.

    :param directory: where its standard error is kept.
    :param allowed: filters, as for ``python -W``, for the warnings that are no errors.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PYTHONPATH"] = str(Path(fastserve.__file__).parent.parent)  # the package that is under test here
    environment["FASTSERVE_NO_EXTENSIONS"] = "1" if implementation == "py" else "0"
    filters = [f"-W{text}" for text in ("error", *allowed)]
    errors = directory / "stderr.txt"
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-u", "-X", "faulthandler", *filters, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
            cwd=directory,
        ) as process,
    ):
        try:
            yield Child(process, errors)
        finally:
            process.kill()


def program(order: str, imports: str, body: str) -> list[str]:
    """Return the arguments of a program that runs ``body`` on fastserve through ``patch()``.

    :param order: whether ``imports`` come ``"before"`` or ``"after"`` the patch.
    :param imports: what the program imports, and classes that it derives at once.
    :param body: the rest; it calls ``serve(server)`` or uses ``until_interrupted()``.
    """
    assert order in ("before", "after")
    begin = [imports, _PATCH] if order == "before" else [_PATCH, _NOT_YET, imports]
    return ["-c", "\n".join([_HEAD, *begin, body, _TAIL])]


# It watches all calls: a program that runs on fastserve calls no function of the module socketserver.
_HEAD = """
import contextlib, os, socketserver, sys, threading, types

def functions():
    return {
        (cls, name): value
        for cls in vars(socketserver).values() if isinstance(cls, type) and cls.__module__ == "socketserver"
        for name, value in vars(cls).items() if isinstance(value, types.FunctionType) or "shutdown_request" in name
    }

def watch(frame, event, argument):
    if event == "call":
        owner = frame.f_globals.get("__name__", "").partition(".")[0]
        if owner in called:
            called[owner].add(frame.f_code.co_qualname)

@contextlib.contextmanager
def until_interrupted():
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted")

def serve(server):
    with server, until_interrupted():
        print("listening on", f"{server.server_address[0]}:{server.server_address[1]}")
        server.serve_forever()

stdlib = functions()
called = {"fastserve": set(), "socketserver": set()}
"""
# Nothing above has imported what the program is to import after the patch.
_NOT_YET = """
programs = {"dnslib", "http.server", "logging.config", "werkzeug", "wsgiref.simple_server", "xmlrpc.server"}
assert not programs & set(sys.modules)
"""
_PATCH = """
import fastserve
assert fastserve.implementation == ("py" if os.environ["FASTSERVE_NO_EXTENSIONS"] == "1" else "c")
fastserve.patch()
for name in ("serve_forever", "handle_request", "shutdown", "_handle_request_noblock"):
    assert getattr(socketserver.BaseServer, name) is getattr(fastserve.BaseServer, name)
assert socketserver.TCPServer.get_request is fastserve.TCPServer.get_request
threading.setprofile(watch)
sys.setprofile(watch)
"""
_TAIL = """
sys.setprofile(None)
threading.setprofile(None)
assert called["fastserve"] & {"BaseServer.serve_forever", "BaseServer.handle_request"}, called
assert "BaseRequestHandler.__init__" in called["fastserve"] or "ForkingMixIn.process_request" in called["fastserve"]
# What stands for the threads of a server that has none is an object of the stdlib's, and does nothing.
from_stdlib = {name for name in called["socketserver"] if not name.startswith("_NoThreads.")}
assert from_stdlib <= ({"__getattr__"} if sys.version_info >= (3, 15) else set()), called  # that of the module
assert functions() != stdlib
fastserve.unpatch()
assert functions() == stdlib
print("the stdlib is itself again")
"""

THE_END = "the stdlib is itself again\n"
