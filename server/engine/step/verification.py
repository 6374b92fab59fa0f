"""Draws the tokens of a step whose drafts are checked, position after position.

A draft token was right if it is the token that is drawn in its place, from the logits after those
before it, with the request's own random number: what is drawn is what would have been drawn one
step after the other. It is exact matching and no rejection sampling (arXiv 2211.17192), which keeps
the distribution but not the tokens of a seed. The first token that differs from the draft is drawn
from right logits as well, and ends the draft.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch

from turret.server.engine.scheduling.sequence import Scheduled, Sequence
from turret.server.engine.step.executor import Draws
from turret.server.engine.step.masks import LateMask, Mask
from turret.server.engine.step.sampler import NOTHING_DRAWN, Draw
from turret.server.engine.step.vocabulary_plan import NOTHING_ADDED

NO_MORE_MASKS: Mapping[Sequence, Mask] = {}


@dataclass(slots=True)
class _Run:
    """A sequence's rows, and what has been drawn from them so far."""

    item: Scheduled
    first_row: int
    draws: list[Draw] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def take(self, draw: Draw) -> None:
        self.draws.append(draw)
        self.tokens.append(draw.token_id)

    @property
    def goes_on(self) -> bool:
        """Whether the next row is that of the token drawn last."""
        count = len(self.tokens)
        draft = self.item.draft
        return count <= len(draft) and draft[count - 1] == self.tokens[-1]


def draw_tokens(
    sampler: Draws,
    logits: torch.Tensor,
    items: SequenceOf[Scheduled],
    masks: Mapping[Sequence, Mask],
    added: Mapping[Sequence, torch.Tensor] = NOTHING_ADDED,
) -> list[list[Draw]]:
    """Draw at least one token for every sequence that samples in a step.

    Args:
        sampler: Draws from rows.
        logits: ``[samples, vocab]`` fp32: of each item a row, and one for each token of its draft;
            modified in place.
        items: What samples, in the order of the rows.
        masks: Of the sequences with a constraint, which have no drafts.
        added: See ``Computed``.

    Returns:
        For each item the tokens in order: those of its draft that were right, and one more.
    """
    runs: list[_Run] = []
    row = 0
    for item in items:
        runs.append(_Run(item, row))
        row += 1 + len(item.draft)
    if row == len(runs):
        sequences = [item.sequence for item in items]
        beyond = {sequence: rows[0] for sequence, rows in added.items()}
        draws = sampler.draw(logits, sequences, masks, NOTHING_DRAWN, beyond)
        return [[draw] for draw in draws]
    going = runs
    while going:
        rows = torch.tensor([run.first_row + len(run.tokens) for run in going])
        sequences = [run.item.sequence for run in going]
        drawn = {run.item.sequence: run.tokens for run in going}
        picked = logits.index_select(0, rows.to(logits.device))
        beyond = {s: added[s][len(drawn[s])] for s in sequences if s in added}
        draws = sampler.draw(picked, sequences, masks, drawn, beyond)
        for run, draw in zip(going, draws, strict=True):
            run.take(draw)
        going = [run for run in going if run.goes_on]
        masks = NO_MORE_MASKS
    return [run.draws for run in runs]


def likeliest_draws(
    items: SequenceOf[Scheduled], tokens: SequenceOf[int], masks: Mapping[Sequence, Mask]
) -> list[list[Draw]] | None:
    """The same where the token of every row is known.

    Args:
        items: See ``draw_tokens``.
        tokens: ``[samples]``: the likeliest of each row.
        masks: See ``draw_tokens``; late ones.

    Returns:
        None where a constraint says no to a token: then the logits have to tell.
    """
    drawn: list[list[Draw]] = []
    row = 0
    for item in items:
        token: int | None = tokens[row]
        mask = masks.get(item.sequence)
        if mask is not None:
            assert isinstance(mask, LateMask), "greedy"
            token = mask.settle(tokens[row])
        if token is None:
            return None
        run = _Run(item, row)
        run.take(Draw(token))
        while run.goes_on:
            run.take(Draw(tokens[row + len(run.tokens)]))
        drawn.append(run.draws)
        row += 1 + len(item.draft)
    return drawn
