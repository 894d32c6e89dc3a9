"""The client of upper_udp_server.py: it sends a datagram and prints the answer.

    python examples/upper_udp_client.py --port 9999 hello world

The port is the one that the server has printed.
"""

from __future__ import annotations

import argparse
import socket
import sys


def main() -> None:
    """Send the words and print what comes back; exit with status 1 if nothing does."""
    parser = argparse.ArgumentParser(description="Send a datagram and print the answer.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True, help="the port that the server has printed")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds to wait for the answer")
    parser.add_argument("words", nargs="+", help="what to send")
    arguments = parser.parse_args()

    line = " ".join(arguments.words)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        # UDP promises nothing: the datagram or its answer may be lost.
        client.settimeout(arguments.timeout)
        client.sendto(line.encode() + b"\n", (arguments.host, arguments.port))
        try:
            answer = client.recv(65536)
        except TimeoutError:
            sys.exit(f"no answer from {arguments.host}:{arguments.port} within {arguments.timeout:g} s")

    print(f"sent:     {line}")
    print(f"received: {answer.decode(errors='replace').rstrip()}")


if __name__ == "__main__":
    main()
