# cython: language_level=3, embedsignature=True
"""The C twin of the greenlet hub. Its contract and its types are those of ``_hub_py``.

There is no central loop that everything goes through. Whoever has to wait looks itself for what is to go on: it takes
the next event, or asks the kernel for more, and switches straight to the greenlet that the event is for.

A switch copies the C stack of the greenlet that waits, from its first function to the switch, and every connection
that waits keeps that copy. So the functions on this way have small frames: what they rarely do is in functions of its
own, and they hear of exceptions by their results (``raised``), as a ``try`` costs a hundred bytes of the frame.
"""

import os as _os
import threading as _threading
from collections import deque as _deque

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF, PyObject
from libc.errno cimport EAGAIN, EEXIST, EINTR
from libc.math cimport INFINITY, ceil
from libc.stdlib cimport free
from libc.string cimport memset

from fastserve import _core, _waiting
from fastserve._clock cimport MAX_WAIT, now
from fastserve._errors cimport error_of, raised
from fastserve._queues cimport heap_put, heap_put_off, heap_take, ring_put, ring_take, timer_init
from fastserve._sockets cimport descriptor_of, family_of, timeout_of, type_of
from fastserve._syscalls cimport (
    AF_INET, AF_INET6, MSG_DONTWAIT, close_descriptor, epoll_event, fs_epoll_create, fs_epoll_wait, fs_send,
)

from greenlet import GreenletExit

cdef extern from "greenlet.h":
    ctypedef struct PyGreenlet:
        pass
    void PyGreenlet_Import()
    PyGreenlet *PyGreenlet_New(PyObject *, PyGreenlet *) except NULL
    PyGreenlet *PyGreenlet_GetCurrent() except NULL
    PyObject *PyGreenlet_Switch(PyGreenlet *, PyObject *, PyObject *)  # NULL: an exception is set

cdef extern from "_hub.h" nogil:
    enum:
        SOCK_STREAM
    void *fs_hub_get()
    void fs_hub_set(void *)
    void *fs_frames_begin()
    void fs_frames_end(void *)

cdef extern from "<stdlib.h>":
    void *aligned_alloc(size_t, size_t)

cdef extern from "Python.h":
    PyObject *PyObject_Call(PyObject *, PyObject *, PyObject *)  # NULL: an exception is set
    object PyContext_New()
    int PyContext_Enter(object) except -1
    int PyContext_Exit(object) except -1

PyGreenlet_Import()

cdef enum:
    PAGE = 4096  # bytes
    POOLED = 512  # greenlets kept for later requests; each holds some 6 KiB

# What a forked child inherits of its parent's hub. Were it collected there, the handlers would be ended in the child,
# and with them the connections of the parent.
cdef list _inherited = []
cdef list _hubs = _waiting.hubs


cdef Hub running_hub():
    cdef void *found = fs_hub_get()
    return None if found == NULL else <Hub>found


cdef double deadline_after(object timeout) except -1.0:
    """Return when so many seconds from now have passed: INFINITY for ``None``."""
    return INFINITY if timeout is None else now() + min(max(<double>timeout, 0.0), MAX_WAIT)


cdef double deadline_of(object connection) except -1.0:
    """Return until when an operation may wait: INFINITY, or 0.0 if it must not wait."""
    cdef double timeout = timeout_of(connection)
    if timeout < 0.0:
        return INFINITY
    return now() + min(timeout, MAX_WAIT) if timeout > 0.0 else 0.0


cdef int fail(int code) except -1:
    """Raise the ``OSError`` of an errno."""
    raise error_of(code)


