# The errors of system calls, and exceptions that are set.


cdef inline object error_of(int code):
    """Return the ``OSError`` of an errno, of the subclass that its constructor picks for the code."""
    import os  # for the error alone: a file of declarations has no names of Python of its own

    return OSError(code, os.strerror(code))


cdef inline int raised() except -1:
    """Raise the exception that is set."""
    return -1
