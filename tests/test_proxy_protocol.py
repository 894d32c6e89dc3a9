"""The header of the PROXY protocol: what it says, how it is read piece by piece, and that nothing else gets through."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import pickle
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import proxy_support as headers
from fastserve._proxy_protocol import LONGEST_V1, SHORTEST, ProxyInfo, ProxyProtocolError, ProxySSL, crc32c, parse
from proxy_support import LOCAL, PROXY, V1, V1_CLIENT, V2, binary, ipv4, ipv6, tlv, unix, with_checksum

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent

SOURCE, DESTINATION = ("192.0.2.7", 56324), ("198.51.100.1", 443)
SOURCE6, DESTINATION6 = ("2001:db8::7", 56324), ("2001:db8::1", 443)


def read(data: bytes) -> ProxyInfo:
    """Return what a complete header says, all of ``data``."""
    info, size = parse(data)
    assert info is not None
    assert size == len(data)
    return info


def receive(data: bytes, sizes: Any = None, limit: int = 4096) -> tuple[ProxyInfo | None, int]:
    """Do what a reader does: take no more than is certain to be of the header. Return it, and how much was taken.

    :param sizes: yields how many bytes come at a time at most.
    """
    taken = 0
    while True:
        info, number = parse(data[:taken], limit)
        if info is not None:
            assert number == taken
            return info, taken
        assert number >= 1
        if taken == len(data):
            return None, taken
        taken = min(taken + min(number, next(sizes) if sizes else number), len(data))


def said(info: ProxyInfo) -> Any:
    return info.command, info.source, info.destination, info.tlvs


# Version 1


def test_a_line_for_tcp_over_ipv4() -> None:
    assert read(V1) == ProxyInfo(1, "PROXY", socket.AF_INET, socket.SOCK_STREAM, SOURCE, DESTINATION)


def test_a_line_for_tcp_over_ipv6_has_addresses_as_socket_gives_them() -> None:
    info = read(b"PROXY TCP6 2001:DB8:0:0::7 ::1 1 65535\r\n")
    assert (info.family, info.type) == (socket.AF_INET6, socket.SOCK_STREAM)
    assert (info.source, info.destination) == (("2001:db8::7", 1, 0, 0), ("::1", 65535, 0, 0))


@pytest.mark.parametrize(
    "line",
    [
        b"PROXY UNKNOWN\r\n",
        b"PROXY UNKNOWN ffff::1 ffff::2 65535 65535\r\n",
        b"PROXY UNKNOWN " + b"x" * 91 + b"\r\n",
        b"PROXY UNKNOWN a\nb\r\n",
    ],
)
def test_an_unknown_connection_has_no_addresses(line: bytes) -> None:
    assert read(line) == ProxyInfo(1, "PROXY", socket.AF_UNSPEC, None, None, None, ())


def test_the_longest_line_is_read_and_a_longer_one_is_not() -> None:
    longest = b"PROXY UNKNOWN " + b"x" * 91 + b"\r\n"
    assert len(longest) == LONGEST_V1
    assert read(longest)
    for line in (longest.replace(b"x", b"xx", 1), b"PROXY UNKNOWN " + b"x" * 1000):
        with pytest.raises(ProxyProtocolError):
            parse(line)
        with pytest.raises(ProxyProtocolError):
            receive(line)


@pytest.mark.parametrize(
    "line",
    [
        b"PROXY TCP4 192.0.2.7 198.51.100.1 56324\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443 \r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443 1\r\n",
        b"PROXY  TCP4 192.0.2.7 198.51.100.1 56324 443\r\n",
        b"PROXY TCP4  192.0.2.7 198.51.100.1 56324 443\r\n",
        b"PROXY\tTCP4 192.0.2.7 198.51.100.1 56324 443\r\n",
        b"proxy TCP4 192.0.2.7 198.51.100.1 56324 443\r\n",
        b"PROXY tcp4 192.0.2.7 198.51.100.1 56324 443\r\n",
        b"PROXY TCP5 192.0.2.7 198.51.100.1 56324 443\r\n",
        b"PROXY UDP4 192.0.2.7 198.51.100.1 56324 443\r\n",
        b"PROXY TCP4 2001:db8::7 2001:db8::1 56324 443\r\n",
        b"PROXY TCP6 192.0.2.7 198.51.100.1 56324 443\r\n",
        b"PROXY TCP6 2001:db8::7%1 2001:db8::1 56324 443\r\n",
        b"PROXY TCP6 [2001:db8::7] 2001:db8::1 56324 443\r\n",
        b"PROXY TCP6 2001::db8::7 2001:db8::1 56324 443\r\n",
        b"PROXY TCP4 192.0.2 198.51.100.1 56324 443\r\n",
        b"PROXY TCP4 192.0.2.256 198.51.100.1 56324 443\r\n",
        b"PROXY TCP4 192.0.02.7 198.51.100.1 56324 443\r\n",
        b"PROXY TCP4 192.0.2.7\0 198.51.100.1 56324 443\r\n",
        b"PROXY TCP4 localhost 198.51.100.1 56324 443\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 056324 443\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 01 443\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 +1 443\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 -1 443\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 65536 443\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 1_0\r\n",
        "PROXY TCP4 192.0.2.7 198.51.100.1 56324 ١\r\n".encode(),
        b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\n\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\r\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\rX\n",
        b"PROXY UNKNOWN\rX",
        b"PROXY UNKNOWNS\r\n",
        b"PROXY\r\n........",
        b"PROXY \r\n.......",
    ],
)
def test_a_line_that_does_not_match_is_refused(line: bytes) -> None:
    with pytest.raises(ProxyProtocolError):
        parse(line)
    with pytest.raises(ProxyProtocolError):
        receive(line)


def test_a_line_that_only_ends_with_a_newline_is_not_complete() -> None:
    assert parse(V1.replace(b"\r\n", b"\n"))[0] is None
    with pytest.raises(ProxyProtocolError):
        parse(V1.replace(b"\r\n", b"\n") + b"GET / HTTP/1.0\r\n\r\n")


# Version 2


def test_addresses_of_version_2() -> None:
    assert read(V2) == ProxyInfo(2, "PROXY", socket.AF_INET, socket.SOCK_STREAM, SOURCE, DESTINATION)
    info = read(ipv4(SOURCE, DESTINATION, family=headers.UDP4))
    assert (info.family, info.type, info.source) == (socket.AF_INET, socket.SOCK_DGRAM, SOURCE)
    info = read(ipv6(SOURCE6, DESTINATION6))
    assert (info.family, info.type) == (socket.AF_INET6, socket.SOCK_STREAM)
    assert (info.source, info.destination) == ((*SOURCE6, 0, 0), (*DESTINATION6, 0, 0))
    assert read(ipv6(SOURCE6, DESTINATION6, family=headers.UDP6)).type == socket.SOCK_DGRAM


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")
def test_addresses_of_unix_sockets_are_as_socket_gives_them() -> None:
    info = read(unix(b"/run/client", b"/run/server"))
    assert (info.family, info.type) == (socket.AF_UNIX, socket.SOCK_STREAM)
    assert (info.source, info.destination) == ("/run/client", "/run/server")
    info = read(unix(b"", b"\0abstract", family=headers.UNIX_DGRAM))
    assert (info.type, info.source, info.destination) == (socket.SOCK_DGRAM, "", b"\0abstract")
    info = read(unix(b"x" * 108, b"\xff\xfe"))
    assert info.source == "x" * 108
    assert os.fsencode(info.destination) == b"\xff\xfe"  # type: ignore[arg-type]
    assert read(unix(b"/a\0rest is no part of it", b"")).source == "/a"


@pytest.mark.parametrize("payload", [b"", bytes(12), b"anything\xff" * 3])
@pytest.mark.parametrize("family", [headers.UNSPEC, headers.TCP4, 0xFF])
def test_a_local_connection_has_no_addresses_whatever_its_header_holds(payload: bytes, family: int) -> None:
    assert read(binary(payload, LOCAL, family)) == ProxyInfo(2, "LOCAL")


@pytest.mark.parametrize("family", [0x00, 0x01, 0x02, 0x10, 0x20, 0x30])
def test_an_unspecified_family_or_protocol_has_no_addresses(family: int) -> None:
    for payload in (b"", bytes(36), tlv(1, b"h2")):
        assert read(binary(payload, PROXY, family)) == ProxyInfo(2, "PROXY")


@pytest.mark.parametrize(
    "header",
    [
        V2.replace(b"QUIT", b"QUI\0"),
        V2[:12] + b"\x11" + V2[13:],
        V2[:12] + b"\x31" + V2[13:],
        V2[:12] + b"\x22" + V2[13:],
        V2[:13] + b"\x41" + V2[14:],
        V2[:13] + b"\x13" + V2[14:],
        V2[:13] + b"\x21" + V2[14:],
        V2[:13] + b"\x31" + V2[14:],
        binary(bytes(11), family=headers.TCP4),
        binary(bytes(35), family=headers.TCP6),
        binary(bytes(215), family=headers.UNIX_STREAM),
        ipv4(SOURCE, DESTINATION, b"\x01"),
        ipv4(SOURCE, DESTINATION, b"\x01\x00"),
        ipv4(SOURCE, DESTINATION, b"\x01\x00\x01"),
        ipv4(SOURCE, DESTINATION, tlv(1, b"h2") + b"\x01\xff\xff"),
        ipv4(SOURCE, DESTINATION, tlv(0x20, b"\x01\0\0\0")),
        ipv4(SOURCE, DESTINATION, tlv(0x20, b"\x01\0\0\0\0\x21\0\x09TLSv1.3")),
        ipv4(SOURCE, DESTINATION, tlv(3, bytes(4))),
        ipv4(SOURCE, DESTINATION, tlv(3, b"")),
        ipv4(SOURCE, DESTINATION, tlv(3, bytes(5))),
    ],
)
def test_a_header_of_version_2_that_does_not_match_is_refused(header: bytes) -> None:
    with pytest.raises(ProxyProtocolError):
        parse(header)
    with pytest.raises(ProxyProtocolError):
        receive(header)


def test_the_limit_counts_the_whole_header() -> None:
    header = ipv4(SOURCE, DESTINATION, tlv(4, bytes(100)))
    assert parse(header, len(header))[1] == len(header)
    with pytest.raises(ProxyProtocolError):
        parse(header, len(header) - 1)
    with pytest.raises(ProxyProtocolError):
        parse(header[:16], len(header) - 1)  # before the rest was received
    assert read(ipv4(SOURCE, DESTINATION, tlv(4, bytes(4096 - 16 - 12 - 3))))
    with pytest.raises(ProxyProtocolError):
        parse(ipv4(SOURCE, DESTINATION, tlv(4, bytes(4097 - 16 - 12 - 3))))


# TLVs


def test_tlvs_are_there_in_their_order_and_by_name() -> None:
    tlvs = tlv(1, b"h2") + tlv(2, "bücher.example".encode()) + tlv(4, b"") + tlv(5, b"\0\xff") + tlv(0x30, b"ns")
    info = read(ipv4(SOURCE, DESTINATION, tlvs + tlv(0xE0, b"own") + tlv(1, b"h3")))
    assert [kind for kind, _ in info.tlvs] == [1, 2, 4, 5, 0x30, 0xE0, 1]
    assert info.tlvs[5] == (0xE0, b"own")
    assert (info.alpn, info.authority, info.unique_id, info.netns) == (b"h2", "bücher.example", b"\0\xff", "ns")
    assert (info.ssl, info.crc32c) == (None, None)


def test_what_is_not_there_is_none() -> None:
    info = read(V2)
    assert (info.alpn, info.authority, info.unique_id, info.netns, info.ssl, info.crc32c) == (None,) * 6


def test_a_name_that_is_no_utf_8_is_readable_and_can_be_printed() -> None:
    info = read(ipv4(SOURCE, DESTINATION, tlv(2, b"a\xff.example")))
    assert info.authority == "a\\xff.example"
    assert info.authority.encode()


def test_what_is_said_about_tls() -> None:
    inside = tlv(0x21, b"TLSv1.3") + tlv(0x22, b"client.example") + tlv(0x23, b"TLS_AES_128_GCM_SHA256")
    inside += tlv(0x24, b"RSA-SHA256") + tlv(0x25, b"RSA2048")
    ssl = read(ipv4(SOURCE, DESTINATION, tlv(0x20, b"\x03\0\0\0\0" + inside))).ssl
    assert ssl is not None
    assert (ssl.client, ssl.verify, ssl.tls, ssl.certificate, ssl.verified) == (3, 0, True, True, True)
    assert (ssl.version, ssl.cn, ssl.cipher) == ("TLSv1.3", "client.example", "TLS_AES_128_GCM_SHA256")
    assert (ssl.sig_alg, ssl.key_alg) == ("RSA-SHA256", "RSA2048")
    assert ssl.tlvs[0] == (0x21, b"TLSv1.3")


@pytest.mark.parametrize(
    ("client", "verify", "expected"),
    [(0, 0, False), (1, 0, False), (2, 0, False), (3, 0, True), (5, 0, True), (7, 19, False), (3, 1 << 31, False)],
)
def test_a_client_is_verified_only_with_tls_a_certificate_and_no_error(
    client: int, verify: int, expected: bool
) -> None:
    assert ProxySSL(client, verify).verified is expected
    ssl = read(ipv4(SOURCE, DESTINATION, tlv(0x20, bytes([client]) + verify.to_bytes(4)))).ssl
    assert ssl == ProxySSL(client, verify)
    assert ssl.version is None


def test_the_checksum_is_verified() -> None:
    header = with_checksum(ipv4(SOURCE, DESTINATION, tlv(5, b"id")))
    info = read(header)
    assert info.crc32c == int.from_bytes(header[-4:])
    for place in set(range(16, len(header))) - {len(header) - 7}:  # where it says that there is a checksum
        with pytest.raises(ProxyProtocolError):
            parse(header[:place] + bytes([header[place] ^ 1]) + header[place + 1 :])
    assert read(with_checksum(ipv6(SOURCE6, DESTINATION6))).source == (*SOURCE6, 0, 0)


def test_two_checksums_are_refused() -> None:
    with pytest.raises(ProxyProtocolError):
        parse(with_checksum(with_checksum(V2)))


def test_the_checksum_is_that_of_the_published_examples() -> None:
    # RFC 3720, B.4
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(bytes(range(31, -1, -1))) == 0x113FDB5C
    assert crc32c(b"123456789") == 0xE3069283


# What it is made of


def test_a_header_that_was_read_cannot_be_changed_and_can_be_kept() -> None:
    info = read(ipv4(SOURCE, DESTINATION, tlv(1, b"h2")))
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.source = None  # type: ignore[misc]
    assert hash(info) == hash(read(ipv4(SOURCE, DESTINATION, tlv(1, b"h2"))))
    assert pickle.loads(pickle.dumps(info)) == info


# Piece by piece


def test_what_cannot_become_a_header_is_refused_at_once() -> None:
    assert parse(b"") == (None, SHORTEST)
    for begin in (b"G", b"GET / HTTP/1.1\r\n", b"PROXX", b"\r\n\r\n\0\r\nQUIP", b"\x16\x03\x01", b"\n", b"PROXY\r"):
        with pytest.raises(ProxyProtocolError):
            parse(begin)


hosts4 = st.ip_addresses(v=4).map(str)
hosts6 = st.ip_addresses(v=6).map(str)
ports = st.integers(0, 65535)
tlvs_ = st.lists(
    st.tuples(st.integers(0, 255).filter(lambda kind: kind not in (3, 0x20)), st.binary(max_size=40)), max_size=4
)


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    kind, hosts = draw(st.sampled_from([("TCP4", hosts4), ("TCP6", hosts6)]))
    return f"PROXY {kind} {draw(hosts)} {draw(hosts)} {draw(ports)} {draw(ports)}\r\n".encode()


@st.composite
def binaries(draw: st.DrawFn) -> bytes:
    extra = b"".join(tlv(kind, value) for kind, value in draw(tlvs_))
    make, hosts = draw(st.sampled_from([(ipv4, hosts4), (ipv6, hosts6)]))
    header = make((draw(hosts), draw(ports)), (draw(hosts), draw(ports)), extra)
    return with_checksum(header) if draw(st.booleans()) else header


@settings(deadline=None)
@given(header=st.one_of(lines(), binaries()), behind=st.binary(max_size=200), data=st.data())
def test_any_header_in_any_pieces_says_the_same_and_what_is_behind_is_left(
    header: bytes, behind: bytes, data: st.DataObject
) -> None:
    expected = headers.model(header)
    assert expected is not None and expected[0] == len(header)
    for beginning in range(len(header)):
        info, missing = parse(header[:beginning])
        assert info is None
        assert 1 <= missing <= len(header) - beginning
    sizes = iter(lambda: data.draw(st.integers(1, 300)), None)
    for pieces in (None, sizes):
        info, taken = receive(header + behind, pieces)
        assert info is not None
        assert taken == len(header)
        assert said(info) == expected[1]


@settings(deadline=None)
@given(source=st.tuples(hosts6, ports), destination=st.tuples(hosts6, ports), extra=tlvs_)
def test_a_header_says_what_was_put_into_it(source: Any, destination: Any, extra: Any) -> None:
    info = read(ipv6(source, destination, b"".join(tlv(*pair) for pair in extra)))
    assert (info.source[0], info.source[1]) == (canonical(source[0]), source[1])  # type: ignore[index]
    assert (info.destination[0], info.destination[1]) == (canonical(destination[0]), destination[1])  # type: ignore[index]
    assert list(info.tlvs) == extra
    line = read(f"PROXY TCP6 {source[0]} {destination[0]} {source[1]} {destination[1]}\r\n".encode())
    assert (line.source, line.destination) == (info.source, info.destination)


def canonical(host: str) -> str:
    return socket.inet_ntop(socket.AF_INET6, ipaddress.IPv6Address(host).packed)


def check(data: bytes, sizes: Any = None, limit: int = 4096) -> bool:
    """Compare the parser with the model; return whether there was a header."""
    expected = headers.model(data, limit)
    for at_once in (True, False):
        try:
            info, size = parse(data, limit) if at_once else receive(data, sizes, limit)
        except ProxyProtocolError:
            info = None
        if expected is None:
            assert info is None, data
        else:
            assert info is not None, data
            assert (size, said(info)) == expected, data
    return expected is not None


@settings(deadline=None)
@given(st.one_of(st.binary(), st.binary().map(V1.__add__), st.binary().map(lambda data: headers.SIGNATURE + data)))
def test_random_bytes_say_what_the_specification_says(data: bytes) -> None:
    check(data)


@settings(deadline=None)
@given(
    st.sampled_from([b"PROXY TCP4 ", b"PROXY TCP6 ", b"PROXY UNKNOWN"]),
    st.text("0123456789abf:.% \r\n\0é", max_size=110),
    st.sampled_from([b"\r\n", b"\n", b""]),
)
def test_random_lines_say_what_the_specification_says(begin: bytes, text: str, end: bytes) -> None:
    check(begin + text.encode() + end)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(16, 5000))
def test_mutated_headers_say_what_the_specification_says(seed: int, limit: int) -> None:
    generator = random.Random(seed)
    header = headers.random_header(generator)
    assume(headers.model(header, limit))
    assert check(header, limit=limit)
    check(
        headers.mutated(generator, header) + b"GET / HTTP/1.0\r\n\r\n",
        iter(lambda: generator.randrange(1, 40), None),
        limit,
    )


def test_the_fuzzer_runs_and_finds_nothing() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "fuzz_proxy.py"), "--inputs", "3000", "--seed", "1"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "3000 inputs" in done.stdout


def test_the_fuzzer_ends_with_1_where_an_address_is_wrong() -> None:
    program = f"""
import runpy, socket, sys
from fastserve import _proxy_protocol
_proxy_protocol._ip_address = lambda family, packed, port: ("192.0.2.66", port)
sys.argv = ["fuzz_proxy.py", "--inputs", "300"]
runpy.run_path({str(ROOT / "bench" / "fuzz_proxy.py")!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "says" in done.stdout


def test_the_names_of_the_tests_own_model_hold() -> None:
    # The model is worth something only if it takes what it should, too.
    assert headers.model(V1) == (len(V1), ("PROXY", V1_CLIENT, DESTINATION, ()))
    assert headers.model(V2 + b"rest") == (len(V2), ("PROXY", SOURCE, DESTINATION, ()))
    assert headers.model(b"GET / HTTP/1.0\r\n\r\n") is None
