"""The build backend: that of setuptools, which asks for what extensions are built with only where they are built."""

from __future__ import annotations

import os
import sys
import sysconfig
from typing import Any

from setuptools.build_meta import *  # noqa: F403 - the other hooks of PEP 517 and PEP 660

# A free-threaded build of CPython: PEP 703. No marker of a requirement can tell one.
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def has_extensions() -> bool:
    """Return whether the C extensions are to be built. They need POSIX sockets, and the C API of CPython."""
    refused = os.environ.get("FASTSERVE_NO_EXTENSIONS", "") not in ("", "0")
    return not refused and os.name == "posix" and sys.implementation.name == "cpython"


def has_greenlets() -> bool:
    """Return whether the extensions of the hub are to be built, if there is a greenlet to build with.

    The hub waits with epoll, and needs the GIL; elsewhere its Python twin serves.
    """
    return has_extensions() and sys.platform == "linux" and not FREE_THREADED


def requirements() -> list[str]:
    """Return what the extensions are built with."""
    cython = ["cython>=3.1"] if has_extensions() else []
    # There is no greenlet for newer versions yet: without it the package is built without the hub.
    return cython + (["greenlet>=3.1"] if has_greenlets() and sys.version_info < (3, 15) else [])


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Return what is needed beside what pyproject.toml requires: PEP 517.

    The hook of setuptools would find out by running setup.py, which cannot be run without it.
    """
    return requirements()


get_requires_for_build_sdist = get_requires_for_build_editable = get_requires_for_build_wheel
