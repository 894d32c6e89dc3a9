# The greenlet hub, as the connections that wait in it see it.

from cpython.ref cimport PyObject
from libc.stdint cimport uint32_t, uint64_t

from fastserve._queues cimport Heap, Ring, Timer
from fastserve._syscalls cimport epoll_event

cdef extern from "_hub.h" nogil:
    enum:
        EPOLLIN
        EPOLLOUT
        EPOLLPRI
        EPOLLERR
        EPOLLHUP
        EPOLLRDHUP
        EPOLL_CTL_ADD
        EPOLL_CTL_MOD
        EPOLL_CTL_DEL
        FS_EVERYTHING
    int fs_watch(int, int, int, uint32_t, uint64_t)
    uint64_t fs_tag(const epoll_event *)

cdef extern from "_hub.h":
    Py_ssize_t fs_recv_new(int, PyObject **, Py_ssize_t, char *, Py_ssize_t) except? -1

cdef enum:
    MAX_EVENTS = 256  # events taken from the kernel at a time
    SCRATCH = 262144  # bytes received at a time
    LARGE = 8192  # bytes; what is received is not copied from the scratch from here on
    CORK = 65536  # bytes of replies gathered while requests are left to read
    # What a greenlet may do until it is the turn of others: 32 calls of the kernel that succeed, or 256 reads of what
    # was received already, or 128 KiB received; some 0.3 ms.
    BUDGET = 256
    CALL = 8
    PER_UNIT = 512  # bytes received


# What the hub knows of a descriptor. It belongs to a connection until that is closed; the generation tells an event of
# an earlier owner.
cdef struct Slot:
    void *owner  # the connection, borrowed; NULL: nobody's
    void *reader  # the Task that waits to read, a reference; NULL: none
    void *writer  # the Task that waits to write, a reference
    void *others  # a list of further Tasks that wait for anything, a reference; NULL: none
    bint unread  # something that was received is still in the rfile
    uint32_t generation
    bint registered  # with epoll, for good
    bint drained  # the last read got less than it asked for: without an event there is nothing to read
    bint exposed  # somebody has the descriptor itself: nothing is gathered
    bint peculiar  # a short read does not mean that: it is a Unix socket, or has been hung up, or has urgent data


cdef class Hub

cdef class Task:
    cdef object greenlet
    cdef Hub hub
    cdef object function, arguments
    cdef double deadline  # of the wait, INFINITY without one
    cdef Timer timer  # in the heap, of a wait or of an earlier one
    cdef bint begun, woken, queued, timed_out, ending
    cdef readonly bint killed

    cdef bint has_run(self, PyObject *result, object context) except -1


cdef class Hub:
    cdef int epoll
    cdef Slot *slots
    cdef int slot_count
    cdef epoll_event events[MAX_EVENTS]
    cdef int event_count, next_event
    cdef readonly Task root
    cdef Task current
    cdef Task urgent  # who is to go on before all others
    cdef Task beginning  # who the root is to switch to
    cdef Ring ready  # Tasks, references
    cdef size_t ready_in_turn
    cdef Heap timers  # of Tasks, references
    cdef list pool, root_ready
    cdef dict tasks  # by greenlet
    cdef set root_fds, muted
    cdef bint root_waits, root_drains
    cdef object failure
    cdef object posted, wakeup
    cdef int wakeup_fd
    cdef bint notified
    cdef readonly bint idle
    cdef bint watcher_sleeps
    cdef object watcher
    cdef readonly Py_ssize_t active
    cdef readonly unsigned long long progress  # grows whenever somebody goes on
    cdef readonly bint stale
    cdef int budget
    cdef readonly unsigned long owner
    cdef char *scratch
    cdef Py_ssize_t expected  # bytes that were received last, if LARGE
    cdef char *cork
    cdef Py_ssize_t corked
    cdef object cork_owner
    cdef public object server  # whose requests the tasks handle
    cdef public object thread  # that runs it
    cdef public object executor  # of tasks.to_thread()

    cdef int wait_as_root(self, double deadline) except -1
    cdef Slot *slot_of(self, object connection, int fd) except NULL
    cdef void clear_slot(self, int fd)
    cdef void forget_slot(self, int fd)
    cdef int grow(self, int fd) except -1
    cdef Task this_task(self)
    cdef int wait_for(self, object connection, int fd, bint writing, double deadline) except -1
    cdef int watch_slot(self, Slot *slot, int fd) except -1
    cdef int wait_too(self, Slot *slot, Task me) except -1
    cdef int wait_failed(self, Task me, int fd, uint32_t generation) except -1
    cdef int stop_waiting(self, Task me, int fd, uint32_t generation) except -1
    cdef int switch(self, Task me, Task target) noexcept
    cdef int refuse(self) except -1
    cdef Task next_task(self)
    cdef Task dispatch(self, epoll_event *event)
    cdef int collect(self) except? -2
    cdef int wake_task(self, Task task) except -1
    cdef Task pop_ready(self)
    cdef int set_timer(self, Task task) except -1
    cdef void drop_top(self)
    cdef int fire_timers(self) except -1
    cdef int take_posted(self) except -1
    cdef int spend(self) except -1
    cdef int flush(self) except -1
    cdef int end_flush(self) except -1
    cdef int finished(self, Task task) except -1


cdef Hub running_hub()
cdef double deadline_of(object connection) except -1.0
cdef int send_all(Hub hub, object connection, const char *data, Py_ssize_t size, double deadline) except -1
cdef int forget(int fd) except -1
