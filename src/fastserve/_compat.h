/* What differs between the POSIX systems, so that the extensions read the same on all of them.
 *
 * Every fs_ function returns a value >= 0, or -errno. errno is read right after the system call: taking the
 * GIL back may change it.
 */
#ifndef FASTSERVE_COMPAT_H
#define FASTSERVE_COMPAT_H

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <poll.h>
#include <stdint.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <netinet/in.h>
#include <arpa/inet.h>
#include <unistd.h>

#if defined(__linux__)
#  include <sys/epoll.h>
#  include <sys/eventfd.h>
#  define FS_HAVE_EPOLL 1
#  define FS_HAVE_EVENTFD 1
#else
#  define FS_HAVE_EPOLL 0
#  define FS_HAVE_EVENTFD 0
typedef union { void *ptr; int fd; uint32_t u32; uint64_t u64; } fs_epoll_data_t;
struct epoll_event { uint32_t events; fs_epoll_data_t data; };
#  define EPOLLIN 1u
#  define EPOLL_CTL_ADD 1
#  define EPOLL_CTL_DEL 2
#endif

#define FS_RESULT(expression) \
    do { int fs_result = (int)(expression); return fs_result < 0 ? -errno : fs_result; } while (0)

/* Close-on-exec and, if asked for, non-blocking, where the creating call has no flags for it. */
static inline int fs_set_flags(int fd, int nonblocking)
{
    int flags = fcntl(fd, F_GETFD);
    if (flags < 0 || fcntl(fd, F_SETFD, flags | FD_CLOEXEC) < 0)
        return -errno;
    if (nonblocking) {
        flags = fcntl(fd, F_GETFL);
        if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
            return -errno;
    }
    return 0;
}

/* accept(2) with close-on-exec set; the new descriptor is blocking on Linux, elsewhere it may inherit. */
static inline int fs_accept(int listener, struct sockaddr *address, socklen_t *length)
{
#if defined(__linux__) || defined(__FreeBSD__) || defined(__NetBSD__) || defined(__OpenBSD__)
    FS_RESULT(accept4(listener, address, length, SOCK_CLOEXEC));
#else
    int fd = accept(listener, address, length);
    if (fd < 0)
        return -errno;
    int error = fs_set_flags(fd, 0);
    if (error < 0) {
        close(fd);
        return error;
    }
    return fd;
#endif
}

static inline int fs_eventfd(void)
{
#if FS_HAVE_EVENTFD
    FS_RESULT(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
#else
    return -ENOSYS;
#endif
}

/* A connected pair of stream sockets, both non-blocking and close-on-exec. */
static inline int fs_socketpair(int pair[2])
{
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) < 0)
        return -errno;
    for (int i = 0; i < 2; i++) {
        int error = fs_set_flags(pair[i], 1);
        if (error < 0) {
            close(pair[0]);
            close(pair[1]);
            return error;
        }
    }
    return 0;
}

static inline int fs_epoll_create(void)
{
#if FS_HAVE_EPOLL
    FS_RESULT(epoll_create1(EPOLL_CLOEXEC));
#else
    return -ENOSYS;
#endif
}

static inline int fs_epoll_ctl(int epfd, int operation, int fd, uint32_t events)
{
#if FS_HAVE_EPOLL
    struct epoll_event event = {0};
    event.events = events;
    event.data.fd = fd;
    FS_RESULT(epoll_ctl(epfd, operation, fd, &event));
#else
    (void)epfd; (void)operation; (void)fd; (void)events;
    return -ENOSYS;
#endif
}

static inline int fs_epoll_wait(int epfd, struct epoll_event *events, int count, int milliseconds)
{
#if FS_HAVE_EPOLL
    FS_RESULT(epoll_wait(epfd, events, count, milliseconds));
#else
    (void)epfd; (void)events; (void)count; (void)milliseconds;
    return -ENOSYS;
#endif
}

static inline int fs_poll(struct pollfd *fds, nfds_t count, int milliseconds)
{
    FS_RESULT(poll(fds, count, milliseconds));
}

/* select(2) for reading, on a copy of the set so that the caller's stays as it is. milliseconds < 0: endless. */
static inline int fs_select(int highest, const fd_set *wanted, fd_set *ready, int milliseconds)
{
    struct timeval limit;
    *ready = *wanted;
    if (milliseconds >= 0) {
        limit.tv_sec = milliseconds / 1000;
        limit.tv_usec = (milliseconds % 1000) * 1000;
    }
    FS_RESULT(select(highest + 1, ready, NULL, NULL, milliseconds < 0 ? NULL : &limit));
}

