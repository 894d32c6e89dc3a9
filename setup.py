"""Build the C extensions; everything else about the package is in pyproject.toml.

Set ``FASTSERVE_NO_EXTENSIONS=1`` to build the pure-Python package. It is an explicit choice: where the
extension is asked for and its compilation fails, the build fails.
"""

import glob
import importlib.util
import os
import sys

from build_backend import FREE_THREADED, has_extensions, has_greenlets
from setuptools import Extension, setup

ON_STACKS = {"_green", "_hub", "_turns"}  # what a greenlet that waits has on its stack


def extensions() -> list[Extension]:
    """Return the extension modules to build: none where they are refused or not supported."""
    if not has_extensions():
        return []
    # Imported here so that the pure-Python build does not need Cython.
    from Cython.Build import cythonize

    headers = sorted(glob.glob("src/fastserve/*.h") + glob.glob("src/fastserve/*.px[di]"))
    # Python's own flags ask for debug information, three quarters of the size, and often for -O3, an eighth of the rest
    # that no measurement shows. Symbols are left out too. CFLAGS of one's own are respected.
    options = link_options = []
    if "CFLAGS" not in os.environ:
        options = ["-g0", "-O2"]
        link_options = ["-Wl,-x"] if sys.platform == "darwin" else ["-Wl,-s"]
        if sys.platform == "linux":
            link_options += ["-Wl,-z,noseparate-code"]  # pages of zeros between code and data
    greenlet_options = []
    if options and sys.platform == "linux":
        # Every greenlet that waits keeps a copy of the C stack below it, where rare cases are functions of their own.
        greenlet_options = ["-fno-inline-functions-called-once"]
    names = ["_sockets", "_core", "_streams", "_datagrams", "_threads"]
    # It looks into classes that other threads may change, which the GIL alone makes safe; nor are there greenlets.
    if not FREE_THREADED:
        names.append("_turns")
    if sys.platform == "linux":  # the only system that the load generator of the benchmarks knows
        names.append("_load")
    includes = []
    if has_greenlets() and importlib.util.find_spec("greenlet") is not None:
        names += ["_hub", "_green"]
        includes.append(os.path.dirname(importlib.import_module("greenlet").__file__ or ""))
    modules: list[Extension] = cythonize(
        [
            Extension(
                f"fastserve.{name}",
                [f"src/fastserve/{name}.pyx"],
                depends=headers,
                extra_compile_args=options + (greenlet_options if name in ON_STACKS else []),
                extra_link_args=link_options,
                include_dirs=includes,
            )
            for name in names
        ]
    )
    return modules


setup(ext_modules=extensions())
