"""The operations of a decoder layer between its projections, and the KV cache that they use.

This is the interface between the decoder and a compute path: the decoder determines which
operations run, and ``LayerOps`` or a subclass implements them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from turret.kernels.expert_routing import Routing, combine_reference, route_reference
from turret.kernels.gpu.tables import upload
from turret.kernels.paged_attention import SequenceSpan, paged_attention_reference, plan_attention
from turret.kernels.rows import (
    residual_rms_norm_reference,
    rotate_heads,
    row_clamped_swiglu,
    row_gelu,
    row_silu,
)
from turret.server.adapters.device import AdapterStep
from turret.server.models.decoding import LONG, Arch, ClampedSwiglu, QueryGrowth, Rope

# The paged KV cache's tensors. The engine assigns the blocks.


class KvCache:
    """Keys and values of all layers, ``[layers, num_blocks, block_size, kv_heads, head_dim]``.

    Block 0 is never allocated, because it pads tiles. The memory is only reserved: a block takes
    RAM when it is first written.
    """

    def __init__(
        self, arch: Arch, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ):
        shape = (arch.num_layers, num_blocks, block_size, arch.num_kv_heads, arch.head_dim)
        self.block_size = block_size
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.clear([0])

    @staticmethod
    def block_bytes(arch: Arch, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers, keys and values."""
        per_token = 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim
        return per_token * block_size * dtype.itemsize

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero blocks that change owner; needed if ``LayerOps.reads_masked``."""
        if blocks:
            index = torch.tensor(blocks, device=self.keys.device)
            self.keys.index_fill_(1, index, 0)
            self.values.index_fill_(1, index, 0)

    def fill(
        self, blocks: Sequence[int], keys: torch.Tensor, values: torch.Tensor, first: int
    ) -> None:
        """Copy stored keys and values of all layers into whole blocks.

        Args:
            blocks: Block numbers, in position order.
            keys: ``[layers, positions, kv_heads, head_dim]``, as attention reads them.
            values: Same shape.
            first: The stored position that goes into the first slot. Negative if padding slots,
                which stay zero, come first.
        """
        skip = max(-first, 0)
        places = [b * self.block_size + o for b in blocks for o in range(self.block_size)][skip:]
        slots = upload(torch.tensor(places), self.keys.device)
        rows = slice(first + skip, first + skip + len(places))
        for cache, stored in ((self.keys, keys), (self.values, values)):
            part = upload(stored[:, rows].to(cache.dtype), cache.device)
            cache.flatten(1, 2).index_copy_(1, slots, part)

    def write(
        self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store new tokens.

        Args:
            layer: Layer number.
            slots: ``block · block_size + offset`` per row, ``[rows]`` int64.
            keys: Rotated, ``[rows, kv_heads, head_dim]``.
            values: ``[rows, kv_heads, head_dim]``.
        """
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, keys.to(self.keys.dtype))
        self.values[layer].flatten(0, 1).index_copy_(0, slots, values.to(self.values.dtype))


# Cosines and sines of positions, computed once.
#
# A library's sine may round differently depending on an element's index in a vector, and the index
# of a position in a step depends on the batch. So the values are computed for fixed blocks of
# positions, and then looked up.


_BLOCK = 1024
Angles = tuple[torch.Tensor, torch.Tensor]


class RotaryAngles:
    """The rotary angles of a kind of layer (RoFormer, arXiv 2104.09864).

    Args:
        rope: The rotary positions; see ``Rope``.
        device: Where the positions are.
    """

    def __init__(self, rope: Rope, device: torch.device) -> None:
        self._all = _Angles(rope.inv_freq.to(device), rope.scaling)
        self._long = None
        if rope.long_inv_freq is not None:
            self._long = _Angles(rope.long_inv_freq.to(device), rope.scaling)

    def at(self, positions: torch.Tensor) -> Angles:
        """Cosines and sines, ``[rows, pairs]`` fp32.

        Args:
            positions: ``[rows]`` int64, plus ``LONG`` for long sequences.
        """
        if self._long is None:
            return self._all.at(positions)
        is_long = (positions >= LONG).unsqueeze(1)
        positions = positions % LONG
        both = zip(self._long.at(positions), self._all.at(positions), strict=True)
        cos, sin = (torch.where(is_long, long, short) for long, short in both)
        return cos, sin


class _Angles:
    """The angles of one set of frequencies."""

    def __init__(self, inv_freq: torch.Tensor, scaling: float) -> None:
        self._inv_freq, self._scaling = inv_freq, scaling
        self._cos = self._sin = inv_freq.new_empty(0, inv_freq.shape[0])

    def at(self, positions: torch.Tensor) -> Angles:
        if positions.device.type != "cpu":
            return self._make(positions)
        most = int(positions.max()) if positions.numel() else 0
        while self._cos.shape[0] <= most:
            start = self._cos.shape[0]
            cos, sin = self._make(torch.arange(start, start + _BLOCK))
            self._cos, self._sin = torch.cat((self._cos, cos)), torch.cat((self._sin, sin))
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)

    def _make(self, positions: torch.Tensor) -> Angles:
        phases = positions[:, None].float() * self._inv_freq
        return phases.cos() * self._scaling, phases.sin() * self._scaling


