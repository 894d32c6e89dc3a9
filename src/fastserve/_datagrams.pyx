# cython: language_level=3, embedsignature=True, freethreading_compatible=True
"""The C twin of the datagrams: recvmmsg(2), sendmmsg(2), and the turns of a loop over a batch.

Its contract and its types are those of ``_datagrams_py``; the docstrings here say only what is particular to C.
"""

import os as _os

import _socket

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_GetItemWithError
from cpython.exc cimport PyErr_CheckSignals
from cpython.object cimport PyObject, PyTypeObject
from libc.errno cimport EAGAIN, EINTR
from libc.stdint cimport uint16_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset, strlen

from fastserve._addresses cimport address_of
from fastserve._errors cimport error_of
from fastserve._hooks cimport (
    PyObject_GenericGetDict, _PyType_Lookup, fs_finds_attributes_plainly, fs_type_of, fs_version_of,
)
from fastserve._locks cimport PyThread_get_thread_ident, fs_number, fs_set_number
from fastserve._syscalls cimport (
    AF_INET, AF_INET6, AF_UNIX, MSG_TRUNC, POLLOUT, fs_can_segment, fs_control, fs_mmsghdr, fs_poll, fs_recvmmsg,
    fs_segment, fs_sendmmsg, htonl, htons, inet_pton, iovec, pollfd, sockaddr_in, sockaddr_in6, sockaddr_storage,
    sockaddr_un, socklen_t,
)

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object, Py_ssize_t *) except NULL
    int PySys_Audit(const char *, const char *, ...) except -1

cdef enum:
    KNOWN = 64        # addresses of peers that are remembered
    LINE = 64         # bytes of a line of the processor's cache
    MOST = 64         # replies that are gathered
    LONGEST = 65507   # bytes of a datagram over IPv4
    SEGMENT = 1232    # bytes of a datagram that any path takes in one piece: RFC 8200, the least MTU without headers
    JOINED = 60000    # bytes that are sent as one message
    ROOM = 104        # bytes of sun_path, on the system that has the fewest

cdef object _absent = object()

cdef str FLAG = "_BaseServer__shutdown_request"

cdef object _family_of = _socket.socket.family.__get__
cdef object _descriptor_of = _socket.socket.fileno