cdef int park(Hub hub, Task me, double deadline) except -1:
    """Let others go on until somebody wakes the calling greenlet, or the deadline comes."""
    cdef Task target
    if hub.corked or hub.stale or hub.epoll < 0:
        hub.refuse()
    if me.killed:
        raise GreenletExit
    me.timed_out = me.woken = False
    me.deadline = deadline
    if deadline < me.timer.deadline:
        hub.set_timer(me)
    while not me.woken:
        target = hub.next_task()
        if target is me:
            break
        if hub.switch(me, target) < 0:
            me.deadline = INFINITY
            raised()
    me.deadline = INFINITY  # its place in the heap remains: mostly the next wait has a later deadline
    hub.budget = BUDGET
    if me.killed:
        raise GreenletExit
    if hub.failure is not None and me is hub.root:
        hub.raise_failure()
    return 0


ctypedef int (*Park)(Hub, Task, double) noexcept

# The same for who looks at the result: below zero if an exception is set.
cdef Park park_quietly = <Park>park


cdef class Task:
    """What a greenlet of the hub does, and what it waits for."""

    def __cinit__(self, Hub hub):
        self.hub = hub
        self.deadline = INFINITY
        timer_init(&self.timer, <void *>self)

    def __call__(self):
        """Run requests, one after the other: the greenlet's life."""
        cdef void *frames = fs_frames_begin()
        cdef PyObject *result
        cdef int parked = 0
        while parked == 0 and self.function is not None:
            context = PyContext_New()
            PyContext_Enter(context)
            # One that was killed before it began too: it releases what it was given, and its waits raise.
            result = PyObject_Call(<PyObject *>self.function, <PyObject *>self.arguments, NULL)
            if not self.has_run(result, context):
                break
            context = None
            parked = park_quietly(self.hub, self, INFINITY)
            while parked == 0 and self.function is None and not self.ending:
                parked = park_quietly(self.hub, self, INFINITY)  # it was woken for a request that has ended
        fs_frames_end(frames)
        if parked < 0:
            raised()
        self.deadline = INFINITY  # its timer may still be in the heap
        del self.hub.tasks[self.greenlet]
        # The greenlet goes on in its parent, the root, which looks again what there is to do.

    cdef bint has_run(self, PyObject *result, object context) except -1:
        """Note the end of a request; return whether the greenlet is in the pool, and to wait for another one."""
        cdef Hub hub = self.hub
        try:
            try:
                if result == NULL:
                    raised()
                Py_DECREF(<object>result)
            finally:
                if hub.corked:
                    hub.end_flush()
        except GreenletExit:
            pass
        except BaseException as error:
            hub.failure = error
        finally:
            PyContext_Exit(context)
        if hub.stale:
            # A child that a handler has forked, and whose handler has returned: with threads it would end here.
            _os._exit(0)
        self.function = self.arguments = None
        self.killed = False
        hub.finished(self)
        if len(hub.pool) >= POOLED or self.ending or hub.epoll < 0:
            return False
        hub.pool.append(self)
        return True


