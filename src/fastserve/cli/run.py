"""``fastserve run``: a program of the user's, on fastserve."""

from __future__ import annotations

import argparse
import builtins
import os
import sys
from types import ModuleType
from typing import Any, Final

import fastserve
from fastserve.cli.arguments import UsageError
from fastserve.cli.targets import put_first_in_path, require_greenlets, shown_without_our_frames
from fastserve.patching import Threading

DESCRIPTION: Final = """\
Run a Python program as "python" does, with fastserve in the place of socketserver
(fastserve.patch()). All that follows MODULE or SCRIPT is the program's own.
"""
EPILOG: Final = """\
With --worker greenlet the requests of a threading server share one thread, and take turns
when they wait for their connections. That is for programs which keep no state for each
thread (threading.local), and hold no lock and call nothing that blocks (time.sleep, a
database, a name server) for long: whatever else waits holds up all clients.

examples:
  fastserve run -m http.server 8000
  fastserve run --worker greenlet chat_server.py --port 7000
"""

# What --worker takes, and what patch() is told.
THREADING: Final[dict[str, Threading]] = {"threads": "thread", "greenlet": "greenlet"}


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command to those of the command line."""
    usage = "fastserve run [-h] [--worker {threads,greenlet}] (-m MODULE | SCRIPT) [ARGS ...]"
    help = "run a program on fastserve, unchanged"
    parser = commands.add_parser("run", usage=usage, help=help, description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("-m", dest="module", metavar="MODULE", help="run a module or package, as python -m does")
    parser.add_argument(
        "script", metavar="SCRIPT", nargs="?", help="run a file, or a directory or zip with __main__.py"
    )
    help = "what socketserver.ThreadingMixIn runs each request in (default: %(default)s)"
    parser.add_argument("--worker", choices=THREADING, default="threads", help=help)
    # For the help alone: main() keeps the program's arguments from the parser.
    parser.add_argument("ARGS", nargs="*", help="the program's own arguments, passed on untouched")
    parser.set_defaults(command=run, parser=parser)


def own_arguments(argv: list[str]) -> int:
    """Return how many of the arguments of the command are not the program's: those up to MODULE or SCRIPT."""
    count = 0
    while argv[count : count + 1] == ["--worker"] or (argv[count:] and argv[count].startswith("--worker=")):
        count += 2 if argv[count] == "--worker" else 1
    return count + (2 if argv[count : count + 1] in (["-m"], ["--"]) else 1)


def run(args: argparse.Namespace) -> int:
    """Run the program that the arguments name. Raises what it raises, and ``UsageError``."""
    if args.module is None and args.script is None:
        raise UsageError("a MODULE or a SCRIPT is required")
    if args.worker == "greenlet":
        require_greenlets()
    fastserve.patch(threading=THREADING[args.worker])
    with shown_without_our_frames():
        if args.module is None:
            _run_script(args.script, args.rest)
        else:
            sys.argv = ["-m", *args.rest]
            put_first_in_path(os.getcwd())
            _run_module(args.module, alter_argv=True)
    return 0


def _run_script(script: str, rest: list[str]) -> None:
    """Run a file, or a directory or zip with ``__main__.py``. Raises ``UsageError`` if it is not to be had."""
    import pkgutil
    from importlib.machinery import SourceFileLoader, SourcelessFileLoader

    sys.argv = [script, *rest]
    path = os.path.join(os.getcwd(), script)
    if pkgutil.get_importer(path) is not None:
        sys.path[: 0 if sys.flags.safe_path else 1] = [path]
        return _run_module("__main__", alter_argv=False)
    loader = (SourcelessFileLoader if path.endswith(".pyc") else SourceFileLoader)("__main__", path)
    try:
        source = loader.get_data(path)
    except OSError as error:
        raise UsageError(f"cannot open {path!r}: {error.strerror}") from None
    code: Any = loader.get_code("__main__") if path.endswith(".pyc") else loader.source_to_code(source, path)
    put_first_in_path(os.path.dirname(os.path.realpath(path)))
    cached = {} if sys.version_info >= (3, 15) else {"__cached__": None}
    exec(code, _new_main(__file__=path, __loader__=loader, **cached))


def _run_module(name: str, alter_argv: bool) -> None:
    """Run a module as ``__main__``. Raises ``UsageError`` if it is not to be had."""
    import runpy

    _new_main()
    try:
        # What the interpreter itself calls for -m. runpy.run_module() would restore __main__ at its last line,
        # while threads of the program may go on.
        runpy._run_module_as_main(name, alter_argv)  # type: ignore[attr-defined]
    except SystemExit as error:
        in_runpy = error.__traceback__ and error.__traceback__.tb_next
        if in_runpy is None or in_runpy.tb_next is not None:
            raise  # the program's own
        raise UsageError(str(error).removeprefix(f"{sys.executable}: ")) from None


def _new_main(**attributes: object) -> dict[str, Any]:
    """Put a new ``__main__`` in the place of ours, for good, and return its names."""
    main_module = sys.modules["__main__"] = ModuleType("__main__")
    vars(main_module).update(__builtins__=builtins, **attributes)
    return vars(main_module)
