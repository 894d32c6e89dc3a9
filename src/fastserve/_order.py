"""The order in which mix-ins and servers are named: one that would take effect silently, or not at all, is an error."""

from __future__ import annotations

from fastserve._annotations import Any
from fastserve._stdlib import socketserver


class BeforeServer:
    """A mix-in that does nothing, and says nothing, where it is named after the server: with TLS nobody would notice.

    The mix-ins that the stdlib has too are none of these: what is correct there is correct here.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """Raise ``TypeError`` if one of the mix-ins comes after the server in the order of resolution."""
        super().__init_subclass__(**options)
        bases = cls.__mro__
        if socketserver.BaseServer in bases:
            for late in bases[bases.index(socketserver.BaseServer) :]:
                if BeforeServer in late.__bases__:
                    raise TypeError(
                        f"{cls.__name__}: name {late.__name__} before the server, as in "
                        f"class {cls.__name__}({late.__name__}, ThreadingTCPServer): after it, it would do nothing"
                    )
