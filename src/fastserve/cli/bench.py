"""``fastserve bench``: a handler of the user's, measured under the stdlib's servers and under ours."""

from __future__ import annotations

import argparse
import codecs
import importlib.util
import json
import os
import re
import sys
from typing import TYPE_CHECKING, Any, Final

from fastserve.cli.arguments import UsageError, positive
from fastserve.cli.targets import require_greenlets
from fastserve.workers._names import WORKERS

if TYPE_CHECKING:
    from fastserve.bench.measure import Load

DEFAULT_WORKER: Final = "threads"
MAX_DATAGRAM: Final = 8192  # UDPServer.max_packet_size: a server takes no more
MAX_DELIMITER: Final = 64
MAX_UNDER_WAY: Final = 1024  # datagrams of one socket
MAX_AT_ONCE: Final = 1 << 26  # bytes
SPARE_DESCRIPTORS: Final = 64

DESCRIPTION: Final = """\
Run a handler class under the standard library's servers and under fastserve's, send it the
same requests, and show in a table how much CPU time each takes, how fast it is, and the ratio.
A handler that raises, hangs or answers wrongly is told of instead of timed.
"""
EPILOG: Final = """\
TEXT and DELIMITER may have the escapes \\n \\r \\t \\0 \\xHH \\\\ of C, so that a delimiter of
digits is not taken for a number of bytes (\\x31\\x30), nor a text for a file (\\x40).

It needs Linux and two processors: the server gets one, the load the other. The bar on a
terminal and --plot need the extra: pip install "fastserve[bench]".

examples:
  fastserve bench echo.py:Handler --connections 50
  fastserve bench echo.py:Handler --worker threads --worker fork --json figures.json
  fastserve bench http.server:SimpleHTTPRequestHandler --send @request.txt --until close
  fastserve bench clock.py:Handler --udp --pipeline 16 --plot clock.svg
"""


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command to those of the command line."""
    help = "measure a handler class, stdlib against fastserve"
    parser = commands.add_parser("bench", help=help, description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("target", metavar="MODULE:HANDLER | FILE.py:HANDLER", help="as for fastserve serve")
    help = r"what a request consists of: a text, or @ and the name of a file (default: 'hello\n')"
    parser.add_argument("--send", metavar="TEXT|@FILE", type=_send, default=b"hello\n", help=help)
    help = (
        r"where an answer ends: at a delimiter, after a number of bytes, or with the connection (default: '\n'; not "
        "with --udp, where a datagram is an answer)"
    )
    parser.add_argument("--until", metavar="DELIMITER|BYTES|close", type=_until, help=help)
    help = "connections at a time, or sockets with --udp (default: %(default)s). They are kept if the handler keeps \
        them; otherwise each is for one request"
    parser.add_argument("--connections", metavar="N", type=positive, default=10, help=help)
    help = "requests that are sent at once on each connection, or datagrams under way on each socket (default: \
        %(default)s)"
    parser.add_argument("--pipeline", metavar="P", type=positive, default=1, help=help)
    help = "seconds of load for each server, spread over rounds (default: %(default)g)"
    parser.add_argument("--duration", metavar="S", type=_seconds, default=5.0, help=help)
    parser.add_argument("--udp", action="store_true", help="send datagrams (default: connections)")
    help = f"a worker model, as for fastserve serve; may be repeated (default: {DEFAULT_WORKER}, because a sync \
        server answers one kept connection at a time)"
    parser.add_argument("--worker", choices=WORKERS, action="append", dest="workers", help=help)
    help = "threads, with --worker threadpool (default: as many as the class takes); a kept connection keeps one"
    parser.add_argument("--max-workers", metavar="N", type=positive, help=help)
    parser.add_argument("--plot", metavar="FILE", type=_output, help="draw the figures too: .svg or .png")
    parser.add_argument("--json", metavar="FILE", type=_output, help="write the figures of each round too")
    parser.set_defaults(command=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Measure, and print the table. Returns 1 if a server failed; raises ``UsageError``."""
    if sys.platform != "linux":
        raise UsageError("the load generator is for Linux alone")
    from fastserve.bench import command
    from fastserve.bench.measure import generator
    from fastserve.bench.probe import ProbeFailed, last_line
    from fastserve.bench.process import ServerFailed, cores

    load = _load(args)
    if args.max_workers and "threadpool" not in (args.workers or ()):
        raise UsageError("--max-workers is for --worker threadpool")
    if "greenlet" in (args.workers or ()):
        require_greenlets()
    try:
        generator()
        server_core, load_core = cores()
    except ServerFailed as error:
        raise UsageError(str(error)) from None
    _allow_descriptors(args.connections)
    _check_plot(args.plot)
    chosen = command.entries(list(dict.fromkeys(args.workers or [DEFAULT_WORKER])))
    try:
        with (
            command.signals_stop(),
            command.started(args.target, chosen, args.udp, server_core, args.max_workers) as servers,
        ):
            return _measure(args, load, chosen, servers, load_core)
    except ServerFailed as error:
        line = last_line(error.errors)
        if error.status == 2 and error.errors and not line:
            raise UsageError(error.errors) from None  # there is no such handler
        head = str(error).partition(":")[0]
        if line and head.endswith("did not start"):
            print(error.errors, file=sys.stderr)  # of the handler's module, as Python shows it
        print(f"fastserve bench: {f'{head}: {line}' if line else error}", file=sys.stderr)
    except ProbeFailed as error:
        print(f"fastserve bench: {error}", file=sys.stderr)
    except command.Stopped as error:
        print("fastserve bench: stopped", file=sys.stderr)
        return error.status
    return 1


