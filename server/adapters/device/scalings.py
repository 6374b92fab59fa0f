"""The scalings of an adapter's components, told by states after a first pass (X-LoRA)."""

from __future__ import annotations

import torch

from turret.kernels.adapters.fusion_gate import given_gate_reference
from turret.kernels.rows.linear import row_linear
from turret.server.adapters.operators.token_router import TokenRouter


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
