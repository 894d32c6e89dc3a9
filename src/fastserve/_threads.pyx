# cython: language_level=3, embedsignature=True, freethreading_compatible=True
"""Threads of the operating system that are used again, each time with a new Python thread state.

An operating-system thread that has ended a job waits here, in C and without a Python thread state, for the next one
and ends after a while without any. Every job gets a state of its own, made by ``PyGILState_Ensure`` and destroyed by
``PyGILState_Release``: no ``threading.local``, context or trace function of one job is ever seen by another. Keeping
the state and clearing its dictionary would be cheaper and leaks on Python 3.13.

What all threads share is guarded by one lock, held for a few instructions and never while waiting for the GIL; what
belongs to one object by a flag or a critical section of its own, which a Python with the GIL does not need.
"""

import sys as _sys
import threading as _threading
from collections import deque as _deque
from os import register_at_fork as _register_at_fork

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.stdlib cimport calloc, free

from fastserve._clock cimport MAX_WAIT, now
from fastserve._locks cimport (
    NOWAIT_LOCK, PY_LOCK_ACQUIRED, PY_LOCK_FAILURE, PY_LOCK_INTR, PYTHREAD_INVALID_THREAD_ID, PyLockStatus,
    PyThread_acquire_lock, PyThread_acquire_lock_timed, PyThread_allocate_lock, PyThread_free_lock,
    PyThread_get_stacksize, PyThread_get_thread_ident, PyThread_get_thread_native_id, PyThread_release_lock,
    PyThread_start_new_thread, PyThread_type_lock, WAIT_LOCK, fs_clear_flag, fs_is_set, fs_set_flag, fs_test_and_set,
)

cdef extern from "_stacks.h":
    void fs_keep_stacks()

cdef enum:
    ENDLESS = -1

# From 3.14 on the operating system is told the name of a thread.
cdef bint HAS_OS_NAME = hasattr(_threading.Thread, "_set_os_name")


cdef struct Completion:
    # The end of a job: whoever joins it has a reference, and so has the thread that runs it.
    int references
    int done  # a flag
    bint daemon
    unsigned long ident
    unsigned long generation
    PyThread_type_lock joined  # held until the job is done; made by the first who joins
    Completion *before  # the list of running jobs
    Completion *after


cdef struct Worker:
    PyThread_type_lock wakeup  # released for every job, and to end the thread
    PyObject *job  # a reference, from hand-over until the thread has taken it; NULL to end the thread
    Completion *completion
    unsigned long ident
    unsigned long native_id
    unsigned long season
    bint idle
    Worker *before  # the list of idle threads, the last to be used first
    Worker *after


cdef PyThread_type_lock guard = PyThread_allocate_lock()
cdef Worker *idle_workers = NULL
cdef Completion *running = NULL
cdef unsigned long generation = 0  # of processes: one more in every forked child
cdef unsigned long season = 0  # a thread that took its job in another one ends with it
cdef double idle_seconds = 10.0  # after which a thread without a job ends
cdef size_t stack_size = 0  # what threading.stack_size() said when the last thread was started
cdef Py_ssize_t workers = 0
cdef Py_ssize_t idle_count = 0

if guard == NULL:
    raise MemoryError()


cdef inline void enter() noexcept nogil:
    PyThread_acquire_lock(guard, WAIT_LOCK)


cdef inline void leave() noexcept nogil:
    PyThread_release_lock(guard)


# Completion


cdef Completion *new_completion(bint daemon) except NULL:
    cdef Completion *made = <Completion *>calloc(1, sizeof(Completion))
    if made == NULL:
        raise MemoryError()
    made.references = 1
    made.daemon = daemon
    made.generation = generation
    return made


cdef inline bint is_done(Completion *completion) noexcept nogil:
    """Return whether a job has ended, or was one of a thread that a forked child does not have."""
    return fs_is_set(&completion.done) or completion.generation != generation


cdef void let_go(Completion *completion) noexcept nogil:
    """Give up a reference."""
    cdef int left
    enter()
    completion.references -= 1
    left = completion.references
    leave()
    if left == 0:
        if completion.joined != NULL:
            PyThread_free_lock(completion.joined)
        free(completion)


