# cython: language_level=3, embedsignature=True, embedsignature.format=clinic
"""The C twin of the connections that wait in a hub. Its contract and its types are those of ``_green_py``."""

import io as _io
import socket as _socket_module

import _socket
cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport Py_DECREF, PyObject
from libc.errno cimport EAGAIN, EBADF, EINTR
from libc.string cimport memchr, memcpy, memset

from fastserve import _green_py
from fastserve._lines import LineTooLong as _LineTooLong
from fastserve cimport _streams
from fastserve._addresses cimport address_of
from fastserve._errors cimport error_of, raised
from fastserve._hub cimport (
    CALL, CORK, LARGE, PER_UNIT, SCRATCH, Hub, Slot, deadline_of, forget, fs_recv_new, running_hub, send_all,
)
from fastserve._sockets cimport descriptor_of, family_of, initialize, new_socket, protocol_of, type_of
from fastserve._syscalls cimport (
    AF_INET, AF_INET6, AF_UNIX, MSG_DONTWAIT, close_descriptor, fs_accept, fs_recv, fs_send, fs_shutdown_and_close,
    sockaddr, sockaddr_storage, socklen_t,
)

cdef object _plain_socket = _socket_module.socket
cdef object _PyConnection = _green_py.Connection
cdef object _close = _socket.socket.close
cdef object _detach = _socket.socket.detach


cdef inline int begin_reading(Hub hub) except -1:
    """Send what was gathered, and let others have their turn if it is time for that."""
    if hub.corked:
        hub.flush()
    if hub.budget <= 0:
        hub.spend()
    return 0


