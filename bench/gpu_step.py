"""A whole decode step at a model's shapes, random NF4 weights made in place, adapters on top."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu_adapters import LowRankPack, make_pack, make_table
from kernel_launches import Model

from turret.kernels.gpu.attention_table import AttentionTable
from turret.kernels.gpu.hadamard_expand import hadamard_expand
from turret.kernels.gpu.hadamard_shrink import hadamard_shrink
from turret.kernels.gpu.kronecker import kronecker
from turret.kernels.gpu.nf4_matmul import nf4_matmul
from turret.kernels.gpu.paged_attention import paged_attention
from turret.kernels.gpu.rms_norm import residual_rms_norm
from turret.kernels.gpu.rope_kv_write import rope_kv_write
from turret.kernels.gpu.row_table import RowTable
from turret.kernels.gpu.segmented_expand import segmented_expand
from turret.kernels.gpu.segmented_shrink import segmented_shrink
from turret.kernels.gpu.silu_mul import silu_mul
from turret.kernels.nf4_matmul import BLOCK, Nf4Matrix
from turret.kernels.paged_attention import SequenceSpan

KV_BLOCK = 16
# (layer, group, x, y): adds the adapters' updates to y in place.
Apply = Callable[[int, str, torch.Tensor, torch.Tensor], None]


def random_nf4(out_features: int, in_features: int, device: torch.device) -> Nf4Matrix:
    """Random codes with maxima that make a result about as large as the input."""
    size = out_features * in_features
    packed = torch.randint(0, 256, (size // 2,), dtype=torch.uint8, device=device)
    absmax = torch.rand(size // BLOCK, device=device).mul_(2 * in_features**-0.5)
    return Nf4Matrix(packed, absmax, out_features, in_features)


@dataclass(frozen=True, slots=True)
class Scenario:
    """Who uses which adapter.

    Attributes:
        name: As printed.
        slot_of_row: Slot per row, 0 for the base model alone.
        ranks: Ranks of slots 1, 2, …
        method: ``lora``, ``dora``, ``loha`` or ``lokr``.
    """

    name: str
    slot_of_row: tuple[int, ...]
    ranks: tuple[int, ...]
    method: str = "lora"


class DecodeStep:
    """Weights, cache and metadata of one decode step of ``num_rows`` sequences."""

    def __init__(
        self,
        model: Model,
        num_layers: int,
        num_rows: int,
        context: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.model, self.num_layers, self.num_rows = model, num_layers, num_rows
        self.context, self.dtype, self.device = context, dtype, device
        like = {"dtype": dtype, "device": device}
        self.weights = [
            {
                name: random_nf4(sum(outs), inner, device)
                for name, (inner, outs) in model.groups.items()
            }
            for _ in range(num_layers)
        ]
        self.norm = torch.ones(model.hidden, **like)
        self.hidden = torch.randn(num_rows, model.hidden, **like)
        blocks = -(-(context + 1) // KV_BLOCK)
        shape = (num_rows * blocks + 1, KV_BLOCK, model.kv_heads, model.head_dim)
        self.caches = [
            tuple(torch.randn(shape, **like) for _ in range(2)) for _ in range(num_layers)
        ]
        table = [list(range(1 + i * blocks, 1 + (i + 1) * blocks)) for i in range(num_rows)]
        self.attention = AttentionTable(
            max_records=num_rows * (context // 512 + 2),
            max_blocks=num_rows * blocks,
            queries_per_head=model.heads // model.kv_heads,
            window=model.window,
            device=device,
        )
        self.attention.load([SequenceSpan(i, 1, context, b) for i, b in enumerate(table)])
        angles = torch.rand(num_rows, model.head_dim // 2, device=device)
        self.cos, self.sin = angles.cos(), angles.sin()
        last = [b[context // KV_BLOCK] * KV_BLOCK + context % KV_BLOCK for b in table]
        self.kv_slots = torch.tensor(last, device=device)

    def run(self, apply: Apply | None) -> torch.Tensor:
        """The step without embedding and head; returns the last layer's output."""
        model = self.model
        hidden = self.hidden.clone()
        update: torch.Tensor | None = None
        for layer in range(self.num_layers):
            normed = residual_rms_norm(hidden, update, self.norm, 1e-5)
            qkv = self._project(layer, "qkv", normed, apply)
            k, v = self.caches[layer]
            q = rope_kv_write(qkv, self.cos, self.sin, self.kv_slots, k, v)
            attended = paged_attention(q, k, v, self.attention, scale=model.head_dim**-0.5)
            update = self._project(layer, "o", attended.flatten(1), apply)
            normed = residual_rms_norm(hidden, update, self.norm, 1e-5)
            inner = silu_mul(self._project(layer, "gate_up", normed, apply))
            update = self._project(layer, "down", inner, apply)
        return residual_rms_norm(hidden, update, self.norm, 1e-5)

    def _project(
        self, layer: int, group: str, x: torch.Tensor, apply: Apply | None
    ) -> torch.Tensor:
        y = nf4_matmul(x, self.weights[layer][group])
        if apply is not None:
            apply(layer, group, x, y)
        return y

    def base_bytes(self) -> int:
        """Bytes a step must read at least: packed weights, maxima, keys and values."""
        weights = sum(
            w.packed.nbytes + w.absmax.nbytes
            for layer in self.weights
            for w in layer.values()
            if isinstance(w.absmax, torch.Tensor)
        )
        per_token = 2 * self.model.kv_heads * self.model.head_dim * self.dtype.itemsize
        return weights + self.num_layers * self.num_rows * self.context * per_token


