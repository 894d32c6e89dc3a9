# What makes the handlers of datagrams, for the extension that takes these.

from cpython.object cimport PyObject, PyTypeObject


cdef class Handlers:
    cdef object _init, _no_setup, _setup, _handle, _handle_with_files
    # The class that was looked at last.
    cdef PyTypeObject *_class
    cdef unsigned int _version
    cdef PyObject *_class_init  # of the class; NULL where it is to be called itself
    cdef bint _needs_no_setup, _needs_files

    cdef int construct(self, object cls, object request, object client_address, object server) except -1
    cdef int _look_at_class(self, PyTypeObject *cls) except -1
