"""Run CPython's own test suites with fastserve in the place of socketserver, and compare with the plain stdlib.

    python tests/cpython_suites.py [--as module|patch] [TEST ...]

``--as module`` puts the package into ``sys.modules["socketserver"]`` before anything is imported; ``--as patch``
applies ``fastserve.patch()``. A test that fails counts only if it passes on the plain stdlib, on the same Python
and machine: the failing suites are run again without fastserve, and the difference decides the exit status.
``MiscTestCase.test_all`` of test_socketserver asks for the module's name, and may differ under ``--as module``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

SUITES = [
    "test_socketserver",
    "test_httpservers",
    "test_xmlrpc",
    "test_docxmlrpc",
    "test_wsgiref",
    "test_logging",
    "test_imaplib",
    "test_urllib2_localnet",
]
NAMES_THE_MODULE = "test.test_socketserver.MiscTestCase.test_all"
TIME_LIMIT = 600  # seconds for one run of the suites

# main() is called directly: "python -m test" executes itself anew, without what was done before.
PROGRAM = """
import sys
how = sys.argv.pop(1)
if how == "module":
    import fastserve
    sys.modules["socketserver"] = fastserve
elif how == "patch":
    import fastserve
    fastserve.patch()
    import socketserver
    assert socketserver.TCPServer.get_request is fastserve.TCPServer.get_request
if how != "plain":
    import os
    wanted = "py" if os.environ.get("FASTSERVE_NO_EXTENSIONS", "") not in ("", "0") else "c"
    assert fastserve.implementation == wanted, (fastserve.implementation, wanted)
from test.libregrtest.main import main
main()
"""


def failures(how: str, suites: list[str], directory: str) -> tuple[set[str], int, str]:
    """Run ``suites``; return the names of the tests that did not pass, how many ran, and what was printed."""
    report = Path(directory, f"{how}.xml")
    command = [sys.executable, "-c", PROGRAM, how, "-u", "network", "--junit-xml", str(report), *suites]
    # Warnings are as "python -m test" sets them.
    command[1:1] = ["-W", "default", "-bb"]
    result = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIME_LIMIT,
        cwd=directory,
    )
    if not report.exists():
        sys.exit(f"the suites did not run ({how}, exit status {result.returncode}):\n{result.stdout}")
    cases = list(ET.parse(report).getroot().iter("testcase"))
    failed = {
        case.get("name", "?") for case in cases if case.find("error") is not None or case.find("failure") is not None
    }
    if result.returncode and not failed:
        # A suite may also fail as a whole, for a leaked thread, say.
        failed.add(f"exit status {result.returncode}")
    return failed, len(cases), result.stdout


def main() -> int:
    """Run the suites and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--as", dest="how", choices=["module", "patch"], default="module")
    parser.add_argument("suites", nargs="*", default=SUITES, metavar="TEST")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        failed, count, output = failures(arguments.how, arguments.suites, directory)
        if arguments.how == "module":
            failed.discard(NAMES_THE_MODULE)
        if failed:
            failed -= failures("plain", arguments.suites, directory)[0]
            if failed:
                print(output)
    implementation = "py" if os.environ.get("FASTSERVE_NO_EXTENSIONS", "") not in ("", "0") else "c"
    version = ".".join(map(str, sys.version_info[:3]))
    where = f"CPython {version}, {implementation}, as {arguments.how}"
    print(f"{where}: {count} tests, {len(failed)} fail only with fastserve")
    for name in sorted(failed):
        print(f"  {name}")
    return 1 if failed or not count else 0


if __name__ == "__main__":
    sys.exit(main())
