"""The documentation: complete, without dead links, and with examples that run."""

from __future__ import annotations

import ast
import contextlib
import inspect
import operator
import os
import re
import shlex
import signal
import socket
import socketserver
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from http.server import HTTPServer
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import pytest

import fastserve
import fastserve.testing
from fastserve import _backend, proxy, stats, systemd
from fastserve.cli import make_parser
from fastserve.cli.run import own_arguments
from support import open_descriptors, serving, settle, talk, wait_until

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]
WITH_CODE = [page for page in PAGES if "```python\n" in page.read_text("utf-8")]

CODE_BLOCK = re.compile(
    r"^(?P<runnable><!-- runnable -->\n)?```python\n(?P<code>.*?)^```$", flags=re.DOTALL | re.MULTILINE
)
LINK = re.compile(r"\]\((?!https?:)(?P<path>[^)#]*)(?:#(?P<anchor>[^)]*))?\)")
SPECIAL_METHODS = {"__init__", "__enter__", "__exit__"}


class Row(NamedTuple):
    """A row of the compatibility table."""

    name: str
    stdlib: str
    py: str
    c: str

    def is_in_this_stdlib(self) -> bool:
        """Return whether the table says that this Python's stdlib has the name."""
        if self.stdlib == "yes":
            return True
        first = re.fullmatch(r"(\d+)\.(\d+)\+", self.stdlib)
        assert first, f"{self.name}: {self.stdlib!r} is neither 'yes' nor a version"
        return sys.version_info >= (int(first[1]), int(first[2]))


def compatibility_table() -> list[Row]:
    lines = (DOCS / "compatibility.md").read_text("utf-8").splitlines()
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines if line[:3] == "| `"]
    return [Row(*row[:4]) for row in rows]


