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

from turret.kernels.paged_attention import SequenceSpan

HEADER = 4
RECORD = 8
ITEM = 4
# Positions per split, a multiple of the kernel's tile and of every block size.
SPLIT = 512


class AttentionTable:
    """Owns the device buffer. Not thread-safe.

    Attributes:
        buffer: ``[capacity]`` int32 on the device; its address never changes.
        max_records: Records of a step at most; kernels size their scratch by it.
        tile_rows: Query rows per item, 16 or 32 (larger tiles would take another MMA instruction
            and round differently).
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
        tile_rows: int = 16,
        spread: bool = True,
    ) -> None:
        """Allocate for the largest step.

        Args:
            max_records: Items times splits of a step (items alone if not ``spread``).
            max_blocks: KV blocks of all sequences of a step.
            queries_per_head: See the class.
            window: See the class.
            device: Where the kernels run.
            tile_rows: See the class.
            spread: One split per record (decode), or all in one (prefill).

        Raises:
            ValueError: ``tile_rows`` is neither 16 nor 32, or less than ``queries_per_head``.
        """
        if tile_rows not in (16, 32) or tile_rows < queries_per_head:
            raise ValueError(
                f"tile_rows is {tile_rows}; 16 and 32 are supported, at least {queries_per_head}"
            )
        self.max_records = max_records
        self.tile_rows = tile_rows
        self.queries_per_head = queries_per_head
        self.window = window
        self.spread = spread
        capacity = HEADER + max_records * (RECORD + ITEM) + max_blocks
        self.buffer = torch.zeros(capacity, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        # Two, so that a copy still under way is not overwritten by the next step's preparation.
        self._staging = [
            torch.zeros(capacity, dtype=torch.int32, pin_memory=pinned) for _ in range(2)
        ]
        self._step = 0

    def load(self, spans: Sequence[SequenceSpan]) -> None:
        """Describe a step and start copying the description to the device.

        Raises:
            ValueError: The step is over a capacity given at construction.
        """
        words = self._words(spans)
        staging = self._staging[self._step % 2]
        self._step += 1
        if len(words) > staging.numel() or words[0] > self.max_records:
            raise ValueError(
                f"the step has {words[0]} records and {len(words)} words; {self.max_records} and "
                f"{staging.numel()} are allocated"
            )
        staging[: len(words)] = torch.tensor(words, dtype=torch.int32)
        self.buffer[: len(words)].copy_(staging[: len(words)], non_blocking=True)

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
