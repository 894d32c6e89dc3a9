"""The servers of asyncio and uvloop: ``asyncio_server.py asyncio|uvloop streams|protocol MODE``.

MODE is echo, lines, oneshot or udp (a protocol only). The first line printed is the port on 127.0.0.1. Streams do not
await ``drain()``, and a protocol writes each line by itself, as a handler does.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

AT_ONCE = 65536
BACKLOG = 4096
ADDRESS = ("127.0.0.1", 0)


class Echo(asyncio.Protocol):
    """Send back what comes."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class Lines(Echo):
    """Send back line after line."""

    rest = b""

    def data_received(self, data: bytes) -> None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            self.transport.write(line + b"\n")


class OneShot(Echo):
    """Send back what comes first, and close the connection."""

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)
        self.transport.close()


class Datagram(asyncio.DatagramProtocol):
    """Send back datagrams."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, address: Any) -> None:
        self.transport.sendto(data, address)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back what comes."""
    while data := await reader.read(AT_ONCE):
        writer.write(data)
    writer.close()


async def lines(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back line after line."""
    while line := await reader.readline():
        writer.write(line)
    writer.close()


async def oneshot(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back what comes first, and close the connection."""
    writer.write(await reader.read(AT_ONCE))
    writer.close()


PROTOCOLS = {"echo": Echo, "lines": Lines, "oneshot": OneShot}
STREAMS = {"echo": echo, "lines": lines, "oneshot": oneshot}


async def serve(style: str, mode: str) -> None:
    """Serve until the process is ended."""
    loop = asyncio.get_running_loop()
    if mode == "udp":
        transport, _ = await loop.create_datagram_endpoint(Datagram, local_addr=ADDRESS)
        port = transport.get_extra_info("sockname")[1]
    elif style == "protocol":
        server: Any = await loop.create_server(PROTOCOLS[mode], *ADDRESS, backlog=BACKLOG)
        port = server.sockets[0].getsockname()[1]
    else:
        server = await asyncio.start_server(STREAMS[mode], *ADDRESS, backlog=BACKLOG)
        port = server.sockets[0].getsockname()[1]
    print(port, flush=True)
    await asyncio.Event().wait()


def main() -> None:
    """Serve on the loop that the command line names."""
    loop, style, mode = sys.argv[1:]
    if loop == "uvloop":
        import uvloop

        factory: Any = uvloop.new_event_loop
    else:
        factory = asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serve(style, mode))


if __name__ == "__main__":
    main()