def set_on_instances(cls: type) -> set[str]:
    """Return the attributes that the methods of ``cls`` itself assign on ``self``."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    names = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
    return {f"_{cls.__name__}{name}" if name.startswith("__") else name for name in names}


def public_names() -> Iterator[str]:
    """Yield the names of ``socketserver.__all__``, and what each class defines that none of its bases has."""
    for name in socketserver.__all__:
        yield name
        cls = getattr(socketserver, name)
        for attribute in vars(cls):
            if not attribute.startswith("_") or attribute in SPECIAL_METHODS:
                yield f"{name}.{attribute}"
        inherited = set().union(*(set_on_instances(base) for base in cls.__mro__[1:-1]))
        for attribute in set_on_instances(cls) - inherited:
            if not attribute.startswith("_"):
                yield f"{name}.{attribute}"


def exists(module: ModuleType, name: str) -> bool:
    class_name, _, attribute = name.partition(".")
    found = getattr(module, class_name, None)
    if not attribute or found is None:
        return found is not None
    return hasattr(found, attribute) or any(attribute in set_on_instances(base) for base in found.__mro__[:-1])


def test_the_compatibility_table_has_a_row_for_every_public_name_of_socketserver() -> None:
    missing = set(public_names()) - {row.name for row in compatibility_table()}
    assert not missing


def test_the_compatibility_table_has_no_name_twice() -> None:
    names = [row.name for row in compatibility_table()]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("row", compatibility_table(), ids=lambda row: row.name)
def test_a_row_of_the_compatibility_table_is_true(row: Row) -> None:
    assert exists(socketserver, row.name) == row.is_in_this_stdlib()
    # Neither implementation lacks any name: they differ in the core alone, which has no public name.
    assert (row.py, row.c) == ("yes", "yes")
    assert exists(fastserve, row.name)


def test_fastserve_defines_every_public_method_itself() -> None:
    for name in public_names():
        class_name, _, attribute = name.partition(".")
        theirs = vars(getattr(socketserver, class_name)).get(attribute)
        if isinstance(theirs, FunctionType):
            assert attribute in vars(getattr(fastserve, class_name)), name


def test_every_deviation_names_a_test_that_exists() -> None:
    text = (DOCS / "differences.md").read_text("utf-8")
    tests = {
        name
        for path in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r"^\s*def (test_\w+)", path.read_text("utf-8"), flags=re.MULTILINE)
    }
    sections = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    assert sections
    for section in sections:
        title = section.partition("\n")[0]
        named = set(re.findall(r"`(test_\w+)`", section))
        assert named, f"{title!r} names no test"
        assert named <= tests, f"{title!r} names tests that do not exist: {named - tests}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_relative_links_point_to_files_and_headings_that_exist(page: Path) -> None:
    for link in LINK.finditer(page.read_text("utf-8")):
        target = page.parent / link["path"] if link["path"] else page
        assert target.is_file(), link[0]
        assert not link["anchor"] or link["anchor"] in anchors(target), link[0]


def test_the_navigation_lists_every_page_once_and_so_does_the_front_page() -> None:
    text = (DOCS / "index.md").read_text("utf-8")
    groups = re.findall(r"```\{toctree\}\n:hidden:\n:caption: (\w+)\n\n(.*?)```", text, flags=re.DOTALL)
    listed = [page for _, pages in groups for page in pages.split()]
    assert sorted([*listed, "index"]) == sorted(page.stem for page in DOCS.glob("*.md"))
    # The headings of the page are the captions of the navigation, with the same pages under them.
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert [section.partition("\n")[0] for section in sections] == [caption for caption, _ in groups]
    for section, (caption, pages) in zip(sections, groups, strict=True):
        assert re.findall(r"\]\((\w+)\.md\)", section) == pages.split(), caption


def documented() -> set[str]:
    """Return the names of which the page Interface has the contract, and those of its table of combinations."""
    text = (DOCS / "api.md").read_text("utf-8")
    combinations = text.partition("### Predefined combinations")[2].partition("\n#")[0]
    directives = re.findall(
        r"^\.\. (?:auto(?:class|exception|function)|data):: fastserve\.([\w.]+)(?:\(.*)?$", text, re.MULTILINE
    )
    assert sorted(directives) == sorted(set(directives))
    return {*directives, *re.findall(r"`(\w+Server)`", combinations)}


def interface() -> Iterator[str]:
    """Yield what may be imported: the names of the package, and of its modules that users import."""
    yield from fastserve.__all__
    for module in (proxy, stats, systemd, fastserve.testing):
        for name, value in vars(module).items():
            # Types and functions alone: constants are for the package itself, and the rest are imports.
            if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__:
                yield name if name in fastserve.__all__ else f"{module.__name__.partition('.')[2]}.{name}"


def test_the_page_interface_has_every_public_name() -> None:
    assert set(fastserve.__extensions__) <= set(fastserve.__all__)
    beside = {"proxy.ProxySSL", "streams.Connection", "tasks.Spawned", "patching.Patched", "testing.ServerFactory"}
    assert documented() == set(interface()) | beside


def public_objects() -> Iterator[Any]:
    """Yield what is documented and has a docstring of its own, with the public methods that each class defines."""
    for name in sorted(documented()):
        found = operator.attrgetter(name)(fastserve)
        if not (isinstance(found, type) or inspect.isfunction(found)):
            continue
        yield pytest.param(found, id=name)
        for attribute, value in vars(found).items():
            method = getattr(value, "fget", None) or getattr(value, "__func__", value)
            if not attribute.startswith("_") and inspect.isfunction(method):
                yield pytest.param(method, id=f"{name}.{attribute}")


@pytest.mark.parametrize("found", [*public_objects()])
def test_what_is_public_has_a_docstring_of_its_own(found: Any) -> None:
    assert (vars(found) if isinstance(found, type) else {"__doc__": found.__doc__}).get("__doc__")


@pytest.mark.skipif(not (ROOT / "src").exists(), reason="the tests of a wheel have no sources beside them")
def test_the_module_map_names_every_file_of_the_package_and_no_other() -> None:
    text = (DOCS / "design.md").read_text("utf-8").partition("## Module map")[2]
    named = [
        name for row in re.findall(r"^\| (`.*?) \|", text, flags=re.MULTILINE) for name in re.findall("`(.+?)`", row)
    ]
    assert sorted(named) == sorted(set(named))
    package = ROOT / "src" / "fastserve"
    files = {
        path.relative_to(package).as_posix()
        for suffix in ("py", "pyx", "pxd", "pxi", "h")
        for path in package.rglob(f"*.{suffix}")
        if "__pycache__" not in path.parts
    }
    assert set(named) == (files - {"workers/__init__.py"}) | {"_fastserve_pytest.py"}


def code_blocks(only_runnable: bool = False) -> list[object]:
    found = []
    for page in WITH_CODE:
        for number, block in enumerate(CODE_BLOCK.finditer(page.read_text("utf-8")), 1):
            if block["runnable"] or not only_runnable:
                found.append(pytest.param(block["code"], id=f"{page.name}-{number}"))
    assert found
    return found


@pytest.mark.parametrize("code", code_blocks())
def test_code_in_the_documentation_compiles(code: str) -> None:
    compile(code, "example", "exec")


def commands() -> list[object]:
    """Return the commands of all pages that are ours, each as its words."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```$", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["fastserve"]:
                    found.append(pytest.param(words[1:], id=f"{page.stem}: {' '.join(words)}"))
    assert found
    return found


