"""The first passes of a step: what they tell the rows of adapters that wait for it."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import NamedTuple

import torch

from turret.kernels.fusion_gate import given_gate_reference
from turret.kernels.rows.linear import row_linear
from turret.server.adapters.device.store import AdapterStore
from turret.server.adapters.operators.token_router import TokenRouter
from turret.server.engine.scheduling.sequence import Scheduled, Sequence, Step
from turret.server.engine.step.rows import Placed

# X-LoRA computes the scalings of an adapter's components from the states of a first pass.


def scalings(router: TokenRouter, states: torch.Tensor) -> torch.Tensor:
    """``α`` of every row and module.

    Args:
        router: On the device of the states.
        states: After the final norm, ``[rows, hidden]``, any float dtype.

    Returns:
        ``[rows, modules, components]`` fp32. A row's bits do not depend on the other rows.
    """
    values = states.float()
    last = len(router.weights) - 1
    for number, (weight, bias) in enumerate(zip(router.weights, router.biases, strict=True)):
        values = row_linear(values, weight) + bias
        if number < last:
            values = values.relu_()
    modules = 1 if router.is_shared else router.modules
    logits = values[:, : modules * router.components].reshape(-1, router.components)
    gates = given_gate_reference(
        logits,
        temperature=router.temperature,
        top_k=router.top_k,
        is_renormalised=router.is_renormalised,
    )
    gates = gates.view(len(states), modules, router.components) * router.scale
    return gates.expand(-1, router.modules, -1)


def first_scalings(router: TokenRouter, num_rows: int, device: torch.device) -> torch.Tensor:
    """Scalings of the adapter's own first pass, ``[rows, modules, components]`` fp32."""
    assert router.first_pass is not None, "the first pass is not the base's own"
    # Write the values on the device: a copy from the host would make it wait for the device.
    each = [torch.full((1,), value, device=device) for value in router.first_pass]
    return torch.cat(each).expand(num_rows, router.modules, -1)


class Told(NamedTuple):
    """The scalings of a sequence's new rows, ``[rows, modules, components]`` fp32, and whose."""

    key: str
    scalings: torch.Tensor


# Scalings per sequence, for sequences that have any.
AllTold = Mapping[Sequence, Told]
NOTHING_TOLD: AllTold = {}


def guides_of(step: Step) -> Step | None:
    """The first passes of a step, as a step; None if there are none."""
    items = [
        replace(item, sequence=item.sequence.guide)
        for item in step.scheduled
        if item.sequence.guide is not None
    ]
    return Step(tuple(items), (), 0) if items else None


def told_before(guides: Step, store: AdapterStore, device: torch.device) -> AllTold:
    """Scalings of the first passes themselves: constants, for adapters that act in them."""
    return {
        item.sequence: Told(adapter.key, first_scalings(router, item.num_rows, device))
        for item in guides.scheduled
        for adapter, _ in item.sequence.mix.members
        if (router := store.router(adapter.key)) is not None
    }


def told_by(
    items: SequenceOf[Scheduled],
    placed: SequenceOf[Placed],
    states: torch.Tensor,
    store: AdapterStore,
) -> AllTold:
    """The scalings of a step's sequences, computed from their guides' final states.

    Args:
        items: The step's.
        placed: The guides, and their rows.
        states: After the final norm, ``[at least all rows, hidden]``.
        store: Holds the adapters.
    """
    rows = {place.item.sequence: (place.row_start, place.last_row + 1) for place in placed}
    waiting: dict[str, list[Sequence]] = {}
    for item in items:
        sequence = item.sequence
        if sequence.guide is not None:
            for adapter, _ in sequence.mix.members:
                if store.router(adapter.key) is not None:
                    waiting.setdefault(adapter.key, []).append(sequence)
    told: dict[Sequence, Told] = {}
    for key, sequences in waiting.items():
        router = store.router(key)
        assert router is not None
        # The router runs once for all sequences of an adapter.
        parts = [states[slice(*rows[s.guide])] for s in sequences if s.guide is not None]
        found = scalings(router, torch.cat(parts)).split([len(part) for part in parts])
        told |= {s: Told(key, some) for s, some in zip(sequences, found, strict=True)}
    return told


def given_rows(placed: SequenceOf[Placed], told: AllTold) -> dict[str, torch.Tensor]:
    """By adapter, the scalings of every row of a step (see ``StepMembers.given``)."""
    if not told:
        return {}
    num_rows = max(place.last_row for place in placed) + 1
    given: dict[str, torch.Tensor] = {}
    for place in placed:
        if place.item.sequence in told:
            key, values = told[place.item.sequence]
            if key not in given:
                given[key] = values.new_zeros(num_rows, *values.shape[1:])
            given[key][place.row_start : place.last_row + 1] = values
    return given
