"""The interface: every name, signature, value and base class of ``socketserver``, and the extensions."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import os
import selectors
import socket
import socketserver
import subprocess
import sys
import threading
import time
import typing
from io import BufferedIOBase
from types import FunctionType
from typing import Any
from unittest import mock

import pytest

import fastserve
from fastserve.sockets import OFF

NAMES = sorted(socketserver.__all__)
# The combinations of 3.12, which fastserve has on every Python.
PREDEFINED = [
    f"{worker}{server}"
    for worker in ("Threading", "Forking")
    for server in ("TCPServer", "UDPServer", "UnixStreamServer", "UnixDatagramServer")
]
REACHED = {
    "BufferedIOBase": BufferedIOBase,
    "os": os,
    "selectors": selectors,
    "socket": socket,
    "sys": sys,
    "threading": threading,
    "time": time.monotonic,
}

# What the import may load that socketserver has not: no shared library, and little code.
ALLOWED_BESIDE = {"__future__", "_functools", "contextlib", "functools", "importlib", "signal", "warnings", "weakref"}


def pairs() -> list[Any]:
    """Return the public classes of ours and of the stdlib, by name."""
    return [pytest.param(getattr(fastserve, name), getattr(socketserver, name), id=name) for name in NAMES]


def public(cls: type) -> dict[str, Any]:
    """Return what a class itself defines under public names and special ones that are functions."""
    return {
        name: value
        for name, value in vars(cls).items()
        if not name.startswith("_") or (name.endswith("__") and isinstance(value, FunctionType))
    }


def test_every_public_name_is_there() -> None:
    assert set(NAMES) <= set(fastserve.__all__)
    assert len(set(fastserve.__all__)) == len(fastserve.__all__)
    for name in fastserve.__all__:
        assert hasattr(fastserve, name)


def test_extensions_are_the_names_that_socketserver_has_not() -> None:
    assert set(fastserve.__extensions__) == set(fastserve.__all__) - set(NAMES) - set(PREDEFINED)


def test_the_version_is_that_of_fastserve() -> None:
    try:
        installed = importlib.metadata.version("fastserve")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fastserve is imported from its sources, and not installed")
    assert fastserve.__version__ == installed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("name", PREDEFINED)
def test_every_combination_is_predefined(name: str) -> None:
    worker = "ThreadingMixIn" if name.startswith("Threading") else "ForkingMixIn"
    server = name.removeprefix("Threading").removeprefix("Forking")
    assert name in fastserve.__all__
    cls = getattr(fastserve, name)
    for module in (fastserve, socketserver):
        assert issubclass(cls, getattr(module, worker))
        assert issubclass(cls, getattr(module, server))
    assert cls.__mro__.index(fastserve.ForkingMixIn if worker == "ForkingMixIn" else fastserve.ThreadingMixIn) < (
        cls.__mro__.index(getattr(fastserve, server))
    )


@pytest.mark.parametrize(("ours", "theirs"), pairs())
def test_every_attribute_is_defined_by_the_class_of_the_same_name(ours: type, theirs: type) -> None:
    assert set(public(theirs)) <= set(public(ours))


@pytest.mark.parametrize(("ours", "theirs"), pairs())
def test_no_class_has_a_public_attribute_that_the_stdlibs_has_not_but_these(ours: type, theirs: type) -> None:
    added = {
        fastserve.TCPServer: {*OFF, "from_socket"},
        fastserve.UDPServer: {"max_batch", "gather_replies", "truncated_datagrams", "dropped_datagrams"},
        fastserve.ThreadingMixIn: {"reuse_threads", "handshake_timeout"},
        getattr(fastserve, "ForkingMixIn", None): {"handshake_timeout"},
    }
    assert {name for name in public(ours) if not name.startswith("_")} - added.get(ours, set()) <= set(public(theirs))


@pytest.mark.parametrize(("ours", "theirs"), pairs())
def test_methods_are_ours_with_the_stdlibs_signature(ours: type, theirs: type) -> None:
    for name, value in public(theirs).items():
        if not isinstance(value, FunctionType):
            continue
        function = vars(ours)[name]
        assert isinstance(function, FunctionType), name
        assert function.__module__.startswith("fastserve."), name
        expected, found = (
            [
                (parameter.name, parameter.kind, parameter.default)
                for parameter in inspect.signature(f).parameters.values()
            ]
            for f in (value, function)
        )
        assert found == expected, name


@pytest.mark.parametrize(("ours", "theirs"), pairs())
def test_class_attributes_have_the_stdlibs_values(ours: type, theirs: type) -> None:
    for name, value in public(theirs).items():
        if not isinstance(value, FunctionType):
            assert vars(ours)[name] == value, name
            assert type(vars(ours)[name]) is type(value), name


@pytest.mark.parametrize(("ours", "theirs"), pairs())
def test_classes_and_methods_have_docstrings_of_their_own(ours: type, theirs: type) -> None:
    assert ours.__doc__
    assert ours.__doc__ != theirs.__doc__
    for name, value in public(ours).items():
        if isinstance(value, FunctionType) and not name.startswith("_"):
            assert value.__doc__, name


def test_the_extensions_have_docstrings() -> None:
    assert fastserve.__doc__
    for name in fastserve.__extensions__:
        value = getattr(fastserve, name)
        if callable(value):
            assert value.__doc__, name


@pytest.mark.parametrize(("ours", "theirs"), pairs())
def test_a_class_inherits_from_the_stdlibs_of_the_same_name(ours: type, theirs: type) -> None:
    assert ours is not theirs
    assert issubclass(ours, theirs)
    assert ours.__name__ == theirs.__name__


def test_the_classes_are_related_as_in_the_stdlib() -> None:
    for name in NAMES:
        for other in NAMES:
            expected = issubclass(getattr(socketserver, name), getattr(socketserver, other))
            assert issubclass(getattr(fastserve, name), getattr(fastserve, other)) == expected, (name, other)
            assert issubclass(getattr(fastserve, name), getattr(socketserver, other)) == expected, (name, other)
            assert not issubclass(getattr(socketserver, name), getattr(fastserve, other)), (name, other)


@pytest.mark.parametrize(("ours", "theirs"), pairs())
def test_our_part_of_the_order_of_resolution_is_the_stdlibs(ours: type, theirs: type) -> None:
    mine = [cls.__name__ for cls in ours.__mro__ if cls.__module__.startswith("fastserve.")]
    assert mine == [cls.__name__ for cls in theirs.__mro__ if cls is not object]


@pytest.mark.parametrize(("ours", "theirs"), pairs())
def test_every_name_that_an_instance_finds_is_found_in_our_classes_first(ours: type, theirs: type) -> None:
    for name in dir(theirs):
        if name.startswith("__"):
            continue
        owner = next(cls for cls in ours.__mro__ if name in vars(cls))
        assert owner.__module__.startswith("fastserve."), (name, owner)


@pytest.mark.parametrize("name", sorted(REACHED))
def test_what_programs_reach_through_socketserver_is_reached_through_fastserve(name: str) -> None:
    assert getattr(fastserve, name) is REACHED[name] is getattr(socketserver, name)


@pytest.mark.parametrize("name", ["_ServerSelector", "_SocketWriter", "_Threads", "_NoThreads"])
def test_the_private_names_of_the_module_are_there(name: str) -> None:
    assert issubclass(getattr(fastserve, name), getattr(socketserver, name))


@pytest.mark.parametrize("private", ["_SocketWriter", "_Threads", "_NoThreads"])
def test_the_private_classes_have_the_stdlibs_methods(private: str) -> None:
    for name, value in vars(getattr(socketserver, private)).items():
        if isinstance(value, FunctionType):
            found = getattr(getattr(fastserve, private), name)
            assert list(inspect.signature(found).parameters) == list(inspect.signature(value).parameters)


@pytest.mark.parametrize(("ours", "theirs"), pairs())
def test_classes_are_plain_python(ours: Any, theirs: Any) -> None:
    assert type(ours) is type
    assert "__slots__" not in vars(ours)
    assert ours.__new__ is object.__new__
    assert hasattr(ours.__new__(ours), "__dict__")
    ours.assigned_at_run_time = 1
    assert ours.assigned_at_run_time == 1
    del ours.assigned_at_run_time
    with mock.patch.object(ours, "__init__", return_value=None):
        ours()


def test_editing_bases_is_allowed_where_the_stdlib_allows_it() -> None:
    class Extra:
        pass

    for name in NAMES:
        allowed = []
        for module in (socketserver, fastserve):
            cls = getattr(module, name)
            before = cls.__bases__
            try:
                cls.__bases__ = (Extra, *before)
            except TypeError:
                allowed.append(False)
            else:
                cls.__bases__ = before
                allowed.append(True)
        assert allowed[1] or not allowed[0], name


def test_the_import_is_light() -> None:
    # socketserver itself has loaded the rest. Each shared library and each page of a module is copied by fork(2).
    program = """
