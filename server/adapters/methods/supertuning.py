"""Super-Tuning (arXiv 2607.09287): ``ΔW = S + s·B A``, where ``S`` is sparse.

Without ``r`` there is no low-rank part. The file must contain the positions of the entries of
``S``. PEFT can also derive them from the largest weights of the base that the adapter was trained
on, but other weights would give other positions.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *

_VALUES, _PLACES = "supertuning_values", "supertuning_indices"
_A, _B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"
_COUNT, _RANK = extent(_VALUES, 0), key("r")


def _operators(m: Module) -> Iterator[Piece]:
    places, size = m.tensors[_PLACES].long(), m.inputs * m.outputs
    if len(places) and (int(places.min()) < 0 or int(places.max()) >= size):
        m.misfit(say("INVALID_INDICES", limits=size), _PLACES)
        return
    if _A in m:
        rank, alpha = m.config["r"], m.config.get("lora_alpha")
        # PEFT's default alpha is twice the rank.
        scaling = (2 * rank if alpha is None else alpha) / rank
        wide = torch.promote_types(m.tensors[_B].dtype, torch.float32)
        yield low_rank(m.tensors[_A], m.tensors[_B].to(wide) * scaling)
    shape = m.outputs, m.inputs
    yield sparse(places // m.inputs, places % m.inputs, m.tensors[_VALUES], shape)


METHOD = LinearMethod(
    name="supertuning",
    peft_types={"SUPERTUNING"},
    keys={"r": optional(fault_of_rank), "lora_alpha": optional(fault_of_number)},
    ignored={"lora_dropout": DROPOUT, "sparsity": IN_TENSORS, "select_top": IN_TENSORS},
    refused={
        "save_precomputed_indices": (
            (True,),
            "the file then lacks the positions of the update; save the adapter with"
            " save_precomputed_indices=True on the base model it was trained on",
        )
    },
    rank=None,
    rank_of=lambda m: m.config.get("r") or 0,
    tensors={
        _VALUES: (_COUNT,),
        _PLACES: indices(_COUNT),
        _A: when("r", (_RANK, IN)),
        _B: when("r", (OUT, _RANK)),
    },
    check=check_places,
    operators=_operators,
)
