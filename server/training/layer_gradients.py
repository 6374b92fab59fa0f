"""Gradients of the operations between a layer's projections, in float32.

``LayerGradients`` differentiates by autograd, for one segment (the sequences of one adapter) at a
time, because the bits of torch's results may depend on the number of rows. The results of the
compiled kernels do not, so these compute the rows of all segments at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from turret.kernels.cpu.gradients import add_norm_gradient_, attention_gradient, gate_gradient
from turret.kernels.cpu.layers import add_rms_norm
from turret.kernels.rows import rotate_heads
from turret.server.models.decoding import ClampedSwiglu
from turret.server.models.decoding.cpu_layers import CpuLayerOps
from turret.server.models.decoding.decoder import Decoder, DecoderLayer

_GELU = "gelu_pytorch_tanh"
_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    _GELU: partial(F.gelu, approximate="tanh"),
}


class LayerGradients:
    """The gradients of a pass.

    Args:
        decoder: The model.
        lengths: The number of rows of each sequence, by segment.
        positions: The position of each row.
    """

    def __init__(
        self, decoder: Decoder, lengths: Sequence[Sequence[int]], positions: torch.Tensor
    ) -> None:
        self._layers = decoder.layers
        self._arch = decoder.arch
        self._lengths = lengths
        ends = itertools.accumulate((sum(each) for each in lengths), initial=0)
        self._rows = [slice(*pair) for pair in itertools.pairwise(ends)]
        # Clone the tensors, because steps of requests may have made them in inference mode.
        self._angles = {
            kind: None if angles is None else (angles[0].clone(), angles[1].clone())
            for kind, angles in decoder.rotations(positions).items()
        }
        growth = decoder.growth_at(positions)
        self._growth = None if growth is None else growth.clone()

    def add_norm(
        self, total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor
    ) -> None:
        """Add the gradient of an RMSNorm's input to ``total``, ``[rows, width]``."""
        total += self._through(lambda part, _: self._normed(part, weight), x, grad)

    def gate(self, gate_up: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of the gated activation's input, ``[rows, 2 · width]``."""
        activation = self._arch.activation
        assert not isinstance(activation, ClampedSwiglu), "an activation of experts"

        def gated(part: torch.Tensor, number: int) -> torch.Tensor:
            gate, up = part.chunk(2, dim=-1)
            return _ACTIVATIONS[activation](gate) * up

        return self._through(gated, gate_up, grad)

    def attention(self, number: int, qkv: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of the input of a layer's attention.

        Args:
            number: The number of the layer.
            qkv: ``[rows, (heads + 2 · kv_heads) · head_dim]``.
            grad: The gradient of the result, ``[rows, heads · head_dim]``.

        Returns:
            The gradient of ``qkv``, in the same shape.
        """
        return self._through(partial(self._attended, number), qkv, grad)

    def _through(
        self,
        function: Callable[[torch.Tensor, int], torch.Tensor],
        x: torch.Tensor,
        grad: torch.Tensor,
    ) -> torch.Tensor:
        """The gradient of a function's input; the function also takes the segment's number."""
        parts: list[torch.Tensor] = []
        for number, rows in enumerate(self._rows):
            leaf = x[rows].to(torch.float32, copy=True).requires_grad_()
            with torch.enable_grad():
                y = function(leaf, number)
            parts += torch.autograd.grad(y, leaf, grad[rows])
        return torch.cat(parts)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight.float(), self._arch.rms_norm_eps)

    def _attended(self, number: int, qkv: torch.Tensor, segment: int) -> torch.Tensor:
        arch, layer = self._arch, self._layers[number]
        lengths, rows = list(self._lengths[segment]), self._rows[segment]
        heads, kv_heads = arch.num_heads, arch.num_kv_heads
        split = qkv.view(-1, heads + 2 * kv_heads, arch.head_dim)
        q, k, v = split.split((heads, kv_heads, kv_heads), dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = self._normed(q.reshape(-1, layer.q_norm.shape[0]), layer.q_norm).view(q.shape)
            k = self._normed(k.reshape(-1, layer.k_norm.shape[0]), layer.k_norm).view(k.shape)
        angles = self._angles[arch.rope_of_layer[number]]
        if angles is not None:
            cos, sin = (each[rows] for each in angles)
            q, k = (rotate_heads(x, cos, sin, is_interleaved=arch.is_interleaved) for x in (q, k))
        if self._growth is not None:
            q = q * self._growth[rows]
        # Put each sequence into a separate row, padded on the right.
        q, k, v = (pad_sequence(list(x.split(lengths)), batch_first=True) for x in (q, k, v))
        places = torch.arange(max(lengths), device=qkv.device)
        distance = places[:, None] - places[None, :]
        window = arch.windows[number]
        is_hidden = (distance < 0) | (distance >= (len(places) if window is None else window))
        q = q.unflatten(2, (kv_heads, -1))
        scores = torch.einsum("bqhgd,bkhd->bhgqk", q, k) * arch.attention_scale
        if arch.attention_softcap is not None:
            scores = arch.attention_softcap * (scores / arch.attention_softcap).tanh()
        scores = scores.masked_fill(is_hidden, float("-inf"))
        if layer.sinks is not None:
            sinks = layer.sinks.view(kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
            shares = torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]
        else:
            shares = scores.softmax(-1)
        mixed = torch.einsum("bhgqk,bkhd->bqhgd", shares, v).flatten(2)
        return torch.cat([row[:length] for row, length in zip(mixed, lengths, strict=True)])


class NativeLayerGradients(LayerGradients):
    """``LayerGradients`` by compiled kernels, for the rows of all segments at once."""

    def add_norm(
        self, total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor
    ) -> None:
        add_norm_gradient_(total, x, weight, grad, self._arch.rms_norm_eps)

    def gate(self, gate_up: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        return gate_gradient(gate_up, grad, is_gelu=self._arch.activation == _GELU)

    def attention(self, number: int, qkv: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        arch, layer = self._arch, self._layers[number]
        heads, kv_heads = arch.num_heads, arch.num_kv_heads
        split = qkv.view(-1, heads + 2 * kv_heads, arch.head_dim)
        normed = self._with_head_norms(layer, split)
        of_normed = attention_gradient(
            normed,
            grad.view(-1, heads, arch.head_dim),
            list(itertools.chain(*self._lengths)),
            kv_heads=kv_heads,
            angles=self._angles[arch.rope_of_layer[number]],
            is_interleaved=arch.is_interleaved,
            growth=self._growth,
            scale=arch.attention_scale,
            softcap=arch.attention_softcap,
            window=arch.windows[number],
            sinks=layer.sinks,
        )
        if normed is not split:
            sizes = heads, kv_heads, kv_heads
            norms = layer.q_norm, layer.k_norm
            *parts, of_values = of_normed.split(sizes, dim=1)
            for n, (norm, x) in enumerate(zip(norms, split.split(sizes, dim=1), strict=False)):
                assert norm is not None
                of_x = torch.zeros(parts[n].shape).view(-1, norm.shape[0])
                self.add_norm(of_x, _flat(x, norm), norm, _flat(parts[n], norm))
                parts[n] = of_x.view(parts[n].shape)
            of_normed = torch.cat((*parts, of_values), dim=1)
        return of_normed.view(qkv.shape)

    def _with_head_norms(self, layer: DecoderLayer, split: torch.Tensor) -> torch.Tensor:
        if layer.q_norm is None or layer.k_norm is None:
            return split
        arch = self._arch
        heads, kv_heads, eps = arch.num_heads, arch.num_kv_heads, arch.rms_norm_eps
        q, k, v = split.float().split((heads, kv_heads, kv_heads), dim=1)
        q = add_rms_norm(_flat(q, layer.q_norm), None, layer.q_norm, eps).view(q.shape)
        k = add_rms_norm(_flat(k, layer.k_norm), None, layer.k_norm, eps).view(k.shape)
        return torch.cat((q, k, v), dim=1)


def _flat(heads: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    return heads.reshape(-1, norm.shape[0]).contiguous()


def layer_gradients(
    decoder: Decoder, lengths: Sequence[Sequence[int]], positions: torch.Tensor
) -> LayerGradients:
    """The fastest ``LayerGradients`` for this model on this machine."""
    is_native = isinstance(decoder.ops, CpuLayerOps)
    return (NativeLayerGradients if is_native else LayerGradients)(decoder, lengths, positions)