class GrowingQueries:
    """``QueryGrowth`` of positions.

    Args:
        growth: The growth of the queries.
        max_len: Maximum number of positions of a sequence.
        device: Where the positions are.
    """

    def __init__(self, growth: QueryGrowth, max_len: int, device: torch.device) -> None:
        steps = range(max_len // growth.length + 1)
        values = [1.0 + growth.beta * math.log(1.0 + step) for step in steps]
        self._length = growth.length
        self._values = torch.tensor(values, device=device)

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        """The factors, ``[rows, 1, 1]`` fp32."""
        steps = (positions // self._length).clamp(max=len(self._values) - 1)
        return self._values.index_select(0, steps).view(-1, 1, 1)


def no_rotation(rows: int, arch: Arch, device: torch.device) -> Angles:
    """The angles of layers without rotary positions: all of them 0."""
    ones = torch.ones(rows, arch.head_dim // 2, device=device)
    return ones, torch.zeros_like(ones)


def _gated(
    activate: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[torch.Tensor], torch.Tensor]:
    def apply(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return activate(gate).mul_(up)

    return apply


class LayerOps:
    """The operations of a layer in torch, on any device. Tokens are packed, ``[rows, …]``.

    Args:
        arch: The architecture of the decoder.

    Attributes:
        reads_masked: Whether attention multiplies the values at masked positions by 0. A NaN of a
            block's previous owner would then spread, so blocks that change owner must be cleared.
        activations: Name in ``Arch`` → function that also multiplies the activation by ``up``.
        clamped_swiglu: Computes a ``ClampedSwiglu``.
        route_rows: See ``route``.
        combine: Sums the outputs of each row's experts, ``[pairs, hidden]`` → ``[rows, hidden]``.
    """

    reads_masked = True
    activations: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": _gated(row_silu),
        "gelu_pytorch_tanh": _gated(row_gelu),
    }
    clamped_swiglu = staticmethod(row_clamped_swiglu)
    route_rows = staticmethod(route_reference)
    combine = staticmethod(combine_reference)

    def __init__(self, arch: Arch) -> None:
        self._arch = arch

    def plan_attention(
        self,
        spans: Sequence[SequenceSpan],
        *,
        num_rows: int,
        block_size: int,
        window: int | None,
        device: torch.device,
    ) -> Any:
        """Prepare a step's attention for the layers with this window.

        The result is for ``attend``.
        """
        return plan_attention(
            spans,
            num_rows=num_rows,
            block_size=block_size,
            queries_per_head=self._arch.queries_per_head,
            window=window,
            device=device,
        )

    def add_rms_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor
    ) -> torch.Tensor:
        """``hidden += delta`` in place; returns the RMSNorm of the sum, ``[rows, hidden]``."""
        return residual_rms_norm_reference(hidden, delta, weight, self._arch.rms_norm_eps)

    def attend(
        self,
        number: int,
        qkv: torch.Tensor,
        angles: Angles | None,
        slots: torch.Tensor,
        cache: KvCache,
        plan: Any,
        growth: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        adapters: AdapterStep | None = None,
    ) -> torch.Tensor:
        """Rotate queries and keys, store keys and values, and attend.

        Args:
            number: The layer's number.
            qkv: ``[rows, heads + 2·kv_heads, head_dim]``.
            angles: Cosines and sines, ``[rows, pairs]`` fp32 each, or None (no rotation).
            slots: Where each row's keys and values go, ``[rows]`` int64.
            cache: The KV cache, which is written and then read.
            plan: Result of ``plan_attention`` for the layer's window.
            growth: Multiplies each row's queries, ``[rows, 1, 1]`` fp32, or None.
            sinks: The layer's sinks, ``[heads]`` fp32, or None.
            adapters: The step's adapters, which may attend to further keys, or None.

        Returns:
            ``[rows, heads · head_dim]``.
        """
        arch = self._arch
        heads, kv_heads = arch.num_heads, arch.num_kv_heads
        qk, values = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if angles is not None:
            qk = rotate_heads(qk, *angles, is_interleaved=arch.is_interleaved)
        cache.write(number, slots, qk[:, heads:], values)
        q = qk[:, :heads] if growth is None else qk[:, :heads].float() * growth
        attended = paged_attention_reference(
            q,
            cache.keys[number],
            cache.values[number],
            plan,
            scale=arch.attention_scale,
            softcap=arch.attention_softcap,
            sinks=sinks,
        )
        if adapters is not None:
            adapters.attend(number, q, attended)
        return attended.view(qkv.shape[0], -1)

    def gated_activation(self, gate_up: torch.Tensor) -> torch.Tensor:
        """``activation(gate) · up``: ``[rows, 2·width]`` → ``[rows, width]``."""
        activation = self._arch.activation
        if isinstance(activation, ClampedSwiglu):
            return self.clamped_swiglu(gate_up, activation.alpha, activation.limit)
        return self.activations[activation](gate_up)

    def route(self, scores: torch.Tensor) -> Routing:
        """Choose the experts of each row from ``[rows, experts]`` scores."""
        experts = self._arch.experts
        assert experts is not None, "a layer that routes has experts"
        return self.route_rows(scores, experts.per_token, normalizes=experts.normalizes)
