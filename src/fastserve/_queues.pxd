# What waits in a hub: a ring of those that are ready, and a heap of those with a deadline. Neither knows what it holds;
# who puts something in sees to references. Each function that needs memory returns -1 if there is none.

from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from libc.math cimport INFINITY

cdef struct Ring:
    void **items
    size_t room  # a power of 2
    size_t head, count


cdef inline int ring_put(Ring *ring, void *item) noexcept:
    cdef void **grown
    cdef size_t i, room
    if ring.count == ring.room:
        room = max(ring.room * 2, <size_t>64)
        grown = <void **>PyMem_Malloc(room * sizeof(void *))
        if grown == NULL:
            return -1
        for i in range(ring.count):
            grown[i] = ring.items[(ring.head + i) & (ring.room - 1)]
        PyMem_Free(ring.items)
        ring.items = grown
        ring.room = room
        ring.head = 0
    ring.items[(ring.head + ring.count) & (ring.room - 1)] = item
    ring.count += 1
    return 0


cdef inline void *ring_take(Ring *ring) noexcept:
    """Take what was put in first. The ring is not empty."""
    cdef void *item = ring.items[ring.head]
    ring.head = (ring.head + 1) & (ring.room - 1)
    ring.count -= 1
    return item


# A timer is part of what it is for, and knows its place, so that its deadline can be changed where it is.
cdef struct Timer:
    void *owner
    double deadline
    Py_ssize_t place  # in the heap, -1 outside


cdef struct Heap:
    Timer **items  # items[0] has the earliest deadline
    Py_ssize_t count, room


cdef inline void timer_init(Timer *timer, void *owner) noexcept:
    timer.owner = owner
    timer.deadline = INFINITY
    timer.place = -1


cdef inline void sift_up(Heap *heap, Py_ssize_t i) noexcept:
    cdef Timer *moved = heap.items[i]
    cdef Py_ssize_t above
    while i > 0:
        above = (i - 1) >> 1
        if heap.items[above].deadline <= moved.deadline:
            break
        heap.items[i] = heap.items[above]
        heap.items[i].place = i
        i = above
    heap.items[i] = moved
    moved.place = i


cdef inline void sift_down(Heap *heap, Py_ssize_t i) noexcept:
    cdef Timer *moved = heap.items[i]
    cdef Py_ssize_t below
    while True:
        below = 2 * i + 1
        if below >= heap.count:
            break
        if below + 1 < heap.count and heap.items[below + 1].deadline < heap.items[below].deadline:
            below += 1
        if moved.deadline <= heap.items[below].deadline:
            break
        heap.items[i] = heap.items[below]
        heap.items[i].place = i
        i = below
    heap.items[i] = moved
    moved.place = i


cdef inline int heap_put(Heap *heap, Timer *timer, double deadline) noexcept:
    """Put a timer in, or give one that is in an earlier deadline."""
    cdef Timer **grown
    if timer.place < 0:
        if heap.count == heap.room:
            grown = <Timer **>PyMem_Realloc(heap.items, (heap.room * 2 + 64) * sizeof(Timer *))
            if grown == NULL:
                return -1
            heap.items = grown
            heap.room = heap.room * 2 + 64
        heap.items[heap.count] = timer
        timer.place = heap.count
        heap.count += 1
    timer.deadline = deadline
    sift_up(heap, timer.place)
    return 0


cdef inline void heap_put_off(Heap *heap, double deadline) noexcept:
    """Give the first timer a later deadline."""
    heap.items[0].deadline = deadline
    sift_down(heap, 0)


cdef inline void *heap_take(Heap *heap) noexcept:
    """Take the timer with the earliest deadline; return its owner. The heap is not empty."""
    cdef Timer *timer = heap.items[0]
    heap.count -= 1
    if heap.count:
        heap.items[0] = heap.items[heap.count]
        heap.items[0].place = 0
        sift_down(heap, 0)
    timer.place = -1
    timer.deadline = INFINITY
    return timer.owner
