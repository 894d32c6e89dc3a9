"""How a mix-in of ours reaches the method that it extends."""

from __future__ import annotations

from fastserve._annotations import Any


def past(ours: type, theirs: type, server: object) -> Any:
    """Return ``super()`` as seen from ``ours``, passing over ``theirs`` if that is what comes next.

    The stdlib's mix-in, from which ours is derived, would do the same work a second time. It is passed over only
    where nothing stands between the two: a class that does may extend the method as well.

    :param ours: the class of the method that calls.
    :param theirs: the stdlib's mix-in of the same name.
    """
    classes = type(server).__mro__
    follows = classes[classes.index(ours) + 1]
    return super(theirs if follows is theirs else ours, server)
