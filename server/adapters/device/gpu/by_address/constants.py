"""Constant keys and values on the gpu path: each adapter's by themselves, found by address."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from turret.kernels.gpu.adapters.constant_attention import CONSTANT_WORDS, constant_attention
from turret.kernels.gpu.tables.member_table import MemberTable, RowMember
from turret.kernels.gpu.tables.staged_buffer import upload
from turret.server.adapters.device.gpu.tables import GpuTables
from turret.server.adapters.device.hadamard_shelf import grown
from turret.server.adapters.device.members import Members
from turret.server.adapters.device.part import Part
from turret.server.adapters.operators.adapter_operators import AdapterOperators

_LEAST_SLOTS = 4


@dataclass(frozen=True, slots=True)
class GpuStepConstants:
    """A step's rows that attend to constants.

    Attributes:
        words: Where the constants of a slot lie in each layer, ``[layers, slots, CONSTANT_WORDS]``.
        table: The members of each row that have some.
        layers: Those in which some adapter has constants.
        kv_heads: Of the constants.
    """

    words: torch.Tensor
    table: MemberTable
    layers: frozenset[int]
    kv_heads: int

    @property
    def signature(self) -> Hashable:
        """What the step launches, and where what it reads lies: not which adapters it has."""
        words = self.words.data_ptr(), self.words.shape
        return (words, self.table.buffer.data_ptr(), self.layers)

    def attend(self, layer: int, q: torch.Tensor, attended: torch.Tensor) -> None:
        """Add what the rows' adapters attend to, in place; see ``AdapterStep.attend``."""
        if layer in self.layers:
            constant_attention(q, attended, self.kv_heads, self.words[layer], self.table)


class GpuConstants(Part):
    """The constants of every adapter in a store that has some, by key.

    Args:
        num_layers: Of the model.
        dtype: Serving dtype.
        device: Where the kernels run.
    """

    def __init__(self, num_layers: int, dtype: torch.dtype, device: torch.device) -> None:
        self._like = {"dtype": dtype, "device": device}
        shape = (num_layers, 0, CONSTANT_WORDS)
        self._words = torch.zeros(shape, dtype=torch.int64, device=device)
        self._slots: dict[str, int] = {}
        # What the words are of.
        self._kept: dict[str, list[torch.Tensor]] = {}
        self._layers: frozenset[int] = frozenset()
        self._kv_heads = 0

    def insert(self, key: str, operators: AdapterOperators) -> None:
        if operators.attention is None:
            return
        taken = set(self._slots.values())
        slot = next(i for i in range(len(taken) + 1) if i not in taken)
        if slot >= self._words.shape[1]:
            self._words = grown(self._words, max(_LEAST_SLOTS, 2 * self._words.shape[1]))
        words = torch.zeros(self._words.shape[0], CONSTANT_WORDS, dtype=torch.int64)
        kept = []
        for layer, kv in operators.attention.items():
            own = [tensor.to(**self._like, copy=True) for tensor in (kv.keys, kv.values)]
            words[layer, :2] = torch.tensor([tensor.data_ptr() for tensor in own])
            words[layer, 2], self._kv_heads = kv.keys.shape[:2]
            kept += own
        self._words[:, slot] = upload(words, self._words.device)
        self._slots[key], self._kept[key] = slot, kept
        self._layers = self._layers.union(operators.attention)

    def remove(self, key: str) -> None:
        """Forget an adapter. Its words stay, and no step reads them."""
        self._slots.pop(key, None)
        self._kept.pop(key, None)

    def bind(
        self, runs: Sequence[tuple[int, int, Members]], tables: GpuTables
    ) -> GpuStepConstants | None:
        """Load a step's table; None if no row attends to constants.

        Args:
            runs: All rows of the step, one run behind the other: first, end, and their mix.
            tables: Where the metadata goes.
        """
        found = [
            (start, end, [RowMember(self._slots[k], w) for k, w in mix if k in self._slots])
            for start, end, mix in (runs if self._slots else ())
        ]
        members = max((len(mix) for _, _, mix in found), default=0)
        if not members:
            return None
        table = tables.member_table("constants", members)
        table.load(found)
        return GpuStepConstants(self._words, table, self._layers, self._kv_heads)
