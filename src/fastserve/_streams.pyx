# cython: language_level=3, embedsignature=True, embedsignature.format=clinic, freethreading_compatible=True
"""The C twin of the streams. Its contract and its types are those of ``_streams_py``.

What is a ``socket.socket``, a ``socket.SocketIO`` or the stdlib's ``_SocketWriter`` there is one here as well: each
class is derived from the stdlib's and from an extension class without fields, which may stand beside it and brings the
methods that are worth it. They do the plain case themselves, one system call that succeeds or fails. Whatever is odd
goes to the stdlib's own method, so that it does what that does: a closed file, a buffer of another kind, a method or a
class that somebody has replaced.
"""

import socket as _socket_module
import socketserver as _socketserver
import sys as _sys
from io import BufferedReader as _BufferedReader

import _socket
cimport cython
from cpython.buffer cimport PyBUF_READ, PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.memoryview cimport PyMemoryView_FromMemory
from cpython.object cimport PyObject, PyTypeObject
from libc.errno cimport EAGAIN, EINTR
from libc.math cimport ceil

from fastserve._clock cimport MAX_WAIT, now
from fastserve._errors cimport error_of
from fastserve._hooks cimport fs_version_of
from fastserve._sockets cimport descriptor_of, initialize, new_socket, timeout_of
from fastserve._streams_py import Connection as _PyConnection, reduce_connection as _reduce_connection
from fastserve._syscalls cimport MSG_DONTWAIT, POLLIN, fs_poll, fs_recv, fs_send, pollfd

cdef extern from *:
    """
    #include <structmember.h>
    static inline Py_ssize_t fs_place_of(PyObject *slot) { return ((PyMemberDescrObject *)slot)->d_member->offset; }
    /* What is in a slot, borrowed; NULL: nothing. Without the GIL another thread may replace it meanwhile. */
    static inline PyObject *fs_in_slot(PyObject *object, Py_ssize_t place)
    {
    #ifdef Py_GIL_DISABLED
        return NULL;
    #else
        return *(PyObject **)((char *)object + place);
    #endif
    }
    """
    Py_ssize_t fs_place_of(object)
    PyObject *fs_in_slot(object, Py_ssize_t)

cdef object _plain_socket = _socket_module.socket
cdef object _plain_init = _plain_socket.__init__
cdef object _plain_makefile = _plain_socket.makefile
cdef object _plain_close = _plain_socket.close
cdef object _plain_real_close = _plain_socket._real_close
cdef object _SocketIO = _socket_module.SocketIO
cdef object _SocketIO_readinto = _SocketIO.readinto
cdef object _StdlibWriter = _socketserver._SocketWriter
cdef object _raw_close = _socket_module.io.RawIOBase.close

# The methods at the C level; nothing but a module that replaces socket.socket stands between them and the kernel.
cdef object _recv_into = _socket.socket.recv_into
cdef object _sendall = _socket.socket.sendall
cdef object _close = _socket.socket.close
cdef object _init_socket = _socket.socket.__init__


cdef Py_ssize_t _receive(int fd, void *data, size_t size, double until) noexcept nogil:
    """Receive until then; return what recv(2) returns, -errno, or -EAGAIN if nothing came.

    That is tried first, without the GIL, as the wait would be: most often there is something, and no need to wait.
    """
    cdef pollfd waited
    cdef double left
    cdef Py_ssize_t result
    waited.fd = fd
    waited.events = POLLIN
    while True:
        # The descriptor need not be non-blocking: another object may have changed it.
        result = fs_recv(fd, data, size, MSG_DONTWAIT)
        if result != -EAGAIN:
            return result
        left = until - now()
        if left < 0.0:
            return -EAGAIN
        waited.revents = 0
        result = fs_poll(&waited, 1, <int>ceil(left * 1000.0))  # rounded up, as socket.socket does
        if result <= 0:
            return result if result < 0 else -EAGAIN


