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
    /* Take a reference; give one up, and return how many are left. */
    static inline void fs_add_reference(int *count) { __atomic_fetch_add(count, 1, __ATOMIC_RELAXED); }
    static inline int fs_drop_reference(int *count) { return __atomic_sub_fetch(count, 1, __ATOMIC_ACQ_REL); }
    /* A number, such as that of the thread that something belongs to: who finds it finds what was done before. */
    static inline unsigned long fs_number(const unsigned long *number)
    { return __atomic_load_n(number, __ATOMIC_ACQUIRE); }
    static inline void fs_set_number(unsigned long *number, unsigned long value)
    { __atomic_store_n(number, value, __ATOMIC_RELEASE); }
    static inline void fs_next_number(unsigned long *number) { __atomic_fetch_add(number, 1, __ATOMIC_ACQ_REL); }
    """
    bint fs_is_set(const int *) nogil
    void fs_set_flag(int *) nogil
    void fs_clear_flag(int *) nogil
    bint fs_test_and_set(int *) nogil
    void fs_add_reference(int *) nogil
    int fs_drop_reference(int *) nogil
    unsigned long fs_number(const unsigned long *) nogil
    void fs_set_number(unsigned long *, unsigned long) nogil
    void fs_next_number(unsigned long *) nogil
