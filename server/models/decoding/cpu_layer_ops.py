"""Layer operations of the cpu path: the compiled kernels (bf16 and fp32)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from turret.kernels.cpu.elementwise import (
    add_rms_norm,
    clamped_swiglu,
    gelu_mul,
    rope_kv_write,
    silu_mul,
)
from turret.kernels.cpu.paged_attention import MAX_HEAD_DIM, NativeAttentionPlan, paged_attention
from turret.kernels.paged_attention import SequenceSpan
from turret.server.adapters.device.store import AdapterStep
from turret.server.models.decoding.arch import Arch, ClampedSwiglu
from turret.server.models.decoding.kv_cache import KvCache

_HEAD_DIM_MULTIPLE = 32
# Name in ``Arch`` → kernel that multiplies the activation by ``up`` in the same pass.
_GATED_ACTIVATIONS = {"silu": silu_mul, "gelu_pytorch_tanh": gelu_mul}


class CpuLayerOps:
    """See ``LayerOps``."""

    def __init__(self, arch: Arch) -> None:
        self._arch = arch

    @staticmethod
    def serves(arch: Arch) -> bool:
        """Whether the kernels know the model's head size and activation."""
        is_head_known = arch.head_dim % _HEAD_DIM_MULTIPLE == 0 and arch.head_dim <= MAX_HEAD_DIM
        activation = arch.activation
        is_clamped = isinstance(activation, ClampedSwiglu)
        return is_head_known and (is_clamped or activation in _GATED_ACTIVATIONS)

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
        angles: tuple[torch.Tensor, torch.Tensor] | None,
        slots: torch.Tensor,
        cache: KvCache,
        plan: NativeAttentionPlan,
        growth: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        adapters: AdapterStep | None = None,
    ) -> torch.Tensor:
        arch = self._arch
        if angles is None:
            ones = torch.ones(qkv.shape[0], arch.head_dim // 2)
            angles = ones, torch.zeros_like(ones)
        keys, values = cache.keys[number], cache.values[number]
        q = rope_kv_write(qkv, *angles, slots, keys, values, is_interleaved=arch.is_interleaved)
        if growth is not None:
            q *= growth
        scale, softcap = arch.attention_scale, arch.attention_softcap
        out = paged_attention(q, keys, values, plan, scale=scale, softcap=softcap, sinks=sinks)
        if adapters is not None:
            adapters.attend(number, q, out)
        return out.view(qkv.shape[0], -1)

    def gated_activation(self, gate_up: torch.Tensor) -> torch.Tensor:
        activation = self._arch.activation
        if isinstance(activation, ClampedSwiglu):
            return clamped_swiglu(gate_up, activation.alpha, activation.limit)
        return _GATED_ACTIVATIONS[activation](gate_up)
