"""fastserve: the standard library's :mod:`socketserver` on a Cython core.

``import fastserve as socketserver`` is all that a program changes; ``fastserve run -m http.server`` changes
nothing. Every name of ``socketserver`` is here, with its behaviour; the page "Differences" of the documentation
lists the few exceptions.
"""

from __future__ import annotations

# Not used here: names of the module socketserver that programs reach through it.
import os as os
import selectors as selectors
import socket as socket
import sys as sys
import threading as threading
from io import BufferedIOBase as BufferedIOBase
from time import monotonic as time  # noqa: F401

from fastserve._annotations import TYPE_CHECKING, Any
from fastserve._backend import implementation
from fastserve._lines import LineTooLong
from fastserve._version import __version__
from fastserve.handlers import DatagramRequestHandler, StreamRequestHandler
from fastserve.pollers import _STDLIB_SELECTOR as _ServerSelector  # noqa: F401
from fastserve.server import TCPServer, UDPServer
from fastserve.sockets import from_socket
from fastserve.streams import _SocketWriter  # noqa: F401
from fastserve.tasks import create_connection, sleep, spawn, to_thread
from fastserve.workers.threads import (
    ThreadingMixIn,
    ThreadingTCPServer,
    ThreadingUDPServer,
    _NoThreads,  # noqa: F401
    _Threads,  # noqa: F401
)

if TYPE_CHECKING:
    # Ours add nothing to them. As the same classes they go together with the servers and handlers of http.server, say,
    # as a program that was written for socketserver has it: in annotations, and as self.server of a handler.
    from socketserver import BaseRequestHandler, BaseServer

    # The names of types, which programs find in the stub of socketserver and nowhere else.
    from socketserver import _AfInet6Address as _AfInet6Address
    from socketserver import _AfInetAddress as _AfInetAddress
    from socketserver import _AfUnixAddress as _AfUnixAddress
    from socketserver import _RequestType as _RequestType

    from fastserve.draining import DrainHTTPMixIn, DrainMixIn, idle
    from fastserve.limits import LimitsMixIn
    from fastserve.logs import LoggingMixIn
    from fastserve.patching import patch, patched, unpatch
    from fastserve.proxy import ProxyInfo, ProxyProtocolError, ProxyProtocolMixIn, proxy_info
    from fastserve.stats import ServerStats, StatsMixIn, WorkerStats
    from fastserve.tls_mixin import TLSMixIn
    from fastserve.workers.greenlets import GreenletMixIn, GreenletTCPServer, GreenletUDPServer
    from fastserve.workers.threadpool import ThreadPoolMixIn, ThreadPoolTCPServer, ThreadPoolUDPServer
else:
    from fastserve.handlers import BaseRequestHandler
    from fastserve.server import BaseServer

# What socketserver does not have is loaded when it is first asked for: the names of each module. A server that does
# without is up sooner, and a forking one has less memory to copy the page tables of at each request.
_LAZY: dict[str, tuple[str, ...]] = {
    "draining": ("DrainHTTPMixIn", "DrainMixIn", "idle"),
    "limits": ("LimitsMixIn",),
    "logs": ("LoggingMixIn",),
    "patching": ("patch", "patched", "unpatch"),
    "proxy": ("ProxyInfo", "ProxyProtocolError", "ProxyProtocolMixIn", "proxy_info"),
    "stats": ("ServerStats", "StatsMixIn", "WorkerStats"),
    "tls_mixin": ("TLSMixIn",),
    "workers.greenlets": ("GreenletMixIn", "GreenletTCPServer", "GreenletUDPServer"),
    "workers.threadpool": ("ThreadPoolMixIn", "ThreadPoolTCPServer", "ThreadPoolUDPServer"),
}

