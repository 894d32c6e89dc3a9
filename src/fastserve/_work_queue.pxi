# The queue of a pool of threads: a part of _threads.pyx.

from collections import deque as _deque


cdef struct Waiter:
    PyThread_type_lock wakeup  # held until there may be something
    Waiter *next


cdef class WorkQueue:
    """What :class:`queue.SimpleQueue` is, for the threads of a pool; it wakes as few of them as it can.

    At most one thread is on its way from being woken to having the GIL. When it has taken its item, and there are
    more, it wakes the next. So a thread that is free in the meantime takes several items of a burst, and every item
    still finds a thread while there is an idle one. ``SimpleQueue`` wakes another one in vain after each item. The last
    thread to wait is the first to be woken. The GIL guards all fields, or the critical section of the object.
    """

    cdef object items, append, popleft  # a deque that nobody else can reach: its own lock is always free
    cdef Waiter *waiting
    cdef bint is_coming  # a thread that was woken and does not run yet
    cdef Waiter *spare  # to be used again; a thread that wakes one may still be about to let go of its lock

    def __cinit__(self):
        self.items = _deque()
        self.append = self.items.append
        self.popleft = self.items.popleft

    def __dealloc__(self):
        # Nobody waits, for who does has a reference. In a forked child some seem to: threads that it does not have.
        cdef Waiter *waiter
        while self.spare != NULL:
            waiter = self.spare
            self.spare = waiter.next
            PyThread_free_lock(waiter.wakeup)
            free(waiter)

    def put(self, item):
        """Add an item, and wake a thread that waits for one. It never waits."""
        with cython.critical_section(self):
            self.append(item)
            self.wake_one()

    cdef void wake_one(self) noexcept:
        """Wake a thread, if one waits and none is on its way already: that one wakes the next if there is more."""
        cdef Waiter *waiter = self.waiting
        if waiter != NULL and not self.is_coming:
            self.waiting = waiter.next
            self.is_coming = True
            PyThread_release_lock(waiter.wakeup)

    def get(self, block=True):
        """Remove and return the oldest item, and wait for one; raise :class:`queue.Empty` if it may not wait.

        No signal handler runs while it waits: it is not for the main thread.
        """
        cdef Waiter *waiter = NULL
        while True:
            with cython.critical_section(self):
                if waiter != NULL:  # it was woken
                    waiter.next = self.spare
                    self.spare = waiter
                    self.is_coming = False
                if self.items:
                    item = self.popleft()
                    if self.items:
                        self.wake_one()
                    return item
                if not block:
                    from queue import Empty  # with heapq and two shared libraries: what few programs need

                    raise Empty
                waiter = self.spare
                if waiter == NULL:
                    waiter = new_waiter()
                else:
                    self.spare = waiter.next
                waiter.next = self.waiting
                self.waiting = waiter
            with nogil:
                PyThread_acquire_lock(waiter.wakeup, WAIT_LOCK)

    def get_nowait(self):
        """Remove and return the oldest item; raise :class:`queue.Empty` if there is none."""
        return self.get(False)

    def empty(self):
        """Return whether there is no item."""
        return not self.items

    def qsize(self):
        """Return how many items there are."""
        return len(self.items)


cdef Waiter *new_waiter() except NULL:
    cdef Waiter *waiter = <Waiter *>calloc(1, sizeof(Waiter))
    if waiter == NULL:
        raise MemoryError()
    waiter.wakeup = new_held_lock()
    if waiter.wakeup == NULL:
        free(waiter)
        raise MemoryError()
    return waiter
