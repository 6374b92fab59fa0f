"""Matches regular expressions from uploaded configs without trusting them.

Python's ``re`` has no time limit and keeps the interpreter lock while it backtracks: one hostile
pattern would stop the whole server. Plain patterns are matched here; anything that can backtrack
is matched by a child interpreter that is killed when it takes too long.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

TIMEOUT_SECONDS = 5.0
MAX_PATTERN_CHARS = 8192
# Without these characters a pattern has no repetition, group, class or alternative, so matching
# takes at most one step per character.
_BACKTRACKING = frozenset("*+?{}()[]|\\")
_CHILD = """
import json, re, sys, warnings
warnings.simplefilter("ignore")
jobs, names = json.load(sys.stdin)
for mode, pattern in jobs:
    try:
        match = getattr(re.compile(pattern), mode)
    except (re.error, RecursionError, OverflowError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
        continue
    found = [match(name) for name in names]
    row = [None if m is None else m.groupdict().get("idx") or "" for m in found]
    print(json.dumps(row), flush=True)
"""


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
    error: str | None = None


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
            why = f"pattern is longer than {MAX_PATTERN_CHARS} characters"
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
        return PatternResult((None,) * len(names), f"is not a regular expression: {error}")
    found = (match(name) for name in names)
    return PatternResult(
        tuple(None if m is None else m.groupdict().get("idx") or "" for m in found)
    )


def _match_in_child(patterns: Sequence[Pattern], names: Sequence[str]) -> list[PatternResult]:
    """Runs one isolated interpreter (standard library only) over the patterns in order."""
    jobs = [(pattern.mode, pattern.regex) for pattern in patterns]
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        output, _ = process.communicate(json.dumps([jobs, list(names)]), timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
    rows: list[PatternResult] = []
    for line in output.splitlines()[: len(patterns)]:
        row = json.loads(line)
        if isinstance(row, dict):
            rows.append(
                PatternResult((None,) * len(names), f"is not a regular expression: {row['error']}")
            )
        else:
            rows.append(PatternResult(tuple(row)))
    # The child works in order and reports as it goes: the first without an answer is the culprit.
    slow = PatternResult((None,) * len(names), "cannot be matched in reasonable time")
    unknown = PatternResult((None,) * len(names), "was not checked: another pattern is too slow")
    while len(rows) < len(patterns):
        rows.append(slow if slow not in rows else unknown)
    return rows