# What fastserve has beyond socketserver.
__extensions__: list[str] = [
    "DrainHTTPMixIn",
    "DrainMixIn",
    "GreenletMixIn",
    "GreenletTCPServer",
    "GreenletUDPServer",
    "LimitsMixIn",
    "LineTooLong",
    "LoggingMixIn",
    "ProxyInfo",
    "ProxyProtocolError",
    "ProxyProtocolMixIn",
    "ServerStats",
    "StatsMixIn",
    "TLSMixIn",
    "ThreadPoolMixIn",
    "ThreadPoolTCPServer",
    "ThreadPoolUDPServer",
    "WorkerStats",
    "__version__",
    "create_connection",
    "from_socket",
    "idle",
    "implementation",
    "patch",
    "patched",
    "proxy_info",
    "sleep",
    "spawn",
    "to_thread",
    "unpatch",
]

__all__ = [
    "BaseRequestHandler",
    "BaseServer",
    "DatagramRequestHandler",
    "DrainHTTPMixIn",
    "DrainMixIn",
    "GreenletMixIn",
    "GreenletTCPServer",
    "GreenletUDPServer",
    "LimitsMixIn",
    "LineTooLong",
    "LoggingMixIn",
    "ProxyInfo",
    "ProxyProtocolError",
    "ProxyProtocolMixIn",
    "ServerStats",
    "StatsMixIn",
    "StreamRequestHandler",
    "TCPServer",
    "TLSMixIn",
    "ThreadPoolMixIn",
    "ThreadPoolTCPServer",
    "ThreadPoolUDPServer",
    "ThreadingMixIn",
    "ThreadingTCPServer",
    "ThreadingUDPServer",
    "UDPServer",
    "WorkerStats",
    "__version__",
    "create_connection",
    "from_socket",
    "idle",
    "implementation",
    "patch",
    "patched",
    "proxy_info",
    "sleep",
    "spawn",
    "to_thread",
    "unpatch",
]

if hasattr(os, "fork"):
    from fastserve.workers.forking import ForkingMixIn, ForkingTCPServer, ForkingUDPServer

    if TYPE_CHECKING:
        from fastserve.workers.prefork import PreforkMixIn

    _LAZY["workers.prefork"] = ("PreforkMixIn",)
    __extensions__ += ["PreforkMixIn"]
    __all__ += ["ForkingMixIn", "ForkingTCPServer", "ForkingUDPServer", "PreforkMixIn"]

if hasattr(socket, "AF_UNIX"):
    from fastserve.server import UnixDatagramServer, UnixStreamServer
    from fastserve.workers.threads import ThreadingUnixDatagramServer, ThreadingUnixStreamServer

    if TYPE_CHECKING:
        from fastserve.workers.greenlets import GreenletUnixDatagramServer, GreenletUnixStreamServer
        from fastserve.workers.threadpool import ThreadPoolUnixDatagramServer, ThreadPoolUnixStreamServer

    _LAZY["workers.greenlets"] += ("GreenletUnixDatagramServer", "GreenletUnixStreamServer")
    _LAZY["workers.threadpool"] += ("ThreadPoolUnixDatagramServer", "ThreadPoolUnixStreamServer")
    __extensions__ += [
        "GreenletUnixDatagramServer",
        "GreenletUnixStreamServer",
        "ThreadPoolUnixDatagramServer",
        "ThreadPoolUnixStreamServer",
    ]
    __all__ += [
        "GreenletUnixDatagramServer",
        "GreenletUnixStreamServer",
        "ThreadPoolUnixDatagramServer",
        "ThreadPoolUnixStreamServer",
        "ThreadingUnixDatagramServer",
        "ThreadingUnixStreamServer",
        "UnixDatagramServer",
        "UnixStreamServer",
    ]

if hasattr(os, "fork") and hasattr(socket, "AF_UNIX"):
    from fastserve.workers.forking import ForkingUnixDatagramServer, ForkingUnixStreamServer

    __all__ += ["ForkingUnixDatagramServer", "ForkingUnixStreamServer"]

if not TYPE_CHECKING:  # a type checker that saw this would take any name for one that is here
    _HOMES = {name: f"fastserve.{module}" for module, names in _LAZY.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        found = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOMES})
