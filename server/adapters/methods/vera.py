"""VeRA (arXiv 2310.11454): ``Δ(x) = λ_b ⊙ B (λ_d ⊙ (A x))`` with A and B that all modules share.

Each module uses the corner of A and B that fits its sizes, so its update is low-rank, with the two
vectors folded in.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *


def method(name: str, copies: int = 1) -> LinearMethod:
    """VeRA, or a method whose A and ``λ_d`` have ``copies`` parts, of which it uses the first."""
    a_name, b_name = (f"base_model.{name}_{factor}" for factor in "AB")

    def projections(adapter: Reading) -> tuple[torch.Tensor, torch.Tensor]:
        if is_saved(adapter):
            return adapter.shared[a_name], adapter.shared[b_name]
        adapter.warn(drawn(f"{name}_A and {name}_B"))
        return _fixed(adapter, copies * adapter.rank)

    def operators(m: Module) -> Piece:
        a, b = m.once(projections)
        wide = torch.promote_types(a.dtype, torch.float32)
        lambda_b, lambda_d = (m.tensors[f"{name}_lambda_{x}"].to(wide) for x in "bd")
        # Fold both vectors into b: a is then rounded as in PEFT, and b only once.
        b = lambda_b[:, None] * b[: m.outputs].to(wide) * lambda_d[: m.rank]
        return low_rank(a[: m.rank, : m.inputs], b)

    return LinearMethod(
        name=name,
        peft_types={name.upper()},
        keys={"save_projection": fault_of_bool, "projection_prng_key": fault_of_seed},
        ignored={f"{name}_dropout": DROPOUT, "d_initial": START},
        bias=(f"{name}_only",),
        conflicts=needs_seed,
        tensors={f"{name}_lambda_b": (OUT,), f"{name}_lambda_d": (copies * R,)},
        shared={a_name: when(is_saved, (copies * R, IN)), b_name: when(is_saved, (OUT, R))},
        operators=operators,
    )


def _fixed(adapter: Reading, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's fixed random A ``[rows, in]`` and B ``[out, rank]``, large enough for every module.

    A and then B are drawn uniformly by Kaiming's rule, from one generator of the CPU.
    """
    generator = torch.Generator(device="cpu").manual_seed(adapter.config["projection_prng_key"])

    def draw(rows: int, columns: int) -> torch.Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    first = draw(rows, adapter.inputs)
    return first, draw(adapter.outputs, adapter.rank)


METHOD = method("vera")
