"""``threading.Thread`` for a request in an operating-system thread that is used again.

A handler sees what it would see in a fresh thread: a ``threading.Thread`` of its own with a name and number of its
own, empty ``threading.local`` objects, an empty context (with ``-X thread_inherit_context`` a copy of the serving
thread's), the hooks of :func:`threading.settrace`. The operating-system thread and how it is handed from one request to
the next are in ``_threads``.
"""

from __future__ import annotations

import sys
import threading

from fastserve import _backend
from fastserve._annotations import Any, Final
from fastserve._stdlib import socketserver

_std: Any = socketserver  # see server.py
_threading: Any = threading

# A thread is used again only while nobody has replaced what makes a thread: gevent and eventlet, debuggers.
_STARTERS: Final = ("_start_joinable_thread", "_start_new_thread")  # from 3.13 on, and before
_STARTER: Final = next((name for name in _STARTERS if hasattr(threading, name)), None)
_ORIGINALS: Final = (threading.Thread, threading.Thread.start, _STARTER and getattr(threading, _STARTER))
# Private names of threading that the light Thread stands on; without one of them no thread is used again.
_NEEDED: Final = ("_active", "_counter", "_make_invoke_excepthook", "_profile_hook", "_register_atexit", "_trace_hook")
# What threading has of an operating-system thread from 3.13 on; another name since 3.14.
_HANDLES: Final = ("_os_thread_handle", "_handle")
_HANDLE: Final = next((name for name in _HANDLES if hasattr(threading.main_thread(), name)), None)


def _is_usable() -> bool:
    """Return whether threads can be used again here at all."""
    return (
        _backend.threads is not None
        and _STARTER is not None
        # What was replaced before this import is among the originals here.
        and not _backend.monkey_patched()
        and all(hasattr(threading, name) for name in _NEEDED)
        and hasattr(threading, "_make_thread_handle") == (_HANDLE is not None)
    )


RequestThread: Any = None

if _is_usable():
    assert _backend.threads is not None
    _Job: Any = _backend.threads.Job

    class _RequestThread(_Job, threading.Thread):  # type: ignore[misc]
        """The ``threading.Thread`` of one request.

        Its constructor does not call that of ``Thread``. What this would set for each object is in ``Job``, or set here
        for all; what differs with the version of Python in how a thread is watched is overridden.
        """

        _initialized = True
        _started = threading.Event()
        _target = None
        _args = ()
        _kwargs: dict[str, Any] = {}
        _tstate_lock: Any = None
        _started.set()

        @property
        def _stderr(self) -> Any:
            return sys.stderr

        def __repr__(self) -> str:
            status = ("started" if self.is_alive() else "stopped") + (" daemon" if self._daemonic else "")
            return f"<Thread({self._name}, {status} {self._ident})>"

        # The child of a fork has one thread, the one that forked. It becomes the main thread there, and threading waits
        # for what it has of the main thread when the child ends.

        def _reset_internal_locks(self, is_alive: bool) -> None:  # 3.11, 3.12
            if is_alive:
                self._tstate_lock = _threading._allocate_lock()
                self._tstate_lock.acquire()
            else:
                self.mark_stopped()

        def _stop(self) -> None:  # 3.11, 3.12
            self.mark_stopped()

        def _after_fork(self, new_ident: int | None = None) -> None:  # from 3.13 on
            if new_ident is None:
                self.mark_stopped()
            else:
                self._ident = new_ident
                setattr(self, str(_HANDLE), _threading._make_thread_handle(new_ident))

    RequestThread = _RequestThread


_is_exiting = False
_is_registered = False


def _at_exit() -> None:
    """Wait for the requests of threads that are no daemons, as the interpreter does for other threads."""
    global _is_exiting
    _is_exiting = True
    assert _backend.threads is not None
    _backend.threads.join_all()


def is_possible() -> bool:
    """Return whether a request may run in a thread that is used again, at this moment."""
    global _is_registered
    if _backend.threads is None or RequestThread is None or _is_exiting or _std.threading is not threading:
        return False
    if (threading.Thread, threading.Thread.start, getattr(threading, _STARTER or "")) != _ORIGINALS:
        return False
    if not _is_registered:
        try:
            _threading._register_atexit(_at_exit)
        except RuntimeError:
            return False  # the interpreter is ending
        _is_registered = True
    return True


def end_idle_threads() -> None:
    """End the threads that have no request. Any thread may call it."""
    if _backend.threads is not None:
        _backend.threads.end_idle()
