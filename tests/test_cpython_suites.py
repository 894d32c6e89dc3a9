"""CPython's own test suites with fastserve in the place of socketserver."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import TWINS

SCRIPT = Path(__file__).with_name("cpython_suites.py")

# How fastserve is put in place and which twin serves are independent of each other: three of the four combinations
# show both.
COMBINATIONS = (
    [("c", "module"), ("c", "patch"), ("py", "module")] if "c" in TWINS else [("py", "module"), ("py", "patch")]
)
if importlib.util.find_spec("greenlet") is not None:
    COMBINATIONS.append((COMBINATIONS[0][0], "greenlets"))
TIME_LIMIT = 900  # seconds


@pytest.fixture(scope="module")
def running() -> Iterator[dict[tuple[str, str], subprocess.Popen[str]]]:
    """The suites of all combinations, side by side: they mostly wait."""
    with contextlib.ExitStack() as stack:
        started = {}
        for implementation, how in COMBINATIONS:
            environment = dict(os.environ, FASTSERVE_NO_EXTENSIONS="1" if implementation == "py" else "0")
            # What this run's own configuration says about pytest and warnings is not meant for CPython's suites.
            environment.pop("PYTHONWARNINGS", None)
            process = subprocess.Popen(
                [sys.executable, str(SCRIPT), "--as", how],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            started[implementation, how] = process
        yield started


@pytest.mark.timeout(TIME_LIMIT + 20)
@pytest.mark.skipif(
    importlib.util.find_spec("test.test_socketserver") is None, reason="this Python came without its test package"
)
@pytest.mark.parametrize(("implementation", "how"), COMBINATIONS)
def test_cpython_suites_pass(
    running: dict[tuple[str, str], subprocess.Popen[str]], implementation: str, how: str
) -> None:
    process = running[implementation, how]
    output, _ = process.communicate(timeout=TIME_LIMIT)
    assert process.returncode == 0, output
    print(output)
