"""The position in a sequence from which each of its adapters acts. No torch.

An activated adapter (``Adapter.invocation``) acts from the last occurrence of its invocation in the
prompt on, in what is generated after it too; where there is none it never acts. What is generated
is not searched, so that the answer to a prompt does not depend on how it is cut, broken off or
computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from turret.server.basics.token_search import last_occurrence

if TYPE_CHECKING:
    # Imported for types only: the scheduler and its tests run without torch.
    from turret.server.adapters.mix import Mix


@dataclass(frozen=True, slots=True)
class Stage:
    """The adapters that act from a position on, until the next stage.

    Attributes:
        start: The first position.
        mix: Part of the request's mix, in its order.
    """

    start: int
    mix: Mix


def stages_of(mix: Mix, prompt: Sequence[int], num_virtual: int) -> tuple[Stage, ...]:
    """The stages of a request, in the order of their positions.

    Args:
        mix: All its adapters.
        prompt: Its text's tokens.
        num_virtual: Positions before them.

    Returns:
        The first begins at 0, without any activated adapter; it is the whole mix if there is none.
    """
    starts = {
        index: None if found is None else num_virtual + found
        for index, (adapter, _) in enumerate(mix.members)
        if adapter.invocation
        for found in [last_occurrence(prompt, adapter.invocation)]
    }
    if not starts:
        return (Stage(0, mix),)

    def acting(position: int | None) -> Mix:
        members = [
            member
            for index, member in enumerate(mix.members)
            if index not in starts
            or (position is not None and (start := starts[index]) is not None and start <= position)
        ]
        return mix.part(members)

    begins = sorted({start for start in starts.values() if start is not None})
    return (Stage(0, acting(None)), *(Stage(start, acting(start)) for start in begins))