cdef void begin(Completion *completion, unsigned long ident) noexcept nogil:
    """Put a job on the list of those that run; the list and the thread are one reference."""
    global running
    enter()
    completion.references += 1
    completion.ident = ident
    completion.before = NULL
    completion.after = running
    if running != NULL:
        running.before = completion
    running = completion
    leave()


cdef void take_off(Completion *completion) noexcept nogil:
    """Take a job off the list, with the guard held."""
    global running
    if completion.before != NULL:
        completion.before.after = completion.after
    else:
        running = completion.after
    if completion.after != NULL:
        completion.after.before = completion.before
    completion.before = completion.after = NULL


cdef void finish(Completion *completion) noexcept nogil:
    """Tell those who join that the job and its thread state are gone."""
    enter()
    if completion.generation == generation:
        take_off(completion)
    fs_set_flag(&completion.done)
    if completion.joined != NULL:
        PyThread_release_lock(completion.joined)
    leave()
    let_go(completion)


cdef int wait_for(Completion *completion, double seconds) except -1:
    """Wait for the end of a job, at most so many seconds (below zero: endless). Signal handlers run meanwhile."""
    cdef double until = now() + seconds
    cdef double left
    cdef PyLockStatus status
    enter()
    if completion.joined == NULL and not is_done(completion):
        completion.joined = PyThread_allocate_lock()
        if completion.joined == NULL:
            leave()
            raise MemoryError()
        PyThread_acquire_lock(completion.joined, NOWAIT_LOCK)
    leave()
    while not is_done(completion):
        left = MAX_WAIT if seconds < 0 else min(max(until - now(), 0.0), MAX_WAIT)
        with nogil:
            status = PyThread_acquire_lock_timed(completion.joined, <long long>(left * 1e6), 1)
            if status == PY_LOCK_ACQUIRED:
                PyThread_release_lock(completion.joined)  # for the next who joins
        if status == PY_LOCK_INTR:
            PyErr_CheckSignals()
        elif status == PY_LOCK_FAILURE and seconds >= 0 and now() >= until:
            break
    return 0


# Workers


cdef void run(Worker *worker) noexcept with gil:
    """Run the job of a thread, in a new Python thread state that ends with this call."""
    cdef Job job = <Job>worker.job
    Py_DECREF(job)
    worker.job = NULL
    if job._native_id is None:  # the first one: the thread could not tell it before
        job._native_id = worker.native_id
    job.bootstrap()
    job = None


cdef bint next_job(Worker *worker) noexcept nogil:
    """Wait for the next job; return whether there is one, or the thread is to end."""
    global idle_workers, idle_count
    enter()
    if worker.season != season:
        leave()
        return False
    worker.idle = True
    worker.before = NULL
    worker.after = idle_workers
    if idle_workers != NULL:
        idle_workers.before = worker
    idle_workers = worker
    idle_count += 1
    leave()
    if PyThread_acquire_lock_timed(worker.wakeup, <long long>(idle_seconds * 1e6), 0) != PY_LOCK_ACQUIRED:
        enter()
        if worker.idle:
            take_idle(worker)
            leave()
            return False
        leave()
        PyThread_acquire_lock(worker.wakeup, WAIT_LOCK)  # it was chosen at the last moment
    return worker.job != NULL


cdef void take_idle(Worker *worker) noexcept nogil:
    """Take a thread off the list of the idle, with the guard held."""
    global idle_workers, idle_count
    worker.idle = False
    idle_count -= 1
    if worker.before != NULL:
        worker.before.after = worker.after
    else:
        idle_workers = worker.after
    if worker.after != NULL:
        worker.after.before = worker.before
    worker.before = worker.after = NULL


cdef void main(void *argument) noexcept nogil:
    """The whole life of a thread, which begins and goes on with waiting for a job."""
    global workers
    cdef Worker *worker = <Worker *>argument
    cdef Completion *completion
    worker.native_id = PyThread_get_thread_native_id()
    PyThread_acquire_lock(worker.wakeup, WAIT_LOCK)
    while worker.job != NULL:
        completion = worker.completion
        run(worker)
        finish(completion)
        if not next_job(worker):
            break
    enter()
    workers -= 1
    leave()
    PyThread_free_lock(worker.wakeup)
    free(worker)


