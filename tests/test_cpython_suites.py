"""CPython's own test suites with fastserve in the place of socketserver."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import TWINS

SCRIPT = Path(__file__).with_name("cpython_suites.py")

# The suites take half a minute a run. How fastserve is put in place and which twin serves are independent of each
# other: three of the four combinations show both.
COMBINATIONS = (
    [("c", "module"), ("c", "patch"), ("py", "module")] if "c" in TWINS else [("py", "module"), ("py", "patch")]
)


@pytest.mark.timeout(900)
@pytest.mark.skipif(
    importlib.util.find_spec("test.test_socketserver") is None, reason="this Python came without its test package"
)
@pytest.mark.parametrize(("implementation", "how"), COMBINATIONS)
def test_cpython_suites_pass(implementation: str, how: str) -> None:
    environment = dict(os.environ, FASTSERVE_NO_EXTENSIONS="1" if implementation == "py" else "0")
    # What this run's own configuration says about pytest and warnings is not meant for CPython's suites.
    environment.pop("PYTHONWARNINGS", None)
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--as", how],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=880,
    )
    assert result.returncode == 0, result.stdout
