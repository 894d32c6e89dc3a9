"""What ``.ci/check_wheel.py`` finds in a wheel."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import struct
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "check_wheel.py"

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(not SCRIPT.exists(), reason="these tests are not in a repository"),
]

ENTRY_POINTS = "[console_scripts]\nfastserve = fastserve.cli:main\n[pytest11]\nfastserve = _fastserve_pytest\n"
FILES = {
    "_fastserve_pytest.py": b"",
    "fastserve/__init__.py": b"",
    "fastserve/py.typed": b"",
    "fastserve-1.0.dist-info/METADATA": b"",
    "fastserve-1.0.dist-info/entry_points.txt": ENTRY_POINTS.encode(),
}
PURE = "fastserve-1.0-py3-none-any.whl"
LINUX = "fastserve-1.0-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"
SHT_SYMTAB, SHT_DYNSYM = 2, 11


@pytest.fixture
def script() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("check_wheel", str(SCRIPT))
    spec = importlib.util.spec_from_loader("check_wheel", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def elf(section: int, size: int = 1000) -> bytes:
    """Return a file of 64 bits, little-endian, with a section of a type: elf(5)."""
    header = b"\x7fELF\x02\x01".ljust(40, b"\0") + struct.pack("<Q", 64) + bytes(10) + struct.pack("<HHH", 64, 1, 0)
    return (header + struct.pack("<II", 0, section)).ljust(size, b"\0")


def extensions(script: ModuleType, section: int = SHT_DYNSYM, size: int = 1000) -> dict[str, bytes]:
    names = sorted(script.EXTENSIONS_ON_LINUX | script.OPTIONAL_ON_LINUX)
    return {f"fastserve/{name}.cpython-311-x86_64-linux-gnu.so": elf(section, size) for name in names}


def check(script: ModuleType, path: Path, files: dict[str, Any]) -> list[str]:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return list(script.faults(str(path)))


def test_a_wheel_that_is_as_it_should_be(script: ModuleType, tmp_path: Path) -> None:
    assert check(script, tmp_path / PURE, FILES) == []
    assert check(script, tmp_path / LINUX, FILES | extensions(script)) == []
    assert script.main([str(tmp_path / PURE), str(tmp_path / LINUX)]) == 0
    assert script.main([]) == 2


@pytest.mark.parametrize("name", ["fastserve/_core.c", "fastserve/_core.pyx", "fastserve/_hub.h", "tests/test_api.py"])
def test_a_file_that_does_not_belong_into_it(script: ModuleType, tmp_path: Path, name: str) -> None:
    assert check(script, tmp_path / PURE, FILES | {name: b""}) == [f"{name} does not belong into it"]
    assert script.main([str(tmp_path / PURE)]) == 1


@pytest.mark.parametrize("name", ["_fastserve_pytest.py", "fastserve/py.typed"])
def test_a_file_that_is_missing(script: ModuleType, tmp_path: Path, name: str) -> None:
    files = {other: content for other, content in FILES.items() if other != name}
    assert check(script, tmp_path / PURE, files) == [f"{name} is missing"]


def test_entry_points_that_are_missing(script: ModuleType, tmp_path: Path) -> None:
    files = FILES | {"fastserve-1.0.dist-info/entry_points.txt": b""}
    assert len(check(script, tmp_path / PURE, files)) == 2


def test_extension_modules_that_are_missing_or_too_many(script: ModuleType, tmp_path: Path) -> None:
    built = extensions(script)
    (fault,) = check(script, tmp_path / PURE, FILES | built)
    assert fault.startswith("its extension modules are ['_core', ")
    (core,) = (name for name in built if "_core" in name)
    del built[core]
    (fault,) = check(script, tmp_path / LINUX, FILES | built)
    assert fault.startswith("its extension modules are ['_datagrams', ")


def test_a_wheel_for_free_threaded_python_has_nothing_that_needs_the_gil(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / LINUX.replace("cp311-cp311", "cp314-cp314t")
    built = extensions(script)
    (fault,) = check(script, path, FILES | built)
    assert fault.startswith("its extension modules are ['_core', ")
    unwanted = tuple(f"fastserve/{name}." for name in script.NOT_FREE_THREADED)
    built = {name: content for name, content in built.items() if not name.startswith(unwanted)}
    assert check(script, path, FILES | built) == []


def test_extension_modules_that_are_not_stripped(script: ModuleType, tmp_path: Path) -> None:
    faults = check(script, tmp_path / LINUX, FILES | extensions(script, SHT_SYMTAB))
    assert faults == [f"{name} is not stripped" for name in sorted(extensions(script))]


def test_extension_modules_that_are_too_large(script: ModuleType, tmp_path: Path) -> None:
    one = next(iter(extensions(script)))
    (fault,) = check(script, tmp_path / LINUX, FILES | extensions(script) | {one: elf(SHT_DYNSYM, script.LARGEST + 1)})
    assert fault == f"{one} has {script.LARGEST + 1} bytes, more than {script.LARGEST}"
    (fault,) = check(script, tmp_path / LINUX, FILES | extensions(script, size=script.LARGEST))
    assert fault.startswith("the extension modules that serve have ")
