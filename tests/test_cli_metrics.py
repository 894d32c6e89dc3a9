"""``fastserve serve --metrics``: what the server counts, for Prometheus."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli_support import WORKERS, address_of, cli, connect, exchange, run, started, stop
from support import in_time, wait_until

if importlib.util.find_spec("prometheus_client") is None:
    pytest.skip("prometheus-client is not installed", allow_module_level=True)

from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.once
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc for what the processes are and hold")

METRICS = ["--bind", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
# Those of programs that wait for something else, and never of fastserve itself.
STRICT = {"PYTHONWARNINGS": "error"}


def url_of(server: subprocess.Popen[str]) -> str:
    """Read the line that tells where the metrics are."""
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line.startswith("Metrics on http://127.0.0.1:") and line.endswith("/metrics\n"), line
    return line.split()[-1]


def scrape(url: str) -> dict[tuple[str, ...], float]:
    """Return the samples at this moment, by their names and the values of their labels."""

    def ask() -> str:
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=")
            text: str = answer.read().decode()
        return text

    text = in_time(ask, 1)
    families = list(text_string_to_metric_families(text))
    assert all(family.name.startswith("fastserve_") and family.documentation for family in families)
    return {
        (sample.name.removeprefix("fastserve_"), *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in families
        for sample in family.samples
    }


@contextlib.contextmanager
def measured(*options: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A server with metrics, its address, and where they are."""
    with started("serve", "handlers:Lines", "--backlog", "128", *METRICS, *options, **STRICT) as server:
        yield server, address_of(server), url_of(server)


def total(samples: dict[tuple[str, ...], float], name: str) -> float:
    return sum(value for key, value in samples.items() if key[0] == name)


@pytest.mark.parametrize("processes", [(), ("--workers", "2")])
@pytest.mark.parametrize("worker", WORKERS)
def test_a_scrape_tells_what_was_counted(here: Path, worker: str, processes: tuple[str, ...]) -> None:
    with measured("--worker", worker, *processes) as (server, address, url):
        for _ in range(5):
            with connect(address) as client:
                assert exchange(client) == b"HELLO\n"
        with connect(address) as client:
            client.sendall(b"raise\n")
            with contextlib.suppress(ConnectionError):
                assert client.recv(1) == b""
        wait_until(lambda: total(scrape(url), "requests_handled_total") == 6)
        wait_until(lambda: total(scrape(url), "connections_active") == 0)
        wait_until(lambda: total(scrape(url), "loop_delay_seconds") > 0)
        samples = scrape(url)
        assert total(samples, "connections_accepted_total") == 6
        assert total(samples, "errors_total") == 1
        assert total(samples, "connections_refused_total") == total(samples, "requests_timed_out_total") == 0
        assert samples["connections_refused_total", "verify_request", "0"] == 0
        assert samples["requests_timed_out_total", "idle_timeout", "0"] == 0
        assert total(samples, "requests_queued") == 0
        assert samples["processes",] == (2 if processes else 1)
        labels = {key[-1] for key in samples if key[0] == "connections_accepted_total"}
        assert labels == ({"0", "1"} if processes else {"0"})
        if sys.platform == "linux":
            assert total(samples, "bytes_received_total") == total(samples, "bytes_sent_total") + 6 == 36
            assert (samples["backlog_connections",], samples["backlog_limit_connections",]) == (0, 128)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        assert server.stderr is not None
        errors = server.stderr.read()
        assert errors.count("Traceback") == 1 and "from the handler" in errors and "Warning" not in errors


def test_datagrams_are_counted(here: Path) -> None:
    arguments = ["serve", "handlers:Packets", *METRICS, "--udp", "--worker", "sync"]
    with started(*arguments, **STRICT) as server:
        address = address_of(server)
        url = url_of(server)
        with connect(address, socket.SOCK_DGRAM) as client:
            assert exchange(client) == b"HELLO\n"
        wait_until(lambda: scrape(url)["requests_handled_total", "0"] == 1)
        samples = scrape(url)
        assert samples["bytes_received_total", "0"] == 6
        assert ("bytes_sent_total", "0") not in samples and ("backlog_connections",) not in samples
        stop(server)


def test_limits_are_counted(here: Path) -> None:
    with measured("--max-connections-per-client", "1", "--idle-timeout", "1") as (server, address, url):
        begun = time.monotonic()
        with connect(address) as first, connect(address) as second:
            assert second.recv(1) == b""
            was_quick = time.monotonic() - begun < 1
            assert first.recv(1) == b""
        wait_until(lambda: total(scrape(url), "connections_active") == 0)
        samples = scrape(url)
        refused = samples["connections_refused_total", "max_connections_per_client", "0"]
        timed_out = samples["requests_timed_out_total", "idle_timeout", "0"]
        # On a busy machine the first may have been idle for too long before the second came.
        assert (refused, timed_out) == (1, 1) or (not was_quick and (refused, timed_out) == (0, 2))
        stop(server)


