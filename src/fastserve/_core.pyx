# cython: language_level=3, embedsignature=True, freethreading_compatible=True
"""The C twin of the core: epoll, poll, select, wake-up and accept without the GIL.

Its contract and its types are those of ``_core_py``; the docstrings here say only what is particular to C.
"""

import socket as _socket_module

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, EBADF, EINTR, ENOENT, EPERM
from libc.math cimport ceil
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memset

from fastserve._addresses cimport address_of
from fastserve._clock cimport MAX_WAIT, now
from fastserve._errors cimport error_of
from fastserve._sockets cimport descriptor_of, family_of, protocol_of, timeout_of, type_of
from fastserve._syscalls cimport (
    AF_INET, AF_INET6, AF_UNIX, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLLIN, FD_CLR, FD_ISSET, FD_SET, FD_SETSIZE,
    FD_ZERO, FS_HAVE_EPOLL, FS_HAVE_EVENTFD, POLLIN, close_descriptor, epoll_event, fd_set, fs_accept,
    fs_epoll_create, fs_epoll_ctl, fs_epoll_wait, fs_eventfd, fs_is_closed, fs_poll, fs_read, fs_select,
    fs_socketpair, fs_write, nfds_t, pollfd, sockaddr, sockaddr_storage, socklen_t,
)

HAVE_EPOLL = bool(FS_HAVE_EPOLL)

cdef enum:
    MAX_EVENTS = 64  # events taken from the kernel at a time

# The class whose accept() may be bypassed; a library that replaces socket.socket (gevent, eventlet) before this
# module is imported leaves none. Family, type and protocol are read at the C level, as ints: the properties of
# socket.socket make enum members of them at ten times the cost.
cdef object _plain_socket = _socket_module.socket if _socket_module.socket.__module__ == "socket" else None
cdef object _plain_accept = None if _plain_socket is None else _plain_socket.accept


cdef int _checked(int fd) except -1:
    if fd < 0:
        raise ValueError(f"Invalid file descriptor: {fd}")
    return fd


cdef double _until(object timeout) except -2.0:
    """Return the time at which ``timeout`` seconds from now have passed, or -1.0 if it is endless."""
    if timeout is None:
        return -1.0
    return now() + min(max(<double>timeout, 0.0), MAX_WAIT)


cdef int _left(double until) noexcept nogil:
    """Return the milliseconds left until then, rounded up as :mod:`selectors` does, or -1 for endless."""
    if until < 0.0:
        return -1
    return <int>ceil(max(until - now(), 0.0) * 1000.0)


cdef int _interrupted(int result) except -1:
    """Deal with the failure of a wait: run signal handlers after EINTR, raise anything else."""
    if result != -EINTR:
        raise error_of(-result)
    PyErr_CheckSignals()  # declared to raise what a handler raises
    return 0


cdef class EpollPoller:
    """Wait with epoll_wait(2), level-triggered, without the GIL."""

    def __cinit__(self):
        self._epoll = -1
        cdef int fd = fs_epoll_create()
        if fd < 0:
            raise error_of(-fd)
        self._epoll = fd

    def __dealloc__(self):
        self.close()

    cdef int _opened(self) except -1:
        if self._epoll < 0:
            raise ValueError("I/O operation on closed epoll object")
        return self._epoll

    def register(self, int fd):
        cdef int result = fs_epoll_ctl(self._opened(), EPOLL_CTL_ADD, _checked(fd), EPOLLIN)
        if result < 0:
            raise error_of(-result)

    def unregister(self, int fd):
        cdef int result = fs_epoll_ctl(self._epoll, EPOLL_CTL_DEL, fd, 0)
        # A descriptor that was closed meanwhile is one that the kernel has forgotten; EPERM is said of one that epoll
        # cannot watch, such as a file.
        if result < 0 and result != -ENOENT and result != -EBADF and result != -EPERM:
            raise error_of(-result)

    def wait(self, timeout=None):
        cdef epoll_event events[MAX_EVENTS]
        cdef double until = _until(timeout)
        cdef int result
        self._opened()
        while True:
            with nogil:
                result = fs_epoll_wait(self._epoll, events, MAX_EVENTS, _left(until))
            if result >= 0:
                return [events[i].data.fd for i in range(result)]
            _interrupted(result)

    cdef int wait_for(self, int fd) except -1:
        """Wait endlessly; return whether this descriptor is ready, and no other one."""
        cdef epoll_event events[2]
        cdef int result
        self._opened()
        while True:
            with nogil:
                result = fs_epoll_wait(self._epoll, events, 2, -1)
            if result >= 0:
                return result == 1 and events[0].data.fd == fd
            _interrupted(result)

    cpdef close(self):
        if self._epoll >= 0:
            close_descriptor(self._epoll)
            self._epoll = -1


cdef class PollPoller:
    """Wait with poll(2) without the GIL."""

    cdef pollfd *_fds
    cdef int _count, _room

    def __dealloc__(self):
        free(self._fds)

    cdef int _find(self, int fd) noexcept:
        cdef int i
        for i in range(self._count):
            if self._fds[i].fd == fd:
                return i
        return -1

    def register(self, int fd):
        cdef pollfd *grown
        _checked(fd)
        if self._find(fd) >= 0:
            return
        if self._count == self._room:
            grown = <pollfd *>realloc(self._fds, (self._room + 8) * 2 * sizeof(pollfd))
            if grown == NULL:
                raise MemoryError()
            self._fds = grown
            self._room = (self._room + 8) * 2
        self._fds[self._count].fd = fd
        self._fds[self._count].events = POLLIN
        self._fds[self._count].revents = 0
        self._count += 1

    def unregister(self, int fd):
        cdef int i = self._find(fd)
        if i >= 0:
            self._count -= 1
            self._fds[i] = self._fds[self._count]

    def wait(self, timeout=None):
        cdef double until = _until(timeout)
        cdef int result
        while True:
            with nogil:
                result = fs_poll(self._fds, <nfds_t>self._count, _left(until))
            if result >= 0:
                return [self._fds[i].fd for i in range(self._count) if self._fds[i].revents]
            _interrupted(result)

    def close(self):
        pass  # poll(2) holds no descriptor


