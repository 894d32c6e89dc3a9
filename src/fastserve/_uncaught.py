"""What becomes of an exception that nobody has caught, where a thread would end with it and ours goes on."""

import sys
import threading


def report(error: BaseException) -> None:
    """Give ``error``, which is being handled, to ``threading.excepthook``; if that raises, to ``sys.excepthook``."""
    try:
        threading.excepthook(
            threading.ExceptHookArgs((type(error), error, error.__traceback__, threading.current_thread()))
        )
    except Exception:
        sys.excepthook(*sys.exc_info())
