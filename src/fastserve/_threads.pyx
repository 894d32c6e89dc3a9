# cython: language_level=3, embedsignature=True, freethreading_compatible=True
"""Threads of the operating system that are used again, each time with a new Python thread state.

An operating-system thread that has ended a job waits here, in C and without a Python thread state, for the next one
and ends after a while without any. Every job gets a state of its own, made by ``PyGILState_Ensure`` and destroyed by
``PyGILState_Release``: no ``threading.local``, context or trace function of one job is ever seen by another. Keeping
the state and clearing its dictionary would be cheaper and leaks on Python 3.13.

What several threads share is in shards, each with a lock that is held for a few instructions and never while waiting
for the GIL: the threads that one serving thread has started are in one, so that servers do not meet. What belongs to
one object is guarded by a flag or a critical section of its own, which a Python with the GIL does not need.
"""

import sys as _sys
import threading as _threading
from os import register_at_fork as _register_at_fork

cimport cython
from cpython.contextvars cimport PyContext_CopyCurrent
from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free

from fastserve._clock cimport MAX_WAIT, now
from fastserve._locks cimport (
    NOWAIT_LOCK, PY_LOCK_ACQUIRED, PY_LOCK_FAILURE, PY_LOCK_INTR, PYTHREAD_INVALID_THREAD_ID, PyLockStatus,
    PyThread_acquire_lock, PyThread_acquire_lock_timed, PyThread_allocate_lock, PyThread_free_lock,
    PyThread_get_stacksize, PyThread_get_thread_ident, PyThread_get_thread_native_id, PyThread_release_lock,
    PyThread_start_new_thread, PyThread_type_lock, WAIT_LOCK, fs_add_reference, fs_clear_flag, fs_drop_reference,
    fs_is_set, fs_next_number, fs_number, fs_set_flag, fs_set_number, fs_test_and_set,
)

cdef extern from "_stacks.h":
    void fs_keep_stacks()

cdef enum:
    ENDLESS = -1
    SHARDS = 16

# From 3.14 on the operating system is told the name of a thread.
cdef bint HAS_OS_NAME = hasattr(_threading.Thread, "_set_os_name")
# From 3.14 on a thread may begin with a copy of the context of the one that starts it; without the GIL it does.
cdef bint INHERITS_CONTEXT = getattr(_sys.flags, "thread_inherit_context", False)


cdef struct Completion:
    # The end of a job: whoever joins it has a reference, and so has the thread that runs it.
    Shard *shard
    Shard *shard_of_worker  # once it runs; mostly the same
    int references
    int done  # a flag
    bint daemon
    unsigned long ident
    unsigned long generation
    PyThread_type_lock joined  # held until the job is done; made by the first who joins
    Completion *before  # the list of running jobs
    Completion *after


cdef struct Worker:
    Shard *shard
    PyThread_type_lock wakeup  # released for every job, and to end the thread
    PyObject *job  # a reference, from hand-over until the thread has taken it; NULL to end the thread
    Completion *completion
    unsigned long ident
    unsigned long native_id
    unsigned long season
    bint idle
    Worker *before  # the list of idle threads, the last to be used first
    Worker *after


cdef struct Shard:
    PyThread_type_lock guard
    Worker *idle_workers
    Completion *running
    Py_ssize_t workers
    Py_ssize_t idle_count


cdef Shard shards[SHARDS]
cdef unsigned long generation = 0  # of processes: one more in every forked child
cdef unsigned long season = 0  # a thread that took its job in another one ends with it
cdef unsigned long idle_microseconds = 10000000  # after which a thread without a job ends
cdef size_t stack_size = 0  # what threading.stack_size() said when the last thread was started


cdef int clear_shards() except -1:
    """Begin without any thread, at the import and in a forked child."""
    cdef int i
    for i in range(SHARDS):
        # Another thread may have held the guard when this process was forked, and been about to change the lists:
        # nothing of these is looked at. What they hold stays allocated; nobody is left to free it.
        shards[i].guard = PyThread_allocate_lock()
        if shards[i].guard == NULL:
            raise MemoryError()
        shards[i].idle_workers = NULL
        shards[i].running = NULL
        shards[i].workers = shards[i].idle_count = 0
    return 0


