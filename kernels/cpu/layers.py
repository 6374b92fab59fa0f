"""Operations of a decoder layer, and all layers of a step in one call, by C kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from turret.kernels.cpu import LANES, by_element, functions, num_threads
from turret.kernels.paged_attention import SequenceSpan

# A decoder layer's operations between its matrix products, one pass each (``elementwise.c``).


def add_rms_norm(
    hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """``hidden += delta`` in place, then RMSNorm (arXiv 1910.07467) of the sum.

    Args:
        hidden: ``[rows, width]`` bf16 or fp32, contiguous.
        delta: Same shape and dtype, contiguous, or None.
        weight: ``[width]`` fp32, contiguous.
        eps: Added to the mean square.

    Returns:
        ``[rows, width]``, same dtype, rounded once from fp32.
    """
    assert weight.dtype == torch.float32
    assert hidden.is_contiguous()
    rows, width = hidden.shape
    out = torch.empty_like(hidden)
    by_element("turret_add_rms_norm", hidden.dtype)(
        hidden.data_ptr(),
        None if delta is None else delta.data_ptr(),
        weight.data_ptr(),
        eps,
        out.data_ptr(),
        rows,
        width,
        num_threads(),
    )
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) · up`` (arXiv 2002.05202): ``[rows, 2·width]`` → ``[rows, width]``.

    ``gate_up`` is bf16 or fp32 and contiguous, the gates first. The result has its dtype.
    """
    return _gated_mul("turret_silu_mul", gate_up)


def gelu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``gelu(gate) · up``, gelu by its tanh formula (arXiv 1606.08415); see ``silu_mul``."""
    return _gated_mul("turret_gelu_mul", gate_up)


def clamped_swiglu(gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """``(up + 1) · gate · σ(alpha · gate)``, clamped; see ``kernels/rows.py``.

    Args:
        gate_up: ``[rows, 2·width]`` bf16 or fp32, contiguous; gates and ups alternate.
        alpha: Gain of the sigmoid.
        limit: The maximum of gates and ups; the ups' minimum is ``-limit``.

    Returns:
        ``[rows, width]``, same dtype, rounded once from fp32.
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype)
    by_element("turret_clamped_swiglu", gate_up.dtype)(
        gate_up.data_ptr(), out.data_ptr(), rows, width, alpha, limit, num_threads()
    )
    return out


def _gated_mul(name: str, gate_up: torch.Tensor) -> torch.Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype)
    by_element(name, gate_up.dtype)(gate_up.data_ptr(), out.data_ptr(), rows, width, num_threads())
    return out


def rope_kv_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    is_interleaved: bool = False,
) -> torch.Tensor:
    """Rotate queries and keys (RoFormer, arXiv 2104.09864); store keys and values.

    Args:
        qkv: ``[rows, heads + 2·kv_heads, head_dim]`` bf16 or fp32, contiguous; head_dim is a
            multiple of 32.
        cos: ``[rows, pairs]`` fp32, contiguous; ones for a layer without rotary positions. The
            first ``2 · pairs`` features of a head rotate; the others stay unchanged.
        sin: Same shape.
        slots: ``block · block_size + offset`` per row, ``[rows]`` int64.
        k_cache: One layer's keys, ``[num_blocks, block_size, kv_heads, head_dim]``, dtype of
            ``qkv``.
        v_cache: Same shape and dtype.
        is_interleaved: Whether neighbouring features make a pair, not (i, i + pairs).

    Returns:
        Rotated queries, ``[rows, heads, head_dim]`` fp32.
    """
    rows, total, head_dim = qkv.shape
    kv_heads = k_cache.shape[2]
    heads = total - 2 * kv_heads
    q = torch.empty(rows, heads, head_dim)
    by_element("turret_rope_kv_write", qkv.dtype)(
        qkv.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        slots.data_ptr(),
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        rows,
        heads,
        kv_heads,
        head_dim,
        cos.shape[1],
        is_interleaved,
        num_threads(),
    )
    return q


# Causal attention over a paged KV cache; see ``attention.c``.
#
# The contract is that of ``kernels/paged_attention.py``: a row's result depends only on its own
# query and keys. Unlike there, keys and values are not gathered first, and there are no masks: the
# kernel reads the blocks of a sequence in place, up to each row's position.


MAX_HEAD_DIM = 256
_MOST_QUERIES = 48  # MOST_QUERIES in attention.c


