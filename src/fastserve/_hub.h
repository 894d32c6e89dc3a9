/* What the greenlet hub needs and Cython cannot say. */
#ifndef FASTSERVE_HUB_H
#define FASTSERVE_HUB_H

#include <Python.h>
#include <errno.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <fcntl.h>
#include <unistd.h>

/* The hub that runs in this thread, borrowed; NULL where none does. */
static __thread void *fs_running_hub = NULL;

static inline void *fs_hub_get(void) { return fs_running_hub; }
static inline void fs_hub_set(void *hub) { fs_running_hub = hub; }

/* Watch everything that can happen to a connection, each change once: epoll(7), edge-triggered. */
#define FS_EVERYTHING (EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLPRI | EPOLLET)

static inline int fs_watch(int epfd, int operation, int fd, uint32_t events, uint64_t tag)
{
    struct epoll_event event = {0};
    event.events = events;
    event.data.u64 = tag;
    return epoll_ctl(epfd, operation, fd, &event) < 0 ? -errno : 0;
}

static inline uint64_t fs_tag(const struct epoll_event *event) { return event->data.u64; }

/* The beginning of a socket of the module _socket, in every CPython from 3.11 to 3.15. Its methods would tell the same
 * at some thirty times the cost; whether it still is so is asked at import, and they are asked if not. */
typedef struct {
    PyObject_HEAD
    int descriptor;
    int family, type, protocol;
    PyObject *(*error_handler)(void);
    int64_t timeout;  /* nanoseconds; negative: none */
} fs_socket;

static int fs_knows_sockets = 0;

static inline int fs_descriptor_of(PyObject *socket)
{
    return ((fs_socket *)socket)->descriptor;
}

/* Whether it is a stream of TCP. */
static inline int fs_is_tcp(PyObject *socket)
{
    const fs_socket *found = (fs_socket *)socket;
    return (found->family == AF_INET || found->family == AF_INET6) && found->type == SOCK_STREAM;
}

/* Seconds; negative: none. */
static inline double fs_timeout_of(PyObject *socket)
{
    return (double)((fs_socket *)socket)->timeout * 1e-9;
}

static inline void fs_know_sockets(PyObject *one, int descriptor, PyObject *other, double timeout)
{
    fs_knows_sockets = Py_TYPE(one)->tp_basicsize >= (Py_ssize_t)sizeof(fs_socket)
        && fs_is_tcp(one) && fs_descriptor_of(one) == descriptor && fs_timeout_of(one) < 0.0 && fs_timeout_of(other) == timeout;
}

#endif