@pytest.mark.parametrize("words", commands())
def test_commands_in_the_documentation_have_arguments_that_there_are(words: list[str]) -> None:
    # What follows the program that is run is the program's own.
    own = words[: 1 + own_arguments(words[1:])] if words[0] == "run" else words
    assert callable(make_parser().parse_args(own).command)


@pytest.mark.parametrize("no_extensions", ["0", "1"])
@pytest.mark.parametrize("code", code_blocks(only_runnable=True))
def test_runnable_code_in_the_documentation_runs(code: str, no_extensions: str, tmp_path: Path) -> None:
    if "Greenlet" in code:
        pytest.importorskip("greenlet")
        if not _backend.has_gil():
            pytest.skip("greenlets need the GIL")
    program = tmp_path / "example.py"
    program.write_text(code, "utf-8")
    # What a whole run was told to do without is not brought back.
    refused = os.environ.get("FASTSERVE_NO_EXTENSIONS") or no_extensions
    result = subprocess.run(
        [sys.executable, "-W", "error", program],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "FASTSERVE_NO_EXTENSIONS": refused},
    )
    assert result.returncode == 0, result.stderr
    for expected in re.findall(r"print\(.*\)  # (.*)", code):
        assert expected in result.stdout


# Deviations of the page Differences that belong to no other file

ADDRESS = ("127.0.0.1", 0)
LONG = 30.0  # seconds; a poll_interval that no test waits for


