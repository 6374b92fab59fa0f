"""One member of a request's mix, by name. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from turret.server.errors import InvalidRequestError
from turret.server.words import say


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """One member of a request's mix, by name. ``generation`` None means the newest."""

    name: str
    generation: int | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        ok = math.isfinite(self.weight) and abs(self.weight) <= 100.0
        if not ok:
            why = say("INVALID_VALUE", value=self.weight, wanted="from -100 to 100")
            raise InvalidRequestError.of("adapters.weight", why)
