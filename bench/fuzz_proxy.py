"""Give the parser of the PROXY protocol random headers, mutated ones and random bytes, and compare what it says.

    .venv/bin/python bench/fuzz_proxy.py --inputs 1000000 --seed 1

Each input is read at once and in random pieces. A model of the specification that is written otherwise, that of the
tests, says what has to come out. It ends with status 1 at the first input that raises anything but
``ProxyProtocolError``, takes a byte that is not of the header, does not come to an end, or says something else.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from fastserve._proxy_protocol import ProxyInfo, ProxyProtocolError, parse  # noqa: E402
from proxy_support import SIGNATURE, Said, model, mutated, random_header  # noqa: E402

BEGINNINGS = (b"", b"PROXY ", b"PROXY TCP4 ", b"PROXY TCP6 ::1 ", b"PROXY UNKNOWN", SIGNATURE, SIGNATURE + b"\x21\x11")
LIMITS = (4096, 4096, 4096, 232, 64)


class Wrong(Exception):
    """The parser did what it must not."""


def random_input(generator: random.Random) -> bytes:
    """Return a valid header, a mutated one, or random bytes, and what may come behind it."""
    kind = generator.random()
    behind = generator.choice([b"", b"GET / HTTP/1.0\r\n\r\n", b"\r\n", b"\0" * 9, b"PROXY UNKNOWN\r\n"])
    if kind < 0.15:
        return generator.choice(BEGINNINGS) + generator.randbytes(generator.randrange(60)) + behind
    header = random_header(generator)
    return (header if kind < 0.4 else mutated(generator, header)) + behind


def receive(data: bytes, limit: int, generator: random.Random) -> tuple[ProxyInfo | None, int]:
    """Read a header in random pieces, as a server does."""
    taken = turns = 0
    while True:
        info, number = parse(data[:taken], limit)
        if info is not None:
            if number != taken:
                raise Wrong(f"it took {taken} bytes of a header of {number}")
            return info, taken
        turns += 1
        if number < 1 or turns > len(data) + 1:
            raise Wrong("it does not come to an end")
        if taken == len(data):
            return None, taken
        taken = min(taken + (number if generator.random() < 0.5 else generator.randint(1, number)), len(data))


def outcome(
    read: Callable[[bytes, int], tuple[ProxyInfo | None, int]], data: bytes, limit: int
) -> tuple[ProxyInfo | None, int]:
    """Return what comes of an input."""
    try:
        return read(data, limit)
    except ProxyProtocolError:
        return None, 0


def check(expected: Said | None, info: ProxyInfo | None, size: int) -> None:
    """Compare what the parser says with what the model does. Raises ``Wrong``."""
    found = None if info is None else (size, (info.command, info.source, info.destination, info.tlvs))
    if found != expected:
        raise Wrong(f"it says {found}, and not {expected}")
    if info is not None:
        # Whatever has come through can be asked for.
        ssl = info.ssl
        repr((info.alpn, info.authority, info.unique_id, info.netns, info.crc32c))
        repr(ssl and (ssl.version, ssl.cn, ssl.cipher, ssl.sig_alg, ssl.key_alg, ssl.verified))


def run(inputs: int, seed: int) -> tuple[int, int]:
    """Try so many inputs; return how many held a header, and the number of the input that was wrong, or -1."""
    generator = random.Random(seed)
    headers = 0
    for number in range(inputs):
        data = random_input(generator)
        limit = generator.choice(LIMITS)
        expected = model(data, limit)
        headers += expected is not None
        try:
            check(expected, *outcome(parse, data, limit))
            check(expected, *outcome(functools.partial(receive, generator=generator), data, limit))
        except Exception as error:
            print(f"input {number}, {data!r}, limit {limit}: {type(error).__name__}: {error}")
            return headers, number
    return headers, -1


def main() -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="how many; 100000 by default")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers; 0 by default")
    options = parser.parse_args()
    begin = time.perf_counter()
    headers, wrong = run(options.inputs, options.seed)
    if wrong >= 0:
        return 1
    print(
        f"{options.inputs} inputs with seed {options.seed}: {headers} held a header, none was misread; "
        f"{time.perf_counter() - begin:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