class Upper(fastserve.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(self.rfile.readline().upper())


@contextlib.contextmanager
def asleep(server: Any) -> Iterator[None]:
    """Serve for the time of the block, in which the loop sleeps after its first request."""
    with serving(server, LONG):
        wait_until(lambda: vars(server).get("_fastserve_state") and vars(server)["_fastserve_state"].loops)
        assert talk(server.server_address, b"a\n") == b"A\n"
        # The turn of this request must be over, and nothing but the sleep of the thread tells that it is.
        (thread,) = (thread for thread in threading.enumerate() if thread.name == "serving")
        settle(thread.native_id or 0)
        yield


def test_service_actions_assigned_while_the_loop_sleeps_is_seen_at_its_next_turn(impl: str) -> None:
    called = threading.Event()
    server: Any = fastserve.TCPServer(ADDRESS, Upper)
    with asleep(server):
        server.service_actions = called.set
        assert not called.wait(0.1)
        assert talk(server.server_address, b"a\n") == b"A\n"
        assert called.wait(60)


def test_the_flag_written_through_dict_is_seen_at_the_next_turn(impl: str) -> None:
    server: Any = fastserve.TCPServer(ADDRESS, Upper)
    with asleep(server):
        vars(server)["_BaseServer__shutdown_request"] = True
        assert not server._BaseServer__is_shut_down.wait(0.1)
        with socket.create_connection(server.server_address):
            assert server._BaseServer__is_shut_down.wait(60)


def test_a_running_loop_has_descriptors_of_its_own(impl: str) -> None:
    with fastserve.TCPServer(ADDRESS, Upper) as server:
        before = open_descriptors()
        with serving(server):
            assert talk(server.server_address, b"a\n") == b"A\n"
            # The connection is closed a moment after its client has seen the end.
            wait_until(lambda: 1 <= open_descriptors() - before <= 3)
    assert open_descriptors() == before - 1  # the listener


def test_a_signal_wakeup_that_is_taken_over_stays_with_its_new_owner(impl: str) -> None:
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def take_over_and_stop(request: Any, client_address: Any, server: Any) -> None:
        signal.set_wakeup_fd(writer.fileno())
        server.shutdown()

    try:
        with reader, writer, fastserve.TCPServer(ADDRESS, take_over_and_stop) as server:
            with socket.create_connection(server.server_address):
                server.serve_forever(LONG)
            assert signal.set_wakeup_fd(-1) == writer.fileno()
    finally:
        signal.set_wakeup_fd(-1)


@pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT"), reason="no SO_REUSEPORT here")
@pytest.mark.parametrize("name", ["TCPServer", "UDPServer", "UnixStreamServer", "UnixDatagramServer"])
def test_reuse_port_is_set_for_ip_listeners_only(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Listener(socket.socket):
        options: list[int] = []

        def setsockopt(self, level: int, option: int, value: Any) -> None:  # type: ignore[override]
            self.options.append(option)
            super().setsockopt(level, option, value)

    monkeypatch.setattr(socket, "socket", Listener)
    monkeypatch.chdir(tmp_path)  # the path of a Unix socket is short
    base = getattr(fastserve, name)
    with type(name, (base,), {"allow_reuse_port": True})("path" if "Unix" in name else ADDRESS, Upper):
        assert (socket.SO_REUSEPORT in Listener.options) is ("Unix" not in name)


def test_the_mix_in_and_the_server_that_are_named_first_win() -> None:
    class Theirs(socketserver.ThreadingMixIn, fastserve.TCPServer):
        pass

    class Ours(fastserve.ThreadingMixIn, HTTPServer, fastserve.TCPServer):
        pass

    class WithoutTheirs(fastserve.ThreadingTCPServer, HTTPServer):
        pass

    assert Theirs.process_request is socketserver.ThreadingMixIn.process_request
    assert Theirs.serve_forever is fastserve.BaseServer.serve_forever
    assert Ours.process_request is fastserve.ThreadingMixIn.process_request
    assert Ours.serve_forever is fastserve.BaseServer.serve_forever
    assert Ours.server_bind is HTTPServer.server_bind
    assert WithoutTheirs.server_bind is fastserve.TCPServer.server_bind


def test_a_served_server_has_one_more_key_in_its_dict(impl: str) -> None:
    with (
        fastserve.TCPServer(ADDRESS, Upper) as ours,
        socketserver.TCPServer(ADDRESS, Upper) as theirs,
    ):
        assert vars(ours).keys() == vars(theirs).keys()
        ours.shutdown()
        ours.serve_forever()
        assert vars(ours).keys() - vars(theirs).keys() == {"_fastserve_state"}


@pytest.mark.parametrize(("place", "made"), [("socketserver", 1), ("fastserve", 0)])
def test_a_module_is_replaced_in_socketserver_not_in_fastserve(
    impl: str, monkeypatch: pytest.MonkeyPatch, place: str, made: int
) -> None:
    class Threading(ModuleType):
        events = 0

        def Event(self) -> threading.Event:
            self.events += 1
            return threading.Event()

    recorder = Threading("threading")
    monkeypatch.setattr(sys.modules[place], "threading", recorder)
    with fastserve.TCPServer(ADDRESS, Upper):
        assert recorder.events == made


def test_the_classes_say_that_they_are_of_fastserve() -> None:
    for name in socketserver.__all__:
        ours = getattr(fastserve, name)
        assert ours.__name__ == name
        assert ours.__module__.startswith("fastserve.")


def test_a_loop_that_runs_when_the_patch_is_applied_is_the_stdlibs_to_its_end(impl: str) -> None:
    ours: list[bool] = []

    class Server(socketserver.TCPServer):
        def get_request(self) -> Any:
            # The stdlib's loop leaves no note of itself in the server.
            ours.append("_fastserve_state" in vars(self))
            return super().get_request()

    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(ADDRESS, Upper))
        with serving(server, 0.01):
            assert talk(server.server_address, b"a\n") == b"A\n"
            stack.enter_context(fastserve.patched())
            assert talk(server.server_address, b"a\n") == b"A\n"
            assert ours == [False, False]
    with fastserve.patched(), Server(ADDRESS, Upper) as server, serving(server, LONG):
        assert talk(server.server_address, b"a\n") == b"A\n"
    assert ours == [False, False, True]