cdef Worker *pop_idle() noexcept nogil:
    cdef Worker *worker
    enter()
    worker = idle_workers
    if worker != NULL:
        take_idle(worker)
        worker.season = season
    leave()
    return worker


cdef PyThread_type_lock new_held_lock() noexcept:
    """Return a lock that is held, so that who waits for it sleeps until it is released; NULL without memory."""
    cdef PyThread_type_lock lock = PyThread_allocate_lock()
    if lock != NULL:
        PyThread_acquire_lock(lock, NOWAIT_LOCK)
    return lock


cdef Worker *new_worker() except NULL:
    cdef Worker *worker = <Worker *>calloc(1, sizeof(Worker))
    if worker == NULL:
        raise MemoryError()
    worker.wakeup = new_held_lock()
    if worker.wakeup == NULL:
        free(worker)
        raise MemoryError()
    worker.season = season
    return worker


cdef Worker *start_worker() except NULL:
    """Return a new thread, which waits for its job."""
    global workers
    cdef Worker *worker = new_worker()
    cdef unsigned long ident = PyThread_start_new_thread(main, worker)
    if ident == PYTHREAD_INVALID_THREAD_ID:
        PyThread_free_lock(worker.wakeup)
        free(worker)
        raise RuntimeError("can't start new thread")
    worker.ident = ident
    enter()
    workers += 1
    leave()
    return worker


cdef int notice_stack_size() except -1:
    """Have no job run in a thread whose stack is of another size than threads have that are started now."""
    global stack_size
    cdef size_t wanted = PyThread_get_stacksize()  # _thread.stack_size() sets it, to zero
    if wanted != stack_size:
        stack_size = wanted
        end_idle()
    return 0


cdef bint is_registered = False


cdef int register_hook() except -1:
    """Be called after a fork: from the first job on, as a hook costs each fork.

    It comes after that of threading, which is imported above and says which thread is the calling one.
    """
    global is_registered
    is_registered = True
    _register_at_fork(after_in_child=_after_fork_in_child)
    return 0


