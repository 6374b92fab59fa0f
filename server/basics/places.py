"""Limits on what is open at the same time."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from typing import NamedTuple

from turret.server.errors import QueueFullError
from turret.server.words import say


class Limit(NamedTuple):
    """A limit on the places that one key may take.

    Attributes:
        key: Identifies the places.
        most: The number of places.
        reason: The reason of the error if all places are taken.
        param: The parameter of that error's message that contains the number of places.
    """

    key: Hashable
    most: int
    reason: str
    param: str = "most"


class Places:
    """Counts what is open at the moment, by key. Belongs to one event loop."""

    def __init__(self) -> None:
        self._taken: dict[Hashable, int] = {}

    @contextlib.contextmanager
    def hold(self, *limits: Limit) -> Iterator[None]:
        """Take a place of each key while the block runs.

        Raises:
            QueueFullError: All places of a key are taken.
        """
        taken = self._taken
        for key, most, reason, param in limits:
            if taken.get(key, 0) >= most:
                raise QueueFullError(say(reason, **{param: most}))
        for limit in limits:
            taken[limit.key] = taken.get(limit.key, 0) + 1
        try:
            yield
        finally:
            for limit in limits:
                taken[limit.key] -= 1
                if not taken[limit.key]:
                    del taken[limit.key]
