"""The decoder of the gpu path.

The same layers as ``decoder.py``, every operation a kernel of ``kernels/gpu`` or a torch operation
that a CUDA graph can hold: nothing here reads a value from the device or copies from the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from turret.kernels.gpu.paged_attention import paged_attention
from turret.kernels.gpu.rms_norm import residual_rms_norm
from turret.kernels.gpu.rope_kv_write import rope_kv_write
from turret.kernels.gpu.silu_mul import silu_mul
from turret.kernels.gpu.tables.attention_table import AttentionTable
from turret.server.adapters.device.gpu.store import GpuAdapterStep
from turret.server.adapters.device.vocabulary import VocabularyGroup, change_embeddings
from turret.server.models.decoding.decoder import Decoder, DecoderLayer, StepInput
from turret.server.models.decoding.kv_cache import KvCache

# Libraries choose their algorithm by shape: the head's product always has this many rows.
_HEAD_ROWS = 64
# By their names in ``Arch``: kernels that multiply the activation by ``up`` in the same pass.
_GATED_ACTIVATIONS = {"silu": silu_mul}


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuStep(StepInput):
    """One step's work, everything on the device: a ``StepInput`` and what a captured step needs.

    Attributes:
        attention: Loaded table per distinct window (None is full attention).
        adapters: The step's adapters, or None where every row is the base model's.
        sample_rows: Rows whose logits are wanted, ``[samples]`` int64.
        num_decode: The first rows, of sequences that generate; see ``nf4_gpu.py``.
        logits: Where logits go, ``[at least samples, vocab]`` fp32, unless adapters change the
            head; None for memory of their own.
        heads: Sampled rows, by their place in ``sample_rows``, whose adapters change the head.
    """

    attention: Mapping[int | None, AttentionTable]
    adapters: GpuAdapterStep | None
    sample_rows: torch.Tensor
    num_decode: int
    logits: torch.Tensor | None = None
    heads: Sequence[VocabularyGroup] = ()

    @property
    def is_fixed(self) -> bool:
        """Whether everything that differs between steps is in buffers of fixed address."""
        return self.soft_rows is None and not (self.embeddings or self.heads)


class GpuDecoder(Decoder):
    """A decoder whose linears were loaded with ``gpu=True``."""

    def compute(self, step: GpuStep, cache: KvCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a step and write its keys and values.

        Returns:
            Final-norm hidden states, ``[rows, hidden]``, and the logits of ``sample_rows``,
            ``[samples, vocab]`` fp32.
        """
        arch = self.arch
        rotations = self._rotations(step.positions)
        if None in arch.rope_of_layer:
            # Layers without rotary positions turn by 0.
            ones = torch.ones(len(step.positions), arch.head_dim // 2, device=self.device)
            rotations[None] = ones, torch.zeros_like(ones)
        hidden = F.embedding(step.token_ids, self.embedding)
        change_embeddings(hidden, step.token_ids, self.embedding, step.embeddings)
        if step.soft_rows is not None and step.soft_values is not None:
            hidden.index_copy_(0, step.soft_rows, step.soft_values.to(hidden.dtype))
        eps = arch.rms_norm_eps
        gated_activation = _GATED_ACTIVATIONS[arch.activation]
        update: torch.Tensor | None = None
        for number, layer in enumerate(self.layers):
            normed = residual_rms_norm(hidden, update, layer.norm_before_attention, eps)
            rotation = rotations[arch.rope_of_layer[number]]
            assert rotation is not None, "every kind of layer turns by something"
            update = self._attention(number, layer, normed, rotation, step, cache)
            normed = residual_rms_norm(hidden, update, layer.norm_before_mlp, eps)
            inner = gated_activation(layer.gate_up(normed, step.adapters, step.num_decode))
            update = layer.down(inner, step.adapters, step.num_decode)
        hidden = residual_rms_norm(hidden, update, self.norm, eps)
        sampled = hidden.index_select(0, step.sample_rows)
        if step.logits is None or step.heads:
            return hidden, self.logits(sampled, step.heads)
        return hidden, step.logits[: len(sampled)].copy_(self._head(sampled))

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        num_rows = hidden.shape[0]
        missing = -num_rows % _HEAD_ROWS
        padded = F.pad(hidden, (0, 0, 0, missing)) if missing else hidden
        pieces = [F.linear(piece, self.head) for piece in padded.split(_HEAD_ROWS)]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces))[:num_rows]

    def _attention(
        self,
        number: int,
        layer: DecoderLayer,
        normed: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        step: GpuStep,
        cache: KvCache,
    ) -> torch.Tensor:
        arch = self.arch
        keys, values = cache.keys[number], cache.values[number]
        q = rope_kv_write(
            layer.qkv(normed, step.adapters, step.num_decode),
            *rotation,
            step.kv_slots,
            keys,
            values,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=arch.rms_norm_eps,
        )
        table = step.attention[arch.windows[number]]
        attended = paged_attention(q, keys, values, table, scale=arch.attention_scale)
        return layer.o(attended.flatten(1), step.adapters, step.num_decode)
