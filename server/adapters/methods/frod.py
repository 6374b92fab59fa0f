"""FRoD (doi 10.1609/aaai.v40i31.39813): ``y = U (S + diag(l)) Vᵀ x + b`` instead of ``W x + b``.

The file contains ``l``, the sparse ``S``, and ``V``, which modules of the same kind share. ``U`` is
computed from the weight: its columns are those of ``W V⁻ᵀ``, each divided by its length. The error
of a 4-bit weight therefore affects ``U``, and the worse the condition of ``V``, the more it affects
the update. The error is estimated and reported. The adapter is rejected if most of the update would
be noise.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *

_L, _VALUES = "frod_lambda_l", "frod_lambda_s_values"
_V, _PLACES, _SIZE = "frod_V", "frod_s_indices", "frod_s_size"
# Relative error of normally distributed weights in NF4 with blocks of 64.
_NF4_ERROR = 0.094
# Highest accepted ratio of noise to trained update.
_MOST_NOISE = 0.5
_COUNT = extent(_VALUES, 0)


def _name(part: str, module: str) -> str:
    """The name of a tensor that all modules of one kind share; PEFT defines the kinds' names."""
    *_, folder, leaf = ("", *module.split("."))
    kind = leaf if not folder or folder.isdigit() else f"{folder}_{leaf}"
    return f"base_model.{part}.{kind}"


def _shared(adapter: Reading) -> Shared:
    found: dict[str, Any] = {}
    for name, m in adapter.modules.items():
        # The base determines these sizes, so a mismatch means that the adapter is for another base.
        side = Dim(lambda _, size=m.inputs: size, is_served=True)
        found[_name(_V, name)] = (side, side)
        found[_name(_PLACES, name)] = indices(2, _COUNT.of(m))
        found[_name(_SIZE, name)] = indices(2, or_floats=True)
    return found


class _Solved:
    """Holds the inverse of ``V`` for one kind of module at a time, and the sums of the noise.

    Attributes:
        trained: The squared norm of all updates so far.
        moved: The expected squared norm of their errors.
    """

    def __init__(self, adapter: Reading) -> None:
        self._adapter = adapter
        self._kind, self._inverse = "", None
        self.trained = self.moved = 0.0

    def inverse(self, kind: str) -> torch.Tensor | None:
        """``V⁻¹`` fp64, as large as a weight; adds a fault and returns None if V is singular."""
        if kind != self._kind:
            v = self._adapter.shared[kind].to(torch.float64)
            inverse, info = torch.linalg.inv_ex(v)
            is_sound = not int(info) and bool(torch.isfinite(inverse).all())
            if not is_sound:
                self._adapter.fault(kind, say("INVALID_TENSOR", why="the matrix is singular"))
            self._kind, self._inverse = kind, inverse if is_sound else None
        return self._inverse


def _order(adapter: Reading) -> list[Module]:
    """Modules sorted by their ``V``, so that each inverse is computed once."""
    return sorted(adapter.modules.values(), key=lambda m: _name(_V, m.name))


def _operators(m: Module) -> Pieces:
    places, sizes = m.shared[_name(_PLACES, m.name)], m.shared[_name(_SIZE, m.name)]
    if bool(((places < 0) | (places >= m.inputs)).any()):
        m.reading.fault(_name(_PLACES, m.name), say("INVALID_INDICES", limits=m.inputs))
    if sizes.tolist() != [m.inputs, m.inputs]:
        why = say("INVALID_VALUE", value=sizes.tolist(), wanted=f"[{m.inputs}, {m.inputs}]")
        m.reading.fault(_name(_SIZE, m.name), why)
    solved = m.once(_Solved)
    inverse = None if m.reading.findings.fields else solved.inverse(_name(_V, m.name))
    if inverse is None:
        return ()
    update, noise = _update(m, inverse)
    solved.trained += float(update.square().sum())
    solved.moved += noise**2
    return Dense(update)


def _check_noise(adapter: Reading) -> None:
    solved = adapter.once(_Solved)
    share = (solved.moved / solved.trained) ** 0.5 if solved.trained else 0.0
    if share > _MOST_NOISE:
        adapter.fault(f"base_model.{_V}", say("NOISY_UPDATE", share=share))
    adapter.warn(say("SOLVED_FROM_BASE", names="U", share=share))


def _update(m: Module, inverse: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The update, fp64, and the expected norm of the error that NF4 causes in it.

    With ``W = U diag(l₀) Vᵀ``, the update is ``U C Vᵀ``, where ``C = S + diag(l − l₀)``. An error
    ``E`` of the weight adds ``E V⁻ᵀ diag(1 / l₀) C Vᵀ``.
    """
    weight, v = m.weight().to(torch.float64), m.shared[_name(_V, m.name)].to(torch.float64)
    columns = weight @ inverse.T
    lengths = columns.norm(dim=0)
    scale = torch.where(lengths > 1e-12, 1.0 / lengths, 0.0)
    middle = torch.diag(m.exact(_L) - lengths * (scale > 0))
    places = m.shared[_name(_PLACES, m.name)].to(torch.int64)
    middle.index_put_((places[0], places[1]), m.exact(_VALUES), accumulate=True)
    change = scale[:, None] * (middle @ v.T)
    root = weight.square().mean().sqrt() * len(weight) ** 0.5
    noise = _NF4_ERROR * float(root * (inverse.T @ change).norm())
    return columns @ change, noise


METHOD = LinearMethod(
    name="frod",
    peft_types={"FROD"},
    ignored={
        "projection_prng_key": IN_TENSORS,
        "sparse_rate": IN_TENSORS,
        "regularization_alpha": IN_TENSORS,
        "progressbar": PEFTS_WORK,
        "runtime_offload_base_weight": PEFTS_WORK,
        "frod_dropout": DROPOUT,
    },
    refused={
        "save_projection": (
            (True, None),
            "V is then not in the file; save the adapter with save_projection=True on the base"
            " model it was trained on",
        )
    },
    bias=("frod_only",),
    rank=None,
    tensors={_L: (IN,), _VALUES: (_COUNT,)},
    shared=_shared,
    shared_prefix="base_model.frod_",
    more_integers={_PLACES, _SIZE},
    is_dense=always,
    order=_order,
    operators=_operators,
    after=_check_noise,
)
