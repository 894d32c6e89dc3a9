# cython: language_level=3, embedsignature=True
"""The turns of a loop over connections, and a request in a thread: the methods of a server that nobody overrides.

A method that is not overridden is not called, but done here. Whether it is overridden is asked at the time at which it
would be called, on the class and on the instance. Without this module ``serve_forever`` and ``process_request_thread``
call every method, and the program cannot tell the difference but by looking at the stack.

Where a request runs in a greenlet, the frames below it on the C stack are small, for the reasons that ``_hub`` gives:
what has gone wrong is dealt with in functions of its own.
"""

import os as _os
import socket as _socket_module
import socketserver as _socketserver

import _socket

from cpython.dict cimport PyDict_GetItemWithError
from cpython.exc cimport PyErr_CheckSignals
from cpython.object cimport PyObject, PyTypeObject

from fastserve._core cimport EpollPoller, accept_from
from fastserve._hooks cimport (
    PyObject_GenericGetDict, _PyType_Lookup, construct, fs_finds_attributes_plainly, fs_no_arguments, fs_type_of,
    fs_version_of,
)
from fastserve._errors cimport error_of, raised
from fastserve._sockets cimport descriptor_of
from fastserve._streams import Connection as _Connection, accepted as _accepted
from fastserve._syscalls cimport fs_shutdown_and_close

cdef extern from "Python.h":
    object PyMethod_New(object, object)

cdef tuple _no_arguments = ()
fs_no_arguments = <PyObject *>_no_arguments

cdef object _absent = object()

cdef str FLAG = "_BaseServer__shutdown_request"

cdef enum:
    # One bit for each method of NAMES, in their order.
    HANDLE_NOBLOCK = 1
    GET = 2
    VERIFY = 4
    PROCESS = 8
    FINISH = 16
    SHUTDOWN = 32
    CLOSE = 64
    SERVICE = 128
    IN_THREAD = 256
    # Whether the flag is in the instance's __dict__, as far as the class says.
    HAS_FLAG = 512
    LOOKED = 1024
    # process_request is that of greenlets.
    GREENLET = 2048
    PLACES = 16  # classes that are remembered
    MORE = 15  # connections that are taken for greenlets, after one, until it is the turn of those that are there

cdef tuple NAMES = (
    "_handle_request_noblock", "get_request", "verify_request", "process_request", "finish_request",
    "shutdown_request", "close_request", "service_actions", "process_request_thread",
)


cdef struct Seen:
    # A class that was looked at, and what it has of ours. No other class has had the same version.
    PyTypeObject *cls
    unsigned int version
    unsigned int own

cdef Seen seen[PLACES]

cdef dict _own = {name: () for name in NAMES}
cdef list _passing = []
cdef object _flag = None
cdef object _accept_failed = None
cdef object _paused = None
cdef object _retry_paused = None
# Of the hub of greenlets, once there is one.
cdef object _Hub = None
cdef object _GreenConnection = None
cdef object _accept_green = None
cdef object _end_green = None
cdef object _ended_by = None
cdef object _process_green = None
# Of connections with TLS.
cdef object _unfinished = frozenset()
cdef object _finish_handshake = None
cdef object _is_failed_handshake = None

cdef object _plain_socket = _socket_module.socket
cdef object _get_blocking = _os.get_blocking
cdef object _detach = _socket.socket.detach


def know(own, passing=()):
    """Remember functions, by the name of the method, that need not be called, because it is known what they do.

    :param passing: those of them that only call the next one, that of a base class.
    """
    global seen
    for name, function in own.items():
        _own[name] += (function,)
    _passing.extend(passing)
    for i in range(PLACES):
        seen[i].cls = NULL


def prepare(flag, accept_failed, paused, retry_paused):
    """Remember what else a turn needs.

    :param flag: the descriptor that stands for ``_BaseServer__shutdown_request``.
    :param accept_failed: called with the server and the ``OSError`` of ``get_request``.
    :param paused: the set of loops that pause, and what is called when there is one and a connection was closed.
    """
    global _flag, _accept_failed, _paused, _retry_paused
    _flag, _accept_failed, _paused, _retry_paused = flag, accept_failed, paused, retry_paused


def know_greenlets(hub, connection, accept, end, ended_by, process_request):
    """Remember how connections that wait in a hub are accepted and ended.

    :param hub: the class of hubs, which are the pollers of their servers' loops.
    :param connection: the class of connections that wait in a hub.
    :param accept: called with a listener; returns such a connection and the address of its client.
    :param end: called with a connection; shuts it down and closes it.
    :param ended_by: called with what has come out of a request and would have ended its thread, and the request.
    :param process_request: the method of the mix-in, which need not be called where there is no limit of connections.
    """
    global _Hub, _GreenConnection, _accept_green, _end_green, _ended_by, _process_green
    _Hub, _GreenConnection, _accept_green, _end_green, _ended_by = hub, connection, accept, end, ended_by
    if _process_green is not process_request:
        _process_green = process_request
        for i in range(PLACES):
            seen[i].cls = NULL


