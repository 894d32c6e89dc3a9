"""The command line, in processes of its own: ``python -m fastserve`` and the script ``fastserve``."""

from __future__ import annotations

import os
import re
import socket
import sys
from pathlib import Path

import pytest

import fastserve
from cli_support import (
    HANDLERS,
    NEEDS_GREENLET,
    assert_refused,
    cli,
    fastserve_script,
    needs_unix,
    run,
)
from fastserve import pollers

# help, version, wrong arguments


@pytest.mark.parametrize(
    "command, said",
    [
        ([], ["run", "serve", "info", "--version", "FASTSERVE_POLLER"]),
        (["run"], ["-m MODULE", "SCRIPT", "ARGS", "http.server"]),
        (
            ["serve"],
            ["127.0.0.1:8000", "--udp", "default: threads", f"default: {socket.SOMAXCONN}", "bytes", "8192", "SIGTERM"],
        ),
        (["info"], ["name: value"]),
    ],
    ids=["fastserve", "run", "serve", "info"],
)
def test_help_shows_usage_options_and_an_example(command: list[str], said: list[str]) -> None:
    shown = cli(*command, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith(" ".join(["usage: fastserve", *command]))
    assert re.search(r"^examples?:\n  .*fastserve ", shown.stdout, re.MULTILINE)
    words = " ".join(shown.stdout.split())
    assert [text for text in said if text not in words] == []
    assert max(map(len, shown.stdout.splitlines())) <= 100


@pytest.mark.once
def test_the_script_and_the_module_are_the_same_program() -> None:
    script = fastserve_script()
    for args in ["--help"], ["serve", "--help"], ["--version"], ["info"], ["serve"]:
        ours, theirs = run([*script, *args]), cli(*args)
        assert (ours.returncode, ours.stdout, ours.stderr) == (theirs.returncode, theirs.stdout, theirs.stderr)


def test_version() -> None:
    assert cli("--version").stdout == f"fastserve {fastserve.__version__}\n"


@pytest.mark.parametrize(
    "args, prog, said",
    [
        ("", "fastserve", "COMMAND"),
        ("--nope", "fastserve", "COMMAND"),
        ("nope", "fastserve", "'nope'"),
        ("info more", "fastserve info", "more"),
        ("run", "fastserve run", "SCRIPT is required"),
        ("run --nope", "fastserve run", "--nope"),
        ("run -m", "fastserve run", "-m"),
        ("run --worker", "fastserve run", "--worker"),
        ("run --worker greenlet", "fastserve run", "MODULE or a SCRIPT"),
        ("run --worker sync handlers.py", "fastserve run", "'sync'"),
        ("run --worker=nope -m handlers", "fastserve run", "'nope'"),
        ("run --worker greenlet -m", "fastserve run", "-m"),
        pytest.param("run --worker greenlet -m nope", "fastserve run", "No module named nope", marks=NEEDS_GREENLET),
        ("run nope.py", "fastserve run", "nope.py': No such file"),
        ("run -m nope", "fastserve run", "No module named nope"),
        ("run -m nope.more", "fastserve run", "'nope.more'"),
        ("run -m namespace", "fastserve run", "namespace"),
        ("run namespace", "fastserve run", "__main__"),
        ("serve", "fastserve serve", "MODULE:HANDLER"),
        ("serve handlers", "fastserve serve", "'handlers' is not MODULE:HANDLER"),
        ("serve handlers:", "fastserve serve", "'handlers:' is not MODULE:HANDLER"),
        ("serve :Lines", "fastserve serve", "':Lines' is not MODULE:HANDLER"),
        ("serve .handlers:Lines", "fastserve serve", "is not MODULE:HANDLER"),
        ("serve handlers:Outer..Lines", "fastserve serve", "is not MODULE:HANDLER"),
        ("serve nope:Handler", "fastserve serve", "No module named 'nope'"),
        ("serve handlers.more:Handler", "fastserve serve", "'handlers' is not a package"),
        ("serve nope.py:Handler", "fastserve serve", "'nope.py'"),
        ("serve socket.py:Handler", "fastserve serve", "'socket' is in use"),
        ("serve handlers:Nope", "fastserve serve", "'handlers' has no attribute 'Nope'"),
        ("serve handlers:Outer.Nope", "fastserve serve", "'Outer' has no attribute 'Nope'"),
        ("serve handlers.py:not_callable", "fastserve serve", "not callable"),
        ("serve handlers:Lines more", "fastserve serve", "more"),
        ("serve handlers:Lines --nope", "fastserve serve", "--nope"),
        ("serve handlers:Lines --worker nope", "fastserve serve", "'nope'"),
        ("serve handlers:Lines --max-workers 2", "fastserve serve", "--worker threadpool"),
        ("serve handlers:Lines --worker threadpool --max-workers 0", "fastserve serve", "'0' is not a whole number"),
        ("serve handlers:Lines --workers 0", "fastserve serve", "'0' is not a whole number"),
        ("serve handlers:Lines --grace 0", "fastserve serve", "--grace"),
        ("serve handlers:Packets --udp --request-timeout 5", "fastserve serve", "--udp"),
        ("serve handlers:Lines --bind 8000", "fastserve serve", "HOST:PORT"),
        ("serve handlers:Lines --bind localhost:http", "fastserve serve", "port"),
        ("serve handlers:Lines --bind 127.0.0.1:65536", "fastserve serve", "65535"),
        ("serve handlers:Lines --bind 127.0.0.1:-1", "fastserve serve", "65535"),
        ("serve handlers:Lines --bind ::1:0", "fastserve serve", "brackets"),
        ("serve handlers:Lines --bind [127.0.0.1]:0", "fastserve serve", "cannot serve on [127.0.0.1]:0: "),
        ("serve handlers:Lines --bind no-such-host.invalid:0", "fastserve serve", "no-such-host.invalid:0: "),
        (f"serve handlers:Lines --bind {'x' * 64}.invalid:0", "fastserve serve", ".invalid:0: "),
        ("serve handlers:Lines --request-queue-size 0", "fastserve serve", "'0' is not a whole number"),
        ("serve handlers:Lines --request-queue-size 99999999999", "fastserve serve", "2147483647"),
        ("serve handlers:Packets --udp --max-packet-size many", "fastserve serve", "'many'"),
        ("serve handlers:Packets --udp --request-queue-size 5", "fastserve serve", "--udp"),
        ("serve handlers:Lines --max-packet-size 5", "fastserve serve", "--udp"),
    ],
)
@pytest.mark.once
def test_wrong_arguments_give_one_line_and_status_2(here: Path, args: str, prog: str, said: str) -> None:
    (here / "namespace").mkdir()
    assert_refused(cli(*args.split()), prog, said)


@needs_unix
@pytest.mark.parametrize(
    "bind, said",
    [
        ("unix:", "path"),
        ("unix:nope/socket", "No such file"),
        (f"unix:/tmp/{'x' * 200}", "too long"),
        ("unix:handlers.py", "in use"),
    ],
)
def test_a_wrong_unix_path_gives_one_line_and_status_2(here: Path, bind: str, said: str) -> None:
    assert_refused(cli("serve", "handlers:Lines", "--bind", bind), "fastserve serve", said)
    assert (here / "handlers.py").read_text() == HANDLERS


@needs_unix
def test_reuse_address_contradicts_a_unix_socket(here: Path) -> None:
    for option in "--reuse-address", "--no-reuse-address":
        failed = cli("serve", "handlers:Lines", "--bind", "unix:socket", option)
        assert_refused(failed, "fastserve serve", "--reuse-address")


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
def test_an_address_in_use_gives_one_line_and_status_2(here: Path, kind: int) -> None:
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            taken.listen()
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        udp = ["--udp"] if kind == socket.SOCK_DGRAM else []
        assert_refused(cli("serve", "handlers:Lines", "--bind", bind, *udp), "fastserve serve", f"{bind}: Address")


def test_fork_where_the_system_has_none_gives_one_line_and_status_2(here: Path) -> None:
    code = "import os, sys; vars(os).pop('fork', None); from fastserve.cli import main; sys.exit(main())"
    failed = run([sys.executable, "-c", code, "serve", "handlers:Lines", "--worker", "fork"])
    assert_refused(failed, "fastserve serve", "no fork")


@pytest.mark.parametrize("args", ["info", "serve handlers:Lines", "run handlers.py"])
def test_an_unavailable_poller_gives_one_line_and_status_2(here: Path, args: str) -> None:
    failed = cli(*args.split(), FASTSERVE_POLLER="nope")
    assert_refused(failed, f"fastserve {args.split()[0]}", "FASTSERVE_POLLER='nope' is not available")


@pytest.mark.parametrize("source", ["nonsense", "import no_such_module", "def f(:", "raise SystemExit('no')"])
@pytest.mark.parametrize("form", ["broken", "broken.py"])
def test_an_error_inside_the_handlers_module_is_shown_as_python_shows_it(here: Path, source: str, form: str) -> None:
    path = here / "broken.py"
    path.write_text(f"x = 1\n{source}\n")
    failed, under_python = cli("serve", f"{form}:Handler"), run([sys.executable, str(path)])
    assert (failed.returncode, failed.stdout, failed.stderr) == (1, "", under_python.stderr)


# info


def facts(**env: str) -> dict[str, str]:
    shown = cli("info", **env)
    assert (shown.returncode, shown.stderr) == (0, "")
    lines = shown.stdout.splitlines()
    assert len({re.match(r"\w+: +", line).end() for line in lines}) == 1, "the values are not aligned"
    return {name: value.strip() for name, value in (line.split(":", 1) for line in lines)}


def test_info_tells_what_is_here(here: Path) -> None:
    found = facts()
    assert found["fastserve"] == fastserve.__version__
    assert found["implementation"].split()[0] == fastserve.implementation
    assert re.fullmatch(r"c|py|not available \(.+\)", found["greenlets"])
    assert found["poller"] == pollers.poller_name()
    assert found["python"].split()[1] == sys.version.split()[0]
    assert "GIL" in found["python"]
    assert found["platform"] == " ".join(os.uname()[i] for i in (0, 2, 4))
    for package in "greenlet", "matplotlib", "rich":
        assert re.fullmatch(r"\d+\.\d+\S*|not installed", found[package])


def test_info_tells_what_the_environment_forced(here: Path) -> None:
    found = facts(FASTSERVE_NO_EXTENSIONS="1", FASTSERVE_POLLER="select")
    assert found["implementation"] == "py (FASTSERVE_NO_EXTENSIONS is set)"
    assert found["poller"] == "select (FASTSERVE_POLLER)"


def test_info_names_the_version_of_an_optional_part_or_its_absence(here: Path) -> None:
    (here / "greenlet-99.1.dist-info").mkdir()
    (here / "greenlet-99.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: greenlet\nVersion: 99.1\n")
    (here / "rich").mkdir()  # a directory of that name is not the package
    source = os.path.dirname(os.path.dirname(fastserve.__file__))
    code = f"import sys; sys.path.append({source!r}); from fastserve.cli import main; main(['info'])"
    shown = run([sys.executable, "-S", "-c", code])  # -S: no installed packages
    assert (shown.returncode, shown.stderr) == (0, "")
    assert re.search(r"^greenlet: +99\.1$", shown.stdout, re.MULTILINE)
    assert re.search(r"^rich: +not installed$", shown.stdout, re.MULTILINE)
