"""The decoder's layers in one native call, if every part of them has a compiled kernel.

If Python called the kernels one by one, a step of one row would take 1.5 times as long: about 250
calls would each check arguments, allocate a result and take the interpreter's lock. The kernels and
their order are the same, and so are the bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from turret.kernels.cpu import has_layer_ops, num_threads
from turret.kernels.cpu.layers import (
    CLAMPED_SWIGLU,
    GELU,
    MAX_HEAD_DIM,
    PROJECTIONS,
    SILU,
    NativeAttentionPlan,
    NativeExperts,
    NativeLayer,
    NativeLinear,
    NativeModel,
    NativePass,
    NativeRope,
    add_rms_norm,
    clamped_swiglu,
    gelu_mul,
    paged_attention,
    rope_kv_write,
    run_layers,
    silu_mul,
)
from turret.kernels.cpu.products import TILE_ROWS, serves_dense
from turret.kernels.nf4_matmul import MXFP4
from turret.kernels.paged_attention import SequenceSpan, prepare_attention
from turret.server.adapters.device import AdapterStep
from turret.server.adapters.device.cpu import CpuStep
from turret.server.models.decoding import Arch, ClampedSwiglu
from turret.server.models.decoding.adapted_linear import AdaptedExperts, AdaptedLinear
from turret.server.models.decoding.layer_ops import Angles, KvCache, LayerOps, no_rotation

if TYPE_CHECKING:
    from turret.server.models.decoding.decoder import DecoderLayer
    from turret.server.models.weights import BaseLinear


# Layer operations of the cpu path: the compiled kernels (bf16 and fp32).


_HEAD_DIM_MULTIPLE = 32


class CpuLayerOps(LayerOps):
    """The operations of a layer by compiled kernels."""

    reads_masked = False
    activations = {"silu": silu_mul, "gelu_pytorch_tanh": gelu_mul}  # noqa: RUF012
    clamped_swiglu = staticmethod(clamped_swiglu)

    @classmethod
    def serves(cls, arch: Arch) -> bool:
        """Whether the kernels support the model's head size and activation."""
        is_head_known = arch.head_dim % _HEAD_DIM_MULTIPLE == 0 and arch.head_dim <= MAX_HEAD_DIM
        activation = arch.activation
        is_clamped = isinstance(activation, ClampedSwiglu)
        return is_head_known and (is_clamped or activation in cls.activations)

    def plan_attention(
        self,
        spans: Sequence[SequenceSpan],
        *,
        num_rows: int,
        block_size: int,
        window: int | None,
        device: torch.device,
    ) -> NativeAttentionPlan:
        return NativeAttentionPlan(
            spans,
            num_heads=self._arch.num_heads,
            head_dim=self._arch.head_dim,
            window=window,
        )

    def add_rms_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor
    ) -> torch.Tensor:
        return add_rms_norm(hidden, delta, weight, self._arch.rms_norm_eps)

    def attend(
        self,
        number: int,
        qkv: torch.Tensor,
        angles: Angles | None,
        slots: torch.Tensor,
        cache: KvCache,
        plan: NativeAttentionPlan,
        growth: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        adapters: AdapterStep | None = None,
    ) -> torch.Tensor:
        arch = self._arch
        if angles is None:
            angles = no_rotation(qkv.shape[0], arch, qkv.device)
        keys, values = cache.keys[number], cache.values[number]
        q = rope_kv_write(qkv, *angles, slots, keys, values, is_interleaved=arch.is_interleaved)
        if growth is not None:
            q *= growth
        scale, softcap = arch.attention_scale, arch.attention_softcap
        out = paged_attention(q, keys, values, plan, scale=scale, softcap=softcap, sinks=sinks)
        if adapters is not None:
            adapters.attend(number, q, out)
        return out.view(qkv.shape[0], -1)


def choose_layer_ops(arch: Arch, dtype: torch.dtype, device: torch.device) -> LayerOps:
    """The fastest operations that support this model on this machine."""
    if has_layer_ops(dtype, device) and CpuLayerOps.serves(arch):
        return CpuLayerOps(arch)
    prepare_attention(arch.head_dim, device)
    return LayerOps(arch)


