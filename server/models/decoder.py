"""One decoder for every supported model, driven by its ``Arch``.

Tokens of all sequences are packed ``[num_rows, hidden]``; there is no batch axis. Pre-norm
transformer with RMSNorm, rotary positions, grouped-query attention and a gated MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from turret.kernels.paged_attention import AttentionPlan, paged_attention_reference
from turret.kernels.row_linear import row_linear
from turret.kernels.row_silu import row_silu
from turret.server.adapters.pack import AdapterStep
from turret.server.models.adapted_linear import AdaptedLinear
from turret.server.models.arch import Arch
from turret.server.models.kv_cache import KvCache


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """One step's work on the device.

    Attributes:
        token_ids: ``[rows]`` int64; any valid id where ``soft_rows`` says so.
        positions: Position of each row in its sequence, ``[rows]`` int64.
        kv_slots: Where each row's keys and values go, ``[rows]`` int64.
        attention: Plan per distinct window (None is full attention).
        adapters: The step's adapters, or None where every row is the base model's.
        soft_rows: Rows whose embedding is not a token's, ``[m]`` int64, or None.
        soft_values: Their embeddings, ``[m, hidden]``, or None.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    kv_slots: torch.Tensor
    attention: Mapping[int | None, AttentionPlan]
    adapters: AdapterStep | None
    soft_rows: torch.Tensor | None = None
    soft_values: torch.Tensor | None = None


@dataclass(slots=True, kw_only=True)
class DecoderLayer:
    """Weights of one layer. Norm weights are ``[hidden]`` (``[head_dim]`` for q and k)."""

    input_norm: torch.Tensor
    post_attention_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    qkv: AdaptedLinear
    o: AdaptedLinear
    gate_up: AdaptedLinear
    down: AdaptedLinear


class Decoder:
    """The base model: embeddings, layers, final norm and head.

    Attributes:
        arch: Its architecture.
        layers: Its layers; adapters see their linear modules through ``server/models/base.py``.
        dtype: Dtype of activations.
    """

    def __init__(
        self,
        arch: Arch,
        *,
        embedding: torch.Tensor,
        layers: list[DecoderLayer],
        norm: torch.Tensor,
        head: torch.Tensor,
    ) -> None:
        self.arch = arch
        self.embedding = embedding
        self.layers = layers
        self.norm = norm
        self.head = head
        self.dtype = embedding.dtype
        self.device = embedding.device
        self._inv_freq = arch.inv_freq.to(self.device)

    def forward(self, step: StepInput, cache: KvCache) -> torch.Tensor:
        """Run a step and write its keys and values.

        Returns:
            Final-norm hidden states, ``[rows, hidden]``.
        """
        angles = step.positions[:, None].float() * self._inv_freq
        # [rows, 1, head_dim / 2] fp32, shared by all layers.
        cos = (angles.cos() * self.arch.rope_scaling).unsqueeze(1)
        sin = (angles.sin() * self.arch.rope_scaling).unsqueeze(1)
        hidden = F.embedding(step.token_ids, self.embedding)
        if step.soft_rows is not None and step.soft_values is not None:
            hidden.index_copy_(0, step.soft_rows, step.soft_values.to(hidden.dtype))
        for number, layer in enumerate(self.layers):
            normed = self._rms_norm(hidden, layer.input_norm)
            hidden = hidden + self._attend(number, layer, normed, cos, sin, step, cache)
            normed = self._rms_norm(hidden, layer.post_attention_norm)
            gate, up = layer.gate_up(normed, step.adapters).chunk(2, dim=-1)
            hidden = hidden + layer.down(row_silu(gate).mul_(up), step.adapters)
        return self._rms_norm(hidden, self.norm)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Project ``[rows, hidden]`` onto the vocabulary, ``[rows, vocab]`` fp32."""
        return row_linear(hidden, self.head).float()

    def _attend(
        self,
        number: int,
        layer: DecoderLayer,
        normed: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        step: StepInput,
        cache: KvCache,
    ) -> torch.Tensor:
        arch = self.arch
        heads, kv_heads, head_dim = arch.num_heads, arch.num_kv_heads, arch.head_dim
        qkv = layer.qkv(normed, step.adapters)
        rows = qkv.shape[0]
        qkv = qkv.view(rows, heads + 2 * kv_heads, head_dim)
        qk, values = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            q = self._rms_norm(qk[:, :heads], layer.q_norm)
            k = self._rms_norm(qk[:, heads:], layer.k_norm)
            qk = torch.cat((q, k), dim=1)
        if arch.rotary[number]:
            qk = _rotate(qk, cos, sin)
        cache.write(number, step.kv_slots, qk[:, heads:], values)
        attended = paged_attention_reference(
            qk[:, :heads],
            cache.keys[number],
            cache.values[number],
            step.attention[arch.windows[number]],
            scale=head_dim**-0.5,
        )
        return layer.o(attended.view(rows, heads * head_dim), step.adapters)

    def _rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.arch.rms_norm_eps)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions (RoFormer, arXiv 2104.09864) on ``[rows, heads, head_dim]``; fp32 result.

    Pairs are (i, i + head_dim / 2), as Hugging Face checkpoints lay them out.
    """
    x = x.float()
    first, second = x.chunk(2, dim=-1)
    out = torch.empty_like(x)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out
