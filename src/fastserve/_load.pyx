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


include "_load_streams.pxi"
include "_load_datagrams.pxi"


def streams(address, payload, *, answer, expected=None, connections=1, reconnect=False, together=False, pipeline=1,
            seconds=1.0, warmup=0.0, sample=None):
    """Exchange a payload for an answer over TCP connections for a time, and return what was measured.

    :param address: ``(host, port)`` of the server, a loopback address.
    :param payload: the bytes to send.
    :param answer: how the end of an answer is known: its size in bytes, a delimiter (bytes), or ``None`` for the
        end of the connection.
    :param expected: the bytes that must come back for one payload; ``None``: they are not compared.
    :param connections: connections at a time.
    :param reconnect: whether each exchange has a connection of its own.
    :param together: whether no connection goes on before each was answered once, for which up to a second is waited
        before the warm-up. A server that is busy with the first ones may come to accept no others.
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
    if together and (reconnect or answer is None):
        raise ValueError("connections that end with each exchange cannot begin together")
    run = _Streams(
        address, _bytes(payload) * pipeline, answer, None if expected is None else _bytes(expected) * pipeline,
        connections, reconnect, together, pipeline,
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
