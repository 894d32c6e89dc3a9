"""Run CPython's own test suites with fastserve in the place of socketserver, and compare with the plain stdlib.

    python tests/cpython_suites.py [--as module|patch|greenlets] [TEST ...]

``--as module`` puts the package into ``sys.modules["socketserver"]`` before anything is imported; ``--as patch``
applies ``fastserve.patch()``, and ``--as greenlets`` applies ``fastserve.patch(threading="greenlet")``. The suites
mostly wait, and run side by side. A test that fails counts only if it fails again when its suite is run once more and
alone, because some suites look at the clock; and if it passes on the plain stdlib, on the same Python and machine. What
is left decides the exit status.
``MiscTestCase.test_all`` and ``TestModule.test_deprecated__version__`` of test_socketserver ask for the module's name
and version, and may differ under ``--as module``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

SUITES = [  # the slow ones first
    "test_logging",
    "test_imaplib",
    "test_urllib2_localnet",
    "test_socketserver",
    "test_httpservers",
    "test_xmlrpc",
    "test_docxmlrpc",
    "test_wsgiref",
]
AT_ONCE = 3  # suites
NAMES_THE_MODULE = {
    "test.test_socketserver.MiscTestCase.test_all",
    "test.test_socketserver.TestModule.test_deprecated__version__",  # from 3.15 on
}
TIME_LIMIT = 240  # seconds for one suite, which takes a quarter of a minute at most

# main() is called directly: "python -m test" executes itself anew, without what was done before.
PROGRAM = """
import sys
how = sys.argv.pop(1)
if how == "module":
    import fastserve
    sys.modules["socketserver"] = fastserve
elif how != "plain":
    import fastserve
    fastserve.patch(threading="greenlet" if how == "greenlets" else "thread")
    import socketserver
    assert socketserver.TCPServer.get_request is fastserve.TCPServer.get_request
    assert hasattr(socketserver.ThreadingMixIn, "serve_forever") is (how == "greenlets")
if how != "plain":
    import os
    wanted = "py" if os.environ.get("FASTSERVE_NO_EXTENSIONS", "") not in ("", "0") else "c"
    assert fastserve.implementation == wanted, (fastserve.implementation, wanted)
from test.libregrtest.main import main
main()
"""


class Outcome(NamedTuple):
    """The names of the tests that did not pass, how many ran, and what was printed."""

    failed: set[str]
    count: int
    output: str


def run(how: str, suite: str) -> Outcome:
    """Run a suite in a process and a directory of its own."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.xml")
        command = [sys.executable, "-c", PROGRAM, how, "-u", "network", "--junit-xml", str(report), suite]
        # Warnings are as "python -m test" sets them.
        command[1:1] = ["-W", "default", "-bb"]
        try:
            result = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=TIME_LIMIT,
                cwd=directory,
            )
        except subprocess.TimeoutExpired as error:
            output = error.output or ""
            if isinstance(output, bytes):  # even of a run that was asked for text
                output = output.decode(errors="replace")
            return Outcome({f"{suite} did not end"}, 0, output)
        if not report.exists():
            # It may have been ended by a signal, say.
            return Outcome({f"{suite} did not run to its end, exit status {result.returncode}"}, 0, result.stdout)
        cases = list(ET.parse(report).getroot().iter("testcase"))
    failed = {
        case.get("name", "?") for case in cases if case.find("error") is not None or case.find("failure") is not None
    }
    if result.returncode and not failed:
        # A suite may also fail as a whole, for a leaked thread, say.
        failed.add(f"{suite}, exit status {result.returncode}")
    if how == "module":
        failed -= NAMES_THE_MODULE
    return Outcome(failed, len(cases), result.stdout)


def main() -> int:
    """Run the suites and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--as", dest="how", choices=["module", "patch", "greenlets"], default="module")
    parser.add_argument("suites", nargs="*", default=SUITES, metavar="TEST")
    arguments = parser.parse_args()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        outcomes = pool.map(lambda suite: run(arguments.how, suite), arguments.suites)
        first = dict(zip(arguments.suites, outcomes, strict=True))
    count = sum(outcome.count for outcome in first.values())
    failed: set[str] = set()
    once: set[str] = set()
    for suite, outcome in first.items():
        if outcome.failed:
            again = run(arguments.how, suite)
            once |= outcome.failed - again.failed
            left = outcome.failed & again.failed
            if left:
                left -= run("plain", suite).failed
            if left:
                print(again.output)
            failed |= left
    implementation = "py" if os.environ.get("FASTSERVE_NO_EXTENSIONS", "") not in ("", "0") else "c"
    version = ".".join(map(str, sys.version_info[:3]))
    where = f"CPython {version}, {implementation}, as {arguments.how}"
    print(f"{where}: {count} tests, {len(failed)} fail only with fastserve")
    for name in sorted(failed):
        print(f"  {name}")
    for name in sorted(once):
        print(f"  {name} failed beside other suites, and passed alone")
    return 1 if failed or not count else 0


if __name__ == "__main__":
    sys.exit(main())
