"""TinyLoRA (arXiv 2602.04118): ``Δ(x) = B (Σ_i v_i P_i) A x``, a handful of trained ``v``.

A and B are singular directions of the weight on which the adapter was trained. The file contains
both, so the update does not depend on the base. All modules of a group share ``v``, and ``P`` is
random and fixed.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *

_V = "base_model.tinylora_v."
_U = key("u")


def _fault_of_share(value: Any) -> Text | None:
    problem = fault_of_number(value)
    if problem is None and not 0 <= value <= 1:
        return invalid(value, "from 0 to 1")
    return problem


def _groups(adapter: Reading) -> dict[str, str]:
    """Module name → name of its ``v``. Groups are runs of modules in the model's order."""
    count = len(adapter.modules)
    groups = max(1, round(count * (1.0 - adapter.config["weight_tying"])))
    size = max(1, count // groups)
    return {
        name: f"{_V}{min(number // size, groups - 1)}"
        for number, name in enumerate(adapter.modules)
    }


def _operators(m: Module) -> Piece:
    v = m.shared[m.once(_groups)[m.name]]
    wide = torch.promote_types(v.dtype, torch.float32)
    p = m.tensors["tinylora_P"] if "tinylora_P" in m else _draw(m)
    middle = torch.einsum("i,ijk->jk", v.to(wide), p.to(wide))
    return low_rank(m.tensors["tinylora_A"], m.tensors["tinylora_B"].to(wide) @ middle)


def _draw(m: Module) -> torch.Tensor:
    """PEFT's fixed matrices of a module, ``[u, r, r]``."""
    m.warn(drawn("tinylora_P", "projection_seed"))
    seed = m.config["projection_seed"] + list(m.reading.modules).index(m.name)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    size = m.config["u"], m.rank, m.rank
    return torch.normal(mean=0.0, std=1.0 / m.rank**0.5, size=size, generator=generator)


METHOD = LinearMethod(
    name="tinylora",
    peft_types={"TINYLORA"},
    keys={
        "u": fault_of_rank,
        "weight_tying": _fault_of_share,
        "projection_seed": fault_of_seed,
        "save_projection": fault_of_bool,
    },
    ignored={"tinylora_dropout": DROPOUT, "init_v_bound": START},
    bias=("tinylora_only",),
    required=("u", "weight_tying", "projection_seed"),
    tensors={
        "tinylora_A": (R, IN),
        "tinylora_B": (OUT, R),
        "tinylora_P": when(is_saved, (_U, R, R)),
    },
    shared=lambda adapter: dict.fromkeys(adapter.once(_groups).values(), (_U,)),
    shared_prefix=_V,
    operators=_operators,
)