@linux
def test_a_worker_that_is_killed_takes_nothing_away(here: Path) -> None:
    with measured("--workers", "2") as (server, address, url):
        wait_until(lambda: len(children_of(server.pid)) == 2)
        pids = children_of(server.pid)
        for _ in range(5):
            with connect(address) as client:
                assert exchange(client) == b"HELLO\n"
        wait_until(lambda: total(scrape(url), "requests_handled_total") == 5)
        with socket.create_connection(address_in(url)):  # one that says nothing holds nothing up for long
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda: len(children_of(server.pid) - pids) == 2)
        with connect(address) as client:
            assert exchange(client) == b"HELLO\n"
        wait_until(lambda: total(scrape(url), "requests_handled_total") == 6)
        assert total(scrape(url), "connections_accepted_total") == 6
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


def address_in(url: str) -> tuple[str, int]:
    return "127.0.0.1", int(url.split(":")[2].partition("/")[0])


def children_of(pid: int) -> set[int]:
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def sockets_of(pid: int) -> set[str]:
    """Return what the descriptors of a process are, as far as they are sockets."""
    found = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            found.add(os.readlink(path))
    return {name for name in found if name.startswith("socket:")}


def listener_at(port: int) -> str:
    """Return what the descriptor of the listener at a port is."""
    (listener,) = (name for name, state in at(port) if state == "0A")
    return listener


def connections_at(port: int) -> list[str]:
    """Return what the descriptors of the connections are that the listener at a port has accepted, or is to."""
    return [name for name, state in at(port) if state != "0A" and not name.endswith("[0]")]


def at(port: int) -> list[tuple[str, str]]:
    lines = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return [(f"socket:[{fields[9]}]", fields[3]) for fields in lines if fields[1].endswith(f":{port:04X}")]


@linux
@pytest.mark.parametrize("options", [("--workers", "2"), ("--worker", "fork")])
def test_no_other_process_has_the_listener_of_the_metrics(here: Path, options: tuple[str, ...]) -> None:
    with measured(*options) as (server, address, url), connect(address) as client:
        assert exchange(client) == b"HELLO\n"
        wait_until(lambda: len(children_of(server.pid)) == (2 if "--workers" in options else 1))
        listener = listener_at(address_in(url)[1])
        assert listener in sockets_of(server.pid)
        for pid in children_of(server.pid):
            wait_until(lambda pid=pid: listener not in sockets_of(pid))
        if "--workers" in options:
            client.shutdown(socket.SHUT_RDWR)  # so that its process has nothing to wait for
            before = children_of(server.pid)
            server.send_signal(signal.SIGHUP)
            wait_until(lambda: not before & children_of(server.pid))
            for pid in children_of(server.pid):
                wait_until(lambda pid=pid: listener not in sockets_of(pid))


@linux
@pytest.mark.parametrize("options", [(), ("--workers", "1")])
def test_scrapes_leave_no_descriptor(here: Path, options: tuple[str, ...]) -> None:
    with measured(*options) as (server, _, url):
        wait_until(lambda: "loop_delay_seconds" in {name for name, *_ in scrape(url)})
        wait_until(lambda: not connections_at(address_in(url)[1]))
        before = sockets_of(server.pid)
        for _ in range(20):
            scrape(url)
        with socket.create_connection(address_in(url)) as client:  # one that is reset
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        wait_until(lambda: sockets_of(server.pid) == before)
        stop(server)


@pytest.mark.parametrize("options", [(), ("--workers", "1")])
def test_who_asks_too_slowly_gets_no_answer(here: Path, options: tuple[str, ...]) -> None:
    with measured(*options) as (server, _, url):
        with socket.create_connection(address_in(url), 60) as slow, contextlib.suppress(ConnectionError):
            slow.sendall(b"GET /metrics")
            assert slow.recv(1) == b""
        with socket.create_connection(address_in(url), 60) as drop, contextlib.suppress(ConnectionError):
            for _ in range(1000):
                drop.sendall(b"x")
                time.sleep(0.02)
            raise AssertionError("it was waited for a second each time")
        assert total(scrape(url), "connections_accepted_total") == 0
        stop(server)


def test_metrics_may_be_on_ipv6(here: Path) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    arguments = ["serve", "handlers:Lines", "--bind", "127.0.0.1:0", "--metrics", "[::1]:0"]
    with started(*arguments, **STRICT) as server:
        address_of(server)
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1]
        assert url.startswith("http://[::1]:") and total(scrape(url), "processes") == 1
        stop(server)


def test_an_address_that_is_taken_is_one_line(here: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        result = cli("serve", "handlers:Lines", "--bind", "127.0.0.1:0", "--metrics", where)
    assert result.returncode == 2 and result.stdout == ""
    assert f"cannot serve metrics on {where}: Address already in use" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("where", ["9100", "unix:socket", "127.0.0.1:70000", "::1:9100"])
def test_a_wrong_address_is_one_line(here: Path, where: str) -> None:
    result = cli("serve", "handlers:Lines", "--bind", "127.0.0.1:0", "--metrics", where)
    assert result.returncode == 2 and "--metrics" in result.stderr and "Traceback" not in result.stderr


def test_without_the_library_one_line_names_the_extra(here: Path) -> None:
    code = "import sys; sys.modules['prometheus_client'] = None; from fastserve.cli import main; sys.exit(main())"
    result = run([sys.executable, "-c", code, "serve", "handlers:Lines", *METRICS])
    assert result.returncode == 2
    line = result.stderr.splitlines()[-1]
    assert 'pip install "fastserve[metrics]"' in line and "Traceback" not in result.stderr
