# cython: language_level=3, embedsignature=True, freethreading_compatible=True
# cython: boundscheck=False, wraparound=False, cdivision=True
"""A load generator for servers on this machine: one thread, epoll(7), no Python while it runs. Linux only.

It is meant to be cheap enough never to be what is measured; each result says which share of a core it used. All
of its traffic goes from loopback addresses to a loopback address, and ends after a given time.

>>> streams(("127.0.0.1", 8000), b"hello", answer=5, connections=50, seconds=1.0)["requests_per_second"]
"""

import os as _os
import socket as _socket

from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, ECONNREFUSED, ECONNRESET, EINTR, ENOBUFS, ETIMEDOUT, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.math cimport ceil
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memset

cdef extern from "_load.h" nogil:
    enum:
        EPOLLET
        EPOLLIN
        EPOLLOUT
        EPOLLRDHUP
        EPOLL_CLOEXEC
        EPOLL_CTL_ADD
        EPOLL_CTL_MOD
        IP_BIND_ADDRESS_NO_PORT
        LOAD_BATCH
        LOAD_DATAGRAM
        LOAD_PAYLOAD
        MSG_NOSIGNAL
        SHUT_WR
        SOCK_DGRAM
        SOCK_STREAM

    ctypedef union epoll_data_t:
        uint32_t u32

    struct epoll_event:
        uint32_t events
        epoll_data_t data

    ctypedef struct load_batch:
        pass

    int64_t load_now()
    int64_t load_cpu()
    int load_connect(int, uint32_t, uint16_t, uint32_t)
    int load_watch(int, int, int, uint32_t, uint32_t)
    load_batch *load_new_batch(uint8_t *, const void *, size_t)
    int load_send_datagrams(load_batch *, int, int)
    int load_receive_datagrams(load_batch *, int)
    size_t load_size(load_batch *, int)
    int epoll_create1(int)
    int epoll_wait(int, epoll_event *, int, int)
    ssize_t send(int, const void *, size_t, int)
    ssize_t recv(int, void *, size_t, int)
    int shutdown(int, int)
    int close_descriptor "close"(int)

cdef enum:
    MAX_EVENTS = 256
    SCRATCH = 262144               # bytes received at a time
    PER_DOUBLING = 64              # buckets: latency is counted to within 1.6%
    BUCKETS = 2560                 # up to 2**45 ns
    MAX_DELIMITER = 64             # bytes
    MAX_WINDOW = 1024              # datagrams under way of one socket
    MAX_UNDER_WAY = 2048           # with those that find out whether others are lost
    READS = 16                     # of one connection, before others have their turn
    SOURCES = 200                  # client addresses, from FIRST_SOURCE on
    TURN = 50                      # milliseconds between two looks at signals and at what stands still

cdef uint32_t FIRST_SOURCE = 0x7F000002       # 127.0.0.2
cdef int64_t SECOND = 1000000000              # ns
cdef int64_t PATIENCE = 250000000             # ns without an answer after which something seems wrong
cdef int64_t STALLED = 1000000000             # ns without an answer after which a connection stands still
cdef double SATURATED = 0.95                  # share of a core above which the load may have been the limit

# How the end of an answer is known.
cdef enum:
    BY_SIZE
    BY_DELIMITER
    BY_CLOSE


cdef struct Connection:
    int fd                         # -1 while it is not open
    bint answered                  # whether the answer is complete, and only the end of the connection awaited
    bint differs                   # whether the answer was found to be wrong
    size_t sent                    # bytes of the payload
    size_t received                # bytes of the answer
    int found                      # delimiters in the answer
    int matched                    # bytes of the delimiter with which the answer ends so far
    int64_t begun                  # ns; when the exchange began