@cython.auto_pickle(False)
cdef class _Reader:
    """The methods of :class:`SocketReader`."""

    def readinto(self, b):
        cdef Py_buffer view
        cdef Py_ssize_t result
        cdef int fd
        cdef double timeout
        cdef double until = 0.0
        cdef object sock = self._sock
        cdef object cls = type(sock)
        if (
            (cls is not Connection and cls is not _plain_socket)
            or cls.recv_into is not _recv_into
            or self._timeout_occurred
            or self.closed
        ):
            return _SocketIO_readinto(self, b)
        try:
            PyObject_GetBuffer(b, &view, PyBUF_WRITABLE)
        except Exception:
            return _SocketIO_readinto(self, b)  # which has its own words for it
        try:
            if view.len == 0:
                return _SocketIO_readinto(self, b)
            timeout = timeout_of(sock)
            if timeout > 0.0:
                until = now() + min(timeout, MAX_WAIT)
            while True:
                fd = descriptor_of(sock)  # asked for again after a signal handler, which may have closed it
                with nogil:
                    if timeout < 0.0:
                        result = fs_recv(fd, view.buf, view.len, 0)
                    else:
                        result = _receive(fd, view.buf, view.len, until)
                if result >= 0:
                    return result
                if result == -EINTR:
                    PyErr_CheckSignals()
                elif result != -EAGAIN:
                    raise error_of(-result)
                elif timeout > 0.0:
                    self._timeout_occurred = True
                    raise TimeoutError("timed out")
                else:
                    return None
        finally:
            PyBuffer_Release(&view)

    def readable(self):
        if self.closed:
            raise ValueError("I/O operation on closed socket.")
        return self._reading

    def close(self):
        if self.closed:
            return
        _raw_close(self)
        self._sock._decref_socketios()
        self._sock = None


class SocketReader(_Reader, _SocketIO):
    __module__ = "fastserve.streams"
    __new__ = _SocketIO.__new__  # the extension class's, found first, refuses to make what has fields

    # Every instance has these attributes; it needs them in its own __dict__ only when they change.
    _mode = "rb"
    _reading = True
    _writing = False
    _timeout_occurred = False


cdef object _write_all(object sock, object b):
    sock.sendall(b)
    if type(b) is bytes:
        return len(b)
    with memoryview(b) as view:
        return view.nbytes


green_class = green_sendall = None
cdef unsigned int _green_version = 0


cdef inline bint _is_green(object cls) except -1:
    """Return whether it is the class of a hub's connections, and nobody has replaced its ``sendall``."""
    global _green_version
    if cls is not green_class:
        return False
    if fs_version_of(<PyTypeObject *>cls) != _green_version or _green_version == 0:
        if cls.sendall is not green_sendall:
            return False
        _green_version = fs_version_of(<PyTypeObject *>cls)
    return True


cdef object _writer_class  # below
cdef Py_ssize_t _place_of_sock


cdef inline object _connection_of(object writer):
    """Return ``writer._sock``: for each write, and so without looking for the name."""
    cdef PyObject *sock
    if type(writer) is _writer_class:
        sock = fs_in_slot(writer, _place_of_sock)
        if sock != NULL:
            return <object>sock
    return writer._sock


