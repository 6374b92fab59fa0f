"""Speculative decoding: drafts from earlier text, and statistics that show when drafts pay off."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence

# Initial probabilities by the number of agreeing tokens, from experience with answers that extract
# or format parts of their prompt. If they are too high, a few rows are wasted until the averages
# adapt.
_PRIOR = (0.0, 0.15, 0.35, 0.5, 0.65, 0.75, 0.8, 0.85, 0.9)
# Weight of a new observation in the exponential average.
_RATE = 0.2
# Upper bound of a probability: any answer may end.
_MOST = 0.97
# If drafts do not pay off, one token is still tried after this many skipped drafts.
_TRY_EVERY = 32


class Chances:
    """The chance that a draft token is right: an exponential average for each length of a match.

    All requests of a mix share these averages.
    """

    def __init__(self) -> None:
        self._chances = list(_PRIOR)
        self._passed_over = [0] * (MAX_MATCH + 1)

    def of(self, match: int) -> float:
        """The chance that the token after ``match`` agreeing tokens is right."""
        return min(self._chances[min(match, MAX_MATCH)], _MOST)

    def pass_over(self, match: int) -> bool:
        """Record a draft that does not pay off; returns whether to try it anyway, as a test."""
        self._passed_over[match] += 1
        if self._passed_over[match] < _TRY_EVERY:
            return False
        self._passed_over[match] = 0
        return True

    def learn(self, match: int, num_draft: int, num_accepted: int) -> None:
        """Learn from a draft that was checked.

        Args:
            match: The number of agreeing tokens before the draft; right tokens extend the match.
            num_draft: The number of draft tokens.
            num_accepted: The number of draft tokens that were right, up to the first wrong one.
        """
        for number in range(min(num_accepted + 1, num_draft)):
            place = min(match + number, MAX_MATCH)
            found = 1.0 if number < num_accepted else 0.0
            self._chances[place] += _RATE * (found - self._chances[place])


# Search for earlier occurrences of a text's last tokens.

# Maximum number of tokens to compare at one position. A longer match does not predict better.
MAX_MATCH = 8
# Maximum number of positions to compare for one token, the latest first.
_MAX_PLACES = 16


class TextIndex:
    """Finds where the last tokens of a text occur in an indexed text, which may be the same text.

    A dictionary maps each token to its latest position, and a table maps each position to the
    previous one of the same token. A token is added in constant time and takes about forty bytes.

    Args:
        tokens: The text, which may only grow at its end.
        start: Where the text begins in ``tokens``.
        most: Number of tokens to remember; at twice as many, all but the last ``most`` are dropped.
    """

    def __init__(self, tokens: Sequence[int], start: int = 0, *, most: int) -> None:
        self._tokens = tokens
        self._start = start
        self._most = most
        # Token → the index after its latest position, where the token that follows it is.
        self._latest: dict[int, int] = {}
        # Index minus ``_start`` → the index after the previous position of the token before it, or
        # -1.
        self._before = array("q")

    def read(self) -> None:
        """Index the tokens that were added to the text."""
        tokens = self._tokens
        if len(tokens) - self._start > 2 * self._most:
            self._start = len(tokens) - self._most
            self._latest.clear()
            self._before = array("q")
        latest, before = self._latest, self._before
        if not before and len(tokens) > self._start:
            before.append(-1)
        # An entry needs the token's follower, so the last token of the text is not indexed yet.
        for index in range(self._start + len(before), len(tokens)):
            token = tokens[index - 1]
            before.append(latest.get(token, -1))
            latest[token] = index

    def find(self, tail: Sequence[int]) -> tuple[int, int]:
        """The position with the longest match between the tokens before it and the end of ``tail``.

        Args:
            tail: At least one token; the text itself, or another.

        Returns:
            The index of the token that follows the match, and the number of matching tokens, at
            most ``MAX_MATCH``. Of equal matches, the latest one. (0, 0) if there is none.
        """
        tokens, end = self._tokens, len(tail) - 1
        best, longest = 0, 0
        place = self._latest.get(tail[end], -1)
        for _ in range(_MAX_PLACES):
            if place < 0:
                break
            last = place - 1
            most, match = min(MAX_MATCH, place - self._start, len(tail)), 1
            while match < most and tokens[last - match] == tail[end - match]:
                match += 1
            if match > longest:
                best, longest = place, match
                if match == MAX_MATCH:
                    break
            place = self._before[place - self._start]
        return best, longest


# The fixed cost of a step relative to the cost of a row. It depends on machine, model and compute
# path, so it is measured.

# Initial guess of a step's fixed cost, in rows. A decode step reads all weights, however few its
# rows, and a CPU can compute several rows in that time.
_FIRST = 7.0
_LEAST_ROWS, _MOST_ROWS = 0.5, 64.0
# Weight of a new step in the average, and the spread of rows at which the measurements count as
# much as the initial guess.
_COST_RATE = 0.02
_SPREAD = 1.0


class StepCost:
    """A line fitted to recent decode steps, seconds over rows, with exponential weights.

    Attributes:
        fixed_rows: The fixed cost of a step in rows: the line is zero at minus this number of rows.
            It is between 0.5 and 64, and 7 until there are enough steps with different numbers of
            rows.
    """

    def __init__(self) -> None:
        self.fixed_rows = _FIRST
        self._rows = self._seconds = self._spread = self._slope = 0.0
        self._is_first = True

    def took(self, num_rows: int, seconds: float) -> None:
        """Learn from a step that computed only decode rows."""
        if self._is_first:
            self._is_first = False
            self._rows, self._seconds = float(num_rows), seconds
            return
        # West's update formulas (1979), with weights that decay.
        more_rows, more_seconds = num_rows - self._rows, seconds - self._seconds
        self._rows += _COST_RATE * more_rows
        self._seconds += _COST_RATE * more_seconds
        kept = 1.0 - _COST_RATE
        self._spread = kept * (self._spread + _COST_RATE * more_rows * more_rows)
        self._slope = kept * (self._slope + _COST_RATE * more_rows * more_seconds)
        self._fit()

    def _fit(self) -> None:
        if self._spread <= 0.0 or self._seconds <= 0.0:
            return
        # Least squares. The initial guess counts like observations with the spread ``_SPREAD`` on
        # the line that passes through the mean and has the fixed cost ``_FIRST``.
        guess = self._seconds / (_FIRST + self._rows)
        seconds_per_row = (self._slope + _SPREAD * guess) / (self._spread + _SPREAD)
        rows = self._seconds / seconds_per_row - self._rows if seconds_per_row > 0.0 else _MOST_ROWS
        self.fixed_rows = min(max(rows, _LEAST_ROWS), _MOST_ROWS)


# With more rows than this in a step, drafts included, no more drafts are added: large steps are
# bound by computing, and every draft row computes logits of the whole vocabulary.
_MAX_ROWS = 96


class StepPlan:
    """Decides whether one more draft token in a step is worth its row.

    A step of ``r`` rows takes the time of ``fixed_rows + r`` rows. A draft token pays off if its
    chance is higher than the number of tokens that the step produces per row of time. So a single
    request drafts if one in eight tokens is right, but 64 requests only if nine in ten are.

    Args:
        num_rows: Rows of the step without drafts.
        fixed_rows: See ``StepCost``.

    Attributes:
        num_rows: Rows of the step, drafts included.
    """

    def __init__(self, num_rows: int, fixed_rows: float) -> None:
        self.num_rows = num_rows
        self._fixed_rows = fixed_rows
        self._tokens = float(num_rows)

    def pays(self, chance: float) -> bool:
        """Whether a token that is right with this chance is worth its row."""
        return chance * (self._fixed_rows + self.num_rows) > self._tokens

    def add(self, chance: float) -> None:
        """Count one more row in the step, for a token that is right with this chance."""
        self._tokens += chance
        self.num_rows += 1


# A memory of a mix's recent answers, because answers of one adapter resemble each other.

# Marks the beginning of an answer; no token has this id.
START = -1
# Number of tokens of earlier answers that a memory keeps when it is cut, and maximum number of
# memories. Together they take a few tens of megabytes, or a hundred if all tokens differ.
_MAX_TOKENS = 4096
_MAX_MEMORIES = 128


class MixMemory:
    """Earlier answers of one mix, and how often drafts for it were right.

    Attributes:
        own: The chances of drafts from a request's own text.
        earlier: The chances of drafts from earlier answers.
    """

    def __init__(self) -> None:
        self.own = Chances()
        self.earlier = Chances()
        self._tokens = array("i")
        self._index = TextIndex(self._tokens, most=_MAX_TOKENS)

    def find(self, answer: Sequence[int]) -> tuple[int, int]:
        """Like ``TextIndex.find``; ``answer`` begins with ``START``."""
        return self._index.find(answer)

    def after(self, place: int, count: int) -> list[int]:
        """At most ``count`` tokens from a place on, to the end of the answer there."""
        found = self._tokens[place : place + count].tolist()
        return found[: found.index(START)] if START in found else found

    def add(self, answer: Sequence[int]) -> None:
        """Remember an answer, which begins with ``START``."""
        if len(self._tokens) > 2 * _MAX_TOKENS:
            self._tokens = self._tokens[-_MAX_TOKENS:]
            self._index = TextIndex(self._tokens, most=_MAX_TOKENS)
        self._tokens.extend(answer[: 1 + _MAX_TOKENS])
        self._index.read()


# Drafts for one answer: from its prompt, from its own text, and from earlier answers of its mix.
#
# Prompt lookup (A. Saxena, 2023; the copying of arXiv 2304.04487): an answer that extracts, quotes
# or formats text repeats runs of its prompt's tokens. The tokens that followed a run in the prompt
# are a guess at the next tokens of the answer. Answers of one adapter also resemble each other
# (retrieval, arXiv 2311.08252).

# Maximum number of draft tokens per sequence and step. With the known token, these are 16 rows,
# which are two groups of rows in the kernels.
MAX_DRAFT = 15
# Tokens of a sequence that are searched, prompt included.
_MAX_SEARCHED = 1 << 14


class Drafter:
    """The drafts of one sequence. Used by the engine thread alone.

    Args:
        memory_key: The adapters and the salt of the request, which identify its ``MixMemory``.
        tokens: Its tokens, which only grow. The text begins at ``start``, the answer at
            ``prompt_end``.
        start: See ``tokens``.
        prompt_end: See ``tokens``.
        max_tokens: Maximum number of tokens of the answer.
        end_ids: Tokens that end the answer; a draft ends before them.
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
        self._index = TextIndex(tokens, start, most=_MAX_SEARCHED)
        self._answer = [START]
        # The estimate that the last draft updates, once its result is known.
        self._learns: tuple[Chances, int, int] | None = None

    def draft(self, memory: MixMemory, plan: StepPlan, most: int) -> tuple[int, ...]:
        """Draft the next tokens, and count them in the step.

        Args:
            memory: The memory of the sequence's mix.
            plan: Decides which tokens are worth a row.
            most: The number of tokens for which the step has room.
        """
        self._learns = None
        tokens = self._tokens
        # The step draws one token more than the draft has.
        most = min(most, MAX_DRAFT, self._last_end - len(tokens) - 1)
        if most <= 0:
            return ()
        self._read()
        self._index.read()
        place, match = self._index.find(tokens)
        earlier, earlier_match = memory.find(self._answer)
        chances = memory.own
        is_own = chances.of(match) >= memory.earlier.of(earlier_match)
        if not is_own:
            match, chances = earlier_match, memory.earlier
        if match == 0:
            return ()
        if not plan.pays(chances.of(match)):
            if not chances.pass_over(match):
                return ()
            most = 1
        found = self._after(place, most) if is_own else memory.after(earlier, most)
        draft: list[int] = []
        reached = 1.0
        for number, token in enumerate(found):
            reached *= chances.of(match + number)
            if token in self._end_ids or (draft and not plan.pays(reached)):
                break
            draft.append(token)
            plan.add(reached)
        if draft:
            self._learns = chances, match, len(draft)
        return tuple(draft)

    def learn(self, num_accepted: int) -> None:
        """Learn how many tokens of the last draft were right."""
        if self._learns is not None:
            chances, match, num_draft = self._learns
            chances.learn(match, num_draft, num_accepted)
            self._learns = None

    def end(self, memory: MixMemory) -> None:
        """Add the ended answer to the mix's memory."""
        self._read()
        if len(self._answer) > 1:
            memory.add(self._answer)

    def _read(self) -> None:
        """Add the new tokens of the answer."""
        self._answer += self._tokens[self._prompt_end + len(self._answer) - 1 :]

    def _after(self, place: int, count: int) -> list[int]:
        """Tokens from a place of the text on; beyond the text's end, these tokens repeat."""
        found = self._tokens[place : place + count]
        period = len(self._tokens) - place
        while len(found) < count:
            found.append(found[len(found) - period])
        return found


