"""The first passes of a step, and the scalings that they give the rows of their sequences."""

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


class SequenceScalings(NamedTuple):
    """The scalings of a sequence's new rows, ``[rows, modules, components]`` fp32, and whose."""

    key: str
    scalings: torch.Tensor


# Scalings per sequence, for sequences that have any.
StepScalings = Mapping[Sequence, SequenceScalings]
NO_SCALINGS: StepScalings = {}


def first_passes_of(step: Step) -> Step | None:
    """The first passes of a step, as a step; None if there are none."""
    items = [
        replace(item, sequence=item.sequence.first_pass)
        for item in step.scheduled
        if item.sequence.first_pass is not None
    ]
    return Step(tuple(items), (), 0) if items else None


def constant_scalings(
    first_passes: Step, store: AdapterStore, device: torch.device
) -> StepScalings:
    """Scalings of the first passes themselves: constants, for adapters that act in them."""
    return {
        item.sequence: SequenceScalings(adapter.key, first_scalings(router, item.num_rows, device))
        for item in first_passes.scheduled
        for adapter, _ in item.sequence.mix.members
        if (router := store.router(adapter.key)) is not None
    }


def computed_scalings(
    items: SequenceOf[Scheduled],
    placed: SequenceOf[Placed],
    states: torch.Tensor,
    store: AdapterStore,
) -> StepScalings:
    """The scalings of a step's sequences, computed from the final states of their first passes.

    Args:
        items: The step's.
        placed: The first passes, and their rows.
        states: After the final norm, ``[at least all rows, hidden]``.
        store: Holds the adapters.
    """
    rows = {place.item.sequence: (place.row_start, place.last_row + 1) for place in placed}
    waiting: dict[str, list[Sequence]] = {}
    for item in items:
        sequence = item.sequence
        if sequence.first_pass is not None:
            for adapter, _ in sequence.mix.members:
                if store.router(adapter.key) is not None:
                    waiting.setdefault(adapter.key, []).append(sequence)
    found: dict[Sequence, SequenceScalings] = {}
    for key, sequences in waiting.items():
        router = store.router(key)
        assert router is not None
        # The router runs once for all sequences of an adapter.
        parts = [states[slice(*rows[s.first_pass])] for s in sequences if s.first_pass is not None]
        each = scalings(router, torch.cat(parts)).split([len(part) for part in parts])
        found |= {s: SequenceScalings(key, some) for s, some in zip(sequences, each, strict=True)}
    return found


def given_rows(placed: SequenceOf[Placed], found: StepScalings) -> dict[str, torch.Tensor]:
    """By adapter, the scalings of every row of a step (see ``StepMembers.given``)."""
    if not found:
        return {}
    num_rows = max(place.last_row for place in placed) + 1
    given: dict[str, torch.Tensor] = {}
    for place in placed:
        if place.item.sequence in found:
            key, values = found[place.item.sequence]
            if key not in given:
                given[key] = values.new_zeros(num_rows, *values.shape[1:])
            given[key][place.row_start : place.last_row + 1] = values
    return given
