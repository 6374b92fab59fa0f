"""Elementwise functions in which a row's bits do not depend on the batch.

A library computes most elements with vector instructions, and the last few of each thread's share
with scalar ones, which may round differently. This module therefore uses the compiled kernel. Where
there is none, it pads rows to whole vectors and uses library calls that passed a trial
(``trial.py``).
"""

from __future__ import annotations

from turret.kernels.cpu.logits import log_softmax
from turret.kernels.cpu.native import functions, has_kernels
from turret.kernels.rows.trial import SAMPLE_ROWS, by_rows
from turret.lazy_torch import torch

# The number of elements in the longest vector loop (AVX-512, 16-bit, unrolled twice).
VECTOR_ELEMENTS = 64


def row_exp_(x: torch.Tensor) -> torch.Tensor:
    """Replace fp32 ``x`` by ``e^x``; each element's bits depend on its row alone. Returns ``x``."""
    if x.device.type != "cpu":
        return x.exp_()
    if has_kernels(x.device):
        out = x.contiguous()
        functions().turret_exp_f32(out.data_ptr(), out.numel())
    else:
        width = x.shape[-1]
        wide = torch.nn.functional.pad(x.reshape(-1, width), (0, -width % VECTOR_ELEMENTS))
        out = by_rows("exp", wide.shape[1], torch.exp, wide, lambda: _sample(wide, 10.0))
        out = out[:, :width].reshape(x.shape)
    return x if out is x else x.copy_(out)


def _sample(like: torch.Tensor, scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLE_ROWS, like.shape[1], generator=generator).mul_(scale).to(like.dtype)


# ``silu(x) = x / (1 + e^−x)``; a row's bits do not depend on the batch.
#
# torch uses scalar instructions for the last few elements of every thread's share, and the end of a
# share depends on the size of the whole tensor. So rows are padded to whole vectors, in calls that
# passed a trial (``trial.py``).


def row_silu(x: torch.Tensor) -> torch.Tensor:
    """Apply silu to ``[num_rows, width]``, each row bit-identical in any batch; dtype of ``x``."""
    if x.device.type != "cpu":
        return torch.nn.functional.silu(x)
    width, dtype = x.shape[1], x.dtype
    wide = torch.nn.functional.pad(x, (0, -width % VECTOR_ELEMENTS)).contiguous()
    key, silu = (dtype, wide.shape[1]), torch.nn.functional.silu
    return by_rows("silu", key, silu, wide, lambda: _sample(wide, 4.0))[:, :width]


# gelu by its tanh formula (arXiv 1606.08415); a row's bits do not depend on the batch.
#
# ``gelu(x) = x / (1 + e^−y)`` with ``y = 2 √(2/π) (x + 0.044715 x³)``, by ``row_exp_`` and
# operations that are correctly rounded.


def row_gelu(x: torch.Tensor) -> torch.Tensor:
    """Apply gelu to ``[num_rows, width]``, each row bit-identical in any batch; dtype of ``x``."""
    wide = x.float()
    y = (wide * wide).mul_(0.044715).add_(1.0).mul_(wide).mul_(-1.5957691216057308)
    return torch.div(wide, row_exp_(y).add_(1.0)).to(x.dtype)


# ``c · tanh(x / c)``, which keeps scores and logits within ±c; its bits do not depend on the batch,
# for the same reason as gelu's.


def row_softcap_(x: torch.Tensor, cap: float) -> torch.Tensor:
    """Cap fp32 ``x`` in place; each element's bits depend on its row alone. Returns ``x``."""
    # c · tanh(x / c) = c − 2c / (e^(2x/c) + 1), within 2e-7 · c.
    row_exp_(x.mul_(2.0 / cap)).add_(1.0)
    return torch.div(-2.0 * cap, x, out=x).add_(cap)


# The gate of gpt-oss, see ``kernels/between.py``; its bits do not depend on the batch, for the same
# reason as gelu's.


def row_clamped_swiglu(gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """Apply the gate to ``[num_rows, 2 · width]``, in which gate and up columns alternate.

    Returns ``[num_rows, width]`` in the dtype of ``gate_up``.
    Each row is bit-identical in any batch.
    """
    gate, up = gate_up.float().unflatten(1, (-1, 2)).unbind(-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit).add_(1.0)
    gate = torch.div(gate, row_exp_(gate * -alpha).add_(1.0))
    return gate.mul_(up).to(gate_up.dtype)


# Log softmax over a vocabulary; the bits of a row are the same in any batch.


def row_log_softmax(x: torch.Tensor) -> torch.Tensor:
    """``x − log Σ e^x`` of every row.

    Args:
        x: ``[num_rows, width]`` fp32.

    Returns:
        The same shape. On a CPU without compiled kernels, rows go to the library one at a time,
        each as a separate copy, so that the call is always the same.
    """
    if x.device.type != "cpu":
        return x.log_softmax(-1)
    if has_kernels(x.device):
        return log_softmax(x)
    out = torch.empty_like(x)
    for row, result in zip(x, out, strict=True):
        result.copy_(row.clone().log_softmax(-1))
    return out
