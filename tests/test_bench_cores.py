"""The script that measures what a second processor is worth."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import LIMIT

SCRIPT = Path(__file__).parent.parent / "bench" / "cores.py"

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: ())(0)) < 2, reason="it needs two processors"),
]


def test_each_server_has_a_line_with_both_rates() -> None:
    options = ["--rounds", "1", "--seconds", "0.1", "--work", "2000"]
    result = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, timeout=LIMIT)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert len(lines) == 4
    for line, name in zip(lines[1:], ("stdlib threading", "fastserve threads", "fastserve pool"), strict=True):
        match = re.fullmatch(rf"{name} +with(out a| the) GIL: (\d+) requests/s on one core, (\d+) on two: .*", line)
        assert match and int(match[2]) > 0 and int(match[3]) > 0, line