class Adapters:
    """A scenario's adapters for every layer of a step.

    Attributes:
        apply: Adds them; pass it to ``DecodeStep.run``.
        num_bytes: Bytes of the distinct adapters that the rows use.
    """

    def __init__(self, step: DecodeStep, scenario: Scenario, *, gemv: bool = False) -> None:
        self._step, self._scenario = step, scenario
        used = sorted({slot for slot in scenario.slot_of_row if slot})
        self._packs: list[dict[str, Any]] = []
        groups = step.model.groups
        make = {"loha": self._loha, "lokr": self._lokr}.get(scenario.method, self._low_rank)
        for _ in range(step.num_layers):
            self._packs.append({name: make(*shape) for name, shape in groups.items()})
        if scenario.method in ("loha", "lokr"):
            rows = [i for i, slot in enumerate(scenario.slot_of_row) if slot]
            slots = [scenario.slot_of_row[row] for row in rows]
            self._rows = RowTable(step.num_rows, step.device)
            self._rows.load(rows, slots, [1.0] * len(rows))
            self.apply: Apply = self._apply_loha if scenario.method == "loha" else self._apply_lokr
            size = sum(
                t.nbytes for layer in self._packs for pack in layer.values() for t in pack["all"]
            )
            self.num_bytes = size * len(used) // (len(scenario.ranks) + 1)
            return
        first: LowRankPack = self._packs[0]["qkv"]
        self._table = make_table(first.bounds, scenario.slot_of_row, step.device, gemv=gemv)
        self.apply = self._apply_low_rank
        ranks = sum(scenario.ranks[slot - 1] for slot in used)
        per_rank = sum(len(outs) * inner + sum(outs) for inner, outs in groups.values())
        self.num_bytes = ranks * per_rank * step.dtype.itemsize * step.num_layers

    def _low_rank(self, inner: int, outs: Sequence[int]) -> LowRankPack:
        step = self._step
        return make_pack(inner, outs, self._scenario.ranks, step.dtype, step.device)

    def _apply_low_rank(self, layer: int, group: str, x: torch.Tensor, y: torch.Tensor) -> None:
        pack = self._packs[layer][group]
        gain = pack.gain_delta if self._scenario.method == "dora" else None
        v = segmented_shrink(x, pack.a, pack.slice_ranks, self._table)
        segmented_expand(y, v, pack.b, pack.slice_ranks, self._table, gain_delta=gain)

    def _factor(self, *shape: int) -> torch.Tensor:
        step = self._step
        return torch.randn(shape, dtype=step.dtype, device=step.device).mul_(shape[-1] ** -0.5)

    def _loha(self, inner: int, outs: Sequence[int]) -> dict[str, Any]:
        slots, rank = len(self._scenario.ranks) + 1, self._scenario.ranks[0]
        narrow = [self._factor(slots, len(outs), rank, inner) for _ in range(2)]
        wide = [[self._factor(slots, out, rank) for out in outs] for _ in range(2)]
        return {"narrow": narrow, "wide": wide, "all": [*narrow, *wide[0], *wide[1]]}

    def _apply_loha(self, layer: int, group: str, x: torch.Tensor, y: torch.Tensor) -> None:
        pack = self._packs[layer][group]
        (w1b, w2b), (w1a, w2a) = pack["narrow"], pack["wide"]
        u = hadamard_shrink(x, w1b, w2b, self._rows)
        hadamard_expand(y, u, w1a, w2a, self._rows)

    def _lokr(self, inner: int, outs: Sequence[int]) -> dict[str, Any]:
        slots = len(self._scenario.ranks) + 1
        pairs = []
        for out in outs:
            factor = next(f for f in (64, 32, 16, 8, 4) if inner % f == 0 and out % f == 0)
            small = self._factor(slots, factor, factor)
            pairs.append((small, self._factor(slots, out // factor, inner // factor)))
        return {"pairs": pairs, "all": [t for pair in pairs for t in pair]}

    def _apply_lokr(self, layer: int, group: str, x: torch.Tensor, y: torch.Tensor) -> None:
        start = 0
        for small, large in self._packs[layer][group]["pairs"]:
            out = small.shape[1] * large.shape[1]
            kronecker(x, y[:, start : start + out], small, large, self._rows)
            start += out
