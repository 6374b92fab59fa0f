"""Random gated adapters on one fused projection, and their formula in float64."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise
from types import MappingProxyType

import torch
from torch import Tensor

from turret.server.adapters.device import Members, ProjectionLayout, SliceShape
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.gate import Gate, GivenScore, PrototypeScore, QueryScore

INNER = 192
OUTS = {"q": 96, "k": 32, "v": 32}
WIDTH = sum(OUTS.values())
LAYOUT = ProjectionLayout(1, {"qkv": tuple(SliceShape(n, out, INNER) for n, out in OUTS.items())})
# The components' ranks, by adapter and module: a to c are fusions, d and e are routers, and f takes
# its gates from a first pass. The ranks of c are far higher; a, b and f have empty parts.
RANKS = {
    "a": {"q": (4, 8), "v": (4, 0)},
    "b": {"q": (16, 16, 1), "k": (16, 0, 1), "v": (16, 16, 1)},
    "c": {"k": (200, 120)},
    "d": {"q": (4, 8, 4), "k": (16, 1, 2), "v": (4, 4, 4)},
    "e": {"v": (8, 3)},
    "f": {"q": (4, 8, 3), "v": (0, 16, 8)},
}
D_K = {"a": 16, "b": 32, "c": 48}
# The routers' top_k and temperature.
ROUTING = {"d": (2, 0.7), "e": (1, 1.0)}
# The number of each module in the results of the first pass.
FIRST_PASS = {"f": {"q": 1, "v": 0}}
MIXES: tuple[Members, ...] = (
    (("a", 1.0),),
    (("b", 1.0),),
    (("c", -0.5),),
    (("b", 0.3), ("other", 1.0), ("a", 2.0)),
    (("other", 1.0),),
    (("c", 1.0), ("b", 1.0), ("a", 1.0)),
    (("d", 1.0),),
    (("d", 0.5), ("other", 1.0), ("b", -0.7)),
    (("e", 1.0), ("d", 1.0)),
    (("f", 1.0),),
    (("f", 0.6), ("b", 1.0), ("other", 1.0)),
)


def scalings_of(num_rows: int) -> dict[str, Tensor]:
    """The results of first passes for this number of rows (``StepMembers.scalings``)."""
    return {key: torch.randn(num_rows, len(FIRST_PASS[key]), 3) for key in FIRST_PASS}


def rows_of(scalings: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """The results of first passes for some of the rows."""
    return {key: values[rows] for key, values in scalings.items()}


def gate_of(key: str, module: str, dtype: torch.dtype) -> Gate:
    """A random gate, with ranks padded to a multiple of 16."""
    ranks, out = RANKS[key][module], OUTS[module]
    held = sum(ranks)
    full = -(-held // 16) * 16

    def noise(rows: int, columns: int) -> Tensor:
        values = torch.randn(rows, columns) / columns**0.5
        values[held:] = 0 if rows == full else values[held:]
        return values.to(dtype)

    a, b = noise(full, INNER), noise(full, out)
    if key in ROUTING:
        score = PrototypeScore(torch.randn(len(ranks), INNER) / 14, *ROUTING[key])
    elif key in FIRST_PASS:
        score = GivenScore(FIRST_PASS[key][module])
    else:
        keys = b.float() @ torch.randn(D_K[key], out).T
        score = QueryScore(torch.randn(D_K[key], INNER).to(dtype) / 14, keys)
    return Gate(a, b, score, (0, *accumulate(ranks)))


def gates_of(dtype: torch.dtype) -> dict[str, dict[str, Gate]]:
    """The gates by adapter and module."""
    return {
        key: {name: gate_of(key, name, dtype) for name in modules} for key, modules in RANKS.items()
    }


def operators_of(gates: dict[str, Gate]) -> AdapterOperators:
    """The operators of one adapter."""
    return AdapterOperators(
        MappingProxyType(
            {f"model.layers.0.{name}": ModuleOperators(gate=g) for name, g in gates.items()}
        )
    )


def in_float64(
    gates: dict[str, dict[str, Gate]],
    mix: Members,
    x: Tensor,
    y: Tensor,
    scalings: Mapping[str, Tensor],
) -> Tensor:
    """``y`` plus the changes of rows that share a mix, ``[rows, WIDTH]``; only gates contribute.

    ``scalings`` has the results of first passes for these rows.
    """
    expected, column = y.double(), 0
    for module, out in OUTS.items():
        columns = slice(column, column + out)
        column += out
        for key, weight in mix:
            gate = gates.get(key, {}).get(module)
            if gate is None:
                continue
            expected[:, columns] += weight * gated(gate, x.double(), scalings.get(key))
    return expected


def gated(gate: Gate, x: Tensor, scalings: Tensor | None = None) -> Tensor:
    """``Σ_k α_k b_kᵀ a_k x``, ``[rows, out]`` float64."""
    a, b = gate.a.double(), gate.b.double()
    parts = [slice(*ends) for ends in pairwise(gate.rank_indptr)]
    v = x @ a.T
    if isinstance(gate.score, GivenScore):
        assert scalings is not None
        alphas = scalings[:, gate.score.module].double()
    else:
        alphas = _scores(gate, x, v, parts).softmax(1)
    each = [alphas[:, k : k + 1] * (v[:, p] @ b[p]) for k, p in enumerate(parts)]
    return torch.stack(each).sum(0)


def _scores(gate: Gate, x: Tensor, v: Tensor, parts: list[slice]) -> Tensor:
    """The inputs of the softmax, ``[rows, K]``; −inf for excluded components."""
    if isinstance(gate.score, QueryScore):
        q, keys = x @ gate.score.query.double().T, gate.score.keys.double()
        return torch.stack([(v[:, p] @ keys[p] * q).sum(1) for p in parts], 1)
    assert isinstance(gate.score, PrototypeScore)
    found = (x @ gate.score.prototypes.double().T).abs()
    best = found.topk(gate.score.top_k, 1)
    return torch.full_like(found, -torch.inf).scatter(
        1, best.indices, best.values / gate.score.temperature
    )