cdef Py_ssize_t receive(Hub hub, object connection, char *data, Py_ssize_t room, PyObject **made) except -1:
    """Receive what there is, waiting for it.

    If ``made`` is not NULL and much is expected, it is as ``fs_recv_new`` leaves it.
    """
    cdef double deadline = -1.0
    cdef Py_ssize_t size
    cdef Slot *slot
    cdef int fd
    while True:
        fd = descriptor_of(connection)  # asked for again after a wait: somebody may have closed it
        if fd < 0:
            raise error_of(EBADF)
        slot = hub.slot_of(connection, fd)
        if not slot.drained or deadline == 0.0:
            if made != NULL and hub.expected and hub.expected < room:
                size = fs_recv_new(fd, made, hub.expected, data, room - hub.expected)
            else:
                size = fs_recv(fd, data, room, MSG_DONTWAIT)
            if size >= 0:
                if size < room and size > 0 and not slot.peculiar:
                    slot.drained = True
                hub.budget -= CALL + <int>(size // PER_UNIT)
                return size
            if size == -EINTR:
                PyErr_CheckSignals()
                continue
            if size != -EAGAIN:
                raise error_of(-size)
        if deadline < 0.0:
            deadline = deadline_of(connection)
            if deadline == 0.0 and slot.drained:
                continue  # it must not wait, and may have received something that nobody has heard of yet
        hub.wait_for(connection, fd, False, deadline)


ctypedef Py_ssize_t (*Receive)(Hub, object, char *, Py_ssize_t, PyObject **) noexcept

# The same for who looks at the result: below zero if an exception is set.
cdef Receive receive_quietly = <Receive>receive


cdef bytes received(Hub hub, PyObject *made, Py_ssize_t size):
    """Return as bytes what :func:`receive` has left in ``made``, which is taken over, and in the scratch."""
    cdef Py_ssize_t first
    cdef bytes whole, begin
    hub.expected = size if size >= LARGE else 0
    if made == NULL:
        return PyBytes_FromStringAndSize(hub.scratch, size)
    begin = <bytes>made
    Py_DECREF(begin)
    first = PyBytes_GET_SIZE(begin)
    if size == first:
        return begin
    whole = PyBytes_FromStringAndSize(PyBytes_AS_STRING(begin) if size < first else NULL, size)
    if size > first:
        memcpy(PyBytes_AS_STRING(whole), PyBytes_AS_STRING(begin), first)
        memcpy(PyBytes_AS_STRING(whole) + first, hub.scratch, size - first)
    return whole


cdef int send(Hub hub, object connection, const char *data, Py_ssize_t size) except -1:
    """Send all of it, or gather it while there are requests left to read."""
    cdef Py_ssize_t sent
    cdef Slot *slot
    cdef int fd = descriptor_of(connection)
    if fd < 0:
        raise error_of(EBADF)
    slot = hub.slot_of(connection, fd)
    if slot.unread or hub.corked:
        if hub.corked and (hub.cork_owner is not connection or hub.corked + size > CORK):
            hub.flush()
            fd = descriptor_of(connection)  # asked for again after a wait: somebody may have closed it
            if fd < 0:
                raise error_of(EBADF)
            slot = hub.slot_of(connection, fd)
        if size <= CORK and (hub.corked or (slot.unread and not slot.exposed and deadline_of(connection) != 0.0)):
            if hub.corked == 0:
                hub.cork_owner = connection
            memcpy(hub.cork + hub.corked, data, size)
            hub.corked += size
            if not slot.unread:
                hub.flush()
            return 0
    sent = fs_send(fd, data, size, MSG_DONTWAIT)
    if sent == size:
        hub.budget -= CALL
        return 0
    if sent < 0:
        if sent != -EAGAIN and sent != -EINTR:
            raise error_of(-sent)
        PyErr_CheckSignals()
        sent = 0
    return send_all(hub, connection, data + sent, size - sent, deadline_of(connection))


cdef object plainly_received(object connection, object bufsize, object flags):
    return _PyConnection.recv(connection, bufsize, flags)


@cython.auto_pickle(False)
@cython.binding(False)  # as those of ``socket.socket``: CPython calls them with less ado
cdef class _Green:
    """The methods of :class:`Connection` that are called for every request."""

    def recv(self, bufsize, flags=0, /):
        cdef Hub hub = running_hub()
        cdef PyObject *made = NULL
        cdef Py_ssize_t size
        if hub is None or flags or type(bufsize) is not int or bufsize <= 0:
            return plainly_received(self, bufsize, flags)
        begin_reading(hub)
        size = receive(hub, self, hub.scratch, SCRATCH if bufsize > SCRATCH else <Py_ssize_t>bufsize, &made)
        return received(hub, made, size)

    def recv_into(self, buffer, nbytes=0, flags=0):
        cdef Hub hub = running_hub()
        cdef Py_buffer view
        cdef Py_ssize_t size
        if hub is None or flags or type(nbytes) is not int or nbytes < 0:
            return _PyConnection.recv_into(self, buffer, nbytes, flags)
        begin_reading(hub)
        try:
            PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
        except BufferError:
            return _PyConnection.recv_into(self, buffer, nbytes, flags)  # which raises what a socket does
        try:
            size = view.len
            if nbytes:
                if nbytes > size:
                    raise ValueError("buffer too small for requested bytes")
                size = nbytes
            if size == 0:
                return 0
            return receive(hub, self, <char *>view.buf, size, NULL)
        finally:
            PyBuffer_Release(&view)

    def sendall(self, data, flags=0, /):
        cdef Hub hub = running_hub()
        cdef Py_buffer view
        if hub is None or flags:
            return _PyConnection.sendall(self, data, flags)
        if hub.budget <= 0:
            hub.spend()
        if type(data) is bytes:
            send(hub, self, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
            return None
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            send(hub, self, <const char *>view.buf, view.len)
        finally:
            PyBuffer_Release(&view)

    def makefile(self, mode="r", buffering=None, *, encoding=None, errors=None, newline=None):
        if mode == "rb" and (buffering is None or (type(buffering) is int and buffering != 0)):
            return Reader(self)
        return _PyConnection.makefile(self, mode, buffering, encoding=encoding, errors=errors, newline=newline)

    def accept(self):
        accepted = _PyConnection.accept(self)
        accepted[0].__class__ = Connection
        return accepted

    def fileno(self):
        cdef Hub hub = running_hub()
        cdef int fd = descriptor_of(self)
        if hub is not None and fd >= 0:
            hub.expose(self, fd)
        return fd

    def close(self):
        cdef Hub hub = running_hub()
        cdef int fd
        if self._io_refs > 0:
            self._closed = True
            return
        self._closed = True
        fd = descriptor_of(self)
        if fd < 0:
            return
        try:
            if hub is not None and hub.corked and hub.cork_owner is self:
                hub.flush()
        finally:
            fd = descriptor_of(self)  # asked for again after a wait
            if fd >= 0:
                forget(fd)
                _close(self)


class Connection(_Green, _PyConnection):
    __module__ = "fastserve.streams"
    __doc__ = _green_py.Connection.__doc__
    __slots__ = ()
    __new__ = _plain_socket.__new__


cdef int _send_written(object connection, const char *data, Py_ssize_t size) except -1:
    cdef Hub hub = running_hub()
    if hub is None:
        return False
    if hub.budget <= 0:
        hub.spend()
    send(hub, connection, data, size)
    return True


_streams.green_class = Connection
_streams.green_sendall = Connection.sendall
_streams.green_send = _send_written


def adopt(connection):
    connection.__class__ = Connection
    forget(descriptor_of(connection))


def accept(listener):
    """Accept a connection that waits in the hub: ``(connection, address)``."""
    cdef sockaddr_storage storage
    cdef socklen_t length = sizeof(storage)
    cdef int family
    cdef int fd
    if type(listener) is not _plain_socket:
        return listener.accept()  # somebody's own
    family = family_of(listener)
    if family != AF_INET and family != AF_INET6 and family != AF_UNIX:
        return _green_py.accept(listener)
    memset(&storage, 0, sizeof(storage))
    fd = fs_accept(descriptor_of(listener), <sockaddr *>&storage, &length)
    if fd < 0:
        raise error_of(-fd)
    try:
        connection = new_socket(Connection)
        initialize(connection, family, type_of(listener), protocol_of(listener), fd)
    except BaseException:
        close_descriptor(fd)
        raise
    forget(fd)
    return connection, address_of(&storage, length, family)


def end(connection):
    """Shut a connection down and close it. Nobody else has a file of it open."""
    cdef Hub hub = running_hub()
    cdef int fd, result
    connection._closed = True
    if hub is not None and hub.corked and hub.cork_owner is connection:
        hub.end_flush()
    fd = descriptor_of(connection)
    if fd < 0:
        return
    forget(fd)
    _detach(connection)
    result = fs_shutdown_and_close(fd)
    if result < 0:
        raise error_of(-result)


cdef object _unsupported = _io.UnsupportedOperation


@cython.binding(False)
cdef class Reader:
    """The ``rfile`` of a connection in a hub: as ``io.BufferedReader``, and it keeps only what was not read yet."""

    cdef object sock  # the connection; None when it is closed
    cdef bytes rest  # received and not read yet, from ``position`` on
    cdef Py_ssize_t position
    cdef public Py_ssize_t max_line  # see LimitsMixIn; -1 where there is no limit
    cdef bint timed_out, detached
    cdef object made_raw
    cdef object __weakref__

    def __init__(self, connection):
        self.sock = connection
        self.rest = b""
        self.max_line = -1
        connection._io_refs += 1

    def __del__(self):
        if self.sock is not None:
            self.close()

    cdef object opened(self):
        if self.sock is None:
            raise ValueError("raw stream has been detached" if self.detached else "I/O operation on closed file.")
        return self.sock

    cdef int keep(self, bytes rest) except -1:
        """Remember what is left, and tell the hub whether there is something: replies are gathered meanwhile."""
        cdef Hub hub
        cdef int fd
        self.rest = rest
        self.position = 0
        hub = running_hub()
        if hub is not None and type(self.sock) is Connection:
            fd = descriptor_of(self.sock)
            if 0 <= fd < hub.slot_count and hub.slots[fd].owner == <void *>self.sock:
                hub.slots[fd].unread = PyBytes_GET_SIZE(rest) > 0
        return 0

    cdef bytes take(self, Py_ssize_t size):
        """Return that many bytes of what is left."""
        cdef bytes found
        if size < self.left():
            found = PyBytes_FromStringAndSize(PyBytes_AS_STRING(self.rest) + self.position, size)
            self.position += size
            return found
        found = self.rest[self.position:] if self.position else self.rest
        self.keep(b"")
        return found

    cdef Py_ssize_t left(self):
        return PyBytes_GET_SIZE(self.rest) - self.position

    cdef int begin(self) except -1:
        """Begin a read. Others have their turn also while there is much to read that was received already."""
        cdef Hub hub
        if self.left():
            hub = running_hub()
            if hub is not None and type(self.sock) is Connection:
                hub.budget -= 1
                if hub.budget <= 0:
                    hub.spend()
        self.opened()
        return 0

    cdef Py_ssize_t receive_some(self, Hub hub, Py_ssize_t room, PyObject **made) except -2:
        """Receive into the scratch of the hub, or new bytes; -1: there is nothing, and the connection does not wait."""
        cdef Py_ssize_t size
        self.refuse_timed_out()
        begin_reading(hub)
        size = receive_quietly(hub, self.sock, hub.scratch, room, made)
        if size < 0:
            self.received_nothing()
        return size

    cdef int refuse_timed_out(self) except -1:
        if self.timed_out:
            raise OSError("cannot read from timed out object")
        return 0

    cdef int received_nothing(self) except -1:
        """Raise the exception that is set, unless it says that there is nothing."""
        try:
            raised()
        except BlockingIOError:
            pass
        except TimeoutError:
            self.timed_out = True
            raise
        return 0

    cdef object receive_bytes(self, Py_ssize_t room):
        """Receive and return bytes; ``None`` if nothing is there and the connection does not wait."""
        cdef Hub hub = running_hub()
        cdef PyObject *made = NULL
        cdef Py_ssize_t size
        if hub is not None and type(self.sock) is Connection:
            size = self.receive_some(hub, min(room, SCRATCH), &made)
            return None if size < 0 else received(hub, made, size)
        self.refuse_timed_out()
        try:
            return self.sock.recv(room)
        except BlockingIOError:
            return None
        except TimeoutError:
            self.timed_out = True
            raise

    def readline(self, size=-1, /):
        return self.read_line(-1 if size is None else size)

    cdef bytes read_line(self, Py_ssize_t limit):
        """Do what ``readline()`` does."""
        cdef bytes line
        if limit >= 0 or self.max_line < 0:
            return self.next_line(limit)
        line = self.next_line(self.max_line + 1)
        if PyBytes_GET_SIZE(line) > self.max_line:
            raise _LineTooLong(self.max_line)
        return line

    cdef bytes next_line(self, Py_ssize_t limit):
        """Return a line, or so many bytes of it; all of it if the limit is negative."""
        cdef Hub hub
        cdef Py_ssize_t length, start
        cdef const char *found
        cdef const char *begin
        cdef bytes line
        self.begin()
        length = self.left()
        if length:
            begin = PyBytes_AS_STRING(self.rest) + self.position
            found = <const char *>memchr(begin, 10, length)
            if found != NULL:
                length = found - begin + 1
                return self.take(length if limit < 0 or length <= limit else limit)
            if 0 <= limit <= length:
                return self.take(limit)
            return self.long_line(limit)
        hub = running_hub()
        if limit == 0:
            return b""
        if hub is None or type(self.sock) is not Connection:
            return self.long_line(limit)
        length = self.receive_some(hub, DEFAULT if limit < 0 else SCRATCH, NULL)
        if length <= 0:
            return b""
        found = <const char *>memchr(hub.scratch, 10, length)
        if found == NULL or (0 <= limit < found - hub.scratch + 1):
            self.keep(PyBytes_FromStringAndSize(hub.scratch, length))
            if 0 <= limit <= length:
                return self.take(limit)
            return self.long_line(limit)
        start = found - hub.scratch + 1
        line = PyBytes_FromStringAndSize(hub.scratch, start)
        if start < length:
            self.keep(PyBytes_FromStringAndSize(hub.scratch + start, length - start))
        elif hub.slots[descriptor_of(self.sock)].unread:
            self.keep(b"")
        return line

    cdef bytes long_line(self, Py_ssize_t limit):
        """Return a line of which what is left is only a part."""
        cdef list parts = []
        cdef Py_ssize_t size = 0
        cdef Py_ssize_t length
        while True:
            if self.left():
                length = self.left()
                end = self.rest.find(b"\n", self.position)
                if end >= 0:
                    length = end + 1 - self.position
                if limit >= 0 and size + length >= limit:
                    parts.append(self.take(limit - size))
                    break
                size += length
                parts.append(self.take(length))
                if end >= 0:
                    break
            more = self.receive_bytes(DEFAULT)
            if not more:
                break
            self.keep(more)
        return b"".join(parts)

    def read(self, size=-1, /):
        cdef list parts
        cdef Py_ssize_t wanted = -1 if size is None else size
        self.begin()
        if wanted < -1:
            raise ValueError("read length must be non-negative or -1")
        if 0 <= wanted <= self.left():
            return self.take(wanted)
        parts = [self.take(self.left())] if self.left() else []
        wanted = wanted - len(parts[0]) if parts and wanted >= 0 else wanted
        while wanted:
            more = self.receive_bytes(SCRATCH if wanted < 0 else max(wanted, DEFAULT))
            if more is None and not parts:
                return None
            if not more:
                break
            if 0 <= wanted < len(more):
                self.keep(more)
                more = self.take(wanted)
            parts.append(more)
            if wanted > 0:
                wanted -= len(more)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read1(self, size=-1, /):
        cdef Py_ssize_t wanted = size
        self.begin()
        if wanted < 0:
            wanted = DEFAULT
        if wanted == 0:
            return b""
        if self.left():
            return self.take(min(wanted, self.left()))
        return self.receive_bytes(wanted) or b""

    def peek(self, Py_ssize_t size=0, /):
        self.opened()
        if not self.left():
            self.keep(self.receive_bytes(DEFAULT) or b"")
        return self.rest[self.position:]

    def readinto(self, buffer, /):
        return self.fill(buffer, False)

    def readinto1(self, buffer, /):
        return self.fill(buffer, True)

    def fill(self, buffer, bint once):
        cdef Py_ssize_t filled = 0
        self.begin()
        with memoryview(buffer) as given, given.cast("B") as view:
            if view.readonly:
                raise TypeError(f"argument must be read-write bytes-like object, not {type(buffer).__name__}")
            while filled < len(view):
                if not self.left():
                    if once and filled:
                        break
                    more = self.receive_bytes(max(DEFAULT, len(view) - filled))
                    if more is None and not filled:
                        return None
                    if not more:
                        break
                    self.keep(more)
                part = self.take(min(self.left(), len(view) - filled))
                view[filled:filled + len(part)] = part
                filled += len(part)
                if once:
                    break
        return filled

    def readlines(self, hint=-1, /):
        cdef Py_ssize_t most = -1 if hint is None else hint
        cdef Py_ssize_t size = 0
        found = []
        for line in self:
            found.append(line)
            size += len(line)
            if 0 < most < size:
                break
        return found

    def __iter__(self):
        self.opened()
        return self

    def __next__(self):
        line = self.read_line(-1) if type(self) is Reader else self.readline()
        if not line:
            raise StopIteration
        return line

    def __enter__(self):
        self.opened()
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        if self.detached:
            self.opened()
        if self.sock is not None:
            sock = self.sock
            self.keep(b"")
            self.sock = None
            if self.made_raw is not None:
                self.made_raw.close()
            sock._decref_socketios()

    @property
    def closed(self):
        if self.detached:
            self.opened()
        return self.sock is None

    @property
    def raw(self):
        if self.made_raw is None:
            self.made_raw = _socket_module.SocketIO(self.opened(), "rb")
            self.sock._io_refs += 1
        return self.made_raw

    def detach(self):
        raw = self.raw
        self.made_raw = None  # it is the caller's to close
        self.close()
        self.detached = True
        return raw

    @property
    def name(self):
        return -1 if self.sock is None else self.sock.fileno()

    @property
    def mode(self):
        return "rb"

    def fileno(self):
        return self.opened().fileno()

    def isatty(self):
        self.opened()
        return False

    def readable(self):
        self.opened()
        return True

    def writable(self):
        return False

    def seekable(self):
        self.opened()
        return False

    def flush(self):
        self.opened()

    def seek(self, offset, whence=0, /):
        raise _unsupported("File or stream is not seekable.")

    def tell(self):
        raise _unsupported("seek")

    def truncate(self, size=None, /):
        raise _unsupported("truncate")

    def write(self, data, /):
        raise _unsupported("write")

    def writelines(self, lines, /):
        for line in lines:
            self.write(line)


cdef enum:
    DEFAULT = 65536  # bytes received at a time where nobody says how many


_io.BufferedIOBase.register(Reader)
