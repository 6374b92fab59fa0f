"""MiSS (arXiv 2409.15371), formerly Bone: ``Δ(x) = Mᵀ Σ_j x_j`` for pieces ``x_j`` of ``r`` inputs.

The factors are ``B = Mᵀ`` and ``A``, which is 0 except for ``A[i mod r, i] = 1``. With
``init_weights: "mini"`` the file contains only the first ``mini_r`` columns of ``M``, which repeat.
``"bat"`` multiplies blocks of the base's weight, each of ``r`` outputs and ``r`` inputs:
``ΔW_oi = (W_oi + I) M_o``. Its update can have any rank.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *
from turret.server.adapters.operators.low_rank import piece_sums

# Name of a module's tensor, by ``peft_type``.
_TENSORS = {"MISS": "miss_block", "BONE": "bone_block"}
_MINI = key("mini_r", 1)


def _fault_of_start(value: Any) -> Text | None:
    is_known = value in ("mini", "bat") or isinstance(value, bool)
    return None if is_known else invalid(value, "mini, bat, true or false")


def _is_bat(config: Mapping[str, Any]) -> bool:
    return config.get("init_weights") == "bat"


def _shape(m: Module) -> Shape:
    start = m.config.get("init_weights")
    if start == "bat":
        if m.inputs % m.rank:
            raise Misfit(say("NOT_DIVISIBLE", size=m.inputs, what="inputs", by=m.rank))
        return OUT / R, R, R
    if start != "mini":
        return R, OUT
    if m.outputs % _MINI.of(m):
        raise Misfit(say("NOT_DIVISIBLE", size=m.outputs, what="outputs", by=_MINI.of(m)))
    return R, _MINI


def _role(m: Module | Reading) -> str:
    return _TENSORS[m.config["peft_type"].upper()]


def _sums(adapter: Reading) -> dict[tuple[int, int], torch.Tensor]:
    """The factor ``A`` by rank and inputs, so that modules of the same sizes share its memory."""
    sizes = {(m.rank, m.inputs) for m in adapter.modules.values()}
    return {size: piece_sums(*size, adapter.dtype) for size in sizes}


def _operators(m: Module) -> Piece:
    block = m.tensors[_role(m)]
    if _is_bat(m.config):
        return Dense(_turned(block, m.weight()))
    b = block.T.repeat(m.outputs // block.shape[1], 1)
    return low_rank(m.once(_sums)[m.rank, m.inputs], b)


def _turned(blocks: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``(W_oi + I) M_o`` for all blocks of the weight, ``[out_features, in_features]``."""
    size, wide = blocks.shape[2], torch.promote_types(blocks.dtype, torch.float32)
    # [blocks of outputs, outputs, blocks of inputs, inputs]
    parts = weight.to(wide).unflatten(1, (-1, size)).unflatten(0, (-1, size))
    blocks = blocks.to(wide)
    # Multiply block by block: broadcasting would copy a block for each of its outputs.
    turned = torch.bmm(parts.flatten(1, 2), blocks).view_as(parts) + blocks[:, :, None]
    return turned.flatten(2).flatten(0, 1)


METHOD = LinearMethod(
    name="miss",
    peft_types=set(_TENSORS),
    keys={"mini_r": fault_of_rank, "init_weights": _fault_of_start},
    ignored={"miss_dropout": DROPOUT},
    bias=("MiSS_only", "bone_only"),
    # With "bat", r is the side of a block, and the update can have any rank.
    rank_of=lambda m: 0 if _is_bat(m.config) else m.rank,
    most_rank=lambda inputs, outputs: inputs,
    tensors={
        role: lambda m, role=role: _shape(m) if role == _role(m) else None
        for role in _TENSORS.values()
    },
    is_dense=_is_bat,
    operators=_operators,
    start=Start(
        lambda m: {_TENSORS["MISS"]: m.zeros(m.rank, m.outputs)},
        lambda rank, targets: {"peft_type": "MISS", "init_weights": True},
    ),
)
