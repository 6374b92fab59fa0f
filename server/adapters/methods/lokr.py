"""LoKr (LyCORIS, arXiv 2309.14859): ``Δ(x) = s·kron(w1, w2) x`` with ``s = alpha/r``.

Either factor may itself be a product of two. The tensors in the file determine this, not
``decompose_both`` or ``decompose_factor``. As in PEFT, ``s`` applies even if neither is a product.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *

_ROLES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
# A w1 that is computed from two factors may have this many elements, or as many as w2 has.
_MAX_WHOLE = 1 << 16
_TOO_LARGE = f"lokr_w1 must have at most {_MAX_WHOLE} elements, or no more than lokr_w2"


def _check(m: Module) -> None:
    for role, found in m.tensors.items():
        if len(found.shape) != 2:
            why = say("WRONG_SHAPE", shape=list(found.shape), expected="2 dimensions")
            m.fault(role, why)
            raise StopChecks
    first, second = (_factor_shape(m, which) for which in ("w1", "w2"))
    if first is None or second is None:
        return
    (out_l, in_m), (out_k, in_n) = first, second
    if out_l * out_k != m.outputs or in_m * in_n != m.inputs:
        m.misfit_width(in_m * in_n, out_l * out_k)
    elif "lokr_w1" not in m and out_l * in_m > max(out_k * in_n, _MAX_WHOLE):
        # w1 is multiplied out, so a small file could take much memory. PEFT makes w1 larger than w2
        # only with a large decompose_factor.
        m.fault("lokr_w1_a", say("INVALID_TENSOR", why=_TOO_LARGE))


def _factor_shape(m: Module, which: str) -> tuple[int, int] | None:
    """Rows and columns of ``w1`` or ``w2``, or None if its tensors are not one factor."""
    whole, left, right = (f"lokr_{which}{part}" for part in ("", "_a", "_b"))
    if whole in m:
        if left in m or right in m:
            m.fault(whole, say("DUPLICATE_TENSOR", other=f"{left} and {right}"))
            return None
        return m.extent(whole, 0), m.extent(whole, 1)
    if left not in m or right not in m:
        lone = right if left in m else left
        missing = lone if left in m or right in m else whole
        m.fault(missing, say("MISSING_TENSOR", by="the config"))
        return None
    ranks = m.extent(left, 1), m.extent(right, 0)
    if ranks != (m.rank, m.rank):
        rank = next(rank for rank in ranks if rank != m.rank)
        m.fault(left, say("WRONG_RANK", rank=rank, by="the config", expected=m.rank))
        return None
    return m.extent(left, 0), m.extent(right, 1)


def _rank(m: Module) -> int:
    """The module's rank; 0 if both factors are whole, because r then only divides alpha."""
    return 0 if "lokr_w1" in m and "lokr_w2" in m else m.rank


def _operators(m: Module) -> Piece:
    """Multiply small factors, scale ``w1``, and round each tensor once."""
    wide = torch.promote_types(m.reading.dtype, torch.float32)
    whole = {role: found.to(wide) for role, found in m.tensors.items()}

    def factor(which: str) -> torch.Tensor:
        if f"lokr_{which}" in whole:
            return whole[f"lokr_{which}"]
        return whole[f"lokr_{which}_a"] @ whole[f"lokr_{which}_b"]

    w1 = factor("w1") * m.scaling
    if "lokr_w2" not in m:
        left, right = whole["lokr_w2_a"], whole["lokr_w2_b"]
        rows, columns, rank = left.shape[0], right.shape[1], right.shape[0]
        if rank * (rows + columns) < rows * columns:
            return Kronecker(w1, (left, right))
    return Kronecker(w1, factor("w2"))


def _start(m: NewModule) -> dict[str, torch.Tensor]:
    """PEFT's defaults: nearly square factors, of which the large one is decomposed."""
    (out_l, out_k), (in_m, in_n) = _factors(m.outputs), _factors(m.inputs)
    small = {"lokr_w1": m.zeros(out_l, in_m)}
    if m.rank >= max(out_k, in_n) / 2:
        return {**small, "lokr_w2": m.kaiming(out_k, in_n)}
    return {**small, "lokr_w2_a": m.kaiming(out_k, m.rank), "lokr_w2_b": m.kaiming(m.rank, in_n)}


def _factors(size: int) -> tuple[int, int]:
    small = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    return small, size // small


METHOD = LinearMethod(
    name="lokr",
    peft_types={"LOKR"},
    ignored={
        **LYCORIS_IGNORED,
        "rank_dropout_scale": DROPOUT,
        "decompose_both": IN_TENSORS,
        "decompose_factor": IN_TENSORS,
    },
    alpha="alpha",
    has_patterns=True,
    rank_of=_rank,
    tensors=dict.fromkeys(_ROLES, optionally(ANY)),
    check=_check,
    operators=_operators,
    start=Start(_start),
)
