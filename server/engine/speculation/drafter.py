"""Guesses how one answer goes on: from its prompt, from itself, from what its mix answered before.

Prompt lookup (A. Saxena, 2023; the copying of arXiv 2304.04487): an answer that extracts, quotes or
formats repeats runs of its prompt's tokens, so what followed there is a guess at what follows here.
Answers of one adapter resemble each other as well (retrieval, arXiv 2311.08252).
"""

from __future__ import annotations

from collections.abc import Hashable

from turret.server.engine.speculation.chances import Chances
from turret.server.engine.speculation.memory import START, MixMemory
from turret.server.engine.speculation.step_value import StepValue
from turret.server.engine.speculation.text_index import TextIndex

# Draft tokens per sequence and step. With the known token that is 16 rows, two groups of rows in
# the kernels.
MAX_DRAFT = 15
# Tokens of a sequence that are searched, prompt included.
_MAX_TOKENS = 1 << 14


class Drafter:
    """The drafts of one sequence. Used by the engine thread alone.

    Args:
        memory_key: Its adapters and the salt of its request: which memory it learns from.
        tokens: Its tokens, which only grow: those before ``start`` are none of the text, those from
            ``prompt_end`` on are the answer.
        start: See ``tokens``.
        prompt_end: See ``tokens``.
        max_tokens: Most tokens of the answer.
        end_ids: Tokens that end it; nothing after one is guessed.
    """

    def __init__(
        self,
        memory_key: Hashable,
        tokens: list[int],
        *,
        start: int,
        prompt_end: int,
        max_tokens: int,
        end_ids: frozenset[int],
    ) -> None:
        self.memory_key = memory_key
        self._tokens = tokens
        self._prompt_end = prompt_end
        self._last_end = prompt_end + max_tokens
        self._end_ids = end_ids
        self._index = TextIndex(tokens, start, most=_MAX_TOKENS)
        self._answer = [START]
        # The estimate that the last draft updates, once its result is known.
        self._learns: tuple[Chances, int, int] | None = None

    def draft(self, memory: MixMemory, value: StepValue, most: int) -> tuple[int, ...]:
        """Tokens that may follow, which are then part of the step that ``value`` is of.

        Args:
            memory: Of its mix.
            value: Says which of them are worth a row.
            most: How many the step has room for.
        """
        self._learns = None
        tokens = self._tokens
        # The step draws one token more than the draft has.
        most = min(most, MAX_DRAFT, self._last_end - len(tokens) - 1)
        if most <= 0:
            return ()
        self._read()
        place, match = self._index.find(tokens)
        earlier, earlier_match = memory.find(self._answer)
        chances = memory.own
        is_own = chances.of(match) >= memory.earlier.of(earlier_match)
        if not is_own:
            match, chances = earlier_match, memory.earlier
        if match == 0:
            return ()
        if not value.pays(chances.of(match)):
            if not chances.pass_over(match):
                return ()
            most = 1
        found = self._after(place, most) if is_own else memory.after(earlier, most)
        draft: list[int] = []
        reached = 1.0
        for number, token in enumerate(found):
            reached *= chances.of(match + number)
            if token in self._end_ids or (draft and not value.pays(reached)):
                break
            draft.append(token)
            value.add(reached)
        if draft:
            self._learns = chances, match, len(draft)
        return tuple(draft)

    def learn(self, num_accepted: int) -> None:
        """So many tokens of the last draft were right."""
        if self._learns is not None:
            chances, match, num_draft = self._learns
            chances.learn(match, num_draft, num_accepted)
            self._learns = None

    def end(self, memory: MixMemory) -> None:
        """The answer has ended: the mix's memory takes it in."""
        self._answer += self._tokens[self._prompt_end + len(self._answer) - 1 :]
        if len(self._answer) > 1:
            memory.add(self._answer)

    def _read(self) -> None:
        self._index.read()
        self._answer += self._tokens[self._prompt_end + len(self._answer) - 1 :]

    def _after(self, place: int, count: int) -> list[int]:
        """Tokens from a place of the text on; beyond its end, as if it went on repeating them."""
        found = self._tokens[place : place + count]
        period = len(self._tokens) - place
        while len(found) < count:
            found.append(found[len(found) - period])
        return found
