"""The module ``socketserver`` of the standard library, as it was when this package was imported.

All modules take it from here. Some are loaded later, and a program may have put fastserve, or something else, into its
place in ``sys.modules`` by then.
"""

from __future__ import annotations

import socketserver as socketserver

FORKING = getattr(socketserver, "ForkingMixIn", ())  # for isinstance(); nothing is one where there is no fork
