"""Finds and checks the components of an adapter, and puts their updates side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from turret.kernels.fusion_gate import GATE_MULTIPLE
from turret.lazy_torch import torch
from turret.server.adapters.checkpoint.adapter_checkpoint import Findings
from turret.server.adapters.component import COMPONENTS_KEY, Component, component_refs, unfit
from turret.server.adapters.operators.adapter_operators import beyond_low_rank
from turret.server.adapters.operators.gate import Gate, GivenScore, PrototypeScore, QueryScore
from turret.server.adapters.operators.low_rank import LowRank
from turret.server.adapters.peft_format.reading import Reading
from turret.server.errors import AdapterComponentError
from turret.server.words import say


def find_components(reading: Reading) -> list[Component]:
    """Finds the adapter's components, in the config's order; each has only low-rank updates.

    Raises:
        AdapterComponentError: The error lists the components that are not registered.
        AdapterCheckpointError: The error lists the components that cannot be fused, with reasons.
    """
    components: list[Component] = []
    missing: list[tuple[str, str]] = []
    for ref in component_refs(reading.config):
        try:
            components.append(reading.find_component(ref))
        except AdapterComponentError as error:
            missing += error.violations
    if missing:
        found = "; ".join(text for _, text in missing)
        raise AdapterComponentError(
            say("COMPONENTS_MISSING", path=reading.path, found=say("FINDINGS", found=found)),
            violations=missing,
        )
    check_fusable(components, reading.path)
    reading.components = components
    return components


def check_fusable(components: Sequence[Component], path: str) -> None:
    """Rejects components that have anything but low-rank updates.

    Raises:
        AdapterCheckpointError: The error lists these components, with the reasons, under the
            fusion's ``path``.
    """
    findings = Findings(path)
    for component in components:
        if others := beyond_low_rank(component.operators):
            why = f"only low-rank updates can be fused, and it also has: {', '.join(others)}"
            findings.add(COMPONENTS_KEY, unfit(component, why))
    findings.raise_if_any()


def update_of(component: Component, name: str) -> LowRank | None:
    """A component's low-rank update of a module, or None."""
    ops = component.operators.modules.get(name)
    return ops.low_rank if ops is not None and ops.rank else None


def gate_of(
    updates: Sequence[LowRank | None],
    score_of: Callable[[torch.Tensor], QueryScore | PrototypeScore | GivenScore],
) -> Gate:
    """A gate over components.

    Args:
        updates: Each component's update of the module; None if it has none.
        score_of: Makes the score that determines a token's weights from the factors ``b`` of all
            components.
    """
    some = [update for update in updates if update is not None]
    a = filled_up(torch.cat([update.a for update in some]), GATE_MULTIPLE)
    b = filled_up(torch.cat([update.b for update in some]), GATE_MULTIPLE)
    ranks = [0 if update is None else update.rank for update in updates]
    return Gate(a, b, score_of(b), (0, *accumulate(ranks)))


def query_score(
    query: torch.Tensor, keys: torch.Tensor, b: torch.Tensor, dtype: torch.dtype
) -> QueryScore:
    """The score of a learned fusion, from ``[d_k, in]`` and ``[d_k, out]``."""
    wide = torch.promote_types(dtype, torch.float32)
    folded = b.to(wide) @ filled_up(keys.to(wide), GATE_MULTIPLE).T
    return QueryScore(filled_up(query.to(dtype), GATE_MULTIPLE), folded)


def filled_up(rows: torch.Tensor, multiple: int) -> torch.Tensor:
    """Pads rows with zeros to a multiple."""
    return torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[0] % multiple)).contiguous()