/* Datagrams in batches: recvmmsg(2) and sendmmsg(2) where they are, else their like, one call each. */
#if defined(__linux__) || defined(__FreeBSD__)
#  define FS_HAVE_MMSG 1
typedef struct mmsghdr fs_mmsghdr;
#else
#  define FS_HAVE_MMSG 0
typedef struct { struct msghdr msg_hdr; unsigned int msg_len; } fs_mmsghdr;
#endif

/* Receive what is there, without waiting. An error after the first datagram is stored in *later, or comes with the
 * next call. */
static inline int fs_recvmmsg(int fd, fs_mmsghdr *messages, unsigned int count, int *later)
{
    *later = 0;
#if FS_HAVE_MMSG
    FS_RESULT(recvmmsg(fd, messages, count, MSG_DONTWAIT, NULL));
#else
    for (unsigned int i = 0; i < count; i++) {
        ssize_t size = recvmsg(fd, &messages[i].msg_hdr, MSG_DONTWAIT);
        if (size < 0) {
            if (i == 0)
                return -errno;
            if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)
                *later = errno;
            return (int)i;
        }
        messages[i].msg_len = (unsigned int)size;
    }
    return (int)count;
#endif
}

/* Send; return how many were sent, or the error of the first. The first of the rest tells the error of a later one. */
static inline int fs_sendmmsg(int fd, fs_mmsghdr *messages, unsigned int count)
{
#if FS_HAVE_MMSG
    FS_RESULT(sendmmsg(fd, messages, count, 0));
#else
    for (unsigned int i = 0; i < count; i++) {
        if (sendmsg(fd, &messages[i].msg_hdr, 0) < 0)
            return i == 0 ? -errno : (int)i;
    }
    return (int)count;
#endif
}

/* End a connection: the other side sees the end even where another process has the descriptor too. */
static inline int fs_shutdown_and_close(int fd)
{
    shutdown(fd, SHUT_WR);  /* ENOTCONN: the other side is gone already */
    return close(fd) < 0 && errno != ECONNRESET ? -errno : 0;
}

/* Write an IPv4 address as inet_ntop(3) does, which goes through printf for it. There must be room for 16 bytes. */
static inline void fs_ipv4_text(const void *address, char *text)
{
    const unsigned char *part = (const unsigned char *)address;
    for (int i = 0; i < 4; i++) {
        unsigned value = part[i];
        if (value >= 100)
            *text++ = (char)('0' + value / 100);
        if (value >= 10)
            *text++ = (char)('0' + value / 10 % 10);
        *text++ = (char)('0' + value % 10);
        *text++ = i < 3 ? '.' : '\0';
    }
}

/* Several datagrams of one size to one peer as one message, which the kernel cuts up again: UDP_SEGMENT, udp(7). The last
 * may be shorter. What the option is called is younger than some headers. */
#define FS_SEGMENT 103
typedef union { struct cmsghdr header; char room[CMSG_SPACE(sizeof(uint16_t))]; } fs_control;

/* Whether the kernel knows the option, and nobody has set it on the socket for purposes of their own. */
static inline int fs_can_segment(int fd)
{
#if defined(__linux__)
    int size = 0;
    socklen_t length = sizeof size;
    return getsockopt(fd, IPPROTO_UDP, FS_SEGMENT, &size, &length) == 0 && size == 0;
#else
    (void)fd;
    return 0;
#endif
}

static inline void fs_segment(fs_mmsghdr *message, fs_control *control, uint16_t size)
{
    memset(control, 0, sizeof *control);
    control->header.cmsg_level = IPPROTO_UDP;
    control->header.cmsg_type = FS_SEGMENT;
    control->header.cmsg_len = CMSG_LEN(sizeof size);
    memcpy(CMSG_DATA(&control->header), &size, sizeof size);
    message->msg_hdr.msg_control = control;
    message->msg_hdr.msg_controllen = sizeof control->room;
}

static inline int fs_is_closed(int fd)
{
    return fcntl(fd, F_GETFD) < 0;
}

static inline int fs_write(int fd, const void *data, size_t size)
{
    FS_RESULT(write(fd, data, size));
}

static inline int fs_read(int fd, void *data, size_t size)
{
    FS_RESULT(read(fd, data, size));
}

#ifndef MSG_DONTWAIT
#  define MSG_DONTWAIT 0  /* a socket with a timeout is non-blocking anyway, unless somebody meddles with it */
#endif

/* recv(2) and send(2): their sizes may be more than an int holds. */
static inline ssize_t fs_recv(int fd, void *data, size_t size, int flags)
{
    ssize_t result = recv(fd, data, size, flags);
    return result < 0 ? -errno : result;
}

static inline ssize_t fs_send(int fd, const void *data, size_t size, int flags)
{
    ssize_t result = send(fd, data, size, flags);
    return result < 0 ? -errno : result;
}

#endif
