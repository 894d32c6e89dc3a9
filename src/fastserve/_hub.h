/* What the greenlet hub needs and Cython cannot say. */
#ifndef FASTSERVE_HUB_H
#define FASTSERVE_HUB_H

#include <Python.h>
#include <errno.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
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

/* Receive into new bytes of the expected size, so that nothing has to be copied, and what they have no room for into
 * rest. The bytes are left in made, unless nothing could be received: it may be long until there is something.
 * Returns -errno, or -1 after an exception. The buffers of a call that rarely happens would be on the stack of every
 * connection that waits, were it inlined. */
static __attribute__((noinline, unused)) ssize_t fs_recv_new(
    int fd, PyObject **made, Py_ssize_t expected, char *rest, Py_ssize_t size)
{
    PyObject *begin = PyBytes_FromStringAndSize(NULL, expected);
    if (begin == NULL)
        return -1;
    struct iovec parts[2] = {{PyBytes_AS_STRING(begin), expected}, {rest, size}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    ssize_t result = recvmsg(fd, &message, MSG_DONTWAIT);
    if (result < 0) {
        result = -errno;
        Py_DECREF(begin);
    } else
        *made = begin;
    return result;
}

static inline uint64_t fs_tag(const struct epoll_event *event) { return event->data.u64; }

/* The first block of Python frames of a greenlet. CPython would map 16 KiB at its first function, and the frames of a
 * request that waits for its client touch a page of 4 KiB of them, though most need a fifth of it. What does not fit here
 * goes to blocks of CPython's own, as the frames of any deep call do.
 *
 * A greenlet that is destroyed without having ended, because its thread has, gives its blocks to the arena allocator,
 * which unmaps pages: the block never begins a page, so that there is nothing it could unmap. */
#if PY_VERSION_HEX < 0x030F0000  /* the fields of a thread state may be others in later versions */
enum { FS_FRAMES = 1024, FS_PAGE = 4096, FS_OFF_PAGE = 16 };

static inline void *fs_frames_begin(void)
{
    PyThreadState *state = PyThreadState_Get();
    if (state->datastack_chunk != NULL)
        return NULL;
    char *memory = PyMem_RawMalloc(FS_FRAMES + FS_OFF_PAGE);
    if (memory == NULL)
        return NULL;
    _PyStackChunk *block = (_PyStackChunk *)((uintptr_t)memory % FS_PAGE ? memory : memory + FS_OFF_PAGE);
    block->previous = NULL;
    block->size = FS_FRAMES;
    block->top = 0;
    state->datastack_chunk = block;
    state->datastack_top = &block->data[1];  /* as CPython does, which frees a block with the frame at its beginning */
    state->datastack_limit = (PyObject **)((char *)block + FS_FRAMES);
    return memory;
}

/* Called where no Python frame of the greenlet is left. */
static inline void fs_frames_end(void *memory)
{
    PyThreadState *state = PyThreadState_Get();
    if (memory == NULL)
        return;
    state->datastack_chunk = NULL;
    state->datastack_top = state->datastack_limit = NULL;
    PyMem_RawFree(memory);
}
#else
static inline void *fs_frames_begin(void) { return NULL; }
static inline void fs_frames_end(void *memory) { (void)memory; }
#endif

#endif
