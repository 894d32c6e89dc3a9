"""The header of the PROXY protocol, versions 1 and 2: bytes in, a :class:`ProxyInfo` out. Nothing here reads a socket.

The specification is HAProxy's ``proxy-protocol.txt``.
"""

from __future__ import annotations

import functools
import os
import socket
import struct
from dataclasses import dataclass
from typing import Final, Literal

Address = tuple[str, int] | tuple[str, int, int, int] | str | bytes
TLV = tuple[int, bytes]

SHORTEST: Final = 15  # bytes of "PROXY UNKNOWN\r\n"
LONGEST_V1: Final = 107  # bytes, the CRLF included
DEFAULT_LIMIT: Final = 4096  # bytes of a header of version 2

_LINE: Final = b"PROXY "
_SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
_FIXED: Final = 16  # bytes of version 2 before the addresses

_FAMILIES: Final = {b"TCP4": socket.AF_INET, b"TCP6": socket.AF_INET6}
# The shortest values of the fields of a line, from "PROXY" on.
_SHORTEST_FIELDS: Final = {b"TCP4": (5, 4, 7, 7, 1, 1), b"TCP6": (5, 4, 2, 2, 1, 1)}

_IPV4: Final = struct.Struct("!4s4sHH")
_IPV6: Final = struct.Struct("!16s16sHH")
_UNIX: Final = struct.Struct("!108s108s")
_SIZES: Final = {1: _IPV4.size, 2: _IPV6.size, 3: _UNIX.size}
_TYPES: Final = (None, socket.SOCK_STREAM, socket.SOCK_DGRAM)

ALPN, AUTHORITY, CRC32C, NOOP, UNIQUE_ID, SSL, NETNS = 0x01, 0x02, 0x03, 0x04, 0x05, 0x20, 0x30
_SSL_VERSION, _SSL_CN, _SSL_CIPHER, _SSL_SIG_ALG, _SSL_KEY_ALG = range(0x21, 0x26)
_CLIENT_SSL, _CLIENT_CERT_CONN, _CLIENT_CERT_SESS = 1, 2, 4


class ProxyProtocolError(ValueError):
    """A connection does not begin with a valid header of the PROXY protocol, or not from a trusted peer."""


def _value_of(tlvs: tuple[TLV, ...], wanted: int) -> bytes | None:
    return next((value for kind, value in tlvs if kind == wanted), None)


def _text_of(tlvs: tuple[TLV, ...], wanted: int) -> str | None:
    value = _value_of(tlvs, wanted)
    # A name comes from the client, whatever its bytes are: who logs it must not meet an error.
    return None if value is None else value.decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class ProxySSL:
    """What the proxy says about the client's TLS: the TLV of type 0x20.

    :ivar client: the flags, as they came.
    :ivar verify: 0 if the client's certificate was verified. Some proxies also say 0 where there was none: ask
        ``verified``.
    :ivar tlvs: the pairs ``(type, value)`` inside.
    """

    client: int
    verify: int
    tlvs: tuple[TLV, ...] = ()

    @property
    def tls(self) -> bool:
        """Whether the client uses TLS."""
        return bool(self.client & _CLIENT_SSL)

    @property
    def certificate(self) -> bool:
        """Whether the client has presented a certificate, on this connection or earlier in its TLS session."""
        return bool(self.client & (_CLIENT_CERT_CONN | _CLIENT_CERT_SESS))

    @property
    def verified(self) -> bool:
        """Whether the client has presented a certificate that the proxy has verified."""
        return self.tls and self.certificate and self.verify == 0

    @property
    def version(self) -> str | None:
        """The version of TLS, such as ``"TLSv1.3"``."""
        return _text_of(self.tlvs, _SSL_VERSION)

    @property
    def cn(self) -> str | None:
        """The common name of the client's certificate. It means nothing unless ``verified``."""
        return _text_of(self.tlvs, _SSL_CN)

    @property
    def cipher(self) -> str | None:
        """The name of the cipher."""
        return _text_of(self.tlvs, _SSL_CIPHER)

    @property
    def sig_alg(self) -> str | None:
        """The algorithm that signed the proxy's certificate."""
        return _text_of(self.tlvs, _SSL_SIG_ALG)

    @property
    def key_alg(self) -> str | None:
        """The algorithm of the key of the proxy's certificate."""
        return _text_of(self.tlvs, _SSL_KEY_ALG)


