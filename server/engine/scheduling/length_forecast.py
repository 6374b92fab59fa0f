"""Whether a sequence can be admitted without having to preempt one later. No torch.

A prompt that fits now may, beside others that grow, not fit for long: whoever is preempted then
is computed again. So the scheduler looks ahead, as the Past-Future scheduler does (arXiv
2507.10150): every answer is taken to become as long as one that ended lately, and the moments at
which sequences end are gone through for the one that takes most blocks. A wrong forecast costs a
preemption, or a place that stays empty for a while; nothing else depends on it.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from itertools import accumulate

from turret.server.engine.scheduling.sequence import Sequence

# Answers that the forecast is drawn from: enough for their spread, few enough to follow a change.
_WINDOW = 64


class LengthForecast:
    """Remembers how long answers became. Until one has ended, it foresees nothing."""

    def __init__(self) -> None:
        self._lengths: deque[int] = deque(maxlen=_WINDOW)
        # The seed is fixed so that runs can be repeated; its value does not matter.
        self._draw = random.Random(0)

    def ended(self, sequence: Sequence) -> None:
        """Learn from a sequence that ran to its end, whatever ended it."""
        if sequence.request.generates:
            self._lengths.append(sequence.num_generated)

    def tokens_left(self, sequence: Sequence) -> int:
        """How many tokens a sequence will still generate; drawn once, and again if it was wrong."""
        if not sequence.request.generates:
            return 0
        so_far = sequence.num_generated
        if sequence.forecast <= so_far:
            longer = [length for length in self._lengths if length > so_far]
            sequence.forecast = self._draw.choice(longer) if longer else so_far
            if sequence.request.stop.max_tokens is not None:
                sequence.forecast = min(sequence.forecast, sequence.request.stop.max_tokens)
        return max(sequence.forecast - so_far, 0)

    def peak_tokens(self, sequences: Iterable[Sequence], block_size: int) -> int:
        """Most positions that these sequences will hold at once, unused ones of blocks included.

        Memory is fullest just before one ends: then all that end later have grown as much as it.
        0 as long as no answer has ended.
        """
        if not self._lengths:
            return 0
        spans = sorted(((self.tokens_left(s), len(s.tokens)) for s in sequences), reverse=True)
        held = accumulate(tokens for _, tokens in spans)
        return max(
            (
                tokens + number * left + number * block_size // 2
                for number, ((left, _), tokens) in enumerate(zip(spans, held, strict=True), 1)
            ),
            default=0,
        )
