"""Check what is in a wheel: ``python .ci/check_wheel.py WHEEL...``. It ends with status 1 if something is wrong."""

from __future__ import annotations

import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import PurePosixPath

KIB = 1024
# Bytes for x86_64. The code of other machines is larger.
LARGEST = 192 * KIB  # an extension module
ALL = 1024 * KIB  # all of them but the load generator, which serves nobody
# Beside fastserve-VERSION.dist-info.
TOP = {"fastserve", "_fastserve_pytest.py"}
PACKAGE_SUFFIXES = {".py", ".so"}
REQUIRED = {"_fastserve_pytest.py", "fastserve/__init__.py", "fastserve/py.typed"}
EXTENSIONS = {"_core", "_datagrams", "_sockets", "_streams", "_threads", "_turns"}
EXTENSIONS_ON_LINUX = EXTENSIONS | {"_load"}
# They are built where there is a greenlet to build with.
OPTIONAL_ON_LINUX = {"_green", "_hub"}
# They need the GIL.
NOT_FREE_THREADED = {"_green", "_hub", "_turns"}


def has_symbol_table(module: bytes) -> bool | None:
    """Return whether an extension module has symbols that strip(1) would take away; ``None`` if that is not known.

    Only ELF of 64 bits, little-endian, is read: elf(5). SHT_SYMTAB is 2.
    """
    if module[:6] != b"\x7fELF\x02\x01":
        return None
    (table,) = struct.unpack_from("<Q", module, 40)
    size, count = struct.unpack_from("<HH", module, 58)
    return any(struct.unpack_from("<I", module, table + number * size + 4)[0] == 2 for number in range(count))


def faults(path: str) -> Iterator[str]:
    """Yield what is wrong with a wheel."""
    _, _, python, abi, platform = path.removesuffix(".whl").rsplit("-", 4)
    pure = (python, abi, platform) == ("py3", "none", "any")
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
        modules = {name: wheel.read(name) for name in names if name.endswith(".so")}
        entry_points = next((wheel.read(name) for name in names if name.endswith(".dist-info/entry_points.txt")), b"")
    for name in sorted(names):
        where = PurePosixPath(name)
        if where.parts[0].endswith(".dist-info"):
            continue
        if where.parts[0] not in TOP or (where.suffix not in PACKAGE_SUFFIXES and name not in REQUIRED):
            yield f"{name} does not belong into it"
    for name in sorted(REQUIRED - names):
        yield f"{name} is missing"
    for point in (b"fastserve = fastserve.cli:main", b"fastserve = _fastserve_pytest"):
        if point not in entry_points:
            yield f"the entry point {point.decode()} is missing"

    built = {PurePosixPath(name).name.partition(".")[0] for name in modules}
    if pure:
        needed, allowed = set(), set()
    elif "linux" in platform:
        needed, allowed = EXTENSIONS_ON_LINUX, EXTENSIONS_ON_LINUX | OPTIONAL_ON_LINUX
    else:
        needed = allowed = EXTENSIONS
    if abi.startswith("cp") and abi.endswith("t"):
        needed, allowed = needed - NOT_FREE_THREADED, allowed - NOT_FREE_THREADED
    if not needed <= built <= allowed:
        yield f"its extension modules are {sorted(built)}, not {sorted(needed)}"
    allowance = 1 if platform.endswith("x86_64") else 2
    for name, content in sorted(modules.items()):
        print(f"  {len(content) / KIB:6.1f} KiB  {name}")
        if len(content) > LARGEST * allowance:
            yield f"{name} has {len(content)} bytes, more than {LARGEST * allowance}"
        if has_symbol_table(content):
            yield f"{name} is not stripped"
    total = sum(len(content) for name, content in modules.items() if not name.startswith("fastserve/_load."))
    print(f"  {total / KIB:6.1f} KiB that serve")
    if total > ALL * allowance:
        yield f"the extension modules that serve have {total} bytes, more than {ALL * allowance}"


def main(paths: list[str]) -> int:
    """Check the wheels, tell what is wrong, and return the exit status."""
    status = 0 if paths else 2
    for path in paths:
        print(path)
        for fault in faults(path):
            print(f"{path}: {fault}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
