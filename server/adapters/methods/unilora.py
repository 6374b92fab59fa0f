"""Uni-LoRA (arXiv 2506.00799): ``Δ(x) = B A x``; each entry is one of ``D`` shared values, scaled.

``A = θ[i_A] ⊙ s_A``, ``B = θ[i_B] ⊙ s_B``. If the file does not contain the indices
(``save_indices``), they are drawn again as PEFT draws them: the numbers ``0 … D − 1``, repeated as
often as needed and shuffled, are assigned to the modules in the model's order, A before B. If ``n``
entries share a value, their scale is ``1/√n``.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *

_THETA = "base_model.unilora_theta_d"


def _operators(m: Module) -> Pieces:
    theta = m.reading.wide(_THETA)
    factors = []
    for number, factor in enumerate("AB"):
        if m.config.get("save_indices") is True:
            entries = m.tensors[f"unilora_indices_{factor}"].long()
            scales = m.tensors[f"unilora_scales_{factor}"]
            if not 0 <= int(entries.min()) <= int(entries.max()) < len(theta):
                m.fault(f"unilora_indices_{factor}", say("INVALID_INDICES", limits=len(theta)))
                return ()
        else:
            entries, scales = m.once(_dealt)[m.name][number]
        factors.append(theta[entries] * scales.to(theta.dtype))
    return low_rank(*factors)


def _dealt(adapter: Reading) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Indices and scales of the entries of A and B, by module."""
    adapter.warn(drawn("indices of theta_d", "proj_seed"))
    shapes = []
    for m in adapter.modules.values():
        shapes += [(m.rank, m.inputs), (m.outputs, m.rank)]
    total = sum(rows * columns for rows, columns in shapes)
    length = adapter.config["theta_d_length"]
    entries = draw_indices(adapter.config["proj_seed"], length, total)
    counts = torch.bincount(entries, minlength=length)
    # PEFT keeps the scales in the dtype of the base's weights.
    scales = counts.clamp(min=1).to(torch.float32).rsqrt().to(adapter.dtype)
    dealt = [
        (part.view(shape), scales[part].view(shape))
        for part, shape in zip(entries.split([r * c for r, c in shapes]), shapes, strict=True)
    ]
    return {name: dealt[2 * i : 2 * i + 2] for i, name in enumerate(adapter.modules)}


def draw_indices(seed: int, length: int, total: int) -> torch.Tensor:
    """PEFT's indices for all entries of all modules, ``[total]`` int64."""
    import numpy as np

    generator = np.random.default_rng(seed)
    drawn = np.repeat(np.arange(length), total // length)
    if total % length:
        more = generator.choice(length, size=total % length, replace=False)
        drawn = np.concatenate([drawn, more])
    generator.shuffle(drawn)
    return torch.from_numpy(drawn)


METHOD = LinearMethod(
    name="unilora",
    peft_types={"UNILORA"},
    keys={
        "proj_seed": fault_of_seed,
        "theta_d_length": fault_of_rank,
        "save_indices": fault_of_bool,
    },
    ignored={"unilora_dropout": DROPOUT, "init_theta_d_bound": START},
    bias=("unilora_only",),
    required=("theta_d_length", "proj_seed"),
    tensors={
        "unilora_indices_A": when("save_indices", indices(R, IN)),
        "unilora_indices_B": when("save_indices", indices(OUT, R)),
        "unilora_scales_A": when("save_indices", (R, IN)),
        "unilora_scales_B": when("save_indices", (OUT, R)),
    },
    shared={_THETA: (key("theta_d_length"),)},
    needs_tensors=lambda config: config.get("save_indices") is True,
    operators=_operators,
)
