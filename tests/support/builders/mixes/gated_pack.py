"""Random gated adapters in a pack for kernels, and their gates in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from kernel_traffic import DEVICE
from ptx.addresses import address_of
from torch import Tensor

from turret.kernels.gpu.fusion_gate import WORDS
from turret.kernels.gpu.tables import GatedMembers, RunOfRows, SegmentMember, SegmentTable


@dataclass(frozen=True)
class Fusion:
    """A gated adapter with queries; each slice has a query length, or None without a gate."""

    widths: tuple[int, ...]
    d_k: tuple[int | None, ...]


# Adapters and weights; adapters without gates have other names.
Named = Sequence[tuple[str, float]]
PLAIN = "plain"
PLAIN_RANK = 12


class GatedPack:
    """A plain adapter in slot 1, followed by gated ones.

    Attributes:
        a: ``[ranks, slices, in]``.
        slice_ranks: ``[slots, slices]`` int32.
        words: ``[slots, slices, WORDS]`` int64: the addresses of the query's weight and the keys,
            the query's length, and 0.
    """

    def __init__(
        self,
        inner: int,
        num_slices: int,
        gated: Mapping[str, Fusion],
        dtype: torch.dtype,
    ) -> None:
        self._gated, self._inner = gated, inner
        self.num_slices, self.dtype = num_slices, dtype
        self._slots = {name: slot for slot, name in enumerate(gated, start=2)}
        ends = {name: PLAIN_RANK + end for name, end in _ends(gated).items()}
        self._bounds = {
            name: [
                (first, end)
                for first, end in pairwise(
                    accumulate(one.widths, initial=ends[name] - sum(one.widths))
                )
            ]
            for name, one in gated.items()
        }
        total = max(ends.values())
        self.a = (torch.randn(total, num_slices, inner) / inner**0.5).to(DEVICE, dtype)
        self.slice_ranks = torch.zeros(len(gated) + 2, num_slices, dtype=torch.int32, device=DEVICE)
        self.slice_ranks[1] = PLAIN_RANK
        # The weights of the queries, and the keys, by name and slice.
        self._queries: dict[tuple[str, int], Tensor] = {}
        self._keys: dict[tuple[str, int], Tensor] = {}
        rows = [[[0] * WORDS] * num_slices for _ in range(len(gated) + 2)]
        for name, one in gated.items():
            for s in range(num_slices):
                rows[self._slots[name]][s] = self._make(name, one, s)
        self.words = torch.tensor(rows, device=DEVICE)

    def _make(self, name: str, one: Fusion, s: int) -> list[int]:
        """Create an adapter's tensors in a slice; returns the words with their addresses."""
        slot, bounds = self._slots[name], self._bounds[name]
        d_k = one.d_k[s]
        if d_k is None:
            # A missing slice must not be read.
            self.a[bounds[0][0] : bounds[-1][1], s] = float("nan")
            return [0] * WORDS
        self.slice_ranks[slot, s] = max(one.widths)
        query = torch.randn(d_k, self._inner) / self._inner**0.5
        self._queries[name, s] = query.to(DEVICE, self.dtype)
        self._keys[name, s] = torch.randn(sum(one.widths), d_k, device=DEVICE)
        return [address_of(self._queries[name, s]), address_of(self._keys[name, s]), d_k, 0]

    def table(self, max_rows: int = 64, **sizes: int | bool) -> SegmentTable:
        """A table with room for mixes of some of the adapters."""
        room = {"max_row_rank": 256, "max_components": 16, "max_gates": 4, "max_row_query": 160}
        return SegmentTable(max_rows=max_rows, device=DEVICE, **{**room, **sizes})  # type: ignore[arg-type]

    def run(self, start: int, end: int, mix: Named) -> RunOfRows:
        """A run of rows that use some of the adapters."""
        members: list[SegmentMember] = []
        gated: list[GatedMembers] = []
        for name, weight in mix:
            if name == PLAIN:
                members.append(SegmentMember(0, PLAIN_RANK, 1, weight))
                continue
            first, slot = len(members), self._slots[name]
            members += [SegmentMember(*bound, slot, weight) for bound in self._bounds[name]]
            one = self._gated[name]
            longest = max(d_k or 0 for d_k in one.d_k)
            gated.append(GatedMembers(first, len(members), longest))
        return RunOfRows(start, end, tuple(members), tuple(gated))

    def exact(self, name: str, s: int, x: Tensor) -> Tensor | None:
        """The gates of an adapter's components for one row, float64; None in a missing slice."""
        x = x.double().cpu()
        if (name, s) not in self._queries:
            return None
        query = self._queries[name, s].double().cpu() @ x
        keys, first = self._keys[name, s].double().cpu(), self._bounds[name][0][0]
        scores = [
            query @ (keys[low - first : high - first].T @ (self.a[low:high, s].double().cpu() @ x))
            for low, high in self._bounds[name]
        ]
        return torch.stack(scores).softmax(0)


def _ends(gated: Mapping[str, Fusion]) -> dict[str, int]:
    """The cumulative ends of the ranks."""
    return dict(zip(gated, accumulate(sum(one.widths) for one in gated.values()), strict=True))


def routed_in_float64(similarities: Tensor, top_k: int, temperature: float) -> Tensor:
    """The gates of one row's components, by sorting; of equal ones, the first counts."""
    scores = [abs(float(value)) for value in similarities]
    best = sorted(range(len(scores)), key=lambda k: (-scores[k], k))[:top_k]
    gates = torch.zeros(len(scores), dtype=torch.float64)
    kept = torch.tensor([scores[k] for k in best], dtype=torch.float64)
    gates[best] = (kept / temperature).softmax(0)
    return gates
