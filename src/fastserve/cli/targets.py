"""What the command line is asked to serve, or run: worker models, and handlers and programs of the user's."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType, TracebackType
from typing import Any, Final

from fastserve import _backend
from fastserve.cli.arguments import UsageError

OUR_FILES: Final = os.path.join(os.path.dirname(__file__), "")


def require_greenlets() -> None:
    """Raise ``UsageError`` if nothing can be served in greenlets here."""
    try:
        _backend.hub()
        _backend.green()
    except (ImportError, RuntimeError) as error:
        if find_spec("greenlet") is None:
            what = 'greenlet, which the extra brings: pip install "fastserve[greenlet]"'
            raise UsageError(f"--worker greenlet needs {what}") from None
        raise UsageError(f"--worker greenlet: {error}") from None


def find_handler(target: str) -> Any:
    """Return what ``MODULE:HANDLER`` or ``FILE.py:HANDLER`` names. Raises ``UsageError`` if there is none."""
    source, _, attributes = target.rpartition(":")
    is_file = source.endswith(".py")
    if not (is_file or all(source.split("."))) or not all(attributes.split(".")):
        raise UsageError(f"{target!r} is not MODULE:HANDLER or FILE.py:HANDLER")
    with shown_without_our_frames():
        found: Any = _import_file(source) if is_file else _import_module(source)
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            raise UsageError(f"{target!r}: {getattr(found, '__name__', found)!r} has no attribute {attribute!r}")
        found = getattr(found, attribute)
    if not callable(found):
        raise UsageError(f"{target!r} is not callable")
    return found


def _import_module(name: str) -> ModuleType:
    put_first_in_path(os.getcwd())
    try:
        __import__(name)  # importlib.import_module() would leave its own frames in a traceback
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # one that the module itself wants to import
        raise UsageError(f"cannot import {name!r}: {error}") from None
    return sys.modules[name]


def _import_file(path: str) -> ModuleType:
    """Import a file under its own name, with its directory first in ``sys.path``."""
    from importlib.util import module_from_spec, spec_from_file_location

    name = os.path.basename(path).removesuffix(".py")
    if name in sys.modules:
        raise UsageError(f"cannot import {path!r}: a module named {name!r} is in use already; rename the file")
    if not (os.path.isfile(path) and os.access(path, os.R_OK)):
        raise UsageError(f"cannot import {path!r}: there is no such file, or it is not readable")
    spec = spec_from_file_location(name, os.path.abspath(path))
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = module_from_spec(spec)
    put_first_in_path(os.path.dirname(os.path.realpath(path)))
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def shown_without_our_frames() -> Iterator[None]:
    """Have an uncaught error of the block shown, by the ``sys.excepthook`` of then, as if Python itself had run it."""
    try:
        yield
    except BaseException as error:
        tb, uncaught, show = error.__traceback__, error, sys.excepthook
        while tb and tb.tb_frame.f_code.co_filename.startswith((OUR_FILES, "<frozen importlib")):
            tb = tb.tb_next

        def hook(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
            if value is uncaught:
                traceback = value.__traceback__ = tb
            show(kind, value, traceback)

        sys.excepthook = hook
        raise


def put_first_in_path(directory: str) -> None:
    """Put ``directory`` where Python has put that of our own script, unless it was told to put none."""
    if not sys.flags.safe_path:
        sys.path[0] = directory
