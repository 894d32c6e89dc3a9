# The C declarations that the extensions use. Every fs_ function returns a value >= 0, or -errno.

from libc.stdint cimport uint16_t, uint32_t

cdef extern from "_compat.h" nogil:
    enum:
        FS_HAVE_EPOLL
        FS_HAVE_EVENTFD
        FD_SETSIZE
        AF_INET
        AF_INET6
        AF_UNIX
        EPOLLIN
        EPOLL_CTL_ADD
        EPOLL_CTL_DEL
        MSG_DONTWAIT
        POLLIN
        POLLOUT
        MSG_TRUNC

    ctypedef unsigned int socklen_t
    ctypedef unsigned long nfds_t

    ctypedef struct fd_set:
        pass

    void FD_ZERO(fd_set *)
    void FD_SET(int, fd_set *)
    void FD_CLR(int, fd_set *)
    int FD_ISSET(int, fd_set *)

    struct pollfd:
        int fd
        short events
        short revents

    ctypedef union epoll_data_t "fs_epoll_data_t":
        int fd

    struct epoll_event:
        uint32_t events
        epoll_data_t data

    struct sockaddr:
        unsigned short sa_family

    struct sockaddr_storage:
        unsigned short ss_family

    struct in_addr:
        pass

    struct in6_addr:
        pass

    struct sockaddr_in:
        unsigned short sin_family
        unsigned short sin_port
        in_addr sin_addr

    struct sockaddr_in6:
        unsigned short sin6_family
        unsigned short sin6_port
        uint32_t sin6_flowinfo
        in6_addr sin6_addr
        uint32_t sin6_scope_id

    struct sockaddr_un:
        unsigned short sun_family
        char sun_path[1]

    struct iovec:
        void *iov_base
        size_t iov_len

    struct msghdr:
        void *msg_name
        socklen_t msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags

    ctypedef struct fs_mmsghdr:
        msghdr msg_hdr
        unsigned int msg_len

    ctypedef union fs_control:
        pass

    unsigned short ntohs(unsigned short)
    unsigned short htons(unsigned short)
    uint32_t ntohl(uint32_t)
    uint32_t htonl(uint32_t)
    int inet_pton(int, const char *, void *)
    const char *inet_ntop(int, const void *, char *, socklen_t)
    void fs_ipv4_text(const void *, char *)
    int close_descriptor "close"(int)

    int fs_accept(int, sockaddr *, socklen_t *)
    int fs_eventfd()
    int fs_socketpair(int *)
    int fs_epoll_create()
    int fs_epoll_ctl(int, int, int, uint32_t)
    int fs_epoll_wait(int, epoll_event *, int, int)
    int fs_poll(pollfd *, nfds_t, int)
    int fs_select(int, const fd_set *, fd_set *, int)
    int fs_recvmmsg(int, fs_mmsghdr *, unsigned int, int *)
    int fs_sendmmsg(int, fs_mmsghdr *, unsigned int)
    int fs_shutdown_and_close(int)
    int fs_can_segment(int)
    void fs_segment(fs_mmsghdr *, fs_control *, uint16_t)
    int fs_is_closed(int)
    int fs_write(int, const void *, size_t)
    int fs_read(int, void *, size_t)
    Py_ssize_t fs_recv(int, void *, size_t, int)
    Py_ssize_t fs_send(int, const void *, size_t, int)
