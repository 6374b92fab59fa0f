"""SHiRA (arXiv 2406.13175): ``ΔW`` is 0 except at a few positions, which the file contains."""

from __future__ import annotations

from turret.server.adapters.methods.kit import *

_VALUES, _PLACES = "shira_weight", "shira_indices"


def _operators(m: Module) -> Pieces:
    places = m.exact(_PLACES)
    if not bool((places == places.floor()).all()):
        m.fault(_PLACES, say("WRONG_DTYPE", dtype=places.dtype, expected="integers"))
        return ()
    limits = torch.tensor([[m.outputs], [m.inputs]])
    if bool(((places < 0) | (places >= limits)).any()):
        m.fault(_PLACES, say("INVALID_INDICES", limits=f"[{m.outputs}, {m.inputs}]"))
        return ()
    rows, columns = m.tensors[_PLACES].to(torch.int64)
    return sparse(rows, columns, m.tensors[_VALUES], (m.outputs, m.inputs))


METHOD = LinearMethod(
    name="shira",
    peft_types={"SHIRA"},
    ignored={"mask_type": IN_TENSORS, "random_seed": IN_TENSORS},
    # r only determines how many entries change; the update can have any rank.
    rank_of=lambda m: 0,
    tensors={
        _VALUES: (R * (IN + OUT),),
        # PEFT writes the positions as floating-point numbers on some systems.
        _PLACES: indices(2, R * (IN + OUT), or_floats=True),
    },
    check=check_places,
    operators=_operators,
)
