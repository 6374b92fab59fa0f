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
    blocks   block numbers of the sequence …
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from turret.kernels.gpu.tables.staged_buffer import StagedBuffer
from turret.kernels.paged_attention import SequenceSpan

HEADER = 4
RECORD = 9
# Positions per split, a multiple of the kernel's tile and of every block size.
SPLIT = 256


class AttentionTable:
    """Owns the device buffer. Not thread-safe.

    Attributes:
        buffer: ``[capacity]`` int32 on the device; its address never changes.
        counters: Records of an item that are done, ``[spread_records · kv_heads]`` int32, at its
            first record and head; zero between launches.
        max_records: Records of a step at most.
        spread_records: Of those, records of spread items; kernels size their scratch by it.
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
        max_blocks: int,
        kv_heads: int,
        queries_per_head: int,
        window: int | None,
        device: torch.device,
        spread_records: int,
    ) -> None:
        """Allocate for the largest step.

        Args:
            max_records: Items of a step, and ``spread_records`` besides.
            max_blocks: KV blocks of all sequences of a step.
            kv_heads: See the class.
            queries_per_head: See the class.
            window: See the class.
            device: Where the kernels run.
            spread_records: See the class; 0 spreads nothing.

        Raises:
            ValueError: ``queries_per_head`` is over 32.
        """
        if queries_per_head > 32:
            raise ValueError(f"{queries_per_head} queries per KV head; at most 32 are supported")
        self.max_records = max_records
        self.spread_records = spread_records
        self.tile_rows = 16 if queries_per_head <= 16 else 32
        self.kv_heads = kv_heads
        self.queries_per_head = queries_per_head
        self.window = window
        capacity = HEADER + max_records * RECORD + max_blocks
        self._staged = StagedBuffer(capacity, torch.int32, device)
        self.buffer = self._staged.buffer
        counters = max(1, spread_records * kv_heads)
        self.counters = torch.zeros(counters, dtype=torch.int32, device=device)

    def load(self, spans: Sequence[SequenceSpan]) -> None:
        """Describe a step and start copying the description to the device.

        Raises:
            ValueError: The step is over a capacity given at construction.
        """
        words = self._words(spans)
        if words[0] > self.max_records:
            raise ValueError(f"the step has {words[0]} records; {self.max_records} are allocated")
        self._staged.load(words)

    def _words(self, spans: Sequence[SequenceSpan]) -> list[int]:
        blocks: list[int] = []
        spread: list[int] = []
        whole: list[int] = []
        chosen = self._chosen(spans)
        tokens_per_item = self.tile_rows // self.queries_per_head
        for number, span in enumerate(spans):
            blocks_at = HEADER + len(blocks)
            blocks.extend(span.blocks)
            for first in range(0, span.num_new, tokens_per_item):
                tokens = min(tokens_per_item, span.num_new - first)
                position = span.num_context + first
                begin, end = self._splits(span, position, tokens)
                item = (span.row_start + first, tokens, position, blocks_at, span.num_padding)
                if number in chosen:
                    run = (len(spread) // RECORD, end - begin)
                    for split in range(begin, end):
                        spread.extend((*item, split, split + 1, *run))
                else:
                    whole.extend((*item, begin, end, 0, 1))
        records = (len(spread) + len(whole)) // RECORD
        return [records, HEADER + len(blocks), 0, 0, *blocks, *spread, *whole]

    def _chosen(self, spans: Sequence[SequenceSpan]) -> set[int]:
        """Which sequences are spread."""
        tokens_per_item = self.tile_rows // self.queries_per_head
        sizes = []
        for number, span in enumerate(spans):
            begin, end = self._splits(span, span.num_context, span.num_new)
            items = -(-span.num_new // tokens_per_item)
            if end - begin > 1:
                sizes.append((items, begin - end, number))
        chosen, left = set(), self.spread_records
        for items, minus_splits, number in sorted(sizes):
            if items * -minus_splits <= left:
                chosen.add(number)
                left += items * minus_splits
        return chosen

    def _splits(self, span: SequenceSpan, position: int, tokens: int) -> tuple[int, int]:
        """Splits that any of the item's tokens sees; never empty."""
        first = span.num_padding
        if self.window is not None:
            first = max(first, position - self.window + 1)
        return first // SPLIT, (position + tokens - 1) // SPLIT + 1