cdef class Receiver:
    """The buffers are made at the first call, and again when a batch does not fit."""

    cdef char *_room
    cdef fs_mmsghdr *_messages
    cdef iovec *_vectors
    cdef sockaddr_storage *_names
    cdef Py_ssize_t _count, _size
    # Who has sent lately: a tuple of an address that is known need not be made again.
    cdef sockaddr_storage _known[KNOWN]
    cdef list _known_addresses
    cdef public Py_ssize_t truncated
    cdef public object failed

    def __cinit__(self):
        self._known_addresses = [None] * KNOWN

    def __dealloc__(self):
        self._release()

    cdef void _release(self) noexcept:
        free(self._room)
        free(self._messages)
        free(self._vectors)
        free(self._names)
        self._room = NULL
        self._messages = NULL
        self._vectors = NULL
        self._names = NULL
        self._count = 0

    cdef int _reserve(self, Py_ssize_t count, Py_ssize_t size) except -1:
        # An odd number of cache lines lies between two buffers, so that their beginnings do not evict each other.
        cdef Py_ssize_t stride = ((size + 2 * LINE - 1) // (2 * LINE)) * (2 * LINE) + LINE
        cdef Py_ssize_t i
        self._release()
        self._room = <char *>malloc(count * stride)
        self._messages = <fs_mmsghdr *>malloc(count * sizeof(fs_mmsghdr))
        self._vectors = <iovec *>malloc(count * sizeof(iovec))
        self._names = <sockaddr_storage *>malloc(count * sizeof(sockaddr_storage))
        if self._room == NULL or self._messages == NULL or self._vectors == NULL or self._names == NULL:
            self._release()
            raise MemoryError()
        memset(self._messages, 0, count * sizeof(fs_mmsghdr))
        for i in range(count):
            self._vectors[i].iov_base = self._room + i * stride
            self._vectors[i].iov_len = size
            self._messages[i].msg_hdr.msg_name = &self._names[i]
            self._messages[i].msg_hdr.msg_namelen = sizeof(sockaddr_storage)
            self._messages[i].msg_hdr.msg_iov = &self._vectors[i]
            self._messages[i].msg_hdr.msg_iovlen = 1
        self._count = count
        self._size = size
        return 0

    cdef object _address(self, sockaddr_storage *name, socklen_t length, int family):
        cdef unsigned int place
        cdef uint32_t host
        if family == AF_INET and length == sizeof(sockaddr_in):
            memcpy(&host, &(<sockaddr_in *>name).sin_addr, sizeof(host))
            place = (<sockaddr_in *>name).sin_port ^ host ^ (host >> 24)
        elif family == AF_INET6 and length == sizeof(sockaddr_in6):
            place = (<sockaddr_in6 *>name).sin6_port
        else:
            (<char *>name)[length] = 0
            return address_of(name, length, family)
        place = (place ^ (place >> 8)) % KNOWN
        known = self._known_addresses[place]
        if known is not None and memcmp(&self._known[place], name, length) == 0:
            return known
        known = address_of(name, length, family)
        memcpy(&self._known[place], name, length)
        self._known_addresses[place] = known
        return known

    def receive(self, listener, target, Py_ssize_t count, Py_ssize_t size):
        cdef int family = _family_of(listener)
        cdef int descriptor, later = 0
        cdef int result = 0
        cdef Py_ssize_t i, length
        cdef fs_mmsghdr *message
        if count > self._count or size != self._size:
            self._reserve(count, size)
        while True:
            descriptor = _descriptor_of(listener)  # asked for again after a signal handler, which may have closed it
            with nogil:
                result = fs_recvmmsg(descriptor, self._messages, <unsigned int>count, &later)
            if result >= 0:
                break
            if result == -EINTR:
                PyErr_CheckSignals()
            elif result == -EAGAIN:
                return []
            else:
                raise error_of(-result)
        if later:
            self.failed = error_of(later)
        received = []
        for i in range(result):
            message = &self._messages[i]
            length = min(<Py_ssize_t>message.msg_len, size)
            data = PyBytes_FromStringAndSize(<char *>self._vectors[i].iov_base, length)
            address = self._address(&self._names[i], message.msg_hdr.msg_namelen, family)
            if message.msg_hdr.msg_flags & MSG_TRUNC:
                self.truncated += 1
            message.msg_hdr.msg_namelen = sizeof(sockaddr_storage)
            received.append(((data, target), address))
        return received

    def close(self):
        self._release()


include "_handlers.pxi"


cdef class Turns:
    """A method that is not overridden is not called, but done here.

    Whether it is overridden is asked at each datagram, on the class and on the instance.
    """

    cdef object _flag
    cdef Handlers _handlers
    cdef PyObject *_handle_request_noblock
    cdef PyObject *_get_request
    cdef PyObject *_verify_request
    cdef PyObject *_process_request
    cdef PyObject *_finish_request
    cdef PyObject *_shutdown_request
    cdef PyObject *_close_request
    cdef PyObject *_service_actions
    cdef dict _own  # holds what the pointers point to
    # The class that was looked at last, and whether it overrides a method.
    cdef PyTypeObject *_class
    cdef unsigned int _version
    cdef bint _class_overrides, _class_has_flag

    def __cinit__(self, flag, own, own_of_handlers):
        self._flag = flag
        self._handlers = Handlers(own_of_handlers)
        self._own = dict(own)
        self._handle_request_noblock = <PyObject *>self._own["_handle_request_noblock"]
        self._get_request = <PyObject *>self._own["get_request"]
        self._verify_request = <PyObject *>self._own["verify_request"]
        self._process_request = <PyObject *>self._own["process_request"]
        self._finish_request = <PyObject *>self._own["finish_request"]
        self._shutdown_request = <PyObject *>self._own["shutdown_request"]
        self._close_request = <PyObject *>self._own["close_request"]
        self._service_actions = <PyObject *>self._own["service_actions"]

    def run(self, server, loop, kept):
        cdef bint plain = self._is_plain(server)
        popleft = kept.popleft
        while True:
            if plain:
                plain = self._plain_turn(server, popleft)
            else:
                self._turn(server, popleft)
            if not kept:
                return
            if not plain:
                if not _is_own(server, "service_actions", self._service_actions):
                    server.service_actions()
                plain = self._is_plain(server)
            if loop.stopping or loop.held or self._flag_is_set(server):
                return

    cdef int _look_at_class(self, object server, PyTypeObject *cls) except -1:
        self._class = NULL
        self._class_overrides = not fs_finds_attributes_plainly(server)
        for name, function in self._own.items():
            if _PyType_Lookup(cls, name) != <PyObject *>function:
                self._class_overrides = True
        self._class_has_flag = (
            fs_finds_attributes_plainly(server) and _PyType_Lookup(cls, FLAG) == <PyObject *>self._flag
        )
        self._version = fs_version_of(cls)
        self._class = cls
        return 0

    cdef bint _is_plain(self, object server) except -1:
        """Return whether neither the class nor the instance overrides a method."""
        cdef PyTypeObject *cls = fs_type_of(server)
        cdef dict attributes
        if cls != self._class or fs_version_of(cls) != self._version or self._version == 0:
            self._look_at_class(server, cls)
        if self._class_overrides:
            return False
        attributes = PyObject_GenericGetDict(server, NULL)
        return not (
            "_handle_request_noblock" in attributes or "get_request" in attributes or "verify_request" in attributes
            or "process_request" in attributes or "finish_request" in attributes or "shutdown_request" in attributes
            or "close_request" in attributes or "service_actions" in attributes
        )

    cdef bint _plain_turn(self, object server, object popleft) except -1:
        """Do what ``_turn`` does where nothing is overridden before the handler runs; return whether it is so after.

        Nothing of Python runs between the end of this and the next handler, so that the answer holds for that too.
        """
        cdef bint plain = True
        try:
            request, client_address = popleft()
        except IndexError:
            return False
        try:
            self._handlers.construct(server.RequestHandlerClass, request, client_address, server)
            plain = self._is_plain(server)
            if not plain:
                self._end(server, request)
        except Exception:
            server.handle_error(request, client_address)
            self._end(server, request)
            return False
        except BaseException:
            self._end(server, request)
            raise
        return plain

    cdef bint _flag_is_set(self, object server) except -1:
        cdef PyTypeObject *cls = fs_type_of(server)
        cdef PyObject *found
        if cls != self._class or fs_version_of(cls) != self._version or self._version == 0:
            self._look_at_class(server, cls)
        if self._class_has_flag:
            found = PyDict_GetItemWithError(PyObject_GenericGetDict(server, NULL), FLAG)
            if found != NULL:
                return <object>found
        return server._BaseServer__shutdown_request

    cdef int _turn(self, object server, object popleft) except -1:
        if not (
            _is_own(server, "_handle_request_noblock", self._handle_request_noblock)
            and _is_own(server, "get_request", self._get_request)
        ):
            server._handle_request_noblock()
            return 0
        try:
            request, client_address = popleft()
        except IndexError:
            return 0  # another thread has taken it
        if not _is_own(server, "verify_request", self._verify_request):
            if not server.verify_request(request, client_address):
                self._end(server, request)
                return 0
        try:
            if not _is_own(server, "process_request", self._process_request):
                server.process_request(request, client_address)
            else:
                if _is_own(server, "finish_request", self._finish_request):
                    self._handlers.construct(server.RequestHandlerClass, request, client_address, server)
                else:
                    server.finish_request(request, client_address)
                self._end(server, request)
        except Exception:
            server.handle_error(request, client_address)
            self._end(server, request)
        except BaseException:
            self._end(server, request)
            raise
        return 0

    cdef int _end(self, object server, object request) except -1:
        if not _is_own(server, "shutdown_request", self._shutdown_request):
            server.shutdown_request(request)
        elif not _is_own(server, "close_request", self._close_request):
            server.close_request(request)
        return 0


cdef inline bint _is_own(object server, str name, PyObject *function) except -1:
    """Return whether the method of that name is this function at this moment."""
    if not fs_finds_attributes_plainly(server) or _PyType_Lookup(fs_type_of(server), name) != function:
        return False
    return name not in <dict>PyObject_GenericGetDict(server, NULL)


cdef class Gatherer:
    """One array of messages for sendmmsg(2); the bytes of the replies are referred to, not copied.

    Replies of one size to one peer, one behind the other, are one message, if the kernel can cut it up again.
    """

    cdef object _listener, _send_now, _report
    cdef list _replies, _addresses  # so that the data live and a failure can be told
    cdef iovec _vectors[MOST]
    cdef sockaddr_storage _names[MOST]
    cdef socklen_t _lengths[MOST]
    cdef Py_ssize_t _first, _count  # those from the first on are not sent yet
    cdef fs_mmsghdr _messages[MOST]
    cdef fs_control _controls[MOST]
    cdef bint _joins
    cdef Py_ssize_t _alone  # those before are sent one by one
    cdef int _family
    cdef unsigned long _thread  # that which gathers, or 0
    cdef bint _flushing
    # Addresses that were translated lately. A receiver gives the same object again for an address that it knows.
    cdef list _known_addresses
    cdef sockaddr_storage _known[KNOWN]
    cdef socklen_t _known_lengths[KNOWN]

    def __cinit__(self, listener, report):
        self._listener = listener
        self._send_now = listener.sendto
        self._report = report
        self._replies = [None] * MOST
        self._addresses = [None] * MOST
        self._known_addresses = [_absent] * KNOWN
        self._family = _family_of(listener)
        self._joins = self._family != AF_UNIX and fs_can_segment(_descriptor_of(listener))
        memset(self._messages, 0, sizeof(self._messages))

    def begin(self):
        with cython.critical_section(self):  # of two loops of a server one gathers
            if not fs_number(&self._thread):
                fs_set_number(&self._thread, PyThread_get_thread_ident())

    def end(self):
        if not self._is_own():
            return
        try:
            self.flush()
        except BaseException:
            self.flush()  # a handler of signals or errors has raised; the other replies go out all the same
            raise
        finally:
            fs_set_number(&self._thread, 0)

    def forget(self):
        fs_set_number(&self._thread, 0)
        self._flushing = False
        self._first = self._count = self._alone = 0
        self._replies = [None] * MOST
        self._addresses = [None] * MOST

    def sendto(self, data, flags, address=_absent, /):
        cdef size_t place = <size_t><PyObject *>flags
        if not self._is_own() or self._flushing:
            return self._pass_on(data, flags, address)
        if address is not _absent or (type(data) is not bytes and type(data) is not bytearray):
            self.flush()
            return self._pass_on(data, flags, address)
        if self._count == MOST:
            self.flush()
        place = ((place >> 4) ^ (place >> 10)) % KNOWN
        if self._known_addresses[place] is not flags and not self._translate(flags, place):
            self.flush()
            return self._pass_on(data, flags, address)
        if len(data) > LONGEST:
            self.flush()
            return self._pass_on(data, flags, address)
        PySys_Audit("socket.sendto", "OO", <PyObject *>self._listener, <PyObject *>flags)
        kept = data if type(data) is bytes else bytes(data)
        memcpy(&self._names[self._count], &self._known[place], self._known_lengths[place])
        self._lengths[self._count] = self._known_lengths[place]
        self._vectors[self._count].iov_base = PyBytes_AS_STRING(kept)
        self._vectors[self._count].iov_len = PyBytes_GET_SIZE(kept)
        self._replies[self._count] = kept
        self._addresses[self._count] = flags
        self._count += 1
        return PyBytes_GET_SIZE(kept)

    cdef inline bint _is_own(self) noexcept:
        """Return whether the calling thread gathers. Nothing else may be looked at if not."""
        return fs_number(&self._thread) == PyThread_get_thread_ident()

    cdef object _pass_on(self, object data, object flags, object address):
        if address is _absent:
            return self._send_now(data, flags)
        return self._send_now(data, flags, address)

    cdef bint _translate(self, object address, size_t place) except -1:
        """Remember an address at a place; return whether it is one, and not left to the socket to judge."""
        self._known_addresses[place] = _absent
        self._known_lengths[place] = self._write(address, &self._known[place])
        if self._known_lengths[place] == 0:
            return False
        self._known_addresses[place] = address
        return True

    cdef socklen_t _write(self, object address, sockaddr_storage *name) except? 0:
        """Write an address into ``name`` and return its length; 0 for what is left to the socket to judge."""
        cdef sockaddr_in *inet = <sockaddr_in *>name
        cdef sockaddr_in6 *inet6 = <sockaddr_in6 *>name
        cdef sockaddr_un *local = <sockaddr_un *>name
        cdef Py_ssize_t offset = <char *>local.sun_path - <char *>local
        memset(name, 0, sizeof(sockaddr_storage))
        if self._family == AF_UNIX:
            if type(address) is str:
                address = _os.fsencode(address)
                if not address or b"\0" in address or len(address) >= ROOM:
                    return 0
                length = len(address) + 1
            elif type(address) is bytes and address.startswith(b"\0") and len(address) <= ROOM:
                length = len(address)
            else:
                return 0
            local.sun_family = AF_UNIX
            memcpy(local.sun_path, PyBytes_AS_STRING(address), PyBytes_GET_SIZE(address))
            return <socklen_t>(offset + length)
        if type(address) is not tuple or len(<tuple>address) != (2 if self._family == AF_INET else 4):
            return 0
        if type(address[0]) is not str or not _is_number(address[1], 0xFFFF):
            return 0
        if self._family == AF_INET:
            inet.sin_family = AF_INET
            inet.sin_port = htons(address[1])
            return sizeof(sockaddr_in) if _is_written(AF_INET, address[0], &inet.sin_addr) else 0
        if not _is_number(address[2], 0xFFFFF) or not _is_number(address[3], 0xFFFFFFFF):
            return 0
        inet6.sin6_family = AF_INET6
        inet6.sin6_port = htons(address[1])
        inet6.sin6_flowinfo = htonl(address[2])
        inet6.sin6_scope_id = address[3]
        return sizeof(sockaddr_in6) if _is_written(AF_INET6, address[0], &inet6.sin6_addr) else 0

    cpdef flush(self):
        cdef int descriptor
        cdef int result = 0
        cdef bint waited = False
        cdef Py_ssize_t i, count
        if not self._is_own() or self._flushing or self._first == self._count:
            return
        self._flushing = True  # what a handler of signals or errors sends meanwhile goes out at once
        replies, addresses = self._replies, self._addresses
        try:
            while self._first < self._count:
                descriptor = _descriptor_of(self._listener)
                count = self._join()
                with nogil:
                    result = fs_sendmmsg(descriptor, self._messages, <unsigned int>count)
                if result >= 0:
                    for i in range(result):
                        self._first += self._messages[i].msg_hdr.msg_iovlen
                    waited = False
                elif result == -EINTR:
                    PyErr_CheckSignals()
                elif result == -EAGAIN:
                    _wait_writable(descriptor, waited)
                    waited = True
                elif self._messages[0].msg_hdr.msg_iovlen > 1:
                    # Each is to have its own error, and some routes cannot do it.
                    self._alone = self._first + self._messages[0].msg_hdr.msg_iovlen
                else:
                    i = self._first
                    self._first += 1
                    self._report(error_of(-result), replies[i], addresses[i])
            self._first = self._count = self._alone = 0
            for i in range(MOST):
                if replies[i] is None:
                    break
                replies[i] = addresses[i] = None
        finally:
            self._flushing = False

    cdef Py_ssize_t _join(self) noexcept:
        """Make messages of the replies that are not sent yet; return how many."""
        cdef Py_ssize_t first = self._first, count = 0, after
        cdef fs_mmsghdr *message
        while first < self._count:
            after = self._end_of_run(first)
            message = &self._messages[count]
            message.msg_hdr.msg_name = &self._names[first]
            message.msg_hdr.msg_namelen = self._lengths[first]
            message.msg_hdr.msg_iov = &self._vectors[first]
            message.msg_hdr.msg_iovlen = after - first
            if after - first > 1:
                fs_segment(message, &self._controls[count], <uint16_t>self._vectors[first].iov_len)
            else:
                message.msg_hdr.msg_control = NULL
                message.msg_hdr.msg_controllen = 0
            first = after
            count += 1
        return count

    cdef Py_ssize_t _end_of_run(self, Py_ssize_t first) noexcept:
        """Return the end of the replies that can be one message: all of one size, but for a shorter one at the end."""
        cdef size_t size = self._vectors[first].iov_len, present = size, total = size
        cdef Py_ssize_t after = first + 1
        if not self._joins or first < self._alone or size > SEGMENT:
            return after
        while after < self._count and present == size and 0 < self._vectors[after].iov_len <= size:
            present = self._vectors[after].iov_len
            total += present
            if (
                total > JOINED or self._lengths[after] != self._lengths[first]
                or memcmp(&self._names[after], &self._names[first], self._lengths[first]) != 0
            ):
                break
            after += 1
        return after


cdef bint _is_number(object value, unsigned long highest):
    return type(value) is int and 0 <= value <= highest


cdef bint _is_written(int family, str host, void *binary) except -1:
    """Translate a numeric address; return whether it is one."""
    cdef Py_ssize_t size
    cdef const char *text
    if not host.isascii():
        return False
    text = PyUnicode_AsUTF8AndSize(host, &size)
    return <size_t>size == strlen(text) and inet_pton(family, text, binary) == 1


cdef int _wait_writable(int descriptor, bint in_vain) except -1:
    """Wait until a socket takes more; a millisecond, if it said so before and took nothing.

    A Unix socket counts as writable while the queue of the peer is full.
    """
    cdef pollfd waited
    cdef int result
    waited.fd = descriptor
    waited.events = POLLOUT
    waited.revents = 0
    with nogil:
        result = fs_poll(&waited, 0, 1) if in_vain else fs_poll(&waited, 1, -1)
    if result == -EINTR:
        PyErr_CheckSignals()
    elif result < 0:
        raise error_of(-result)
    return 0
