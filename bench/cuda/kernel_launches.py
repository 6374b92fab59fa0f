"""One launch of every Triton kernel in every form that real models need, on meta tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from turret.kernels.gpu.activations import clamped_swiglu, gelu_mul, silu_mul
from turret.kernels.gpu.experts import add_expert_updates, combine_experts, nf4_experts, route_rows
from turret.kernels.gpu.fusion_gate import WORDS, fusion_gate, gate_shrink
from turret.kernels.gpu.hadamard import hadamard_expand, hadamard_shrink
from turret.kernels.gpu.kronecker import kronecker
from turret.kernels.gpu.low_rank import Shrink, nf4_shrink, segmented_expand, segmented_shrink
from turret.kernels.gpu.nf4 import nf4_dequantize, nf4_matmul, nf4_rotate
from turret.kernels.gpu.paged_attention import paged_attention
from turret.kernels.gpu.rms_norm import residual_rms_norm
from turret.kernels.gpu.rope_kv_write import KvWrite, rope_kv_write
from turret.kernels.gpu.sample_rows import sample_rows
from turret.kernels.gpu.tables import AttentionTable, RowTable, SamplingTable, SegmentTable
from turret.kernels.nf4_matmul import BLOCK, MXFP4, NF4, Format, Nf4Matrix

_META = torch.device("meta")
_ROWS = 64
_RANK = 1024  # of the pack
_SLOTS = 64


@dataclass(frozen=True, slots=True)
class Model:
    """The properties of a model that determine its kernels."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    window: int | None = None
    head_norm: bool = False
    vocab: int = 1024

    @property
    def groups(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """The input width and the slice widths of every fused projection."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (self.hidden, (q, kv, kv)),
            "o": (q, (self.hidden,)),
            "gate_up": (self.hidden, (self.inner, self.inner)),
            "down": (self.inner, (self.hidden,)),
        }


MODELS = {
    "Llama-3.1-8B": Model(4096, 32, 8, 128, 14336, vocab=128256),
    "Qwen2.5-0.5B": Model(896, 14, 2, 64, 4864, head_norm=True, window=4096),
    "SmolLM2-135M": Model(576, 9, 3, 64, 1536),
}
# Models for which only some kernels need separate forms.
_GEMMA_2_9B = Model(3584, 16, 8, 256, 14336, window=4096)
_GEMMA_3_1B = Model(1152, 4, 1, 256, 6912, head_norm=True, window=512)
_PHI_4_MINI = Model(3072, 24, 8, 128, 8192)
_GLM_4_9B = Model(4096, 32, 2, 128, 13696)
_GPT_OSS = Model(2880, 64, 8, 64, 2880, window=128)


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=_META)


def _low_rank(inner: int, outs: tuple[int, ...]) -> Iterator[Callable[[], object]]:
    """Launches of low-rank updates, with and without gain, biases and gates."""
    slices, width = len(outs), sum(outs)
    x, y = _empty(_ROWS, inner), _empty(_ROWS, width)
    a, b = _empty(_RANK, slices, inner), [_empty(_RANK, out) for out in outs]
    ranks = _empty(_SLOTS, slices, dtype=torch.int32)
    per_slot = _empty(_SLOTS, width, dtype=torch.float32)
    table = _segments()

    def launch() -> None:
        v = segmented_shrink(x, a, ranks, table)
        segmented_expand(y, v, b, ranks, table)
        segmented_expand(
            y, v, b, ranks, table, gain_delta=per_slot, bias=per_slot, base_bias=_empty(width)
        )
        words = _empty(_SLOTS, slices, WORDS, dtype=torch.int64)
        q = gate_shrink(x, words, table)
        gates = fusion_gate(q, v, words, table, _ROWS)
        segmented_expand(y, v, b, ranks, table, gates=gates)

    yield launch


def _by_slot(inner: int, outs: tuple[int, ...]) -> Iterator[Callable[[], object]]:
    """Launches of Hadamard and Kronecker adapters."""
    table = RowTable(_ROWS, _META)
    x, y = _empty(_ROWS, inner), _empty(_ROWS, sum(outs))

    def hadamard(rank: int) -> None:
        factors = _empty(_SLOTS, 4, dtype=torch.int64)
        u = hadamard_shrink(x, factors, rank, table)
        for out in outs:
            hadamard_expand(y[:, :out], u, factors, table)

    def kron(out: int) -> None:
        for factor in (8, 64, 128):
            if inner % factor or out % factor:
                continue
            (o, n), first = (out // factor, inner // factor), (factor, factor)
            for shapes in ([first, (o, n)], [first, (o, 16), (16, n)]):
                factors = _empty(_SLOTS, len(shapes), dtype=torch.int64)
                kronecker(x, y[:, :out], factors, shapes, table)

    for rank in (8, 16, 32, 64):
        yield lambda rank=rank: hadamard(rank)
    yield lambda: kron(outs[0])


def _base(inner: int, outs: tuple[int, ...], gated: bool) -> None:
    """Launches of the base product, with the activation as in the server."""
    weight = _weight(inner, sum(outs))
    nf4_dequantize(weight, torch.bfloat16)
    for rows in (16, 32, _ROWS):
        nf4_matmul(_empty(rows, inner), weight)
    a, ranks = _empty(_RANK, len(outs), inner), _empty(_SLOTS, len(outs), dtype=torch.int32)
    for rows in (16, 32, _ROWS):
        # Compile every number of rows only for wide inputs: registers depend little on the other
        # constants.
        if rows == 16 or inner >= 4096:
            nf4_shrink(_empty(_ROWS, inner), rows, weight, Shrink(a, ranks, _segments()))
        if gated:
            nf4_matmul(_empty(rows, inner), weight, gated=True)


def _attention(model: Model, softcap: float | None = None, has_sinks: bool = False) -> None:
    cache = _empty(256, 16, model.kv_heads, model.head_dim)
    table = AttentionTable(
        max_records=_ROWS,
        blocks=1024,
        kv_heads=model.kv_heads,
        queries_per_head=model.heads // model.kv_heads,
        window=model.window,
        device=_META,
        spread_records=_ROWS,
    )
    q = _empty(_ROWS, model.heads, model.head_dim)
    sinks = _empty(model.heads, dtype=torch.float32) if has_sinks else None
    scale = model.head_dim**-0.5
    paged_attention(q, cache, cache, table, scale=scale, softcap=softcap, sinks=sinks)


def _rotation(model: Model, pairs: int, *, is_interleaved: bool = False) -> None:
    cache = _empty(256, 16, model.kv_heads, model.head_dim)
    angles = _empty(_ROWS, pairs, dtype=torch.float32)
    norm = _empty(model.head_dim, dtype=torch.float32) if model.head_norm else None
    qkv = _empty(_ROWS, (model.heads + 2 * model.kv_heads) * model.head_dim)
    slots = _empty(_ROWS, dtype=torch.int64)
    write = KvWrite(
        cos=angles,
        sin=angles,
        kv_slots=slots,
        k_cache=cache,
        v_cache=cache,
        is_interleaved=is_interleaved,
    )
    rope_kv_write(qkv, write, q_norm=norm, k_norm=norm)
    if norm is None:
        _heads_at_once(model, write)


def _heads_at_once(model: Model, write: KvWrite) -> None:
    """Launches that combine the projection onto heads and their rotation."""
    inner, outs = model.groups["qkv"]
    weight, bias = _weight(inner, sum(outs)), _empty(sum(outs))
    if write.divides(128):
        # Compile every form only for the first model: registers depend little on the others'
        # constants.
        for rows in (16, 32, _ROWS) if model.hidden == 4096 and not write.is_partial else (16,):
            for added in (None, bias):
                nf4_rotate(_empty(rows, inner), weight, added, write.rows(0, rows))


def _segments() -> SegmentTable:
    return SegmentTable(
        max_rows=_ROWS,
        max_row_rank=256,
        max_components=16,
        max_gates=2,
        max_row_query=128,
        device=_META,
    )


def _weight(inner: int, width: int) -> Nf4Matrix:
    packed = _empty(width * inner // 2, dtype=torch.uint8)
    return Nf4Matrix(packed, _empty(width * inner // BLOCK, dtype=torch.float32), width, inner)


def _experts(
    hidden: int, inner: int, count: int, per_token: int, weight_format: Format = NF4
) -> None:
    """Launches of a mixture of experts with an adapter."""
    routing = route_rows(_empty(_ROWS, count), per_token, normalizes=True)
    route_rows(_empty(_ROWS, count), per_token, normalizes=False)
    pairs, table = _ROWS * per_token, RowTable(_ROWS, _META)
    for out, into, rows in ((2 * inner, hidden, routing.rows), (hidden, inner, None)):
        size = count * out * into
        packed = _empty(size // 2, dtype=torch.uint8)
        dtype = torch.float32 if weight_format == NF4 else torch.bfloat16
        maxima = _empty(size // weight_format.block, dtype=dtype)
        weight = Nf4Matrix(packed, maxima, count * out, into, weight_format)
        x = _empty(pairs if rows is None else _ROWS, into)
        y = nf4_experts(x, weight, routing, rows)
        factors = _empty(_SLOTS, 2, dtype=torch.int64)
        add_expert_updates(x, y, factors, 16, table, routing, rows)
    combine_experts(_empty(pairs, hidden), routing)


def _between(model: Model) -> None:
    """Launches of attention and the small kernels around it."""
    _attention(model)
    _rotation(model, model.head_dim // 2)
    hidden = _empty(_ROWS, model.hidden)
    norm = _empty(model.hidden, dtype=torch.float32)
    residual_rms_norm(hidden, hidden, norm, 1e-5)
    residual_rms_norm(hidden, None, norm, 1e-5)
    silu_mul(_empty(_ROWS, 2 * model.inner))
    logits = _empty(_ROWS, model.vocab, dtype=torch.float32)
    sample_rows(logits, SamplingTable(_ROWS, _META).buffer, _empty(_ROWS, dtype=torch.int64))


def _all() -> Iterator[Callable[[], object]]:
    for model in MODELS.values():
        for name, (inner, outs) in model.groups.items():
            yield from _low_rank(inner, outs)
            yield from _by_slot(inner, outs)
            gated = name == "gate_up"
            yield lambda inner=inner, outs=outs, gated=gated: _base(inner, outs, gated)
        yield lambda model=model: _between(model)
    # This model has more queries per KV head than a tile of 16 rows holds.
    yield lambda: _attention(Model(4096, 32, 1, 128, 14336))
    yield lambda: _attention(_GEMMA_2_9B, 50.0)
    yield lambda: _attention(_GEMMA_3_1B)
    yield lambda: gelu_mul(_empty(_ROWS, 2 * _GEMMA_2_9B.inner))
    yield lambda: _rotation(_GEMMA_3_1B, 128)
    yield lambda: _rotation(_PHI_4_MINI, 48)
    yield lambda: _rotation(_GLM_4_9B, 32, is_interleaved=True)
    # Qwen3-30B-A3B and Mixtral-8x7B.
    yield lambda: _experts(2048, 768, 128, 8)
    yield lambda: _experts(4096, 14336, 8, 2)
    for window in (None, _GPT_OSS.window):
        yield lambda window=window: _attention(replace(_GPT_OSS, window=window), has_sinks=True)
    yield lambda: clamped_swiglu(_empty(_ROWS, 2 * _GPT_OSS.inner), 1.702, 7.0)
    # gpt-oss-20b and gpt-oss-120b, as released and in checkpoints of bitsandbytes.
    for count, stored in itertools.product((32, 128), (MXFP4, NF4)):
        yield lambda count=count, stored=stored: _experts(
            _GPT_OSS.hidden, _GPT_OSS.inner, count, 4, stored
        )


LAUNCHES: tuple[Callable[[], object], ...] = tuple(_all())
