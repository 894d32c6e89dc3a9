/* The limit: what one thread of C with epoll(7) makes of this machine. No error is survived, nothing is logged.
 *
 *     server echo      sends back what it receives, until the client ends the connection
 *     server lines     sends back whole lines, as many as it has received
 *     server oneshot   sends back what it receives once, and closes the connection
 *     server udp       sends back datagrams, in batches of recvmmsg(2) and sendmmsg(2)
 *
 * It listens on 127.0.0.1, on a port that the kernel chooses and that is the first line it prints.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { EVENTS = 256, ROOM = 262144, BATCH = 64, DATAGRAM = 2048, CONNECTIONS = 65536 };

/* The start of a line whose end has not come yet. */
struct rest { char *bytes; size_t size; };

static char room[ROOM];
static struct rest rests[CONNECTIONS];

static void check(int sound, const char *what)
{
    if (!sound) {
        perror(what);
        exit(1);
    }
}

static int listen_on_loopback(int type)
{
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t length = sizeof address;
    int fd = socket(AF_INET, type | SOCK_NONBLOCK, 0);
    check(fd >= 0, "socket");
    check(bind(fd, (struct sockaddr *)&address, sizeof address) == 0, "bind");
    check(type == SOCK_DGRAM || listen(fd, 4096) == 0, "listen");
    check(getsockname(fd, (struct sockaddr *)&address, &length) == 0, "getsockname");
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

/* Send everything; a client that does not read is waited for. Returns whether the connection is sound. */
static int send_all(int fd, const char *data, size_t size)
{
    while (size) {
        ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN)
            return 0;
        if (sent > 0) {
            data += sent;
            size -= (size_t)sent;
        }
    }
    return 1;
}

/* Send the whole lines of what was received, and keep the rest. */
static int send_lines(int fd, size_t size)
{
    struct rest *rest = &rests[fd % CONNECTIONS];
    char *end = memrchr(room, '\n', size);
    size_t whole = end ? (size_t)(end - room) + 1 : 0;
    if (whole) {
        if (rest->size && !send_all(fd, rest->bytes, rest->size))
            return 0;
        rest->size = 0;
        if (!send_all(fd, room, whole))
            return 0;
    }
    if (whole < size) {
        rest->bytes = realloc(rest->bytes, rest->size + size - whole);
        check(rest->bytes != NULL, "realloc");
        memcpy(rest->bytes + rest->size, room + whole, size - whole);
        rest->size += size - whole;
    }
    return 1;
}

static void serve_streams(int lines, int oneshot)
{
    struct epoll_event events[EVENTS], event = { .events = EPOLLIN };
    int listener = listen_on_loopback(SOCK_STREAM);
    int epoll = epoll_create1(0), yes = 1;
    check(epoll >= 0, "epoll_create1");
    event.data.fd = listener;
    check(epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event) == 0, "epoll_ctl");
    for (;;) {
        int count = epoll_wait(epoll, events, EVENTS, -1);
        for (int i = 0; i < count; i++) {
            int fd = events[i].data.fd;
            if (fd == listener) {
                fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
                if (fd < 0)
                    continue;
                rests[fd % CONNECTIONS].size = 0;
                if (!oneshot) {
                    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
                    event.data.fd = fd;
                    check(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) == 0, "epoll_ctl");
                    continue;
                }
                /* A connection that is accepted usually has its request with it: the poller is not troubled. */
                ssize_t size = recv(fd, room, ROOM, 0);
                if (size < 0 && errno == EAGAIN) {
                    event.data.fd = fd;
                    check(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) == 0, "epoll_ctl");
                    continue;
                }
                if (size > 0)
                    send_all(fd, room, (size_t)size);
                close(fd);
                continue;
            }
            ssize_t size = recv(fd, room, ROOM, 0);
            if (size < 0 && errno == EAGAIN)
                continue;
            int sound = size > 0 && (lines ? send_lines(fd, (size_t)size) : send_all(fd, room, (size_t)size));
            if (!sound || oneshot)
                close(fd);
        }
    }
}

static void serve_datagrams(void)
{
    static char rooms[BATCH][DATAGRAM];
    struct mmsghdr messages[BATCH] = { 0 };
    struct iovec parts[BATCH];
    struct sockaddr_in addresses[BATCH];
    struct epoll_event event = { .events = EPOLLIN };
    int fd = listen_on_loopback(SOCK_DGRAM);
    int epoll = epoll_create1(0);
    check(epoll >= 0, "epoll_create1");
    check(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) == 0, "epoll_ctl");
    for (;;) {
        for (int i = 0; i < BATCH; i++) {
            parts[i].iov_base = rooms[i];
            parts[i].iov_len = DATAGRAM;
            messages[i].msg_hdr.msg_iov = &parts[i];
            messages[i].msg_hdr.msg_iovlen = 1;
            messages[i].msg_hdr.msg_name = &addresses[i];
            messages[i].msg_hdr.msg_namelen = sizeof addresses[i];
        }
        int count = recvmmsg(fd, messages, BATCH, MSG_DONTWAIT, NULL);
        if (count < 0) {
            check(errno == EAGAIN || errno == EINTR || errno == ECONNREFUSED, "recvmmsg");
            epoll_wait(epoll, &event, 1, -1);
            continue;
        }
        for (int i = 0; i < count; i++)
            parts[i].iov_len = messages[i].msg_len;
        for (int sent = 0; sent < count;) {
            int more = sendmmsg(fd, messages + sent, (unsigned)(count - sent), 0);
            sent += more > 0 ? more : 1;
        }
    }
}

int main(int argc, char **argv)
{
    const char *mode = argc == 2 ? argv[1] : "";
    if (!strcmp(mode, "echo"))
        serve_streams(0, 0);
    else if (!strcmp(mode, "lines"))
        serve_streams(1, 0);
    else if (!strcmp(mode, "oneshot"))
        serve_streams(0, 1);
    else if (!strcmp(mode, "udp"))
        serve_datagrams();
    fprintf(stderr, "usage: %s echo | lines | oneshot | udp\n", argv[0]);
    return 2;
}