def know_handshakes(unfinished, finish_handshake, is_failed_handshake):
    """Remember how the handshakes of connections with TLS are done.

    :param unfinished: the classes of connections whose handshake is to be done.
    :param finish_handshake: does it, and returns whether it succeeded.
    :param is_failed_handshake: tells whether an ``OSError`` of ``verify_request`` is a handshake that failed in it.
    """
    global _unfinished, _finish_handshake, _is_failed_handshake
    _unfinished, _finish_handshake, _is_failed_handshake = unfinished, finish_handshake, is_failed_handshake


cdef unsigned int look_at(object server, PyTypeObject *cls, Seen *place) except 0:
    cdef unsigned int own = LOOKED
    cdef int i
    place.cls = NULL
    # A stand-in with slots for a server has no __dict__ to look into.
    if fs_finds_attributes_plainly(server) and (<object>cls).__dictoffset__ != 0:
        for i, name in enumerate(NAMES):
            for base in (<object>cls).__mro__:
                found = vars(base).get(name, _absent)
                if found is not _absent and not any(found is function for function in _passing):
                    if any(found is function for function in _own[name]):
                        own |= 1 << i
                    elif found is _process_green and found is not None:
                        own |= GREENLET
                    break
        if _PyType_Lookup(cls, FLAG) == <PyObject *>_flag:
            own |= HAS_FLAG
    place.own = own
    place.version = fs_version_of(cls)
    place.cls = cls
    return own


cdef inline unsigned int own_of(object server) except 0:
    """Return which methods the class of a server does not override."""
    cdef PyTypeObject *cls = fs_type_of(server)
    cdef Seen *place = &seen[(<size_t>cls >> 6) % PLACES]
    if cls == place.cls and fs_version_of(cls) == place.version and place.version != 0:
        return place.own
    return look_at(server, cls, place)


cdef inline bint is_own(object server, unsigned int bit, str name) except -1:
    """Return whether a method is one of ours at this moment."""
    if not own_of(server) & bit:
        return False
    return name not in <dict>PyObject_GenericGetDict(server, NULL)


cdef inline bint flag_is_set(object server) except -1:
    cdef PyObject *found
    if own_of(server) & HAS_FLAG:
        found = PyDict_GetItemWithError(PyObject_GenericGetDict(server, NULL), FLAG)
        if found != NULL:
            return <object>found
    return server._BaseServer__shutdown_request


cdef inline bint is_plain(object server, object loop) except -1:
    """Return whether the loop may wait here: it has nothing else to look at, and its methods are not overridden."""
    return (
        is_own(server, HANDLE_NOBLOCK, "_handle_request_noblock")
        and is_own(server, GET, "get_request")
        and is_own(server, SERVICE, "service_actions")
        and not (loop.ticks or loop.stale or loop.held or loop._backoff.pause)
    )


def run(server, loop):
    """Do the turns of a loop, until one is not plain or the loop is to stop; return whether there was any.

    The wait and ``get_request`` are done here as long as nobody has overridden what is called on this way; the loop
    itself does every turn that is different. It is called by the loop's thread.

    :param loop: a :class:`fastserve._loop.Loop` that is open.
    """
    cdef bint waited = False
    cdef bint ready
    cdef int listener = loop._listener
    cdef object poller = loop._poller
    cdef EpollPoller epoll = poller if type(poller) is EpollPoller else None
    cdef bint green = type(poller) is _Hub
    cdef bint may_try = green and not _get_blocking(listener)
    while True:
        PyErr_CheckSignals()
        if not is_plain(server, loop) or loop.stopping or flag_is_set(server):
            return waited
        waited = True
        if epoll is not None:
            ready = epoll.wait_for(listener)
        else:
            ready = poller.wait_for_one(listener) if green else poller.wait(None) == [listener]
        if not ready or loop.stopping or flag_is_set(server):  # bpo-35017: no request is begun after shutdown()
            return True
        # Another thread may have overridden them meanwhile. The poller still reports the listener to the loop then.
        if not (is_own(server, HANDLE_NOBLOCK, "_handle_request_noblock") and is_own(server, GET, "get_request")):
            return True
        if handle_request(server, poller if green else None) and may_try:
            handle_more(server, loop, poller, listener)
        if not is_own(server, SERVICE, "service_actions"):
            server.service_actions()


cdef int handle_more(object server, object loop, object hub, int listener) except -1:
    """Begin more requests, as many as there are clients that wait, up to a limit.

    With one for each turn of the hub, in which all connections that are there may be served, a new client would have to
    wait for as many turns as there are new clients before it. The listener does not block.
    """
    cdef int _i
    for _i in range(MORE):
        if not is_plain(server, loop) or loop.stopping or flag_is_set(server):
            return 0
        if type(server.socket) is not _plain_socket or descriptor_of(server.socket) != listener:
            return 0
        if not handle_request(server, hub):
            return 0
    return 0


