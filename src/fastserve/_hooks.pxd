# Whether a method is overridden, and how a handler class is called: for extensions that do what methods would do.

from cpython.object cimport PyObject, PyTypeObject

cdef extern from "Python.h":
    PyTypeObject PyType_Type, PyBaseObject_Type
    PyObject *_PyType_Lookup(PyTypeObject *, object)
    object PyObject_GenericGetDict(object, void *)
    PyObject *PyObject_GenericGetAttr(PyObject *, PyObject *)
    int PyFunction_Check(PyObject *)

cdef extern from *:
    """
    /* What these ask for is done through references that are borrowed from classes and dictionaries. Without the GIL
       another thread may take away what was looked at: there nothing is plain, and every method is called. */
    #ifdef Py_GIL_DISABLED
    #define FS_LOOKS_INTO_CLASSES 0
    #else
    #define FS_LOOKS_INTO_CLASSES 1
    #endif
    #define fs_new_object(cls) (PyBaseObject_Type.tp_new((PyTypeObject *)(cls), fs_no_arguments, NULL))
    #define fs_makes_plain_objects(cls) (FS_LOOKS_INTO_CLASSES && Py_TYPE(cls) == &PyType_Type \
        && ((PyTypeObject *)(cls))->tp_new == PyBaseObject_Type.tp_new)
    #define fs_finds_attributes_plainly(object) \
        (FS_LOOKS_INTO_CLASSES && Py_TYPE(object)->tp_getattro == PyObject_GenericGetAttr)
    #define fs_has_plain_attributes(cls) (FS_LOOKS_INTO_CLASSES \
        && (cls)->tp_getattro == PyObject_GenericGetAttr && (cls)->tp_setattro == PyObject_GenericSetAttr)
    /* Another number after each change of a class or its bases, 0 until the next look-up; what CPython itself
       compares before it takes a method that it has found before. */
    #define fs_version_of(cls) ((cls)->tp_version_tag)
    static PyObject *fs_no_arguments;
    static inline PyObject *fs_begin_handler(PyObject *init, PyObject *handler, PyObject *request, PyObject *address,
                                             PyObject *server)
    {
        PyObject *arguments[] = {handler, request, address, server};
        return PyObject_Vectorcall(init, arguments, 4, NULL);
    }
    static inline PyTypeObject *fs_type_of(PyObject *object) { return Py_TYPE(object); }
    """
    object fs_new_object(object)
    bint fs_makes_plain_objects(object)
    bint fs_finds_attributes_plainly(object)
    bint fs_has_plain_attributes(PyTypeObject *)
    unsigned int fs_version_of(PyTypeObject *)
    PyTypeObject *fs_type_of(object)
    object fs_begin_handler(PyObject *, object, object, object, object)
    PyObject *fs_no_arguments  # an empty tuple, which the module sets


cdef inline int construct(object cls, object request, object client_address, object server) except -1:
    """Call a handler class as ``type.__call__`` does, without packing the arguments into a tuple twice."""
    cdef PyObject *init = NULL
    if fs_makes_plain_objects(cls):
        init = _PyType_Lookup(<PyTypeObject *>cls, "__init__")
    if init == NULL or not PyFunction_Check(init):
        cls(request, client_address, server)
        return 0
    handler = fs_new_object(cls)
    # Looked up again, as nobody holds the function: the garbage collector may run some code where an object is made.
    init = _PyType_Lookup(<PyTypeObject *>cls, "__init__")
    if init == NULL or not PyFunction_Check(init):
        result = begin_otherwise(handler, request, client_address, server)
    else:
        # On the C stack, of which every request that waits keeps a copy, this takes less than a call of Cython's.
        result = fs_begin_handler(init, handler, request, client_address, server)
    if result is not None:
        refuse_result(result)
    return 0


cdef inline object begin_otherwise(object handler, object request, object client_address, object server):
    return type(handler).__init__(handler, request, client_address, server)


cdef inline int refuse_result(object result) except -1:
    raise TypeError(f"__init__() should return None, not '{type(result).__name__}'")
