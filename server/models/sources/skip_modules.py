"""``--skip-modules``: the modules of a plain checkpoint that stay in 16 bits. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from turret.server.basics.names import closest
from turret.server.errors import InvalidRequestError
from turret.server.words import Text, say

# Never quantised, but usually listed in ``llm_int8_skip_modules``.
_HEAD = "lm_head"


def skipped_modules(patterns: Sequence[str], modules: Iterable[str]) -> frozenset[str]:
    """The modules that a pattern matches, by the rule of ``llm_int8_skip_modules``.

    A pattern is either a regular expression, which must match a path from its start up to a dot or
    to its end, or the text with which a path ends.

    Args:
        patterns: The patterns.
        modules: The paths of the modules that would be quantised. ``lm_head``, which never is, may
            be matched too.

    Raises:
        InvalidRequestError: A pattern matches no module.
    """
    paths = [*modules, _HEAD]
    found: set[str] = set()
    for pattern in patterns:
        matched = [path for path in paths if _matches(pattern, path)]
        if not matched:
            raise InvalidRequestError.of("skip_modules", _unknown(pattern, paths))
        found.update(matched)
    return frozenset(found)


def _matches(pattern: str, path: str) -> bool:
    if not pattern:
        return False
    if path.endswith(pattern):
        return True
    try:
        return re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", path) is not None
    except re.error:
        return False


def _unknown(pattern: str, paths: Sequence[str]) -> Text:
    leaves = dict.fromkeys(path.rpartition(".")[2] for path in paths)
    return say("UNKNOWN_MODULE", value=pattern, closest=closest(pattern, [*leaves, *paths]))
