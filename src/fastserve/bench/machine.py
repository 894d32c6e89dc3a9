"""What a figure was measured on: without it, a figure means nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fastserve

GIT_LIMIT = 10.0  # seconds


def describe(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Return a description of this machine and of what runs on it, fit for JSON.

    ``packages`` are distributions whose versions are wanted too; the version of one that is not installed is
    ``None``. So is the commit where fastserve does not run from a checkout. A commit ends in ``+`` if the
    checkout has changes to its files that are not committed.
    """
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "fastserve": fastserve.__version__,
        "implementation": fastserve.implementation,
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "packages": {name: _version(name) for name in packages},
    }


def _cpu() -> str:
    """Return the name of the processor."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the commit of the checkout that fastserve runs from."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=GIT_LIMIT
        ).stdout.strip()

    try:
        # An installed copy may lie in a checkout of something else, where git would tell of that.
        git("ls-files", "--error-unmatch", "../__init__.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
