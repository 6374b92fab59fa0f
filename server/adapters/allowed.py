"""What is refused unless whoever runs the server allows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Allowed:
    """Switches for what is refused by default; all are off.

    Attributes:
        other_base: Adapters whose base is another one by name, if shapes fit.
        dense: Adapters whose updates are as large as the weights they change.
    """

    other_base: bool = False
    dense: bool = False


NOTHING_SPECIAL = Allowed()
