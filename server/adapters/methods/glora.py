"""GLoRA (arXiv 2306.07967): ``y = (W + W ⊙ A + B) x + b + b ⊙ D + E + W C``.

If ``A`` is a vector or a number, it is a gain; ``B`` is then an update of rank 1. With ``lora``,
PEFT's default, ``A`` is a low-rank matrix that multiplies the weight elementwise, and ``B`` a
low-rank update. ``C``, ``D`` and ``E`` change the bias, if the base has one.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *

_WEIGHT: dict[str, dict[str, Shape]] = {
    "lora": {"Xd": (OUT, R), "Xu": (R, IN)},
    "vector": {"X": (OUT, 1)},
    "constant": {"X": (1,)},
    "none": {"zeros": (OUT, IN)},
}
_COLUMN: dict[str, dict[str, Shape]] = {
    "lora": {"Xd": (IN, R), "Xu": (R, 1)},
    "vector": {"X": (IN, 1)},
    "none": {"zeros": (IN, 1)},
}
_BIAS: dict[str, dict[str, Shape]] = {
    "vector": {"X": (OUT,)},
    "constant": {"X": (1,)},
    "none": {"zeros": (OUT,)},
}
# GLoRA's paths, each with the shapes of its parts and the config key that selects among them.
_PATHS = {
    **dict.fromkeys("AB", (_WEIGHT, "config_A_B")),
    "C": (_COLUMN, "config_C"),
    **dict.fromkeys("DE", (_BIAS, "config_D_E")),
}


def _shape(m: Module, path: str, part: str) -> Shape | None:
    table, name = _PATHS[path]
    kind = m.config[name]
    # Without a bias in the base, PEFT has nothing to train here. If the base has not been read yet,
    # the tensor shows whether there is a bias.
    if path in "CDE" and not m.has_bias and (m.has_bias is False or f"glora_{path}.zeros" in m):
        kind = "none"
    return table[kind].get(part)


def _operators(m: Module) -> Iterator[Piece]:
    for role, values in m.tensors.items():
        if role.endswith(".zeros") and bool(values.any()):
            m.fault(role, say("INVALID_TENSOR", why="every value must be 0"))
    if "glora_A.Xd" in m:
        yield ModulatedBase(m.tensors["glora_A.Xu"], m.tensors["glora_A.Xd"].T)
        yield low_rank(m.tensors["glora_B.Xu"], m.tensors["glora_B.Xd"])
    if "glora_A.X" in m:
        yield Gain(1.0 + m.tensors["glora_A.X"].float().reshape(-1).expand(m.outputs))
        b = m.tensors["glora_B.X"].reshape(-1, 1).expand(m.outputs, 1)
        yield low_rank(b.new_ones(1, m.inputs), b)
    if (change := _bias(m)) is not None:
        yield Bias(change)


def _bias(m: Module) -> torch.Tensor | None:
    """``b ⊙ D + E + W C``; None if the base has no bias, or if none of the three is trained."""
    served = m.bias()
    if served is None:
        return None
    total = None
    if "glora_D.X" in m:
        total = served * m.tensors["glora_D.X"].float() + m.tensors["glora_E.X"].float()
    if "glora_C.zeros" not in m:
        parts = [m.tensors[role] for role in ("glora_C.Xd", "glora_C.Xu", "glora_C.X") if role in m]
        column = parts[0].to(torch.promote_types(parts[0].dtype, torch.float32))
        if len(parts) == 2:
            column = column @ parts[1].to(column.dtype)
        change = weight_times(m.rows(), column).reshape(-1).float()
        total = change if total is None else total + change
    return total


def _rank(m: Module) -> int:
    """The served rank: 1 for a vector or a number. C adds none, because W C becomes a bias."""
    return {"lora": m.rank, "none": 0}.get(m.config["config_A_B"], 1)


METHOD = LinearMethod(
    name="glora",
    peft_types={"GLORA"},
    keys={
        "config_A_B": fault_of_choice(*_WEIGHT),
        "config_C": fault_of_choice(*_COLUMN),
        "config_D_E": fault_of_choice("constant", "vector", "none"),
    },
    refused={
        "bias": (("none", None), "biases trained in addition to GLoRA's own are not used"),
    },
    rank_of=_rank,
    required=("config_A_B", "config_C", "config_D_E"),
    tensors={
        f"glora_{path}.{part}": lambda m, path=path, part=part: _shape(m, path, part)
        for path in _PATHS
        for part in ("Xd", "Xu", "X", "zeros")
    },
    operators=_operators,
)
