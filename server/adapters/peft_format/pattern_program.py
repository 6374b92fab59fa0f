"""Matches regular expressions; runs in a confined child process."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence


def answers(job: tuple[Sequence[tuple[str, str]], Sequence[str]]) -> Iterator[object]:
    """Yield the matches of each pattern (see ``PatternResult``) or its error."""
    warnings.simplefilter("ignore")
    patterns, names = job
    for mode, pattern in patterns:
        try:
            match = getattr(re.compile(pattern), mode)
        except (re.error, RecursionError, OverflowError) as error:
            yield {"error": str(error)}
            continue
        found = [match(name) for name in names]
        yield [None if m is None else m.groupdict().get("idx") or "" for m in found]
