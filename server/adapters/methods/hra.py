"""HRA (arXiv 2405.17484): ``y = W R x``, where ``R`` is a product of reflections.

``R = Π (I − 2 u_i u_iᵀ)``, or ``I − 2 U Uᵀ`` with ``apply_GS``. ``R − I`` has rank ``r``. If the
columns of ``V`` are the unit reflection vectors, ``R − I`` is ``P Vᵀ`` (the compact WY form), so
``ΔW = W P Vᵀ``. Training starts from pairs of equal reflections, for which ``P Vᵀ`` is a small
difference of large factors. The served factors are therefore ``Qᵀ`` and ``W (P Tᵀ)``, where
``V = Q T`` (QR). Their product has no such cancellation, so rounding them loses nothing.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *


def _operators(m: Module) -> Pieces:
    u = m.exact("hra_u")
    if not bool(u.any(dim=0).all()):
        m.fault("hra_u", say("INVALID_TENSOR", why="a column has only zeros"))
        return ()
    a, change = (_orthonormal if m.config["apply_GS"] else _reflections)(u)
    return low_rank(a, weight_times(m.rows(), change))


def _reflections(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``R − I`` for successive reflections, as ``change @ a``.

    Args:
        u: ``[in_features, r]`` fp64, a direction in each column.

    Returns:
        ``a``, ``[r, in_features]``, orthonormal rows, and ``change``, ``[in_features, r]``.
    """
    v = u / u.norm(dim=0)
    overlaps = v.T @ v
    columns: list[torch.Tensor] = []
    for i in range(v.shape[1]):
        column = v[:, i]
        if columns:
            column = column + torch.stack(columns, dim=1) @ overlaps[:i, i]
        columns.append(-2.0 * column)
    q, triangle = torch.linalg.qr(v)
    return q.T, torch.stack(columns, dim=1) @ triangle.T


def _orthonormal(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Like ``_reflections``, for ``R = I − 2 U Uᵀ``, with ``U`` orthonormalised by Gram-Schmidt."""
    done: list[torch.Tensor] = []
    for column in u.unbind(dim=1):
        for other in done:
            column = column - (other @ column) * other
        done.append(column / column.norm())
    v = torch.stack(done, dim=1)
    return v.T, -2.0 * v


METHOD = LinearMethod(
    name="hra",
    peft_types={"HRA"},
    keys={"apply_GS": fault_of_bool},
    bias=("hra_only",),
    most_rank=lambda inputs, outputs: inputs,
    required=("apply_GS",),
    tensors={"hra_u": (IN, R)},
    operators=_operators,
)
