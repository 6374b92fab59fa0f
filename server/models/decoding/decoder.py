"""One decoder for every supported model, driven by its ``Arch``.

The model is a transformer with RMSNorm before or after attention and MLP, rotary positions,
grouped-query attention and a gated MLP. The tokens of all sequences are packed, ``[num_rows,
hidden]``, without a batch axis.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from turret.kernels.likeliest import MOST_ROWS, Screen, ScreenCodes, likeliest_tokens
from turret.kernels.rows import row_linear, row_softcap_
from turret.server.adapters.device import AdapterStep
from turret.server.adapters.device.cpu import CpuStep
from turret.server.adapters.device.vocabulary import (
    VocabularyGroup,
    change_embeddings,
    change_logits,
)
from turret.server.models.decoding import Arch
from turret.server.models.decoding.adapted_linear import AdaptedLinear, ExpertMixture
from turret.server.models.decoding.cpu_layers import CpuLayerOps, CpuLayers, choose_layer_ops
from turret.server.models.decoding.layer_ops import GrowingQueries, KvCache, RotaryAngles
from turret.server.models.fidelity import Fidelity


class OwnRows(NamedTuple):
    """Rows whose embeddings do not come from the base's embedding matrix.

    Attributes:
        rows: ``[m]`` int64.
        values: Their embeddings, ``[m, hidden]``.
    """

    rows: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """One step's work on the device.

    Attributes:
        token_ids: ``[rows]`` int64; any valid id where ``soft`` or ``added`` has the row.
        positions: Position of each row in its sequence, padding not counted, ``[rows]`` int64;
            ``LONG`` more where the sequence is long (``Arch.long_from``).
        kv_slots: Where each row's keys and values go, ``[rows]`` int64.
        attention: Plan of the decoder's ``ops`` per distinct window (None is full attention).
        adapters: The step's adapters, or None if every row is the base model's.
        soft: Rows of soft prompts.
        added: Rows of tokens that the base lacks.
        embeddings: Rows whose adapters change the embedding.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    kv_slots: torch.Tensor
    attention: Mapping[int | None, Any]
    adapters: AdapterStep | None
    soft: OwnRows | None = None
    added: OwnRows | None = None
    embeddings: Sequence[VocabularyGroup] = ()


@dataclass(slots=True, kw_only=True)
class DecoderLayer:
    """Weights of one layer. Norms are fp32 and include ``Arch.norm_offset``; None means no norm.

    ``q_norm`` and ``k_norm`` are ``[head_dim]``, or as wide as all heads together. ``sinks`` are
    ``[heads]`` fp32. A layer has an MLP (``gate_up`` and ``down``) or ``experts``.
    """

    norm_before_attention: torch.Tensor | None
    norm_after_attention: torch.Tensor | None = None
    norm_before_mlp: torch.Tensor | None
    norm_after_mlp: torch.Tensor | None = None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    sinks: torch.Tensor | None = None
    qkv: AdaptedLinear
    o: AdaptedLinear
    gate_up: AdaptedLinear | None = None
    down: AdaptedLinear | None = None
    experts: ExpertMixture | None = None