def _measure(args: argparse.Namespace, load: Load, chosen: Any, servers: Any, core: int) -> int:
    """Measure with servers that run already, and show what was found."""
    from fastserve.bench import command
    from fastserve.bench.progress import progress

    if not args.workers:
        message = f"--worker {DEFAULT_WORKER}, for none was named (sync answers one kept connection at a time)."
        print(f"It takes {message}", file=sys.stderr)
    print(command.announcement(chosen, load, args.duration), file=sys.stderr, flush=True)
    with progress(len(chosen), command.ROUNDS) as on_round:
        report = command.measure(servers, chosen, load, args.duration, core, on_round, args.max_workers)
    _print("\n".join([f"{args.target}: {report.work()}", "", report.table(), "", *report.notes()]))
    try:
        if args.json:
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump(report.as_json(_arguments(args, load)), file, indent=1)
                file.write("\n")
        if args.plot and len(report.problems()) < len(report.rows):
            from fastserve.bench.plot import plot

            plot(report, args.target, args.plot)
    except OSError as error:
        raise UsageError(f"cannot write {error.filename!r}: {error.strerror}") from None
    for problem in report.problems():
        print(f"fastserve bench: {problem}", file=sys.stderr)
    return 1 if report.problems() else 0


def _load(args: argparse.Namespace) -> Load:
    """Return what the arguments ask to be sent. Raises ``UsageError`` where they contradict each other."""
    from fastserve.bench.measure import Load

    until = b"\n" if args.until is None else args.until
    for wrong, message in (
        (args.udp and args.until is not None, "--until is for connections: with --udp a datagram is an answer"),
        (args.udp and len(args.send) > MAX_DATAGRAM, f"--send: a datagram has at most {MAX_DATAGRAM} bytes"),
        (args.udp and args.pipeline > MAX_UNDER_WAY, f"--pipeline: with --udp it is at most {MAX_UNDER_WAY}"),
        (args.pipeline * len(args.send) > MAX_AT_ONCE, f"--pipeline: at most {MAX_AT_ONCE} bytes are sent at once"),
        (until == "close" and args.pipeline > 1, "--pipeline: with --until close a connection has one answer"),
    ):
        if wrong:
            raise UsageError(message)
    return Load(
        args.send,
        answer=None if until == "close" else until,
        connections=args.connections,
        pipeline=args.pipeline,
        datagrams=args.udp,
    )


def _allow_descriptors(connections: int) -> None:
    """Raise the limit of open files for that many connections, here and in the servers."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SPARE_DESCRIPTORS
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise UsageError(f"--connections: a process may have {hard} files open here (ulimit -Hn)")
    if soft != resource.RLIM_INFINITY and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _check_plot(path: str | None) -> None:
    """Raise ``UsageError`` if there could be no picture, before anything is measured."""
    if path is None:
        return
    from fastserve.bench.plot import FORMATS

    if not path.endswith(FORMATS):
        raise UsageError(f"--plot {path!r}: it draws {' and '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError('--plot needs matplotlib, which the extra brings: pip install "fastserve[bench]"')


def _print(text: str) -> None:
    """Print a text also where standard output cannot show all of it."""
    encoding = sys.stdout.encoding
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.replace("µ", "u").encode(encoding, "backslashreplace").decode(encoding)
    print(text, flush=True)


def _arguments(args: argparse.Namespace, load: Load) -> dict[str, Any]:
    """Return the arguments, fit for JSON."""
    text = {name: repr(value)[2:-1] if isinstance(value, bytes) else value for name, value in vars(args).items()}
    names = ("target", "send", "until", "connections", "pipeline", "duration", "udp", "max_workers")
    found = {name: text[name] for name in names}
    if not args.udp and args.until is None:
        found["until"] = "\\n"
    return found | {"workers": args.workers or [DEFAULT_WORKER], "send_bytes": len(load.payload)}


def _unescape(text: str) -> bytes:
    """Return the bytes that a text with C escapes means."""

    def replace(found: re.Match[bytes]) -> bytes:
        escape = found[0]
        if not re.fullmatch(rb"\\([nrt0\\]|x[0-9a-fA-F]{2})", escape):
            raise argparse.ArgumentTypeError(f"{text!r}: {escape.decode()!r} is none of \\n \\r \\t \\0 \\xHH \\\\")
        return codecs.escape_decode(escape)[0]

    return re.sub(rb"\\(x[0-9a-fA-F]{0,2}|[^x]|$)", replace, os.fsencode(text), flags=re.DOTALL)


def _send(text: str) -> bytes:
    if text.startswith("@"):
        try:
            with open(text[1:], "rb") as file:
                data = file.read()
        except OSError as error:
            raise argparse.ArgumentTypeError(f"cannot read {text[1:]!r}: {error.strerror}") from None
    else:
        data = _unescape(text)
    if not data:
        raise argparse.ArgumentTypeError("there is nothing to send")
    return data


def _until(text: str) -> bytes | int | str:
    if text == "close":
        return text
    if text.isascii() and text.isdigit():
        return positive(text)
    delimiter = _unescape(text)
    if not 0 < len(delimiter) <= MAX_DELIMITER:
        raise argparse.ArgumentTypeError(f"a delimiter has 1 to {MAX_DELIMITER} bytes")
    return delimiter


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 3600")
    return seconds


def _output(text: str) -> str:
    """Convert the name of a file to write; refuse it if it cannot be written."""
    directory = os.path.dirname(text) or "."
    if os.path.isdir(text) or not os.access(text if os.path.exists(text) else directory, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {text!r}")
    return text
