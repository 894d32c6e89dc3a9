# The load of datagrams: a part of _load.pyx.

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
