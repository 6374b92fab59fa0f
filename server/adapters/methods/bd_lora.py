"""BD-LoRA (``use_bdlora``): LoRA with one block-diagonal factor, so that shards exchange no sums.

The file contains the ``n`` blocks stacked by rows: ``lora_A`` ``[r, in / n]`` or ``lora_B``
``[out, r / n]``.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *
from turret.server.adapters.methods.lora import METHOD as LORA
from turret.server.adapters.methods.lora import A, B, with_bias

_KEY = "use_bdlora"
_LISTS = {A: "target_modules_bd_a", B: "target_modules_bd_b"}
_BLOCKS = Dim(lambda m: m.config[_KEY]["nblocks"])


def _blocked(m: Module) -> list[str]:
    """The factors of a module that the config makes block-diagonal."""
    lists = {role: m.config[_KEY].get(key) or () for role, key in _LISTS.items()}
    return [role for role, parts in lists.items() if any(part in m.name for part in parts)]


def _shape(m: Module, role: str) -> Shape:
    blocked, blocks = _blocked(m), _BLOCKS.of(m)
    if len(blocked) > 1:
        why = "both of its factors would be block-diagonal"
        m.reading.fault(_KEY, say("UNSUPPORTED_VALUE", value=m.name, why=why))
        raise StopChecks
    if blocked and m.rank % blocks:
        m.reading.fault(_KEY, say("NOT_DIVISIBLE", size=m.rank, what="rank components", by=blocks))
        raise StopChecks
    if role == A:
        return (R, IN / _BLOCKS) if A in blocked else (R, IN)
    if B not in blocked:
        return OUT, R
    if m.outputs % blocks:
        raise Misfit(say("NOT_DIVISIBLE", size=m.outputs, what="outputs", by=blocks))
    return OUT, R / _BLOCKS


def _operators(m: Module) -> Iterator[Piece]:
    factors = {role: m.tensors[role] for role in (A, B)}
    for role in _blocked(m):
        factors[role] = torch.block_diag(*factors[role].chunk(_BLOCKS.of(m)))
    return with_bias(m, Scaled(factors[A], factors[B], m.scaling))


METHOD = replace(
    LORA,
    name="bd_lora",
    accepts=lambda config: isinstance(config.get(_KEY), Mapping),
    required=(_KEY,),
    factors=None,
    tensors={
        **LORA.tensors,
        A: lambda m: _shape(m, A),
        B: lambda m: _shape(m, B),
    },
    operators=_operators,
)