cdef class Job:
    """What a ``threading.Thread`` is to a request in a thread that is used again: a base class for one.

    :param target: called without keyword arguments.
    :param args: its arguments.
    :param daemon: whether the interpreter does not wait for it at its end.
    """

    cdef Completion *completion
    cdef object target, args, name_, target_name
    cdef int started  # a flag
    cdef readonly bint has_begun  # whether its thread runs it, or has; a Thread's start() waits for that, this one not
    cdef public object _ident, _native_id
    cdef public bint _daemonic

    def __cinit__(self, target, tuple args not None, bint daemon):
        if not is_registered:
            register_hook()
        self.completion = new_completion(daemon)
        self.target = target
        self.args = args
        self._daemonic = daemon
        self.name_ = _threading._counter()
        self.target_name = getattr(target, "__name__", None)

    def __init__(self, target, args, daemon):
        pass  # not the constructor of Thread, which costs several times as much

    def __dealloc__(self):
        if self.completion != NULL:
            let_go(self.completion)

    @property
    def _name(self):
        with cython.critical_section(self):
            if type(self.name_) is int:
                name = f"Thread-{self.name_}"
                self.name_ = name if self.target_name is None else f"{name} ({self.target_name})"
            return self.name_

    @_name.setter
    def _name(self, name):
        with cython.critical_section(self):
            self.name_ = name

    @property
    def _is_stopped(self):
        return is_done(self.completion)

    def start(self):
        """Hand the job to an idle thread, or to a new one.

        :raises RuntimeError: if it was started before, or if no thread can be started.
        """
        cdef Worker *worker
        if fs_test_and_set(&self.started):
            raise RuntimeError("threads can only be started once")
        try:
            notice_stack_size()
            worker = pop_idle()
            if worker == NULL:
                worker = start_worker()
            else:
                self._native_id = worker.native_id
            self.hand_to(worker)
        except BaseException:
            fs_clear_flag(&self.started)
            raise

    cdef int hand_to(self, Worker *worker) except -1:
        try:
            self._ident = worker.ident
            _threading._active[self._ident] = self
        except BaseException:
            enter()
            PyThread_release_lock(worker.wakeup)  # without a job it ends
            leave()
            raise
        begin(self.completion, worker.ident)
        Py_INCREF(self)
        worker.job = <PyObject *>self
        worker.completion = self.completion
        # The kernel may switch to a thread that is woken, and this one would find the GIL held.
        with nogil:
            PyThread_release_lock(worker.wakeup)
        return 0

    cdef int bootstrap(self) except? -1:
        """Run the job as ``Thread._bootstrap_inner`` does. Nothing is raised."""
        cdef object ident = self._ident
        self.has_begun = True
        try:
            try:
                if HAS_OS_NAME:
                    self._set_os_name()
                if _threading._trace_hook:
                    _sys.settrace(_threading._trace_hook)
                if _threading._profile_hook:
                    _sys.setprofile(_threading._profile_hook)
                self.target(*self.args)
            except:  # noqa: E722 - all of them, as Thread does
                _threading._make_invoke_excepthook()(self)
        finally:
            self.target = self.args = None
            _threading._active.pop(ident, None)
        return 0

    def is_alive(self):
        """Return whether the job was started and has not ended."""
        return fs_is_set(&self.started) and not is_done(self.completion)

    def join(self, timeout=None):
        """Wait until the job has ended, at most ``timeout`` seconds (``None``: endless).

        :raises RuntimeError: in the thread of the job itself, and before it was started.
        """
        if not fs_is_set(&self.started):
            raise RuntimeError("cannot join thread before it is started")
        if self is _threading.current_thread():
            raise RuntimeError("cannot join current thread")
        wait_for(self.completion, ENDLESS if timeout is None else max(<double>timeout, 0.0))

    def mark_stopped(self):
        """Have it count as ended: in a forked child, where its thread does not exist."""
        fs_set_flag(&self.completion.done)


def end_idle():
    """End the threads that have no job, and have the others end with theirs. They may take a moment for it."""
    global season
    cdef Worker *worker
    if not is_registered:
        return  # there was none, and a fork would not know of the guard
    enter()  # each needs the guard before it goes, and so waits until its lock is let go of
    season += 1
    while idle_workers != NULL:
        worker = idle_workers
        take_idle(worker)
        PyThread_release_lock(worker.wakeup)
    leave()


def join_all():
    """Wait for all running jobs that are no daemons, but for one of the calling thread."""
    cdef unsigned long me = PyThread_get_thread_ident()
    cdef Completion *found
    while True:
        enter()
        found = running
        while found != NULL and (found.daemon or found.ident == me):
            found = found.after
        if found != NULL:
            found.references += 1
        leave()
        if found == NULL:
            return
        try:
            wait_for(found, ENDLESS)
        finally:
            let_go(found)


def set_idle_seconds(double seconds):
    """Have threads end that were without a job for so long. Return how long it was."""
    global idle_seconds
    before, idle_seconds = idle_seconds, seconds
    return before


def counts():
    """Return how many threads there are, and how many of them are idle."""
    return workers, idle_count


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


def _after_fork_in_child():
    # Of all threads only the calling one exists. The others may have held the guard, and been about to change the
    # lists: nothing of these is looked at. What belonged to the others stays allocated; nobody is left to free it.
    global guard, idle_workers, running, generation, season, workers, idle_count
    cdef PyThread_type_lock fresh = PyThread_allocate_lock()
    cdef Completion *mine
    if fresh == NULL:
        raise MemoryError()
    guard = fresh
    generation += 1
    season += 1  # the only thread of the child ends with its job, as any other thread does
    idle_workers = running = NULL
    workers = idle_count = 0
    me = _threading._active.get(PyThread_get_thread_ident())
    if isinstance(me, Job):
        mine = (<Job>me).completion
        mine.generation = generation
        mine.before = mine.after = NULL
        running = mine
        workers = 1


fs_keep_stacks()
