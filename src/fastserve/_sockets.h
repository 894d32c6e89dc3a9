/* What is read from, and written into, the fields of a socket. */
#ifndef FASTSERVE_SOCKETS_H
#define FASTSERVE_SOCKETS_H

#include <Python.h>
#include <stdint.h>
#include <netinet/in.h>
#include <sys/socket.h>

/* The beginning of a socket of the module _socket, in every CPython from 3.11 to 3.15. Its methods would tell the same
 * at some thirty times the cost; whether it still is so is asked at import, and they are asked if not. */
typedef struct {
    PyObject_HEAD
    int descriptor;
    int family, type, protocol;
    PyObject *(*error_handler)(void);
    int64_t timeout;  /* nanoseconds; negative: none */
} fs_socket;

/* Another thread may close the socket meanwhile. */
static inline int fs_descriptor_of(PyObject *socket)
{
    return __atomic_load_n(&((fs_socket *)socket)->descriptor, __ATOMIC_RELAXED);
}

static inline int fs_family_of(PyObject *socket) { return ((fs_socket *)socket)->family; }
static inline int fs_type_of_socket(PyObject *socket) { return ((fs_socket *)socket)->type; }
static inline int fs_protocol_of(PyObject *socket) { return ((fs_socket *)socket)->protocol; }

/* Seconds; negative: none. */
static inline double fs_timeout_of(PyObject *socket) { return (double)((fs_socket *)socket)->timeout * 1e-9; }

/* Whether these two, of TCP and IPv4, the second one with a timeout of 12.5 seconds, are as described above. */
static inline int fs_sockets_are_known(PyObject *one, int descriptor, PyObject *other)
{
    return Py_TYPE(one)->tp_basicsize >= (Py_ssize_t)sizeof(fs_socket)
        && fs_family_of(one) == AF_INET && fs_type_of_socket(one) == SOCK_STREAM && fs_protocol_of(one) == IPPROTO_TCP
        && fs_descriptor_of(one) == descriptor && fs_timeout_of(one) < 0.0
        && fs_timeout_of(other) == 12.5;
}

/* Make a socket object of a class that is derived from _socket.socket: without a descriptor, and not initialized. */
static inline PyObject *fs_new_socket(PyObject *base, PyObject *cls, PyObject *no_arguments)
{
    return ((PyTypeObject *)base)->tp_new((PyTypeObject *)cls, no_arguments, NULL);
}

/* Whether such an object lacks nothing but what fs_set_socket() sets. */
static inline int fs_lacks_only_fields(PyObject *made, PyObject *other)
{
    return fs_descriptor_of(made) == -1 && fs_timeout_of(made) < 0.0
        && ((fs_socket *)made)->error_handler == ((fs_socket *)other)->error_handler;
}

static inline void fs_set_socket(PyObject *made, int descriptor, int family, int type, int protocol)
{
    fs_socket *socket = (fs_socket *)made;
    socket->descriptor = descriptor;
    socket->family = family;
    socket->type = type;
    socket->protocol = protocol;
}

#endif
