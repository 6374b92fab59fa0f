"""Finds and checks the components of an adapter, and puts their updates side by side."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from itertools import accumulate

from turret.kernels.fusion_gate import GATE_MULTIPLE
from turret.lazy_torch import torch
from turret.server.adapters.checkpoint.adapter_checkpoint import AdapterCheckpoint, Findings
from turret.server.adapters.component import (
    COMPONENTS_KEY,
    Component,
    FindComponent,
    component_refs,
    unfit,
)
from turret.server.adapters.operators.gate import Gate, GivenScore, PrototypeScore, QueryScore
from turret.server.adapters.operators.low_rank import LowRank
from turret.server.adapters.peft_format.reading import Reading
from turret.server.errors import AdapterComponentError
from turret.server.words import Text, say

# Names, for messages, of operators that a component must not have.
_WORDS = {
    "hadamard": "a Hadamard update",
    "kronecker": "a Kronecker update",
    "dense": "a dense update",
    "sparse": "entries of the weight",
    "gain": "a gain",
    "input_gain": "an input gain",
    "bias": "a bias",
    "soft_prompt": "soft tokens or a prefix",
    "attention": "a prompt that layers attend to",
    "experts": "updates of experts",
    "head": "an embedding or head",
    "tokens": "an embedding or head",
    "classifier": "a classification head",
    "router": "scalings that a first pass tells",
    "invocation": "an invocation before which it does nothing",
}


def find_components(
    checkpoint: AdapterCheckpoint | Reading, find_component: FindComponent
) -> list[Component]:
    """All components in the config's order; each must have only low-rank updates.

    Raises:
        AdapterComponentError: Some are not registered; names all.
        AdapterCheckpointError: Some cannot be fused; names all, and why.
    """
    components: list[Component] = []
    missing: list[tuple[str, str]] = []
    for ref in component_refs(checkpoint.config):
        try:
            components.append(find_component(ref))
        except AdapterComponentError as error:
            missing += error.violations
    if missing:
        found = "; ".join(text for _, text in missing)
        raise AdapterComponentError(
            say("COMPONENTS_MISSING", path=checkpoint.path, found=say("FINDINGS", found=found)),
            violations=missing,
        )
    check_fusable(components, checkpoint.path)
    return components


def check_fusable(components: Sequence[Component], path: str) -> None:
    """Whether components have low-rank updates and nothing else.

    Raises:
        AdapterCheckpointError: Some do not; names all, and why. ``path`` is the fusion's.
    """
    findings = Findings(path)
    for component in components:
        others = _other_operators(component)
        if others:
            why = f"it has {' and '.join(others)}, and only low-rank updates can be fused"
            findings.add(COMPONENTS_KEY, unfit(component, why))
    findings.raise_if_any()


def _other_operators(component: Component) -> list[str]:
    """Names of a component's operators other than low-rank updates."""
    operators = component.operators
    used = {
        part.name
        for module in operators.modules.values()
        for part in module.operators
        if not isinstance(part, LowRank)
    }
    used |= {
        field.name
        for field in fields(operators)
        if field.init and field.name != "modules" and getattr(operators, field.name) is not None
    }
    return list(dict.fromkeys(_WORDS.get(name, f"an operator {name}") for name in sorted(used)))


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
        score_of: From the factors ``b`` of all, the score that determines a token's weights.
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


def left_out(components: Sequence[Component], modules: Collection[str]) -> list[Text]:
    """A warning about modules that components adapt and the gated adapter does not."""
    adapted = {name for component in components for name in component.operators.modules}
    count = len(adapted.difference(modules))
    return [say("COMPONENTS_ADAPT_MORE", count=count)] if count else []
