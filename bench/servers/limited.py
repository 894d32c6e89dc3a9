"""A server with limits, and maybe with TLS: ``python bench/servers/limited.py MIX-INS HANDLER ATTRIBUTES``.

MIX-INS are names of fastserve's, with commas between them, in the order in which they are named; HANDLER is a class of
bench/handlers.py; ATTRIBUTES are those of the server, as JSON. It prints the port that it serves on 127.0.0.1.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import fastserve

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BACKLOG = 4096  # connections; none is refused while a server is behind


def main() -> None:
    import handlers

    names, handler, attributes = sys.argv[1], getattr(handlers, sys.argv[2]), json.loads(sys.argv[3])
    bases: tuple[Any, ...] = tuple(getattr(fastserve, name) for name in names.split(",") if name)
    own = {"request_queue_size": BACKLOG, "daemon_threads": True, "block_on_close": False, **attributes}

    def stop(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(0)

    if fastserve.PreforkMixIn not in bases:  # which has its own
        signal.signal(signal.SIGTERM, stop)
    with type("Server", (*bases, fastserve.TCPServer), own)(("127.0.0.1", 0), handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
