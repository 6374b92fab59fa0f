"""Drafts that are right as often and as far as a test wants them to be."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from unittest.mock import patch

from turret.server.engine.speculation import Drafter, MixMemory, StepValue

MAX_RIGHT = 11


class PlantedDrafts:
    """Takes drafts from known answers, and now and then puts a wrong token into one.

    Args:
        answers: Prompt → the tokens of its answer. A prompt that is not there gets no drafts.
        vocab_size: Of the model.
        seed: Of what is right and wrong.

    Attributes:
        num_draft: Tokens of all drafts.
        num_right: Those of them that come before the first wrong one.
    """

    def __init__(
        self, answers: Mapping[tuple[int, ...], Sequence[int]], vocab_size: int, seed: int = 0
    ) -> None:
        self._answers = answers
        self._vocab_size = vocab_size
        self._random = random.Random(seed)
        self.num_draft = self.num_right = 0

    def draft(
        self, drafter: Drafter, _memory: MixMemory, _value: StepValue, most: int
    ) -> tuple[int, ...]:
        """In place of ``Drafter.draft``; as long as it may be, and no longer."""
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
        """Every drafter drafts so."""

        def draft(
            drafter: Drafter, memory: MixMemory, value: StepValue, most: int
        ) -> tuple[int, ...]:
            return self.draft(drafter, memory, value, most)

        with patch.object(Drafter, "draft", draft):
            yield
