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

static inline int fs_accept_nonblocking(int listener, struct sockaddr *address, socklen_t *length)
{
    int fd = accept4(listener, address, length, SOCK_CLOEXEC | SOCK_NONBLOCK);
    return fd < 0 ? -errno : fd;
}

static inline int fs_set_nonblocking(int fd, int nonblocking)
{
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0)
        return -errno;
    int wanted = nonblocking ? flags | O_NONBLOCK : flags & ~O_NONBLOCK;
    return wanted == flags || fcntl(fd, F_SETFL, wanted) == 0 ? 0 : -errno;
}

/* The descriptor is the first field of a socket of the module _socket in every CPython from 3.11 to 3.15; the module
 * asks at import whether it still is, see _green.pyx. */
static inline int fs_descriptor_of(PyObject *socket)
{
    return *(int *)((char *)socket + sizeof(PyObject));
}

#endif
