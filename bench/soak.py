"""Serve for long, and see that nothing is lost and nothing is left: ``python bench/soak.py WHAT``.

``datagrams`` sends datagrams through a ``UDPServer`` and compares what was sent with what was handled and what the
kernel dropped (``/proc/net/udp``), and descriptors, threads and memory before and after. It ends with status 1 if
something does not add up. ``connections`` makes connections to a ``ThreadingTCPServer`` from several threads, one
exchange each, every tenth of which makes the handler raise, and counts the answers; ``sync``, ``threadpool``, ``fork``
and ``greenlets`` do so to servers of these worker models. ``mixed`` keeps 2,000 connections to one of greenlets, and
meanwhile makes others by chance that break in the middle, end their sending side, time out, flood or pipeline. All need
Linux.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import os
import random
import resource
import socket
import struct
import sys
import threading
import time
from collections.abc import Sequence

import fastserve

WARM_UP = 20_000  # requests after which memory is looked at first
MIXED_WARM_UP = 10_000  # likewise, where they are mixed
GROWTH = 4096  # KiB that a process may grow from then on


def resources() -> dict[str, int]:
    """Return what this process holds: descriptors, threads, and KiB of memory."""
    gc.collect()
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "KiB": int(fields["VmRSS"].split()[0]),
    }


def report_resources(before: dict[str, int], warm: dict[str, int], serving: dict[str, int]) -> list[str]:
    """Print what was held when, and is held at the end; return what of it should not be so."""
    deadline = time.monotonic() + 10
    while (closed := resources())["threads"] > before["threads"] and time.monotonic() < deadline:
        time.sleep(0.01)  # for threads that are about to end
    for when, found in (("before", before), ("warm", warm), ("serving", serving), ("closed", closed)):
        print(f"  {when}: " + ", ".join(f"{value} {name}" for name, value in found.items()))
    faults = [
        f"{before[name]} {name} before, {closed[name]} after"
        for name in ("descriptors", "threads")
        if closed[name] != before[name]
    ]
    if warm and serving["KiB"] - warm["KiB"] > GROWTH:
        faults.append(f"memory grew by {serving['KiB'] - warm['KiB']} KiB")
    return faults


def kernel_drops(port: int) -> int:
    """Return how many datagrams the kernel has dropped at a port of IPv4, because nobody took them."""
    with open("/proc/net/udp") as table:
        next(table)
        for line in table:
            words = line.split()
            if int(words[1].partition(":")[2], 16) == port:
                return int(words[-1])
    raise LookupError(f"no socket on port {port}")


class Counted(fastserve.BaseRequestHandler):
    """Count a datagram, and answer it."""

    def handle(self) -> None:
        data, listener = self.request
        self.server.handled += 1
        listener.sendto(data, self.client_address)


class Server(fastserve.UDPServer):
    """Knows how many datagrams were handled."""

    handled = 0


def soak_datagrams(options: argparse.Namespace) -> list[str]:
    """Send datagrams, at most ``window`` ahead of the server; return what does not add up."""
    faults: list[str] = []
    Server.gather_replies = options.gather_replies
    begun = time.monotonic()
    before = resources()
    with Server(("127.0.0.1", 0), Counted) as server, socket.socket(type=socket.SOCK_DGRAM) as client:
        port = server.server_address[1]
        client.connect(server.server_address)
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        warm: dict[str, int] = {}
        sent = answered = 0
        while sent < options.requests and time.monotonic() - begun < options.seconds:
            for _ in range(options.burst):
                client.send(b"%d" % sent)
                sent += 1
            answered += drain(client)
            lag(server, sent - options.window, port)
            if not warm and sent >= WARM_UP:
                lag(server, sent, port)
                warm = resources()
        lag(server, sent, port)
        after = resources()
        answered += drain(client, 0.2)
        dropped = kernel_drops(port)
        server.shutdown()
        serving.join()
        took = time.monotonic() - begun
    print(
        f"datagrams: {sent:,} sent, {server.handled:,} handled, {dropped:,} dropped by the kernel, {answered:,} "
        f"answers seen, {took:.1f} s; {fastserve.implementation}"
    )
    faults += report_resources(before, warm, after)
    if server.handled + dropped != sent:
        faults.append(f"{sent - dropped - server.handled} datagrams that the kernel delivered were not handled")
    return faults


def lag(server: Server, number: int, port: int) -> None:
    """Wait until so many datagrams were handled or dropped by the kernel, at most 10 s."""
    begun = time.monotonic()
    while server.handled < number:
        waited = time.monotonic() - begun
        if waited > 10 or (waited > 0.05 and server.handled + kernel_drops(port) >= number):
            return
        time.sleep(0.0001)


def drain(client: socket.socket, timeout: float = 0.0) -> int:
    """Receive the answers that are there, and return how many."""
    client.settimeout(timeout)
    count = 0
    try:
        while client.recv(100):
            count += 1
    except (BlockingIOError, TimeoutError):
        pass  # no more answers
    client.settimeout(None)
    return count


class Exchange(fastserve.StreamRequestHandler):
    """Answer a line; raise after every tenth."""

    def handle(self) -> None:
        line = self.rfile.readline()
        self.wfile.write(line)
        if line.endswith(b"0\n"):
            raise ValueError(line)


class CountingServer(fastserve.TCPServer):
    """Counts the errors of its handlers."""

    request_queue_size = 1024
    allow_reuse_address = True

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.errors = itertools.count()

    def handle_error(self, request: object, client_address: object) -> None:
        next(self.errors)


class ThreadingServer(fastserve.ThreadingMixIn, CountingServer):
    """A thread for each connection."""


class ThreadPoolServer(fastserve.ThreadPoolMixIn, CountingServer):
    """A limited number of threads."""


class ForkingServer(fastserve.ForkingMixIn, CountingServer):
    """A child process for each connection, which takes its errors with it."""


class GreenletServer(fastserve.GreenletMixIn, CountingServer):
    """A greenlet for each connection."""


def soak_connections(options: argparse.Namespace, server_class: type[CountingServer]) -> list[str]:
    """Connect from ``clients`` threads; return what does not add up."""
    faults: list[str] = []
    begun = time.monotonic()
    before = resources()
    numbers, wrong, warm, made = itertools.count(), [], {}, [0] * options.clients
    with server_class(("127.0.0.1", 0), Exchange) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()

        def connect(mine: int) -> None:
            while time.monotonic() - begun < options.seconds:
                number = next(numbers)
                if number >= options.requests:
                    return
                line = b"%d\n" % number
                # The addresses of 127/8 are all this machine: so many connections need more ports than one has.
                with socket.socket() as client:
                    client.bind((f"127.0.0.{number % 200 + 1}", 0))
                    client.connect(server.server_address)
                    client.sendall(line)
                    answer = client.makefile("rb").read()
                made[mine] += 1
                if answer != line:
                    wrong.append(number)
                if number == WARM_UP:
                    warm.update(resources())

        clients = [threading.Thread(target=connect, args=(mine,)) for mine in range(options.clients)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        after = resources()
        server.shutdown()
        serving.join()
    done = sum(made)
    errors = next(server.errors)
    print(
        f"{options.what}: {done:,} made, {len(wrong)} not answered, {errors:,} handlers raised, "
        f"{time.monotonic() - begun:.1f} s; {fastserve.implementation}"
    )
    faults += report_resources(before, warm, after)
    if wrong:
        faults.append(f"{len(wrong)} connections had no answer, {wrong[0]} the first")
    counts = not issubclass(server_class, fastserve.ForkingMixIn)
    if counts and errors != len(range(0, done, 10)):
        faults.append(f"{errors} handlers raised, not {len(range(0, done, 10))}")
    return faults


class Patient(fastserve.StreamRequestHandler):
    """Answer line after line; a line of ``timeout`` bounds the waits from then on."""

    def handle(self) -> None:
        while line := self.rfile.readline():
            if line == b"timeout\n":
                self.connection.settimeout(0.2)
            self.wfile.write(line)


class MixedServer(fastserve.GreenletTCPServer):
    """Knows the errors of its handlers that no client is to blame for."""

    request_queue_size = 1024
    allow_reuse_address = True

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.blamed: dict[str, int] = {}
        self.unexpected: list[str] = []

    def handle_error(self, request: object, client_address: object) -> None:
        error = sys.exception()
        if isinstance(error, (TimeoutError, ConnectionError)):
            self.blamed[type(error).__name__] = self.blamed.get(type(error).__name__, 0) + 1
        else:
            self.unexpected.append(repr(error))


RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() ends the connection with RST
LINES = b"".join(b"%d\n" % number for number in range(100))


def breaks(client: socket.socket, chance: random.Random) -> bool:
    """Leave in the middle of a line, with a reset."""
    client.sendall(LINES[: chance.randrange(len(LINES))])
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    return True


def half_closes(client: socket.socket, chance: random.Random) -> bool:
    """End the sending side amid a line, and read all that comes back."""
    sent = LINES[: chance.randrange(len(LINES))]
    client.sendall(sent)
    client.shutdown(socket.SHUT_WR)
    with client.makefile("rb") as answer:
        return answer.read() == sent


def times_out(client: socket.socket, chance: random.Random) -> bool:
    """Send half a line, and wait until the server no longer does."""
    client.sendall(b"timeout\nhalf a line")
    with client.makefile("rb") as answer:
        return answer.read() == b"timeout\n"


def floods(client: socket.socket, chance: random.Random) -> bool:
    """Send much and read nothing, until nothing more is taken, and leave with a reset."""
    client.setblocking(False)
    for _ in range(chance.randrange(1, 40)):
        try:
            client.send(LINES * 200)
        except BlockingIOError:
            time.sleep(0.005)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    return True


def pipelines(client: socket.socket, chance: random.Random) -> bool:
    """Send many lines at once, twice, and read the answers."""
    with client.makefile("rb") as answers:
        for _ in range(2):
            client.sendall(LINES)
            if answers.read(len(LINES)) != LINES:
                return False
    return True


# What a connection does, and how often of a hundred: each that times out takes a client 0.2 s.
DEEDS = [(breaks, 40), (half_closes, 25), (pipelines, 28), (floods, 5), (times_out, 2)]
KEPT = 2000


def soak_mixed(options: argparse.Namespace) -> list[str]:
    """Keep connections, and make others that do what clients do; return what does not add up."""
    faults: list[str] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    keep = min(KEPT, (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 500) // 2)
    begun = time.monotonic()
    before = resources()
    numbers, failed, done, warm = itertools.count(), [], [0] * options.clients, {}
    with MixedServer(("127.0.0.1", 0), Patient) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        kept = [socket.create_connection(server.server_address, 60) for _ in range(keep)]

        def exchange(client: socket.socket) -> bool:
            client.sendall(b"still there?\n")
            return client.recv(13, socket.MSG_WAITALL) == b"still there?\n"

        def connect(mine: int) -> None:
            chance = random.Random(mine)
            for number in numbers:
                if number >= options.requests or time.monotonic() - begun > options.seconds:
                    return
                (deed,) = chance.choices([deed for deed, _ in DEEDS], [often for _, often in DEEDS])
                try:
                    with socket.socket() as client:
                        client.settimeout(60)
                        client.bind((f"127.0.0.{number % 200 + 1}", 0))
                        client.connect(server.server_address)
                        if not deed(client, chance):
                            failed.append(f"{number}: {deed.__name__}")
                    if not exchange(kept[mine + options.clients * chance.randrange(keep // options.clients)]):
                        failed.append(f"{number}: kept")
                except OSError as error:
                    failed.append(f"{number}: {deed.__name__}: {error!r}")
                done[mine] += 1
                if number == min(MIXED_WARM_UP, options.requests // 4):
                    warm.update(resources())

        clients = [threading.Thread(target=connect, args=(mine,)) for mine in range(options.clients)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        alive = sum(map(exchange, kept))
        after = resources()
        for connection in kept:
            connection.close()
        server.shutdown()
        serving.join()
    blamed = ", ".join(f"{count:,} {name}" for name, count in sorted(server.blamed.items()))
    print(
        f"mixed: {sum(done):,} connections beside {keep:,} that stayed, {alive:,} of which answered at the end; "
        f"{blamed or 'no errors'}; {time.monotonic() - begun:.1f} s; {fastserve.implementation}"
    )
    faults += report_resources(before, warm, after)
    if failed:
        faults.append(f"{len(failed)} connections did not get what they should, the first {failed[0]}")
    if server.unexpected:
        faults.append(
            f"{len(server.unexpected)} handlers raised what no client can cause, first {server.unexpected[0]}"
        )
    if alive != keep:
        faults.append(f"{keep - alive} connections that stayed had no answer")
    return faults


SOAKS = {
    "datagrams": (soak_datagrams, 2_000_000),
    "connections": (functools.partial(soak_connections, server_class=ThreadingServer), 200_000),
    "sync": (functools.partial(soak_connections, server_class=CountingServer), 200_000),
    "threadpool": (functools.partial(soak_connections, server_class=ThreadPoolServer), 200_000),
    "fork": (functools.partial(soak_connections, server_class=ForkingServer), 50_000),
    "greenlets": (functools.partial(soak_connections, server_class=GreenletServer), 100_000),
    "mixed": (soak_mixed, 40_000),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the options say; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="bench/soak.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=SOAKS)
    parser.add_argument(
        "--requests",
        type=int,
        metavar="N",
        help="at most (default: any number if --seconds is given, else 2,000,000 datagrams, 200,000 connections,"
        " 100,000 by greenlets, 50,000 by fork, 40,000 mixed)",
    )
    parser.add_argument("--seconds", type=float, metavar="S", help="at most (default: 300)")
    parser.add_argument("--burst", type=int, default=50, metavar="N", help="sent in a row (default: %(default)s)")
    parser.add_argument(
        "--window", type=int, default=100, metavar="N", help="sent and not handled (default: %(default)s)"
    )
    parser.add_argument("--gather-replies", action="store_true")
    parser.add_argument("--clients", type=int, default=8, metavar="N", help="that connect (default: %(default)s)")
    options = parser.parse_args(argv)
    soak, requests = SOAKS[options.what]
    options.requests = options.requests or (requests if options.seconds is None else sys.maxsize)
    options.seconds = 300.0 if options.seconds is None else options.seconds
    faults = soak(options)
    for fault in faults:
        print(f"bench/soak.py: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