cdef class Hub:
    """The greenlets of one thread, and all that they wait for."""

    def __cinit__(self):
        self.epoll = -1
        # At the beginning of a page: copies to and from an odd address take several times as long on some processors.
        self.scratch = <char *>aligned_alloc(PAGE, SCRATCH)
        self.cork = <char *>aligned_alloc(PAGE, CORK)
        if self.scratch == NULL or self.cork == NULL:
            raise MemoryError()

    def __init__(self):
        cdef int result = fs_epoll_create()
        if result < 0:
            raise error_of(-result)
        self.epoll = result
        self.owner = _threading.get_ident()
        self.pool = []
        self.tasks = {}
        self.root_ready = []
        self.root_fds = set()
        self.muted = set()
        self.posted = _deque()
        self.budget = BUDGET
        self.wakeup = _core.Wakeup()
        self.wakeup_fd = self.wakeup.fileno()
        self.root = self.current = Task(self)
        self.root.greenlet = <object>PyGreenlet_GetCurrent()
        Py_DECREF(self.root.greenlet)
        self.root.woken = True
        self.register(self.wakeup_fd)
        _waiting.hubs.append(self)

    def __dealloc__(self):
        cdef int i
        if self.epoll >= 0:
            close_descriptor(self.epoll)
        for i in range(self.slot_count):
            Py_XDECREF(<PyObject *>self.slots[i].reader)
            Py_XDECREF(<PyObject *>self.slots[i].writer)
            Py_XDECREF(<PyObject *>self.slots[i].others)
        while self.ready.count:
            self.pop_ready()
        while self.timers.count:
            self.drop_top()
        PyMem_Free(self.slots)
        PyMem_Free(self.ready.items)
        PyMem_Free(self.timers.items)
        free(self.scratch)
        free(self.cork)

    # The life of a hub: its thread enters it, and connections wait in it until it is left.

    def enter(self):
        if fs_hub_get() != NULL:
            raise RuntimeError("a hub runs in this thread already")
        if _threading.get_ident() != self.owner:
            raise RuntimeError("a hub runs in the thread that has made it")
        fs_hub_set(<void *>self)
        _waiting.local.hub = self

    def leave(self):
        if fs_hub_get() == <void *>self:
            fs_hub_set(NULL)
            _waiting.local.hub = None

    def close(self):
        """Watch no more for the root, whose poller this is."""
        for fd in list(self.root_fds):
            if fd != self.wakeup_fd:
                self.unregister(fd)
        self.root_ready.clear()

    def end(self):
        """End the greenlets of the pool, and release the descriptors. Called by the root, when no task runs."""
        cdef Task task
        if self.epoll < 0 or self.stale:
            return
        while self.pool:
            task = self.pool.pop()
            task.ending = True
            task.woken = True
            if self.switch(self.root, task) < 0:
                raised()
        while self.timers.count:
            # Of waits that were over before their deadline: the garbage collector does not see these references.
            self.drop_top()
        close_descriptor(self.epoll)
        self.epoll = -1
        _waiting.hubs.remove(self)
        self.wakeup.close()

    def forget_parent(self):
        """Called in a forked child: nothing of this hub, which the child shares with its parent, is used again."""
        self.stale = True
        self.corked = 0
        self.cork_owner = None
        self.leave()
        _inherited.append(self)

    # The interface of a poller, for the root.

    def register(self, int fd):
        cdef int result
        if fd < 0:
            raise ValueError(f"Invalid file descriptor: {fd}")
        result = fs_watch(self.epoll, EPOLL_CTL_ADD, fd, EPOLLIN, <uint64_t>fd)
        if result < 0:
            raise error_of(-result)
        self.root_fds.add(fd)

    def unregister(self, int fd):
        if fd in self.root_fds and not self.stale:  # a forked child shares the epoll of its parent
            self.root_fds.remove(fd)
            self.muted.discard(fd)
            if fd in self.root_ready:
                self.root_ready.remove(fd)
            fs_watch(self.epoll, EPOLL_CTL_DEL, fd, 0, 0)  # it may have been closed: the kernel has forgotten it then

    def wait(self, timeout=None):
        cdef list found
        self.wait_as_root(deadline_after(timeout))
        found, self.root_ready = self.root_ready, []
        return found

    def wait_for_one(self, int fd):
        """Wait endlessly; return whether this descriptor is ready, and no other one."""
        self.wait_as_root(INFINITY)
        ready = len(self.root_ready) == 1 and <int>self.root_ready[0] == fd
        self.root_ready.clear()
        return ready

    def pending(self):
        """Return how many tasks may go on and wait for their turn, at about this moment. Any thread may call it."""
        return self.ready.count + max(self.event_count - self.next_event, 0)

    cdef int wait_as_root(self, double deadline) except -1:
        if self.muted:
            for fd in self.muted:
                fs_watch(self.epoll, EPOLL_CTL_MOD, fd, EPOLLIN, <uint64_t><int>fd)
            self.muted.clear()
        if not self.root_ready:
            self.root_waits = True
            try:
                park(self, self.root, deadline)
            finally:
                self.root_waits = False
        return 0

    # Tasks.

    def start(self, function, *arguments):
        """Begin a task at once, in the caller's place; go on when it waits for the first time, or has ended."""
        cdef Task task, me
        if self.corked:
            self.flush()
        task = self.new_task(function, arguments)
        me = self.this_task()
        if self.urgent is not None:  # only one can be next
            self.wake_task(task)
            return
        me.woken = False
        self.urgent = me
        task.begun = task.woken = True
        if self.switch(me, task) < 0:
            raised()
        while not me.woken:
            task = self.next_task()
            if task is not me and self.switch(me, task) < 0:
                raised()
        self.budget = BUDGET
        if self.failure is not None and me is self.root:
            self.raise_failure()

    def spawn(self, function, *arguments):
        """Begin a task when it is its turn. The calling greenlet goes on."""
        self.wake_task(self.new_task(function, arguments))

    def new_task(self, function, arguments):
        cdef Task task
        if self.pool:
            task = self.pool.pop()
        else:
            task = Task(self)
            task.greenlet = <object>PyGreenlet_New(<PyObject *>task, <PyGreenlet *>self.root.greenlet)
            Py_DECREF(task.greenlet)
            self.tasks[task.greenlet] = task
        task.function = function
        task.arguments = arguments
        self.active += 1
        return task

    def this(self):
        """Return the task of the calling greenlet."""
        return self.this_task()

    def park(self, timeout=None):
        """Wait for ``wake`` or ``post``; return whether it came, and not the timeout. It may return for nothing."""
        cdef Task me
        if self.corked:
            # What comes while that has to wait wakes nobody a second time: the caller looks again what it waits for.
            self.flush()
            return True
        me = self.this_task()
        park(self, me, deadline_after(timeout))
        return not me.timed_out

    def wake(self, Task task):
        self.wake_task(task)

    def post(self, task):
        """Wake a task, from any thread."""
        self.posted.append(task)
        if not self.notified:
            self.notified = True
            self.wakeup.set()

    def drain(self, timeout=None):
        """Let the tasks go on until all have ended; return whether they have. The root calls it."""
        cdef double deadline = deadline_after(timeout)
        if self.stale:
            return True  # they are the parent's
        self.root_drains = True
        try:
            while self.active:
                park(self, self.root, deadline)
                if self.root.timed_out:
                    break
        finally:
            self.root_drains = False
        return self.active == 0

    def kill(self):
        """Have every wait of every task raise ``GreenletExit``, from now on."""
        cdef Task task
        for task in self.tasks.values():
            if task.function is not None and task is not self.current:
                task.killed = True
                self.wake_task(task)

    def pace(self):
        if self.budget <= 0:
            self.spend()
        self.budget -= CALL

    def arguments(self):
        """Return the arguments of the tasks that run, for whoever looks from another thread."""
        cdef Task task = self.current
        return None if task is None else task.arguments

    def forget(self, int fd):
        self.forget_slot(fd)

    cdef void forget_slot(self, int fd):
        """Do what ``forget`` does; the descriptor is still open, so that no other connection has its number."""
        if 0 <= fd < self.slot_count and self.slots[fd].owner != NULL:
            self.clear_slot(fd)

    def watch(self, watcher):
        """Call ``watcher.set()`` when the hub has something to do again."""
        self.watcher = watcher
        self.watcher_sleeps = True

    cdef Task this_task(self):
        cdef PyObject *mine = <PyObject *>PyGreenlet_GetCurrent()
        cdef Task task = self.current
        cdef object greenlet = <object>mine
        Py_DECREF(greenlet)
        if task.greenlet is greenlet:
            return task
        # A greenlet that a handler has made itself, or one that it has left for another and come back to.
        if self.root.greenlet is greenlet:
            task = self.root
        else:
            task = self.tasks.get(greenlet)
            if task is None:
                task = Task(self)
                task.greenlet = greenlet
        task.woken = True  # it runs
        self.current = task
        return task

    cdef int finished(self, Task task) except -1:
        self.active -= 1
        if self.failure is not None or (self.root_drains and self.active == 0):
            self.wake_task(self.root)
        return 0

    def raise_failure(self):
        error, self.failure = self.failure, None
        raise error

    # Descriptors.

    cdef int grow(self, int fd) except -1:
        cdef int room = max(self.slot_count * 2, fd + 1, 64)
        cdef Slot *grown = <Slot *>PyMem_Realloc(self.slots, room * sizeof(Slot))
        if grown == NULL:
            raise MemoryError()
        memset(grown + self.slot_count, 0, (room - self.slot_count) * sizeof(Slot))
        self.slots = grown
        self.slot_count = room
        return 0

    cdef Slot *slot_of(self, object connection, int fd) except NULL:
        """Return the slot of a connection, which becomes its own if it is not yet."""
        if fd >= self.slot_count:
            self.grow(fd)
        if self.slots[fd].owner != <void *>connection:
            self.clear_slot(fd)
            self.slots[fd].owner = <void *>connection
            # A short read tells that nothing is left for a stream of TCP alone: that of a Unix socket ends where a
            # message carries descriptors, that of a datagram socket with each datagram.
            self.slots[fd].peculiar = (
                type_of(connection) != SOCK_STREAM or family_of(connection) not in (AF_INET, AF_INET6)
            )
        return &self.slots[fd]

    cdef void clear_slot(self, int fd):
        """Make a slot nobody's. Who waits for it looks again, and finds its connection closed."""
        cdef Slot *slot = &self.slots[fd]
        slot.owner = NULL
        slot.generation += 1
        slot.registered = slot.drained = slot.peculiar = slot.exposed = False
        slot.unread = False
        if slot.reader != NULL or slot.writer != NULL or slot.others != NULL:
            for task in self.take_waiting(fd):
                if _threading.get_ident() == self.owner:
                    self.wake_task(task)
                else:
                    self.post(task)

    def take_waiting(self, int fd):
        """Return the tasks that wait for a descriptor, which then do so no longer."""
        cdef Slot *slot = &self.slots[fd]
        cdef list found = []
        if slot.others != NULL:
            found = <list>slot.others
            Py_DECREF(found)
            slot.others = NULL
        if slot.writer != NULL:
            found.insert(0, <object>slot.writer)
            Py_DECREF(<object>slot.writer)
            slot.writer = NULL
        if slot.reader != NULL:
            found.insert(0, <object>slot.reader)
            Py_DECREF(<object>slot.reader)
            slot.reader = NULL
        return found

    cdef int wait_for(self, object connection, int fd, bint writing, double deadline) except -1:
        """Wait until the connection may be read, or written to. The caller has tried, or knows that it would wait.

        Raises ``BlockingIOError`` if it must not wait, ``TimeoutError`` at the deadline.
        """
        cdef Task me
        cdef Slot *slot
        cdef uint32_t generation
        if deadline == 0.0:
            fail(EAGAIN)
        if self.corked:
            self.flush()
            return 0  # there may have been a wait, in which what is waited for here has happened
        slot = self.slot_of(connection, fd)
        if not slot.registered:
            self.watch_slot(slot, fd)
        me = self.this_task()
        if not writing and slot.reader == NULL:
            Py_INCREF(me)
            slot.reader = <void *>me
        elif writing and slot.writer == NULL:
            Py_INCREF(me)
            slot.writer = <void *>me
        else:
            self.wait_too(slot, me)
        generation = slot.generation
        if park_quietly(self, me, deadline) < 0:
            self.wait_failed(me, fd, generation)
        slot = &self.slots[fd]
        if me.timed_out or slot.reader == <void *>me or slot.writer == <void *>me or slot.others != NULL:
            self.stop_waiting(me, fd, generation)
        return 0

    cdef int wait_failed(self, Task me, int fd, uint32_t generation) except -1:
        """Raise the exception that is set, and has ended a wait."""
        me.timed_out = False
        me.deadline = INFINITY
        try:
            raised()
        finally:
            self.stop_waiting(me, fd, generation)

    cdef int watch_slot(self, Slot *slot, int fd) except -1:
        """Have the kernel tell what happens to a connection, for good."""
        cdef int result
        cdef uint64_t tag
        if slot.generation == 0:
            slot.generation = 1  # 0 is the root's
        tag = (<uint64_t>slot.generation << 32) | <uint32_t>fd
        if fd in self.root_fds:  # what the root watched was closed, and the number is a connection's by now
            self.root_fds.remove(fd)
            self.muted.discard(fd)
        result = fs_watch(self.epoll, EPOLL_CTL_ADD, fd, FS_EVERYTHING, tag)
        if result == -EEXIST:  # the descriptor came here by another object, or is one of several of the same file
            result = fs_watch(self.epoll, EPOLL_CTL_MOD, fd, FS_EVERYTHING, tag)
        if result < 0:
            raise error_of(-result)
        slot.registered = True
        return 0

    cdef int wait_too(self, Slot *slot, Task me) except -1:
        """Note one more that waits for a connection for which somebody waits already."""
        cdef list others
        if slot.others == NULL:
            others = []
            Py_INCREF(others)
            slot.others = <void *>others
        (<list>slot.others).append(me)
        return 0

    def wait_io(self, connection, int fd, bint writing, deadline):
        if descriptor_of(connection) != fd:
            return  # another thread has closed it meanwhile
        self.wait_for(connection, fd, writing, INFINITY if deadline is None else <double>deadline)

    def expose(self, connection, int fd):
        if self.corked and self.cork_owner is connection:
            self.flush()
        if descriptor_of(connection) == fd:
            self.slot_of(connection, fd).exposed = True

    def send_gathered(self):
        if self.corked:
            self.flush()

    cdef int stop_waiting(self, Task me, int fd, uint32_t generation) except -1:
        """Forget that a task waits for a connection. Raises ``TimeoutError`` if it has waited too long."""
        cdef Slot *slot = &self.slots[fd]
        if slot.generation == generation:
            if slot.reader == <void *>me:
                slot.reader = NULL
                Py_DECREF(me)
            elif slot.writer == <void *>me:
                slot.writer = NULL
                Py_DECREF(me)
            elif slot.others != NULL and me in <list>slot.others:
                (<list>slot.others).remove(me)
                if not <list>slot.others:
                    Py_DECREF(<list>slot.others)
                    slot.others = NULL
        if me.timed_out:
            raise TimeoutError("timed out")
        return 0

    # Waiting.

    cdef int switch(self, Task me, Task target) noexcept:
        """Go on in another greenlet until somebody switches back; below zero if an exception is set then."""
        cdef PyObject *result
        self.current = target
        self.progress += 1
        result = PyGreenlet_Switch(<PyGreenlet *>target.greenlet, NULL, NULL)
        self.current = me
        if result == NULL:
            return -1
        Py_DECREF(<object>result)
        return 0

    cdef int refuse(self) except -1:
        """Raise what keeps everybody from waiting, if anything does, and send what was gathered."""
        if self.stale:
            raise RuntimeError("this process has forked and cannot go on with the greenlets of its parent")
        if self.epoll < 0:
            raise RuntimeError("the hub has ended")
        if self.corked:
            self.flush()
        return 0

    cdef int spend(self) except -1:
        """Count a call of the kernel; after some of them it is the turn of others."""
        cdef Task me
        self.budget -= CALL
        if self.budget <= 0:
            me = self.this_task()
            if me is not self.root:
                if self.corked:
                    self.flush()  # it may have to wait itself, and would take the waking for its own
                self.wake_task(me)
                park(self, me, INFINITY)
            self.budget = BUDGET
        return 0

    cdef Task next_task(self):
        """Return the task that is to go on, which is noted in it."""
        cdef Task task
        while True:
            if self.urgent is not None:
                task = self.urgent
                self.urgent = None
                task.woken = True
                return task
            if self.beginning is not None:
                task = self.beginning
                self.beginning = None
                task.begun = task.woken = True
                return task
            if self.ready_in_turn:
                self.ready_in_turn -= 1
                task = self.pop_ready()
                if task.woken:
                    continue
                if not task.begun and self.current is not self.root:
                    # A new greenlet counts its recursion from where it begins: the root's place.
                    self.beginning = task
                    return self.root
                task.begun = task.woken = True
                return task
            while self.next_event < self.event_count:
                self.next_event += 1
                task = self.dispatch(&self.events[self.next_event - 1])
                if task is not None:
                    return task
            # Those that are ready without an event have their turn once between two looks at the kernel's.
            if self.collect() < 0:
                return self.root
            self.ready_in_turn = self.ready.count

    cdef Task dispatch(self, epoll_event *event):
        """Take note of an event; return the task that it wakes, ``None`` if there is none."""
        cdef uint64_t tag = fs_tag(event)
        cdef uint32_t generation = <uint32_t>(tag >> 32)
        cdef uint32_t bits = event.events
        cdef int fd = <int><uint32_t>tag
        cdef Slot *slot
        cdef Task task = None
        cdef void *reader
        cdef void *writer
        if generation == 0:
            if fd == self.wakeup_fd:
                self.take_posted()
                return None
            if fd not in self.root_fds:
                return None
            if not self.root_waits:
                # The root is busy with something else: without this the kernel would tell it again and again.
                fs_watch(self.epoll, EPOLL_CTL_MOD, fd, 0, <uint64_t>fd)
                self.muted.add(fd)
                return None
            if fd not in self.root_ready:
                self.root_ready.append(fd)
            if self.root.queued:
                return None
            self.root.woken = True
            return self.root
        slot = &self.slots[fd]
        if slot.generation != generation:
            return None  # of a connection that is no more
        if bits & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR | EPOLLPRI):
            slot.drained = False
            if bits & (EPOLLRDHUP | EPOLLHUP | EPOLLERR | EPOLLPRI):
                slot.peculiar = True
            reader = slot.reader
        else:
            reader = NULL
        writer = slot.writer if bits & (EPOLLOUT | EPOLLHUP | EPOLLERR) else NULL
        if slot.others != NULL:
            for task in self.take_waiting(fd):
                self.wake_task(task)
            return None
        if reader != NULL:
            slot.reader = NULL
            task = <Task>reader
            Py_DECREF(task)
        if writer != NULL:
            slot.writer = NULL
            if task is not None:
                self.wake_task(task)
            task = <Task>writer
            Py_DECREF(task)
        if task is None or task.queued:
            return None
        task.woken = True
        return task

    cdef int collect(self) except? -2:
        """Ask the kernel for events, waiting for them if nothing is ready; -1 if the root is to raise something."""
        cdef int milliseconds = -1
        cdef int count
        cdef double left
        if self.ready.count or self.notified:
            milliseconds = 0
        elif self.timers.count:
            left = self.timers.items[0].deadline - now()
            milliseconds = 0 if left <= 0.0 else <int>ceil(left * 1000.0)
        self.progress += 1
        self.idle = True
        with nogil:
            count = fs_epoll_wait(self.epoll, self.events, MAX_EVENTS, milliseconds)
        self.idle = False
        if self.watcher_sleeps:
            self.watcher_sleeps = False
            self.watcher.set()
        self.event_count = max(count, 0)
        self.next_event = 0
        try:
            if count < 0 and count != -EINTR:
                raise error_of(-count)
            # Here, and not where some handler goes on: also if the signal came in another thread.
            PyErr_CheckSignals()
            if self.notified:
                self.take_posted()
            if self.timers.count:
                self.fire_timers()
        except BaseException as error:
            # Whoever happens to wait has nothing to do with it: it is the root's, as in a server without greenlets.
            self.failure = error
            self.root.woken = True
            return -1
        return 0

    cdef int take_posted(self) except -1:
        if self.notified:
            self.notified = False
            self.wakeup.clear()
        while self.posted:
            self.wake_task(self.posted.popleft())
        return 0

    # Those that are ready, and those with a deadline. A task has one timer, which stays when its wait is over.

    cdef int wake_task(self, Task task) except -1:
        if task.queued:
            return 0
        if ring_put(&self.ready, <void *>task) < 0:
            raise MemoryError()
        Py_INCREF(task)
        task.queued = True
        return 0

    cdef Task pop_ready(self):
        cdef Task task = <Task>ring_take(&self.ready)
        Py_DECREF(task)
        task.queued = False
        return task

    cdef int set_timer(self, Task task) except -1:
        cdef bint is_new = task.timer.place < 0
        if heap_put(&self.timers, &task.timer, task.deadline) < 0:
            raise MemoryError()
        if is_new:
            Py_INCREF(task)
        return 0

    cdef void drop_top(self):
        Py_DECREF(<Task>heap_take(&self.timers))

    cdef int fire_timers(self) except -1:
        """Wake the tasks whose deadline has passed; put those off that have a later one by now."""
        cdef double moment = now()
        cdef Task task
        while self.timers.count and self.timers.items[0].deadline <= moment:
            task = <Task>self.timers.items[0].owner
            if task.deadline <= moment:
                self.drop_top()
                if not task.queued:  # else what it waited for has come in time
                    task.timed_out = True
                    self.wake_task(task)
            elif task.deadline == INFINITY:
                self.drop_top()
            else:
                heap_put_off(&self.timers, task.deadline)
        return 0

    # Replies that are gathered while there are requests left to read.

    cdef int end_flush(self) except -1:
        """Send what a task has left unsent that has ended without closing its connection."""
        try:
            self.flush()
        except OSError:
            pass  # the client has gone, and nobody is left to be told so
        return 0

    cdef int flush(self) except -1:
        """Send what was gathered. Only the greenlet that gathered it comes here: nobody waits before it was sent."""
        cdef object connection = self.cork_owner
        cdef object rest
        cdef Py_ssize_t size = self.corked
        cdef Py_ssize_t sent
        cdef int fd
        self.corked = 0
        self.cork_owner = None
        fd = descriptor_of(connection)
        sent = fs_send(fd, self.cork, size, MSG_DONTWAIT)
        self.budget -= CALL
        if sent == size:
            return 0
        if sent < 0:
            if sent != -EAGAIN and sent != -EINTR:
                raise error_of(-sent)
            sent = 0
        # There may be a wait, in which others gather theirs.
        rest = PyBytes_FromStringAndSize(self.cork + sent, size - sent)
        send_all(self, connection, PyBytes_AS_STRING(rest), PyBytes_GET_SIZE(rest), deadline_of(connection))
        return 0


