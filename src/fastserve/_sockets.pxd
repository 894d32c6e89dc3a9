# What a socket object knows, and how one is made, for all extensions.

from cpython.object cimport PyObject

cdef extern from "_sockets.h" nogil:
    int fs_descriptor_of(PyObject *)
    double fs_timeout_of(PyObject *)
    int fs_family_of(PyObject *)
    int fs_type_of_socket(PyObject *)
    int fs_protocol_of(PyObject *)

cdef bint known  # whether the fields of a socket are where they are looked for

cdef int ask_descriptor(object connection) except -2
cdef double ask_timeout(object connection) except? -2.0
cdef int ask_family(object connection) except -1
cdef int ask_type(object connection) except -1
cdef int ask_protocol(object connection) except -1
cdef object new_socket(object cls)
cdef int initialize(object made, int family, int type, int proto, int descriptor) except -1


cdef inline int descriptor_of(object connection) except -2:
    """Return the descriptor; -1: it is closed."""
    return fs_descriptor_of(<PyObject *>connection) if known else ask_descriptor(connection)


cdef inline double timeout_of(object connection) except? -2.0:
    """Return the timeout in seconds; negative: none."""
    return fs_timeout_of(<PyObject *>connection) if known else ask_timeout(connection)


cdef inline int family_of(object connection) except -1:
    return fs_family_of(<PyObject *>connection) if known else ask_family(connection)


cdef inline int type_of(object connection) except -1:
    return fs_type_of_socket(<PyObject *>connection) if known else ask_type(connection)


cdef inline int protocol_of(object connection) except -1:
    return fs_protocol_of(<PyObject *>connection) if known else ask_protocol(connection)
