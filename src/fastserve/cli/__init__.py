"""The command line: ``fastserve run``, ``fastserve serve``, ``fastserve bench`` and ``fastserve info``.

Wrong arguments end in one line on standard error and exit status 2; an error of the program or the handler
module that was named shows its traceback, as under ``python``.
"""

from __future__ import annotations

import argparse
import sys
from typing import Final

import fastserve
from fastserve import pollers
from fastserve.cli import bench, info, run, serve
from fastserve.cli.arguments import Parser, UsageError
from fastserve.cli.serve import _resolve as _resolve

EPILOG: Final = """\
"fastserve COMMAND --help" describes a command.

environment:
  FASTSERVE_NO_EXTENSIONS=1  use the pure-Python core
  FASTSERVE_POLLER=NAME      wait with epoll, kqueue, poll or select

examples:
  fastserve run -m http.server 8000
  fastserve serve echo.py:Handler --bind 127.0.0.1:7000
  fastserve bench echo.py:Handler
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    description = "Run servers written for the standard library's socketserver on fastserve."
    parser = Parser(prog="fastserve", description=description, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"fastserve {fastserve.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in run, serve, bench, info:
        command.add(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv``, without the program's name (``None``: that of the process).

    Returns the exit status. Raises ``SystemExit`` for wrong arguments and for ``--help``, and whatever the program
    raises that is run. ``sys.argv``, ``sys.path``, ``__main__`` and signal handlers are not restored afterwards.
    """
    argv = sys.argv[1:] if argv is None else argv
    # What follows MODULE or SCRIPT is the program's own; argparse would look for options of ours in it.
    end = 1 + run.own_arguments(argv[1:]) if argv[:1] == ["run"] else len(argv)
    args, unknown = make_parser().parse_known_args(argv[:end], argparse.Namespace(rest=argv[end:]))
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        pollers.poller_name()
    except ValueError as error:  # from FASTSERVE_POLLER
        args.parser.error(str(error))
    try:
        status: int = args.command(args)
    except UsageError as error:
        args.parser.error(str(error))
    return status
