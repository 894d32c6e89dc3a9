"""The plugin of pytest: the fixture ``fastserve_server``.

pytest imports this module whenever it starts. It is no part of the package, so that fastserve itself is imported only
where the fixture is used: not by other tests, and not before a coverage tool, or gevent, has done what must come first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fastserve.testing import Served, ServerFactory


@pytest.fixture
def fastserve_server() -> Iterator[ServerFactory]:
    """Return a function that starts a server, with the arguments of ``fastserve.testing.serve``, and returns it served.

    The servers are stopped when the test ends, the last one first. Handlers whose exceptions nobody has taken out of
    ``errors`` then make the test an error.
    """
    from fastserve.testing import serve

    with contextlib.ExitStack() as stack:

        def start(handler: Callable[[Any, Any, Any], Any] | None = None, **options: Any) -> Served:
            return stack.enter_context(serve(handler, **options))

        yield start
