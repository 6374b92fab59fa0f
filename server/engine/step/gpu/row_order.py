"""The order of a step's rows: how each is multiplied depends on its own sequence alone."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from turret.server.engine.scheduling.scheduler import Scheduled
from turret.server.engine.scheduling.sequence import Sequence
from turret.server.engine.step.rows import Placed

# Prompts with at most this many positions are multiplied like decoding rows.
_SHORT_PROMPT = 64


def generates(sequence: Sequence) -> bool:
    """Whether its one new row is the last generated token's, so that the next is drawn from it."""
    return sequence.prompt_end <= sequence.num_computed == len(sequence.tokens) - 1


def in_order(items: SequenceOf[Scheduled]) -> list[Placed]:
    """Their rows, those that are fused before the others (see ``nf4_gpu.py``)."""
    placed, row = [], 0
    for item in sorted(items, key=lambda item: not is_fused(item)):
        placed.append(Placed(item, row))
        row += item.num_new
    return placed


def is_fused(item: Scheduled) -> bool:
    """Whether its rows go through ``nf4_matmul``: what decodes, and short prompts.

    A step with any other row writes all weights out, which costs every row of it more than many
    decode steps. The whole prompt decides, not the chunk: how a prompt is cut depends on the batch.
    """
    sequence = item.sequence
    return sequence.num_computed >= sequence.prompt_end or sequence.prompt_end <= _SHORT_PROMPT
