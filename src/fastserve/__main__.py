"""``python -m fastserve``: the same program as the command ``fastserve``."""

from __future__ import annotations

import sys

from fastserve.cli import main

if __name__ == "__main__":
    sys.exit(main())
