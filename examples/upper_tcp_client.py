"""The client of upper_tcp_server.py and upper_stream_server.py: it sends a line and prints the answer.

    python examples/upper_tcp_client.py --port 9999 hello world

The port is the one that the server has printed.
"""

from __future__ import annotations

import argparse
import socket


def main() -> None:
    """Send the words and print what comes back."""
    parser = argparse.ArgumentParser(description="Send a line over TCP and print the answer.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True, help="the port that the server has printed")
    parser.add_argument("words", nargs="+", help="what to send")
    arguments = parser.parse_args()

    line = " ".join(arguments.words)
    with socket.create_connection((arguments.host, arguments.port), timeout=10) as connection:
        connection.sendall(line.encode() + b"\n")
        # One line and no more: a server that goes on reading lines does not close after the first.
        with connection.makefile("r", encoding="utf-8", errors="replace") as answers:
            answer = answers.readline()

    print(f"sent:     {line}")
    print(f"received: {answer.rstrip()}")


if __name__ == "__main__":
    main()
