# What the connections of a hub tell the writer, which is the same for all connections.

ctypedef int (*SendAll)(object connection, const char *data, Py_ssize_t size) except -1

cdef object green_class  # the connections of a hub, and their method; None: there are none
cdef object green_sendall
cdef SendAll green_send  # does what that method does, and returns whether it has