clear_shards()


cdef inline Shard *shard_of_caller() noexcept nogil:
    """Return the shard for what the calling thread starts: the upper bits of a hash, for its ident is an address."""
    return &shards[(<uint64_t>PyThread_get_thread_ident() * <uint64_t>0x9E3779B97F4A7C15) >> 60]


cdef inline void enter(Shard *shard) noexcept nogil:
    PyThread_acquire_lock(shard.guard, WAIT_LOCK)


cdef inline void leave(Shard *shard) noexcept nogil:
    PyThread_release_lock(shard.guard)


# Completion


cdef Completion *new_completion(bint daemon) except NULL:
    cdef Completion *made = <Completion *>calloc(1, sizeof(Completion))
    if made == NULL:
        raise MemoryError()
    made.shard = shard_of_caller()
    made.references = 1
    made.daemon = daemon
    made.generation = generation
    return made


cdef inline bint is_done(Completion *completion) noexcept nogil:
    """Return whether a job has ended, or was one of a thread that a forked child does not have."""
    return fs_is_set(&completion.done) or completion.generation != generation


cdef void let_go(Completion *completion) noexcept nogil:
    """Give up a reference."""
    if fs_drop_reference(&completion.references) == 0:
        if completion.joined != NULL:
            PyThread_free_lock(completion.joined)
        free(completion)


cdef void begin(Completion *completion, unsigned long ident) noexcept nogil:
    """Put a job on the list of those that run; the list and the thread are one reference."""
    cdef Shard *shard = completion.shard
    fs_add_reference(&completion.references)
    enter(shard)
    completion.generation = generation  # it may have been made before a fork
    completion.ident = ident
    completion.before = NULL
    completion.after = shard.running
    if shard.running != NULL:
        shard.running.before = completion
    shard.running = completion
    leave(shard)


cdef void take_off(Completion *completion) noexcept nogil:
    """Take a job off the list, with the guard held."""
    if completion.before != NULL:
        completion.before.after = completion.after
    else:
        completion.shard.running = completion.after
    if completion.after != NULL:
        completion.after.before = completion.before
    completion.before = completion.after = NULL


cdef void finish(Completion *completion) noexcept nogil:
    """Tell those who join that the job and its thread state are gone."""
    enter(completion.shard)
    if completion.generation == generation:
        take_off(completion)
    fs_set_flag(&completion.done)
    if completion.joined != NULL:
        PyThread_release_lock(completion.joined)
    leave(completion.shard)
    let_go(completion)


cdef int wait_for(Completion *completion, double seconds) except -1:
    """Wait for the end of a job, at most so many seconds (below zero: endless). Signal handlers run meanwhile."""
    cdef double until = now() + seconds
    cdef double left
    cdef PyLockStatus status
    enter(completion.shard)
    if completion.joined == NULL and not is_done(completion):
        completion.joined = PyThread_allocate_lock()
        if completion.joined == NULL:
            leave(completion.shard)
            raise MemoryError()
        PyThread_acquire_lock(completion.joined, NOWAIT_LOCK)
    leave(completion.shard)
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
    cdef Shard *shard = worker.shard
    enter(shard)
    if worker.season != fs_number(&season):
        leave(shard)
        return False
    worker.idle = True
    worker.before = NULL
    worker.after = shard.idle_workers
    if shard.idle_workers != NULL:
        shard.idle_workers.before = worker
    shard.idle_workers = worker
    shard.idle_count += 1
    leave(shard)
    if PyThread_acquire_lock_timed(worker.wakeup, <long long>fs_number(&idle_microseconds), 0) != PY_LOCK_ACQUIRED:
        enter(shard)
        if worker.idle:
            take_idle(worker)
            leave(shard)
            return False
        leave(shard)
        PyThread_acquire_lock(worker.wakeup, WAIT_LOCK)  # it was chosen at the last moment
    return worker.job != NULL


