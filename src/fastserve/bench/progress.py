"""How far a measurement is: a bar on a terminal that has rich, plain lines elsewhere."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress(servers: int, rounds: int) -> Iterator[Callable[[str], None]]:
    """Yield what is to be called with the name of a server whose turn is over. It writes to standard error."""
    if sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
        rich: Any = importlib.import_module("rich.progress")
        console: Any = importlib.import_module("rich.console").Console(stderr=True)
        # No thread of its own: it would take its time from the load.
        with rich.Progress(console=console, auto_refresh=False, transient=True) as bar:
            task = bar.add_task("probing", total=servers * rounds)

            def advance(name: str) -> None:
                bar.update(task, advance=1, description=name, refresh=True)

            bar.refresh()
            yield advance
        return
    turns = 0

    def line(name: str) -> None:
        nonlocal turns
        turns += 1
        if turns % servers == 0:
            print(f"round {turns // servers} of {rounds}", file=sys.stderr, flush=True)

    yield line