import sys, socketserver
before = set(sys.modules)
import fastserve
print(sorted(name for name in set(sys.modules) - before if not name.startswith(("fastserve", "_cython", "cython"))))
print(sorted(name for name in sys.modules if name.startswith("fastserve.workers.")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    beside, workers = (ast.literal_eval(line) for line in done.stdout.splitlines())
    assert {name.partition(".")[0] for name in beside} <= ALLOWED_BESIDE
    assert workers == [f"fastserve.workers.{name}" for name in ("_past", "_reuse", "forking", "threads")]


def test_names_that_are_loaded_late_are_as_the_others() -> None:
    program = """
import sys, fastserve
assert set(fastserve.__all__) <= set(dir(fastserve)), set(fastserve.__all__) - set(dir(fastserve))
late = set(fastserve._HOMES)
assert late < set(fastserve.__all__), late - set(fastserve.__all__)
assert not late & set(vars(fastserve))
for name in sorted(late):
    found = getattr(fastserve, name)
    assert vars(fastserve)[name] is found is getattr(sys.modules[fastserve._HOMES[name]], name)
try:
    fastserve.NoSuchName
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("module 'fastserve' has no attribute 'NoSuchName'\n", "")


def test_what_is_loaded_late_is_built_on_the_stdlibs_module_and_no_other() -> None:
    program = """
import sys, socketserver, fastserve
sys.modules["socketserver"] = fastserve
from fastserve import *
import fastserve.testing
names = fastserve.__all__
modules = [module for name, module in sys.modules.items() if name.startswith("fastserve.")]
print({vars(module).get("socketserver", socketserver) is socketserver for module in modules})
print(all(issubclass(getattr(fastserve, name), socketserver.BaseServer) for name in names if name.endswith("Server")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("{True}\nTrue\n", "")


def test_the_annotations_can_be_asked_for() -> None:
    for name in NAMES:
        cls = getattr(fastserve, name)
        typing.get_type_hints(cls)
        for method in vars(cls).values():
            if inspect.isfunction(method):
                typing.get_type_hints(method)


def test_the_implementation_is_that_of_the_environment() -> None:
    for refused, expected in (("1", {"py"}), ("0", {"c", "py"})):
        done = subprocess.run(
            [sys.executable, "-c", "import fastserve; print(fastserve.implementation)"],
            env={**os.environ, "FASTSERVE_NO_EXTENSIONS": refused},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout.strip() in expected


def test_a_star_import_gives_the_public_names() -> None:
    namespace: dict[str, Any] = {}
    exec("from fastserve import *", namespace)
    assert set(fastserve.__all__) <= set(namespace)