class CpuLayers:
    """A decoder's layers and its cache, as the kernels read them.

    Args:
        arch: An architecture for which ``serves`` is true.
        layers: The decoder's layers. This object becomes invalid when their weights are exchanged.
        norm: The last norm, ``[hidden]`` fp32.
        cache: The cache of the layers' keys and values.
    """

    def __init__(
        self, arch: Arch, layers: Sequence[DecoderLayer], norm: torch.Tensor, cache: KvCache
    ) -> None:
        self._arch = arch
        self._cache = cache
        self._kinds = tuple(dict.fromkeys(arch.rope_of_layer))
        self._windows = tuple(dict.fromkeys(arch.windows))
        # Keep everything alive to which the C structures point.
        self._kept = (layers, norm, cache.keys, cache.values)
        self._layers = (NativeLayer * arch.num_layers)(
            *(self._layer(number, layer) for number, layer in enumerate(layers))
        )
        first, experts = layers[0], arch.experts
        bases = [each.base for layer in layers for _, each in _projections(layer)]
        dense = [base.in_features for base in bases if _dense(base) is not None]
        self._widest_dense = max(dense, default=0)
        # The largest numbers of outputs and inputs of a row; those of its experts are summed.
        self._outputs = max(_width(base) for base in bases)
        self._inputs = max(arch.num_heads * arch.head_dim, arch.intermediate_size)
        if experts is not None:
            widths = arch.hidden_size, experts.intermediate_size
            self._outputs = max(self._outputs, experts.per_token * max(widths[0], 2 * widths[1]))
            self._inputs = max(self._inputs, experts.per_token * max(widths))
        activation = arch.activation
        clamped = activation if isinstance(activation, ClampedSwiglu) else None
        self._model = NativeModel(
            layers=ctypes.addressof(self._layers),
            norm=norm.data_ptr(),
            num_layers=arch.num_layers,
            hidden=arch.hidden_size,
            heads=arch.num_heads,
            kv_heads=arch.num_kv_heads,
            head_dim=arch.head_dim,
            block_size=cache.block_size,
            q_norm_width=0 if first.q_norm is None else first.q_norm.shape[0],
            k_norm_width=0 if first.k_norm is None else first.k_norm.shape[0],
            is_interleaved=arch.is_interleaved,
            activation=CLAMPED_SWIGLU if clamped else SILU if activation == "silu" else GELU,
            experts=experts.count if experts else 0,
            per_token=experts.per_token if experts else 0,
            normalizes=experts.normalizes if experts else 0,
            eps=arch.rms_norm_eps,
            residual_scale=arch.residual_scale,
            attention_scale=arch.attention_scale,
            attention_softcap=arch.attention_softcap or 0.0,
            alpha=clamped.alpha if clamped else 0.0,
            limit=clamped.limit if clamped else 0.0,
        )

    @staticmethod
    def serves(arch: Arch, layers: Sequence[DecoderLayer]) -> bool:
        """Whether the kernels support the layers of a bf16 model that uses ``CpuLayerOps``."""
        bases = [each.base for layer in layers for _, each in _projections(layer)]
        experts = [each.base for layer in layers for each in _experts(layer)]
        return (
            arch.query_growth is None
            and all(hasattr(base, "packed") or _dense(base) is not None for base in bases)
            and all(base.addresses is not None for base in experts)
        )

    def run(
        self,
        hidden: torch.Tensor,
        *,
        rotations: Mapping[str | None, Angles | None],
        slots: torch.Tensor,
        attention: Mapping[int | None, NativeAttentionPlan],
        adapters: CpuStep | None,
    ) -> torch.Tensor:
        """Run a step and write its keys and values.

        Args:
            hidden: The input of the first layer, ``[rows, hidden]`` bf16; written to.
            rotations: Cosines and sines by kind of layer.
            slots: Where each row's keys and values go, ``[rows]`` int64.
            attention: Plans by window.
            adapters: The adapters, all of them native, or None.

        Returns:
            Final-norm hidden states, ``[rows, hidden]``.
        """
        arch, rows = self._arch, hidden.shape[0]
        angles = [rotations[kind] or no_rotation(rows, arch, hidden.device) for kind in self._kinds]
        ropes = (NativeRope * len(angles))(
            *(NativeRope(cos.data_ptr(), sin.data_ptr(), cos.shape[1]) for cos, sin in angles)
        )
        plans = (ctypes.c_void_p * len(self._windows))(
            *(attention[window].address for window in self._windows)
        )
        heads = arch.num_heads * arch.head_dim
        sizes = (arch.hidden_size, arch.hidden_size, arch.hidden_size, self._outputs, self._inputs)
        out, normed, delta, wide, narrow = (hidden.new_empty(rows, size) for size in sizes)
        q = torch.empty(rows, heads)
        made = NativePass(
            hidden=hidden.data_ptr(),
            out=out.data_ptr(),
            normed=normed.data_ptr(),
            wide=wide.data_ptr(),
            narrow=narrow.data_ptr(),
            delta=delta.data_ptr(),
            q=q.data_ptr(),
            slots=slots.data_ptr(),
            ropes=ctypes.addressof(ropes),
            plans=ctypes.addressof(plans),
            rows=rows,
            threads=num_threads(),
        )
        if self._widest_dense:
            # Scratch memory for the rows of a dense product, transposed for AMX tiles or in fp32.
            groups = -(-rows // TILE_ROWS) * TILE_ROWS
            scratch = torch.empty(groups, self._widest_dense)
            made.scratch = scratch.data_ptr()
        if arch.experts is not None:
            pairs = torch.empty(4, rows * arch.experts.per_token, dtype=torch.int64)
            ends = torch.empty(arch.experts.count, dtype=torch.int64)
            weights = torch.empty(rows, arch.experts.per_token + arch.experts.count)
            made.chosen, made.pair_places, made.pair_rows, made.pair_experts = (
                each.data_ptr() for each in pairs
            )
            made.ends, made.weights = ends.data_ptr(), weights.data_ptr()
        if adapters is not None:
            if adapters.experts is not None:
                made.expert_adapters = adapters.experts.address
            low, high, _ = adapters.base_rows.indices(rows)
            made.base_low, made.base_high = low, high
            made.adapters = adapters.rows.address
            made.places = ctypes.addressof(adapters.numbers.places)
            inputs = adapters.inputs.native(rows)
            if inputs is not None:
                changed = hidden.new_empty(rows, inputs.width)
                made.inputs = ctypes.addressof(inputs.table)
                made.changed = changed.data_ptr()
            for number, name in enumerate(PROJECTIONS):
                made.updates |= (name in adapters.updates) << number
        run_layers(self._model, made)
        return out

    def _layer(self, number: int, layer: DecoderLayer) -> NativeLayer:
        made = NativeLayer(
            *(
                None if norm is None else norm.data_ptr()
                for norm in (
                    layer.norm_before_attention,
                    layer.norm_after_attention,
                    layer.norm_before_mlp,
                    layer.norm_after_mlp,
                    layer.q_norm,
                    layer.k_norm,
                    layer.sinks,
                )
            ),
            self._cache.keys[number].data_ptr(),
            self._cache.values[number].data_ptr(),
            self._kinds.index(self._arch.rope_of_layer[number]),
            self._windows.index(self._arch.windows[number]),
        )
        for name, projection in _projections(layer):
            base, bias = projection.base, projection.bias
            # A weight belongs to a ``PackedLinear`` or a ``DenseLinear``.
            weights = getattr(base, "packed", None), getattr(base, "absmax", None), _dense(base)
            made.linears[PROJECTIONS.index(name)] = NativeLinear(
                *(None if tensor is None else tensor.data_ptr() for tensor in (*weights, bias)),
                _width(base),
                base.in_features,
            )
        for place, projection in enumerate(_experts(layer)):
            base, bias = projection.base, projection.bias
            assert base.addresses is not None
            made.experts[place] = NativeExperts(
                base.addresses.data_ptr(),
                None if bias is None else bias.data_ptr(),
                base.format == MXFP4,
                base.out_features,
                base.in_features,
            )
        return made


def _projections(layer: DecoderLayer) -> Iterator[tuple[str, AdaptedLinear]]:
    router = None if layer.experts is None else layer.experts.router
    found = layer.qkv, layer.o, layer.gate_up, layer.down, router
    for name, projection in zip(PROJECTIONS, found, strict=True):
        if projection is not None:
            yield name, projection


def _experts(layer: DecoderLayer) -> tuple[AdaptedExperts, ...]:
    """The layer's projections of experts, in the order of ``NativeLayer.experts``."""
    return () if layer.experts is None else (layer.experts.gate_up, layer.experts.down)


def _dense(base: BaseLinear) -> torch.Tensor | None:
    """``DenseLinear.weight``, if the kernels support it; None for any other kind of weight."""
    weight: torch.Tensor | None = getattr(base, "weight", None)
    return weight if weight is not None and serves_dense(weight) else None


def _width(base: BaseLinear) -> int:
    return sum(base.widths)
