"""The decoder of the gpu path.

It computes the same layers as ``decoder.py``. Every operation is a kernel of ``kernels/gpu`` or a
torch operation that a CUDA graph can capture: nothing here reads a value from the device or copies
from the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from turret.kernels.gpu.activations import clamped_swiglu, gelu_mul, silu_mul
from turret.kernels.gpu.experts import combine_experts, route_rows
from turret.kernels.gpu.nf4 import GatedSilu, Heads
from turret.kernels.gpu.paged_attention import paged_attention
from turret.kernels.gpu.rms_norm import residual_rms_norm
from turret.kernels.gpu.rope_kv_write import KvWrite
from turret.kernels.gpu.tables import AttentionTable
from turret.kernels.rows import linear_in_pieces
from turret.server.adapters.device.gpu_store import GpuAdapterStep
from turret.server.models.decoding import Arch
from turret.server.models.decoding.decoder import Decoder, DecoderLayer, StepInput
from turret.server.models.decoding.layer_ops import KvCache, LayerOps, no_rotation
from turret.server.models.weights.nf4_gpu import keep_sums_whole

_GATED_SILU = GatedSilu()


class GpuLayerOps(LayerOps):
    """A layer's operations by Triton kernels, except attention, which the decoder computes."""

    activations = {"silu": silu_mul, "gelu_pytorch_tanh": gelu_mul}  # noqa: RUF012
    clamped_swiglu = staticmethod(clamped_swiglu)
    route_rows = staticmethod(route_rows)
    combine = staticmethod(combine_experts)

    def add_rms_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor
    ) -> torch.Tensor:
        return residual_rms_norm(hidden, delta, weight, self._arch.rms_norm_eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuStep(StepInput):
    """The work of a step, entirely on the device: a ``StepInput``, and data for captured steps.

    Attributes:
        attention: The loaded table for each distinct window (None is full attention).
        adapters: The step's adapters, or None if every row is the base model's.
        sample_rows: Rows whose logits are needed, ``[samples]`` int64.
        num_decode: Number of leading rows that belong to sequences that generate or have a short
            prompt; see ``nf4_gpu.py``.
        logits: The tensor for logits, ``[at least samples, vocab]`` fp32; None for a new one.
        embedded: The input of the first layer, ``[rows, hidden]``, if it is already computed.
    """

    attention: Mapping[int | None, AttentionTable]
    adapters: GpuAdapterStep | None
    sample_rows: torch.Tensor
    num_decode: int
    logits: torch.Tensor | None = None
    embedded: torch.Tensor | None = None

    @property
    def is_fixed(self) -> bool:
        """Whether everything that differs between steps is in buffers of fixed address."""
        return self.adapters is None or self.adapters.others is None


class GpuDecoder(Decoder):
    """A decoder whose linears were loaded with ``gpu=True``."""

    def __init__(self, arch: Arch, **weights: Any) -> None:
        super().__init__(arch, **weights)
        self.ops = GpuLayerOps(arch)
        keep_sums_whole(self.device)

    def compute(self, step: GpuStep, cache: KvCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a step and write its keys and values.

        Returns:
            Final-norm hidden states, ``[rows, hidden]``, and the logits of ``sample_rows``,
            ``[samples, vocab]`` fp32.
        """
        arch = self.arch
        rotations = self.rotations(step.positions)
        if None in arch.rope_of_layer:
            # Layers without rotary positions rotate by an angle of 0.
            rotations[None] = no_rotation(len(step.positions), arch, self.device)
        growth = self.growth_at(step.positions)
        hidden = self.embed(step)
        update: torch.Tensor | None = None
        for number, layer in enumerate(self.layers):
            normed = self._enter(hidden, update, layer.norm_before_attention)
            rotation = rotations[arch.rope_of_layer[number]]
            assert rotation is not None, "every layer has a rotation"
            attended = self._attention(number, normed, rotation, growth, step, cache)
            update = self.leave(attended, layer.norm_after_attention)
            normed = self._enter(hidden, update, layer.norm_before_mlp)
            update = self.leave(self._feed_forward(layer, normed, step), layer.norm_after_mlp)
        hidden = self.ops.add_rms_norm(hidden, update, self.norm)
        sampled = hidden.index_select(0, step.sample_rows)
        return hidden, self.logits(sampled, out=step.logits)

    def embed(self, step: StepInput) -> torch.Tensor:
        if isinstance(step, GpuStep) and step.embedded is not None:
            # Copy the input, because the layers add to it in place.
            return step.embedded.clone()
        return super().embed(step)

    def _feed_forward(
        self, layer: DecoderLayer, normed: torch.Tensor, step: GpuStep
    ) -> torch.Tensor:
        if layer.experts is not None:
            return self._mix_experts(layer.experts, normed, step)
        assert layer.gate_up is not None
        assert layer.down is not None
        adapters, num_decode = step.adapters, step.num_decode
        if self.arch.activation == "silu":
            inner = layer.gate_up.with_epilogue(normed, adapters, num_decode, _GATED_SILU)
        else:
            inner = self.ops.gated_activation(layer.gate_up(normed, adapters, num_decode))
        return layer.down(inner, adapters, num_decode)

    def _dense(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_in_pieces(hidden, weight)

    def _attention(
        self,
        number: int,
        normed: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        growth: torch.Tensor | None,
        step: GpuStep,
        cache: KvCache,
    ) -> torch.Tensor:
        arch, layer = self.arch, self.layers[number]
        keys, values = cache.keys[number], cache.values[number]
        cos, sin = rotation
        write = KvWrite(
            cos=cos,
            sin=sin,
            kv_slots=step.kv_slots,
            k_cache=keys,
            v_cache=values,
            is_interleaved=arch.is_interleaved,
        )
        if arch.qk_norm == "projection":
            qkv = layer.qkv(normed, step.adapters, step.num_decode)
            q = Heads(write=write)(self._norm_projections(layer, qkv))
        else:
            norms = {"q_norm": layer.q_norm, "k_norm": layer.k_norm}
            heads = Heads(write=write, eps=arch.rms_norm_eps, **norms)
            q = layer.qkv.with_epilogue(normed, step.adapters, step.num_decode, heads)
        if growth is not None:
            q *= growth
        table = step.attention[arch.windows[number]]
        scale, softcap = arch.attention_scale, arch.attention_softcap
        attended = paged_attention(
            q, keys, values, table, scale=scale, softcap=softcap, sinks=layer.sinks
        )
        if step.adapters is not None:
            step.adapters.attend(number, q, attended)
        return layer.o(attended.flatten(1), step.adapters, step.num_decode)

    def _norm_projections(self, layer: DecoderLayer, qkv: torch.Tensor) -> torch.Tensor:
        """The projections, with queries and keys each normalised as a whole."""
        assert layer.q_norm is not None
        assert layer.k_norm is not None
        widths = layer.q_norm.shape[0], layer.k_norm.shape[0], layer.k_norm.shape[0]
        q, k, v = qkv.split(widths, dim=1)
        norm = self.ops.add_rms_norm
        return torch.cat((norm(q, None, layer.q_norm), norm(k, None, layer.k_norm), v), dim=1)