@dataclass(frozen=True)
class ProxyInfo:
    """What the header of a connection says.

    Addresses have the form that ``socket`` gives them: ``(host, port)`` for IPv4, ``(host, port, 0, 0)`` for IPv6; for
    Unix sockets a path, ``""`` without a name, or ``bytes`` that begin with a NUL for an abstract one.

    :ivar version: of the protocol: 1 or 2.
    :ivar command: ``"PROXY"``, or ``"LOCAL"`` for a connection of the proxy's own, such as a health check.
    :ivar family: ``socket.AF_INET``, ``AF_INET6``, ``AF_UNIX``, or ``AF_UNSPEC`` if the header names no addresses.
    :ivar type: ``socket.SOCK_STREAM`` or ``SOCK_DGRAM``, what the client uses; ``None`` without addresses.
    :ivar source: the address of the client; ``None`` without addresses.
    :ivar destination: the address that the client has connected to; ``None`` without addresses.
    :ivar tlvs: the pairs ``(type, value)`` that version 2 has after the addresses, in their order. They are empty
        without addresses. Where one type comes twice the properties give the first.
    """

    version: int
    command: Literal["PROXY", "LOCAL"]
    family: int = socket.AF_UNSPEC
    type: int | None = None
    source: Address | None = None
    destination: Address | None = None
    tlvs: tuple[TLV, ...] = ()

    @property
    def alpn(self) -> bytes | None:
        """The protocol that was negotiated with the client, such as ``b"h2"``: the TLV of type 0x01."""
        return _value_of(self.tlvs, ALPN)

    @property
    def authority(self) -> str | None:
        """The host name that the client has asked for, with TLS that of SNI: the TLV of type 0x02.

        Bytes that are no UTF-8 are written as ``\\xff``.
        """
        return _text_of(self.tlvs, AUTHORITY)

    @property
    def crc32c(self) -> int | None:
        """The checksum of the header, which was verified: the TLV of type 0x03."""
        value = _value_of(self.tlvs, CRC32C)
        return None if value is None else int.from_bytes(value)

    @property
    def unique_id(self) -> bytes | None:
        """What the proxy calls this connection: the TLV of type 0x05."""
        return _value_of(self.tlvs, UNIQUE_ID)

    @property
    def ssl(self) -> ProxySSL | None:
        """What the proxy says about the client's TLS: the TLV of type 0x20."""
        value = _value_of(self.tlvs, SSL)
        return None if value is None else _read_ssl(value)

    @property
    def netns(self) -> str | None:
        """The name of the network namespace: the TLV of type 0x30."""
        return _text_of(self.tlvs, NETNS)


def parse(data: bytes, limit: int = DEFAULT_LIMIT) -> tuple[ProxyInfo | None, int]:
    """Read the header that ``data`` begins with.

    :param limit: the most bytes that a header of version 2 may have.
    :return: ``(info, size)``: the header, and how many bytes of ``data`` it is. While it is not complete,
        ``(None, missing)``: so many bytes, at least 1, are yet to come for certain, so that who receives no more than
        these never receives what comes after the header.
    :raises ProxyProtocolError: if ``data`` is not a header, nor the beginning of one.
    """
    if not data:
        return None, SHORTEST
    if _LINE.startswith(data[: len(_LINE)]):
        return _parse_line(data)
    if _SIGNATURE.startswith(data[: len(_SIGNATURE)]):
        return _parse_binary(data, limit)
    raise ProxyProtocolError("there is no header of the PROXY protocol")


def _parse_line(data: bytes) -> tuple[ProxyInfo | None, int]:
    """Do what :func:`parse` does, for version 1: a line of text."""
    # A carriage return before the last two places of the longest line.
    end = data.find(b"\r", 0, LONGEST_V1 - 1)
    if end < 0:
        missing = _missing_of_line(data)
        if len(data) + missing > LONGEST_V1:
            raise ProxyProtocolError(f"a header of version 1 is longer than {LONGEST_V1} bytes")
        return None, missing
    if end + 1 == len(data):
        return None, 1
    if data[end + 1] != ord("\n"):
        raise ProxyProtocolError("a header of version 1 has a carriage return in it")
    return _read_line(data[:end]), end + 2


def _missing_of_line(data: bytes) -> int:
    """Return how many bytes come yet at least in a line that has not ended."""
    if len(data) < SHORTEST:
        return SHORTEST - len(data)
    fields = data.split(b" ")
    if fields[1] == b"UNKNOWN":
        return len(b"\r\n")
    shortest = _SHORTEST_FIELDS.get(fields[1])
    if shortest is None or len(fields) > len(shortest):
        raise ProxyProtocolError(f"not the fields of a header of version 1: {data!r}")
    last = len(fields) - 1
    return (
        (0 if fields[last] else shortest[last])
        + sum(len(b" ") + size for size in shortest[len(fields) :])
        + len(b"\r\n")
    )


def _read_line(line: bytes) -> ProxyInfo:
    if line == b"PROXY UNKNOWN" or line.startswith(b"PROXY UNKNOWN "):
        return ProxyInfo(1, "PROXY")  # the rest of the line is to be ignored
    fields = line.split(b" ")
    if len(fields) != 6 or fields[1] not in _FAMILIES:
        raise ProxyProtocolError(f"not the fields of a header of version 1: {line!r}")
    family = _FAMILIES[fields[1]]
    try:
        source, destination = (socket.inet_pton(family, field.decode("ascii")) for field in fields[2:4])
    except (OSError, ValueError):
        raise ProxyProtocolError(f"not the addresses of a header of version 1: {line!r}") from None
    return ProxyInfo(
        1,
        "PROXY",
        family,
        socket.SOCK_STREAM,
        _ip_address(family, source, _port(fields[4])),
        _ip_address(family, destination, _port(fields[5])),
    )