cdef struct Sender:
    int fd
    int under_way                  # datagrams without an answer
    int first                      # index of the oldest of them in times
    int64_t times[MAX_UNDER_WAY]   # ns; when each was sent, a ring
    int64_t heard                  # ns; when the last answer came, 0 before the first
    int64_t since                  # ns; since when an answer is awaited
    int64_t probed                 # ns; when the probe was sent after which nothing was, or 0
    int64_t slowest                # ns; the longest wait for an answer
    uint64_t given_up              # datagrams that were counted as lost


cdef class _Histogram:
    """Latencies in buckets whose width grows with them."""

    cdef uint64_t counts[BUCKETS]
    cdef uint64_t total
    cdef int64_t longest

    def __cinit__(self):
        memset(self.counts, 0, sizeof(self.counts))

    cdef void add(self, int64_t nanoseconds) noexcept nogil:
        cdef int doubling = 0
        cdef int64_t rest = nanoseconds
        while rest >= 2 * PER_DOUBLING:
            rest >>= 1
            doubling += 1
        cdef int index = <int>rest + doubling * PER_DOUBLING
        self.counts[min(index, BUCKETS - 1)] += 1
        self.total += 1
        self.longest = max(self.longest, nanoseconds)

    cdef double quantile(self, double part):
        """Return the latency in microseconds that this part of all does not exceed; 0 if there are none."""
        cdef uint64_t wanted = <uint64_t>ceil(part * self.total)
        cdef uint64_t seen = 0
        cdef int index, doubling
        for index in range(BUCKETS):
            seen += self.counts[index]
            if seen and seen >= wanted:
                doubling = max(index // PER_DOUBLING - 1, 0)
                return min((<int64_t>(index - doubling * PER_DOUBLING + 1)) << doubling, self.longest) / 1000.0
        return self.longest / 1000.0


cdef class _Run:
    """What every kind of load has: a server, a payload, an expected answer, a clock and counters."""

    cdef int epoll
    cdef uint32_t host
    cdef uint16_t port
    cdef const uint8_t *payload
    cdef size_t payload_size
    cdef const uint8_t *expected             # NULL: the answer is not compared
    cdef size_t expected_size
    cdef bytes _payload, _expected           # what the pointers point to
    cdef _Histogram latencies
    cdef uint64_t refused, broken, wrong, lost, next_source
    cdef int64_t counted_from, ended, until
    cdef int repeats                         # requests that one exchange counts as
    cdef int failure                         # errno of a failure of the generator itself
    cdef bint ending
    cdef uint8_t *scratch

    def __cinit__(self):
        self.epoll = -1
        self.repeats = 1

    cdef int prepare(self, address, bytes payload, expected, size_t room) except -1:
        host, port = address
        self.host = _loopback(host)
        if not 0 < port < 65536:
            raise ValueError(f"{port} is not a port")
        if not payload:
            raise ValueError("there is nothing to send")
        self.port = port
        self._payload = payload
        self._expected = expected
        self.payload = payload
        self.payload_size = len(payload)
        if expected is not None:
            self.expected = self._expected
            self.expected_size = len(expected)
        self.latencies = _Histogram()
        self.scratch = <uint8_t *>calloc(room, 1)
        if self.scratch == NULL:
            raise MemoryError()
        self.epoll = epoll_create1(EPOLL_CLOEXEC)
        if self.epoll < 0:
            raise OSError(errno, _os.strerror(errno))
        return 0

    def __dealloc__(self):
        free(self.scratch)
        if self.epoll >= 0:
            close_descriptor(self.epoll)

    cdef uint32_t source(self) noexcept nogil:
        self.next_source += 1
        return FIRST_SOURCE + <uint32_t>(self.next_source % SOURCES)

    cdef dict measure(self, double warmup, double seconds, sample):
        """Begin, run for a while uncounted and then counted, end, and return the figures.

        ``sample`` is called at the beginning and at the end of the time that counts.
        """
        if not (0 <= warmup <= 3600 and 0 < seconds <= 3600):
            raise ValueError("a run takes more than 0 and at most 3600 seconds, after a warm-up of at most as many")
        self.begin_all()
        self.run(warmup)
        self.latencies = _Histogram()
        self.refused = self.broken = self.wrong = self.lost = 0
        before = None if sample is None else sample()
        cdef int64_t cpu = load_cpu()
        self.counted_from = load_now()
        self.run(seconds)
        elapsed = (load_now() - self.counted_from) / <double>SECOND
        share = (load_cpu() - cpu) / <double>SECOND / elapsed
        after = None if sample is None else sample()
        # What is answered from here on is awaited, so that no server is left with it, but it is not counted.
        latencies, self.latencies = self.latencies, _Histogram()
        self.ending = True
        cdef uint64_t stalled = self.end_all()
        requests = latencies.total * self.repeats
        return {
            "requests": requests,
            "seconds": elapsed,
            "requests_per_second": requests / elapsed,
            "p50_us": latencies.quantile(0.5),
            "p90_us": latencies.quantile(0.9),
            "p99_us": latencies.quantile(0.99),
            "max_us": latencies.longest / 1000.0,
            "errors": self.refused + self.broken + self.wrong + self.lost + stalled,
            "refused": self.refused,
            "broken": self.broken,
            "wrong": self.wrong,
            "lost": self.lost,
            "stalled": stalled,
            "generator_cpu": share,
            "generator_saturated": bool(share > SATURATED),
            "samples": None if sample is None else (before, after),
        }

    cdef int run(self, double seconds) except -1:
        """Run for a time. Signal handlers run meanwhile; what they raise ends the run."""
        cdef epoll_event events[MAX_EVENTS]
        cdef int i
        cdef int count = 0
        cdef int error = 0
        cdef int64_t turn_ends
        self.ended = load_now()
        self.until = self.ended + <int64_t>(seconds * SECOND)
        while self.ended < self.until:
            with nogil:
                turn_ends = min(self.ended + TURN * 1000000, self.until)
                while self.ended < turn_ends:
                    count = epoll_wait(self.epoll, events, MAX_EVENTS, <int>((turn_ends - self.ended) // 1000000) + 1)
                    error = errno  # before the GIL is taken, which may change it
                    for i in range(count):
                        self.ready(events[i].data.u32, events[i].events)
                    self.ended = load_now()
                    if count < 0:
                        break
            if count < 0 and error != EINTR:
                raise OSError(error, _os.strerror(error))
            PyErr_CheckSignals()
            self.turn()
            self.check()
        return 0

    cdef int check(self) except -1:
        """Raise ``OSError`` if the generator itself ran out of something: that is no error of the server."""
        if self.failure:
            raise OSError(self.failure, _os.strerror(self.failure))
        return 0

    cdef int begin_all(self) except -1:
        return 0

    cdef void ready(self, uint32_t index, uint32_t events) noexcept nogil:
        pass

    cdef void turn(self) noexcept:
        pass

    cdef uint64_t end_all(self) except? 0xFFFFFFFF:
        """End everything that is open, and return what stands still."""
        return 0


cdef class _Streams(_Run):
    """Connections that each send the payload, await the answer, and begin again."""

    cdef Connection *connections
    cdef int count
    cdef int rule
    cdef size_t answer_size
    cdef uint8_t delimiter[MAX_DELIMITER]
    cdef int fallback[MAX_DELIMITER]         # Knuth, Morris and Pratt: where to go on after a mismatch
    cdef int delimiter_size, delimiters
    cdef bint predicted                      # whether an expected answer is whole just at its end
    cdef bint reconnect

    def __init__(self, address, bytes payload, answer, expected, int connections, bint reconnect, int repeats):
        cdef int i
        cdef Connection trial
        if connections < 1:
            raise ValueError("there must be at least one connection")
        self.prepare(address, payload, expected, SCRATCH)
        self.repeats = repeats
        self.reconnect = reconnect
        if answer is None:
            self.rule = BY_CLOSE
            self.reconnect = True
        elif isinstance(answer, bytes):
            if not 0 < len(answer) <= MAX_DELIMITER:
                raise ValueError(f"a delimiter has 1 to {MAX_DELIMITER} bytes")
            self.rule = BY_DELIMITER
            self.delimiters = repeats
            self.delimiter_size = len(answer)
            for i in range(self.delimiter_size):
                self.delimiter[i] = answer[i]
            self.fallback[0] = 0
            for i in range(1, self.delimiter_size):
                self.fallback[i] = self.fallback[i - 1]
                while self.fallback[i] and self.delimiter[self.fallback[i]] != self.delimiter[i]:
                    self.fallback[i] = self.fallback[self.fallback[i] - 1]
                self.fallback[i] += self.delimiter[self.fallback[i]] == self.delimiter[i]
            if expected is not None:
                trial.found = trial.matched = 0
                self.predicted = self.scan(&trial, self.expected, self.expected_size) == <ssize_t>self.expected_size
        else:
            if answer < 1:
                raise ValueError("an answer has at least one byte")
            self.rule = BY_SIZE
            self.answer_size = answer * repeats
            if expected is not None and self.expected_size != self.answer_size:
                raise ValueError(f"an answer of {answer} bytes is never the {len(expected) // repeats} expected ones")
        self.count = connections
        self.connections = <Connection *>calloc(connections, sizeof(Connection))
        if self.connections == NULL:
            raise MemoryError()
        for i in range(connections):
            self.connections[i].fd = -1

    def __dealloc__(self):
        cdef int i
        if self.connections != NULL:
            for i in range(self.count):
                if self.connections[i].fd >= 0:
                    close_descriptor(self.connections[i].fd)
            free(self.connections)

    cdef int begin_all(self) except -1:
        self.turn()
        return self.check()

    cdef void open(self, uint32_t index) noexcept nogil:
        cdef Connection *connection = &self.connections[index]
        cdef int error
        self.begin(connection, load_now())
        connection.fd = load_connect(SOCK_STREAM, self.host, self.port, self.source())
        if connection.fd < 0:
            error = -connection.fd
            connection.fd = -1
            if error == ECONNREFUSED or error == ECONNRESET or error == ETIMEDOUT:
                self.refused += 1
            else:
                self.failure = error
            return
        # Told of edges alone: what there is to do is done until the kernel says EAGAIN, or shows that it would.
        error = load_watch(self.epoll, EPOLL_CTL_ADD, connection.fd, index, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET)
        if error < 0:
            self.failure = -error
        # On loopback it is connected by now, as a rule; if not, epoll tells when it is.
        elif not self.push(connection):
            self.fail(index)

    cdef void begin(self, Connection *connection, int64_t now) noexcept nogil:
        connection.sent = connection.received = 0
        connection.found = connection.matched = 0
        connection.answered = connection.differs = False
        connection.begun = now

    cdef void close(self, Connection *connection) noexcept nogil:
        close_descriptor(connection.fd)
        connection.fd = -1

    cdef void fail(self, uint32_t index) noexcept nogil:
        """Give up a connection; the next turn opens it again, so that a dead server is not hammered."""
        if self.ending:
            pass
        elif self.connections[index].sent == 0:
            self.refused += 1
        else:
            self.broken += 1
        self.close(&self.connections[index])

    cdef void ready(self, uint32_t index, uint32_t events) noexcept nogil:
        cdef Connection *connection = &self.connections[index]
        if connection.fd < 0:
            return
        if not self.ending and not self.push(connection):
            self.fail(index)
        elif events & ~<uint32_t>EPOLLOUT:
            self.pull(index, events & ~<uint32_t>(EPOLLIN | EPOLLOUT))

    cdef bint push(self, Connection *connection) noexcept nogil:
        """Send what is left of the payload, as far as there is room; return whether the connection is sound."""
        cdef ssize_t size
        while connection.sent < self.payload_size:
            size = send(
                connection.fd, self.payload + connection.sent, self.payload_size - connection.sent, MSG_NOSIGNAL
            )
            if size >= 0:
                connection.sent += size
            elif errno != EINTR:
                return errno == EAGAIN
        return True

    cdef void pull(self, uint32_t index, uint32_t ends) noexcept nogil:
        """Receive what there is. ``ends``: the end of the connection, or an error, is known to come after it."""
        cdef Connection *connection = &self.connections[index]
        cdef ssize_t size
        for _ in range(READS):
            size = recv(connection.fd, self.scratch, SCRATCH, 0)
            if size < 0:
                if errno == EINTR:
                    continue
                if errno != EAGAIN:
                    self.fail(index)
                return
            if size == 0:
                self.finish(index)
                return
            if not self.ending:
                self.take(index, size, ends)
                if connection.fd < 0:
                    return
            if size < SCRATCH and not ends:
                return
        # There is more, and there will be no edge for it: watched anew, it is told of again.
        load_watch(self.epoll, EPOLL_CTL_MOD, connection.fd, index, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET)

    cdef void finish(self, uint32_t index) noexcept nogil:
        """Take note of the end of a connection."""
        cdef Connection *connection = &self.connections[index]
        if self.rule == BY_CLOSE and (connection.received or (self.expected != NULL and self.expected_size == 0)):
            if not self.ending:
                self.complete(connection, load_now())
        elif not connection.answered:
            self.fail(index)
            return
        self.close(connection)
        if not self.ending:
            self.open(index)

    cdef void take(self, uint32_t index, ssize_t size, uint32_t ends) noexcept nogil:
        """Compare and count what was received; begin the next exchange if it was the end of an answer."""
        cdef Connection *connection = &self.connections[index]
        cdef ssize_t whole = -1              # bytes of what was received that belong to the answer, once it is whole
        cdef int64_t now
        if connection.answered:
            if not connection.differs:
                self.wrong += 1              # more than the answer
            connection.differs = True
            return
        if self.expected != NULL and not connection.differs and (
            connection.received + size > self.expected_size
            or memcmp(self.scratch, self.expected + connection.received, size) != 0
        ):
            connection.differs = True
            if self.predicted:
                self.scan(connection, self.expected, connection.received)
        connection.received += size
        if self.rule == BY_SIZE:
            if connection.received >= self.answer_size:
                whole = size - <ssize_t>(connection.received - self.answer_size)
        elif self.rule == BY_DELIMITER:
            if not self.predicted or connection.differs:
                whole = self.scan(connection, self.scratch, size)
            elif connection.received == self.expected_size:
                whole = size
        if whole < 0:
            return
        # More than the answer is wrong, and so is an answer to what has not been asked in full.
        connection.differs = connection.differs or whole < size or connection.sent < self.payload_size
        now = load_now()
        self.complete(connection, now)
        connection.answered = True
        if self.reconnect:
            if not ends:
                shutdown(connection.fd, SHUT_WR)  # for a handler that serves its client until the client ends it
        elif connection.sent < self.payload_size:
            self.close(connection)
        else:
            self.begin(connection, now)
            if not self.push(connection):
                self.fail(index)

    cdef ssize_t scan(self, Connection *connection, const uint8_t *data, ssize_t size) noexcept nogil:
        """Look for delimiters; return how many bytes it took to find all of them, or -1."""
        cdef ssize_t i
        for i in range(size):
            while connection.matched and self.delimiter[connection.matched] != data[i]:
                connection.matched = self.fallback[connection.matched - 1]
            connection.matched += self.delimiter[connection.matched] == data[i]
            if connection.matched == self.delimiter_size:
                connection.matched = 0
                connection.found += 1
                if connection.found == self.delimiters:
                    return i + 1
        return -1

    cdef void complete(self, Connection *connection, int64_t now) noexcept nogil:
        if connection.differs or (self.expected != NULL and connection.received != self.expected_size):
            self.wrong += 1
            connection.differs = True
        self.latencies.add(now - connection.begun)

    cdef void turn(self) noexcept:
        cdef int i
        for i in range(self.count):
            if self.connections[i].fd < 0 and not self.ending and not self.failure:
                self.open(i)

    cdef uint64_t end_all(self) except? 0xFFFFFFFF:
        """End every connection and read what is still to come, so that no server sees one reset."""
        cdef int i, open_still
        cdef uint64_t stalled = 0
        cdef int64_t patience = load_now() + PATIENCE
        for i in range(self.count):
            if self.connections[i].fd >= 0:
                # Not answered for long, or not during the whole of a shorter run.
                stalled += (
                    self.ended - self.connections[i].begun > STALLED or self.connections[i].begun < self.counted_from
                )
                shutdown(self.connections[i].fd, SHUT_WR)
        while load_now() < patience:
            open_still = 0
            for i in range(self.count):
                open_still += self.connections[i].fd >= 0
            if not open_still:
                break
            self.run(0.005)
        return stalled


cdef class _Datagrams(_Run):
    """Sockets that each keep a number of datagrams under way.

    Answers carry nothing that tells which datagram they answer, so they are taken to come in order. While a lost
    one is not known to be lost, its place in the window stays empty; when all places are, nothing comes any more,
    just as from a server that is slow or stopped. What tells these apart is a probe, one datagram more: a server that
    answers it, and then nothing else for a while, has lost what it was sent before. Without an answer to the probe
    nothing is counted.
    """

    cdef Sender *senders
    cdef load_batch *batch
    cdef int count, window

    def __init__(self, address, bytes payload, expected, int sockets, int window):
        if sockets < 1 or not 1 <= window <= MAX_WINDOW:
            raise ValueError(f"there must be at least one socket, and 1 to {MAX_WINDOW} datagrams under way")
        if len(payload) > LOAD_PAYLOAD:
            raise ValueError(f"a datagram has at most {LOAD_PAYLOAD} bytes")
        self.prepare(address, payload, expected, <size_t>LOAD_BATCH * LOAD_DATAGRAM)
        self.window = window
        self.count = sockets
        self.batch = load_new_batch(self.scratch, self.payload, self.payload_size)
        self.senders = <Sender *>calloc(sockets, sizeof(Sender))
        if self.senders == NULL or self.batch == NULL:
            raise MemoryError()
        cdef int i
        for i in range(sockets):
            self.senders[i].fd = -1
        for i in range(sockets):
            self.senders[i].fd = load_connect(SOCK_DGRAM, self.host, self.port, self.source())
            if self.senders[i].fd < 0:
                raise OSError(-self.senders[i].fd, _os.strerror(-self.senders[i].fd))
            error = load_watch(self.epoll, EPOLL_CTL_ADD, self.senders[i].fd, i, EPOLLIN)
            if error < 0:
                raise OSError(-error, _os.strerror(-error))

    def __dealloc__(self):
        cdef int i
        if self.senders != NULL:
            for i in range(self.count):
                if self.senders[i].fd >= 0:
                    close_descriptor(self.senders[i].fd)
            free(self.senders)
        free(self.batch)

    cdef int begin_all(self) except -1:
        self.turn()
        return self.check()

    cdef int send(self, Sender *sender, int wanted) noexcept nogil:
        """Send up to so many datagrams and return how many were sent."""
        cdef int64_t now
        cdef int sent = load_send_datagrams(self.batch, sender.fd, wanted)
        if sent < 0:
            self.refuse(sender, -sent)
            return 0
        now = load_now()
        if sender.under_way == 0:
            sender.since = now
        for _ in range(sent):
            sender.times[(sender.first + sender.under_way) % MAX_UNDER_WAY] = now
            sender.under_way += 1
        sender.probed = 0
        return sent

    cdef void fill(self, Sender *sender) noexcept nogil:
        """Send until the window is full."""
        while sender.under_way < self.window and self.send(sender, self.window - sender.under_way) > 0:
            pass

    cdef void refuse(self, Sender *sender, int error) noexcept nogil:
        """Take note of an error. If nobody listens, all that is under way is refused; the next turn tries again."""
        if error == ECONNREFUSED:
            self.refused += max(sender.under_way, 1)
            sender.under_way = 0
        elif error != EAGAIN and error != EINTR and error != ENOBUFS:
            self.failure = error

    cdef void ready(self, uint32_t index, uint32_t events) noexcept nogil:
        cdef Sender *sender = &self.senders[index]
        cdef int i
        cdef int received = load_receive_datagrams(self.batch, sender.fd)
        if received < 0:
            self.refuse(sender, -received)
            return
        cdef int64_t now = load_now()
        if sender.under_way:
            sender.slowest = max(sender.slowest, now - max(sender.since, sender.probed))
        sender.heard = sender.since = now
        for i in range(received):
            if self.expected != NULL and (
                load_size(self.batch, i) != self.expected_size
                or memcmp(self.scratch + <size_t>i * LOAD_DATAGRAM, self.expected, self.expected_size) != 0
            ):
                self.wrong += 1
            if sender.under_way:
                self.latencies.add(now - sender.times[sender.first])
                sender.first = (sender.first + 1) % MAX_UNDER_WAY
                sender.under_way -= 1
            elif sender.given_up:
                sender.given_up -= 1
                self.lost -= self.lost > 0  # it was late, and not lost
            else:
                self.wrong += 1  # nothing was asked
        if not self.ending:
            self.fill(sender)

    cdef void turn(self) noexcept:
        cdef int i
        for i in range(self.count):
            if self.is_silent(&self.senders[i]):
                self.ready(i, EPOLLIN)  # it is this process, perhaps, that was stopped
            if self.is_silent(&self.senders[i]):
                self.doubt(&self.senders[i])
            if not self.ending:
                self.fill(&self.senders[i])

    cdef bint is_silent(self, Sender *sender) noexcept nogil:
        """Return whether answers are awaited for longer than this server ever took."""
        return sender.under_way and load_now() - sender.since > max(PATIENCE, 4 * sender.slowest)

    cdef void doubt(self, Sender *sender) noexcept nogil:
        """Find out why nothing comes."""
        if sender.probed == 0:
            if sender.under_way < MAX_UNDER_WAY and self.send(sender, 1):
                sender.probed = load_now()
        elif sender.heard > sender.probed:
            self.lost += sender.under_way
            sender.given_up += sender.under_way
            sender.under_way = 0

    cdef uint64_t end_all(self) except? 0xFFFFFFFF:
        """Await the answers to what is under way. Sockets without any answer for long stand still."""
        cdef int i, open_still
        cdef uint64_t stalled = 0
        cdef int64_t patience = load_now() + STALLED
        while load_now() < patience:
            open_still = 0
            for i in range(self.count):
                open_still += self.senders[i].under_way > 0
            if not open_still:
                break
            self.run(0.005)
        for i in range(self.count):
            stalled += self.senders[i].under_way > 0 and load_now() - self.senders[i].heard > STALLED
        return stalled


def streams(address, payload, *, answer, expected=None, connections=1, reconnect=False, pipeline=1, seconds=1.0,
            warmup=0.0, sample=None):
    """Exchange a payload for an answer over TCP connections for a time, and return what was measured.

    :param address: ``(host, port)`` of the server, a loopback address.
    :param payload: the bytes to send.
    :param answer: how the end of an answer is known: its size in bytes, a delimiter (bytes), or ``None`` for the
        end of the connection.
    :param expected: the bytes that must come back for one payload; ``None``: they are not compared.
    :param connections: connections at a time.
    :param reconnect: whether each exchange has a connection of its own.
    :param pipeline: payloads sent at once, whose answers are awaited together; latencies are those of the whole.
    :param seconds: how long; ``warmup``: seconds before, which do not count.
    :param sample: called without arguments when the time that counts begins and when it ends.
    :returns: a dict: requests, seconds, requests_per_second; p50_us, p90_us, p99_us and max_us (microseconds);
        errors and what they consist of (refused, broken, wrong, lost, stalled); generator_cpu (share of a core)
        and generator_saturated (above 0.95 of it); samples (the two results of ``sample``).
    :raises ValueError: for arguments that make no sense.
    :raises OSError: if the generator itself runs out of something, descriptors for one.

    An exchange is wrong if its answer differs from ``expected``, or goes on after its end. refused: connections that
    failed before anything was sent; broken: those that ended without a whole answer, each tried again a little later;
    stalled: connections without an answer in the last second of the run, or in all of a shorter one.
    """
    if pipeline < 1:
        raise ValueError("the pipeline must be at least 1 deep")
    run = _Streams(
        address, _bytes(payload) * pipeline, answer, None if expected is None else _bytes(expected) * pipeline,
        connections, reconnect, pipeline,
    )
    return run.measure(warmup, seconds, sample)


def datagrams(address, payload, *, expected=None, sockets=1, window=1, seconds=1.0, warmup=0.0, sample=None):
    """Exchange datagrams over UDP for a time, and return what was measured: as :func:`streams`.

    An answer is taken for that of the datagram that has waited longest, so latencies hold while none is lost. lost:
    datagrams without an answer from a server that answered later ones; refused: those sent while nobody listened;
    stalled: sockets that have no answer at all in the end; wrong: also answers to nothing.

    Sockets times window is what the server may have to hold: a receive buffer of 208 KiB, Linux's default, holds about
    190 small datagrams, and what comes beyond is lost.

    :param sockets: sockets, each with an address of its own.
    :param window: datagrams that each socket keeps under way.
    """
    run = _Datagrams(address, _bytes(payload), None if expected is None else _bytes(expected), sockets, window)
    return run.measure(warmup, seconds, sample)


def _loopback(host):
    """Return the address as a number. Raises ``ValueError`` if it is not one of this machine."""
    try:
        number = int.from_bytes(_socket.inet_pton(_socket.AF_INET, host), "big")
    except OSError:
        raise ValueError(f"{host!r} is not an IPv4 address") from None
    if number >> 24 != 127:
        raise ValueError(f"{host} is not a loopback address: load is for servers on this machine")
    return number


def _bytes(data):
    return bytes(memoryview(data))  # unlike bytes(data), not for a number


class Idle:
    """Connections that are opened and held, and send at most a first payload. A context manager.

    :param address: ``(host, port)`` of the server, a loopback address.
    :param count: how many.
    :param payload: bytes that each sends at first, and for which it awaits as many; empty: none.
    :raises ValueError: if the server is not on this machine.
    :raises OSError: if a connection fails, ``TimeoutError`` if an echo does not come in ten seconds.
    """

    def __init__(self, address, count, payload=b""):
        self._sockets = []
        _loopback(address[0])
        try:
            for number in range(count):
                client = _socket.socket()
                self._sockets.append(client)
                client.settimeout(10)
                client.setsockopt(_socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
                client.bind((f"127.0.0.{2 + number % SOURCES}", 0))
                client.connect(address)
                if payload:
                    client.sendall(payload)
                    received = b""
                    while len(received) < len(payload):
                        more = client.recv(65536)
                        if not more:
                            raise ConnectionResetError("the server ended an idle connection")
                        received += more
        except BaseException:
            self.close()
            raise

    def close(self):
        """Close all connections."""
        for client in self._sockets:
            client.close()
        self._sockets.clear()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()
