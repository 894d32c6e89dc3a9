# The load of streams: a part of _load.pyx.

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
    cdef bint together                       # whether all connections are answered once before any goes on
    cdef bint gathering                      # whether that is awaited

    def __init__(self, address, bytes payload, answer, expected, int connections, bint reconnect, bint together,
                 int repeats):
        cdef int i
        cdef Connection trial
        if connections < 1:
            raise ValueError("there must be at least one connection")
        self.prepare(address, payload, expected, SCRATCH)
        self.repeats = repeats
        self.reconnect = reconnect
        self.together = together
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
        self.check()
        if self.together:
            self.gather()
        return 0

    cdef int gather(self) except -1:
        """Let no connection go on before each was answered once, or some stand still."""
        cdef int i, gathered
        cdef int64_t patience = load_now() + STALLED
        self.gathering = True
        while load_now() < patience:
            gathered = 0
            for i in range(self.count):
                gathered += self.connections[i].fd >= 0 and self.connections[i].answered
            if gathered == self.count:
                break
            self.run(0.01)
        self.gathering = False
        for i in range(self.count):
            if self.connections[i].fd >= 0 and self.connections[i].answered:
                self.again(i, load_now())
        return 0

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
        elif not self.gathering:
            self.again(index, now)

    cdef void again(self, uint32_t index, int64_t now) noexcept nogil:
        """Begin the next exchange on a connection."""
        cdef Connection *connection = &self.connections[index]
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
