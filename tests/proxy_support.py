"""What the tests of the PROXY protocol share: headers, and a model of the specification that is written otherwise.

The model reads a header that is complete, from its end: no state, no estimate of what is missing.
"""

from __future__ import annotations

import ipaddress
import random
import re
import socket
import struct
from collections.abc import Callable
from typing import Any

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
LOCAL, PROXY = 0x20, 0x21
TCP4, UDP4, TCP6, UDP6, UNIX_STREAM, UNIX_DGRAM, UNSPEC = 0x11, 0x12, 0x21, 0x22, 0x31, 0x32, 0x00

V1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\r\n"
V1_CLIENT = ("192.0.2.7", 56324)


def tlv(kind: int, value: bytes) -> bytes:
    return bytes([kind]) + struct.pack("!H", len(value)) + value


def binary(payload: bytes = b"", command: int = PROXY, family: int = UNSPEC) -> bytes:
    """Return a header of version 2."""
    return SIGNATURE + bytes([command, family]) + struct.pack("!H", len(payload)) + payload


def ipv4(source: tuple[str, int], destination: tuple[str, int], tlvs: bytes = b"", family: int = TCP4) -> bytes:
    hosts = b"".join(ipaddress.IPv4Address(host).packed for host, _ in (source, destination))
    return binary(hosts + struct.pack("!HH", source[1], destination[1]) + tlvs, family=family)


def ipv6(source: tuple[str, int], destination: tuple[str, int], tlvs: bytes = b"", family: int = TCP6) -> bytes:
    hosts = b"".join(ipaddress.IPv6Address(host).packed for host, _ in (source, destination))
    return binary(hosts + struct.pack("!HH", source[1], destination[1]) + tlvs, family=family)


def unix(source: bytes, destination: bytes, tlvs: bytes = b"", family: int = UNIX_STREAM) -> bytes:
    return binary(source.ljust(108, b"\0") + destination.ljust(108, b"\0") + tlvs, family=family)


V2 = ipv4(("192.0.2.7", 56324), ("198.51.100.1", 443))
V2_LOCAL = binary(command=LOCAL)


def remainder_of_castagnoli(data: bytes) -> int:
    """Return the checksum by division, bit by bit, in the order in which RFC 9260 sends them."""
    value = 0xFFFFFFFF
    for byte in data:
        for bit in range(8):
            carry = (value ^ byte >> bit) & 1
            value >>= 1
            if carry:
                value ^= 0x82F63B78
    return value ^ 0xFFFFFFFF


def with_checksum(header: bytes) -> bytes:
    """Return a header of version 2 with a checksum at its end."""
    header = header[:14] + struct.pack("!H", len(header) - 16 + 7) + header[16:] + tlv(3, bytes(4))
    return header[:-4] + struct.pack("!I", remainder_of_castagnoli(header))


# The model. It returns the size of the header, and (command, source, destination, tlvs); or None where there is none.

Said = tuple[int, tuple[str, Any, Any, tuple[tuple[int, bytes], ...]]]

_LINE = re.compile(rb"PROXY (?:(UNKNOWN)(?: [^\r]*)?|(TCP[46]) (\S+) (\S+) (0|[1-9]\d{0,4}) (0|[1-9]\d{0,4}))\r\n")


def model(data: bytes, limit: int = 4096) -> Said | None:
    """Return what the header at the beginning of ``data`` says, ``None`` if none is there, or not all of it."""
    if data.startswith(SIGNATURE):
        return _model_of_binary(data, limit)
    return _model_of_line(data)


def _model_of_line(data: bytes) -> Said | None:
    found = _LINE.match(data[:107])
    if found is None:
        return None
    if found[1]:
        return found.end(), ("PROXY", None, None, ())
    make: Callable[[str], Any] = ipaddress.IPv4Address if found[2] == b"TCP4" else ipaddress.IPv6Address
    try:
        hosts = [make(found[place].decode("ascii")) for place in (3, 4)]
    except ValueError:
        return None
    ports = [int(found[place]) for place in (5, 6)]
    if max(ports) > 65535 or any("%" in str(host) for host in hosts):
        return None
    source, destination = (address(host.packed, port) for host, port in zip(hosts, ports, strict=True))
    return found.end(), ("PROXY", source, destination, ())


def address(packed: bytes, port: int) -> Any:
    """Return an address as ``socket`` does."""
    if len(packed) == 4:
        return (".".join(str(byte) for byte in packed), port)
    return (socket.inet_ntop(socket.AF_INET6, packed), port, 0, 0)


