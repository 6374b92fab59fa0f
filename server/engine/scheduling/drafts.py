"""The draft tokens of a step: which sequences get some, and the blocks for them. No torch.

What room a step has left, of tokens and of free blocks, goes to draft tokens
(``server/engine/speculation``). Nobody waits for one and nobody is preempted for one. What was
computed for those that turn out wrong is overwritten; blocks that hold nothing else are free again
after the step.
"""

from __future__ import annotations

from dataclasses import replace

from turret.server.engine.scheduling.block_pool import BlockPool
from turret.server.engine.scheduling.sequence import Scheduled, Sequence
from turret.server.engine.speculation import Speculation


class Drafts:
    """Adds draft tokens to steps.

    Attributes:
        is_paused: Whether none are added: the device had no memory for a step with some.

    Args:
        blocks: The KV blocks.
        speculation: Guesses for sequences that have a drafter; None for nobody.
    """

    def __init__(self, blocks: BlockPool, speculation: Speculation | None) -> None:
        self.is_paused = False
        self._blocks = blocks
        self._speculation = speculation

    def add(self, scheduled: list[Scheduled], new_blocks: list[int], max_tokens: int) -> None:
        """Give what a step has left to tokens that may turn out to be the next ones.

        Args:
            scheduled: What it computes in any case; items with a draft are replaced.
            new_blocks: Blocks that change owner with it; those of drafts are added.
            max_tokens: Most tokens that it may compute.
        """
        if self._speculation is None or self.is_paused:
            return
        num_rows = sum(item.num_new for item in scheduled)
        plan = self._speculation.plan(num_rows)
        budget = max_tokens - num_rows
        for number, item in enumerate(scheduled):
            sequence, drafter = item.sequence, item.sequence.drafter
            if drafter is None or sequence.num_computed < sequence.prompt_end or not item.samples:
                continue
            places = (len(sequence.blocks) + self._blocks.num_free) * self._blocks.block_size
            draft = plan.draft(drafter, min(budget, places - len(sequence.tokens)))
            if not draft:
                continue
            total = self._blocks.blocks_for(len(sequence.tokens) + len(draft))
            more = self._blocks.allocate(max(total - len(sequence.blocks), 0))
            assert more is not None, "there was room for all of it"
            sequence.blocks.extend(more)
            new_blocks.extend(more)
            scheduled[number] = replace(item, draft=draft)
            budget -= len(draft)

    def accepted(self, sequence: Sequence, count: int) -> None:
        """Learn how many tokens of a draft were right, and free the blocks of the others."""
        if sequence.drafter is not None:
            sequence.drafter.learn(count)
        self.take_back(sequence)

    def take_back(self, sequence: Sequence) -> None:
        """Free the blocks that hold nothing but draft tokens that were wrong."""
        kept = self._blocks.blocks_for(len(sequence.tokens))
        if kept < len(sequence.blocks):
            self._blocks.release(sequence.blocks[kept:])
            sequence.blocks = sequence.blocks[:kept]

    def ended(self, sequence: Sequence) -> None:
        """A sequence has run to its end."""
        if self._speculation is not None and sequence.drafter is not None:
            self._speculation.ended(sequence.drafter)
