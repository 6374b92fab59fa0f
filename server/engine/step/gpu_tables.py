"""Device buffers of one kind of step (decode, or prompts beside it): allocated once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from turret.kernels.gpu.tables.attention_table import SPLIT, AttentionTable
from turret.kernels.gpu.tables.row_table import RowTable
from turret.kernels.gpu.tables.segment_table import SegmentTable
from turret.kernels.gpu.tables.staged_buffer import StagedBuffer
from turret.kernels.paged_attention import SequenceSpan
from turret.kernels.segments import LongSegment
from turret.server.models.decoding.arch import Arch

# Attention scratch is bounded: of many long contexts, some are walked by one program each.
_MAX_SPREAD_RECORDS = 2048
# How much room one row's mix has in the first segment table; it grows when a step needs more.
_FIRST_ROW_RANK = 256
_FIRST_MEMBERS = 8
# Fusions come and go by key; a table of 8,192 rows is 6 MB on the device and 13 MB pinned.
_MAX_FUSION_TABLES = 64


class StepTables:
    """Everything that a step's kernels read, at fixed addresses (``GpuTables``).

    Args:
        arch: The model.
        max_rows: Most rows of a step.
        max_seqs: Most sequences of a step.
        max_len: Most positions of a sequence without a prefix.
        block_size: Positions per KV block.
        device: Where the kernels run.

    Attributes:
        max_rows: See above.
        epoch: Moves when a table is replaced by a larger one.
    """

    def __init__(
        self,
        arch: Arch,
        *,
        max_rows: int,
        max_seqs: int,
        max_len: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self.max_rows = max_rows
        self.epoch = 0
        self._device = device
        self._rows = StagedBuffer(4 * max_rows, torch.int64, device)
        self._row_tables: dict[Hashable, RowTable] = {}
        # The one that was used last comes last.
        self._fusion_tables: dict[tuple[str, int, int], SegmentTable] = {}
        self._row_rank, self._members = _FIRST_ROW_RANK, _FIRST_MEMBERS
        self._segments = self._make_segments()
        self._arch = arch
        self._spread_records = min(max_seqs * -(-max_len // SPLIT), _MAX_SPREAD_RECORDS)
        self._max_blocks = max_seqs * -(-max_len // block_size)
        self._make_attention()

    def load_rows(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        kv_slots: Sequence[int],
        sample_rows: Sequence[int],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Start copying; missing rows are zero.

        Returns:
            Views of the whole buffer, each ``[max_rows]`` int64.
        """
        words: list[int] = []
        for values in (token_ids, positions, kv_slots, sample_rows):
            words.extend(values)
            words.extend([0] * (self.max_rows - len(values)))
        self._rows.load(words)
        ids, places, slots, samples = self._rows.buffer.view(4, self.max_rows).unbind()
        return ids, places, slots, samples

    def load_attention(self, spans: Sequence[SequenceSpan]) -> dict[int | None, AttentionTable]:
        """Load the tables of every window.

        Larger ones are made if sequences are longer than the model's context: an adapter's prefix
        comes on top of it.
        """
        num_blocks = sum(len(span.blocks) for span in spans)
        if num_blocks > self._max_blocks:
            self._max_blocks = max(num_blocks, 2 * self._max_blocks)
            self._make_attention()
            self.epoch += 1
        for table in self._attention.values():
            table.load(spans)
        return self._attention

    def load_segments(self, runs: Sequence[LongSegment]) -> SegmentTable:
        """Load the segment table; a larger one if a mix is larger than it was made for."""
        self._fit_segments(runs)
        self._segments.load(runs)
        return self._segments

    def _fit_segments(self, runs: Sequence[LongSegment]) -> None:
        ranks = max((sum(m.rank_end - m.rank_start for m in r.members) for r in runs), default=0)
        most = max((len(run.members) for run in runs), default=0)
        if ranks <= self._row_rank and most <= self._members:
            return
        while self._row_rank < ranks:
            self._row_rank *= 2
        while self._members < most:
            self._members *= 2
        self._segments = self._make_segments()
        self.epoch += 1

    def row_table(self, key: Hashable) -> RowTable:
        """The table of a shelf and position; the same one for the same key."""
        if key not in self._row_tables:
            self._row_tables[key] = RowTable(self.max_rows, self._device)
        return self._row_tables[key]

    def fusion_table(self, key: str, ranks: int, components: int) -> SegmentTable:
        """The table of a learned fusion; the same one for the same arguments."""
        place = (key, ranks, components)
        table = self._fusion_tables.pop(place, None)
        if table is None:
            if len(self._fusion_tables) >= _MAX_FUSION_TABLES:
                self._fusion_tables.pop(next(iter(self._fusion_tables)))
                self.epoch += 1
            table = SegmentTable(
                max_rows=self.max_rows,
                max_row_rank=ranks,
                max_components=components,
                device=self._device,
            )
        self._fusion_tables[place] = table
        return table

    def _make_attention(self) -> None:
        self._attention = {
            window: AttentionTable(
                max_records=self.max_rows + self._spread_records,
                max_blocks=self._max_blocks,
                kv_heads=self._arch.num_kv_heads,
                queries_per_head=self._arch.queries_per_head,
                window=window,
                device=self._device,
                spread_records=self._spread_records,
            )
            for window in set(self._arch.windows)
        }

    def _make_segments(self) -> SegmentTable:
        return SegmentTable(
            max_rows=self.max_rows,
            max_row_rank=self._row_rank,
            max_components=self._members,
            device=self._device,
        )
