# The clock by which waits are counted.

from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

cdef extern from *:
    """
    /* Seconds: poll(2) and epoll_wait(2) count milliseconds in an int. */
    #define FS_MAX_WAIT 2000000.0
    """
    const double MAX_WAIT "FS_MAX_WAIT"


cdef inline double now() noexcept nogil:
    """Return the seconds of the clock of ``time.monotonic()``."""
    cdef timespec moment
    clock_gettime(CLOCK_MONOTONIC, &moment)
    return moment.tv_sec + moment.tv_nsec * 1e-9
