"""``fastserve info``: what this installation consists of."""

from __future__ import annotations

import argparse
import os
from typing import Any

import fastserve
from fastserve import _backend, pollers


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command to those of the command line."""
    description = 'Tell what this installation consists of and runs on, one "name: value" a line.'
    help = "tell version, core, poller and platform"
    parser = commands.add_parser("info", help=help, description=description, epilog="example:\n  fastserve info\n")
    parser.set_defaults(command=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Print the facts."""
    import platform
    from importlib import metadata

    system = platform.uname()
    reason = "FASTSERVE_NO_EXTENSIONS is set" if _backend.refused() else "the extension is not built"
    gil = "with the GIL" if _backend.has_gil() else "without the GIL"
    build = "free-threaded, " if _backend.FREE_THREADED else ""
    try:
        greenlets = "c" if _backend.hub().__name__ == "fastserve._hub" else "py"
    except (ImportError, RuntimeError) as error:
        greenlets = f"not available ({error})"
    facts = {
        "fastserve": fastserve.__version__,
        "implementation": "c" if fastserve.implementation == "c" else f"py ({reason})",
        "greenlets": greenlets,
        "poller": pollers.poller_name() + (" (FASTSERVE_POLLER)" if os.environ.get("FASTSERVE_POLLER") else ""),
        "python": f"{platform.python_implementation()} {platform.python_version()} ({build}{gil})",
        "platform": f"{system.system} {system.release} {system.machine}",
    }
    for package in ("greenlet", "matplotlib", "rich"):
        facts[package] = next((found.version for found in metadata.distributions(name=package)), "not installed")
    for name, value in facts.items():
        print(f"{name + ':':{max(map(len, facts)) + 1}} {value}")
    return 0
