"""The names that annotations need, without :mod:`typing`.

What ``import fastserve`` loads takes them from here. No annotation is evaluated when a module is loaded, and typing
(with ``re``) takes a quarter of the time and of the memory of that import: memory that fork(2) has to copy the page
tables of for each request of a forking server.
"""

from __future__ import annotations

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any as Any
    from typing import Final as Final
    from typing import Protocol as Protocol
    from typing import Self as Self
else:
    # ``typing.get_type_hints()`` finds them. It is not asked about modules, whose variables alone are Final.
    Any = Final = Protocol = Self = object
