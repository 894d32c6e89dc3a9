"""Scripts that need a process of their own, because they fork, take signals or use up descriptors; their runner."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

TESTS = Path(__file__).parent.parent

# Since 3.12 a fork warns where there are several threads, as there are wherever a forking server does not run in
# the main thread of a program without others. Its children only run the handler, and leave by os._exit().
FORK_WARNING = "ignore:This process:DeprecationWarning"


def run_isolated(
    script: str, variant: str, *arguments: str, seconds: float = 120.0, environment: Mapping[str, str] | None = None
) -> str:
    """Run ``isolated/script.py`` on a variant (``stdlib``, ``py`` or ``c``) and return what it printed.

    Raises ``AssertionError`` with all its output if it fails, or does not end in time: the output then has the
    stacks of its threads.
    """
    process = subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-W", FORK_WARNING, "-m", f"isolated.{script}", variant]
        + list(arguments),
        cwd=TESTS,
        env=os.environ | {"FASTSERVE_NO_EXTENSIONS": "0" if variant == "c" else "1"} | dict(environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    hung = False
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        hung = True
        os.killpg(process.pid, signal.SIGABRT)  # faulthandler, which -X dev turns on, then prints the stacks
        output, errors = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):  # it left no child behind
            os.killpg(process.pid, signal.SIGKILL)
    assert not hung and process.returncode == 0, (
        f"isolated.{script} {variant} {' '.join(arguments)} "
        f"{f'did not end in {seconds} s' if hung else f'exited with {process.returncode}'}\n"
        f"--- stdout ---\n{output}--- stderr ---\n{errors}"
    )
    return output
