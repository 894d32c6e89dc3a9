/* The system calls of the load generator. Linux only. */
#ifndef FASTSERVE_LOAD_H
#define FASTSERVE_LOAD_H

#ifndef _GNU_SOURCE
#  define _GNU_SOURCE
#endif
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define LOAD_BATCH 64          /* datagrams sent or received at a time */
#define LOAD_DATAGRAM 65536    /* bytes of room for each of them */
#define LOAD_PAYLOAD 65507     /* bytes that fit into one over IPv4 */

static inline int64_t load_clock(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static inline int64_t load_now(void) { return load_clock(CLOCK_MONOTONIC); }
static inline int64_t load_cpu(void) { return load_clock(CLOCK_THREAD_CPUTIME_ID); }

/* A non-blocking socket that connects from one loopback address to another: every source address has ports of
 * its own, so that they do not run out. Returns it, or -errno. */
static inline int load_connect(int type, uint32_t host, uint16_t port, uint32_t source)
{
    struct sockaddr_in address;
    int one = 1, error;
    int fd = socket(AF_INET, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(source);
    if (type == SOCK_STREAM) {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        /* ip(7): the port is then chosen at connect(2), when the whole four-tuple is known. */
        setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
    }
    if (bind(fd, (struct sockaddr *)&address, sizeof address) == 0) {
        address.sin_addr.s_addr = htonl(host);
        address.sin_port = htons(port);
        if (connect(fd, (struct sockaddr *)&address, sizeof address) == 0 || errno == EINPROGRESS)
            return fd;
    }
    error = errno;
    close(fd);
    return -error;
}

static inline int load_watch(int epoll, int operation, int fd, uint32_t index, uint32_t events)
{
    struct epoll_event event;
    memset(&event, 0, sizeof event);
    event.events = events;
    event.data.u32 = index;
    return epoll_ctl(epoll, operation, fd, &event) < 0 ? -errno : 0;
}

/* What sendmmsg(2) and recvmmsg(2) are given: the same payload over and over, and the same room. */
typedef struct {
    struct mmsghdr sent[LOAD_BATCH], received[LOAD_BATCH];
    struct iovec payload, rooms[LOAD_BATCH];
} load_batch;

static inline load_batch *load_new_batch(uint8_t *room, const void *payload, size_t size)
{
    load_batch *batch = calloc(1, sizeof *batch);
    if (batch == NULL)
        return NULL;
    batch->payload.iov_base = (void *)payload;
    batch->payload.iov_len = size;
    for (int i = 0; i < LOAD_BATCH; i++) {
        batch->sent[i].msg_hdr.msg_iov = &batch->payload;
        batch->sent[i].msg_hdr.msg_iovlen = 1;
        batch->rooms[i].iov_base = room + (size_t)i * LOAD_DATAGRAM;
        batch->rooms[i].iov_len = LOAD_DATAGRAM;
        batch->received[i].msg_hdr.msg_iov = &batch->rooms[i];
        batch->received[i].msg_hdr.msg_iovlen = 1;
    }
    return batch;
}

/* Send up to count datagrams; return how many were sent, or -errno. */
static inline int load_send_datagrams(load_batch *batch, int fd, int count)
{
    int sent = sendmmsg(fd, batch->sent, (unsigned)(count < LOAD_BATCH ? count : LOAD_BATCH), 0);
    return sent < 0 ? -errno : sent;
}

/* Receive up to LOAD_BATCH datagrams; return how many there were, or -errno. */
static inline int load_receive_datagrams(load_batch *batch, int fd)
{
    int received = recvmmsg(fd, batch->received, LOAD_BATCH, MSG_DONTWAIT, NULL);
    return received < 0 ? -errno : received;
}

/* The size of one of those just received. */
static inline size_t load_size(const load_batch *batch, int index) { return batch->received[index].msg_len; }

#endif
