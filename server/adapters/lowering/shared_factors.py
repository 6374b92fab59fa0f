"""Low-rank updates of matrices that all modules share (VeRA and its kin), saved or drawn again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.lowering.low_rank import fold
from turret.server.adapters.operators.updates import LowRank
from turret.server.adapters.peft_format.module_checkpoint import ModuleCheckpoint


def shared_projections(
    config: Mapping[str, Any],
    found: ModuleCheckpoint,
    base: BaseModel,
    *,
    a: tuple[str, int],
    b: tuple[str, int],
    findings: Findings,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The shared A ``[rows, inputs]`` and B ``[outputs, columns]``, as large as any module.

    Args:
        config: Its ``save_projection`` and ``projection_prng_key`` decide.
        found: The checkpoint.
        base: Gives the sizes of the modules.
        a: Name of A, and its rows.
        b: Name of B, and its columns.
        findings: Receives what is wrong; the result is then empty.
    """
    inputs = max(base.modules[name].in_features for name in found.modules)
    outputs = max(base.modules[name].out_features for name in found.modules)
    shapes = {a[0]: (a[1], inputs), b[0]: (outputs, b[1])}
    if config.get("save_projection", True):
        for name, shape in shapes.items():
            if name not in found.shared:
                findings.add(name, "is missing; save_projection is true")
            else:
                findings.check_shape(name, found.shared[name], shape)
        if not findings.fields:
            return found.shared[a[0]], found.shared[b[0]]
    else:
        for name in found.shared:
            findings.add(name, "is there, but save_projection is false")
        if "projection_prng_key" in config:
            return draw_projections(config["projection_prng_key"], *shapes.values())
        findings.add("projection_prng_key", "is required; save_projection is false")
    return torch.empty(0), torch.empty(0)


def draw_projections(
    seed: int, a: tuple[int, int], b: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's initialisation: A, then B, uniform by Kaiming's rule, from one CPU generator."""
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def draw(rows: int, columns: int) -> torch.Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    first = draw(*a)
    return first, draw(*b)


def drawn_warning(config: Mapping[str, Any], names: str) -> tuple[str, ...]:
    """What to say of projections that are not in the file."""
    if config.get("save_projection") is not False:
        return ()
    why = (
        f"{names} are not in the file; they were drawn again from projection_prng_key, as PEFT does"
    )
    return (why,)


def fold_shared(
    lambda_b: torch.Tensor,
    lambda_d: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    module: BaseModule,
    dtype: torch.dtype,
) -> LowRank:
    """``λ_b ⊙ B (λ_d ⊙ (A x))`` of the corners of A and B that fit a module's sizes."""
    # Both vectors go into b: a is then rounded as PEFT rounds it, and b once.
    b = lambda_b[:, None] * b[: module.out_features].to(lambda_b.dtype) * lambda_d
    return fold(a[:, : module.in_features], b, 1.0, dtype)