cdef int send_all(Hub hub, object connection, const char *data, Py_ssize_t size, double deadline) except -1:
    """Send all of it, waiting where the kernel's buffer is full."""
    cdef Py_ssize_t sent
    cdef int fd
    while True:
        fd = descriptor_of(connection)  # asked for again after a wait: somebody may have closed it
        sent = fs_send(fd, data, size, MSG_DONTWAIT)
        if sent >= 0:
            if sent == size:
                return 0
            data += sent
            size -= sent
            hub.spend()
        elif sent == -EINTR:
            PyErr_CheckSignals()
        elif sent == -EAGAIN:
            hub.wait_for(connection, fd, True, deadline)
        else:
            raise error_of(-sent)


cdef int forget(int fd) except -1:
    """Let every hub forget a descriptor: it changes hands."""
    for hub in _hubs:
        if type(hub) is Hub:
            (<Hub>hub).forget_slot(fd)
        else:
            hub.forget(fd)  # its Python twin
    return 0


def _before_fork():
    # What was gathered is the parent's to send; the child would send it again, or something else before it.
    cdef Hub hub = running_hub()
    if hub is not None and hub.corked:
        hub.flush()


def _after_fork_in_child():
    for hub in list(_waiting.hubs):
        if type(hub) is Hub:  # its Python twin looks after its own
            hub.forget_parent()
            _waiting.hubs.remove(hub)


_os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)