cdef class SelectPoller:
    """Wait with select(2) without the GIL."""

    cdef fd_set _wanted
    cdef int _highest

    def __cinit__(self):
        FD_ZERO(&self._wanted)
        self._highest = -1

    def register(self, int fd):
        _checked(fd)
        if fd >= FD_SETSIZE:  # beyond the end of the fd_set: it would overwrite memory
            raise ValueError("filedescriptor out of range in select()")
        FD_SET(fd, &self._wanted)
        self._highest = max(self._highest, fd)

    def unregister(self, int fd):
        if 0 <= fd < FD_SETSIZE:
            FD_CLR(fd, &self._wanted)

    def wait(self, timeout=None):
        cdef fd_set ready
        cdef double until = _until(timeout)
        cdef int result
        while True:
            with nogil:
                result = fs_select(self._highest, &self._wanted, &ready, _left(until))
            if result >= 0:
                return [fd for fd in range(self._highest + 1) if FD_ISSET(fd, &ready)]
            if result == -EBADF:
                return [
                    fd for fd in range(self._highest + 1)
                    if FD_ISSET(fd, &self._wanted) and fs_is_closed(fd)
                ]
            _interrupted(result)

    def close(self):
        pass  # select(2) holds no descriptor


cdef class Wakeup:
    """An eventfd(2), or a socket pair. ``set`` and ``close`` exclude each other, by the GIL or without it."""

    cdef int _reader, _writer  # the same descriptor if it is an eventfd

    def __cinit__(self, bint for_signals=False):
        cdef int pair[2]
        cdef int result
        self._reader = self._writer = -1
        if FS_HAVE_EVENTFD and not for_signals:
            result = pair[0] = pair[1] = fs_eventfd()
        else:
            result = fs_socketpair(pair)
        if result < 0:
            raise error_of(-result)
        self._reader = pair[0]
        self._writer = pair[1]

    def __dealloc__(self):
        self.close()

    def fileno(self):
        return self._reader

    def signal_fileno(self):
        return -1 if self._reader == self._writer else self._writer

    def set(self):
        cdef uint64_t one = 1
        cdef int result
        while True:
            with cython.critical_section(self):
                result = 0 if self._writer < 0 else fs_write(self._writer, &one, sizeof(one))
            if result >= 0 or result == -EAGAIN:
                return  # full means readable already
            _interrupted(result)

    def clear(self):
        cdef char scratch[512]
        cdef int result
        while self._reader >= 0:
            result = fs_read(self._reader, scratch, sizeof(scratch))
            if result == -EAGAIN:
                return
            if result < 0:
                _interrupted(result)
            elif result < <int>sizeof(scratch):
                return  # an eventfd is emptied by one read; so is a stream by a short one

    cpdef close(self):
        cdef int reader, writer
        with cython.critical_section(self):
            reader = self._reader
            writer = self._writer
            self._reader = self._writer = -1
        if reader >= 0:
            close_descriptor(reader)
        if writer >= 0 and writer != reader:
            close_descriptor(writer)


def wait_readable(int fd, timeout):
    cdef pollfd waited
    cdef double until = _until(timeout)
    cdef int result
    waited.fd = _checked(fd)
    waited.events = POLLIN
    while True:
        waited.revents = 0
        with nogil:
            result = fs_poll(&waited, 1, _left(until))
        if result >= 0:
            return result > 0
        _interrupted(result)


def accept(listener, make=_plain_socket):
    """Accept with accept4(2) without the GIL, if ``listener`` is a plain socket of a family known here."""
    return accept_from(listener, make)


cdef object accept_from(object listener, object make):
    cdef sockaddr_storage storage
    cdef socklen_t length = sizeof(storage)
    cdef int descriptor, family
    cdef int result = -1
    if (
        type(listener) is not _plain_socket
        or _socket_module.socket is not _plain_socket
        or _plain_socket.accept is not _plain_accept
    ):
        return listener.accept()  # somebody's own, or somebody's own would be made
    family = family_of(listener)
    if family != AF_INET and family != AF_INET6 and family != AF_UNIX:
        return listener.accept()
    memset(&storage, 0, sizeof(storage))
    while True:
        descriptor = descriptor_of(listener)  # asked for again after a signal handler, which may have closed it
        with nogil:
            result = fs_accept(descriptor, <sockaddr *>&storage, &length)
        if result >= 0:
            break
        if result == -EINTR:
            PyErr_CheckSignals()
            length = sizeof(storage)
        elif result == -EAGAIN and timeout_of(listener) > 0.0:
            return listener.accept()  # it has a timeout, and waits for what is left of it
        else:
            raise error_of(-result)
    try:
        address = address_of(&storage, length, family)
        request = make(family, type_of(listener), protocol_of(listener), result)
    except BaseException:
        close_descriptor(result)
        raise
    # CPython issue 7995: some systems let the new descriptor inherit O_NONBLOCK from a listener with a timeout.
    if timeout_of(listener) > 0.0 and _socket_module.getdefaulttimeout() is None:
        request.setblocking(True)
    return request, address
