"""What the commands share about their arguments."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn


class UsageError(Exception):
    """The arguments or the environment cannot be followed. The message is one line for the user."""


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that reports a wrong argument in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Print one line on standard error and exit with status 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.splitlines())}\n")


def positive(text: str) -> int:
    """Convert an argument to a positive whole number that fits into a C int."""
    if not (text.isascii() and text.isdigit() and 0 < int(text[:11]) < 2**31):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 2147483647")
    return int(text)


def limit(text: str) -> int:
    """Convert an argument to a limit: a positive whole number, or 0, also written ``off``, for none."""
    if text in ("0", "off"):
        return 0
    try:
        return positive(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor off") from None
