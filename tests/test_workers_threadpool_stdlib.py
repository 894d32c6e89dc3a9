"""The pool of threads over a server of the stdlib, to which it brings the loop."""

from __future__ import annotations

import concurrent.futures
import http.server
import socketserver
import threading
import time
import urllib.request
from typing import Any

import fastserve
from fastserve import _backend, _loop
from support import LIMIT, serving

POLL_INTERVAL = 100.0  # seconds: whatever happens sooner than this was not seen by a tick


class Names(http.server.BaseHTTPRequestHandler):
    """Answer with the name of the thread."""

    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        body = threading.current_thread().name.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


class Web(fastserve.ThreadPoolMixIn, http.server.HTTPServer):
    max_workers = 2


def get(server: Any) -> str:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"http://127.0.0.1:{server.server_port}/", timeout=LIMIT) as answer:
        return str(answer.read().decode())


def test_over_a_server_of_the_stdlib_the_loop_comes_with_the_mix_in(impl: str) -> None:
    server = Web(("127.0.0.1", 0), Names)
    assert Web.get_request is socketserver.TCPServer.get_request
    with serving(server, POLL_INTERVAL):
        assert get(server) == "Web-worker-1"
        [loop] = _loop.State.of(server).loops
        assert isinstance(loop, _loop.Loop)
        # Every loop ticks where there is no GIL.
        assert _loop.idle_timeout(server, loop, POLL_INTERVAL) == (None if _backend.has_gil() else POLL_INTERVAL)
        begin = time.monotonic()
        server.shutdown()
        assert time.monotonic() - begin < POLL_INTERVAL / 2


def test_over_a_server_of_the_stdlib_the_flag_wakes_and_shutdown_may_come_first(impl: str) -> None:
    with Web(("127.0.0.1", 0), Names) as server:
        server.shutdown()
        server.serve_forever(POLL_INTERVAL)  # returns at once
        thread = threading.Thread(target=server.serve_forever, args=(POLL_INTERVAL,))
        thread.start()
        assert get(server) == "Web-worker-1"
        server._BaseServer__shutdown_request = True
        thread.join(LIMIT)
        assert not thread.is_alive()


def test_over_a_server_of_the_stdlib_handle_request_hands_over(impl: str) -> None:
    with Web(("127.0.0.1", 0), Names) as server, concurrent.futures.ThreadPoolExecutor(1) as executor:
        answer = executor.submit(get, server)
        server.handle_request()
        assert answer.result(LIMIT) == "Web-worker-1"


def test_a_loop_that_a_program_has_overridden_stays_its_own(impl: str) -> None:
    called = []

    class Own(http.server.HTTPServer):
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            called.append("serve_forever")
            super().serve_forever(0.02)

        def _handle_request_noblock(self) -> None:
            called.append("_handle_request_noblock")
            super()._handle_request_noblock()  # type: ignore[misc]

    class Pooled(fastserve.ThreadPoolMixIn, Own):
        max_workers = 1

    with serving(Pooled(("127.0.0.1", 0), Names)) as server:
        assert get(server) == "Pooled-worker-1"
    assert called == ["serve_forever", "_handle_request_noblock"]