@cython.auto_pickle(False)
@cython.binding(False)  # CPython calls them with less ado
cdef class _Writer:
    """The methods of :class:`_SocketWriter`."""

    def writable(self):
        return True

    def write(self, b):
        cdef Py_buffer view
        cdef Py_ssize_t sent
        cdef int fd, flags
        cdef object sock = _connection_of(self)
        cdef object cls = type(sock)
        if _is_green(cls):
            if type(b) is bytes and green_send(sock, PyBytes_AS_STRING(b), PyBytes_GET_SIZE(b)):
                return PyBytes_GET_SIZE(b)
            return _write_all(sock, b)
        if (cls is not Connection and cls is not _plain_socket) or cls.sendall is not _sendall:
            return _write_all(sock, b)
        try:
            PyObject_GetBuffer(b, &view, PyBUF_SIMPLE)
        except Exception:
            return _write_all(sock, b)  # which has its own words for it
        try:
            if view.len == 0:
                return _write_all(sock, b)
            # The descriptor need not be non-blocking: another object may have changed it.
            flags = 0 if timeout_of(sock) < 0.0 else MSG_DONTWAIT
            fd = descriptor_of(sock)
            with nogil:
                sent = fs_send(fd, view.buf, view.len, flags)
            if sent < 0:
                if sent != -EAGAIN and sent != -EINTR:
                    raise error_of(-sent)
                sent = 0
            PyErr_CheckSignals()  # as sendall() does after every part
            if sent < view.len:
                # There was no wait yet: the time that sendall() may take begins now.
                _sendall(sock, PyMemoryView_FromMemory(<char *>view.buf + sent, view.len - sent, PyBUF_READ))
            return view.len
        finally:
            PyBuffer_Release(&view)

    def fileno(self):
        return self._sock.fileno()


class _SocketWriter(_Writer, _StdlibWriter):
    __module__ = "fastserve.streams"
    __slots__ = ("_sock",)  # CPython finds methods sooner where there is nothing in the __dict__
    __new__ = _StdlibWriter.__new__

    # A method of an extension class would not tell its parameters, nor could it be replaced.
    def __init__(self, sock):
        self._sock = sock


_writer_class = _SocketWriter
_place_of_sock = fs_place_of(_SocketWriter._sock)


@cython.auto_pickle(False)
cdef class _Connection:
    """The methods of :class:`Connection`."""

    def close(self):
        if (
            type(self) is not Connection
            or _plain_socket.close is not _plain_close
            or _plain_socket._real_close is not _plain_real_close
        ):
            _plain_socket.close(self)
            return
        self._closed = True
        if self._io_refs <= 0:
            _close(self)

    def makefile(self, mode="r", buffering=None, *, encoding=None, errors=None, newline=None):
        if (
            mode != "rb"
            or buffering == 0
            or _plain_socket.makefile is not _plain_makefile
            or _socket_module.SocketIO is not _SocketIO
            or _SocketIO.readinto is not _SocketIO_readinto
        ):
            return _plain_socket.makefile(
                self, mode, buffering, encoding=encoding, errors=errors, newline=newline
            )
        raw = SocketReader.__new__(SocketReader)
        raw._sock = self
        self._io_refs += 1
        if buffering is None or buffering < 0:
            buffering = _socket_module.io.DEFAULT_BUFFER_SIZE
        return _BufferedReader(raw, buffering)


class Connection(_Connection, _plain_socket):
    __module__ = "fastserve.streams"
    __doc__ = _PyConnection.__doc__  # not that of the extension class, which it would inherit
    __slots__ = ()
    __new__ = _plain_socket.__new__

    def __init__(self, family=-1, type=-1, proto=-1, fileno=None):
        if fileno is None or _plain_socket.__init__ is not _plain_init:
            _plain_socket.__init__(self, family, type, proto, fileno)
        else:
            _init_socket(self, family, type, proto, fileno)
            self._io_refs = 0
            self._closed = False

    def __reduce_ex__(self, protocol):
        # A method in C has no frame of its own.
        return _reduce_connection(self, protocol, _sys._getframe(0).f_globals)


cdef object _init_connection = Connection.__init__


def accepted(family, type, proto, descriptor):
    """Return the :class:`Connection` of a descriptor that accept(2) has returned."""
    if Connection.__init__ is not _init_connection or _plain_socket.__init__ is not _plain_init:
        return Connection(family, type, proto, descriptor)
    connection = new_socket(Connection)
    initialize(connection, family, type, proto, descriptor)
    return connection