def _port(field: bytes) -> int:
    if not field.isdigit() or len(field) > 5 or (field[0] == ord("0") and len(field) > 1) or int(field) > 65535:
        raise ProxyProtocolError(f"not a port: {field!r}")
    return int(field)


def _ip_address(family: int, packed: bytes, port: int) -> Address:
    host = socket.inet_ntop(family, packed)
    return (host, port) if family == socket.AF_INET else (host, port, 0, 0)


def _parse_binary(data: bytes, limit: int) -> tuple[ProxyInfo | None, int]:
    """Do what :func:`parse` does, for version 2."""
    if len(data) < _FIXED:
        # The first bytes of both versions differ, so that this is known only now.
        return None, _FIXED - len(data)
    version, command = divmod(data[12], 16)
    family, protocol = divmod(data[13], 16)
    length = int.from_bytes(data[14:16])
    if version != 2 or command > 1:
        raise ProxyProtocolError(f"version and command are {data[12]:#04x}")
    is_local = command == 0  # the rest is to be ignored then
    if not is_local and (family > 3 or protocol > 2):
        raise ProxyProtocolError(f"family and protocol are {data[13]:#04x}")
    has_addresses = not is_local and bool(family and protocol)
    if has_addresses and length < _SIZES[family]:
        raise ProxyProtocolError(f"{length} bytes are too few for the addresses")
    end = _FIXED + length
    if end > limit:
        raise ProxyProtocolError(f"a header of version 2 has {end} bytes, more than {limit}")
    if len(data) < end:
        return None, end - len(data)
    if not has_addresses:
        return ProxyInfo(2, "LOCAL" if is_local else "PROXY"), end
    kind, source, destination = _read_addresses(family, data)
    tlvs = _read_tlvs(data, _FIXED + _SIZES[family], end)
    _check(data[:end], tlvs)
    pairs = tuple((type_, data[start:stop]) for type_, start, stop in tlvs)
    for type_, value in pairs:
        if type_ == SSL:
            _read_ssl(value)
    return ProxyInfo(2, "PROXY", kind, _TYPES[protocol], source, destination, pairs), end


def _read_addresses(family: int, data: bytes) -> tuple[int, Address, Address]:
    if family == 3:
        source, destination = _UNIX.unpack_from(data, _FIXED)
        return socket.AF_UNIX, _unix_address(source), _unix_address(destination)
    packing, kind = (_IPV4, socket.AF_INET) if family == 1 else (_IPV6, socket.AF_INET6)
    source, destination, source_port, destination_port = packing.unpack_from(data, _FIXED)
    return kind, _ip_address(kind, source, source_port), _ip_address(kind, destination, destination_port)


def _unix_address(field: bytes) -> Address:
    """Return what ``socket`` would for such an address; the field does not tell how many NULs end an abstract one."""
    if field[0] == 0:
        return field.rstrip(b"\0") or ""
    return os.fsdecode(field.partition(b"\0")[0])


def _read_tlvs(data: bytes, start: int, end: int) -> list[tuple[int, int, int]]:
    """Return the type of each TLV of a part of ``data``, and where its value starts and ends."""
    found = []
    while start < end:
        value = start + 3
        if value > end or (stop := value + int.from_bytes(data[start + 1 : value])) > end:
            raise ProxyProtocolError("a TLV is longer than what holds it")
        found.append((data[start], value, stop))
        start = stop
    return found


def _read_ssl(value: bytes) -> ProxySSL:
    if len(value) < 5:
        raise ProxyProtocolError("the TLV of TLS is too short")
    tlvs = tuple((type_, value[start:stop]) for type_, start, stop in _read_tlvs(value, 5, len(value)))
    return ProxySSL(value[0], int.from_bytes(value[1:5]), tlvs)


def _check(header: bytes, tlvs: list[tuple[int, int, int]]) -> None:
    """Raise ``ProxyProtocolError`` if the header has a checksum that is wrong."""
    places = [(start, stop) for type_, start, stop in tlvs if type_ == CRC32C]
    if not places:
        return
    (start, stop), *others = places
    if others or stop - start != 4:
        raise ProxyProtocolError("not one checksum of 4 bytes")
    if int.from_bytes(header[start:stop]) != crc32c(header[:start] + bytes(4) + header[stop:]):
        raise ProxyProtocolError("the checksum is wrong")


def crc32c(data: bytes) -> int:
    """Return the checksum of RFC 9260, appendix A, also known as that of Castagnoli, as a number below 2**32."""
    table = _crc32c_table()
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ table[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


@functools.cache
def _crc32c_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


ProxyInfo.__module__ = ProxySSL.__module__ = ProxyProtocolError.__module__ = "fastserve.proxy"
