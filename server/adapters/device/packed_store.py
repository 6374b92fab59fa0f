"""The adapters of the running batch, side by side in wide matrices.

Per fused projection kind and layer, the A matrices of all packed adapters are stacked along the
rank axis, and so are the B matrices: sixteen different adapters are one product of sixteen times
the rank, masked per row. An adapter owns the same rank range in every module, as wide as its own
largest rank. Gains and biases are tables with a slot per adapter; operators that do not stack are
in ``unstacked.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from turret.kernels.row_gain import row_bias_, row_combine, row_gain_
from turret.kernels.segmented_expand import rank_window, segmented_expand_reference
from turret.kernels.segmented_shrink import segmented_shrink_reference
from turret.kernels.segments import SegmentPlan
from turret.server.adapters.device.extras import Extras, StepExtras, TorchExtras
from turret.server.adapters.device.hadamard_shelf import HadamardShelves
from turret.server.adapters.device.kronecker_shelf import KroneckerShelves
from turret.server.adapters.device.layout import ProjectionLayout
from turret.server.adapters.device.members import StepMembers
from turret.server.adapters.device.packed_projection import PackedProjection
from turret.server.adapters.device.segments import plan_segments
from turret.server.adapters.device.shelves import Shelves
from turret.server.adapters.device.store import BaseProduct, OnMoved, Resident, StoredAdapters
from turret.server.adapters.operators import AdapterOperators

# Rank ranges start at multiples of this: bf16 dot products take ranks in pairs, and a shifted
# pairing would change the rounding.
_RANK_ALIGNMENT = 8
_MIN_RANK_CAPACITY = 16
_MIN_SLOTS = 4


@dataclass(slots=True)
class PackedEntry:
    """An adapter's place: ranks ``[rank_start, rank_end)`` and its slot in the tables.

    ``present`` holds (group, slice) with a low-rank update in some layer; ``gains``,
    ``input_gains`` and ``biases`` the groups with one in some layer.
    """

    adapter: Resident
    rank_start: int
    rank_end: int
    slot: int
    present: frozenset[tuple[str, int]]
    gains: frozenset[str]
    input_gains: frozenset[str]
    biases: frozenset[str]
    last_step: int


class PackedStore(StoredAdapters[PackedEntry]):
    """Owns the packed copies of the adapters that the running batch uses; see ``AdapterStore``.

    Args:
        layout: Shape of the base.
        dtype: Serving dtype.
        device: Where the copies live.
        max_bytes: Budget of the copies.
        on_moved: Told of every adapter that was packed or forgotten.
    """

    def __init__(
        self,
        layout: ProjectionLayout,
        dtype: torch.dtype,
        device: torch.device,
        max_bytes: int,
        on_moved: OnMoved = lambda _: None,
    ) -> None:
        self._layout = layout
        self._dtype = dtype
        self._device = device
        super().__init__(max_bytes, self._make_unstacked(), on_moved)
        self._window = rank_window(dtype)
        self._groups = {name: self._make_group(name) for name in layout.groups}
        self._capacity = 0
        self._slots = 1  # slot 0 is the neutral one

    # Where the Triton path differs (``server/adapters/device/gpu_store.py``).

    def _make_group(self, name: str) -> PackedProjection:
        return PackedProjection(self._layout, name, self._dtype, self._device)

    def _make_unstacked(self) -> Extras:
        like = (self._layout, self._device)
        banks = Shelves((HadamardShelves(*like), KroneckerShelves(*like)), self._device)
        return TorchExtras(*like, banks)

    def stored_bytes(self, operators: AdapterOperators) -> int:
        """Bytes an adapter takes when packed: its ranks are as wide in every module."""
        stacked = self.rank_width(operators) * self._rank_bytes
        extra = self._unstacked.extra_bytes(operators)
        return operators.num_bytes - operators.num_low_rank_bytes + stacked + extra

    @functools.cached_property
    def _rank_bytes(self) -> int:
        """Bytes one unit of rank takes over all modules."""
        per_layer = sum(
            len(slices) * slices[0].in_features + sum(s.out_features for s in slices)
            for slices in self._layout.groups.values()
        )
        return per_layer * self._layout.num_layers * self._dtype.itemsize

    @staticmethod
    def rank_width(operators: AdapterOperators) -> int:
        """Ranks an adapter occupies: its largest, rounded up to the alignment."""
        return -(-operators.rank // _RANK_ALIGNMENT) * _RANK_ALIGNMENT

    def step(self, members: StepMembers) -> PackedStep:
        mixes = [*members.short, *(mix for _, _, mix in members.long)]
        entries = [self._entries[key] for key in {key for mix in mixes for key, _ in mix}]
        plan = plan_segments(members, self._entries, self._device)
        present = frozenset().union(*(e.present for e in entries))
        assert isinstance(self._unstacked, TorchExtras)
        return PackedStep(
            groups=self._groups,
            plan=plan,
            present={
                name: tuple((name, s) in present for s in range(len(group.slices)))
                for name, group in self._groups.items()
            },
            gains=frozenset().union(*(e.gains for e in entries)),
            input_gains=frozenset().union(*(e.input_gains for e in entries)),
            biases=frozenset().union(*(e.biases for e in entries)),
            unstacked=self._unstacked.bind(members),
        )

    def _store(self, adapter: Resident, operators: AdapterOperators) -> None:
        width = self.rank_width(operators)
        start = self._find_range(width)
        entry = self._describe(adapter, operators, start, start + width, self._find_slot())
        self._entries[adapter.key] = entry
        for group in self._groups.values():
            group.put_low_rank(operators, entry.rank_start, entry.rank_end)
            group.put_tables(operators, entry.slot, self._slots)

    def _describe(
        self, adapter: Resident, operators: AdapterOperators, start: int, end: int, slot: int
    ) -> PackedEntry:
        present, gains, input_gains, biases = set(), set(), set(), set()
        for name in self._groups:
            for _, s, ops in self._layout.of(operators, name):
                if ops.low_rank is not None:
                    present.add((name, s))
                if ops.gain is not None:
                    gains.add(name)
                if ops.input_gain is not None:
                    input_gains.add(name)
                if ops.bias is not None:
                    biases.add(name)
        return PackedEntry(
            adapter=adapter,
            rank_start=start,
            rank_end=end,
            slot=slot,
            present=frozenset(present),
            gains=frozenset(gains),
            input_gains=frozenset(input_gains),
            biases=frozenset(biases),
            last_step=self._step,
        )

    def _find_range(self, width: int) -> int:
        """First fit; makes room by forgetting idle adapters, oldest first, then by growing.

        Idle adapters give way before the pack grows: every step reads the span of ranks that its
        adapters lie in, so a dense pack is a fast one.
        """
        if width == 0:
            return 0
        while True:
            taken = sorted((e.rank_start, e.rank_end) for e in self._entries.values())
            cursor = 0
            for start, end in (*taken, (self._capacity, self._capacity)):
                place = self._fit(cursor, width)
                if place + width <= start:
                    return place
                cursor = max(cursor, end)
            if not self._drop_idle():
                return self._rebuild(width)

    def _fit(self, cursor: int, width: int) -> int:
        """The first place from ``cursor`` on that crosses no rank window it need not cross."""
        left = -cursor % self._window
        return cursor if width <= left else cursor + left

    def _rebuild(self, width: int) -> int:
        """Place all adapters densely, in matrices with room for ``width`` more; returns where."""
        cursor = 0
        for entry in self._entries.values():
            size = entry.rank_end - entry.rank_start
            entry.rank_start = self._fit(cursor, size)
            cursor = entry.rank_end = entry.rank_start + size
        place = self._fit(cursor, width)
        self._capacity = max(self._capacity, _rounded(place + width))
        for group in self._groups.values():
            group.allocate(self._capacity)
        for entry in self._entries.values():
            operators = self._operators(entry.adapter)
            for group in self._groups.values():
                group.put_low_rank(operators, entry.rank_start, entry.rank_end)
        return place

    def _find_slot(self) -> int:
        taken = {e.slot for e in self._entries.values()}
        slot = next(i for i in range(1, len(taken) + 2) if i not in taken)
        while self._slots <= slot:
            self._slots = max(_MIN_SLOTS, 2 * self._slots)
        return slot


def _rounded(ranks: int) -> int:
    """Room for so many ranks and at most an eighth more, so that not every adapter grows it."""
    grain = max(_MIN_RANK_CAPACITY, 1 << max(ranks.bit_length() - 4, 0))
    return -(-ranks // grain) * grain


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedStep:
    """See ``AdapterStep``.

    ``present`` says per group which slices have a low-rank update.
    """

    groups: Mapping[str, PackedProjection]
    plan: SegmentPlan
    present: Mapping[str, tuple[bool, ...]]
    gains: frozenset[str]
    input_gains: frozenset[str]
    biases: frozenset[str]
    unstacked: StepExtras

    def project(
        self,
        layer: int,
        group: str,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        base: BaseProduct,
    ) -> torch.Tensor:
        y = base(x)
        self._scale(layer, group, x, y, base)
        if bias is not None:
            y += bias
        self._add(layer, group, x, y)
        return y

    def _scale(
        self, layer: int, group: str, x: torch.Tensor, y: torch.Tensor, base: BaseProduct
    ) -> None:
        """Apply the gains to bias-free base results ``y``, in place."""
        packed = self.groups[group]
        if group in self.gains:
            assert packed.gain_delta is not None
            row_gain_(y, packed.gain_delta[layer], self.plan)
        if group in self.input_gains:
            # W (l ⊙ x) = W x + W ((l − 1) ⊙ x): exact beside any other operator of the mix.
            assert packed.input_gain_delta is not None
            for s, columns in enumerate(packed.columns):
                table = packed.input_gain_delta[layer, :, s]
                delta = row_combine(table, self.plan, x.shape[0])
                rows = delta.count_nonzero(dim=1).nonzero().squeeze(1)
                if rows.numel():
                    chosen = x.index_select(0, rows).float() * delta.index_select(0, rows)
                    change = base(chosen.to(x.dtype))[:, columns]
                    y[:, columns].index_add_(0, rows, change)

    def _add(self, layer: int, group: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add bias differences and updates to ``y``, in place."""
        packed = self.groups[group]
        if group in self.biases:
            assert packed.bias is not None
            row_bias_(y, packed.bias[layer], self.plan)
        present = self.present[group]
        if any(present):
            a, b = packed.layers[layer]
            v = segmented_shrink_reference(x, a, self.plan)
            segmented_expand_reference(y, v, b, self.plan, present)
        self.unstacked.apply(layer, group, x, y)