# The drafts of all sequences.


class Speculation:
    """Costs and chances for the drafts of all sequences. Used by the engine thread alone.

    Args:
        cost: The cost of a step's rows.
        remembers: Whether drafts also come from earlier answers with the same memory key.
    """

    def __init__(self, cost: StepCost, *, remembers: bool = True) -> None:
        self._cost = cost
        self._remembers = remembers
        # The most recently used memories, one for each mix and salt.
        self._memories: OrderedDict[Hashable, MixMemory] = OrderedDict()

    def plan(self, num_rows: int) -> StepPlan:
        """Begin the drafts of a step, which has this many rows without them."""
        return StepPlan(num_rows, self._cost.fixed_rows)

    def draft(self, drafter: Drafter, plan: StepPlan, most: int) -> tuple[int, ...]:
        """Draft at most this many tokens for a sequence; often none."""
        most = min(most, _MAX_ROWS - plan.num_rows)
        return drafter.draft(self.memory(drafter.memory_key), plan, most) if most > 0 else ()

    def ended(self, drafter: Drafter) -> None:
        """Remember the answer of a sequence that ran to its end, if answers are remembered."""
        if self._remembers:
            drafter.end(self.memory(drafter.memory_key))

    def memory(self, key: Hashable) -> MixMemory:
        """The memory for a key; a new one is empty."""
        if key not in self._memories:
            self._memories[key] = MixMemory()
            if len(self._memories) > _MAX_MEMORIES:
                self._memories.popitem(last=False)
        self._memories.move_to_end(key)
        return self._memories[key]