cdef void take_idle(Worker *worker) noexcept nogil:
    """Take a thread off the list of the idle, with the guard held."""
    worker.idle = False
    worker.shard.idle_count -= 1
    if worker.before != NULL:
        worker.before.after = worker.after
    else:
        worker.shard.idle_workers = worker.after
    if worker.after != NULL:
        worker.after.before = worker.before
    worker.before = worker.after = NULL


cdef void main(void *argument) noexcept nogil:
    """The whole life of a thread, which begins and goes on with waiting for a job."""
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
    enter(worker.shard)
    worker.shard.workers -= 1
    leave(worker.shard)
    PyThread_free_lock(worker.wakeup)
    free(worker)


cdef Worker *pop_idle(Shard *shard) noexcept nogil:
    cdef Worker *worker
    enter(shard)
    worker = shard.idle_workers
    if worker != NULL:
        take_idle(worker)
    leave(shard)
    return worker


cdef Worker *any_idle() noexcept nogil:
    cdef Worker *worker
    cdef int i
    for i in range(SHARDS):
        worker = pop_idle(&shards[i])
        if worker != NULL:
            return worker
    return NULL


cdef PyThread_type_lock new_held_lock() noexcept:
    """Return a lock that is held, so that who waits for it sleeps until it is released; NULL without memory."""
    cdef PyThread_type_lock lock = PyThread_allocate_lock()
    if lock != NULL:
        PyThread_acquire_lock(lock, NOWAIT_LOCK)
    return lock


cdef Worker *new_worker(Shard *shard) except NULL:
    cdef Worker *worker = <Worker *>calloc(1, sizeof(Worker))
    if worker == NULL:
        raise MemoryError()
    worker.wakeup = new_held_lock()
    if worker.wakeup == NULL:
        free(worker)
        raise MemoryError()
    worker.shard = shard
    worker.season = fs_number(&season)
    return worker


cdef Worker *start_worker(Shard *shard) except NULL:
    """Return a new thread, which waits for its job; one of another shard if the system has no more."""
    cdef Worker *worker = new_worker(shard)
    cdef unsigned long ident = PyThread_start_new_thread(main, worker)
    if ident == PYTHREAD_INVALID_THREAD_ID:
        PyThread_free_lock(worker.wakeup)
        free(worker)
        worker = any_idle()
        if worker == NULL:
            raise RuntimeError("can't start new thread")
        return worker
    worker.ident = ident
    enter(shard)
    shard.workers += 1
    leave(shard)
    return worker


cdef int notice_stack_size() except -1:
    """Have no job run in a thread whose stack is of another size than threads have that are started now."""
    global stack_size
    cdef size_t wanted = PyThread_get_stacksize()  # _thread.stack_size() sets it, to zero
    if wanted != stack_size:
        stack_size = wanted
        end_idle()
    return 0


cdef int is_registered = 0  # a flag


cdef int register_hook() except -1:
    """Be called after a fork: from the first job on, as a hook costs each fork.

    It comes after that of threading, which is imported above and says which thread is the calling one. Two threads may
    both register it, without harm; none may run a job before it is registered.
    """
    _register_at_fork(after_in_child=_after_fork_in_child)
    fs_set_flag(&is_registered)
    return 0


