"""Drafts with a controlled share of right tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from unittest.mock import patch

from turret.server.engine.speculation import Drafter, MixMemory, StepPlan

MAX_RIGHT = 11


class PlantedDrafts:
    """Drafts tokens from known answers, and sometimes a wrong token.

    Args:
        answers: Prompt → the tokens of its answer. Other prompts get no drafts.
        vocab_size: The vocabulary size of the model.
        seed: The seed of wrong tokens.

    Attributes:
        num_draft: The number of tokens in all drafts.
        num_right: The number of those before the first wrong one.
    """

    def __init__(
        self, answers: Mapping[tuple[int, ...], Sequence[int]], vocab_size: int, seed: int = 0
    ) -> None:
        self._answers = answers
        self._vocab_size = vocab_size
        self._random = random.Random(seed)
        self.num_draft = self.num_right = 0

    def draft(
        self, drafter: Drafter, _memory: MixMemory, _plan: StepPlan, most: int
    ) -> tuple[int, ...]:
        """Replaces ``Drafter.draft``, with the maximum length."""
        tokens, end = drafter._tokens, drafter._prompt_end
        start = drafter._index._start
        most = min(most, drafter._last_end - len(tokens) - 1)
        answer = self._answers.get(tuple(tokens[start:end]))
        if answer is None or most <= 0:
            return ()
        known = len(tokens) - end
        right = list(answer[known : known + self._random.randint(0, MAX_RIGHT)])
        draft = right[:most]
        self.num_right += len(draft)
        if known + len(draft) < len(answer):
            wrong = (answer[known + len(draft)] + 1) % self._vocab_size
            noise = [self._random.randrange(self._vocab_size) for _ in range(3)]
            draft = [*draft, wrong, *noise][: min(most, len(draft) + self._random.randint(0, 4))]
        self.num_draft += len(draft)
        return tuple(draft)

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Make every drafter use these drafts."""

        def draft(
            drafter: Drafter, memory: MixMemory, plan: StepPlan, most: int
        ) -> tuple[int, ...]:
            return self.draft(drafter, memory, plan, most)

        with patch.object(Drafter, "draft", draft):
            yield