class Decoder:
    """The base model: embeddings, layers, final norm and head.

    Attributes:
        arch: Its architecture.
        layers: Its layers. ``describe_base`` describes their linear modules to adapters.
        dtype: Dtype of activations.
        ops: Computes the operations between the projections on this path.
        epoch: Changes when a merge exchanges weights, which makes earlier graphs invalid.
        fidelity: How the weights of the layers differ from those in the model's files.
        head_copy: The int8 copy of the head in the cache, or None.
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
        self.epoch = 0
        self.fidelity = Fidelity()
        self.head_copy: ScreenCodes | None = None
        self.ops = choose_layer_ops(arch, self.dtype, self.device)
        self._angles = {kind: RotaryAngles(rope, self.device) for kind, rope in arch.ropes.items()}
        self._growth = None
        if arch.query_growth is not None:
            self._growth = GrowingQueries(arch.query_growth, arch.max_model_len, self.device)
        # The C structures of the layers, cached for one ``epoch`` of the weights and one KV cache.
        self._native: tuple[int, KvCache, CpuLayers | None] | None = None
        # Round the factor to the embedding's dtype, as in training.
        self._embedding_scale = float(torch.tensor(arch.embedding_scale).to(self.dtype))

    def forward(self, step: StepInput, cache: KvCache) -> torch.Tensor:
        """Run a step and write its keys and values.

        Returns:
            Final-norm hidden states, ``[rows, hidden]``.
        """
        ops = self.ops
        rotations = self.rotations(step.positions)
        growth = self.growth_at(step.positions)
        hidden = self.embed(step)
        adapters = step.adapters
        if adapters is None or (isinstance(adapters, CpuStep) and adapters.is_native):
            native = self._in_one_call(cache)
            if native is not None:
                return native.run(
                    hidden,
                    rotations=rotations,
                    slots=step.kv_slots,
                    attention=step.attention,
                    adapters=adapters,
                )
        delta = None
        for number, layer in enumerate(self.layers):
            normed = self._enter(hidden, delta, layer.norm_before_attention)
            qkv = self._heads(layer, layer.qkv(normed, step.adapters))
            attended = ops.attend(
                number,
                qkv,
                rotations[self.arch.rope_of_layer[number]],
                step.kv_slots,
                cache,
                step.attention[self.arch.windows[number]],
                growth,
                layer.sinks,
                step.adapters,
            )
            delta = self.leave(layer.o(attended, step.adapters), layer.norm_after_attention)
            normed = self._enter(hidden, delta, layer.norm_before_mlp)
            delta = self.leave(self._mlp(layer, normed, step), layer.norm_after_mlp)
        return ops.add_rms_norm(hidden, delta, self.norm)

    def _in_one_call(self, cache: KvCache) -> CpuLayers | None:
        """All layers as one call, or None if some part of them has no compiled kernel."""
        if not isinstance(self.ops, CpuLayerOps) or self.dtype != torch.bfloat16:
            return None
        if self._native is None or self._native[:2] != (self.epoch, cache):
            is_served = CpuLayers.serves(self.arch, self.layers)
            made = CpuLayers(self.arch, self.layers, self.norm, cache) if is_served else None
            self._native = self.epoch, cache, made
        return self._native[2]

    def _mlp(self, layer: DecoderLayer, normed: torch.Tensor, step: StepInput) -> torch.Tensor:
        """The output of the MLP, or of the experts that replace it, ``[rows, hidden]``."""
        if layer.experts is not None:
            return self._mix_experts(layer.experts, normed, step)
        assert layer.gate_up is not None
        assert layer.down is not None
        gated = self.ops.gated_activation(layer.gate_up(normed, step.adapters))
        return layer.down(gated, step.adapters)

    def _mix_experts(
        self, experts: ExpertMixture, normed: torch.Tensor, step: StepInput
    ) -> torch.Tensor:
        routing = self.ops.route(experts.router(normed, step.adapters))
        gate_up = experts.gate_up(normed, routing, step.adapters, routing.rows)
        gated = self.ops.gated_activation(gate_up)
        return self.ops.combine(experts.down(gated, routing, step.adapters), routing)

    def embed(self, step: StepInput) -> torch.Tensor:
        """The first layer's input, ``[rows, hidden]``."""
        hidden = F.embedding(step.token_ids, self.embedding)
        change_embeddings(hidden, step.token_ids, self.embedding, step.embeddings)
        if step.added is not None:
            hidden.index_copy_(0, *step.added)
        is_scaled = self._embedding_scale != 1.0
        if is_scaled and not self.arch.scales_soft_tokens:
            hidden *= self._embedding_scale
        if step.soft is not None:
            hidden.index_copy_(0, step.soft.rows, step.soft.values.to(hidden.dtype))
        if is_scaled and self.arch.scales_soft_tokens:
            hidden *= self._embedding_scale
        return hidden

    def _enter(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, norm: torch.Tensor | None
    ) -> torch.Tensor:
        """Add the previous part's result and return the next part's input, which is read-only."""
        if norm is not None:
            return self.ops.add_rms_norm(hidden, delta, norm)
        if delta is not None:
            hidden += delta
        return hidden

    def leave(self, delta: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        """Compute the residual stream's update from the last projection of attention or MLP."""
        if norm is not None:
            delta = self.ops.add_rms_norm(delta, None, norm)
        if self.arch.residual_scale != 1.0:
            delta *= self.arch.residual_scale
        return delta

    def growth_at(self, positions: torch.Tensor) -> torch.Tensor | None:
        """The factor of each row's queries, ``[rows, 1, 1]`` fp32, or None."""
        return None if self._growth is None else self._growth.at(positions)

    def rotations(
        self, positions: torch.Tensor
    ) -> dict[str | None, tuple[torch.Tensor, torch.Tensor] | None]:
        """Cosines and sines by kind of layer, ``[rows, pairs]`` fp32 each."""
        made = {kind: angles.at(positions) for kind, angles in self._angles.items()}
        return {None: None, **made}

    def logits(
        self,
        hidden: torch.Tensor,
        changes: Sequence[VocabularyGroup] = (),
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Project ``[rows, hidden]`` onto the vocabulary, ``[rows, vocab]`` fp32.

        Args:
            hidden: Final-norm hidden states.
            changes: Rows whose adapters change the head.
            out: The tensor for the logits, ``[at least rows, vocab]`` fp32; None for a new one.
        """
        head = functools.partial(self._dense, weight=self.head)
        return self._scaled(change_logits(hidden, head(hidden), head, changes, out))

    def some_logits(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Project ``[rows, hidden]`` onto some tokens of the base or of an adapter.

        Args:
            hidden: Final-norm hidden states.
            rows: The tokens' rows of a head, ``[tokens, hidden]``.

        Returns:
            ``[rows, tokens]`` fp32.
        """
        return self._scaled(self._dense(hidden, rows).float())

    def _scaled(self, logits: torch.Tensor) -> torch.Tensor:
        if self.arch.logit_scale != 1.0:
            logits *= self.arch.logit_scale
        if self.arch.logit_softcap is not None:
            logits = row_softcap_(logits, self.arch.logit_softcap)
        return logits

    def _dense(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return row_linear(hidden, weight)

    def _heads(self, layer: DecoderLayer, qkv: torch.Tensor) -> torch.Tensor:
        """Split into ``[rows, heads + 2·kv_heads, head_dim]``, with head norms if there are any."""
        heads, kv_heads = self.arch.num_heads, self.arch.num_kv_heads
        qkv = qkv.view(qkv.shape[0], heads + 2 * kv_heads, self.arch.head_dim)
        if layer.q_norm is None or layer.k_norm is None:
            return qkv
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
        return torch.cat((self._norm(q, layer.q_norm), self._norm(k, layer.k_norm), v), dim=1)

    def _norm(self, heads: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm of every head, or of all heads of a row together, ``[rows, heads, head_dim]``."""
        flat = heads.reshape(-1, weight.shape[0]).contiguous()
        return self.ops.add_rms_norm(flat, None, weight).view(heads.shape)


# Finds the likeliest tokens of rows without computing all of their logits.


# AMX's tiles need at least this many outputs. Each output is computed separately, but with fewer
# outputs the order of its sum differs.
_LEAST_OUTPUTS = 16
# A softcap can make distinct logits equal: logits that differ by less than _CAP_SLACK times the cap
# (with a margin for rounding errors), and logits beyond _CAP_REACH times the cap.
_CAP_SLACK, _CAP_REACH = 1e-3, 4.0


class LikeliestTokens:
    """Finds exactly the likeliest tokens while reading only a part of the head (``Screen``).

    Args:
        decoder: A decoder whose head does not change.
        screen: The int8 copy of its head.
    """

    def __init__(self, decoder: Decoder, screen: Screen) -> None:
        self._decoder, self._screen = decoder, screen
        self._slack, self._most = 0.0, float("inf")
        scale, cap = decoder.arch.logit_scale, decoder.arch.logit_softcap
        if cap is not None:
            self._slack = _CAP_SLACK * cap / scale
            self._most = cap * math.tanh(_CAP_REACH)

    @classmethod
    def of(cls, decoder: Decoder) -> LikeliestTokens | None:
        """The finder for a decoder; None if its head cannot be screened."""
        if decoder.arch.logit_scale > 0.0 and Screen.serves(decoder.head):
            # A head with a non-finite weight cannot be screened.
            with contextlib.suppress(ValueError):
                return cls(decoder, Screen(decoder.head, decoder.head_copy))
        return None

    def find(self, hidden: torch.Tensor) -> list[int] | None:
        """The token with the largest logit of each row, and the first one of equal logits.

        Args:
            hidden: Final-norm hidden states, ``[rows, hidden]``.

        Returns:
            The tokens, or None if all logits are needed to decide.
        """
        if hidden.shape[0] > MOST_ROWS:
            return None
        tokens = self._screen.outputs(hidden, self._slack)
        if tokens is None:
            return None
        if len(tokens) == 1 and self._most == float("inf"):
            return [int(tokens)] * hidden.shape[0]
        if len(tokens) < _LEAST_OUTPUTS:
            # Pad with the first token. Of equal logits the first is chosen, so the result stays the
            # same.
            tokens = torch.cat((tokens, tokens[:1].expand(_LEAST_OUTPUTS - len(tokens))))
        rows = self._decoder.head.index_select(0, tokens)
        logits = self._decoder.some_logits(hidden, rows)
        if self._most < float("inf") and float(logits.abs().max()) > self._most:
            return None
        found: list[int] = tokens[likeliest_tokens(logits)].tolist()
        return found

    def skip_next_calls(self) -> None:
        """Do not search in the next calls: the tokens that the last one found could not be used."""
        self._screen.pause()