cdef class Job:
    """What a ``threading.Thread`` is to a request in a thread that is used again: a base class for one.

    :param target: called without keyword arguments.
    :param args: its arguments.
    :param daemon: whether the interpreter does not wait for it at its end.
    """

    cdef Completion *completion
    cdef object target, args, name_, target_name
    cdef object context  # in which the target is called; None is the empty one of the new thread state
    cdef int started  # a flag
    cdef int begun  # a flag
    cdef public object _ident, _native_id
    cdef public bint _daemonic

    def __cinit__(self, target, tuple args not None, bint daemon):
        if not fs_is_set(&is_registered):
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
    def has_begun(self):
        """Whether its thread runs it, or has: the ``start()`` of a ``Thread`` waits for that, this one does not."""
        return fs_is_set(&self.begun)

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
            if INHERITS_CONTEXT:
                self.context = PyContext_CopyCurrent()
            notice_stack_size()
            worker = pop_idle(self.completion.shard)
            if worker == NULL:
                worker = start_worker(self.completion.shard)
            else:
                self._native_id = worker.native_id
            self.hand_to(worker)
        except BaseException:
            fs_clear_flag(&self.started)
            raise

    cdef int hand_to(self, Worker *worker) except -1:
        cdef Shard *shard
        try:
            self._ident = worker.ident
            _threading._active[self._ident] = self
        except BaseException:
            shard = worker.shard
            enter(shard)
            PyThread_release_lock(worker.wakeup)  # without a job it ends
            leave(shard)
            raise
        self.completion.shard_of_worker = worker.shard
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
        fs_set_flag(&self.begun)
        try:
            try:
                if HAS_OS_NAME:
                    self._set_os_name()
                if _threading._trace_hook:
                    _sys.settrace(_threading._trace_hook)
                if _threading._profile_hook:
                    _sys.setprofile(_threading._profile_hook)
                if self.context is None:
                    self.target(*self.args)
                else:
                    self.context.run(self.target, *self.args)
            except:  # noqa: E722 - all of them, as Thread does
                _threading._make_invoke_excepthook()(self)
        finally:
            self.target = self.args = self.context = None
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
    cdef Worker *worker
    cdef Shard *shard
    cdef int i
    if not fs_is_set(&is_registered):
        return  # there was none, and a fork would not know of the guards
    # Who is about to wait for a job sees it with the guard that is taken below, or is idle by then.
    fs_next_number(&season)
    for i in range(SHARDS):
        shard = &shards[i]
        enter(shard)  # each needs the guard before it goes, and so waits until its lock is let go of
        while shard.idle_workers != NULL:
            worker = shard.idle_workers
            take_idle(worker)
            PyThread_release_lock(worker.wakeup)
        leave(shard)


def join_all():
    """Wait for all running jobs that are no daemons, but for one of the calling thread."""
    cdef Completion *found
    cdef bint was_any = True
    cdef int i
    while was_any:  # one that runs may begin another one, in any shard
        was_any = False
        for i in range(SHARDS):
            while True:
                found = one_to_join(&shards[i])
                if found == NULL:
                    break
                was_any = True
                try:
                    wait_for(found, ENDLESS)
                finally:
                    let_go(found)


cdef Completion *one_to_join(Shard *shard) noexcept nogil:
    """Return a running job that is no daemon and not the calling thread's, and a reference to it."""
    cdef unsigned long me = PyThread_get_thread_ident()
    cdef Completion *found
    enter(shard)
    found = shard.running
    while found != NULL and (found.daemon or found.ident == me):
        found = found.after
    if found != NULL:
        fs_add_reference(&found.references)
    leave(shard)
    return found


def set_idle_seconds(double seconds):
    """Have threads end that were without a job for so long. Return how long it was."""
    cdef double before = fs_number(&idle_microseconds) / 1e6
    fs_set_number(&idle_microseconds, <unsigned long>(seconds * 1e6))
    return before


def counts():
    """Return how many threads there are, and how many of them are idle."""
    cdef Py_ssize_t workers = 0
    cdef Py_ssize_t idle = 0
    cdef int i
    for i in range(SHARDS):
        enter(&shards[i])
        workers += shards[i].workers
        idle += shards[i].idle_count
        leave(&shards[i])
    return workers, idle


include "_work_queue.pxi"


def _after_fork_in_child():
    # Of all threads only the calling one exists.
    global generation
    cdef Completion *mine
    clear_shards()
    generation += 1
    fs_next_number(&season)  # the only thread of the child ends with its job, as any other thread does
    me = _threading._active.get(PyThread_get_thread_ident())
    if isinstance(me, Job):
        mine = (<Job>me).completion
        mine.generation = generation
        mine.before = mine.after = NULL
        mine.shard.running = mine
        mine.shard_of_worker.workers = 1


fs_keep_stacks()
