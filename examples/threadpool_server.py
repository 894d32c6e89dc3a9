"""A web server of the standard library, with a limited number of threads that are used again.

    python examples/threadpool_server.py --clients 20 --threads 4

It talks to itself: it starts the server, lets all clients ask at the same time, prints which thread has answered how
many of them, and ends.
"""

from __future__ import annotations

import argparse
import http.server
import threading
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import fastserve

# What a thread leaves here is there when it handles its next request: a connection to a database, say.
kept = threading.local()


class NamingHandler(http.server.BaseHTTPRequestHandler):
    """Answer with the name of the thread, and with how many requests it has handled."""

    def do_GET(self) -> None:
        kept.requests = getattr(kept, "requests", 0) + 1
        body = f"{threading.current_thread().name} {kept.requests}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing for each request."""


class WebServer(fastserve.ThreadPoolMixIn, http.server.HTTPServer):
    """The mix-in comes first, as always; it brings fastserve's loop with it."""

    request_queue_size = 128  # clients that wait in the kernel
    max_queued = 8  # clients that wait for a thread; beyond them none is accepted


def ask(url: str) -> str:
    """Return the answer of the server."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url, timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def main() -> None:
    """Serve some clients and end."""
    parser = argparse.ArgumentParser(description="Serve clients in a limited number of threads.")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--threads", type=int, default=4)
    arguments = parser.parse_args()

    with WebServer(("127.0.0.1", 0), NamingHandler) as server:
        server.max_workers = arguments.threads
        print(f"listening on 127.0.0.1:{server.server_port}", flush=True)
        loop = threading.Thread(target=server.serve_forever, name="loop")
        loop.start()
        try:
            with ThreadPoolExecutor(arguments.clients) as clients:
                answers = list(clients.map(ask, [f"http://127.0.0.1:{server.server_port}/"] * arguments.clients))
            for name, count in sorted(Counter(answer.split()[0] for answer in answers).items()):
                print(f"{name}: {count}")
        except KeyboardInterrupt:
            print("stopped")
        finally:
            server.shutdown()
            loop.join()


if __name__ == "__main__":
    main()