class NativeAttentionPlan:
    """Attention metadata of a step, shared by all layers with the same window.

    Args:
        spans: The sequences of the step.
        num_heads: Query heads.
        head_dim: A multiple of 16, at most ``MAX_HEAD_DIM``.
        window: Sliding window in tokens, or None.
    """

    def __init__(
        self,
        spans: Sequence[SequenceSpan],
        *,
        num_heads: int,
        head_dim: int,
        window: int | None,
    ) -> None:
        blocks = [block for span in spans for block in span.blocks]
        self._blocks = (ctypes.c_int64 * len(blocks))(*blocks)
        values: list[int] = []
        address = ctypes.addressof(self._blocks)
        longest = 0
        for span in spans:
            values += (span.row_start, span.num_new, span.num_context, span.num_padding, address)
            address += 8 * len(span.blocks)
            longest = max(longest, span.num_context + span.num_new)
        self._spans = (ctypes.c_int64 * len(values))(*values)
        threads = num_threads()
        # Pad by a whole vector, because the kernel may store a vector at any position.
        padded = -(-longest // LANES) * LANES + LANES
        # The memory must suffice for all heads of one row, and for a KV head's queries of several
        # rows.
        stride = max(num_heads, _MOST_QUERIES) * (2 * head_dim + padded)
        self._scratch = torch.empty(threads * stride)
        self._plan = (ctypes.c_int64 * 6)(
            ctypes.addressof(self._spans),
            self._scratch.data_ptr(),
            len(spans),
            stride,
            threads,
            window or 0,
        )
        self.address = ctypes.addressof(self._plan)


class _Heads(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "head_dim", "block_size")),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("sinks", ctypes.c_void_p),
    )


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: NativeAttentionPlan,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend to the cached keys; every row of ``q`` must belong to a span of the plan.

    Args:
        q: Rotated queries, ``[num_rows, num_heads, head_dim]`` fp32, contiguous.
        k_cache: Keys of one layer, ``[num_blocks, block_size, num_kv_heads, head_dim]``, bf16 or
            fp32.
        v_cache: Values, same shape and dtype.
        plan: The plan of the step.
        scale: Multiplied into the queries.
        softcap: Scores become ``softcap · tanh(score / softcap)`` if it is given.
        sinks: An additional score per head in the softmax, ``[num_heads]`` fp32
            contiguous, or None.

    Returns:
        ``[num_rows, num_heads, head_dim]``, dtype of the cache.
    """
    _, block_size, kv_heads, head_dim = k_cache.shape
    out = torch.empty(q.shape, dtype=k_cache.dtype)
    assert sinks is None or (sinks.dtype == torch.float32 and sinks.is_contiguous())
    heads = _Heads(
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        out.data_ptr(),
        q.shape[1],
        kv_heads,
        head_dim,
        block_size,
        scale,
        softcap or 0.0,
        None if sinks is None else sinks.data_ptr(),
    )
    by_element("turret_attend", k_cache.dtype)(plan.address, ctypes.addressof(heads))
    return out


_address, _int, _double = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double

PROJECTIONS = ("qkv", "o", "gate_up", "down", "router")
EXPERT_PROJECTIONS = ("experts_gate_up", "experts_down")
# The values of ``Activation`` in layers.c.
SILU, GELU, CLAMPED_SWIGLU = range(3)


class NativeLinear(ctypes.Structure):
    """A weight: ``packed`` and ``absmax`` in bitsandbytes' CPU layout, or ``dense``.

    The fields that are not used are None.
    """

    _fields_ = (
        *((name, _address) for name in ("packed", "absmax", "dense", "bias")),
        ("out_features", _int),
        ("in_features", _int),
    )


class NativeExperts(ctypes.Structure):
    """A projection of all experts; ``weights`` points to the addresses of the experts' weights.

    The addresses are in the form that ``nf4_expert_products`` uses.
    """

    _fields_ = (
        ("weights", _address),
        ("bias", _address),
        *((name, _int) for name in ("is_mxfp4", "out_features", "in_features")),
    )


class NativeLayer(ctypes.Structure):
    """A layer. Norms are fp32 or None. Keys and values are the layer's part of the cache.

    A layer has ``gate_up`` and ``down``, or ``router`` and experts. The fields of the other kind
    are zeros.
    """

    _fields_ = (
        *(
            (name, _address)
            for name in (
                *("before_attention", "after_attention", "before_mlp", "after_mlp"),
                *("q_norm", "k_norm", "sinks", "keys", "values"),
            )
        ),
        ("rope", _int),
        ("window", _int),
        ("linears", NativeLinear * len(PROJECTIONS)),
        ("experts", NativeExperts * len(EXPERT_PROJECTIONS)),
    )


class NativeModel(ctypes.Structure):
    """The layers, the last norm, and the properties that all layers share."""

    _fields_ = (
        ("layers", _address),
        ("norm", _address),
        *(
            (name, _int)
            for name in (
                *("num_layers", "hidden", "heads", "kv_heads", "head_dim", "block_size"),
                *("q_norm_width", "k_norm_width", "is_interleaved", "activation"),
                *("experts", "per_token", "normalizes"),
            )
        ),
        *(
            (name, _double)
            for name in (
                *("eps", "residual_scale", "attention_scale", "attention_softcap"),
                *("alpha", "limit"),
            )
        ),
    )


class NativeRope(ctypes.Structure):
    """Cosines and sines of a step's rows, ``[rows, pairs]`` fp32."""

    _fields_ = (("cos", _address), ("sin", _address), ("pairs", _int))


class NativePlace(ctypes.Structure):
    """A projection's ``ProjectionShape`` and first module's number, to find its operators."""

    _fields_ = (("shape", _address), ("module", _int))


class NativeInputs(ctypes.Structure):
    """The inputs of a projection that adapters change, for the rows of a step.

    ``changes`` is ``[rows, 3]`` int64: the range of the members that change a row's input (empty if
    none does), and 1 if each slice has its own change, else 0. ``count`` is the resulting number of
    inputs of the projection: one for all slices, one per slice, or 0 if no input changes.
    """

    _fields_ = (("changes", _address), ("count", _int))


class NativePass(ctypes.Structure):
    """A step: its rows, memory for intermediate results, and its adapters."""

    _fields_ = (
        *(
            (name, _address)
            for name in (
                *("hidden", "out", "normed", "wide", "narrow", "delta", "q", "slots"),
                *("ropes", "plans", "adapters", "places", "inputs", "expert_adapters"),
                *("chosen", "pair_places", "pair_rows", "pair_experts", "ends", "weights"),
                *("scratch", "changed"),
            )
        ),
        *((name, _int) for name in ("updates", "base_low", "base_high", "rows", "threads")),
    )


def run_layers(model: NativeModel, step: NativePass) -> None:
    """Compute ``step.out`` from ``step.hidden``, and the step's keys and values."""
    functions().turret_layers(ctypes.addressof(model), ctypes.addressof(step))
