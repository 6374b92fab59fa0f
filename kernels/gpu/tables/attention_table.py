"""Attention metadata of a step on the device, in one buffer of fixed address.

The queries of a sequence are cut into *items* of at most ``tile_rows`` query rows (new tokens times
the query heads of a KV head). A sequence's keys are cut into *splits* at fixed positions, multiples
of ``SPLIT``, whatever the batch: a record is an item with a run of splits. An item is either
spread, one split a record, so that a long context fills the device, or whole, all its splits in one
record, and then nothing is written in between. Both add splits up in the same order, so the bits
are the same, and each item is free to be either, whatever else is in the step. As far as there is
scratch, sequences are spread: those of fewest items first, which leave most of the device idle
otherwise, and of them the longest. Their records come first::

    header   num_records · records@ · 0 · 0
    record   row · tokens · position · blocks@ · padding · split_begin · split_end
             · first record of the item · its records

Block numbers are in a buffer of their own, which outlives the step (``BlockTables``); ``blocks@``
is where the sequence's begin.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from turret.kernels.gpu.tables.staged_buffer import StagedMemory, host_tensor
from turret.kernels.paged_attention import SequenceSpan

HEADER = 4
RECORD = 9
# Default number of positions per split; a multiple of every block size.
SPLIT = 256


class AttentionTable:
    """Owns its part of the device memory. Not thread-safe.

    Attributes:
        buffer: ``[capacity]`` int32 on the device; its address never changes.
        blocks: Block numbers of all sequences, int32 on the device.
        counters: Records of an item that are done, ``[spread_records · kv_heads]`` int32, at its
            first record and head; zero between launches.
        max_records: Records of a step at most.
        spread_records: Of those, records of spread items; kernels size their scratch by it.
        split: Positions per split, a multiple of the kernel's tile: the order of a row's sums, so
            one number for all steps.
        tile_rows: Query rows per item: 16, or 32 where a KV head has more queries than that. One
            size for all steps of a model: sums over keys are shared out among the warps by it.
        kv_heads: KV heads.
        queries_per_head: Query heads per KV head.
        window: Sliding window in tokens, or None.
    """

    def __init__(
        self,
        *,
        max_records: int,
        blocks: torch.Tensor | int,
        kv_heads: int,
        queries_per_head: int,
        window: int | None,
        device: torch.device,
        spread_records: int,
        memory: StagedMemory | None = None,
        split: int = SPLIT,
    ) -> None:
        """Allocate for the largest step.

        Args:
            max_records: Items of a step, and ``spread_records`` besides.
            blocks: Block numbers on the device, which someone else keeps up to date; or how many
                the table has room for itself, for ``load``.
            kv_heads: See the class.
            queries_per_head: See the class.
            window: See the class.
            device: Where the kernels run.
            spread_records: See the class; 0 spreads nothing.
            memory: What the table is a part of; None for one of its own.
            split: See the class.

        Raises:
            ValueError: ``queries_per_head`` is over 32.
        """
        if queries_per_head > 32:
            raise ValueError(f"{queries_per_head} queries per KV head; at most 32 are supported")
        self.max_records = max_records
        self.spread_records = spread_records
        self.split = split
        self.tile_rows = 16 if queries_per_head <= 16 else 32
        self.kv_heads = kv_heads
        self.queries_per_head = queries_per_head
        self.window = window
        memory = StagedMemory(device, 0) if memory is None else memory
        self._memory = memory
        self._part = memory.part(HEADER + max_records * RECORD, torch.int32)
        self.buffer = self._part.buffer
        self._own_blocks = memory.part(blocks, torch.int32) if isinstance(blocks, int) else None
        self.blocks = blocks if self._own_blocks is None else self._own_blocks.buffer
        counters = max(1, spread_records * kv_heads)
        self.counters = torch.zeros(counters, dtype=torch.int32, device=device)

    def load(self, spans: Sequence[SequenceSpan]) -> None:
        """Describe a step, block numbers included, and start copying that to the device.

        Raises:
            ValueError: The step is over a capacity given at construction.
        """
        assert self._own_blocks is not None, "block numbers are somebody else's"
        blocks: list[int] = []
        sequences: list[int] = []
        for s in spans:
            sequences += (s.row_start, s.num_new, s.num_context, len(blocks), s.num_padding)
            blocks.extend(s.blocks)
        with self._memory.step():
            self._own_blocks.load(blocks)
            self.load_words(self.words(sequences))

    def load_words(self, words: torch.Tensor) -> None:
        """Describe a step whose block numbers are on the device; ``words`` describes it."""
        with self._memory.step():
            self._part.staged(len(words)).copy_(words)

    def words(self, spans: Sequence[int]) -> torch.Tensor:
        """A step's description, int32 on the host.

        Args:
            spans: One behind the other five numbers of each sequence: its first row, new tokens,
                tokens before them, where its block numbers begin in ``blocks``, and leading
                positions that are not seen.

        Raises:
            ValueError: The step is over a capacity given at construction.
        """
        # Operate on whole columns: a step with 64 long contexts has a thousand records.
        table = host_tensor(spans, torch.int32).view(len(spans) // 5, 5)
        num_new, size = table[:, 1], self.tile_rows // self.queries_per_head
        counts = (num_new + (size - 1)) // size
        spread = self._spread(table, counts)
        items, span_of = self._items(table, counts)
        first, last = self._splits(items)
        runs = torch.where(spread[span_of], last - first, 1)
        # Put spread items first and keep the order otherwise.
        order = torch.cat((spread[span_of].nonzero()[:, 0], (~spread[span_of]).nonzero()[:, 0]))
        items, first, last, runs = items[order], first[order], last[order], runs[order]
        ends = runs.cumsum(0)
        begins = ends - runs
        num_records = int(ends[-1]) if len(ends) else 0
        if num_records > self.max_records:
            raise ValueError(
                f"the step has {num_records} records; {self.max_records} are allocated"
            )
        item_of = _repeated(begins, num_records)
        count, begin = runs[item_of], begins[item_of]
        split = first[item_of] + torch.arange(num_records) - begin
        words = torch.zeros(HEADER + num_records * RECORD, dtype=torch.int32)
        words[:2] = host_tensor((num_records, HEADER), torch.int32)
        records = words[HEADER:].view(-1, RECORD)
        records[:, :5] = items[item_of]
        records[:, 5] = split
        records[:, 6] = torch.where(count == 1, last[item_of], split + 1)
        records[:, 7] = torch.where(count == 1, 0, begin)
        records[:, 8] = count
        return words

    def _items(
        self, spans: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Items as spans of few tokens, ``[items, 5]``, and the number of each one's span."""
        size, total = self.tile_rows // self.queries_per_head, int(counts.sum())
        if total == len(spans):
            return spans, torch.arange(total)
        begins = counts.cumsum(0) - counts
        span_of = _repeated(begins, total)
        first = ((torch.arange(total) - begins[span_of]) * size).to(torch.int32)
        items = spans[span_of]
        items[:, 0] += first
        items[:, 1] = (items[:, 1] - first).clamp(max=size)
        items[:, 2] += first
        return items, span_of

    def _splits(self, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """First and end of the splits that any token of each item sees; never empty."""
        _, tokens, position, _, first = items.unbind(1)
        if self.window is not None:
            first = torch.maximum(first, position - (self.window - 1))
        return first // self.split, (position + tokens - 1) // self.split + 1

    def _spread(self, spans: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Which sequences are spread."""
        first, last = self._splits(spans)
        splits = last - first
        records = counts * splits
        chosen = splits > 1
        if int(torch.where(chosen, records, 0).sum()) <= self.spread_records:
            return chosen
        left = self.spread_records
        sizes = zip(counts.tolist(), (-splits).tolist(), range(len(splits)), strict=True)
        for items, minus_splits, number in sorted(sizes):
            fits = minus_splits < -1 and items * -minus_splits <= left
            chosen[number] = fits
            left += items * minus_splits if fits else 0
        return chosen


def _repeated(begins: torch.Tensor, total: int) -> torch.Tensor:
    """Number of the run that each of ``total`` places is in; runs are not empty.

    ``torch.repeat_interleave`` would wake a team of threads for it.
    """
    places = torch.zeros(total, dtype=torch.int64)
    places[begins[1:]] = 1
    return places.cumsum(0)
