# What other extensions use of the core.

cdef class EpollPoller:
    cdef int _epoll

    cdef int _opened(self) except -1
    cdef int wait_for(self, int fd) except -1
    cpdef close(self)


cdef object accept_from(object listener, object make)
