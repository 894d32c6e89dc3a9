# How the turns over datagrams make a handler and have it handle a request: a part of _datagrams.pyx.

from io import BytesIO as _BytesIO

from cpython.object cimport PyObject, PyTypeObject

from fastserve._hooks cimport (
    PyFunction_Check, _PyType_Lookup, fs_has_plain_attributes, fs_makes_plain_objects, fs_new_object, fs_no_arguments,
    fs_version_of, refuse_result,
)

cdef extern from *:
    """
    #define fs_new_file(cls) ((cls)->tp_new((cls), fs_no_arguments, NULL))
    #define fs_begin_file(cls, file, arguments) ((cls)->tp_init((file), (arguments), NULL))
    """
    object fs_new_file(PyTypeObject *)
    int fs_begin_file(PyTypeObject *, object, tuple) except -1

cdef tuple _no_arguments = ()
fs_no_arguments = <PyObject *>_no_arguments


cdef PyTypeObject *_file = <PyTypeObject *>_BytesIO


cdef class Handlers:
    """Makes handlers. A ``setup`` that is not overridden is not called, but done here.

    Whether it is overridden is asked for each handler.

    :param own: see ``OWN_OF_HANDLERS``.
    """

    cdef object _init, _no_setup, _setup, _handle, _handle_with_files
    # The class that was looked at last.
    cdef PyTypeObject *_class
    cdef unsigned int _version
    cdef PyObject *_class_init  # of the class; NULL where it is to be called itself
    cdef bint _needs_no_setup, _needs_files

    def __cinit__(self, own):
        self._init, self._no_setup, self._setup, self._handle, self._handle_with_files = own

    cdef int construct(self, object cls, object request, object client_address, object server) except -1:
        """Call a handler class as ``type.__call__`` does, without packing the arguments into a tuple twice."""
        cdef PyTypeObject *looked_at = <PyTypeObject *>cls
        if looked_at != self._class or fs_version_of(looked_at) != self._version or self._version == 0:
            if not fs_makes_plain_objects(cls):
                cls(request, client_address, server)
                return 0
            self._look_at_class(looked_at)
        if self._needs_files and type(request) is tuple and len(<tuple>request) == 2:
            packet, socket = <tuple>request
            self._handle_with_files(
                fs_new_object(cls), request, client_address, server, packet, socket, _reader(packet), _writer()
            )
            return 0
        if self._needs_no_setup:
            self._handle(fs_new_object(cls), request, client_address, server)
            return 0
        if self._class_init == NULL:
            cls(request, client_address, server)
            return 0
        init = <object>self._class_init
        result = init(fs_new_object(cls), request, client_address, server)
        if result is not None:
            refuse_result(result)
        return 0

    cdef int _look_at_class(self, PyTypeObject *cls) except -1:
        cdef PyObject *init = _PyType_Lookup(cls, "__init__")
        cdef PyObject *setup = _PyType_Lookup(cls, "setup")
        cdef bint is_plain = init == <PyObject *>self._init and fs_has_plain_attributes(cls)
        self._class = NULL
        for name in ("request", "client_address", "server", "packet", "socket", "rfile", "wfile"):
            if _PyType_Lookup(cls, name) != NULL:
                is_plain = False  # it may be a property, and put a method into the instance
        self._class_init = init if init != NULL and PyFunction_Check(init) else NULL
        self._needs_no_setup = is_plain and setup == <PyObject *>self._no_setup
        self._needs_files = is_plain and setup == <PyObject *>self._setup
        self._version = fs_version_of(cls)
        self._class = cls
        return 0


cdef inline object _reader(object data):
    """Return ``BytesIO(data)``."""
    file = fs_new_file(_file)
    fs_begin_file(_file, file, (data,))
    return file


cdef inline object _writer():
    """Return ``BytesIO()``."""
    return fs_new_file(_file)