cdef bint handle_request(object server, object hub) except -1:
    """Do what ``_handle_request_noblock`` does, ``get_request`` included; return whether there was a request."""
    try:
        listener = server.socket
        if type(listener) is not _plain_socket:
            request, client_address = server.get_request()
        elif hub is not None:
            request, client_address = _accept_green(listener)
        else:
            request, client_address = accept_from(listener, _accepted)
    except OSError as error:
        if hub is None or type(error) is not BlockingIOError:
            _accept_failed(server, error)
        return False
    if not is_own(server, VERIFY, "verify_request"):
        try:
            verified = server.verify_request(request, client_address)
        except OSError as error:
            if not _is_failed_handshake(error):
                raise
            verified = False
        if not verified:
            end(server, request)
            return True
    try:
        if is_own(server, PROCESS, "process_request"):
            finish(server, request, client_address)
            end(server, request)
        elif (
            hub is not None
            and type(request) is _GreenConnection
            and is_own(server, GREENLET, "process_request")
            and server.max_connections is None
        ):
            hub.start(process_request_greenlet, server, request, client_address)
        else:
            server.process_request(request, client_address)
    except Exception:
        server.handle_error(request, client_address)
        end(server, request)
    except BaseException:
        end(server, request)
        raise
    return True


cdef inline int finish(object server, object request, object client_address) except -1:
    """Do what ``finish_request`` does."""
    if is_own(server, FINISH, "finish_request"):
        construct(server.RequestHandlerClass, request, client_address, server)
    else:
        server.finish_request(request, client_address)
    return 0


cdef int end(object server, object request) except -1:
    """Do what ``shutdown_request`` does, and ``close_request`` for it."""
    cdef int descriptor, result
    if (
        (type(request) is not _Connection and type(request) is not _GreenConnection)
        or not is_own(server, SHUTDOWN, "shutdown_request")
        or not is_own(server, CLOSE, "close_request")
        or not is_plain_connection()
        or request._io_refs > 0
        or _socketserver.socket is not _socket_module
    ):
        server.shutdown_request(request)
        return 0
    if type(request) is _GreenConnection:
        _end_green(request)
    else:
        request._closed = True
        descriptor = _detach(request)
        if descriptor >= 0:
            with nogil:
                result = fs_shutdown_and_close(descriptor)
            if result < 0:
                raise error_of(-result)
    if _paused:
        _retry_paused()
    return 0


# The methods of a connection that its end goes through, as they are when this module is imported.
cdef list _of_connections = [
    (cls, name, getattr(cls, name))
    for cls in (_Connection, _socket_module.socket) for name in ("shutdown", "close", "_real_close", "detach")
]
cdef unsigned int _connection_version = 0
cdef bint _connection_is_plain = False


cdef inline bint is_plain_connection() except -1:
    """Return whether nobody has replaced a method of connections, or of ``socket.socket``, that ends one."""
    global _connection_version, _connection_is_plain
    cdef PyTypeObject *cls = <PyTypeObject *>_Connection
    if fs_version_of(cls) != _connection_version or _connection_version == 0:
        _connection_is_plain = True
        for owner, name, function in _of_connections:
            if getattr(owner, name) is not function:
                _connection_is_plain = False
        _connection_version = fs_version_of(cls)
    return _connection_is_plain


cdef inline bint is_ready(object request) except -1:
    """Return whether a request may be handled. The handshake of a connection with TLS may be to be done first."""
    return (
        type(request) is _Connection
        or type(request) is _GreenConnection
        or type(request) not in _unfinished
        or _finish_handshake(request)
    )


cdef int handle(object server, object request, object client_address) except -1:
    """Handle a request in the thread or the greenlet that it has."""
    if is_ready(request):
        finish(server, request, client_address)
    return 0


ctypedef int (*Handle)(object, object, object) noexcept

# The same for who looks at the result: below zero if an exception is set.
cdef Handle handle_quietly = <Handle>handle


cdef int end_handled(object server, object request, object client_address, bint failed) except -1:
    """End a request that was handled, and report the exception that is set if it has ``failed``."""
    try:
        if failed:
            raised()
    except Exception:
        server.handle_error(request, client_address)
    finally:
        end(server, request)
    return 0


def process_request_thread(server, request, client_address):
    """Do what ``ThreadingMixIn.process_request_thread`` does."""
    end_handled(server, request, client_address, handle_quietly(server, request, client_address) < 0)


def process_request_greenlet(server, request, client_address):
    """Handle a request in its greenlet, as ``process_request_thread`` does."""
    cdef bint is_handled = is_own(server, IN_THREAD, "process_request_thread")
    cdef bint failed = is_handled and handle_quietly(server, request, client_address) < 0
    end_in_greenlet(server, request, client_address, is_handled, failed)


cdef int end_in_greenlet(
    object server, object request, object client_address, bint is_handled, bint failed
) except -1:
    """End a request that was handled, or have an overridden method do all of it; tell what comes out of it."""
    try:
        if is_handled:
            end_handled(server, request, client_address, failed)
        else:
            server.process_request_thread(request, client_address)
    except BaseException as error:
        _ended_by(error, request)
    return 0


cdef object _in_thread = process_request_thread


def method_for_thread(server):
    """Return what a thread is to call with a request and its address: ``server.process_request_thread``, or the above.
    """
    if is_own(server, IN_THREAD, "process_request_thread"):
        return PyMethod_New(_in_thread, server)
    return server.process_request_thread
