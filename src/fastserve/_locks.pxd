# Locks and threads of the interpreter, and flags that several threads read and write. None of them needs the GIL.

cdef extern from "Python.h" nogil:
    ctypedef void *PyThread_type_lock
    ctypedef enum PyLockStatus:
        PY_LOCK_FAILURE
        PY_LOCK_ACQUIRED
        PY_LOCK_INTR
    enum:
        NOWAIT_LOCK
        WAIT_LOCK
    const unsigned long PYTHREAD_INVALID_THREAD_ID
    PyThread_type_lock PyThread_allocate_lock()
    void PyThread_free_lock(PyThread_type_lock)
    int PyThread_acquire_lock(PyThread_type_lock, int)
    PyLockStatus PyThread_acquire_lock_timed(PyThread_type_lock, long long microseconds, int interruptible)
    void PyThread_release_lock(PyThread_type_lock)
    unsigned long PyThread_start_new_thread(void (*)(void *) noexcept nogil, void *)
    size_t PyThread_get_stacksize()
    unsigned long PyThread_get_thread_ident()
    unsigned long PyThread_get_thread_native_id()

cdef extern from *:
    """
    /* What a thread has written before it sets a flag is seen by who finds the flag set. */
    static inline int fs_is_set(const int *flag) { return __atomic_load_n(flag, __ATOMIC_ACQUIRE); }
    static inline void fs_set_flag(int *flag) { __atomic_store_n(flag, 1, __ATOMIC_RELEASE); }
    static inline void fs_clear_flag(int *flag) { __atomic_store_n(flag, 0, __ATOMIC_RELEASE); }
    /* Set a flag, and return whether it was set already. */
    static inline int fs_test_and_set(int *flag) { return __atomic_exchange_n(flag, 1, __ATOMIC_ACQ_REL); }
    /* The thread that something belongs to, or 0: the next owner finds what the last one has done with it. */
    static inline unsigned long fs_owner(const unsigned long *thread)
    { return __atomic_load_n(thread, __ATOMIC_ACQUIRE); }
    static inline void fs_set_owner(unsigned long *thread, unsigned long owner)
    { __atomic_store_n(thread, owner, __ATOMIC_RELEASE); }
    """
    bint fs_is_set(const int *) nogil
    void fs_set_flag(int *) nogil
    void fs_clear_flag(int *) nogil
    bint fs_test_and_set(int *) nogil
    unsigned long fs_owner(const unsigned long *) nogil
    void fs_set_owner(unsigned long *, unsigned long) nogil
