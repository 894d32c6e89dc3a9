# cython: language_level=3, freethreading_compatible=True
"""What a socket object knows, and how one is made.

``socket.socket`` asks the kernel for the name of each socket that it is given, to see whether it is one; and each
of its methods costs some thirty times as much as a look into its fields. Both are left out where a look at a socket
at import finds the fields where they are expected.
"""

import _socket

cdef extern from "_sockets.h":
    bint fs_sockets_are_known(object, int, object)
    object fs_new_socket(object, object, object)
    bint fs_lacks_only_fields(object, object)
    void fs_set_socket(object, int, int, int, int)

cdef extern from "Python.h":
    int PySys_Audit(const char *event, const char *format, ...) except -1

# The methods at the C level; nothing but a module that replaces socket.socket stands between them and the kernel.
cdef object _base = _socket.socket
cdef object _initialize = _base.__init__
cdef object _descriptor = _base.fileno
cdef object _timeout = _base.gettimeout
cdef object _family = _base.family.__get__
cdef object _type = _base.type.__get__
cdef object _protocol = _base.proto.__get__
cdef object _getdefaulttimeout = _socket.getdefaulttimeout
cdef bint _may_set = False  # whether a new socket lacks nothing but what is set here
cdef tuple _none = ()


cdef _look_at_sockets():
    global known, _may_set
    one, other = (_base(_socket.AF_INET, _socket.SOCK_STREAM, _socket.IPPROTO_TCP) for _ in range(2))
    try:
        one.settimeout(None)
        other.settimeout(12.5)
        known = fs_sockets_are_known(one, one.fileno(), other)
        _may_set = known and fs_lacks_only_fields(new_socket(_base), other)
    finally:
        one.close()
        other.close()


_look_at_sockets()


cdef int ask_descriptor(object connection) except -2:
    return _descriptor(connection)


cdef double ask_timeout(object connection) except? -2.0:
    timeout = _timeout(connection)
    return -1.0 if timeout is None else timeout


cdef int ask_family(object connection) except -1:
    return _family(connection)


cdef int ask_type(object connection) except -1:
    return _type(connection)


cdef int ask_protocol(object connection) except -1:
    return _protocol(connection)


cdef object new_socket(object cls):
    """Return a new object of ``cls``, which is derived from ``socket.socket``; it is not initialized."""
    return fs_new_socket(_base, cls, _none)


cdef int initialize(object made, int family, int type, int proto, int descriptor) except -1:
    """Do what ``socket.socket.__init__`` does with a descriptor that certainly is such a socket."""
    if _may_set and _getdefaulttimeout() is None:
        PySys_Audit("socket.__new__", "Oiii", <PyObject *>made, family, type, proto)
        fs_set_socket(made, descriptor, family, type, proto)
    else:
        _initialize(made, family, type, proto, descriptor)
    made._io_refs = 0
    made._closed = False
    return 0