def _model_of_binary(data: bytes, limit: int) -> Said | None:
    if len(data) < 16 or data[12] not in (LOCAL, PROXY):
        return None
    size = 16 + data[14] * 256 + data[15]
    header = data[:size]
    kind, protocol = data[13] >> 4, data[13] & 15
    if len(header) < size or size > limit:
        return None
    if data[12] == LOCAL:
        return size, ("LOCAL", None, None, ())
    if kind > 3 or protocol > 2:
        return None
    if kind == 0 or protocol == 0:
        return size, ("PROXY", None, None, ())
    if kind == 3:
        source, destination, rest = (_path(header[16:124]), _path(header[124:232]), header[232:])
        if size < 232:
            return None
    else:
        width = 4 if kind == 1 else 16
        if size < 16 + 2 * width + 4:
            return None
        end = 16 + 2 * width
        source = address(header[16 : 16 + width], int.from_bytes(header[end : end + 2]))
        destination = address(header[16 + width : end], int.from_bytes(header[end + 2 : end + 4]))
        rest = header[end + 4 :]
    tlvs = _model_of_tlvs(rest)
    if tlvs is None or any(kind == 0x20 and not _is_ssl(value) for kind, value in tlvs):
        return None
    sums = [value for kind, value in tlvs if kind == 3]
    if sums:
        # The place of the only one: what comes after it is known.
        behind = 0
        for kind, value in reversed(tlvs):
            if kind == 3:
                break
            behind += 3 + len(value)
        zeroed = header[: size - behind - len(sums[-1])] + bytes(len(sums[-1])) + header[size - behind :]
        if len(sums) > 1 or len(sums[0]) != 4 or remainder_of_castagnoli(zeroed) != int.from_bytes(sums[0]):
            return None
    return size, ("PROXY", source, destination, tlvs)


def _path(field: bytes) -> Any:
    if field[:1] == b"\0":
        return field.rstrip(b"\0") if field.strip(b"\0") else ""
    return field.split(b"\0")[0].decode("utf-8", "surrogateescape")


def _model_of_tlvs(rest: bytes) -> tuple[tuple[int, bytes], ...] | None:
    if not rest:
        return ()
    if len(rest) < 3 or len(rest) < 3 + rest[1] * 256 + rest[2]:
        return None
    size = 3 + rest[1] * 256 + rest[2]
    others = _model_of_tlvs(rest[size:])
    return None if others is None else ((rest[0], rest[3:size]), *others)


def _is_ssl(value: bytes) -> bool:
    return len(value) >= 5 and _model_of_tlvs(value[5:]) is not None


# Random headers, for the fuzzer: hypothesis has its own.


def random_header(random: random.Random) -> bytes:
    """Return a valid header."""
    number = random.random
    ports = [random.choice([0, 1, 9, 10, 443, 56324, 65535]) for _ in range(2)]
    if number() < 0.4:
        kind = random.choice(["TCP4", "TCP6", "UNKNOWN"])
        if kind == "UNKNOWN":
            filling = bytes(random.choice(b"0123456789abcdef:. \n") for _ in range(random.randrange(92)))
            return b"PROXY UNKNOWN" + (b" " + filling if filling else b"") + b"\r\n"
        make: Any = ipaddress.IPv4Address if kind == "TCP4" else ipaddress.IPv6Address
        hosts = [str(make(_random_bytes(random, 4 if kind == "TCP4" else 16))) for _ in range(2)]
        return f"PROXY {kind} {hosts[0]} {hosts[1]} {ports[0]} {ports[1]}\r\n".encode()
    tlvs = b""
    while number() < 0.5:
        type_ = random.choice([1, 2, 4, 5, 0x20, 0x30, random.choice([0, 0xE0, 0xFF])])
        value = _random_bytes(random, random.choice([0, 1, 5, 20, 128]))
        if type_ == 0x20:
            value = bytes([random.randrange(8)]) + _random_bytes(random, 4) + tlv(0x21, b"TLSv1.3") + tlv(0x22, value)
        tlvs += tlv(type_, value)
    family = random.choice([TCP4, UDP4, TCP6, UDP6, UNIX_STREAM, UNIX_DGRAM, UNSPEC, 0x10, 0x01, 0x02, 0x30])
    sizes = {1: 12, 2: 36, 3: 216}
    payload = _random_bytes(random, sizes.get(family >> 4, 0))
    if family >> 4 == 3 and number() < 0.8:
        payload = b"/run/a".ljust(108, b"\0") + random.choice([b"", b"\0abstract", b"\xff" * 108]).ljust(108, b"\0")
    header = binary(payload + tlvs, LOCAL if number() < 0.1 else PROXY, family)
    if number() < 0.2 and family & 15 and family >> 4:
        header = with_checksum(header)
    return header


def _random_bytes(random: random.Random, size: int) -> bytes:
    return bytes(size) if random.random() < 0.1 else random.randbytes(size)


def mutated(random: random.Random, data: bytes) -> bytes:
    """Return ``data`` with a few changes."""
    changed = bytearray(data)
    for _ in range(random.randrange(4)):
        place = random.randrange(len(changed) + 1)
        what = random.randrange(6)
        if what == 0 and place < len(changed):
            changed[place] ^= 1 << random.randrange(8)
        elif what == 1 and place < len(changed):
            changed[place] = random.choice(b"\0\r\n 0159:.%xP\xff")
        elif what == 2:
            del changed[place : place + random.choice([1, 1, 2, 16])]
        elif what == 3:
            changed[place:place] = _random_bytes(random, random.choice([1, 1, 2, 16]))
        elif what == 4:
            changed[place:place] = random.choice([b"\r", b"\n", b"\r\n", b" ", b"0", b":", b"::", b"%1", b"PROXY "])
        elif place + 2 <= len(changed):
            changed[place : place + 2] = struct.pack("!H", random.choice([0, 1, 2, 3, 12, 36, 216, 4080, 4081, 65535]))
    return bytes(changed)
