"""Matches regular expressions from uploaded configs without trusting them.

Python's ``re`` has no time limit and keeps the interpreter lock while it backtracks: one hostile
pattern would stop the whole server. Plain patterns are matched here; anything that can backtrack
is matched by a child interpreter with a limit of processor time and memory, one child at a time.
What was too slow once is not tried again: a config's patterns are matched more than once.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from turret.server.basics.confined.confined import Confined, ConfinedError
from turret.server.words import Text, say

# Processor time rather than elapsed time, so that a busy machine rejects no more patterns.
CPU_SECONDS = 2
MAX_CHILD_BYTES = 256 << 20
_MAX_ANSWER_BYTES = 64 << 20
_MAX_SLOW = 256
MAX_PATTERN_CHARS = 8192
# Without these characters a pattern has no repetition, group, class or alternative, so matching
# takes at most one step per character.
_BACKTRACKING = frozenset("*+?{}()[]|\\")
_PROGRAM = Path(__file__).with_name("pattern_program.py")

_one_child = threading.Lock()
# Recent patterns that exceeded a limit; guarded by the lock.
_too_slow: OrderedDict[Pattern, None] = OrderedDict()


@dataclass(frozen=True, slots=True)
class Pattern:
    """``re.<mode>(regex, name)``; ``plain`` is the part that came from the config."""

    mode: Literal["match", "fullmatch"]
    regex: str
    plain: str


@dataclass(frozen=True, slots=True)
class PatternResult:
    """One pattern over all names.

    Attributes:
        matches: Per name: None (no match), or the text of the group ``idx`` ("" without one).
        error: Why the pattern could not be used, or None.
    """

    matches: tuple[str | None, ...]
    error: Text | None = None


def match_all(patterns: Sequence[Pattern], names: Sequence[str]) -> list[PatternResult]:
    """Matches every pattern against every name.

    Returns:
        One result per pattern, in order. Never raises for a bad or slow pattern: that is an
        ``error`` in its result.
    """
    results: dict[int, PatternResult] = {}
    child: list[int] = []
    for i, pattern in enumerate(patterns):
        if len(pattern.plain) > MAX_PATTERN_CHARS:
            why = say("TOO_MANY_CHARACTERS", most=MAX_PATTERN_CHARS, found=len(pattern.plain))
            results[i] = PatternResult((None,) * len(names), why)
        elif _BACKTRACKING.isdisjoint(pattern.plain):
            results[i] = _match_here(pattern, names)
        else:
            child.append(i)
    if child:
        rows = _match_in_child([patterns[i] for i in child], names)
        results.update(zip(child, rows, strict=True))
    return [results[i] for i in range(len(patterns))]


def _match_here(pattern: Pattern, names: Sequence[str]) -> PatternResult:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            match = getattr(re.compile(pattern.regex), pattern.mode)
    except re.error as error:
        return _not_regular(pattern, len(names), str(error))
    found = (match(name) for name in names)
    return PatternResult(
        tuple(None if m is None else m.groupdict().get("idx") or "" for m in found)
    )


def _not_regular(pattern: Pattern, count: int, why: str) -> PatternResult:
    return PatternResult(
        (None,) * count,
        say("INVALID_ENTRY", entry=pattern.plain, why=say("PATTERN_INVALID", problem=why)),
    )


def _match_in_child(patterns: Sequence[Pattern], names: Sequence[str]) -> list[PatternResult]:
    """Runs one isolated interpreter (standard library only) over the patterns in order."""
    nothing: tuple[None, ...] = (None,) * len(names)
    slow = [PatternResult(nothing, say("SLOW_PATTERN", pattern=p.plain)) for p in patterns]
    untried = [PatternResult(nothing, say("UNTRIED_PATTERN", pattern=p.plain)) for p in patterns]
    with _one_child:
        if not _too_slow.keys().isdisjoint(patterns):
            return [slow[i] if p in _too_slow else untried[i] for i, p in enumerate(patterns)]
        child = Confined(
            _PROGRAM,
            cpu_seconds=CPU_SECONDS,
            max_bytes=MAX_CHILD_BYTES,
            max_answer_bytes=_MAX_ANSWER_BYTES,
        )
        is_over_limit = False
        try:
            answers = child.ask([[(p.mode, p.regex) for p in patterns], list(names)])
        except ConfinedError as error:
            answers, is_over_limit = error.answers, error.is_over_limit
        finally:
            child.close()
        rows = [
            _not_regular(pattern, len(names), answer["error"])
            if isinstance(answer, dict)
            else PatternResult(tuple(answer))
            for pattern, answer in zip(patterns, answers, strict=False)
        ]
        # The child works in order, so the first pattern without an answer is the one at fault.
        if len(rows) < len(patterns):
            if is_over_limit:
                _too_slow[patterns[len(rows)]] = None
            if len(_too_slow) > _MAX_SLOW:
                _too_slow.popitem(last=False)
            first = len(rows)
            rows += [slow[first], *untried[first + 1 :]]
        return rows
