# The addresses of peers, as the methods of a socket return them.

from cpython.bytes cimport PyBytes_FromStringAndSize

from fastserve._syscalls cimport (
    AF_INET, AF_INET6, fs_ipv4_text, inet_ntop, ntohl, ntohs, sockaddr_in, sockaddr_in6, sockaddr_storage, sockaddr_un,
    socklen_t,
)

cdef extern from "Python.h":
    unicode PyUnicode_DecodeFSDefault(const char *)

cdef enum:
    ADDRESS_TEXT = 64  # bytes; INET6_ADDRSTRLEN is 46


cdef inline object address_of(sockaddr_storage *storage, socklen_t length, int family):
    """Make of a peer's address what ``accept()`` and ``recvfrom()`` of a socket make of it.

    The storage holds a null byte after the address.
    """
    cdef char text[ADDRESS_TEXT]
    cdef sockaddr_in *inet
    cdef sockaddr_in6 *inet6
    cdef sockaddr_un *local
    cdef int size
    if length == 0:
        return None  # a datagram of an unbound Unix socket
    if family == AF_INET:
        inet = <sockaddr_in *>storage
        fs_ipv4_text(&inet.sin_addr, text)
        return (text.decode("ascii"), ntohs(inet.sin_port))
    if family == AF_INET6:
        inet6 = <sockaddr_in6 *>storage
        inet_ntop(AF_INET6, &inet6.sin6_addr, text, ADDRESS_TEXT)
        return (
            text.decode("ascii"), ntohs(inet6.sin6_port), ntohl(inet6.sin6_flowinfo), inet6.sin6_scope_id
        )
    local = <sockaddr_un *>storage
    size = <int>length - <int>(<char *>local.sun_path - <char *>local)
    if size > 0 and local.sun_path[0] == 0:
        return PyBytes_FromStringAndSize(local.sun_path, size)  # Linux's abstract names are bytes
    if size <= 0:
        return ""
    # A path that fills sun_path ends at the null byte after it.
    return PyUnicode_DecodeFSDefault(local.sun_path)
