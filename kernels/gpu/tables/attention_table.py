"""Attention metadata of a step on the device, in one buffer of fixed address.

The queries of a sequence are cut into *items* of at most ``tile_rows`` query rows (new tokens times
the query heads of a KV head). A sequence's keys are cut into *splits* at fixed positions, multiples
of ``SPLIT``, whatever the batch: a record is an item with a run of splits. With one split a record
(decode), long contexts are spread over the device; with all in one (prefill), nothing is written in
between. Both add splits up in the same order, so the bits are the same::

    header   num_records · records@ · num_items · items@
    record   row · tokens · position · blocks@ · padding · split_begin · split_end · 0
    item     row · tokens · record_begin · record_end
    blocks   block numbers of the sequence …
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from turret.kernels.gpu.tables.staged_buffer import StagedBuffer
from turret.kernels.paged_attention import SequenceSpan

HEADER = 4
RECORD = 8
ITEM = 4
# Positions per split, a multiple of the kernel's tile and of every block size.
SPLIT = 256


class AttentionTable:
    """Owns the device buffer. Not thread-safe.

    Attributes:
        buffer: ``[capacity]`` int32 on the device; its address never changes.
        max_records: Records of a step at most; kernels size their scratch by it.
        tile_rows: Query rows per item: 16, or 32 where a KV head has more queries than that. One
            size for all steps of a model: sums over keys are shared out among the warps by it.
        queries_per_head: Query heads per KV head.
        window: Sliding window in tokens, or None.
    """

    def __init__(
        self,
        *,
        max_records: int,
        max_blocks: int,
        queries_per_head: int,
        window: int | None,
        device: torch.device,
        spread: bool = True,
    ) -> None:
        """Allocate for the largest step.

        Args:
            max_records: Items times splits of a step (items alone if not ``spread``).
            max_blocks: KV blocks of all sequences of a step.
            queries_per_head: See the class.
            window: See the class.
            device: Where the kernels run.
            spread: One split per record (decode), or all in one (prefill).

        Raises:
            ValueError: ``queries_per_head`` is over 32.
        """
        if queries_per_head > 32:
            raise ValueError(f"{queries_per_head} queries per KV head; at most 32 are supported")
        self.max_records = max_records
        self.tile_rows = 16 if queries_per_head <= 16 else 32
        self.queries_per_head = queries_per_head
        self.window = window
        self.spread = spread
        capacity = HEADER + max_records * (RECORD + ITEM) + max_blocks
        self._staged = StagedBuffer(capacity, torch.int32, device)
        self.buffer = self._staged.buffer

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
        records: list[int] = []
        items: list[int] = []
        tokens_per_item = self.tile_rows // self.queries_per_head
        for span in spans:
            blocks_at = HEADER + len(blocks)
            blocks.extend(span.blocks)
            for first in range(0, span.num_new, tokens_per_item):
                tokens = min(tokens_per_item, span.num_new - first)
                position = span.num_context + first
                begin, end = self._splits(span, position, tokens)
                runs = [(s, s + 1) for s in range(begin, end)] if self.spread else [(begin, end)]
                first_record = len(records) // RECORD
                for run in runs:
                    records.extend((span.row_start + first, tokens, position, blocks_at))
                    records.extend((span.num_padding, *run, 0))
                items.extend((span.row_start + first, tokens))
                items.extend((first_record, first_record + len(runs)))
        records_at = HEADER + len(blocks)
        items_at = records_at + len(records)
        counts = (len(records) // RECORD, records_at, len(items) // ITEM, items_at)
        return [*counts, *blocks, *records, *items]

    def _splits(self, span: SequenceSpan, position: int, tokens: int) -> tuple[int, int]:
        """Splits that any of the item's tokens sees; never empty."""
        first = span.num_padding
        if self.window is not None:
            first = max(first, position - self.window + 1)
        return first // SPLIT, (position + tokens - 1) // SPLIT + 1
